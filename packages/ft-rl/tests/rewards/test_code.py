"""The reward `code`: which completions pass which tests."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ft_core.errors import RunError
from ft_rl.rewards import resolve_rewards
from ft_rl.rewards.code import CodeSettings, code_in
from ft_rl.rewards.sandbox import NoIsolation, check_isolation

pytestmark = pytest.mark.usefixtures("isolation")

ADD = "def add(a, b):\n    return a + b\n"


def fenced(program: str) -> str:
    return f"Here it is.\n```python\n{program}\n```\nDone."


def scores(completions: list[Any], tests: list[Any], **settings: Any) -> list[float | None]:
    (reward,) = resolve_rewards([{"name": "code", "seconds": 20, **settings}]).functions
    return reward(prompts=["p"] * len(completions), completions=completions, tests=tests)


@pytest.mark.parametrize(
    ("text", "part", "found"),
    [
        ("```python\na\n```\ntext\n```py\nb\n```", "fenced", "b\n"),
        ("```\na\n```", "fenced", "a\n"),
        ("```python\na\n```\n```bash\nls\n```", "fenced", "a\n"),
        ("```python\na", "fenced", None),
        ("a", "fenced", None),
        ("a", "whole", "a"),
        ("<answer>a</answer>", "tag", "a"),
    ],
)
def test_where_the_code_is(text: str, part: Any, found: str | None) -> None:
    assert code_in(text, CodeSettings(part=part)) == found


def test_right_and_wrong_programs() -> None:
    completions = [
        fenced(ADD),
        fenced("def add(a, b):\n    return a - b"),
        fenced("def add(a, b:"),
        fenced("raise ValueError"),
        ADD,  # not between fences
        [{"role": "assistant", "content": fenced(ADD)}],
    ]
    assert scores(completions, ["assert add(1, 2) == 3"] * 6) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_a_share_of_the_tests() -> None:
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add('a', 'b') == 'ab'", "assert missing"]
    assert scores([fenced(ADD)], [tests]) == [0.0]
    assert scores([fenced(ADD)], [tests], partial=True) == [0.75]
    assert scores([fenced(ADD)], [tests[:3]]) == [1.0]


def test_programs_that_read_and_print() -> None:
    pairs = [{"input": "1 2\n", "output": "3"}, {"input": "5 5\n", "output": "10\n"}]
    right = "print(sum(map(int, input().split())))"
    assert scores([fenced(right), fenced("print(3)"), fenced("print(3); exit(1)")], [pairs] * 3) == [1.0, 0.0, 0.0]
    assert scores([fenced("print(3)"), fenced(right + "  \nprint()")], [pairs] * 2, partial=True) == [0.5, 1.0]


@pytest.mark.parametrize(
    "trick",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os\nos.kill(os.getpid(), 9)",
        "import os, builtins\nfor n in range(9): os.write(n, b'word 0\\n') if n > 2 else None",
    ],
)
def test_to_end_early_is_not_to_pass(trick: str) -> None:
    assert scores([fenced(trick)], ["assert add(1, 2) == 3"]) == [0.0]


def test_a_test_that_opens_a_socket_fails() -> None:
    test = "import socket\nsocket.create_connection(('127.0.0.1', 80), 1)"
    caught = (
        "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError: pass\nelse: assert False"
    )
    assert scores([fenced(ADD)] * 2, [test, caught]) == [0.0, 1.0]


def test_endless_loops_run_side_by_side_and_end() -> None:
    start = time.monotonic()
    completions = [fenced("while True: pass")] * 4 + [fenced(ADD)]
    assert scores(completions, ["assert add(1, 2) == 3"] * 5, seconds=5, workers=5) == [0.0] * 4 + [1.0]
    assert time.monotonic() - start < 19  # one after another they take 20


def test_the_first_tests_count_where_a_later_one_hangs() -> None:
    tests = ["assert add(1, 1) == 2", "while True: pass", "assert add(1, 1) == 2"]
    assert scores([fenced(ADD)], [tests], seconds=5, partial=True) == [pytest.approx(1 / 3)]


@pytest.mark.parametrize("tests", [None, "", [], [""], [{"input": "1"}], 3])
def test_a_row_without_tests(tests: Any) -> None:
    with pytest.raises(
        RunError, match=r"sample 1 of 1 .* holds no tests: give Python as text, a list of it, or a list"
    ):
        scores([fenced(ADD)], [tests])


def test_where_there_is_no_isolation_the_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_rl.rewards import sandbox

    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    check_isolation.cache_clear()
    with pytest.raises(
        NoIsolation, match=r"^rewards\.0 \(code\): code is run in Linux's namespaces, which darwin doesn't"
    ):
        resolve_rewards(["code"])
    check_isolation.cache_clear()
