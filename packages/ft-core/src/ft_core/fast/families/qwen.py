"""Qwen 2, 2.5 and 3 (dense)."""

from __future__ import annotations

from typing import Any

from ft_core.fast.layout import Attention, Layout, Mlp, activation

__all__ = ["describe_qwen2", "describe_qwen3"]


def describe_qwen2(config: Any) -> Layout:
    """The layout of a Qwen 2 or 2.5, some of whose layers may have a sliding window."""
    return Layout.of(
        config,
        "Qwen2DecoderLayer",
        attention=Attention(window="sliding_window"),
        mlp=Mlp(activation=activation(config)),
        plain=True,
    )


def describe_qwen3(config: Any) -> Layout:
    """The layout of a dense Qwen 3."""
    return Layout.of(
        config,
        "Qwen3DecoderLayer",
        attention=Attention(window="sliding_window", q_norm="q_norm", k_norm="k_norm"),
        mlp=Mlp(activation=activation(config)),
        plain=True,
    )
