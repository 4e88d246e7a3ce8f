"""What a step takes the host, which launches it: python benchmarks/host_time.py --work DIR

Small random models, whose kernels are over before the next is launched, take a few steps by `ft train`'s own parts,
once with few layers and once with many. From both times follows what a layer takes, and what the trainer takes beside
all layers. A bound on the memory, larger than what is needed, keeps steps from being recorded. With wider layers the
GPU gets as much to do as the host, which shows what a step takes where neither waits for the other all the time.

Rows are added to benchmarks/results/host_time.jsonl. `ft plan` takes its constants from them
(ft_core/planning/speed.py).
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import cases
import fast_path
import planner_check
from planner_check import Drawn

RESULTS = cases.FOLDER / "host_time.jsonl"
DEPTHS = (4, 20)
NARROW = (256, 512, 4, 2, 64, 4096)
WIDE = (2304, 9216, 18, 6, 128, 32000)
ROWS, LENGTH = 1, 2048  # so that a layer's tensors are worth a copy to the host
WAYS = [
    ("none", "keep"), ("nf4", "keep"), ("int8", "keep"), ("none", "recompute"), ("nf4", "recompute"),
    ("none", "offload"), ("nf4", "offload"), ("int8", "offload"),
]  # fmt: skip
BALANCED = [(tokens, 8) for tokens in (512, 1024, 2048, 4096)]
"""Tokens and layers of the wide model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where models are made")
    parser.add_argument("--steps", type=int, default=15, help="timed steps, after those that warm up")
    parser.add_argument("--only", help="weights/activations, comma-separated, and balanced for the wide model")
    parser.add_argument("--budget", type=float, help="seconds that all may take")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: to test this program
    args = parser.parse_args()
    limit = cases.Limit.of(args.budget)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = cases.Rows(args.results, args.device, line)
    wanted = args.only.split(",") if args.only else [*map("/".join, WAYS), "balanced"]
    todo = [
        (drawn(NARROW, depth, LENGTH, kind), choice)
        for kind, choice in WAYS
        for depth in DEPTHS
        if f"{kind}/{choice}" in wanted
    ]
    if "balanced" in wanted:
        todo += [(drawn(WIDE, layers, tokens, "none"), "keep") for tokens, layers in BALANCED]
    for one, choice in todo if args.device == "cuda" else todo[:2]:
        if limit.allows(f"{one.quantization} {choice} {one.layers} layers {one.length} tokens", 8):
            rows.add({"activations": choice, **cases.attempt(functools.partial(measure, one, choice, args))})
            cases.tidy()
    for sentence in summary([row for row in cases.read(args.results) if row["date"] == rows.facts["date"]]):
        print(sentence)


def drawn(shape: tuple[int, ...], layers: int, length: int, quantization: str) -> Drawn:
    """A configuration as planner_check has it; the bound on its memory is given apart."""
    return Drawn("llama", shape, layers, ROWS, length, 16, quantization, False, None)


def measure(one: Drawn, choice: str, args: argparse.Namespace) -> dict[str, Any]:
    """Make the model and train it."""
    folder = args.work / "host-time"
    try:
        fast_path.make_from(planner_check.transformers_config(one), folder, args.device)
        steps = planner_check.WARM + args.steps
        planner_check.write_rows(folder, one, one.rows * (steps + 1))
        config = planner_check.configuration(one, folder, 32 * cases.GIB, steps, choice)
        found = planner_check.train(config, args.device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    planned = found.pop("planned")
    parts = {} if planned.times is None else planned.times.parts
    return {
        "hidden": one.shape[0], "layers": one.layers, "tokens": one.rows * one.length,
        "quantization": one.quantization, "recorded": found.get("recorded", False),
        "step_s": found["step_s"], "gpu_s": sum(s for name, s in parts.items() if name != "the host's launches"),
        "predicted_s": None if planned.times is None else planned.times.step,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    if "error" in row:
        return str(row["error"])
    head = f"{row['hidden']} x {row['layers']} {row['quantization']} {row['activations']} {row['tokens']} tokens"
    return f"{head}: {row['step_s'] * 1e3:.1f} ms, the GPU's part by its rates {row['gpu_s'] * 1e3:.1f} ms"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """What a layer takes, and all beside."""
    lines = []
    for kind, choice in WAYS:
        times = {
            row["layers"]: row["step_s"]
            for row in rows
            if row.get("hidden") == NARROW[0] and (row["quantization"], row["activations"]) == (kind, choice)
        }
        if set(DEPTHS) <= set(times):
            few, many = DEPTHS
            each = (times[many] - times[few]) / (many - few)
            lines.append(
                f"{kind} {choice}: {each * 1e3:.2f} ms a layer, {(times[few] - few * each) * 1e3:.1f} ms beside"
            )
    return lines


if __name__ == "__main__":
    main()
