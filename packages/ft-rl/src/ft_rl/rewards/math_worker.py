"""Compares formulas for :mod:`ft_rl.rewards.symbolic`, as a process of its own: ``python -I math_worker.py MEMORY``.

A line of JSON on standard input, ``{"gold": ["…"], "answer": "…", "seconds": 5}``, is answered by one on standard
output: ``{"equal": true}``, or ``{"unread": "…"}`` for right answers of which math-verify can read none. A comparison
that takes longer than its seconds ends the process, even where nobody is left to end it.
"""

import contextlib
import json
import re
import signal
import sys
from typing import Any

__all__ = ["compare", "is_formula", "main", "read"]

MARKS = ("$", "\\[", "\\(", "\\boxed")
"""Where math-verify looks for LaTeX. Of LaTeX elsewhere it reads the first number that it finds."""

FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh exp log ln pi min max gcd".split()  # noqa: SIM905
"""What LaTeX calls by these names, and people write without its backslash."""

_BARE = re.compile(rf"(?<![\\A-Za-z])(?:{'|'.join(FUNCTIONS)})(?![A-Za-z])")


def is_formula(text: str) -> bool:
    """Whether a text without marks is a formula alone rather than a sentence: it has no words, or no spaces."""
    words = re.findall(r"(?<![\w\\])[A-Za-z]{2,}(?!\w)", text)
    return not re.search(r"\s", text.strip()) or all(word in FUNCTIONS for word in words)


def read(parse: Any, text: str) -> list[Any]:
    """A formula as math-verify reads it, the marks of LaTeX put around it where it stands alone without."""
    plain = any(mark in text for mark in MARKS) or not is_formula(text)
    found = parse(text if plain else f"${_BARE.sub(_with_backslash, text.strip())}$", parsing_timeout=None)
    return list(found or parse(text, parsing_timeout=None))


def _with_backslash(match: re.Match[str]) -> str:
    return f"\\{match[0]}"


def compare(job: dict[str, Any], parse: Any, verify: Any) -> dict[str, Any]:
    gold = [formula for text in job["gold"] for formula in [read(parse, text)] if formula]
    if not gold:
        return {"unread": job["gold"][0]}
    answer = read(parse, job["answer"])
    return {"equal": bool(answer) and any(verify(formula, answer, timeout_seconds=None) for formula in gold)}


def main() -> None:
    import logging

    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
    from math_verify import parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, job["seconds"] + 1)
        try:
            said = compare(job, parse, verify)
        except (MemoryError, RecursionError):
            said = {"equal": False}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
