"""What is checked of a whole model before its folder takes its place.

1. **Weights**, read back from the written files and compared with the model's, in float64 and by other code than what
   wrote them. A tensor that was to stay is equal bit for bit. One that got another type is off by half a unit in its
   last place at most. A compressed one is off by half a step of its codes at most, and each scale is the row's largest
   value over the largest code, to half a unit in its last place. The failing tensor is named.
2. **Log-probabilities** of the actual tokens of held-out rows, in fp32: the model of the written files and
   configuration against the model it was made from. The bound is measured as the merge's is
   (:mod:`ft_export.merging.logprobs_check`): noise of the size of the rounding on the same weights, drawn twice; four
   times the largest and three times the mean of what that does. This guards against what the first check cannot see:
   a wrong configuration, a lost tie, a tensor under the wrong name.

What a server's rounding of activations costs on top is measured too, and told; it has no bound here, for it is the
server's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.bases import load_model
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.logprobs import Difference, all_logprobs, difference, evaluation_error, token_logprobs
from ft_export.merging.logprobs_check import DRAWS, LARGEST_FACTOR, MEAN_FACTOR
from ft_export.merging.names import parameter_names
from ft_export.merging.weights_check import half_ulp
from ft_export.progress import Progress, counting, silent
from ft_export.serving.folder import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["Gap", "Samples", "check_gap", "check_reads", "check_stored", "served_model"]

UNIT = 2.0**-24
BLOCK = 1 << 22
"""How many values are looked at a time in float64 (32 MiB)."""


def check_stored(plan: Plan, folder: Path, progress: Progress = silent) -> dict[str, int]:
    """Compare what lies in ``folder`` with the model, tensor by tensor.

    Returns:
        How many tensors were compressed, cast and left as they are.

    Raises:
        ExportError: one is not what it should be; it is named.
    """
    written = Checkpoint(folder)
    expected = {key for name in plan.stored for key in plan.written(name)}
    if set(written) != expected:
        name = min(set(written) ^ expected)
        raise ExportError(f"the written files and the model differ in {name}: nothing was written")
    count = counting(progress, len(plan.stored.entries), "tensors checked")
    for name in plan.stored:
        tensor, was = written.tensor(plan.key(name)), plan.stored.tensor(name)
        if name in plan.compressed:
            _check_compressed(plan, name, was, tensor, written.tensor(f"{name}_scale"))
        elif name in plan.cast:
            error = (tensor.double() - was.double()).abs()
            if tensor.dtype != plan.dtype or not bool((error <= half_ulp(tensor.double().abs(), plan.dtype)).all()):
                raise ExportError(f"{name} is not the model's, rounded to {plan.dtype}: nothing was written")
        elif tensor.dtype != was.dtype or not _equal_bits(tensor, was):
            raise ExportError(f"{name} is not the model's: nothing was written")
        count()
    kept = len(plan.stored.entries) - len(plan.compressed) - len(plan.cast)
    return {"compressed": len(plan.compressed), "cast": len(plan.cast), "kept": kept}


def _equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    if one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def _check_compressed(plan: Plan, name: str, was: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    step = max(1, BLOCK // max(1, was.shape[1]))
    for start in range(0, was.shape[0], step):
        rows = slice(start, start + step)
        exact, code, scale = was[rows].double(), codes[rows].double(), scales[rows].double()
        largest = exact.abs().amax(dim=1, keepdim=True)
        expected = largest / plan.form.largest
        allowed = half_ulp(expected, scales.dtype) * 1.001 + UNIT * 2 * expected  # the quotient was taken in fp32
        wrong = ((scale - expected).abs() > allowed) & (expected > 0)
        if bool(wrong.any()) or not bool((scale > 0).all() & scale.isfinite().all()):
            row = start + int(wrong.reshape(-1).int().argmax())
            raise ExportError(f"{name}_scale is not the model's largest value, in row {row}: nothing was written")
        error = (code * scale - exact).abs()
        # the quotient of fp32 may fall on the other side of the middle between two codes
        bound = plan.form.half_step(codes[rows], scales[rows]) + 4 * UNIT * (code.abs() + 1) * scale
        if not bool((error <= bound).all()):
            row = start + int((error > bound).any(dim=1).int().argmax())
            raise ExportError(f"{name} is off by more than half a step, in row {row}: nothing was written")


@dataclass(frozen=True)
class Gap:
    """How the written model differs from the one it was made from, in nats.

    Attributes:
        found: the written model's weights, activations as they are.
        noise: what noise of the size of the rounding does, the larger of the draws.
        bound_largest, bound_mean: what ``found`` may be.
        greedy: in how many places of the texts the likeliest token is the same.
        perplexity: of the texts, before and after.
        samples: how many texts.
        served: with activations rounded as a server rounds them too; None where it does not.
        served_greedy: as ``greedy``, with those.
    """

    found: Difference
    noise: Difference
    bound_largest: float
    bound_mean: float
    greedy: int
    perplexity: tuple[float, float]
    samples: int
    served: Difference | None = None
    served_greedy: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "weights": self.found.as_dict(),
            "noise": self.noise.as_dict(),
            "bound_largest": self.bound_largest,
            "bound_mean": self.bound_mean,
            "greedy_equal": self.greedy,
            "perplexity": {"before": self.perplexity[0], "after": self.perplexity[1]},
            "with_rounded_activations": None if self.served is None else self.served.as_dict(),
            "greedy_equal_with_rounded_activations": self.served_greedy,
        }


Samples = Sequence[Sequence[int]] | Callable[[Any], Sequence[Sequence[int]]]
"""Token ids of texts, or a function that makes them of a transformers model, which counts an image's tokens."""


def check_reads(folder: Path, samples: Samples, progress: Progress = silent) -> int:
    """Let transformers read texts from the written folder.

    Returns:
        How many they are.

    Raises:
        ExportError: it cannot be loaded, or says what is no number.
    """
    import torch

    progress(0, 0, "loading the written model in fp32")
    model = load_model(folder, torch.float32)
    texts = list(samples(model) if callable(samples) else samples)
    read = token_logprobs(model, texts, counting(progress, len(texts), "texts read by the written model"))
    if not texts or not all(bool(values.isfinite().all()) for values in read):
        raise ExportError("the written model's log-probabilities are no numbers: nothing was written")
    return len(texts)


def check_gap(plan: Plan, folder: Path, samples: Samples, progress: Progress = silent) -> Gap:
    """Measure the written model against the one it was made from.

    Raises:
        ExportError: the difference is past its bound, or the written model cannot be built.
    """
    import torch

    written = Checkpoint(folder)
    progress(0, 0, "loading the model in fp32")
    model = load_model(plan.model, torch.float32)
    samples = list(samples(model) if callable(samples) else samples)
    before = _read(model, samples, counting(progress, len(samples), "texts read by the model"))
    names = parameter_names(plan.stored, model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    generator = torch.Generator().manual_seed(0)
    changed = sorted(plan.compressed | plan.cast)
    kept = {name: parameters[names[name]].detach().clone() for name in changed}
    count = counting(progress, DRAWS * len(samples), "texts read with rounding's noise")
    draws = []
    for _ in range(DRAWS):
        for name in changed:
            if name in plan.compressed:
                size = plan.form.half_step(written.tensor(name), written.tensor(f"{name}_scale")).float()
            else:
                size = half_ulp(kept[name].double().abs(), plan.dtype).float()
            drawn = size * (2 * torch.rand(size.shape, generator=generator) - 1)
            parameters[names[name]].data.copy_(kept[name] + drawn)
        draws.append(difference(_read(model, samples, count)[0], before[0]))
    del model, parameters, kept

    progress(0, 0, "building the written model in fp32")
    model = _written_model(plan, folder, written)
    after = _read(model, samples, counting(progress, len(samples), "texts read by the written model"))
    found = difference(after[0], before[0])
    served, served_greedy = None, None
    if plan.compressed:
        _round_activations(model, plan)
        rounded = _read(model, samples, counting(progress, len(samples), "texts read with rounded activations"))
        served, served_greedy = difference(rounded[0], before[0]), _agreement(rounded[1], before[1])

    noise = Difference(max(d.largest for d in draws), max(d.mean for d in draws), found.tokens)
    floor = evaluation_error(before[0])
    gap = Gap(
        found,
        noise,
        LARGEST_FACTOR * noise.largest + floor,
        MEAN_FACTOR * noise.mean + floor,
        _agreement(after[1], before[1]),
        (_perplexity(before[0]), _perplexity(after[0])),
        len(samples),
        served,
        served_greedy,
    )
    # written so that a difference that is not a number fails
    if not (found.largest <= gap.bound_largest and found.mean <= gap.bound_mean):
        raise ExportError(
            f"the {plan.form.name} model does not say what the model says: log-probabilities differ by up to "
            f"{found.largest:.3g} (bound {gap.bound_largest:.3g}), {found.mean:.3g} on average (bound "
            f"{gap.bound_mean:.3g}); nothing was written"
        )
    return gap


Reading = tuple[list["torch.Tensor"], list["torch.Tensor"]]


def _read(model: Any, samples: Sequence[Sequence[int]], count: Callable[[], None]) -> Reading:
    """For each text the log-probabilities of its tokens but the first, and the likeliest in their places."""
    import torch

    chosen, likeliest = [], []
    for ids in samples:
        said = all_logprobs(model, ids)[:-1]
        after = torch.tensor(list(ids[1:])).unsqueeze(1)
        has_row = after.squeeze(1) < said.shape[-1]  # the token of an image's pieces may be one past the head's
        chosen.append(said[has_row].gather(1, after[has_row]).squeeze(1))
        likeliest.append(said.argmax(dim=-1))
        count()
    return chosen, likeliest


def _agreement(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> int:
    return sum(int((a == b).sum()) for a, b in zip(one, other, strict=True))


def _perplexity(values: Sequence[torch.Tensor]) -> float:
    total = sum(float(value.sum()) for value in values)
    return math.exp(-total / sum(value.numel() for value in values))


def served_model(plan: Plan, folder: Path) -> Any:
    """The model of the written files in fp32, which rounds activations where a server does."""
    model = _written_model(plan, folder, Checkpoint(folder))
    if plan.compressed:
        _round_activations(model, plan)
    return model


def _written_model(plan: Plan, folder: Path, written: Checkpoint) -> Any:
    """The model that the written files and configuration stand for, dequantized, without compressed-tensors."""
    import torch
    import transformers

    if not plan.compressed:
        return load_model(folder, torch.float32)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    names = parameter_names(plan.stored, model)
    known = dict(model.named_parameters(remove_duplicate=False))
    loaded = set()
    for name in plan.stored:
        tensor = written.tensor(name).float()
        if name in plan.compressed:
            tensor = tensor * written.tensor(f"{name}_scale").float()
        if names[name] in known:
            known[names[name]].data.copy_(tensor)
            loaded.add(names[name])
    model.tie_weights()
    known = dict(model.named_parameters(remove_duplicate=False))
    held = {id(known[name]) for name in loaded}
    missing = sorted(name for name, parameter in known.items() if id(parameter) not in held)
    if missing:
        raise ExportError(f"{plan.model} has no weights for {missing[0]} ({len(missing)} missing): it is incomplete")
    return model.eval()


def _round_activations(model: Any, plan: Plan) -> None:
    """Let each compressed layer round its inputs as a server does: in 8 bits, with a scale for each token."""

    def rounded(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        value = inputs[0].float()
        scale = value.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / plan.form.largest
        codes = (value / scale).clamp(-plan.form.largest, plan.form.largest)
        codes = codes.round() if plan.form.codes == "int8" else codes.to(plan.form.code_dtype()).float()
        return ((codes * scale).to(inputs[0].dtype), *inputs[1:])

    modules = dict(model.named_modules())
    for name in plan.compressed:
        modules[name.removesuffix(".weight")].register_forward_pre_hook(rounded)
