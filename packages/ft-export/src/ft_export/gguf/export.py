"""The exporter ``gguf``: merge if need be, convert, check in llama.cpp, and only then put the file in its place."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ft_export.bases import load_model, load_tokenizer, read_config, stop_tokens
from ft_export.errors import ExportError, one_line
from ft_export.exporting import Exported, check_options, file_name, whole_model
from ft_export.folders import clear_inside, key_of, new_file, new_folder, scratch_folder, sha256_of
from ft_export.gguf.adapter import ADAPTER_TYPES, read_lora, serve, write_and_check
from ft_export.gguf.architectures import find_architecture, is_known
from ft_export.gguf.checking import Sight, check_in_llama_cpp, proven_file, versions
from ft_export.gguf.converter import Converted, check_convertible, check_type, convert, require_gguf
from ft_export.gguf.engine import require_llama_cpp
from ft_export.gguf.mmproj import convert_projector, type_of
from ft_export.gguf.pictures import budget_of
from ft_export.gguf.towers import tower_of
from ft_export.gguf.upstream import convert_upstream, find_script
from ft_export.hearing import refuse
from ft_export.progress import Progress, silent
from ft_export.runs import Source, open_source
from ft_export.seeing import sees

__all__ = ["OPTIONS", "export", "new_folder_with_gguf", "projector_beside"]

OPTIONS = {
    "adapter": "yes writes a LoRA adapter as it is, in f16 or f32, for llama.cpp to put on its base",
    "converter": "llama.cpp's own converter, its script or folder, for what is not in the table; it is run",
    "pre": "llama.cpp's name of the tokenizer's splitting rules, where it is not recognised",
}
"""The ``key=value`` options, and what each is."""
JOURNAL = "journal"
"""Beside an unfinished file: which of its tensors are whole."""


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
    A conversion that was interrupted or killed goes on after its last whole tensor.

    Args:
        path: a run folder, a PEFT adapter folder or a transformers model folder.
        out: the folder to write to; ``path/export/gguf`` by default.
        type: of the file: ``f16``, ``f32``, ``bf16``, ``q8_0``, or one of llama.cpp's smaller ones, such as ``q4_k_m``.
        overwrite: whether an earlier file of the same name may be replaced.
        options: ``pre``: llama.cpp's name of the tokenizer's splitting rules, where it is not recognised. ``adapter``:
            ``yes`` writes a LoRA adapter as it is, for llama.cpp to put on the file of its base; ``type`` is then
            ``f16`` or ``f32``. ``converter``: a llama.cpp folder, or the ``convert_hf_to_gguf.py`` in it, which is run
            for an architecture that is not in our table.
        skip_proof: leave out what is checked in llama.cpp, and the merge's log-probabilities, for which the model is
            held in memory in fp32. It is said loudly, in ``proof.json`` too.
        progress: see :data:`ft_export.progress.Progress`.

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
    if alone == "yes" and "converter" in said:
        raise ExportError("converter= is for whole models: leave adapter=yes out, and the merged model is exported")
    script = find_script(said["converter"]) if "converter" in said else None
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
        with proven_file(file) as (partial, prove):
            made, found = write_and_check(lora, source, partial, file, type, said.get("pre"), lines)
            proof = prove(made, found, lines)
        return Exported(file, proof, tuple(lines), serve(lora, folder, file))
    pre = said.get("pre")

    def check(base: Path, words: Path) -> None:
        if _script_for(base, script, pre) is None:
            check_convertible(base, words, pre, source.rope, type)

    model = whole_model(source, lines, progress, check, skip_proof)
    used = _script_for(model, script, pre)
    by: dict[str, Any] = {}
    tower = tower_of(read_config(model))
    beside = _beside(file)
    if tower is not None and beside.exists() and not overwrite:
        raise ExportError(f"{beside} is already there: pass --overwrite to replace it, or choose another with --out")
    with ExitStack() as stack:
        partial, prove = stack.enter_context(proven_file(file, _key(model, type, pre, name) if used is None else None))
        sight = None
        if used is None:
            made = _converted(model, partial, type, pre, name, lines, progress)
            if tower is not None:  # in its place first: a language model without it would look whole
                place = stack.enter_context(new_file(beside))
                projector = convert_projector(model, place, type=type_of(type), name=name, progress=progress)
                sight = Sight(projector, tower, model)
                lines.append(f"{beside.name} has tower and projector in {projector.type}, for llama.cpp's --mmproj")
            if script is not None:
                lines.append(f"converter= was not needed: {made.architecture} is in ft-export's own table")
        else:
            by = {"converter": {"script": str(used), "sha256": sha256_of(used)}}
            progress(0, 0, f"converting by {used}")
            with scratch_folder(file) as scratch:
                made = convert_upstream(used, model, partial, scratch, type=type, name=name)
            lines.append(f"converted by {used}, whose {made.architecture} is not in ft-export's own table")
        eyes: dict[str, Any] = {} if sight is None else {"sight": sight}
        if skip_proof:
            lines.append(
                "NOT PROVEN: the file was not loaded in llama.cpp and nothing it says was checked (--skip-proof)"
            )
            found = {"skipped": True}
        else:
            tokenizer = load_tokenizer(model)
            found = check_in_llama_cpp(
                made, lambda: load_model(model, torch.float32), tokenizer, stop_tokens(tokenizer, model),
                source.held_out, type, made.kinds, lines, **eyes, **_spoken(source, tokenizer),
            )  # fmt: skip
        if sight is not None:
            by["mmproj"] = {
                "file": beside.name, "type": sight.projector.type, "sha256": sha256_of(sight.projector.file),
                "tensors": sight.projector.tensors,
            }  # fmt: skip
        if source.task == "tts":
            lines.append(
                "the file is the language model alone: what it says are a codec's tokens, which whoever runs it decodes"
            )
        proof = prove(made, {"type": type, **by, **found, "tensors": made.tensors}, lines)
    serve_by = f"llama-server -m {shlex.quote(str(file))} --jinja"
    if sight is not None:
        serve_by += f" --mmproj {shlex.quote(str(beside))}"
        if bounds := budget_of(model, read_config(model), sight.tower):
            serve_by += " --image-min-tokens {} --image-max-tokens {}".format(*bounds)
    return Exported(file, proof, tuple(lines), serve_by)


def _spoken(source: Source, tokenizer: Any) -> dict[str, Any]:
    """Tokens of the vocabulary's later half as a text, where the model speaks: no row has a codec's tokens in it."""
    if source.task != "tts":
        return {}
    size = len(tokenizer)
    return {"more": [tokenizer.decode(list(range(size // 2, size, max(1, size // 256))))]}


def _beside(file: Path) -> Path:
    return file.with_name(f"mmproj-{file.name}")


def projector_beside(file: Path) -> Path | None:
    """The file of the tower and projector that :func:`export` wrote beside a language model's, if it did."""
    path = _beside(file)
    return path if path.is_file() else None


@contextmanager
def new_folder_with_gguf(out: Path, source: Source, type: str) -> Iterator[Path]:
    """:func:`ft_export.folders.new_folder` for what holds a GGUF file, which :func:`export` is to write there.

    Of what a killed or interrupted process has left the unfinished GGUF file alone is kept, and ``export`` goes on with
    it, if it is of the same model.
    """
    name = f"{file_name(source)}-{type}.gguf"
    with new_folder(out, f"for {name}") as partial:
        clear_inside(partial, lambda path: path.is_dir() and path.name.startswith(f".{name}."))
        yield partial


def _converted(
    model: Path, partial: Path, type: str, pre: str | None, name: str, lines: list[str], progress: Progress
) -> Converted:
    """Convert by our table; what an interrupted conversion has left in the folder is gone on with, and that is said."""
    journal = partial.with_name(JOURNAL)
    made = convert(model, partial, type=type, pre=pre, name=name, journal=journal, progress=progress)
    if made.whole:
        lines.append(f"went on with an interrupted conversion: {made.whole} of {len(made.tensors)} tensors were there")
    return made


def _script_for(model: Path, script: Path | None, pre: str | None) -> Path | None:
    """The script, if it is what has to convert this model.

    Raises:
        ExportError: it is, and ``pre`` is given, which it does not take.
    """
    config = read_config(model)
    if script is None or is_known(config):
        return None
    refuse(config, model, "gguf")
    if sees(config):  # of which a script's first file is the language model alone, which would look whole
        find_architecture(config)
    if pre is not None:
        raise ExportError(f"pre={pre} is not for {script}, which knows the tokenizers by itself: leave it out")
    return script


def _key(model: Path, type: str, pre: str | None, name: str) -> str:
    """What the file is made from: with the same key an interrupted conversion is gone on with."""
    files = [path for path in model.iterdir() if path.is_file()]
    return key_of(model, files, type, pre, name, versions())
