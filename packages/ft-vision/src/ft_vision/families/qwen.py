"""Qwen 2.5-VL and Qwen 3-VL (dense).

Positions are of time, height and width (M-RoPE). Both families' text models fold the angles of the three into one row
of cosines and sines before their layers, in sections (2.5) or interleaved (3), so that a layer turns queries and keys
as any other does. Qwen 3-VL's text model adds what its tower's earlier layers saw to the hidden states between its own
first layers (DeepStack, arXiv:2406.04334); that is its forward's work, which runs as it is.
"""

from __future__ import annotations

from typing import Any

from ft_core.fast.layout import Attention, Layout, Mlp, activation

__all__ = ["describe_qwen2_5_vl", "describe_qwen3_vl"]


def describe_qwen2_5_vl(config: Any) -> Layout:
    """The layout of a Qwen 2.5-VL, some of whose layers may have a sliding window."""
    text = config.get_text_config()
    return Layout.of(
        text,
        "Qwen2_5_VLDecoderLayer",
        backbone="model.language_model",
        body="model",
        attention=Attention(window="sliding_window"),
        mlp=Mlp(activation=activation(text)),
    )


def describe_qwen3_vl(config: Any) -> Layout:
    """The layout of a dense Qwen 3-VL."""
    text = config.get_text_config()
    return Layout.of(
        text,
        "Qwen3VLTextDecoderLayer",
        backbone="model.language_model",
        body="model",
        attention=Attention(q_norm="q_norm", k_norm="k_norm"),
        mlp=Mlp(activation=activation(text)),
    )
