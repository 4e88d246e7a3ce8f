"""A model is asked in the words that it was trained on, and stops where it learnt to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ft_core.data import render_prompt, tokenize_rows

QUIET: dict[str, Any] = {"say": lambda line: None}


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with another end-of-text token than the one that its chat template ends a turn with."""
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    for name, changes in (
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
        ("config.json", {"eos_token_id": 2}),
        ("generation_config.json", {"eos_token_id": 2}),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return folder


def test_a_base_model_stops_where_it_learnt_to(
    base: Path, sums: Any, write_rows: Any, tmp_path: Path, metrics: Any
) -> None:
    """In ft, in which nothing but the answer is said, and in plain transformers, which the saved model tells where."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ft_core.generation import encode_prompt, generate_ids, stream
    from ft_core.models.opening import open_model
    from ft_core.training import train

    rows = sums(8)
    training = {
        "max_steps": 60, "batch_size": 8, "gradient_accumulation": 1, "learning_rate": 5e-3, "optimizer": "adamw_torch",
    }  # fmt: skip
    run = tmp_path / "run"
    values = {
        "model": str(base), "data": str(write_rows(tmp_path / "rows.jsonl", rows)), "max_length": 64, "lora": None,
        "packing": False, "training": training, "output": str(run),
    }  # fmt: skip
    train(values, **QUIET)
    model, tokenizer = open_model(str(run), **QUIET)
    asked = [render_prompt(row, tokenizer) for row in rows]
    ids = [encode_prompt(prompt, tokenizer) for prompt, _ in asked]
    assert generate_ids(model, tokenizer, ids, max_new_tokens=30) == [expected for _, expected in asked]
    assert "".join(stream(model, tokenizer, rows[0]["messages"][:1], max_new_tokens=30)) == asked[0][1]
    saved = json.loads((run / "model" / "generation_config.json").read_text(encoding="utf-8"))
    assert saved["eos_token_id"] == [2, 1]
    plain = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    for one, (_, expected) in zip(ids, asked, strict=True):
        out = plain.generate(torch.tensor([one]), max_new_tokens=30, do_sample=False)[0, len(one) :]
        assert tokenizer.decode(out) == f"{expected}<|im_end|>"


ALPACA = [
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"instruction": "Add 4 and 4.", "input": "", "output": "8"},
]


@pytest.fixture
def untold(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model without a chat template, whose tokenizer puts a token before each text."""
    folder = Path(shutil.copytree(tiny, tmp_path / "untold"))
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}},
    }
    path.write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_a_model_trained_on_alpaca_rows_is_asked_in_alpacas_words(
    untold: Path, ft: Any, configure: Any, write_rows: Any, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from ft_core.data import read_rows
    from ft_core.generation import encode_prompts
    from ft_core.models.opening import open_model

    data = write_rows(tmp_path / "alpaca.jsonl", ALPACA * 4)
    held_out = write_rows(tmp_path / "held_out.jsonl", ALPACA)
    words = (f"eval_data={held_out}", "training.max_steps=1")
    done = ft("train", configure(model=str(untold), data=str(data), max_length=400), *words)
    assert done.code == 0, done.err
    assert "the tokenizer is saved with Alpaca's prompt as its chat template" in done.err
    run = tmp_path / "run"
    model, tokenizer = open_model(str(run), **QUIET)
    before = AutoTokenizer.from_pretrained(untold)
    rows = list(read_rows(str(data), ["alpaca"], seed=0))[:2]
    trained = tokenize_rows(rows, before, max_length=400)
    # What is typed is the instruction; the prompt is that of training to the last token.
    asked = encode_prompts(model, tokenizer, [ALPACA[1]["instruction"]])[0]
    document = trained[1]
    assert document["input_ids"][: len(asked)] == asked
    assert document["labels"][len(asked)] != -100 == document["labels"][len(asked) - 1]
    assert asked.count(0) == 1  # the beginning-of-sequence token
    whole = tokenizer.apply_chat_template(rows[1]["messages"], tokenize=False)
    assert tokenizer(whole, add_special_tokens=False)["input_ids"] == document["input_ids"]
    # The template cannot tell an input from its instruction; rows have both apart and are measured as trained.
    assert list(tokenize_rows(rows, tokenizer, max_length=400)) == list(trained)
    assert [render_prompt(row, tokenizer) for row in rows] == [render_prompt(row, before) for row in rows]
    first = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    again = json.loads(ft("eval", run, "--json").out)
    for side in ("before", "after"):
        assert again["metrics"]["loss"][side] == pytest.approx(first["metrics"]["loss"][side], abs=1e-6)


def test_a_conversation_in_alpacas_words(untold: Path) -> None:
    from transformers import AutoTokenizer

    from ft_core.data.rendering import ALPACA_PROMPT, alpaca_template
    from ft_core.errors import DataError
    from ft_core.generation import render_chat

    tokenizer = AutoTokenizer.from_pretrained(untold)
    row = {"messages": [], "alpaca": {"instruction": "a", "input": ""}}
    assert alpaca_template(tokenizer, [{"text": "a"}]) is None
    tokenizer.chat_template = alpaca_template(tokenizer, [{"text": "a"}, row])
    assert alpaca_template(tokenizer, [row]) is None  # there is one
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    first = f"<|im_start|>{ALPACA_PROMPT.format(instruction='a')}b<|im_end|>"
    assert render_chat(turns, tokenizer) == f"{first}\n\n### Instruction:\nc\n\n### Response:\n"
    system = {"role": "system", "content": "Be brief."}
    assert render_chat([system, turns[0]], tokenizer) == (
        "<|im_start|>Be brief.\n\n### Instruction:\na\n\n### Response:\n"
    )
    with pytest.raises(DataError, match="allowed are a system message at the beginning, user and assistant"):
        render_chat([turns[0], system], tokenizer)


def test_a_length_that_nobody_set_is_the_models(ft: Any, configure: Any, tmp_path: Path) -> None:
    """Also on resuming, from the same configuration."""
    import yaml

    path = configure(training={"max_steps": 2})
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    del values["max_length"]
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = ft("train", path)
    assert done.code == 0, done.err
    assert "max_length is 512: tiny has no more positions\n" in done.err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["max_length"] == 512
    assert ft("train", path, "training.max_steps=3", "--resume").code == 0
    refused = ft("train", path, "max_length=2048", "--overwrite")
    assert refused.code == 2
    assert refused.message.startswith("ft train: max_length 2048 is more than the 512 positions of ")


def test_rows_with_an_empty_text_are_counted(ft: Any, configure: Any, tmp_path: Path, write_rows: Any) -> None:
    rows = [{"text": ""}, {"text": "hello"}, {"text": " \n"}, {"prompt": "a " * 100, "completion": "b"}]
    data = write_rows(tmp_path / "text.jsonl", [{"text": ""}, {"text": "hello"}, {"text": " \n"}])
    long = write_rows(tmp_path / "long.jsonl", rows[3:])
    done = ft("train", configure(data=[str(data), str(long)]), "training.max_steps=1")
    assert done.code == 0, done.err
    assert "2 train rows were left out: their text is empty\n" in done.err
    assert "1 train row was left out: no token of its answer is within max_length\n" in done.err
    bare = ft("train", configure(data=str(write_rows(tmp_path / "no.jsonl", rows[:1]))), "--overwrite")
    assert bare.message == (
        "ft train: none of 1 row has a trained token within max_length 64 (0 are longer, 1 has an empty text): raise "
        "max_length or look at the data"
    )
