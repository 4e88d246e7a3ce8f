"""What all exporters share: what they return, their options, and the whole model that an adapter becomes first."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ft_export.bases import find_base
from ft_export.errors import ExportError
from ft_export.merging import is_current, merge
from ft_export.merging.adapter import Adapter
from ft_export.progress import Progress, silent
from ft_export.runs import Source

__all__ = ["PROOF", "Exported", "check_options", "file_name", "whole_model"]

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


def check_options(options: Mapping[str, str] | None, known: Sequence[str], target: str) -> dict[str, str]:
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

    A merge of the same adapter that is there already is used.

    Args:
        lines: gets what was done and found.
        check: called before a merge with the folders of the base and of the tokenizer; raises what the exporter would
            refuse, since a merge takes its time.
        skip_proof: of the merge; one that was not proven is used only then.

    Raises:
        ExportError: what ``check`` and :func:`ft_export.merge` raise.
    """
    if source.adapter is None:
        assert source.model is not None
        return source.model
    merged = source.path / "merged"
    if is_current(merged, source.adapter, proven=not skip_proof):
        lines.append(f"used the merge in {merged}, made from this adapter")
        return merged
    reference = Adapter(source.adapter).base or source.base
    if reference:
        base = find_base(reference)
        brings = (source.adapter / "tokenizer_config.json").is_file()
        check(base, source.adapter if brings else base)
    # a merge of an adapter that is no longer there may be replaced; anything else in its place is refused by merge
    lines.extend(merge(source.path, overwrite=True, skip_proof=skip_proof, progress=progress).lines)
    return merged
