"""Write ``report.html`` into a run folder."""

from __future__ import annotations

from pathlib import Path

from ft_core.report.page import build_page
from ft_core.report.read import read_run
from ft_core.runs import Run, write_text

__all__ = ["write_report"]


def write_report(run: Path) -> Path:
    """Make a run's report from what its folder holds so far, and return the path of the page.

    The page needs nothing but itself: no network, fonts or files. Files that are not there yet are named on it. An
    older page stays in place until the new one is whole.

    Raises:
        RunError: ``run`` is missing, is no run folder, is of a newer format, or cannot be written to.
    """
    record = read_run(Path(run))
    target = record.path / Run.REPORT
    # Text that came out of a model may hold lone surrogates, which UTF-8 cannot express.
    write_text(target, build_page(record).encode("utf-8", errors="replace").decode("utf-8"))
    return target
