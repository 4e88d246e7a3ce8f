"""Nothing yet."""

from __future__ import annotations

from collections.abc import Iterator

from ft_kernels.bench.harness import Case

__all__ = ["cases"]


def cases(models: list[str], tokens: int) -> Iterator[Case]:
    """Nothing yet."""
    yield from ()
