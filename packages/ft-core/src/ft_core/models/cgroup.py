"""How much memory a container allows, which ``/proc/meminfo`` does not know: the limits of Linux's control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["limits"]

KINDS = (
    ("sys/fs/cgroup", "", ("memory.max", "memory.current", "inactive_file")),
    ("sys/fs/cgroup/memory", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
)
"""Of versions 2 and 1: where groups lie, what a line of ``/proc/self/cgroup`` calls it, and the names of what is read.

The third is what the system drops first of the files that it keeps in memory: it is counted as used, and is to be had.
"""


def limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Bytes that each group around this process may take, and how many are left of them.

    Inside a container its own group may be mounted as the topmost, under a name that says otherwise; so the topmost is
    always looked at.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        for mount, controller, names in KINDS:
            if controller not in controllers.split(","):
                continue
            group = PurePosixPath(name.lstrip("/"))
            for path in (group, *group.parents):
                if ".." not in path.parts and (found := _limit(root / mount / path, *names)) is not None:
                    yield found


def _limit(group: Path, most: str, used: str, cache: str) -> tuple[int, int] | None:
    """The limit of one group and what is left of it; None where it has none."""
    try:
        limit, taken = (int((group / name).read_text(encoding="utf-8")) for name in (most, used))
    except (OSError, ValueError):  # no such file, or the word max
        return None
    try:
        fields = (line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        dropped = next((int(words[1]) for words in fields if words[0] == cache), 0)
    except (OSError, ValueError, IndexError):
        dropped = 0
    return limit, max(limit - max(taken - dropped, 0), 0)
