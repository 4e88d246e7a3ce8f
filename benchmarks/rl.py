"""Preference and reinforcement steps beside TRL's own, on one GPU: python benchmarks/rl.py --work DIR [...]

The model of benchmarks/fast_path.py (Llama 3.1 8B in shape, random weights, made once in DIR), nf4, LoRA of rank 32 on
all linear layers, bitsandbytes' 8-bit AdamW. Each contestant runs in a process of its own, through its own trainer's
``train``; a step is timed from its begin to its end, with the GPU waited for at both, and the most memory is torch's
own count of what was allocated. Rows are added to benchmarks/results/rl.jsonl.

Cases:
- grpo-update: the update on one group of eight completions of 20,480 tokens (prompts of 64), a micro-batch each; the
  completions are random tokens with random advantages, the same for all, handed to the trainer in place of a rollout.
- dpo: two pairs whose sequences have 4,096 tokens, of which 512 are the prompt's; with the reference's pass.
- dpo-half: the same, of which 2,048 are the prompt's, as in a conversation of several turns.
- grpo: a whole step, rollouts too: four prompts of 128 tokens, eight completions each of 256 tokens (random weights
  never end one), a reward that costs nothing; micro-batches of eight completions.

Contestants:
- ft: the activations that its planner chooses by the card's memory. ft-small: the same under --memory GiB, a bound.
- trl: its defaults (checkpointing, its chunked head), without Liger. In the case grpo it writes by transformers'
  generate; trl-batching by its continuous batching.

One that fails is a row with its error.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cases
import fast_path

RESULTS = Path(__file__).with_name("results") / "rl.jsonl"
CASES = ("grpo-update", "dpo", "dpo-half", "grpo")
CONTESTANTS = ("ft", "ft-small", "trl", "trl-batching")
RANK = 32
SHAPES: dict[str, dict[str, int]] = {
    "grpo-update": {"prompt": 64, "answer": 20480, "rows": 8, "micro": 1, "group": 8},
    "dpo": {"prompt": 512, "answer": 3584, "rows": 2, "micro": 2, "group": 1},
    "dpo-half": {"prompt": 2048, "answer": 2048, "rows": 2, "micro": 2, "group": 1},
    "grpo": {"prompt": 128, "answer": 256, "rows": 32, "micro": 8, "group": 8},
}
STEPS = {"grpo-update": (1, 2), "dpo": (3, 7), "dpo-half": (3, 7), "grpo": (1, 2)}
"""Steps before those that are timed, and these."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model is made, and kept")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--contestants", default="ft,trl", help=f"comma-separated, of {', '.join(CONTESTANTS)}")
    parser.add_argument("--memory", type=float, default=16.0, help="GiB that ft-small may use")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=None, help="begin no case that would not end by then")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a tiny model, to test this program
    parser.add_argument("--divide", type=int, default=1, help=argparse.SUPPRESS)  # all lengths, for the same purpose
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "CONTESTANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for given, known in ((args.cases, CASES), (args.contestants, CONTESTANTS)):
        if unknown := sorted(set(given.split(",")) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    args.folder = args.work / f"llama-{'8b' if args.device == 'cuda' else 'tiny'}-{args.layers}"
    if args.one:
        print(json.dumps(run(*args.one, args)), flush=True)
        return
    if not (args.folder / "config.json").is_file():
        words = [sys.executable, str(Path(fast_path.__file__)), "--work", str(args.work), "--make"]
        subprocess.run([*words, "--layers", str(args.layers), "--device", args.device], check=True)
    compete(args)


def compete(args: argparse.Namespace) -> None:
    """Let each contestant run each case, and write down what it says."""
    limit = cases.Limit.of(args.seconds)
    facts = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "layers": args.layers}
    rows = []
    for case in args.cases.split(","):
        for contestant in args.contestants.split(","):
            if contestant == "trl-batching" and case != "grpo":
                continue
            if not limit.allows(f"{case}, {contestant}", {"grpo-update": 150, "grpo": 150}.get(case, 80)):
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--one", case, contestant]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if args.profile:
                print("\n".join(line for line in done.stdout.splitlines() if not line.startswith("{")))
            row = {"case": case, "contestant": contestant}
            if done.returncode or not lines:
                words = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
                sys.stderr.write(done.stderr[-4000:])
                row |= {"error": words}
            else:
                row |= json.loads(lines[-1])
            rows.append(row)
            cases.write(args.results, {**facts, **row})
            print(table_line(row), flush=True)
    print()
    for row in rows:
        print(table_line(row))


def table_line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['case']:12} {row['contestant']:13}"
    if "error" in row:
        return f"{head} {row['error']}"
    rollout = f"  {row['rollout_s']:.2f} s of it written" if row.get("rollout_s") else ""
    return f"{head} {row['step_s']:8.3f} s a step  {row['peak_gib']:6.2f} GiB{rollout}  loss {row['loss']:.5f}"


def run(case: str, contestant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One contestant's steps."""
    import torch

    shape = {k: v // args.divide if k in ("prompt", "answer") else v for k, v in SHAPES[case].items()}
    with tempfile.TemporaryDirectory() as folder:
        make = _ft if contestant.startswith("ft") else _trl
        began = time.perf_counter()
        trainer = make(case, contestant, shape, args, Path(folder))
        loaded = time.perf_counter() - began
        clock = _clock(args.device)
        trainer.add_callback(clock)
        if case == "grpo-update":
            batch = completions(shape, args.device)
            trainer._generate_and_score_completions = lambda rows: dict(batch)
        elif case == "grpo":
            _watch_rollouts(trainer, clock, args.device)
        cases.tidy()
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if args.profile:
            _profiled(trainer)
        trainer.train()
        warm, timed = STEPS[case]
        taken = clock.taken[warm : warm + timed]
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        cuda = args.device == "cuda"
        return {
            "step_s": round(statistics.median(taken), 4), "steps": [round(t, 4) for t in clock.taken],
            "rollout_s": round(statistics.median(clock.rollouts[warm:] or [0.0]), 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / cases.GIB, 3) if cuda else 0.0,
            "reserved_gib": round(torch.cuda.max_memory_reserved() / cases.GIB, 3) if cuda else 0.0,
            "loss": round(losses[0], 7), "load_s": round(loaded, 1), "shape": shape,
            "memory": args.memory if contestant == "ft-small" else None,
            "gpu": torch.cuda.get_device_name() if cuda else "none", "versions": fast_path.versions(),
        }  # fmt: skip


def _clock(device: str) -> Any:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds of each step, and of the rollouts within."""

        def __init__(self) -> None:
            self.taken: list[float] = []
            self.rollouts: list[float] = []

        @staticmethod
        def now() -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self._began = self.now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.taken.append(self.now() - self._began)

    return Clock()


def _watch_rollouts(trainer: Any, clock: Any, device: str) -> None:
    own = trainer._generate_single_turn

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = clock.now()
        made = own(*args, **kwargs)
        clock.rollouts.append(clock.now() - began)
        return made

    trainer._generate_single_turn = timed


def _profiled(trainer: Any) -> None:
    """Print what the GPU did in the second step."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Profile(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.profile = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
                self.profile.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                self.profile.__exit__(None, None, None)
                print(
                    self.profile.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=70)
                )

    trainer.add_callback(Profile())


def completions(shape: dict[str, int], device: str) -> dict[str, Any]:
    """One group's completions, scored, as TRL's GRPO trainer has them after a rollout."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = shape["rows"]

    def tokens(length: int) -> Any:
        return torch.randint(3, cases.VOCABULARY[device] - 300, (rows, length), generator=generator).to(device)

    prompt, answer = tokens(shape["prompt"])[:1].expand(rows, -1), tokens(shape["answer"])
    advantages = torch.randn(rows, generator=generator).to(device)
    return {
        "prompt_ids": prompt.contiguous(), "prompt_mask": torch.ones_like(prompt), "completion_ids": answer,
        "completion_mask": torch.ones_like(answer), "advantages": advantages,
        "num_items_in_batch": torch.tensor(answer.numel(), device=device),
    }  # fmt: skip


def texts(case: str, shape: dict[str, int]) -> list[dict[str, str]]:
    """Rows whose tokens the model's tokenizer counts as wanted: it has one for each ASCII letter."""
    import random

    chance = random.Random(0)
    warm, timed = STEPS[case]

    def text(length: int) -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz ", k=length - 1)) + "x"

    count = (warm + timed) * shape["rows"] // shape["group"]
    if not case.startswith("dpo"):
        return [{"prompt": text(shape["prompt"])} for _ in range(count)]
    # the answer's last token is the end-of-sequence token, which both sides append
    return [
        {"prompt": text(shape["prompt"]), "chosen": text(shape["answer"] - 1), "rejected": text(shape["answer"] - 1)}
        for _ in range(count)
    ]


def nothing(completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs nothing and differs."""
    return [float(sum(map(ord, text[-8:])) % 7) for text in completions]


def _ft(case: str, contestant: str, shape: dict[str, int], args: argparse.Namespace, folder: Path) -> Any:
    from ft_core.config.load import check_config, method_settings
    from ft_core.models import find_model, load_tokenizer, pick_device
    from ft_core.plugins import MethodSpec, registry, resolve
    from ft_core.runs import Run
    from ft_core.training.arguments import trainer_arguments
    from ft_core.training.job import Job, build_trainer
    from ft_core.training.optimizers import optimizer_of
    from ft_core.training.prepare import prepare_model
    from ft_core.training.speed import check_first_step, recomputes, speed_up

    method = "dpo" if case.startswith("dpo") else "grpo"
    data = folder / "rows.jsonl"
    rows = texts(case, shape)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"beta": 0.1} if method == "dpo" else {
        "num_generations": shape["group"], "max_completion_length": shape["answer"],
    }  # fmt: skip
    config = check_config(
        {
            "model": str(args.folder), "method": method, "data": str(data), "packing": False, method: section,
            "quantization": "nf4" if args.device == "cuda" else "none", "max_length": shape["prompt"] + shape["answer"],
            "lora": {"r": RANK, "alpha": RANK}, "output": str(folder / "run"),
            **({"rewards": [f"{Path(__file__).resolve()}:nothing"]} if method == "grpo" else {}),
            **({"memory": f"{args.memory:g}GiB"} if contestant == "ft-small" else {}),
            "training": {"max_steps": sum(STEPS[case]), "batch_size": shape["micro"],
                         "gradient_accumulation": shape["rows"] // shape["micro"]},
        }
    )  # fmt: skip
    source, device, spec = find_model(config.model), pick_device(), registry().get(MethodSpec, method)
    model = prepare_model(config, spec, source, device, _quiet)
    speed_up(model, device, _print)
    arguments = trainer_arguments(
        config, Run(str(folder / "run")), device, evaluates=False,
        recompute=recomputes(model, config, device, _print), optimizer=optimizer_of(config, None),
    )  # fmt: skip
    arguments |= {"save_strategy": "no"}
    job = Job(
        config=config, settings=method_settings(config), model=model, tokenizer=load_tokenizer(source),
        train_rows=rows, eval_rows=None, arguments=arguments, callbacks=[], say=_print,
    )  # fmt: skip
    trainer = build_trainer(resolve(spec.trainer), job)
    if args.device == "cuda":
        check_first_step(trainer, config, _print)
    return trainer


def _print(line: str) -> None:
    print(f"# {line}", file=sys.stderr, flush=True)


def _quiet(line: str) -> None:
    """What loading says."""


def _trl(case: str, contestant: str, shape: dict[str, int], args: argparse.Namespace, folder: Path) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    cuda = args.device == "cuda"
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.bfloat16, device_map={"": 0 if cuda else "cpu"},
        quantization_config=four_bits if cuda else None,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=fast_path.TARGETS)
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "max_steps": sum(STEPS[case]), "per_device_train_batch_size": shape["micro"],
        "gradient_accumulation_steps": shape["rows"] // shape["micro"], "report_to": "none",
        "optim": "adamw_8bit", "logging_steps": 1, "save_strategy": "no", "learning_rate": 2e-4, "seed": 0,
        "disable_tqdm": True, "use_cpu": not cuda,
    }  # fmt: skip
    rows, tokenizer = Dataset.from_list(texts(case, shape)), AutoTokenizer.from_pretrained(args.folder)
    if case.startswith("dpo"):
        return DPOTrainer(
            model, args=DPOConfig(**common, max_length=None, beta=0.1), train_dataset=rows,
            processing_class=tokenizer, peft_config=lora,
        )  # fmt: skip
    batching = contestant == "trl-batching"
    arguments = GRPOConfig(
        **common, num_generations=shape["group"], max_completion_length=shape["answer"],
        use_transformers_continuous_batching=batching,
    )  # fmt: skip
    return GRPOTrainer(
        model, reward_funcs=[nothing], args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
