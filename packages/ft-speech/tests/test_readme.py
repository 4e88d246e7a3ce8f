"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

README = Path(__file__).parent.parent / "README.md"


def test_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write("speech.mp3", np.random.default_rng(0).normal(size=(44_100 * 3, 2)) / 10, 44_100)
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, str(README), "exec"), {})  # noqa: S102
