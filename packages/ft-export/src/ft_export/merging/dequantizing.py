"""A base that is quantized, or was while it was trained, written without its quantization, to be merged into."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ft_export.bases import load_model
from ft_export.errors import ExportError
from ft_export.merging.logprobs_check import as_trained
from ft_export.progress import Progress, silent
from ft_export.runs import Rope

__all__ = ["write_dequantized"]


def write_dequantized(
    base: Path,
    to: Path,
    method: str | None,
    as_run: str | None,
    trained: str,
    asked: str,
    labels: int | None,
    rope: Rope | None,
    progress: Progress = silent,
) -> Path:
    """Write the base without its quantization (its own, or that of the run), as a whole; returns where.

    Args:
        method: how the base says that it is quantized, or None. as_run: how the run held it, where that is merged into.
        trained: the format of the weights that the run quantized. asked: ``float16``, or ``bfloat16``.
        labels, rope: as for :func:`ft_export.bases.load_model`.

    Raises:
        ExportError: it is quantized by what is not bitsandbytes, which is missing, or cannot be loaded.
    """
    import torch

    if method is not None and method not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        raise ExportError(f"the base {base} is quantized by {method}: name an unquantized base with ft merge --base")
    if find_spec("bitsandbytes") is None:
        what = "is quantized" if method is not None else "was quantized in the run, with loftq"
        raise ExportError(f"the base {base} {what}: pip install bitsandbytes")
    dtype = torch.float16 if asked == "float16" else torch.bfloat16
    progress(0, 0, "loading the base, to write it without its quantization")
    if as_run is None:
        model = load_model(base, dtype, labels=labels, rope=rope)
    else:  # from weights of the format that the run quantized
        was = getattr(torch, trained, torch.bfloat16)
        held = as_trained(as_run, was)
        model = load_model(base, was, labels=labels, rope=rope, quantization_config=held)
    model = model.dequantize(dtype=dtype).to(dtype)
    # a model that was loaded quantized cannot be saved as what it now is; a plain one of its class can
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(to)
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        if (base / name).is_file():
            (to / name).write_bytes((base / name).read_bytes())
    return to
