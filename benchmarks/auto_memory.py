"""`memory: auto` beside every fixed choice of what layers keep: python benchmarks/auto_memory.py --work DIR [...]

On one GPU and in one process: the model of benchmarks/fast_path.py (Llama 3.1 8B in shape, random weights, made once in
DIR), nf4 and bf16, LoRA of rank 16, one row of random tokens, a bare loop with the 8-bit AdamW. At each length every
fixed policy (keep, inputs, recompute, offload, offload-input) and auto are timed: five steps are warm, so that a step
that may be recorded is, two or three above 16384 tokens; then the median of as many as fit into --seconds, at least
one. Sequence tiles are the planner's for the policy, as in `ft train`. A policy whose predicted peak is far beyond the
memory is left out. Rows (tokens a second, peak, choices of the layers) go to benchmarks/results/auto_memory.jsonl, and
at the end the ratio of auto to the best fixed policy is printed for each length, the worst last. The bar: auto is
never more than 3 % slower.

--memory GIB,… does the same under a bound: auto plans with it, and a fixed policy counts only if its measured peak is
within it. `0` is no bound.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import fast_path

RESULTS = cases.FOLDER / "auto_memory.jsonl"
FIXED = ("keep", "inputs", "recompute", "offload", "offload-input")
LENGTHS = "512,1024,2048,4096,8192,16384,32768,65536"
LONG = 16384
HOPELESS = 1.1
"""A policy is left out where this many times the memory is predicted for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model is made, and kept")
    parser.add_argument("--lengths", default=LENGTHS, help="tokens of a row, comma-separated")
    parser.add_argument("--policies", default=",".join((*FIXED, "auto")))
    parser.add_argument("--quantization", default="nf4,none")
    parser.add_argument("--memory", default="0", help="GiB that may be planned with, comma-separated; 0: all")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed steps for each policy, about")
    parser.add_argument("--budget", type=float, help="seconds that all may take")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    # cpu: a tiny model, bounds in MiB, to test this program
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    limit = cases.Limit.of(args.budget)
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.folder = args.work / f"llama-{'8b' if args.device == 'cuda' else 'tiny'}-{args.layers}"
    args.unit = cases.GIB if args.device == "cuda" else 2**20
    if not (args.folder / "config.json").is_file():
        shape = ["--layers", str(args.layers), "--device", args.device]
        subprocess.run([sys.executable, fast_path.__file__, "--work", str(args.work), *shape, "--make"], check=True)
    rows = cases.Rows(args.results, args.device, line, layers=args.layers)
    measured: list[dict[str, Any]] = []
    for quantization in args.quantization.split(","):
        measured += measure(quantization, rows, args, limit)
        cases.tidy()
    print("\n".join(summary(measured)))


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    bound = f"{row['memory_gib']:g} GiB" if row["memory_gib"] else "no bound"
    head = f"{row['quantization']:4} 1x{row['tokens']:<6} {bound:9} {row['policy']:13}"
    if "error" in row:
        return f"{head} {row['error']}"
    chosen = ", ".join(f"{count} {choice}" for choice, count in row["layers_keep"].items())
    return (
        f"{head} {row['tokens_per_second']:8} tok/s  {row['peak_gib']:7.2f} GiB (predicted {row['predicted_gib']:.2f}) "
        f"{row['step_s'] * 1e3:.0f} ms (predicted {row['predicted_s'] * 1e3:.0f})  {chosen}"
        f"{', recorded' if row['recorded'] else ''}"
    )


def measure(quantization: str, rows: cases.Rows, args: argparse.Namespace, limit: cases.Limit) -> list[dict[str, Any]]:
    """All bounds, lengths and policies of one model; its memory is given back with the return."""
    model, path, optimizer = cases.ft_model(args.folder, quantization, 16)
    found = []
    for bound in map(float, args.memory.split(",")):
        memory = int(bound * args.unit) or None
        for tokens in map(int, args.lengths.split(",")):
            for policy in args.policies.split(","):
                config = cases.configuration(args.folder, tokens, quantization=quantization)
                planned = cases.plan(config, policy, limit=memory)
                row = {"policy": policy, "quantization": quantization, "memory_gib": bound, "tokens": tokens}
                row |= {"predicted_gib": round(planned.peak.total / cases.GIB, 3), "tile": planned.peak.tile}
                row |= {"predicted_s": round(planned.times.step, 4)}
                if policy != "auto" and planned.peak.total > HOPELESS * planned.limit:
                    print(f"# {policy} 1x{tokens}: left out, {row['predicted_gib']:.1f} GiB are predicted", flush=True)
                    continue
                warm = 5 if tokens <= LONG else 3 if policy == "auto" else 2
                seconds = planned.times.step * warm + max(args.seconds, planned.times.step) + 1
                if not path.host.pools:
                    seconds += planned.peak.host / cases.PINNING
                if not limit.allows(f"{quantization} {policy} 1x{tokens}", seconds):
                    continue
                path.choose(policy, memory=memory)
                path.tile = planned.peak.tile
                row |= cases.attempt(
                    lambda tokens=tokens, warm=warm, least=planned.times.step: cases.steps(
                        model, optimizer, 1, tokens, args.device, warm=warm, timed=max(3, int(args.seconds / least)),
                        seconds=args.seconds,
                    )
                )  # fmt: skip
                if "error" not in row:
                    row |= fast_path.chosen(model)
                rows.add(row)
                found.append(row)
                cases.forget(path, host=False)
            cases.forget(path)
    return found


def summary(measured: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each length: how much slower auto is than the best fixed policy; the worst of all at the end."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in measured:
        if "error" not in row and within(row):
            key = row["quantization"], row["memory_gib"], row["tokens"]
            found.setdefault(key, {})[row["policy"]] = row
    lines, ratios = [], []
    for (quantization, bound, tokens), policies in found.items():
        others = [row for policy, row in policies.items() if policy != "auto"]
        if "auto" not in policies or not others:
            continue
        best = min(others, key=lambda row: row["step_s"])
        ratio = policies["auto"]["step_s"] / best["step_s"]
        ratios.append(ratio)
        where = f", {bound:g} GiB" if bound else ""
        lines.append(
            f"{quantization} 1x{tokens}{where}: auto takes {ratio:.3f} of the time of {best['policy']}, in "
            f"{policies['auto']['peak_gib']:.2f} GiB where that has {best['peak_gib']:.2f}"
        )
    if ratios:
        lines.append(f"the worst: {max(ratios):.3f} (the bar: 1.03)")
    return lines


def within(row: dict[str, Any]) -> bool:
    """Whether a row's measured peak is within its bound."""
    return not row["memory_gib"] or row["peak_gib"] <= row["memory_gib"]


if __name__ == "__main__":
    main()
