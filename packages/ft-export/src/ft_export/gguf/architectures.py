"""The table: how each transformers architecture becomes tensors and keys of a GGUF file.

A row names the llama.cpp architecture, the keys it needs, and rules for the tensors that are not taken as they are. A
rule maps source names (a regular expression) to one or more targets; sources that share a target are handed to its
operation together, in the order of the ``index`` group. So a permutation is one to one, a split of a fused weight is
one to many, a stack of experts is many to one, and dropping is one to none.

Names of targets are transformers' style; ``gguf.TensorNameMap`` turns them into llama.cpp's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError

if TYPE_CHECKING:
    import torch

__all__ = ["ARCHITECTURES", "Architecture", "Output", "Rule", "find_architecture", "known", "plan"]

Operation = Callable[[Sequence["torch.Tensor"], Any], "torch.Tensor"]
"""From the source tensors and the transformers configuration to the target tensor. Must work on meta tensors."""


@dataclass(frozen=True)
class Rule:
    """Sources whose whole name matches ``pattern`` become ``targets``: templates of names with the pattern's groups."""

    pattern: str
    targets: tuple[tuple[str, Operation], ...] = ()


@dataclass(frozen=True)
class Output:
    """One tensor to write: its name in transformers' style, where it comes from, and how."""

    name: str
    sources: tuple[str, ...]
    make: Operation


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        classes: the transformers classes (``architectures`` in config.json) that it covers.
        name: llama.cpp's name of the architecture.
        keys: GGUFWriter methods and the configuration's attributes that they take.
        rules: how tensors are made; the first rule that matches counts, and a tensor without a rule stays as it is.
        extra_keys: writes the keys that are more than one attribute.
        extra_tensors: makes tensors that the source does not have, in fp32, by their GGUF name.
        float32: endings of GGUF names that stay in F32 besides norms and one-dimensional tensors.
    """

    classes: tuple[str, ...]
    name: str
    keys: tuple[tuple[str, str], ...]
    rules: tuple[Rule, ...] = ()
    extra_keys: Callable[[Any, Any], None] | None = None
    extra_tensors: Callable[[Any], Iterator[tuple[str, torch.Tensor]]] | None = None
    float32: tuple[str, ...] = ()


def same(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """The source as it is."""
    return tensors[0]


def permute_queries(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """Rotary halves interleaved, as llama.cpp's ``llama`` rotates neighbours and transformers rotates halves."""
    return _interleave(tensors[0], config.num_attention_heads)


def permute_keys(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    return _interleave(tensors[0], config.num_key_value_heads or config.num_attention_heads)


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rest = weight.shape[1:]
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *rest).transpose(1, 2).reshape(weight.shape)


def rope_type(config: Any) -> str:
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def head_size(config: Any) -> int:
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
    if kind != "yarn":
        return
    # llama.cpp has keys for the ends of the ramp, and reads them for other architectures only (measured).
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


def _head_keys(writer: Any, config: Any) -> None:
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def llama3_factors(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Llama 3.1's frequency factors as ``rope_freqs``: long waves are stretched, short ones kept, between them a ramp.

    Source: the Llama 3.1 reference code's ``apply_scaling`` (transformers: ``_compute_llama3_parameters``); llama.cpp
    divides each frequency by its factor.
    """
    import torch

    if rope_type(config) != "llama3":
        return
    rope = config.rope_parameters
    size = head_size(config)
    frequency = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    waves = 2 * math.pi / frequency
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    ramp = (original / waves - low) / (high - low)
    factors = 1 / ((1 - ramp) / rope["factor"] + ramp)
    factors = torch.where(waves < original / high, 1.0, factors)
    factors = torch.where(waves > original / low, float(rope["factor"]), factors)
    yield "rope_freqs.weight", factors.float()


COMMON = (
    ("add_block_count", "num_hidden_layers"),
    ("add_embedding_length", "hidden_size"),
    ("add_feed_forward_length", "intermediate_size"),
    ("add_head_count", "num_attention_heads"),
    ("add_layer_norm_rms_eps", "rms_norm_eps"),
)
LAYER = r"(?P<layer>model\.layers\.\d+\.self_attn)"

ARCHITECTURES = (
    Architecture(
        classes=("LlamaForCausalLM", "MistralForCausalLM"),
        name="llama",
        keys=COMMON,
        rules=(
            Rule(LAYER + r"\.q_proj\.(?P<kind>weight|bias)", (("{layer}.q_proj.{kind}", permute_queries),)),
            Rule(LAYER + r"\.k_proj\.(?P<kind>weight|bias)", (("{layer}.k_proj.{kind}", permute_keys),)),
            Rule(LAYER + r"\.rotary_emb\.inv_freq"),
        ),
        extra_keys=llama_keys,
        extra_tensors=llama3_factors,
    ),
    Architecture(classes=("Qwen2ForCausalLM",), name="qwen2", keys=COMMON, extra_keys=qwen_keys),
    Architecture(classes=("Qwen3ForCausalLM",), name="qwen3", keys=COMMON, extra_keys=qwen_keys),
)


def known() -> str:
    """The transformers classes in the table, for messages."""
    return ", ".join(name for row in ARCHITECTURES for name in row.classes)


def find_architecture(config: Any) -> Architecture:
    """The row for a transformers configuration.

    Raises:
        ExportError: the architecture is not in the table, or uses something that llama.cpp's has not.
    """
    names = list(getattr(config, "architectures", None) or [])
    for row in ARCHITECTURES:
        if set(names) & set(row.classes):
            if getattr(config, "hidden_act", "silu") != "silu":
                raise ExportError(f"llama.cpp's {row.name} has the activation silu, this model has {config.hidden_act}")
            check_rope(config, row.classes[0], row.extra_tensors is not None)
            return row
    raise ExportError(
        f"architecture {', '.join(names) or '(none named)'} cannot be converted to GGUF (known: {known()})"
    )


def plan(architecture: Architecture, config: Any, sources: Sequence[str]) -> list[Output]:
    """What to write, in the sources' order.

    The head is left out where it is tied to the embeddings: llama.cpp then takes these.
    """
    gathered: dict[str, tuple[Operation, list[tuple[int, str]]]] = {}
    for source in sources:
        if source == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
            continue
        for template, operation, index in _targets(architecture, source):
            gathered.setdefault(template, (operation, []))[1].append((index, source))
    return [
        Output(name, tuple(source for _, source in sorted(members)), operation)
        for name, (operation, members) in gathered.items()
    ]


def _targets(architecture: Architecture, source: str) -> list[tuple[str, Operation, int]]:
    for rule in architecture.rules:
        match = re.fullmatch(rule.pattern, source)
        if match:
            groups = match.groupdict()
            index = int(groups.get("index") or 0)
            return [(template.format(**groups), operation, index) for template, operation in rule.targets]
    return [(source, same, 0)]
