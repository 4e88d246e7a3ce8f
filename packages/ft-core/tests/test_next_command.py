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
        (["eval_split=5"], ["eval", "chat", "merge", "export"]),
        ([], ["chat", "merge", "export"]),  # no held-out rows: ft eval would ask for some
        (["eval_split=5", "lora=null"], ["eval", "chat", "export"]),  # nothing is to be merged
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


def test_what_to_install_where_nothing_exports(ft: Any, configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import entry_points

    from ft_core import plugins
    from ft_core.plugins import Registry

    found = Registry(
        [
            point
            for group in plugins.GROUPS
            for point in entry_points(group=group)
            if group != "ft.exporters" and point.name != "merge"
        ]
    )
    monkeypatch.setattr(plugins, "registry", lambda: found)
    done = ft("train", configure(), "training.max_steps=1")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert named(lines[-2])[0][0] == "chat"
    assert len(named(lines[-2])) == 1
    assert lines[-1].startswith("to merge it, or export it to GGUF, Ollama and others: pip install ")
