"""Whatever each layer keeps, computes again or leaves on the host: the gradients are the same bit for bit."""

from __future__ import annotations

import copy
import functools
import gc
import json
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ft_core import fast
from ft_core.errors import RunError

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MAKE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24)),
}
MIXTURES: list[Any] = [
    "inputs",
    "recompute",
    "offload",
    "offload-input",
    ["offload", "keep", "offload-input"],
    ["recompute", "offload", "inputs"],
]


def make(family: str, adapter: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    """A tiny model with random weights, trained whole or by an adapter."""
    torch.manual_seed(0)
    model: Any = MAKE[family]().to(dtype)
    if adapter != "none":
        config = LoraConfig(
            r=5, target_modules="all-linear", init_lora_weights=False, use_dora=adapter == "dora", lora_dropout=dropout
        )
        model = get_peft_model(model, config)
    return model.train()


def batch(form: str) -> dict[str, torch.Tensor]:
    """Two rows of twelve tokens, or one of 24 with three documents in it."""
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    if form == "packed":
        positions = torch.cat([torch.arange(7), torch.arange(5), torch.arange(12)])[None]
        return {"input_ids": ids.view(1, 24), "labels": ids.view(1, 24), "position_ids": positions}
    if form == "dense":
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def enable(model: Any) -> fast.FastPath:
    """The fast path, which takes even small tensors to the host."""
    path = fast.enable(model)
    path.host.least = 0
    return path


def step(model: Any, given: Any, autocast: bool = False, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and the gradient of every parameter that has one."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**given, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {**found, "random numbers": torch.rand(3)}


def assert_equal(one: Any, two: Any) -> None:
    assert one[0] == two[0]
    assert one[1].keys() == two[1].keys()
    assert [name for name, gradient in two[1].items() if not torch.equal(one[1][name], gradient)] == []


def used(path: fast.FastPath) -> tuple[int, int]:
    """Buffers on the host: how many there are, and how many are free."""
    pools = path.host.pools.values()
    free = sum(len(buffers) for pool in pools for buffers in pool._free.values())
    return sum(slab.numel() // size for pool in pools for size, slabs in pool._slabs.items() for slab in slabs), free


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("adapter", ["all", "none", "dora"])
@pytest.mark.parametrize("form", ["dense", "packed", "left"])
def test_gradients_are_the_same(family, adapter, form):
    model, given = make(family, adapter), batch(form)
    path = enable(model)
    kept = step(model, given)
    for choice in MIXTURES:
        path.choose(choice)
        assert_equal(step(model, given), kept)
        count, free = used(path)
        assert count == free
        assert count or not {"offload", "offload-input"} & {*([choice] if isinstance(choice, str) else choice)}


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_draws_the_same_numbers_again(autocast):
    model, given = make("qwen3", "all", torch.bfloat16 if autocast else torch.float32, 0.3), batch("packed")
    path = enable(model)
    kept = step(model, given, autocast)
    assert step(model, given, autocast, seed=1)[0] != kept[0]
    for choice in MIXTURES:
        path.choose(choice)
        assert_equal(step(model, given, autocast), kept)


def test_autocast_of_fp32_weights():
    model, given = make("llama", "all"), batch("packed")
    path = enable(model)
    kept = step(model, given, autocast=True)
    assert kept[0] != step(model, given)[0]
    for choice in MIXTURES:
        path.choose(choice)
        assert_equal(step(model, given, autocast=True), kept)


def test_layers_that_somebody_listens_to():
    model, given = make("qwen2", "all"), batch("packed")
    path, heard = enable(model), []
    path.layers[1].self_attn.q_proj.register_forward_hook(lambda module, args, output: heard.append(1))
    kept = step(model, given)
    for choice in MIXTURES:
        path.choose(choice)
        model.gradient_checkpointing_enable({"use_reentrant": False})  # which ours stands in for
        assert_equal(step(model, given), kept)
    assert all(layer.gradient_checkpointing for layer in path.layers)
    assert len(heard) >= 1 + len(MIXTURES)


def test_inputs_that_require_gradients():
    model, given = make("llama", "all"), batch("packed")
    path = enable(model)
    model.enable_input_require_grads()
    given["inputs_embeds"] = torch.nn.Parameter(torch.randn(1, 24, 64))
    del given["input_ids"]
    results = []
    for choice in ["keep", *MIXTURES]:
        path.choose(choice)
        given["inputs_embeds"].grad = None
        found = step(model, given)
        results.append((found[0], {**found[1], "inputs": given["inputs_embeds"].grad}))
    for result in results[1:]:
        assert_equal(result, results[0])


def test_two_losses_before_their_backward_passes():
    model, one, two = make("llama", "all"), batch("dense"), batch("packed")
    path = enable(model)
    found = []
    for choice in ["keep", *MIXTURES]:
        path.choose(choice)
        model.zero_grad()
        first, second = (model(**given, use_cache=False).loss for given in (one, two))
        first.backward()
        second.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for gradients in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0], strict=True))


def test_a_loss_that_is_thrown_away_gives_its_buffers_back():
    model, given = make("llama", "all"), batch("packed")
    path = enable(model)
    path.choose("offload")
    loss = model(**given, use_cache=False).loss
    count, free = used(path)
    assert free < count
    del loss
    gc.collect()
    assert used(path) == (count, count)
    step(model, given)
    assert used(path) == (count, count)  # used again


@pytest.mark.parametrize("least", [0, 2**40])
def test_nothing_is_alive_after_a_step(least):
    """Without the garbage collector's help: a cycle through a graph would hold a layer's memory."""
    model, given = make("llama", "all"), batch("packed")
    path = enable(model)
    path.host.least = least
    for choice in MIXTURES:
        path.choose(choice)
        step(model, given)
        gc.collect()
        gc.disable()
        try:
            loss = model(**given, use_cache=False).loss
            saved = [t for t in gc.get_objects() if type(t).__name__ == "_Held"]
            assert bool(saved) == (least == 0 and "offload" in str(choice))
            del saved
            loss.backward()
            del loss
            assert not [t for t in gc.get_objects() if type(t).__name__ in ("_Held", "_AgainBackward")]
            count, free = used(path)
            assert count == free
        finally:
            gc.enable()


@pytest.mark.parametrize("choice", ["offload", "offload-input", ["offload", "keep", "offload-input"]], ids=str)
def test_each_tensor_comes_back_once_and_few_at_a_time(choice, monkeypatch):
    from ft_core.fast import offload

    model, given = make("llama", "all"), batch("packed")
    path = enable(model)
    path.choose(choice)
    started, most = [], 0
    begin = offload._Held._set_out

    def set_out(held: Any) -> None:
        nonlocal most
        if held._back is None:
            started.append(held._place)
        begin(held)
        waiting = [other() for other in held._order.held]
        large = [
            other for other in waiting
            if other is not None and other._back is not None and held._order.is_large(other._host.nbytes)
        ]  # fmt: skip
        most = max(most, len(large))

    monkeypatch.setattr(offload._Held, "_set_out", set_out)
    step(model, given)
    assert len(started) == len(set(started)) > 0
    assert most <= 2 * offload.AHEAD + 1  # a node of torch's own may want them in another order than they were saved


def test_without_gradients_nothing_is_kept_or_copied():
    model, given = make("llama", "all"), batch("packed")
    path = enable(model)
    path.choose("offload")
    with torch.no_grad():
        model(**given, use_cache=False)
    model.requires_grad_(False)
    model(**given, use_cache=False)
    assert used(path) == (0, 0)


def test_a_host_without_memory_refuses_in_one_line():
    model, given = make("llama", "all"), batch("packed")
    path = enable(model)
    path.choose("offload")
    path.host.most = 100_000
    with pytest.raises(RunError, match=r"activations in host memory take .* GiB of it, .* can be had: set ") as caught:
        step(model, given)
    assert "\n" not in str(caught.value)


def test_a_copy_has_choices_and_host_memory_of_its_own():
    model, given = make("llama", "all"), batch("packed")
    path = enable(model)
    path.choose("offload")
    kept = step(model, given)
    other = copy.deepcopy(model)
    path.choose("keep")
    theirs = fast.fast_path_of(other)
    assert theirs.chooser.chosen == ["offload"] * 3
    assert theirs.host is not path.host
    theirs.host.least = 0
    assert_equal(step(other, given), kept)
    assert_equal(step(model, given), kept)


def test_wishes_are_checked():
    path = enable(make("llama", "all"))
    for wrong in ("kept", ["keep"], ["keep", "auto", "keep"], ["keep"] * 4):
        with pytest.raises(ValueError, match=r"no such choice|choices for 3 layers"):
            path.choose(wrong)
    with pytest.raises(ValueError, match="positive number of bytes"):
        path.choose("auto", memory=0)


def test_a_trainers_checkpointing_is_left_out_and_that_is_said_once(tiny, tmp_path):
    """TRL's default is checkpointing; what is recomputed is the fast path's choice."""
    from trl import SFTConfig, SFTTrainer

    results = []
    for choice in ("auto", "recompute", "offload"):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32), config)
        path = enable(model)
        path.choose(choice)
        arguments = SFTConfig(
            output_dir=str(tmp_path / choice), max_steps=3, per_device_train_batch_size=2, use_cpu=True, bf16=False,
            learning_rate=1e-2, logging_steps=1, report_to="none", packing=True, max_length=32, disable_tqdm=True,
            packing_strategy="bfd", save_strategy="no", gradient_accumulation_steps=2, seed=1,
        )  # fmt: skip
        assert arguments.gradient_checkpointing
        trainer = SFTTrainer(
            model=model, args=arguments, processing_class=AutoTokenizer.from_pretrained(tiny),
            train_dataset=Dataset.from_dict({"text": ["add 1 and 2 is 3", "seven is a number", "what is it"] * 9}),
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train()
        told = [str(w.message) for w in said if "fast layers choose themselves" in str(w.message)]
        assert len(told) == 1
        assert {"auto": "layers kept", "recompute": "computed again", "offload": "offloaded"}[choice] in told[0]
        results.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert (used(path)[0] > 0) == (choice == "offload")
    assert results[1] == results[0]
    assert results[2] == results[0]


def test_switched_off_the_trainers_checkpointing_is_on():
    model, given = make("llama", "all"), batch("dense")
    path = enable(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    own = path.layers[0].input_layernorm.forward
    path.layers[0].input_layernorm.forward = lambda x: calls.append(1) or own(x)
    for on, count in ((False, 2), (True, 1)):
        path.on = on
        calls.clear()
        step(model, given)
        assert len(calls) == count


@pytest.mark.skipif(Version(version("triton")) < Version("3.7"), reason="its interpreter wants an older numpy")
@pytest.mark.parametrize(
    "choices",
    [["recompute", "offload"], pytest.param(["keep", "offload-input"], marks=pytest.mark.slow)],
    ids=["computed again and offloaded", "kept, and inputs offloaded"],
)
def test_tiles_within_every_choice(choices):
    """With dropout, over documents; layers that are computed again compute gate and up once more, not twice."""
    words = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("tiled.py")), *choices]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("a tile of all tokens")[0] == 0
    assert list(found) == choices
    for choice, (distance, count) in found.items():
        assert distance <= 2e-3, choice  # in fp16: a rounding or two
        assert count == 2 * 2 * 3, choice  # there and back, of two layers, in three tiles


class CheckpointedInItsCall(LlamaDecoderLayer):
    """As transformers 5.17's layers are: checkpointing is in the call, around whatever forward the instance has."""

    calls = 0

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            type(self).calls += 1
            return self._gradient_checkpointing_func(functools.partial(super().__call__, **keywords), *args)
        return super().__call__(*args, **keywords)


def test_checkpointing_in_a_layers_call_is_left_out_too():
    model, given = make("llama", "all"), batch("packed")
    path = enable(model)
    kept = step(model, given)
    for layer in path.layers:
        layer.__class__ = CheckpointedInItsCall
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for choice in ["auto", *MIXTURES]:
        path.choose(choice)
        assert_equal(step(model, given), kept)
    path.layers[1].mlp.register_forward_hook(lambda *_: None)
    listened = step(model, given)
    assert CheckpointedInItsCall.calls == 0
    path.on = False
    step(model, given)
    assert CheckpointedInItsCall.calls == 3
    path.on = True
    path.choose("keep")
    assert_equal(step(model, given), listened)


def _rank(folder: str) -> None:
    import torch.distributed as distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    assert distributed.get_world_size() == 2
    found = []
    for choice in ["keep", *MIXTURES]:
        model = make("llama", "all")
        enable(model).choose(choice)
        given = batch("dense")
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            loss = wrapped(**{name: value[rank : rank + 1] for name, value in given.items()}, use_cache=False).loss
            loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store")
def test_two_processes(tmp_path: Path, run_ranks: Any) -> None:
    ranks = run_ranks(Path(__file__), "_rank", tmp_path)
    assert [rank.code for rank in ranks] == [0] * 2, ranks
    kept, *others = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for gradients in others:
        assert [name for name, gradient in kept.items() if not torch.equal(gradients[name], gradient)] == []


def test_small_tensors_are_not_counted_among_those_under_way():
    """Two large ones are on their way, however many small ones lie between."""
    from ft_core.fast.offload import HostMemory

    host = HostMemory()
    host.least = 1
    host.begin()
    sizes = [1000, 1000, 4, 1000, 1000, 4, 4, 1000]
    held = []
    for size in sizes:
        held.append(host._take(torch.arange(float(size))))
        leaving = [tensor.numel() for tensor, _ in host._leaving]
        assert leaving.count(1000) == min(2, sizes[: len(held)].count(1000))
    host.settle()
    assert host._leaving == []

    def back() -> list[int]:
        return [place for place, one in enumerate(held) if one is not None and one._back is not None]

    for place, under_way in ((7, [2, 3, 4, 5, 6]), (6, [2, 3, 4, 5]), (5, [2, 3, 4]), (4, [1, 2, 3]), (3, [0, 1, 2])):
        assert torch.equal(held[place].come_back(), torch.arange(float(sizes[place])))
        held[place] = None
        assert back() == under_way


@pytest.mark.parametrize("wide", [100, 200, 300, 800])
def test_layers_of_several_widths_have_few_bytes_under_way(wide):
    """First layers whose inputs wait, then layers of which more does, one part of it wider."""
    from ft_core.fast.offload import HostMemory

    host = HostMemory()
    host.least = 1
    host.begin()
    sizes = [100] * 20 + [100, wide, 100, 4] * 4
    held, most = [], 0
    for size in sizes:
        held.append(host._take(torch.zeros(size)))
        most = max(most, sum(tensor.numel() for tensor, _ in host._leaving))
    assert most <= 2 * wide + 8
    most = 0
    while held:
        held.pop().come_back()
        most = max(most, sum(one._host.numel() for one in held if one._back is not None))
    assert most <= 2 * max(wide, 100) + 100 + 12


@pytest.mark.parametrize("choice", ["keep", "recompute", "offload", "offload-input"])
def test_a_step_looks_at_each_layer_a_few_times(choice, monkeypatch):
    """However many layers there are: a look at all of them for each of them took half of a step's time of the host."""
    from ft_core.fast import blocks

    looks = []
    half = blocks.Blocks._half
    monkeypatch.setattr(blocks.Blocks, "_half", lambda self, *given: looks.append(id(self)) or half(self, *given))
    model, given = make("llama", "all"), batch("packed")
    path = enable(model)
    path.choose(choice)
    step(model, given)
    looks.clear()
    step(model, given)
    layers = len(path.layers)
    assert 0 < len(looks) <= 2 * layers * 5  # its halves, there and back: whether they can be one operation, and which
