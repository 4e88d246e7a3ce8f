"""The rewards that compare text (exact-match, numeric, regex, format, length), and the parts that they judge."""

from __future__ import annotations

import math
import random
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_core.errors import DataError, RunError
from ft_rl.rewards import resolve_rewards
from ft_rl.rewards.extraction import Part, boxed, extract, in_tag
from ft_rl.rewards.length import near_target, soft_overlong
from ft_rl.rewards.numeric import last_number
from ft_rl.rewards.samples import text_of


def score(name: str, completion: Any, *, settings: dict[str, Any] | None = None, **columns: Any) -> float | None:
    (reward,) = resolve_rewards([{"name": name, **(settings or {})}]).functions
    (value,) = reward(prompts=["p"], completions=[completion], **{key: [column] for key, column in columns.items()})
    return value


# -- parts


def test_a_completion_of_messages() -> None:
    turns = [
        {"role": "assistant", "content": "let me look"},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": [{"type": "text", "text": "it is "}, {"type": "text", "text": "7"}]},
    ]
    assert text_of(turns) == "it is 7"
    assert text_of(turns[:2]) == "let me look"
    assert text_of([{"role": "assistant", "content": None, "tool_calls": []}]) == ""
    assert text_of([]) == ""
    assert score("exact-match", turns, answer="it is 7") == 1.0


@pytest.mark.parametrize(
    ("part", "text", "found"),
    [
        ("whole", " a\nb ", "a\nb"),
        ("last-line", "a\nb \n \n", "b"),
        ("last-line", "\n", None),
        ("boxed", r"\boxed{1} then \boxed{\frac{1}{2}} ends", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} then \boxed{2", "1"),
        ("boxed", r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        ("boxed", r"\fbox{3}", "3"),
        ("boxed", "3", None),
        ("tag", "<answer>1</answer> <answer> 2 </answer> <answer>", "2"),
        ("tag", "<answer>1", None),
        ("tag", "</answer>1<answer>", None),
        ("marker", "so #### 3\n#### 4\nthe end", "4"),
        ("marker", "so ####\n\n 4 \nthe end", "4"),
        ("marker", "4", None),
        ("marker", "4 ####  ", None),
    ],
)
def test_parts(part: Any, text: str, found: str | None) -> None:
    assert extract(text, Part(part=part)) == found


def test_tags_and_markers_of_the_users() -> None:
    assert extract("<a>1</a><b>2</b>", Part(part="tag", tag="a")) == "1"
    assert extract("Answer: 5", Part(part="marker", marker="Answer:")) == "5"


@given(st.text(alphabet="\\boxed{}a ", max_size=60))
def test_no_text_breaks_the_search_for_boxes(text: str) -> None:
    found = boxed(text)
    assert found is None or f"{{{found}}}" in text


@given(st.lists(st.sampled_from(["<a>", "</a>", "x"]), max_size=12))
def test_what_a_tag_holds_was_closed(parts: list[str]) -> None:
    text = "".join(parts)
    found = in_tag(text, "a")
    assert (found is not None) == ("<a>" in text[: max(text.rfind("</a>"), 0)])
    assert found is None or f"<a>{found}</a>" in text


def test_many_boxes_are_found_in_no_time() -> None:
    start = time.perf_counter()
    boxed("\\boxed{" * 100_000)
    assert time.perf_counter() - start < 5


# -- exact-match


@pytest.mark.parametrize(
    ("completion", "answer", "settings", "value"),
    [
        ("Paris", "Paris", {}, 1.0),
        (" Paris\n", "Paris", {}, 1.0),
        ("New  York", "New York", {}, 1.0),
        ("New  York", "New York", {"ignore_space": False}, 0.0),
        ("paris", "Paris", {}, 0.0),
        ("STRASSE", "straße", {"ignore_case": True}, 1.0),
        ("It's Paris.", "Its Paris", {"ignore_punctuation": True}, 1.0),
        ("It's Paris.", "Its Paris", {}, 0.0),
        ("e\u0301te\u0301", "\u00e9t\u00e9", {}, 1.0),
        ("Lyon", ["Paris", "Lyon"], {}, 1.0),
        ("7", 7, {}, 1.0),
        ("<answer>7</answer>", "7", {"part": "tag"}, 1.0),
        ("7", "7", {"part": "tag"}, 0.0),
        ("I add.\n#### 72", "We add.\n#### 72", {"part": "marker", "column_part": "marker"}, 1.0),
        ("", "7", {}, 0.0),
    ],
)
def test_exact_match(completion: str, answer: Any, settings: dict[str, Any], value: float) -> None:
    assert score("exact-match", completion, settings=settings, answer=answer) == value


def test_the_columns_of_exact_match() -> None:
    assert score("exact-match", "b", solution="b") == 1.0
    assert score("exact-match", "a", solution="b", answer="a") == 1.0
    assert score("exact-match", "c", settings={"column": "gold"}, gold="c", answer="a") == 1.0
    with pytest.raises(RunError, match="the row's answer or solution 'None' holds no answer"):
        score("exact-match", "c", answer=None)


# -- numeric


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("So it is 72.", 72),
        ("first 5, then 72", 72),
        ("-1,234.50", Fraction(-2469, 2)),
        ("\u22123", -3),
        ("$ 1,000,000", 1000000),
        ("1e-3", Fraction(1, 1000)),
        ("2.5E+2", 250),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("2 1/2", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("50%", 50),
        ("€3.20", Fraction(16, 5)),
        ("none", None),
        ("room B12", None),
        ("from 10-3", 3),
        ("5 - 3", 3),
        ("x=-3", -3),
        ("-$5", -5),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("1,2", 2),
        ("", None),
    ],
)
def test_the_last_number(text: str, value: Fraction | None) -> None:
    start = time.perf_counter()
    assert last_number(text) == value
    assert time.perf_counter() - start < 1


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_every_way_to_write_a_number_reads_the_same(whole: int, places: int) -> None:
    value = Fraction(whole, 10**places)
    sign, digits = ("-" if whole < 0 else ""), str(abs(whole)).rjust(places + 1, "0")
    before, after = (digits[:-places], digits[-places:]) if places else (digits, "")
    plain = f"{sign}{before}" + (f".{after}" if after else "")
    grouped = f"{sign}{int(before):,}" + (f".{after}" if after else "")
    for text in (plain, grouped, f"{plain}e0", f"it is {plain}.", f"{whole}/{10**places}"):
        assert last_number(text) == value


@pytest.mark.parametrize(
    ("completion", "answer", "settings", "value"),
    [
        ("The total is $1,234.00", "1234", {}, 1.0),
        ("0.5", "1/2", {}, 1.0),
        ("0.3333", "1/3", {}, 0.0),
        ("0.3333", "1/3", {"tolerance": 1e-4}, 1.0),
        ("99", 100, {"relative": 0.01}, 1.0),
        ("98.9", 100, {"relative": 0.01}, 0.0),
        ("50%", "0.5", {"percent": "divide"}, 1.0),
        ("50%", "50", {}, 1.0),
        ("3", [1, 2, 3], {}, 1.0),
        ("no idea", "3", {}, 0.0),
        (r"\boxed{3} or 4", "3", {"part": "boxed"}, 1.0),
    ],
)
def test_numeric(completion: str, answer: Any, settings: dict[str, Any], value: float) -> None:
    assert score("numeric", completion, settings=settings, answer=answer) == value


def test_a_row_without_a_number() -> None:
    with pytest.raises(RunError, match="the row's answer or solution 'many' holds no number"):
        score("numeric", "3", answer="many")


# -- regex and format


@pytest.mark.parametrize(
    ("completion", "settings", "value"),
    [
        ("a 7", {"pattern": r"\d"}, 1.0),
        ("a 7", {"pattern": r"\d", "match": "full"}, 0.0),
        (" 7\n", {"pattern": r"\d", "match": "full"}, 1.0),
        ("a\nb", {"pattern": "a.b"}, 1.0),
        ("ABC", {"pattern": "abc"}, 0.0),
        ("ABC", {"pattern": "abc", "ignore_case": True}, 1.0),
    ],
)
def test_regex(completion: str, settings: dict[str, Any], value: float) -> None:
    assert score("regex", completion, settings=settings) == value


GOOD = "<think>\nhm\n</think>\n<answer>7</answer>"


@pytest.mark.parametrize(
    ("completion", "settings", "value"),
    [
        (GOOD, {}, 1.0),
        (GOOD + "\n", {}, 1.0),
        (GOOD + " so", {}, 0.0),
        (GOOD + " so", {"outside": True}, 1.0),
        ("<answer>7</answer><think>hm</think>", {}, 0.0),
        ("<answer>7</answer><think>hm</think>", {"partial": True}, 0.75),
        ("<think>hm<answer>7</answer></think>", {}, 0.0),
        ("<think>a</think><think>b</think><answer>7</answer>", {}, 0.0),
        ("<think>hm</think> 7", {"partial": True}, 0.5),
        ("7", {"partial": True}, 0.0),
        ("hm</think><answer>7</answer>", {"opened": True}, 1.0),
        ("hm</think><answer>7</answer>", {}, 0.0),
        ("<a>1</a>", {"tags": ["a"]}, 1.0),
        ("<think>a</think><think>b</think><answer>7</answer>", {"outside": True}, 0.0),
    ],
)
def test_format(completion: str, settings: dict[str, Any], value: float) -> None:
    assert score("format", completion, settings=settings) == value


def test_a_long_answer_without_form_is_judged_in_no_time() -> None:
    start = time.perf_counter()
    for settings in ({}, {"outside": True}, {"partial": True}):
        score("format", "<think>" + "a <b> " * 50_000 + "</think><answer></answer", settings=settings)
    assert time.perf_counter() - start < 5


# -- length


def lengths(counts: list[int], **settings: Any) -> list[float | None]:
    (reward,) = resolve_rewards([{"name": "length", **settings}]).functions
    return reward(
        prompts=["p"] * len(counts), completions=["x"] * len(counts), completion_ids=[[0] * n for n in counts]
    )


def test_dapos_punishment_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    dice = random.Random(0)
    for _ in range(200):
        most = dice.randint(1, 300)
        buffer = dice.randint(0, most)
        counts = [dice.randint(0, 350) for _ in range(8)] + [most, most + 1, most - buffer, most - buffer + 1]
        theirs = get_soft_overlong_punishment(most, buffer)([[0] * n for n in counts])
        assert lengths(counts, max=most, buffer=buffer) == theirs
    assert lengths([80, 90, 100, 101], max=100) == [0.0, -0.5, -1.0, -1.0]  # a fifth before it, unless set
    assert [soft_overlong(n, 10, 0) for n in (10, 11)] == [0.0, -1.0]


def test_a_target() -> None:
    assert lengths([10, 5, 15, 0, 20, 40], target=10) == [1.0, 0.5, 0.5, 0.0, 0.0, 0.0]
    assert lengths([10, 12], target=10, slope=2.0) == pytest.approx([1.0, 0.6])
    assert math.isclose(near_target(11, 10, 0.5), 0.95)


def test_other_units() -> None:
    assert score("length", "one two three", settings={"target": 3, "unit": "words"}) == 1.0
    assert score("length", "abcd", settings={"target": 4, "unit": "characters"}) == 1.0
    with pytest.raises(DataError, match="reward 'length': the tokens are not known here: set unit to "):
        score("length", "abcd", settings={"target": 4})
