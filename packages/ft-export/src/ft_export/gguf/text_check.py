"""Tokens and chat template in llama.cpp against transformers: both must be equal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ft_export.errors import ExportError
from ft_export.gguf.engine import LlamaCpp

__all__ = ["check_template", "check_tokens", "rendered", "shown"]

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
                at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
                at = min(len(found), len(expected)) if at is None else at
                raise ExportError(
                    f"llama.cpp splits {text[:60]!r} otherwise than the tokenizer: token {at} is "
                    f"{_piece(tokenizer, found, at)}, not {_piece(tokenizer, expected, at)}; {advice}"
                )
    return len(texts)


def check_template(engine: LlamaCpp, tokenizer: Any, more: Sequence[Sequence[dict[str, Any]]], bos: str) -> int:
    """Compare the chat template, byte for byte, on conversations of several shapes.

    llama.cpp leaves out a leading ``bos`` that tokenizing adds again; pass "" where it does not.

    Returns:
        How many conversations were compared; a shape that the template itself refuses does not count.

    Raises:
        ExportError: they differ; says where.
    """
    from jinja2.exceptions import TemplateError

    compared = 0
    for messages in (*CONVERSATIONS, *more):
        try:
            expected = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError:
            continue
        found = engine.apply_template(messages)
        if found != expected and bos + found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
            at = min(len(found), len(expected)) if at is None else at
            raise ExportError(
                f"llama.cpp renders the chat template otherwise than transformers: from character {at} on "
                f"{found[at : at + 40]!r}, not {expected[at : at + 40]!r}"
            )
        compared += 1
    return compared


def _piece(tokenizer: Any, ids: Sequence[int], at: int) -> str:
    return shown(tokenizer, ids[at]) if at < len(ids) else "nothing"


def shown(tokenizer: Any, token: int) -> str:
    """A token for messages: its text and its id."""
    return f"{tokenizer.decode([token])!r} ({token})"
