"""A plan in words: the table of `ft plan`, and the one line of `ft train`."""

from __future__ import annotations

from collections.abc import Sequence

from ft_core.console import counted
from ft_core.planning.engine import CONTEXT, MOST_ROWS, Plan

__all__ = ["line", "table"]

GIB = 2**30
SHOWN = GIB // 200
"""Bytes from which a part is worth a row."""
CHOSEN = {
    "keep": "kept", "inputs": "partly computed again", "recompute": "computed again", "offload": "offloaded",
    "offload-input": "computed again from offloaded inputs",
}  # fmt: skip
LABELS = {
    "weights": "weights", "16-bit copies": "16-bit copies of the weights", "head": "head: logits and their gradient",
    "one layer": "one layer backwards", "update": "the optimizer's update", "optimizer": "optimizer's state",
    "workspace": "cuBLAS' workspace", "batch": "the batch and its angles", "images": "the images' pixels",
    "tower": "vision tower, forward or backward",
}  # fmt: skip


def line(plan: Plan) -> str:
    """The plan in one line, such as ``plan: about 7.2 of 23.0 GiB, 9.1k tokens a second, 32 layers kept``."""
    words = [f"about {plan.peak.total / GIB:.1f} of {plan.limit / GIB:.1f} GiB"]
    if plan.recorded >= SHOWN:
        words[0] += f" (and up to {plan.recorded / GIB:.1f} for recorded steps)"
    if plan.times is not None:
        words.append(f"{_short(plan.times.rate)} tokens a second")
    words.append(_chosen(plan))
    if plan.peak.tower_again:
        words.append("the vision tower's computed again")
    if plan.peak.tile:
        words.append(f"tiles of {plan.peak.tile} tokens")
    if plan.peak.disk:
        words.append(f"{plan.peak.disk / GIB:.1f} GiB of them on the disk")
    if _pages(plan):
        words.append("the optimizer's state paged to the host's memory")
    if plan.peak.lent:
        words.append(f"{plan.peak.lent / GIB:.1f} GiB of weights in the host's memory")
    rough = "" if plan.peak.exact else " (rough)"
    doubt = "" if plan.fits else "; it may run out of memory: ft plan says what would fit"
    return f"plan: {', '.join(words)}{rough}{doubt}"


def table(plan: Plan, ways: Sequence[str] = ()) -> str:
    """The plan in a table, with what would make it fit where it doesn't."""
    config, training, peak = plan.config, plan.config.training, plan.peak
    lora = "full fine-tuning" if config.lora is None else f"LoRA r={config.lora.r}"
    weights = "" if config.quantization == "none" else f" on {config.quantization}"
    lines = [
        f"{plan.model} ({plan.parameters / 1e9:.2f} B), {config.method}, {lora}{weights}, {training.batch_size} x "
        f"{config.max_length} tokens, on {plan.card.name} ({plan.card.memory / GIB:.1f} GiB)",
        "",
    ]
    lines += [_row(LABELS.get(part, part), size) for part, size in peak.parts.items() if size >= SHOWN]
    lines += [
        _row("peak", peak.total) + f"   of {plan.limit / GIB:.2f} that can be had",
        _row("CUDA itself, beside that", CONTEXT),
        *([_row("recorded steps, up to, beside that", plan.recorded)] if plan.recorded >= SHOWN else []),
        _row("host memory", peak.host + peak.paged + peak.lent),
        *([_row("disk, for what the host cannot hold", peak.disk)] if peak.disk else []),
        "",
        f"layers         {_chosen(plan)}{'; those of the vision tower computed again' if peak.tower_again else ''}",
        f"micro-batch    {_batch(plan)}",
        f"sequence tile  {f'{peak.tile} tokens' if peak.tile else 'none needed'}",
        *(
            [f"weights        {peak.lent / GIB:.2f} GiB of them in the host's memory, lent layer by layer"]
            if peak.lent
            else []
        ),
        f"head           {peak.head_rows} rows of logits at a time",
        f"optimizer      {peak.optimizer}{', for its state does not fit on the GPU' if _pages(plan) else ''}",
    ]
    lines += _times(plan)
    lines += [f"note           {note}" for note in plan.notes]
    if plan.fits:
        lines += ["", "fits"]
    else:
        over = peak.total - plan.limit
        why = f"{over / GIB:.2f} GiB too much" if over > 0 else "the host's memory cannot hold the activations"
        lines += ["", f"does not fit: {why}"]
        lines += [f"would fit: {way}" for way in ways] or ["nothing that was tried would fit"]
    return "\n".join(lines)


def _pages(plan: Plan) -> bool:
    """Whether the optimizer is paged without anybody having asked for that."""
    return plan.config.training.optimizer == "adamw_8bit" and plan.peak.optimizer.startswith("paged")


def _row(name: str, size: int) -> str:
    return f"{name:34} {size / GIB:8.2f} GiB"


def _chosen(plan: Plan) -> str:
    choices = plan.peak.choices
    return ", ".join(
        f"{choices.count(choice)} of {len(choices)} {CHOSEN[choice]}" for choice in dict.fromkeys(reversed(choices))
    )


def _batch(plan: Plan) -> str:
    said = f"{plan.config.training.batch_size} {'fits' if plan.fits else 'does not fit'}"
    if not plan.largest:
        return f"{said}, nor does 1" if not plan.fits and plan.config.training.batch_size > 1 else said
    kept = plan.largest_kept
    with_kept = "" if kept in (0, plan.largest) else f" ({kept} with all activations kept)"
    at_least = "at least " if plan.largest >= MOST_ROWS else ""
    return f"{said}; the largest that fits: {at_least}{plan.largest}{with_kept}"


def _times(plan: Plan) -> list[str]:
    times = plan.times
    if times is None:
        return []
    parts = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in times.parts.items() if seconds >= 5e-4)
    lines = [
        f"step           {_seconds(times.step)}: {times.accumulation} x {_ms(times.batch)} and {_ms(times.update)} of "
        f"updates; {times.rate:,.0f} tokens a second",
        f"of which       {parts}",
    ]
    if plan.steps is None:
        return [*lines, f"run            unknown: {plan.counted}"]
    seconds = plan.seconds or 0.0
    return [*lines, f"run            {counted(plan.steps, 'step')} ({plan.counted}): about {_seconds(seconds)}"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _short(rate: float) -> str:
    return f"{rate / 1e3:.1f}k" if rate >= 1000 else f"{rate:.0f}"
