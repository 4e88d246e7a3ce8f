"""Whether a Go template, run as Ollama runs it, says byte for byte what a model's chat template says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ft_export.errors import ExportError
from ft_export.ollama.deriving import Candidate, Chat, Refused, candidates
from ft_export.ollama.go_template import GoTemplateError, Template, parse
from ft_export.ollama.rendering import Message, collate, render

__all__ = ["CONTINUED", "CONVERSATIONS", "FURTHER", "Proven", "adds_bos", "chat_of", "prove", "prove_any"]


def _talk(*turns: str) -> list[dict[str, str]]:
    """Messages by turns: ``s:``, ``u:`` or ``a:`` and what is said."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one question": _talk("u:Hi"),
    "a system message and a question": _talk("s:Be brief.", "u:What is 2 + 2?"),
    "two questions": _talk("u:One?", "a:Two.", "u:Three?"),
    "a system message and two questions": _talk("s:Be kind.", "u:One?", "a:Two.", "u:Three?"),
    "four questions": _talk("u:a", "a:b", "u:c", "a:d", "u:e", "a:f", "u:g"),
    "a system message and three questions": _talk("s:S", "u:a", "a:b", "u:c", "a:d", "u:e"),
    "signs of many scripts": _talk("s:Größe, façade", "u:東京, Привет, مرحبا, हिन्दी", "a:🙂👍🏽 e\u0301", "u:한국어?"),
    "signs that mean something to templates": _talk(
        's:{{ .System }} {% if x %} "q"', "u:{{ .Prompt }} 'q' `r` \\n", 'a:"""\n{{- end }}', "u:<b>&amp;</b> ${x} %s"
    ),
    "lines and blanks inside": _talk("s:a\n\nb", "u:def f(x):\n    return x\t# 1", "a:one\r\n\n two", "u:x  y\n- z"),
}
"""Conversations that have to be rendered equal, as far as the chat template takes them; each ends with the user."""

FURTHER: dict[str, list[dict[str, str]]] = {
    "blanks at the ends of messages": _talk("u: One?\n", "a:\tTwo. \n", "u:\n Three \n"),
    "blanks at the ends of a system message": _talk("s: Be brief. \n", "u:Hi"),
    "an answer that comes first": _talk("a:Hello!", "u:Hi"),
    "a system message later on": _talk("u:One?", "a:Two.", "s:Be brief.", "u:Three?"),
    "thoughts in an earlier answer": _talk("u:One?", "a:<think>\nTwo?\n</think>\n\nTwo.", "u:Three?"),
}
"""Conversations whose difference is told, and is no failure: Ollama's templates cannot cut blanks off a text."""

CONTINUED = {"an answer to go on with": _talk("u:One?", "a:Two, and")}
"""A conversation that ends with the assistant, whose answer is to be gone on with; its difference is told as well."""


@dataclass(frozen=True)
class Proven:
    """A template that is equal to the chat template.

    Attributes:
        text: the Go template.
        form: how it was found.
        conversations: names of the conversations that are equal, the held-out ones as one with their number.
        refused: those that the chat template does not take.
        differing: those whose difference is only told.
        takes_system: whether system messages are written.
        answer_to_user: what stands between an answer and the next question.
    """

    text: str
    form: str
    conversations: tuple[str, ...]
    refused: tuple[str, ...]
    differing: tuple[str, ...]
    takes_system: bool
    answer_to_user: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "equal": list(self.conversations),
            "refused_by_the_chat_template": list(self.refused),
            "differing": list(self.differing),
            "takes_system": self.takes_system,
        }


def adds_bos(tokenizer: Any) -> bool:
    """Whether tokenizing a text puts the beginning-of-sequence token before it."""
    ids = tokenizer("a")["input_ids"]
    return bool(len(ids) > 1 and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)


def chat_of(tokenizer: Any) -> Chat:
    """A tokenizer's chat template, without the beginning-of-sequence token that tokenizing adds again.

    Raises:
        ExportError: there is no chat template.
    """
    if not tokenizer.chat_template:
        raise ExportError("the model has no chat template: Ollama needs one (--to gguf does not)")
    bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""

    def chat(messages: Sequence[Message], opened: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opened)
        except Exception as error:  # a template is a program of the model's, its errors have no common type
            raise Refused(str(error)) from error
        return str(text).removeprefix(bos)

    return chat


def prove_any(chat: Chat, held_out: Sequence[Sequence[Message]]) -> Proven:
    """The first template derived from the chat template that is equal to it.

    Raises:
        ExportError: none is; says where the nearest differs.
    """
    why = "it writes a message not once, or in an order of its own"
    for candidate in candidates(chat):
        try:
            return prove(candidate, chat, held_out)
        except ExportError as error:
            why = str(error)
    raise ExportError(
        f"no template of Ollama's is found that says what the chat template says ({why}): give one with template=FILE"
    )


def prove(candidate: Candidate, chat: Chat, held_out: Sequence[Sequence[Message]]) -> Proven:
    """Compare a template with the chat template.

    Raises:
        ExportError: it is none that can be read, or differs; names the conversation and the place.
    """
    try:
        template = parse(candidate.text)
    except GoTemplateError as error:
        raise ExportError(f"the template for Ollama cannot be checked: {error}") from error
    equal: list[str] = []
    refused: list[str] = []
    differing: list[str] = []
    for name, messages in CONVERSATIONS.items():
        try:
            expected = chat(messages, True)
        except Refused:
            refused.append(name)
            continue
        _require_equal(name, expected, _rendered(template, messages))
        equal.append(name)
    if not equal:
        raise ExportError("the chat template takes no conversation: it cannot be compared")
    for name, messages in {**FURTHER, **CONTINUED}.items():
        try:
            expected = _up_to(chat(messages, False), messages) if name in CONTINUED else chat(messages, True)
        except Refused:
            refused.append(name)
            continue
        (equal if _rendered(template, messages) == expected else differing).append(name)
    takes = "a system message and a question" in equal and candidate.takes_system
    found = tuple(equal), tuple(refused), tuple(differing)
    proven = Proven(candidate.text, candidate.form, *found, takes, candidate.answer_to_user)
    return _with_held_out(proven, template, chat, held_out)


def _with_held_out(proven: Proven, template: Template, chat: Chat, held_out: Sequence[Sequence[Message]]) -> Proven:
    equal, blanks, refused, joined = 0, 0, 0, 0
    for number, messages in enumerate(held_out, 1):
        if len(collate(messages)[1]) < len(messages):
            joined += 1  # Ollama puts neighbours of one role together, whatever the template
            continue
        try:
            expected = chat(messages, True)
            bare = [{**message, "content": str(message["content"]).strip()} for message in messages]
            if _rendered(template, messages) == expected:
                equal += 1
                continue
            _require_equal(f"held-out conversation {number}", chat(bare, True), _rendered(template, bare))
            blanks += 1
        except Refused:
            refused += 1
    differing = [f"{blanks} held-out conversations, in blanks at the ends of messages"] if blanks else []
    differing += [f"{joined} held-out conversations with neighbours of one role"] if joined else []
    return replace(
        proven,
        conversations=(*proven.conversations, *([f"{equal} held-out conversations"] if equal else [])),
        refused=(*proven.refused, *([f"{refused} held-out conversations"] if refused else [])),
        differing=(*proven.differing, *differing),
    )


def _rendered(template: Template, messages: Sequence[Message]) -> str:
    try:
        return render(template, messages)
    except GoTemplateError as error:
        raise ExportError(f"the template for Ollama cannot be run: {error}") from error


def _up_to(text: str, messages: Sequence[Message]) -> str:
    """The text up to the end of the last message."""
    last = str(messages[-1]["content"])
    before, found, _ = text.rpartition(last)
    return before + found


def _require_equal(name: str, expected: str, found: str) -> None:
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        at = next((i for i, (one, other) in pairs if one != other), min(len(found), len(expected)))
        raise ExportError(
            f"the template for Ollama says otherwise than the chat template in {name!r}: from character {at} on "
            f"{found[at : at + 40]!r}, not {expected[at : at + 40]!r}"
        )
