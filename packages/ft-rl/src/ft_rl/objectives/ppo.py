"""Proximal policy optimization for language models: two clipped losses, token rewards, and the weight of the KL."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ft_rl.objectives.kl import KLEstimator
from ft_rl.objectives.kl import kl as estimate_kl
from ft_rl.objectives.precision import bounded_exp, widen
from ft_rl.objectives.tokens import check_tokens, sequence_sums

__all__ = ["AdaptiveKL", "FixedKL", "penalised_rewards", "ppo_policy", "ppo_value"]


def ppo_policy(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 0.2,
    num_items: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The clipped surrogate objective, as a loss.

    .. math::
        L = -\frac{1}{N} \sum_t \min\left[w_t A_t,\ \mathrm{clip}(w_t, 1 - \epsilon, 1 + \epsilon)\,A_t\right], \qquad
        w_t = \frac{\pi(y_t)}{\pi_{old}(y_t)}

    Equation 7 of Schulman et al. 2017 (arXiv:1707.06347).

    Args:
        logprobs: log-probabilities of the tokens under the policy, of shape [N].
        old_logprobs: those under the policy that sampled them.
        advantages: :math:`A_t`, of shape [N].
        clip_range: :math:`\epsilon`.
        num_items: what the sum is divided by, when the batch is a part of one that is accumulated; None is N. One
            below 1 counts as 1.

    Returns:
        The loss, a scalar in float32 (float64 for float64 log-probabilities), 0 when there is no token; and detached
        means over the tokens: ``ratio_mean``, of :math:`w`; ``clip_fraction``, the share whose gradient the clipping
        stops; ``approx_kl``, of :math:`\mathrm{KL}(\pi_{old} \| \pi)` by the estimator k3.

    Raises:
        ValueError: the shapes differ or are not [N], or ``clip_range`` is below 0.
    """
    _check_flat(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if clip_range < 0:
        raise ValueError(f"clip_range is 0 or more, not {clip_range}")
    logprobs, old_logprobs, advantages = widen(logprobs), widen(old_logprobs), widen(advantages)
    weights = bounded_exp(logprobs - old_logprobs)
    plain, clipped = weights * advantages, weights.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -_average(torch.minimum(plain, clipped), num_items)
    with torch.no_grad():
        metrics = {
            "ratio_mean": _average(weights),
            "clip_fraction": _average((clipped < plain).to(weights.dtype)),
            "approx_kl": _average(estimate_kl(old_logprobs, logprobs, "k3")),
        }
    return loss, metrics


def ppo_value(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    clip_range: float | None = 0.2,
    num_items: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The value function's squared error, where a step beyond the clip range earns nothing.

    .. math::
        L = \frac{1}{2N} \sum_t \max\left[(V_t - R_t)^2,\
            (\mathrm{clip}(V_t, V_{old,t} - \epsilon, V_{old,t} + \epsilon) - R_t)^2\right]

    The squared error of equation 9 of Schulman et al. 2017 (arXiv:1707.06347), which has no factor 1/2; that and the
    clipping are those of OpenAI's baselines, used for language models since Ziegler et al. 2019 (arXiv:1909.08593).

    Args:
        values: :math:`V_t` with gradients, of shape [N].
        old_values: those the batch was made with.
        returns: :math:`R_t`, such as :func:`ft_rl.objectives.gae.gae` gives.
        clip_range: :math:`\epsilon`; None is no clipping.
        num_items: what the sum is divided by; None is N. One below 1 counts as 1.

    Returns:
        The loss, a scalar in float32 (float64 for float64 values), 0 when there is no token; and detached means over
        the tokens: ``value_mean``, ``return_mean``, ``error``, the mean of :math:`(V - R)^2`, and ``clip_fraction``,
        the share whose clipped error is the larger.

    Raises:
        ValueError: the shapes differ or are not [N], or ``clip_range`` is below 0.
    """
    _check_flat(values=values, old_values=old_values, returns=returns)
    if clip_range is not None and clip_range < 0:
        raise ValueError(f"clip_range is 0 or more, or None, not {clip_range}")
    values, old_values, returns = widen(values), widen(old_values), widen(returns)
    plain = (values - returns).square()
    clipped = plain
    if clip_range is not None:
        # Moved by the clipped difference, values keep their gradient within the range and lose it outside.
        clipped = (old_values + (values - old_values).clamp(-clip_range, clip_range) - returns).square()
    loss = _average(torch.maximum(plain, clipped), num_items) / 2
    with torch.no_grad():
        metrics = {
            "value_mean": _average(values),
            "return_mean": _average(returns),
            "error": _average(plain),
            "clip_fraction": _average((clipped > plain).to(plain.dtype)),
        }
    return loss, metrics


@torch.no_grad()
def penalised_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    sequences: Tensor,
    *,
    coefficient: float,
    estimator: KLEstimator = "k1",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""A reward for each token: what leaving the reference costs there, and at the last one the sequence's score.

    .. math:: r_t = -\beta\,\mathrm{KL}_t + [t = T]\,s

    Summed over a sequence that is equation 2 of Ziegler et al. 2019 (arXiv:1909.08593), for the estimator k1.

    Args:
        scores: :math:`s`, a score for each sequence, of shape [B].
        logprobs: log-probabilities of the tokens under the policy that sampled them, of shape [N].
        ref_logprobs: those under the reference.
        sequences: the number of each token's sequence, int64 of shape [N]; tokens of a sequence in their order.
        coefficient: :math:`\beta`.
        estimator: see :func:`ft_rl.objectives.kl.kl`.

    Returns:
        The rewards, of shape [N], without gradients; float32, or float64 for float64 inputs. A sequence without tokens
        has nowhere to put its score. And detached scalars: ``kl``, the mean over sequences of their tokens' sum, which
        is what :class:`AdaptiveKL` is told, and ``score_mean``.

    Raises:
        ValueError: the shapes do not fit.
    """
    if scores.ndim != 1:
        raise ValueError(f"scores are of shape [B], one a sequence, not {list(scores.shape)}")
    check_tokens(sequences, len(scores), logprobs=logprobs, ref_logprobs=ref_logprobs)
    scores = widen(scores)
    token_kl = estimate_kl(logprobs, ref_logprobs, estimator)
    positions = torch.arange(len(sequences), device=sequences.device)
    last = positions.new_full((len(scores),), -1).scatter_reduce(0, sequences, positions, "amax")
    rewards = -coefficient * token_kl + torch.where(positions == last[sequences], scores[sequences], 0.0)
    sums = sequence_sums(token_kl, sequences, len(scores))
    return rewards, {"kl": sums.mean(), "score_mean": scores.mean()}


@dataclass
class FixedKL:
    """A weight of the KL penalty that stays as it is.

    Attributes:
        coefficient: the weight.
    """

    coefficient: float = 0.05

    def update(self, kl: float) -> None:
        """Nothing; so that it can stand where :class:`AdaptiveKL` stands."""

    def state_dict(self) -> dict[str, float]:
        """What :meth:`load_state_dict` takes."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a state."""
        self.coefficient = float(state["coefficient"])


@dataclass
class AdaptiveKL:
    r"""A weight of the KL penalty that is moved until the divergence is what it should be.

    .. math::
        e_t = \mathrm{clip}\left(\frac{\mathrm{KL}_t - \mathrm{KL}_{target}}{\mathrm{KL}_{target}}, -0.2, 0.2\right),
        \qquad \beta_{t+1} = \beta_t (1 + K_\beta e_t)

    Section 2.2 of Ziegler et al. 2019 (arXiv:1909.08593).

    Attributes:
        coefficient: :math:`\beta`, the weight to begin with, then the present one.
        target: :math:`\mathrm{KL}_{target}`, the divergence of a whole sequence, in nats.
        gain: :math:`K_\beta`; the paper's is 0.1.

    Raises:
        ValueError: coefficient, target or gain is not above 0.
    """

    coefficient: float = 0.05
    target: float = 6.0
    gain: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is a number above 0, not {value}")

    def update(self, kl: float) -> None:
        """Move the weight after a batch.

        Args:
            kl: the batch's divergence, the mean over its sequences, in nats.

        Raises:
            ValueError: it is not finite; the weight stays as it was.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the divergence to adapt to is a finite number, not {kl}")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + self.gain * error

    def state_dict(self) -> dict[str, float]:
        """What :meth:`load_state_dict` takes; target and gain are settings and not in it."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a state."""
        self.coefficient = float(state["coefficient"])


def _check_flat(**inputs: Tensor) -> None:
    first = next(iter(inputs.values()))
    if any(x.ndim != 1 or x.shape != first.shape for x in inputs.values()):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items())
        raise ValueError(f"per-token inputs are of one shape [N], not {shapes}")


def _average(values: Tensor, num_items: float | Tensor | None = None) -> Tensor:
    return values.sum() / torch.as_tensor(len(values) if num_items is None else num_items).clamp(min=1)
