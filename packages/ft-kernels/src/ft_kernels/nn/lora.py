"""Layers with low-rank updates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ft_kernels.functional.lora import WideWeight, lora_linear
from ft_kernels.ops.lora.operands import width

__all__ = ["LoRALinear"]


class LoRALinear(torch.nn.Module):
    """:func:`ft_kernels.lora_linear` with a frozen weight that has room for the update, and adapters to train.

    The state dict has ``weight``, ``bias``, ``lora_a``, ``lora_b`` and ``magnitude``; the weight is the plain one. It
    and the bias are parameters that require no gradient, the weight as ``wide``, in rows with room beside it.

    Args:
        in_features, out_features: K and N.
        rank: of the update, from 1.
        alpha: the update is scaled by alpha / rank.
        rank_stabilized: it is scaled by alpha / sqrt(rank) instead (rsLoRA).
        weight_decomposed: train each row's magnitude too (DoRA).
        dropout: of the adapters' input while training.
        bias: whether there is one; frozen, like the weight.
        device, dtype: where and what the weight is.
        adapter_dtype: what the adapters are.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float = 16.0,
        rank_stabilized: bool = False,
        weight_decomposed: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRALinear: rank={rank}; allowed is 1 or more, or use torch.nn.Linear for no update")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.scaling = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.dropout = dropout
        place = {"device": device, "dtype": adapter_dtype}
        wide = torch.zeros(out_features, width(in_features, rank), device=device, dtype=dtype)
        # Not buffers, though nothing trains them: DistributedDataParallel sends these to all at each forward.
        self.wide = torch.nn.Parameter(wide, requires_grad=False)
        shift = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if shift is None else torch.nn.Parameter(shift, requires_grad=False)
        self.lora_a = torch.nn.Parameter(torch.empty(rank, in_features, **place))  # type: ignore[arg-type]
        self.lora_b = torch.nn.Parameter(torch.zeros(out_features, rank, **place))  # type: ignore[arg-type]
        torch.nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.magnitude: torch.nn.Parameter | None = None
        if weight_decomposed:
            self.magnitude = torch.nn.Parameter(torch.empty(out_features, **place))  # type: ignore[arg-type]
            self.reset_magnitude()

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, rank: int, **settings: Any) -> LoRALinear:
        """A layer that computes what ``linear`` does, until it is trained. Settings are those of the class."""
        layer = cls(
            linear.in_features, linear.out_features, rank, bias=linear.bias is not None,
            device=linear.weight.device, dtype=linear.weight.dtype, **settings,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(linear.weight)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
            layer.reset_magnitude()
        return layer

    @property
    def weight(self) -> Tensor:
        """The frozen weight ``[N, K]``, a view of what the operation uses."""
        return self.wide[:, : self.in_features]

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Set the magnitude to the norms of the weight's rows, where the layer computes what the weight does."""
        if self.magnitude is not None:
            self.magnitude.copy_(torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        weight = WideWeight(self.wide, self.in_features, (self.out_features,))
        return lora_linear(
            x, weight, self.lora_a, self.lora_b, scaling=self.scaling, bias=self.bias, dropout=self.dropout,
            magnitude=self.magnitude, training=self.training,
        )  # fmt: skip

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "wide"]
        destination[prefix + "weight"] = self.weight.contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, strict, missing, unexpected, errors = args
        weight = state_dict.get(prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, *args)
        for names, name in ((missing, "wide"), (unexpected, "weight")):
            if prefix + name in names:
                names.remove(prefix + name)
        if weight is None:
            if strict:
                missing.append(prefix + "weight")
        elif weight.shape != self.weight.shape:  # copy_ would repeat a row that fits
            errors.append(
                f"size mismatch for {prefix}weight: copying a param with shape {weight.shape} from checkpoint, "
                f"the shape in current model is {self.weight.shape}."
            )
        else:
            with torch.no_grad():
                self.weight.copy_(weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, scaling={self.scaling:g}"
