"""The folder of exactly what is pushed: what belongs to a model and nothing else, without this machine's paths."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ft_export.bases import TOKENIZER_FILES
from ft_export.errors import ExportError
from ft_export.folders import check_inside, files_in, require_space, sha256_of
from ft_export.hub.record import is_local
from ft_export.runs import read_json

__all__ = ["File", "check_clean", "listed", "place", "place_model", "pushable"]

WHOLE, INDEX, SHARDS = "model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"
MODEL = ("config.json", "generation_config.json", WHOLE, INDEX, SHARDS, *TOKENIZER_FILES)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES)
TEMPLATES = "additional_chat_templates/*.jinja"
DROPPED = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
"""Keys that libraries leave in configurations and that say where a file once lay; of no use to anybody else."""
BASE = "base_model_name_or_path"
WORDS = {"tokenizer.json", "vocab.json", "added_tokens.json"}
"""Files of a tokenizer's words, which may look like paths and are none."""
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
TEXT = (".json", ".jinja", ".md", ".txt", "")
LARGEST_TEXT = 50_000_000


@dataclass(frozen=True)
class File:
    """A file to push.

    Attributes:
        name: its path in the repository, with ``/``.
        path: where it lies here.
        size: bytes.
        sha256: of its content, hexadecimal.
    """

    name: str
    path: Path
    size: int
    sha256: str

    def git_id(self) -> str:
        """What git, and the Hub with it, calls a file that it holds as it is (not in large file storage)."""
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest()


def pushable(name: str, adapter: bool) -> bool:
    """Whether a file of a model's or adapter's folder belongs to it, by its path there."""
    patterns = ADAPTER if adapter else MODEL
    return fnmatchcase(name, TEMPLATES) or any("/" not in name and fnmatchcase(name, known) for known in patterns)


def place_model(source: Path, to: Path, base: str | None, adapter: bool) -> list[str]:
    """Put the files of a model or an adapter into ``to``; return what else lies beside them and stays behind.

    Large files are linked rather than copied where that changes nothing for the original.

    Args:
        base: the name on the Hub that an adapter is to have for its base.

    Raises:
        ExportError: no space, or a configuration that holds a local path.
    """
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    wanted = [name for name in names if pushable(name, adapter)]
    if WHOLE in wanted:  # which transformers reads then; shards beside it are of another model
        wanted = [name for name in wanted if name == WHOLE or not (name == INDEX or fnmatchcase(name, SHARDS))]
    copied = sum((source / name).stat().st_size for name in wanted if not _linkable(source / name, to))
    require_space(to, copied + 10_000_000, "the folder of what is pushed")
    for name in wanted:
        check_inside(source / name, source)
        if name.endswith(".json") and name not in WORDS and not name.endswith(".index.json"):
            _place_json(source / name, to / name, base)
        else:
            place(source / name, to / name)
    went = {name.partition("/")[0] for name in wanted}
    beside = sorted(path for path in source.iterdir() if path.name not in went and path.name != "export")
    return [f"{path.name}/" if path.is_dir() else path.name for path in beside]


def place(source: Path, to: Path) -> None:
    """Link a file to a second place, or copy it where a link is not possible or would be seen at the original."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if _linkable(source, to.parent):
        try:
            os.link(source.resolve(), to)
            return
        except OSError:  # a file system without links
            pass
    shutil.copyfile(source, to)


def listed(folder: Path, known: Sequence[File] = ()) -> list[File]:
    """What a folder holds, by name, with checksums.

    Args:
        known: files whose checksums have been taken; those of the same name are not read once more.
    """
    taken = {file.name: file.sha256 for file in known}
    found = []
    for path in files_in(folder):
        name = path.relative_to(folder).as_posix()
        found.append(File(name, path, path.stat().st_size, taken.get(name) or sha256_of(path)))
    return found


def check_clean(files: list[File], secret: str | None) -> None:
    """Look once more through everything that is text for what must not go out.

    Args:
        secret: the token that is used.

    Raises:
        ExportError: a file holds an access token, or a configuration a path on this machine; names the file.
    """
    for file in files:
        if file.path.suffix not in TEXT or file.size > LARGEST_TEXT:
            continue
        content = file.path.read_bytes()
        if TOKEN.search(content) or (secret and secret.encode() in content):
            raise ExportError(f"{file.name} holds an access token: take it out (and revoke it); nothing was sent")
        if file.name.endswith(".json") and file.name not in WORDS:
            for key, value in _strings(json.loads(content), ""):
                if _is_path_here(value):
                    raise ExportError(
                        f"{file.name} holds a path on this machine at {key}: {value}; change it in the original; "
                        "nothing was sent"
                    )


def _place_json(source: Path, to: Path, base: str | None) -> None:
    """Copy a configuration without paths on this machine; byte for byte where there are none."""
    said = read_json(source)
    cleaned = _cleaned(said)
    if source.name == "adapter_config.json" and base is not None and said.get(BASE) != base:
        cleaned = {**cleaned, BASE: base, "revision": None}  # a revision is of the repository that was named before
    if cleaned == said:
        place(source, to)
        return
    to.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cleaned(said: Any) -> Any:
    if isinstance(said, dict):
        gone = {key for key in DROPPED if isinstance(said.get(key), str) and said[key] and is_local(said[key])}
        return {key: _cleaned(value) for key, value in said.items() if key not in gone}
    return [_cleaned(value) for value in said] if isinstance(said, list) else said


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, with the path of keys that leads to it."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _strings(inner, f"{where}[{number}]")


def _is_path_here(value: str) -> bool:
    if len(value) > 4096 or "\n" in value or not Path(value).is_absolute():
        return False
    try:
        known = Path(value).exists()
    except OSError:  # no name that the system takes
        return False
    return (known and Path(value) != Path("/")) or Path(value).is_relative_to(Path.home())


def _linkable(source: Path, folder: Path) -> bool:
    """Whether a second name for the file is as good as a copy: same disk, ours, and of the rights a new file has.

    The finished folder's files get those rights, and by another name the original would get them too.
    """
    held, beside = source.stat(), folder.stat()
    mask = os.umask(0)
    os.umask(mask)
    owner = not hasattr(os, "getuid") or held.st_uid == os.getuid()
    return held.st_dev == beside.st_dev and owner and (held.st_mode & 0o777) == (0o666 & ~mask)
