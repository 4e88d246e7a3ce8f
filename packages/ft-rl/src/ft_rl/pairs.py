"""Preference rows as token sequences, the way TRL's trainers tokenize them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ft_core.training.inputs import Inputs

__all__ = ["Labelled", "Pairs", "content_of", "part_of", "show", "tokenize_labelled", "tokenize_pairs"]


@dataclass(frozen=True)
class Pairs:
    """Tokenized pairs.

    Attributes:
        chosen_ids, rejected_ids: the tokens of prompt and answer, a list a pair.
        prompt_lengths: how many tokens both begin with that are no part of the answers.
        rows: for each pair, the position of its row among those given.
        overlong: how many rows were left out because one of their sequences is too long.
    """

    chosen_ids: list[list[int]]
    rejected_ids: list[list[int]]
    prompt_lengths: list[int]
    rows: list[int]
    overlong: int

    @property
    def tokens(self) -> int:
        """The number of tokens of all pairs, padding apart."""
        return sum(map(len, self.chosen_ids)) + sum(map(len, self.rejected_ids))


@dataclass(frozen=True)
class Labelled:
    """Tokenized answers, each with what it is thought of.

    Attributes:
        ids: the tokens of prompt and answer, a list a row.
        prompt_lengths: how many tokens of each are no part of the answer.
        labels: whether the answer is one that is wanted.
        rows, overlong: as :class:`Pairs` has them.
    """

    ids: list[list[int]]
    prompt_lengths: list[int]
    labels: list[bool]
    rows: list[int]
    overlong: int

    @property
    def tokens(self) -> int:
        """The number of tokens of all rows, padding apart."""
        return sum(map(len, self.ids))


def tokenize_pairs(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    inputs: Inputs | None = None,
    among: Sequence[int] | None = None,
) -> Pairs:
    """Tokenize rows with ``prompt``, ``chosen`` and ``rejected``.

    Lists of messages go through the chat template. Strings are joined as they are, and the end-of-sequence token is
    appended where it isn't there. An answer is never cut: what it is worth may lie in its end.

    Args:
        rows: preference rows in normal form; ``prompt`` may be missing or empty.
        tokenizer: the model's.
        max_length: rows with a longer sequence are left out and counted. None: no limit.
        inputs: sees to what the prompts hold beside text. among: the numbers of the rows to take; None: all.

    Raises:
        DataError: messages without a chat template, or messages that the template refuses; names the row.
    """
    found = Pairs([], [], [], [], 0)
    overlong = 0
    for number in range(len(rows)) if among is None else among:
        row = rows[number]
        if inputs is None:
            prompt, chosen, rejected = _tokenize(row, ("chosen", "rejected"), tokenizer, number)
        else:
            prompt, chosen, rejected = _with_inputs(row, inputs, number)
        if max_length is not None and max(len(chosen), len(rejected)) > max_length:
            overlong += 1
            continue
        found.chosen_ids.append(chosen)
        found.rejected_ids.append(rejected)
        found.prompt_lengths.append(min(_shared(prompt, chosen), _shared(prompt, rejected)))
        found.rows.append(number)
    return Pairs(found.chosen_ids, found.rejected_ids, found.prompt_lengths, found.rows, overlong)


def tokenize_labelled(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> Labelled:
    """Tokenize rows with ``prompt``, ``completion`` and ``label``; a pair is one row of each label.

    Args, Raises: as for :func:`tokenize_pairs`.
    """
    found = Labelled([], [], [], [], 0)
    overlong = 0
    for number, row in enumerate(rows):
        sides = (("chosen", True), ("rejected", False)) if "chosen" in row else (("completion", bool(row["label"])),)
        prompt, *answers = _tokenize(row, [name for name, _ in sides], tokenizer, number)
        for ids, (_, label) in zip(answers, sides, strict=True):
            if max_length is not None and len(ids) > max_length:
                overlong += 1
                continue
            found.ids.append(ids)
            found.prompt_lengths.append(_shared(prompt, ids))
            found.labels.append(label)
            found.rows.append(number)
    return Labelled(found.ids, found.prompt_lengths, found.labels, found.rows, overlong)


def _tokenize(
    row: Mapping[str, Any], names: Sequence[str], tokenizer: PreTrainedTokenizerBase, number: int
) -> list[list[int]]:
    """The tokens of a row's prompt alone, as it stands before an answer, and of the prompt with each answer."""
    try:
        return [_prompt(row, names[0], tokenizer), *(_whole(row, name, tokenizer) for name in names)]
    except Exception as error:  # a chat template raises what it likes
        if isinstance(error, DataError):
            raise
        raise DataError(f"row {number + 1}: the chat template refuses it: {error}") from error


def _with_inputs(row: Mapping[str, Any], inputs: Inputs, number: int) -> list[list[int]]:
    """As :func:`_tokenize`, of messages whose prompt holds more than text."""
    prompt, given = row["prompt"], row[inputs.column]
    try:
        return [
            inputs.ids(prompt, given, prompting=True),
            *(inputs.ids([*prompt, *row[name]], given) for name in ("chosen", "rejected")),
        ]
    except DataError as error:
        raise DataError(f"row {number + 1}: {error}") from error


def _prompt(row: Mapping[str, Any], name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    prompt = row.get("prompt")
    if isinstance(row[name], str):
        return list(tokenizer(prompt or "")["input_ids"])
    _check_template(tokenizer)
    if not prompt:
        return []
    ids = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)
    return list(ids["input_ids"])


def _whole(row: Mapping[str, Any], name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    prompt, answer = row.get("prompt"), row[name]
    if isinstance(answer, str):
        end = tokenizer.eos_token or ""
        return list(tokenizer((prompt or "") + answer.removesuffix(end) + end)["input_ids"])
    _check_template(tokenizer)
    messages = [*(prompt or []), *answer]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])


def _check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise DataError(
            "the rows hold messages, but the tokenizer has no chat template: give prompt and answers as strings"
        )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with: tokens may merge across the end of a prompt."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def show(value: str | Sequence[Mapping[str, Any]] | None) -> str:
    """A prompt or an answer as a person reads it: a string as it is, of messages the contents."""
    if value is None or isinstance(value, str):
        return value or ""
    return "\n".join(content_of(message) for message in value)


def content_of(message: Mapping[str, Any]) -> str:
    """A message's content as text; of parts the texts, and of others what they are."""
    content = message.get("content", "")
    return " ".join(map(part_of, content)) if isinstance(content, list) else str(content)


def part_of(part: Mapping[str, Any]) -> str:
    """A part of a content: its text, or in brackets what it shows, an image by its path where it has one."""
    if part.get("text") is not None:
        return str(part["text"])
    kind = str(part.get("type", "part"))
    shown = part.get(kind)
    return f"[{shown if isinstance(shown, str) and not shown.startswith('data:') else kind}]"
