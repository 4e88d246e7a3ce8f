"""The merge's second check: the merged model says what the adapter on its base says.

The bound is measured, not guessed. Rounding a merged weight to 16 bits moves it by an amount spread evenly over half a
unit in the last place to either side. So the same amount of noise, drawn anew, is put on the same weights of the
merged model, and what this does to the same log-probabilities is what rounding can do. The merge may differ from the
adapter by three times the mean and four times the largest of two such draws (means of hundreds of tokens vary little
between draws, their maxima more), plus what fp32 evaluation itself may be off. A layer left out or scaled wrongly
is caught by the first check whatever its size; this one guards against what the first cannot see: a wrong
configuration, a lost tensor tie, a tensor under the wrong name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.bases import attach, load_model
from ft_export.errors import ExportError
from ft_export.logprobs import Difference, difference, evaluation_error, token_logprobs
from ft_export.merging.adapter import Adapter
from ft_export.merging.weights_check import half_ulp
from ft_export.progress import Progress, counting, silent
from ft_export.runs import Rope

if TYPE_CHECKING:
    import torch

__all__ = ["LogprobsCheck", "as_trained", "check_logprobs", "gap_to_quantized"]

DRAWS = 2
LARGEST_FACTOR, MEAN_FACTOR = 4.0, 3.0


@dataclass(frozen=True)
class LogprobsCheck:
    """What was measured, in nats (in the score's own unit for a score head).

    Attributes:
        merged: the merged model against the adapter on its base.
        rounding: the merged model against itself with rounding noise, the larger of the draws.
        bound_largest, bound_mean: what ``merged`` may be.
        samples: how many texts.
        values: the merged model's log-probabilities, by sample.
        texts: the samples themselves, as token ids.
    """

    merged: Difference
    rounding: Difference
    bound_largest: float
    bound_mean: float
    samples: int
    values: tuple[torch.Tensor, ...]
    texts: tuple[Sequence[int], ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "merged": self.merged.as_dict(),
            "rounding": self.rounding.as_dict(),
            "bound_largest": self.bound_largest,
            "bound_mean": self.bound_mean,
        }


def check_logprobs(
    merged: Path,
    base: Path,
    adapter: Adapter,
    samples: Sequence[Sequence[int]] | Callable[[Any], Sequence[Sequence[int]]],
    dtype: torch.dtype,
    rounded: set[str] | None,
    labels: int | None,
    rope: Rope | None = None,
    progress: Progress = silent,
    put: Callable[[Any], Any] | None = None,
) -> LogprobsCheck:
    """Measure both models in fp32 on ``samples`` and compare.

    Args:
        samples: token ids of texts, or a function that makes them of the adapter's model.
        dtype: the type the merged weights were rounded to.
        rounded: the parameters that were rounded; None for all.
        rope: the rotary scaling that the adapter's base has; the merged model's must be in its own configuration.
        progress: see :data:`ft_export.progress.Progress`.
        put: puts onto the base what the merged model is compared with; ``adapter`` by default.

    Raises:
        ExportError: the difference is past its bound.
    """
    import torch

    progress(0, 0, "loading the adapter's base in fp32")
    model = load_model(base, torch.float32, labels=labels, rope=rope)
    adapted = attach(model, adapter.folder, adapter.rows) if put is None else put(model)
    samples = list(samples(adapted) if callable(samples) else samples)
    count = counting(progress, len(samples), "texts read by the adapter on its base")
    expected = token_logprobs(adapted, samples, count)
    del model, adapted
    progress(0, 0, "loading the merged model in fp32")
    model = load_model(merged, torch.float32, labels=labels)
    values = token_logprobs(model, samples, counting(progress, len(samples), "texts read by the merged model"))
    found = difference(values, expected)

    generator = torch.Generator().manual_seed(0)
    parameters = [p for name, p in model.named_parameters() if rounded is None or name in rounded]
    kept = [parameter.detach().clone() for parameter in parameters]
    draws = []
    count = counting(progress, DRAWS * len(samples), "texts read with rounding's noise")
    for _ in range(DRAWS):
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value + _noise(value, dtype, generator))
        draws.append(difference(token_logprobs(model, samples, count), values))
    rounding = Difference(max(d.largest for d in draws), max(d.mean for d in draws), found.tokens)

    floor = evaluation_error(expected)
    check = LogprobsCheck(
        found,
        rounding,
        LARGEST_FACTOR * rounding.largest + floor,
        MEAN_FACTOR * rounding.mean + floor,
        len(samples),
        tuple(values),
        tuple(samples),
    )
    # written so that a difference that is not a number fails
    if not (found.largest <= check.bound_largest and found.mean <= check.bound_mean):
        raise ExportError(
            f"the merged model does not say what the adapter on its base says: log-probabilities differ by up to "
            f"{found.largest:.3g} (bound {check.bound_largest:.3g}), {found.mean:.3g} on average (bound "
            f"{check.bound_mean:.3g}); nothing was written"
        )
    return check


def as_trained(quantization: str, dtype: torch.dtype) -> Any:
    """transformers' configuration for a base as a run with ``quantization: nf4`` or ``int8`` holds it."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def gap_to_quantized(
    quantization: str,
    base: Path,
    adapter: Adapter,
    merged: LogprobsCheck,
    labels: int | None,
    rope: Rope | None = None,
    progress: Progress = silent,
) -> dict[str, Any] | None:
    """How far the merged model is from the 4- or 8-bit model that was trained, or why that was not measured.

    None for a run that was not quantized. There is no bound: the gap is the base's quantization error, which the
    adapter was trained on top of.
    """
    import torch

    samples = merged.texts
    if quantization not in ("nf4", "int8"):
        return None
    if find_spec("bitsandbytes") is None:
        return {"not_measured": "not measured: pip install bitsandbytes"}
    config = as_trained(quantization, torch.float32)
    progress(0, 0, f"loading the base in {quantization}, as it was trained on")
    try:
        model = load_model(base, torch.float32, labels=labels, rope=rope, quantization_config=config)
        count = counting(progress, len(samples), f"texts read by the {quantization} run")
        values = token_logprobs(attach(model, adapter.folder, adapter.rows), samples, count)
    except (ExportError, RuntimeError, NotImplementedError, ImportError) as error:
        return {"not_measured": f"not measured: bitsandbytes cannot run here ({' '.join(str(error).split())[:200]})"}
    return difference(list(merged.values), values).as_dict()


def _noise(value: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Uniform within half a unit in the last place of ``dtype`` to either side, as rounding errors are."""
    import torch

    size = half_ulp(value.abs().double(), dtype).to(value.dtype)
    return size * (2 * torch.rand(value.shape, generator=generator) - 1)
