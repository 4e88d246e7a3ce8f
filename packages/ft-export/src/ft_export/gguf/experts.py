"""Mixtures of experts: the experts' matrices of a layer lie in one tensor each, ``(experts, rows, columns)``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.gguf.rope import check_rope
from ft_export.gguf.rules import Rule, same

if TYPE_CHECKING:
    import torch

__all__ = ["EXPERT_RULES", "check_qwen3moe", "expert_keys", "fused_name"]


def stack(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """The experts' matrices on top of each other."""
    import torch

    return torch.stack(list(tensors))


def first_rows(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """The upper half of each matrix, which is the gate's."""
    return tensors[0].chunk(2, dim=-2)[0]


def last_rows(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    return tensors[0].chunk(2, dim=-2)[1]


LAYER = r"(?P<layer>model\.layers\.\d+\.mlp\.experts)"
EXPERT_RULES = (
    Rule(LAYER + r"\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight", (("{layer}.{part}_proj.weight", stack),)),
    Rule(
        LAYER + r"\.gate_up_proj",
        (("{layer}.gate_proj.weight", first_rows), ("{layer}.up_proj.weight", last_rows)),
    ),
    Rule(LAYER + r"\.down_proj", (("{layer}.down_proj.weight", same),)),
)
"""Of files that hold each expert for itself, and of those that hold them stacked, gate and way up in one."""


def fused_name(source: str) -> str:
    """The parameter of the loaded transformers model that a tensor of the files becomes part of."""
    found = re.fullmatch(LAYER + r"\.\d+\.(?P<part>gate|up|down)_proj\.weight", source)
    if found is None:
        return source
    return f"{found['layer']}.{'down_proj' if found['part'] == 'down' else 'gate_up_proj'}"


def check_qwen3moe(config: Any) -> None:
    """
    Raises:
        ExportError: llama.cpp's Qwen 3 with experts has not what the configuration says.
    """
    check_rope(config, "Qwen3MoeForCausalLM", has_factors=False)
    if not config.norm_topk_prob:
        raise ExportError(
            "llama.cpp's qwen3moe divides the experts' weights by their sum, this model has not (norm_topk_prob)"
        )
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise ExportError(
            "llama.cpp's qwen3moe has experts in every layer, this model has not (mlp_only_layers, decoder_sparse_step)"
        )


def expert_keys(writer: Any, config: Any) -> None:
    """How many experts there are, how many a token is given to, and how wide they are."""
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
