"""Generalised advantage estimation, and the whitening of what it gives."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_rl.objectives.precision import widen
from ft_rl.objectives.tokens import check_tokens

__all__ = ["gae", "whiten"]


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, sequences: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    r"""Advantages of the tokens of finished sequences, and the returns that a value function should learn.

    .. math::
        \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \sum_{l \ge 0} (\gamma \lambda)^l \delta_{t+l}, \qquad
        R_t = A_t + V_t

    Equations 12 and 16 of Schulman et al. 2015 (arXiv:1506.02438), with :math:`V = 0` after a sequence's last token.

    The sums are taken by doubling: once each token holds the sum over the next :math:`2^k` tokens, adding
    :math:`(\gamma \lambda)^{2^k}` times the one :math:`2^k` further on gives that over :math:`2^{k+1}`. That is
    :math:`\log_2 N` passes over the batch, not one for each token of the longest sequence.

    Args:
        rewards: of shape [N].
        values: :math:`V_t`, the value function before each token, of shape [N].
        sequences: the number of each token's sequence, int64 of shape [N]; tokens of a sequence in their order.
        gamma: the discount :math:`\gamma`, from 0 to 1.
        lam: :math:`\lambda`, from 0 (one step, least variance) to 1 (no bias from the value function).

    Returns:
        Advantages and returns, each of shape [N], without gradients; float32, or float64 for float64 inputs.

    Raises:
        ValueError: the shapes differ, or ``gamma`` or ``lam`` is not from 0 to 1.
    """
    check_tokens(sequences, rewards=rewards, values=values)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam are from 0 to 1, not {gamma} and {lam}")
    order = sequences.argsort(stable=True)  # a sequence's tokens side by side, whatever lay between them
    rewards, values, sequences = widen(rewards)[order], widen(values)[order], sequences[order]
    sums = rewards + gamma * _ahead(values, sequences, 1) - values
    step, factor = 1, gamma * lam
    while step < len(sums) and factor > 0:
        sums = sums + factor * _ahead(sums, sequences, step)
        step, factor = 2 * step, factor * factor
    advantages, returns = torch.empty_like(sums), torch.empty_like(sums)
    advantages[order], returns[order] = sums, sums + values
    return advantages, returns


def _ahead(values: Tensor, sequences: Tensor, step: int) -> Tensor:
    """The value ``step`` tokens further on in the same sequence; 0 where it has ended."""
    found = torch.zeros_like(values)
    found[:-step] = torch.where(sequences[step:] == sequences[:-step], values[step:], 0.0)
    return found


def whiten(values: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Values less their mean over their standard deviation, :math:`(x - \mu) / \sqrt{\sigma^2 + 10^{-8}}`.

    As Ziegler et al. 2019 (arXiv:1909.08593) whiten advantages in their published code; the variance is that of the
    values at hand (over N, not N - 1), so a single value becomes 0.

    Args:
        values: of any shape.
        mask: which of them count, bool of the same shape; None is all. Others become 0.

    Returns:
        Of the same shape; float32, or float64 for float64 values.

    Raises:
        ValueError: the mask is not bool, or of another shape.
    """
    values = widen(values)
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    if mask.shape != values.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask is bool of shape {list(values.shape)}, like the values, not {mask.dtype} of shape {list(mask.shape)}"
        )
    count = mask.sum().clamp(min=1)
    centred = torch.where(mask, values - torch.where(mask, values, 0.0).sum() / count, 0.0)
    return centred * (centred.square().sum() / count + 1e-8).rsqrt()
