"""A small, strict reader of Go's ``text/template``: what templates for chat need of it, and an error for all else.

Ollama renders conversations with that language. No Go is at hand when a model is exported, so the proof that a template
says what the model's chat template says is made here; tests hold this reader byte for byte against Go itself.

Read are: text, trim markers, comments, ``if``, ``else if``, ``else``, ``range`` (with and without variables),
``end``, declaring and setting variables, fields, strings, whole numbers, ``true`` and ``false``, parentheses, and the
functions in ``FUNCTIONS``. Text is a Python string; where Go counts bytes (``len``), bytes are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ft_export.ollama.go_functions import FUNCTIONS, truth
from ft_export.ollama.go_tokens import GoTemplateError, Piece, Token, pieces, quoted, unquoted

__all__ = ["FUNCTIONS", "GoTemplateError", "Template", "parse", "quoted"]

KEYWORDS = frozenset({"if", "else", "end", "range", "with", "define", "template", "block", "break", "continue"})

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
    parser = _Parser(list(pieces(text)))
    nodes = parser.nodes(inside=None)
    return Template(tuple(nodes), frozenset(parser.names))


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
            return _constant(unquoted((kind, text))), rest
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
        yield from _run(branches[0] if truth(value(state)) else branches[1], state)
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
            if truth(found) is (name == "or"):
                break
        return found

    return value
