"""Models that see by a tower of one family and speak by the layers of another: LLaVA, LLaVA-NeXT, SmolVLM, Idefics 3,
Mistral 3, and Pixtral, which transformers has as a LLaVA.

Their text model is any that transformers has, as the configuration says. It is laid out as it is by itself; only where
it lies is another place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ft_core.fast.find import described
from ft_core.fast.layout import Layout

__all__ = ["describe_language_model", "describe_text_model"]


def describe_language_model(config: Any) -> Layout:
    """The layout of a LLaVA, LLaVA-NeXT or Mistral 3.

    Raises:
        ft_core.fast.NotFast: the text model's family is not known.
    """
    return _inside(config, "model.language_model")


def describe_text_model(config: Any) -> Layout:
    """The layout of a SmolVLM or Idefics 3.

    Raises:
        ft_core.fast.NotFast: the text model's family is not known.
    """
    return _inside(config, "model.text_model")


def _inside(config: Any, backbone: str) -> Layout:
    return replace(described(config.get_text_config()), backbone=backbone, body="model", plain=False)
