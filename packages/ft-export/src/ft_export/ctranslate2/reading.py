"""CTranslate2's ``model.bin``, read without CTranslate2.

The format (version 6; ``python/ctranslate2/specs/model_spec.py`` and ``src/models/model.cc`` of CTranslate2 4.8, MIT):
a version, the name of the kind of model and its revision; the number of variables, and for each its name, the number of
its sizes and these, its type, its bytes and how many they are; then the number of second names, and for each that and
the first one. Numbers are little-endian and without a sign; a text has its length with the zero that ends it before it.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ft_export.errors import ExportError

if TYPE_CHECKING:
    import torch

__all__ = ["VERSION", "ModelFile", "Variable"]

VERSION = 6
TYPES = (("float32", 4), ("int8", 1), ("int16", 2), ("int32", 4), ("float16", 2), ("bfloat16", 2))
"""By its number, torch's name of a type and the bytes of a value."""


class Variable(NamedTuple):
    """Attributes:
    shape: none for a scalar. dtype: torch's name. place: of its bytes in the file. size: in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    place: int
    size: int


class ModelFile:
    """A file's variables, by name; nothing is read before it is asked for.

    Attributes:
        kind: of the model, such as ``WhisperSpec``. revision: of that.
        variables: by name. aliases: second names, and whose they are.

    Raises:
        ExportError: it is not such a file, of another version, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.variables: dict[str, Variable] = {}
        self.aliases: dict[str, str] = {}
        try:
            with path.open("rb") as file:
                self._read(file)
        except (struct.error, UnicodeDecodeError, IndexError) as error:
            raise ExportError(f"{path} is no whole model.bin of CTranslate2: {error}") from error

    def _read(self, file: BinaryIO) -> None:
        version = _number(file, "<I")
        if version != VERSION:
            raise ExportError(f"{self.path} has version {version} of CTranslate2's format, not {VERSION}")
        self.kind, self.revision = _text(file), _number(file, "<I")
        end = self.path.stat().st_size
        for _ in range(_number(file, "<I")):
            name = _text(file)
            shape = tuple(_number(file, "<I") for _ in range(_number(file, "<B")))
            dtype, width = TYPES[_number(file, "<B")]
            size, place = _number(file, "<I"), file.tell()
            if size != math.prod(shape) * width or place + size > end:
                raise ExportError(f"{self.path}: {name} has {size} bytes, its sizes ask for {math.prod(shape) * width}")
            self.variables[name] = Variable(shape, dtype, place, size)
            file.seek(place + size)
        for _ in range(_number(file, "<I")):
            name, first = _text(file), _text(file)
            self.aliases[name] = first
            if f"{first}_scale" in self.variables:  # which goes along, and is not named
                self.aliases[f"{name}_scale"] = f"{first}_scale"
        if file.read(1):
            raise ExportError(f"{self.path} has more in it than it says")

    def __contains__(self, name: str) -> bool:
        return name in self.variables or name in self.aliases

    def variable(self, name: str) -> Variable:
        """What is said of a variable, under any of its names."""
        return self.variables[self.aliases.get(name, name)]

    def tensor(self, name: str) -> torch.Tensor:
        """The values as they are stored."""
        import torch

        said = self.variable(name)
        with self.path.open("rb") as file:
            file.seek(said.place)
            data = bytearray(file.read(said.size))
        return torch.frombuffer(data, dtype=getattr(torch, said.dtype)).reshape(said.shape)

    def values(self, name: str) -> torch.Tensor:
        """The values that a variable stands for, in fp32: codes of 8 bits are divided by their rows' scales."""
        tensor = self.tensor(name).float()
        scale = f"{name}_scale"
        if scale not in self:
            return tensor
        return tensor / self.tensor(scale).reshape(-1, *(1,) * (tensor.dim() - 1))


def _number(file: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])


def _text(file: BinaryIO) -> str:
    length = _number(file, "<H")
    data = file.read(length)
    if len(data) != length or data[-1:] != b"\0":
        raise struct.error("a name that does not end")
    return data[:-1].decode()
