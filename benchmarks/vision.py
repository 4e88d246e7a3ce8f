"""Training steps on images beside TRL's and Unsloth's, on one GPU: python benchmarks/vision.py --work DIR [...]

A model of the shape of Qwen3-VL-8B (text model and tower, random weights, made once in DIR), nf4, LoRA of rank 16 on
all linear layers of the language model, the vision tower and its merger frozen, bitsandbytes' 8-bit AdamW. A batch is
four conversations of one image of 1024 x 1024 (1,024 tokens) and 256 tokens of text, of which 128 are the answer and
trained. Images lie as JPEG files; each contestant reads and processes them by its own collator, in four workers.

Each contestant runs in a process of its own, through its own trainer's ``train``. A step is timed from the end of the
one before to its own end, with the GPU waited for at both, so that waiting for data counts; the most memory is torch's
own count of what was allocated in ``train``. Rows are added to benchmarks/results/vision.jsonl.

Contestants:
- ft: the activations that its planner chooses by the card's memory. ft-small: the same under --memory GiB, a bound.
- trl: TRL's SFTTrainer and collator, prompt and completion, its defaults (checkpointing).
- unsloth: its FastVisionModel and collator with TRL's trainer, as its notebooks have it. unsloth-trl: TRL's collator.

One that isn't installed, or fails, is a row with its error. The first step's loss is in each row: adapters begin as
zero, so all compute the same number, but for rounding.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cases
import fast_path

RESULTS = Path(__file__).with_name("results") / "vision.jsonl"
CONTESTANTS = ("ft", "ft-small", "trl", "unsloth", "unsloth-trl")
RANK, BATCH, WORKERS = 16, 4, 4
WARM, TIMED = 4, 10
SIDE, TEXT, ANSWER = 1024, 256, 128
"""Pixels of an image's side, tokens of a conversation's text, and those of it which are the answer."""

WORDS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
SEEING = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AROUND = len("user\n") + len("assistant\n") + len("\n\n") + 4
"""Tokens of text that the template adds: a token for each letter, and four marks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model and the images are made, and kept")
    parser.add_argument("--contestants", default="ft,trl,unsloth", help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that ft-small may use")
    parser.add_argument("--lend", action="store_true", help="ft's frozen weights live in the host's memory")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--seconds", type=float, default=None, help="begin no contestant that would not end by then")
    parser.add_argument("--unsloth-path", help="put before PYTHONPATH for unsloth alone, which wants an older trl")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a tiny model, to test this program
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--one", metavar="CONTESTANT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := sorted(set(args.contestants.split(",")) - set(CONTESTANTS)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}")
    args.folder = args.work / f"qwen3-vl-{'8b' if args.device == 'cuda' else 'tiny'}-{args.layers}"
    if args.one == "make":
        make(args.folder, args.layers, args.device)
        return
    if args.one:
        print(json.dumps(run(args.one, args)), flush=True)
        return
    if not (args.folder / "config.json").is_file():
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", "make"], check=True)
    compete(args)


def compete(args: argparse.Namespace) -> None:
    """Let each contestant run, and write down what it says."""
    limit = cases.Limit.of(args.seconds)
    facts = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "layers": args.layers}
    rows = []
    for contestant in args.contestants.split(","):
        if not limit.allows(contestant, 90):
            continue
        environment = dict(os.environ)
        if contestant.startswith("unsloth") and args.unsloth_path:
            paths = [args.unsloth_path, environment.get("PYTHONPATH")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        command = [sys.executable, __file__, *sys.argv[1:], "--one", contestant]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if args.profile:
            print("\n".join(line for line in done.stdout.splitlines() if not line.startswith("{")))
        row: dict[str, Any] = {"contestant": contestant}
        sys.stderr.write("\n".join(line for line in done.stderr.splitlines() if line.startswith("# ")) + "\n")
        if done.returncode or not lines:
            row |= {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
            sys.stderr.write(done.stderr[-6000:])
        else:
            row |= json.loads(lines[-1])
        rows.append(row)
        cases.write(args.results, {**facts, **row})
        print(table_line(row), flush=True)


def table_line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in row:
        return f"{row['contestant']:12} {row['error']}"
    return (
        f"{row['contestant']:12} {row['step_s'] * 1e3:7.0f} ms a step ({row['busy_s'] * 1e3:.0f} without data)  "
        f"{row['tokens_per_second']:7.0f} tok/s  {row['peak_gib']:6.2f} GiB  first loss {row['loss']:.5f}"
    )


def make(folder: Path, layers: int, device: str) -> None:
    """A model of Qwen3-VL-8B's shape with random weights, or for a CPU a tiny one, its processor, and the images."""
    import torch
    import transformers as t

    folder.mkdir(parents=True, exist_ok=True)
    processor(folder)
    pictures(folder)
    ids = t.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(SEEING)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    text: dict[str, Any] = {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                            "mrope_interleaved": True},
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 4096, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    if device == "cpu":
        text |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        text |= {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 4}
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [4, 2, 2]}
        vision |= {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"deepstack_visual_indexes": [0, 1, 2]}
    config = t.Qwen3VLConfig(
        text_config={**text, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}, vision_config=vision,
        tie_word_embeddings=False, dtype="bfloat16", architectures=["Qwen3VLForConditionalGeneration"],
        **dict(zip(names, ids, strict=True)),
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = t.Qwen3VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    fast_path.write(model.state_dict(), folder)
    config.save_pretrained(folder)  # last: it tells that all is there


def processor(folder: Path) -> None:
    """A tokenizer with a token for each byte and the family's marks, and the files of Qwen3-VL's processors."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate([*WORDS, *letters])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*WORDS, *SEEING])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=WORDS[0], eos_token=WORDS[1], pad_token=WORDS[2], model_max_length=262144,
        extra_special_tokens={"image_token": SEEING[2], "video_token": SEEING[3], "vision_bos_token": SEEING[0],
                              "vision_eos_token": SEEING[1]},
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    images = {
        "size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    kinds = {"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**images, **kinds}))
    video = {**images, "processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def pictures(folder: Path) -> None:
    """As many images as a run sees, of smooth colours, as JPEG files."""
    import numpy as np
    from PIL import Image

    for number in range(BATCH * (WARM + TIMED)):
        coarse = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.jpg", quality=92)


def conversations(folder: Path) -> list[tuple[str, str, str]]:
    """The path of an image, a question and an answer for each row."""
    chance = random.Random(0)

    def text(length: int) -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=length))

    count = BATCH * (WARM + TIMED)
    return [(str(folder / f"{i}.jpg"), text(TEXT - ANSWER - AROUND), text(ANSWER)) for i in range(count)]


def run(contestant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One contestant's steps."""
    if contestant.startswith("unsloth"):
        import unsloth  # noqa: F401 (it wants to be first)
    import torch

    cuda = args.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        builders = {"ft": _ft, "ft-small": _ft, "trl": _trl}
        began = time.perf_counter()
        trainer = builders.get(contestant, _unsloth)(contestant, args, Path(folder))
        loaded = time.perf_counter() - began
        clock = _clock(cuda)
        trainer.add_callback(clock)
        if args.profile:
            import rl

            rl._profiled(trainer)
        _watch(trainer, clock)
        cases.tidy()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        ends, steps = clock.ends, clock.steps
        whole = [after - before for before, after in itertools.pairwise(ends)][WARM - 1 :]
        median = statistics.median(whole)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        path = _path(trainer) if contestant.startswith("ft") else None
        kept = {} if path is None else fast_path.chosen(path) | {"lent_gib": _lent(path)}
        return {
            "step_s": round(median, 4), "busy_s": round(statistics.median(steps[WARM:]), 4),
            "steps": [round(t, 4) for t in whole], "tokens_per_second": round(clock.tokens / median),
            "tokens": clock.tokens, "shapes": clock.shapes,
            "peak_gib": round(torch.cuda.max_memory_allocated() / cases.GIB, 3) if cuda else 0.0,
            "reserved_gib": round(torch.cuda.max_memory_reserved() / cases.GIB, 3) if cuda else 0.0,
            "loss": round(losses[0], 6), "last_loss": round(losses[-1], 6), "load_s": round(loaded, 1),
            "memory": args.memory if contestant == "ft-small" else None, **kept,
            "gpu": torch.cuda.get_device_name() if cuda else "none", "versions": fast_path.versions(),
        }  # fmt: skip


def _path(trainer: Any) -> Any:
    from ft_core import fast

    model = trainer.accelerator.unwrap_model(trainer.model)
    return model if fast.fast_path_of(model) is not None else None


def _lent(model: Any) -> float:
    """GiB of weights that live in the host's memory."""
    from ft_core import fast

    path = fast.fast_path_of(model)
    return 0.0 if path is None or path.lent is None else round(path.lent.bytes / cases.GIB, 2)


def _clock(cuda: bool) -> Any:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """When steps began and ended, and what a batch held."""

        def __init__(self) -> None:
            self.steps: list[float] = []
            self.ends: list[float] = []
            self.shapes: dict[str, list[int]] = {}
            self.tokens = 0

        @staticmethod
        def now() -> float:
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self._began = self.now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(self.now())
            self.steps.append(self.ends[-1] - self._began)

    return Clock()


def _watch(trainer: Any, clock: Any) -> None:
    """Note the shapes of the first batch: that all contestants are given the same."""
    own = trainer.training_step

    def watched(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        if not clock.shapes:
            clock.shapes = {k: list(v.shape) for k, v in inputs.items() if hasattr(v, "shape")}
            clock.shapes["trained"] = [int((inputs["labels"] != -100).sum())]
            clock.tokens = inputs["input_ids"].numel()
        return own(model, inputs, *rest, **more)

    trainer.training_step = watched


def _say(line: str) -> None:
    print(f"# {line}", file=sys.stderr, flush=True)


def _ft(contestant: str, args: argparse.Namespace, folder: Path) -> Any:
    from ft_core.config.load import check_config, method_settings
    from ft_core.models import find_model, load_tokenizer, pick_device
    from ft_core.plugins import MethodSpec, registry, resolve
    from ft_core.runs import Run
    from ft_core.training.arguments import trainer_arguments
    from ft_core.training.job import Job, build_trainer
    from ft_core.training.optimizers import optimizer_of
    from ft_core.training.prepare import prepare_model, prepare_processor, prepare_rows
    from ft_core.training.speed import check_first_step, foresee, plan_ahead, recomputes, speed_up

    data = folder / "rows.jsonl"
    with open(data, "w") as out:
        for image, question, answer in conversations(args.folder):
            asked = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": turns}) + "\n")
    config = check_config(
        {
            "model": str(args.folder), "task": "vision", "method": "sft", "data": str(data), "packing": False,
            "quantization": "nf4" if args.device == "cuda" else "none", "max_length": 2048,
            "lora": {"r": RANK, "alpha": RANK}, "output": str(folder / "run"), "vision": {"workers": WORKERS},
            **({"memory": f"{args.memory:g}GiB"} if contestant == "ft-small" else {}),
            "training": {"max_steps": WARM + TIMED, "batch_size": BATCH, "gradient_accumulation": 1},
        }
    )  # fmt: skip
    source, device, spec = find_model(config.model), pick_device(), registry().get(MethodSpec, config.method)
    planned = foresee(config, source, device, _say)
    tokenizer = load_tokenizer(source)
    processor = prepare_processor(config, source, tokenizer)
    rows, _ = prepare_rows(config, spec, (), _say)
    model = prepare_model(config, spec, source, device, _say)
    speed_up(model, device, _say)
    arguments = trainer_arguments(
        config, Run(str(folder / "run")), device, evaluates=False,
        recompute=recomputes(model, config, device, _say, planned), optimizer=optimizer_of(config, planned),
    )  # fmt: skip
    arguments |= {"save_strategy": "no", "logging_steps": 1}
    job = Job(
        config=config, settings=method_settings(config), model=model, tokenizer=tokenizer, train_rows=rows,
        eval_rows=None, arguments=arguments, callbacks=[], say=_say, processor=processor,
    )  # fmt: skip
    trainer = build_trainer(resolve(spec.trainer), job)
    plan_ahead(trainer, _say)
    if args.lend:
        from ft_core import fast

        path = fast.fast_path_of(model)
        assert path is not None
        if path.lent is None:
            path.lend()
        assert path.lent is not None
        _say(f"{path.lent.bytes / cases.GIB:.2f} GiB of weights live in the host's memory")
    if args.device == "cuda":
        check_first_step(trainer, config, _say)
    return trainer


def _arguments(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"), "max_steps": WARM + TIMED, "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1, "report_to": "none", "optim": "adamw_8bit", "logging_steps": 1,
        "save_strategy": "no", "learning_rate": 2e-4, "seed": 0, "disable_tqdm": True,
        "use_cpu": args.device != "cuda", "dataloader_num_workers": WORKERS, "max_length": None,
    }  # fmt: skip


def _pairs(args: argparse.Namespace) -> Any:
    """TRL's rows: a prompt and its completion, with images that are read when a batch is made."""
    from datasets import Dataset, Image, Sequence

    found = conversations(args.folder)
    return Dataset.from_dict(
        {
            "images": [[image] for image, _, _ in found],
            "prompt": [[{"role": "user", "content": question}] for _, question, _ in found],
            "completion": [[{"role": "assistant", "content": answer}] for _, _, answer in found],
        }
    ).cast_column("images", Sequence(Image()))


def _trl(contestant: str, args: argparse.Namespace, folder: Path) -> Any:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    cuda = args.device == "cuda"
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(
        args.folder, dtype=torch.bfloat16, device_map={"": 0 if cuda else "cpu"},
        quantization_config=four_bits if cuda else None,
    )  # fmt: skip
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    return SFTTrainer(
        model, args=SFTConfig(**_arguments(args, folder)), train_dataset=_pairs(args),
        processing_class=AutoProcessor.from_pretrained(args.folder), peft_config=lora,
    )  # fmt: skip


def _unsloth(contestant: str, args: argparse.Namespace, folder: Path) -> Any:
    from unsloth import FastVisionModel
    from unsloth.trainer import UnslothVisionDataCollator

    model, processor = FastVisionModel.from_pretrained(
        str(args.folder), load_in_4bit=True, use_gradient_checkpointing="unsloth", max_seq_length=2048
    )
    model = FastVisionModel.get_peft_model(
        model, finetune_vision_layers=False, finetune_language_layers=True, finetune_attention_modules=True,
        finetune_mlp_modules=True, r=RANK, lora_alpha=RANK, lora_dropout=0, bias="none", random_state=0,
    )  # fmt: skip
    from trl import SFTConfig, SFTTrainer

    FastVisionModel.for_training(model)
    if contestant == "unsloth-trl":
        return SFTTrainer(
            model, args=SFTConfig(**_arguments(args, folder)), train_dataset=_pairs(args), processing_class=processor
        )
    from PIL import Image

    rows = []
    for image, question, answer in conversations(args.folder):
        asked = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
        told = [{"type": "text", "text": answer}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
    collator = UnslothVisionDataCollator(
        model, processor, max_seq_length=2048, resize=(SIDE, SIDE), train_on_responses_only=True,
        instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n",
    )  # fmt: skip
    more = {"remove_unused_columns": False, "dataset_text_field": "",
            "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": 2048}  # fmt: skip
    return SFTTrainer(
        model, args=SFTConfig(**{**_arguments(args, folder), **more}), train_dataset=rows, data_collator=collator,
        processing_class=processor.tokenizer,
    )  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
