"""How long a text a card can serve: what weights, keys and values take, and what is left."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ft_export.errors import ExportError
from ft_export.hearing import WHISPER
from ft_export.runs import read_json

__all__ = ["ALLOWANCE", "CARDS", "UTILIZATION", "Limits", "limits_of", "memory_of"]

UTILIZATION = 0.9
"""The share of the card that the server may take; the rest is for the driver and for what else runs on it."""
ALLOWANCE = 2 << 30
"""Bytes set aside for activations and CUDA graphs: an allowance, which depends on the server's batches."""
LEAST = 1024
"""A shorter context than this (or the model's own, if that is shorter) is refused."""
BLOCK = 16
"""Servers hand out the cache in blocks of this many tokens."""
GIB = 1 << 30
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141)
"""GiB that cards have."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Limits:
    """What a server of one model needs, and what is therefore asked of it.

    Attributes:
        weights: bytes of the weights.
        token: bytes of keys and values for one token, in 16 bits.
        context: the tokens that a conversation may have.
        memory: bytes of the card, or None where that is not known.
        asked: whether that context was asked for, so that a card with room for less would not do.
        heard: bytes of keys and values of a sound, beside those of its text, in a model that listens.
    """

    weights: int
    token: int
    context: int
    memory: int | None
    asked: bool = False
    heard: int = 0

    @property
    def room(self) -> int:
        """Bytes that are left for keys and values; of one whole context where the card is not known."""
        if self.memory is None:
            return self.token * self.context + self.heard
        return int(self.memory * UTILIZATION) - self.weights - ALLOWANCE

    @property
    def needed(self) -> float:
        """The smallest card for one conversation of ``context`` tokens, in bytes."""
        return (self.weights + ALLOWANCE + self.token * self.context + self.heard) / UTILIZATION

    @property
    def smaller_card(self) -> int | None:
        """The largest card, in GiB, that has not room for ``context`` tokens and can serve the model with fewer."""
        if self.asked:
            return None
        least = replace(self, context=min(self.context, LEAST)).needed
        return max((size for size in CARDS if least <= size * GIB < self.needed), default=None)

    def told(self) -> list[str]:
        """The arithmetic, line by line, for a comment."""
        lines = [
            f"Weights take {_gib(self.weights)}. Keys and values in 16 bits take {self.token:,} bytes a token,",
            f"{_gib(self.token * self.context)} for one conversation of {self.context:,} tokens.",
        ]
        if self.heard:
            lines[-1] = (
                f"{_gib(self.token * self.context + self.heard)} for one text of {self.context:,} tokens and its sound."
            )
        if self.memory is None:
            lines += [
                f"With an allowance of {_gib(ALLOWANCE)} for activations and CUDA graphs that asks for a card of at "
                f"least {_gib(self.needed)},",
                f"of which the server takes {UTILIZATION:.0%}.",
            ]
            if self.smaller_card is not None:
                lines[-1] += f" For a smaller one, and fewer tokens, export again with memory={self.smaller_card}GiB."
        else:
            tokens = self.room // self.token if self.token else 0
            lines += [
                f"Of the card's {_gib(self.memory)} the server takes {UTILIZATION:.0%}; without the weights and an "
                f"allowance of {_gib(ALLOWANCE)}",
                f"for activations and CUDA graphs {_gib(self.room)} are left: {tokens:,} tokens at a time, "
                f"{_counted(tokens // self.context)}.",
            ]
        return lines


def memory_of(text: str | None) -> int | None:
    """The bytes that ``memory=24GiB`` means.

    Raises:
        ExportError: it is no size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1 << 28:
        raise ExportError(f"memory={text} is not the memory of a card (allowed: bytes, or as in 24GiB or 24GB)")
    return size


def limits_of(folder: Path, weights: int, memory: int | None, context: str | None) -> Limits:
    """What a model's configuration and the card allow.

    Args:
        folder: of the model's ``config.json``.
        weights: bytes of all weights that are loaded.
        memory: bytes of the card, or None.
        context: what ``context=N`` says, or None.

    Raises:
        ExportError: the model does not fit, or the context asked for is not one.
    """
    said = read_json(folder / "config.json")
    config: dict[str, Any] = {**said, **(said.get("text_config") or {})}
    family = said.get("model_type")
    if family == WHISPER:
        names = {"num_hidden_layers": "decoder_layers", "num_attention_heads": "decoder_attention_heads"}
        names |= {"hidden_size": "d_model", "max_position_embeddings": "max_target_positions"}
        config |= {name: said.get(own) for name, own in names.items()}
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(longest, int) or longest < 1:
        if context is None:
            raise ExportError(f"{folder / 'config.json'} has no max_position_embeddings: name the length by context=N")
        longest = int(context) if context.isdigit() else 0
    if context is not None:
        if not context.isdigit() or not 1 <= int(context) <= longest:
            raise ExportError(f"context={context} is not allowed (1 to {longest}, the positions that the model has)")
        longest = int(context)
    token = _bytes_a_token(config, folder)
    limits = Limits(weights, token, longest, memory, context is not None)
    if family == WHISPER:  # a text is short: it fits whole or not at all
        limits = replace(limits, heard=token * int(said["max_source_positions"]), asked=True)
        context = str(longest)
    if memory is None or limits.room >= token * longest + limits.heard:
        return limits
    fitting = max(0, limits.room // token) // BLOCK * BLOCK
    least = min(longest, LEAST)
    if fitting < least or context is not None:
        wanted = longest if context is not None else least
        needed = replace(limits, context=wanted).needed
        raise ExportError(
            f"the model does not fit: {_gib(weights)} of weights, {_gib(ALLOWANCE)} for activations and the keys and "
            f"values of {wanted} tokens need a card of {math.ceil(needed / GIB * 10) / 10} GiB, memory= says "
            f"{_gib(memory)}: use a smaller --type, a shorter context= or a larger card"
        )
    return Limits(weights, token, fitting, memory)


def _bytes_a_token(config: dict[str, Any], folder: Path) -> int:
    """Keys and values of one token in all layers, 2 bytes a number; a sliding window, which needs less, is not seen."""
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    heads = config.get("num_attention_heads") or config.get("n_head")
    hidden = config.get("hidden_size") or config.get("n_embd")
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        raise ExportError(f"{folder / 'config.json'} does not say layers, heads and width: memory cannot be computed")
    if isinstance(config.get("kv_lora_rank"), int):  # DeepSeek's latent attention keeps one vector for all heads
        return 2 * layers * (int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim") or 0))
    size = config.get("head_dim") or hidden // heads
    return 2 * 2 * layers * int(config.get("num_key_value_heads") or heads) * int(size)


def _counted(conversations: int) -> str:
    return "one such conversation" if conversations == 1 else f"{conversations:,} such conversations"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / (1 << 20):.2f} MiB"
