"""The benchmark's processes take turns: each alone, in order, and none that fails is in the way of the others."""

import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
turns = pytest.importorskip("turns")

PLAYER = """
import sys, time
sys.path.insert(0, {path!r})
from turns import my_turn
name, log = {name!r}, {log!r}
def note(what):
    with open(log, "a") as file:
        file.write(f"{{name}} {{what}}\\n")
if name == "never":
    raise ModuleNotFoundError("No module named 'never'")
note("ready")
my_turn()
note("begins")
print("a row of " + name, flush=True)
if name == "late":
    time.sleep(60)
if name == "broken":
    raise RuntimeError("out of memory")
time.sleep(0.1)
note("ends")
"""


def _played(names: list[str], log: Path, *, together: bool, turn: float = 20.0) -> dict[str, turns.Player]:
    def start(name: str) -> turns.Player:
        source = PLAYER.format(path=str(BENCHMARKS), name=name, log=str(log))
        return turns.Player([sys.executable, "-c", source], os.environ)

    found: dict[str, turns.Player] = {}
    starts = [lambda name=name: start(name) for name in names]
    turns.play(starts, lambda i, player: found.update({names[i]: player}), together=together, turn=turn)
    assert list(found) == names
    return found


def test_all_get_ready_and_then_each_has_its_turn_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = _played(["never", "one", "broken", "two"], log, together=True)
    lines = log.read_text().splitlines()
    assert set(lines[:3]) == {"one ready", "broken ready", "two ready"}
    assert lines[3:] == ["one begins", "one ends", "broken begins", "two begins", "two ends"]
    assert found["one"].lines == ["a row of one"]
    assert found["one"].error is None
    assert found["never"].error == "ModuleNotFoundError: No module named 'never'"
    assert found["broken"].lines == ["a row of broken"]
    assert found["broken"].error == "RuntimeError: out of memory"


def test_one_after_the_other_each_starts_for_its_turn(tmp_path: Path) -> None:
    log = tmp_path / "log"
    _played(["one", "two"], log, together=False)
    assert log.read_text().splitlines() == [f"{n} {w}" for n in ("one", "two") for w in ("ready", "begins", "ends")]


def test_a_turn_that_takes_too_long_is_ended_and_its_rows_are_kept(tmp_path: Path) -> None:
    found = _played(["late", "one"], tmp_path / "log", together=True, turn=3.0)
    assert found["late"].lines == ["a row of late"]
    assert found["late"].error == "took too long and was ended"
    assert found["one"].error is None
