"""What a reward must not return: it is named with the sample, and handled as the configuration says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from ft_core.errors import DataError, RunError
from ft_rl.rewards import Reward
from ft_rl.rewards.samples import SampleErrors, score_each

PROMPTS = ["first question", "second question", "third question", "fourth question"]
COMPLETIONS = ["1", "2", "bad", "4"]


def raises_on_bad(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(text) for text in completions]


def per_sample(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return score_each(len(completions), lambda i: float(completions[i]))


def fixed(*values: Any) -> Callable[..., Any]:
    return lambda prompts, completions, **columns: list(values)


def test_what_it_returns_is_checked_and_made_floats() -> None:
    function = fixed(1, True, numpy.float32(0.5), torch.tensor(2.5))
    values = Reward(function, name="r")(prompts=PROMPTS, completions=COMPLETIONS)
    assert values == [1.0, 1.0, 0.5, 2.5]
    assert all(type(value) is float for value in values)
    for whole in (torch.tensor([1.0, 2.0, 3.0, 4.0]), numpy.arange(1, 5), (1, 2, 3, 4)):
        reward = Reward(lambda prompts, completions, whole=whole, **columns: whole, name="r")
        assert reward(prompts=PROMPTS, completions=COMPLETIONS) == [1.0, 2.0, 3.0, 4.0]


def test_none_is_no_fault() -> None:
    reward = Reward(fixed(1, None, 0, None), name="r")
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == [1.0, None, 0.0, None]
    assert (reward.faults, reward.samples) == (0, 4)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            raises_on_bad,
            "reward 'r': sample 3 of 4 (prompt 'third question'): raises ValueError: could not convert string to "
            "float: 'bad' (test_faults.py, line ",
        ),
        (per_sample, "reward 'r': sample 3 of 4 (prompt 'third question'): ValueError: could not convert string to"),
        (fixed(0, float("nan"), 0, 0), "reward 'r': sample 2 of 4 (prompt 'second question'): returns nan; on_error: "),
        (fixed(0, 0, 0, float("-inf")), "reward 'r': sample 4 of 4 (prompt 'fourth question'): returns -inf; "),
        (
            fixed(0, torch.tensor(float("nan")), 0, 0),
            "reward 'r': sample 2 of 4 (prompt 'second question'): returns nan",
        ),
        (fixed(0, 0, "1.0", 0), "reward 'r': sample 3 of 4 (prompt 'third question'): returns '1.0' (str), no number"),
        (fixed([0], 0, 0, 0), "reward 'r': sample 1 of 4 (prompt 'first question'): returns [0] (list), no number"),
        (
            fixed(0, 0, 0),
            "reward 'r': sample 1 of 4 (prompt 'first question'): returns 3 values for 4 samples (and 3 more)",
        ),
        (
            lambda **_: 0.5,
            "reward 'r': sample 1 of 4 (prompt 'first question'): returns 0.5 (float), no list of numbers",
        ),
        (lambda **_: None, "reward 'r': sample 1 of 4 (prompt 'first question'): returns None (NoneType), no list"),
    ],
)
def test_stop(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(RunError) as caught:
        Reward(function, name="r")(prompts=PROMPTS, completions=COMPLETIONS)
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("on_error: skip or zero would go on")


@pytest.mark.parametrize(("on_error", "instead"), [("skip", None), ("zero", 0.0)])
@pytest.mark.parametrize("function", [raises_on_bad, per_sample, fixed(1, 2, float("nan"), 4), fixed(1, 2, "bad", 4)])
def test_skip_and_zero_leave_the_other_samples_alone(on_error: Any, instead: float | None, function: Any) -> None:
    lines: list[str] = []
    reward = Reward(function, name="r", on_error=on_error, say=lines.append)
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == [1.0, 2.0, instead, 4.0]
    assert (reward.faults, reward.samples) == (1, 4)
    (line,) = lines
    assert line.startswith("reward 'r': sample 3 of 4 (prompt 'third question'): ")
    assert line.endswith("; skipped" if on_error == "skip" else "; counted as 0")


def test_a_wrong_number_of_values_is_a_fault_of_all() -> None:
    lines: list[str] = []
    reward = Reward(fixed(1, 2, 3), name="r", on_error="skip", say=lines.append)
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == [None] * 4
    assert len(lines) == 4  # three in full, then the number
    assert lines[-1] == "reward 'r': 4 of 4 samples so far failed and were skipped"


def test_one_that_fails_on_the_batch_alone() -> None:
    def whole(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if len(prompts) > 1:
            raise RuntimeError("too many")
        return [1.0]

    with pytest.raises(
        RunError, match=r"raises RuntimeError: too many .*, on the whole batch but on no sample of it alone"
    ):
        Reward(whole, name="r")(prompts=PROMPTS, completions=COMPLETIONS)


def test_single_calls_get_the_samples_own_columns_and_log_nothing_twice() -> None:
    seen, logged = [], []

    def function(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        columns["log_metric"]("calls", 1.0)
        columns["log_extra"]("column", list(prompts))
        seen.append((prompts, columns["answer"], columns["trainer_state"]))
        return [float(text) for text in completions]

    reward = Reward(function, name="r", on_error="skip", say=lambda line: None)
    values = reward(
        prompts=PROMPTS,
        completions=COMPLETIONS,
        answer=list("abcd"),
        trainer_state="state",
        log_metric=lambda name, value: logged.append((name, value)),
        log_extra=lambda name, values: logged.append((name, len(values))),
    )
    assert values == [1.0, 2.0, None, 4.0]
    assert seen[0] == (PROMPTS, list("abcd"), "state")
    assert seen[1:] == [([p], [a], "state") for p, a in zip(PROMPTS, "abcd", strict=True)]
    assert logged == [("calls", 1.0), ("column", 4), ("rewards/r/faults", 0.25)]


def test_many_faults_are_counted_aloud_at_each_doubling() -> None:
    lines: list[str] = []
    reward = Reward(fixed(float("nan")), name="r", on_error="zero", say=lines.append)
    for _ in range(100):
        assert reward(prompts=["p"], completions=["c"]) == [0.0]
    assert [line.partition(": ")[2].partition(" (")[0] for line in lines[:3]] == ["sample 1 of 1"] * 3
    assert lines[3:] == [
        f"reward 'r': {n} of {n} samples so far failed and were counted as 0" for n in (4, 8, 16, 32, 64)
    ]
    assert reward.faults == 100


def test_a_mistake_in_the_configuration_is_no_fault_of_a_sample() -> None:
    def function(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        raise DataError("no such column")

    with pytest.raises(DataError, match=r"^reward 'r': no such column$"):
        Reward(function, name="r", on_error="skip")(prompts=PROMPTS, completions=COMPLETIONS)


def test_what_errors_of_samples_hold() -> None:
    with pytest.raises(SampleErrors) as caught:
        per_sample(PROMPTS, COMPLETIONS)
    assert caught.value.values == [1.0, 2.0, None, 4.0]
    assert list(caught.value.errors) == [2]


def test_a_long_prompt_and_messages_are_shown_short() -> None:
    for prompt in ("word " * 100, [{"role": "system", "content": "x"}, {"role": "user", "content": "word " * 100}]):
        with pytest.raises(RunError) as caught:
            Reward(fixed(float("nan")), name="r")(prompts=[prompt], completions=["c"])
        shown = str(caught.value).partition("(prompt '")[2].partition("')")[0]
        assert len(shown) == 60
        assert shown.startswith("word word")


def test_an_empty_batch() -> None:
    assert Reward(fixed(), name="r")(prompts=[], completions=[]) == []
