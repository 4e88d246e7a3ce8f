"""From a row in normal form to text: what the model reads, and which characters of it are trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ALPACA_PROMPT", "ALPACA_PROMPT_WITH_INPUT", "Draft", "draft", "opening", "render_prompt"]

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca (Taori et al. 2023), for a tokenizer without a chat template."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Draft:
    """A document before it is tokenized.

    Attributes:
        text: all of it; tokenized without adding special tokens.
        spans: the trained character ranges [start, end), rising and apart.
        end: whether the tokenizer's end-of-sequence token follows, trained.
        mask: for each token whether it is trained, where the chat template's markers say so; ``spans`` is then empty.
        splittable: whether a document that is too long is cut into pieces instead of cut off.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    end: bool = False
    mask: tuple[int, ...] | None = None
    splittable: bool = False


def draft(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Draft]:
    """The documents that a row gives: one, save for a conversation whose template rewrites earlier turns.

    Messages go through the tokenizer's chat template. Every assistant turn is trained (save those of weight 0), from
    where the generation prompt ends to the token that ends the turn, which the model has to learn; white space that the
    template writes after it is not trained. Which characters these are:

    1. the template's ``{% generation %}`` markers, if it has any;
    2. else the difference between the conversation up to the turn with the generation prompt, and up to and with the
       turn, provided that both are prefixes of the whole;
    3. else (a template that drops the thinking of earlier turns, say) each trained turn gives a document of its own,
       the conversation up to it, which is exactly what the model sees when it has to give that answer.

    A row from Alpaca's columns with a tokenizer that has no chat template becomes Alpaca's prompt and its output.
    Prompt and completion given as strings are joined as they are, with no template, as TRL does.

    Raises:
        DataError: messages without a chat template, or messages that the template refuses.
    """
    if "text" in row:
        text = _begin(row["text"], tokenizer)
        return [Draft(text, ((0, len(text)),), end=True, splittable=True)] if row["text"].strip() else []
    if "messages" in row and tokenizer.chat_template is None:
        row = _alpaca(row)
    if "prompt" in row and "completion" in row:
        prompt = _begin(row["prompt"], tokenizer)
        text = prompt + row["completion"]
        return [Draft(text, ((len(prompt), len(text)),), end=True)]
    if "messages" not in row:
        raise DataError(f"a row with {', '.join(map(repr, row))} is not in a form that can be tokenized for training")
    return _conversation(row, tokenizer)


def render_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """What to give the model to have it answer a row, and the answer that the row expects.

    The prompt is whole: it holds the generation prompt and every special token, so it is tokenized with
    ``add_special_tokens=False``, and its tokens are then those that training has before the answer.

    Returns:
        the prompt's text and the expected answer: the last assistant turn, the completion or the chosen answer. A text
        row has no answer: (text, None).

    Raises:
        DataError: as :func:`draft`.
    """
    if "text" in row:
        return _begin(row["text"], tokenizer), None
    if "chosen" in row:
        if isinstance(row["chosen"], str):
            return _begin(row["prompt"], tokenizer), row["chosen"]
        row = {"messages": [*row["prompt"], *row["chosen"]]}
    if "messages" in row and tokenizer.chat_template is None:
        row = _alpaca(row)
    if "completion" in row:
        return _begin(row["prompt"], tokenizer), row["completion"]
    messages = row["messages"]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    prompt = _render(messages[:last], tokenizer, row.get("tools"), generation_prompt=True)
    return prompt, messages[last].get("content", "")


def opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the token that this tokenizer puts before every sequence, or nothing."""
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if bos is not None and whole[:1] == [bos] and body[:1] != [bos] else ""


def _begin(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with its one beginning-of-sequence token, if the tokenizer uses one."""
    bos = opening(tokenizer)
    return text if bos and text.startswith(bos) else bos + text


def _alpaca(row: Mapping[str, Any]) -> dict[str, str]:
    fields = row.get("alpaca")
    if fields is None:
        raise DataError(
            "the tokenizer has no chat template, so messages cannot be written as text: take an instruction-tuned "
            "model or one with a template, or give prompt and completion"
        )
    prompt = ALPACA_PROMPT_WITH_INPUT if fields["input"].strip() else ALPACA_PROMPT
    # the output is the last message, so that a row whose answer was changed keeps the change
    return {"prompt": prompt.format(**fields), "completion": row["messages"][-1]["content"]}


def _render(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: Any, *, generation_prompt: bool
) -> str:
    from jinja2 import TemplateError

    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=generation_prompt)
        )
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses a conversation of {roles or 'no turns'}: {error}") from error


def _conversation(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Draft]:
    messages, tools = row["messages"], row.get("tools")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [i for i in answers if message_weight(messages[i])]
    whole = _render(messages, tokenizer, tools, generation_prompt=False)
    if trained == answers and _MARKER.search(str(tokenizer.chat_template)) and tokenizer.is_fast:
        mask = _marked(messages, tokenizer, tools)
        if any(mask):
            return [Draft(whole, (), mask=mask)]
    turns = [_turn(messages, i, tokenizer, tools, whole) for i in trained]
    spans = [(start, _end_of_turn(text, end, tokenizer)) for start, end, text in turns]
    if all(whole.startswith(text) for _, _, text in turns):
        return [Draft(whole, tuple(span for span in spans if span[0] < span[1]))]
    return [Draft(text, (span,)) for span, (_, _, text) in zip(spans, turns, strict=True)]


def message_weight(message: Mapping[str, Any]) -> float:
    return float(message.get("weight", 1))


def _turn(
    messages: Sequence[Mapping[str, Any]], index: int, tokenizer: PreTrainedTokenizerBase, tools: Any, whole: str
) -> tuple[int, int, str]:
    """Start and end of an assistant turn, and the text of the conversation up to and with it."""
    last = index == len(messages) - 1
    text = whole if last else _render(messages[: index + 1], tokenizer, tools, generation_prompt=False)
    try:
        before = _render(messages[:index], tokenizer, tools, generation_prompt=True)
    except DataError:  # a template may refuse to begin with the answer, or to continue after one
        before = None
    if before is not None and text.startswith(before):
        return len(before), len(text), text
    # The generation prompt is not what the template writes before a finished answer (it opens a thought, say): the
    # turn starts where two conversations that differ in this answer alone begin to differ.
    content = str(messages[index].get("content", "")).lstrip()
    other = "b" if content.startswith("a") else "a"
    changed = [*messages[:index], {**messages[index], "content": other}]
    return _common_prefix(text, _render(changed, tokenizer, tools, generation_prompt=False)), len(text), text


def _end_of_turn(text: str, end: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the turn's last special token ends, if only white space follows it, else ``end``."""
    bare = len(text[:end].rstrip())
    special = {*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.get_added_vocab())}
    return bare if any(text.endswith(token, 0, bare) for token in special if token) else end


def _common_prefix(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _marked(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: Any) -> tuple[int, ...]:
    """The template's own mask, with the special token that ends a turn where the markers stop just before it."""
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    out = tokenizer.apply_chat_template(plain, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], list(out["assistant_masks"])
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for i in range(1, len(ids)):
        if mask[i - 1] and not out["assistant_masks"][i] and ids[i] in special and ids[i - 1] not in special:
            mask[i] = 1
    return tuple(mask)
