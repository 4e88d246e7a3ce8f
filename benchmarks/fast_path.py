"""Training steps on the fast path beside its peers, on one GPU: python benchmarks/fast_path.py --work DIR [...]

A model of the shape of Llama 3.1 8B with random weights is made once in DIR (16 GB). Each contestant runs in a process
of its own: a bare loop, the same optimizer (bitsandbytes' 8-bit AdamW, or torch's fused one), labels on every token,
LoRA of rank 16 on all linear layers; the median of the steps after the first few, of which the time until backward has
ended on the GPU is given too, and torch's own count of the most memory allocated. A row for each is added to
benchmarks/results/fast_path.jsonl, and a table is printed.

Contestants: ft, ft-recompute (ft's layers, each computed again in backward), transformers (with PEFT and
checkpointing), liger, unsloth, unsloth-keep (its checkpointing off). One that isn't installed is a row with its error.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "fast_path.jsonl"
CONTESTANTS = ("ft", "ft-recompute", "transformers", "liger", "unsloth", "unsloth-keep")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIMIZERS = ("adamw8bit", "fused")
WARM, TIMED = 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model is made, and kept")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--quantization", default="none,nf4")
    parser.add_argument("--shapes", default="2x2048,1x8192", help="rows x tokens, comma-separated")
    parser.add_argument("--optimizers", default="adamw8bit", help=f"comma-separated, of {', '.join(OPTIMIZERS)}")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--unsloth-path", help="put before PYTHONPATH for unsloth alone, which wants an older trl")
    parser.add_argument("--make", action="store_true", help="make the model and stop")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "QUANTIZATION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    folder = args.work / f"llama-8b-{args.layers}"
    if args.one:
        run(*args.one, folder, shapes, args.optimizers.split(","), args.profile)
        return
    if not (folder / "config.json").is_file():
        make(folder, args.layers)
    if args.make:
        return
    rows: list[dict[str, Any]] = []
    RESULTS.parent.mkdir(exist_ok=True)
    facts = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "layers": args.layers}
    for quantization in args.quantization.split(","):
        for contestant in args.contestants.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", contestant, quantization]
            environment = dict(os.environ)
            if contestant.startswith("unsloth") and args.unsloth_path:
                paths = [args.unsloth_path, environment.get("PYTHONPATH")]
                environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            if args.profile:
                print("\n".join(line for line in done.stdout.splitlines() if not line.startswith("{")))
            if done.returncode:
                words = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
                lines.append({"contestant": contestant, "quantization": quantization, "error": words[-1][:300]})
            rows += lines
            for line in lines:
                print(table_line(line), flush=True)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({**facts, **line}) + "\n" for line in lines)
    print()
    for row in rows:
        print(table_line(row))


def table_line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['contestant']:13} {row['quantization']:4}"
    if "error" in row:
        return f"{head} {row['error']}"
    return (
        f"{head} {row['rows']}x{row['tokens']:<6} {row['tokens_per_second']:8.0f} tok/s  {row['peak_gib']:6.2f} GiB  "
        f"{row['optimizer']:9} of {row['step_s'] * 1e3:.0f} ms {row['backward_s'] * 1e3:.0f} to backward's end  "
        f"first step after {row['first_step_s']:.0f} s  loss {row['loss']:.4f}"
    )


def make(folder: Path, layers: int) -> None:
    """A model of the shape of Llama 3.1 8B with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters=rope, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=False,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer(folder)


def tokenizer(folder: Path) -> None:
    """A tokenizer for those contestants that want one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|bos|>", "<|eos|>", "<|pad|>", *letters]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **words, model_max_length=131072).save_pretrained(folder)


def load(contestant: str, quantization: str, folder: Path, longest: int) -> Any:
    """The model with its adapter, as the contestant's users have it."""
    if contestant.startswith("unsloth"):
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=longest, load_in_4bit=quantization == "nf4",
            load_in_16bit=quantization == "none",
        )  # fmt: skip
        checkpointing = False if contestant == "unsloth-keep" else "unsloth"
        return FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS,
            use_gradient_checkpointing=checkpointing, max_seq_length=longest,
        )  # fmt: skip
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if contestant.startswith("ft"):
        import ft_core as ft

        model, _ = ft.load(str(folder), quantization=quantization, dtype="bfloat16")
        model.config.use_cache = False
        model = ft.add_lora(model, r=16, alpha=16)
        if contestant == "ft-recompute":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if contestant == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa",
        quantization_config=four_bits if quantization == "nf4" else None,
    )  # fmt: skip
    model.config.use_cache = False
    again = {"use_reentrant": False}
    if quantization == "nf4":
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=again)
        for parameter in model.parameters():  # it makes norms and head fp32; TRL makes them 16-bit again
            if parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(torch.bfloat16)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))


def run(
    contestant: str,
    quantization: str,
    folder: Path,
    shapes: list[tuple[int, ...]],
    optimizers: list[str],
    profile: bool,
) -> None:
    """Print a line of JSON for each shape."""
    began = time.perf_counter()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if contestant.startswith("unsloth"):
        import unsloth  # noqa: F401 (it wants to be first)
    import bitsandbytes
    import torch

    model = load(contestant, quantization, folder, max(tokens for _, tokens in shapes)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    first = 0.0
    for name, (rows, tokens) in itertools.product(optimizers, shapes):
        if name == "fused":
            optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        else:
            optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=1e-4)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds, backward, loss = [], [], 0.0
        for step in range(WARM + TIMED):
            ids = torch.randint(3, 128000, (rows, tokens), generator=torch.Generator().manual_seed(step)).cuda()
            mask = {} if contestant.startswith(("unsloth", "ft")) else {"attention_mask": torch.ones_like(ids)}
            done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start = time.perf_counter()
            done[0].record()
            with torch.autocast("cuda", torch.bfloat16):
                out = model(input_ids=ids, labels=ids.clone(), **mask).loss
            out.backward()
            done[1].record()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            backward.append(done[0].elapsed_time(done[1]) / 1e3)
            first = first or time.perf_counter() - began
            loss = out.item()
        median = statistics.median(seconds[WARM:])
        row = {
            "contestant": contestant, "quantization": quantization, "rows": rows, "tokens": tokens,
            "optimizer": name, "step_s": round(median, 4), "backward_s": round(statistics.median(backward[WARM:]), 4),
            "tokens_per_second": round(rows * tokens / median), "first_step_s": round(first, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "loss": round(loss, 5),
            "gpu": torch.cuda.get_device_name(), "versions": versions(),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        if profile:
            from torch.profiler import ProfilerActivity
            from torch.profiler import profile as profiler

            with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
                with torch.autocast("cuda", torch.bfloat16):
                    out = model(input_ids=ids, labels=ids.clone()).loss
                out.backward()
                torch.cuda.synchronize()
            print(profiled.key_averages().table(sort_by="cuda_time_total", row_limit=28, max_name_column_width=60))


def versions() -> dict[str, str]:
    """Of what took part."""
    found = {}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth", "ft-core"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
