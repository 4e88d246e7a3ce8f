"""The second file of a model that sees: its tower and projector, which llama.cpp takes with ``--mmproj``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.bases import empty_model, read_config
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.folders import require_space
from ft_export.gguf.jobs import Job, write_file
from ft_export.gguf.rules import Output
from ft_export.gguf.towers import tower_of
from ft_export.merging.names import parameter_names
from ft_export.progress import Progress, silent
from ft_export.seeing import image_settings

__all__ = ["Projector", "convert_projector", "type_of"]


@dataclass(frozen=True)
class Projector:
    """What :func:`convert_projector` wrote.

    Attributes:
        file: the GGUF file. type: its type, ``f16``, ``bf16`` or ``f32``.
        tensors: by GGUF name: type, shape and SHA-256 of the bytes in the file.
        kinds: by the name of the parameter in transformers' model: the type in the file.
    """

    file: Path
    type: str
    tensors: dict[str, dict[str, Any]]
    kinds: dict[str, str]


def type_of(type: str) -> str:
    """The type of the file beside a language model of ``type``; a tower is never rounded to blocks."""
    return type if type in ("f32", "bf16") else "f16"


def convert_projector(
    model: Path, out: Path, *, type: str = "f16", name: str | None = None, progress: Progress = silent
) -> Projector:
    """Write the tower and the projector of ``model`` as the GGUF file ``out``, in place; nothing is checked yet.

    Args:
        model: a transformers folder of a model that sees, of a family in :data:`ft_export.gguf.towers.TOWERS`.
        out: the file to write. type: ``f16``, ``bf16`` or ``f32``.
        name: the model's name in the file; the folder's by default.

    Raises:
        ExportError: it is of no such family, a tensor is not known, is missing or broken, or no space.
    """
    import gguf

    config = read_config(model)
    tower = tower_of(config)
    if tower is None:
        raise ExportError(f"{model} is of no family whose tower can be written to GGUF")
    said = image_settings(model)
    weights = Checkpoint(model)
    weights.rename(parameter_names(weights, empty_model(model, config)))

    def kind(name: str, dimensions: Sequence[int]) -> str:
        special = tower.kinds.get(name)
        return special[type] if special else "F32" if len(dimensions) < 2 else type.upper()

    jobs, kinds = [], {}
    for source in weights:
        if source == "lm_head.weight" or source.startswith("model.language_model."):
            continue
        targets = tower.targets(source, config)
        if targets is None:
            raise ExportError(f"{model}: llama.cpp has no place for the tensor {source} of this architecture")
        for target, make in targets:
            job = Job(Output(source, (source,), make), target, weights, config, kind)
            jobs.append(job)
            kinds[source] = job.type.name

    require_space(out.parent, sum(job.bytes for job in jobs) + 50_000_000, "the file of the tower")

    def keys(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_name(name or model.absolute().name)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if type == "f32" else f"MOSTLY_{type.upper()}"])
        tower.keys(writer, config, said)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    written, _ = write_file(out, "clip", jobs, keys, None, progress)
    return Projector(out, type, written, kinds)
