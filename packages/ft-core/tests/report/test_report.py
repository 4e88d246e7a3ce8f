"""The page's content, from whole, unfinished, odd and hostile run folders."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ft_core.commands import report as command
from ft_core.errors import RunError
from ft_core.report import write_report

MakeRun = Callable[..., Path]
VOID = {"meta", "path", "rect"}


class Page(HTMLParser):
    """A page's text and elements; fails on an element that is not closed where it should be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self._open == []
        self.text = re.sub(r"\s+", " ", " ".join(self._words).replace("\N{NO-BREAK SPACE}", " "))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID and tag != "wbr":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self._words.append(data)

    def ids(self, tag: str) -> list[str | None]:
        return [attributes.get("id") for name, attributes in self.elements if name == tag]


def train_rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"kind": "train", "step": step, "loss": 2.0 / step, **more} for step in range(1, count + 1)]


def test_a_whole_run(make_run: MakeRun) -> None:
    run = make_run()
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    for said in (
        "HuggingFaceTB/SmolLM2-135M-Instruct → dates",
        "sft, LoRA (rank 16)",
        "23 November 2026",
        "Exact match on 10 held-out rows rose from 10 % to 90 %; held-out loss fell from 3.1 to 0.0204.",
        "120 steps over 74,880 tokens took 4 min 11 s (298 tokens per second), with at most 2.62 GiB of memory.",
        "+80 points",
        "Right before: 1 of 10 samples; after: 9.",
        "learning_ rate 0.002",
        "transformers 5.23.0",
        "Training rows 1,900",
        "Rows longer than max_length 0",
        "1 checkpoint to resume from",
    ):
        assert said in page.text, said
    assert page.ids("figure") == ["loss", "learning-rate", "throughput", "memory", "phases", "metric-0"]
    assert "ft chat " in page.text
    assert "ft merge " in page.text
    assert "--to gguf" in page.text
    assert "Not there yet" not in page.text
    assert sum(name == "caption" for name, _ in page.elements) == sum(name == "table" for name, _ in page.elements) >= 6
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_exact_match_of_some_rows_is_not_said_of_all(make_run: MakeRun) -> None:
    run = make_run()
    found = json.loads((run / "evaluation.json").read_text())
    found["rows"] = 5000
    (run / "evaluation.json").write_text(json.dumps(found))
    assert "Exact match on held-out rows rose" in Page(write_report(run)).text


def test_a_change_for_the_worse_is_said(make_run: MakeRun) -> None:
    run = make_run(evaluation={"rows": 7, "metrics": {"loss": {"before": 0.5, "after": 0.9}}, "samples": []})
    text = Page(write_report(run)).text
    assert "Held-out loss on 7 rows rose from 0.5 to 0.9. That is worse than before (loss)." in text
    assert "Sample answers" not in text


@pytest.mark.parametrize("missing", ["metrics", "summary", "evaluation", "config", "environment"])
def test_a_missing_file_is_named(make_run: MakeRun, missing: str) -> None:
    run = make_run(**{missing: None})
    file = {"metrics": "metrics.jsonl", "config": "config.yaml"}.get(missing, f"{missing}.json")
    assert f"Not there yet: {file}" in Page(write_report(run)).text


def test_a_run_that_has_just_begun(make_run: MakeRun) -> None:
    text = Page(write_report(make_run(metrics=None, summary=None, evaluation=None))).text
    assert "The run has recorded no step yet." in text
    assert "No step is recorded" in text


def test_a_run_in_its_middle(make_run: MakeRun) -> None:
    run = make_run(metrics=train_rows(30), summary=None, evaluation=None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 31, "lo')
    text = Page(write_report(run)).text
    assert "it stands at step 30" in text
    assert "The training loss fell from about" in text
    assert "1 line of metrics.jsonl could not be read" in text
    assert f"ft train {run / 'config.yaml'} --resume" in text
    assert "ft chat" not in text  # there is no model to talk to yet


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"metrics": 3, "samples": {"a": 1}, "rows": "x", "memory": []}'])
def test_unusable_files_do_no_harm(make_run: MakeRun, content: str) -> None:
    run = make_run()
    for name in ("summary.json", "evaluation.json", "environment.json", "config.yaml", "metrics.jsonl"):
        (run / name).write_text(content)
    assert "Before and after" in Page(write_report(run)).text


def test_losses_that_are_no_numbers_are_gaps_and_said(make_run: MakeRun) -> None:
    rows = train_rows(40)
    for step, loss in ((10, math.nan), (11, None), (20, math.inf)):
        rows[step - 1]["loss"] = loss
    page = Page(write_report(make_run(metrics=rows)))
    assert "The training loss was not a finite number at 3 of 40 recorded steps (10, 11, 20)" in page.text
    figure = page.source.split('id="loss"')[1].split("</figure>")[0]
    raw, smoothed, marks = (re.search(f'class="{name}" d="([^"]*)"', figure)[1] for name in ("faint", "line", "mark"))
    assert raw.count("M") == smoothed.count("M") == 3  # two gaps, three pieces
    assert marks.count("M") == 3
    assert "nan" not in figure.lower()
    assert "inf" not in figure.lower().replace("no finite loss", "")


def test_every_loss_a_nan(make_run: MakeRun) -> None:
    page = Page(write_report(make_run(metrics=train_rows(30, loss=math.nan))))
    assert "not a finite number at 30 of 30" in page.text
    assert "loss" not in page.ids("figure")


def test_of_a_step_twice_the_later_line_counts(make_run: MakeRun) -> None:
    rows = [*train_rows(5), {"kind": "train", "step": 3, "loss": 77.0}]
    page = Page(write_report(make_run(metrics=rows)))
    data = json.loads(re.search(r'id="loss".*?<script type="application/json">(.*?)</script>', page.source)[1])
    assert data["series"][0]["x"] == [1, 2, 3, 4, 5]
    assert data["series"][0]["y"][2] == 77


def test_a_methods_own_numbers_get_plots(make_run: MakeRun) -> None:
    rows = train_rows(3, **{"rewards/margins": 0.5, "speech/rate": 3.0, "note": "text", "flag": True})
    rows.append({"kind": "eval", "step": 3, "loss": 1.0, "accuracy": 0.7})
    page = Page(write_report(make_run(metrics=rows)))
    assert "Margin chosen above rejected" in page.text
    assert "Accuracy" in page.text
    assert "Speech rate" in page.text
    assert not {"Note", "Flag"} & set(page.text.split())


def test_a_spike_makes_the_axis_logarithmic(make_run: MakeRun) -> None:
    rows = train_rows(20)
    rows[10]["loss"] = 1e6
    assert "logarithmic" in Page(write_report(make_run(metrics=rows))).text


def test_a_long_run_is_a_small_page(make_run: MakeRun) -> None:
    rows = train_rows(100_000, learning_rate=1e-4, grad_norm=1.0, tokens_per_second=3.0, memory=2**30, reward=0.25)
    rows[54_321]["loss"] = 99.0
    page = Page(write_report(make_run(metrics=rows)))
    assert len(page.source) < 500_000
    assert "highest 99" in page.source
    assert max(len(path[1].get("d") or "") for path in page.elements if path[0] == "path") < 25_000


def test_nothing_that_a_model_says_becomes_markup(make_run: MakeRun) -> None:
    bad = '<script>alert("x")</script>\'"><img src=x onerror=alert(1)></script>&lt;\ud800\x00\u202e'
    run = make_run(
        name="a'b\"<i>&",
        config={bad: bad, "model": bad, "method": bad, "data": [{"path": bad}], "lora": {"r": bad}, "max_length": bad},
        environment={
            "base_model": {"name": bad, "path": bad},
            "libraries": {bad: bad},
            "started": bad,
            bad: bad,
            "torch": bad,
        },
        metrics=train_rows(30, **{bad: 1.0}),
        summary={"status": bad, "data": {bad: bad, "overlong_rows": 4}, "memory": {bad: 5.0}, "seconds": 3},
        evaluation={
            "data": bad,
            "rows": 3,
            "metrics": {bad: {"before": 1, "after": 2}},
            "samples": [
                {"prompt": bad, "expected": bad, "before": bad * 20, "after": bad * 400},
                {"prompt": [{"role": bad, "content": bad}], "expected": {bad: bad}, "before": 3, "after": None},
            ],
        },
    )
    (run / "export" / "<b>").mkdir(parents=True)
    page = Page(write_report(run))
    scripts = [attributes.get("type") for name, attributes in page.elements if name == "script"]
    assert scripts.count(None) == 1
    assert set(scripts) == {None, "application/json"}
    assert not {"img", "iframe", "object", "link", "i>"} & {name for name, _ in page.elements}
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert "characters more" in page.text
    assert '<script>alert("x")</script>' in page.text


def test_the_page_names_no_other_place(make_run: MakeRun) -> None:
    page = Page(write_report(make_run()))
    assert not re.search(r"https?://|//[a-z]|@import|url\(", page.source.replace("// ", ""))
    linked = [attributes["href"] for name, attributes in page.elements if name == "a"]
    assert linked
    assert all("://" not in str(place) for place in linked)


def test_long_text_folds(make_run: MakeRun) -> None:
    sample = {"prompt": "p " * 400, "expected": "yes", "before": "no", "after": "one\n" * 20}
    page = Page(write_report(make_run(evaluation={"metrics": {}, "samples": [sample]})))
    assert sum(name == "details" for name, _ in page.elements) == 2


def test_many_samples_open_on_demand(make_run: MakeRun) -> None:
    one = {"prompt": "p", "expected": "yes", "before": "no", "after": "yes"}
    text = Page(write_report(make_run(evaluation={"metrics": {}, "samples": [one] * 100}))).text
    assert "56 more samples" in text
    assert "36 further samples are in evaluation.json" in text


def test_what_is_still_wrong_is_in_plain_sight(make_run: MakeRun) -> None:
    good = [{"prompt": f"good {i}", "expected": "yes", "before": "no", "after": "yes"} for i in range(100)]
    bad = [{"prompt": f"bad {i}", "expected": "yes", "before": "no", "after": "no"} for i in range(3)]
    page = Page(write_report(make_run(evaluation={"metrics": {}, "samples": [*good, *bad]})))
    plain, _, folded = page.source.partition('class="more"')
    assert [plain.count(f">bad {i}<") for i in range(3)] == [1, 1, 0]
    assert folded.count(">bad 2<") == 1
    said = re.findall(r">((?:good|bad) \d+)<", page.source)
    assert len(said) == len(set(said)) == 64
    assert said[:6] == [f"good {i}" for i in range(6)]


def test_full_fine_tuning_has_nothing_to_merge(make_run: MakeRun) -> None:
    run = make_run(config={"model": "m", "method": "sft", "lora": None})
    (run / "adapter" / "adapter_model.safetensors").unlink()
    (run / "adapter").rename(run / "model")
    text = Page(write_report(run)).text
    assert "sft, full fine-tuning" in text
    assert "ft chat" in text
    assert "ft merge" not in text


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run folder .*none: .* holds no run"):
        write_report(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"):
        write_report(tmp_path / "file")
    with pytest.raises(RunError, match="is no run folder"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_newer_format_is_refused(make_run: MakeRun) -> None:
    run = make_run(environment={"run_format": 2})
    with pytest.raises(RunError, match=r"run_format 2.*upgrade"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_disk_that_takes_no_more_leaves_the_old_page(make_run: MakeRun) -> None:
    """A real limit on the size of files (EFBIG), in a process of its own."""
    run = make_run()
    (run / "report.html").write_text("old")
    code = (
        "import resource, signal, sys; from pathlib import Path; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from ft_core.report import write_report\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_report(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, run], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith(f"RunError cannot write {run / 'report.html'}: File too large")
    assert (run / "report.html").read_text() == "old"
    assert [p.name for p in run.iterdir() if p.name.startswith(".")] == []


def test_the_command(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(run)])) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").is_file()


def test_nothing_heavy_is_imported() -> None:
    heavy = {"torch", "transformers", "pydantic", "numpy"}
    code = f"import sys, ft_core.report, ft_core.commands.report; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
