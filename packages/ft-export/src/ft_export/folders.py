"""Writing beside the final place and renaming, so that nothing unfinished ever looks finished."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ft_export import __version__
from ft_export.errors import ExportError

__all__ = [
    "KEY", "check_inside", "clear_inside", "clear_unfinished", "files_in", "key_of", "made_for", "new_file",
    "new_folder", "refuse_existing_folder", "require_space", "scratch_folder", "sha256_of", "unfinished_bytes",
]  # fmt: skip

RANDOM = "[a-z0-9_]{8}"
"""What tempfile puts into a name."""
KEY = ".made-from"
"""The file in an unfinished folder that says what it is made from."""


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse early when ``needed`` bytes do not fit on the disk of ``folder`` (which need not exist yet).

    Raises:
        ExportError: less is free than needed; says both in MB.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ExportError(
            f"{what} needs {needed / 1e6:.0f} MB on the disk of {there}, {free / 1e6:.0f} MB are free: "
            "free space or choose another folder with --out"
        )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link in a model's folder that leads out of it, to what may be anybody's.

    The Hub's cache keeps a snapshot as links to its ``blobs``, which are the snapshot's own.

    Raises:
        ExportError: it does.
    """
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if home not in real.parents and (blobs is None or blobs not in real.parents):
        raise ExportError(f"{path} is a link to {real}, outside of the model's folder: refused; copy the file there")


def refuse_existing_folder(out: Path, marker: str, overwrite: bool) -> None:
    """Refuse an output folder that is taken.

    Args:
        marker: a file that an earlier output of the same kind holds. Only such a folder may be overwritten, so that a
            mistyped ``--out`` cannot delete anything else.

    Raises:
        ExportError: ``out`` is a file, or a folder with content that may not be replaced.
    """
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir() or out.is_symlink():
        raise ExportError(f"{out} exists and is no folder of its own: choose another one with --out")
    if not any(out.iterdir()):
        return
    if not (out / marker).is_file():
        raise ExportError(f"{out} holds something else (it has no {marker}): choose another folder with --out")
    if not overwrite:
        raise ExportError(f"{out} is already there: pass --overwrite to replace it, or choose another with --out")


@contextmanager
def made_for(out: Path) -> Iterator[None]:
    """Make the folders that ``out`` is to lie in; those that were made go where the block fails and left them empty."""
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty: an interrupted merge is kept, or something else came in
            for parent in made:
                parent.rmdir()
        raise


@contextmanager
def new_folder(out: Path, key: str | None = None) -> Iterator[Path]:
    """Yield a folder beside ``out`` that takes its place when the block ends well and vanishes when it does not.

    What ``out`` held before stays until the new folder is whole. What killed processes have left of such folders goes.

    Args:
        key: what the folder is to be made from. What a killed or interrupted process has left of one with the same key
            is gone on with: the folder that is yielded holds it. Without a key it is empty.
    """
    with made_for(out), _unfinished(out, key) as partial:
        yield partial
        (partial / KEY).unlink(missing_ok=True)
        for file in partial.rglob("*"):  # safetensors writes files that only their owner can read
            if file.is_file():
                file.chmod(0o666 & ~_umask())
        if out.exists():
            old = partial.with_suffix(".old")
            os.replace(out, old)
            try:
                os.replace(partial, out)
            except OSError:
                os.replace(old, out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(partial, out)
        for old in _beside(out, f".{out.name}.", ".old"):  # of a process that was killed while it replaced it
            if not old.with_suffix(".partial").exists():
                shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _unfinished(out: Path, key: str | None) -> Iterator[Path]:
    """The folder beside ``out`` of :func:`new_folder`. It goes when the block ends, but for an interrupted one's."""
    clear_unfinished(out, key)
    partial, lock = _left_of(out, key) or _begin(
        lambda: Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    )
    kept = False
    try:
        partial.chmod(0o777 & ~_umask())
        if key is not None:
            with suppress(OSError):  # a full disk, of which the block says what it wants; it is not gone on with then
                (partial / KEY).write_text(key, encoding="utf-8")
        yield partial
    except KeyboardInterrupt:
        kept = key is not None
        raise
    finally:
        if not kept:
            shutil.rmtree(partial, ignore_errors=True)
        _end(lock)


@contextmanager
def new_file(out: Path, key: str | None = None) -> Iterator[Path]:
    """As :func:`new_folder`, for one file.

    With a key it lies in a folder of its own until it is whole, where what says how far it is may lie beside it.
    """
    if key is not None:
        with made_for(out), _unfinished(out, key) as folder:
            yield folder / out.name
            _to_disk(folder / out.name)
            os.replace(folder / out.name, out)
        return
    with made_for(out), _new_file(out) as partial:
        yield partial


@contextmanager
def _new_file(out: Path) -> Iterator[Path]:
    clear_unfinished(out)

    def make() -> Path:
        handle, name = tempfile.mkstemp(prefix=f".{out.stem}.", suffix=f".partial{out.suffix}", dir=out.parent)
        os.close(handle)
        return Path(name)

    partial, lock = _begin(make)
    try:
        partial.chmod(0o666 & ~_umask())
        yield partial
        _to_disk(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
        _end(lock)


def key_of(model: Path, files: Iterable[Path], *said: Any) -> str:
    """What something is made from, for :func:`new_folder`: with the same key the same bytes are made.

    Args:
        model: the folder of the model. files: those of it that are read; their sizes and times of change count.
        said: all else that what is made depends on; to be said as JSON.
    """
    stats = [(path.name, path.stat()) for path in sorted(files)]
    about = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    text = json.dumps([__version__, str(model.resolve()), about, *said])
    return hashlib.sha256(text.encode()).hexdigest()


def files_in(folder: Path) -> list[Path]:
    """All files of a folder, finished or not, in the order of their paths; :data:`KEY` is none of them."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != KEY)


def clear_inside(folder: Path, keep: Callable[[Path], bool]) -> None:
    """Remove what an unfinished folder holds that is not gone on with."""
    for path in folder.iterdir():
        if path.name != KEY and not keep(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` for what is needed on the way to it; it goes when the block ends.

    It is called as an unfinished ``out`` is, so that what a killed process leaves of it goes in the same way.
    """
    with made_for(out):
        partial, lock = _begin(
            lambda: Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        )
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            _end(lock)


def clear_unfinished(out: Path, key: str | None = None) -> None:
    """Remove what killed processes have left beside ``out``: unfinished folders and files that no process holds.

    Whoever writes one holds a lock of the system's on it (``flock``), which ends with the process, however that ends.
    Where the system has no such locks nothing is removed, and on a network's file system they may hold for one machine
    alone. What stood in the place of ``out`` until a process was killed that was replacing it stands there again.

    Args:
        key: folders with this key stay (see :func:`new_folder`).
    """
    if not out.exists():
        for old in _beside(out, f".{out.name}.", ".old"):
            if _is_left(old.with_suffix(".partial")):
                os.replace(old, out)
                break
    for prefix, suffix in ((f".{out.name}.", ".partial"), (f".{out.stem}.", f".partial{out.suffix}")):
        for path in _beside(out, prefix, suffix):
            try:
                lock = _lock(path)
            except OSError:  # a living process has it, or has just renamed it
                continue
            if lock is None:
                continue
            if path.is_dir():
                if key is None or _key_of(path) != key:
                    shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            _end(lock)


def unfinished_bytes(out: Path, key: str) -> int:
    """Bytes of what is there already of a folder with this key."""
    left = [path for path in _beside(out, f".{out.name}.", ".partial") if _key_of(path) == key]
    return sum(file.stat().st_size for path in left[:1] for file in path.rglob("*") if file.is_file())


def _left_of(out: Path, key: str | None) -> tuple[Path, int | None] | None:
    """A folder with this key that no process holds, and a lock on it."""
    for path in _beside(out, f".{out.name}.", ".partial") if key is not None else ():
        if _key_of(path) != key:
            continue
        try:
            lock = _lock(path)
        except OSError:
            continue
        if lock is not None and _is_at(lock, path):
            return path, lock
        _end(lock)
    return None


def _key_of(path: Path) -> str | None:
    try:
        return (path / KEY).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _is_left(path: Path) -> bool:
    """Whether a partial folder is there that no process holds."""
    try:
        lock = _lock(path)
    except OSError:
        return False
    _end(lock)
    return lock is not None


def _beside(out: Path, prefix: str, suffix: str) -> list[Path]:
    """Files and folders beside ``out`` that tempfile has named so."""
    if not out.parent.is_dir():
        return []
    name = re.compile(re.escape(prefix) + RANDOM + re.escape(suffix))
    return [path for path in out.parent.iterdir() if name.fullmatch(path.name) and not path.is_symlink()]


def _begin(make: Callable[[], Path]) -> tuple[Path, int | None]:
    """What ``make`` makes, with a lock on it (None where the system has none)."""
    while True:
        path = make()
        try:
            lock = _lock(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process saw it before it was locked, and clears it away
        if lock is None or _is_at(lock, path):
            return path, lock
        _end(lock)


def _lock(path: Path) -> int | None:
    """An open handle with a lock; None where none can be had.

    Raises:
        BlockingIOError: another process has it. FileNotFoundError: it is gone.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a network's file system without them
        os.close(handle)
        return None
    return handle


def _is_at(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _end(lock: int | None) -> None:
    if lock is not None:
        with suppress(OSError):
            os.close(lock)


def _to_disk(path: Path) -> None:
    """Wait until a file's bytes are on the disk, so that no name leads to bytes that a power cut has lost."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    """The process's umask; reading it is only possible by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
