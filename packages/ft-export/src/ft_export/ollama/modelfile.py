"""Ollama's Modelfile: written, and read again by the rules that Ollama reads it by, so that every value survives.

A text stands between three quotes, or between one; there are no escapes. Signs that are not printable (a no-break
space, a joiner inside an emoji) Ollama drops without a word, and a line that ends with three quotes ends the text.
What would be changed so is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from ft_export.errors import ExportError

__all__ = ["Command", "read_modelfile", "write_modelfile"]

Command = tuple[str, str]
"""A command's name in lower case (a parameter's own name for ``PARAMETER``, ``model`` for ``FROM``) and its value."""

NAMES = frozenset({"from", "license", "template", "system", "adapter", "renderer", "parser", "message", "requires"})
OF_THEIR_OWN = frozenset({"model", "template", "system", "license"})
"""Commands that are no parameters; what is written here of them."""


def write_modelfile(commands: Sequence[Command]) -> str:
    """The file's text.

    Raises:
        ExportError: a value would not survive; names it and what is in its way.
    """
    for command in commands:
        try:
            whole = read_modelfile(f"FROM .\n{_line(*command)}\n") == [("model", "."), command]
        except ExportError:
            whole = False
        if not whole:
            _refuse(*command)
    groups: list[list[str]] = []
    for index, (name, value) in enumerate(commands):
        if index and not {name, commands[index - 1][0]} & OF_THEIR_OWN:
            groups[-1].append(_line(name, value))
        else:
            groups.append([_line(name, value)])
    return "\n\n".join("\n".join(lines) for lines in groups) + "\n"


def _line(name: str, value: str) -> str:
    if name == "model":
        return f"FROM {value}"
    return f'{name.upper()} """{value}"""' if name in OF_THEIR_OWN else f"PARAMETER {name} {_value(value)}"


def _value(value: str) -> str:
    if value.lstrip("-").replace(".", "", 1).isdigit():
        return value
    return f'"{value}"' if '"' not in value and "\n" not in value else f'"""{value}"""'


def _refuse(name: str, value: str) -> None:
    lost = next((sign for sign in value if not (sign.isprintable() or sign in "\n\r\t")), None)
    if lost is not None:
        why = f"holds the sign U+{ord(lost):04X}, which Ollama drops from a Modelfile"
    elif '"""' in value:
        why = 'holds """, which ends a text in a Modelfile'
    else:
        why = "is not read back from a Modelfile as it was written"
    hint = " (another text: system=TEXT, none: system=)" if name == "system" else ""
    raise ExportError(f"the {name} {value[:60]!r} {why}{hint}")


def read_modelfile(text: str) -> list[Command]:
    """The commands in a Modelfile, read as Ollama reads it, sign by sign.

    Raises:
        ExportError: it is none; says why.
    """
    commands: list[Command] = []
    at = 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
        elif text[at] == "#":
            while at < len(text) and text[at] not in "\r\n":
                at += 1
        else:
            name, at = _word(text, at)
            if name.lower() not in NAMES | {"parameter"}:
                raise ExportError(f"a Modelfile has no command {name!r}")
            name = {"from": "model"}.get(name.lower(), name.lower())
            if name == "parameter":
                name, at = _word(text, at)
            value, at = _read_value(text, at)
            commands.append((name, value))
    if not any(name == "model" for name, _ in commands):
        raise ExportError("a Modelfile needs FROM")
    return commands


def _word(text: str, at: int) -> tuple[str, int]:
    start = at
    while at < len(text) and ((text[at].isascii() and text[at].isalnum()) or text[at] == "_"):
        at += 1
    if at == start or at == len(text) or text[at] not in " \t":
        raise ExportError(f"a Modelfile's command is cut short at {text[start : at + 10]!r}")
    return text[start:at], at + 1


def _read_value(text: str, at: int) -> tuple[str, int]:
    """A value: it ends with the first line at whose end what was read so far is whole."""
    kept: list[str] = []
    while at < len(text):
        sign = text[at]
        at += 1
        if sign in "\r\n":
            value = _unquoted("".join(kept).strip())
            if value is not None:
                return value, at
            kept.append(sign)
        elif sign in " \t" or sign.isprintable():
            kept.append(sign)
    value = _unquoted("".join(kept).strip())
    if value is None:
        raise ExportError("a Modelfile's text has no end")
    return value, at


def _unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            whole = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if whole else None
    return text
