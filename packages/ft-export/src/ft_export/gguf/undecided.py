"""Tokens of a mixture of experts that hang on a choice which rounding turns.

A router takes the best few of its experts. Where the last one taken and the first one left are as good as equal,
rounding gives the token to the other, and everything after it in the text moves by far more than rounding does
elsewhere (measured: from 0.01 to 1.3 nats in a model of eight experts). Such tokens say nothing of a conversion. They
are found in transformers alone: noise of the size of the rounding is put on its linear layers a few times, and a token
whose log-probabilities it moves many times as far as those of most is undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["undecided"]

DRAWS = 12
NOISE = {"f32": 1e-3, "f16": 1e-3, "bf16": 4e-3, "q8_0": 1e-2}
"""By the file's type: the noise on each output, as a share of it."""
FAR = 8.0
"""How many times the median shift makes a token undecided."""
CANDIDATES = 5


def undecided(model: Any, type: str, measured: Callable[[], Sequence[torch.Tensor]]) -> list[list[bool]] | None:
    """For each prompt and each token of its continuation, whether it is undecided; None for a model without experts.

    Args:
        model: the transformers model in fp32.
        type: of the GGUF file.
        measured: gives the model's log-probabilities, ``(tokens, vocabulary)`` for each prompt.
    """
    import torch

    if not getattr(model.config, "num_experts_per_tok", None):
        return None
    exact = measured()
    places = [rows.topk(min(CANDIDATES, rows.shape[-1])).indices for rows in exact]
    shifts = [torch.zeros(rows.shape[0]) for rows in exact]
    for draw in range(DRAWS):
        with _noise(model, NOISE.get(type, max(NOISE.values())), draw):
            for shift, rows, near, at in zip(shifts, exact, measured(), places, strict=True):
                if len(rows):
                    moved = (near.gather(1, at) - rows.gather(1, at)).abs().amax(1)
                    torch.maximum(shift, moved, out=shift)
    usual = torch.cat(shifts).median()
    return [(shift > FAR * usual).tolist() for shift in shifts]


@contextmanager
def _noise(model: Any, share: float, seed: int) -> Iterator[None]:
    import torch

    generator = torch.Generator().manual_seed(seed)

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + share * torch.randn(output.shape, generator=generator))

    handles = [layer.register_forward_hook(hook) for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
