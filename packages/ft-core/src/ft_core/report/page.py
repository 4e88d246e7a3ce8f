"""The page: its parts in the order in which a person wants them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib.resources import files as resources

from ft_core.report import sections
from ft_core.report.completions import completions
from ft_core.report.figures import figures
from ft_core.report.html import text
from ft_core.report.read import RunRecord
from ft_core.report.verdict import base_name, circumstances, verdict

__all__ = ["build_page"]


def build_page(record: RunRecord) -> str:
    """The whole page as a string of HTML, with style and script inside."""
    style = (resources("ft_core.report") / "style.css").read_text(encoding="utf-8")
    script = (resources("ft_core.report") / "hover.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing may be fetched, and no script runs but ours: should a model's text ever slip through unescaped, it stays
    # text that does nothing.
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    run = record.path.resolve().name
    title = f"{base_name(record)} → {run}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{''.join(_body(record, run))}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _body(record: RunRecord, run: str) -> Iterator[str]:
    yield "<main><header>"
    yield f'<h1><span class="from">{text(base_name(record))}</span> <span class="to">→&nbsp;{text(run)}</span></h1>'
    words = " <i>·</i> ".join(f"<span>{text(word)}</span>" for word in circumstances(record))
    yield f'<p class="circumstances">{words}</p>'
    for note in _notes(record):
        yield f'<p class="warning">{text(note)}</p>'
    if said := verdict(record):
        lead, *others = said
        yield f'<p class="verdict">{text(lead)}</p>'
        yield f'<p class="cost">{text(" ".join(others))}</p>' if others else ""
    yield f"</header>{sections.facts(record)}"
    yield _section("evaluation", "Before and after", sections.evaluation(record))
    drawn = figures(record)
    yield _section("training", "Training", drawn or '<p class="note">No step is recorded in metrics.jsonl yet.</p>')
    yield _section("completions", "Best and worst completions", completions(record))
    yield _section("samples", "Sample answers", sections.samples(record))
    yield '<div class="columns"><div>'
    yield _section("configuration", "Configuration", sections.configuration(record))
    yield "</div><div>"
    yield _section("environment", "Environment", sections.environment(record))
    yield _section("data", "Data", sections.data(record))
    yield "</div></div>"
    yield _section("files", "Files", sections.files(record))
    lines = "".join(
        f"<li><code>{text(command)}</code> <span>{text(what)}</span></li>"
        for command, what in sections.commands(record)
    )
    yield _section("next", "Next", f'<ul class="commands">{lines}</ul>')
    yield "</main>"


def _notes(record: RunRecord) -> Iterator[str]:
    missing = [
        f"{name} ({what})"
        for name, what, there in (
            ("config.yaml", "the configuration", record.config),
            ("environment.json", "machine and versions", record.environment),
            ("metrics.jsonl", "the steps", record.train or record.evals),
            ("summary.json", "counts and times, at the end of the run", record.summary is not None),
            ("evaluation.json", "before and after", record.evaluation is not None),
        )
        if not there and not any(note.startswith(name) for note in record.notes)
    ]
    if missing:
        yield f"Not there yet: {', '.join(missing)}."
    yield from record.notes
    if record.skipped_lines:
        lines = "line" if record.skipped_lines == 1 else "lines"
        yield f"{record.skipped_lines} {lines} of metrics.jsonl could not be read (cut short, perhaps) and left out."


def _section(name: str, title: str, body: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{title}</h2>{body}</section>'
        if body
        else ""
    )
