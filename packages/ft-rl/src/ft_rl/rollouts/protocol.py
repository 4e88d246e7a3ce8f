"""What a rollout engine is: it is handed prompts and writes completions with the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from ft_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ft_core.fast.beside import Beside

__all__ = ["TOKENS_AT_ONCE", "Asked", "Completion", "Engine", "EngineJob", "Sampling", "SeeingEngine", "checked"]

Asked: TypeAlias = "Callable[[Sequence[int], Tensor, Tensor], Beside | None]"
"""Gives what some prompts hold beside text, by their numbers and, on the CPU, ids and mask ``[B, L]`` of the batch that
they are read in (:func:`ft_rl.inputs.beside_of`)."""

TOKENS_AT_ONCE = 32768
"""The most tokens, of prompts and completions together, whose keys and values a model keeps at a time as it writes."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the names are those of transformers' generation.

    Attributes:
        max_new_tokens: the longest completion. temperature: divides the logits; 0 takes the likeliest token.
        limits: the longest completion of each prompt, where they differ; ``max_new_tokens`` is then the largest. What
            an engine writes beyond a prompt's own is left out by whoever asked.
        top_p, top_k, min_p: what the distribution is cut to; 1, 0 and 0 cut nothing.
        repetition_penalty: above 1, tokens that are there already are drawn less often.
        stops: ids of tokens that end a completion and are part of it.
        seed: of an engine that has random numbers of its own; the others draw from torch's.
        never: ids of tokens that are never drawn, such as those that stand for an image.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stops: frozenset[int] = field(default_factory=frozenset)
    seed: int = 0
    limits: tuple[int, ...] = ()
    never: frozenset[int] = frozenset()

    def limits_of(self, prompts: int) -> tuple[int, ...]:
        """The longest completion of each of so many prompts, in tokens."""
        return self.limits or (self.max_new_tokens,) * prompts

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the whole distribution as it is."""
        return self.top_p >= 1 and self.top_k == 0 and self.min_p == 0 and self.repetition_penalty == 1


@dataclass(frozen=True)
class Completion:
    """One completion.

    Attributes:
        ids: its tokens, the one that ended it included.
        logprobs: the log-probability of each, under the distribution that it was drawn from.
    """

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class EngineJob:
    """What an engine is made of, once a training: ``engine(job) -> Engine``.

    Attributes:
        model: the model that is trained, as the trainer holds it.
        tokenizer: its tokenizer.
        settings: the engine's own, from the method's section of the configuration.
        folder: the run's folder, where an engine may keep what it hands to a server.
        say: prints one line.
        max_length: tokens of a prompt and its completion that were asked for; None where nobody said.
        accelerator: the trainer's ``accelerate.Accelerator``; None outside a training.
    """

    model: Any
    tokenizer: Any
    settings: dict[str, Any]
    folder: Any
    say: Callable[[str], None]
    max_length: int | None = None
    accelerator: Any = None


S = TypeVar("S", bound=BaseModel)


def checked(kind: type[S], given: dict[str, Any], engine: str) -> S:
    """An engine's settings, read by its own model of them.

    Raises:
        ConfigError: an unknown key, or a value that is not allowed; one line.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(["rollouts", *map(str, first["loc"])])
    if first["type"] == "extra_forbidden":
        raise ConfigError(f"unknown key {key!r} (allowed with engine {engine}: {', '.join(kind.model_fields)})")
    value = "what is given" if "@" in str(first["input"]) else repr(first["input"])  # which may hold a password
    allowed = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    raise ConfigError(f"{key}: {value} is not allowed (allowed: {allowed})")


class Engine(Protocol):
    """Writes completions by the model as it is at the time of a call."""

    def generate(
        self, prompts: Sequence[Sequence[int]], copies: int, sampling: Sampling, *, step: int
    ) -> list[list[Completion]]:
        """Several completions of each prompt.

        Args:
            prompts: token ids, none empty. copies: how many completions each gets.
            step: optimizer steps done: an engine that holds weights of its own renews them when it changes.

        Raises:
            RunError: the engine cannot be reached, or has failed; one line.
        """
        ...

    def close(self) -> None:
        """Let go of what the engine holds; it may be used again."""
        ...


class SeeingEngine(Engine, Protocol):
    """An engine that reads more than text."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        sampling: Sampling,
        *,
        step: int,
        beside: Asked | None = None,
    ) -> list[list[Completion]]:
        """As :meth:`Engine.generate`.

        Args:
            beside: what the prompts hold beside text; None: nothing.
        """
        ...
