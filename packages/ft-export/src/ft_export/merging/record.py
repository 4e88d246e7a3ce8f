"""What a merged model's folder says of itself (``merge.json``), and whether it is still what it says."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.bases import TOKENIZER_FILES, local_base, quantization_of
from ft_export.errors import ExportError
from ft_export.folders import KEY, sha256_of
from ft_export.merging.adapter import Adapter
from ft_export.runs import read_json

__all__ = [
    "MARKER", "UNPROVEN", "Standing", "again", "base_files", "check_unchanged", "fingerprint", "is_current", "standing",
    "sums",
]  # fmt: skip

MARKER = "merge.json"
UNPROVEN = "not proven"
"""Why a merge is not current whose proof was skipped."""
CONFIGURATIONS = ("config.json", "generation_config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Standing:
    """What a merge is worth to whoever wants the whole model of an adapter now.

    Attributes:
        current: whether it can be taken.
        why: where not, why not, as what the merge "was"; where it can, what is to be known about it, or nothing.
        asked: whether it was made as nobody would make it unasked (of several adapters, with a weight, on another
            base): one that is not current is then not replaced by a plain one.
    """

    current: bool
    why: str = ""
    asked: bool = False


def fingerprint(adapter: Path) -> str:
    """The SHA-256 of an adapter: its configuration's bytes and its weights'."""
    digest = hashlib.sha256((adapter / "adapter_config.json").read_bytes())
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a merged model but what says so, by its name."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name not in (MARKER, KEY))
    return {path.name: sha256_of(path) for path in sorted(files)}


def base_files(folder: Path) -> dict[str, list[int]]:
    """Of each file of a base that a merge reads: its bytes, and when it was written last (ns since 1970).

    That tells a base that was changed without reading its gigabytes again. One that was only copied or touched looks
    changed too, and is merged anew for nothing; the other way round nothing wrong is served.
    """
    names = (*CONFIGURATIONS, *TOKENIZER_FILES)
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in names]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files) if path.is_file()}


def is_current(merged: Path, adapter: Path, proven: bool = True, base: str | None = None) -> bool:
    """Whether ``merged`` was made of this adapter, and of what else it says, as they are now; see :func:`standing`.

    Args:
        base: as for :func:`standing`; by default what the adapter itself names.
    """
    found = standing(merged, adapter, base or Adapter(adapter).base, proven)
    return found is not None and found.current


def standing(merged: Path, adapter: Path, base: str | None, proven: bool = True) -> Standing | None:
    """What the merge in ``merged`` is worth to whoever wants the whole model of ``adapter``; None: there is none.

    It is current if the adapter, those that were combined with it and the base are what they were when it was made. Of
    what is not here any more nothing can be said: the merge that was made of it stands.

    Args:
        base: the folder or Hub name of the adapter's base, as the adapter or its run says; nothing is fetched.
        proven: whether its proof must not have been skipped.

    Raises:
        ExportError: it would be current, but its weights are others now, which nothing has checked.
    """
    if not (merged / MARKER).is_file():
        return None
    said = read_json(merged / MARKER)
    parts = said.get("adapters") or []
    asked = said.get("combination") is not None
    if said.get("adapter_sha256") != fingerprint(adapter):
        return Standing(False, "of an earlier adapter", asked)
    for part in parts[1:]:
        folder = Path(part["path"])
        if _is_adapter(folder) and part["sha256"] != fingerprint(folder):
            return Standing(False, f"made with an earlier {folder}", asked)
    told, other = _base_standing(said, base)
    if not told.current:
        return Standing(False, told.why, asked or other)
    if not isinstance(said.get("files_sha256"), dict):
        return Standing(False, "made before merges had checksums", asked)
    if proven and said.get("logprobs") is None:
        return Standing(False, UNPROVEN, asked)
    check_unchanged(merged)
    gone = [part["path"] for part in parts[1:] if not _is_adapter(Path(part["path"]))]
    notes = [f"{path} is not here to be compared" for path in gone] + [told.why] * bool(told.why)
    return Standing(True, "; ".join(notes), asked)


def _is_adapter(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors"))


def _base_standing(said: dict[str, Any], base: str | None) -> tuple[Standing, bool]:
    """Whether the base of a merge is that of its adapter and unchanged; and whether another one was named for it."""
    left = said.get("base_files")
    if not isinstance(left, dict):
        return Standing(False, "made before merges said what their base was"), False
    own = local_base(base) if base else None
    same_name = said.get("base") == base
    if own is None:
        return Standing(True, "its base is not here to be compared"), False
    if same_name or os.path.realpath(own) == said.get("base_folder"):
        same = base_files(own) == left
        return Standing(same, "" if same else "on its base before that was changed"), False
    if base_files(own) == left:
        return Standing(True), False
    if quantization_of(own) not in (None, "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        return Standing(True, f"on {said.get('base')}, since no merge can be made on {base}"), False
    return Standing(False, f"on {said.get('base')} and not on the adapter's own base {base}"), True


def again(said: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`ft_export.merge` that make a merge again as ``merge.json`` says that it was made."""
    kept: dict[str, Any] = {key: said[key] for key in ("dtype", "base") if key in said}
    how, parts = said.get("combination"), said.get("adapters")
    if isinstance(how, dict) and isinstance(parts, list):
        kept |= {"weight": parts[0]["weight"], "adapters": [(part["path"], part["weight"]) for part in parts[1:]]}
        kept |= {"combination": how["type"]}
        kept |= {key: how[key] for key in ("density", "majority_sign", "rank", "seed") if how.get(key) is not None}
    return kept


def check_unchanged(merged: Path) -> None:
    """
    Raises:
        ExportError: a merge's weights or settings are not those that it was left with, which nothing has checked.
    """
    left: Any = read_json(merged / MARKER).get("files_sha256")
    now = sums(merged)
    for name in sorted({*left, *now}) if isinstance(left, dict) else ():
        if left.get(name) != now.get(name):
            raise ExportError(
                f"{merged / name} is not what the merge left there ({MARKER} has its checksum): "
                f"remove {merged} to merge anew, or take {MARKER} away to export it as it is"
            )
