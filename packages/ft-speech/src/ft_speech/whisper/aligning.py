"""When each word is spoken: the path of Whisper's cross-attention through time.

After the timing of words in OpenAI's whisper (MIT), file whisper/timing.py: the heads that a model names are averaged,
and dynamic time warping finds the way through tokens and time along which they attend most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ft_speech.listening.metrics import UNSPACED
from ft_speech.listening.transcripts import Word
from ft_speech.whisper.vocabulary import Vocabulary

__all__ = ["in_words", "path", "token_times", "without_pauses", "words_of"]

Matrix: TypeAlias = npt.NDArray[np.float32]

ENDS = ".。!！?？"  # noqa: RUF001
LONGEST_MEDIAN = 0.7
"""Seconds: a typical word is no longer, whatever the median of a few says."""


def words_of(
    texts: Sequence[Sequence[int]], times: Sequence[float], tokenizer: Any, language: str | None
) -> list[list[Word]]:
    """The words of each text, with their times.

    Args:
        texts: tokens, of one segment each, all of one window.
        times: where each of these tokens begins, in seconds; and, one more, where the last ends.
        language: of the texts; English of a translation.
    """
    found: list[list[Word]] = []
    place = 0
    for text in texts:
        words = []
        for word, count in in_words(text, tokenizer, language):
            words.append(Word(times[place], times[place + count], word))
            place += count
        found.append(words)
    flat = without_pauses([word for words in found for word in words])
    return [[flat.pop(0) for _ in words] for words in found]


def in_words(tokens: Sequence[int], tokenizer: Any, language: str | None) -> list[tuple[str, int]]:
    """Words, and of how many tokens each is. Punctuation belongs to the word that it stands at."""
    pieces: list[tuple[str, int]] = []  # whole characters
    begun: list[int] = []
    for token in tokens:
        begun.append(token)
        piece = tokenizer.decode(begun)
        if "\ufffd" not in piece or len(begun) >= 4:  # no character has more than four bytes
            pieces.append((piece, len(begun)))
            begun = []
    if begun:
        pieces.append((tokenizer.decode(begun), len(begun)))
    words: list[tuple[str, int]] = []
    for piece, count in pieces:
        begins = piece[:1].isspace() or language in UNSPACED
        spoken = any(character.isalnum() for character in piece)
        waits = bool(words) and not any(character.isalnum() for character in words[-1][0])  # an opening bracket, say
        closes = bool(piece.strip()) and not spoken and not _opens(piece)
        if words and (waits or not begins or closes):
            words[-1] = (words[-1][0] + piece, words[-1][1] + count)
        else:
            words.append((piece, count))
    return [(word.strip(), count) for word, count in words]


def _opens(piece: str) -> bool:
    return piece.strip() in ("(", "[", "{", '"', "“", "«", "¿", "¡", "「", "『", "（")  # noqa: RUF001


def without_pauses(words: Sequence[Word]) -> list[Word]:
    """Words without the pauses between sentences, which the path through time has to spend on one or the other.

    The last word of a sentence that takes more than twice as long as the median word ends, and the first one begins,
    that much from its other edge.
    """
    lengths = [word.end - word.start for word in words if word.end > word.start]
    if not lengths:
        return list(words)
    most = 2 * min(LONGEST_MEDIAN, float(np.median(lengths)))
    cut: list[Word] = []
    for number, word in enumerate(words):
        if word.end - word.start > most:
            if word.text[-1:] in ENDS:
                word = replace(word, end=word.start + most)
            elif number == 0 or words[number - 1].text[-1:] in ENDS:
                word = replace(word, start=word.end - most)
        cut.append(word)
    return cut


def token_times(
    model: Any,
    vocabulary: Vocabulary,
    features: Any,
    frames: Sequence[int],
    texts: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    step: float,
) -> list[list[float]]:
    """Where each token of each text begins in its window, in seconds; and, one more, where the last ends.

    Args:
        features: log-mel spectra, ``[windows, mels, frames]``.
        frames: of each window, how many are of the recording and not of the padding.
        prefixes: what each text follows.
        step: seconds of a position of the encoder.
    """
    import torch

    rows = [[*prefix, *text, vocabulary.end] for prefix, text in zip(prefixes, texts, strict=True)]
    longest = max(map(len, rows))
    ids = [
        [*row, *[vocabulary.end] * (longest - len(row))] for row in rows
    ]  # what follows is not seen by what precedes
    with _attention(model, vocabulary.heads) as seen:
        model(input_features=features, decoder_input_ids=torch.tensor(ids, device=features.device), use_cache=False)
    times = []
    for number, (text, prefix) in enumerate(zip(texts, prefixes, strict=True)):
        # The attention by which a token was written is that of the one before it.
        own = slice(len(prefix) - 1, len(prefix) + len(text))
        weights = seen(number, max(frames[number] // 2, 1))[:, own]
        spread, mean = np.std(weights, axis=1, keepdims=True), np.mean(weights, axis=1, keepdims=True)
        smooth = _median((weights - mean) / np.maximum(spread, 1e-10), model.config.median_filter_width)
        tokens, places = path(-smooth.mean(axis=0))
        first = np.flatnonzero(np.diff(tokens, prepend=-1))
        times.append([float(place) * step for place in places[first]])
    return times


@contextmanager
def _attention(model: Any, heads: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """What gives, after a forward pass, a window's attention ``[heads, tokens, positions]`` over its first positions.

    Kernels that are fast return no attention; queries and keys of the few heads that matter are taken on their way.
    """
    import torch

    layers = model.get_decoder().layers
    queries: dict[int, Any] = {}
    keys: dict[int, Any] = {}
    hooks = []

    def keep(into: dict[int, Any], layer: int) -> Any:
        def hook(module: Any, given: Any, made: Any) -> None:
            into[layer] = made

        return hook

    def seen(number: int, positions: int) -> Matrix:
        rows = []
        for layer, head in heads:
            attention = layers[layer].encoder_attn
            own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            query, key = queries[layer][number, :, own].float(), keys[layer][number, :positions, own].float()
            rows.append(torch.softmax(query @ key.T * attention.head_dim**-0.5, dim=-1))
        result: Matrix = torch.stack(rows).cpu().numpy()
        return result

    try:
        for layer in {layer for layer, _ in heads}:
            attention = layers[layer].encoder_attn
            hooks.append(attention.q_proj.register_forward_hook(keep(queries, layer)))
            hooks.append(attention.k_proj.register_forward_hook(keep(keys, layer)))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _median(weights: Matrix, width: int) -> Matrix:
    """The median of ``width`` neighbours along the last axis, which is mirrored at its ends."""
    half = width // 2
    if weights.shape[-1] <= half:
        return weights
    padded = np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(half, half)], mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1), axis=-1).astype(np.float32)


def path(cost: Matrix) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Dynamic time warping: the cheapest way from one corner of ``cost`` ``[rows, columns]`` to the opposite one.

    Each step goes to the next row, the next column, or both. Sums along a diagonal depend on the two before it alone,
    so that each diagonal is computed at once.

    Returns:
        The rows and the columns of the way, in order.
    """
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    came = np.zeros((rows + 1, columns + 1), np.int8)  # 0: from both, 1: from the row before, 2: from the column before
    for diagonal in range(2, rows + columns + 1):
        row = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        column: npt.NDArray[np.int64] = diagonal - row
        ways = np.stack([total[row - 1, column - 1], total[row - 1, column], total[row, column - 1]])
        # The first of equal ones would prefer both; whisper's own prefers the column, then the row.
        best = 2 - np.argmin(ways[::-1], axis=0)
        came[row, column] = best
        total[row, column] = cost[row - 1, column - 1] + ways[best, np.arange(len(row))]
    row_, column_ = rows, columns
    found: list[tuple[int, int]] = []
    while row_ > 0 and column_ > 0:
        found.append((row_ - 1, column_ - 1))
        step = came[row_, column_]
        row_, column_ = row_ - (step != 2), column_ - (step != 1)
    way = np.array(found[::-1], dtype=np.int64)
    return way[:, 0], way[:, 1]
