"""``ft verify MODEL``: whether the fast layers compute what transformers' own do, measured against float64."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.commands.arguments import count
from ft_core.console import counted

if TYPE_CHECKING:
    from ft_core.fast.verify import Ledger

__all__ = ["add_arguments", "run"]

SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, a Hub name, a .gguf file or package:NAME")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="by default this machine's best")
    parser.add_argument(
        "--parameters", choices=("adapter", "all"), default="adapter", help="whose gradients (default: adapter)"
    )
    parser.add_argument("--layers", type=count, default=4, help="of the model, from the first on (default: 4)")
    parser.add_argument("--batches", type=count, default=5, help="how many batches (default: 5)")
    parser.add_argument("--tokens", type=count, default=256, help="tokens a batch, in three documents (default: 256)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every parameter's errors to FILE")


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 if the fast layers are as exact as transformers' own, 1 if not.

    Raises:
        FtError: the model cannot be loaded, or has no fast layers.
    """
    import torch

    from ft_core import console
    from ft_core.errors import ConfigError, ModelError
    from ft_core.fast import NotFast
    from ft_core.fast.verify import verify
    from ft_core.models import find_model, pick_device
    from ft_core.runs import write_json

    if args.parameters == "all" and args.quantization != "none":
        raise ConfigError("--parameters all: quantized weights have no gradients; leave out --quantization")
    if args.tokens < 12:
        raise ConfigError(f"--tokens {args.tokens}: three documents need at least 12")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ConfigError(f"--json {args.json}: give a file in a folder that is there")
    console.quiet()
    device = pick_device()
    source = find_model(args.model)
    dtype = args.dtype or device.dtype
    try:
        ledger = verify(
            lambda exact: _load(source, device, "none" if exact else args.quantization, dtype, args.layers),
            name=source.name,
            dtype=getattr(torch, dtype),
            quantization=args.quantization,
            parameters=args.parameters,
            batches=args.batches,
            tokens=args.tokens,
            progress=console.say,
        )
    except NotFast as reason:
        raise ModelError(f"{source.name} has no fast layers to verify: {reason}") from reason
    if args.json is not None:
        write_json(args.json, ledger.as_json())
    print(_table(ledger))
    if args.json is not None:
        print(f"every parameter: {args.json}")
    return 1 if ledger.mismatches else 0


def _load(source: Any, device: Any, quantization: str, dtype: str, layers: int) -> Any:
    from ft_core.models.loading import load_layers

    return load_layers(source, device, quantization, dtype, layers)


def _ratio(ledger: Ledger) -> str:
    deviation = "" if ledger.deviation is None else f" ± {ledger.deviation:.2f}"
    return f"{ledger.ratio:5.2f}{deviation} x"


def _table(ledger: Ledger) -> str:
    """The errors in a few lines, the worst parameters first."""
    found = ledger.summary()
    batches = "1 batch" if ledger.batches == 1 else f"{ledger.batches} batches"
    lines = [
        f"{ledger.model} ({ledger.family}), {counted(ledger.layers, 'layer')}, {ledger.dtype}"
        + (f", {ledger.quantization}" if ledger.quantization != "none" else "")
        + f": {len(ledger.lines)} gradients, {batches} of {counted(ledger.tokens, 'token')}, against float64",
        f"{'':44}  fast layers  transformers",
        f"{'loss':44}  {ledger.losses[0]:11.2e}  {ledger.losses[1]:12.2e}",
        f"{'gradients, median':44}  {found['median_fast']:11.2e}  {found['median_plain']:12.2e}  {_ratio(ledger)}",
    ]
    worst = sorted(ledger.lines, key=lambda n: n.fast / max(n.plain, ledger.floor), reverse=True)
    for line in worst[:SHOWN]:
        name = line.name if len(line.name) <= 44 else "…" + line.name[-43:]
        lines.append(f"{name:44}  {line.fast:11.2e}  {line.plain:12.2e}  {line.ratio:5.2f} x")
    wrong = ledger.mismatches
    if wrong:
        lines.append(
            f"MISMATCH: {len(wrong)} gradients are over twice as far off as transformers'; {wrong[0].name} most"
        )
    else:
        lines.append(f"the same: no gradient is over {found['largest_ratio']:.2f} times as far off as transformers'")
    return "\n".join(lines)
