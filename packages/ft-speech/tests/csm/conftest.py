from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import tiny_csm


@pytest.fixture(scope="session")
def csm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_csm.make(tmp_path_factory.mktemp("csm") / "model")


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Eight tones that say a word each, of two voices."""
    made = []
    for number, frequency in enumerate((300, 500, 800, 1200) * 2):
        tone = 0.4 * np.sin(2 * np.pi * frequency * np.arange(12_000 + 800 * number) / 24_000)
        soundfile.write(tmp_path / f"{number}.wav", tone, 24_000)
        text = ("one", "two", "three", "four")[number % 4]
        made.append({"text": text, "audio": f"{number}.wav", "speaker": ("bob", "anna")[number % 2]})
    return made


@pytest.fixture
def configure(tmp_path: Path, csm: Path, rows: list[dict[str, Any]]) -> Callable[..., Path]:
    def write(*, data: list[dict[str, Any]] | None = None, training: dict[str, Any] | None = None, **more: Any) -> Path:
        lines = rows if data is None else data
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        values = {
            "model": str(csm), "data": str(tmp_path / "rows.jsonl"), "lora": {"r": 8}, "output": str(tmp_path / "run"),
            **more,
        }  # fmt: skip
        values["training"] = {
            "max_steps": 8, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-2,
            "optimizer": "adamw_torch", **(training or {}),
        }  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def ft(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from ft_core.cli import main

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call
