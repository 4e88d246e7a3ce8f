"""Activations on the disk, where the host's memory cannot hold them: the same numbers, and no file left."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ft_core import fast
from ft_core.errors import RunError
from ft_core.fast import offload, spill
from ft_core.fast.choose import Sizes, fit, fit_on_disk
from ft_core.fast.spill import Disk, disk_room
from ft_core.models.device import processes_here

MIB = 2**20
needs_names = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system keeps the name of a file")


def make() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).train()


def step(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1)).to(model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@needs_names
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("most", [0, 200_000])
def test_gradients_are_the_same_and_it_is_said_once(most, device, tmp_path):
    """With nothing in the host's memory, and with some of it there."""
    model = make().to(device)
    path = fast.enable(model)
    path.host.least = 0
    kept = step(model)
    assert path.host.pool(model.device).bytes == 0  # which is there before anybody says how much it may take
    said: list[str] = []
    path.host.most, path.host.disk, path.host.say = most, tmp_path, said.append
    path.choose("offload")
    for _ in range(3):
        found = step(model)
        assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
        assert list(tmp_path.iterdir()) == []
    disk = path.host.on_disk()
    assert disk is not None
    assert disk.bytes > 0
    assert sum(len(buffers) for buffers in disk._free.values()) == sum(
        slab.numel() // size for size, slabs in disk._slabs.items() for slab in slabs
    )
    assert len(said) == 1
    assert f"GiB of a batch go to a file in {tmp_path}, which costs some" in said[0]
    assert bool(path.host.pool(model.device).bytes) == bool(most)
    path.host.leave_disk()
    assert path.host.on_disk() is None


def test_without_a_folder_or_without_room_it_is_refused(tmp_path):
    model = make()
    path = fast.enable(model)
    path.host.least, path.host.most = 0, 0
    path.choose("offload")
    with pytest.raises(RunError, match=r"activations in host memory take .* set activations: recompute"):
        step(model)
    path.host.disk = tmp_path
    disk = path.host.on_disk()
    disk.most = 10_000
    with pytest.raises(RunError, match=r"take 0.0 GiB of the disk at .*, 0.0 can be had: set .*disk: FOLDER") as caught:
        step(model)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@needs_names
def test_a_disk_that_will_not_hold_it_is_seen_before_it_is_written(tmp_path):
    resource = pytest.importorskip("resource")
    disk = Disk(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(RunError, match=r"activations cannot be kept in a file in .*: File too large; set"):
            disk.take(MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert disk.bytes == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match="No such file or directory"):
        Disk(tmp_path / "gone", most=2**30).take(MIB)


def test_buffers_hold_what_is_written_to_them(tmp_path):
    disk = Disk(tmp_path)
    buffers = [disk.take(3 * MIB) for _ in range(10)]
    for number, buffer in enumerate(buffers):
        buffer.fill_(number)
    assert [int(buffer.max()) for buffer in buffers] == [int(buffer.min()) for buffer in buffers] == list(range(10))
    assert disk.bytes == 48 * MIB
    for buffer in buffers:
        disk.give(buffer)
    assert disk.take(3 * MIB - 7).numel() == 3 * MIB
    assert disk.bytes == 48 * MIB


def test_room_on_a_disk(tmp_path, monkeypatch):
    room = disk_room(tmp_path / "not" / "there" / "yet")
    assert 0 < room <= 0.81 * os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    if os.path.isdir("/dev/shm") and "tmpfs" in Path("/proc/mounts").read_text():
        assert disk_room(Path("/dev/shm")) == 0  # memory, not a disk
    monkeypatch.setattr(spill, "_is_memory", lambda folder: True)
    assert disk_room(tmp_path) == 0


def test_the_host_s_share_is_not_counted_again_as_it_is_taken(monkeypatch):
    free = 100 * MIB
    pool = offload.Pool(pinned=False)
    monkeypatch.setattr(offload, "host_memory", lambda: (2**40, free - pool.bytes))
    held = [pool.take(MIB) for _ in range(70)]
    with pytest.raises(RunError):
        held += [pool.take(MIB) for _ in range(30)]
    assert pool.bytes <= 0.8 * free


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_disk_s_share_is_not_counted_again_as_it_is_taken(ranks, tmp_path, monkeypatch):
    """By however many processes: each begins before any of them has taken much."""
    free = 100 * MIB
    disks = [Disk(tmp_path) for _ in range(ranks)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(spill, "disk_room", lambda folder: int(spill.SHARE * (free - sum(d.bytes for d in disks))))
    monkeypatch.setattr(Disk, "_memory", lambda disk, count: torch.empty(count, dtype=torch.uint8, device="meta"))
    assert [disk.room for disk in disks] == [80 * MIB // ranks] * ranks
    for disk in disks:
        held = [disk.take(MIB) for _ in range(24)]
    for disk in disks:
        with pytest.raises(RunError, match="can be had"):
            held += [disk.take(MIB) for _ in range(100)]
    assert 60 * MIB < sum(disk.bytes for disk in disks) <= 80 * MIB
    assert held


def test_processes_on_this_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert processes_here() == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert processes_here() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes_here() == 2


def test_no_more_of_the_disk_than_is_needed():
    layout: Any = SimpleNamespace(heads=32, kv_heads=8, head_dim=128)
    sizes = Sizes.of(layout, SimpleNamespace(hidden_size=4096, intermediate_size=14336), True, ranks=112)
    layers, tokens = 32, 65536
    each = tokens * sizes.host["offload-input"]
    lean = layers * tokens * sizes.kept["recompute"]

    def moved(plan: Any) -> int:
        return sum(tokens * sizes.host.get(choice, 0) for choice in plan)

    asked = []

    def plan(room: int, host: int, disk: int) -> Any:
        return fit_on_disk(layers, tokens, room, sizes, host, lambda: asked.append(1) or disk, room)

    assert plan(lean, 0, 2**50) == fit(layers, tokens, lean, sizes, 0)
    assert not asked
    for short in (1, each, 5 * each):
        found = plan(lean - short, 0, 2**50)
        assert sum(tokens * sizes.kept[choice] for choice in found) <= lean - short
        assert moved(found) == -(-short // each) * each
    found = plan(lean // 2, 10 * each, 3 * each)
    assert moved(found) <= 13 * each


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ft train` on the fast layers, on a machine with 10 kB of free memory."""
    from ft_core.models import device, loading
    from ft_core.training import run, speed

    pick = device.pick_device
    for module in (run, loading):
        monkeypatch.setattr(module, "pick_device", lambda: dataclasses.replace(pick(), dtype="float32"))
    monkeypatch.setattr(speed, "runs_kernels", lambda device: True)
    monkeypatch.setattr(offload, "LEAST", 0)
    monkeypatch.setattr(offload, "host_memory", lambda: (2**40, 10_000))


@needs_names
def test_in_training(ft, configure, metrics, tmp_path, little_memory):
    def train(name: str, **changes: Any) -> Any:
        return ft("train", configure(output=str(tmp_path / name), training={"save_every": 2}, **changes))

    assert train("kept", activations="keep").code == 0
    done = train("spilled", activations="offload")
    assert done.code == 0, done.err
    said = done.out + done.err
    assert said.count(f"of a batch go to a file in {tmp_path / 'spilled'}, which costs") == 1
    assert [r["loss"] for r in metrics(tmp_path / "spilled")] == [r["loss"] for r in metrics(tmp_path / "kept")]
    assert {p.name for p in (tmp_path / "spilled").iterdir()} == {p.name for p in (tmp_path / "kept").iterdir()}
    other = tmp_path / "other"
    refused = train("refused", activations="offload", disk=str(other))
    assert refused.code == 2
    assert refused.message == f"ft train: disk: '{other}' is no folder (allowed: auto, off, or a folder that is there)"
    assert not (tmp_path / "refused").exists()
    other.mkdir()
    done = train("elsewhere", activations="offload", disk=str(other))
    assert done.code == 0, done.err
    assert f"go to a file in {other}, which" in done.out + done.err
    assert list(other.iterdir()) == []
    refused = train("off", activations="offload", disk="off")
    assert refused.code == 2
    assert refused.message.startswith("ft train: activations in host memory take")


def test_a_copy_of_a_model_spills_by_itself(tmp_path):
    model = make()
    path = fast.enable(model)
    path.host.disk = tmp_path
    theirs = fast.fast_path_of(copy.deepcopy(model))
    assert theirs is not None
    assert theirs.host.on_disk() is None
