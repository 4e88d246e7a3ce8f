"""What all exporters share: what they return, their options, and the whole model that an adapter becomes first."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.bases import TOKENIZER_FILES, find_base
from ft_export.errors import ExportError
from ft_export.folders import new_file, refuse_existing_folder
from ft_export.merging import merge
from ft_export.merging.adapter import base_of
from ft_export.merging.record import MARKER, UNPROVEN, Standing, again, standing
from ft_export.progress import Progress, silent
from ft_export.runs import Source, read_json

__all__ = ["PROOF", "Exported", "check_options", "check_target", "file_name", "new_proof", "save_proof", "whole_model"]

PROOF = "proof.json"
"""The file in an export's folder that says what was checked."""


@dataclass(frozen=True)
class Exported:
    """What an exporter made.

    Attributes:
        file: the main file, or the folder.
        proof: ``proof.json``, which says what was checked and holds the checksums.
        lines: what was checked and found, for people.
        next_command: a command that serves it.
    """

    file: Path
    proof: Path
    lines: tuple[str, ...]
    next_command: str


def check_options(options: Mapping[str, str] | None, known: Collection[str], target: str) -> dict[str, str]:
    """The options, all of which the target knows.

    Raises:
        ExportError: one is unknown; names those that are allowed.
    """
    said = dict(options or {})
    for key in said:
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise ExportError(f"option {key!r} is not known for {target} (allowed: {allowed})")
    return said


def check_target(folder: Path, source: Source, marker: str, overwrite: bool) -> None:
    """Refuse a folder that is taken, or that holds what is to be exported.

    Args:
        marker: a file that an earlier export to the same target holds, beside its proof.

    Raises:
        ExportError: see above.
    """
    there = folder.resolve()
    reference = base_of(source)
    base = Path(reference).expanduser() if reference else None
    for taken in (source.path, source.adapter, source.model, base):
        if taken is not None and there in (taken.resolve(), *taken.resolve().parents):
            raise ExportError(f"{folder} holds what is to be exported: choose another folder with --out")
    refuse_existing_folder(folder, marker, overwrite)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROOF).is_file():
        raise ExportError(f"{folder} holds something else (it has no {PROOF}): choose another folder with --out")


def save_proof(folder: Path, said: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> Path:
    """Write a folder's :data:`PROOF`, beside its place and renamed: at any moment it is the old one or the new one."""
    with new_proof(folder, said) as path:
        pass
    return path


@contextmanager
def new_proof(folder: Path, said: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> Iterator[Path]:
    """:func:`save_proof` in two steps: written before the block, and in its place after it if it ends well.

    Args:
        said: what it says; or a function that reads what is there and gives it with what is new. That is asked once
            more right before the new one takes its place, and what came in meanwhile is in it.

    Yields:
        Its place.
    """
    path = folder / PROOF
    with new_file(path) as partial:
        if not callable(said):
            _write(partial, said)
            yield path
            return
        written = said()
        _write(partial, written)
        yield path
        while True:
            with partial.open("r+b") as file:
                os.fsync(file.fileno())  # nothing that takes time lies between the last look and the renaming
            if (now := said()) == written:
                return
            _write(partial, written := now)


def _write(partial: Path, said: Mapping[str, Any]) -> None:
    partial.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def file_name(source: Source) -> str:
    """What a source is called in the names of files."""
    return re.sub(r"[^\w.-]+", "-", source.name).strip("-") or "model"


def whole_model(
    source: Source,
    lines: list[str],
    progress: Progress = silent,
    check: Callable[[Path, Path], None] = lambda base, tokenizer: None,
    skip_proof: bool = False,
) -> Path:
    """The folder of the whole model in 16 bits, merged if need be, into ``merged/`` beside the adapter.

    A merge that is there already is used if adapter and base are what they were when it was made. One that was made as
    no exporter would make it (of several adapters, on a base that was named for it) is used as well, which is said, and
    is never replaced by a plain one.

    Args:
        lines: gets what was done and found.
        check: called before a merge with the folders of the base and of the tokenizer; raises what the exporter would
            refuse, since a merge takes its time.
        skip_proof: of the merge; one that was not proven is used only then.

    Raises:
        ExportError: what ``check`` and :func:`ft_export.merge` raise; or a merge there is neither current nor one that
            may be replaced.
    """
    if source.adapter is None:
        assert source.model is not None
        return source.model
    merged = source.path / "merged"
    reference = base_of(source)
    found = standing(merged, source.adapter, reference, proven=not skip_proof)
    if found is not None and found.current:
        lines.append(
            f"used the merge in {merged}, made from {_made_from(merged)}" + f" ({found.why})" * bool(found.why)
        )
        return merged
    if reference:
        base = find_base(reference)
        brings = (source.adapter / "tokenizer_config.json").is_file()
        check(base, source.adapter if brings else base)
    kept: dict[str, Any] = {}
    if found is not None:
        kept = _replaceable(merged, found, source, lines)
    # anything else in its place is refused by merge
    made = merge(source.path, overwrite=True, skip_proof=skip_proof, progress=progress, **kept)
    lines.extend(made.lines)
    return merged


def _made_from(merged: Path) -> str:
    """The adapters of a merge, with their weights where there are several or one has a weight of its own."""
    said = read_json(merged / MARKER)
    how, parts = said.get("combination"), said.get("adapters")
    if not isinstance(how, dict) or not isinstance(parts, list):
        return "this adapter"
    others = [f"{part['path']} (weight {part['weight']:g})" for part in parts[1:]]
    return " and ".join([f"this adapter (weight {parts[0]['weight']:g})", *others]) + f" by {how['type']}"


def _replaceable(merged: Path, found: Standing, source: Source, lines: list[str]) -> dict[str, Any]:
    """Whether a merge may be replaced by one of the adapter as it is now; what is kept of how it was made.

    Raises:
        ExportError: something that a merge does not write lies in its folder and would be lost; or the merge is one
            that was asked for as it is, and what it was made of has changed.
    """
    said = read_json(merged / MARKER)
    if found.asked and found.why != UNPROVEN:
        raise ExportError(
            f"{merged} was {found.why}, and an export would put a plain merge of {source.adapter} in its place: make "
            f"it again with ft merge --overwrite, name {merged} itself to export it as it is, or remove it"
        )
    known = {MARKER, "config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES}
    for path in sorted(merged.iterdir()):
        if path.name not in known and path.suffix != ".safetensors" and path.name != "additional_chat_templates":
            raise ExportError(
                f"{merged} is to be merged anew, and {path.name} in it would be lost: move that, or name "
                f"{merged} itself to export it as it is"
            )
    lines.append(f"the merge in {merged} was {found.why}: merged anew")
    return again(said) if found.why == UNPROVEN else {}
