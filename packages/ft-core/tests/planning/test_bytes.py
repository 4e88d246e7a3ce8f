"""Bytes that are predicted beside those of real objects: quantized weights, adapters, optimizer states."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ft_core.adapters import add_lora
from ft_core.config import LoraSettings
from ft_core.models.source import ModelSource
from ft_core.planning.blueprint import Blueprint
from ft_core.planning.weights import nf4_bytes, room_bytes, states_of, weight_bytes

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw_8bit": bnb.optim.AdamW8bit,
    "lion_8bit": bnb.optim.Lion8bit,
    "lion_32bit": bnb.optim.Lion32bit,
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "sgd": torch.optim.SGD,
}
SMALL = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 256,
}  # fmt: skip


def blueprint(path: Path) -> Blueprint:
    return Blueprint.of(ModelSource(str(path), path, path.name))


@pytest.mark.parametrize(
    ("changes", "billions"),
    [
        ({}, 8.03),
        ({"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}, 70.55),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "intermediate_size": 12288,
             "num_hidden_layers": 36, "head_dim": 128, "vocab_size": 151936},
            8.19,
        ),
    ],
)  # fmt: skip
def test_known_models_have_the_parameters_that_they_are_known_for(
    folder: Any, changes: dict[str, Any], billions: float
) -> None:
    found = blueprint(folder(**changes))
    assert found.parameters / 1e9 == pytest.approx(billions, abs=0.005)
    assert found.layout is not None


@pytest.mark.parametrize("tied", [False, True])
def test_weights_in_sixteen_bits(folder: Any, tied: bool) -> None:
    path = folder(**SMALL, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    actual = sum(parameter.nbytes for parameter in model.parameters())
    assert weight_bytes(blueprint(path), "none", 2) == actual


@pytest.mark.parametrize("count", [64 * 64, 128 * 320, 1000 * 64, 123 * 64])
def test_one_nf4_weight(count: int) -> None:
    weight = torch.randn(count // 64, 64)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    tensors = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(count) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_model(tiny: Path, quantization: str) -> None:
    from ft_core.models import load

    model, _ = load(tiny, quantization=quantization, dtype="bfloat16")
    actual = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            actual += parameter.nbytes
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                held = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
                actual += sum(tensor.nbytes for tensor in held)
            if getattr(parameter, "SCB", None) is not None:
                actual += parameter.SCB.nbytes
    assert weight_bytes(blueprint(tiny), quantization, 2) == actual


@pytest.mark.parametrize("lora", [{}, {"r": 5, "targets": ["q_proj", "down_proj"]}, {"dora": True}])
def test_adapters(tiny: Path, lora: dict[str, Any]) -> None:
    settings = LoraSettings.model_validate(lora)
    outline = blueprint(tiny).outline(settings)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    adapted = add_lora(model, **settings.model_dump())
    actual = sorted(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert sorted(outline.trained) == actual


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_an_optimizer(name: str) -> None:
    sizes = (100 * 100, 64 * 63, 64 * 64, 5000, 17)
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = OPTIMIZERS[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = {
        tensor.data_ptr(): tensor.nbytes
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    assert states_of(sizes, name).gpu == sum(held.values())


def test_paged_states_lie_on_the_host() -> None:
    big, small = 2_000_000, 50_000
    paged, plain = states_of((big, small), "paged_adamw_8bit"), states_of((big, small), "adamw_8bit")
    assert paged.host == 2 * big
    assert paged.gpu + paged.host == plain.gpu


def test_room_for_updates_is_that_of_wide_weights(tiny: Path) -> None:
    import ft_kernels as kernels

    found = blueprint(tiny)
    outline = found.outline(LoraSettings(r=8))
    hidden, inner, keys, layers = 64, 128, 32, 2
    actual = 0
    for sizes, into in (
        ((hidden, keys, keys), hidden),
        ((hidden,), hidden),
        ((inner, inner), hidden),
        ((hidden,), inner),
    ):
        weights = [torch.zeros(size, into, dtype=torch.bfloat16) for size in sizes]
        rank = -(-8 * len(sizes) // 16) * 16
        wide = kernels.widen(weights, rank)
        actual += wide.buffer.nbytes - sum(weight.nbytes for weight in weights)
    assert room_bytes(found, outline) == layers * actual


def test_a_mixture_adapts_its_dense_layers_and_uses_some_of_its_experts(tmp_path: Path) -> None:
    values = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64,
        "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 400,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    found = blueprint(tmp_path)
    assert found.layout is None
    assert found.used == 0.25
    assert found.experts == 2 * 8 * 3 * 64 * 32
    heads, routers = 2 * (2 * 64 * 64 + 2 * 64 * 32), found.used_numbers - 2 * 2 * 3 * 64 * 32
    assert heads <= routers <= heads + 2 * 8 * 64  # the router is a linear layer in some versions of transformers
    assert {name.rpartition(".")[2] for name in found.outline(LoraSettings()).targets} <= {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
