"""Loss, perplexity and exact match are what they are by hand, before and after."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ft_core.evaluation import TOKENS_AT_ONCE, Evaluation, Sample, _by_tokens, _nll, compare, table


def nll_by_hand(model: Any, documents: Any) -> float:
    """Mean negative log-likelihood of the trained tokens in float64, each document alone, token by token."""
    import torch

    total, count = 0.0, 0
    for document in documents:
        with torch.no_grad():
            logits = model(torch.tensor([document["input_ids"]], device=model.device)).logits[0].double()
        for place, label in enumerate(document["labels"]):
            if label != -100:
                row = logits[place - 1]
                total += float(row.exp().sum().log() - row[label])
                count += 1
    return total / count


@pytest.fixture(scope="module")
def taught(tiny: Path, tmp_path_factory: pytest.TempPathFactory, sums: Any, write_rows: Any) -> Path:
    """A folder with `run`, a model trained in full until it knew the answers to eight rows, and those rows."""
    from ft_core.training import train

    folder = tmp_path_factory.mktemp("taught")
    rows, same = (write_rows(folder / name, sums(8)) for name in ("rows.jsonl", "same.jsonl"))
    training = {
        "max_steps": 60, "batch_size": 8, "gradient_accumulation": 1, "learning_rate": 5e-3, "optimizer": "adamw_torch",
    }  # fmt: skip
    values = {
        "model": str(tiny), "data": str(rows), "eval_data": str(same), "max_length": 64, "lora": None,
        "packing": False, "training": training, "output": str(folder / "run"),
    }  # fmt: skip
    train(values, say=lambda line: None)
    return folder


def test_an_interrupted_evaluation_keeps_no_memory_for_more_answers(taught: Path, sums: Any) -> None:
    from ft_core.config.load import method_settings
    from ft_core.evaluation import EvaluationJob, evaluate_answers
    from ft_core.fast.decoding import decoder_of
    from ft_core.models import load_run
    from ft_core.runs import Run

    run = Run.open(taught / "run")
    model, tokenizer = load_run(run, say=lambda line: None)
    job = EvaluationJob(run.config, method_settings(run.config), model, tokenizer, sums(8))

    def interrupt(done: int, total: int, what: str) -> None:
        if what == "answers":
            assert "_ft_decoder" in vars(model)
            raise KeyboardInterrupt

    job.progress = interrupt
    assert decoder_of(model, anywhere=True) is not None  # by itself only a GPU's model gets one
    with pytest.raises(KeyboardInterrupt):
        evaluate_answers(job)
    assert "_ft_decoder" not in vars(model)


def test_a_model_that_knows_the_answers(taught: Path, ft: Any, sums: Any) -> None:
    run = taught / "run"
    done = ft("eval", run, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert found["metrics"]["exact_match"] == {"before": 0.0, "after": 1.0}
    assert found["metrics"]["loss"]["after"] < 0.1 < found["metrics"]["loss"]["before"]
    assert (found["data"], found["rows"]) == ("held_out.jsonl", 8)
    for sample, row in zip(found["samples"], sums(8), strict=True):
        question, answer = (message["content"] for message in row["messages"])
        assert (sample["prompt"], sample["expected"], sample["after"]) == (question, answer, answer)
        assert sample["before"] != answer


def test_answers_that_are_wrong_lower_the_exact_match(
    taught: Path, ft: Any, sums: Any, tmp_path: Path, write_rows: Any
) -> None:
    rows = sums(8)
    for row in rows[:2]:
        row["messages"][1]["content"] = "wrong"
    rows[2]["messages"][1]["content"] += " \n"  # white space at the end is no mistake
    data = write_rows(tmp_path / "other.jsonl", rows)
    found = json.loads(ft("eval", taught / "run", "--data", data, "--json").out)
    assert found["metrics"]["exact_match"]["after"] == 0.75
    assert found["data"] == str(data)
    some = json.loads(ft("eval", taught / "run", "--data", data, "--limit", 4, "--answers", 2, "--json").out)
    assert (some["rows"], len(some["samples"]), some["metrics"]["exact_match"]["after"]) == (4, 2, 0.0)
    assert (found["answers"], some["answers"]) == (8, 2)
    shown = ft("eval", taught / "run", "--data", data, "--limit", 4, "--answers", 2)
    assert f"\nover 4 rows of {data}, exact match over 2 answers\n" in shown.out
    assert "compared" not in found


@pytest.mark.parametrize(
    ("words", "compared", "right"),
    [
        (["--ignore-case"], {"ignore_case": True, "whitespace": "strip"}, [True, True, False]),
        (["--whitespace", "collapse"], {"ignore_case": False, "whitespace": "collapse"}, [True, False, True]),
        (["--whitespace", "keep"], {"ignore_case": False, "whitespace": "keep"}, [False, False, False]),
    ],
)
def test_what_makes_no_difference_is_asked_for(
    words: list[str],
    compared: dict[str, Any],
    right: list[bool],
    taught: Path,
    ft: Any,
    sums: Any,
    tmp_path: Path,
    write_rows: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = sums(3)
    for row in rows:
        row["messages"][1]["content"] = "two words"
    said = ["two words\n", "Two words", "two  words"]
    monkeypatch.setattr("ft_core.generation.generate_ids", lambda *_, **__: said)
    data = write_rows(tmp_path / "other.jsonl", rows)
    found = json.loads(ft("eval", taught / "run", "--data", data, *words, "--json").out)
    assert found["compared"] == compared
    assert [sample["right"]["after"] for sample in found["samples"]] == right
    assert found["metrics"]["exact_match"]["after"] == sum(right) / 3


def test_the_loss_is_measured_in_batches_of_bounded_size() -> None:
    """Padding counts: one long row among short ones does not make them all long."""
    ids = [[1] * length for length in (10, 1900, *[7, 300] * 40, 5000, 10)]
    batches = list(_by_tokens(ids))
    assert sorted(i for batch in batches for i in batch) == list(range(len(ids)))
    sizes = [len(batch) * max(len(ids[i]) for i in batch) for batch in batches]
    assert all(size <= TOKENS_AT_ONCE or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    assert len(batches) < 12  # and short rows share batches: 82 rows


@pytest.mark.parametrize("tells", [True, False])
def test_only_the_logits_that_are_needed_are_computed(tells: bool, tiny: Path) -> None:
    """The loss of a batch is that of its rows alone, also by a model that cannot be told which logits are needed."""
    import torch

    from ft_core.models import load

    model, _ = load(tiny, dtype="float32")
    if not tells:
        forward = model.forward
        model.forward = lambda input_ids, attention_mask=None, use_cache=False: forward(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        )
    shapes = []
    model.lm_head.register_forward_hook(lambda module, given, out: shapes.append(out.shape[1]))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(400, (length,), generator=generator).tolist() for length in (12, 5, 9)]
    labels = [[-100] * (len(row) - 2) + row[-2:] for row in ids]
    sums = _nll(model, ids, labels)
    assert shapes == [6 if tells else 12]  # the last two of each row are scored from columns 2, 3, 6, 7, 9 and 10
    for row, target, found in zip(ids, labels, sums, strict=True):
        alone = nll_by_hand(model, [{"input_ids": row, "labels": target}])
        # float32 through two layers of width 64: each logit is off by some 1e-6 at most, the loss by no more
        assert found == pytest.approx(2 * alone, rel=1e-5)


def test_a_prompt_that_fills_the_positions_counts_as_not_answered(
    taught: Path, ft: Any, sums: Any, tmp_path: Path, write_rows: Any
) -> None:
    rows = sums(8)
    rows[3]["messages"][0]["content"] = "b" * 600
    data = write_rows(tmp_path / "long.jsonl", rows)
    done = ft("eval", taught / "run", "--data", data, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["metrics"]["exact_match"]["after"] == 7 / 8
    assert found["samples"][3]["after"] == ""


@pytest.mark.parametrize("lora", [{"r": 8}, {"r": 8, "modules_to_save": ["lm_head"]}, {"r": 8, "bias": "all"}, None])
def test_loss_and_perplexity_are_those_computed_by_hand(
    lora: Any, ft: Any, configure: Any, tmp_path: Path, tiny: Path, metrics: Any
) -> None:
    """Of the base before, of the result after.

    Both sides see the same model in this machine's number format, whose logits may differ by one rounding where rows
    are padded to a batch: with |logit| below 8, half a unit in the last place of bfloat16 is 2^-6.
    """
    from transformers import AutoTokenizer

    from ft_core.data import tokenize_rows
    from ft_core.models import load, load_run, pick_device
    from ft_core.runs import Run

    run = tmp_path / "run"
    assert ft("train", configure(lora=lora, training={"max_steps": 8}), "eval_split=10").code == 0
    done = ft("eval", run, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["metrics"]
    held_out = [json.loads(line) for line in (run / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    documents = list(tokenize_rows(held_out, AutoTokenizer.from_pretrained(tiny), max_length=64))
    tolerance = 2.0**-6 if pick_device().dtype != "float32" else 1e-4
    base, _ = load(tiny)
    after, _ = load_run(Run(run), say=lambda line: None)
    assert found["loss"]["before"] == pytest.approx(nll_by_hand(base, documents), abs=tolerance)
    assert found["loss"]["after"] == pytest.approx(nll_by_hand(after, documents), abs=tolerance)
    assert abs(found["loss"]["after"] - found["loss"]["before"]) > 1e-3  # else the two sides could be mixed up unseen
    for side in ("before", "after"):
        assert found["perplexity"][side] == math.exp(found["loss"][side])


def test_training_measures_as_ft_eval_does(ft: Any, configure: Any, tmp_path: Path, rounding: float) -> None:
    """The trainer's autocast is not on while it measures; it made 3 % of the loss on some rows."""
    run = tmp_path / "run"
    assert ft("train", configure(training={"max_steps": 8, "learning_rate": 1e-2}), "eval_split=10").code == 0
    trained = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["metrics"]["loss"]
    measured = json.loads(ft("eval", run, "--json").out)["metrics"]["loss"]
    assert trained["before"] == pytest.approx(measured["before"], rel=1e-5 + rounding)
    assert trained["after"] == pytest.approx(measured["after"], rel=1e-5 + rounding)
    assert abs(trained["after"] - trained["before"]) > 0.05


def test_a_text_has_no_answer(ft: Any, configure: Any, tmp_path: Path, write_rows: Any) -> None:
    data = write_rows(tmp_path / "text.jsonl", [{"text": f"a text with the number {n}"} for n in range(12)])
    assert ft("train", configure(data=str(data)), "eval_split=4", "training.max_steps=1").code == 0
    done = ft("eval", tmp_path / "run", "--json")
    found = json.loads(done.out)
    assert set(found["metrics"]) == {"loss", "perplexity"}
    assert found["samples"] == []


def test_long_answers_are_not_matched(ft: Any, configure: Any, tmp_path: Path, write_rows: Any) -> None:
    rows = [{"prompt": f"{n}", "completion": " so it goes" * 15} for n in range(8)]
    data = write_rows(tmp_path / "long.jsonl", rows)
    assert ft("train", configure(data=str(data), max_length=256), "eval_split=2", "training.max_steps=1").code == 0
    found = json.loads(ft("eval", tmp_path / "run", "--json").out)
    assert set(found["metrics"]) == {"loss", "perplexity"}
    assert len(found["samples"]) == 2


def test_runs_that_cannot_be_measured(ft: Any, configure: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ft("eval", run).err == (
        f"ft eval: no run folder {run}: {tmp_path} holds no run; give the folder that ft train wrote (its 'output')\n"
    )
    assert ft("eval", tmp_path).err == (
        f"ft eval: {tmp_path} is no run folder: it has no config.yaml and environment.json\n"
    )
    assert ft("train", configure(), "training.max_steps=1").code == 0
    assert ft("eval", run).message == (f"ft eval: {run} kept no rows for evaluation: give some with --data FILE")
    nowhere = ft("eval", run, "--data", tmp_path / "nowhere.jsonl")
    assert nowhere.code == 2
    assert nowhere.message.startswith(f"ft eval: {tmp_path}/nowhere.jsonl: no such file or folder")
    (run / "adapter").rename(tmp_path / "moved")
    gone = ft("eval", run, "--data", tmp_path / "rows.jsonl")
    assert gone.message == f"ft eval: {run} is finished, but its adapter/ or model/ is gone"


@pytest.mark.parametrize(
    ("data", "eval_data"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("rows.jsonl", "./rows.jsonl"),
        (["other.jsonl", {"path": "rows.jsonl", "weight": 2}], "rows.jsonl"),
        ("owner/name", "owner/name:train"),
    ],
)
def test_rows_that_are_trained_on_are_no_held_out_rows(data: Any, eval_data: str, ft: Any, configure: Any) -> None:
    done = ft("train", configure(data=data, eval_data=eval_data))
    assert done.code == 2
    assert "is trained on too, so it measures nothing: name other rows, another split" in done.message
    assert ft("train", configure(data="owner/name", eval_data="owner/name:test"), "--print-config").code == 0


def test_the_table() -> None:
    before = Evaluation({"loss": 3.0, "perplexity": math.exp(3), "exact_match": 0.0}, [Sample("q", "a", "b")], 1)
    after = Evaluation({"loss": 0.5, "perplexity": math.exp(0.5), "exact_match": 0.985}, [Sample("q", "a", "a")], 1)
    found = compare(before, after, "held_out.jsonl")
    assert table(found).splitlines() == [
        "                      before       after",
        "loss                       3         0.5",
        "perplexity             20.09       1.649",
        "exact match            0.0 %      98.5 %",
        "over 1 row of held_out.jsonl",
    ]
    assert found["samples"] == [{"prompt": "q", "expected": "a", "before": "b", "after": "a"}]
    assert compare(compare(before, None, "x"), after, "x")["samples"] == found["samples"]
    after.rows = 5
    assert table(compare(before, after, "x")).splitlines()[-1] == "over 5 rows of x, exact match over 1 answer"


def test_rows_that_end_with_the_same_question_keep_their_own_answers() -> None:
    before = Evaluation({}, [Sample("why?", "a", "one"), Sample("why?", "b", "two")], 2)
    after = Evaluation({}, [Sample("why?", "a", "three"), Sample("why?", "b", "four")], 2)
    for first in (before, compare(before, None, "x")):
        pairs = [(s["before"], s["after"]) for s in compare(first, after, "x")["samples"]]
        assert pairs == [("one", "three"), ("two", "four")]


def test_a_number_that_is_none_is_null() -> None:
    found = compare(Evaluation({"loss": math.inf}, [], 1), Evaluation({"loss": None}, [], 1), "x")
    assert found["metrics"] == {"loss": {"before": None, "after": None}}
    assert "—" in table(found)


def test_a_partial_measurement_does_not_replace_a_whole_one(taught: Path, ft: Any, tmp_path: Path, sums: Any) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(taught / "run", run)
    names = [run / name for name in ("evaluation.json", "report.html", "evaluation-partial.json")]
    whole, report, partial = names
    whole.unlink()
    partial.unlink(missing_ok=True)  # of other tests
    assert ft("eval", run, "--answers", 4).code == 0  # more than none
    assert json.loads(whole.read_text(encoding="utf-8"))["answers"] == 4
    assert ft("eval", run).code == 0
    assert not partial.exists()
    before = whole.read_bytes(), report.read_bytes()
    for words, rows, answers in ((["--limit", 3], 3, 3), (["--answers", 2], 8, 2)):
        done = ft("eval", run, *words)
        assert done.code == 0, done.err
        assert f"written to {partial}: evaluation.json holds a fuller measurement" in done.err
        found = json.loads(partial.read_text(encoding="utf-8"))
        assert (found["rows"], found["answers"]) == (rows, answers)
        assert (whole.read_bytes(), report.read_bytes()) == before
    # As many as there are leave nothing out.
    assert f"written to {whole} and {report}" in ft("eval", run, "--limit", 8).err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "'utf-8' codec can't decode"),
        (b"[]", "it holds no JSON object"),
        (b'{"metrics": {"loss": 1.0}}', "it holds no measurement"),
        (b'{"metrics": {}, "rows": "8"}', "it holds no measurement"),
    ],
)
def test_a_broken_measurement_counts_as_none(
    content: bytes, reason: str, taught: Path, ft: Any, tmp_path: Path
) -> None:
    """It is said once, before anything is measured, and a partial measurement takes its place."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(taught / "run", run)
    whole = run / "evaluation.json"
    whole.write_bytes(content)
    done = ft("eval", run, "--limit", 3)
    assert done.code == 0, done.err
    assert done.err.count(f"{whole} cannot be read: {reason}") == 1
    assert done.err.index("; taken for none\n") < done.err.index(f"written to {whole}")
    assert json.loads(whole.read_text(encoding="utf-8"))["rows"] == 3


def test_a_broken_measurement_is_found_before_the_model_is_loaded(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from ft_core import evaluation, models

    run = tmp_path / "run"
    shutil.copytree(taught / "run", run)
    (run / "evaluation.json").write_text("{", encoding="utf-8")
    said: list[str] = []

    def load(*args: Any, **keywords: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_run", load, raising=False)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(run, limit=3, say=said.append)
    assert len(said) == 1
    assert said[0].endswith("; taken for none")


def test_a_training_says_how_many_rows_it_measures(
    ft: Any, configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ft_core.training import run as training

    monkeypatch.setattr(training, "EVALUATED", 4)
    done = ft("train", configure(), "eval_split=6", "training.max_steps=1")
    assert done.code == 0, done.err
    for what in ("before", "after"):
        assert f"measuring {what} training on the first 4 of 6 held-out rows (ft eval measures all)" in done.err
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "The first 4 rows of 6 (ft eval measures all) of held_out.jsonl" in page
    assert ft("eval", tmp_path / "run").code == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "6 rows of held_out.jsonl" in page
