"""Time the operations at the shapes of Llama models: ``python -m ft_kernels.bench``.

What other libraries do is timed too, where they are installed (liger_kernel, bitsandbytes). An operation that fails is
a line that says so; the others go on. Exit code 0 when every bar is met, 1 when one is not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import ft_kernels
from ft_kernels.bench import harness, report
from ft_kernels.bench.harness import MODELS, Case, Times

__all__ = ["main"]

GROUPS = ("bandwidth", "quantization", "heads", "lora", "attention")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ft_kernels.bench", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--ops", default="", help="comma-separated operations or groups; all by default: " + ", ".join(GROUPS)
    )
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated, of 1b, 8b, 70b")
    parser.add_argument("--tokens", type=int, default=16384, help="rows of the bandwidth-bound operations")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--quick", action="store_true", help="8b only, fewer repetitions and variants")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes seconds a line")
    return parser


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            check=True, capture_output=True, text=True,
        ).stdout.split()[0]  # fmt: skip
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    names: dict[str, str | None] = {"torch": torch.__version__, "ft-kernels": ft_kernels.__version__}
    names |= {name: _version(name) for name in ("triton", "liger-kernel", "bitsandbytes")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "versions": {name: version for name, version in names.items() if version},
    }


def _cases(options: argparse.Namespace, models: list[str]) -> Iterator[Case | str]:
    """The cases asked for; a group that cannot even list its own is its error, in words."""
    wanted = set(filter(None, options.ops.split(",")))
    for group in GROUPS:
        try:
            module = importlib.import_module(f"ft_kernels.bench.{group}")
            listed: list[Case] = list(module.cases(models, options.tokens))
        except Exception as error:
            yield f"{group}: {_words(error)}"
            continue
        for case in listed:
            if wanted & {group, case.op} or (not wanted and (case.quick or not options.quick)):
                yield case


def _words(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _measure(case: Case, budget: float, compiled: bool) -> tuple[dict[str, Times], dict[str, str]]:
    times: dict[str, Times] = {}
    errors: dict[str, str] = {}
    variants: dict[str, Callable[..., Any]] = dict(case.variants)
    if compiled and case.compiled and "eager" in variants:
        variants["compile"] = torch.compile(variants["eager"], dynamic=False)
    for name, function in variants.items():
        try:
            torch.manual_seed(0)
            times[name] = harness.measure(function, case.make(), "backward" in case.passes, budget)
        except Exception as error:
            errors[name] = _words(error)
        gc.collect()
        torch.cuda.empty_cache()
    return times, errors


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code says whether the bars were met."""
    parser = _parser()
    options = parser.parse_args(arguments)
    models = ["8b"] if options.quick else options.models.split(",")
    unknown = set(models) - set(MODELS)
    if unknown:
        parser.error(
            f"--models {options.models}: {', '.join(sorted(unknown))} unknown; allowed are {', '.join(MODELS)}"
        )
    if not torch.cuda.is_available():
        print("ft_kernels.bench: no CUDA device here, so there is nothing to time", file=sys.stderr)
        return 2
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it names each backend that it did not find
    machine = _machine()
    roof = harness.roofline(torch.device("cuda", torch.cuda.current_device()))
    print(
        f"{machine['gpu']}, driver {machine['driver']}, "
        + ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
    )
    print(
        f"copy {roof['copy']:.2f} TB/s ({roof['copy of 128 MiB']:.2f} for 128 MiB), "
        f"bf16 product of 8192 cubed {roof['product']:.0f} TFLOP/s\n",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    failures: list[str] = []

    def add(row: dict[str, Any]) -> None:
        row["missed"] = report.judge(row, options.tokens)
        rows.append(row)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps({**machine, "roofline": roof, "tokens": options.tokens, **_rounded(row)}) + "\n")
        print(report.table([row]).splitlines()[1], flush=True)

    for case in _cases(options, models):
        if isinstance(case, str):
            failures.append(case)
            continue
        for row in report.rows_of(case, *_measure(case, 0.15 if options.quick else 0.4, not options.no_compile), roof):
            add(row)
    mean = report.mean_row(rows)
    if mean:
        add(mean)
    print(f"\n{report.table(rows)}\n\nA ratio is the other's time divided by ours: above 1, ours is faster.")
    for row in rows:
        for name, words in row.get("errors", {}).items():
            if row["pass"] in ("-", "forward"):
                print(f"error: {row['op']} {row['model']} {row['shape']}, {name}: {words}")
    for words in failures:
        print(f"error: {words}")
    return 1 if failures or any(row["missed"] for row in rows) else 0


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return value


if __name__ == "__main__":
    sys.exit(main())
