"""Launch settings: a table by architecture, and an autotune that is off until somebody asks for it.

A kernel's module says what it would take by itself and, if it likes, what else may be tried::

    tiling = tuning.settings("rms_norm_forward", x.device, (h, x.dtype), default=_tiling(h), candidates=[...])

While autotune is on, each launch is one trial of one candidate: nothing is launched that was not asked for, so kernels
that work in place stay right and every result is valid. Once every candidate has been timed the fastest one stays.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

__all__ = [
    "TABLE",
    "Settings",
    "autotune",
    "capability",
    "family",
    "forget",
    "multiprocessors",
    "settings",
    "shared_memory",
    "trial",
]

Settings = dict[str, Any]

TABLE: dict[str, dict[str, Settings]] = {"turing": {}, "ampere": {}, "ada": {}, "hopper": {}, "blackwell": {}}
"""What overrides a kernel's own defaults on an architecture family: family → kernel's name → settings."""

WARMUP, ROUNDS = 1, 5
"""Launches of each candidate that are not timed (the first one compiles) and that are."""


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability; (0, 0) where there is none (CPU, ROCm)."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def family(device: torch.device) -> str:
    """turing (7.x), ampere (8.0), ada (8.6 to 8.9), hopper (9.0), blackwell (10 and later), other (CPU, ROCm)."""
    major, minor = capability(device)
    if major == 9:
        return "hopper"
    if major == 8:
        return "ampere" if minor == 0 else "ada"
    return "blackwell" if major >= 10 else "turing" if major == 7 else "other"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; that of the smallest card where there is no GPU."""
    major, minor = capability(device)
    if (major, minor) == (8, 0) or (major, minor) == (8, 7):
        return 163 << 10
    if major in (9, 10):
        return 227 << 10
    return (64 if major <= 7 else 99) << 10


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 1 for a CPU, on which only the interpreter runs kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def settings(
    name: str,
    device: torch.device,
    key: Hashable = (),
    *,
    default: Mapping[str, Any],
    candidates: Sequence[Mapping[str, Any]] | Callable[[], Sequence[Mapping[str, Any]]] = (),
) -> Settings:
    """The settings to launch kernel ``name`` with, to be called right before ``dispatch.launch(name, ...)``.

    Args:
        name: the kernel's name, as ``dispatch.launch`` gets it.
        device: where it will run.
        key: whatever the best choice depends on: widths and dtypes, but not the number of rows, which changes all the
            time. Its ``repr`` is what is stored.
        default: what the kernel's module would take.
        candidates: complete alternatives to the default, or what makes them; each must be right for these arguments
            and fit the device.

    Returns:
        What autotune found, or is just trying; else the default with the table's line for this architecture.
    """
    chosen = {**default, **TABLE.get(family(device), {}).get(name, {})} if TABLE.get(family(device)) else dict(default)
    if not _state.used or device.type != "cuda":
        return chosen
    candidates = candidates() if callable(candidates) else candidates
    if len(candidates) == 0:
        return chosen
    return _state.pick(name, device, repr(key), [chosen, *(dict(c) for c in candidates if dict(c) != chosen)])


@dataclass
class _Search:
    """The search for one kernel, key and device: how far it is, and what it found."""

    options: list[Settings]
    issued: int = 0
    events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def next(self) -> int | None:
        """The option to try now, or None when all trials are issued."""
        return self.issued // (WARMUP + ROUNDS) if self.issued < len(self.options) * (WARMUP + ROUNDS) else None

    def best(self) -> Settings | None:
        """The fastest option, once the GPU is done with all trials; an option that failed counts as infinitely slow."""
        if self.next() is not None or not all(end.query() for _, _, end in self.events):
            return None
        times = [math.inf] * len(self.options)
        for option, start, end in self.events:
            times[option] = min(times[option], start.elapsed_time(end))
        return self.options[times.index(min(times))]


class _State(threading.local):
    """What this thread is about to launch: backward passes run in threads of their own."""

    pending: tuple[str, _Search, int] | None = None


class _Tuner:
    def __init__(self) -> None:
        self.enabled = False
        self.found: dict[tuple[str, str, str], Settings] = {}
        self.searches: dict[tuple[str, str, str], _Search] = {}
        self.flush: dict[torch.device, torch.Tensor] = {}
        self.thread = _State()
        self.lock = threading.Lock()

    @property
    def used(self) -> bool:
        return self.enabled or bool(self.found)

    def pick(self, name: str, device: torch.device, key: str, options: list[Settings]) -> Settings:
        with self.lock:
            place = (torch.cuda.get_device_name(device), name, key)
            known = self.found.get(place)
            if known is not None and known in options:  # what an older version stored may not be one of them
                return dict(known)
            if not self.enabled or torch.cuda.is_current_stream_capturing():
                return options[0]
            search = self.searches.get(place)
            if search is None or search.options != options:
                search = self.searches[place] = _Search(options)
            option = search.next()
            if option is not None:
                self.thread.pending = (name, search, option)
                return dict(options[option])
            best = search.best()
            if best is not None:
                self.found[place] = best
                del self.searches[place]
            return dict(best or options[0])

    def settle(self) -> None:
        """Wait for the GPU and decide what can be decided."""
        with self.lock:
            if self.searches:
                torch.cuda.synchronize()
            for place, search in list(self.searches.items()):
                best = search.best()
                if best is not None:
                    self.found[place] = best
                    del self.searches[place]

    def scratch(self, device: torch.device) -> torch.Tensor:
        if device not in self.flush:
            self.flush[device] = torch.empty(1 << 28, dtype=torch.uint8, device=device)
        return self.flush[device]


_state = _Tuner()


def trial(name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Times the one launch inside if it is a trial; ``dispatch.launch`` wraps every launch with it."""
    pending = _state.thread.pending
    if pending is None:
        return contextlib.nullcontext()
    _state.thread.pending = None
    return _timed(*pending[1:], device) if pending[0] == name else contextlib.nullcontext()


@contextlib.contextmanager
def _timed(search: _Search, option: int, device: torch.device) -> Iterator[None]:
    number = search.issued % (WARMUP + ROUNDS)
    search.issued += 1
    if number < WARMUP:
        yield
        return
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Empties the second-level cache, and keeps the GPU busy until the launch is queued behind it.
    _state.scratch(device).zero_()
    start.record()
    yield
    end.record()
    search.events.append((option, start, end))


class autotune:
    """Turn the search for launch settings on or off, from here on or for a ``with`` block.

    Each launch of a kernel that has candidates becomes a trial until all were timed; some hundred training steps do for
    all kernels. What was found stays in memory for the process. Launches inside ``torch.cuda.graph`` are never trials.

        with ft_kernels.tuning.autotune(file="ft_kernels.json"):
            for batch in batches: ...

    Args:
        enabled: False uses what was found and searches no further.
        file: a JSON file, read now if it exists and written at the end of the block (or by ``save()``). It holds every
            device it was ever used on.
    """

    def __init__(self, enabled: bool = True, *, file: str | os.PathLike[str] | None = None) -> None:
        self.file = None if file is None else Path(file)
        self.before = _state.enabled
        if self.file is not None and self.file.exists():
            _state.found |= _read(self.file)
        _state.enabled = enabled

    def save(self) -> None:
        """Write what was found so far to the file."""
        _state.settle()
        if self.file is None:
            return
        found = {**(_read(self.file) if self.file.exists() else {}), **_state.found}
        lines = [{"device": d, "kernel": n, "key": k, "settings": s} for (d, n, k), s in sorted(found.items())]
        beside = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        beside.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.file)

    def __enter__(self) -> autotune:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.enabled = self.before
        _state.flush.clear()
        self.save()


def _read(file: Path) -> dict[tuple[str, str, str], Settings]:
    try:
        lines = json.loads(file.read_text(encoding="utf-8"))
        return {(line["device"], line["kernel"], line["key"]): dict(line["settings"]) for line in lines}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} does not hold launch settings ({error}); name another file or remove it") from None


def forget() -> None:
    """Drop all that was found in this process; files stay."""
    _state.found.clear()
    _state.searches.clear()
