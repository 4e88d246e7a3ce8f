"""What an audio codec is to those who train on its codes and speak with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Codec", "Layout", "StreamDecoder"]

Samples: TypeAlias = npt.NDArray[np.float32]
Codes: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """How the codes of a stretch of time become tokens of a language model.

    A frame is the shortest stretch that all codebooks share; it has ``len(sizes)`` codes in a fixed order. The code
    ``c`` at place ``p`` of a frame is the audio token number ``offset(p) + c``: every place has numbers of its own.

    Attributes:
        sizes: how many codes there are at each place of a frame.
    """

    sizes: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many audio tokens there are in all."""
        return sum(self.sizes)

    def offset(self, place: int) -> int:
        """The number of the first audio token at a place."""
        return sum(self.sizes[:place])


class StreamDecoder(Protocol):
    """Decodes frames as they come. What all pushes and the end give, one after the other, is as long as ``decode``'s
    samples, and equal to them where the codec's decoder has no more context than the stream keeps."""

    def push(self, codes: Codes) -> Samples:
        """Samples that are settled by the frames ``[frames, places]`` so far; perhaps none."""
        ...

    def finish(self) -> Samples:
        """The samples that are left."""
        ...


class Codec(Protocol):
    """An audio codec; see :class:`ft_core.plugins.CodecSpec`.

    Attributes:
        sample_rate: samples per second, in Hz.
        frame_samples: samples of one frame.
        layout: of a frame's codes.
    """

    name: ClassVar[str]
    sample_rate: int
    frame_samples: int
    layout: Layout

    @classmethod
    def load(cls, folder: Path, device: Any = "cpu") -> Self:
        """The codec of a folder with its ``config.json`` and weights (safetensors, or a ``.bin`` read without pickle).

        Raises:
            ft_speech.codecs.CodecError: a file is missing, damaged, or of another codec.
        """
        ...

    def encode(self, samples: Samples) -> Codes:
        """The codes of mono audio at ``sample_rate``, ``[samples]``, full scale -1 to 1: ``[frames, places]``.

        The last frame is filled up with silence.
        """
        ...

    def decode(self, codes: Codes) -> Samples:
        """``[frames * frame_samples]`` samples of codes ``[frames, places]``.

        Raises:
            ValueError: another shape, or a code that is not in its place's codebook.
        """
        ...

    def stream(self) -> StreamDecoder:
        """A decoder of frames as they come."""
        ...
