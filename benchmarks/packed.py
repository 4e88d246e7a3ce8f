"""Training steps on documents of many lengths, packed or padded: python benchmarks/packed.py --work DIR [...]

On one GPU: the model of benchmarks/fast_path.py (Llama 3.1 8B in shape, random weights, made once in DIR), nf4, LoRA of
rank 16 on all linear layers, bitsandbytes' 8-bit AdamW, a bare loop under autocast to bfloat16. A batch is sixteen
documents of random tokens whose lengths are log-normal, a median of 350 tokens and a sigma of 0.8, cut to 50 and 2000
(with --shape orpheus-3b, Llama 3.2 3B with a codec's tokens, those of speech: 520, 0.5, 120 and 1350); drawn by a seed,
another batch at each step, the same for every contestant. Every token is trained but each document's first, which
nothing predicts. The rate is that of real tokens, padding not counted: the median of ten steps after five.

Two of the steps before are chosen for all alike, so that no timed step meets anything for the first time: the largest
batch comes first, for the allocator, and the second is cut to a multiple of sixteen tokens, for which Triton compiles
kernels of their own.

Contestants:
- ft: the documents in one row without padding, as ft's collator makes it (positions restart, lengths are stated).
  ft-small: the same under --memory GiB, a bound.
- unsloth: its defaults in a bare loop, documents padded to the longest, with an attention mask.
- unsloth-packed: the same model given one row without padding, with positions that restart and the documents' lengths
  as `packed_seq_lengths`, int32 [documents]: what its trainer hands to its models, according to its documentation
  (https://unsloth.ai/docs/blog/3x-faster-training-packing) and the descriptions of pull requests 3525 and 3672.
- transformers: padded, with PEFT and checkpointing. liger: the same on Liger's kernels.

One that isn't installed, or fails, is a row with its error. The first step's loss is in each row: adapters start as
zero, so all compute the same number, but for rounding, if they keep documents apart. With --together all load at the
same time and then take turns. Rows are added to benchmarks/results/packed.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fast_path
from turns import Player, my_turn, play

RESULTS = Path(__file__).with_name("results") / "packed.jsonl"
CONTESTANTS = ("ft", "unsloth", "unsloth-packed", "transformers")
OTHERS = ("liger", "ft-small")
DOCUMENTS = 16
LENGTHS = {"llama-8b": (350, 0.8, 50, 2000), "orpheus-3b": (520, 0.5, 120, 1350)}
"""Median and sigma of the documents' lengths, the shortest and the longest. Speech: 7 tokens a frame, 12 frames a
second, so that the median is six seconds and the longest sixteen, with some tokens of text."""
LAYERS = {"llama-8b": 32, "orpheus-3b": 28}
PAD = 2

Batch = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model is made, and kept")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help=f"also: {', '.join(OTHERS)}")
    parser.add_argument("--quantization", default="nf4", help="nf4, none, or both, comma-separated")
    parser.add_argument("--shape", choices=fast_path.SHAPES, default=fast_path.SHAPES[0], help="of the model")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--memory", type=float, default=None, help="GiB that ft-small may use")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warm", type=int, default=5, help="steps before them")
    parser.add_argument("--seed", type=int, default=0, help="draws lengths and tokens")
    parser.add_argument("--together", action="store_true", help="load all at the same time, then take turns")
    parser.add_argument("--turn", type=float, default=120.0, help="seconds after which a contestant's turn is ended")
    parser.add_argument("--unsloth-path", help="put before PYTHONPATH for unsloth alone, which wants an older trl")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a tiny model, to test this program
    parser.add_argument("--divide", type=int, default=1, help=argparse.SUPPRESS)  # all lengths, for the same purpose
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "QUANTIZATION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := sorted(set(args.contestants.split(",")) - {*CONTESTANTS, *OTHERS}):
        parser.error(f"unknown contestants: {', '.join(unknown)}; there are {', '.join((*CONTESTANTS, *OTHERS))}")
    args.layers = args.layers or LAYERS[args.shape]
    args.folder = fast_path.folder_of(args)
    if args.one:
        run(*args.one, args)
        return
    if not (args.folder / "config.json").is_file():
        shape = ["--layers", str(args.layers), "--device", args.device, "--shape", args.shape]
        subprocess.run([sys.executable, fast_path.__file__, "--work", str(args.work), *shape, "--make"], check=True)
    compete(args)


def compete(args: argparse.Namespace) -> None:
    """Let the contestants run, and write down what they print."""
    facts = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "layers": args.layers}
    facts |= {"seed": args.seed, "shape": args.shape} | ({"together": True} if args.together else {})
    pairs = list(itertools.product(args.quantization.split(","), args.contestants.split(",")))
    rows: list[dict[str, Any]] = []
    args.results.parent.mkdir(exist_ok=True)

    def start(quantization: str, contestant: str) -> Player:
        environment = dict(os.environ)
        if contestant.startswith("unsloth") and args.unsloth_path:
            paths = [args.unsloth_path, environment.get("PYTHONPATH")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        return Player([sys.executable, __file__, *sys.argv[1:], "--one", contestant, quantization], environment)

    def done(number: int, player: Player) -> None:
        quantization, contestant = pairs[number]
        row: dict[str, Any] = {"contestant": contestant, "quantization": quantization}
        for line in player.lines:
            if line.startswith("{"):
                row |= json.loads(line)
        if player.error is not None:
            row["error"] = player.error
        rows.append(row)
        print(table_line(row), flush=True)
        with open(args.results, "a", encoding="utf-8") as file:
            file.write(json.dumps({**facts, **row}) + "\n")

    play([functools.partial(start, *pair) for pair in pairs], done, together=args.together, turn=args.turn)
    print()
    for row in rows:
        print(table_line(row))


def table_line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['contestant']:14} {row['quantization']:4}"
    if "error" in row:
        return f"{head} {row['error']}"
    return (
        f"{head} {row['tokens_per_second']:8.0f} tok/s ({row['overall']:.0f} over all timed steps, {row['filled']:.0%} "
        f"of the positions filled)  {row['peak_gib']:6.2f} GiB ({row['reserved_gib']:.2f} reserved)  "
        f"first loss {row['first_loss']:.5f}"
    )


def batches(count: int, seed: int, vocabulary: int, divide: int = 1, shape: str = "llama-8b") -> list[Batch]:
    """So many batches of documents, each a list of token ids; see the top for their lengths and their order."""
    draw = random.Random(f"packed:{seed}")
    found = [[_length(draw, divide, shape) for _ in range(DOCUMENTS)] for _ in range(count)]
    largest = max(range(count), key=lambda i: sum(found[i]))
    found.insert(0, found.pop(largest))
    if count > 1:
        longest = max(range(DOCUMENTS), key=found[1].__getitem__)
        found[1][longest] -= sum(found[1]) % 16
    return [[[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths] for lengths in found]


def _length(draw: random.Random, divide: int, shape: str) -> int:
    median, sigma, shortest, longest = LENGTHS[shape]
    length = round(math.exp(draw.gauss(math.log(median), sigma)))
    return min(max(length, shortest), longest) // divide


def given(contestant: str, batch: Sequence[list[int]]) -> dict[str, Any]:
    """A batch as the contestant takes it, on the CPU."""
    import torch

    from ft_core.data import Collator

    features = [{"input_ids": ids, "labels": ids} for ids in batch]
    if contestant.startswith("ft"):
        return Collator(PAD, lengths=True)(features)
    if contestant == "unsloth-packed":
        lengths = torch.tensor([len(ids) for ids in batch], dtype=torch.int32)
        return {**Collator(PAD)(features), "packed_seq_lengths": lengths}
    return Collator(PAD, padding_free=False)(features)


def run(contestant: str, quantization: str, args: argparse.Namespace) -> None:
    """Load, wait for the turn, and print a line of JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if contestant.startswith("unsloth"):
        import unsloth  # noqa: F401 (it wants to be first)
    import torch

    cuda = args.device == "cuda"
    documents = batches(args.warm + args.steps, args.seed, 128000 if cuda else 512, args.divide, args.shape)
    packed = contestant in ("ft", "ft-small", "unsloth-packed")
    longest = max((sum if packed else max)(map(len, batch)) for batch in documents)
    model = fast_path.load(contestant, quantization, args, longest).train()
    if contestant.startswith("ft"):
        from ft_core import fast

        path = fast.enable(model)  # which a GPU does by itself
        if contestant == "ft-small":
            path.choose("auto", memory=None if args.memory is None else int(args.memory * 2**30))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = fast_path.adamw8bit(contestant, trained)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what loading needed for a while is the others'
        torch.cuda.reset_peak_memory_stats()
    my_turn()
    seconds: list[float] = []
    losses: list[float] = []
    positions: list[int] = []
    for batch in documents:
        inputs = {k: v.to(args.device) if hasattr(v, "to") else v for k, v in given(contestant, batch).items()}
        began = _now(cuda)
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(_now(cuda) - began)
        losses.append(loss.item())
        positions.append(inputs["input_ids"].numel())
    timed, tokens = seconds[args.warm :], [sum(map(len, batch)) for batch in documents]
    row = {
        "contestant": contestant, "quantization": quantization, "documents": DOCUMENTS,
        "tokens_per_second": round(statistics.median(n / s for n, s in zip(tokens[args.warm :], timed, strict=True))),
        "overall": round(sum(tokens[args.warm :]) / sum(timed)), "filled": round(sum(tokens) / sum(positions), 3),
        "step_s": round(statistics.median(timed), 4), "first_step_s": round(seconds[0], 2),
        "slowest_step_s": round(max(timed), 4), "steps": [round(s, 3) for s in seconds],
        "first_loss": round(losses[0], 5), "loss": round(losses[-1], 5),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else 0.0,
        "gpu": torch.cuda.get_device_name() if cuda else "none", "versions": fast_path.versions(),
    }  # fmt: skip
    print(json.dumps(row), flush=True)


def _now(cuda: bool) -> float:
    import torch

    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
