"""Three estimates of the divergence between the policy and a reference, from the sampled tokens alone."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ft_rl.objectives.precision import bounded_exp, widen

__all__ = ["KLEstimator", "kl"]

KLEstimator = Literal["k1", "k2", "k3"]


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    r"""The estimate of :math:`\mathrm{KL}(\pi \| \pi_{ref})` that each sampled token gives.

    With :math:`r = \pi_{ref}(y_t) / \pi(y_t)` for a token that :math:`\pi` sampled:

    .. math:: k_1 = -\log r \qquad k_2 = \tfrac{1}{2} (\log r)^2 \qquad k_3 = (r - 1) - \log r

    These are the estimators of Schulman 2020 ("Approximating KL divergence", http://joschu.net/blog/kl-approx.html).
    k1 is unbiased and of either sign; k2 is biased and never negative; k3 is both unbiased and never negative, and is
    equation 4 of Shao et al. 2024 (GRPO, arXiv:2402.03300). That holds of their values: of k1's gradient the
    expectation is 0, so k1 belongs into a reward and not into a loss.

    Args:
        logprobs: log-probabilities under the policy, of any shape.
        ref_logprobs: those under the reference, of the same shape.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.

    Returns:
        The estimates, of the same shape, with gradients; float32, or float64 for float64 inputs.

    Raises:
        ValueError: the shapes differ, or the estimator is not one of the three.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"logprobs and ref_logprobs are of one shape, not {list(logprobs.shape)} and {list(ref_logprobs.shape)}"
        )
    log_r = widen(ref_logprobs) - widen(logprobs)
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    if estimator == "k3":
        return bounded_exp(log_r) - 1 - log_r
    raise ValueError(f"estimator is 'k1', 'k2' or 'k3', not {estimator!r}")
