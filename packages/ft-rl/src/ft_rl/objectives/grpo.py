"""Group relative policy optimization and its kin: Dr. GRPO, DAPO's loss, GSPO and GSPO-token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ft_rl.objectives.kl import KLEstimator
from ft_rl.objectives.kl import kl as estimate_kl
from ft_rl.objectives.precision import bounded_exp, widen
from ft_rl.objectives.tokens import check_tokens, sequence_lengths, sequence_sums

__all__ = ["GRPOLoss", "ImportanceLevel", "grpo", "overlong_penalty"]

GRPOLoss = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
ImportanceLevel = Literal["token", "sequence", "sequence_token"]


def grpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequences: Tensor,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_estimator: KLEstimator = "k3",
    bias_correction_kl: bool = False,
    loss_type: GRPOLoss = "dapo",
    max_completion_length: int | None = None,
    num_items: float | Tensor | None = None,
    importance_sampling_level: ImportanceLevel = "token",
    importance_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The clipped policy loss over completions, with a penalty for leaving the reference.

    Each token :math:`t` of completion :math:`i` contributes

    .. math::
        \ell_{i,t} = -c_{i,t} \min\left[w_{i,t} A_i,\
            \mathrm{clip}(w_{i,t}, 1 - \epsilon_{low}, 1 + \epsilon_{high})\,A_i\right] + \beta\,\mathrm{KL}_{i,t}

    Equation 3 of Shao et al. 2024 (GRPO, arXiv:2402.03300), with the two bounds of Yu et al. 2025 (DAPO,
    arXiv:2503.14476, equation 8). With ``delta`` the first :math:`w` is at most :math:`\delta`, which bounds the loss
    where :math:`A < 0` too (two-sided clipping, arXiv:2505.07291). The ratio :math:`w_{i,t}` is, by
    ``importance_sampling_level``,

    - ``token``: :math:`\pi(y_{i,t}) / \pi_{old}(y_{i,t})`.
    - ``sequence``: :math:`s_i = (\pi(y_i) / \pi_{old}(y_i))^{1/|y_i|}`, GSPO: equations 5 to 7 of Zheng et al. 2025
      (arXiv:2507.18071), together with ``loss_type="grpo"``.
    - ``sequence_token``: :math:`\mathrm{sg}[s_i]\,\pi(y_{i,t}) / \mathrm{sg}[\pi(y_{i,t})]`, GSPO-token: equations 13
      and 14 there. Its value is :math:`s_i`, its gradient each token's own; sg is the stop-gradient.

    The contributions are summed and divided, by ``loss_type``,

    - ``grpo``: by each completion's tokens, then by B: equation 3 of the GRPO paper.
    - ``bnpo``: by N.
    - ``dr_grpo``: by B times ``max_completion_length``: Liu et al. 2025 (Dr. GRPO, arXiv:2503.20783).
    - ``dapo``: by ``num_items``, the tokens of all batches that one optimizer step adds up: DAPO, equation 8.

    The first three divide by what is in this batch; who accumulates gradients over several divides by their number.

    Args:
        logprobs: log-probabilities of the trained tokens under the policy, of shape [N].
        old_logprobs: those under the policy that the batch was made for, of shape [N]. Equal to ``logprobs`` without
            their gradient until a batch is used again.
        advantages: :math:`A_i`, of shape [B].
        sequences: the number of each token's completion, int64 of shape [N].
        epsilon_low, epsilon_high: how far :math:`w` may be below and above 1.
        delta: :math:`\delta`; None is no such bound.
        beta: the weight of the divergence from the reference.
        ref_logprobs: log-probabilities under the reference, of shape [N]; needed when ``beta`` is not 0.
        kl_estimator: how the divergence is estimated, see :func:`ft_rl.objectives.kl.kl`.
        bias_correction_kl: multiply the divergence by :math:`w_{i,t}`, so that its estimate stays unbiased when the
            batch was sampled by the old policy.
        loss_type, importance_sampling_level: one of the names above.
        max_completion_length: the divisor of ``dr_grpo``.
        num_items: the divisor of ``dapo``; None is N. One below 1 counts as 1.
        importance_weights: :math:`c_{i,t}`, of shape [N]; None is 1. Such as those of
            :func:`ft_rl.objectives.sampler.sampler_weights`, or 0 for tokens that are to be left out. They do not weigh
            the divergence.

    Returns:
        The loss, a scalar in float32 (float64 for float64 log-probabilities), 0 when there is no token; and detached
        scalars: ``ratio_mean``, the mean of :math:`w`, ``clip_low``, the share where :math:`A < 0` and :math:`w` is
        below its bound, ``clip_high``, where :math:`A > 0` and :math:`w` is above it, ``clip_region``, either of them;
        and ``kl``, the mean divergence, if ``beta`` is not 0. Means are over tokens; over sequences for ``sequence``,
        where only ``kl`` is over tokens. They are 0 when there is no token.

    Raises:
        ValueError: the shapes do not fit, something needed is missing, or a setting is not what it may be.
    """
    if advantages.ndim != 1:
        raise ValueError(f"advantages are of shape [B], one a completion, not {list(advantages.shape)}")
    check_tokens(
        sequences,
        len(advantages),
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
    )
    if epsilon_low < 0 or epsilon_high < 0:
        raise ValueError(f"epsilon_low and epsilon_high are 0 or more, not {epsilon_low} and {epsilon_high}")
    logprobs, advantages = widen(logprobs), widen(advantages)
    log_ratio = logprobs - widen(old_logprobs)
    lengths = sequence_lengths(sequences, len(advantages)).clamp(min=1)

    if importance_sampling_level == "token":
        log_weights = log_ratio
    elif importance_sampling_level in ("sequence", "sequence_token"):
        log_weights = (sequence_sums(log_ratio, sequences, len(advantages)) / lengths)[sequences]
        if importance_sampling_level == "sequence_token":
            log_weights = log_weights.detach() + (logprobs - logprobs.detach())
    else:
        raise ValueError(
            f"importance_sampling_level is 'token', 'sequence' or 'sequence_token', not {importance_sampling_level!r}"
        )
    weights = bounded_exp(log_weights)
    bounded = weights if delta is None else weights.clamp(max=delta)
    clipped = weights.clamp(1 - epsilon_low, 1 + epsilon_high)
    token_advantages = advantages[sequences]
    losses = -torch.minimum(bounded * token_advantages, clipped * token_advantages)
    if importance_weights is not None:
        losses = losses * importance_weights
    token_kl = None
    if beta != 0:
        if ref_logprobs is None:
            raise ValueError(f"ref_logprobs are needed when beta is not 0; it is {beta}")
        token_kl = estimate_kl(logprobs, ref_logprobs, kl_estimator)
        if bias_correction_kl:
            token_kl = token_kl * weights
        losses = losses + beta * token_kl

    if loss_type == "grpo":
        loss = (losses / lengths[sequences]).sum() / len(advantages)
    elif loss_type == "bnpo":
        loss = losses.sum() / max(len(losses), 1)
    elif loss_type == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise ValueError(f"loss_type 'dr_grpo' needs max_completion_length, 1 or more, not {max_completion_length}")
        loss = losses.sum() / (len(advantages) * max_completion_length)
    elif loss_type == "dapo":
        loss = losses.sum() / torch.as_tensor(len(losses) if num_items is None else num_items).clamp(min=1)
    else:
        raise ValueError(f"loss_type is 'grpo', 'bnpo', 'dr_grpo' or 'dapo', not {loss_type!r}")

    with torch.no_grad():
        low = (bounded < 1 - epsilon_low) & (token_advantages < 0)
        high = (bounded > 1 + epsilon_high) & (token_advantages > 0)
        metrics = {"ratio_mean": weights, "clip_low": low, "clip_high": high, "clip_region": low | high}
        metrics = {name: value.to(losses.dtype) for name, value in metrics.items()}
        if importance_sampling_level == "sequence":  # every token has its sequence's value
            present = sequence_lengths(sequences, len(advantages)) > 0
            metrics = {
                name: (sequence_sums(value, sequences, len(advantages)) / lengths).sum() / present.sum().clamp(min=1)
                for name, value in metrics.items()
            }
        else:
            metrics = {name: value.sum() / max(len(losses), 1) for name, value in metrics.items()}
        if token_kl is not None:
            metrics["kl"] = token_kl.sum() / max(len(losses), 1)
    return loss, metrics


def overlong_penalty(lengths: Tensor, *, max_length: int, cache: int) -> Tensor:
    r"""What a completion loses for coming near, or over, the length it is allowed.

    .. math::
        R(y) = \begin{cases}
            0 & |y| \le L_{max} - L_{cache} \\
            \frac{(L_{max} - L_{cache}) - |y|}{L_{cache}} & L_{max} - L_{cache} < |y| \le L_{max} \\
            -1 & L_{max} < |y|
        \end{cases}

    Equation 13 of Yu et al. 2025 (DAPO, arXiv:2503.14476), added there to the reward.

    Args:
        lengths: the completions' tokens, of any shape.
        max_length: :math:`L_{max}`.
        cache: :math:`L_{cache}`, over how many tokens the penalty grows; 0 is a step at ``max_length``.

    Returns:
        The penalties, from -1 to 0, of the same shape, float32.

    Raises:
        ValueError: ``cache`` is not from 0 to ``max_length``.
    """
    if not 0 <= cache <= max_length:
        raise ValueError(f"cache is from 0 to max_length, {max_length}, not {cache}")
    if cache == 0:
        return -(lengths > max_length).float()
    return ((max_length - cache - lengths).float() / cache).clamp(-1, 0)
