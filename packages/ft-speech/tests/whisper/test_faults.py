"""What is wrong with a configuration or its data is one line, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"stt": {"encoder": "lora"}}, "stt.encoder: lora needs lora (it is null: allowed are frozen, full)"),
        (
            {"stt": {"encoder": "full"}, "lora": {"r": 4}, "quantization": "nf4"},
            "stt.encoder: full needs quantization: none (it is nf4: allowed are frozen, lora)",
        ),
        ({"stt": {"langauge": "en"}}, "did you mean 'stt.language'?"),
        ({"stt": {"augment": {"noise": 5}}}, "two numbers, the smaller first"),
        ({"stt": {"augment": {"speed": [0.1, 1]}}}, "stt.augment.speed.0: 0.1"),
        ({"stt": {"language": "xx"}}, "row 1: language: 'xx' is none of the 3 that"),
        ({"stt": {"language": None}}, "row 1: has no language, and stt.language is not set"),
        ({"stt": {"timestamps": True}}, "stt.timestamps is set, and no training row has segments"),
        ({"stt": {"timestamps": True, "trim_silence": 40}}, "stt.trim_silence would move the times"),
        ({"stt": {"trim_silence": -40}}, "stt.trim_silence: -40"),
        ({"method": "dpo"}, "does not train the task 'stt' yet (allowed: sft)"),
    ],
)
def test_a_setting(changes: dict[str, Any], line: str, configure: Any, ft: Any, tmp_path: Path) -> None:
    made = ft("train", configure(**changes))
    assert made.code == 2, made.err
    assert line in made.message
    assert not (tmp_path / "run").exists()


def test_a_recording(configure: Any, ft: Any, words: Any, tmp_path: Path) -> None:
    rows = words(6)
    (tmp_path / rows[2]["audio"]).write_bytes(b"RIFF")
    path = configure(rows=rows)
    made = ft("train", path)
    assert made.code == 2
    assert f"row 3: {tmp_path / rows[2]['audio']}: " in made.message
    assert "(stt.on_bad_audio: skip leaves such rows out)" in made.message
    assert not (tmp_path / "run").exists()
    made = ft("train", configure(rows=rows, stt={"on_bad_audio": "skip"}))
    assert made.code == 0, made.err
    assert "left out: train row 3: " in made.out + made.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["data"]["bad_audio_rows"] == 1
    assert json.loads((tmp_path / "run/environment.json").read_text())["left_out_rows"] == [2]


def test_a_plan_is_refused_and_a_step_timed(configure: Any, ft: Any, tmp_path: Path) -> None:
    path = configure()
    text = path.read_text()
    for values in (text, "\n".join(line for line in text.splitlines() if line.strip() not in ("stt:", "language: en"))):
        path.write_text(values)  # the section tells the task, or else the model
        made = ft("plan", path, "--memory", "12GiB")
        assert made.code == 2
        assert made.message == "ft plan: task: ft plan does not know the task 'stt' yet"
    path.write_text(text)
    made = ft("bench", path, "--steps", 2, "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["tokens_per_second"] > 0
    assert not (tmp_path / "run").exists()
