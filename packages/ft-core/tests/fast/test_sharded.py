"""FSDP2: two processes, each with half of every parameter, train as one with all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ft_core import fast

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store")

RANKS = 2
LENGTHS = [7, 13]
WAYS = ("adapter", "all", "recompute", "enabled after sharding")


def make(way: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes, num_key_value_heads=2))
    if way != "all":
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    if way == "recompute":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def batches(rank: int) -> list[dict[str, Any]]:
    """For each of two steps a row of two documents; as many tokens on each rank."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    found = []
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank)
        ids = torch.randint(400, (1, sum(LENGTHS)), generator=generator)
        found.append({"input_ids": ids, "labels": ids, "position_ids": positions, "document_lengths": LENGTHS})
    return found


def train(model: Any, given: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """Two steps, and what is left: each parameter, and its gradient of the second step."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for together in given:
        optimizer.zero_grad()
        for batch in together:
            (model(**batch).loss / len(together)).backward()
        optimizer.step()
    found = {f"{name}.grad": p.grad for name, p in trained.items()} | trained
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()
        for name, value in found.items()
        if value is not None
    }


def refuse(*args: Any, **keywords: Any) -> Any:
    raise AssertionError("a layer was computed by transformers' own code")


def _rank(folder: str, way: str) -> None:
    import torch.distributed as distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    assert distributed.get_world_size() == RANKS
    mesh = torch.distributed.init_device_mesh("cpu", (RANKS,))
    model = make(way)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if way != "enabled after sharding":
        fast.enable(model)
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for forward in (vars(layer)["forward"] for layer in fast.enable(model).layers):
        forward.own = refuse
    assert all(isinstance(p, DTensor) for p in model.parameters())
    result = train(model, [[batch] for batch in batches(rank)])
    assert all(isinstance(p, DTensor) for p in base.model.layers.parameters()), "a layer stayed whole"
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def start(function: str, *words: object) -> subprocess.Popen[bytes]:
    """A function of this file in a process of its own."""
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('ranks', sys.argv[1]); "
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m); "
        "getattr(m, sys.argv[2])(*sys.argv[3:])"
    )
    return subprocess.Popen([sys.executable, "-c", code, __file__, function, *map(str, words)])


@pytest.mark.parametrize("way", WAYS)
def test_two_sharded_processes_train_as_one(way: str, tmp_path: Path, run_ranks: Any) -> None:
    ranks = run_ranks(Path(__file__), "_rank", tmp_path, way)
    assert [rank.code for rank in ranks] == [0] * RANKS, ranks
    model = make(way)
    fast.enable(model)
    expected = train(model, [list(step) for step in zip(*map(batches, range(RANKS)), strict=True)])
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result.keys() == expected.keys()
    assert len(expected) > 10
    for name, value in expected.items():
        # fp32: each gradient is the sum of the two halves' in both; a few hundred products of 6e-8 each.
        torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def _on_a_gpu(folder: str) -> None:
    import torch.distributed as distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def adapted() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "num_attention_heads": 4}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes, num_key_value_heads=2))
        config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model.to("cuda", torch.bfloat16), config).train()
        fast.enable(model)
        return model

    def step(model: Any) -> dict[str, torch.Tensor]:
        ids = torch.randint(1000, (1, 300), generator=torch.Generator().manual_seed(1)).cuda()
        positions = torch.cat([torch.arange(171), torch.arange(129)])[None].cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, position_ids=positions, document_lengths=[171, 129]).loss
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}

    torch.cuda.set_device(0)
    whole = adapted()
    expected = step(whole)
    assert all(decoder.blocks.wide.weights for decoder in fast.fast_path_of(whole).decoders)
    distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
    mesh = distributed.init_device_mesh("cuda", (1,))
    model = adapted()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    gradients = step(model)
    path = fast.fast_path_of(model)
    assert not any(decoder.blocks.wide.weights for decoder in path.decoders)
    assert all(isinstance(p, DTensor) for layer in path.layers for p in layer.parameters())
    limit = fast.check.bound(torch.bfloat16, 3, 640)  # the products are others: their updates are separate
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= limit * expected[name].norm(), name
    distributed.destroy_process_group()


@pytest.mark.gpu
def test_sharded_weights_are_not_copied_on_a_gpu(tmp_path: Path) -> None:
    assert start("_on_a_gpu", tmp_path).wait(timeout=300) == 0
