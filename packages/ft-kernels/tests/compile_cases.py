"""One small call of every operation, forward and backward, at the widths of real models.

``compile_targets.py`` compiles the kernels that these calls launch for cards that are not there; ``sanitize.py`` runs
them on the one that is. Rows are few (a multiple of 16, as in training: Triton compiles other code for odd numbers),
widths are those that decide tile sizes. Every ``@triton.jit`` function that is launched must be reached by a case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ft_kernels as ft

H, INTERMEDIATE, VOCABULARY, ROWS = 4096, 14336, 128256, 16  # Llama 3.1 8B's, and few rows of them


@dataclass(frozen=True)
class Make:
    """Makes a case's tensors."""

    dtype: torch.dtype
    device: str

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers that want a gradient."""
        return torch.randn(shape, dtype=self.dtype, device=self.device).requires_grad_()

    def frozen(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def classes(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, device=self.device)


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])


def rms_norm(make: Make) -> None:
    backward(ft.rms_norm(make(ROWS, H), make(H)))
    backward(ft.rms_norm(make(ROWS, 128), make(128), offset=1.0))  # the norm of a head
    backward(ft.rms_norm(make(ROWS, H), make.frozen(H)))


def cross_entropy(make: Make) -> None:
    targets = make.classes(VOCABULARY, ROWS)
    backward(ft.cross_entropy(make(ROWS, VOCABULARY), targets))
    backward(ft.cross_entropy(make(ROWS, VOCABULARY), targets, softcap=30.0, label_smoothing=0.1, z_loss=1e-4))


CASES: list[Callable[[Make], None]] = [rms_norm, cross_entropy]
