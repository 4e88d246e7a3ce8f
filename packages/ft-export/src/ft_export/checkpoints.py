"""Reading a folder of safetensors files tensor by tensor, checked before anything is loaded."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ft_export.errors import ExportError
from ft_export.runs import read_json

if TYPE_CHECKING:
    import torch

__all__ = ["CODES", "Checkpoint", "Code", "code_of", "read_header"]


class Code(NamedTuple):
    """What a type's code in a safetensors file stands for: torch's ``name`` of it, and the bytes of a value."""

    name: str
    itemsize: int


CODES = {
    "F64": Code("float64", 8),
    "F32": Code("float32", 4),
    "F16": Code("float16", 2),
    "BF16": Code("bfloat16", 2),
    "I64": Code("int64", 8),
    "I32": Code("int32", 4),
    "I16": Code("int16", 2),
    "I8": Code("int8", 1),
    "U8": Code("uint8", 1),
    "BOOL": Code("bool", 1),
    "F8_E4M3": Code("float8_e4m3fn", 1),
    "F8_E5M2": Code("float8_e5m2", 1),
}
BLOCK = 1 << 24
"""Values that :meth:`Checkpoint.blocks` reads at a time, about: 64 MiB in fp32."""
LARGEST_HEADER = 100_000_000
SHARD = re.compile(r"\w[\w.-]*\.safetensors")
"""The name of a file in an index; nothing that leads to another folder matches."""


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: for each tensor its ``dtype``, ``shape`` and ``data_offsets``.

    Raises:
        ExportError: the file is missing, is not safetensors, or is shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise ExportError(f"{path} is not a whole safetensors file: get it again")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing: get the model's files again") from error
    except ValueError as error:
        raise ExportError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ExportError(f"{path} is not a safetensors file: its header holds no JSON object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_entry(entry):
            raise ExportError(f"{path} is not a safetensors file: its header does not say where and what {name!r} is")
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ExportError(f"{path} is truncated: it has {size} bytes, its header says {end}; get it again")
    return dict(header)


def code_of(dtype: torch.dtype) -> str:
    """The code of a type in a safetensors file."""
    return next(code for code, (name, _) in CODES.items() if name == str(dtype).removeprefix("torch."))


def _is_entry(entry: Any) -> bool:
    """Whether a header says of a tensor its type, its shape and its place in the file."""

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)

    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not sizes(entry.get("shape")):
        return False
    place: Any = entry.get("data_offsets")
    return sizes(place) and len(place) == 2 and place[0] <= place[1]


class Checkpoint:
    """The tensors of a folder, by name; nothing is read before it is asked for.

    Args:
        folder: a folder with one safetensors file or an index of several.
        stem: how the files are called: ``model``, or ``adapter_model``.

    Raises:
        ExportError: there are no safetensors weights (pickle weights are named and refused), an index names a file
            outside the folder or a tensor that its file has not, or a file is missing or truncated.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}
        self._files: dict[str, Path] = {}
        self._keys: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        files, where = self._find(folder, stem)
        for path in files:
            for name, entry in read_header(path).items():
                self.entries[name] = entry
                self._files[name] = path
        for name, shard in where.items():
            if name not in self.entries:
                raise ExportError(f"{folder / shard} lacks {name}, which the index says it has: get it again")

    @staticmethod
    def _find(folder: Path, stem: str) -> tuple[list[Path], dict[str, str]]:
        """The files, and where an index says each tensor is."""
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            return [single], {}
        if index.is_file():
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict) or not where:
                raise ExportError(f"{index} has no weight_map, which says where each tensor is: get it again")
            for shard in where.values():
                if not isinstance(shard, str) or not SHARD.fullmatch(shard):
                    raise ExportError(f"{index} names {shard!r}, which is no plain file name of safetensors: refused")
            return [folder / shard for shard in sorted(set(where.values()))], where
        pickles = sorted(path.name for ending in ("bin", "pt", "pth") for path in folder.glob(f"*.{ending}"))
        if pickles:
            raise ExportError(
                f"{folder} has its weights as pickle ({pickles[0]}), which can run code: convert them to safetensors"
            )
        raise ExportError(f"{folder} has no {single.name}: it holds no weights")

    def rename(self, names: Mapping[str, str]) -> Checkpoint:
        """Let the tensors go by other names, given by those of now; returns itself."""
        self._keys = {names[name]: self._keys.get(name, name) for name in self.entries}
        self._files = {names[name]: path for name, path in self._files.items()}
        self.entries = {names[name]: entry for name, entry in self.entries.items()}
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        import torch

        code = self.entries[name]["dtype"]
        if code not in CODES:
            raise ExportError(f"{self._files[name]}: tensor {name} has the type {code}, which is not known here")
        dtype = getattr(torch, CODES[code].name)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is stored."""
        tensor: torch.Tensor = self._file(name).get_tensor(self.key(name))
        return tensor

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in blocks of whole rows along the first dimension, of about ``BLOCK`` numbers each."""
        import math

        shape = self.shape(name)
        if math.prod(shape) <= BLOCK or not shape:
            yield self.tensor(name)
            return
        rows = max(1, BLOCK // math.prod(shape[1:]))
        part = self._file(name).get_slice(self.key(name))
        for start in range(0, shape[0], rows):
            yield part[start : start + rows]

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._files.values()))

    def key(self, name: str) -> str:
        """What the file calls a tensor."""
        return self._keys.get(name, name)

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def parameters(self) -> int:
        """The number of values in all tensors."""
        import math

        return sum(math.prod(entry["shape"]) for entry in self.entries.values())

    def widest_float(self) -> torch.dtype:
        """The floating-point type that holds every floating-point tensor exactly; float32 where types are mixed."""
        import torch

        found = {self.dtype(name) for name in self}
        floats = {dtype for dtype in found if dtype.is_floating_point}
        if not floats:
            raise ExportError(f"{self.folder} has no floating-point tensors")
        return floats.pop() if len(floats) == 1 else torch.float32
