"""A linear layer as the kernels want it: its frozen weight in one of their forms, its bias, and the adapter on it.

Read anew at each call, so that an adapter that is switched off, changed or added is seen at once; only the form of the
frozen weight is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LENT", "Adapter", "Linear", "base_of", "frozen", "is_plain", "numbers", "read", "state", "trains", "updates",
]  # fmt: skip

LENT = "_ft_lent"
"""The mark of a parameter whose memory comes and goes (``ft_core.fast.lent``): where it lies says nothing of it."""


@dataclass(frozen=True)
class Adapter:
    """One low-rank update: ``scaling · B A``, with dropout of its input; 0 where it is switched off."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float


@dataclass(frozen=True)
class Linear:
    """A linear layer's parts.

    Attributes:
        module: the layer itself, with its adapter's wrapping.
        weight: the frozen weight: a tensor ``[N, K]``, or an ``ft_kernels`` weight; None where the layer can only be
            called as it is.
        bias: ``[N]`` or None.
        adapter: the adapter that is on, or None.
        sizes: (N, K).
    """

    module: nn.Module
    weight: Any
    bias: Tensor | None
    adapter: Adapter | None
    sizes: tuple[int, int]


def base_of(module: nn.Module) -> nn.Module:
    """The layer beneath an adapter's wrapping."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def is_plain(module: nn.Module) -> bool:
    """Whether nothing but its own forward runs when the layer is called: no hook, no forward of the instance."""
    parts: list[Any] = [module]
    while parts:  # not module.modules(), which takes three times as long, at each call of each layer
        part = parts.pop()
        own = part.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return False
        if own["_modules"]:
            parts.extend(child for child in own["_modules"].values() if child is not None)
    return True


def read(module: nn.Module) -> Linear | None:
    """The parts of a linear layer, or None for one that only its own code can compute."""
    base = base_of(module)
    found = _weight(base)
    if found is None:
        return None
    weight, sizes = found
    bias = getattr(base, "bias", None)
    if base is module:
        return Linear(module, weight, bias, None, sizes)
    adapters = _adapters(module)
    if adapters is None:
        return None
    return Linear(module, weight, bias, adapters[0] if adapters else None, sizes)


def state(module: Any) -> tuple[Any, ...]:
    """What :func:`read` looks at, as numbers that stay the same as long as it would find the same.

    Tensors are there by their identity: whoever keeps a state keeps what was read, so that no other takes their place.
    """
    base = base_of(module)
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    found: list[Any] = [id(base), id(weight), id(bias)]
    if weight is not None:
        found += [_place(weight), weight.requires_grad, id(getattr(weight, "quant_state", None))]
        found += [id(getattr(weight, "CB", None)), id(getattr(weight, "SCB", None))]
    if bias is not None:
        found.append(bias.requires_grad)
    if base is module:
        return tuple(found)
    found += [getattr(module, "disable_adapters", None), getattr(module, "merged", None)]
    names = getattr(module, "active_adapters", ())
    found += names
    if not hasattr(module, "lora_A"):
        return (*found, id(module))
    for name in names:
        if name in module.lora_A:
            dropout = module.lora_dropout[name]
            a, b = module.lora_A[name], module.lora_B[name]
            found += [id(a), id(b), id(a.weight), id(b.weight), name in module.lora_variant, module.scaling[name]]
            found += [id(dropout), dropout.training, getattr(dropout, "p", None), id(b.bias)]
    return tuple(found)


def _place(weight: Tensor) -> int:
    """Where the numbers lie; 0 for a tensor that is made of others (a shard), or whose memory comes and goes."""
    return weight.data_ptr() if type(weight) in _HAVE_MEMORY and not hasattr(weight, LENT) else 0


_HAVE_MEMORY = (Tensor, nn.Parameter)


def _adapters(module: Any) -> list[Adapter] | None:
    """The adapters of PEFT's LoRA that are on: none or one; None for anything else."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        return None
    if module.disable_adapters:
        return None if module.merged else []
    if module.merged:
        return []
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) > 1:
        return None
    return [_adapter(module, name) for name in names] if _known(module, names) else None


def _known(module: Any, names: list[str]) -> bool:
    """Whether the adapters are nothing but A and B: no variant (DoRA has a form of its own), no bias of theirs."""
    return all(
        name not in module.lora_variant
        and type(module.lora_A[name]) is nn.Linear
        and type(module.lora_B[name]) is nn.Linear
        and module.lora_B[name].bias is None
        and isinstance(module.lora_dropout[name], nn.Identity | nn.Dropout)
        for name in names
    )


def _adapter(module: Any, name: str) -> Adapter:
    dropout = module.lora_dropout[name]
    return Adapter(
        module.lora_A[name].weight,
        module.lora_B[name].weight,
        float(module.scaling[name]),
        float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
    )


def _weight(base: nn.Module) -> tuple[Any, tuple[int, int]] | None:
    """A frozen weight in the kernels' form, with its sizes."""
    weight = getattr(base, "weight", None)
    if weight is None:
        return None
    if type(base) is nn.Linear:
        if weight.dim() != 2 or not weight.is_floating_point():
            return None
        return weight, (weight.shape[0], weight.shape[1])
    return _bitsandbytes(base, weight)


def _bitsandbytes(base: Any, weight: Any) -> tuple[Any, tuple[int, int]] | None:
    """bitsandbytes' weight as it lies in memory; None for another type, or before it is quantized.

    Its 8-bit layers multiply rounded activations. Here the weight is expanded and they are not: a product of the same
    frozen weight with less error.
    """
    from ft_kernels import Int8Weight, NestedScales, NF4Weight

    kind = type(base).__name__
    if kind == "Linear8bitLt":
        codes = weight.CB if getattr(weight, "CB", None) is not None else weight.data
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else getattr(base.state, "SCB", None)
        if codes.dtype != torch.int8 or scales is None:
            return None
        return Int8Weight(codes, scales), (codes.shape[0], codes.shape[1])
    state = getattr(weight, "quant_state", None)
    if kind != "Linear4bit" or state is None or state.quant_type != "nf4":
        return None
    nested = None
    if state.nested:
        nested = NestedScales(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    rows, columns = state.shape
    return NF4Weight(weight.data, state.absmax, (rows, columns), state.blocksize, nested), (rows, columns)


def trains(linear: Linear) -> bool:
    """Whether the base weight or the bias is trained too."""
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in (linear.weight, linear.bias))


def numbers(module: nn.Module) -> Tensor | None:
    """What a quantized layer's weight stands for, in float32; None for a layer that is not quantized."""
    from ft_kernels import Int8Weight, NF4Weight, int8_dequantize, nf4_dequantize

    if getattr(module, "base_layer", None) is not None or not isinstance(module, nn.Linear):
        return None
    found = _weight(module)
    if found is None:
        return None
    weight, shape = found
    if isinstance(weight, NF4Weight):
        return nf4_dequantize(
            weight.packed, weight.absmax, shape, torch.float32, weight.blocksize, nested=weight.nested
        )
    if isinstance(weight, Int8Weight):
        return int8_dequantize(weight.quantized, weight.scales, torch.float32)
    return None


def frozen(linears: Sequence[Linear | None]) -> list[Linear] | None:
    """All of them, if one product can compute them: frozen weights of one kind, adapters of one dropout."""
    known = [linear for linear in linears if linear is not None and not trains(linear)]
    if len(known) != len(linears) or len({type(linear.weight) for linear in known}) != 1:
        return None
    return known if len({linear.adapter.dropout for linear in known if linear.adapter is not None}) <= 1 else None


def updates(linears: Sequence[Linear]) -> tuple[list[Tensor | None], list[Tensor | None], dict[str, Any]]:
    """A and B of each layer, None where there is none, and the products' keywords: scaling, bias and dropout."""
    adapters = [linear.adapter for linear in linears]
    biases = [linear.bias for linear in linears]
    return (
        [None if adapter is None else adapter.a for adapter in adapters],
        [None if adapter is None else adapter.b for adapter in adapters],
        {
            "scaling": [1.0 if adapter is None else adapter.scaling for adapter in adapters],
            "bias": biases if any(bias is not None for bias in biases) else None,
            "dropout": max((adapter.dropout for adapter in adapters if adapter is not None), default=0.0),
        },
    )
