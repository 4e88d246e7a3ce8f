"""What `ft train` names at its end can be run as it stands."""

from __future__ import annotations

import shlex
from typing import Any

import pytest


def named(out: str) -> list[list[str]]:
    last = out.rstrip("\n").rpartition("\n")[2]
    return [shlex.split(words)[1:] for words in last.removeprefix("next: ").split("  |  ")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["eval_split=5"], ["eval", "chat", "merge"]),
        ([], ["chat", "merge"]),  # no held-out rows: ft eval would ask for some
        (["eval_split=5", "lora=null"], ["eval", "chat"]),  # nothing is to be merged
    ],
)
def test_each_works(
    ft: Any, configure: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: list[str]
) -> None:
    import io

    pytest.importorskip("ft_export")
    done = ft("train", configure(), "training.max_steps=1", *words)
    assert done.code == 0, done.err
    commands = named(done.out)
    assert [command[0] for command in commands] == expected
    for command in commands:
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        done = ft(*command)
        assert done.code == 0, done.err
