"""A small, strict reader of Go's ``text/template``: what templates for chat need of it, and an error for all else.

Ollama renders conversations with that language. No Go is at hand when a model is exported, so the proof that a template
says what the model's chat template says is made here; tests hold this reader byte for byte against Go itself.

Read are: text, trim markers, comments, ``if``, ``else if``, ``else``, ``range`` (with and without variables),
``end``, declaring and setting variables, fields, strings, whole numbers, ``true`` and ``false``, parentheses, and the
functions in ``FUNCTIONS``. Text is a Python string; where Go counts bytes (``len``), bytes are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FUNCTIONS", "GoTemplateError", "Template", "parse", "quoted"]

BLANKS = " \t\r\n"
KEYWORDS = frozenset({"if", "else", "end", "range", "with", "define", "template", "block", "break", "continue"})
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


# Expressions are functions of the state; a node writes text. Both are closures, with what Ollama asks of them beside.
Expression = Callable[["_State"], Any]


@dataclass(frozen=True)
class _Node:
    """One step: plain text, an action, or a block with its branches.

    Attributes:
        run: writes the node's text, given its branches.
        branches: the lists of nodes inside, for the steps that have them.
        is_response: whether it writes ``.Response``, where Ollama cuts the last turn.
    """

    run: Callable[[_State, Sequence[Sequence[_Node]]], Iterator[str]]
    branches: tuple[tuple[_Node, ...], ...] = ()
    is_response: bool = False


class _Root(dict[str, Any]):
    """What a template is run on."""


class _State:
    def __init__(self, values: dict[str, Any]) -> None:
        self.dot: Any = _Root(values)
        self.variables: list[tuple[str, Any]] = [("$", self.dot)]

    def get(self, name: str) -> Any:
        return next(value for known, value in reversed(self.variables) if known == name)

    def set(self, name: str, value: Any) -> None:
        at = next(i for i in reversed(range(len(self.variables))) if self.variables[i][0] == name)
        self.variables[at] = (name, value)


@dataclass(frozen=True)
class Template:
    """A template that was read.

    Attributes:
        names: the fields and variables it uses, in lower case; Ollama decides by them how to run it.
    """

    nodes: tuple[_Node, ...]
    names: frozenset[str]

    def execute(self, values: dict[str, Any]) -> str:
        """The text for these values: strings, whole numbers, truth values, lists, and dicts for structures.

        Raises:
            GoTemplateError: a field that is not there is written, or a function gets what it does not take.
        """
        return "".join(_run(self.nodes, _State(values)))

    def until_response(self) -> Template:
        """The template up to where it first writes ``.Response``; all of it where it does not."""
        return Template(_cut(self.nodes)[0], self.names)

    def with_response(self) -> Template:
        """The template with ``{{ .Response }}`` after it."""
        return Template((*self.nodes, *parse("{{ .Response }}").nodes), self.names | {"response"})


def _cut(nodes: Sequence[_Node]) -> tuple[tuple[_Node, ...], bool]:
    kept: list[_Node] = []
    for node in nodes:
        branches, done = [], node.is_response
        for branch in node.branches:
            part, found = ((), done) if done else _cut(branch)
            branches.append(part)
            done = done or found
        kept.append(_Node(node.run, tuple(branches), node.is_response))
        if done:
            return tuple(kept), True
    return tuple(kept), False


def _run(nodes: Sequence[_Node], state: _State) -> Iterator[str]:
    for node in nodes:
        yield from node.run(state, node.branches)


def parse(text: str) -> Template:
    """Read a template.

    Raises:
        GoTemplateError: it is wrong, or uses what is not read here; says what.
    """
    parser = _Parser(list(_pieces(text)))
    nodes = parser.nodes(inside=None)
    return Template(tuple(nodes), frozenset(parser.names))


Token = tuple[str, str]
Piece = str | list[Token]
"""Plain text, or the tokens of one action."""


def _pieces(text: str) -> Iterator[Piece]:
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


def _unquoted(token: Token) -> str:
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


class _Parser:
    """Makes nodes of the pieces, one after the other."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.at = 0
        self.variables = ["$"]
        self.names: set[str] = set()
        self.ended_by: list[Token] = []

    def nodes(self, inside: str | None) -> list[_Node]:
        """Nodes up to ``end`` or ``else`` (whose tokens are ``ended_by`` then), or up to the end of the template."""
        found: list[_Node] = []
        while self.at < len(self.pieces):
            piece = self.pieces[self.at]
            self.at += 1
            if isinstance(piece, str):
                if piece:
                    found.append(_text(piece))
                continue
            if not piece:
                raise GoTemplateError("an action is empty")
            word = piece[0][1] if piece[0][0] == "word" else ""
            if word in ("end", "else"):
                if inside is None:
                    raise GoTemplateError(f"{word} stands outside of if and range")
                self.ended_by = piece
                return found
            found.append(self._node(piece))
        if inside is not None:
            raise GoTemplateError(f"{inside} has no end")
        return found

    def _node(self, tokens: list[Token]) -> _Node:
        word = tokens[0][1] if tokens[0][0] == "word" else ""
        if word in ("if", "range"):
            return self._block(word, tokens[1:])
        if word in KEYWORDS:
            raise GoTemplateError(f"{word!r} is not read here")
        if len(tokens) > 1 and tokens[0][0] == "variable" and tokens[1] in (("mark", ":="), ("mark", "=")):
            return self._setting(tokens)
        return _action_node(self._expression(tokens), tokens)

    def _setting(self, tokens: list[Token]) -> _Node:
        name, value = tokens[0][1], self._expression(tokens[2:])
        if "." in name or name == "$":
            raise GoTemplateError(f"{name} cannot be set")
        if tokens[1][1] == "=" and name not in self.variables:
            raise GoTemplateError(f"the variable {name} is not declared")
        if tokens[1][1] == ":=":
            self.variables.append(name)
        return _declaring(name, value) if tokens[1][1] == ":=" else _setting(name, value)

    def _block(self, word: str, tokens: list[Token]) -> _Node:
        known = len(self.variables)
        names: list[str] = []
        marks = [token[1] for token in tokens if token[0] == "mark"]
        if ":=" in marks or "=" in marks:
            end = tokens.index(("mark", ":=")) if ":=" in marks else -1
            names = [token[1] for token in tokens[: max(end, 0)] if token[0] == "variable"]
            wanted = [part for name in names for part in (("variable", name), ("mark", ","))][:-1]
            if word != "range" or not 1 <= len(names) <= 2 or tokens[:end] != wanted or any("." in n for n in names):
                raise GoTemplateError(f"variables are set otherwise in {word} than is read here")
            tokens = tokens[end + 1 :]
        value = self._expression(tokens)
        self.variables += names
        body = self.nodes(word)
        orelse: list[_Node] = []
        if self.ended_by[0][1] == "else":
            del self.variables[known:]
            rest = self.ended_by[1:]
            if rest and (rest[0] != ("word", "if") or word != "if"):
                raise GoTemplateError(f"'else {rest[0][1]}' is not read here")
            orelse = [self._block("if", rest[1:])] if rest else self.nodes(word)
            if not rest and self.ended_by[0][1] == "else":
                raise GoTemplateError(f"{word} has two else")
        elif len(self.ended_by) > 1:
            raise GoTemplateError("end takes nothing")
        del self.variables[known:]
        branches = (tuple(body), tuple(orelse))
        return _Node(_if(value), branches) if word == "if" else _Node(_range(names, value), branches)

    def _expression(self, tokens: list[Token]) -> Expression:
        found, rest = self._call(tokens)
        if rest:
            raise GoTemplateError(f"{rest[0][1]!r} is not read here")
        return found

    def _call(self, tokens: list[Token]) -> tuple[Expression, list[Token]]:
        """A function with its arguments, or one operand; and what is left, from a closing parenthesis on."""
        if not tokens:
            raise GoTemplateError("a value is missing")
        kind, text = tokens[0]
        if kind == "word" and text not in ("true", "false"):
            if text not in FUNCTIONS:
                raise GoTemplateError(f"the function {text!r} is not read here (allowed: {', '.join(FUNCTIONS)})")
            arguments, rest = [], tokens[1:]
            while rest and rest[0] != ("mark", ")"):
                argument, rest = self._operand(rest)
                arguments.append(argument)
            return _calling(text, arguments), rest
        return self._operand(tokens)

    def _operand(self, tokens: list[Token]) -> tuple[Expression, list[Token]]:
        (kind, text), rest = tokens[0], tokens[1:]
        if (kind, text) == ("mark", "("):
            inner, rest = self._call(rest)
            if not rest or rest[0] != ("mark", ")"):
                raise GoTemplateError("a parenthesis is not closed")
            return inner, rest[1:]
        if kind in ("string", "raw"):
            return _constant(_unquoted((kind, text))), rest
        if kind == "number":
            return _constant(int(text)), rest
        if kind == "word" and text in ("true", "false"):
            return _constant(text == "true"), rest
        if kind == "field":
            path = text[1:].split(".")
            self.names.update(name.lower() for name in path)
            return _field(None, path), rest
        if kind == "variable":
            name, *path = text.split(".")
            if name not in self.variables:
                raise GoTemplateError(f"the variable {name} is not declared")
            self.names.update(part.lower() for part in (name, *path))
            return _field(name, path), rest
        if (kind, text) == ("mark", "."):
            return (lambda state: state.dot), rest
        raise GoTemplateError(f"{text!r} is not read here")


def _text(text: str) -> _Node:
    return _Node(lambda state, branches: iter((text,)))


def _action_node(value: Expression, tokens: list[Token]) -> _Node:
    writes = [text for kind, text in tokens if kind == "field" and "Response" in text.split(".")]
    if writes and len(tokens) > 1:
        raise GoTemplateError(".Response is read here only by itself")

    def run(state: _State, branches: object) -> Iterator[str]:
        found = value(state)
        if isinstance(found, bool):
            yield "true" if found else "false"
        elif isinstance(found, str | int):
            yield str(found)
        else:
            raise GoTemplateError("a value is written that is no text and no number")

    return _Node(run, is_response=bool(writes))


def _declaring(name: str, value: Expression) -> _Node:
    def run(state: _State, branches: object) -> Iterator[str]:
        state.variables.append((name, value(state)))
        return iter(())

    return _Node(run)


def _setting(name: str, value: Expression) -> _Node:
    def run(state: _State, branches: object) -> Iterator[str]:
        state.set(name, value(state))
        return iter(())

    return _Node(run)


def _if(value: Expression) -> Callable[[_State, Sequence[Sequence[_Node]]], Iterator[str]]:
    def run(state: _State, branches: Sequence[Sequence[_Node]]) -> Iterator[str]:
        known = len(state.variables)
        yield from _run(branches[0] if _truth(value(state)) else branches[1], state)
        del state.variables[known:]

    return run


def _range(names: list[str], value: Expression) -> Callable[[_State, Sequence[Sequence[_Node]]], Iterator[str]]:
    def run(state: _State, branches: Sequence[Sequence[_Node]]) -> Iterator[str]:
        items, known, dot = value(state), len(state.variables), state.dot
        if items is not None and not isinstance(items, list):
            raise GoTemplateError("range goes over what is no list")
        for index, item in enumerate(items or ()):
            state.dot = item
            state.variables += zip(names, [item] if len(names) == 1 else [index, item], strict=False)
            yield from _run(branches[0], state)
            del state.variables[known:]
        state.dot = dot
        if not items:
            yield from _run(branches[1], state)
            del state.variables[known:]

    return run


def _constant(value: Any) -> Expression:
    return lambda state: value


def _field(variable: str | None, path: list[str]) -> Expression:
    def value(state: _State) -> Any:
        found = state.dot if variable is None else state.get(variable)
        for name in path:
            if isinstance(found, _Root) and name not in found:  # Ollama passes a map, of which Go takes what is missing
                return None
            if not isinstance(found, dict) or name not in found:
                raise GoTemplateError(f"there is no field .{name}")
            found = found[name]
        return found

    return value


def _truth(value: Any) -> bool:
    return True if isinstance(value, dict) else bool(value)


def _equal(one: Any, *others: Any) -> bool:
    for other in others:
        if type(one) is not type(other) or not isinstance(one, str | int):
            raise GoTemplateError("eq compares values of different or other types than text and numbers")
    if not others:
        raise GoTemplateError("eq takes two values or more")
    return one in others


def _number(name: str, compare: Callable[[int, int], bool]) -> Callable[..., bool]:
    def function(*given: Any) -> bool:
        if len(given) != 2 or any(type(value) is not int for value in given):
            raise GoTemplateError(f"{name} compares two whole numbers here")
        return compare(*given)

    return function


def _length(*given: Any) -> int:
    if len(given) != 1 or not isinstance(given[0], str | list):
        raise GoTemplateError("len takes a text or a list")
    return len(given[0].encode()) if isinstance(given[0], str) else len(given[0])


def _slice(*given: Any) -> list[Any]:
    items, *bounds = given or (None,)
    if not isinstance(items, list) or not 1 <= len(bounds) <= 2 or any(type(at) is not int for at in bounds):
        raise GoTemplateError("slice takes a list and one or two whole numbers here")
    start, end = bounds if len(bounds) == 2 else (bounds[0], len(items))
    if not 0 <= start <= end <= len(items):
        raise GoTemplateError("slice reaches beyond the list")
    return items[start:end]


def _not(*given: Any) -> bool:
    if len(given) != 1:
        raise GoTemplateError("not takes one value")
    return not _truth(given[0])


def _not_equal(*given: Any) -> bool:
    if len(given) != 2:
        raise GoTemplateError("ne takes two values")
    return not _equal(*given)


FUNCTIONS: dict[str, Callable[..., Any] | None] = {
    "and": None,  # and, or: the last value that had to be looked at
    "or": None,
    "not": _not,
    "eq": _equal,
    "ne": _not_equal,
    "lt": _number("lt", lambda a, b: a < b),
    "le": _number("le", lambda a, b: a <= b),
    "gt": _number("gt", lambda a, b: a > b),
    "ge": _number("ge", lambda a, b: a >= b),
    "len": _length,
    "slice": _slice,
}
"""The functions that are read here."""


def _calling(name: str, arguments: list[Expression]) -> Expression:
    function = FUNCTIONS[name]
    if function is not None:
        return lambda state: function(*(argument(state) for argument in arguments))
    if not arguments:
        raise GoTemplateError(f"{name} takes one value or more")

    def value(state: _State) -> Any:
        found: Any = None
        for argument in arguments:
            found = argument(state)
            if _truth(found) is (name == "or"):
                break
        return found

    return value
