"""What a merged model's folder says of itself (``merge.json``), and whether it is still what it says."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ft_export.errors import ExportError
from ft_export.folders import KEY, sha256_of
from ft_export.runs import read_json

__all__ = ["MARKER", "check_unchanged", "fingerprint", "is_current", "sums"]

MARKER = "merge.json"


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


def is_current(merged: Path, adapter: Path, proven: bool = True) -> bool:
    """Whether ``merged`` was made from exactly this adapter, and says which weights it was left with.

    Args:
        proven: whether its proof must not have been skipped.

    Raises:
        ExportError: its weights are others now, which nothing has checked.
    """
    if not (merged / MARKER).is_file():
        return False
    said = read_json(merged / MARKER)
    left = said.get("files_sha256")
    if said.get("adapter_sha256") != fingerprint(adapter) or not isinstance(left, dict):
        return False
    if proven and said.get("logprobs") is None:
        return False
    check_unchanged(merged)
    return True


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
