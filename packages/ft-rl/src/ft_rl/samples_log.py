"""``samples.jsonl``: of each rollout, the best and the worst completion, for a person to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ft_core.errors import RunError
from ft_core.runs import Run
from ft_rl.pairs import part_of

__all__ = ["SamplesLog", "best_and_worst", "readable"]

ROLLOUTS = 500
"""Rollouts that a run records at most, or about so: of a longer run every k-th."""

LONGEST = 20_000
"""Characters of one text; of a longer one the middle is left out, since answers stand at the end."""


class SamplesLog:
    """Appends to the file of one run; where the run is resumed, what came after its checkpoint is gone by then.

    Args:
        folder: the run's.
        total: steps that the run will have.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.path = folder / Run.SAMPLES
        self._every = max(1, math.ceil(total / ROLLOUTS))
        self._next = 0

    def write(
        self,
        step: int,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rewards: Mapping[str, Sequence[float | None]],
        totals: Sequence[float | None],
    ) -> None:
        """Record a rollout, unless one of the steps just before is recorded and the run is long.

        Args:
            step: the optimizer step that learns from it first, counted from 1 as in ``metrics.jsonl``.
            prompts, completions: strings or lists of messages, one each for every completion.
            rewards: each reward's value of every completion; totals: the weighted sum. None or NaN: not scored.

        Raises:
            RunError: the file cannot be written.
        """
        if step < self._next:
            return
        self._next = step + self._every
        lines = []
        for rank, i in best_and_worst(totals):
            row = {
                "step": step,
                "rank": rank,
                "reward": totals[i],
                "rewards": {name: _finite(values[i]) for name, values in rewards.items()},
                "prompt": readable(prompts[i]),
                "completion": readable(completions[i]),
            }
            lines.append(json.dumps(row, allow_nan=False) + "\n")
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror or error}; free some space, go on with --resume"
            ) from error


def best_and_worst(totals: Sequence[float | None]) -> list[tuple[str, int]]:
    """Rank and index of the highest and the lowest total, of equal ones the first and the last.

    Totals that are None, NaN or infinite do not count; of one alone, the lowest is left out.
    """
    known = [(value, -i) for i, value in enumerate(totals) if value is not None and math.isfinite(value)]
    if not known:
        return []
    best, worst = -max(known)[1], -min(known)[1]
    return [("best", best)] if best == worst else [("best", best), ("worst", worst)]


def readable(value: Any) -> str:
    """A prompt or a completion as bounded text: of one message its content, of several each after its role."""
    if isinstance(value, str):
        said = value
    elif len(value) == 1:
        said = _content(value[0])
    else:
        said = "\n".join(f"{message.get('role', '')}: {_content(message)}" for message in value)
    if len(said) <= LONGEST:
        return said
    half = LONGEST // 2
    return f"{said[:half]}\n… {len(said) - 2 * half:,} characters left out …\n{said[-half:]}"


def _content(message: Mapping[str, Any]) -> str:
    """A message's reasoning, text (other parts, such as images, by name or kind) and, as JSON, its calls of tools."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content or ""]
    words = [str(message.get("reasoning_content") or "")]
    words += [part_of(part) if isinstance(part, Mapping) else str(part) for part in parts]
    if message.get("tool_calls"):
        words.append(json.dumps(message["tool_calls"], ensure_ascii=False, default=str))
    return "\n".join(word for word in words if word)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
