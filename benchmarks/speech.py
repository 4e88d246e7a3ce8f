"""Whisper's training steps beside transformers' and PEFT's, on one GPU: python benchmarks/speech.py [...]

A Whisper of the shape of large-v3 with random weights in bfloat16, LoRA of rank 32 (on all linear layers, or with
--targets on some), PEFT's adapters in float32, bitsandbytes' 8-bit AdamW, a bare loop under autocast to bfloat16. A
batch is sixteen times 30 seconds: random features ``[16, 128, 3000]`` and so many random tokens to write, all trained.

Contestants:
- ft: the layers keep what the card's memory allows. ft-small: inputs of layers wait in the host's memory, the rest is
  computed again. ft-recompute: they wait on the GPU.
- transformers: its own layers with torch's attention and PEFT. transformers-checkpointing: the same, computed again.

The rate is the median of ten steps after five; the most memory is torch's own count of what was allocated in any. The
first step's loss is in each row: adapters begin as zero, so all compute the same number, but for rounding. One that
fails is a row with its error. Rows are added to benchmarks/results/speech.jsonl. What an Orpheus costs is measured by
benchmarks/packed.py --shape orpheus-3b.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cases
import fast_path

RESULTS = Path(__file__).with_name("results") / "speech.jsonl"
CONTESTANTS = ("ft", "ft-recompute", "ft-small", "transformers", "transformers-checkpointing")
BATCH, RANK, TEXT = 16, 32, 128
WARM, TIMED = 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--targets", default="all-linear", help="names of layers, comma-separated")
    parser.add_argument("--text", type=int, default=TEXT, help="tokens that are written of each 30 seconds")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--seconds", type=float, default=None, help="begin no contestant that would not end by then")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a tiny model, to test this program
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--one", metavar="CONTESTANT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := sorted(set(args.contestants.split(",")) - set(CONTESTANTS)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}")
    if args.one:
        print(json.dumps(run(args.one, args)), flush=True)
        return
    limit = cases.Limit.of(args.seconds)
    for contestant in args.contestants.split(","):
        if not limit.allows(contestant, 45):
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--one", contestant]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if args.profile:
            print("\n".join(line for line in done.stdout.splitlines() if not line.startswith("{")))
        row: dict[str, Any] = {"contestant": contestant}
        if done.returncode or not lines:
            row |= {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
            sys.stderr.write(done.stderr[-4000:])
        else:
            row |= json.loads(lines[-1])
        facts = {"date": cases.now(), "model": "whisper-large-v3", "rank": RANK, "targets": args.targets}
        cases.write(args.results, {**facts, **row})
        print(table_line(row), flush=True)


def table_line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in row:
        return f"{row['contestant']:27} {row['error']}"
    memory = f"{row['peak_gib']:6.2f} GiB ({row['reserved_gib']:.2f} reserved)"
    return (
        f"{row['contestant']:27} {row['step_s'] * 1e3:7.1f} ms a step  {row['audio_per_second']:7.0f} s of audio a "
        f"second  {memory}  first loss {row['loss']:.5f}  {row['recorded'] or ''}"
    )


def model_of(args: argparse.Namespace) -> Any:
    """A Whisper of large-v3's shape, for a CPU a tiny one, with its adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes: dict[str, Any] = {
        "vocab_size": 51866, "d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "num_mel_bins": 128,
        "encoder_attention_heads": 20, "decoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120,
    }  # fmt: skip
    if args.device == "cpu":
        sizes |= {"vocab_size": 512, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 20}
        sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 50}
        sizes |= {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    config = WhisperConfig(
        **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, use_cache=False
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = WhisperForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))


def run(contestant: str, args: argparse.Namespace) -> dict[str, Any]:
    """One contestant's steps."""
    import torch

    cuda = args.device == "cuda"
    model = model_of(args).train()
    path = None
    if contestant.startswith("ft"):
        from ft_speech.fast.whisper import enable

        path = enable(model)
        path.choose({"ft": "auto", "ft-small": "offload", "ft-recompute": "recompute"}[contestant])  # type: ignore[arg-type]
    elif contestant == "transformers-checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = fast_path.adamw8bit(contestant, [p for p in model.parameters() if p.requires_grad])
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    features = torch.randn(shape, generator=generator).to(args.device, torch.bfloat16)
    labels = torch.randint(4, config.vocab_size, (BATCH, args.text), generator=generator).to(args.device)
    cases.tidy()
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def step() -> Any:
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(input_features=features, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    seconds, losses = [], []
    for _ in range(WARM + TIMED):
        began = _now(cuda)
        loss = step()
        seconds.append(_now(cuda) - began)
        losses.append(loss.item())
    median = statistics.median(seconds[WARM:])
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    kept = None if path is None else [path.chosen.of(layer) for layer in path.layers]
    if args.profile and cuda:
        profiled(step)
        if path is not None:
            path.graphs.on = False  # a recorded step's kernels do not say what they are of
            profiled(step)
    return {
        "batch": BATCH, "text": args.text, "step_s": round(median, 5), "steps": [round(s, 4) for s in seconds],
        "audio_per_second": round(BATCH * 30 / median), "peak_gib": round(peak / cases.GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / cases.GIB, 3) if cuda else 0.0,
        "loss": round(losses[0], 6), "last_loss": round(losses[-1], 6),
        "recorded": None if path is None else (path.graphs.replays, path.graphs.reason),
        "layers_keep": None if kept is None else {choice: kept.count(choice) for choice in sorted(set(kept))},
        "gpu": torch.cuda.get_device_name() if cuda else "none", "versions": fast_path.versions(),
    }  # fmt: skip


def profiled(step: Any) -> None:
    """Print the kernels of a step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], record_shapes=True) as found:
        step()
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=110))
    shapes = found.key_averages(group_by_input_shape=True)
    print(shapes.table(sort_by="self_cuda_time_total", row_limit=40, max_shapes_column_width=120))


def _now(cuda: bool) -> float:
    import torch

    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
