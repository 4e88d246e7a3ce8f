"""Merging, converting and quantizing against copying the same bytes: python benchmarks/export.py --work DIR [...]

A model of the shape of Llama 3.1 8B with few layers (--layers, 2 by default: 3 GB, most of it embeddings and head) and
a LoRA of rank 16 on all its linear layers is made once in DIR. Each job runs in a process of its own, in turns for
--rounds, and its files are flushed to the disk before its time ends. Measured are the seconds and the largest anonymous
memory (RssAnon in /proc/self/status, every 10 ms: what the process holds beyond the page cache, imports included).

Jobs: copy (the model's bytes twice, one copy after the other), merge (up to the written model, without its checks, and
with them), f16 and q4_k_m (ft_export.gguf.convert, without the check in llama.cpp), and, where their places are given,
upstream (llama.cpp's convert_hf_to_gguf.py to f16; --upstream FOLDER has it) and llama_cpp (llama_model_quantize from
the f16 file to q4_k_m; --libllama FOLDER has libllama); of these two the most resident memory is told. A row for each
is added to benchmarks/results/export.jsonl, and a table is printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "export.jsonl"
TESTS = Path(__file__).parent.parent / "packages" / "ft-export" / "tests"
JOBS = ("copy", "merge", "f16", "q4_k_m")
MODEL_FILES = "model*.safetensors"
Q4_K_M = 15
"""llama.cpp's number of that file type."""
UPSTREAM = """
import runpy, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]) / "gguf-py")]
import conversion.base
for name in vars(conversion.base).values():  # its look-up of a tokenizer by hash does not know one made here
    if isinstance(name, type) and "get_vocab_base_pre" in vars(name):
        name.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
script = str(Path(sys.argv[1]) / "convert_hf_to_gguf.py")
sys.argv = [script, sys.argv[2], "--outfile", sys.argv[3], "--outtype", "f16"]
runpy.run_path(script, run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model is made, and kept")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--upstream", type=Path, help="the folder of llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--libllama", type=Path, help="a folder with libllama and libggml")
    parser.add_argument("--shape", choices=("8b", "tiny"), default="8b", help=argparse.SUPPRESS)  # to test this program
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--one", metavar="JOB", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = args.work / f"export-{args.shape}-{args.layers}"
    if args.one:
        print(json.dumps(run(args.one, args)))
        return
    if not (args.folder / "adapter" / "adapter_config.json").is_file():
        make(args.folder, args.layers, args.shape)
    jobs = [*JOBS, *(["upstream"] if args.upstream else []), *(["llama_cpp"] if args.libllama else [])]
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "layers": args.layers,
        "shape": args.shape,
        "bytes": sum(path.stat().st_size for path in (args.folder / "model").glob(MODEL_FILES)),
        "cores": os.cpu_count(),
    }
    print(f"{facts['bytes'] / 1e9:.2f} GB, {facts['cores']} cores")
    print(f"{'':12}{'seconds':>10}{'of copy':>10}{'RssAnon GiB':>14}")
    args.results.parent.mkdir(exist_ok=True)
    for number in range(args.rounds):
        copying = 0.0
        for job in jobs:
            words = [sys.executable, __file__, *sys.argv[1:], "--one", job]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                row: dict[str, Any] = {"job": job, "error": done.stderr.strip().splitlines()[-1][:300]}
            else:
                row = json.loads(done.stdout.strip().splitlines()[-1])
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**facts, "round": number, **row}) + "\n")
            if "error" in row:
                print(f"{job:12} {row['error']}")
                continue
            copying = row["seconds"] if job == "copy" else copying
            share = row["seconds"] / copying if copying else float("nan")
            print(f"{job:12}{row['seconds']:10.1f}{share:10.2f}{row['anonymous'] / 2**30:14.2f}", flush=True)
            if "checked_seconds" in row:
                print(f"{'  checked':12}{row['checked_seconds']:10.1f}{'':10}{row['checked_anonymous'] / 2**30:14.2f}")


def make(folder: Path, layers: int, shape: str) -> None:
    """The model, its tokenizer, and an adapter."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    sys.path.insert(0, str(TESTS))
    from conftest import _train_tokenizer
    from tokenizers import pre_tokenizers

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
             "vocab_size": 128256}  # fmt: skip
    if shape == "tiny":
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "vocab_size": 512}  # fmt: skip
    tokenizer = _train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=layers, max_position_embeddings=8192, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model.name_or_path = str(folder / "model")
    wrapped = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "model")
    wrapped.save_pretrained(folder / "adapter")


class Memory:
    """The largest anonymous memory of this process so far, in bytes."""

    def __init__(self) -> None:
        self.largest = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.01)

    def look(self) -> int:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        now = int(text.split("RssAnon:")[1].split()[0]) * 1024
        self.largest = max(self.largest, now)
        return self.largest


def run(job: str, args: argparse.Namespace) -> dict[str, Any]:
    """One job in this process: seconds, and bytes of anonymous memory."""
    model, out = args.folder / "model", args.folder / f"out-{job}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    row: dict[str, Any] = {"job": job}
    if job in ("upstream", "llama_cpp"):  # processes of their own, whose memory is not asked for here
        words = {
            "upstream": [sys.executable, "-c", UPSTREAM, str(args.upstream), str(model), str(out / "f16.gguf")],
            "llama_cpp": [sys.executable, str(TESTS / "quantize_by_llama_cpp.py"), str(args.libllama),
                          str(args.folder / "out-f16" / "f16.gguf"), f"{Q4_K_M}={out / 'q4_k_m.gguf'}"],
        }[job]  # fmt: skip
        environment = {**os.environ, **({"LD_LIBRARY_PATH": str(args.libllama)} if job == "llama_cpp" else {})}
        began = time.perf_counter()
        subprocess.run(words, env=environment, check=True, stdout=sys.stderr)
        _flush(out)
        return {**row, "seconds": time.perf_counter() - began, "anonymous": _largest_of_children()}
    memory = Memory()
    if job == "copy":
        began = time.perf_counter()
        for path in sorted(model.glob(MODEL_FILES)):
            shutil.copyfile(path, out / f"1-{path.name}")
        _flush(out)
        for path in sorted(model.glob(MODEL_FILES)):
            shutil.copyfile(out / f"1-{path.name}", out / f"2-{path.name}")
        _flush(out)
    elif job == "merge":
        from ft_export import merge

        import_first()
        written: dict[str, Any] = {}

        def told(done: int, total: int, what: str) -> None:
            if what == "tensors checked" and not written:
                _flush(args.folder)
                written.update(seconds=time.perf_counter() - began, anonymous=memory.look())

        began = time.perf_counter()
        merge(args.folder / "adapter", out / "merged", progress=told)
        _flush(out / "merged")
        row = {**row, **written, "checked_seconds": time.perf_counter() - began, "checked_anonymous": memory.look()}
    else:
        from ft_export.gguf import convert

        import_first()
        began = time.perf_counter()
        convert(model, out / f"{job}.gguf", type=job)
        _flush(out)
    found = {"seconds": time.perf_counter() - began, "anonymous": memory.look(), **row}
    if job != "f16":  # which llama_cpp reads
        shutil.rmtree(out)
    return found


def import_first() -> None:
    """What is imported late by what is timed: seconds of Python, not of its work."""
    import gguf  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers

    transformers.AutoModelForCausalLM.__name__  # noqa: B018  imported when it is asked for


def _largest_of_children() -> int:
    """The largest resident memory of a child, in bytes; the page cache that it maps counts here."""
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _flush(folder: Path) -> None:
    """Until the files are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


if __name__ == "__main__":
    main()
