"""The terminal: quiet libraries, progress on stderr, results on stdout."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence

__all__ = ["counted", "progress", "quiet", "say", "some"]

NAMED = 5
"""How many of several things a line names."""


def say(line: str) -> None:
    """One line to the person at the terminal, at once."""
    print(line, file=sys.stderr, flush=True)


def counted(count: int, thing: str) -> str:
    """``1 step``, ``2 steps``, ``1,000 steps``: ``thing`` is one of them."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def some(names: Sequence[str]) -> str:
    """``a, b``, or of more than a few ``a, b, c, d, e and 7 more``."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def quiet() -> None:
    """Silence the libraries' own chatter and progress bars. Only the command line calls this, for its own process."""
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "peft", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
    else:  # what a plan has no use for takes a second to import; it reads this when it is
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def progress(unit: str) -> Callable[[int, int], None]:
    """A callback (done, total) that shows how far a piece of work is, its rate and its end, on stderr."""
    start = time.monotonic()
    shown = 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        live = sys.stderr.isatty()
        if done == 0 or (done < total and now - shown < (0.2 if live else 10.0)):
            return
        shown = now
        rate = done / max(now - start, 1e-9)
        left = (total - done) / rate if rate > 0 else 0.0
        start_of_line = "\r\x1b[K" if live else ""
        line = f"{done}/{total} {unit}  {rate:.1f}/s  {left:.0f} s left"
        end = "\n" if not live or done >= total else ""
        sys.stderr.write(f"{start_of_line}{line}{end}")
        sys.stderr.flush()

    return show
