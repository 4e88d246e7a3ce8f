"""The parts of the page: evaluation, samples, configuration, environment, data, files and what to do next."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ft_core.comparison import OF_ANSWERS
from ft_core.console import counted
from ft_core.report.html import fold, table, text
from ft_core.report.metrics import label, metrics_of
from ft_core.report.numbers import DASH, compact, count, date, duration, memory, percent
from ft_core.report.read import RunRecord, mapping, number
from ft_core.report.verdict import generates, peak

__all__ = ["commands", "configuration", "data", "environment", "evaluation", "facts", "files", "samples"]

SHOWN = 8
"""Samples in plain sight; the others open on demand."""

SHORT = 64
"""Characters up to which an expected answer is short, where the evaluation doesn't tell by measuring exact match."""

MOST = 64
"""Samples on the page at most."""


def facts(record: RunRecord) -> str:
    """The run's size in a row of figures."""
    summary, last = mapping(record.summary), record.train[-1] if record.train else {}

    def of(key: str, other: str | None = None) -> float | None:
        value = number(summary.get(key))
        return number(last.get(other or key)) if value is None else value

    seconds, tokens, trained, total = of("seconds"), of("tokens"), of("trainable_parameters"), of("parameters")
    pairs = [
        ("Time", duration(seconds) if seconds is not None else "", ""),
        ("Steps", count(steps) if (steps := of("steps", "step")) is not None else "", ""),
        ("Tokens", compact(tokens) if tokens is not None else "", ""),
        ("Tokens per second", compact(round(tokens / seconds)) if tokens and seconds else "", ""),
        ("Peak memory", memory(top) if (top := peak(record)) is not None else "", ""),
        (
            "Trained parameters",
            compact(trained) if trained is not None else "",
            f"{percent(trained / total)} of {compact(total)}" if trained is not None and total else "",
        ),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{text(value)}{f'<small>{text(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in pairs
        if value
    )
    return f'<dl class="facts">{cells}</dl>' if cells else ""


def evaluation(record: RunRecord) -> str:
    """The table of metrics before and after."""
    if record.evaluation is None:
        return (
            '<p class="note">Nothing is measured yet: there is no usable evaluation.json. '
            "<code>ft eval</code> makes it.</p>"
        )
    rows = []
    for metric in metrics_of(record):
        mark = {True: '<span class="good">better</span>', False: '<span class="bad">worse</span>', None: ""}[
            metric.better
        ]
        rows.append(
            (
                text(metric.name),
                text(metric.show(metric.before)),
                f"<b>{text(metric.show(metric.after))}</b>",
                f"{text(metric.change)} {mark}",
            )
        )
    if not rows:
        return '<p class="note">The evaluation holds no numbers.</p>'
    measured = number(record.evaluation.get("rows"))
    source = record.evaluation.get("data")
    where = f"{count(measured)} row{'' if measured == 1 else 's'}" if measured is not None else "Measured"
    total = number(mapping(mapping(record.summary).get("data")).get("held_out_rows"))
    if source == "held_out.jsonl" and measured is not None and total is not None and measured < total:
        where = f"The first {count(measured)} rows of {count(total)} (ft eval measures all)"
    caption = f"{where} of {source}" if source else f"{where} of held-out data"
    answers = number(record.evaluation.get("answers"))
    if answers is not None and measured is not None and answers < measured:
        named = [label(key) for key in OF_ANSWERS if key in mapping(record.evaluation.get("metrics"))]
        caption += f"; {counted(int(answers), 'answer')} for {', '.join(named)}"
    if ways := mapping(record.evaluation.get("compared")):
        caption += f"; answers compared with {', '.join(f'{key}: {_value(value)}' for key, value in ways.items())}"
    return table(caption, ("Metric", "Before", "After", "Change"), rows, kind="metrics")


def _said(value: Any) -> str | None:
    """A prompt or an answer as text: strings as they are, messages by role, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(m, Mapping) and "content" in m for m in value):
        return "\n".join(f"{m.get('role', '')}: {m['content']}" for m in value)
    return json.dumps(value, ensure_ascii=False, indent=1)


def samples(record: RunRecord) -> str:
    """Answers side by side, marked right or wrong where answers are short: a longer one has no one right wording."""
    found = mapping(record.evaluation).get("samples")
    found = [mapping(s) for s in found if isinstance(s, Mapping)] if isinstance(found, list) else []
    if not found:
        return ""
    expected = [_said(sample.get("expected")) for sample in found]
    metrics = mapping(mapping(record.evaluation).get("metrics"))
    judged = any("right" in sample for sample in found) or (
        ("exact_match" in metrics and "cer" not in metrics)
        or all(answer is not None and len(answer) <= SHORT for answer in expected)
    )
    rows = [_sample(sample, judged) for sample in (_failures_early(found) if judged else found)[:MOST]]
    out = _sample_table("Held-out prompts and the answers to them", rows[:SHOWN])
    if rows[SHOWN:]:
        out += (
            f'<details class="more"><summary>{counted(len(rows) - SHOWN, "more sample")}</summary>'
            f"{_sample_table('Further samples', rows[SHOWN:])}</details>"
        )
    said = []
    if judged:
        right = {side: sum(_right(sample, side) is True for sample in found) for side in ("before", "after")}
        said.append(f"Right before: {right['before']} of {counted(len(found), 'sample')}; after: {right['after']}.")
    if len(found) > MOST:
        further = "sample is" if len(found) == MOST + 1 else "samples are"
        said.append(f"{count(len(found) - MOST)} further {further} in evaluation.json.")
    return (f'<p class="note">{" ".join(said)}</p>' if said else "") + out


def _failures_early(found: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The samples in their order, save that of those in plain sight up to two are still wrong, if there are any."""
    first, rest = found[:SHOWN], found[SHOWN:]
    have = sum(_right(sample, "after") is False for sample in first)
    wrong = [sample for sample in rest if _right(sample, "after") is False]
    keep = len(first) - min(max(0, 2 - have), len(wrong))
    moved = SHOWN - keep
    others = [*first[keep:], *wrong[moved:], *(s for s in rest if _right(s, "after") is not False)]
    return [*first[:keep], *wrong[:moved], *others]


def _right(sample: Mapping[str, Any], side: str) -> bool | None:
    """Whether an answer is right, by what the sample says of it; or else the expected one, white space at both ends
    apart, as exact match counts it."""
    known = mapping(sample.get("right")).get(side)
    if isinstance(known, bool):
        return known
    answer, expected = _said(sample.get(side)), _said(sample.get("expected"))
    return None if answer is None or expected is None else answer.strip() == expected.strip()


def _sample(sample: Mapping[str, Any], judged: bool) -> str:
    cells = []
    for key, name in (("prompt", "Prompt"), ("expected", "Expected"), ("before", "Before"), ("after", "After")):
        said = _said(sample.get(key))
        right = _right(sample, key) if judged and key in ("before", "after") else None
        mark = {
            True: '<span class="mark good">right</span>',
            False: '<span class="mark bad">wrong</span>',
            None: "",
        }[right]
        body = fold(said) if said is not None else f'<div class="said none">{DASH}</div>'
        cells.append(f'<td role="cell"><span class="cell-name">{name}</span>{body}{mark}</td>')
    return f'<tr role="row">{"".join(cells)}</tr>'


def _sample_table(caption: str, rows: list[str]) -> str:
    head = "".join(
        f'<th scope="col" role="columnheader">{name}</th>' for name in ("Prompt", "Expected", "Before", "After")
    )
    return (  # the roles keep it a table for screen readers where a narrow page stacks its cells
        f'<table class="samples" role="table"><caption>{caption}</caption><thead role="rowgroup"><tr role="row">{head}'
        f'</tr></thead><tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(value: Any) -> str:
    """A value as YAML writes it, near enough: null, true, plain words, JSON for what is nested."""
    if isinstance(value, str) and value:
        return text(value)
    if isinstance(value, float) and math.isfinite(value):
        return text(f"{value:.12g}")
    return text(json.dumps(value, ensure_ascii=False, default=str))


def configuration(record: RunRecord) -> str:
    """Every key of the resolved configuration."""
    rows = [
        (text(key).replace(".", ".<wbr>").replace("_", "_<wbr>"), _value(value)) for key, value in _flat(record.config)
    ]
    return table("config.yaml, every key with its value", (), rows, kind="pairs") or _absent("config.yaml")


def _absent(name: str) -> str:
    return f'<p class="note">There is no usable {name}.</p>'


def environment(record: RunRecord) -> str:
    """The machine and the versions."""
    values, base = record.environment, mapping(record.environment.get("base_model"))
    named = [
        ("Base model", base.get("name")),
        ("given as", base.get("reference")),
        ("loaded from", base.get("path")),
        ("Device", " · ".join(str(v) for v in (values.get("device"), values.get("device_name")) if v)),
        ("Data type", values.get("dtype")),
        ("Started", date(str(values["started"])) if values.get("started") else None),
        ("Platform", values.get("platform")),
        ("Python", values.get("python")),
        ("ft-core", values.get("ft_core")),
        ("torch", values.get("torch")),
        *mapping(values.get("libraries")).items(),
    ]
    shown = {"run_format", "ft_core", "python", "platform", "torch", "libraries", "device", "device_name", "dtype"}
    shown |= {"base_model", "started"}
    named += [(key, value) for key, value in _flat({k: v for k, v in values.items() if k not in shown})]
    rows = [(text(name), _value(value)) for name, value in named if value not in (None, "", {}, [])]
    return table("Machine and versions", (), rows, kind="pairs") or _absent("environment.json")


def data(record: RunRecord) -> str:
    """How many rows and tokens there were."""
    if record.summary is None:
        return '<p class="note">The counts come with summary.json, at the end of the run.</p>'
    names = {
        "train_rows": "Training rows",
        "held_out_rows": "Held-out rows",
        "overlong_rows": "Rows longer than max_length",
        "train_tokens": "Tokens in the training rows",
        "trained_tokens": "Tokens that count in the loss",
    }
    rows = []
    for key, value in mapping(record.summary.get("data")).items():
        size = number(value)
        name = names.get(str(key)) or str(key).replace("_", " ").capitalize()
        rows.append((text(name), text(count(size)) if size is not None else _value(value)))
    return table("Rows and tokens", (), rows, kind="pairs counts") or '<p class="note">The summary holds no counts.</p>'


def _size(path: Path) -> int:
    """Bytes of a file or of everything below a folder; links are not followed."""
    if not path.is_dir():
        return path.lstat().st_size
    return sum((Path(top) / name).lstat().st_size for top, _, names in os.walk(path) for name in names)


def files(record: RunRecord) -> str:
    """What lies in the run folder, and how large it is."""
    what = {
        "adapter": "the adapter (PEFT) and the tokenizer",
        "model": "the trained model and the tokenizer",
        "merged": "adapter and base in one 16-bit model",
        "export": "",
        "checkpoints": "to resume from",
        "held_out.jsonl": "the rows kept from training",
        "evaluation.json": "before and after, with all samples",
        "evaluation-partial.json": "a later look at fewer rows or answers",
        "metrics.jsonl": "one line a step",
        "samples.jsonl": "best and worst completions",
        "summary.json": "counts, times, memory",
        "config.yaml": "the configuration, resolved",
        "environment.json": "machine and versions",
    }
    rows = []
    for name, meaning in what.items():
        path = record.path / name
        places = sorted(path.iterdir()) if name == "export" and path.is_dir() else [path]
        for place in places:
            if not place.exists():
                continue
            try:
                size = _size(place)
            except OSError:  # a folder that changes while it is read, or may not be read
                continue
            relative = place.relative_to(record.path).as_posix() + ("/" if place.is_dir() else "")
            if name == "checkpoints":
                steps = sum(1 for p in place.glob("checkpoint-*") if p.is_dir())
                if not steps:
                    continue
                meaning = f"{steps} {'checkpoint' if steps == 1 else 'checkpoints'} to resume from"
            said = meaning or f"written by ft export --to {place.name}"
            link = f'<a href="{text(quote(relative))}">{text(relative)}</a><small>{text(said)}</small>'
            rows.append((link, text(memory(size))))
    return table("In this folder", ("File", "Size"), rows, kind="files") or '<p class="note">The folder is empty.</p>'


def commands(record: RunRecord) -> list[tuple[str, str]]:
    """Commands that make sense next, each with what it does."""
    run = shlex.quote(str(record.path))
    there = {name for name in ("adapter", "model", "merged") if (record.path / name).is_dir()}
    out: list[tuple[str, str]] = []
    if record.summary is None or record.summary.get("status") not in (None, "finished"):
        config = shlex.quote(str(record.path / "config.yaml"))
        out.append((f"ft train {config} --resume", "go on with the run"))
    if there and generates(record):
        out.append((f"ft chat {run}", "talk to it"))
    if there and record.evaluation is None:
        out.append((f"ft eval {run}", "measure it on held-out data"))
    if "adapter" in there and "merged" not in there:
        out.append((f"ft merge {run}", "adapter and base in one model"))
    if there and generates(record) and not (record.path / "export" / "gguf").is_dir():
        out.append((f"ft export {run} --to gguf", "a file for llama.cpp"))
    out.append((f"ft report {run}", "write this page again"))
    return out
