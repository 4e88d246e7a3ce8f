"""Where Qwen3-ASR's layers lie: its language side is a dense Qwen 3, laid out as by itself.

The audio encoder, the projector and what puts their states in the place of the audio's tokens are transformers' own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ft_core.fast.find import described
from ft_core.fast.layout import Layout

__all__ = ["describe"]


def describe(config: Any) -> Layout:
    """The layout of a Qwen3-ASR.

    Args:
        config: transformers' ``Qwen3ASRConfig``.

    Raises:
        ft_core.fast.NotFast: its language side is of a family that is not known.
    """
    return replace(described(config.get_text_config()), backbone="model.language_model", body="model", plain=False)
