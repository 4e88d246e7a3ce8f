"""`ft bench` times a real configuration and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_times_a_configuration_and_leaves_nothing(ft: Any, configure: Any, tmp_path: Path) -> None:
    config = configure(output=str(tmp_path / "run"))
    before = set(tmp_path.rglob("*"))
    done = ft("bench", config, "--steps", "2", "--json")
    assert done.code == 0, done.err
    timing = json.loads(done.out)
    assert set(timing["seconds"]) == {"data", "forward", "backward", "optimizer"}
    assert all(seconds >= 0 for seconds in timing["seconds"].values())
    assert timing["seconds"]["backward"] > 0
    assert timing["tokens"] > 1
    assert timing["tokens_per_second"] == timing["tokens"] / timing["step_seconds"]
    assert timing["memory"] > 2**20
    assert timing["fast"] is False
    assert set(tmp_path.rglob("*")) == before
    done = ft("bench", config, "--steps", "1")
    assert "tokens a second" in done.out
    assert "plain layers" in done.out


def test_a_wrong_key_is_one_line(ft: Any, configure: Any) -> None:
    done = ft("bench", configure(), "training.batchsize=3")
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
    assert "did you mean" in done.err
