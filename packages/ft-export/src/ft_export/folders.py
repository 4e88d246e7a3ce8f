"""Writing beside the final place and renaming, so that nothing unfinished ever looks finished."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ft_export.errors import ExportError

__all__ = ["new_file", "new_folder", "refuse_existing_folder", "require_space"]


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
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place when the block ends well and vanishes when it does not.

    What ``out`` held before stays until the new folder is whole.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
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
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """As :func:`new_folder`, for one file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{out.stem}.", suffix=f".partial{out.suffix}", dir=out.parent)
    os.close(handle)
    partial = Path(name)
    try:
        partial.chmod(0o666 & ~_umask())
        yield partial
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask; reading it is only possible by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
