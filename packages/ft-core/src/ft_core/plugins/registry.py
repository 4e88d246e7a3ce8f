"""Finds plugins by their entry points, imports one only when it is used, and says which are broken and why."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from ft_core.errors import PluginError
from ft_core.installing import how_to_install
from ft_core.plugins.specs import API_VERSION, GROUPS, Spec

__all__ = ["EXTRAS", "Entry", "Problem", "Registry", "registry"]

S = TypeVar("S", bound=Spec)

OWN = ("ft-core", "ft-kernels", "ft-rl", "ft-vision", "ft-speech", "ft-export")

EXTRAS: dict[str, dict[str, str]] = {
    "ft.methods": dict.fromkeys(("reward", "dpo", "orpo", "kto", "grpo", "gspo", "ppo"), "rl"),
    "ft.rewards": dict.fromkeys(
        (
            "exact-match",
            "numeric",
            "math",
            "regex",
            "format",
            "length",
            "json-schema",
            "code",
            "reward-model",
            "http",
            "reasoning-gym",
        ),
        "rl",
    ),
    "ft.modalities": {"vision": "vision", "stt": "speech", "tts": "speech"},
    "ft.codecs": dict.fromkeys(("snac", "mimi", "mel"), "speech"),
    "ft.architectures": dict.fromkeys(
        ("gemma3", "idefics3", "llava", "llava_next", "mistral3", "qwen2_5_vl", "qwen3_vl", "smolvlm"), "vision"
    )
    | dict.fromkeys(("csm", "qwen3_asr", "whisper"), "speech"),
    "ft.rollouts": dict.fromkeys(("transformers", "vllm", "vllm-colocate"), "rl"),
    "ft.exporters": dict.fromkeys(("gguf", "ollama", "open-webui", "vllm", "sglang", "hub", "ctranslate2"), "export"),
    "ft.commands": {"merge": "export", "transcribe": "speech", "speak": "speech"},
}
"""The extra of ft-core that brings a name that is known but not there."""


@dataclass(frozen=True)
class Entry:
    """A plugin as its distribution's metadata names it; nothing of it has been imported."""

    group: str
    name: str
    value: str
    distribution: str
    version: str

    @property
    def own(self) -> bool:
        """Whether the plugin comes from one of ft's own packages."""
        return self.distribution in OWN

    @property
    def source(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class Problem:
    """A plugin that cannot be used, and why."""

    entry: Entry
    reason: str


class Registry:
    """The plugins of this environment.

    Args:
        points: entry points to use instead of the environment's, for tests.
    """

    def __init__(self, points: Iterable[EntryPoint] | None = None) -> None:
        self._points = None if points is None else tuple(points)
        self._found: dict[str, list[Entry]] = {}

    def entries(self, group: str) -> list[Entry]:
        """All plugins of a group, ft's own first, without importing any."""
        if group not in self._found:
            points = entry_points(group=group) if self._points is None else self._points
            found = [_entry(point) for point in points if point.group == group]
            self._found[group] = sorted(dict.fromkeys(found), key=lambda entry: not entry.own)
        return list(self._found[group])

    def names(self, group: str) -> list[str]:
        """The names of a group, each once, without importing any plugin."""
        return list(dict.fromkeys(entry.name for entry in self.entries(group)))

    def _choose(self, group: str, name: str) -> Entry:
        """The one plugin that a name stands for; ft's own wins over a third party's of the same name."""
        same = [entry for entry in self.entries(group) if entry.name == name]
        if not same:
            raise PluginError(self._unknown(group, name))
        own = [entry for entry in same if entry.own]
        if len(own) == 1:
            return own[0]
        if len(same) > 1:
            sources = " and ".join(e.source for e in same)
            raise PluginError(f"{group} {name!r} is declared more than once, by {sources}: uninstall all but one")
        return same[0]

    def _unknown(self, group: str, name: str) -> str:
        kind = group.removeprefix("ft.").removesuffix("s").replace("modalitie", "modality")
        extra = EXTRAS.get(group, {}).get(name)
        if extra:
            return f"{kind} {name!r} is not installed: {how_to_install(extra)}"
        known = [*self.names(group), *(n for n in EXTRAS.get(group, {}) if n not in self.names(group))]
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"no {kind} {name!r}{hint} (allowed: {', '.join(known) or 'none is installed'})"

    def load(self, group: str, name: str) -> Spec:
        """Import one plugin's spec and check it.

        Raises:
            PluginError: the name is unknown, declared twice, fails to import, is no spec of its group, or is written
                for a newer interface. The message names the plugin and its package.
        """
        return self._load(self._choose(group, name))

    def get(self, kind: type[S], name: str) -> S:
        """As :meth:`load`, by the spec's class."""
        spec = self.load(kind.group, name)
        assert isinstance(spec, kind)
        return spec

    def _load(self, entry: Entry) -> Spec:
        where = _where(entry)
        point = EntryPoint(entry.name, entry.value, entry.group)
        try:
            spec = point.load()
        except (
            Exception,
            SystemExit,
        ) as error:  # a plugin is foreign code: whatever it raises is its problem, not ours
            raise PluginError(f"{where} fails to import: {type(error).__name__}: {error}") from error
        expected = GROUPS[entry.group]
        if not isinstance(spec, expected):
            raise PluginError(f"{where} is no {expected.__name__}: {entry.value} is of type {type(spec).__name__}")
        if spec.api_version != API_VERSION:
            newer = isinstance(spec.api_version, int) and spec.api_version > API_VERSION
            advice = "upgrade ft-core" if newer else f"ask for a {entry.distribution} that is written for it"
            raise PluginError(f"{where} is for plugin api {spec.api_version}, this ft-core has {API_VERSION}: {advice}")
        if spec.name != entry.name:
            raise PluginError(f"{where} calls itself {spec.name!r}: the entry point's name and the spec's must agree")
        return spec

    def check(self, on_each: Callable[[Entry], None] | None = None) -> list[Problem]:
        """Import every plugin and return those that cannot be used, duplicates included. Harms nothing."""
        problems = []
        for group in GROUPS:
            for entry in self.entries(group):
                if on_each:
                    on_each(entry)
                try:
                    chosen = self._choose(group, entry.name)
                    if chosen == entry:
                        self._load(entry)
                    else:
                        problems.append(Problem(entry, f"its name is taken by {chosen.source}, which is used instead"))
                except PluginError as error:
                    problems.append(Problem(entry, str(error).removeprefix(_where(entry)).strip()))
        return problems


def _where(entry: Entry) -> str:
    return f"plugin {entry.name!r} ({entry.group}) of {entry.source}"


def _entry(point: EntryPoint) -> Entry:
    # An installation that was cut short has metadata without name and version.
    name = (point.dist and point.dist.name) or "unknown"
    version = (point.dist and point.dist.version) or "?"
    return Entry(point.group, point.name, point.value, re.sub(r"[-_.]+", "-", name).lower(), version)


@cache
def registry() -> Registry:
    """The registry of this environment, made once."""
    return Registry()
