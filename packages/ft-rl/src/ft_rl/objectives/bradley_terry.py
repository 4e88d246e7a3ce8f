"""The pairwise loss of reward modelling."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["bradley_terry"]


def bradley_terry(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The negative log-likelihood that the chosen answers win, under the model of Bradley and Terry.

    .. math::
        L = \frac{1}{B} \sum_i \left[ -\log \sigma(r^+_i - r^-_i - m_i) + c\,(r^+_i + r^-_i)^2 \right]

    The first term is equation 1 of Ouyang et al. 2022 (arXiv:2203.02155) for pairs, after Bradley and Terry 1952
    (Biometrika 39); the margin :math:`m` is equation 2 of Touvron et al. 2023 (Llama 2, arXiv:2307.09288); the second
    term, which holds the mean reward at zero, is equation 2 of Eisenstein et al. 2023 (arXiv:2312.09244).

    Args:
        chosen: rewards :math:`r^+` of the preferred answers, of shape [B].
        rejected: rewards :math:`r^-` of the others, of shape [B].
        margin: by how much each pair should differ at least, of shape [B]; None is 0.
        center: the coefficient :math:`c`; None is 0. The paper's authors use 0.01.

    Returns:
        The loss, a scalar in float32 (float64 for float64 rewards), whatever 16-bit type the rewards have; and detached
        scalars: ``accuracy``, the share of pairs with :math:`r^+ > r^-` (a tie is wrong), and ``margin``,
        ``mean_reward``, ``min_reward``, ``max_reward``.

    Raises:
        ValueError: the shapes differ, or there is no pair.
    """
    if chosen.ndim != 1 or chosen.shape != rejected.shape or chosen.numel() == 0:
        raise ValueError(
            f"chosen and rejected are rewards of shape [B], B > 0, not {list(chosen.shape)} and {list(rejected.shape)}"
        )
    if margin is not None and margin.shape != chosen.shape:
        raise ValueError(f"margin is of shape {list(chosen.shape)}, like the rewards, not {list(margin.shape)}")
    if chosen.dtype != torch.float64:
        chosen, rejected = chosen.float(), rejected.float()
    difference = chosen - rejected
    loss = -logsigmoid(difference if margin is None else difference - margin).mean()
    if center is not None:
        loss = loss + center * (chosen + rejected).square().mean()
    with torch.no_grad():
        rewards = torch.cat([chosen, rejected])
        metrics = {
            "accuracy": (chosen > rejected).to(chosen.dtype).mean(),
            "margin": difference.mean(),
            "mean_reward": rewards.mean(),
            "min_reward": rewards.min(),
            "max_reward": rewards.max(),
        }
    return loss, {name: value.detach() for name, value in metrics.items()}
