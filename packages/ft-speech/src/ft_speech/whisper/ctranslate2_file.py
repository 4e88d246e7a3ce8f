"""CTranslate2's ``model.bin``, read without CTranslate2: its weights by name, as NumPy arrays.

The layout, little-endian (CTranslate2 4, MIT, ``ctranslate2/specs/model_spec.py``, binary version 6): the version, the
name of the specification, its revision and the number of variables; of each variable its name, its shape, the number of
its type, the number of its bytes, and these; then the aliases, each a name and the variable it stands for. A name is
preceded by its length and ends with a zero.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ft_core.errors import ModelError

__all__ = ["CTranslate2File", "read_file"]

Array: TypeAlias = npt.NDArray[Any]

VERSIONS = (5, 6)
"""The binary versions that are read; they differ in nothing that is read here."""

BFLOAT16 = 5
TYPES = ("float32", "int8", "int16", "int32", "float16", "uint16")
"""The types by their numbers; what is bfloat16 is read as its bits."""


@dataclass(frozen=True)
class CTranslate2File:
    """What a ``model.bin`` holds.

    Attributes:
        spec: the name of its specification, such as ``WhisperSpec``.
        revision: that specification's revision.
        variables: the arrays by their names; of integers with a ``_scale`` beside them see :meth:`weight`.
        aliases: names that stand for variables.
    """

    spec: str
    revision: int
    variables: Mapping[str, Array]
    aliases: Mapping[str, str]

    def weight(self, name: str) -> Array:
        """A variable in floating point: float16 or float32, float32 where it is quantized.

        8- and 16-bit integers were made by ``round(weight * scale)``, with a scale for each row, or for all.

        Raises:
            KeyError: there is none of this name.
        """
        found = self.variables[self.aliases.get(name, name)]
        if found.dtype.kind != "i":
            return found
        scale = np.asarray(self.variables[f"{self.aliases.get(name, name)}_scale"], np.float32)
        if scale.ndim:
            scale = scale.reshape(-1, *[1] * (found.ndim - 1))
        return found.astype(np.float32) / scale


def read_file(parts: list[Path]) -> CTranslate2File:
    """Read a ``model.bin``, given whole or in parts.

    Raises:
        ModelError: it cannot be read, is none, or is cut short; one line.
    """
    name = str(parts[0]) if len(parts) == 1 else f"{parts[0]} and {len(parts) - 1} more"
    try:
        data = b"".join(part.read_bytes() for part in parts)
    except OSError as error:
        raise ModelError(f"{name}: cannot be read: {error.strerror}") from error
    reader = _Reader(data)
    try:
        (version,) = reader.numbers("I")
        if version not in VERSIONS:
            raise ModelError(
                f"{name}: is no model.bin of CTranslate2 with binary version {' or '.join(map(str, VERSIONS))} "
                f"(it begins with {version})"
            )
        spec = reader.text()
        revision, count = reader.numbers("II")
        variables = dict(reader.variable() for _ in range(count))
        (count,) = reader.numbers("I")
        aliases = {reader.text(): reader.text() for _ in range(count)}
    except (struct.error, UnicodeDecodeError, ValueError, IndexError) as error:
        raise ModelError(f"{name}: is cut short or damaged, after {reader.at} of {len(data)} bytes") from error
    if reader.at != len(data):
        raise ModelError(f"{name}: is damaged: {len(data) - reader.at} bytes follow its end")
    return CTranslate2File(spec, revision, variables, aliases)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def numbers(self, kinds: str) -> tuple[int, ...]:
        found = struct.unpack_from(f"<{kinds}", self.data, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return found

    def text(self) -> str:
        (length,) = self.numbers("H")
        raw = self.data[self.at : self.at + length]
        if len(raw) != length or not raw.endswith(b"\0"):
            raise ValueError("no text")
        self.at += length
        return raw[:-1].decode()

    def variable(self) -> tuple[str, Array]:
        name = self.text()
        (rank,) = self.numbers("B")
        shape = self.numbers("I" * rank)
        kind, size = self.numbers("BI")
        type = np.dtype(TYPES[kind]).newbyteorder("<")
        if size != prod(shape) * type.itemsize:
            raise ValueError("bytes and shape differ")
        found = np.frombuffer(self.data, type, prod(shape), self.at).reshape(shape)
        self.at += size
        if kind == BFLOAT16:
            found = (found.astype(np.uint32) << 16).view(np.float32)
        return name, found
