"""From what a configuration calls a model to a folder that is known to hold one."""

from __future__ import annotations

import difflib
import json
import os
import re
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_core.errors import ModelError
from ft_core.models.device import host_memory

__all__ = ["ModelSource", "check_folder", "check_local", "find_model", "read_ahead", "weight_files"]

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*"]
NOT_WANTED = ["consolidated*", "*/*"]  # the same weights in another layout, and what lies in subfolders


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        reference: what the configuration calls it.
        path: the folder with its config, weights and tokenizer.
        name: what to call it to people.
    """

    reference: str
    path: Path
    name: str
    is_hub: bool = False

    @property
    def location(self) -> str:
        """What transformers loads the model by, on this machine and (for a Hub name) on any other."""
        return self.reference if self.is_hub else str(self.path)


def find_model(reference: str) -> ModelSource:
    """Find a model: a folder, a ``.gguf`` file, ``package:NAME`` (a GGUF inside an installed package) or a Hub name.

    A folder on this machine goes before a Hub name. Downloads happen only for a Hub name, into Hugging Face's cache.

    Raises:
        ModelError: nothing is there, or what is there cannot be loaded safely; see :func:`check_folder`.
    """
    from ft_core.models import gguf

    if reference.startswith("package:"):
        path, name = gguf.from_package(reference.removeprefix("package:"))
        return ModelSource(reference, path, name)
    check_local(reference)
    local = Path(reference).expanduser()
    if local.is_file():
        return ModelSource(reference, gguf.from_file(local), local.stem)
    if local.is_dir():
        return ModelSource(reference, local.resolve(), local.resolve().name)
    path = _download(reference, local)
    check_folder(path, reference)
    return ModelSource(reference, path, reference, is_hub=True)


def check_local(reference: str) -> None:
    """Refuse what :func:`find_model` would, as far as this machine's files show it; nothing heavy is imported.

    Raises:
        ModelError: a package that is not installed or carries no model, a file that is no .gguf file, a folder that
            holds no whole model, or neither of them nor a Hub name.
    """
    from ft_core.models import gguf

    if reference.startswith("package:"):
        gguf.check_package(reference.removeprefix("package:"))
        return
    local = Path(reference).expanduser()
    if local.is_file():
        if local.suffix != ".gguf":
            raise ModelError(f"model {reference} is a file: give a folder, a .gguf file or a Hub name")
    elif local.is_dir():
        check_folder(local)
    elif not HUB_NAME.fullmatch(reference) or reference.endswith(".gguf"):
        raise ModelError(f"no model folder {reference}{_nearest(local)}")


def _nearest(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, 1)
    return f" (in {folder.resolve()} there is {close[0]!r})" if close else f" (looked in {folder.resolve()})"


def _download(reference: str, local: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    hint = _nearest(local) if local.parent.is_dir() else ""
    try:
        return Path(snapshot_download(reference, allow_patterns=HUB_FILES, ignore_patterns=NOT_WANTED))
    except GatedRepoError:
        raise ModelError(
            f"model {reference!r} is gated: accept its terms on its Hub page and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"no model {reference!r} on the Hub, and no such folder here{hint} (a private one needs `hf auth login`)"
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {reference!r} is no folder here{hint}, is not in the Hub's cache, and the Hub cannot be reached "
            f"({type(error).__name__}): check the name or the connection"
        ) from None


def check_folder(folder: Path, name: str | None = None) -> None:
    """Check that a folder holds a whole model in safetensors, reading only headers.

    Raises:
        ModelError: it is empty or an adapter, ``config.json`` is missing or broken, weights are missing, pickled,
            truncated or not all there.
    """
    shown = name or str(folder)
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"model {shown} is an adapter, not a model: give the model that it was trained on")
        if (folder / "config.yaml").is_file() and (folder / "environment.json").is_file():
            raise ModelError(
                f"model {shown} is a run: give {shown}/model or {shown}/merged (ft merge {shown} makes it)"
            )
        raise ModelError(f"model {shown} has no config.json: it is no transformers model folder")
    try:
        parsed = json.loads(config.read_text(encoding="utf-8"))
        assert isinstance(parsed, dict)
    except (ValueError, AssertionError) as error:
        raise ModelError(f"model {shown}: config.json is no valid JSON object ({error})") from None
    for file in weight_files(folder, shown):
        _check_header(file, shown)


def weight_files(folder: Path, shown: str) -> list[Path]:
    """The files that transformers will read, in its order of preference; ``shown`` is what errors call the model.

    Raises:
        ModelError: there are none, or not all.
    """
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"model {shown}: {index.name} cannot be read ({error!r})") from None
        bad = sorted(n for n in names if not isinstance(n, str) or Path(n).name != n)
        if bad:
            raise ModelError(f"model {shown}: {index.name} names a file outside its folder: {bad[0]!r}")
        missing = sorted(n for n in names if not (folder / n).is_file())
        if missing:
            count = f"{len(missing)} of {len(names)}"
            raise ModelError(f"model {shown}: {count} weight files are missing, {missing[0]} first: fetch it again")
        return [folder / n for n in sorted(names)]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
    if pickled:
        raise ModelError(
            f"model {shown} has only pickled weights ({pickled[0]}), which can run code when loaded: "
            "ft takes safetensors only; convert it where you trust it, with save_pretrained of transformers"
        )
    raise ModelError(f"model {shown} has no weights: neither {whole.name} nor {index.name} is there")


def read_ahead(source: ModelSource) -> None:
    """Ask the system to begin reading a model's files, while Python imports what will load them.

    Only where it can be asked (Linux), and where there is memory for all of them: what is read ahead must still be
    there when it is wanted.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    files = weight_files(source.path, source.reference)
    if sum(file.stat().st_size for file in files) > 0.8 * host_memory()[1]:
        return

    def ask() -> None:  # it may wait for the disk
        for file in files:
            with suppress(OSError), open(file, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    threading.Thread(target=ask, daemon=True, name="ft-read-ahead").start()


def _check_header(file: Path, shown: str) -> None:
    """A safetensors file: eight bytes with the header's length, a JSON header, then exactly the data it describes."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                raise ValueError("it ends within its header")
            (length,) = struct.unpack("<Q", start)
            if length > min(size - 8, 100_000_000):
                raise ValueError("it ends within its header")
            header: dict[str, Any] = json.loads(stream.read(length))
        ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ModelError(f"model {shown}: {file.name} is no whole safetensors file ({error}): fetch it again") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "is truncated, " if size < expected else "is damaged, "
        raise ModelError(f"model {shown}: {file.name} {what}{size} bytes are there of {expected}: fetch it again")
