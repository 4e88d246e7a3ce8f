"""Merging adapters: ``merge`` makes a 16-bit model and checks it twice."""

from ft_export.merging.merger import MergeResult, is_current, merge

__all__ = ["MergeResult", "is_current", "merge"]
