from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

from ft_core.plugins.registry import registry
from ft_core.plugins.specs import ModalitySpec, resolve


def test_the_modality_is_registered_and_reads(tmp_path: Path) -> None:
    spec = registry().get(ModalitySpec, "stt")
    assert spec.load is not None
    assert spec.read is not None
    read = resolve(spec.read)
    for ending in spec.extensions:
        format, subtype = {".oga": ("OGG", None), ".opus": ("OGG", "OPUS")}.get(ending, (ending[1:].upper(), None))
        path = tmp_path / f"tone{ending}"
        soundfile.write(path, np.sin(np.arange(8_000) / 5) / 2, 8_000, format=format, subtype=subtype)
        audio, rate = read(path)
        assert (rate, audio.shape) == (16_000, (16_000,))


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys, ft_speech, ft_speech.plugin; print({'numpy', 'soundfile', 'soxr', 'torch'} & set(sys.modules))\n"
        "import ft_speech.audio; print({'torch', 'torchaudio'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["set()", "set()"]
