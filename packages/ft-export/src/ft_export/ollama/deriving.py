"""A Go template that says what a chat template says, found by trying the chat template out.

Nothing is guessed from a model's name. The chat template is run on conversations of marked messages, and what stands
before, between and after them is all that a template needs: what leads from one role to the next. A template that fits
none of the forms here has no candidate; one that fits too loosely fails the comparison that comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ft_export.ollama.go_template import quoted
from ft_export.ollama.rendering import Message

__all__ = ["Candidate", "Chat", "Refused", "candidates"]

Chat = Callable[[Sequence[Message], bool], str]
"""A chat template: messages, and whether the assistant's turn is to be opened; raises :class:`Refused`."""

START = ""
Joints = dict[tuple[str, str], str]
"""What is written between a message of one role (or the start) and one of another."""


class Refused(Exception):
    """The chat template refuses a conversation."""


@dataclass(frozen=True)
class Candidate:
    """A Go template that may be what the chat template is.

    Attributes:
        form: what it supposes: ``turns``, or ``system before the last user``.
        text: the template.
        answer_to_user: what is written between an answer and the next question.
        takes_system: whether system messages are written.
    """

    form: str
    text: str
    answer_to_user: str
    takes_system: bool


def candidates(chat: Chat) -> Iterator[Candidate]:
    """Go templates to compare with a chat template, the plainer form first."""
    user, assistant, system = "user", "assistant", "system"
    short, long = _between(chat, [user]), _between(chat, [user, assistant, user])
    if short is None or long is None:
        return
    opening, generation = short
    joints: Joints = {(START, user): opening, (user, assistant): long[1], (assistant, user): long[2]}
    beginning = _between(chat, [system, user])
    if beginning is not None:
        joints |= {(START, system): beginning[0], (system, user): beginning[1]}
    # what not every template allows; where it does, nothing else will do
    for roles in ([assistant, user], [system, assistant, user], [user, assistant, system, user]):
        parts = _between(chat, roles)
        if parts is not None and (beginning is not None or system not in roles):
            for joint, text in zip(zip([START, *roles], roles, strict=False), parts, strict=False):
                joints.setdefault(joint, text)
    yield Candidate("turns", _turns(joints, generation), long[2], beginning is not None)
    if beginning is not None:
        later = _between(chat, [system, user, assistant, user], [user, assistant, system, user])
        if later is not None:
            befores = {START: beginning[0], assistant: later[2]}
            plain = {joint: text for joint, text in joints.items() if system not in joint}
            text = _system_last(plain, befores, beginning[1], generation)
            yield Candidate("system before the last user", text, long[2], True)


def _between(chat: Chat, roles: Sequence[str], written: Sequence[str] | None = None) -> list[str] | None:
    """What stands before, between and after the messages of a conversation that the assistant is to go on with.

    Args:
        written: the order in which the messages stand in the text, where it is not their own.

    Returns:
        One text more than there are messages; None where the chat template refuses the conversation, or writes a
        message not once or in another order.
    """
    marks = [f"qx{role}{index}xq" for index, role in enumerate(roles)]
    try:
        text = chat([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)], True)
    except Refused:
        return None
    left = list(marks)
    order = [left.pop(next(i for i, mark in enumerate(left) if role in mark)) for role in written or roles]
    parts = []
    for mark in order:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return None if any(mark in part for mark in marks for part in (*parts, text)) else [*parts, text]


def _turns(joints: Joints, generation: str) -> str:
    """Each message after what leads to it from the one before; an answer that comes last is left open to go on."""
    lines = ['{{- $before := "" }}', "{{- range .Messages }}"]
    word = "if"
    for role in ("system", "user", "assistant"):
        before = {old: text for (old, new), text in joints.items() if new == role}
        if before:
            lines.append(f"{{{{- {word} eq .Role {quoted(role)} }}}}{_by_role(before)}{{{{ .Content }}}}")
            lines.append("{{- $before = .Role }}")
            word = "else if"
    return "\n".join([*lines, "{{- end }}", "{{- end }}", _opening(generation)])


def _system_last(joints: Joints, befores: dict[str, str], after: str, generation: str) -> str:
    """As :func:`_turns`, with all system messages before the last message, where that is the user's."""
    user = {old: text for (old, new), text in joints.items() if new == "user"}
    assistant = {old: text for (old, new), text in joints.items() if new == "assistant"}
    return "\n".join(
        [
            '{{- $before := "" }}',
            "{{- range $index, $message := .Messages }}",
            '{{- if eq .Role "user" }}',
            "{{- if and $.System (eq (len (slice $.Messages $index)) 1) }}"
            f"{_by_role(befores)}{{{{ $.System }}}}{_literal(after)}",
            f"{{{{- else }}}}{_by_role(user)}{{{{ end }}}}{{{{ .Content }}}}",
            "{{- $before = .Role }}",
            f'{{{{- else if eq .Role "assistant" }}}}{_by_role(assistant)}{{{{ .Content }}}}',
            "{{- $before = .Role }}",
            "{{- end }}",
            "{{- end }}",
            _opening(generation),
        ]
    )


def _opening(generation: str) -> str:
    return f'{{{{- if ne $before "assistant" }}}}{_literal(generation)}{{{{ end }}}}'


def _by_role(texts: dict[str, str]) -> str:
    """What is written by the role of the message before; what all end with stands once, behind what differs."""
    shared = min(texts.values(), key=len)
    if all(text.endswith(shared) for text in texts.values()):
        rest = {old: text.removesuffix(shared) for old, text in texts.items()}
        return _choice(rest) + _literal(shared)
    return _choice(texts)


def _choice(texts: dict[str, str]) -> str:
    """One of several texts; the one that most have comes last, for all other roles."""
    values = list(texts.values())
    most = max(values, key=values.count)
    others = [(old, text) for old, text in texts.items() if text != most]
    if not others:
        return _literal(most)
    if others == [(START, "")]:
        return f"{{{{ if ne $before {quoted(START)} }}}}{_literal(most)}{{{{ end }}}}"
    chain = [f"if eq $before {quoted(old)} }}}}{_literal(text)}" for old, text in others]
    rest = f"{{{{ else }}}}{_literal(most)}" if most else ""
    return "{{ " + "{{ else ".join(chain) + rest + "{{ end }}"


def _literal(text: str) -> str:
    """A text as an action of its own, so that no trim marker beside it takes a blank or a line's end off it."""
    return f"{{{{ {quoted(text)} }}}}" if text else ""
