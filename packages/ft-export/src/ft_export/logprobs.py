"""Log-probabilities of given tokens under teacher forcing, in fp32, and how two such measurements differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.hearing import Heard, Spoken

if TYPE_CHECKING:
    import torch

__all__ = ["Difference", "all_logprobs", "difference", "evaluation_error", "token_logprobs"]


@dataclass(frozen=True)
class Difference:
    """How far two models' log-probabilities (nats) of the same tokens lie apart."""

    largest: float
    mean: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def all_logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of every possible next token after each of ``ids``: ``(len(ids), vocabulary)``, fp32."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(**_inputs(ids, device), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1).cpu()


def token_logprobs(
    model: Any, samples: Sequence[Sequence[int]], count: Callable[[], None] = lambda: None
) -> list[torch.Tensor]:
    """For each sample the log-probabilities of its tokens but the first.

    A model with a score head in place of a language-model head gives its scores instead. ``count`` is called after each
    sample.
    """
    import torch

    results = []
    model.eval()
    for ids in samples:
        if isinstance(ids, Spoken):
            results.append(ids.read(model))
            count()
            continue
        device = next(model.parameters()).device
        with torch.inference_mode():
            logits = _caller(model, ids)(**_inputs(ids, device), use_cache=False).logits[0].float().cpu()
        if logits.dim() == 1:
            results.append(logits)
        else:
            chosen = torch.tensor(list(ids[1:])).unsqueeze(1)
            said = torch.log_softmax(logits[:-1], dim=-1)
            has_row = chosen.squeeze(1) < logits.shape[-1]  # the token of an image's pieces may be one past the head's
            results.append(said[has_row].gather(1, chosen[has_row]).squeeze(1))
        count()
    return results


def _caller(model: Any, ids: Sequence[int]) -> Any:
    """What is called with sounds: PEFT's own forward for encoder and decoder has other keywords than a Whisper's."""
    return model.get_base_model() if isinstance(ids, Heard) and hasattr(model, "get_base_model") else model


def _inputs(ids: Sequence[int], device: Any) -> dict[str, torch.Tensor]:
    """A batch of one text, with the images or the sound that go with it (``Seen``, ``Heard``)."""
    import torch

    more: dict[str, torch.Tensor] = getattr(ids, "inputs", {})
    name = getattr(ids, "keyword", "input_ids")
    return {name: torch.tensor([list(ids)], device=device), **{k: v.to(device) for k, v in more.items()}}


def difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """Over all samples.

    Raises:
        ExportError: no sample has a token to compare, so nothing would have been checked.
    """
    import torch

    gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(one, other, strict=True)] or [torch.empty(0)])
    if not gaps.numel():
        raise ExportError("no sample has two tokens, so the models cannot be compared: give longer held-out rows")
    return Difference(gaps.max().item(), gaps.mean().item(), gaps.numel())


def evaluation_error(samples: Sequence[torch.Tensor]) -> float:
    """What two fp32 evaluations of one function may differ by because they add in another order.

    64 units of fp32's rounding (2^-24 each), relative to the largest log-probability: sums of some thousand terms in
    blocks, layer after layer, stay well below that, and both sides carry it.
    """
    largest = max(1.0, *(sample.abs().max().item() for sample in samples if sample.numel()))
    return 2 * 64 * 2.0**-24 * largest
