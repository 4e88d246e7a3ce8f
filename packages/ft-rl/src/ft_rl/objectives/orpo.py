"""Odds-ratio preference optimization: preference and imitation in one loss, without a reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ft_rl.objectives.precision import widen

__all__ = ["orpo"]


def orpo(chosen: Tensor, rejected: Tensor, chosen_nll: Tensor, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The imitation loss on the chosen answers plus a penalty while their odds do not exceed the others'.

    .. math::
        L = L_{NLL} - \frac{\beta}{B} \sum_i \log \sigma\left(\log
            \frac{\mathrm{odds}(y^+_i | x_i)}{\mathrm{odds}(y^-_i | x_i)}\right), \qquad
        \mathrm{odds}(y | x) = \frac{P(y | x)}{1 - P(y | x)}

    Equations 4, 6 and 7 of Hong et al. 2024 (arXiv:2403.07691), where :math:`\beta` is called :math:`\lambda` and
    :math:`\log P(y | x)` is the mean over the answer's tokens (equation 1). The log-odds are
    :math:`-\log(e^{-\ell} - 1)` of that mean :math:`\ell \le 0`. They are infinite at 0, so an :math:`\ell` closer to 0
    than its type can tell a probability from 1 (1.2e-7 in float32) counts as that far from it, with the gradient there.

    Args:
        chosen: mean log-probability per token of each preferred answer, of shape [B].
        rejected: those of the other answers, of shape [B].
        chosen_nll: the imitation loss on the chosen examples, a scalar. TRL's is the mean over their tokens, the
            prompts' included.
        beta: the weight of the odds ratio.

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs); and detached scalars: ``accuracy``, the share of
        pairs whose chosen answer is likelier (a tie is wrong), ``margin``, the mean of
        :math:`\beta (\ell^+ - \ell^-)`, ``chosen_reward`` and ``rejected_reward``, the means of
        :math:`\beta \ell^\pm`, ``log_odds_ratio``, the mean inside the sigmoid, ``odds_loss``, the loss without
        imitation and before :math:`\beta`, and ``nll``.

    Raises:
        ValueError: the shapes differ, there is no pair, or ``chosen_nll`` is no scalar.
    """
    if chosen.ndim != 1 or chosen.shape != rejected.shape or chosen.numel() == 0:
        raise ValueError(
            f"chosen and rejected are mean log-probabilities of shape [B], B > 0, "
            f"not {list(chosen.shape)} and {list(rejected.shape)}"
        )
    if chosen_nll.ndim != 0:
        raise ValueError(f"chosen_nll is a scalar, not of shape {list(chosen_nll.shape)}")
    chosen, rejected, chosen_nll = widen(chosen), widen(rejected), widen(chosen_nll)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    odds_loss = softplus(-log_odds_ratio).mean()  # -log(sigmoid)
    loss = chosen_nll + beta * odds_loss
    with torch.no_grad():
        metrics = {
            "accuracy": (chosen > rejected).to(chosen.dtype).mean(),
            "margin": beta * (chosen - rejected).mean(),
            "chosen_reward": beta * chosen.mean(),
            "rejected_reward": beta * rejected.mean(),
            "log_odds_ratio": log_odds_ratio.mean(),
            "odds_loss": odds_loss,
            "nll": chosen_nll,
        }
    return loss, {name: value.detach() for name, value in metrics.items()}


def _log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p."""
    closest = -torch.finfo(logprobs.dtype).eps
    logprobs = logprobs + (logprobs.clamp(max=closest) - logprobs).detach()  # the gradient passes, taken there
    # log(1 - p): each form loses digits where the other keeps them; they meet at p = 1/2. Where one is not used its
    # input is put where it is harmless, as its gradient of 0 times an infinity would be NaN.
    likely = logprobs > -0.6931471805599453
    near = torch.log(-torch.expm1(torch.where(likely, logprobs, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(likely, -1.0, logprobs)))
    return logprobs - torch.where(likely, near, far)
