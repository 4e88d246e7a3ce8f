"""Activations on the disk, where the host's memory cannot hold them: the last resort.

They lie in files that are mapped into memory, so that the system itself moves them. A file has no name from the moment
when it is made: whatever ends the process, nothing is left of it. Its room on the disk is taken at once, since a mapped
file that outgrows its disk ends the process without a word.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ft_core.errors import RunError
from ft_core.fast.offload import IN_A_SLAB, Pool
from ft_core.models.device import processes_here

__all__ = ["RATE", "Disk", "disk_room"]

RATE = 1e9
"""Bytes a second that a disk is taken to write or read: a common SSD sustains one to three times that."""
SHARE = 0.8
"""Of what is free on the disk, what activations may take, of all processes: checkpoints are written beside them."""
MEMORY = ("tmpfs", "ramfs")
"""File systems that are memory."""


def disk_room(folder: Path) -> int:
    """Bytes that activations may take in a folder, or in what will hold it; 0 where that lies in memory itself."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return 0 if _is_memory(folder) else int(SHARE * shutil.disk_usage(folder).free)
    except OSError:
        return 0


class Disk(Pool):
    """Buffers in files without a name.

    Attributes:
        folder: where they are made; it has to be there.
    """

    def __init__(self, folder: Path, most: int | None = None) -> None:
        super().__init__(pinned=False, most=most)
        self.folder = folder
        self._files: list[Any] = []

    def _limit(self) -> int:
        if self.most is not None:
            return self.most
        room = disk_room(self.folder)
        if not self.bytes:
            self._share = room // processes_here()  # as of the host's memory: what is taken must not be shared again
        return self.bytes + room if self._share is None else min(self.bytes + room, self._share)

    def _slab(self, size: int) -> int:
        return IN_A_SLAB * size

    def _memory(self, count: int) -> Tensor:
        try:
            file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  # it lives as long as what is mapped
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, count)
                else:
                    file.truncate(count)
                mapped = mmap.mmap(file.fileno(), count)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise RunError(
                f"activations cannot be kept in a file in {self.folder}: {error.strerror or error}; set activations: "
                "recompute, or disk: FOLDER, or lower max_length or training.batch_size"
            ) from error
        if hasattr(os, "posix_fallocate"):
            file.close()  # the mapping keeps what it needs
        else:
            self._files.append(file)
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def _refusal(self, wanted: int, most: int) -> str:
        return (
            f"activations that the host's memory cannot hold take {wanted / 2**30:.1f} GiB of the disk at "
            f"{self.folder}, {most / 2**30:.1f} can be had: set activations: recompute, or disk: FOLDER on a larger "
            "one, or lower max_length or training.batch_size"
        )


def _is_memory(folder: Path) -> bool:
    """Whether the file system of a folder is one of memory, as far as Linux says so."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    device = folder.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2] == name:
            return after.split()[0] in MEMORY
    return False
