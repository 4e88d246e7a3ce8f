"""Blocks on their way into a file."""

from __future__ import annotations

import hashlib
import io
import threading

import numpy as np
import pytest
import torch

from ft_export import ExportError
from ft_export.gguf import streaming


def test_a_stream_writes_its_blocks_and_their_hash() -> None:
    blocks = [np.arange(6, dtype=np.float16).reshape(2, 3), np.ones((1, 3), dtype=np.float16)]
    stream = streaming.Stream(iter(blocks), 18)
    file = io.BytesIO()
    stream.tofile(file)
    assert file.getvalue() == b"".join(block.tobytes() for block in blocks)
    assert stream.sha256 == hashlib.sha256(file.getvalue()).hexdigest()
    with pytest.raises(ExportError, match="was to have 20 bytes and has 18"):
        streaming.Stream(iter(blocks), 20).tofile(io.BytesIO())


def test_what_is_ahead_is_made_in_another_thread_and_fails_where_it_is_used() -> None:
    made: list[int] = []

    def items() -> object:
        for number in range(3):
            assert threading.current_thread() is not threading.main_thread()
            made.append(number)
            yield number
        raise ValueError("no more")

    found: list[int] = []
    with pytest.raises(ValueError, match="no more"):
        found.extend(number for number in streaming.ahead(items()))
    assert made == [0, 1, 2]
    one = streaming.ahead(items())
    assert [next(one), next(one), next(one)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no more"):
        next(one)
    assert list(streaming.ahead([])) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_finite(dtype: torch.dtype) -> None:
    value = torch.randn(3, 50).to(dtype)
    assert streaming.is_finite(value)
    assert streaming.is_finite(value[:0])
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 70, 149):
            broken = value.clone()
            broken.view(-1)[place] = bad
            assert not streaming.is_finite(broken)


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 10)
    value = torch.arange(7 * 4).reshape(7, 4)
    assert [len(part) for part in streaming.rows_of(value)] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(list(streaming.rows_of(value))), value)
    assert [len(part) for part in streaming.rows_of(torch.arange(30))] == [30]
    assert [tuple(part.shape) for part in streaming.rows_of(torch.ones(3, 2, 4))] == [(1, 2, 4)] * 3
