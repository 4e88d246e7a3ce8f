"""Llama, and what shares its decoder: SmolLM2, Mistral."""

from __future__ import annotations

from typing import Any

from ft_core.fast.layout import Attention, Layout, Mlp, activation
from ft_core.plugins.specs import ArchitectureSpec

__all__ = ["LLAMA", "MISTRAL", "describe_llama", "describe_mistral"]

LLAMA = ArchitectureSpec(
    name="llama",
    summary="Llama 2 and 3, SmolLM2 and other models of the type llama",
    model_types=("llama",),
    describe="ft_core.fast.families.llama:describe_llama",
)
MISTRAL = ArchitectureSpec(
    name="mistral",
    summary="Mistral 7B and its relatives, with or without a sliding window",
    model_types=("mistral",),
    describe="ft_core.fast.families.llama:describe_mistral",
)


def describe_llama(config: Any) -> Layout:
    """The layout of a Llama."""
    return Layout.of(config, "LlamaDecoderLayer", mlp=Mlp(activation=activation(config)))


def describe_mistral(config: Any) -> Layout:
    """The layout of a Mistral, whose window, if it has one, is that of all layers."""
    return Layout.of(
        config,
        "MistralDecoderLayer",
        attention=Attention(window="config.sliding_window"),
        mlp=Mlp(activation=activation(config)),
    )
