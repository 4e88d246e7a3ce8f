"""Rotary position embeddings: the keys and tensors that say them in a GGUF file, and those that llama.cpp has not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_ramp",
    "check_rope",
    "context_keys",
    "head_size",
    "llama3_factors",
    "longrope_attention",
    "longrope_factors",
    "rope_keys",
    "rope_type",
    "rotary_size",
    "window",
    "yarn_attention",
]


def rope_type(config: Any) -> str:
    """transformers' name of the scaling, ``default`` where there is none."""
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def head_size(config: Any) -> int:
    """Values of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_keys(writer: Any, config: Any) -> None:
    """Rotary keys; llama3's scaling is a tensor (:func:`llama3_factors`), not a key.

    Of yarn (Peng et al. 2023, arXiv:2309.00071) llama.cpp computes the same ramp with the paper's ends, and the factor
    on cos and sin by the paper's formula ``0.1 ln(factor) + 1``. The key ``attn_factor`` multiplies that: it holds the
    model's own over the formula's.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope_type(config)
    if kind == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        from gguf import RopeScalingType

        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        factor = float(rope.get("factor") or config.max_position_embeddings / original)
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(int(original))
        share = yarn_attention(rope, factor) / _mscale(factor, 1.0)
        if share != 1.0:
            writer.add_rope_scaling_attn_factors(share)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def yarn_attention(rope: Mapping[str, Any], factor: float) -> float:
    """What yarn multiplies cos and sin by, as transformers takes it from its parameters."""
    stated, one, all_dim = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if stated is not None:
        return float(stated)
    return _mscale(factor, one) / _mscale(factor, all_dim) if one and all_dim else _mscale(factor, 1.0)


def check_rope(config: Any, name: str, has_factors: bool) -> None:
    """
    Args:
        name: of the model's class, for messages.
        has_factors: whether llama.cpp's graph of it reads a factor for each frequency (``rope_freqs``).

    Raises:
        ExportError: llama.cpp has no such rotary embedding.
    """
    kind = rope_type(config)
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ExportError(f"rope_type {kind!r} cannot be written to GGUF (allowed: default, linear, llama3, yarn)")
    if kind == "llama3" and not has_factors:
        raise ExportError(f"rope_type 'llama3' cannot be written to GGUF for {name}")
    if kind == "yarn":
        check_ramp(config)


def check_ramp(config: Any) -> None:
    """
    Raises:
        ExportError: yarn's ramp is another than llama.cpp computes, which has keys for its ends, and reads them for
            other architectures only (measured).
    """
    rope, computed = config.rope_parameters, {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    for key, value in computed.items():
        stated = rope.get(key)
        if stated is not None and stated != value:
            raise ExportError(
                f"rope_type 'yarn' with {key} {stated} cannot be written to GGUF: llama.cpp computes with {value}"
            )


def window(config: Any) -> int | None:
    """The sliding window that attention has, if it has one."""
    size = getattr(config, "sliding_window", None)
    return int(size) if size and getattr(config, "use_sliding_window", True) else None


def context_keys(writer: Any, config: Any) -> None:
    """The context length. These graphs have no sliding window, so a model with one is exact up to its window only."""
    longest = int(config.max_position_embeddings)
    limit = window(config)
    writer.add_context_length(min(longest, limit) if limit else longest)


def llama3_factors(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Llama 3.1's frequency factors as ``rope_freqs``: long waves are stretched, short ones kept, between them a ramp.

    Source: the Llama 3.1 reference code's ``apply_scaling`` (transformers: ``_compute_llama3_parameters``); llama.cpp
    divides each frequency by its factor. Computed in fp32, as its own converter and transformers do.
    """
    import torch

    if rope_type(config) != "llama3":
        return
    rope = config.rope_parameters
    size = head_size(config)
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    waves = 2 * math.pi / frequency
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    ramp = (original / waves - low) / (high - low)
    factors = 1 / ((1 - ramp) / rope["factor"] + ramp)
    factors = torch.where(waves < original / high, 1.0, factors)
    factors = torch.where(waves > original / low, float(rope["factor"]), factors)
    yield "rope_freqs.weight", factors


def rotary_size(config: Any) -> int:
    """How many of a head's values are rotated."""
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor") or 1.0
    return int(head_size(config) * share)


def longrope_attention(config: Any) -> float:
    """What longrope (Ding et al. 2024, arXiv:2402.13753) multiplies cos and sin by, as transformers takes it."""
    rope = config.rope_parameters
    stated = rope.get("attention_factor")
    if stated is not None:
        return float(stated)
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def longrope_factors(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Longrope's two divisors for each frequency, ``(rotary_size / 2,)`` each.

    transformers takes the long ones for a text that is longer than the original context, llama.cpp for every text in a
    context that is.
    """
    import torch

    if rope_type(config) != "longrope":
        return
    for which in ("long", "short"):
        factors = torch.tensor(config.rope_parameters[f"{which}_factor"], dtype=torch.float32)
        yield f"rope_factors_{which}.weight", factors
