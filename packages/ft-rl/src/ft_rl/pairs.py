"""Preference rows as pairs of token sequences, the way TRL's trainers tokenize them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pairs", "show", "tokenize_pairs"]


@dataclass(frozen=True)
class Pairs:
    """Tokenized pairs.

    Attributes:
        chosen_ids, rejected_ids: the tokens of prompt and answer, a list a pair.
        rows: for each pair, the position of its row among those given.
        overlong: how many rows were left out because one of their sequences is too long.
    """

    chosen_ids: list[list[int]]
    rejected_ids: list[list[int]]
    rows: list[int]
    overlong: int

    @property
    def tokens(self) -> int:
        """The number of tokens of all pairs, padding apart."""
        return sum(map(len, self.chosen_ids)) + sum(map(len, self.rejected_ids))


def tokenize_pairs(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> Pairs:
    """Tokenize rows with ``prompt``, ``chosen`` and ``rejected``.

    Lists of messages go through the chat template. Strings are joined as they are, and the end-of-sequence token is
    appended where it isn't there. An answer is never cut: what it is worth may lie in its end.

    Args:
        rows: preference rows in normal form; ``prompt`` may be missing or empty.
        tokenizer: the model's.
        max_length: rows with a longer sequence are left out and counted. None: no limit.

    Raises:
        DataError: messages without a chat template, or messages that the template refuses; names the row.
    """
    chosen_ids, rejected_ids, kept = [], [], []
    for number, row in enumerate(rows):
        try:
            chosen, rejected = (_tokenize(row, name, tokenizer) for name in ("chosen", "rejected"))
        except Exception as error:  # a chat template raises what it likes
            if isinstance(error, DataError):
                raise
            raise DataError(f"row {number + 1}: the chat template refuses it: {error}") from error
        if max_length is None or max(len(chosen), len(rejected)) <= max_length:
            chosen_ids.append(chosen)
            rejected_ids.append(rejected)
            kept.append(number)
    return Pairs(chosen_ids, rejected_ids, kept, len(rows) - len(kept))


def _tokenize(row: Mapping[str, Any], name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    prompt, answer = row.get("prompt"), row[name]
    if isinstance(answer, str):
        end = tokenizer.eos_token or ""
        return list(tokenizer((prompt or "") + answer.removesuffix(end) + end)["input_ids"])
    if tokenizer.chat_template is None:
        raise DataError(
            "the rows hold messages, but the tokenizer has no chat template: "
            "give prompt, chosen and rejected as strings"
        )
    messages = [*(prompt or []), *answer]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])


def show(value: str | Sequence[Mapping[str, Any]] | None) -> str:
    """A prompt or an answer as a person reads it: a string as it is, of messages the contents."""
    if value is None or isinstance(value, str):
        return value or ""
    return "\n".join(str(message.get("content", "")) for message in value)
