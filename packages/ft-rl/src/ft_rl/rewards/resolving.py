"""From the configuration's ``rewards`` to functions with names and weights, checked before a model is loaded."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ft_core.config import RewardEntry
from ft_core.config.load import reward_settings
from ft_core.errors import ConfigError, DataError, FtError
from ft_core.plugins import RewardSpec, registry, resolve
from ft_rl.rewards.faults import LOGGERS, Reward
from ft_rl.rewards.samples import Text

if TYPE_CHECKING:
    from ft_rl.rewards.guest import Policy

__all__ = ["Rewards", "load_attribute", "resolve_rewards"]

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "environments", *LOGGERS)
"""Arguments of the trainer's, which a setting of a user's function cannot be called."""


@dataclass(frozen=True)
class Rewards:
    """The rewards of a training, in the configuration's order.

    Attributes:
        functions: callables, each with the ``__name__`` that it is logged by; for TRL's ``reward_funcs``.
    """

    functions: tuple[Reward, ...]

    @property
    def weights(self) -> list[float]:
        """A weight per function; for TRL's ``reward_weights``."""
        return [reward.weight for reward in self.functions]

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.functions]

    @property
    def faults(self) -> dict[str, int]:
        """How many samples each reward failed on so far; those that failed on none are left out."""
        return {reward.name: reward.faults for reward in self.functions if reward.faults}

    def check_columns(self, available: Iterable[str]) -> None:
        """Refuse data that lacks a column which a reward has said it needs.

        Raises:
            DataError: names the reward, the column, and what is there.
        """
        there = set(available)
        for reward in self.functions:
            for column in reward.columns:
                if not any(name in there for name in column.split("|")):
                    wanted = " or ".join(repr(name) for name in column.split("|"))
                    raise DataError(
                        f"reward {reward.name!r} needs the column {wanted}, which the data doesn't have "
                        f"(it has {', '.join(sorted(there))})"
                    )

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> tuple[list[list[float | None]], list[float | None]]:
        """All rewards of a batch.

        Returns:
            A list per function with a value per sample, unweighted; and the weighted sum per sample, in which a
            value of None adds nothing. None for a sample that no function scores.

        Raises:
            RunError: as :class:`ft_rl.rewards.faults.Reward`.
        """
        each = [reward(prompts=prompts, completions=completions, **columns) for reward in self.functions]
        totals: list[float | None] = []
        for values in zip(*each, strict=True):
            scored = [w * value for w, value in zip(self.weights, values, strict=True) if value is not None]
            totals.append(sum(scored) if scored else None)
        return each, totals


def resolve_rewards(
    entries: Sequence[RewardEntry | str | dict[str, Any]] | None,
    *,
    say: Callable[[str], None] = print,
    policy: Policy | None = None,
    modules: dict[Path, ModuleType] | None = None,
) -> Rewards:
    """The rewards that a configuration names.

    The same name twice is told apart by a number: ``regex``, ``regex-2``.

    Args:
        entries: ``config.rewards``, or what stands there in a file: names, or values with a ``name``.
        say: prints one line when a reward fails on a sample.
        policy: the model whose completions are scored, for rewards that can use it.
        modules: files of the user's that have been run, by path; added to.

    Raises:
        ConfigError: there is none; a setting is wrong; a file or a function isn't there or cannot be used; a package
            that a reward needs isn't installed. One line, with the entry's place.
        PluginError: a name is unknown; names the nearest and all that are installed.
    """
    if not entries:
        raise ConfigError(
            f"rewards: is missing: give a list of names (installed: {', '.join(registry().names('ft.rewards'))}), "
            "or file.py:function of yours"
        )
    found: list[Reward] = []
    modules = {} if modules is None else modules
    for number, given in enumerate(entries):
        where = f"rewards.{number}"
        entry = _entry(given, where)
        if entry.file is not None:
            path, attribute = entry.file
            function = load_attribute(path, attribute, where, modules)
            _check_function(function, entry, where)
            base, settings = attribute, entry.settings
        else:
            function, base, settings = _installed(entry, where, policy), entry.name, {}
        name, same = base, 1
        while name in {reward.name for reward in found}:
            same += 1
            name = f"{base}-{same}"
        found.append(
            Reward(function, name=name, weight=entry.weight, on_error=entry.on_error, settings=settings, say=say)
        )
    return Rewards(tuple(found))


def _entry(given: RewardEntry | str | dict[str, Any], where: str) -> RewardEntry:
    if isinstance(given, RewardEntry):
        return given
    try:
        return RewardEntry.model_validate({"name": given} if isinstance(given, str) else given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{where}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _installed(entry: RewardEntry, where: str, policy: Policy | None) -> Callable[..., Any]:
    settings = reward_settings(entry, where)
    spec = registry().get(RewardSpec, entry.name)
    try:
        made = resolve(spec.reward)
        if settings is None:
            return made  # type: ignore[no-any-return]
        takes = "policy" in inspect.signature(made).parameters
        return made(settings, policy=policy) if takes else made(settings)  # type: ignore[no-any-return]
    except FtError as error:
        raise type(error)(f"{where} ({entry.name}): {error}") from error
    except ValueError as error:
        raise ConfigError(f"{where} ({entry.name}): {error}") from error


def load_attribute(path: str, attribute: str, where: str, modules: dict[Path, ModuleType] | None = None) -> Any:
    """What a file of the user's defines under a name.

    The file is run once for each of ``modules``, and finds modules that lie beside it while it runs, not after.

    Args:
        path: a Python file.
        attribute: the name of a function or class in it.
        where: the place in the configuration, for messages.
        modules: files that have been run, by path; added to.

    Raises:
        ConfigError: the file isn't there or fails, or has no such name.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{where}: no file {path}, looked for from {Path.cwd()}")
    file = file.resolve()
    loaded = {} if modules is None else modules
    if file not in loaded:
        loaded[file] = _run(file, path, where)
    module = loaded[file]
    if not hasattr(module, attribute):
        own = {name: value for name, value in vars(module).items() if callable(value)}
        names = [name for name, value in own.items() if getattr(value, "__module__", None) == module.__name__]
        close = difflib.get_close_matches(attribute, names, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{where}: {path} has no {attribute!r}{hint} (it has: {', '.join(names) or 'no function'})")
    return getattr(module, attribute)


def _run(file: Path, path: str, where: str) -> ModuleType:
    # A name of its own: a file `json.py` must not stand for Python's. In sys.modules, since dataclasses look there.
    name = f"ft_user_{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _findable(file.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code raises what it likes
        del sys.modules[name]
        raise ConfigError(f"{where}: {path} fails to run: {type(error).__name__}: {error}") from error
    return module


@contextmanager
def _findable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _check_function(function: Any, entry: RewardEntry, where: str) -> None:
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else f"of type {type(function).__name__}"
        raise ConfigError(f"{where}: {entry.name} is {kind}: give a function f(prompts, completions, **columns)")
    parameters = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ConfigError(
            f"{where}: {entry.name} must take further keywords, since every column of the data is handed to it: "
            "f(prompts, completions, **columns)"
        )
    taken = [key for key in entry.settings if key in GIVEN]
    if taken:
        raise ConfigError(f"{where}: {taken[0]!r} is what the trainer hands to a reward: call the setting otherwise")
