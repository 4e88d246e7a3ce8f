"""Llama, and what shares its decoder: SmolLM2, Mistral."""

from __future__ import annotations

from typing import Any

from ft_core.fast.layout import Attention, Layout, Mlp, activation

__all__ = ["describe_llama", "describe_mistral"]


def describe_llama(config: Any) -> Layout:
    """The layout of a Llama."""
    return Layout.of(config, "LlamaDecoderLayer", mlp=Mlp(activation=activation(config)), plain=True)


def describe_mistral(config: Any) -> Layout:
    """The layout of a Mistral, whose window, if it has one, is that of all layers."""
    return Layout.of(
        config,
        "MistralDecoderLayer",
        attention=Attention(window="config.sliding_window"),
        mlp=Mlp(activation=activation(config)),
        plain=True,
    )
