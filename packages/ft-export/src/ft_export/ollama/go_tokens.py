"""Go's ``text/template`` sign by sign: where text ends and actions begin, what is trimmed, and strings."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["GoTemplateError", "Piece", "Token", "pieces", "quoted", "unquoted"]

BLANKS = " \t\r\n"
TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<raw>`[^`]*`)
    |(?P<field>(?:\.[A-Za-z_]\w*)+)
    |(?P<variable>\$\w*(?:\.[A-Za-z_]\w*)*)
    |(?P<word>[A-Za-z_]\w*)
    |(?P<number>[0-9]+)
    |(?P<mark>:=|=|,|\(|\)|\.)""",
    re.VERBOSE | re.ASCII,
)
OPENS, CLOSES = ("(", ",", ":=", "="), (")", ",", ":=", "=")
"""Marks after and before which no blank is needed."""
ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)


class GoTemplateError(Exception):
    """The template is wrong, or uses what is not read here; the message is one line."""


def quoted(text: str) -> str:
    """A text as a string of Go's, in printable ASCII but for letters, marks, digits and signs that are printable."""
    named = {value: name for name, value in ESCAPES.items()}
    parts = []
    for sign in text:
        if sign in named:
            parts.append("\\" + named[sign])
        elif sign.isprintable():
            parts.append(sign)
        else:
            parts.append(f"\\u{ord(sign):04x}" if ord(sign) < 0x10000 else f"\\U{ord(sign):08x}")
    return '"' + "".join(parts) + '"'


Token = tuple[str, str]
Piece = str | list[Token]
"""Plain text, or the tokens of one action."""


def pieces(text: str) -> Iterator[Piece]:
    at, trim = 0, False
    while True:
        start = text.find("{{", at)
        plain = text[at:] if start < 0 else text[at:start]
        if trim:
            plain = plain.lstrip(BLANKS)
        if start < 0:
            yield plain
            return
        at = start + 2
        if text[at : at + 1] == "-" and text[at + 1 : at + 2] in BLANKS and text[at + 1 : at + 2]:
            plain, at = plain.rstrip(BLANKS), at + 2
        yield plain
        comment = re.compile(r"/\*.*?\*/", re.DOTALL).match(text, at)
        if comment:
            end = re.compile(r"([ \t\r\n]-)?\}\}").match(text, comment.end())
            if end is None:
                raise GoTemplateError("a comment is not alone in its action")
            at, trim = end.end(), end[1] is not None
            continue
        tokens, at, trim = _action(text, at)
        yield tokens


def _action(text: str, at: int) -> tuple[list[Token], int, bool]:
    """The tokens up to the end of an action, where that is, and whether it trims."""
    tokens: list[Token] = []
    right = re.compile(r"([ \t\r\n]-)?\}\}")
    before = ""
    while True:
        end = right.match(text, at)
        if end:
            return tokens, end.end(), end[1] is not None
        found = TOKEN.match(text, at)
        if found is None:
            what = text[at : at + 12]
            raise GoTemplateError(f"{what!r} is not read here" if what else "an action has no end")
        kind, word = str(found.lastgroup), found[0]
        if kind != "space":
            if before and not (before in OPENS or word in CLOSES):
                raise GoTemplateError(f"there is no blank before {word!r}")
            tokens.append((kind, word))
        before, at = "" if kind == "space" else word, found.end()


def unquoted(token: Token) -> str:
    kind, text = token
    if kind == "raw":
        return text[1:-1].replace("\r", "")

    def one(found: re.Match[str]) -> str:
        if found[3] is None:
            return chr(int(found[1] or found[2], 16))
        if found[3] not in ESCAPES:
            raise GoTemplateError(f"the escape \\{found[3]} is not read here")
        return ESCAPES[found[3]]

    return ESCAPE.sub(one, text[1:-1])
