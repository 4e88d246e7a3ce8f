"""What the planner predicts beside what a training takes: python benchmarks/planner_check.py --work DIR [--seed 0]

Configurations are drawn by the seed: a family (llama, qwen2, qwen3) at one of its widths, a depth (few layers of a wide
model, whose real depth would take minutes to make), rows and their length, the adapter's rank, none, nf4 or int8,
packing or not, and for half of them a bound on the memory. Models have random weights, made on the GPU in DIR (/dev/shm
is fast) and removed after their turn.

Each is trained by `ft train`'s own parts: the same plan is made before anything is loaded (which is what `ft plan` says
for this card), the same model, choices and tile follow from it, the same trainer takes a few steps on rows of exactly
max_length tokens, with clipping and all; nothing is saved. Measured are the time of the steps after the tenth by their
number, the GPU waited for before the first of them and after the last, and torch's max_memory_allocated in the steps
after the second, when `auto` has settled. A row with both errors in per cent is added to
benchmarks/results/planner_check.jsonl, and at the end the worst are printed. The bars: 5 % of memory, 10 % of time. A
configuration that does not fit by the plan gets half as much memory again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import string
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cases
import fast_path

RESULTS = cases.FOLDER / "planner_check.jsonl"
WARM = 10
"""Steps before those that are timed: by then they are recorded, where they are to be."""
SHAPES = {  # hidden, inner, heads, keys' heads, width of a head, vocabulary
    "llama": [(2048, 8192, 32, 8, 64, 128256), (3072, 8192, 24, 8, 128, 128256), (4096, 14336, 32, 8, 128, 128256)],
    "qwen2": [(1536, 8960, 12, 2, 128, 151936), (2048, 11008, 16, 2, 128, 151936), (3584, 18944, 28, 4, 128, 152064)],
    "qwen3": [(2048, 6144, 16, 8, 128, 151936), (2560, 9728, 32, 8, 128, 151936), (4096, 12288, 32, 8, 128, 151936)],
}
TINY = {family: [(64, 128, 4, 2, 16, 512), (96, 160, 6, 2, 16, 512)] for family in SHAPES}
KINDS = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
DEPTHS = {0: (8, 12, 16), 3000: (4, 6, 8)}
"""Layers, from a width on."""
LENGTHS, ROWS, MOST = (512, 1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8), 16384
TINY_LENGTHS, TINY_MOST = (32, 64, 128), 256
BARS = {"memory": 5.0, "time": 10.0}


@dataclass(frozen=True)
class Drawn:
    """One configuration; ``bound``: the memory as a share of what all activations and weights take, or None."""

    family: str
    shape: tuple[int, ...]
    layers: int
    rows: int
    length: int
    rank: int
    quantization: str
    packing: bool
    bound: float | None

    @property
    def memory(self) -> float | None:
        """The bound in bytes, from sizes alone, so that it does not move with the planner."""
        if self.bound is None:
            return None
        hidden, inner, heads, keys, width, vocabulary = self.shape
        attention = 2 * hidden * heads * width + 2 * hidden * keys * width
        each = {"none": 2.0, "int8": 1.0, "nf4": 0.52}[self.quantization]
        weights = 4 * vocabulary * hidden + each * self.layers * (attention + 3 * hidden * inner)
        kept = 2 * (2 * hidden + 2 * heads * width + 2 * keys * width + 2 * inner) * self.layers
        return weights + self.bound * kept * self.rows * self.length + 2**30


def draw(seed: int, count: int, tiny: bool = False) -> list[Drawn]:
    """So many configurations, by the seed alone; families and quantizations take turns."""
    found = []
    for number in range(count):
        dice = random.Random(f"planner:{seed}:{number}")
        family = sorted(SHAPES)[number % 3]
        shape = dice.choice((TINY if tiny else SHAPES)[family])
        depths = (2, 3) if tiny else DEPTHS[max(width for width in DEPTHS if shape[0] >= width)]
        most = TINY_MOST if tiny else MOST
        length = dice.choice(TINY_LENGTHS if tiny else LENGTHS)
        rows = dice.choice([rows for rows in ROWS if rows * length <= most])
        found.append(
            Drawn(
                family, shape, dice.choice(depths), rows, length, dice.choice((8, 16, 32, 64)),
                ("none", "nf4", "int8")[number // 3 % 3], dice.random() < 0.5,
                dice.choice((0.2, 0.5)) if number % 2 else None,
            )
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where models are made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12, help="configurations")
    parser.add_argument("--only", default="", help="numbers of those to run, comma-separated, from 0")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after ten")
    parser.add_argument("--list", action="store_true", help="print the configurations and what is predicted, and stop")
    parser.add_argument("--budget", type=float, help="seconds that all may take")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: tiny models, to test this program
    args = parser.parse_args()
    limit = cases.Limit.of(args.budget)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.device == "cuda":
        from ft_core.memory import let_segments_grow

        let_segments_grow()  # as ft train does
    rows = None if args.list else cases.Rows(args.results, args.device, line, seed=args.seed)
    measured = []
    for number, drawn in enumerate(draw(args.seed, args.count, args.device == "cpu")):
        if args.only and str(number) not in args.only.split(","):
            continue
        folder = args.work / f"planner-check-{number}"
        try:
            row: dict[str, Any] = {"number": number, **asdict(drawn)}
            if rows is None:
                outline(drawn, folder)
                _, planned = settle(drawn, folder)
                print(line(row | predicted(planned)), flush=True)
            elif limit.allows(f"configuration {number}", 25):
                rows.add(row | cases.attempt(functools.partial(check, drawn, folder, args)))
                measured.append(rows.last)
                cases.tidy()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(summary(measured)))


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    packed = "packed" if row["packing"] else "apart"
    head = f"{row['number']:2} {row['family']} {row['shape'][0]} x {row['layers']} {row['quantization']} "
    head += f"{row['rows']}x{row['length']} {packed} r={row['rank']} {row.get('memory', '')}"
    if "error" in row:
        return f"{head}  {row['error']}"
    said = f"{head}  predicted {row['predicted_gib']:.3f} GiB {row['predicted_s'] * 1e3:.1f} ms"
    if "peak_gib" not in row:
        return f"{said}  {row['planned_layers']}"
    return (
        f"{said}  measured {row['peak_gib']:.3f} GiB {row['step_s'] * 1e3:.1f} ms  "
        f"off by {row['memory_error']:+.1f} % and {row['time_error']:+.1f} %  {row.get('layers_keep', '')}"
    )


def summary(measured: Sequence[dict[str, Any]]) -> list[str]:
    """How many are within the bars, and the worst."""
    whole = [row for row in measured if "memory_error" in row]
    if not whole:
        return []
    lines = [f"{len(measured) - len(whole)} of {len(measured)} failed"] if len(whole) < len(measured) else []
    for what, bar in BARS.items():
        errors = [row[f"{what}_error"] for row in whole]
        inside = sum(abs(error) <= bar for error in errors)
        lines.append(f"{what}: {inside} of {len(errors)} within {bar:g} %, the worst {max(errors, key=abs):+.1f} %")
    return lines


def transformers_config(drawn: Drawn) -> Any:
    """What transformers calls the model."""
    import transformers

    hidden, inner, heads, keys, width, vocabulary = drawn.shape
    more = {} if drawn.family == "qwen2" else {"head_dim": width}
    return getattr(transformers, KINDS[drawn.family])(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=keys,
        vocab_size=vocabulary, num_hidden_layers=drawn.layers, max_position_embeddings=32768,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="bfloat16",
        architectures=[KINDS[drawn.family].replace("Config", "ForCausalLM")], **more,
    )  # fmt: skip


def outline(drawn: Drawn, folder: Path) -> None:
    """A folder with what a plan reads: a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    transformers_config(drawn).save_pretrained(folder)


def configuration(
    drawn: Drawn, folder: Path, memory: float | None, steps: int, activations: str = "auto"
) -> Any:  # fmt: skip
    """As ``ft train`` takes it."""
    from ft_core.config.load import check_config

    return check_config(
        {
            "model": str(folder), "data": str(folder / "rows.jsonl"), "quantization": drawn.quantization,
            "activations": activations,
            "max_length": drawn.length, "packing": drawn.packing, "lora": {"r": drawn.rank},
            "memory": "auto" if memory is None else f"{int(memory / 2**20)}MiB",
            "training": {"batch_size": drawn.rows, "gradient_accumulation": 1, "max_steps": steps},
        }
    )  # fmt: skip


def settle(drawn: Drawn, folder: Path, steps: int = 10) -> tuple[Any, Any]:
    """The configuration, with more memory where it does not fit; and its plan."""
    memory = drawn.memory
    while True:
        config = configuration(drawn, folder, memory, steps)
        planned = cases.plan(config)
        if planned.fits or memory is None:
            return config, planned
        memory *= 1.5


def predicted(planned: Any) -> dict[str, Any]:
    """What a plan says, for a row."""
    return {
        "memory": planned.config.memory, "predicted_gib": round(planned.peak.total / cases.GIB, 4),
        "predicted_s": round(planned.times.step, 5), "parts": planned.peak.parts, "moment": planned.peak.moment,
        "time_parts": {name: round(seconds, 5) for name, seconds in planned.times.parts.items()},
        "update_s": round(planned.times.update, 5), "tile": planned.peak.tile,
        "planned_layers": planned.as_json()["layers"],
    }  # fmt: skip


def check(drawn: Drawn, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Make the model, plan, train a few steps and compare."""
    import torch

    from ft_core.models.device import count_peak_anew

    fast_path.make_from(transformers_config(drawn), folder, args.device)
    cases.tidy()
    count_peak_anew()
    steps = WARM + args.steps
    write_rows(folder, drawn, drawn.rows * (steps + 1))
    config, _ = settle(drawn, folder, steps)
    with cases.capped(config):
        found = train(config, args.device)
    planned, row = found.pop("planned"), {}
    row = predicted(planned) | found
    if row["tokens"] != drawn.rows * drawn.length:
        raise ValueError(f"a step had {row['tokens']} tokens, not {drawn.rows * drawn.length}")
    peak = row["peak_gib"] or float("nan")
    row["memory_error"] = round(100 * (row["predicted_gib"] / peak - 1), 2) if torch.cuda.is_available() else 0.0
    row["time_error"] = round(100 * (row["predicted_s"] / row["step_s"] - 1), 2)
    return row


def write_rows(folder: Path, drawn: Drawn, count: int) -> None:
    """Texts of exactly ``max_length`` tokens: the tokenizer has one for each letter, and the end of the text is one."""
    dice = random.Random(0)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(count):
            text = "".join(dice.choices(string.ascii_lowercase, k=drawn.length - 1))
            file.write(json.dumps({"text": text}) + "\n")


def train(config: Any, device: str) -> dict[str, Any]:
    """The steps of ``ft train`` without its run folder: plan, load, choose, train."""
    import torch
    from transformers import PrinterCallback

    from ft_core import fast
    from ft_core.config.load import method_settings
    from ft_core.fast import fast_path_of
    from ft_core.models import find_model, load_tokenizer, pick_device
    from ft_core.plugins import MethodSpec, registry, resolve
    from ft_core.runs import Run
    from ft_core.training.arguments import trainer_arguments
    from ft_core.training.job import Job, build_trainer
    from ft_core.training.optimizers import optimizer_of
    from ft_core.training.prepare import prepare_model, prepare_rows
    from ft_core.training.speed import foresee, plan_ahead, recomputes, speed_up

    said: list[str] = []
    source, where, spec = find_model(config.model), pick_device(), registry().get(MethodSpec, config.method)
    planned = foresee(config, source, where, said.append) or cases.plan(config)
    rows, _ = prepare_rows(config, spec)
    model = prepare_model(config, spec, source, where, said.append)
    speed_up(model, where, said.append)
    if device == "cpu":  # where a training has no use for them
        fast.enable(model)
    with tempfile.TemporaryDirectory() as folder:
        recompute = recomputes(model, config, where, said.append, planned)
        arguments = trainer_arguments(
            config, Run(folder), where, evaluates=False, recompute=recompute, optimizer=optimizer_of(config, planned)
        )
        arguments |= {"save_strategy": "no"}
        watch = stopwatch(device == "cuda")
        trainer = build_trainer(
            resolve(spec.trainer),
            Job(
                config=config, settings=method_settings(config), model=model, tokenizer=load_tokenizer(source),
                train_rows=rows, eval_rows=None, arguments=arguments, callbacks=[watch], say=said.append,
            ),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        plan_ahead(trainer, said.append)
        trainer.train()
    path, timed = fast_path_of(model), watch.steps - WARM
    begins = [round(then - watch.first, 4) for then in watch.begins]
    return {
        "planned": planned, "step_s": round((watch.ended - watch.begun) / timed, 5), "timed": timed,
        "tokens": int(trainer.state.num_input_tokens_seen) // watch.steps, "said": said[-3:], "begins": begins,
        "allocations": watch.allocations,
        "peak_gib": round(torch.cuda.max_memory_allocated() / cases.GIB, 4) if device == "cuda" else 0.0,
        **(fast_path.chosen(model) if path is not None else {}),
    }  # fmt: skip


def stopwatch(cuda: bool) -> Any:
    """A trainer's callback that notes when the timed steps begin and end, and forgets the peak of the first two."""
    import torch
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.steps, self.begun, self.ended, self.first = 0, 0.0, 0.0, time.perf_counter()
            self.before: dict[str, int] = {}
            self.allocations: dict[str, int] = {}
            self.begins: list[float] = []  # by the host's clock, nothing waited for: where the seconds went

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begins.append(time.perf_counter())
            if cuda and self.steps == 2:
                torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps += 1
            if self.steps == WARM:
                self.begun, self.before = self.now(), self.counts()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended = self.now()
            self.allocations = {name: count - self.before.get(name, 0) for name, count in self.counts().items()}

        def counts(self) -> dict[str, int]:  # each waits for the GPU
            stats = torch.cuda.memory_stats() if cuda else {}
            return {name: stats.get(name, 0) for name in ("num_alloc_retries", "num_device_alloc", "num_device_free")}

        def now(self) -> float:
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

    return Stopwatch()


if __name__ == "__main__":
    main()
