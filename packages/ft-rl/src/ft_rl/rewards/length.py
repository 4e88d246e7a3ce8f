"""The reward ``length``: how far a completion is from a length, or beyond one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ft_core.errors import DataError
from ft_rl.rewards.samples import Text, text_of

__all__ = ["LengthSettings", "length", "near_target", "soft_overlong"]


class LengthSettings(BaseModel):
    """Settings of ``length``; one of ``target`` and ``max`` is given.

    Attributes:
        target: the length that gets 1; see :func:`near_target`.
        slope: how much a deviation of one target length costs.
        max: the length above which a completion gets -1; see :func:`soft_overlong`.
        buffer: so long before ``max`` the punishment begins to rise; unset, a fifth of ``max``; 0: none before it.
        unit: what is counted: the tokens that were sampled, or the text's ``characters`` or ``words``.
    """

    model_config = ConfigDict(extra="forbid")

    target: int | None = Field(default=None, ge=1)
    slope: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max: int | None = Field(default=None, ge=1)
    buffer: int | None = Field(default=None, ge=0)
    unit: Literal["tokens", "characters", "words"] = "tokens"

    @model_validator(mode="after")
    def _one_of_two(self) -> LengthSettings:
        if (self.target is None) == (self.max is None):
            raise ValueError("length takes one of target and max")
        if self.max is None and self.buffer is not None:
            raise ValueError("length.buffer belongs to length.max")
        if self.max is not None and (self.buffer or 0) > self.max:
            raise ValueError(f"length.buffer {self.buffer} is longer than length.max {self.max}")
        return self


def near_target(count: int, target: int, slope: float) -> float:
    """1 at the target length, less by ``slope`` for each target length of distance, never below 0."""
    return max(0.0, 1 - slope * abs(count - target) / target)


def soft_overlong(count: int, most: int, buffer: int) -> float:
    """DAPO's soft punishment of overlong answers (Yu et al. 2025, arXiv:2503.14476, equation 13).

    0 up to ``most - buffer``, falling linearly to -1 at ``most``, and -1 beyond.
    """
    if count <= most - buffer:
        return 0.0
    return (most - buffer - count) / buffer if count <= most else -1.0


def length(settings: LengthSettings) -> Any:
    """The reward function: a number from 0 to 1 for ``target``, from -1 to 0 for ``max``."""

    def reward(
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        if settings.unit == "tokens":
            if completion_ids is None:
                raise DataError("the tokens are not known here: set unit to characters or words")
            counts = [len(ids) for ids in completion_ids]
        else:
            texts = [text_of(completion) for completion in completions]
            counts = [len(text) if settings.unit == "characters" else len(text.split()) for text in texts]
        if settings.target is not None:
            return [near_target(count, settings.target, settings.slope) for count in counts]
        assert settings.max is not None
        buffer = settings.max // 5 if settings.buffer is None else settings.buffer
        return [soft_overlong(count, settings.max, buffer) for count in counts]

    return reward
