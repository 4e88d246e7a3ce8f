from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ft_core.errors import DataError
from ft_rl.pairs import show, tokenize_pairs
from ft_rl.preference import samples_of


@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("with_prompt", [False, True])
def test_tokens_are_trls(
    toy: Any, messages: bool, with_prompt: bool, tokenizer: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """TRL's trainer, given the rows as they are, prepares the very same tokens."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    class Quiet(RewardTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            pass

    made = toy.rows(8, 1, messages=messages)
    if not messages:
        made[0]["chosen"] += " <eos>"
    if not with_prompt:
        made = [{name: row[name] for name in ("chosen", "rejected")} for row in made]
    theirs = Quiet(
        model=AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1),
        args=RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(made),
        processing_class=tokenizer,
    ).train_dataset
    ours = tokenize_pairs(made, tokenizer, max_length=None)
    assert ours.chosen_ids == theirs["chosen_ids"][:]
    assert ours.rejected_ids == theirs["rejected_ids"][:]


def test_long_pairs_are_left_out_and_counted(toy: Any, tokenizer: Any) -> None:
    made = toy.rows(20, 0)
    everything = tokenize_pairs(made, tokenizer, max_length=None)
    longest = [max(len(c), len(r)) for c, r in zip(everything.chosen_ids, everything.rejected_ids, strict=True)]
    limit = sorted(longest)[10]
    pairs = tokenize_pairs(made, tokenizer, max_length=limit)
    assert pairs.rows == [i for i, length in enumerate(longest) if length <= limit]
    assert 0 < pairs.overlong == len(made) - len(pairs.rows)
    assert pairs.chosen_ids == [everything.chosen_ids[i] for i in pairs.rows]
    assert pairs.tokens == sum(len(ids) for ids in pairs.chosen_ids + pairs.rejected_ids)


def test_messages_without_a_chat_template(toy: Any) -> None:
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        tokenize_pairs(toy.rows(1, 0, messages=True), toy.make_tokenizer(template=False), max_length=None)


def test_a_template_that_refuses_names_the_row(toy: Any) -> None:
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% if messages|length > 2 %}{{ raise_exception('only two turns') }}{% endif %}x"
    made = toy.rows(3, 0, messages=True)
    made[1]["prompt"] = made[1]["prompt"] * 3
    with pytest.raises(DataError, match="row 2: the chat template refuses it: only two turns"):
        tokenize_pairs(made, tokenizer, max_length=None)


def test_what_a_person_is_shown() -> None:
    assert show(None) == ""
    assert show("text") == "text"
    assert show([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]) == "one\ntwo"


def test_samples_are_called_what_tells_them_apart() -> None:
    job = SimpleNamespace(answers=4)
    prompts = ["tell me", [{"role": "user", "content": "tell me"}], None, "the sun", "cats"]
    made = samples_of(job, prompts, lambda i: f"row {i + 1}", lambda i: None if i else "a", str)  # type: ignore[arg-type]
    assert [sample.prompt for sample in made] == ["tell me", "tell me (row 2)", "(row 3)", "the sun"]
    assert [sample.expected for sample in made] == ["a", None, None, None]
    job.answers = None
    assert len(samples_of(job, prompts * 4, str, str, str)) == 16  # type: ignore[arg-type]
