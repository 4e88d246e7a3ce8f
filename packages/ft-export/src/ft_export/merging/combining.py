"""Several adapters made into one by PEFT itself, without the base's weights; and the same on the base, to compare with.

What PEFT's ``LoraModel.add_weighted_adapter`` gets here is a model of nothing but the adapted modules, in the order of
the base's, whose weights are one zero seen as a matrix: A and B alone decide what comes out. Two things are told to it
otherwise than an adapter's own configuration would:

- it gives the result the configuration of the first adapter, with alpha equal to the rank: with rsLoRA that scales the
  result by the root of the rank (seen with PEFT 0.21.2). So each adapter gets a configuration that names its modules
  one by one and nothing else that matters here, and rsLoRA is taken out of it once its scale is known.
- it begins new layers as the first adapter began, which may change a base: here as LoRA does.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ft_export.bases import copy_tokenizer
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.folders import require_space, scratch_folder
from ft_export.merging.adapter import Adapter
from ft_export.merging.combination import Combination, Part, other_templates
from ft_export.merging.combined_check import check_combined
from ft_export.merging.names import parameter_names
from ft_export.merging.outline import built
from ft_export.progress import Progress, silent
from ft_export.runs import read_json

__all__ = ["Combined", "combine", "combined_adapter", "put_together"]

RESULT = "combined"


@dataclass(frozen=True)
class Combined:
    """The adapters that the merged one is of, how, and what :func:`check_combined` found."""

    parts: tuple[Part, ...]
    how: Combination
    found: dict[str, Any]

    def lines(self) -> list[str]:
        shares = ", ".join(f"{part.weight:g} x {part.source.path}" for part in self.parts)
        away = self.found["from_the_sum"]
        checked = (
            "the weighted sum of their changes" if self.how.type == "cat" else f"what {self.how.type} makes of them"
        )
        return [
            f"{shares}, combined by PEFT ({self.how.type})"
            + (f": in float64 {checked}, in {self.found['tensors']} weights" if self.found["checked"] else "")
            + (f"; off the weighted sum of their changes by {100 * away:.3g} % of its size" if away > 1e-6 else ""),
            *other_templates(self.parts),
        ]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.how), **self.found}


@contextmanager
def combined_adapter(
    parts: Sequence[Part], how: Combination, base: Path, reference: str, target: Path, progress: Progress = silent
) -> Iterator[tuple[Adapter, Combined]]:
    """The combined adapter, checked, in a folder beside ``target`` that goes when the block ends.

    Args:
        base, reference: the base's folder, and what it is called.

    Raises:
        ExportError: no space, or what :func:`combine` and :func:`check_combined` raise.
    """
    size = sum(part.adapter.files.parameters() for part in parts) * 4
    require_space(target.parent, size + 50_000_000, "the combined adapter")
    with scratch_folder(target) as scratch:
        progress(0, 0, f"combining {len(parts)} adapters by {how.type}")
        adapter = combine(parts, how, base, reference, scratch)
        yield adapter, Combined(tuple(parts), how, check_combined(adapter, parts, how))


def combine(parts: Sequence[Part], how: Combination, base: Path, reference: str, to: Path) -> Adapter:
    """Write the combined adapter into the folder ``to``, as PEFT saves one, with the first adapter's tokenizer.

    Args:
        reference: what the result says that its base is.

    Raises:
        ExportError: an adapter is for another base, holds other embeddings than the base, or PEFT refuses.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    first = parts[0]
    model = built(base, None, first.source.rope)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for part in parts:
        part.adapter.check_shapes(shapes)
    _check_embeddings(parts, base, model)
    peft = _through_peft(_skeleton(parts, list(shapes)), parts, how, fan_in_fan_out=False)
    tensors, ranks = {}, {}
    for name, layer in _layers(peft):
        if RESULT in layer.lora_A:
            found = {"lora_A.weight": layer.lora_A[RESULT].weight, "lora_B.weight": layer.lora_B[RESULT].weight}
        else:
            found = {"lora_embedding_A": layer.lora_embedding_A[RESULT]}
            found["lora_embedding_B"] = layer.lora_embedding_B[RESULT]
        for ending, value in found.items():
            tensors[f"base_model.model.{name}.{ending}"] = value.detach().float().contiguous().clone()
        ranks[name] = next(iter(found.values())).shape[0]
    rank = max(ranks.values())
    own = {name: r for name, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=own, alpha_pattern=own, target_modules=list(ranks),
        fan_in_fan_out=bool(first.adapter.config.get("fan_in_fan_out")), inference_mode=True,
        base_model_name_or_path=reference, task_type=first.adapter.config.get("task_type"),
    )  # fmt: skip
    config.save_pretrained(str(to))
    path = to / "adapter_config.json"  # PEFT writes the modules in another order each time, and an interrupted merge
    said = {**read_json(path), "target_modules": sorted(ranks)}  # is gone on with where its adapter is the same
    path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
    if (first.adapter.folder / "tokenizer_config.json").is_file():
        copy_tokenizer(first.adapter.folder, base, to)
    return Adapter(to)


def put_together(model: Any, parts: Sequence[Part], how: Combination) -> Any:
    """The adapters on their base by PEFT, from their own files, in evaluation mode.

    The weighted sum is what PEFT makes of adapters that are all active; every other combination is made again.

    Raises:
        ExportError: PEFT cannot put them there.
    """
    turned = bool(parts[0].adapter.config.get("fan_in_fan_out"))
    if how.type != "cat":
        peft = _through_peft(model, parts, how, turned)
        peft.set_adapter(RESULT)
        return peft.eval()
    peft, names = _loaded(model, parts, turned)
    peft.base_model.set_adapter(names)
    for _, layer in _layers(peft):
        for name, part in zip(names, parts, strict=True):
            layer.set_scale(name, part.weight)
    return peft.eval()


def _through_peft(model: Any, parts: Sequence[Part], how: Combination, fan_in_fan_out: bool) -> Any:
    """A PEFT model with the adapters and their combination, whose masks are drawn as the seed says."""
    import torch

    peft, names = _loaded(model, parts, fan_in_fan_out)
    for name in names:
        peft.peft_config[name].use_rslora = False
    options: dict[str, Any] = {"svd_rank": how.rank, "svd_full_matrices": False, "density": how.density}
    if how.majority_sign is not None:
        options["majority_sign_method"] = how.majority_sign
    weights = [part.weight for part in parts]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a density of 1 prunes nothing
        torch.manual_seed(how.seed or 0)
        try:
            peft.base_model.add_weighted_adapter(names, weights, RESULT, combination_type=how.type, **options)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ExportError(f"PEFT cannot combine the adapters by {how.type}: {error}") from error
    return peft


def _loaded(model: Any, parts: Sequence[Part], fan_in_fan_out: bool) -> tuple[Any, list[str]]:
    """A PEFT model with all adapters, in fp32, and what it calls them; each scale is compared with our own."""
    import torch
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict

    peft: Any = None
    names = [f"part{number}" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        said = part.adapter.config
        config = LoraConfig(
            r=said["r"], lora_alpha=said["lora_alpha"], use_rslora=bool(said.get("use_rslora")),
            rank_pattern=said.get("rank_pattern") or {}, alpha_pattern=said.get("alpha_pattern") or {},
            target_modules=[change.module for change in part.changes.values()], fan_in_fan_out=fan_in_fan_out,
        )  # fmt: skip
        keys = [change.parts[which] for change in part.changes.values() for which in ("A", "B")]
        tensors = {key: part.adapter.files.tensor(key).float() for key in keys}
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a tied embedding is adapted, which the merge looks after
                if peft is None:
                    peft = PeftModel(model, config, adapter_name=name)
                else:
                    peft.add_adapter(name, config)
                result = set_peft_model_state_dict(peft, tensors, adapter_name=name)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ExportError(f"PEFT cannot attach {part.adapter.folder}: {error}") from error
        scales = {module: layer.scaling[name] for module, layer in _layers(peft) if name in layer.scaling}
        own = {change.module: change.scale for change in part.changes.values()}
        if result.unexpected_keys or scales.keys() != own.keys():
            odd = [*result.unexpected_keys, *sorted(scales.keys() ^ own.keys())][0]
            raise ExportError(f"PEFT does not take {odd} of {part.adapter.folder} for what this package takes it for")
        for module, scale in scales.items():
            if abs(scale - own[module]) > 1e-12 * abs(own[module]):
                raise ExportError(f"PEFT scales {module} of {part.adapter.folder} by {scale}, not by {own[module]}")
    return peft, names


def _layers(peft: Any) -> list[tuple[str, Any]]:
    """The adapted modules of a PEFT model by the base's names for them."""
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in peft.base_model.model.named_modules() if isinstance(layer, LoraLayer)]


def _skeleton(parts: Sequence[Part], order: Sequence[str]) -> Any:
    """A model of the adapted modules alone, in ``order``, which PEFT follows when it draws its masks."""
    import torch

    sizes: dict[str, tuple[bool, int, int]] = {}
    for part in parts:
        for name, change in part.changes.items():
            shapes = [part.adapter.files.shape(change.parts[which]) for which in ("A", "B")]
            sizes[name] = ("lora_embedding_A" in change.parts["A"], shapes[0][1], shapes[1][0])
    root = torch.nn.Module()
    for name in (name for name in order if name in sizes):
        embedding, inner, outer = sizes[name]
        *parents, last = name.removesuffix(".weight").split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        with torch.device("meta"):
            layer = torch.nn.Embedding(inner, outer) if embedding else torch.nn.Linear(inner, outer, bias=False)
        layer.weight = torch.nn.Parameter(torch.zeros(()).expand(layer.weight.shape), requires_grad=False)
        place.add_module(last, layer)
    return root


def _check_embeddings(parts: Sequence[Part], base: Path, model: Any) -> None:
    """Adapted embeddings are saved with the layer they sit on: it has to be the base's own.

    Raises:
        ExportError: it is another one (resized, or trained), which a combination cannot have.
    """
    import torch

    held = [(part, name, c.parts["base"]) for part in parts for name, c in part.changes.items() if "base" in c.parts]
    if not held:
        return
    stored = Checkpoint(base)
    stored.rename(parameter_names(stored, model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for part, name, key in held:
        mine = part.adapter.files.tensor(key)
        tied = [other for other, p in parameters.items() if p is parameters[name] and other in stored]
        theirs = stored.tensor(tied[0]) if tied else None
        if theirs is None or mine.shape != theirs.shape or not torch.equal(mine.to(theirs.dtype), theirs):
            raise ExportError(
                f"{part.adapter.path} holds {name} whole and not as the base has it: it cannot be combined with others"
            )
