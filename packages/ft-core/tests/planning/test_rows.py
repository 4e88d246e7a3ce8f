"""How many steps a run has, from files that are counted and not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ft_core.config.load import check_config
from ft_core.planning.rows import count_rows, steps_of


def config(data: Any, **changes: Any) -> Any:
    return check_config({"model": "m", "data": data, "packing": False, **changes})


def write(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": "word " * 40}) + "\n" for _ in range(count)), encoding="utf-8")
    return path


def test_rows_are_steps(tmp_path: Path) -> None:
    data = str(write(tmp_path / "rows.jsonl", 101))
    training = {"batch_size": 4, "gradient_accumulation": 2}
    for epochs, steps in ((1, 13), (2, 26), (0.5, 7)):
        wanted = config(data, training={**training, "epochs": epochs})
        assert steps_of(wanted, count_rows(wanted))[0] == steps
    wanted = config(data, training={**training, "max_steps": 5})
    assert steps_of(wanted, count_rows(wanted)) == (5, "training.max_steps")


def test_packed_rows_are_estimated_from_the_size(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", 1000)
    wanted = config(str(data), packing=True, max_length=256, training={"batch_size": 1, "gradient_accumulation": 1})
    steps, said = steps_of(wanted, count_rows(wanted))
    assert steps == -(-data.stat().st_size // 4 // 256) or steps == pytest.approx(data.stat().st_size / 1024, abs=1)
    assert "about" in said


def test_several_sources_their_weights_and_what_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "a.jsonl", 10)
    (tmp_path / "folder" / "b.csv").write_text("prompt,completion\n" + "a,b\n" * 6, encoding="utf-8")
    write(tmp_path / "c.jsonl", 20)
    sources = [str(tmp_path / "folder"), {"path": str(tmp_path / "c.jsonl"), "weight": 0.5}]
    found = count_rows(config(sources))
    assert found is not None
    assert found.rows == 26
    found = count_rows(config(sources, eval_split=6))
    assert found is not None
    assert found.rows == 20
    found = count_rows(config(sources, eval_split=0.5))
    assert found is not None
    assert found.rows == 13


def test_what_cannot_be_counted_is_unknown(tmp_path: Path) -> None:
    for data in ("some/dataset", str(tmp_path / "none.jsonl"), str(tmp_path)):
        wanted = config(data)
        assert count_rows(wanted) is None
        assert steps_of(wanted, None)[0] is None
