"""From nothing to the end of the first training step, on one GPU: python benchmarks/loading.py --work DIR [...]

A model of the shape of Llama 3.1 8B with random weights is made once in DIR (16 GB). Each contestant runs in a process
of its own, twice and in turns (A B A B), so that the second time finds in the page cache and in triton's cache what the
first left there; --forget gives every run a triton cache of its own, as on a new machine, and --cold a model that has
to come from the disk. Timed are the imports, the
loading, the first step of 2 x 2048 tokens (forward, backward and optimizer) with LoRA of rank 16 on all linear layers,
and all of it together; with them go torch's count of the most memory allocated while loading, and the process's most
resident memory. A row for each is added to benchmarks/results/loading.jsonl, and a table is printed.

Contestants: transformers (from_pretrained, PEFT, checkpointing), ft.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

RESULTS = Path(__file__).with_name("results") / "loading.jsonl"
CONTESTANTS = ("transformers", "ft")
ROWS, TOKENS = 2, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model is made, and kept")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--quantization", default="nf4,none")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--forget", action="store_true", help="a new triton cache for each run")
    parser.add_argument("--cold", action="store_true", help="the model's files out of the page cache before each run")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a tiny model, to test this program
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, metavar=("CONTESTANT", "QUANTIZATION", "BEGAN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = args.work / f"llama-{'8b' if args.device == 'cuda' else 'tiny'}-{args.layers}"
    if args.one:
        contestant, quantization, began = args.one
        run(contestant, quantization, float(began), args)
        return
    if not (args.folder / "config.json").is_file():
        make = [sys.executable, str(Path(__file__).with_name("fast_path.py")), "--work", str(args.work), "--make"]
        subprocess.run([*make, "--layers", str(args.layers), "--device", args.device], check=True)
    args.results.parent.mkdir(exist_ok=True)
    facts = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "layers": args.layers}
    print(f"{'':20}{'imports':>9}{'load':>8}{'step':>8}{'second':>8}{'all':>8} s{'GPU':>9}{'host':>8} GiB")
    for quantization in args.quantization.split(","):
        for number in range(args.rounds):
            for contestant in args.contestants.split(","):
                if args.cold:
                    drop(args.folder)
                row = facts | {"round": number, "forget": args.forget, "cold": args.cold}
                row |= one(args, contestant, quantization)
                with open(args.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(table_line(row), flush=True)


def drop(folder: Path) -> None:
    """Let the system forget the content of a folder's files (Linux)."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one(args: argparse.Namespace, contestant: str, quantization: str) -> dict[str, Any]:
    """A contestant's row, from a process of its own; the time of the whole process is taken here."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({"TRITON_CACHE_DIR": cache} if args.forget else {})}
        command = [sys.executable, __file__, *sys.argv[1:], "--one", contestant, quantization, str(time.time())]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        return {"contestant": contestant, "quantization": quantization, "error": words[-1][:300]}
    row: dict[str, Any] = lines[-1]
    return row


def table_line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['contestant']:13}{row['quantization']:5}{row['round']:<2}"
    if "error" in row:
        return f"{head} {row['error']}"
    return (
        f"{head}{row['imports_s']:9.1f}{row['load_s']:8.1f}{row['first_step_s']:8.1f}{row['second_step_s']:8.2f}"
        f"{row['all_s']:8.1f}  {row['gpu_gib']:9.2f}{row['host_gib']:8.2f}"
    )


def run(contestant: str, quantization: str, began: float, args: argparse.Namespace) -> None:
    """Print the row; ``began`` is when the parent started this process, so that the interpreter's start counts."""
    import resource

    import torch

    if contestant == "ft":
        import ft_core  # noqa: F401 (what it needs beside, it imports while it loads)
    else:
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401
    imported = time.time()
    from fast_path import adamw8bit, load, versions

    cuda = args.device == "cuda"

    def wait() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.time()

    model = load(contestant, quantization, args, TOKENS)
    loaded, gpu = wait(), torch.cuda.max_memory_allocated() if cuda else 0
    ahead = 0
    if contestant == "ft":
        from ft_kernels import dispatch

        ahead = len(dispatch._coming)
    model.train()
    optimizer = adamw8bit(contestant, [p for p in model.parameters() if p.requires_grad])
    times, loss = [loaded], 0.0
    for step in range(2):
        ids = torch.randint(3, 128000 if cuda else 500, (ROWS, TOKENS if cuda else 64),
                            generator=torch.Generator().manual_seed(step)).to(args.device)  # fmt: skip
        mask = {} if contestant == "ft" else {"attention_mask": torch.ones_like(ids)}
        with torch.autocast(args.device, torch.bfloat16):
            out = model(input_ids=ids, labels=ids.clone(), **mask).loss
        out.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = out.item()
        times.append(wait())
    row = {
        "contestant": contestant, "quantization": quantization, "imports_s": round(imported - began, 2),
        "load_s": round(loaded - imported, 2), "first_step_s": round(times[1] - loaded, 2),
        "second_step_s": round(times[2] - times[1], 3), "all_s": round(times[1] - began, 2),
        "gpu_gib": round(gpu / 2**30, 2),
        "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "loss": round(loss, 5), "compiled_ahead": ahead,
        "gpu": torch.cuda.get_device_name() if cuda else "none", "cores": os.cpu_count(), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
