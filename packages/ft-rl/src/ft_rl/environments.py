"""Environments of several turns: what a class of the user's must have, and how one is found, checked and played.

Two kinds are known by their methods. One that has ``step`` takes turns with the model (:class:`Environment`). One
without is TRL's: its other public methods are tools that the model calls, and ``get_reward()`` says what it was worth;
its class is what ``GRPOTrainer`` takes as ``environment_factory``.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ft_core.errors import ConfigError, FtError, RunError
from ft_rl.rewards.resolving import load_attribute
from ft_rl.rewards.samples import start_of

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

__all__ = ["Environment", "EnvironmentClass", "Episode", "play", "resolve_environment"]

Message = dict[str, Any]


class Environment(Protocol):
    """What takes turns with the model. An object plays one episode at a time, and is reset for the next."""

    def reset(self, **row: Any) -> str | None:
        """Begin an episode.

        Args:
            row: the columns of the data's row, the prompt among them.

        Returns:
            What to add to the prompt's last message; None: nothing.
        """

    def step(self, completion: str) -> tuple[str | None, float, bool]:
        """Take a turn of the model's.

        Args:
            completion: what the model said.

        Returns:
            What it is told, as the next message of the user's; what the turn was worth (an episode is worth the sum of
            its turns); and whether the episode is over.
        """


@dataclass(frozen=True)
class EnvironmentClass:
    """An environment that was found and checked.

    Attributes:
        make: makes an object, without arguments.
        kind: ``turns`` (it has ``step``) or ``tools`` (TRL's).
        name: what the configuration calls it.
        owns_reward: whether it says itself what an episode was worth: by its steps, or by ``get_reward``.
    """

    make: Callable[[], Any]
    kind: Literal["turns", "tools"]
    name: str
    owns_reward: bool


@dataclass
class Episode:
    """What came of one row.

    Attributes:
        prompt: the messages that it began with, what ``reset`` had to add included.
        completion: the turns: the model's messages (``assistant``) and what it was told (``user``).
        rewards: what each of the model's turns was worth.
        done: whether the environment ended it; else it ran out of turns, or of room for them.
    """

    prompt: list[Message]
    completion: list[Message] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    done: bool = False

    @property
    def reward(self) -> float:
        """What the whole was worth: the sum of its turns."""
        return math.fsum(self.rewards)


def resolve_environment(
    name: str, where: str = "environment", modules: dict[Path, ModuleType] | None = None
) -> EnvironmentClass:
    """The environment that a configuration names as ``file.py:Class``.

    One object is made to check it.

    Args:
        where: the key's place in the configuration, for messages.
        modules: files that have been run, by path; added to. Rewards that are to share the file's state get the same.

    Raises:
        ConfigError: the name is of another form, there is no such file or class, or the class lacks what an environment
            has. One line.
    """
    path, colon, attribute = name.rpartition(":")
    if not colon or not path.endswith(".py") or not attribute:
        raise ConfigError(f"{where}: {name!r} is not allowed (allowed: file.py:Class)")
    found = load_attribute(path, attribute, where, modules)
    if not inspect.isclass(found):
        raise ConfigError(f"{where}: {name} is of type {type(found).__name__}: give a class with reset and step")
    methods = {key: value for key, value in inspect.getmembers(found, inspect.isfunction) if not key.startswith("_")}
    if "reset" not in methods:
        raise ConfigError(f"{where}: {name} has no method reset(self, **row), with which an episode begins")
    if not _takes_any_keyword(methods["reset"]):
        raise ConfigError(
            f"{where}: {name}.reset must take any keyword, since it is handed the row: reset(self, **row)"
        )
    try:
        found()
    except FtError:
        raise
    except (Exception, SystemExit) as error:  # the user's code raises what it likes
        raise ConfigError(
            f"{where}: {name}() fails: {type(error).__name__}: {error}; an environment is made without arguments"
        ) from error
    if "step" in methods:
        _check_step(methods["step"], name, where)
        return EnvironmentClass(found, "turns", name, owns_reward=True)
    tools = {key: value for key, value in methods.items() if key not in ("reset", "get_reward")}
    if not tools:
        raise ConfigError(f"{where}: {name} has neither a method step(self, completion) nor one for the model to call")
    for key, tool in tools.items():
        _check_tool(tool, f"{name}.{key}", where)
    return EnvironmentClass(found, "tools", name, owns_reward="get_reward" in methods)


def play(
    environment: EnvironmentClass,
    prompts: Sequence[Sequence[Mapping[str, Any]]],
    rows: Sequence[Mapping[str, Any]],
    answer: Callable[[list[list[Message]]], Sequence[str | None]],
    *,
    max_turns: int,
) -> list[Episode]:
    """Play one episode a row, all side by side, each with an object of its own.

    Args:
        environment: of the kind ``turns``.
        prompts: the messages that each begins with; the last one is the user's.
        rows: the columns of each row.
        answer: what the model says to each of some conversations; it is asked for those that go on, in their order.
            None where there is no room for another turn: the episode ends with the model's last one.
        max_turns: the most turns of the model's in an episode.

    Raises:
        ValueError: another kind of environment; numbers of prompts, rows or answers that differ; ``max_turns`` below 1.
        RunError: an environment raises, or returns what it must not; names the class, the row and the turn.
    """
    if environment.kind != "turns":
        raise ValueError(f"{environment.name} has no step: its tools are called by TRL's trainer")
    if len(prompts) != len(rows) or max_turns < 1:
        raise ValueError(f"{len(prompts)} prompts, {len(rows)} rows, {max_turns} turns")
    worlds = [environment.make() for _ in rows]
    episodes: list[Episode] = []
    for i, (world, prompt, row) in enumerate(zip(worlds, prompts, rows, strict=True)):
        told = _asked(lambda world=world, row=row: world.reset(**row), environment, i, prompt, "reset")  # type: ignore[misc]
        if told is not None and not isinstance(told, str):
            raise _wrong(environment, i, prompt, "reset", f"returns {_shown(told)}: text, or None")
        episodes.append(Episode(_with(prompt, told)))
    going = list(range(len(rows)))
    for turn in range(max_turns):
        going = [i for i in going if not episodes[i].done]
        if not going:
            break
        said = answer([[*episodes[i].prompt, *episodes[i].completion] for i in going])
        if len(said) != len(going):
            raise ValueError(f"{len(said)} answers to {len(going)} conversations")
        spoken = [(i, text) for i, text in zip(going, said, strict=True) if text is not None]
        for i in set(going) - {i for i, _ in spoken}:
            _without_last_word(episodes[i])
        going = [i for i, _ in spoken]
        for i, text in spoken:
            place, episode = f"turn {turn + 1}", episodes[i]
            result = _asked(lambda i=i, text=text: worlds[i].step(text), environment, i, episode.prompt, place)  # type: ignore[misc]
            told, reward, over = _checked(result, environment, i, episode.prompt, place)
            episode.completion.append({"role": "assistant", "content": text})
            episode.rewards.append(reward)
            episode.done = over
            if told is not None and not over and turn + 1 < max_turns:  # a last word that nobody answers is left out
                episode.completion.append({"role": "user", "content": told})
    return episodes


def _without_last_word(episode: Episode) -> None:
    """Leave out what the environment has said last, which nobody answers."""
    if episode.completion and episode.completion[-1]["role"] == "user":
        episode.completion.pop()


def _with(prompt: Sequence[Mapping[str, Any]], told: str | None) -> list[Message]:
    messages = [dict(message) for message in prompt]
    if told:
        if not messages:
            return [{"role": "user", "content": told}]
        messages[-1]["content"] = f"{messages[-1].get('content') or ''}{told}"
    return messages


def _asked(call: Callable[[], Any], environment: EnvironmentClass, i: int, prompt: Any, place: str) -> Any:
    try:
        return call()
    except FtError:
        raise
    except (Exception, SystemExit) as error:  # the user's code raises what it likes
        raise _wrong(environment, i, prompt, place, f"raises {type(error).__name__}: {error}") from error


def _checked(
    result: Any, environment: EnvironmentClass, i: int, prompt: Any, place: str
) -> tuple[str | None, float, bool]:
    if not (isinstance(result, tuple) and len(result) == 3):
        raise _wrong(
            environment, i, prompt, place, f"returns {_shown(result)}: (text or None, reward, whether it is over)"
        )
    told, reward, over = result
    if told is not None and not isinstance(told, str):
        raise _wrong(environment, i, prompt, place, f"tells {_shown(told)}: text, or None")
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        raise _wrong(environment, i, prompt, place, f"gives the reward {_shown(reward)}: a finite number")
    return told, float(reward), bool(over)


def _wrong(environment: EnvironmentClass, i: int, prompt: Any, place: str, said: str) -> RunError:
    return RunError(f"environment {environment.name}, {place} of row {i + 1} (prompt {start_of(prompt)!r}): {said}")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:39] + '…'} ({type(value).__name__})"


def _takes_any_keyword(method: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method).parameters.values())


def _check_step(step: Callable[..., Any], name: str, where: str) -> None:
    try:
        inspect.signature(step).bind(None, "")
    except TypeError:
        raise ConfigError(f"{where}: {name}.step must take what the model said: step(self, completion)") from None
    if inspect.iscoroutinefunction(step):
        raise ConfigError(f"{where}: {name}.step is a coroutine function: give a plain one")


def _check_tool(tool: Callable[..., Any], name: str, where: str) -> None:
    """A tool is described to the model by its docstring and annotations, as transformers reads them."""
    if not inspect.getdoc(tool):
        raise ConfigError(f"{where}: {name} has no docstring, by which the model is told what it does")
    from transformers.utils import get_json_schema

    try:
        get_json_schema(tool)
    except Exception as error:  # transformers raises several kinds, none of which is public in name
        raise ConfigError(f"{where}: {name} cannot be described to the model: {error}") from error
