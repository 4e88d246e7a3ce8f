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
TEXTS = frozenset({"template", "system", "license"})


def write_modelfile(commands: Sequence[Command]) -> str:
    """The file's text.

    Raises:
        ExportError: a value would not survive; names it and what is in its way.
    """
    text = "\n\n".join(_group(commands)) + "\n"
    found = read_modelfile(text)
    for command, read in zip(commands, found, strict=False):
        if command != read:
            _refuse(*command)
    if len(found) != len(commands):
        raise ExportError("the Modelfile would be read with more or fewer commands than it has")
    return text


def _group(commands: Sequence[Command]) -> list[str]:
    """Lines, those of parameters together."""
    groups: list[list[str]] = []
    for index, (name, value) in enumerate(commands):
        parameter = name not in TEXTS and name != "model"
        if name in TEXTS:
            line = f'{name.upper()} """{value}"""'
        elif name == "model":
            line = f"FROM {value}"
        else:
            line = f"PARAMETER {name} {_value(value)}"
        before = commands[index - 1][0] if index else ""
        if groups and parameter and before not in TEXTS and before != "model":
            groups[-1].append(line)
        else:
            groups.append([line])
    return ["\n".join(lines) for lines in groups]


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
