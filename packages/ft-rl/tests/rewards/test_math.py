"""The reward `math`, by the real math-verify; its time limit, in threads too."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ft_core.errors import RunError
from ft_rl.rewards import resolve_rewards
from ft_rl.rewards.symbolic import Comparer

HANGS = "$2^{10^{10^{10}}}$"


pytest.importorskip("math_verify", reason='math-verify is not installed: pip install "ft-rl[math]"')


@pytest.fixture(scope="module")
def reward() -> Any:
    (found,) = resolve_rewards(["math"]).functions
    yield found
    found.function.comparer.close()


@pytest.mark.parametrize(
    ("completion", "gold", "value"),
    [
        ("0.5", "1/2", 1.0),
        ("1/2", r"\frac{1}{2}", 1.0),
        (r"$\frac{2}{4}$", r"\frac12", 1.0),
        ("(x+1)^2", "x^2+2x+1", 1.0),
        ("The answer is $(x+1)^2$.", "$x^2+2x+1$", 1.0),
        (r"\frac{1}{\sqrt 2}", r"\sqrt{2}/2", 1.0),
        ("So it is 72.", "72", 1.0),
        ("So it is 73.", "72", 0.0),
        ("2y", "2x", 0.0),
        ("x+x", "2x", 1.0),
        ("1", "sin(x)^2 + cos(x)^2", 1.0),
        (r"so \boxed{5}", "5", 1.0),
        (r"\{2,1\}", r"\{1,2\}", 1.0),
        ("(2,1)", "(1,2)", 0.0),
        ("9.42", r"3\pi", 0.0),
        ("7", ["6", "7"], 1.0),
        ("", "7", 0.0),
        ("I cannot say.", "7", 0.0),
    ],
)
def test_formulas(reward: Any, completion: str, gold: Any, value: float) -> None:
    assert reward(prompts=["p"], completions=[completion], answer=[gold]) == [value]


def test_an_answer_is_no_program(reward: Any, tmp_path: Any) -> None:
    for word in ("", "$"):
        answer = f"{word}__import__('os').system('touch {tmp_path}/here'){word}"
        reward(prompts=["p"], completions=[answer], answer=["1"])
    assert os.listdir(tmp_path) == []


def test_a_right_answer_that_cannot_be_read(reward: Any) -> None:
    with pytest.raises(
        RunError, match=r"sample 2 of 2 .* the right answer 'hello world' is no formula that math-verify"
    ):
        reward(prompts=["p", "q"], completions=["1", "1"], answer=["1", "hello world"])


def test_a_comparison_that_takes_too_long_ends_and_the_next_one_works() -> None:
    comparer = Comparer(seconds=3.0)
    assert comparer.equal(["1/2"], "0.5")  # the process has started
    start = time.monotonic()
    assert comparer.equal([HANGS], "5") is False
    assert 2.9 < time.monotonic() - start < 20
    assert comparer.timeouts == 1
    assert comparer.equal(["1/2"], "0.5")
    process = comparer._process
    assert process is not None
    comparer.close()
    assert process.poll() is not None


def test_the_ones_that_took_too_long_are_logged() -> None:
    (reward,) = resolve_rewards([{"name": "math", "seconds": 3}]).functions
    logged: list[tuple[str, float]] = []
    arguments = {"answer": ["5", HANGS, "5"], "log_metric": lambda name, value: logged.append((name, value))}
    assert reward(prompts=["p"] * 3, completions=["5", "5", "6"], **arguments) == [1.0, 0.0, 0.0]
    assert logged == [("rewards/math/timeouts", 1)]
    reward.function.comparer.close()


def test_it_works_from_many_threads() -> None:
    comparer = Comparer(seconds=20.0)
    with ThreadPoolExecutor(4) as pool:
        asked = [(f"{n}/7", f"{2 * n}/14" if n % 2 else f"{2 * n + 1}/14") for n in range(1, 25)]
        found = list(pool.map(lambda pair: comparer.equal([pair[0]], pair[1]), asked))
    comparer.close()
    assert found == [bool(n % 2) for n in range(1, 25)]


def test_its_process_is_gone_when_nobody_needs_it() -> None:
    comparer = Comparer(seconds=20.0)
    assert comparer.equal(["1"], "1")
    process = comparer._process
    assert process is not None
    del comparer
    assert process.wait(10) is not None


def test_a_process_that_was_killed_is_started_anew() -> None:
    comparer = Comparer(seconds=20.0)
    assert comparer.equal(["1"], "1")
    assert comparer._process is not None
    comparer._process.kill()
    comparer._process.wait()
    assert comparer.equal(["1"], "1")
    comparer.close()
