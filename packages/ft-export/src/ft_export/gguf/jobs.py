"""Tensors on their way into a GGUF file, and the file: its head first, then one tensor after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.gguf.growing import Growing
from ft_export.gguf.kernels import quantize
from ft_export.gguf.mixes import WHOLE
from ft_export.gguf.rules import Output, same
from ft_export.gguf.streaming import Stream, is_finite, rows_of
from ft_export.progress import Progress, counting, silent

if TYPE_CHECKING:
    import torch

__all__ = ["Job", "Made", "write_file"]


class Made:
    """A tensor that the source does not have, in fp32."""

    def __init__(self, name: str, value: torch.Tensor) -> None:
        import gguf

        self.name, self._value, self.shape = name, value, tuple(value.shape)
        self.type, self.bytes = gguf.GGMLQuantizationType.F32, value.nbytes

    def announce(self, writer: Any) -> None:
        """Say what will be written."""
        writer.add_tensor_info(self.name, self.shape, self._value.numpy().dtype, self._value.nbytes)

    def stream(self) -> Stream:
        """What is written."""
        return Stream([self._value.numpy()], self._value.nbytes)


class Job:
    """One tensor on its way into the file; its shape is known before it is loaded.

    Args:
        output: where it comes from and how. name: in the file. weights: what its sources are read from.
        config: transformers' configuration, for the operation.
        kind: from the name and the shape to ggml's name of the type in the file.
    """

    def __init__(
        self, output: Output, name: str, weights: Checkpoint, config: Any, kind: Callable[[str, tuple[int, ...]], str]
    ) -> None:
        import gguf
        import torch

        self.output, self.name, self.weights, self.config = output, name, weights, config
        meta = [torch.empty(weights.shape(source), device="meta") for source in output.sources]
        self.shape = tuple(output.make(meta, config).shape)
        self.type = gguf.GGMLQuantizationType[kind(name, self.shape)]
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        self.bytes = _product(self.shape) // block * size

    def announce(self, writer: Any) -> None:
        import gguf
        import numpy as np

        kinds = gguf.GGMLQuantizationType
        if self.type in (kinds.F16, kinds.F32):
            dtype = np.dtype(np.float16 if self.type == kinds.F16 else np.float32)
            writer.add_tensor_info(self.name, self.shape, dtype, self.bytes)
        else:
            shape = gguf.quant_shape_to_byte_shape(self.shape, self.type)
            writer.add_tensor_info(self.name, shape, np.dtype(np.uint8), self.bytes, raw_dtype=self.type)

    def stream(self) -> Stream:
        """What is written."""
        return Stream(map(self._written, self._blocks()), self.bytes)

    def _blocks(self) -> Iterator[torch.Tensor]:
        if self.output.make is same:
            yield from self.weights.blocks(self.output.sources[0])
            return
        tensors = [self.weights.tensor(source) for source in self.output.sources]
        yield from rows_of(self.output.make(tensors, self.config))

    def _written(self, block: torch.Tensor) -> Any:
        import gguf

        kinds = gguf.GGMLQuantizationType
        if self.type == kinds.F16:
            half = block.half()
            if not is_finite(half):
                self._require_finite(block)
                raise ExportError(
                    f"tensor {self.output.name} has values beyond F16's 65504: it cannot be written as f16"
                )
            return half.contiguous().numpy()
        self._require_finite(block)
        value = block.float().contiguous().numpy()
        if self.type == kinds.F32:
            return value
        return gguf.quants.quantize(value, self.type) if self.type.name in WHOLE else quantize(value, self.type.name)

    def _require_finite(self, block: torch.Tensor) -> None:
        if not is_finite(block):
            raise ExportError(f"tensor {self.output.name} holds values that are not finite: the model is broken")


def write_file(
    target: Path, architecture: str, writes: Sequence[Job | Made], keys: Callable[[Any], None],
    journal: Path | None = None, progress: Progress = silent,
) -> tuple[dict[str, dict[str, Any]], int]:  # fmt: skip
    """Write a GGUF file in place, its tensors in this order.

    Args:
        architecture: llama.cpp's name of it.
        keys: writes the keys, given a ``gguf.GGUFWriter``.
        journal: as for :func:`ft_export.gguf.convert`.

    Returns:
        By name what was written (type, shape, SHA-256), and how many tensors an interrupted process had left.

    Raises:
        ExportError: a value that is not finite or out of its type's range.
    """
    import gguf

    # apart from the tensors, since the writer would begin the file anew
    beginning = target.with_name(f".{target.name}.beginning")
    writer = gguf.GGUFWriter(beginning, architecture)
    try:
        keys(writer)
        for job in writes:
            job.announce(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = beginning.read_bytes()
    finally:
        writer.close()
        beginning.unlink(missing_ok=True)
    written: dict[str, dict[str, Any]] = {}
    if journal is not None and journal.is_file():
        progress(0, 0, "reading what an interrupted conversion has left")
    count = counting(progress, len(writes), "tensors written")
    with Growing(target, head, {job.name: job.bytes for job in writes}, writer.data_alignment, journal) as file:
        for job in writes:
            digest = file.whole.get(job.name) or file.add(job.name, job.stream())
            written[job.name] = {"type": job.type.name, "shape": list(job.shape), "sha256": digest}
            count()
    return written, len(file.whole)


def _product(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)
