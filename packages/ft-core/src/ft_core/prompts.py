"""Prompts as token ids, and where an answer to them ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ft_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["encode_prompt", "encode_prompts", "render", "render_chat", "room", "stop_ids"]


def encode_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[dict[str, str]]],
    *,
    system: str | None = None,
) -> list[list[int]]:
    """The token ids of prompts as :func:`ft_core.generation.generate` takes them.

    Raises:
        DataError: a prompt is empty or fills the model's positions; conversations or a system message, but no chat
            template; or messages that the template refuses.
    """
    ids = [encode_prompt(render(prompt, tokenizer, system), tokenizer) for prompt in prompts]
    for number, one in enumerate(ids, 1):
        room(model, len(one), 1, f"prompt {number}")
    return ids


def render_chat(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the model's chat template writes it, ready for the answer.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses these messages (a role it doesn't know).
    """
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template: give plain prompts, or use an instruct model")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's; its errors have no common type
        raise DataError(f"the model's chat template refuses these messages: {error}") from error
    return str(text)


def render(prompt: str | Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, system: str | None) -> str:
    """A prompt as the model is given it: a conversation, a user's turn, or, without a chat template, a text to go on.

    Raises:
        DataError: there is a system message and no chat template, or as :func:`render_chat`.
    """
    from ft_core.data import render_prompt

    if isinstance(prompt, str):
        if not tokenizer.chat_template:
            if system:
                raise DataError("the model's tokenizer has no chat template, so it knows no system message")
            return render_prompt({"text": prompt}, tokenizer)[0]
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = list(prompt)
    if system and not (messages and messages[0].get("role") == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return render_chat(messages, tokenizer)


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt that is whole: a rendered conversation, or a text with its beginning-of-sequence token."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the generation configuration, the tokenizer's own, and the one with which
    the chat template ends a turn (a base model's tokenizer may have another end-of-text token, Qwen2.5's has)."""
    from ft_core.data.rendering import Renderer

    ids = model.generation_config.eos_token_id if model.generation_config else None
    known = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    known += [tokenizer.eos_token_id, Renderer(tokenizer).end_of_turn()]
    return [token for token in dict.fromkeys(known) if token is not None]


def room(model: PreTrainedModel, length: int, wanted: int, which: str = "the prompt") -> int:
    """How many tokens an answer to a prompt of ``length`` tokens may have: ``wanted``, or the positions left.

    Raises:
        DataError: the prompt is empty, or fills the model's positions.
    """
    from ft_core.models.positions import positions

    if not length:
        raise DataError(f"{which} is empty")
    limit = positions(model.config)
    if limit is None:
        return wanted
    if length >= limit:
        raise DataError(f"{which} has {length} tokens and leaves none of the model's {limit} positions: shorten it")
    return min(wanted, limit - length)
