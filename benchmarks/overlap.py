"""How much of the copying to and from the host runs beside computing: python benchmarks/overlap.py --work DIR [...]

One step of the model of benchmarks/fast_path.py (Llama 3.1 8B in shape, random weights, made once in DIR), LoRA of rank
16, layers offloading what they keep (--way), is traced by torch's profiler in the midst of others, as a training has
them one after the other; kernels and copies alone are traced. Of every copy between host and device the time is counted
during which a kernel ran on another stream; the share is that of all copies' time together (the bar: 90 %). A row for
each shape goes to benchmarks/results/overlap.jsonl, with the bytes a second of both directions, the time of the step
that no kernel filled, and host_ms: what the host took to launch it all, untraced. Where that is longer than the kernels
take, they wait for the host, and nothing is there for copies to run beside. --trace FILE keeps the trace of the last
one; --read FILE takes a trace that was kept, and needs no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cases
import fast_path

RESULTS = cases.FOLDER / "overlap.jsonl"
Interval = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where the model is made, and kept")
    parser.add_argument("--quantization", default="nf4", help="nf4, none, or both, comma-separated")
    parser.add_argument("--shapes", default="2x2048,1x8192", help="rows x tokens, comma-separated")
    parser.add_argument("--way", default="offload", help="what layers keep: offload or offload-input")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--budget", type=float, help="seconds that all may take")
    parser.add_argument("--trace", type=Path, help="keep the last trace here")
    parser.add_argument("--read", type=Path, help="a trace that was kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a tiny model, to test this program
    args = parser.parse_args()
    if args.read:
        print(line({"way": args.read.name, **measure(events_of(args.read))}))
        return
    if args.work is None:
        parser.error("--work or --read is needed")
    limit = cases.Limit.of(args.budget)
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = args.work / f"llama-{'8b' if args.device == 'cuda' else 'tiny'}-{args.layers}"
    if not (folder / "config.json").is_file():
        shape = ["--layers", str(args.layers), "--device", args.device]
        subprocess.run([sys.executable, fast_path.__file__, "--work", str(args.work), *shape, "--make"], check=True)
    rows = cases.Rows(args.results, args.device, line, layers=args.layers, way=args.way)
    for quantization in args.quantization.split(","):
        trace_all(quantization, folder, rows, args, limit)
        cases.tidy()


def trace_all(quantization: str, folder: Path, rows: cases.Rows, args: argparse.Namespace, limit: cases.Limit) -> None:
    """All shapes of one model, whose memory is given back with the return."""
    model, path, optimizer = cases.ft_model(folder, quantization, 16)
    path.choose(args.way)
    for shape in args.shapes.split(","):
        count, tokens = map(int, shape.split("x"))
        row: dict[str, Any] = {"quantization": quantization, "rows": count, "tokens": tokens}
        if limit.allows(f"{quantization} {shape}", 4 * count * tokens / 10000 + 10):
            one = functools.partial(traced, model, optimizer, count, tokens, args.device, args.trace)
            rows.add(row | cases.attempt(one))
            cases.forget(path)


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    head = f"{row.get('quantization', ''):4} {row.get('rows', '?')}x{row.get('tokens', '?')} {row['way']}"
    if "error" in row:
        return f"{head}  {row['error']}"
    if not row["copies"]:
        return f"{head}  no copies in the trace"
    ways = ", ".join(f"{name} {at['gib']:.2f} GiB at {at['gb_s']:.1f} GB/s" for name, at in row["directions"].items())
    return (
        f"{head}  {row['share']:.1%} of {row['copy_ms']:.1f} ms of {row['copies']} copies beside kernels (bar: 90 %); "
        f"{ways}; {row['span_ms']:.1f} ms from first to last, no kernel ran in {row['idle_ms']:.1f} of them; "
        f"{row.get('host_ms', 0):.1f} ms of the host's"
    )


def traced(model: Any, optimizer: Any, rows: int, tokens: int, device: str, keep: Path | None) -> dict[str, Any]:
    """Warm steps, what the host takes for one, and one that is traced between two others."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    cases.steps(model, optimizer, rows, tokens, device, warm=1, timed=1)
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    ids = torch.randint(3, cases.VOCABULARY[device], (rows, tokens)).to(device)

    def one() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids.clone()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    begun = time.perf_counter()
    one()
    host = time.perf_counter() - begun
    if device == "cuda":
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = keep or Path(folder) / "trace.json"
        with profile(
            activities=[activity], schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda found: found.export_chrome_trace(str(file)),
        ) as found:  # fmt: skip
            for _ in range(3):
                one()
                found.step()
        return measure(events_of(file)) | {"host_ms": round(host * 1e3, 1)}


def events_of(file: Path) -> list[dict[str, Any]]:
    """The events of a trace."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return list(found["traceEvents"] if isinstance(found, dict) else found)


def measure(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The share of host-device copying that runs beside a kernel of another stream, and what else a row says.

    Args:
        events: of a Chrome trace by torch's profiler: times in microseconds, ``cat`` ``kernel`` or ``gpu_memcpy``, the
            stream and bytes among ``args``.
    """
    kernels: dict[Any, list[Interval]] = {}
    copies: list[tuple[Any, Interval, str, int]] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        about, name = event.get("args", {}), str(event.get("name", ""))
        stream = about.get("stream", event.get("tid"))
        interval = float(event["ts"]), float(event["ts"]) + float(event.get("dur", 0))
        if event.get("cat") == "kernel":
            kernels.setdefault(stream, []).append(interval)
        elif event.get("cat") == "gpu_memcpy" and ("HtoD" in name or "DtoH" in name):
            copies.append((stream, interval, "to host" if "DtoH" in name else "to GPU", int(about.get("bytes", 0))))
    total = covered = 0.0
    directions: dict[str, list[float]] = {}
    beside: dict[Any, list[Interval]] = {}
    for stream, interval, direction, size in copies:
        if stream not in beside:
            beside[stream] = union(one for other, all_ in kernels.items() if other != stream for one in all_)
        total += interval[1] - interval[0]
        covered += overlap(interval, beside[stream])
        sums = directions.setdefault(direction, [0.0, 0.0])
        sums[0] += size
        sums[1] += interval[1] - interval[0]
    busy = union(one for found in kernels.values() for one in found)
    ends = [*busy, *(interval for _, interval, _, _ in copies)]
    span = max(b for _, b in ends) - min(a for a, _ in ends) if ends else 0.0
    return {
        "copies": len(copies), "copy_ms": round(total / 1e3, 3), "share": round(covered / total, 4) if total else 0.0,
        "directions": {
            name: {"gib": round(size / cases.GIB, 3), "gb_s": round(size / 1e3 / taken, 2) if taken else 0.0}
            for name, (size, taken) in directions.items()
        },
        "span_ms": round(span / 1e3, 3), "idle_ms": round((span - sum(b - a for a, b in busy)) / 1e3, 3),
    }  # fmt: skip


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same stretches of time without overlaps, in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def overlap(interval: Interval, others: Sequence[Interval]) -> float:
    """How much of an interval is in others, which are in order and apart (:func:`union`)."""
    from bisect import bisect_right

    begin, end = interval
    total = 0.0
    for at in range(max(bisect_right(others, (begin, float("inf"))) - 1, 0), len(others)):
        if others[at][0] >= end:
            break
        total += max(min(end, others[at][1]) - max(begin, others[at][0]), 0.0)
    return total


if __name__ == "__main__":
    main()
