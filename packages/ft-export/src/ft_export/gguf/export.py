"""The exporter ``gguf``: merge if need be, convert, check in llama.cpp, and only then put the file in its place."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ft_export import __version__
from ft_export.bases import load_model, load_tokenizer, stop_tokens
from ft_export.errors import ExportError, one_line
from ft_export.exporting import PROOF, Exported, check_options, file_name, whole_model
from ft_export.folders import new_file
from ft_export.gguf.converter import Converted, check_convertible, check_type, convert, require_gguf
from ft_export.gguf.engine import llama_cpp, require_llama_cpp
from ft_export.gguf.proof import FINE, Comparison, Prompt, compare
from ft_export.gguf.text_check import check_template, check_tokens, rendered
from ft_export.gguf.vocabulary import Vocabulary
from ft_export.progress import Progress, silent
from ft_export.runs import Source, open_source, read_json
from ft_export.samples import Row, prompt_text, read_rows

__all__ = ["export"]

OPTIONS = ("pre",)
NEW_TOKENS = 24
LONGEST_PROMPT = 256


@one_line
def export(
    path: Path | str,
    out: Path | str | None = None,
    *,
    type: str = "f16",
    overwrite: bool = False,
    options: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write ``OUT/<name>-<type>.gguf`` and ``OUT/proof.json``.

    An adapter is merged first, into ``merged/`` beside it; a merge of the same adapter that is there already is used.

    Args:
        path: a run folder, a PEFT adapter folder or a transformers model folder.
        out: the folder to write to; ``path/export/gguf`` by default.
        type: of the file: ``f16``, ``f32``, ``bf16``, ``q8_0``, or one of llama.cpp's smaller ones, such as ``q4_k_m``.
        overwrite: whether an earlier file of the same name may be replaced.
        options: ``pre``: llama.cpp's name of the tokenizer's splitting rules, where it is not recognised.
        progress: of a merge; see :func:`ft_export.merge`.

    Raises:
        ExportError: bad input, a missing extra, no space, or a check that failed; no file is left then.
    """
    source = open_source(Path(path))
    folder = Path(out).expanduser() if out is not None else source.path / "export" / "gguf"
    said = check_options(options, OPTIONS, "gguf")
    check_type(type)
    require_gguf()
    require_llama_cpp()
    name = file_name(source)
    file = folder / f"{name}-{type}.gguf"
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is no folder: choose another with --out")
    if file.exists() and not overwrite:
        raise ExportError(f"{file} is already there: pass --overwrite to replace it, or choose another with --out")

    lines: list[str] = []
    model = whole_model(
        source, lines, progress, lambda base, words: check_convertible(base, words, said.get("pre"), source.rope, type)
    )
    made_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        with new_file(file) as partial:
            made = convert(model, partial, type=type, pre=said.get("pre"), name=name)
            result = _check(made, model, source, type, lines)
            proof = _write_proof(folder, file, made, type, result, lines)
    except BaseException:
        with suppress(OSError):  # not empty: something else came in
            for parent in made_folders:
                parent.rmdir()
        raise
    serve = f"llama-server -m {shlex.quote(str(file))} --jinja"
    return Exported(file, proof, tuple(lines), serve)


def _check(made: Converted, model: Path, source: Source, type: str, lines: list[str]) -> dict[str, Any]:
    import torch

    tokenizer = load_tokenizer(model)
    rows = read_rows(source.held_out)
    prompts = _prompts(rows, tokenizer) or _prompts(read_rows(None), tokenizer)
    vocabulary = made.vocabulary
    with llama_cpp(made.file, max(len(prompt.ids) for prompt in prompts) + NEW_TOKENS + 8) as engine:
        written = [*(prompt.text for prompt in prompts), *rendered(tokenizer)]
        how: dict[str, Any] = {"plain": vocabulary.plain, "spaced": vocabulary.spaced}
        if vocabulary.scores:
            how["advice"] = "llama.cpp has no other way of splitting for a SentencePiece tokenizer"
        texts = check_tokens(engine, tokenizer, written, **how)
        lines.append(
            f"llama.cpp splits {texts} text{'' if texts == 1 else 's'} into the same tokens (rules: {vocabulary.pre})"
        )
        lines.extend(_exceptions(vocabulary))
        conversations = 0
        if vocabulary.templates:
            bos = tokenizer.bos_token if vocabulary.add_bos else ""
            conversations = check_template(engine, tokenizer, _conversations(rows), bos)
            several = "conversation" if conversations == 1 else "conversations"
            lines.append(f"llama.cpp renders {conversations} {several} in the chat template byte for byte alike")
        else:
            lines.append("the model has no chat template: none was written")
        stops = set(stop_tokens(tokenizer, model))
        whole = load_model(model, torch.float32)
        found = compare(engine, whole, tokenizer, prompts, type, made.kinds, stops, NEW_TOKENS)
    lines.extend(_told(found, prompts[0], type))
    return {
        "texts_with_equal_tokens": texts,
        "conversations_with_equal_template": conversations,
        "stop_tokens": sorted(stops),
        "prompts": len(prompts),
        "continuations": found.as_dict(),
    }


def _exceptions(vocabulary: Vocabulary) -> list[str]:
    """What llama.cpp cannot do as the tokenizer does it; such texts were not compared."""
    told = []
    if not vocabulary.plain:
        told.append(
            "a text with no special token before it begins without the space in llama.cpp that the tokenizer puts there"
        )
    if not vocabulary.spaced:
        told.append("a text that begins with a space begins with one space more in llama.cpp")
    return told


def _told(found: Comparison, prompt: Prompt, type: str) -> list[str]:
    before, after = found.perplexity
    model = "transformers" if type in FINE else "transformers with the rounded weights"
    lines = [
        f"{type} costs {found.cost.mean:.2e} nats on average, {found.cost.largest:.2e} at most; perplexity of the "
        f"prompts {before:.4g}, rounded {after:.4g}",
        f"greedy continuations: {found.equal} of {found.tokens} tokens are the likeliest of {model}"
        + (f", the others within {found.close:.2e} nats of it" if found.equal < found.tokens else ""),
        f"log-probabilities against {model} in fp32: largest difference {found.error.largest:.2e} (bound "
        f"{found.bound_largest:.2e} for {type}), mean {found.error.mean:.2e} (bound {found.bound_mean:.2e})",
    ]
    if found.undecided:
        lines.append(f"{found.undecided} tokens hang on a choice of experts that rounding turns: not compared further")
    same = "equal to transformers'" if found.answers_equal else f"transformers says {found.generated!r}"
    asked = prompt.text if len(prompt.text) <= 160 else f"…{prompt.text[-160:]}"
    lines.append(f"llama.cpp's answer to {asked!r}: {found.answer!r}, {same}")
    return lines


def _prompts(rows: list[Row], tokenizer: Any) -> list[Prompt]:
    prompts = []
    for row in rows:
        text, special = prompt_text(row, tokenizer)
        ids = tokenizer(text, add_special_tokens=not special)["input_ids"][:LONGEST_PROMPT]
        if ids:
            prompts.append(Prompt(text, tuple(ids)))
    return prompts


def _conversations(rows: list[Row]) -> list[list[dict[str, Any]]]:
    """Those held-out conversations that end with the user, where the assistant is to speak."""
    found = []
    for row in rows:
        messages = list(row.get("messages") or [])
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        if messages:
            found.append(messages)
    return found[:3]


def _write_proof(
    folder: Path, file: Path, made: Converted, type: str, result: dict[str, Any], lines: list[str]
) -> Path:
    """Add the file's entry to ``proof.json``; entries of other files in the folder stay."""
    from importlib.metadata import version

    path = folder / PROOF
    proof = read_json(path) if path.is_file() else {}
    said = proof.get("files")
    files: dict[str, Any] = said if isinstance(said, dict) else {}
    files[file.name] = {
        "type": type,
        "architecture": made.architecture,
        "pre_tokenizer": made.vocabulary.pre,
        "ft_export": __version__,
        "libraries": {name: version(name) for name in ("gguf", "xllamacpp", "transformers", "torch")},
        **result,
        "checks": lines,
        "tensors": made.tensors,
    }
    text = json.dumps({"proof_format": 1, "files": files}, indent=1, ensure_ascii=False) + "\n"
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
