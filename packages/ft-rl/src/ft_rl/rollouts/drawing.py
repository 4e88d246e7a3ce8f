"""How the next token is drawn from logits, and its log-probability."""

from __future__ import annotations

import torch
from torch import Tensor

from ft_rl.rollouts.protocol import Sampling

__all__ = ["draw"]


def draw(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw a token of each row, in fp32; nothing waits for the device.

    Cut in the order of transformers' warpers: repetition penalty (Keskar et al. 2019, arXiv:1909.05858), temperature,
    top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751), min-p (arXiv:2407.01082).

    Args:
        logits: ``[B, V]``. seen: bool ``[B, V]``, the tokens that are there already; for the repetition penalty.

    Returns:
        int64 ``[B]``, and fp32 ``[B]``, the log-probability of each under the distribution that it was drawn from; of
        the likeliest token (temperature 0), under the distribution of the logits.
    """
    scores = logits.float()
    if sampling.never:
        scores = scores.index_fill(1, torch.tensor(sorted(sampling.never), device=scores.device), float("-inf"))
    if sampling.repetition_penalty != 1 and seen is not None:
        penalised = torch.where(scores < 0, scores * sampling.repetition_penalty, scores / sampling.repetition_penalty)
        scores = torch.where(seen, penalised, scores)
    if sampling.temperature == 0:
        tokens = scores.argmax(-1)
    else:
        scores = scores / sampling.temperature
        if not sampling.plain:
            scores = _cut(scores, sampling)
        # Gumbel's way of drawing needs one pass, and no sum of probabilities that rounds.
        noise = torch.empty_like(scores).exponential_().log_()
        tokens = (scores - noise).argmax(-1)
    chosen = scores.gather(-1, tokens[:, None])[:, 0]
    return tokens, chosen - torch.logsumexp(scores, -1)


def _cut(scores: Tensor, sampling: Sampling) -> Tensor:
    nothing = float("-inf")
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, nothing)
    if sampling.top_p < 1:
        ordered, order = torch.sort(scores, descending=False)
        left = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        left[..., -1:] = False
        scores = scores.masked_fill(left.scatter(1, order, left), nothing)
    if sampling.min_p > 0:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), nothing)
    return scores
