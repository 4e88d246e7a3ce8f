"""The one layer whose step is compiled ahead is a layer of the model that is loaded, and its step is a step."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_it_is_a_layer_of_the_model(tiny: Path, quantization: Any) -> None:
    import torch

    from ft_core.fast import ahead
    from ft_core.models import load

    model, _ = load(tiny, quantization=quantization, dtype="bfloat16")
    one = ahead._one_layer(model.config, torch.bfloat16, quantization, model.device)
    whole = {name: module for name, module in model.named_modules() if ".layers." not in name or ".layers.0." in name}
    mine = dict(one.named_modules())
    assert mine.keys() == {name for name in whole if not name.endswith(".layers.0")} | {"model.layers.0"}
    for name, module in mine.items():
        theirs = dict(model.named_modules())[name]
        assert type(module) is type(theirs), name
        for key, parameter in module.named_parameters(recurse=False):
            other = getattr(theirs, key)
            facts = [(p.shape, p.dtype, p.requires_grad, type(p), p.device) for p in (parameter, other)]
            assert facts[0] == facts[1], f"{name}.{key}"
            state, expected = getattr(parameter, "quant_state", None), getattr(other, "quant_state", None)
            assert (state is None) == (expected is None)
            if state is not None:
                for field in ("quant_type", "blocksize", "nested", "dtype", "shape"):
                    assert getattr(state, field) == getattr(expected, field), field


def test_its_step_reaches_every_adapter(tiny: Path) -> None:
    import torch
    from transformers import AutoConfig

    from ft_core import fast
    from ft_core.adapters import add_lora
    from ft_core.fast import ahead

    device = torch.device("cpu")
    config = AutoConfig.from_pretrained(tiny)
    model = ahead._one_layer(config, torch.float32, "none", device)
    assert len(model.model.layers) == 1
    assert config.num_hidden_layers > 1
    adapted = add_lora(model, 4)
    fast.enable(adapted)
    # On a CPU nothing is launched; a parameter that the step did not reach would be an error of autograd.
    ahead._step(adapted, torch.float32, [(2, 32), (1, 7)], device)


LAUNCHES = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from ft_core import fast
from ft_core.adapters import add_lora
from ft_core.fast import ahead
from ft_kernels import dispatch

def keys(layers):
    found, add = set(), dispatch.CompileAhead.add
    def note(self, kernel, grid, device, args, meta):
        found.add((kernel.__name__, dispatch._key(kernel, device, args, meta)[1:]))
    dispatch.CompileAhead.add = note
    config = LlamaConfig(vocab_size=1008, hidden_size=256, intermediate_size=640, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    if sys.argv[1] != "none":
        ahead._quantize(model, model.lm_head, sys.argv[1], torch.bfloat16)
    model = add_lora(model).train()
    fast.enable(model)
    if layers == 1:
        ahead._step(model, torch.bfloat16, [(2, 64)], torch.device("cpu"))
    else:
        with dispatch.CompileAhead(1), torch.autograd.set_multithreading_enabled(False):
            ids = torch.zeros((2, 64), dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return found

ahead, later = keys(1), keys(3)
assert len(later) > 15, later
assert not later - ahead, later - ahead
"""


@pytest.mark.parametrize("quantization", ["none", "nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_what_several_layers_launch_was_compiled(quantization: str) -> None:
    """Kernel, options and what is compiled in of each argument: the first layer wants no gradient for its input, the
    others do."""
    import os
    import subprocess
    import sys

    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-W", "ignore", "-c", LAUNCHES, quantization]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def held() -> int:
    """Bytes of all tensors that Python can reach, but for those of other tests that have no memory."""
    import gc

    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    memory = {}
    for tensor in gc.get_objects():
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
    return sum(memory.values())


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("fault", [False, True])
def test_nothing_of_it_is_left(tiny: Path, quantization: str, fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Python's search for circles, which may come when the weights have been read already."""
    import gc

    import torch
    from transformers import AutoConfig

    from ft_core import adapters, fast
    from ft_core.fast import ahead

    plain, dtype = adapters.add_lora, torch.float32 if quantization == "none" else torch.bfloat16

    def add_lora(*args: Any, **named: Any) -> Any:  # as it does on a GPU
        adapted = plain(*args, **named)
        fast.enable(adapted)
        return adapted

    monkeypatch.setattr(adapters, "add_lora", add_lora)
    config, device, shapes = AutoConfig.from_pretrained(tiny), torch.device("cpu"), [(2, 32), (1, -1 if fault else 7)]
    ahead._try(config, dtype, quantization, {"r": 4}, [(2, 32)], device)  # imports, and what is kept once for all
    gc.collect()
    gc.disable()
    try:
        before = held()
        with pytest.raises(RuntimeError) if fault else contextlib.nullcontext():
            ahead._try(config, dtype, quantization, {"r": 4}, shapes, device)
        # Less than any matrix of the layer. For NF4, bitsandbytes' tables of 16 and 256 numbers for each of the seven
        # matrices, and their scales: a byte for 64 of some 12 · 64² weights.
        small = config.hidden_size**2 // 2 + (7 * (16 + 256) * 4 if quantization == "nf4" else 0)
        assert held() - before < small
    finally:
        gc.enable()


def test_no_step_of_a_family_that_is_not_known(tiny: Path) -> None:
    import torch
    from transformers import AutoConfig

    from ft_core.fast import ahead

    device = torch.device("cpu")
    model = ahead._one_layer(AutoConfig.from_pretrained(tiny), torch.float32, "none", device).eval()
    ahead._step(model, torch.float32, [(2, 32), (1, 7)], device)
    assert not model.training
