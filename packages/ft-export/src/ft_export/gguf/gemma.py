"""Gemma 2 and 3 (text): norms that hold their distance from one, capped logits, windows in some of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.gguf.rope import rope_type

if TYPE_CHECKING:
    import torch

__all__ = ["NORMS", "check_gemma2", "check_gemma3", "gemma2_keys", "gemma3_keys", "plus_one"]

NORMS = r"(?P<name>model\.(?:layers\.\d+\.(?:self_attn\.)?\w*)?norm\.weight)"
"""The names of all their norms."""
GEMMA2_PERIOD, GEMMA3_PERIOD = 2, 6
"""Every so many layers, one sees the whole context; the others have a window. Where it is so, no key says it."""
GEMMA2_27B, GEMMA3_27B = 46, 62
"""Layers of the models that llama.cpp takes for 27B, by the layers alone, and divides their queries otherwise."""


def plus_one(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """The factor that a norm multiplies by; transformers' files hold it less one. In fp32, where the sum is exact."""
    return tensors[0].float() + 1


def check_gemma2(config: Any) -> None:
    """
    Raises:
        ExportError: llama.cpp's Gemma 2 has not what the configuration says.
    """
    _check(config, "gemma2", GEMMA2_27B)
    if rope_type(config) != "default":
        raise ExportError(f"rope_type {rope_type(config)!r} cannot be written to GGUF for Gemma 2 (allowed: default)")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(config, key):
            raise ExportError(f"llama.cpp's gemma2 caps logits, this model has {key} {getattr(config, key)}")
    if "sliding_attention" not in config.layer_types:  # it would end this very process
        raise ExportError("llama.cpp's gemma2 needs layers with a sliding window, this model has none (layer_types)")
    if not config.tie_word_embeddings:
        raise ExportError("llama.cpp's gemma2 has no head of its own, this model has one (tie_word_embeddings false)")


def check_gemma3(config: Any) -> None:
    """
    Raises:
        ExportError: llama.cpp's Gemma 3 has not what the configuration says.
    """
    _check(config, "gemma3", GEMMA3_27B)
    if config.attn_logit_softcapping:
        raise ExportError("llama.cpp's gemma3 does not cap attention's logits, this model has attn_logit_softcapping")
    for layers, allowed in (("full_attention", ("default", "linear")), ("sliding_attention", ("default",))):
        kind = config.rope_parameters[layers].get("rope_type", "default")
        if kind not in allowed:
            raise ExportError(
                f"rope_type {kind!r} of {layers} cannot be written to GGUF for Gemma 3 (allowed: {', '.join(allowed)})"
            )


def _check(config: Any, name: str, layers_of_27b: int) -> None:
    if getattr(config, "use_bidirectional_attention", False):
        raise ExportError(f"llama.cpp's {name} looks back only, this model has use_bidirectional_attention")
    is_27b = config.num_hidden_layers == layers_of_27b
    computed = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    if config.query_pre_attn_scalar != computed:
        raise ExportError(
            f"llama.cpp's {name} of {config.num_hidden_layers} layers divides queries by the root of {computed}, "
            f"this model has query_pre_attn_scalar {config.query_pre_attn_scalar}"
        )


def gemma2_keys(writer: Any, config: Any) -> None:
    """Keys of Gemma 2 that are more than one attribute."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _window_keys(writer, config, GEMMA2_PERIOD)


def gemma3_keys(writer: Any, config: Any) -> None:
    """Keys of Gemma 3 that are more than one attribute: the layers with a window rotate from a base of their own."""
    from gguf import RopeScalingType

    writer.add_context_length(config.max_position_embeddings)
    whole, local = (config.rope_parameters[layers] for layers in ("full_attention", "sliding_attention"))
    writer.add_rope_freq_base(float(whole["rope_theta"]))
    writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    if whole.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(whole["factor"]))
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _window_keys(writer, config, GEMMA3_PERIOD)


def _window_keys(writer: Any, config: Any, period: int) -> None:
    has_window = [kind == "sliding_attention" for kind in config.layer_types]
    if any(has_window):
        writer.add_sliding_window(config.sliding_window)
    if has_window != [(layer + 1) % period != 0 for layer in range(config.num_hidden_layers)]:
        writer.add_sliding_window_pattern(has_window)
