"""Kahneman-Tversky optimization: answers labelled good or bad one by one, without pairs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ft_rl.objectives.precision import widen

__all__ = ["KTOLoss", "kto", "kto_kl"]

KTOLoss = Literal["kto", "apo_zero_unpaired"]


def kto_kl(kl_logprobs: Tensor, ref_kl_logprobs: Tensor) -> Tensor:
    r"""The reference point of KTO: how far the policy has moved, estimated on answers that belong to other prompts.

    .. math:: z_0 = \max\left(0, \frac{1}{B} \sum_i \log \frac{\pi(y'_i | x_i)}{\pi_{ref}(y'_i | x_i)}\right)

    The estimate of Ethayarajh et al. 2024 (arXiv:2402.01306), where :math:`y'_i` is the answer to another prompt of
    the batch. Over several processes the mean is over all of them, before the clamp.

    Args:
        kl_logprobs: log-probabilities of the mismatched answers under the policy, summed over tokens, of shape [B].
        ref_kl_logprobs: those under the reference.

    Returns:
        :math:`z_0`, a scalar without gradient; float32, or float64 for float64 inputs.

    Raises:
        ValueError: the shapes differ, or are not [B].
    """
    if kl_logprobs.ndim != 1 or kl_logprobs.shape != ref_kl_logprobs.shape or kl_logprobs.numel() == 0:
        raise ValueError(
            f"kl_logprobs and ref_kl_logprobs are of shape [B], B > 0, "
            f"not {list(kl_logprobs.shape)} and {list(ref_kl_logprobs.shape)}"
        )
    return (widen(kl_logprobs) - widen(ref_kl_logprobs)).mean().clamp(min=0).detach()


def kto(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: KTOLoss = "kto",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""How little a person would value the answers, by the value function of prospect theory.

    With :math:`h = \log \pi(y | x) - \log \pi_{ref}(y | x)`, the mean over all answers of

    .. math::
        \lambda_D\,[1 - \sigma(\beta (h - z_0))] \text{ if desirable, } \qquad
        \lambda_U\,[1 - \sigma(\beta (z_0 - h))] \text{ if not.}

    Equation 7 of Ethayarajh et al. 2024 (arXiv:2402.01306). ``apo_zero_unpaired`` has :math:`z_0 = 0`: the two
    terms of equation 7 of D'Oosterlinck et al. 2024 (APO, arXiv:2408.06266), each for its own answers.

    Args:
        logprobs: log-probabilities of the answers under the policy, summed over tokens, of shape [B].
        ref_logprobs: those under the reference.
        desirable: which answers are good, bool of shape [B].
        kl: :math:`z_0` from :func:`kto_kl`, a scalar; None, or ignored, for ``apo_zero_unpaired``.
        beta: :math:`\beta > 0`; the larger, the more averse to risk.
        desirable_weight, undesirable_weight: :math:`\lambda_D` and :math:`\lambda_U`.
        loss_type: ``"kto"`` or ``"apo_zero_unpaired"``.

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs); and detached scalars: ``chosen_reward`` and
        ``rejected_reward``, the means of :math:`\beta h` over the desirable and over the other answers,
        ``chosen_logprob`` and ``rejected_logprob`` (each NaN where the batch has no such answer), ``margin``, the
        rewards' difference, and ``kl``.

    Raises:
        ValueError: the shapes differ, there is no answer, ``desirable`` is not bool, or a setting is wrong.
    """
    if logprobs.ndim != 1 or logprobs.shape != ref_logprobs.shape or logprobs.numel() == 0:
        raise ValueError(
            f"logprobs and ref_logprobs are of shape [B], B > 0, "
            f"not {list(logprobs.shape)} and {list(ref_logprobs.shape)}"
        )
    if desirable.shape != logprobs.shape or desirable.dtype != torch.bool:
        raise ValueError(
            f"desirable is bool of shape {list(logprobs.shape)}, not {desirable.dtype} of shape {list(desirable.shape)}"
        )
    if beta <= 0:
        raise ValueError(f"beta is above 0, not {beta}")
    if loss_type not in ("kto", "apo_zero_unpaired"):
        raise ValueError(f"loss_type is 'kto' or 'apo_zero_unpaired', not {loss_type!r}")
    logprobs, ref_logprobs = widen(logprobs), widen(ref_logprobs)
    if loss_type == "apo_zero_unpaired":
        kl = logprobs.new_zeros(())
    elif kl is None or kl.numel() != 1:
        raise ValueError("loss_type 'kto' needs kl, the scalar that kto_kl gives")
    kl = widen(kl.detach()).reshape(())

    above = logprobs - ref_logprobs
    # 1 - sigma(x) is sigma(-x), which keeps its digits where it is small.
    losses = torch.where(
        desirable,
        desirable_weight * torch.sigmoid(beta * (kl - above)),
        undesirable_weight * torch.sigmoid(beta * (above - kl)),
    )
    with torch.no_grad():
        metrics = {
            "chosen_reward": beta * _mean(above, desirable),
            "rejected_reward": beta * _mean(above, ~desirable),
            "chosen_logprob": _mean(logprobs, desirable),
            "rejected_logprob": _mean(logprobs, ~desirable),
            "kl": kl,
        }
        metrics["margin"] = metrics["chosen_reward"] - metrics["rejected_reward"]
    return losses.mean(), metrics


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0.0).sum() / where.sum()
