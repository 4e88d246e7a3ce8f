"""Phi-3 and Phi-4: fused projections, which llama.cpp has fused too, longrope, and heads that are rotated in part."""

from __future__ import annotations

from typing import Any

from ft_export.errors import ExportError
from ft_export.gguf.rope import context_keys, longrope_attention, rope_type, rotary_size

__all__ = ["check_phi3", "phi3_keys"]


def check_phi3(config: Any) -> None:
    """
    Raises:
        ExportError: llama.cpp's Phi-3 has not what the configuration says.
    """
    kind = rope_type(config)
    if kind not in ("default", "longrope"):
        raise ExportError(f"rope_type {kind!r} cannot be written to GGUF for Phi-3 (allowed: default, longrope)")
    size = config.hidden_size // config.num_attention_heads
    if getattr(config, "head_dim", None) not in (None, size):
        raise ExportError(f"llama.cpp's phi3 has heads of {size} values, this model has head_dim {config.head_dim}")


def phi3_keys(writer: Any, config: Any) -> None:
    """Keys of Phi-3 that are more than one attribute.

    llama.cpp's graph has no sliding window, whatever the key says, so the context ends where one would begin to count.
    """
    context_keys(writer, config)
    rope = config.rope_parameters
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(rotary_size(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope_type(config) == "longrope":
        writer.add_rope_scaling_attn_factors(longrope_attention(config))
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_sliding_window(config.sliding_window or 0)
