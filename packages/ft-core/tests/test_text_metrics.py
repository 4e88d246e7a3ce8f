"""Error rates, exact match and ANLS, against values counted by hand, a plain table of distances, and jiwer."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import jiwer
import pytest

from ft_core.text_metrics import Normalisation, anls, character_error_rate, exact_match, word_error_rate


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The Levenshtein distance by the table that defines it (Wagner and Fischer, 1974)."""
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(other) + 1)] for i in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    return table[-1][-1]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Sentences and what became of them: words and letters changed, lost and added."""
    chance = random.Random(7)
    made = []
    for _ in range(60):
        words = ["".join(chance.choices("abcdeé", k=chance.randint(1, 5))) for _ in range(chance.randint(1, 6))]
        said = [word for word in words if chance.random() > 0.2]
        said = ["".join(chance.choice([c, c, c, "x", "", c + "y"]) for c in word) or "z" for word in said]
        made.append((" ".join(words), " ".join(said)))
    return made


@pytest.mark.parametrize(
    ("answer", "accepted", "cer", "wer"),
    [
        ("kitten", ["sitting"], 3 / 7, 1.0),  # two substitutions and one insertion
        ("the cat sat", ["the cat sat"], 0.0, 0.0),
        ("the cat", ["the cat sat"], 4 / 11, 1 / 3),
        ("the black cat sat", ["the cat sat"], 6 / 11, 1 / 3),
        ("", ["abc d"], 1.0, 1.0),
        ("abc", ["a"], 2.0, 1.0),  # more was said than expected: above one
        ("color", ["colour", "color"], 0.0, 0.0),
        ("abcd", ["abzz", "abcz"], 1 / 4, 1.0),  # the nearest counts
        ("e\u0301te\u0301", ["\u00e9t\u00e9"], 0.0, 0.0),  # one word in two encodings
        (" a\u00a0 b\n", ["a b"], 0.0, 0.0),
    ],
)
def test_error_rates_by_hand(answer: str, accepted: list[str], cer: float, wer: float) -> None:
    assert character_error_rate([answer], [accepted]) == pytest.approx(cer)
    assert word_error_rate([answer], [accepted]) == pytest.approx(wer)


def test_error_rates_are_sums_over_sums() -> None:
    # one of 3 characters wrong, none of 7: 1 / 10, where the mean of the rates would be 1 / 6
    assert character_error_rate(["abx", "abcdefg"], [["abc"], ["abcdefg"]]) == pytest.approx(0.1)
    # what is said where nothing was expected is inserted
    assert character_error_rate(["ab", "xy"], [[""], ["xy"]]) == pytest.approx(1.0)
    assert character_error_rate(["ab"], [[""]]) is None
    assert word_error_rate([], []) is None


def test_error_rates_equal_a_plain_table(pairs: list[tuple[str, str]]) -> None:
    expected, said = [a for a, _ in pairs], [b for _, b in pairs]
    accepted = [[text] for text in expected]
    edits = sum(distance(a, b) for a, b in pairs)
    assert edits > 100
    assert character_error_rate(said, accepted) == pytest.approx(edits / sum(map(len, expected)), rel=1e-12)
    edits = sum(distance(a.split(), b.split()) for a, b in pairs)
    assert word_error_rate(said, accepted) == pytest.approx(edits / sum(len(a.split()) for a in expected), rel=1e-12)


def test_error_rates_equal_those_of_jiwer(pairs: list[tuple[str, str]]) -> None:
    expected, said = [a for a, _ in pairs], [b for _, b in pairs]
    accepted = [[text] for text in expected]
    assert character_error_rate(said, accepted) == pytest.approx(jiwer.cer(expected, said), rel=1e-12)
    assert word_error_rate(said, accepted) == pytest.approx(jiwer.wer(expected, said), rel=1e-12)


@pytest.mark.parametrize(
    ("answer", "accepted", "value"),
    [
        ("Paris", ["paris"], 1.0),  # without case
        ("  new   york ", ["New York"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abzz"], 0.0),  # half of it wrong: the threshold itself counts for nothing
        ("abc", ["abz"], 2 / 3),
        ("12.4", ["12.5", "12.40"], 0.8),  # 3 / 4 and 4 / 5: the more similar
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("abcdef", ["abc"], 0.0),
    ],
)
def test_anls_by_hand(answer: str, accepted: list[str], value: float) -> None:
    assert anls([answer], [accepted]) == pytest.approx(value)


def test_anls_is_a_mean_over_questions(pairs: list[tuple[str, str]]) -> None:
    assert anls(["abc", "zzz"], [["abz"], ["abc"]]) == pytest.approx(1 / 3)
    assert anls(["abcd"], [["abzz"]], threshold=0.6) == pytest.approx(0.5)
    assert anls([], []) is None
    total = 0.0
    for one, other in pairs:
        far = distance(one, other) / max(len(one), len(other))
        total += 1 - far if far < 0.5 else 0
    found = anls([b for _, b in pairs], [[a] for a, _ in pairs])
    assert found == pytest.approx(total / len(pairs), rel=1e-12)
    assert 0 < total < len(pairs)


@pytest.mark.parametrize(
    ("normalisation", "right"),
    [
        (Normalisation(), [True, False, True, False]),
        (Normalisation(ignore_case=True), [True, True, True, False]),
        (Normalisation(whitespace="strip"), [True, False, False, False]),
        (Normalisation(whitespace="keep"), [False, False, False, False]),
    ],
)
def test_exact_match_after_what_makes_no_difference(normalisation: Normalisation, right: list[bool]) -> None:
    answers = ["two words\n", "Two words", "two  words", "twowords"]
    assert exact_match(answers, [["2 words", "two words"]] * 4, normalisation) == right


def test_case_folding_is_unicodes() -> None:
    folded = Normalisation(ignore_case=True)
    assert exact_match(["STRASSE"], [["straße"]], folded) == [True]
    assert character_error_rate(["ABC"], [["abd"]], folded) == pytest.approx(1 / 3)
    assert character_error_rate(["ABC"], [["abd"]]) == pytest.approx(1.0)
    assert word_error_rate(["A b"], [["a B"]], folded) == 0.0


@pytest.mark.parametrize("measure", [character_error_rate, word_error_rate, exact_match, anls])
def test_what_does_not_fit_together_is_refused(measure: object) -> None:
    with pytest.raises(ValueError, match="2 answers, but accepted ones for 1"):
        measure(["a", "b"], [["a"]])  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"accepted\[1\] must be a list of one text or more"):
        measure(["a", "b"], [["a"], []])  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"accepted\[0\] must be a list"):
        measure(["a"], ["a"])  # type: ignore[operator]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ImportError, match=r"need rapidfuzz: pip install 'ft-core\[metrics\]'"):
        anls(["a"], [["a"]])
