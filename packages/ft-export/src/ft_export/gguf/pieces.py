"""SentencePiece tokenizers as llama.cpp reads them: a score for each token, and whether a text gets a space in front.

transformers has such a tokenizer as a BPE with byte fallback: a list of merges, the first of which that can be done is
done first. llama.cpp merges whatever two neighbours make a token, that of the highest score first. The two are the same
where every way to halve a token into two tokens is among the merges, all of one token next to each other, which is how
merges are made from a SentencePiece model. Scores are then those of ``tokenizer.model``, or the tokens' places among
the merges where there is no such file.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ft_export.errors import ExportError

__all__ = ["ADDED_SCORE", "SPACE", "UNUSED_SCORE", "Prefix", "prefix_of", "read_model", "scores_of"]

SPACE = "\u2581"
"""What stands for a space in tokens."""
ADDED_SCORE, UNUSED_SCORE = -1000.0, -10000.0
"""What llama.cpp's converter gives to added tokens and to ids without a token; neither is read."""

Prefix = str
"""When a text gets a space in front: ``never``, ``always``, or ``start``: where no special token stands before it."""


def prefix_of(data: Mapping[str, Any]) -> tuple[Prefix, bool] | None:
    """When a tokenizer puts a space before a text, and whether it does so even if there is one.

    Args:
        data: the tokenizer as ``tokenizer.json`` has it.

    Returns:
        None where its steps are not those of a SentencePiece tokenizer.
    """
    steps = [*_flat(data.get("normalizer"), "normalizers"), *_flat(data.get("pre_tokenizer"), "pretokenizers")]
    prefix, even_before_space, replaced = "never", True, False
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE and not replaced:
            prefix = "always"
        elif kind == "Replace" and (step.get("pattern"), step.get("content")) == ({"String": " "}, SPACE):
            replaced = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE and not step.get("split", True):
            prefix = {"always": "always", "first": "start", "never": "never"}[step.get("prepend_scheme", "always")]
            even_before_space, replaced = False, True
        elif kind == "Split" and step.get("pattern") == {"String": " "} and replaced:
            pass  # Gemma's: there are no spaces any more
        else:
            return None
    return (prefix, even_before_space) if replaced else None


def _flat(step: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[parts]) if step.get("type") == "Sequence" else [step]


def scores_of(
    folder: Path, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Collection[str]
) -> dict[int, float]:
    """The score of each token that is not added, by id.

    Raises:
        ExportError: ``tokenizer.model`` is broken, or there is none and no scores do what the merges do.
    """
    path = folder / "tokenizer.model"
    if path.is_file():
        known = dict(read_model(path))
        if all(token in known for token in vocabulary if token not in added):
            return {index: known[token] for token, index in vocabulary.items() if token not in added}
        # the file of another tokenizer, left in the folder
    places: dict[str, int] = {}
    last = ""
    for pair in merges:
        token = "".join(pair)
        if token != last and token in places:
            raise _not_scores(folder, f"merges of {token!r} do not follow each other")
        places.setdefault(token, len(places))
        last = token
    pairs = set(merges)
    for token in vocabulary:
        if token in added or token.startswith("<0x"):
            continue
        for cut in range(1, len(token)):
            half = token[:cut], token[cut:]
            if half not in pairs and all(part in vocabulary and part not in added for part in half):
                raise _not_scores(folder, f"{half[0]!r} and {half[1]!r} are not merged into {token!r}")
    never = len(places)
    return {index: float(-places.get(token, never)) for token, index in vocabulary.items() if token not in added}


def _not_scores(folder: Path, why: str) -> ExportError:
    return ExportError(
        f"{folder} has merges that are not those of a SentencePiece model ({why}), which is all that GGUF can say of "
        "a tokenizer with byte fallback"
    )


def read_model(path: Path) -> Iterator[tuple[str, float]]:
    """Tokens and scores of a SentencePiece model file, in the order of their ids.

    Source: sentencepiece's ``sentencepiece_model.proto``: ``ModelProto.pieces = 1`` with ``piece = 1, score = 2``.

    Raises:
        ExportError: the file is no such model, or is truncated.
    """
    data = path.read_bytes()
    try:
        for field, value in _fields(data):
            if field == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                text, score = piece.get(1, b""), piece.get(2, b"\0\0\0\0")
                if not isinstance(text, bytes) or not isinstance(score, bytes):
                    raise ValueError("a piece of another type")
                yield text.decode("utf-8"), struct.unpack("<f", score)[0]
    except (ValueError, IndexError, struct.error) as error:
        raise ExportError(f"{path} is not a whole SentencePiece model: {error}; get it again") from error


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: numbers, or bytes, which may be a text, a message or a fixed-size number.

    Raises:
        ValueError, IndexError: it is not one.
    """
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number without an end")

    while at < len(data):
        field, wire = divmod(number(), 8)
        if wire == 0:
            yield field, number()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"a field of the unknown type {wire}")
        size = number() if wire == 2 else 8 if wire == 1 else 4
        if at + size > len(data):
            raise ValueError("it ends too early")
        yield field, data[at : at + size]
        at += size
