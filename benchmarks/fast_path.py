"""Training steps on the fast path beside its peers, on one GPU: python benchmarks/fast_path.py --work DIR [...]

A model of the shape of Llama 3.1 8B with random weights is made once in DIR (16 GB; /dev/shm is fast). Each contestant
runs in a process of its own: a bare loop, the same optimizer (bitsandbytes' 8-bit AdamW, whose updates ft queues, or
torch's fused one), labels on every token, LoRA of rank 16 on all linear layers; the median of the steps after the first
few, of which the time until backward has ended on the GPU is given too, and torch's own count of the most memory
allocated. A row for each is added to benchmarks/results/fast_path.jsonl, and a table is printed.

With --together all contestants load at the same time, on the same GPU, and then take turns: much less time in all, but
loading is not timed, and the GPU's memory has to hold all their models.

Contestants: ft (all activations kept), ft-recompute (each layer computed again in backward from its input), ft-offload
(the inputs of its halves and the attention's output in host memory), ft-capped (its choice under --cap), transformers
(with PEFT and checkpointing), liger, unsloth, unsloth-keep (its checkpointing off). One that isn't installed, or fails,
is a row with its error.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from turns import Player, my_turn, play

RESULTS = Path(__file__).with_name("results") / "fast_path.jsonl"
CONTESTANTS = (
    "ft", "ft-recompute", "ft-offload", "ft-capped", "transformers", "liger", "unsloth", "unsloth-keep",
)  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIMIZERS = ("adamw8bit", "fused")
UNSLOTH_PEAKS = {"none": {(2, 2048): 16.4, (1, 8192): 17.5}, "nf4": {(2, 2048): 6.8, (1, 8192): 7.8}}
"""GiB that Unsloth's defaults take, by quantization and shape."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model is made, and kept")
    parser.add_argument(
        "--contestants", default=",".join(CONTESTANTS), help="comma-separated; NAME@2x2048 runs that shape alone"
    )
    parser.add_argument("--quantization", default="none,nf4")
    parser.add_argument("--shapes", default="2x2048,1x8192", help="rows x tokens, comma-separated")
    parser.add_argument("--optimizers", default="adamw8bit", help=f"comma-separated, of {', '.join(OPTIMIZERS)}")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warm", type=int, default=5, help="steps before them")
    parser.add_argument("--cap", type=float, help="GiB that ft-capped may use (default: what Unsloth's defaults take)")
    parser.add_argument("--together", action="store_true", help="load all at the same time, then take turns")
    parser.add_argument("--turn", type=float, default=120.0, help="seconds after which a contestant's turn is ended")
    parser.add_argument("--unsloth-path", help="put before PYTHONPATH for unsloth alone, which wants an older trl")
    parser.add_argument("--make", action="store_true", help="make the model and stop")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0], help="of the model")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a tiny model, to test this program
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "QUANTIZATION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = {word.partition("@")[0] for word in args.contestants.split(",")}
    if unknown := sorted(names - set(CONTESTANTS)):
        parser.error(f"unknown contestants: {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}")
    args.folder = folder_of(args)
    if args.one:
        run(*args.one, args)
        return
    if not (args.folder / "config.json").is_file():
        if args.make:
            make(args.folder, args.layers, args.device, args.shape)
        else:  # in a process of its own, which gives its memory on the GPU back
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], check=True)
    if args.make:
        return
    compete(args)


def compete(args: argparse.Namespace) -> None:
    """Let the contestants run, and write down what they print."""
    facts = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "layers": args.layers}
    facts |= {"together": True} if args.together else {}
    pairs = list(itertools.product(args.quantization.split(","), args.contestants.split(",")))
    rows: list[dict[str, Any]] = []
    args.results.parent.mkdir(exist_ok=True)

    def start(quantization: str, contestant: str) -> Player:
        environment = dict(os.environ)
        if contestant.startswith("unsloth") and args.unsloth_path:
            paths = [args.unsloth_path, environment.get("PYTHONPATH")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        name, _, shape = contestant.partition("@")
        own = ["--shapes", shape] if shape else []
        return Player([sys.executable, __file__, *sys.argv[1:], *own, "--one", name, quantization], environment)

    def done(number: int, player: Player) -> None:
        quantization, contestant = pairs[number]
        lines = [json.loads(line) for line in player.lines if line.startswith("{")]
        if args.profile:
            print("\n".join(line for line in player.lines if not line.startswith("{")))
        if player.error is not None:
            name = contestant.partition("@")[0]
            lines.append({"contestant": name, "quantization": quantization, "error": player.error})
        rows.extend(lines)
        for line in lines:
            print(table_line(line), flush=True)
        with open(args.results, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({**facts, **line}) + "\n" for line in lines)

    play([functools.partial(start, *pair) for pair in pairs], done, together=args.together, turn=args.turn)
    print()
    for row in rows:
        print(table_line(row))


def table_line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = f"{row['contestant']:13} {row['quantization']:4}"
    if "error" in row:
        return f"{head} {row['error']}"
    first = f"first step after {row['first_step_s']:.0f} s  " if "first_step_s" in row else ""
    return (
        f"{head} {row['rows']}x{row['tokens']:<6} {row['tokens_per_second']:8.0f} tok/s  {row['peak_gib']:6.2f} GiB  "
        f"{row['optimizer']:9} of {row['step_s'] * 1e3:.0f} ms {row['backward_s'] * 1e3:.0f} to backward's end  "
        f"{first}loss {row['loss']:.4f}"
    )


SHAPES = ("llama-8b", "orpheus-3b")
ORPHEUS = {
    "vocab_size": 156940, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
"""Llama 3.2 3B with a codec's tokens: canopylabs/orpheus-3b."""


def folder_of(args: argparse.Namespace) -> Path:
    """Where the model of this shape lies."""
    return Path(
        args.work / f"{args.shape if args.device == 'cuda' else args.shape.split('-')[0] + '-tiny'}-{args.layers}"
    )


def make(folder: Path, layers: int, device: str, shape: str = "llama-8b") -> None:
    """A model of the shape of Llama 3.1 8B, or Orpheus 3B, with random weights, or for a CPU a tiny one."""
    from transformers import LlamaConfig

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if device == "cuda":
        sizes: dict[str, Any] = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
        sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
        if shape == "orpheus-3b":
            sizes, rope["factor"] = ORPHEUS, 32.0
    else:
        sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": shape == "orpheus-3b"}
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters=rope, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    make_from(config, folder, device)


def make_from(config: Any, folder: Path, device: str) -> None:
    """A model of a configuration of transformers', with random weights in bfloat16, and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    write(model.state_dict(), folder)
    tokenizer(folder)
    config.save_pretrained(folder)  # last: it tells that all is there


def write(state: dict[str, Any], folder: Path, files: int = 16) -> None:
    """Weights as safetensors in several files at once, which takes a third of ``save_pretrained``'s time.

    The format: the length of a JSON header in eight bytes, the header, and the numbers of each tensor.
    """
    import torch

    names = list(state)
    index: dict[str, str] = {}

    def one(number: int) -> None:
        mine, place = names[number::files], 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name in mine:
            tensor = state[name]
            assert tensor.dtype == torch.bfloat16
            end = place + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [place, end]}
            place = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in mine:
                out.write(state[name].contiguous().cpu().view(torch.uint8).numpy().data)
                index[name] = file

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(files)))
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


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


def load(contestant: str, quantization: str, args: argparse.Namespace, longest: int) -> Any:
    """The model with its adapter, as the contestant's users have it."""
    folder = args.folder
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
        return ft.add_lora(model, r=16, alpha=16)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if contestant == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0 if args.device == "cuda" else "cpu"},
        attn_implementation="sdpa",
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


def run(contestant: str, quantization: str, args: argparse.Namespace) -> None:
    """Load, wait for the turn, and print a line of JSON for each shape."""
    began = time.perf_counter()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if contestant.startswith("unsloth"):
        import unsloth  # noqa: F401 (it wants to be first)
    import torch

    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    torch.manual_seed(0)  # the same adapter for all of ft's: their losses then show that they compute the same
    model = load(contestant, quantization, args, max(tokens for _, tokens in shapes)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what loading needed for a while is the others'
    my_turn()
    optimizer: torch.optim.Optimizer
    first = 0.0
    for name, (rows, tokens) in itertools.product(args.optimizers.split(","), shapes):
        if name == "fused":
            optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        else:
            optimizer = adamw8bit(contestant, trained)
        if contestant.startswith("ft"):
            choose(contestant, quantization, model, (rows, tokens), args.cap)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds, backward, loss = [], [], 0.0
        for step in range(args.warm + args.steps):
            ids = torch.randint(3, 512 if not cuda else 128000, (rows, tokens),
                                generator=torch.Generator().manual_seed(step)).to(args.device)  # fmt: skip
            mask = {} if contestant.startswith(("unsloth", "ft")) else {"attention_mask": torch.ones_like(ids)}
            marks = [_now(cuda)]
            event = _event(cuda)
            with torch.autocast(args.device, torch.bfloat16):
                out = model(input_ids=ids, labels=ids.clone(), **mask).loss
            out.backward()
            there = _event(cuda)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            marks.append(_now(cuda))
            seconds.append(marks[1] - marks[0])
            backward.append(event.elapsed_time(there) / 1e3 if cuda else there - event)
            first = first or time.perf_counter() - began
            loss = out.item()
        median = statistics.median(seconds[args.warm :])
        row = {
            "contestant": contestant, "quantization": quantization, "rows": rows, "tokens": tokens,
            "optimizer": name, "step_s": round(median, 4),
            "backward_s": round(statistics.median(backward[args.warm :]), 4),
            "tokens_per_second": round(rows * tokens / median),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0, "loss": round(loss, 5),
            "gpu": torch.cuda.get_device_name() if cuda else "none", "versions": versions(),
        }  # fmt: skip
        if name == "adamw8bit" and contestant.startswith("ft"):
            row["queued"] = True
        if contestant.startswith("ft"):
            row |= chosen(model)
        if not args.together:
            row["first_step_s"] = round(first, 1)
        print(json.dumps(row), flush=True)
        if args.profile and cuda:
            profiled(model, ids)


def choose(contestant: str, quantization: str, model: Any, shape: tuple[int, int], cap: float | None) -> None:
    """What ft's layers keep."""
    from ft_core import fast

    path = fast.enable(model)  # on a GPU it is on already
    if contestant != "ft-capped":
        path.choose({"ft": "keep", "ft-recompute": "recompute", "ft-offload": "offload"}[contestant])
        return
    known = UNSLOTH_PEAKS[quantization]
    path.choose("auto", memory=int((cap or known.get(shape, known[2, 2048])) * 2**30))


def adamw8bit(contestant: str, trained: list[Any]) -> Any:
    """bitsandbytes' AdamW; ft's queues its updates, the same ones, as its own trainers do (ft_core.training.queued)."""
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit
    if contestant.startswith("ft"):
        from ft_core.training import queued

        kind = queued(kind)
    return kind(trained, lr=1e-4)


def chosen(model: Any) -> dict[str, Any]:
    """How many layers kept what, how much of it on the host, and whether the step was recorded."""
    from collections import Counter

    from ft_core import fast

    path = fast.fast_path_of(model)
    pinned = sum(pool.bytes for pool in path.host.pools.values()) / 2**30
    return {
        "layers_keep": dict(Counter(path.chooser.chosen)), "host_gib": round(pinned, 2),
        "head_gib": round(path.chooser.head / 2**30, 3), "recorded": path.graphs.replays,
    }  # fmt: skip


def _now(cuda: bool) -> float:
    import torch

    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _event(cuda: bool) -> Any:
    """Now, where the GPU is: an event on its stream."""
    import torch

    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def profiled(model: Any, ids: Any) -> None:
    """Print the kernels of a step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        with torch.autocast("cuda", torch.bfloat16):
            out = model(input_ids=ids, labels=ids.clone()).loss
        out.backward()
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=28, max_name_column_width=60))


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
