"""The exporter ``gguf``: merge if need be, convert, check in llama.cpp, and only then put the file in its place."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_export.bases import load_model, load_tokenizer, stop_tokens
from ft_export.errors import ExportError, one_line
from ft_export.exporting import Exported, check_options, file_name, whole_model
from ft_export.folders import new_file
from ft_export.gguf.adapter import ADAPTER_TYPES, read_lora, serve, write_and_check
from ft_export.gguf.checking import check_in_llama_cpp, write_proof
from ft_export.gguf.converter import check_convertible, check_type, convert, require_gguf
from ft_export.gguf.engine import require_llama_cpp
from ft_export.progress import Progress, silent
from ft_export.runs import open_source

__all__ = ["export"]

OPTIONS = ("pre", "adapter")


@one_line
def export(
    path: Path | str,
    out: Path | str | None = None,
    *,
    type: str = "f16",
    overwrite: bool = False,
    options: Mapping[str, str] | None = None,
    skip_proof: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write ``OUT/<name>-<type>.gguf`` (of an adapter alone ``OUT/<name>-adapter-<type>.gguf``) and ``OUT/proof.json``.

    An adapter is merged first, into ``merged/`` beside it; a merge of the same adapter that is there already is used.

    Args:
        path: a run folder, a PEFT adapter folder or a transformers model folder.
        out: the folder to write to; ``path/export/gguf`` by default.
        type: of the file: ``f16``, ``f32``, ``bf16``, ``q8_0``, or one of llama.cpp's smaller ones, such as ``q4_k_m``.
        overwrite: whether an earlier file of the same name may be replaced.
        options: ``pre``: llama.cpp's name of the tokenizer's splitting rules, where it is not recognised. ``adapter``:
            ``yes`` writes a LoRA adapter as it is, for llama.cpp to put on the file of its base; ``type`` is then
            ``f16`` or ``f32``.
        skip_proof: leave out what is checked in llama.cpp, and the merge's log-probabilities, for which the model is
            held in memory in fp32. It is said loudly, in ``proof.json`` too.
        progress: of a merge; see :func:`ft_export.merge`.

    Raises:
        ExportError: bad input, a missing extra, no space, or a check that failed; no file is left then.
    """
    import torch

    source = open_source(Path(path))
    folder = Path(out).expanduser() if out is not None else source.path / "export" / "gguf"
    said = check_options(options, OPTIONS, "gguf")
    alone = said.get("adapter", "no")
    if alone not in ("yes", "no"):
        raise ExportError(f"option adapter={alone} is not known for gguf (allowed: yes, no)")
    if alone == "no":
        check_type(type)
    elif type not in ADAPTER_TYPES:
        raise ExportError(
            f"--type {type!r} is not known for gguf with adapter=yes (allowed: {', '.join(ADAPTER_TYPES)})"
        )
    if skip_proof and alone == "yes":
        raise ExportError("--skip-proof is not for an adapter alone: leave it out")
    require_gguf()
    if not skip_proof:
        require_llama_cpp()
    name = file_name(source)
    file = folder / (f"{name}-{type}.gguf" if alone == "no" else f"{name}-adapter-{type}.gguf")
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is no folder: choose another with --out")
    if file.exists() and not overwrite:
        raise ExportError(f"{file} is already there: pass --overwrite to replace it, or choose another with --out")

    lines: list[str] = []
    found: dict[str, Any]
    if alone == "yes":
        lora = read_lora(source, said.get("pre"))
        with new_file(file) as partial:
            made, found = write_and_check(lora, source, partial, file, type, said.get("pre"), lines)
            proof = write_proof(folder, file, made, found, lines)
        return Exported(file, proof, tuple(lines), serve(lora, folder, file))
    model = whole_model(
        source,
        lines,
        progress,
        lambda base, words: check_convertible(base, words, said.get("pre"), source.rope, type),
        skip_proof,
    )
    with new_file(file) as partial:
        made = convert(model, partial, type=type, pre=said.get("pre"), name=name)
        if skip_proof:
            lines.append(
                "NOT PROVEN: the file was not loaded in llama.cpp and nothing it says was checked (--skip-proof)"
            )
            found = {"skipped": True}
        else:
            tokenizer = load_tokenizer(model)
            found = check_in_llama_cpp(
                made, lambda: load_model(model, torch.float32), tokenizer, stop_tokens(tokenizer, model),
                source.held_out, type, made.kinds, lines,
            )  # fmt: skip
        proof = write_proof(folder, file, made, {"type": type, **found, "tensors": made.tensors}, lines)
    return Exported(file, proof, tuple(lines), f"llama-server -m {shlex.quote(str(file))} --jinja")
