"""What merging and converting take, beside copying the same bytes: python benchmarks/export.py --work DIR [--layers 4]

A model of Llama 3.1 8B's shape with random weights, or fewer of its layers, and an adapter of rank 16 on all linear
layers are made in DIR, on whose disk everything is written. Measured, each in a process of its own:

- copying the model's bytes twice (as merging and converting write them twice), to the disk (fsync);
- merging, without its checks, and converting the merged model to F16 and to Q4_K_M;
- with --llama-cpp LIB: `llama_model_quantize` of a prebuilt libllama, F32 to Q4_K_M, as many threads;
- with --upstream DIR: llama.cpp's convert_hf_to_gguf.py to F16, from a folder of llama.cpp's source.

Memory is the process's own (RssAnon of /proc/self/status, fifty times a second), without the page cache, in which the
files are mapped, and without what Python and its libraries took before. Rows are added to
benchmarks/results/export.jsonl. The bars: 4 GB, and 1.5 times the copies; Q4_K_M as fast as llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases

RESULTS = cases.FOLDER / "export.jsonl"
WIDTHS = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY, RANK, BLOCK = 128256, 16, 1 << 24
STAGES = ("copy", "merge", "f16", "q4_k_m", "llama.cpp", "upstream")
TINY = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where all is made; needs about six times the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated")
    parser.add_argument("--llama-cpp", type=Path, help="a folder with libllama and libggml")
    parser.add_argument("--upstream", type=Path, help="a folder of llama.cpp's source")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # to test this program
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(measured(args.stage, args)))
        return
    make(args.work, args.layers, args.tiny)
    rows = cases.Rows(args.results, "cpu", line, layers=args.layers, cores=os.cpu_count())
    for stage in args.stages.split(","):
        if (stage == "llama.cpp" and not args.llama_cpp) or (stage == "upstream" and not args.upstream):
            continue
        words = [sys.executable, __file__, *sys.argv[1:], "--stage", stage]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        rows.add(json.loads(done.stdout.splitlines()[-1]))


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    memory = "" if row["memory_gb"] is None else f", {row['memory_gb']:.2f} GB of memory"
    return f"{row['stage']}: {row['seconds']:.1f} s for {row['gb']:.2f} GB written{memory}"


def make(work: Path, layers: int, tiny: bool) -> None:
    """The base, its adapter and a tokenizer, if they are not there."""
    import torch
    import transformers

    from ft_export.writing import Tensor, write_model

    base, adapter = work / "base", work / "adapter"
    if (base / "config.json").is_file():
        return
    for folder in (base, adapter):
        folder.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(
        **(TINY if tiny else WIDTHS), num_hidden_layers=layers, vocab_size=512 if tiny else VOCABULARY,
        max_position_embeddings=8192, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def blocks(shape: tuple[int, ...]) -> Any:
        rows = max(1, BLOCK // (shape[1] if len(shape) > 1 else BLOCK))
        for start in range(0, shape[0], rows) if len(shape) > 1 else (0,):
            part = (min(rows, shape[0] - start), shape[1]) if len(shape) > 1 else shape
            yield torch.randn(part).mul_(0.02).bfloat16() if len(shape) > 1 else torch.ones(part).bfloat16()

    write_model(base, [Tensor(n, "BF16", s, lambda s=s: blocks(s)) for n, s in shapes.items()])  # type: ignore[misc]
    tokenizer().save_pretrained(base)
    low: dict[str, Any] = {}
    for name, (outer, inner) in ((n, s) for n, s in shapes.items() if n.endswith("_proj.weight")):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        low[f"{module}.lora_A.weight"] = torch.randn(RANK, inner) * 0.02
        low[f"{module}.lora_B.weight"] = torch.randn(outer, RANK) * 0.02
    from safetensors.torch import save_file

    save_file(low, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK,
        "base_model_name_or_path": str(base), "target_modules": sorted({name.split(".")[-2] for name in low}),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    config.save_pretrained(base)  # last: with it the folder is whole


def tokenizer() -> Any:
    """A small byte-level one, split by GPT-2's rules."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["Merging and converting, beside copying the same bytes."] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def measured(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one stage and watch it; libraries are loaded before."""
    import gguf  # noqa: F401
    import transformers

    transformers.logging.set_verbosity_error()
    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    work: Path = args.work
    run, out = {
        "copy": (copy_twice, work / "copies"), "merge": (merge, work / "merged"), "f16": (to_gguf, work / "f16.gguf"),
        "q4_k_m": (to_gguf, work / "q4_k_m.gguf"), "llama.cpp": (by_llama_cpp, work / "theirs.gguf"),
        "upstream": (by_upstream, work / "upstream.gguf"),
    }[stage]  # fmt: skip
    for path in (out, out.with_suffix(".proof")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    seconds, memory = run(args, out)
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if stage == "copy":
        shutil.rmtree(out)
    return {"stage": stage, "seconds": round(seconds, 2), "gb": round(size / 1e9, 3), "memory_gb": memory}


def copy_twice(args: argparse.Namespace, out: Path) -> tuple[float, None]:
    """The base's weights, twice."""
    begun = time.perf_counter()
    for number in range(2):
        (out / str(number)).mkdir(parents=True)
        for file in (args.work / "base").glob("*.safetensors"):
            copy = out / str(number) / file.name
            shutil.copyfile(file, copy)
            with copy.open("rb+") as handle:
                os.fsync(handle.fileno())
    return time.perf_counter() - begun, None


def merge(args: argparse.Namespace, out: Path) -> tuple[float, float]:
    """What ``ft_export.merge`` does before its checks, by its own parts."""
    import torch

    from ft_export.bases import copy_tokenizer
    from ft_export.checkpoints import Checkpoint
    from ft_export.merging.adapter import Adapter
    from ft_export.merging.outline import Outline
    from ft_export.merging.tensors import merged_tensors
    from ft_export.writing import write_model

    def work() -> None:
        base, adapter = args.work / "base", Adapter(args.work / "adapter")
        stored = Checkpoint(base)
        outline = Outline(base, stored, None, None)
        adapter.check_shapes(outline.shapes)
        out.mkdir()
        write_model(out, merged_tensors(stored, adapter, outline, outline.loosen(adapter), torch.bfloat16))
        outline.save_config(out, torch.bfloat16)
        copy_tokenizer(adapter.folder, base, out)

    return watched(work)


def to_gguf(args: argparse.Namespace, out: Path) -> tuple[float, float]:
    """The merged model as GGUF, without its checks."""
    from ft_export.gguf import convert

    def work() -> None:
        convert(args.work / "merged", out, type=out.stem, pre="gpt-2")
        with out.open("rb+") as handle:
            os.fsync(handle.fileno())

    return watched(work)


def by_llama_cpp(args: argparse.Namespace, out: Path) -> tuple[float, None]:
    """llama.cpp's own tool, from F32, which is written first and not counted."""
    from gguf import LlamaFileType

    from ft_export.gguf import convert
    from ft_export.gguf.mixes import FILE_TYPES

    source = args.work / "f32.gguf"
    convert(args.work / "merged", source, type="f32", pre="gpt-2")
    driver = Path(__file__).parents[1] / "packages/ft-export/tests/quantize_by_llama_cpp.py"
    code = int(LlamaFileType[FILE_TYPES["q4_k_m"].code])
    words = [sys.executable, str(driver), str(args.llama_cpp), str(source), f"{code}={out}"]
    begun = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with out.open("rb+") as handle:
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - begun
    source.unlink()
    return seconds, None


def by_upstream(args: argparse.Namespace, out: Path) -> tuple[float, None]:
    """llama.cpp's converter, from the merged model to F16; the start of Python and its libraries is counted."""
    driver = Path(__file__).parents[1] / "packages/ft-export/tests/convert_by_llama_cpp.py"
    words = [sys.executable, str(driver), str(args.upstream), str(args.work / "merged"), str(out), "f16", "gpt-2"]
    begun = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with out.open("rb+") as handle:
        os.fsync(handle.fileno())
    return time.perf_counter() - begun, None


def watched(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and the most memory (GB) above what was there before."""
    before = most = memory()
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.02):
            most = max(most, memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    over.set()
    watcher.join()
    return seconds, round(most - before, 3)


def memory() -> float:
    """The process's own memory in GB, without mapped files."""
    for text in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if text.startswith("RssAnon:"):
            return int(text.split()[1]) * 1024 / 1e9
    raise RuntimeError("/proc/self/status has no RssAnon")


if __name__ == "__main__":
    main()
