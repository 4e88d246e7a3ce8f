"""Words that are sung by sines, and the files of a training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RATE = 16_000
WORDS = {"one": (500, 1500), "two": (900, 2500), "three": (300, 3200)}
"""The two resonances of each word's vowel, in Hz."""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def sung(text: str) -> np.ndarray:
    """A text as 0.2 s of harmonics of 120 Hz for each word, under the word's resonances."""
    time = np.arange(RATE // 5) / RATE
    pieces = []
    for word in text.split():
        harmonics = np.arange(1, 40) * 120.0
        gains = sum(1 / (1 + ((harmonics - centre) / 150) ** 2) for centre in WORDS[word])
        tone = (gains[:, None] * np.cos(2 * np.pi * harmonics[:, None] * time)).sum(0)
        pieces += [tone * np.hanning(len(time)) / 8, np.zeros(RATE // 20)]
    return np.concatenate(pieces).astype(np.float32)


class Songs(NamedTuple):
    """Files of rows, a codec's folder, and the base model's; the texts that are held out."""

    folder: Path
    train: Path
    held_out: Path
    codec: Path
    base: Path
    tied: Path

    def config(self, output: Path, **changes: Any) -> dict[str, Any]:
        values = {
            "model": str(self.base), "task": "tts", "data": str(self.train), "eval_data": str(self.held_out),
            "lora": None, "max_length": 128, "tts": {"codec": "mel", "codec_model": str(self.codec)},
            "training": {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 3e-3},
            "output": str(output),
        }  # fmt: skip
        return {**values, **changes}
