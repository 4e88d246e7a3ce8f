"""The first check of a ``model.bin``: every variable against the model's tensors, read back from the written file.

In a float type each value is the model's, rounded to it: equal bit for bit. In 8 bits each row of a matrix has a scale,
127 over its largest value, and each code is off by half a step at most; norms and biases are fp32 then, and exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.bases import empty_model
from ft_export.checkpoints import Checkpoint
from ft_export.ctranslate2.layout import Part, variables_of
from ft_export.ctranslate2.reading import ModelFile
from ft_export.errors import ExportError
from ft_export.merging.names import parameter_names
from ft_export.progress import Progress, counting, silent

if TYPE_CHECKING:
    import torch

__all__ = ["check_file"]

GELU = 3
"""CTranslate2's number of that activation."""
LARGEST = 127
TIED = ("proj_out.weight", "model.decoder.embed_tokens.weight")
"""The head, and under which name its values are stored where it is the embeddings."""
UNIT = 2.0**-24


def check_file(file: ModelFile, model: Path, config: Any, dtype: str, progress: Progress = silent) -> dict[str, int]:
    """Compare every variable with the model's tensors.

    Args:
        model: the transformers folder. config: its configuration.
        dtype: of what is not in 8 bits: ``float16`` or ``float32``.

    Returns:
        How many variables are equal, and how many compressed.

    Raises:
        ExportError: one is not what it should be, is missing or should not be there; it is named.
    """
    import torch

    if (file.kind, file.revision) != ("WhisperSpec", 3):
        raise ExportError(f"{file.path} is a {file.kind} of revision {file.revision}, not a WhisperSpec of revision 3")
    stored = Checkpoint(model)
    stored.rename(parameter_names(stored, empty_model(model, config)))
    expected = variables_of(config)
    _check_names(file, expected)
    _check_scalars(file, config)
    counts = {"equal": 0, "compressed": 0}
    count = counting(progress, len(expected), "variables checked")
    for name, parts in expected.items():
        values = torch.cat([_values(stored, part) for part in parts])
        written = file.tensor(name)
        if f"{name}_scale" in file:
            _check_codes(name, written, file.tensor(f"{name}_scale"), values.float())
            counts["compressed"] += 1
        else:
            rounded = values.to(getattr(torch, dtype))
            if not bool(rounded.isfinite().all()):
                raise ExportError(f"{name} holds values that are too large for {dtype}: use --type float32")
            if written.shape != rounded.shape or written.dtype != rounded.dtype or not torch.equal(written, rounded):
                raise ExportError(f"{file.path.name}: {name} is not the model's in {dtype}: nothing was written")
            counts["equal"] += 1
        count()
    return counts


def _check_names(file: ModelFile, expected: dict[str, tuple[Part, ...]]) -> None:
    there = {
        name
        for name, said in file.variables.items()
        if said.shape and not (name.endswith("_scale") and name.removesuffix("_scale") in file)
    }
    there |= {name for name in file.aliases if not name.endswith("_scale")}
    if there != set(expected):
        name = min(there ^ set(expected))
        raise ExportError(f"{file.path.name} and the model differ in {name}: nothing was written")


def _check_scalars(file: ModelFile, config: Any) -> None:
    right = {
        "encoder/num_heads": config.encoder_attention_heads,
        "decoder/num_heads": config.decoder_attention_heads,
        "decoder/activation": GELU,
        "decoder/pre_norm": 1,
        "decoder/scale_embeddings": 0,
        "decoder/start_from_zero_embedding": 0,
        "decoder/alibi": 0,
    }
    for name, value in right.items():
        said = file.variables.get(name)
        if said is None or said.shape or int(file.tensor(name)) != value:
            found = "missing" if said is None else str(file.tensor(name).tolist())
            raise ExportError(f"{file.path.name}: {name} is {found}, not {value}: nothing was written")


def _values(stored: Checkpoint, part: Part) -> torch.Tensor:
    import torch

    if part.parameter is None:
        return torch.zeros(part.rows)
    name = part.parameter
    if name not in stored and name == TIED[0]:  # stored once
        name = TIED[1]
    if name not in stored:
        raise ExportError(f"{stored.folder} has no weights for {name}: it is incomplete")
    tensor = stored.tensor(name)
    if tensor.shape[0] != part.rows:
        raise ExportError(
            f"{stored.folder} has {name} with {tensor.shape[0]} rows, its config.json asks for {part.rows}"
        )
    if not bool(tensor.isfinite().all()):
        raise ExportError(f"{stored.folder}: {name} holds values that are not finite: it is broken")
    return tensor


def _check_codes(name: str, codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
    exact, found = values.double().flatten(1), codes.double().flatten(1)
    scale = scales.double().reshape(-1, 1)
    if codes.shape != values.shape or scale.shape[0] != exact.shape[0]:
        raise ExportError(f"{name} has another shape than the model's: nothing was written")
    largest = exact.abs().amax(1, keepdim=True)
    right = LARGEST / largest.where(largest > 0, LARGEST)
    wrong = (scale - right).abs() > 4 * UNIT * right
    if bool(wrong.any()):
        raise ExportError(f"{name}_scale is not 127 over the largest value, in row {int(wrong.int().argmax())}")
    # the product was taken in fp32, and may lie on the other side of the middle between two codes
    off = (found - exact * scale).abs() > 0.5 + 4 * UNIT * LARGEST
    if bool(off.any()):
        raise ExportError(f"{name} is off by more than half a step, in row {int(off.any(1).int().argmax())}")
