from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from ft_speech.listening.transcripts import Word
from ft_speech.whisper.aligning import _attention, in_words, path, token_times, without_pauses


def cheapest(cost: np.ndarray) -> float:
    """By every way there is."""
    rows, columns = cost.shape
    best = np.inf
    steps = {0: (1, 0), 1: (0, 1), 2: (1, 1)}
    for length in range(max(rows, columns) - 1, rows + columns - 1):
        for way in product(steps, repeat=length):
            row = column = 0
            total = cost[0, 0]
            for step in way:
                row, column = row + steps[step][0], column + steps[step][1]
                if row >= rows or column >= columns:
                    break
                total += cost[row, column]
            else:
                if (row, column) == (rows - 1, columns - 1):
                    best = min(best, total)
    return float(best)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (4, 1), (3, 4), (4, 3), (2, 5)])
def test_the_path_is_the_cheapest(rows: int, columns: int) -> None:
    for seed in range(5):
        cost = np.random.default_rng(seed).standard_normal((rows, columns))
        down, along = path(cost)
        assert (down[0], along[0], down[-1], along[-1]) == (0, 0, rows - 1, columns - 1)
        assert set(zip(np.diff(down), np.diff(along), strict=True)) <= {(1, 0), (0, 1), (1, 1)}
        assert cost[down, along].sum() == pytest.approx(cheapest(cost), abs=1e-12)


def test_the_path_is_that_of_transformers() -> None:
    from transformers.models.whisper.generation_whisper import _dynamic_time_warping

    for seed in range(5):
        cost = np.random.default_rng(seed).standard_normal((9, 40))
        for mine, theirs in zip(path(cost), _dynamic_time_warping(cost), strict=True):
            assert np.array_equal(mine, theirs)


class Pieces:
    """A tokenizer whose tokens are these bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "language", "words"),
    [
        ([b" Hello", b",", b" wor", b" ld", b"!"], "en", ["Hello,", "wor", "ld!"]),
        ([b" (", b"Na", b"\xc3", b"\xaf", b"ve", b")", b" caf", b"\xc3\xa9"], "fr", ["(Na\u00efve)", "caf\u00e9"]),
        ([b" Wait", b" -", b" what", b"?"], "en", ["Wait -", "what?"]),
        ([b"Stra", b"\xc3\x9f", b"e", b" ", b"1"], "de", ["Stra\u00dfe", "1"]),
        (["\u4eca".encode()[:2], "\u4eca".encode()[2:], "\u5929".encode(), "\u3002".encode(), "\u597d".encode()], "zh",
         ["\u4eca", "\u5929\u3002", "\u597d"]),
        ([b"\xf0", b"\x9f", b"\xa6", b"\x8a", b" fox"], "en", ["\U0001f98a fox"]),
        ([b" cut", b"\xf0"], "en", ["cut\ufffd"]),
        ([], "en", []),
    ],
)  # fmt: skip
def test_words_are_whole_characters_with_their_punctuation(
    pieces: list[bytes], language: str, words: list[str]
) -> None:
    found = in_words(range(len(pieces)), Pieces(*pieces), language)
    assert [word for word, _ in found] == words
    assert sum(count for _, count in found) == len(pieces)


def test_a_pause_is_no_part_of_the_words_around_it() -> None:
    words = [
        Word(0.0, 0.3, "I"),
        Word(0.3, 0.6, "see."),
        Word(0.6, 3.0, "You"),
        Word(3.0, 3.3, "do."),
        Word(3.3, 9, "B."),
    ]
    found = without_pauses(words)
    # The median is 0.3 s, so that a word is 0.6 s long at most.
    assert [(word.start, word.end) for word in found] == [
        (0.0, 0.3), (0.3, 0.6), (pytest.approx(2.4), 3.0), (3.0, 3.3), (3.3, pytest.approx(3.9)),
    ]  # fmt: skip
    assert without_pauses([]) == []


def test_attention_is_taken_as_the_layers_compute_it(tiny: Path) -> None:
    """Against the weights that transformers' slow attention returns."""
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(tiny).eval()
    slow = WhisperForConditionalGeneration.from_pretrained(tiny, attn_implementation="eager").eval()
    features = torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[260, 258, 262, 5, 6], [260, 258, 262, 7, 8]])
    heads = [(0, 1), (1, 0)]
    with torch.inference_mode():
        with _attention(model, heads) as seen:
            model(input_features=features, decoder_input_ids=ids, use_cache=False)
        whole = slow(input_features=features, decoder_input_ids=ids, use_cache=False, output_attentions=True)
    assert not any(module._forward_hooks for module in model.modules())
    for number in range(2):
        expected = torch.stack([whole.cross_attentions[layer][number, head] for layer, head in heads])
        # Two float32 products of 64 terms and an exponential: some 1e-6.
        np.testing.assert_allclose(seen(number, 100), expected.numpy(), atol=5e-6)
        part = expected[..., :60] / expected[..., :60].sum(-1, keepdim=True)  # as if the padding were not there
        np.testing.assert_allclose(seen(number, 60), part.numpy(), atol=5e-6)


def test_times_follow_the_attention(tiny: Path) -> None:
    """A decoder whose queries meet, token after token, the keys of later and later positions."""
    from transformers import WhisperForConditionalGeneration

    from ft_speech.whisper.vocabulary import Vocabulary

    model = WhisperForConditionalGeneration.from_pretrained(tiny).eval()
    places = [10, 25, 40, 70]

    class Fixed(torch.nn.Module):
        def __init__(self, made: torch.Tensor) -> None:
            super().__init__()
            self.made = made

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.made.expand(hidden.shape[0], -1, -1)

    layer = model.get_decoder().layers[0].encoder_attn
    keys = torch.zeros(1, 100, 128)
    keys[0, :, :64] = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    queries = torch.zeros(1, 6, 128)  # the last one's, at the end's token, is not looked at
    spans = [(0, 10), (10, 25), (25, 40), (40, 70), (70, 80)]
    for row, (start, end) in enumerate(spans):  # a token looks at its own stretch alone
        queries[0, row, :64] = 8 * torch.linalg.lstsq(keys[0, :80, :64], 20 * _mark(start, end)).solution
    layer.k_proj, layer.q_proj = Fixed(keys), Fixed(queries)
    known = Vocabulary(260, 256, 264, 266, {}, {}, ((0, 0),))
    with torch.inference_mode():
        (times,) = token_times(model, known, torch.zeros(1, 80, 200), [160], [[1, 2, 3, 4]], [[260]], 0.02)
    # The median of seven positions and the fit of 80 places by 64 numbers blur an edge by a few positions, 0.02 s each.
    assert np.abs(np.array(times) - [0.0, *(place * 0.02 for place in places)]).max() <= 0.1


def _mark(start: int, end: int) -> torch.Tensor:
    wanted = torch.zeros(80)
    wanted[start:end] = 1
    return wanted
