"""Answers in batches are the answers one by one, and a file of answers that was cut is completed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import DataError, RunError
from ft_core.generation import encode_prompt, generate, generate_ids, render_chat, stop_ids, stream
from ft_core.memory import enough_memory

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PROMPTS = ["add 3 and 4", "a", "please " * 20, "what is it that you want from me today?", "b c", "add 30 and 14"]


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    from ft_core.models import load

    return load(tiny, dtype="float32")


def test_a_batch_gives_the_answers_of_its_prompts_alone(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert together == alone
    assert len(set(alone)) == len(PROMPTS)  # so the order is seen
    backwards = generate(model, tokenizer, PROMPTS[::-1], max_new_tokens=12)
    assert backwards == alone[::-1]


@pytest.mark.parametrize("batch_tokens", [1, 60, 200])
def test_batches_of_any_size(loaded: tuple[Any, Any], batch_tokens: int) -> None:
    model, tokenizer = loaded
    ids = [encode_prompt(prompt, tokenizer) for prompt in PROMPTS]
    seen: list[tuple[int, int]] = []
    answers = generate_ids(
        model,
        tokenizer,
        ids,
        max_new_tokens=5,
        batch_tokens=batch_tokens,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert answers == generate_ids(model, tokenizer, ids, max_new_tokens=5)
    assert seen[0] == (0, 6)
    assert seen[-1] == (6, 6)
    assert generate_ids(model, tokenizer, [], max_new_tokens=5) == []


def test_greedy_answers_are_the_likeliest_tokens(loaded: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = loaded
    ids = encode_prompt("add 3", tokenizer)
    expected = list(ids)
    for _ in range(5):
        with torch.no_grad():
            expected.append(int(model(torch.tensor([expected], device=model.device)).logits[0, -1].argmax()))
    assert generate_ids(model, tokenizer, [ids], max_new_tokens=5) == [tokenizer.decode(expected[len(ids) :])]


def test_sampling_follows_the_seed(loaded: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = loaded
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(generate(model, tokenizer, ["a"], max_new_tokens=20, temperature=1.5, top_p=0.9)[0])
    assert answers[0] == answers[1] != answers[2]


def test_an_answer_stops_at_its_end(loaded: tuple[Any, Any]) -> None:
    """The first token of the greedy answer is made an end token."""
    import copy

    model, tokenizer = loaded
    plain = generate(model, tokenizer, ["a"], max_new_tokens=4)[0]
    first = tokenizer(plain, add_special_tokens=False)["input_ids"][0]
    stopping = copy.copy(model)
    stopping.generation_config = copy.deepcopy(model.generation_config)
    stopping.generation_config.eos_token_id = [first]
    assert stop_ids(stopping, tokenizer) == [first, tokenizer.eos_token_id]
    assert len(generate(stopping, tokenizer, ["a"], max_new_tokens=4)[0]) < len(plain)


def test_the_chat_template_says_what_ends_a_turn(loaded: tuple[Any, Any]) -> None:
    """Also where the tokenizer's end-of-text token is another, as in base models."""
    import copy

    import torch

    model, tokenizer = copy.deepcopy(loaded)
    tokenizer.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = 2
    assert stop_ids(model, tokenizer) == [2, 1]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "(over)")  # no special token
    assert stop_ids(model, tokenizer) == [2]
    tokenizer.chat_template = "{{ raise_exception('nobody is to talk to me') }}"
    assert stop_ids(model, tokenizer) == [2]
    # Phi-3's ends the conversation with the end-of-text token after the turn's own.
    tokenizer.chat_template = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    assert stop_ids(model, tokenizer) == [2, 1]
    with torch.no_grad():  # a head that answers <|im_end|> or a token of logit 0
        ids = encode_prompt(render_chat([{"role": "user", "content": "a"}], tokenizer), tokenizer)
        hidden = model.model(torch.tensor([ids], device=model.device)).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = hidden
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    assert generate(model, tokenizer, ["a"], max_new_tokens=9) == [""]
    assert len(passes) == 1


def test_a_token_that_ends_the_turn_is_no_part_of_the_answer(loaded: tuple[Any, Any]) -> None:
    """Even if it is an added token that decoding does not know as special."""
    import copy

    model, tokenizer = copy.deepcopy(loaded)
    turn = [{"role": "user", "content": "add 3 and 4"}]
    plain = generate(model, tokenizer, [turn], max_new_tokens=6)[0]
    tokens = tokenizer(plain, add_special_tokens=False)["input_ids"]
    last = next(i for i in range(1, len(tokens)) if tokens[i] not in tokens[:i])
    model.generation_config.eos_token_id = tokens[last]
    assert generate(model, tokenizer, [turn], max_new_tokens=6) == [tokenizer.decode(tokens[:last])]
    assert "".join(stream(model, tokenizer, turn, max_new_tokens=6)) == tokenizer.decode(tokens[:last])


def test_settings_of_the_model_do_not_change_answers(loaded: tuple[Any, Any]) -> None:
    """What generation_config.json says beyond the end tokens is left out, with and without an adapter, and kept."""
    import copy

    import torch
    from transformers import GenerationConfig

    from ft_core import add_lora

    model, tokenizer = loaded
    turn = [{"role": "user", "content": "add 3 and 4"}]
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    torch.manual_seed(5)
    drawn = generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.5, top_p=0.99)
    other = copy.deepcopy(model)
    own = GenerationConfig(
        repetition_penalty=5.0, min_new_tokens=12, no_repeat_ngram_size=2, do_sample=True, top_k=1, temperature=0.7,
        top_p=0.5, eos_token_id=1, suppress_tokens=tokenizer(plain[0])["input_ids"],
    )  # fmt: skip
    other.generation_config = own
    kept = own.to_dict()
    with torch.no_grad():
        ids = torch.tensor([encode_prompt(render_chat(turn, tokenizer), tokenizer)])
        heeded = other.generate(ids, max_new_tokens=12)[0, ids.shape[1] :]
    assert tokenizer.decode(heeded, skip_special_tokens=True) != plain[0]  # transformers alone would heed it
    for asked in (other, add_lora(other, r=2)):
        assert generate(asked, tokenizer, PROMPTS, max_new_tokens=12) == plain
        assert "".join(stream(asked, tokenizer, turn, max_new_tokens=12)) == plain[0]
        torch.manual_seed(5)
        assert generate(asked, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.5, top_p=0.99) == drawn
        assert asked.generation_config is own
        assert own.to_dict() == kept


@pytest.fixture
def learned_positions(loaded: tuple[Any, Any]) -> tuple[Any, Any]:
    """A GPT-2 of 64 positions: beyond them there is no embedding."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = loaded[1]
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, **tokens)
    return GPT2LMHeadModel(config).eval(), tokenizer


def test_an_answer_ends_at_the_last_position(learned_positions: tuple[Any, Any]) -> None:
    """Each by its own prompt's length, whatever it is batched with."""
    model, tokenizer = learned_positions
    model.generation_config.eos_token_id = None
    tokenizer.eos_token, eos = None, tokenizer.eos_token
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        prompts = [[5, 6, 7] * 20, [5, 6] * 20, [7, 8] * 20, [5] * 63]
        answers = generate_ids(model, tokenizer, prompts, max_new_tokens=30)
        assert answers == [generate_ids(model, tokenizer, [one], max_new_tokens=30)[0] for one in prompts]
        lengths = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
        assert all(given <= most for given, most in zip(lengths, [4, 24, 24, 1], strict=True))
        for length in (64, 70):
            expected = rf"^prompt 2 has {length} tokens and leaves none of the model's 64 positions: shorten it$"
            with pytest.raises(DataError, match=expected):
                generate_ids(model, tokenizer, [[5], [5] * length], max_new_tokens=1)
        text = tokenizer.decode([5] * 70)
        with pytest.raises(DataError, match=r"^the conversation has \d+ tokens and leaves none"):
            list(stream(model, tokenizer, [{"role": "user", "content": text}]))
        with pytest.raises(DataError, match=r"^prompt 1 is empty$"):
            generate(model, tokenizer, [""])
    finally:
        tokenizer.eos_token, tokenizer.chat_template = eos, template


def test_too_little_memory_is_one_line() -> None:
    import torch

    with (
        pytest.raises(RunError, match=r"^answering takes more memory than is free: ask less$"),
        enough_memory("answering", "ask less"),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), enough_memory("answering", "ask less"):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_prompts_are_written_with_the_template(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    turn = {"role": "user", "content": "hello"}
    assert render_chat([turn], tokenizer) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    plain, system, kept = generate(
        model,
        tokenizer,
        ["hello", [{"role": "system", "content": "be brief"}, turn], [{"role": "system", "content": "x"}, turn]],
        max_new_tokens=8,
    )
    assert generate(model, tokenizer, [[turn]], max_new_tokens=8) == [plain]
    assert generate(model, tokenizer, ["hello"], system="be brief", max_new_tokens=8) == [system]
    given = [{"role": "system", "content": "x"}, turn]
    assert generate(model, tokenizer, [given], system="be brief", max_new_tokens=8) == [kept]
    assert len({plain, system, kept}) == 3


def test_without_a_template(tiny: Path) -> None:
    from ft_core.models import load

    model, tokenizer = load(tiny, dtype="float32")
    tokenizer.chat_template = None
    text = generate_ids(model, tokenizer, [encode_prompt("hello", tokenizer)], max_new_tokens=8)
    assert generate(model, tokenizer, ["hello"], max_new_tokens=8) == text
    with pytest.raises(DataError, match="has no chat template: give plain prompts, or use an instruct model"):
        generate(model, tokenizer, [[{"role": "user", "content": "hello"}]])
    with pytest.raises(DataError, match="has no chat template, so it knows no system message"):
        generate(model, tokenizer, ["hello"], system="be brief")


def test_a_template_that_refuses(loaded: tuple[Any, Any]) -> None:
    import copy

    model, tokenizer = loaded
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"^the model's chat template refuses these messages: no system role$"):
        generate(model, strict, ["a"])


def test_a_stream_is_the_answer_in_pieces(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    turn = [{"role": "user", "content": "add 3 and 4"}]
    pieces = list(stream(model, tokenizer, turn, max_new_tokens=30))
    assert "".join(pieces) == generate(model, tokenizer, [turn], max_new_tokens=30)[0]
    assert len(pieces) > 3


def test_a_stream_that_is_closed_ends_the_generation(loaded: tuple[Any, Any]) -> None:
    import threading

    model, tokenizer = loaded
    before = threading.active_count()
    pieces = stream(model, tokenizer, [{"role": "user", "content": "a"}], max_new_tokens=400)
    next(pieces)
    assert threading.active_count() == before + 1
    pieces.close()
    assert threading.active_count() == before


def test_an_error_while_streaming_is_raised_where_it_is_read(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded

    def fail(*args: Any, **keywords: Any) -> Any:
        raise ValueError("it failed half-way")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(ValueError, match="half-way"):
        list(stream(model, tokenizer, [{"role": "user", "content": "a"}]))


# -- by the fast layers, here on a CPU


def test_answers_by_the_fast_layers(loaded: tuple[Any, Any]) -> None:
    """The same text, in batches of any size, with the model's settings left out, and streamed."""
    import copy

    import torch

    from ft_core import add_lora
    from ft_core.fast.decoding import forget

    model, tokenizer = copy.deepcopy(loaded)
    turn = [{"role": "user", "content": "add 3 and 4"}]
    for asked in (model, add_lora(copy.deepcopy(model), r=2)):
        plain = generate(asked, tokenizer, PROMPTS, max_new_tokens=12)
        ids = [encode_prompt(render_chat([{"role": "user", "content": one}], tokenizer), tokenizer) for one in PROMPTS]
        for batch_tokens in (1, 200, 8192):
            given: dict[str, Any] = {"max_new_tokens": 12, "batch_tokens": batch_tokens, "fast": True}
            assert generate_ids(asked, tokenizer, ids, **given) == plain
        pieces = list(stream(asked, tokenizer, turn, max_new_tokens=12, fast=True))
        assert "".join(pieces) == plain[0]
        assert len(pieces) > 3
        torch.manual_seed(5)
        drawn = generate(asked, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.5, top_p=0.9)
        torch.manual_seed(5)
        assert generate(asked, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.5, top_p=0.9, fast=True) == drawn
    forget(model)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == generate(
        loaded[0], tokenizer, PROMPTS, max_new_tokens=12
    )
    if model.device.type == "cpu":
        assert "_ft_decoder" not in vars(model)  # there nobody else makes one


def test_an_end_token_ends_what_the_fast_layers_write(loaded: tuple[Any, Any]) -> None:
    import copy

    model, tokenizer = copy.deepcopy(loaded)
    turn = [{"role": "user", "content": "add 3 and 4"}]
    plain = generate(model, tokenizer, [turn], max_new_tokens=6)[0]
    tokens = tokenizer(plain, add_special_tokens=False)["input_ids"]
    last = next(i for i in range(1, len(tokens)) if tokens[i] not in tokens[:i])
    model.generation_config.eos_token_id = tokens[last]
    expected = tokenizer.decode(tokens[:last])
    assert generate(model, tokenizer, [turn], max_new_tokens=6, fast=True) == [expected]
    assert "".join(stream(model, tokenizer, turn, max_new_tokens=6, fast=True)) == expected


def test_a_stream_of_the_fast_layers_is_stopped_or_closed(loaded: tuple[Any, Any]) -> None:
    import threading

    model, tokenizer = loaded
    turn = [{"role": "user", "content": "a"}]
    before = threading.active_count()
    stopped = threading.Event()
    pieces = stream(model, tokenizer, turn, max_new_tokens=400, stopped=stopped, fast=True)
    first = next(pieces)
    stopped.set()
    rest = list(pieces)
    assert len(first + "".join(rest)) < 400
    again = stream(model, tokenizer, turn, max_new_tokens=400, fast=True)
    assert next(again) == first
    again.close()
    assert threading.active_count() == before
    with pytest.raises(DataError, match="max_new_tokens"):
        list(stream(model, tokenizer, turn, max_new_tokens=0, fast=True))


def test_answers_for_which_there_is_no_room(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_core.fast.decoding import Decoder

    model, tokenizer = loaded
    prompts = ["add 3 and 4", "add 11 and 5"]
    expected = generate(model, tokenizer, prompts, max_new_tokens=8, fast=True)
    monkeypatch.setattr(Decoder, "_fits", lambda *_: False)
    assert generate(model, tokenizer, prompts, max_new_tokens=8) == expected
    with pytest.raises(RunError, match="do not fit into the free memory"):
        generate(model, tokenizer, prompts, max_new_tokens=8, fast=True)


def test_answers_that_the_fast_layers_cannot_write(learned_positions: tuple[Any, Any]) -> None:
    model, tokenizer = learned_positions
    expected = r"^the fast layers cannot write this model's answers: the family gpt2 is not known to them"
    with pytest.raises(RunError, match=expected):
        generate_ids(model, tokenizer, [[5]], max_new_tokens=1, fast=True)
    assert generate_ids(model, tokenizer, [[5]], max_new_tokens=1, fast=False)


# -- ft generate

Generate = Callable[..., Any]


@pytest.fixture
def generate_file(ft: Any, tiny: Path, tmp_path: Path) -> Generate:
    def call(prompts: Path, *words: object, out: Path | None = None) -> Any:
        given = ("--prompts", prompts, "--out", out or tmp_path / "out.jsonl", "--max-new-tokens", 4)
        return ft("generate", tiny, *given, *words)

    return call


def test_a_file_of_prompts(generate_file: Generate, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows: list[Any] = [
        "a plain string",
        {"prompt": "two\u2028lines"},  # a separator of lines to str.splitlines, but not to JSON lines
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "not read"}]},
    ]
    prompts.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    done = generate_file(prompts)
    out = tmp_path / "out.jsonl"
    assert (done.code, done.out) == (0, f"4 answers in {out}\n")
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["prompt"] for row in answers] == [
        "a plain string",
        "two\u2028lines",
        rows[2]["messages"],
        rows[2]["messages"],
    ]
    assert answers[2]["answer"] == answers[3]["answer"]
    again = generate_file(prompts)
    assert (again.code, again.err) == (0, f"{out} is complete: 4 answers\n")


def test_a_prompt_on_the_command_line(ft: Any, tiny: Path, tmp_path: Path) -> None:
    """Its answer is printed, or written beside it."""
    from ft_core.models import load

    model, tokenizer = load(tiny)
    words = ("--max-new-tokens", 8, "--system", "be brief")
    (answer,) = generate(model, tokenizer, ["add 1 and 2"], max_new_tokens=8, system="be brief")
    printed = ft("generate", tiny, "add 1 and 2", *words)
    assert (printed.code, printed.out) == (0, f"{answer}\n")
    out = tmp_path / "out.jsonl"
    written = ft("generate", tiny, "add 1 and 2", *words, "--out", out)
    assert (written.code, written.out) == (0, f"1 answer in {out}\n")
    assert json.loads(out.read_text(encoding="utf-8")) == {"prompt": "add 1 and 2", "answer": answer}
    assert ft("generate", tiny, "add 1 and 2", "--out", out).err == f"{out} is complete: 1 answer\n"


def test_images_for_a_model_of_text(ft: Any, tiny: Path, tmp_path: Path) -> None:
    """Whether or not there is a package that would show them to another model."""
    for command in (("generate", tiny, "what is this?"), ("chat", tiny)):
        done = ft(*command, "--image", tmp_path / "a.png")
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": "what is this?", "images": ["a.png"]}), encoding="utf-8")
    done = ft("generate", tiny, "--prompts", prompts, "--out", out)
    assert done.message == f"ft generate: {prompts}, line 1: has images, and {tiny} sees none"
    assert (done.code, out.exists()) == (2, False)


def test_prompts_in_a_list(generate_file: Generate, tmp_path: Path) -> None:
    for name, text in (("p.json", json.dumps(["a", {"prompt": "b"}], indent=1)), ("p.JSONL", '"a"\n{"prompt": "b"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert generate_file(tmp_path / name, "--overwrite").code == 0
        answers = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["prompt"] for line in answers] == ["a", "b"]


@pytest.mark.parametrize("prompt", ["prompt", "ü\u2028ü"])
def test_a_file_cut_anywhere_is_completed(generate_file: Generate, tmp_path: Path, prompt: str) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = (json.dumps({"prompt": f"{prompt} {n}"}) for n in range(4))
    prompts.write_text("\n".join(lines), encoding="utf-8")
    assert generate_file(prompts).code == 0
    whole = out.read_bytes()
    first, second = whole.index(b"\n"), whole.index(b"\n", whole.index(b"\n") + 1)
    for size in (0, 3, 14, first, first + 1, first + 14, second, len(whole) - 1):
        out.write_bytes(whole[:size])
        done = generate_file(prompts)
        assert done.code == 0, done.err
        assert out.read_bytes() == whole
        there = whole[:size].count(b"\n")
        assert (f"{there} of 4 are there already\n" in done.err) == (there > 0)
    assert {p.name for p in tmp_path.iterdir()} == {"prompts.jsonl", "out.jsonl"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("my notes\n", "OUT holds something else than answers (line 1): give another --out, or --overwrite"),
        ("my notes", "OUT holds something else than answers (line 1): give another --out, or --overwrite"),
        ("{}\n", "OUT holds something else than answers (line 1): give another --out, or --overwrite"),
        (b"\xff\xfe", "OUT holds something else than answers (line 1): give another --out, or --overwrite"),
        (
            '{"prompt": "other", "answer": ""}\n',
            "OUT holds answers to other prompts (line 1): give another --out, or --overwrite",
        ),
        (
            '{"prompt": "a", "answer": ""}\n{"prompt": "b", "answer": ""}\n',
            "OUT holds answers to other prompts (line 2): give another --out, or --overwrite",
        ),
    ],
)
def test_a_file_of_something_else_is_kept(
    generate_file: Generate, tmp_path: Path, content: str | bytes, message: str
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "notes.jsonl"
    prompts.write_text("a\n", encoding="utf-8")
    out.write_bytes(content.encode() if isinstance(content, str) else content)
    before = out.read_bytes()
    done = generate_file(prompts, out=out)
    assert (done.code, done.out, done.err) == (2, "", f"ft generate: {message.replace('OUT', str(out))}\n")
    assert out.read_bytes() == before
    assert generate_file(prompts, "--overwrite", out=out).code == 0
    assert out.read_text(encoding="utf-8").startswith('{"prompt": "a", ')


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no prompts file PATH"),
        ("empty.txt", "\n\n", "PATH holds no prompts"),
        ("p.jsonl", '"a"\n{"prompt": "b"\n', "PATH, line 2: no valid JSON (Expecting ',' delimiter"),
        ("p.jsonl", '{"text": "b"}\n', "PATH, line 1: has neither 'prompt' nor 'messages'"),
        ("p.jsonl", "7\n", "PATH, line 1: has neither 'prompt' nor 'messages'"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}\n', "PATH, line 1: a message is {'role': …, 'content': text}"),
        ("p.txt", b"\xff", "cannot read the prompts PATH: "),
        ("p.csv", "prompt\na\n", "PATH: prompts are read from .txt (one a line), .jsonl and .json files, not .csv\n"),
        ("p.json", '{"prompt": "a"}', "PATH: a .json file of prompts holds a list; one object a line is .jsonl\n"),
        ("p.json", '["a"', "PATH: no valid JSON (Expecting ',' delimiter"),
        ("p.json", '["a", 7]', "PATH, prompt 2: has neither 'prompt' nor 'messages'"),
        ("p.JSONL", "a\n", "PATH, line 1: no valid JSON ("),
    ],
)
def test_prompts_that_cannot_be_used(
    generate_file: Generate, tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    done = generate_file(path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"ft generate: {message.replace('PATH', str(path))}")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_too_long_is_said_before_the_first_answer(generate_file: Generate, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n" + "b" * 600, encoding="utf-8")
    done = generate_file(tmp_path / "p.txt")
    assert done.code == 2
    assert done.message == (
        "ft generate: prompt 2 has 608 tokens and leaves none of the model's 512 positions: shorten it"
    )
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_cannot_be_written(generate_file: Generate, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a", encoding="utf-8")
    nowhere = tmp_path / "nowhere" / "out.jsonl"
    assert generate_file(prompts, out=nowhere).err == (
        f"ft generate: no folder {nowhere.parent} to write out.jsonl to\n"
    )
    assert (
        generate_file(prompts, out=tmp_path).err == f"ft generate: --out {tmp_path} is a folder: give a .jsonl file\n"
    )
    for words in ((), ("--overwrite",)):
        refused = generate_file(prompts, *words, out=prompts)
        assert (refused.code, refused.err) == (
            2,
            f"ft generate: --out {prompts} is the file of the prompts: give another\n",
        )
    assert prompts.read_text(encoding="utf-8") == "a"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: '0' is not allowed (allowed: a whole number from 1)"),
        (["--max-new-tokens", "many"], "--max-new-tokens: 'many' is not allowed (allowed: a whole number from 1)"),
        (["--temperature", "nan"], "--temperature: 'nan' is not allowed (allowed: a number from 0)"),
        (["--top-p", "1.5"], "--top-p: '1.5' is not allowed (allowed: a number above 0 and up to 1)"),
    ],
)
def test_numbers_that_make_no_sense(generate_file: Generate, tmp_path: Path, words: list[str], message: str) -> None:
    done = generate_file(tmp_path / "p.txt", *words)
    assert (done.code, done.err) == (2, f"ft generate: argument {message} (see ft generate --help)\n")
