"""The kernels of a training step, compiled while the weights of its model are still being read.

On a machine that has never trained this family, triton compiles some forty kernels in the first step, one after
another. They depend on the model's sizes and formats, not on its weights: so a model of one layer with any weights
takes a step whose launches are compiled by threads in the background and not run. Nothing of it is kept but triton's
cache; where it fails, or the step turns out to be another, the kernels are compiled when they are launched, as ever.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ft_core.fast.find import layout_of
from ft_core.fast.layout import at
from ft_core.fast.swap import disable, fast_path_of

__all__ = ["compile_ahead"]

THREADS = 8
MOST = 2048
"""Tokens of a row at most: a power of two, as lengths are."""
SHARE = 0.5
"""The share of the free memory that the one layer, its embeddings and its head may take for a moment."""


def compile_ahead(
    config: Any,
    dtype: torch.dtype,
    quantization: str,
    *,
    r: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    shapes: Sequence[tuple[int, int]] = ((2, 2048),),
) -> None:
    """Begin to compile what a step under a LoRA adapter will launch on the current GPU, and return at once.

    Args:
        config: of the model, whose family may be any.
        dtype: of its weights, and of the step.
        quantization: ``none``, ``nf4`` or ``int8``.
        r, alpha, dropout, targets: of the adapter, as :func:`ft_core.add_lora` takes them.
        shapes: rows and tokens of batches; of the numbers themselves only whether sixteen divides them, and whether
            they are one, is in a kernel.
    """
    # Nothing may fail here that would not fail later by itself, and be said there.
    with contextlib.suppress(Exception):
        _begin(config, dtype, quantization, r, alpha, dropout, targets, shapes)


def _begin(
    config: Any,
    dtype: torch.dtype,
    quantization: str,
    r: int,
    alpha: float | None,
    dropout: float,
    targets: str | list[str],
    shapes: Sequence[tuple[int, int]],
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.random.fork_rng([device]):
        with torch.device("meta"):
            outline = _model(config, dtype)
        layout_of(outline)  # a family that is not known ends it here
        needed = sum(p.numel() for p in outline.parameters()) * dtype.itemsize
        if needed <= SHARE * torch.cuda.mem_get_info(device)[0]:
            adapter = {"r": r, "alpha": alpha, "dropout": dropout, "targets": targets}
            _try(config, dtype, quantization, adapter, shapes, device)


def _try(
    config: Any,
    dtype: torch.dtype,
    quantization: str,
    adapter: dict[str, Any],
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
) -> None:
    """Take the step of one layer, and leave none of its memory behind."""
    from ft_core.adapters import add_lora

    model = _one_layer(config, dtype, quantization, device)
    try:
        _step(add_lora(model, **adapter), dtype, shapes, device)
    finally:
        _empty(model)


def _empty(model: nn.Module) -> None:
    """Give back a model's memory. Its layers' forwards and bitsandbytes' weights refer to what they belong to, so that
    it would stay until Python looks for such circles, and the weights that are read meanwhile want it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)
        vars(tensor).clear()  # bitsandbytes keeps scales and a second name of the weight there
    disable(model)  # forgets what was made of the weights


def _model(config: Any, dtype: torch.dtype) -> Any:
    """A model with one of the layers, and embeddings and a head of full size."""
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config.get_text_config())
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    return AutoModelForCausalLM.from_config(small, dtype=dtype)


def _one_layer(config: Any, dtype: torch.dtype, quantization: str, device: torch.device) -> Any:
    with torch.device(device):
        model = _model(config, dtype)
    if quantization != "none":
        _quantize(model, model.get_output_embeddings(), quantization, dtype)
    return model


def _quantize(model: nn.Module, head: nn.Module, quantization: str, dtype: torch.dtype) -> None:
    """bitsandbytes' layers in the places of the linear ones, as transformers puts them there."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child is head:
                continue
            sizes, bias, weight = (child.in_features, child.out_features), child.bias is not None, child.weight.data
            layer: Any
            with torch.device("meta"):
                if quantization == "nf4":
                    layer = Linear4bit(*sizes, bias, compute_dtype=dtype, quant_type="nf4")
                else:
                    layer = Linear8bitLt(*sizes, bias, has_fp16_weights=False)
            if quantization == "nf4":
                layer.weight = Params4bit(weight, quant_type="nf4", module=layer).to(weight.device)
            else:
                # From the host: it quantizes on the way to a device, and nowhere else.
                layer.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
            layer.bias = child.bias
            setattr(parent, name, layer)


def _step(model: Any, dtype: torch.dtype, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
    from ft_kernels.dispatch import CompileAhead

    path = fast_path_of(model)
    if path is None:
        return
    path.graphs.on = False
    model.train()
    parameters = [p for p in at(path.model, path.layout.backbone).parameters() if p.requires_grad]
    threads = max(1, min(THREADS, (os.cpu_count() or 2) - 1))
    with CompileAhead(threads), torch.autograd.set_multithreading_enabled(False):
        for is_first in (True, False):
            if not is_first:
                model.get_input_embeddings().register_forward_hook(_require_gradient)
            for rows, tokens in shapes:
                few = min(rows, 2), min(tokens, MOST - (tokens % 16 != 0))
                ids = torch.zeros(few, dtype=torch.int64, device=device)
                with torch.autocast(device.type, dtype, enabled=dtype.itemsize == 2):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                torch.autograd.grad(loss, parameters)


def _require_gradient(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    """As the input of every layer but the first wants one."""
    return output.requires_grad_()
