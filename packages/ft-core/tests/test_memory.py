"""A training that runs out of memory says so in one line, with what helps."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit, which Linux has")
def test_no_memory_left(configure: Any, tmp_path: Path, start_ft: Any, ft: Any, write_rows: Any) -> None:
    """A batch of half a million tokens in documents of uneven lengths: their mask alone has over 100 GB."""
    words = " ".join(map(str, range(100)))
    data = write_rows(tmp_path / "long.jsonl", [{"text": f"{n} {words[: 3 * (n % 100)]}"} for n in range(4000)])
    config = configure(data=str(data), max_length=256, training={"max_steps": 2, "batch_size": 1, "save_every": 1})
    assert ft("train", config).code == 0
    more = ["training.max_steps=3", "training.batch_size=4000", f"output={tmp_path / 'other'}"]
    process = start_ft("train", config, *more)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (2**36, resource.RLIM_INFINITY))  # else it might be granted
    failed = process.wait()
    assert failed.code == 2, failed.err
    assert failed.message == (
        "ft train: out of memory: set activations: recompute, or set quantization: nf4, or lower training.batch_size "
        "(now 4000), or lower max_length (now 256)"
    )
    assert "Traceback" not in failed.err
    # With a checkpoint there, another way to keep activations is no other run.
    done = ft("train", config, "--resume", "training.max_steps=3", "activations=recompute")
    assert done.code == 0, done.err


def test_what_is_a_want_of_memory() -> None:
    import torch

    from ft_core.memory import is_memory_error

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_memory_error(caught.value)
    assert is_memory_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_memory_error(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_memory_error(caught.value)
