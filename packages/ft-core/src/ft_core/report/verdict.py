"""The run in words, made from its numbers: the page's title, its line of circumstances, and its verdict."""

from __future__ import annotations

import math
from pathlib import PurePath

from ft_core.comparison import OF_ANSWERS
from ft_core.console import counted
from ft_core.errors import PluginError
from ft_core.plugins.registry import registry
from ft_core.plugins.specs import MethodSpec
from ft_core.report.metrics import Metric, metrics_of
from ft_core.report.numbers import count, date, duration, memory, percent, plain
from ft_core.report.read import RunRecord, mapping, number
from ft_core.report.series import smooth

__all__ = ["base_name", "circumstances", "generates", "losses", "method_name", "peak", "smoothing_span", "verdict"]


def base_name(record: RunRecord) -> str:
    """The base model's name as people know it."""
    base = mapping(record.environment.get("base_model"))
    return str(base.get("name") or base.get("reference") or record.config.get("model") or "unknown model")


def method_name(record: RunRecord) -> str:
    """The method and what it trained: sft, QLoRA (nf4, rank 16)."""
    method = str(record.config.get("method") or "training")
    if "lora" not in record.config:
        return method
    lora = record.config["lora"]
    if lora is None:
        return f"{method}, full fine-tuning"
    held = record.config.get("quantization") or "none"
    rank = f"rank {mapping(lora)['r']}" if "r" in mapping(lora) else ""
    kind = "DoRA" if mapping(lora).get("dora") is True else "LoRA"
    details = ", ".join(str(word) for word in (None if held == "none" else held, rank) if word)
    return f"{method}, {'Q' if held != 'none' else ''}{kind}{f' ({details})' if details else ''}"


def generates(record: RunRecord) -> bool:
    """Whether the trained model writes text (a reward model gives a score instead)."""
    try:
        return registry().get(MethodSpec, str(record.config.get("method") or "sft")).head == "language-model"
    except PluginError:  # the run may come from a machine with more packages
        return True


def circumstances(record: RunRecord) -> list[str]:
    """Method, data, machine and date, each in a few words."""
    data = record.config.get("data")
    sources = [data] if isinstance(data, str) else [mapping(d).get("path", d) for d in data] if data else []
    names = [PurePath(str(source)).name or str(source) for source in sources if source]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    device = record.environment.get("device_name") or record.environment.get("device")
    started = record.environment.get("started")
    words = [method_name(record), f"{', '.join(names[:2])}{more}", device, date(str(started)) if started else ""]
    return [str(word) for word in words if word]


def losses(record: RunRecord) -> tuple[list[float], list[float | None], list[float]]:
    """Steps, losses (None where there is no finite one), and the steps of the latter."""
    steps, values, odd = [], [], []
    for row in record.train:
        if "loss" not in row:
            continue
        loss = number(row["loss"])
        finite = loss is not None and math.isfinite(loss)
        steps.append(float(row["step"]))
        values.append(loss if finite else None)
        if not finite:
            odd.append(float(row["step"]))
    return steps, values, odd


def smoothing_span(points: int) -> int:
    """Over how many points a loss is smoothed: a fortieth of the run, but enough to see through the noise."""
    return max(6, round(points / 40))


def peak(record: RunRecord) -> float | None:
    """The highest memory of the run in bytes, from the summary or else the steps so far."""
    values = [number(value) for value in mapping(mapping(record.summary).get("memory")).values()]
    if not values:
        values = [number(row.get("memory")) for row in record.train]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return max(known, default=None)


def _moved(metric: Metric, where: str = "") -> str:
    name = metric.name if metric.key != "loss" else "Held-out loss"
    before, after = metric.show(metric.before, 3), metric.show(metric.after, 3)
    if metric.verb == "stayed":
        return f"{name}{where} stayed at {after}"
    if metric.verb:
        return f"{name}{where} {metric.verb} from {before} to {after}"
    return (
        f"{name}{where} is {after} after training" if metric.after is not None else f"{name}{where} was {before} before"
    )


def verdict(record: RunRecord) -> list[str]:
    """A few sentences: what got better or worse, at what cost, and what went wrong."""
    return [s for s in (_state(record), _gain(record), _cost(record), _faults(record)) if s]


def _state(record: RunRecord) -> str:
    if record.summary is None:
        if not record.train:
            return "The run has recorded no step yet."
        return f"The run has not finished: it stands at step {count(record.train[-1]['step'])}."
    status = record.summary.get("status")
    return "" if status in (None, "finished") else f"The run's status is “{status}”."


def _gain(record: RunRecord) -> str:
    metrics = metrics_of(record)
    if not metrics:
        _, values, _ = losses(record)
        level = [v for v in smooth(values, smoothing_span(len(values))) if v is not None]
        if len(level) < 2:
            return ""
        verb = "fell" if level[-1] < level[0] else "rose"
        return f"The training loss {verb} from about {plain(level[0], 2)} to {plain(level[-1], 2)} (smoothed)."
    rows = number(mapping(record.evaluation).get("rows"))
    where = f" on {count(rows)} held-out row{'' if rows == 1 else 's'}" if rows else ""
    lead = metrics[0]
    answered = mapping(record.evaluation).get("samples")
    if lead.key in OF_ANSWERS and isinstance(answered, list) and len(answered) != rows:
        where = " on held-out rows"  # not all of them were answered
    loss = next((m for m in metrics if m.key == "loss" and m is not lead), None)
    if lead.key == "loss":
        where = where.replace(" held-out", "")
    sentence = _moved(lead, where)
    if loss:
        moved = _moved(loss)
        sentence += f"; {moved[0].lower()}{moved[1:]}"
    worse = [m.name.lower() for m in metrics if m.better is False]
    note = f" That is worse than before ({', '.join(worse)})." if worse else ""
    return f"{sentence}.{note}"


def _cost(record: RunRecord) -> str:
    summary = mapping(record.summary)
    last = record.train[-1] if record.train else {}
    steps = number(summary.get("steps")) or number(last.get("step"))
    tokens = number(summary.get("tokens")) or number(last.get("tokens"))
    seconds = number(summary.get("seconds")) or number(last.get("seconds"))
    top = peak(record)
    if steps and seconds:
        over = f" over {count(tokens)} tokens" if tokens else ""
        rate = f" ({count(tokens / seconds)} tokens per second)" if tokens else ""
        used = f", with at most {memory(top)} of memory" if top else ""
        noun = "step" if steps == 1 else "steps"
        return f"{count(steps)} {noun}{over} took {duration(seconds)}{rate}{used}."
    return f"Memory peaked at {memory(top)}." if top else ""


def _faults(record: RunRecord) -> str:
    steps, _, odd = losses(record)
    words = []
    if odd:
        few = ", ".join(count(step) for step in odd[:5]) + (", …" if len(odd) > 5 else "")
        words.append(
            f"The training loss was not a finite number at {count(len(odd))} of {counted(len(steps), 'recorded step')} "
            f"({few}); the plot shows gaps there."
        )
    data = mapping(mapping(record.summary).get("data"))
    rows, overlong = number(data.get("train_rows")), number(data.get("overlong_rows"))
    if overlong:
        share = f" ({percent(overlong / rows)} of the training rows)" if rows and overlong <= rows else ""
        limit = record.config.get("max_length")
        verb = "row was" if overlong == 1 else "rows were"
        words.append(f"{count(overlong)} {verb} longer than max_length{f' ({limit})' if limit else ''}{share}.")
    return " ".join(words)
