"""How exact gradients are, ft's and transformers' own, against float64: python benchmarks/exactness.py [--device cpu]

For each family, dtype and way of training: random models with the head dimensions of real ones, of the same seed, see
five batches (a row of three documents, as `ft verify` makes it) in float64, in transformers' eager layers and in ft's.
Of each parameter, the mean over the batches of the gradient's distance from the float64 one, relative to its length, is
its error. Ways of training:

- adapter: LoRA of rank 16 with random A and B, in fp32, on all linear layers of frozen weights in the dtype.
- full: all weights trained, in fp32, with the numbers that a checkpoint in the dtype holds.

fp32 runs without autocast, bf16 and fp16 under it, fp16 with a scaled loss as its trainers have it.

Columns: the median over the parameters of ft's error and of eager's; their ratio, "±" its standard error over the
batches (a jackknife); the median of the parameters' own ratios; the largest of those, and whose. The bar: a ratio of
at most 1.00 and a largest of at most 1.25; `ft verify` calls more than 2 a mismatch. Products in fp32 are fp32's (no
TF32) unless --tf32 allows it for both. Rows are added to benchmarks/results/exactness.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ft_core.console import quiet
from ft_core.fast.verify import Ledger, verify

RESULTS = Path(__file__).with_name("results") / "exactness.jsonl"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("adapter", "full")
BAR, LARGEST = 1.0, 1.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the kernels' references")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--hidden", type=int, default=512, help="the model's width (default: 512)")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=384, help="a batch's")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of weights, adapters and batches")
    parser.add_argument("--attention", default="eager", choices=("eager", "sdpa"), help="transformers' own")
    parser.add_argument("--tf32", action="store_true", help="let fp32 products use TF32, eager's as ft's")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="print each case's N largest ratios too")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for given, known in ((args.families, FAMILIES), (args.dtypes, DTYPES), (args.modes, MODES)):
        if unknown := sorted(set(given.split(",")) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    if args.hidden % 128:
        parser.error(f"--hidden {args.hidden}: heads are 128 wide, give a multiple of that")
    if args.batches < 2:
        parser.error("--batches: a standard error takes at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: --device cpu measures the references")
    quiet()
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    rows = []
    print(HEADER, flush=True)
    for family, dtype, mode in itertools.product(*(x.split(",") for x in (args.families, args.dtypes, args.modes))):
        began = time.perf_counter()
        ledger = measure(family, dtype, mode, args)
        row = {"family": family, "dtype": dtype, "mode": mode, **figures(ledger)}
        row["seconds"] = round(time.perf_counter() - began, 2)
        rows.append(row)
        print(table_line(row), flush=True)
        for line in sorted(ledger.lines, key=lambda n: -n.ratio)[: args.worst]:
            print(f"    {line.fast:9.3e} {line.plain:9.3e} {line.ratio:6.3f}  {line.name}")
    write(args, rows)
    over = [row for row in rows if row["ratio"] > BAR or row["largest"] > LARGEST]
    print(f"\n{len(rows) - len(over)} of {len(rows)} within the bar (ratio <= {BAR:.2f}, largest <= {LARGEST})")
    for row in over:
        resolved = row["ratio"] - 2 * row["deviation"] > BAR or row["largest"] > LARGEST
        print(f"over it{'' if resolved else ', by less than two standard errors'}: {table_line(row)}")


def measure(family: str, dtype: str, mode: str, args: argparse.Namespace) -> Ledger:
    """Three fresh loads of one model, compared."""

    torch.manual_seed(args.seed)
    model = FAMILIES[family](args.hidden, args.layers)
    model.set_attn_implementation(args.attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(DTYPES[dtype])

    def load(exact: bool) -> Any:
        return copy.deepcopy(model).to(args.device, torch.float32 if mode == "full" else DTYPES[dtype])

    parameters = {"adapter": "adapter", "full": "all"}[mode]
    return verify(
        load, name=family, dtype=DTYPES[dtype], parameters=parameters,  # type: ignore[arg-type]
        batches=args.batches, tokens=args.tokens, seed=args.seed,
    )  # fmt: skip


def figures(ledger: Ledger) -> dict[str, Any]:
    """What a row says of a ledger."""
    largest = max(ledger.lines, key=lambda n: n.fast / max(n.plain, ledger.floor))
    return {
        "parameters": len(ledger.lines),
        "ft": median(n.fast for n in ledger.lines),
        "eager": median(n.plain for n in ledger.lines),
        "ratio": ledger.ratio,
        "deviation": ledger.deviation,
        "median_ratio": median(n.ratio for n in ledger.lines),
        "largest": largest.fast / max(largest.plain, ledger.floor),
        "largest_name": largest.name.removeprefix("base_model.model."),
        "loss_ft": ledger.losses[0],
        "loss_eager": ledger.losses[1],
        "mismatches": [n.name for n in ledger.mismatches],
    }


HEADER = (
    f"{'family':8} {'dtype':5} {'mode':8} {'ft':>9} {'eager':>9}  {'ratio':>6} {'':8} {'of ratios':>9} {'largest':>7}  "
    "whose"
)


def table_line(row: dict[str, Any]) -> str:
    """One case's figures."""
    return (
        f"{row['family']:8} {row['dtype']:5} {row['mode']:8} {row['ft']:9.3e} {row['eager']:9.3e}  "
        f"{row['ratio']:6.4f} ± {row['deviation']:6.4f} {row['median_ratio']:9.4f} {row['largest']:7.3f}  "
        f"{row['largest_name']} ({row['parameters']} parameters, {row['seconds']:.1f} s)"
    )


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Add the rows to the results, with what they were made on."""
    here = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "device": here,
        "torch": torch.__version__, "hidden": args.hidden, "layers": args.layers, "tokens": args.tokens,
        "batches": args.batches, "seed": args.seed, "tf32": args.tf32,
        "attention": args.attention,
    }  # fmt: skip
    args.results.parent.mkdir(exist_ok=True)
    with open(args.results, "a", encoding="utf-8") as file:
        file.writelines(json.dumps({**facts, **row}) + "\n" for row in rows)


def sizes(hidden: int, layers: int) -> dict[str, Any]:
    """Heads of 128, as in these families' models of 7 and 8 billion, every two with keys and values of one."""
    heads = hidden // 128
    return {
        "vocab_size": 2000, "hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": max(heads // 2, 1), "head_dim": 128,
    }  # fmt: skip


def qwen2(hidden: int, layers: int) -> Any:
    """It has no head_dim of its own, and a window in its last layers."""
    given = {name: value for name, value in sizes(hidden, layers).items() if name != "head_dim"}
    return Qwen2ForCausalLM(Qwen2Config(**given, use_sliding_window=True, sliding_window=64, max_window_layers=1))


FAMILIES: dict[str, Callable[[int, int], Any]] = {
    "llama": lambda hidden, layers: LlamaForCausalLM(LlamaConfig(**sizes(hidden, layers))),
    "mistral": lambda hidden, layers: MistralForCausalLM(MistralConfig(**sizes(hidden, layers), sliding_window=64)),
    "qwen2": qwen2,
    "qwen3": lambda hidden, layers: Qwen3ForCausalLM(Qwen3Config(**sizes(hidden, layers))),
}


if __name__ == "__main__":
    main()
