"""The table: how each transformers architecture becomes tensors and keys of a GGUF file.

A row (:class:`ft_export.gguf.rules.Architecture`) names the llama.cpp architecture, the keys it needs, and rules for
the tensors that are not taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.gguf import deepseek, experts, gemma, phi3, towers
from ft_export.gguf.rope import check_rope, context_keys, head_size, llama3_factors, longrope_factors, rope_keys
from ft_export.gguf.rules import Architecture, Rule, same
from ft_export.hearing import refuse
from ft_export.seeing import sees, text_config

if TYPE_CHECKING:
    import torch

__all__ = ["ARCHITECTURES", "find_architecture", "is_known", "known"]


def permute_queries(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Rotary halves interleaved, as llama.cpp's ``llama`` rotates neighbours and transformers rotates halves."""
    return _interleave(tensors[0], config.num_attention_heads)


def permute_keys(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    return _interleave(tensors[0], config.num_key_value_heads or config.num_attention_heads)


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rest = weight.shape[1:]
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *rest).transpose(1, 2).reshape(weight.shape)


def llama_keys(writer: Any, config: Any) -> None:
    context_keys(writer, config)
    rope_keys(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_size(config))
    _head_keys(writer, config)


def qwen_keys(writer: Any, config: Any) -> None:
    context_keys(writer, config)
    rope_keys(writer, config)
    _head_keys(writer, config)


def qwen3_vl_keys(writer: Any, config: Any) -> None:
    """Angles are of time, height and width, in sections of each frequency's places; a fourth section is not used."""
    qwen_keys(writer, config)
    writer.add_rope_dimension_sections([*config.rope_parameters["mrope_section"], 0])
    writer.add_num_deepstack_layers(config.deepstack_layers)


def qwen_moe_keys(writer: Any, config: Any) -> None:
    qwen_keys(writer, config)
    experts.expert_keys(writer, config)


def _head_keys(writer: Any, config: Any) -> None:
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


COMMON = (
    ("add_block_count", "num_hidden_layers"),
    ("add_embedding_length", "hidden_size"),
    ("add_feed_forward_length", "intermediate_size"),
    ("add_head_count", "num_attention_heads"),
    ("add_layer_norm_rms_eps", "rms_norm_eps"),
)
HEADS = (("add_head_count_kv", "num_key_value_heads"), ("add_key_length", "head_dim"), ("add_value_length", "head_dim"))
LAYER = r"(?P<layer>model\.layers\.\d+\.self_attn)"

LANGUAGE = r"model\.language_model\.(?P<name>"
LANGUAGE_SIDE = Rule(LANGUAGE + ".*)", (("model.{name}", same),))
"""Of a model that sees: what its language model is called when it is by itself."""

ARCHITECTURES = (
    Architecture(
        classes=("LlamaForCausalLM", "MistralForCausalLM"),
        name="llama",
        check=partial(check_rope, name="LlamaForCausalLM", has_factors=True),
        keys=COMMON,
        rules=(
            Rule(LAYER + r"\.q_proj\.(?P<kind>weight|bias)", (("{layer}.q_proj.{kind}", permute_queries),)),
            Rule(LAYER + r"\.k_proj\.(?P<kind>weight|bias)", (("{layer}.k_proj.{kind}", permute_keys),)),
            Rule(LAYER + r"\.rotary_emb\.inv_freq"),
        ),
        extra_keys=llama_keys,
        extra_tensors=llama3_factors,
    ),
    Architecture(
        classes=("Qwen2ForCausalLM",),
        name="qwen2",
        check=partial(check_rope, name="Qwen2ForCausalLM", has_factors=False),
        keys=COMMON,
        extra_keys=qwen_keys,
    ),
    Architecture(
        classes=("Qwen3ForCausalLM",),
        name="qwen3",
        check=partial(check_rope, name="Qwen3ForCausalLM", has_factors=False),
        keys=COMMON,
        extra_keys=qwen_keys,
    ),
    Architecture(
        classes=("Qwen3VLForConditionalGeneration",),
        name="qwen3vl",
        check=towers.check_qwen3_vl,
        keys=COMMON,
        rules=(Rule(r"model\.visual\..*"), LANGUAGE_SIDE),
        extra_keys=qwen3_vl_keys,
    ),
    Architecture(
        classes=("Qwen3MoeForCausalLM",),
        name="qwen3moe",
        check=experts.check_qwen3moe,
        keys=COMMON,
        rules=experts.EXPERT_RULES,
        extra_keys=qwen_moe_keys,
        float32=("ffn_gate_inp.weight",),
        parameter=experts.fused_name,
        has_mixes=False,
    ),
    Architecture(
        classes=("Gemma2ForCausalLM",),
        name="gemma2",
        check=gemma.check_gemma2,
        keys=(*COMMON, *HEADS),
        rules=(Rule(gemma.NORMS, (("{name}", gemma.plus_one),)),),
        extra_keys=gemma.gemma2_keys,
        activation="gelu_pytorch_tanh",
    ),
    Architecture(
        classes=("Gemma3ForCausalLM",),
        name="gemma3",
        check=gemma.check_gemma3,
        keys=(*COMMON, *HEADS),
        rules=(Rule(gemma.NORMS, (("{name}", gemma.plus_one),)),),
        extra_keys=gemma.gemma3_keys,
        activation="gelu_pytorch_tanh",
    ),
    Architecture(
        classes=("Gemma3ForConditionalGeneration",),
        name="gemma3",
        check=towers.check_gemma3_vl,
        keys=(*COMMON, *HEADS),
        rules=(
            Rule(r"model\.(?:vision_tower|multi_modal_projector)\..*"),
            Rule(LANGUAGE + gemma.NORMS.removeprefix(r"(?P<name>model\."), (("model.{name}", gemma.plus_one),)),
            LANGUAGE_SIDE,
        ),
        extra_keys=gemma.gemma3_keys,
        activation="gelu_pytorch_tanh",
    ),
    Architecture(
        classes=("Phi3ForCausalLM",),
        name="phi3",
        check=phi3.check_phi3,
        keys=COMMON,
        extra_keys=phi3.phi3_keys,
        extra_tensors=longrope_factors,
    ),
    Architecture(
        classes=("DeepseekV3ForCausalLM",),
        name="deepseek2",
        check=deepseek.check_deepseek3,
        keys=(
            *COMMON,
            ("add_context_length", "max_position_embeddings"),
            ("add_vocab_size", "vocab_size"),
            ("add_leading_dense_block_count", "first_k_dense_replace"),
            ("add_kv_lora_rank", "kv_lora_rank"),
            ("add_value_length_mla", "v_head_dim"),
            ("add_rope_dimension_count", "qk_rope_head_dim"),
            ("add_expert_count", "n_routed_experts"),
            ("add_expert_used_count", "num_experts_per_tok"),
            ("add_expert_feed_forward_length", "moe_intermediate_size"),
            ("add_expert_shared_count", "n_shared_experts"),
            ("add_expert_weights_scale", "routed_scaling_factor"),
            ("add_expert_group_count", "n_group"),
            ("add_expert_group_used_count", "topk_group"),
        ),
        rules=deepseek.RULES,
        extra_keys=deepseek.deepseek3_keys,
        float32=("ffn_gate_inp.weight",),
        parameter=experts.fused_name,
        has_mixes=False,
    ),
)


def known() -> str:
    """The transformers classes in the table, for messages."""
    return ", ".join(name for row in ARCHITECTURES for name in row.classes)


def is_known(config: Any) -> bool:
    """Whether a transformers configuration's architecture is in the table."""
    names = set(getattr(config, "architectures", None) or [])
    return any(names & set(row.classes) for row in ARCHITECTURES)


def find_architecture(config: Any) -> Architecture:
    """The row for a transformers configuration.

    Raises:
        ExportError: the architecture is not in the table, or uses something that llama.cpp's has not.
    """
    names = list(getattr(config, "architectures", None) or [])
    for row in ARCHITECTURES:
        if set(names) & set(row.classes):
            text = text_config(config)
            activation = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", row.activation)
            if activation != row.activation:
                raise ExportError(
                    f"llama.cpp's {row.name} has the activation {row.activation}, this model has {activation}"
                )
            row.check(config)
            return row
    refuse(config, ", ".join(names) or "it", "gguf")
    if sees(config):
        raise ExportError(
            f"{', '.join(names) or 'it'} is a model that sees, of which GGUF is written, tower and all, for "
            f"{' and '.join(towers.TOWERS)} alone: export it to vllm, sglang or hub"
        )
    raise ExportError(
        f"architecture {', '.join(names) or '(none named)'} cannot be converted to GGUF (known: {known()}): if "
        "llama.cpp's own converter knows it, export it to gguf with converter=PATH, a llama.cpp folder"
    )
