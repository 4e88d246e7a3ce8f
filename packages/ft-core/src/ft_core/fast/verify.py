"""How exact the fast layers are: their loss and gradients, and transformers' own, against float64.

Three fresh loads of the model, cut to a few layers, see the same batches with the same adapter: transformers' layers in
float64, transformers' layers as they train, and ft's. The distance of each gradient from the float64 one, relative to
its length, is the error; the fast layers may not have more than twice the error of transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Float64", "Ledger", "Line", "verify"]

TOO_MUCH = 2.0
"""Times transformers' own error from which the fast layers' is called a mismatch."""
FEW = 1e-3
"""Gradients shorter than this share of the longest are measured by that: they may be nothing but rounding."""

SCALE = 2.0**16
"""By what the loss is multiplied in float16 at first: torch's ``GradScaler`` begins with it."""

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Line:
    """One parameter: the mean errors of its gradient over the batches, relative L2 against float64.

    Attributes:
        name: the parameter's. fast, plain: the means.
        batches: each batch's errors, fast and plain.
    """

    name: str
    fast: float
    plain: float
    batches: tuple[tuple[float, float], ...]

    @property
    def ratio(self) -> float:
        """The fast error over the plain one."""
        return self.fast / self.plain if self.plain else 1.0 if not self.fast else math.inf


@dataclass(frozen=True)
class Ledger:
    """What was compared, and found.

    Attributes:
        model, family, dtype, quantization, parameters: of what. ``parameters``: "adapter" or "all".
        layers, batches, tokens: how much of it.
        losses: the mean relative errors of the loss, fast and plain.
        lines: one for each parameter.
        floor: errors under this are rounding of the dtype itself, whatever their ratio.
    """

    model: str
    family: str
    dtype: str
    quantization: str
    parameters: str
    layers: int
    batches: int
    tokens: int
    losses: tuple[float, float]
    lines: tuple[Line, ...]
    floor: float

    @property
    def mismatches(self) -> list[Line]:
        """Parameters whose gradient is wrong, the worst first."""
        wrong = [n for n in self.lines if not n.fast <= TOO_MUCH * max(n.plain, self.floor)]
        return sorted(wrong, key=lambda n: -math.inf if math.isnan(n.fast) else -n.ratio)

    @property
    def ratio(self) -> float:
        """The median parameter's error, the fast layers' over transformers' own."""
        return self._ratio(range(self.batches))

    @property
    def deviation(self) -> float | None:
        """The standard error of :attr:`ratio`, a jackknife over the batches; None for a single one.

        The errors of parameters go together, since each layer hands its own on to those before it: what is independent
        are the batches, however many parameters there are.
        """
        count = self.batches
        if count < 2:
            return None
        without = [self._ratio([i for i in range(count) if i != left_out]) for left_out in range(count)]
        return math.sqrt((count - 1) / count * sum((value - mean(without)) ** 2 for value in without))

    def _ratio(self, batches: Sequence[int]) -> float:
        fast, plain = (median(mean(n.batches[i][side] for i in batches) for n in self.lines) for side in (0, 1))
        return fast / plain if plain else 1.0 if not fast else math.inf

    def summary(self) -> dict[str, float | None]:
        """Medians, their ratio with its standard error, and the largest ratio."""
        return {
            "median_fast": median(n.fast for n in self.lines),
            "median_plain": median(n.plain for n in self.lines),
            "ratio": self.ratio,
            "deviation": self.deviation,
            "largest_ratio": max(n.fast / max(n.plain, self.floor) for n in self.lines),
        }

    def as_json(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {**asdict(self), "summary": self.summary(), "mismatches": [n.name for n in self.mismatches]}


class Float64(TorchFunctionMode):
    """Within it, what asks torch for float32 gets float64.

    transformers computes norms, angles, softmax and losses in float32 whatever a model's dtype; a float64 model is
    exact to float64 only where that is left out.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        return function(*_wider(args), **_wider(kwargs or {}))


def _wider(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if isinstance(value, tuple | list):
        return type(value)(_wider(v) for v in value) if type(value) in (tuple, list) else value
    if isinstance(value, dict):
        return {key: _wider(v) for key, v in value.items()}
    return value


def verify(
    load: Callable[[bool], Any],
    *,
    name: str,
    dtype: torch.dtype,
    quantization: str = "none",
    parameters: Literal["adapter", "all"] = "adapter",
    batches: int = 5,
    tokens: int = 256,
    seed: int = 0,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    fast: Callable[[Any], Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Ledger:
    """Compare the fast layers of a model, transformers' own and float64.

    Args:
        load: loads the model afresh, on the device, as it is trained; given True, without quantization.
        name, quantization: for the ledger.
        dtype: what it is trained in.
        parameters: whose gradients: those of an adapter on all linear layers with random A and B, or all.
        batches, tokens: how many batches, of so many tokens in three documents each.
        inputs: batches with labels instead of these, as a collator makes them: with images, say. Numbers in them are
            widened for float64.
        fast: puts the fast layers into the model, and returns a handle that can switch them off; None for
            :func:`ft_core.fast.enable`.
        progress: told what comes next.

    Raises:
        NotFast: the model is not one that the fast layers can compute.
    """
    from ft_core.fast.swap import enable

    results: dict[str, list[tuple[float, Gradients]]] = {}
    family, layers, frozen = "", 0, None
    for role in ("plain", "fast", "exact"):
        progress(f"{role}: loading")
        model = load(role == "exact")
        if role == "exact":
            model = model.to(torch.float64)  # the weights that are trained with, not others rounded less
            _copy_weights(model, frozen or {})
        elif quantization != "none" and frozen is None:
            frozen = _dequantized(model)
        config = model.config.get_text_config()
        family, layers = model.config.model_type, config.num_hidden_layers
        model = _prepared(model, parameters, seed, torch.float64 if role == "exact" else None)
        if role == "fast":
            (fast or enable)(model)
        elif inputs is not None:
            (fast or enable)(
                model
            ).on = False  # it takes the lengths of documents out, and sees to masks that would be wrong
        results[role] = []
        for i in range(len(inputs) if inputs is not None else batches):
            progress(f"{role}: batch {i + 1} of {len(inputs) if inputs is not None else batches}")
            device = next(model.parameters()).device
            if inputs is None:
                batch = _batch(config.vocab_size, tokens, seed + i, device)
            else:
                batch = {name: _given(value, device, role) for name, value in inputs[i].items() if name != "use_cache"}
            results[role].append(_step(model, batch, role, dtype))
        del model
    if inputs is not None:
        batches, tokens = len(inputs), max(_tokens(given).numel() for given in inputs)
    return Ledger(
        name, family, str(dtype).removeprefix("torch."), quantization, parameters, layers, batches, tokens,
        _loss_errors(results), _lines(results), torch.finfo(dtype).eps / 4,
    )  # fmt: skip


def _prepared(model: Any, parameters: str, seed: int, dtype: torch.dtype | None) -> Any:
    """With what is to be trained, the same numbers in each load."""
    model.config.use_cache = False
    if parameters == "all":
        return model.requires_grad_(True).train()
    from ft_core.adapters import add_lora
    from ft_core.fast.swap import disable

    model = add_lora(model, r=16)
    disable(model)  # for one of the three they are switched on again
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            scale = parameter.shape[-1] ** -0.5 * (0.1 if "lora_B" in name else 1.0)
            # As fp32 holds them, in each dtype alike.
            values = (torch.randn(parameter.shape, generator=generator) * scale).to(torch.bfloat16)
            parameter.data = values.to(parameter.device, dtype or torch.float32)
    return model.train()


def _batch(vocabulary: int, tokens: int, seed: int, device: torch.device) -> dict[str, Any]:
    """A row of three documents of random tokens, all but the first of each trained on."""
    generator = torch.Generator().manual_seed(seed)
    first, second = tokens // 2, tokens // 3
    lengths = [first, second, tokens - first - second]
    ids = torch.randint(vocabulary, (1, tokens), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = torch.where(positions == 0, -100, ids)
    given = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: value.to(device) for name, value in given.items()}


def _tokens(batch: Mapping[str, Any]) -> Tensor:
    """The tokens that a batch's loss is taken over."""
    found: Tensor = batch["input_ids"] if "input_ids" in batch else batch["labels"]
    return found


def _given(value: Any, device: torch.device, role: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, torch.float64 if role == "exact" and value.is_floating_point() else value.dtype)


def _step(model: Any, batch: Mapping[str, Any], role: str, dtype: torch.dtype) -> tuple[float, Gradients]:
    """Loss and gradients; in float16 of a scaled loss, as it is trained: small ones would be lost otherwise."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scale = SCALE if dtype == torch.float16 and role != "exact" else 1.0
    while True:
        with _arithmetic(role, _tokens(batch).device, dtype):
            loss = model(**batch, use_cache=False).loss
        found = torch.autograd.grad(loss * scale, list(parameters.values()), allow_unused=True)
        gradients = {name: g.detach().cpu() for name, g in zip(parameters, found, strict=True) if g is not None}
        if scale == 1.0:
            return loss.item(), gradients
        if all(bool(g.isfinite().all()) for g in gradients.values()):
            return loss.item(), {name: g.float() / scale for name, g in gradients.items()}
        scale /= 2  # too large for float16: a trainer leaves the step out and does the same


@contextmanager
def _arithmetic(role: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """float64 throughout; or autocast as in training, where that computes in 16 bits."""
    if role == "exact":
        with Float64():
            yield
    else:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            yield


def _loss_errors(results: dict[str, list[tuple[float, Gradients]]]) -> tuple[float, float]:
    exact = [loss for loss, _ in results["exact"]]
    fast, plain = (
        mean(abs(loss - right) / abs(right) for (loss, _), right in zip(results[role], exact, strict=True))
        for role in ("fast", "plain")
    )
    return fast, plain


def _lines(results: dict[str, list[tuple[float, Gradients]]]) -> tuple[Line, ...]:
    names = list(dict.fromkeys(name for _, exact in results["exact"] for name in exact))
    errors: dict[str, dict[str, list[float]]] = {role: {name: [] for name in names} for role in ("fast", "plain")}
    for i, (_, exact) in enumerate(results["exact"]):
        longest = max(float(g.norm()) for g in exact.values())
        for role in ("fast", "plain"):
            made = results[role][i][1]
            for name in names:
                errors[role][name].append(_error(made.get(name), exact.get(name), longest))
    pairs = {name: tuple(zip(errors["fast"][name], errors["plain"][name], strict=True)) for name in names}
    return tuple(Line(name, mean(errors["fast"][name]), mean(errors["plain"][name]), pairs[name]) for name in names)


def _error(given: Tensor | None, exact: Tensor | None, longest: float) -> float:
    """The relative distance of a gradient; one that should not be there, or is not, is infinitely wrong."""
    if given is None or exact is None:
        return 0.0 if given is exact else math.inf  # a batch of text alone has none for what sees
    return float((given.double() - exact).norm()) / max(float(exact.norm()), FEW * longest)


def _dequantized(model: Any) -> dict[str, Tensor]:
    """The numbers that quantized weights stand for, by the names of their layers, on the CPU."""
    from ft_core.fast.linears import numbers

    found = {}
    for name, module in model.named_modules():
        values = numbers(module)
        if values is not None:
            found[name] = values.cpu()
    return found


def _copy_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, values in weights.items():
            target = model.get_submodule(name).weight
            target.copy_(values.to(target.device, target.dtype))
