"""A model whose modules go back to the mode that each was in: training, or evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["modes_kept"]


@contextmanager
def modes_kept(model: Any) -> Iterator[None]:
    """Within it a model's modules may be put into any mode; afterwards each is in the one that it was in before.

    ``model.train()`` would put all into one, where a person or a trainer may have kept some in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
