"""The folder of a whole model for a server: its weights in the form asked for, its configuration, its tokenizer.

Tensors go from safetensors to safetensors one at a time; files that do not change are linked or copied.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ft_export.bases import copy_tokenizer, empty_model, read_config
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.folders import require_space
from ft_export.merging.merger import MARKER
from ft_export.merging.names import parameter_names
from ft_export.progress import Progress, counting, silent
from ft_export.runs import read_json
from ft_export.serving.forms import Form
from ft_export.serving.stream import Planned, write_tensors

if TYPE_CHECKING:
    import torch

__all__ = ["Plan", "Whole", "plan_whole", "take_names", "write_whole"]

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
GENERATES = ("ForCausalLM", "ForConditionalGeneration")


@dataclass(frozen=True)
class Plan:
    """What becomes of the tensors of a model.

    Attributes:
        model: its folder.
        stored: its tensors as they are.
        form: the form to write.
        dtype: the type of weights that are not compressed.
        cast: the tensors that get another 16-bit or 32-bit type.
        compressed: the tensors that are compressed.
        ignored: the linear layers that are not, by name.
        names: what tensors are called in the written files that are called otherwise in the model's.
    """

    model: Path
    stored: Checkpoint
    form: Form
    dtype: torch.dtype
    cast: frozenset[str]
    compressed: frozenset[str]
    ignored: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """What a tensor is called in the written files."""
        return self.names.get(name, name)

    def written(self, name: str) -> dict[str, Planned]:
        """What is written for a tensor, by name."""
        shape = self.stored.shape(name)
        if name in self.compressed:
            scale = Planned((shape[0], 1), self.form.scale_dtype(self.dtype))
            return {name: Planned(shape, self.form.code_dtype()), f"{name}_scale": scale}
        return {self.key(name): Planned(shape, self.dtype if name in self.cast else self.stored.dtype(name))}

    def bytes(self) -> int:
        """Of all tensors that are written."""
        return sum(planned.bytes for name in self.stored for planned in self.written(name).values())


@dataclass(frozen=True)
class Whole:
    """What :func:`write_whole` wrote.

    Attributes:
        plan: what was planned.
        linked: whether the files of weights share their bytes with those of the model.
    """

    plan: Plan
    linked: bool


def plan_whole(model: Path, form: Form, base: Path | None = None) -> Plan:
    """Decide about every tensor; nothing is loaded.

    Args:
        base: the model that this one was trained from, of whose files the names of tensors are taken: servers know
            those, and transformers may have saved others.

    Raises:
        ExportError: broken files, a model that does not generate text, one that is quantized already, or one whose
            layers cannot be compressed.
    """
    import torch

    config = read_json(model / "config.json")
    kinds = config.get("architectures") or ["None"]
    if not str(kinds[0]).endswith(GENERATES):
        raise ExportError(f"{model} is a {kinds[0]}, which writes no text: only {' or '.join(GENERATES)} can be served")
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict):
        raise ExportError(
            f"{model} is quantized already ({quantized.get('quant_method', 'unknown')}): export the 16-bit model"
        )
    stored = Checkpoint(model)
    known = (torch.bfloat16, torch.float16, torch.float32)
    sizes = dict.fromkeys(known, 0)
    floats = [name for name in stored if stored.dtype(name).is_floating_point]
    for name in floats:
        if stored.dtype(name) not in known:
            raise ExportError(f"{stored.file(name)}: {name} is {stored.dtype(name)}: only 16 and 32 bits are exported")
        sizes[stored.dtype(name)] += Planned(stored.shape(name), stored.dtype(name)).bytes
    most = max(sizes, key=lambda dtype: sizes[dtype])
    own = torch.bfloat16 if most == torch.float32 else most
    dtype = getattr(torch, form.dtype) if form.dtype is not None else own
    # a 16-bit model may hold a few tensors in fp32 on purpose: they stay, unless another type was asked for
    casts = form.dtype is not None or most == torch.float32
    linear, ignored = _linear(model, stored) if form.codes else (set(), [])
    compressed = frozenset(linear)
    cast = frozenset(name for name in floats if casts and name not in compressed and stored.dtype(name) != dtype)
    names = {} if base is None else _names_of(base, model, stored)
    return Plan(model, stored, form, dtype, cast, compressed, tuple(ignored), names)


def _names_of(base: Path, model: Path, stored: Checkpoint) -> dict[str, str]:
    """For each tensor that the base's files call otherwise, their name of it."""
    empty = empty_model(model, read_config(model))
    published = {known: name for name, known in parameter_names(Checkpoint(base), empty).items()}
    found = {name: published.get(known, name) for name, known in parameter_names(stored, empty).items()}
    return {name: other for name, other in found.items() if name != other}


def _linear(model: Path, stored: Checkpoint) -> tuple[set[str], list[str]]:
    """The names of the weights of all linear layers but the head, and the name of the head."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    try:
        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError) as error:
        raise ExportError(f"{model} is of a kind whose layers cannot be compressed: {error}") from error
    for name, parameter in empty.named_parameters():
        if parameter.dim() > 2:
            raise ExportError(
                f"{model} has {name} of shape {tuple(parameter.shape)}: experts and convolutions are not compressed "
                "here; export it with --type 16bit"
            )
    head = empty.get_output_embeddings()
    found: set[str] = set()
    ignored = []
    for name, module in empty.named_modules():
        if module is head:
            ignored.append(name)
        elif isinstance(module, torch.nn.Linear):
            found.add(f"{name}.weight")
    names = parameter_names(stored, empty)
    for name, known in names.items():
        if known in found and known != name:
            raise ExportError(f"{model} calls {known} {name}: export it with --type 16bit")
    missing = sorted(found - set(stored))
    if missing:
        raise ExportError(f"{model} has no weights for {missing[0]} ({len(missing)} missing): it is incomplete")
    return found, ignored


def take_names(folder: Path, base: Path) -> int:
    """Give a model's files the names of tensors that its base's have; those that change are written anew, beside.

    Returns:
        How many names changed.
    """
    stored = Checkpoint(folder)
    names = _names_of(base, folder, stored)
    for path in stored.files if names else ():
        here = [name for name in stored if stored.file(name) == path]
        planned = {names.get(name, name): Planned(stored.shape(name), stored.dtype(name)) for name in here}
        beside = path.with_suffix(".unfinished")
        write_tensors(beside, planned, ({names.get(name, name): stored.tensor(name)} for name in here))
        os.replace(beside, path)  # which may be a second name of somebody's file, that stays
    if names and (folder / INDEX).is_file():
        said = read_json(folder / INDEX)
        said["weight_map"] = {names.get(name, name): file for name, file in said["weight_map"].items()}
        beside = folder / f"{INDEX}.unfinished"
        beside.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, folder / INDEX)
    return len(names)


def write_whole(plan: Plan, to: Path, progress: Progress = silent) -> Whole:
    """Write weights, configuration and tokenizer into a folder that is empty.

    Where tensors are made anew it may hold files of them, whole ones, that an interrupted process has left: they stay.

    Raises:
        ExportError: no space, weights that are no numbers or do not fit into the type, or no tokenizer.
    """
    files: dict[Path, list[str]] = {}
    for name in plan.stored:
        files.setdefault(plan.stored.file(name), []).append(name)
    linked = False
    count = counting(progress, len(plan.stored.entries), "tensors written")
    if plan.cast or plan.compressed or plan.names:
        there = sum(path.stat().st_size for path in to.glob("*.safetensors"))
        require_space(to, int(plan.bytes() * 1.01) + 50_000_000 - there, "the model to serve")
        for path, names in files.items():
            if (to / path.name).is_file():
                for _ in names:
                    count()
                continue
            planned = {key: value for name in names for key, value in plan.written(name).items()}
            beside = to / f"{path.stem}.unfinished"
            write_tensors(beside, planned, (_piece(plan, name, count) for name in names))
            os.replace(beside, to / path.name)
        if (plan.model / INDEX).is_file():
            _write_index(plan, to / INDEX)
    else:
        linked = _take_over(plan, list(files), to)
        for name in plan.stored:
            _finite(plan, name, plan.stored.tensor(name))
            count()
    config = read_json(plan.model / "config.json")
    if plan.cast or plan.form.codes:
        config.pop("torch_dtype", None)  # what older versions of transformers call it
        config["dtype"] = str(plan.dtype).removeprefix("torch.")
    if plan.form.codes:
        config["quantization_config"] = plan.form.configuration(list(plan.ignored))
    (to / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (plan.model / "generation_config.json").is_file():
        shutil.copyfile(plan.model / "generation_config.json", to / "generation_config.json")
    copy_tokenizer(plan.model, plan.model, to)
    return Whole(plan, linked)


def _piece(plan: Plan, name: str, count: Callable[[], None]) -> dict[str, torch.Tensor]:
    tensor = _finite(plan, name, plan.stored.tensor(name))
    count()
    if name in plan.compressed:
        codes, scales = plan.form.compress(tensor, plan.form.scale_dtype(plan.dtype))
        return {name: codes, f"{name}_scale": scales}
    if name in plan.cast:
        tensor = tensor.to(plan.dtype)
        if not tensor.isfinite().all():
            raise ExportError(
                f"{plan.stored.file(name)}: {name} has values that are too large for {plan.dtype}: use --type bf16"
            )
    return {plan.key(name): tensor}


def _finite(plan: Plan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point and not tensor.isfinite().all():
        raise ExportError(f"{plan.stored.file(name)}: {name} holds values that are no numbers: the model is broken")
    return tensor


def _take_over(plan: Plan, files: list[Path], to: Path) -> bool:
    """Link the files of a merge, which this package made and nobody writes into; copy anyone else's."""
    several = (plan.model / INDEX).is_file() and not (plan.model / WHOLE).is_file()  # else it is of other files
    paths = [*files, *([plan.model / INDEX] if several else [])]
    if (plan.model / MARKER).is_file():
        with suppress(OSError):  # another disk, or one without links
            for path in paths:
                os.link(path, to / path.name)
            return True
    require_space(to, int(plan.bytes() * 1.01) + 50_000_000, "the model to serve")
    for path in paths:
        (to / path.name).unlink(missing_ok=True)
        shutil.copyfile(path, to / path.name)
    return False


def _write_index(plan: Plan, path: Path) -> None:
    places: Iterator[tuple[str, str]] = (
        (key, plan.stored.file(name).name) for name in plan.stored for key in plan.written(name)
    )
    said = {"metadata": {"total_size": plan.bytes()}, "weight_map": dict(sorted(places))}
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
