"""How much time recorded steps save on packed rows of a small model: python benchmarks/recorded.py [...]

Of SmolLM2-135M in shape (random weights, bf16, LoRA of rank 16): rows of documents whose lengths are log-normal (a
median of 100 tokens, a sigma of 0.8), filled up to at most --tokens, another row at each step and the same for both
ways; AdamW of torch, fused; a bare loop. Computed kernel by kernel, and by recordings of rows filled up to lengths that
come again. Each way runs --steps steps after as many to compile and to record; a step's time is that of all by their
number. Rows are added to benchmarks/results/recorded.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ft_core import fast
from ft_core.adapters import add_lora

RESULTS = Path(__file__).with_name("results") / "recorded.jsonl"
MEDIAN, SIGMA, SHORTEST = 100, 0.8, 8
SHAPE: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1024,2048,4096,8192", help="of a row at most, comma-separated")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    print(f"{'tokens':>7} {'recorded':>8} {'ms/step':>8} {'tokens/s':>9} {'GiB':>6} {'loss':>7}  replayed, recordings")
    for most in map(int, args.tokens.split(",")):
        for on in (False, True):
            torch.cuda.empty_cache()
            row = measure(most, on, args)
            print(
                f"{most:7} {on!s:>8} {row['ms']:8.2f} {row['tokens_per_s']:9.0f} {row['gib']:6.2f} {row['loss']:7.4f}  "
                f"{row['replayed']} of {args.steps}, {row['recordings']}; {row['reason'] or 'nothing refused'}",
                flush=True,
            )
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def rows(most: int, count: int, seed: int) -> list[list[int]]:
    """Lengths of documents, row by row: as many as fit."""
    draw = random.Random(seed)
    found: list[list[int]] = []
    waiting: list[int] = []
    while len(found) < count:
        length = min(most, max(SHORTEST, round(draw.lognormvariate(0.0, SIGMA) * MEDIAN)))
        if sum(waiting) + length > most:
            found.append(waiting)
            waiting = []
        waiting.append(length)
    return found


def measure(most: int, on: bool, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    model = add_lora(LlamaForCausalLM(LlamaConfig(**SHAPE)).to("cuda", torch.bfloat16), r=16).train()
    path = fast.enable(model)
    path.graphs.on = path.graphs.documents = on
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batches, replayed = rows(most, 2 * args.steps, args.seed), 0
    losses = []
    torch.cuda.reset_peak_memory_stats()
    for number, lengths in enumerate(batches):
        if number == args.steps:
            torch.cuda.synchronize()
            began, replayed = time.perf_counter(), 0
        ids = torch.randint(SHAPE["vocab_size"], (1, sum(lengths)))
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        batch = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}
        given = {name: tensor.pin_memory().to("cuda", non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**given, document_lengths=lengths, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        replayed += path.graphs.replays
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": most,
        "recorded": on,
        "ms": 1e3 * seconds / args.steps,
        "tokens_per_s": sum(map(sum, batches[args.steps :])) / seconds,
        "gib": torch.cuda.max_memory_reserved() / 2**30,
        "loss": float(torch.stack(losses[args.steps :]).mean()),
        "replayed": replayed,
        "recordings": path.graphs.recorded,
        "reason": path.graphs.reason,
    }


if __name__ == "__main__":
    main()
