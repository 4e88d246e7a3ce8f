"""k-means and residual codebooks, in numpy."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["kmeans", "nearest", "residual_codebooks", "residual_codes"]

Floats: TypeAlias = npt.NDArray[np.float32]

_BLOCK = 1 << 22  # distances that are held at once


def nearest(points: Floats, centres: Floats) -> npt.NDArray[np.int64]:
    """The number of the nearest centre of each point, the first of equally near ones: ``[points]``.

    Args:
        points: ``[points, features]``.
        centres: ``[centres, features]``.
    """
    half = (centres**2).sum(axis=1) / 2
    step = max(1, _BLOCK // len(centres))
    found = [np.argmax(points[i : i + step] @ centres.T - half, axis=1) for i in range(0, len(points), step)]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def kmeans(points: Floats, count: int, *, rounds: int = 20, seed: int = 0) -> Floats:
    """Lloyd's algorithm (Lloyd 1982) from randomly chosen points: ``[count, features]``.

    A centre that loses all its points is put on the point that is farthest from its own centre.

    Args:
        points: ``[points, features]``, at least ``count`` of them.
        rounds: how often points are assigned and centres moved; it ends earlier when no point changes its centre.
        seed: of the choice of points.
    """
    random = np.random.default_rng(seed)
    centres = points[np.sort(random.choice(len(points), count, replace=False))].copy()
    assigned: npt.NDArray[np.int64] = np.full(len(points), -1, np.int64)
    for _ in range(rounds):
        before, assigned = assigned, nearest(points, centres)
        if np.array_equal(before, assigned):
            break
        sizes = np.bincount(assigned, minlength=count)
        order = np.argsort(assigned, kind="stable")
        filled = np.flatnonzero(sizes)
        starts = np.concatenate([[0], np.cumsum(sizes[filled])[:-1]])
        sums = np.add.reduceat(points[order].astype(np.float64), starts, axis=0)
        centres[filled] = (sums / sizes[filled, None]).astype(np.float32)
        empty = np.flatnonzero(sizes == 0)
        if len(empty):
            far = np.argsort(((points - centres[assigned]) ** 2).sum(axis=1), kind="stable")[::-1]
            centres[empty] = points[far[: len(empty)]]
    return centres


def residual_codebooks(points: Floats, sizes: tuple[int, ...], *, rounds: int = 20, seed: int = 0) -> list[Floats]:
    """A codebook for the points, one for what it leaves, and so on: a list of ``[size, features]``.

    Residual vector quantization (Juang and Gray 1982).
    """
    books = []
    for place, size in enumerate(sizes):
        book = kmeans(points, size, rounds=rounds, seed=seed + place)
        points = points - book[nearest(points, book)]
        books.append(book)
    return books


def residual_codes(points: Floats, books: list[Floats]) -> npt.NDArray[np.int64]:
    """The codes of points, one codebook after the other: ``[points, codebooks]``."""
    codes: npt.NDArray[np.int64] = np.zeros((len(points), len(books)), np.int64)
    for place, book in enumerate(books):
        codes[:, place] = nearest(points, book)
        points = points - book[codes[:, place]]
    return codes
