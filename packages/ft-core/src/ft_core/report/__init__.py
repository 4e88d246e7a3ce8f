"""The page that shows what a run did: one self-contained file, made from the run folder alone."""

from __future__ import annotations

from ft_core.report.write import write_report

__all__ = ["write_report"]
