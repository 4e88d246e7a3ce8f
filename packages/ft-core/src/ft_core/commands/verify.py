"""``ft verify MODEL``: whether the fast layers compute what transformers' own do, measured against float64."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_core.commands.arguments import count
from ft_core.console import counted

if TYPE_CHECKING:
    from ft_core.fast.verify import Ledger
    from ft_core.models import Device, ModelSource
    from ft_core.plugins import ModalitySpec

__all__ = ["add_arguments", "run"]

SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run, a folder, a Hub name, a .gguf file or package:NAME")
    parser.add_argument(
        "--quantization", choices=("none", "nf4", "int8"), help="by default that of the run, or none of a model"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="by default this machine's best")
    parser.add_argument(
        "--parameters", choices=("adapter", "all"), default="adapter", help="whose gradients (default: adapter)"
    )
    parser.add_argument("--layers", type=count, default=4, help="of the model, from the first on (default: 4)")
    parser.add_argument("--batches", type=count, default=5, help="how many batches (default: 5)")
    parser.add_argument(
        "--tokens",
        type=count,
        default=256,
        help="tokens of text a batch, in three documents (default: 256); images add theirs",
    )
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
    from ft_core.models import pick_device
    from ft_core.runs import write_json

    if args.tokens < 12:
        raise ConfigError(f"--tokens {args.tokens}: three documents need at least 12")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ConfigError(f"--json {args.json}: give a file in a folder that is there")
    console.quiet()
    source, quantization = _found(args.model, args.quantization)
    if args.parameters == "all" and quantization != "none":
        raise ConfigError(
            "--parameters all: quantized weights have no gradients; "
            + ("leave out --quantization" if args.quantization else "give --quantization none")
        )
    device = pick_device()
    dtype = args.dtype or device.dtype
    load, inputs = _prepared(source, device, quantization, dtype, args)
    try:
        ledger = verify(
            load,
            name=source.name,
            dtype=getattr(torch, dtype),
            quantization=quantization,
            parameters=args.parameters,
            batches=args.batches,
            tokens=args.tokens,
            inputs=inputs,
            fast=functools.partial(_enabled, _modality(source)),
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


def _found(reference: str, quantization: str | None) -> tuple[ModelSource, str]:
    """The model, of a run the one that it trained in full or its base; and how it is quantized."""
    from ft_core.models import find_model
    from ft_core.models.opening import check_reference
    from ft_core.runs import Run

    check_reference(reference)
    run = Run(reference)
    if not (run.path.is_dir() and run.is_run):
        return find_model(reference), quantization or "none"
    run = Run.open(reference)
    if run.model.is_dir():
        return find_model(str(run.model)), quantization or "none"
    return find_model(run.config.model), quantization or run.config.quantization


def _prepared(
    source: ModelSource, device: Device, quantization: str, dtype: str, args: argparse.Namespace
) -> tuple[Callable[[bool], Any], Sequence[Mapping[str, Any]] | None]:
    """How the model is loaded, and on what it is compared: None is rows of text."""
    from ft_core.models.loading import load_layers
    from ft_core.plugins import resolve

    modality = _modality(source)
    if modality is not None and modality.verify is not None:
        prepare = resolve(modality.verify)
        found: tuple[Callable[[bool], Any], Sequence[Mapping[str, Any]]] | None = prepare(
            source,
            device,
            quantization=quantization,
            dtype=dtype,
            layers=args.layers,
            batches=args.batches,
            tokens=args.tokens,
        )
        if found is not None:
            return found
    return lambda exact: load_layers(source, device, "none" if exact else quantization, dtype, args.layers), None


def _enabled(modality: ModalitySpec | None, model: Any) -> Any:
    """The fast layers put into a model: the modality's own where it has some for it."""
    from ft_core.fast import enable
    from ft_core.plugins import resolve

    own = resolve(modality.fast)(model) if modality is not None and modality.fast is not None else None
    return enable(model) if own is None else own


def _modality(source: ModelSource) -> ModalitySpec | None:
    """The modality that knows the model, if one does."""
    from ft_core.errors import PluginError
    from ft_core.plugins import ModalitySpec, registry, resolve

    known = registry()
    for name in known.names(ModalitySpec.group):
        try:
            spec = known.get(ModalitySpec, name)
            if spec.knows is not None and resolve(spec.knows)(source):
                return spec
        except (PluginError, ImportError):  # what is broken harms no other; `ft plugins` names it
            continue
    return None


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
