"""The reward ``code``: whether the completion's Python passes the row's tests, run where it can harm nothing."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ft_core.memory import bytes_of
from ft_rl.rewards.extraction import in_tag
from ft_rl.rewards.samples import Text, column_of, score_each, text_of
from ft_rl.rewards.sandbox import Limits, check_isolation, run_python

__all__ = ["CodeSettings", "code", "code_in", "share_passed"]

COLUMNS = ("tests", "test_list", "test")

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE
)

DRIVER = """
import os, sys
descriptor = int(os.environ.pop("RESULT"))
names = {"__name__": "solution"}
with open("solution.py", encoding="utf-8") as file:
    exec(compile(file.read(), "solution.py", "exec"), names)
# Only now, so that what has run above has had no reason to find it: the tests, and the word that says one has passed.
import json, traceback
told = json.loads(sys.stdin.read())
for number, test in enumerate(told["tests"]):
    try:
        exec(compile(test, f"test {number + 1}", "exec"), names)
    except BaseException:
        traceback.print_exc()
    else:
        os.write(descriptor, f"{told['word']} {number}\\n".encode())
"""


class CodeSettings(BaseModel):
    """Settings of ``code``.

    Attributes:
        column: the data's column with the tests: Python as text (``assert add(1, 2) == 3``), a list of such, each a
            test of its own, or a list of ``{input, output}``: what the program reads and has to print. Unset,
            ``tests``, ``test_list`` or ``test``.
        part: where the code is: in the last block between fences (``fenced``), in a ``tag``, or the ``whole``
            completion.
        tag: the tag's name.
        partial: whether the reward is the share of the tests that pass, instead of 1 for all and 0 otherwise.
        seconds: how long one run may take by the clock; with ``{input, output}`` each is a run.
        memory: how much memory each of its processes may take.
        processes: how many processes and threads it may have at a time.
        packages: whether the packages installed here can be imported, or the standard library only.
        workers: how many completions run at a time.
    """

    model_config = ConfigDict(extra="forbid")

    column: str | None = None
    part: Literal["fenced", "tag", "whole"] = "fenced"
    tag: str = Field(default="answer", min_length=1)
    partial: bool = False
    seconds: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    memory: str = "512MiB"
    processes: int = Field(default=4, ge=1)
    packages: bool = False
    workers: int = Field(default_factory=lambda: min(4, os.cpu_count() or 1), ge=1)

    @field_validator("memory")
    @classmethod
    def _amount(cls, text: str) -> str:
        bytes_of(text)
        return text

    @property
    def limits(self) -> Limits:
        return Limits(
            seconds=self.seconds,
            cpu_seconds=int(self.seconds) + 1,
            memory=bytes_of(self.memory),
            processes=self.processes,
        )


def code(settings: CodeSettings) -> Any:
    """The reward function. What it rewards is written by a model that is rewarded for it: tests that the code shares a
    process with can be tricked by code that sets out to, ``{input, output}`` cannot.

    Raises:
        NoIsolation: this machine cannot keep code from the network and from its files.
    """
    check_isolation()
    names = (settings.column,) if settings.column else COLUMNS

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        tests = column_of(columns, *names)

        def share(i: int) -> float:
            wanted = _tests(tests[i], names)
            program = code_in(text_of(completions[i]), settings)
            return 0.0 if program is None else share_passed(program, wanted, settings)

        with ThreadPoolExecutor(settings.workers) as pool:
            runs = [pool.submit(share, i) for i in range(len(completions))]

            def score(i: int) -> float:
                passed = runs[i].result()
                return passed if settings.partial else float(passed == 1.0)

            return score_each(len(completions), score)

    reward.columns = ("|".join(names),)  # type: ignore[attr-defined]
    return reward


def code_in(text: str, settings: CodeSettings) -> str | None:
    """A completion's code; None where there is none. A block in another language is none."""
    if settings.part == "whole":
        return text
    if settings.part == "tag":
        return in_tag(text, settings.tag)
    blocks = [m["code"] for m in _FENCE.finditer(text) if m["language"].lower() in ("", "python", "python3", "py")]
    return blocks[-1] if blocks else None


def share_passed(program: str, tests: Sequence[str] | Sequence[Mapping[str, str]], settings: CodeSettings) -> float:
    """The share of the tests that a program passes.

    Args:
        tests: Python to run after the program, in its names; or inputs with the outputs that must be printed for
            them, white space at the ends of lines and of the whole apart.

    Raises:
        NoIsolation: as :func:`ft_rl.rewards.sandbox.run_python`.
    """
    asserts = [test for test in tests if isinstance(test, str)]
    if asserts:
        word = secrets.token_hex(16)
        outcome = run_python(
            DRIVER,
            settings.limits,
            stdin=json.dumps({"tests": asserts, "word": word}),
            files={"solution.py": program},
            packages=settings.packages,
        )
        lines = outcome.result.decode(errors="replace").splitlines()
        return sum(f"{word} {number}" in lines for number in range(len(asserts))) / len(asserts)
    pairs = [test for test in tests if not isinstance(test, str)]
    passed = 0
    for number, pair in enumerate(pairs):
        outcome = run_python(program, settings.limits, stdin=pair["input"], packages=settings.packages)
        printed = outcome.output.decode(errors="replace")
        right = (outcome.status, outcome.code) == ("exit", 0) and _lines(printed) == _lines(pair["output"])
        passed += right
        if not right and not settings.partial:
            return number / len(pairs)
    return passed / len(pairs)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _tests(value: Any, names: Sequence[str]) -> list[str] | list[dict[str, str]]:
    tests = [value] if isinstance(value, str | Mapping) else value
    if isinstance(tests, list) and tests:
        if all(isinstance(test, str) and test.strip() for test in tests):
            return list(tests)
        if all(isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in tests):
            return [{name: str(test[name]) for name in ("input", "output")} for test in tests]
    raise ValueError(
        f"the row's {' or '.join(names)} {str(value)[:40]!r} holds no tests: give Python as text, a list of it, "
        "or a list of {input, output}"
    )
