"""A training that runs out of memory says so in one line, with what helps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_no_memory_left(configure: Any, tmp_path: Path, start_ft: Any, ft: Any, write_rows: Any) -> None:
    """A batch of half a million tokens in documents of uneven lengths: their mask alone has over 100 GB."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("needs prlimit, which Linux has")
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
        "ft train: out of memory again, after planning anew (every layer is computed again in backward): set "
        "quantization: nf4, or lower training.batch_size (now 4000), or lower max_length (now 256)"
    )
    assert "Traceback" not in failed.err
    # With a checkpoint there, another way to keep activations is no other run.
    done = ft("train", config, "--resume", "training.max_steps=3", "activations=recompute")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("optimizer", "used", "advised"),
    [
        ("adamw_8bit", "adamw_8bit", True),
        ("adamw_8bit", "paged_adamw_8bit", False),
        ("adamw_torch", "adamw_torch", True),
        ("lion_8bit", "lion_8bit", True),
        ("paged_adamw_32bit", "paged_adamw_32bit", False),
        ("sgd", "sgd", False),
        ("adafactor", "adafactor", False),
    ],
)
def test_another_optimizer_is_named_where_it_helps(optimizer: str, used: str, advised: bool, tmp_path: Path) -> None:
    from ft_core.config.load import check_config
    from ft_core.errors import RunError
    from ft_core.runs import Run
    from ft_core.training.memory import memory_errors_said

    values = {"model": "a/b", "data": "rows.jsonl", "lora": None, "training": {"optimizer": optimizer}}

    def train() -> None:
        with memory_errors_said(Run(tmp_path), check_config(values)) as now:
            assert now.optimizer == optimizer
            now.optimizer = used
            raise MemoryError

    with pytest.raises(RunError) as caught:
        train()
    assert ("set training.optimizer: paged_adamw_8bit" in str(caught.value)) == advised


def test_the_optimizer_that_a_plan_has_paged_is_not_advised(
    configure: Any, ft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from ft_core.training import run

    def load(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(run, "prepare_model", load)
    for optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        planned = SimpleNamespace(peak=SimpleNamespace(optimizer=optimizer))
        monkeypatch.setattr(run, "foresee", lambda *args, found=planned: found)
        failed = ft("train", configure(lora=None, quantization="none", training={"optimizer": "adamw_8bit"}))
        assert failed.code == 2
        assert "out of memory: " in failed.message
        assert ("paged_adamw_8bit" in failed.message) == (optimizer == "adamw_8bit")


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


@pytest.mark.parametrize(
    ("text", "count"),
    [("12GiB", 12 * 2**30), ("12.5 gib", 25 * 2**29), ("800MiB", 800 * 2**20), ("7GB", 7 * 10**9), ("1 mb", 10**6)],
)
def test_amounts(text: str, count: int) -> None:
    from ft_core.memory import bytes_of

    assert bytes_of(text) == count


def test_a_cap_without_a_gpu_says_that_nothing_is_capped(configure: Any, tmp_path: Path, ft: Any) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = configure(memory="12GiB", activations="offload", training={"max_steps": 1}, output=str(tmp_path / "run"))
    done = ft("train", config)
    assert done.code == 0, done.err
    assert "memory: 12GiB is for a GPU's memory, and this runs on none: nothing is limited" in done.out + done.err
    assert "activations: offload needs the fast layers; they are computed again instead" in done.out + done.err


GIB = 2**30
V1 = 2**63 - 4096
"""What version 1 says where there is no limit."""


@pytest.mark.parametrize(
    ("groups", "files", "total", "free"),
    [
        ("0::/\n", {}, 64, 48),
        ("0::/\n", {"memory.max": "max", "memory.current": 4 * GIB}, 64, 48),
        ("0::/\n", {"memory.max": 16 * GIB, "memory.current": 4 * GIB}, 16, 12),
        ("0::/\n", {"memory.max": 16 * GIB, "memory.current": 17 * GIB}, 16, 0),
        ("0::/\n", {"memory.max": 60 * GIB, "memory.current": GIB}, 60, 48),
        ("0::/\n", {"memory.max": "?", "memory.current": "?"}, 64, 48),
        (  # what the system keeps of files is to be had
            "0::/\n",
            {"memory.max": 16 * GIB, "memory.current": 9 * GIB, "memory.stat": f"anon 1\ninactive_file {5 * GIB}\n"},
            16,
            12,
        ),
        (  # the group around it allows less
            "0::/job/step\n",
            {
                "job/step/memory.max": 32 * GIB,
                "job/step/memory.current": GIB,
                "job/memory.max": 16 * GIB,
                "job/memory.current": 10 * GIB,
            },
            16,
            6,
        ),
        ("0::/../other\n", {"memory.max": 16 * GIB, "memory.current": 4 * GIB}, 16, 12),
        (
            "5:cpu:/\n4:memory:/docker/abc\n",
            {"memory/memory.limit_in_bytes": 8 * GIB, "memory/memory.usage_in_bytes": 2 * GIB},
            8,
            6,
        ),
        (
            "4:cpu,memory:/a\n0::/\n",
            {
                "memory/memory.limit_in_bytes": V1,
                "memory/memory.usage_in_bytes": 2 * GIB,
                "memory/a/memory.limit_in_bytes": 8 * GIB,
                "memory/a/memory.usage_in_bytes": 5 * GIB,
                "memory/a/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
            },
            8,
            4,
        ),
    ],
)
def test_a_container_s_limit(groups: str, files: dict[str, Any], total: int, free: int, tmp_path: Path) -> None:
    from ft_core.models.device import host_memory

    written = {
        "proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {48 * 2**20} kB\n",
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": content for name, content in files.items()},
    }
    for name, content in written.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content), encoding="utf-8")
    assert host_memory(tmp_path) == (total * GIB, free * GIB)


def test_a_training_lets_segments_grow_unless_somebody_has_set_the_allocator(
    configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in processes of their own: torch reads it once, and importing ft sets nothing."""
    last = "print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    script = f"import os, sys\nfrom ft_core.cli import main\nmain(sys.argv[1:])\n{last}"
    config = str(configure(data=str(tmp_path / "none.jsonl"), output=str(tmp_path / "run")))

    def after(*words: str) -> str:
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert after("models") == "None"
    if sys.platform == "linux":
        assert after("train", config) == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert after("train", config) == "None"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "garbage_collection_threshold:0.8")
    assert after("train", config) == "garbage_collection_threshold:0.8"


@pytest.mark.gpu
def test_more_than_the_gpu_has_is_refused(configure: Any, tmp_path: Path, ft: Any) -> None:
    done = ft("train", configure(memory="99999GiB", training={"max_steps": 1}, output=str(tmp_path / "run")))
    assert done.code == 2
    assert "memory: '99999GiB' is more than the GPU has (allowed: auto, or up to" in done.err
