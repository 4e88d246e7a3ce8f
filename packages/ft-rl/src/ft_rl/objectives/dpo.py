"""Direct preference optimization: the policy is its own reward model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ft_rl.objectives.precision import widen

__all__ = ["DPOLoss", "dpo"]

DPOLoss = Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"]


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    loss_type: DPOLoss = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""How far the policy, measured against the reference, is from preferring the chosen answers.

    With :math:`h^\pm = \log \pi(y^\pm | x) - \log \pi_{ref}(y^\pm | x)` and :math:`\Delta = h^+ - h^-`, the mean over
    pairs of

    - ``sigmoid``: :math:`-\log \sigma(\beta \Delta)`, equation 7 of Rafailov et al. 2023 (arXiv:2305.18290).
    - ``hinge``: :math:`\max(0, 1 - \beta \Delta)`, the hinge of Zhao et al. 2023 (SLiC-HF, arXiv:2305.10425) on the
      normalised likelihoods of Liu et al. 2023 (RSO, arXiv:2309.06657).
    - ``ipo``: :math:`(h^+ / |y^+| - h^- / |y^-| - 1 / 2\beta)^2`, equation 17 of Azar et al. 2023 (arXiv:2310.12036),
      where :math:`\beta` is the paper's :math:`\tau`. Dividing by the lengths is not in the paper; TRL does so on its
      authors' word.
    - ``robust``: :math:`[-(1 - \epsilon) \log \sigma(\beta \Delta) + \epsilon \log \sigma(-\beta \Delta)] /
      (1 - 2 \epsilon)`, the loss of Chowdhury et al. 2024 (arXiv:2403.00409), unbiased when a share
      :math:`\epsilon` of the labels is flipped.
    - ``sigmoid_norm``: :math:`-\log \sigma(\beta (h^+ / |y^+| - h^- / |y^-|))`, the length-normalised DPO of Lambert
      et al. 2024 (Tülu 3, arXiv:2411.15124).

    Args:
        chosen: log-probabilities of the preferred answers under the policy, each the sum over the answer's tokens, of
            shape [B].
        rejected: those of the other answers.
        ref_chosen, ref_rejected: the same under the reference.
        beta: :math:`\beta > 0`; the larger, the closer to the reference.
        loss_type: one of the names above.
        label_smoothing: :math:`\epsilon`, from 0 to below 0.5; for ``robust`` alone.
        chosen_lengths, rejected_lengths: the answers' tokens, of shape [B]; for ``ipo`` and ``sigmoid_norm``. A length
            of 0 counts as 1.

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs); and detached scalars: ``accuracy``, the share of
        pairs with :math:`h^+ > h^-` (a tie is wrong), ``margin``, the mean of :math:`\beta \Delta`,
        ``chosen_reward`` and ``rejected_reward``, the means of :math:`\beta h^\pm`, and ``chosen_logprob`` and
        ``rejected_logprob``.

    Raises:
        ValueError: the shapes differ, there is no pair, lengths are missing, or a setting is outside what it may be.
    """
    inputs = {"chosen": chosen, "rejected": rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    if chosen.ndim != 1 or chosen.numel() == 0 or any(x.shape != chosen.shape for x in inputs.values()):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items())
        raise ValueError(f"the log-probabilities are of one shape [B], B > 0, not {shapes}")
    if beta <= 0:
        raise ValueError(f"beta is above 0, not {beta}")
    if label_smoothing and loss_type != "robust":
        raise ValueError(f"label_smoothing is for loss_type 'robust' alone; it is {label_smoothing} for {loss_type!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is from 0 to below 0.5, not {label_smoothing}")

    chosen, rejected, ref_chosen, ref_rejected = (widen(x) for x in inputs.values())
    above, below = chosen - ref_chosen, rejected - ref_rejected  # the h's of the docstring
    difference = above - below
    if loss_type == "sigmoid":
        losses = -logsigmoid(beta * difference)
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * difference)
    elif loss_type == "robust":
        clean, flipped = logsigmoid(beta * difference), logsigmoid(-beta * difference)
        losses = (label_smoothing * flipped - (1 - label_smoothing) * clean) / (1 - 2 * label_smoothing)
    elif loss_type in ("ipo", "sigmoid_norm"):
        per_token = _mean(above, chosen_lengths, "chosen_lengths", loss_type) - _mean(
            below, rejected_lengths, "rejected_lengths", loss_type
        )
        losses = (per_token - 1 / (2 * beta)).square() if loss_type == "ipo" else -logsigmoid(beta * per_token)
    else:
        raise ValueError(f"loss_type is 'sigmoid', 'hinge', 'ipo', 'robust' or 'sigmoid_norm', not {loss_type!r}")

    with torch.no_grad():
        metrics = {
            "accuracy": (above > below).to(above.dtype).mean(),
            "margin": beta * difference.mean(),
            "chosen_reward": beta * above.mean(),
            "rejected_reward": beta * below.mean(),
            "chosen_logprob": chosen.mean(),
            "rejected_logprob": rejected.mean(),
        }
    return losses.mean(), metrics


def _mean(sums: Tensor, lengths: Tensor | None, name: str, loss_type: str) -> Tensor:
    if lengths is None:
        raise ValueError(f"loss_type {loss_type!r} needs {name}, the answers' numbers of tokens, of shape [B]")
    if lengths.shape != sums.shape:
        raise ValueError(
            f"{name} is of shape {list(sums.shape)}, like the log-probabilities, not {list(lengths.shape)}"
        )
    return sums / lengths.clamp(min=1)
