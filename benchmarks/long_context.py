"""Training on long rows, on one GPU: python benchmarks/long_context.py --work DIR [--lengths …] [--caps …]

The model of benchmarks/fast_path.py (Llama 3.1 8B in shape, random weights, made once in DIR, 16 GB), nf4, one row of
random tokens, labels on every token, LoRA on all linear layers, bitsandbytes' 8-bit AdamW, a bare loop under autocast
to bfloat16. Memory is torch's max_memory_allocated. A row is added to benchmarks/results/long_context.jsonl as soon as
it is measured.

--lengths 65536: ft beside its peers (LoRA of rank 16), each in a process of its own, which loads once and takes all
lengths in turn; with --together they load at the same time. One step is warm and two are timed (--warm, --steps): at
65536 tokens a step takes some 15 s. The same with --lengths 2048,4096,8192,16384,32768,65536 is memory against length
(benchmarks/plot_memory.py draws it). Contestants: ft, unsloth (its defaults), transformers (with PEFT and
checkpointing). --ways says how ft does it, comma-separated, each measured: what the layers keep (keep, inputs,
recompute, offload, offload-input, auto), /TILE for tokens of a tile, @GIB for the memory that auto may plan with:
offload-input/4096, auto@15.6 (whose tile is the planner's).

--caps 8,12,16,24/8,40/4: the longest row under a bound in GiB on torch's allocator, enforced as `ft train` enforces
`memory`; LoRA of rank 32, one whole step (forward, backward, update). The length is the longest that the planner
predicts to fit (--at longest), or the goal, one and a half times the longest row that Unsloth publishes for a card of
that size (--at goal), or --tokens. Where it does not fit after all, it is cut by 3 % and tried again, and the row says
so. Attention's time grows with the square of the length, so CAP/LAYERS computes the first layers alone: the others'
weights, adapters, optimizer states and gradients stay where they are, on the GPU, and the prediction is that of the
whole model. Three layers at least, so that one is computed while two inputs are on their way from the host, as in the
whole model; host memory is then used for these layers alone, and --host says in GiB what the plan may assume. 80/3 is
that of an 80 GB card. All layers keep the same, the first that fits of offload-input, offload and recompute;
--activations auto lets them choose as in `ft train` (for all layers only), for which the first step may have to pin
three times the host memory, which takes time. Before the first cap a short step of all layers compiles kernels and
makes the states.

--budget SECONDS leaves out what would not end in time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import fast_path
from turns import READY, Player, my_turn, play

RESULTS = cases.FOLDER / "long_context.jsonl"
CONTESTANTS = ("ft", "unsloth", "transformers")
PUBLISHED = {8: 2972, 12: 21848, 16: 40724, 24: 78475, 40: 153977, 80: 342733}
"""The longest rows that Unsloth publishes for Llama 3.1 8B in 4 bits with LoRA of rank 32, by a card's GB."""
GOAL = 1.5
LEAST = ("offload-input", "offload", "recompute")
POSITIONS = 2**20
SLOWER = {"unsloth": 1.25, "transformers": 2.0}
"""How much longer than ft a contestant takes, about; for the limit on time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model is made, and kept")
    parser.add_argument("--lengths", default="", help="tokens of a row, comma-separated")
    parser.add_argument("--contestants", default="ft,unsloth", help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--ways", default="offload-input/4096,auto@15.6", help="of ft, for --lengths")
    parser.add_argument("--caps", default="", help="GiB, comma-separated; CAP/LAYERS computes so many layers")
    parser.add_argument("--at", choices=("longest", "goal"), default="longest", help="the length under a cap")
    parser.add_argument("--tokens", type=int, help="the length under a cap")
    parser.add_argument("--activations", default="least", help="what layers keep under a cap")
    parser.add_argument("--cuts", type=int, default=3, help="how often a length that does not fit is cut")
    parser.add_argument("--rank", type=int, default=32, help="of the adapter, under a cap")
    parser.add_argument("--host", type=float, help="GiB of host memory that plans may assume (default: what is free)")
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument("--budget", type=float, help="seconds that all may take")
    parser.add_argument("--together", action="store_true", help="load all at the same time, then take turns")
    parser.add_argument("--turn", type=float, default=300.0, help="seconds after which a contestant's turn is ended")
    parser.add_argument("--unsloth-path", help="put before PYTHONPATH for unsloth alone, which wants an older trl")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    # cpu: a tiny model, caps in MiB, to test this program
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--one", metavar="CONTESTANT", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.activations == "auto" and "/" in args.caps:
        parser.error("--activations auto is for all layers: some of them would choose for themselves alone")
    if unknown := sorted(set(args.contestants.split(",")) - set(CONTESTANTS)):
        parser.error(f"unknown contestants: {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.caps:
        from ft_core.memory import let_segments_grow

        let_segments_grow()  # as ft train does
    args.folder = args.work / f"llama-{'8b' if args.device == 'cuda' else 'tiny'}-{args.layers}"
    args.unit = cases.GIB if args.device == "cuda" else 2**20
    limit = cases.Limit(args.until) if args.until else cases.Limit.of(args.budget)
    if args.one:
        contestant(args.one, args, limit)
        return
    if not (args.folder / "config.json").is_file():  # in a process of its own, which gives the GPU's memory back
        shape = ["--layers", str(args.layers), "--device", args.device]
        subprocess.run([sys.executable, fast_path.__file__, "--work", str(args.work), *shape, "--make"], check=True)
    if args.lengths:
        compete(args, limit)
    if args.caps:
        under_caps(args, limit)


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    words = [row["contestant"], row.get("way", ""), f"1x{row['tokens']}"]
    if "cap_gib" in row:
        words.append(f"cap {row['cap_gib']:g} GiB, {row['computed']} of {row['layers']} layers")
    if "predicted_gib" in row:
        words.append(f"predicted {row['predicted_gib']:.2f} GiB {row['predicted_s']:.2f} s")
    if "error" in row:
        words.append(row["error"])
    else:
        words.append(f"{row['tokens_per_second']} tok/s ({row['step_s']:.2f} s)  {row['peak_gib']:.2f} GiB")
        words.append(f"({row['reserved_gib']:.2f} reserved)  loss {row['loss']}")
    if row.get("goal"):
        reached = "reached" if "error" not in row and row["tokens"] >= row["goal"] else "not reached"
        words.append(f"goal {row['goal']} {reached}")
    if row.get("cut"):
        words.append(f"cut by 3 % {row['cut']} times")
    return "  ".join(word for word in words if word)


def compete(args: argparse.Namespace, limit: cases.Limit) -> None:
    """Let the contestants run in turn; they write their rows themselves."""
    names = args.contestants.split(",")

    def start(name: str) -> Player:
        environment = dict(os.environ)
        if name == "unsloth" and args.unsloth_path:
            paths = [args.unsloth_path, environment.get("PYTHONPATH")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        until = [] if limit.until is None else ["--until", str(limit.until)]
        return Player(
            [sys.executable, __file__, *sys.argv[1:], *until, "--one", name], environment,
            heard=lambda said: None if said == READY else print(said, flush=True),
        )  # fmt: skip

    def done(number: int, player: Player) -> None:
        if player.error is not None:
            row = {"date": cases.now(), "contestant": names[number], "lengths": args.lengths, "error": player.error}
            cases.write(args.results, row)
            print(json.dumps(row), flush=True)

    play([functools.partial(start, name) for name in names], done, together=args.together, turn=args.turn)


def contestant(name: str, args: argparse.Namespace, limit: cases.Limit) -> None:
    """Load, wait for the turn, and take all lengths, the shortest first."""
    if name == "unsloth":
        import unsloth  # noqa: F401 (it wants to be first)
    lengths = sorted(map(int, args.lengths.split(",")))
    path = None
    if name == "ft":
        model, path, optimizer = cases.ft_model(args.folder, "nf4", 16)
    else:
        model = fast_path.load(name, "nf4", args, lengths[-1]).train()
        optimizer = fast_path.adamw8bit(name, [p for p in model.parameters() if p.requires_grad])
        cases.tidy()
    my_turn()
    rows = cases.Rows(args.results, args.device, line, layers=args.layers, mode="lengths", together=args.together)
    for tokens in lengths:
        for way in args.ways.split(",") if path is not None else [""]:
            row: dict[str, Any] = {"contestant": name, "quantization": "nf4", "rank": 16, "tokens": tokens}
            if path is not None:
                planned = choose(path, way, tokens, args)
                row |= {"way": way, "tile": path.tile}
                if path.tile == planned.peak.tile:  # else the plan is one of another tile
                    row |= {"predicted_gib": gib(planned, args.unit), "predicted_s": round(planned.times.step, 3)}
                seconds = planned.times.step
                pinning = 0.0 if path.host.pools else planned.peak.host / cases.PINNING
            else:
                # By hand: the planner would build a model in a process whose transformers somebody may have changed.
                seconds, pinning = SLOWER[name] * (0.1 + 6.3e-5 * tokens + 8.5 * (tokens / 65536) ** 2), 0.0
            if not limit.allows(f"{name} {way} 1x{tokens}", seconds * (args.warm + args.steps) + pinning + 3):
                continue
            row |= cases.attempt(
                lambda tokens=tokens: cases.steps(
                    model, optimizer, 1, tokens, args.device, warm=args.warm, timed=args.steps,
                    mask=name == "transformers",
                )
            )  # fmt: skip
            if path is not None and "error" not in row:
                row |= fast_path.chosen(model)
            rows.add(row)
            if path is not None:
                cases.forget(path, host=False)
        if path is not None:
            cases.forget(path)


def choose(path: Any, way: str, tokens: int, args: argparse.Namespace) -> Any:
    """Do as one of ``--ways`` says; the plan of that."""
    way, _, bound = way.partition("@")
    what, _, tile = way.partition("/")
    memory = int(float(bound) * args.unit) if bound else None
    planned = cases.plan(cases.configuration(args.folder, tokens, quantization="nf4"), what, limit=memory)
    path.choose(what, memory=memory)
    path.tile = int(tile) if tile else planned.peak.tile
    return planned


def gib(planned: Any, unit: int = cases.GIB) -> float:
    """A plan's peak."""
    return round(planned.peak.total / cases.GIB, 3 if unit == cases.GIB else 6)


def under_caps(args: argparse.Namespace, limit: cases.Limit) -> None:
    """The longest row under each cap; one load for all."""
    folder = stretched(args.folder)
    model, path, optimizer = cases.ft_model(folder, "nf4", args.rank)
    layers = Layers(model)
    rows = cases.Rows(args.results, args.device, line, layers=args.layers, mode="caps")
    path.choose("offload-input")
    path.tile = 4096 if args.device == "cuda" else 16
    short = 2 * path.tile
    ready = cases.attempt(lambda: cases.steps(model, optimizer, 1, short, args.device, warm=0, timed=1))
    print(f"# a short step of all layers: {ready.get('error', ready.get('all_s'))}", flush=True)
    for word in args.caps.split(","):
        cap, _, count = word.partition("/")
        computed = min(int(count or args.layers), args.layers)
        host = None if args.host is None else int(args.host * cases.GIB)
        one = functools.partial(
            cases.configuration, folder, quantization="nf4", rank=args.rank,
            memory=f"{int(float(cap) * args.unit / 2**20)}MiB",
        )  # fmt: skip
        first = cases.plan(one(256), host=host)
        goal = -(-int(GOAL * PUBLISHED[int(float(cap))]) // 64) * 64 if float(cap) in PUBLISHED else 0
        longest = first.planner.longest(first.config, first.card)
        tokens = args.tokens or (goal if args.at == "goal" and goal else longest)
        for cut in range(args.cuts + 1):
            if tokens < 64:
                print(f"# cap {cap}: the planner finds no length that fits", flush=True)
                break
            config = one(tokens)
            wanted, planned = least(config, host) if args.activations == "least" else (
                args.activations, cases.plan(config, args.activations, host=host),
            )  # fmt: skip
            share = computed / args.layers
            seconds = planned.times.step * share + planned.peak.host * share / cases.PINNING + 3
            if not limit.allows(f"cap {cap}, 1x{tokens}, {computed} layers", seconds):
                break
            path = layers.compute(computed)
            bound = planned.limit / 0.99  # as ft train gives it to the layers
            path.choose(wanted, memory=int(bound))
            path.tile = planned.peak.tile
            row = {
                "contestant": "ft", "quantization": "nf4", "rank": args.rank, "cap_gib": float(cap), "tokens": tokens,
                "computed": computed, "goal": goal, "longest_predicted": longest, "cut": cut, "tile": path.tile,
                "wanted": wanted, "predicted_gib": gib(planned, args.unit),
                "predicted_s": round(planned.times.step * share, 2), "fits": planned.fits,
                "allocator": os.environ.get("PYTORCH_ALLOC_CONF", ""),
            }  # fmt: skip
            with cases.capped(config):
                row |= cases.attempt(
                    lambda tokens=tokens: cases.steps(
                        model, optimizer, 1, tokens, args.device, warm=0, timed=1, before=layers.gradients
                    )
                )
            if "error" not in row:
                row |= fast_path.chosen(model)
            rows.add(row)
            cases.forget(path)
            if not row.get("out_of_memory"):
                break
            tokens = int(tokens * 0.97) // 64 * 64


def least(config: Any, host: int | None) -> tuple[str, Any]:
    """What layers keep in the least memory, of what fits by the planner, or else the first; and the plan of that."""
    plans = {way: cases.plan(config, way, host=host) for way in LEAST}
    way = next((way for way, planned in plans.items() if planned.fits), LEAST[0])
    return way, plans[way]


def stretched(folder: Path) -> Path:
    """A folder with the same files, but a configuration with more positions."""
    made = folder.with_name(f"{folder.name}-long")
    made.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.name != "config.json" and not (made / file.name).exists():
            (made / file.name).symlink_to(file.resolve())
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["max_position_embeddings"] = POSITIONS
    (made / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return made


class Layers:
    """A model whose first layers alone can be computed, while the others remain on the GPU."""

    def __init__(self, model: Any) -> None:
        from ft_core import fast
        from ft_core.fast.layout import at

        path = fast.enable(model)
        self.model, self.inner = model, path.model
        self.backbone: Any = at(path.model, path.layout.backbone)
        self.all = list(path.layers)
        self.computed = len(self.all)

    def compute(self, count: int) -> Any:
        """Let so many be computed; their fast path."""
        from torch import nn

        from ft_core import fast

        if count != self.computed:
            fast.disable(self.model)
            self.backbone.layers = nn.ModuleList(self.all[:count])
            self.inner.config.num_hidden_layers = self.computed = count
        return fast.enable(self.model)

    def gradients(self) -> None:
        """Give the parameters of the others gradients, which the whole model would have by the end of backward."""
        import torch

        for layer in self.all[self.computed :]:
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)


if __name__ == "__main__":
    main()
