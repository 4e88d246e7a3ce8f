"""Tiny models that see and drawn digits, those of ft-vision's own tests, for tests of methods of other packages."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).parents[1] / "packages/ft-vision/tests/conftest.py"
_spec = importlib.util.spec_from_file_location("ft_vision_tests", PATH)
assert _spec is not None
assert _spec.loader is not None
_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tests)

FAMILIES: tuple[str, ...] = ("qwen3_vl", "qwen2_5_vl", "gemma3", "llava")
draw_digit = _tests.draw_digit
family, ft = _tests.family, _tests.ft

QUESTION = "which digit?"


def asked(path: Path, more: str = "") -> list[dict[str, Any]]:
    """A prompt with one image."""
    parts = [{"type": "image", "image": str(path)}, {"type": "text", "text": QUESTION + more}]
    return [{"role": "user", "content": parts}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def pairs(folder: Path, count: int, *, digits: int = 4, sizes: Any = ((56, 56), (84, 56))) -> list[dict[str, Any]]:
    """Pairs that differ in which digit they say; questions, answers and images of several lengths and sizes."""
    (folder / "images").mkdir(exist_ok=True)
    made = []
    for number in range(count):
        digit = number % digits
        path = draw_digit(folder / "images", digit, seed=number, size=sizes[number % len(sizes)])
        wrong = str((digit + 1 + number // digits % (digits - 1)) % digits)
        made.append(
            {
                "prompt": asked(path, " " * 0 if number % 3 else " digit?"),
                "chosen": said(str(digit)),
                "rejected": said(wrong + (" 1 2" if number % 2 else "")),
            }
        )
    return made


def prompts(folder: Path, count: int, *, digits: int = 2, size: tuple[int, int] = (56, 56)) -> list[dict[str, Any]]:
    """Questions with the right answer in a column."""
    (folder / "images").mkdir(exist_ok=True)
    made = []
    for number in range(count):
        path = draw_digit(folder / "images", number % digits, seed=number, size=size)
        made.append({"prompt": asked(path), "answer": str(number % digits)})
    return made


def colours(folder: Path) -> list[dict[str, Any]]:
    """Which of two colours fills an image, in four shades."""
    from PIL import Image

    made = []
    for number in range(4):
        shade = 90 + 40 * number
        path = folder / f"colour-{number}.png"
        Image.new("RGB", (56, 56), (shade, 20, 20) if number % 2 else (20, 20, shade)).save(path)
        made.append({"prompt": asked(path), "answer": str(number % 2)})
    return made


def write(folder: Path, model: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """A configuration of a short LoRA run on these rows."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values: dict[str, Any] = {
        "model": str(model),
        "task": "vision",
        "method": "dpo",
        "data": str(data),
        "max_length": 96,
        "lora": {"r": 8},
        "output": str(folder / "run"),
        **changes,
    }
    values["training"] = {
        "max_steps": 3,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "learning_rate": 5.0e-3,
        "optimizer": "adamw_torch",
        **changes.get("training", {}),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]
