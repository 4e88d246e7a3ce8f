"""Prompts as tokens, and completions as rewards see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["as_completion", "check_conversations", "prompt_ids"]

Prompt = str | Sequence[Mapping[str, Any]]


def prompt_ids(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None, where: str = "prompt"
) -> list[int]:
    """The tokens of a prompt, up to where an answer begins.

    Args:
        prompt: text, taken as it is; or messages, which go through the chat template with its generation prompt.
        options: further arguments of the chat template. where: what an error names.

    Raises:
        DataError: messages without a chat template, or messages that the template refuses.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise DataError(f"{where}: holds messages, but the tokenizer has no chat template: give prompts as strings")
    try:
        made = tokenizer.apply_chat_template(
            [dict(message) for message in prompt], tokenize=True, return_dict=True, add_generation_prompt=True,
            **dict(options or {}),
        )  # fmt: skip
    except Exception as error:  # a chat template raises what it likes
        raise DataError(f"{where}: the chat template refuses it: {error}") from error
    return list(made["input_ids"])


def check_conversations(prompts: Sequence[Prompt], where: str) -> None:
    """Refuse prompts that an environment cannot go on with.

    Args:
        where: the environment's place in the configuration.

    Raises:
        DataError: one is text, which has no turns; names the row.
    """
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, str):
            raise DataError(f"row {number}: {where} takes turns in conversations: give prompts as lists of messages")


def as_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """A completion in the form of its prompt: text, or one assistant's message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
