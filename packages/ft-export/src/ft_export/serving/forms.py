"""The forms in which a whole model is written for a server: 16-bit, and compressed-tensors' int8 and float8.

The two compressed forms are those of the compressed-tensors library (version 0.20, ``CompressionFormat``
``int-quantized`` and ``float-quantized``), which vLLM reads: for a linear layer of shape (out, in), ``weight`` holds
int8 or float8_e4m3fn values of the same shape and ``weight_scale`` one scale for each output row, shape (out, 1); the
weight stood for is their product. Activations are rounded by the server while it runs, with a scale for each token, so
nothing has to be calibrated. Embeddings, the language-model head, norms and biases stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError

if TYPE_CHECKING:
    import torch

__all__ = ["COMPRESSED", "FORMS", "Form", "form_of"]

BLOCK = 1 << 24
"""How many values are computed at a time in fp32 (64 MiB)."""


@dataclass(frozen=True)
class Form:
    """How the weights of a whole model are written.

    Attributes:
        name: what ``--type`` calls it.
        dtype: the type of uncompressed weights: ``bfloat16``, ``float16``, or None for the model's own.
        codes: the type of compressed weights: ``int8``, ``float8_e4m3fn``, or None.
        largest: the largest number that a code is.
    """

    name: str
    dtype: str | None = None
    codes: str | None = None
    largest: float = 0.0

    def code_dtype(self) -> torch.dtype:
        import torch

        assert self.codes is not None
        dtype = getattr(torch, self.codes)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def scale_dtype(self, model: torch.dtype) -> torch.dtype:
        """Scales are bfloat16 in a bfloat16 model; float16 has too small a range for the scale of small weights."""
        import torch

        return torch.bfloat16 if model == torch.bfloat16 else torch.float32

    def compress(self, weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes and scales of one weight.

        The scale of a row is its largest absolute value over the largest code, rounded to the type that it is stored
        in before anything is divided by it, so that the rounding of scales costs nothing.

        Args:
            weight: ``(out, in)``.

        Returns:
            Codes ``(out, in)`` and scales ``(out, 1)``.
        """
        import torch

        codes = torch.empty(weight.shape, dtype=self.code_dtype())
        scales = torch.empty((weight.shape[0], 1), dtype=scale_dtype)
        step = max(1, BLOCK // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            values = weight[rows].float()
            largest = values.abs().amax(dim=1, keepdim=True)
            scale = (largest / self.largest).to(scale_dtype)
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a row of zeros
            scaled = (values / scale.float()).clamp(-self.largest, self.largest)
            codes[rows] = (scaled.round() if self.codes == "int8" else scaled).to(codes.dtype)
            scales[rows] = scale
        return codes, scales

    def half_step(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Half the distance between neighbouring numbers around each code times its scale, float64, shape of codes.

        No weight may lie farther than this from what was written for it, save by fp32's own rounding.
        """
        import torch

        from ft_export.merging.weights_check import half_ulp

        scale = scales.double()
        if self.codes == "int8":
            return (scale / 2).expand(codes.shape)
        return half_ulp(codes.double().abs(), torch.float8_e4m3fn) * scale

    def configuration(self, ignored: list[str]) -> dict[str, Any]:
        """The ``quantization_config`` that goes into ``config.json``.

        Args:
            ignored: the names of the linear layers that are not compressed.
        """
        number = {"num_bits": 8, "type": "int" if self.codes == "int8" else "float", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": {**number, "strategy": "channel", "dynamic": False},
            "input_activations": {**number, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized" if self.codes == "int8" else "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ignored,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


FORMS = {
    form.name: form
    for form in (
        Form("16bit"),
        Form("bf16", dtype="bfloat16"),
        Form("f16", dtype="float16"),
        Form("fp8", codes="float8_e4m3fn", largest=448.0),
        Form("w8a8", codes="int8", largest=127.0),
    )
}
COMPRESSED = tuple(name for name, form in FORMS.items() if form.codes)


def form_of(name: str, allowed: tuple[str, ...], target: str) -> Form:
    """The form that ``--type`` names.

    Raises:
        ExportError: the target does not know it.
    """
    if name not in allowed or name not in FORMS:
        raise ExportError(f"--type {name!r} is not known for {target} (allowed: {', '.join(allowed)})")
    return FORMS[name]
