"""A tiny Whisper, words of tones to train it on, and `ft` called in this process."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_whisper import WORDS, make_whisper, spoken


class Outcome(NamedTuple):
    """What a call of `ft` gave."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line that says what is wrong: the last on stderr, after progress."""
        return self.err.rstrip("\n").rpartition("\n")[2]


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Whisper that hears a second at a time; not to be changed."""
    return make_whisper(tmp_path_factory.mktemp("models") / "whisper", seconds=1, layers=1)


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`words(count)`: rows of one or two words of tones; the files lie in `audio/`, named relative to `rows.jsonl`."""

    def make(count: int, seed: int = 0) -> list[dict[str, Any]]:
        chance, folder = random.Random(seed), tmp_path / "audio"
        folder.mkdir(exist_ok=True)
        rows = []
        for number in range(count):
            said = [chance.choice(list(WORDS)) for _ in range(chance.choice((1, 2)))]
            path = spoken(folder / f"{seed}-{number}.wav", said, number)
            rows.append({"audio": f"audio/{path.name}", "text": " ".join(said)})
        return rows

    return make


@pytest.fixture
def configure(tmp_path: Path, whisper: Path, words: Any) -> Callable[..., Path]:
    """Writes `config.yaml`, a short run in full on rows in `rows.jsonl` (words of tones, unless they are given)."""

    def write(
        *,
        rows: list[Any] | None = None,
        stt: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        lines = words(8) if rows is None else rows
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
        values: dict[str, Any] = {
            "model": str(whisper),
            "data": str(tmp_path / "rows.jsonl"),
            "stt": {"language": "en", **(stt or {})},
            "lora": None,
            "output": str(tmp_path / "run"),
            **changes,
        }
        values["training"] = {
            "max_steps": 2,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "learning_rate": 1.0e-2,
            "optimizer": "adamw_torch",
            **(training or {}),
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def ft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Calls the command line in this process."""
    from ft_core.cli import main

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse's way out
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call
