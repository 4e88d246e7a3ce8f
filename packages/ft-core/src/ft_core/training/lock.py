"""One training at a time in a run folder: a lock that the system takes back from a process that dies."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ft_core.errors import RunError

__all__ = ["held"]

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
"""What a file system without locks says; there a run is not guarded."""

TRIES = 100
"""How often a folder is made that others remove meanwhile; where no file can be made at all, it looks the same."""
FAR = 2**30
"""Windows keeps others from reading what is locked, so the byte that is locked there lies behind the number."""


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the folder ``run`` for this process: a file ``.NAME.lock`` beside it, locked, gone at the end.

    The lock is the system's (``flock``, on Windows ``msvcrt.locking``), not the file's being there: what a killed
    process leaves behind holds nobody up.

    Raises:
        RunError: another process holds it, or no file can be made there.
    """
    path = run.with_name(f".{run.name}.lock")
    made: list[Path] = []
    try:
        handle = _take(path, run, made)
        try:
            yield
        finally:
            # The name goes while the lock is held: whoever has opened the file by then sees that it is gone (_take).
            # Windows removes no open file, and refuses while another has it open, so there it goes last.
            if sys.platform != "win32":
                with suppress(OSError):
                    path.unlink()
            os.close(handle)
            if sys.platform == "win32":
                with suppress(OSError):
                    path.unlink()
    finally:
        for folder in made:
            with suppress(OSError):  # it holds a run now
                folder.rmdir()


def _take(path: Path, run: Path, made: list[Path]) -> int:
    """An open, locked file at ``path``; ``made`` takes the folders that were made for it, the lowest first."""
    try:
        return _open(path, run, made)
    except OSError as error:
        raise RunError(f"cannot make the run folder {run}: {error.strerror or error}") from error


def _open(path: Path, run: Path, made: list[Path]) -> int:
    missed = 0
    while True:
        made += _make_parents(path)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            missed += 1
            if missed == TRIES:
                raise
            continue  # another process has just removed the folder that it had made
        try:
            if not _lock(handle):
                number = os.read(handle, 32).decode(errors="replace").strip()
                who = f" (process {number})" if number else ""
                raise RunError(f"another ft train{who} is writing {run}: wait for it, or give another output")
            if _is_at(handle, path):
                with suppress(OSError):  # the number is a courtesy; a full disk has no room for it
                    os.ftruncate(handle, 0)
                    os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it between our opening and our locking it


def _make_parents(path: Path) -> list[Path]:
    missing = []
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        missing.append(folder)
        folder = folder.parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
    return missing


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _lock(handle: int) -> bool:
    """Lock an open file without waiting; False where another holds it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, FAR, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
