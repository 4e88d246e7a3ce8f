"""Tokens, chat template and stop tokens in llama.cpp against transformers: all must be equal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ft_export.errors import ExportError
from ft_export.gguf.engine import LlamaCpp

__all__ = ["check_readable", "check_stops", "check_template", "check_tokens", "rendered", "shown"]

TEXTS = (
    "Hello, world! It's 3.14159 or 1,000,000; isn't it?",
    "  two spaces,\ttabs\n\n\nand   lines  \n",
    "Größe, façade, naïve, 東京, Привет, مرحبا, 한국어, हिन्दी 🙂👍🏽",
    "def f(x):\n    return {'a': x**2}  # 100%\n",
    "ABCdef GHIjkl WE'LL we'll 12 345 6789 01234",
)
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": " Three \n"},
    ],
)


def rendered(tokenizer: Any) -> list[str]:
    """The built-in conversations in the chat template, to be split; none without one."""
    from jinja2.exceptions import TemplateError

    texts: list[str] = []
    if tokenizer.chat_template:
        for messages in CONVERSATIONS:
            with suppress(TemplateError):  # a shape that the template refuses
                texts.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return texts


def check_tokens(
    engine: LlamaCpp,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    plain: bool = True,
    spaced: bool = True,
    advice: str = "name the right rules with pre=NAME",
) -> int:
    """Compare the tokens of built-in texts and ``prompts``, with and without what the tokenizer adds around a text.

    Args:
        plain: whether llama.cpp can split texts with no special token before them as the tokenizer does; where it
            cannot, one is put there.
        spaced: whether it can split those that begin with a space; where it cannot, they begin without.
        advice: what to do where they differ.

    Returns:
        How many texts were compared.

    Raises:
        ExportError: they differ; names the text and the place.
    """
    texts = [*TEXTS, *prompts]
    if not spaced:
        texts = [text.lstrip(" ") for text in texts]
    if not plain:
        begin = tokenizer.bos_token or tokenizer.eos_token or ""
        texts = [text if text.startswith(begin) else begin + text for text in texts]
    for text in texts:
        for add_special in (False, True) if plain else (False,):
            expected = tokenizer(text, add_special_tokens=add_special)["input_ids"]
            found = engine.tokenize(text, add_special)
            if found != expected:
                at = _parting(found, expected)
                raise ExportError(
                    f"llama.cpp splits {text[:60]!r} otherwise than the tokenizer: token {at} is "
                    f"{_piece(tokenizer, found, at)}, not {_piece(tokenizer, expected, at)}; {advice}"
                )
    return len(texts)


def check_template(engine: LlamaCpp, tokenizer: Any, more: Sequence[Sequence[dict[str, Any]]], bos: str) -> int:
    """Compare the chat template, byte for byte, as a text and on conversations of several shapes.

    The text, since a template has branches (for tools, say) that no conversation here takes. In a conversation
    llama.cpp leaves out a leading ``bos`` that tokenizing adds again; pass "" where it does not.

    Returns:
        How many conversations were compared; a shape that the template itself refuses does not count.

    Raises:
        ExportError: they differ; says where.
    """
    from jinja2.exceptions import TemplateError

    template = tokenizer.chat_template
    right = _as_read(template.get("default", "") if isinstance(template, dict) else template)
    written = _as_read(engine.template())
    if written != right:
        at = _parting(written, right)
        raise ExportError(
            f"the chat template in the file is not the tokenizer's: from character {at} on "
            f"{written[at : at + 40]!r}, not {right[at : at + 40]!r}"
        )
    compared = 0
    for messages in (*CONVERSATIONS, *more):
        try:
            expected = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError:
            continue
        found = engine.apply_template(messages)
        if found != expected and bos + found != expected:
            at = _parting(found, expected)
            raise ExportError(
                f"llama.cpp renders the chat template otherwise than transformers: from character {at} on "
                f"{found[at : at + 40]!r}, not {expected[at : at + 40]!r}"
            )
        compared += 1
    return compared


def _as_read(template: str) -> str:
    """Line ends as templates are read with, by Jinja and by llama.cpp: ``\\n``, and one less at the very end."""
    return template.replace("\r\n", "\n").removesuffix("\n")


def check_readable(tokenizer: Any) -> None:
    """
    Raises:
        ExportError: the chat template is no Jinja template, so that nothing could render it.
    """
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    if tokenizer.chat_template:
        try:
            tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)
        except TemplateSyntaxError as error:
            raise ExportError(
                f"the chat template of {tokenizer.name_or_path} cannot be read: {error.message}, line {error.lineno}"
            ) from error
        except TemplateError:  # it refuses this conversation, and may take others
            return


def check_stops(engine: LlamaCpp, tokenizer: Any, stops: Sequence[int]) -> int:
    """Let llama.cpp say each stop token, whether or not the model would: its answer must be over then.

    Args:
        stops: the ids that end an answer; the first is the tokenizer's own end, where it has one.

    Returns:
        How many there are.

    Raises:
        ExportError: llama.cpp goes on after one, or takes another token for the end of a text. Names the token.
    """
    for token in stops:
        if not engine.ends_at(token):
            raise ExportError(f"llama.cpp goes on after the stop token {shown(tokenizer, token)}: it would never stop")
    # a file that names no end gets one from llama.cpp: whatever stands at a certain id
    if stops and engine.end_token() != tokenizer.decode(stops[:1]):
        raise ExportError(
            f"llama.cpp takes {engine.end_token()!r} for the end of a text, not {shown(tokenizer, stops[0])}"
        )
    return len(stops)


def _parting(found: Sequence[Any], expected: Sequence[Any]) -> int:
    """Where two sequences begin to differ."""
    at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    return min(len(found), len(expected)) if at is None else at


def _piece(tokenizer: Any, ids: Sequence[int], at: int) -> str:
    return shown(tokenizer, ids[at]) if at < len(ids) else "nothing"


def shown(tokenizer: Any, token: int) -> str:
    """A token for messages: its text and its id."""
    return f"{tokenizer.decode([token])!r} ({token})"
