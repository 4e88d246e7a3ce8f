"""What Whisper's layers keep between forward and backward, so that a step is as fast as the memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ft_speech.fast.layers import SpeechLayer

__all__ = ["Choice", "Chosen", "Wanted", "chosen"]

Choice = Literal["keep", "recompute", "offload"]
"""All that backward wants; the layer's input; that in the host's memory."""
Wanted = Literal["auto", "keep", "recompute", "offload"]

HEAD, LEAST_HEAD = 2**30, 2**27
"""Bytes that the head may use at a time, and where memory is short."""
SHARE = 0.45
"""Of the free memory, what counted activations may fill: a recorded step keeps its memory to itself, and is recorded
while what an earlier one took is still there."""
PIECES = 8
"""Parts in which a batch is computed where memory is short."""
BACKWARD = 2.2
"""What a layer's backward pass takes at most, in what it keeps: that, and the gradients of it."""


@dataclass(frozen=True)
class Chosen:
    """What layers keep.

    Attributes:
        choices: of layers, by their identity; of all others ``keep``.
        pieces: in how many parts of the batch a layer is computed that is computed again.
        head: bytes that the head may use at a time.
    """

    choices: dict[int, Choice] = field(default_factory=dict)
    pieces: int = 1
    head: int = HEAD

    @property
    def offloads(self) -> bool:
        """Whether anything waits in the host's memory."""
        return "offload" in self.choices.values()

    def of(self, layer: SpeechLayer) -> Choice:
        """What a layer keeps."""
        return self.choices.get(id(layer), "keep")


def chosen(
    layers: Sequence[SpeechLayer], model: Any, shape: tuple[int, int], device: torch.device, want: Wanted,
    memory: int | None,
) -> Chosen:  # fmt: skip
    """What layers keep of a batch.

    Args:
        layers: the encoder's first. model: that they are of.
        shape: sequences, and tokens that are written of each.
        want, memory: as for :meth:`ft_speech.fast.whisper.WhisperPath.choose`.
    """
    pieces = max(n for n in range(1, PIECES + 1) if shape[0] % n == 0)
    if want == "offload":
        return Chosen({id(layer): "offload" for layer in layers}, pieces, LEAST_HEAD)
    if want == "recompute":
        return Chosen({id(layer): "recompute" for layer in layers})
    if want == "keep" or device.type != "cuda":
        return Chosen()
    config = model.config
    itemsize = model.dtype.itemsize
    audio, text = shape[0] * config.max_source_positions, shape[0] * shape[1]
    kept = [itemsize * _numbers(layer, audio, text, config) for layer in layers]
    inputs = [itemsize * config.d_model * (text if layer.listens else audio) for layer in layers]
    room = _room(device, memory)
    left = room - HEAD - BACKWARD * max(kept) - sum(inputs)
    if left < 0:  # nothing can be kept
        left = room - LEAST_HEAD - BACKWARD * max(kept) / pieces - sum(inputs)
        choice: Choice = "recompute" if left >= 0 else "offload"
        return Chosen({id(layer): choice for layer in layers}, pieces, LEAST_HEAD)
    choices: dict[int, Choice] = {}
    # The last layers keep the most: backward begins with them.
    for layer, size, own in reversed(list(zip(layers, kept, inputs, strict=True))):
        left -= size - own
        if left < 0:
            choices[id(layer)] = "recompute"
    return Chosen(choices)


def _numbers(layer: SpeechLayer, audio: int, text: int, config: Any) -> int:
    """How many numbers a layer keeps for backward: the inputs of its single operations."""
    d = int(config.d_model)
    if layer.listens:
        return text * (12 * d + 2 * int(config.decoder_ffn_dim)) + 2 * audio * d
    return audio * (8 * d + 2 * int(config.encoder_ffn_dim))


def _room(device: torch.device, memory: int | None) -> float:
    """Bytes that activations may take."""
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - used
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    most = limit if memory is None else min(limit, memory)
    return SHARE * max(min(free, most - used), 0)
