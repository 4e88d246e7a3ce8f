"""Which tokens end a completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["stops_of"]


def stops_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The model's end tokens and the one that ends a turn in the chat template."""
    from ft_core.generation import stop_ids

    return frozenset(int(token) for token in stop_ids(model, tokenizer))
