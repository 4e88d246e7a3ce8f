"""`ft eval` with `task: vision`: what is measured on answers, with several accepted, and what makes no difference."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The Levenshtein distance by the table that defines it, a row at a time."""
    last = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (a != b)))
        last = row
    return last[-1]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measured(ft: Any, *words: object) -> dict[str, Any]:
    found = ft("eval", *words, "--json")
    assert found.code == 0, found.err
    return json.loads(found.out[found.out.index("{") :])  # type: ignore[no-any-return]


@pytest.fixture
def run(configure: Any, ft: Any, digits: Any, tmp_path: Path) -> Path:
    """A run of one step, whose model says whatever it says; 10 rows are held out, and 6 trained on."""
    rows = digits(16)
    for row in rows:  # two words, so that they and their letters are counted apart
        row["messages"][1]["content"] = "the digit " + row["messages"][1]["content"][0]["text"]
    made = ft("train", configure(rows=rows, eval_split=10, training={"max_steps": 1}))
    assert made.code == 0, made.err
    return tmp_path / "run"


def test_answers_are_measured(run: Path, ft: Any, tmp_path: Path) -> None:
    during = json.loads((run / "evaluation.json").read_text())
    assert during["answers"] == 8  # those of the training are for reading, and so few are no share
    assert list(during["metrics"]) == ["loss", "perplexity", "cer", "wer", "anls"]
    assert all(sample["right"] == {"before": False, "after": False} for sample in during["samples"])
    found = measured(ft, run)
    assert (found["rows"], found["answers"]) == (10, 10)
    assert list(found["metrics"]) == ["loss", "perplexity", "exact_match", "cer", "wer", "anls"]
    assert found["compared"] == {"ignore_case": False, "whitespace": "collapse"}
    for side in ("before", "after"):
        pairs = [(" ".join(s["expected"].split()), " ".join(s[side].split())) for s in found["samples"]]
        assert any(said for _, said in pairs)
        letters = sum(distance(a, b) for a, b in pairs) / sum(len(a) for a, _ in pairs)
        words = sum(distance(a.split(), b.split()) for a, b in pairs) / sum(len(a.split()) for a, _ in pairs)
        far = [distance(a.lower(), b.lower()) / max(len(a), len(b)) for a, b in pairs]
        likeness = sum(1 - one if one < 0.5 else 0 for one in far) / len(far)
        metrics = {name: values[side] for name, values in found["metrics"].items()}
        assert metrics["cer"] == pytest.approx(letters, rel=1e-12)
        assert metrics["wer"] == pytest.approx(words, rel=1e-12)
        assert metrics["anls"] == pytest.approx(likeness, rel=1e-12)
        assert metrics["exact_match"] == sum(a == b for a, b in pairs) / len(pairs)
    shown = ft("eval", run, "--answers", 3).out
    assert "\nover 10 rows of held_out.jsonl, exact match, CER, WER, ANLS over 3 answers\n" in shown
    assert "\nanswers compared with ignore_case: false, whitespace: collapse" in shown
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("Character error rate", "Word error rate", "ANLS", "Exact match"))
    assert "answers compared with ignore_case: false, whitespace: collapse" in page


def test_what_is_accepted_and_what_makes_no_difference(run: Path, ft: Any, tmp_path: Path) -> None:
    said = [sample["after"] for sample in measured(ft, run)["samples"]]
    assert any(text.swapcase() != text for text in said)
    rows = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    data = tmp_path / "accepted.jsonl"

    def after(accepted: list[Any], *words: str) -> tuple[dict[str, float], dict[str, Any]]:
        written(data, [{**row, "answers": ["another", text]} for row, text in zip(rows, accepted, strict=True)])
        found = measured(ft, run, "--data", data, *words)
        return {name: values["after"] for name, values in found["metrics"].items()}, found

    same, found = after(said)
    assert (same["exact_match"], same["cer"], same["wer"], same["anls"]) == (1, 0, 0, 1)
    assert [sample["right"]["after"] for sample in found["samples"]] == [True] * 10
    page = (run / "report.html").read_text(encoding="utf-8")
    assert re.search(r"Right before: \d+ of 10 samples; after: 10\.", page)

    swapped = [f" {text.swapcase()} " for text in said]
    with_case, _ = after(swapped)
    assert with_case["cer"] > 0
    assert with_case["exact_match"] < 1
    assert with_case["anls"] == 1  # never minds case
    without, found = after(swapped, "--ignore-case")
    assert (without["exact_match"], without["cer"], without["wer"]) == (1, 0, 0)
    assert found["compared"]["ignore_case"] is True


def test_long_answers_are_measured_whole_or_not_at_all(configure: Any, ft: Any, digits: Any, tmp_path: Path) -> None:
    rows = digits(3)
    for row in rows:
        row["messages"][1]["content"] = "a long answer, " * 12
    made = ft("train", configure(rows=rows, eval_split=1, max_length=512, training={"max_steps": 1}))
    assert made.code == 0, made.err
    run = tmp_path / "run"
    during = json.loads((run / "evaluation.json").read_text())
    # A training doesn't wait for more than 128 tokens an answer; what ended early is no answer to be measured.
    assert list(during["metrics"]) == ["loss", "perplexity"]
    assert len(during["samples"]) == 1
    assert "right" not in during["samples"][0]
    found = measured(ft, run)
    assert list(found["metrics"]) == ["loss", "perplexity", "cer", "wer", "anls", "exact_match"]
    longest = [max(len(sample[side]) for sample in found["samples"]) for side in ("before", "after")]
    early = [max(len(sample[side]) for sample in during["samples"]) for side in ("before", "after")]
    assert max(longest) > max(early)
    assert "right" not in found["samples"][0]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (7, "answers must be a list of texts, those that are accepted, not a int"),
        (["7", 7], "answers must be a list of texts, those that are accepted, not a list with a int"),
        ([{"text": "7"}], "answers must be a list of texts, those that are accepted, not a list with null"),
    ],
)
def test_accepted_answers_of_other_kinds_are_refused(
    answers: Any, message: str, configure: Any, ft: Any, digits: Any
) -> None:
    made = ft("train", configure(rows=[{**row, "answers": answers} for row in digits(2)]))
    assert made.code == 2
    assert message in made.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whitespace": "none"}, "vision.whitespace: 'none' is not allowed (allowed: collapse, strip, keep)"),
        ({"ignore_case": "yes please"}, "vision.ignore_case"),
    ],
)
def test_a_comparison_that_is_not_known_is_refused(changes: Any, message: str, configure: Any, ft: Any) -> None:
    made = ft("train", configure(vision=changes))
    assert made.code == 2
    assert message in made.message
