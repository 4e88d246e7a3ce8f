"""Finds a codec: its class by the registry, its folder on this machine or on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.models.source import HUB_NAME
from ft_speech.codecs.errors import CodecError

if TYPE_CHECKING:
    from ft_speech.codecs.protocol import Codec

__all__ = ["codec_class", "find_codec", "load_codec", "read_config", "read_weights"]

HUB_FILES = ["config.json", "*.safetensors", "pytorch_model.bin", "preprocessor_config.json", "LICENSE*"]


def codec_class(name: str) -> type[Codec]:
    """The class of a codec, by its name in ``ft.codecs``.

    Raises:
        ft_core.errors.PluginError: no such codec is installed, or it fails to import.
    """
    from ft_core.errors import PluginError
    from ft_core.plugins import CodecSpec, registry, resolve

    spec = registry().get(CodecSpec, name)
    try:
        found: type[Codec] = resolve(spec.codec)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(f"codec {name!r} ({spec.codec}) fails to import: {type(error).__name__}: {error}") from error
    return found


def find_codec(reference: str | Path) -> Path:
    """The folder of a codec's weights: one on this machine, or one of the Hub's, which is downloaded into its cache.

    Raises:
        CodecError: there is neither.
    """
    local = Path(reference).expanduser()
    if local.is_dir():
        return local.resolve()
    name = str(reference)
    if local.is_file():
        raise CodecError(f"codec {name} is a file: give its folder, or a Hub name")
    if isinstance(reference, Path) or not HUB_NAME.fullmatch(name):
        raise CodecError(f"no codec folder {name}")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except GatedRepoError:
        raise CodecError(f"codec {name!r} is gated: accept its terms on its Hub page, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise CodecError(f"no codec {name!r} on the Hub, and no such folder here") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise CodecError(
            f"codec {name!r} is no folder here, is not in the Hub's cache, and the Hub cannot be reached "
            f"({type(error).__name__}): check the name or the connection"
        ) from None


def load_codec(name: str, reference: str | Path, device: Any = "cpu") -> Codec:
    """Load a codec.

    >>> codec = load_codec("snac", "hubertsiuzdak/snac_24khz", "cuda")  # doctest: +SKIP

    Args:
        name: of a plugin of the group ``ft.codecs``: ``snac``, ``mimi``, ``mel``, or a third party's.
        reference: the folder with its ``config.json`` and weights, or a Hub name, which is downloaded.
        device: of torch's, where it computes; a codec without networks computes on the CPU.

    Raises:
        ft_core.errors.PluginError: no such codec is installed, or it fails to import.
        CodecError: the folder isn't there, a file of it is missing or damaged, or it is another codec's.
    """
    kind = codec_class(name)
    return kind.load(find_codec(reference), device)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """What a codec's ``config.json`` says.

    Args:
        name: the codec's, for the message.

    Raises:
        CodecError: it is missing or no JSON object.
    """
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CodecError(f"{name} codec {folder}: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise CodecError(f"{name} codec {folder}: config.json cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise CodecError(f"{name} codec {folder}: config.json is no JSON object")
    return values


def read_weights(folder: Path, name: str) -> dict[str, Any]:
    """A codec's tensors, on the CPU: those of ``model.safetensors``, or else of ``pytorch_model.bin``.

    Of the latter nothing but tensors and plain containers is unpickled (torch's ``weights_only``).

    Args:
        name: the codec's, for the message.

    Raises:
        CodecError: neither is there, or it is damaged.
    """
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.is_file():
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found: dict[str, Any] = load_file(safe)
        except (SafetensorError, OSError) as error:
            raise CodecError(f"{name} codec {folder}: {safe.name} is damaged ({error}): fetch it again") from None
        return found
    if not pickled.is_file():
        raise CodecError(f"{name} codec {folder}: it has neither {safe.name} nor {pickled.name}")
    import torch

    try:
        weights = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its reader and its unpickler do
        reason = str(error).strip().split("\n")[0][:200]
        raise CodecError(f"{name} codec {folder}: {pickled.name} holds no plain tensors ({reason})") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CodecError(f"{name} codec {folder}: {pickled.name} is no table of tensors")
    return weights
