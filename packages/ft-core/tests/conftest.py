"""A tiny language model made on the spot, data for it, and `ft` called in this process or in one that may be killed."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import random
import runpy
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

LONGEST_FIRST = (
    "test_choices.py",
    "test_predictions.py",
    "test_resume.py",
    "test_replanning.py",
    "test_models.py",
    "test_decoding.py",
    "test_ahead.py",
    "test_streaming.py",
    "test_faults.py",
    "test_training.py",
    "test_in_training.py",
    "test_command.py",
)
"""Files that take longest: begun first, so that of two processes none is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


class Outcome(NamedTuple):
    """What a call of `ft` gave."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line that says what is wrong: the last on stderr, after progress."""
        return self.err.rstrip("\n").rpartition("\n")[2]


Ft = Callable[..., Outcome]
Configure = Callable[..., Path]


def _sums(count: int, *, seed: int = 0, system: str | None = None) -> list[dict[str, Any]]:
    pairs = [(a, b) for a in range(40) for b in range(40)]
    random.Random(seed).shuffle(pairs)
    first = [{"role": "system", "content": system}] if system else []
    return [
        {
            "messages": [
                *first,
                {"role": "user", "content": f"add {a} and {b}"},
                {"role": "assistant", "content": str(a + b)},
            ]
        }
        for a, b in pairs[:count]
    ]


def _write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def _metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == kind]


def _losses(run: Path) -> list[tuple[int, str]]:
    return [(row["step"], json.dumps(row["loss"])) for row in _metrics(run)]


def _make_tiny(folder: Path) -> Path:
    """A random Llama of two layers with a byte-level tokenizer of 400 tokens and a ChatML template, in safetensors.

    The head's rows of tokens that are not plain ASCII are zero, so that a greedy answer is printable text: some other
    token's logit is above zero.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([json.dumps(row) for row in _sums(400)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for token in range(len(tokenizer)):
            text = tokenizer.decode([token])
            if token < len(SPECIAL) or not (text.isascii() and text.isprintable()):
                model.lm_head.weight[token] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums() -> Callable[..., list[dict[str, Any]]]:
    """`sums(count, seed=0, system=None)`: distinct chat rows that ask for a sum of two numbers below 40."""
    return _sums


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list[Any]], Path]:
    """`write_rows(path, rows)`: JSON lines; returns the path."""
    return _write_rows


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes | None]]:
    """`tree(folder)`: every file below a folder with its content, and every folder with None."""
    return _tree


@pytest.fixture(scope="session")
def metrics() -> Callable[..., list[dict[str, Any]]]:
    """`metrics(run, kind="train")`: the rows of a run's `metrics.jsonl`, which must all parse."""
    return _metrics


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[tuple[int, str]]]:
    """`losses(run)`: (step, loss) of each training step, the loss with every digit that is in the file."""
    return _losses


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model; not to be changed."""
    return _make_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def configure(tmp_path: Path, tiny: Path) -> Configure:
    """Writes `config.yaml` (a short LoRA run on 60 sums, into `tmp_path/run`) with these keys changed; `training` is
    added to, not replaced."""

    def write(*, training: dict[str, Any] | None = None, **changes: Any) -> Path:
        data = tmp_path / "rows.jsonl"
        if not data.exists():
            _write_rows(data, _sums(60))
        values: dict[str, Any] = {
            "model": str(tiny),
            "data": str(data),
            "max_length": 64,
            "lora": {"r": 8},
            "output": str(tmp_path / "run"),
            **changes,
        }
        values["training"] = {
            "max_steps": 4,
            "batch_size": 2,
            "gradient_accumulation": 1,
            "learning_rate": 5.0e-3,
            "optimizer": "adamw_torch",
            **(training or {}),
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def ft(capsys: pytest.CaptureFixture[str]) -> Ft:
    """Calls the command line in this process."""
    from ft_core.cli import main

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse's way out
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


class Process:
    """`ft` in a process of its own, which may be killed. What it prints goes to a file."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self.process, self.log = process, log

    def wait(self, seconds: float = 120) -> Outcome:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.log.read_text()}"
        return Outcome(self.process.exitcode, "", self.log.read_text(encoding="utf-8"))

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


StartFt = Callable[..., Process]


@pytest.fixture(scope="session")
def rounding() -> float:
    """How far losses of the same training may be apart, relatively: not at all on a CPU. On a GPU a step may be
    computed kernel by kernel or replayed filled up to another length, by products of other shapes: a rounding of
    bfloat16 in some logits, which AdamW's first steps, by the signs of gradients, carry on."""
    import torch

    return 2.0**-10 if torch.cuda.is_available() else 0.0


@pytest.fixture(scope="session")
def forkserver() -> Any:
    """Processes forked from one that has imported the libraries, so that each starts at once.

    A process that was forked cannot use a GPU that its parent has looked at, so there each starts from nothing.
    """
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ft_core.training.run", "ft_core.training.sft", "trl", "peft", "datasets"])
    return context


@pytest.fixture
def start_ft(forkserver: Any, tmp_path: Path) -> Iterator[StartFt]:
    """Starts `ft WORDS` in a process that is gone at the end of the test."""
    started: list[Process] = []

    def start(*words: object) -> Process:
        log = tmp_path / f"log-{len(started)}.txt"
        given = {"WORDS": [str(word) for word in words], "LOG": str(log)}
        process = forkserver.Process(
            target=runpy.run_path, args=(str(Path(__file__).with_name("child.py")), given, "__main__")
        )
        process.start()
        started.append(Process(process, log))
        return started[-1]

    yield start
    for one in started:
        if one.running:
            one.process.kill()
            one.process.join()


RunRanks = Callable[..., list[Outcome]]


@pytest.fixture
def run_ranks(forkserver: Any, tmp_path: Path) -> RunRanks:
    """`run_ranks(file, function, *words)`: a function of a file in two processes that know their ranks; what each gave.

    Rank, number of processes and a port are in the environment, as `torchrun` sets them. Without a function the file is
    run as a program. Where one process fails the other is ended, as it may wait for the first for ever.
    """

    def run(file: Path, function: str | None, *words: object, seconds: float = 120) -> list[Outcome]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes, logs = [], [tmp_path / f"rank-{rank}.txt" for rank in range(2)]
        for rank, log in enumerate(logs):
            known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            environment = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in known.items()}}
            given = {"file": str(file), "function": function, "words": [str(word) for word in words], "log": str(log)}
            processes.append(
                forkserver.Process(
                    target=runpy.run_path,
                    args=(
                        str(Path(__file__).with_name("ranks.py")),
                        {"GIVEN": {**given, "environment": environment}},
                        "__main__",
                    ),
                )
            )
            processes[-1].start()
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in processes):
            late = time.monotonic() > end
            if late or any(process.exitcode for process in processes):
                for process in processes:
                    process.join(1)  # whoever fails at the same place says so too
                    process.kill()
            multiprocessing.connection.wait([process.sentinel for process in processes if process.is_alive()], 1)
        for process in processes:
            process.join()
        return [Outcome(p.exitcode, "", log.read_text("utf-8")) for p, log in zip(processes, logs, strict=True)]

    return run
