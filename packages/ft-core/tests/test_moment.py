"""A step begun again begins as it did: running averages, dynamic frequencies and random numbers are put back."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from ft_core.models.rotary import changes, rope_types
from ft_core.training.moment import Moment, changed_by_forward
from ft_core.training.trainer import RunTrainerMixin

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 8,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(DYNAMIC)))


def gemma(full: dict[str, Any] = DYNAMIC) -> Any:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, head_dim=16, layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"full_attention": dict(full), "sliding_attention": dict(PLAIN)},
        )
    )  # fmt: skip


def batch(length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(length)[None] % 50
    return {"input_ids": ids, "labels": ids}


class Normed(nn.Module):
    """A model whose loss depends on its running averages, and changes them."""

    supports_gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line = nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        hidden = self.norm(x) + self.norm.running_mean + self.norm.num_batches_tracked
        return {"loss": (self.line(hidden) ** 2).mean()}

    def gradient_checkpointing_enable(self, settings: Any) -> None: ...


def trainer_of(model: Any, folder: Any, rows: list[Any], steps: int) -> Any:
    class Trainer(RunTrainerMixin, transformers.Trainer):
        pass

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, save_strategy="no",
        report_to=[], gradient_accumulation_steps=2, disable_tqdm=True, remove_unused_columns=False, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.keep_checkpoints = 1
    trainer.say = lambda line: None
    return trainer


def trained(model: Any, folder: Any, rows: list[Any], fails: int | None, monkeypatch: Any) -> tuple[Any, list[float]]:
    """The model after two updates of two micro-batches, and the losses; one fails after its forward and backward."""
    calls: list[int] = []
    step = transformers.Trainer.training_step

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = step(self, *args, **kwargs)
        if len(calls) == fails:
            raise torch.OutOfMemoryError("out of memory")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", failing)
        trainer = trainer_of(model, folder, rows, 2)
        trainer.train()
    assert len(calls) == 4 + (0 if fails is None else 1 + (fails + 1) % 2)
    return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["norm", "llama", "gemma"])
def test_a_step_begun_again_begins_as_it_did(kind, fails, tmp_path, monkeypatch):
    make = {"norm": Normed, "llama": llama, "gemma": gemma}[kind]
    if kind == "norm":
        torch.manual_seed(0)
        rows = [{"x": x, "labels": x[:1]} for x in torch.randn(8, 3) * torch.arange(1, 9)[:, None]]
    else:  # frequencies that another text leaves behind: ten are computed by those of twelve, until a short one
        rows = [
            {name: value[0] for name, value in batch(length).items()} for length in (10, 10, 12, 12, 14, 14, 30, 30)
        ]
        monkeypatch.setattr(RunTrainerMixin, "_get_train_sampler", lambda self, *a: None, raising=False)
    torch.manual_seed(1)
    model = make()
    other = copy.deepcopy(model)
    whole, expected = trained(model, tmp_path, rows, None, monkeypatch)
    again, losses = trained(other, tmp_path, rows, fails, monkeypatch)
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    for (name, a), (_, b) in zip(whole.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("before", [4, 12])
def test_frequencies_are_put_back(make, before):
    """Those of a model that has seen nothing longer than `before`, after a text of forty and one of two tokens."""
    model = make()
    model(**batch(before))
    rotary = model.model.rotary_emb
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")))

    def state() -> dict[str, Any]:
        values = {**dict(rotary.named_buffers()), **vars(rotary)}
        return {name: copy.copy(value) for name, value in values.items() if not name.startswith("_")}

    def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return a.keys() == b.keys() and all(
            torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name] for name in a
        )

    was = state()
    moment = Moment.of(trainer, changed_by_forward(model))
    for lengths in ((40,), (40, 2)):
        for length in lengths:
            model(**batch(length))
        if lengths == (40,):
            assert not same(was, state())
        moment.restore(trainer)
        assert same(was, state())


def test_the_types_of_a_rotary_embedding():
    assert set(rope_types(gemma().model.rotary_emb)) == {"dynamic", "default"}
    assert rope_types(llama().model.rotary_emb) == ("dynamic",)
    assert rope_types(nn.Linear(1, 1)) == ()
    assert changes(gemma().model.rotary_emb)
    assert not changes(gemma(PLAIN).model.rotary_emb)
    assert changed_by_forward(gemma(PLAIN)) == []


@pytest.mark.parametrize("make", [llama, gemma])
def test_dynamic_frequencies_are_not_rehearsed(make, tmp_path, monkeypatch):
    from ft_core.training import replan

    monkeypatch.setattr(replan, "longest_batch", lambda trainer: pytest.fail("it was looked for"))
    trainer = trainer_of(make(), tmp_path, [{name: value[0] for name, value in batch(8).items()}] * 4, 1)
    trainer.rehearses = True
    trainer.train()
    assert not trainer.rehearses


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_step_is_recorded_where_one_type_of_layer_has_dynamic_frequencies(dynamic, monkeypatch):
    from ft_core import fast

    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    fast.enable(model)
    monkeypatch.setattr(fast.FastPath, "decoders", [])  # what else a recording depends on is not there on a CPU
    model.model.rotary_emb.rope_type = {"full": "dynamic" if dynamic else "default", "sliding": "default"}
    assert (model.forward._looks(True) is None) == dynamic


def test_on_mps(tmp_path, monkeypatch):
    """torch's random numbers of the device are put back, and its memory is given back."""
    told: list[Any] = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: told.append(state.tolist()))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: told.append("emptied"))
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("mps")))
    Moment.of(trainer, []).restore(trainer)
    RunTrainerMixin._drop(trainer, nn.Linear(1, 1))  # type: ignore[arg-type]
    assert told == [[7], "emptied"]
