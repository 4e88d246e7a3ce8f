"""DeepSeek V3: attention over a short latent, experts in groups, the first layers without.

llama.cpp multiplies queries by the keys' half of what makes keys and values of the latent, so that the latent itself is
the key of every head: that half lies transposed in the file, and the two halves apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.gguf.experts import EXPERT_RULES
from ft_export.gguf.rope import check_ramp, rope_type
from ft_export.gguf.rules import Rule, same

if TYPE_CHECKING:
    import torch

__all__ = ["RULES", "check_deepseek3", "deepseek3_keys"]

LITE = (26, 27)
"""Layers of the models that llama.cpp takes for the small ones of V2, whose queries come from no latent."""
KANANA = (48, 128256)
"""Layers and tokens of another that it takes for such a one."""


def keys_of_latent(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """``(heads, latent, key)``, of a weight ``(heads * (key + value), latent)``."""
    return _by_head(tensors[0], config)[:, : config.qk_nope_head_dim].transpose(1, 2)


def values_of_latent(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """``(heads, value, latent)``."""
    return _by_head(tensors[0], config)[:, config.qk_nope_head_dim :]


def _by_head(weight: torch.Tensor, config: Any) -> torch.Tensor:
    return weight.reshape(config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, weight.shape[-1])


RULES = (
    *EXPERT_RULES,
    Rule(
        r"(?P<layer>model\.layers\.\d+\.self_attn)\.kv_b_proj\.weight",
        (("{layer}.k_b_proj.weight", keys_of_latent), ("{layer}.v_b_proj.weight", values_of_latent)),
    ),
    Rule(
        r"(?P<gate>model\.layers\.\d+\.mlp\.gate)\.e_score_correction_bias", (("{gate}.e_score_correction.bias", same),)
    ),
)


def check_deepseek3(config: Any) -> None:
    """
    Raises:
        ExportError: llama.cpp's DeepSeek has not what the configuration says.
    """
    kind, rope = rope_type(config), config.rope_parameters
    if kind not in ("default", "yarn"):
        raise ExportError(f"rope_type {kind!r} cannot be written to GGUF for DeepSeek V3 (allowed: default, yarn)")
    if kind == "yarn":
        check_ramp(config)
        if not rope.get("mscale") == rope.get("mscale_all_dim") == 1:
            raise ExportError("yarn can be written to GGUF for DeepSeek V3 only with mscale 1 and mscale_all_dim 1")
    if not config.rope_interleave:
        raise ExportError("llama.cpp's deepseek2 rotates neighbours, this model rotates halves (rope_interleave false)")
    layers = config.num_hidden_layers
    is_lite = layers in LITE or (layers, config.vocab_size) == KANANA
    if (config.q_lora_rank is None) != is_lite:
        raise ExportError(
            f"llama.cpp's deepseek2 of {layers} layers {'has no' if is_lite else 'needs a'} latent for queries, this "
            f"model has q_lora_rank {config.q_lora_rank}"
        )


def deepseek3_keys(writer: Any, config: Any) -> None:
    """Keys of DeepSeek V3 that are more than one attribute. To llama.cpp it has one head of keys, the latent."""
    from gguf import ExpertGatingFuncType, RopeScalingType

    rope = config.rope_parameters
    writer.add_head_count_kv(1)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    # its files do not say it and transformers computes nothing else; without it llama.cpp takes softmax
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if config.norm_topk_prob:
        writer.add_expert_weights_norm(True)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope_type(config) == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
