"""What is written beside its place, and what is left of it when its process is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ft_export.folders import clear_unfinished, new_file, new_folder

needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks on folders")

WRITING = """
import sys, time
from pathlib import Path
from ft_export import folders
with getattr(folders, sys.argv[1])(Path(sys.argv[2])) as partial:
    (partial / "file" if partial.is_dir() else partial).write_text("half")
    print(partial, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writing() -> Iterator[Any]:
    """`writing(kind, out)`: a process that is in the middle of writing `out`, and where it writes."""
    started: list[subprocess.Popen[str]] = []

    def start(kind: str, out: Path) -> tuple[subprocess.Popen[str], Path]:
        words = [sys.executable, "-c", WRITING, kind, str(out)]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        stream = started[-1].stdout
        assert stream is not None
        return started[-1], Path(stream.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.communicate()


@needs_locks
@pytest.mark.parametrize(("kind", "name"), [("new_folder", "merged"), ("new_file", "model-f16.gguf")])
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(
    writing: Any, tmp_path: Path, kind: str, name: str
) -> None:
    out = tmp_path / name
    killed, left = writing(kind, out)
    _, kept = writing(kind, out)
    assert left.exists()  # the second has left the first alone
    assert kept.exists()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    others = [tmp_path / f".{name}.mine", tmp_path / ".other.abcdefgh.partial"]
    for other in others:
        other.mkdir()
    with {"new_folder": new_folder, "new_file": new_file}[kind](out) as partial:
        assert not left.exists()
        assert kept.exists()
        clear_unfinished(out)
        assert partial.exists()
    assert sorted(tmp_path.iterdir()) == sorted([out, kept, *others])


@needs_locks
def test_killed_while_the_old_one_is_replaced(tmp_path: Path) -> None:
    """Between the two renames, or before the old one was removed."""
    out = tmp_path / "merged"
    out.mkdir()
    for name in (".merged.abcdefgh.old", ".merged.abcdefgh.partial", ".merged.ijklmnop.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    link = tmp_path / ".merged.qrstuvwx.partial"
    os.symlink(out, link)
    with new_folder(out) as partial:
        (partial / "new").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [link.name, "merged"]
    assert [path.name for path in out.iterdir()] == ["new"]


@needs_locks
def test_killed_between_two_renames(tmp_path: Path) -> None:
    """The earlier folder has been moved away, the new one not yet in: the earlier one comes back first."""
    out = tmp_path / "merged"
    for name in (".merged.abcdefgh.old", ".merged.abcdefgh.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clear_unfinished(out)
    assert (out / "file").read_text() == ".merged.abcdefgh.old"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_proof_is_on_the_disk_before_it_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written beside, flushed to the disk, renamed; in that order, and nothing else is left."""
    from ft_export.exporting import save_proof

    did: list[str] = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (did.append("flushed"), flush(handle)))
    monkeypatch.setattr(os, "replace", lambda one, other: (did.append(Path(other).name), rename(one, other)))
    path = save_proof(tmp_path, {"a": "ö"})
    assert did == ["flushed", "proof.json"]
    assert path.read_text(encoding="utf-8") == '{\n "a": "ö"\n}\n'
    save_proof(tmp_path, {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["proof.json"]


@pytest.mark.parametrize("number", [1, 2])
def test_two_exports_into_one_folder_keep_both_proofs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """What the others wrote or took away while a file was flushed and renamed, minutes for a large one."""
    from ft_export.exporting import PROOF
    from ft_export.gguf.checking import proven_file

    made: Any = SimpleNamespace(architecture="llama", vocabulary=SimpleNamespace(pre="default"))

    def files() -> dict[str, Any]:
        said: dict[str, Any] = json.loads((tmp_path / PROOF).read_text())
        assert said["proof_format"] == 1
        return {name: entry["found"] for name, entry in said["files"].items()}

    def export(name: str, found: int, between: Any = None) -> None:
        with proven_file(tmp_path / name) as (partial, prove):
            partial.write_text(name)
            assert prove(made, {"found": found}, []) == tmp_path / PROOF
            if between is not None:
                between()

    export("a", 1, lambda: export("b", 1))
    assert files() == {"a": 1, "b": 1}
    # Each made again while the other is: neither's old entry comes back.
    export("a", 2, lambda: export("b", 2))
    assert files() == {"a": 2, "b": 2}
    # A third one comes in while the file is flushed to the disk, or else the new proof.
    flush, calls = os.fsync, [0]

    def late(handle: int) -> None:
        calls[0] += 1
        if calls[0] == number:
            export("c", 3)
        flush(handle)

    export("a", 3, lambda: monkeypatch.setattr(os, "fsync", late))
    assert files() == {"a": 3, "b": 2, "c": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", PROOF]


def test_one_place_writes_proofs() -> None:
    """Every exporter's ``proof.json`` comes from :func:`save_proof`."""
    import ft_export

    folder = Path(ft_export.__file__).parent
    writes = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if "indent=1" in path.read_text(encoding="utf-8")
    ]
    assert writes == ["exporting.py"]
