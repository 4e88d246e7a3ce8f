from __future__ import annotations

import pytest

from ft_speech.listening.metrics import normalizer_of, word_and_character_errors


def test_rates_are_edits_by_what_was_expected() -> None:
    # one word of four substituted, one inserted; characters: b -> x, and " e" inserted, of 7
    found = word_and_character_errors(["a x c d e"], ["a b c d"], normalizer="none")
    assert found == {"wer": 2 / 4, "cer": 3 / 7}
    # sums over all texts, not means of rates
    assert word_and_character_errors(["a", "b c d"], ["x", "b c d"], normalizer="none")["wer"] == 1 / 4


def test_nothing_expected() -> None:
    assert word_and_character_errors(["a b"], [""], "en") == {"wer": None, "cer": None}
    # what is written where nothing was said counts
    assert word_and_character_errors(["a b", "c"], ["", "c"], normalizer="none") == {"wer": 2.0, "cer": 3.0}
    assert word_and_character_errors([""], ["a b"], normalizer="none") == {"wer": 1.0, "cer": 1.0}


def test_normalisers() -> None:
    said, wanted = ["Twenty-five dollars, isn't it?"], ["$25 is not it"]
    assert word_and_character_errors(said, wanted, "en")["wer"] == 0
    assert word_and_character_errors(said, wanted, "de")["wer"] != 0
    assert word_and_character_errors(["Grüße!"], ["grüße"], "de")["wer"] == 0
    assert word_and_character_errors(["Grüße!"], ["grüße"], normalizer="none")["wer"] == 1
    assert word_and_character_errors(["colour"], ["color"], "en", spellings={"colour": "color"})["wer"] == 0
    # each character is a word where there are no spaces
    assert word_and_character_errors(["你号"], ["你好"], "zh")["wer"] == 0.5
    # each text by its own language
    mixed = word_and_character_errors(["two", "zwei"], ["2", "2"], ["en", "de"])
    assert mixed["wer"] == 0.5
    assert word_and_character_errors(["A"], ["a"], normalizer="none", also=str.casefold)["wer"] == 0
    assert normalizer_of("en", "basic")("It's (so)") == "it s "


def test_as_many_answers() -> None:
    with pytest.raises(ValueError, match="1 answers, but 2 expected"):
        word_and_character_errors(["a"], ["a", "b"])
