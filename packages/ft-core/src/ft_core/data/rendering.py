"""From a row in normal form to text: what the model reads, and which characters of it are trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ALPACA_PROMPT", "ALPACA_PROMPT_WITH_INPUT", "Draft", "Renderer", "alpaca_template", "render_prompt"]

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

_ALPACA_TEMPLATE = (
    "{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}{{ 'OPENING' }}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '\\n\\n### Instruction:\\n' + message['content'] }}{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\n### Response:\\n' + message['content'] + eos_token }}"
    "{% elif not loop.first or message['role'] != 'system' %}"
    "{{ raise_exception('allowed are a system message at the beginning, user and assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
).replace("OPENING", ALPACA_PROMPT.partition("\n")[0])
_ALPACA_TEMPLATES = (_ALPACA_TEMPLATE, "{{ bos_token }}" + _ALPACA_TEMPLATE)

Messages = Sequence[Mapping[str, Any]]

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
        uncuttable: whether it is left out instead: a cut could go through an image.
        shown: character ranges [start, end), rising and apart, that stand for what is no text: never trained.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    end: bool = False
    mask: tuple[int, ...] | None = None
    splittable: bool = False
    uncuttable: bool = False
    shown: tuple[tuple[int, int], ...] = ()


def alpaca_template(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Mapping[str, Any]]) -> str | None:
    """The chat template by which a model is asked as it was trained on these rows, where its tokenizer has none.

    Rows in Alpaca's columns are trained as Alpaca's prompt and answer if there is no chat template. Saved with the
    tokenizer, this template has whatever loads the model ask in the same words. A system message stands in the place
    of the opening sentence; further turns follow the first, each answer with its end-of-sequence token.

    Returns:
        the template, or None: the tokenizer has one, or no row is in Alpaca's columns.
    """
    if tokenizer.chat_template is not None or not any("alpaca" in row for row in rows):
        return None
    return _ALPACA_TEMPLATES[bool(Renderer(tokenizer)._bos)]


def render_prompt(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """What to give the model to have it answer a row, and the answer that the row expects.

    The prompt is whole: it holds the generation prompt and every special token, so it is tokenized with
    ``add_special_tokens=False``, and its tokens are then those that training has before the answer.

    Returns:
        the prompt's text and the expected answer: what follows the prompt in the text up to and with the last assistant
        turn, without special tokens and white space around it; the completion; or the chosen answer. A text row has no
        answer: (text, None). Where the template's generation prompt is not what stands before the finished turn (it
        opens a thought that the row's answer does not have), the prompt is what stands before it: what was trained.

    Raises:
        DataError: messages without a chat template, or messages that the template refuses.
    """
    return Renderer(tokenizer).prompt(row)


def _in_parts(messages: Messages) -> list[dict[str, Any]]:
    """Messages with every content as a list of parts: the templates of some processors read nothing else."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]


class Renderer:
    """Writes rows as text for one tokenizer.

    Args:
        tokenizer: the model's.
        processor: has the chat template in the tokenizer's place, where a message may hold more than text: it is
            handed every message's content as a list of parts.

    Attributes:
        special: the tokenizer's special and added tokens, save white space; a turn ends with one of them.
        special_ids: their ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, processor: Any = None) -> None:
        self._tokenizer, self._processor = tokenizer, processor
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        added = {**tokenizer.get_added_vocab(), **special}
        self.special = tuple(token for token in added if token.strip())
        self.special_ids = frozenset(added[token] for token in self.special)
        self._ids = added
        skipped = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(special)
        self._skipped = re.compile("|".join(re.escape(token) for token in sorted(skipped, key=len, reverse=True)))
        body, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        adds_bos = tokenizer.bos_token_id is not None and whole[:1] == [tokenizer.bos_token_id] != body[:1]
        self._bos = str(tokenizer.bos_token) if adds_bos else ""
        template = (tokenizer if processor is None else processor).chat_template
        self._has_template = template is not None
        self._asks_as_alpaca = template in (None, *_ALPACA_TEMPLATES)
        # the mask of the template's markers needs character offsets, which only the fast tokenizers have
        self._has_markers = bool(_MARKER.search(str(template))) and tokenizer.is_fast and processor is None

    def drafts(self, row: Mapping[str, Any]) -> list[Draft]:
        """The documents that a row gives: one, save for a conversation whose template rewrites earlier turns.

        Messages go through the tokenizer's chat template. Every assistant turn is trained (save those of weight 0),
        from where the generation prompt ends to the token that ends the turn, which the model has to learn; white space
        that the template writes after it is not trained. Which characters these are:

        1. the template's ``{% generation %}`` markers, if it has any;
        2. else the difference between the conversation up to the turn with the generation prompt, and up to and with
           the turn, provided that both are prefixes of the whole;
        3. else (a template that drops the thinking of earlier turns, say) each trained turn gives a document of its
           own, the conversation up to it, which is exactly what the model sees when it has to give that answer.

        A row from Alpaca's columns with a tokenizer that has no chat template becomes Alpaca's prompt and its output.
        Prompt and completion given as strings are joined as they are, with no template, as TRL does.

        Raises:
            DataError: messages without a chat template, or messages that the template refuses.
        """
        if "text" in row:
            text = self._begin(row["text"])
            return [Draft(text, ((0, len(text)),), end=True, splittable=True)] if row["text"].strip() else []
        row = self._plain(row)
        if "messages" in row:
            return self._conversation(row["messages"], row.get("tools"))
        if "completion" not in row:
            raise DataError(f"a row with {', '.join(map(repr, row))} is not in a form that answers are trained on")
        prompt = self._begin(row["prompt"])
        text = prompt + row["completion"]
        return [Draft(text, ((len(prompt), len(text)),), end=True)]

    def prompt(self, row: Mapping[str, Any]) -> tuple[str, str | None]:
        """See :func:`render_prompt`."""
        if "text" in row:
            return self._begin(row["text"]), None
        if isinstance(row.get("chosen"), str):
            return self._begin(row["prompt"]), row["chosen"]
        if "chosen" in row:
            row = {"messages": [*row["prompt"], *row["chosen"]]}
        row = self._plain(row)
        if "completion" in row:
            return self._begin(row["prompt"]), row["completion"]
        messages = row["messages"]
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        messages, tools = messages[: last + 1], row.get("tools")
        start, text = self._turn(messages, last, tools, self._render(messages, tools))
        return text[:start], self._skipped.sub("", text[start:]).strip()

    def end_of_turn(self) -> int | None:
        """The special token that the chat template writes after an assistant's turn; None if it writes none."""
        answer = "An answer"
        turns = ({"role": "user", "content": "A question"}, {"role": "assistant", "content": answer})
        try:
            after = self._render(turns, None).rpartition(answer) if self._has_template else ("", "", "")
        except DataError:
            return None
        ends = [token for token in self.special if after[1] and after[2].lstrip().startswith(token)]
        return self._ids[max(ends, key=len)] if ends else None

    def _begin(self, text: str) -> str:
        """The text with its one beginning-of-sequence token, if the tokenizer uses one."""
        return text if text.startswith(self._bos) else self._bos + text

    def _plain(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row, or its Alpaca prompt and completion where there is no chat template to write messages with."""
        if "messages" not in row or not self._asks_as_alpaca:
            return row
        fields = row.get("alpaca")
        if fields is None and self._has_template:
            return row
        if fields is None:
            raise DataError(
                "the tokenizer has no chat template, so messages cannot be written as text: take an instruction-tuned "
                "model or one with a template, or give prompt and completion"
            )
        prompt = ALPACA_PROMPT_WITH_INPUT if fields["input"].strip() else ALPACA_PROMPT
        return {"prompt": prompt.format(**fields), "completion": row["messages"][-1]["content"]}

    def _render(self, messages: Messages, tools: Any, *, prompting: bool = False) -> str:
        return str(self._apply(messages, tools, tokenize=False, add_generation_prompt=prompting))

    def _apply(self, messages: Messages, tools: Any, **options: Any) -> Any:
        from jinja2 import TemplateError

        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        try:
            if self._processor is not None:
                return self._processor.apply_chat_template(_in_parts(plain), tools=tools, **options)
            return self._tokenizer.apply_chat_template(plain, tools=tools, **options)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the chat template refuses a conversation of {roles or 'no turns'}: {error}") from error

    def _conversation(self, messages: Messages, tools: Any) -> list[Draft]:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in answers if messages[i].get("weight", 1)]
        whole = self._render(messages, tools)
        if self._has_markers and trained == answers:
            mask = self._marked(messages, tools)
            if any(mask):
                return [Draft(whole, (), mask=mask)]
        turns = [self._turn(messages, i, tools, whole) for i in trained]
        if all(whole.startswith(text) for _, text in turns):
            return [Draft(whole, tuple((start, self._end_of_turn(text)) for start, text in turns))]
        return [Draft(text, ((start, self._end_of_turn(text)),)) for start, text in turns]

    def _turn(self, messages: Messages, index: int, tools: Any, whole: str) -> tuple[int, str]:
        """Where an assistant turn starts in the text of the conversation up to and with it, and that text."""
        text = whole if index == len(messages) - 1 else self._render(messages[: index + 1], tools)
        try:
            before = self._render(messages[:index], tools, prompting=True)
            if text.startswith(before):
                return len(before), text
        except DataError:  # some templates refuse to begin with an answer, or to continue after one
            pass
        # The generation prompt is not what the template writes before a finished answer (it opens a thought, say): the
        # turn starts where two conversations that differ in this answer alone begin to differ.
        content = str(messages[index].get("content", "")).lstrip()
        changed = {**messages[index], "content": "b" if content.startswith("a") else "a"}
        other = self._render([*messages[:index], changed], tools)
        pairs = enumerate(zip(text, other, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other))), text

    def _end_of_turn(self, text: str) -> int:
        """Where the text's last special token ends, if only white space follows it, else the text's end."""
        bare = len(text.rstrip())
        return bare if text.endswith(self.special, 0, bare) else len(text)

    def _marked(self, messages: Messages, tools: Any) -> tuple[int, ...]:
        """The template's own mask, with the special token that ends a turn where the markers stop just before it."""
        out = self._apply(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = out["input_ids"], list(out["assistant_masks"])
        for i in range(1, len(ids)):
            ends = out["assistant_masks"][i - 1] and not out["assistant_masks"][i]
            if ends and ids[i] in self.special_ids and ids[i - 1] not in self.special_ids:
                mask[i] = 1
        return tuple(mask)
