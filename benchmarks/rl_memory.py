"""What `ft plan` predicts of each preference and reinforcement method, and what its training takes:
python benchmarks/rl_memory.py --work DIR [...]

On one GPU: layers of the model of benchmarks/fast_path.py (Llama 3.1 8B in shape, random weights, made once in DIR),
nf4, LoRA of rank 32 on all linear layers. Each method is trained by ``ft_core.train`` for a few steps on rows of
exactly ``max_length`` tokens; what was measured is the run's own figure, torch's count of the most memory allocated
while it trained. Rows are added to benchmarks/results/rl_memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cases
import fast_path

RESULTS = Path(__file__).with_name("results") / "rl_memory.jsonl"
METHODS = ("reward", "dpo", "orpo", "kto", "grpo", "gspo", "ppo")
BOUND = 0.07


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model is made, and kept")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2, help="training.batch_size")
    parser.add_argument("--seconds", type=float, default=None, help="begin no method that would not end by then")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a tiny model, to test this program
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = args.work / f"llama-{'8b' if args.device == 'cuda' else 'tiny'}-{args.layers}"
    if not (args.folder / "config.json").is_file():
        words = [sys.executable, str(Path(fast_path.__file__)), "--work", str(args.work), "--make"]
        subprocess.run([*words, "--layers", str(args.layers), "--device", args.device], check=True)
    limit = cases.Limit.of(args.seconds)
    rows = cases.Rows(args.results, args.device, table_line, layers=args.layers)
    for method in args.methods.split(","):
        if limit.allows(method, 25):
            shape = {"method": method, "rows": args.rows, "length": args.length}
            rows.add({**shape, **cases.attempt(lambda method=method: one(method, args))})
            cases.tidy()


def one(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured bytes of a method."""
    import ft_core as ft
    from ft_core.config.load import check_config

    with tempfile.TemporaryDirectory() as folder:
        config = check_config(configuration(method, args, Path(folder)))
        planned = cases.plan(config)
        result = ft.train(config, say=lambda line: print(f"# {line}", file=sys.stderr, flush=True))
        memory = json.loads((result.run / "summary.json").read_text())["memory"]
    predicted, measured = planned.peak.total, memory["train"]
    return {
        "predicted_gib": round(predicted / cases.GIB, 3), "measured_gib": round(measured / cases.GIB, 3),
        "off": round(predicted / measured - 1, 4), "moment": planned.peak.moment,
        "choices": {choice: planned.peak.choices.count(choice) for choice in set(planned.peak.choices)},
    }  # fmt: skip


def configuration(method: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A configuration whose rows are as long as they may be."""
    written = method in ("grpo", "gspo", "ppo")
    chance, length, prompt = random.Random(0), args.length, args.length // 8

    def text(count: int) -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz ", k=count - 1)) + "x"

    # the last token of an answer is the end-of-sequence token
    answer = length - prompt - 1
    rows = [
        {"prompt": text(prompt), **({} if written else {"chosen": text(answer), "rejected": text(answer)})}
        for _ in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section: dict[str, Any] = {"max_completion_length": length - prompt} if written else {}
    if method in ("grpo", "gspo"):
        section["num_generations"] = 2 * args.rows
    values: dict[str, Any] = {
        "model": str(args.folder), "method": method, "data": str(folder / "rows.jsonl"), "packing": False,
        "quantization": "nf4" if args.device == "cuda" else "none", "max_length": length, method: section,
        "lora": {"r": 32, "alpha": 32}, "output": str(folder / "run"),
        "training": {"max_steps": 2, "batch_size": args.rows, "gradient_accumulation": 2},
    }  # fmt: skip
    if written:
        values["rewards"] = [f"{Path(__file__).with_name('rl.py').resolve()}:nothing"]
    return values


def table_line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['method']:7} {row['rows']}x{row['length']:<6}"
    if "error" in row:
        return f"{head} {row['error']}"
    verdict = "within" if abs(row["off"]) <= BOUND else "not within"
    return (
        f"{head} predicted {row['predicted_gib']:6.2f} GiB at {row['moment']:9} measured {row['measured_gib']:6.2f}  "
        f"{row['off']:+.1%}, {verdict} {BOUND:.0%}"
    )


if __name__ == "__main__":
    main()
