"""A LoRA adapter's files and the weights that they stand for, by our own formulas.

This is the independent side of the merge's check: it reads ``adapter_config.json`` and ``adapter_model.safetensors``
and never asks PEFT.

- LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1): W' = W + (alpha / r) B A
- rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732): alpha / sqrt(r) in place of alpha / r
- DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353, equation 5): W' = m (W + s B A) / ||W + s B A||, the norm
  over each output row
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.runs import Source, read_json

if TYPE_CHECKING:
    import torch

__all__ = ["PLAIN_STARTS", "Adapter", "LowRank", "Replacement", "base_of"]

UNIT = 2.0**-24
"""Half the distance of 1 to the next fp32 number: the relative error of one fp32 operation."""

BLOCK = 1 << 24
"""How many values are computed at a time in float64 (128 MiB)."""


OTHER_FORMS = (
    "target_parameters", "trainable_token_indices", "layer_replication", "megatron_config", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Settings of PEFT's with which an adapter is more, or something else, than a low-rank product on each weight."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Ways to begin an adapter (``init_lora_weights``) that leave its base as it is; others with a name change it."""


@dataclass
class LowRank:
    """A weight that the adapter changes: the names of its tensors in the adapter's file, and its scale."""

    module: str
    scale: float
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def tensor(self) -> str:
        return f"{self.module}.weight"


@dataclass(frozen=True)
class Replacement:
    """A tensor that the adapter holds whole (``modules_to_save``, trained biases)."""

    tensor: str
    key: str


PARTS = {
    "lora_A.weight": "A",
    "lora_embedding_A": "A",
    "lora_B.weight": "B",
    "lora_embedding_B": "B",
    "lora_B.bias": "bias",
    "base_layer.weight": "base",  # PEFT saves adapted embeddings with the layer they sit on
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


class Adapter:
    """A PEFT adapter of type LORA.

    Attributes:
        config: what ``adapter_config.json`` says.
        changes: by the name of the base model's tensor, how it changes.
        rows: how many tokens the merged model has, where the vocabulary grew in training; else None. Whoever puts the
            adapter on its base finds it out (:func:`ft_export.merging.growing.grown_rows`) and sets it.

    Raises:
        ExportError: the files are missing or broken, or the adapter is of a kind that cannot be merged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "adapter_config.json")
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise ExportError(f"{folder} is a {kind} adapter: only LORA (with rsLoRA and DoRA) can be merged")
        for key in OTHER_FORMS:
            if self.config.get(key):
                raise ExportError(f"{folder} uses {key}, which cannot be merged here: merge it with PEFT itself")
        self.files = Checkpoint(folder, "adapter_model")
        if not self.path.is_file():
            raise ExportError(f"{folder} has its adapter in several files, which PEFT does not load: save it as one")
        self.changes: dict[str, LowRank | Replacement] = {}
        self.rows: int | None = None
        for key in self.files:
            self._add(key)
        if not self.changes:
            raise ExportError(f"{folder} holds no adapter tensors: nothing to merge")
        self._complete()

    @property
    def base(self) -> str | None:
        """The base model's folder or Hub name."""
        base = self.config.get("base_model_name_or_path")
        return str(base) if base else None

    @property
    def changed_base(self) -> str | None:
        """How PEFT began it, where that changed the base's weights first (PiSSA and the like); None elsewhere."""
        begins = self.config.get("init_lora_weights")
        return begins if isinstance(begins, str) and begins.lower() not in PLAIN_STARTS else None

    @property
    def path(self) -> Path:
        return self.folder / "adapter_model.safetensors"

    def _add(self, key: str) -> None:
        name = key.removeprefix("base_model.model.")
        if ".original_module." in name:  # PEFT saves what it replaces, too, where the vocabulary has grown
            return
        for ending, part in PARTS.items():
            if name.endswith("." + ending):
                module = name[: -len(ending) - 1]
                change = self.changes.setdefault(f"{module}.weight", LowRank(module, 0.0))
                if not isinstance(change, LowRank):
                    raise ExportError(f"{self.path}: {module} is both adapted and saved whole, which cannot be merged")
                change.parts[part] = key
                return
        if "lora_" in name:
            raise ExportError(f"{self.path}: tensor {key} is of a LoRA variant that cannot be merged here")
        tensor = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        self.changes[tensor] = Replacement(tensor, key)

    def _complete(self) -> None:
        for change in self.changes.values():
            if isinstance(change, LowRank):
                for part in ("A", "B"):
                    if part not in change.parts:
                        raise ExportError(f"{self.path} has no lora_{part} for {change.module}: it is incomplete")
                shapes = [self.files.shape(change.parts[part]) for part in ("A", "B")]
                if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
                    mine, its = map(_times, shapes)
                    raise ExportError(
                        f"{self.path}: lora_A and lora_B of {change.module} are {mine} and {its}: no product"
                    )
                for key in change.parts.values():
                    if not self.files.dtype(key).is_floating_point:
                        raise ExportError(
                            f"{self.path}: {key} holds {self.files.dtype(key)}, not floating-point numbers"
                        )
                change.scale = self._scale(change.module, shapes[0][0])

    def _scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, with the module's own alpha and rank where a pattern gives them."""
        said = self._number(module, "r", "rank_pattern")
        if said != rank:
            raise ExportError(f"{self.path}: {module} has rank {rank}, adapter_config.json says {said:g}")
        alpha = self._number(module, "lora_alpha", "alpha_pattern")
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _number(self, module: str, key: str, pattern: str) -> float:
        """What adapter_config.json has under ``key``, or under ``pattern`` for this module."""
        patterns = self.config.get(pattern) or {}
        try:
            value = _by_pattern(patterns, module, self.config.get(key, 0))
        except (AttributeError, re.error) as error:
            raise ExportError(
                f"{self.folder / 'adapter_config.json'} has {pattern} {patterns!r}, which maps no regular expressions "
                f"to numbers: {error}"
            ) from error
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ExportError(f"{self.folder / 'adapter_config.json'} has {key} {value!r} (allowed: a number)")
        return float(value)

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare with the base model's tensors.

        Raises:
            ExportError: the base lacks a tensor, or one has another shape: the adapter is for another base.
        """
        for name, change in self.changes.items():
            if name not in shapes:
                raise ExportError(f"{self.path} is for another base: it changes {name}, which the base does not have")
            there = shapes[name]
            if isinstance(change, Replacement):
                mine = self.files.shape(change.key)
                fits = mine == there
            else:
                mine = (self.files.shape(change.parts["B"])[0], self.files.shape(change.parts["A"])[1])
                fits = there in (mine, mine[::-1])
            if not fits:
                raise ExportError(
                    f"{self.path} is for another base: it changes {name} as {_times(mine)}, "
                    f"the base has {_times(there)}"
                )

        for name, change in self.biases().items():
            if name not in shapes:
                raise ExportError(f"{self.path} trains a bias of {change.module} (lora_bias), which the base has not")

    def check_start(self) -> None:
        """
        Raises:
            ExportError: its base is one that PEFT changed when training began, which the files of neither hold.
        """
        if self.changed_base is not None:
            raise ExportError(
                f"{self.folder} began as a part of its base's weights, which these lost (init_lora_weights: "
                f"{self.changed_base}): save it with PEFT's path_initial_model_for_weight_conversion; or, if the base "
                "that it names was saved without that part, set init_lora_weights to true in adapter_config.json"
            )

    def biases(self) -> dict[str, LowRank]:
        """The changes that come with a bias (``lora_bias``), by the bias's tensor name."""
        found = [c for c in self.changes.values() if isinstance(c, LowRank) and "bias" in c.parts]
        return {f"{change.module}.bias": change for change in found}

    def exact_bias(self, change: LowRank, base: torch.Tensor) -> torch.Tensor:
        """The merged bias in float64."""
        return base.double() + change.scale * self.files.tensor(change.parts["bias"]).double()

    def exact(
        self, change: LowRank, base: torch.Tensor, written: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The merged weight in float64, in blocks of output rows.

        Args:
            base: the base's weight, ``(out, in)``; ``(in, out)`` for embeddings and GPT-2's Conv1D.
            written: the merged weight of the same shape.

        Yields:
            The exact values, the written values, both float64, and a bound of what an fp32 evaluation of the same
            formula may be off: (r + 3) u (|W| + s |B| |A|) for the sum (Higham, Accuracy and Stability of Numerical
            Algorithms, section 3.1), and a relative (in / 2 + r + 8) u more where DoRA's norm is taken.
        """
        low, high = self.files.tensor(change.parts["A"]), self.files.tensor(change.parts["B"])
        if "base" in change.parts:
            base = self.files.tensor(change.parts["base"]).to(base.dtype)
        rank, inner = low.shape
        outer = high.shape[0]
        if self.is_turned(change, tuple(base.shape)):
            base, written = base.T, written.T
        magnitude = self.files.tensor(change.parts["magnitude"]).double() if "magnitude" in change.parts else None
        a = low.double()
        step = max(1, BLOCK // inner)
        for start in range(0, outer, step):
            rows = slice(start, start + step)
            b = high[rows].double()
            weight = base[rows].double()
            exact = weight + change.scale * (b @ a)
            size = weight.abs() + abs(change.scale) * (b.abs() @ a.abs())
            error = (rank + 3) * UNIT * size
            if magnitude is not None:
                factor = (magnitude.reshape(-1)[rows] / exact.norm(dim=1)).unsqueeze(1)
                exact = factor * exact
                error = factor.abs() * error + (inner / 2 + rank + 8) * UNIT * exact.abs()
            yield exact, written[rows].double(), error

    def is_turned(self, change: LowRank, shape: tuple[int, ...]) -> bool:
        """Whether the base has a weight as ``(in, out)``: told by its shape, by the kind of layer if it is square."""
        flat = (self.files.shape(change.parts["B"])[0], self.files.shape(change.parts["A"])[1])
        if flat[0] != flat[1]:
            return shape != flat
        return "lora_embedding_A" in change.parts["A"] or bool(self.config.get("fan_in_fan_out"))


def base_of(source: Source, adapter: Adapter | None = None) -> str | None:
    """The folder or Hub name of the base that a source's adapter belongs to: the adapter's word, else its run's.

    None where neither says it, or where the source has no adapter.

    Args:
        adapter: the source's, where it was read already.
    """
    if source.adapter is None:
        return None
    return (adapter or Adapter(source.adapter)).base or source.base


def _by_pattern(pattern: Any, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the whole module name or its end after a dot, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
