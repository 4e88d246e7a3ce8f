"""Qwen 2, 2.5 and 3 (dense)."""

from __future__ import annotations

from typing import Any

from ft_core.fast.layout import Attention, Layout, Mlp, activation
from ft_core.plugins.specs import ArchitectureSpec

__all__ = ["QWEN2", "QWEN3", "describe_qwen2", "describe_qwen3"]

QWEN2 = ArchitectureSpec(
    name="qwen2",
    summary="Qwen 2 and 2.5, with biases on q, k and v",
    model_types=("qwen2",),
    describe="ft_core.fast.families.qwen:describe_qwen2",
)
QWEN3 = ArchitectureSpec(
    name="qwen3",
    summary="Qwen 3, dense, with norms on each head's queries and keys",
    model_types=("qwen3",),
    describe="ft_core.fast.families.qwen:describe_qwen3",
)


def describe_qwen2(config: Any) -> Layout:
    """The layout of a Qwen 2 or 2.5, some of whose layers may have a sliding window."""
    return Layout.of(
        config,
        "Qwen2DecoderLayer",
        attention=Attention(window="sliding_window"),
        mlp=Mlp(activation=activation(config)),
    )


def describe_qwen3(config: Any) -> Layout:
    """The layout of a dense Qwen 3."""
    return Layout.of(
        config,
        "Qwen3DecoderLayer",
        attention=Attention(window="sliding_window", q_norm="q_norm", k_norm="k_norm"),
        mlp=Mlp(activation=activation(config)),
    )
