"""The exporter ``ctranslate2``: a Whisper for CTranslate2 and faster-whisper, proven in CTranslate2."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_export.bases import load_tokenizer
from ft_export.checkpoints import Checkpoint
from ft_export.ctranslate2.checking import check_file
from ft_export.ctranslate2.convert import TYPES, check_convertible, convert, require_ctranslate2
from ft_export.ctranslate2.decoding import check_decoding
from ft_export.ctranslate2.reading import ModelFile
from ft_export.errors import ExportError, one_line
from ft_export.exporting import PROOF, Exported, check_options, check_target, whole_model
from ft_export.folders import new_folder, require_space
from ft_export.progress import Progress, silent
from ft_export.runs import open_source
from ft_export.serving.export import merge_of, write_proof

__all__ = ["MARKER", "TYPES", "export"]

MARKER = "model.bin"
"""The file by which a folder that may be overwritten is known."""
BYTES = {"float16": 2, "float32": 4, "int8": 1}


@one_line
def export(
    path: Path | str,
    out: Path | str | None = None,
    *,
    type: str = "float16",
    overwrite: bool = False,
    options: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write a folder that faster-whisper loads: ``model.bin``, its configuration, tokenizer and features.

    CTranslate2's own converter writes it. Then every variable is compared with the model's tensors
    (:mod:`ft_export.ctranslate2.checking`), and CTranslate2 decodes held-out sounds as transformers does
    (:mod:`ft_export.ctranslate2.decoding`).

    Args:
        path: a run folder, a PEFT adapter folder or a transformers model folder, of a Whisper; an adapter is merged
            first.
        out: the folder to write; ``path/export/ctranslate2`` by default.
        type: ``float16``, ``float32`` or ``int8`` (whose norms and biases are fp32).
        overwrite: whether an earlier export in ``out`` may be replaced.
        options: none are known.
        progress: see :data:`ft_export.progress.Progress`.

    Raises:
        ExportError: bad input, no space, CTranslate2 is missing, or a check failed; nothing is left behind.
    """
    source = open_source(Path(path))
    folder = Path(out).expanduser() if out is not None else source.path / "export" / "ctranslate2"
    check_options(options, (), "ctranslate2")
    if type not in TYPES:
        raise ExportError(f"--type {type!r} is not known for ctranslate2 (allowed: {', '.join(TYPES)})")
    check_target(folder, source, MARKER, overwrite)
    lines: list[str] = []

    def fits(base: Path, _: Path) -> None:
        check_convertible(base)
        require_ctranslate2()

    model = whole_model(source, lines, progress, fits)
    config = check_convertible(model)
    require_ctranslate2()
    size = Checkpoint(model).parameters() * BYTES[type]
    require_space(folder.parent, int(size * 1.02) + 50_000_000, "the model for CTranslate2")
    with new_folder(folder) as partial:
        progress(0, 0, "converting by CTranslate2")
        told = convert(model, partial, type)
        file = ModelFile(partial / MARKER)
        dtype = "float32" if type == "int8" else type
        counts = check_file(file, model, config, dtype, progress)
        equal = f"{counts['equal']} equal bit for bit to the model's in {dtype}"
        codes = f", {counts['compressed']} in 8 bits to within half a step" if counts["compressed"] else ""
        lines.append(f"{sum(counts.values())} variables read back from {MARKER}: {equal}{codes}")
        tokenizer = load_tokenizer(model)
        _check_words(partial, tokenizer, config)
        lines.append(f"the names of its {config.vocab_size} tokens are the tokenizer's")
        lines += told
        decoded = check_decoding(partial, model, source.held_out, tokenizer, type, lines, progress)
        report: dict[str, Any] = {
            "type": type,
            "ctranslate2": _version(),
            "merge": merge_of(model),
            "variables": counts,
            "decoded": decoded.as_dict(),
        }
        write_proof(partial, "ctranslate2", report, lines)
    return Exported(folder, folder / PROOF, tuple(lines), _command(folder))


def _check_words(folder: Path, tokenizer: Any, config: Any) -> None:
    """The names of tokens that CTranslate2 has are the tokenizer's, save for times that a tokenizer does not name.

    Raises:
        ExportError: they are not.
    """
    names = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    known = tokenizer.get_vocab()
    wrong = next((token for token, index in known.items() if index >= len(names) or names[index] != token), None)
    if len(names) != config.vocab_size or wrong is not None:
        raise ExportError(
            f"vocabulary.json has {len(names)} tokens for {config.vocab_size}"
            if wrong is None
            else f"vocabulary.json does not name {wrong!r} ({known[wrong]}) as the tokenizer does: nothing was written"
        )


def _version() -> str:
    from importlib.metadata import version

    return version("ctranslate2")


def _command(folder: Path) -> str:
    """Transcribes a file with faster-whisper."""
    said = (
        f"from faster_whisper import WhisperModel; m = WhisperModel({json.dumps(str(folder), ensure_ascii=False)}); "
        'print(*(part.text for part in m.transcribe("audio.wav")[0]))'
    )
    return f"python -c {shlex.quote(said)}  # pip install faster-whisper"
