"""A step that runs out of memory is computed again by a tighter plan, to the same losses; once a run."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STEPS = 4


class Limit(TorchDispatchMode):
    """Counts the bytes of all storages that operations in it have made and that are alive.

    Attributes:
        most: bytes that they may have together; None bounds nothing. peak: the most that they had.
        operations: how many there were. fails_at: the one that fails, however little there is.
        failures: how often it was too much.
    """

    def __init__(self, most: int | None = None, fails_at: int | None = None) -> None:
        super().__init__()
        self.most, self.now, self.peak, self.failures = most, 0, 0, 0
        self.operations, self.fails_at = 0, fails_at
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.operations += 1
        if (self.most is not None and self.now > self.most) or self.operations == self.fails_at:
            self.failures += 1
            raise torch.OutOfMemoryError(f"out of memory: {func} would make it {self.now} bytes of {self.most}")
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(reference: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def limited(monkeypatch: Any, limit: Limit, when: Callable[[Any], bool] = lambda trainer: True) -> None:
    """Let transformers' trainers compute their micro-batches within the limit, where `when(trainer)`."""
    step = transformers.Trainer.training_step

    def within(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not when(self):
            return step(self, *args, **kwargs)
        with limit:
            return step(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", within)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_core.models import device, loading
    from ft_core.training import run

    pick = device.pick_device
    for module in (run, loading):
        monkeypatch.setattr(module, "pick_device", lambda: dataclasses.replace(pick(), dtype="float32"))


@pytest.fixture(params=["plain", "fast"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """transformers' own layers, which begin with what comes first, and the fast ones, which begin with the longest."""
    if request.param == "fast":
        from ft_core.training import speed

        monkeypatch.setattr(speed, "runs_kernels", lambda device: True)
    return str(request.param)


@pytest.fixture
def train(ft: Any, configure: Any, tmp_path: Path, write_rows: Any, sums: Any) -> Any:
    """`train(name)`: a run of updates of three micro-batches with dropout, the longest row somewhere in the midst."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and these bound the memory of a CPU's tensors")
    rows = sums(24)
    rows[11]["messages"][0]["content"] += " and then nothing more" * 9
    data = write_rows(tmp_path / "uneven.jsonl", rows)

    def call(name: str, *words: str, **training: Any) -> Any:
        training = {"max_steps": STEPS, "batch_size": 2, "gradient_accumulation": 3, "save_every": 2, **training}
        config = configure(
            data=str(data), max_length=256, packing=False, lora={"r": 8, "dropout": 0.2}, training=training,
            output=str(tmp_path / name),
        )  # fmt: skip
        return ft("train", config, *words)

    return call


def told(done: Any) -> list[str]:
    return [line for line in (done.out + done.err).splitlines() if "planned anew" in line]


def peaks(train: Any, monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> int:
    limit = Limit()
    with monkeypatch.context() as patch:
        limited(patch, limit)
        done = train(name, *words)
    assert done.code == 0, done.err
    assert not told(done)
    return limit.peak


def test_once_more_to_the_same_losses(kind, train, metrics, tmp_path, monkeypatch):
    most = peaks(train, monkeypatch, "kept")
    least = peaks(train, monkeypatch, "again", "activations=recompute")
    assert least < 0.8 * most
    limit = Limit((most + least) // 2)
    limited(monkeypatch, limit)
    done = train("bounded")
    assert done.code == 0, done.err
    assert limit.failures == 1
    (line,) = told(done)
    where = "the longest batch, before step 1" if kind == "fast" else "step "
    assert line.startswith(f"out of memory in {where}")
    assert line.endswith("; it is computed again")

    def rows(name: str) -> list[Any]:
        columns = ("step", "loss", "grad_norm", "learning_rate", "tokens", "epoch", "mean_token_accuracy")
        return [[row.get(column) for column in columns] for row in metrics(tmp_path / name)]

    assert rows("bounded") == rows("kept")
    assert len(rows("bounded")) == STEPS
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "bounded" / weights).read_bytes() == (tmp_path / "kept" / weights).read_bytes()


@pytest.mark.parametrize("number", [4, 5, 6])
def test_at_every_micro_batch(kind, number, train, metrics, tmp_path, monkeypatch):
    """Whichever of a step's micro-batches, forward or backward: what was summed before is neither lost nor doubled."""

    def run(name: str, limit: Limit) -> Any:
        calls: list[Any] = []
        with monkeypatch.context() as patch:
            limited(patch, limit, lambda trainer: calls.append(1) or len(calls) == number + (kind == "fast"))
            done = train(name)
        assert done.code == 0, done.err
        lines = [] if limit.fails_at is None else ["step 2: planned anew"]
        assert [word for line in told(done) for word in lines if word in line] == lines
        return [(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / name)]

    whole = Limit()
    kept = run("whole", whole)
    assert len(set(kept)) == STEPS
    for share in (0.2, 0.7, 0.98) if number == 5 else (0.7,):  # forward, and twice backward
        limit = Limit(fails_at=int(share * whole.operations))
        assert run(f"at-{share}", limit) == kept
        assert limit.failures == 1


def test_a_second_time_ends_the_run_in_one_line(kind, train, metrics, tree, tmp_path, monkeypatch):
    limit = Limit()
    limited(monkeypatch, limit, lambda trainer: trainer.state.global_step == 2)
    limit.most = 100_000
    done = train("run")
    assert done.code == 2
    assert limit.failures == 2
    tried = "every layer is computed again in backward" if kind == "plain" else "as little kept as can be"
    assert told(done)[0] == f"out of memory in step 3: planned anew, {tried}; it is computed again"
    assert done.message == (
        f"ft train: out of memory again, after planning anew ({tried}): set quantization: nf4, or lower "
        "training.batch_size (now 2), or lower max_length (now 256); checkpoint-2 is whole, and --resume takes other "
        "activations"
    )
    assert "Traceback" not in done.err
    run = tmp_path / "run"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not (run / "adapter").exists()
    assert len(metrics(run)) == 2
    limit.most = None
    assert train("run", "--resume").code == 0
    assert train("whole").code == 0
    assert [r["loss"] for r in metrics(run)] == [r["loss"] for r in metrics(tmp_path / "whole")]


def test_other_errors_are_not_taken_for_a_want_of_memory(train, tmp_path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the sizes differ")

    monkeypatch.setattr(transformers.Trainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="the sizes differ"):
        train("run")


def test_the_longest_batch_comes_first_and_leaves_nothing(train, metrics, tmp_path, monkeypatch):
    """Found without reading the rows: against all batches of the first epoch as they are made."""
    from ft_core.training import replan, speed

    assert train("plain").code == 0
    monkeypatch.setattr(speed, "runs_kernels", lambda device: True)
    monkeypatch.setattr(speed, "speed_up", lambda *args: None)  # transformers' layers, to compare bits
    monkeypatch.setattr("ft_core.training.run.speed_up", lambda *args: None)
    monkeypatch.setattr("ft_core.training.run.recomputes", lambda *args: False)
    found, seen = [], []
    longest, step = replan.longest_batch, replan.ReplanningMixin.training_step

    def note(trainer: Any) -> Any:
        found.append(longest(trainer))
        every = list(trainer.get_train_dataloader())
        assert found[0]["input_ids"].numel() == max(batch["input_ids"].numel() for batch in every)
        return found[0]

    def record(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["input_ids"])
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(replan, "longest_batch", note)
    monkeypatch.setattr(replan.ReplanningMixin, "training_step", record)
    done = train("rehearsed")
    assert done.code == 0, done.err
    assert "the longest batch fits: " in done.out + done.err
    assert len(found) == 1
    assert len(seen) == 3 * STEPS
    assert any(ids.shape == found[0]["input_ids"].shape and (ids == found[0]["input_ids"]).all() for ids in seen)
    assert [r["loss"] for r in metrics(tmp_path / "rehearsed")] == [r["loss"] for r in metrics(tmp_path / "plain")]


def test_packed_rows_are_rehearsed_by_their_tokens(ft, configure, tmp_path, monkeypatch, metrics):
    from ft_core.training import replan, speed

    monkeypatch.setattr(speed, "runs_kernels", lambda device: True)
    found = []
    longest = replan.longest_batch
    monkeypatch.setattr(replan, "longest_batch", lambda trainer: found.append(longest(trainer)) or found[-1])
    assert ft("train", configure(packing=True, training={"batch_size": 3})).code == 0
    assert found[0]["input_ids"].numel() > 3 * 64 * 0.8


def test_a_stream_has_no_longest_batch():
    from ft_core.training.replan import longest_batch

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield from range(3)

    class Trainer:
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Stream(), batch_size=1)

    assert longest_batch(Trainer()) is None


PROGRAM = """
import dataclasses, sys
import torch, transformers
from ft_core.models import device, loading
from ft_core.training import run, speed
pick = device.pick_device
for module in (run, loading):
    module.pick_device = lambda: dataclasses.replace(pick(), dtype="float32")
if sys.argv[1] != "plain":
    speed.runs_kernels = lambda device: True
calls, step = [], transformers.Trainer.training_step
def failing(self, *args, **kwargs):
    calls.append(1)
    if sys.argv[1] == "failing" and len(calls) == 3:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return step(self, *args, **kwargs)
transformers.Trainer.training_step = failing
from ft_core.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_with_two_processes(launcher, configure, tmp_path, metrics, write_rows, sums, run_ranks):
    """Each tries its own longest batch; where one does not fit nobody begins again, for the other waits.

    torchrun's processes each import the libraries anew, for a minute in all.
    """
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and it would be both processes'")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    rows = sums(24)
    rows[11]["messages"][0]["content"] += " and then nothing more" * 9
    data = write_rows(tmp_path / "uneven.jsonl", rows)

    def train(kind: str) -> Any:
        config = configure(  # without dropout: the fast layers draw other numbers, as the first step's update shows
            data=str(data), max_length=256, packing=False, lora={"r": 8, "dropout": 0.0}, output=str(tmp_path / kind),
            training={"max_steps": 3, "batch_size": 2, "gradient_accumulation": 2},
        )  # fmt: skip
        if launcher == "forked":
            done = run_ranks(program, None, kind, "train", config)
            return max((one.code for one in done), key=abs), "".join(one.err for one in done)
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program), kind]
        done = subprocess.run(
            [sys.executable, *words, "train", str(config)], capture_output=True, text=True, timeout=120, check=False
        )
        return done.returncode, done.stderr

    for kind in ("plain", "fast"):
        code, said = train(kind)
        assert code == 0, said
        assert said.count("the longest batch fits") == (kind == "fast")
    plain, fast = ([row["loss"] for row in metrics(tmp_path / kind)] for kind in ("plain", "fast"))
    assert fast == pytest.approx(plain, rel=1e-4)
    code, said = train("failing")
    assert code != 0
    assert "ft train: out of memory: set activations: recompute, or" in said
    assert "planned anew" not in said


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["keep", "auto"])
def test_under_a_real_bound_on_a_gpu(activations, ft, configure, metrics, tmp_path, monkeypatch, write_rows, sums):
    """torch's own allocator refuses, from the third step on: there is less than was kept, more than is needed."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    first = configure()
    tokenizer = AutoTokenizer.from_pretrained(yaml.safe_load(first.read_text())["model"])
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            **sizes,
        )
    )
    model.save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    del model
    data = write_rows(tmp_path / "many.jsonl", sums(1600))

    def train(name: str) -> Any:
        config = configure(
            model=str(tmp_path / "larger"), data=str(data), max_length=4096, activations=activations,
            training={"max_steps": 4, "batch_size": 2, "gradient_accumulation": 2}, output=str(tmp_path / name),
        )  # fmt: skip
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        done = ft("train", config)
        assert done.code == 0, done.err
        return done

    whole = train("whole")
    assert not told(whole)
    assert "the longest batch fits" in whole.out + whole.err
    most, step, bound = torch.cuda.max_memory_allocated(), transformers.Trainer.training_step, []
    total = torch.cuda.get_device_properties(0).total_memory

    def within(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and not bound:
            torch.cuda.empty_cache()
            now = torch.cuda.memory_allocated()
            bound.append(now + 0.6 * (most - now))
            torch.cuda.set_per_process_memory_fraction(bound[0] / total)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", within)
    try:
        done = train("bounded")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (line,) = told(done)
    assert line.startswith("out of memory in step 3: planned anew, as little kept as can be, up to ")
    found = [row["loss"] for row in metrics(tmp_path / "bounded")]
    assert len(found) == 4
    # The same numbers but for how many logits the head makes at a time.
    assert found == pytest.approx([row["loss"] for row in metrics(tmp_path / "whole")], rel=1e-3)
