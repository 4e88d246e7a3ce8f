"""The gap between the engine that sampled and the model that trains, and the weights that make up for it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ft_rl.objectives.precision import bounded_exp, widen
from ft_rl.objectives.tokens import check_tokens, sequence_sums

__all__ = ["sampler_weights"]


@torch.no_grad()
def sampler_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    sequences: Tensor,
    *,
    num_sequences: int,
    level: Literal["token", "sequence"] = "sequence",
    mode: Literal["truncate", "mask"] = "mask",
    cap: float | None = 3.0,
    floor: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Truncated importance sampling for completions that another engine sampled.

    An engine's kernels, precision or cached weights give each token a somewhat other probability than the model that
    trains. A loss over its samples is an expectation under the engine, :math:`\mu`; the ratio

    .. math::
        c_{i,t} = \frac{\pi_{old}(y_{i,t})}{\mu(y_{i,t})} \text{ (token)}, \qquad
        c_i = \prod_t \frac{\pi_{old}(y_{i,t})}{\mu(y_{i,t})} \text{ (sequence)}

    makes it one under the model. Ratios outside ``floor`` to ``cap`` are set to the bound (``truncate``; Ionides 2008,
    "Truncated importance sampling") or to 0, which leaves the token or sequence out (``mask``). Modes and defaults are
    those of TRL's ``vllm_importance_sampling_mode``.

    A sampler's log-probability of NaN is one it did not give: its ratio is 1, and it counts in no figure of the gap.

    Args:
        logprobs: log-probabilities under the model at the time of sampling, of shape [N].
        sampler_logprobs: those under the engine, of shape [N].
        sequences: the number of each token's sequence, int64 of shape [N].
        num_sequences: B.
        level: a ratio for each ``"token"`` or for each ``"sequence"``.
        mode: ``"truncate"`` or ``"mask"``.
        cap: the largest ratio; None is none.
        floor: the smallest; None is none.

    Returns:
        The weights, of shape [N] at either level (a sequence's is repeated for its tokens), without gradients, float32
        (float64 for float64 inputs); and detached scalars: ``gap_mean`` and ``gap_max``, the mean and largest
        :math:`|\log \pi_{old} - \log \mu|` of a token, and ``ratio_min``, ``ratio_mean``, ``ratio_max`` of the weights
        returned, each token's or each sequence's once. They are 0 where nothing was measured.

    Raises:
        ValueError: the shapes do not fit, the bounds are not in order or both missing, or a name is not known.
    """
    check_tokens(sequences, num_sequences, logprobs=logprobs, sampler_logprobs=sampler_logprobs)
    if level not in ("token", "sequence"):
        raise ValueError(f"level is 'token' or 'sequence', not {level!r}")
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode is 'truncate' or 'mask', not {mode!r}")
    if cap is None and floor is None:
        raise ValueError("cap or floor must be given; without a bound a single ratio can outweigh the batch")
    if cap is not None and floor is not None and floor >= cap:
        raise ValueError(f"floor is below cap, not {floor} with a cap of {cap}")

    difference = widen(logprobs) - widen(sampler_logprobs)
    gap = difference[~difference.isnan()].abs()
    difference = difference.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    if level == "sequence":
        difference = sequence_sums(difference, sequences, num_sequences)
    ratios = bounded_exp(difference)
    if mode == "truncate":
        ratios = ratios.clamp(min=floor, max=cap)
    else:
        outside = torch.zeros_like(ratios, dtype=torch.bool)
        if cap is not None:
            outside |= ratios > cap
        if floor is not None:
            outside |= ratios < floor
        ratios = ratios.masked_fill(outside, 0.0)

    zero = ratios.new_zeros(())
    metrics = {
        "gap_mean": gap.mean() if gap.numel() else zero,
        "gap_max": gap.max() if gap.numel() else zero,
        "ratio_min": ratios.min() if ratios.numel() else zero,
        "ratio_mean": ratios.mean() if ratios.numel() else zero,
        "ratio_max": ratios.max() if ratios.numel() else zero,
    }
    return ratios[sequences] if level == "sequence" else ratios, metrics
