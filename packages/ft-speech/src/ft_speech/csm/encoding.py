"""Recordings as frames of Mimi's codes: each made once, kept for as long as the training or measurement lasts."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ft_speech.csm.loading import plain
from ft_speech.speaking.recordings import Recording, key_of, read_recording

__all__ = ["Encoder", "TooLong"]

KEPT = "csm_codes"
"""The key of ``job.kept`` under which codes are."""

Codes: TypeAlias = npt.NDArray[np.int16]


class TooLong(Exception):
    """A recording of more frames than are wanted."""


class Encoder:
    """Makes codes of recordings, one recording at a time, as transformers does: padding would change its last frame.

    Args:
        model: a CSM, adapted or not.
        kept: where codes are kept, by their recording: ``job.kept`` of a training or a measurement.
        trim_silence: below how many dB the ends of recordings are trimmed; None: not.
    """

    def __init__(self, model: Any, kept: dict[str, Any], trim_silence: float | None = None) -> None:
        self.trim_silence = trim_silence
        self._model = plain(model)
        self._codec = self._model.codec_model
        self._codebooks = int(self._model.config.num_codebooks)
        self._kept: dict[bytes, Codes] = kept.setdefault(KEPT, {})
        self.rate = int(self._codec.config.sampling_rate)
        """Samples per second, in Hz, of what is encoded."""
        self.frame_rate = float(self._codec.config.frame_rate)
        """Frames per second."""

    def known(self, row: dict[str, Any]) -> Codes | None:
        """The codes of a row's recording where they were made before."""
        return self._kept.get(key_of(row))

    def read(self, row: dict[str, Any], most: int) -> Recording:
        """A row's recording, and whether it is clipped.

        Raises:
            TooLong: they are more than ``most`` frames.
            ft_speech.AudioError: as :func:`ft_speech.speaking.recordings.read_recording`.
        """
        made = read_recording(row, self.rate, self.trim_silence, (most + 2) / self.frame_rate)
        if len(made.samples) > (most + 1) * self.rate / self.frame_rate:
            raise TooLong
        return made

    def encode(self, row: dict[str, Any], samples: npt.NDArray[np.float32]) -> Codes:
        """The codes of a row's recording, int16 [frames, codebooks]."""
        import torch

        self._codec.eval()
        given = torch.from_numpy(samples)[None, None].to(self._model.device, torch.float32)
        with torch.inference_mode(), torch.autocast(given.device.type, enabled=False):
            made = self._codec.encode(given, num_quantizers=self._codebooks).audio_codes
        codes: Codes = made[0].T.to("cpu", torch.int16).numpy()
        self._kept[key_of(row)] = codes
        return codes
