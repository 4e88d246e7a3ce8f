"""llama.cpp's roundings, put on a transformers model: the yardstick of what a GGUF type costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ft_export.gguf.kernels import quantize
from ft_export.gguf.mixes import WHOLE
from ft_export.seeing import sees

if TYPE_CHECKING:
    import torch

__all__ = ["round_inputs", "round_to", "round_weights", "rounded_inputs", "rounded_tower"]

EXACT = "F32"
GELU_TABLE = 10.0
"""From here on ggml's GELU is the value itself, or 0."""


def round_weights(model: Any, kinds: Mapping[str, str]) -> None:
    """Put in place of each weight what a file holds of it; it stays so.

    Args:
        model: in fp32. kinds: by the weight's name, ggml's name of its type in the file.
    """
    for name, parameter in model.named_parameters():
        parameter.data.copy_(round_to(parameter.data, kinds.get(name, EXACT)))


@contextmanager
def rounded_inputs(model: Any, kinds: Mapping[str, str]) -> Iterator[None]:
    """Within it the inputs of linear layers are rounded as llama.cpp rounds them for a weight of that type."""
    import torch

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    handles = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            kind = kinds.get(names[id(layer.weight)], EXACT)

            def hook(_: Any, args: tuple[Any, ...], kind: str = kind) -> tuple[Any, ...]:
                return (round_inputs(args[0], kind), *args[1:])

            handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rounded_tower(model: Any) -> Iterator[None]:
    """Within it what llama.cpp computes more coarsely in a tower and its projector is so here; else nothing changes.

    GELU is a table of F16 there, by the formula with tanh for every module that has one (ggml's ``ggml_vec_gelu_f32``);
    keys and values of attention are F16 (``build_attn`` in ``tools/mtmd/clip.cpp``).
    """
    import torch

    def gelu(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        value = torch.nn.functional.gelu(args[0].half().float(), approximate="tanh")
        return torch.where(args[0].abs() < GELU_TABLE, value.half().to(output.dtype), output)

    def half(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.half().to(output.dtype)

    handles = []
    for name, module in model.named_modules() if sees(model.config) else ():
        if "language_model" in name:
            continue
        if "GELU" in type(module).__name__:
            handles.append(module.register_forward_hook(gelu))
        elif name.endswith((".attn.qkv", ".k_proj", ".v_proj")):
            handles.append(module.register_forward_hook(half))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def round_to(value: torch.Tensor, kind: str) -> torch.Tensor:
    """To a type and back, by llama.cpp's own rounding where it is one of blocks."""
    import gguf
    import torch

    if kind == EXACT:
        return value
    if kind in WHOLE:
        return value.to(torch.float16 if kind == "F16" else torch.bfloat16).to(value.dtype)
    packed = quantize(value.float().cpu().contiguous().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])).to(value)


def round_inputs(value: torch.Tensor, kind: str) -> torch.Tensor:
    """The other factor of a product, as llama.cpp rounds it for a weight of this type.

    Blocks of 256 beside the types that have such blocks (Q8_K, whose step is fp32), of 32 beside the other blocks
    (Q8_0, Q8_1: the step is F16); F16 or BF16 beside these. Beside F32 nothing is rounded there, but the cache is F16
    whatever the type, which is put here in its stead.
    """
    import torch

    width = value.shape[-1]
    if kind in WHOLE:
        return value.to(torch.bfloat16 if kind == "BF16" else torch.float16).to(value.dtype)
    size = 256 if kind.endswith("_K") else 32
    if width % size:
        return value.half().to(value.dtype)
    blocks = value.reshape(*value.shape[:-1], -1, size)
    step = blocks.abs().amax(dim=-1, keepdim=True) / 127
    if size == 32:
        step = step.half().to(value.dtype)
    return ((blocks / step.clamp_min(1e-12)).round() * step).reshape(value.shape)
