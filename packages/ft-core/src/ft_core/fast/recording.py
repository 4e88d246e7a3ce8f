"""Graphs of kernels (CUDA graphs): the stream on which they are recorded, and what a recording that fails leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

import torch

__all__ = ["as_it_was", "recording_stream"]


@cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's graphs are recorded, always the same.

    torch's own is of the device on which the first graph of the process was made; a graph of another device would
    be empty.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def as_it_was(device: torch.device) -> Iterator[None]:
    """If the body raises, the current stream and the state of the random numbers are again what they were.

    A recording that breaks off leaves its own stream and, for its random numbers, a state that goes on recording.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator, stream = torch.cuda.default_generators[index], torch.cuda.current_stream(device)
    state = generator.clone_state()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
        raise
