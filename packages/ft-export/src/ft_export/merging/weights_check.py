"""The merge's first check: every written tensor against the value that the adapter's files stand for."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.merging.adapter import Adapter, LowRank, Replacement
from ft_export.progress import Progress, silent

if TYPE_CHECKING:
    import torch

__all__ = ["WeightsCheck", "check_weights", "half_ulp"]

CHECKED = "tensors checked"


@dataclass(frozen=True)
class WeightsCheck:
    """What was compared.

    Attributes:
        merged: tensors that a low-rank product was added to.
        replaced: tensors that the adapter holds whole.
        untouched: tensors equal to the base's, bit for bit (after the cast, where the base has another type).
        largest_error: the largest distance of a merged value from the exact one, in units of the rounding that is
            allowed (half a unit in the last place plus fp32's own error); at most 1.
    """

    merged: int
    replaced: int
    untouched: int
    largest_error: float


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbouring numbers of ``dtype`` at ``values`` (float64), subnormals included."""
    import torch

    info = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent.double() - 1  # |value| lies in [2^exponent, 2^(exponent+1))
    smallest = torch.log2(torch.tensor(info.tiny, dtype=torch.float64))
    exponent = torch.where(values == 0, smallest, exponent)  # frexp gives 0 an exponent of 0, that of 1/2 to 1
    return torch.exp2(torch.maximum(exponent, smallest)) * (info.eps / 2)


def check_weights(
    written: Checkpoint,
    base: Checkpoint,
    adapter: Adapter,
    parameters: Set[str],
    aliases: Mapping[str, str],
    progress: Progress = silent,
) -> WeightsCheck:
    """Compare every tensor of ``written`` with base and adapter.

    Args:
        parameters: the names of the base model's parameters; its files may hold more, which are not looked at.
            Names in ``written`` and ``base`` are the model's own (:func:`~ft_export.merging.names.parameter_names`).
        aliases: for each parameter that is tied to another one, the name under which the base stores their tensor.
        progress: see :data:`ft_export.progress.Progress`.

    Raises:
        ExportError: a merged value is further from the exact one than half a unit in the last place of the written
            type, another tensor differs from the base's or the adapter's, or a tensor is missing. Names the tensor.
    """
    seen: set[str] = set()
    biases = adapter.biases()
    counts = {"merged": 0, "replaced": 0, "untouched": 0}
    largest = 0.0
    for number, name in enumerate(written):
        progress(number, len(written.entries), CHECKED)
        change = adapter.changes.get(name)
        value = written.tensor(name)
        if isinstance(change, Replacement):
            _same(name, value, adapter.files.tensor(change.key), "the adapter's")
            counts["replaced"] += 1
            seen.add(name)
            continue
        stored = aliases.get(name, name)
        if stored not in base:
            raise ExportError(f"the merged model has a tensor {name} that neither the base nor the adapter has")
        source = base.tensor(stored)
        if change is None and name in biases:
            largest = max(largest, _bias(name, value, source, adapter, biases[name]))
            counts["merged"] += 1
        elif change is None:
            _same(name, value, source, "the base's")
            counts["untouched"] += 1
        else:
            largest = max(largest, _weight(name, value, source, adapter, change))
            counts["merged"] += 1
            seen.add(name)
    progress(len(written.entries), len(written.entries), CHECKED)
    # a tied pair that stays tied is stored once
    for name in adapter.changes:
        if name not in seen and aliases.get(name) not in seen:
            raise ExportError(f"the merged model lacks {name}, which the adapter changes")
    for name in parameters:
        if name in base and name not in written and aliases.get(name, "") not in written:
            raise ExportError(f"the merged model lacks {name}, which the base has")
    return WeightsCheck(counts["merged"], counts["replaced"], counts["untouched"], largest)


def _same(name: str, value: torch.Tensor, expected: torch.Tensor, whose: str) -> None:
    import torch

    if expected.is_floating_point() and not bool(torch.isfinite(expected).all()):
        raise ExportError(f"{whose} {name} holds values that are not finite: it is broken")
    expected = expected.to(value.dtype)
    if expected.is_floating_point() and not bool(torch.isfinite(expected).all()):
        raise ExportError(f"the merged {name} is out of the range of {_name(value.dtype)}: pass --dtype bfloat16")
    if value.shape != expected.shape or not torch.equal(value, expected):
        differing = int((value != expected).sum()) if value.shape == expected.shape else value.numel()
        raise ExportError(f"the merged model's {name} differs from {whose} in {differing} of {value.numel()} values")


def _weight(name: str, value: torch.Tensor, source: torch.Tensor, adapter: Adapter, change: LowRank) -> float:
    largest = 0.0
    for exact, written, error in adapter.exact(change, source, value):
        largest = max(largest, _compare(name, exact, written, error, value.dtype))
    return largest


def _bias(name: str, value: torch.Tensor, source: torch.Tensor, adapter: Adapter, change: LowRank) -> float:
    exact = adapter.exact_bias(change, source)
    return _compare(name, exact, value.double(), 2.0**-22 * exact.abs(), value.dtype)


def _compare(name: str, exact: torch.Tensor, written: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> float:
    import torch

    if not bool(torch.isfinite(exact).all()):
        raise ExportError(f"the adapter or the base holds values that are not finite: tensor {name}")
    if not bool(torch.isfinite(written).all()):
        raise ExportError(f"the merged {name} is out of the range of {_name(dtype)}: pass --dtype bfloat16")
    allowed = half_ulp(torch.maximum(exact.abs(), written.abs()), dtype) + error
    ratio = ((written - exact).abs() / allowed).max().item()
    if ratio > 1:
        worst = int(((written - exact).abs() / allowed).argmax())
        raise ExportError(
            f"the merged {name} is wrong: {written.flatten()[worst].item():.6g} where base and adapter make "
            f"{exact.flatten()[worst].item():.6g} ({ratio:.1f} times the rounding of {_name(dtype)})"
        )
    return float(ratio)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
