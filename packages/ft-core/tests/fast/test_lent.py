"""Frozen weights that live in the host's memory: what is computed is the same bit for bit, and nothing stays behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from ft_core import fast
from ft_core.errors import RunError
from ft_core.fast import lent
from ft_core.fast.find import unwrapped
from ft_core.fast.lent import LentWeights

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def _scaled() -> Any:
    """An embedding that does more than look up, as Gemma's."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.embed_tokens = Gemma3TextScaledWordEmbedding(96, 64, None, embed_scale=3.0)
    return model


MAKE: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "scaled": _scaled,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent, "LEAST", 512)


def make(kind: str, quantization: str = "none", device: str = "cpu") -> Any:
    torch.manual_seed(0)
    model = MAKE[kind]().to(torch.bfloat16).to(device)
    if quantization == "nf4":
        import bitsandbytes as bnb

        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        made = bnb.nn.Linear4bit(*reversed(child.weight.shape), bias=False, quant_type="nf4")
                        made.weight = bnb.nn.Params4bit(child.weight.data, quant_type="nf4", module=made).to(device)
                        setattr(parent, name, made)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).train()


def step(model: Any, seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(seed)).to(model.device)
    model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def emptied(model: Any) -> list[str]:
    """Names of the parameters whose memory is gone."""
    return [n for n, p in model.named_parameters() if p.numel() and not p.untyped_storage().nbytes()]


@contextlib.contextmanager
def most_at_once(monkeypatch: pytest.MonkeyPatch, path: Any) -> Iterator[list[int]]:
    """How many layers' weights were there, whenever some set out."""
    found: list[int] = []
    own = lent._Group.set_out

    def counted(group: Any) -> None:
        own(group)
        found.append(sum(g is not None and g.is_here for g in path.lent._groups))

    with monkeypatch.context() as patch:
        patch.setattr(lent._Group, "set_out", counted)
        yield found


@pytest.mark.parametrize("choice", ["keep", "inputs", "recompute", "offload", "offload-input"])
@pytest.mark.parametrize(("kind", "quantization"), [("llama", "nf4"), ("tied", "none"), ("scaled", "none")])
def test_the_same_to_the_bit(kind: str, quantization: str, choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, moved = make(kind, quantization), make(kind, quantization)
    for model in (plain, moved):
        path = fast.enable(model)
        path.host.least = 0
        path.choose(choice)
    path.lend()
    gone = emptied(moved)
    assert len(gone) == 4 * 7 + (1 if kind == "tied" else 2)
    with most_at_once(monkeypatch, path) as there:
        for seed in (0, 1):
            expected, found = step(plain, seed), step(moved, seed)
            assert found[0] == expected[0]
            assert found[1].keys() == expected[1].keys() != set()
            assert [n for n, g in expected[1].items() if not torch.equal(g, found[1][n])] == []
            assert emptied(moved) == gone
    assert max(there) == 2


def test_some_layers_alone() -> None:
    plain, moved = make("llama", "nf4"), make("llama", "nf4")
    fast.enable(plain)
    path = fast.enable(moved)
    path.lend(2, ends=False)
    gone = emptied(moved)
    assert {name.split(".layers.")[1][0] for name in gone} == {"0", "1"}
    assert path.lent is not None
    assert path.lent.bytes == sum(
        p.untyped_storage().nbytes() or p.nbytes for n, p in moved.named_parameters() if n in gone
    )
    expected, found = step(plain), step(moved)
    assert found[0] == expected[0]
    assert emptied(moved) == gone


def test_without_gradients_and_by_transformers_own_layers() -> None:
    plain, moved = make("llama").eval(), make("llama").eval()
    paths = fast.enable(plain), fast.enable(moved)
    paths[1].lend()
    gone = emptied(moved)
    ids = torch.arange(12)[None]
    for on in (True, False):
        for path in paths:
            path.on = on
        with torch.no_grad():
            assert torch.equal(plain(input_ids=ids).logits, moved(input_ids=ids).logits)
        assert emptied(moved) == gone
    told = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(input_ids=ids, **told), moved.generate(input_ids=ids, **told))
    assert emptied(moved) == gone


def test_a_loss_outside_of_the_fast_head() -> None:
    """The head is called as a module, and its weight is there again for its gradient."""
    plain, moved = make("llama"), make("llama")
    paths = fast.enable(plain), fast.enable(moved)
    paths[1].lend()
    results = []
    for model in (plain, moved):
        ids = torch.arange(12)[None]
        logits = model(input_ids=ids).logits
        logits.float().logsumexp(-1).sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert [n for n, g in results[0].items() if not torch.equal(g, results[1][n])] == []


def test_two_passes_before_backward() -> None:
    """As a reference and a policy take them, or two micro-batches."""
    plain, moved = make("llama", "nf4"), make("llama", "nf4")
    paths = fast.enable(plain), fast.enable(moved)
    paths[1].lend()
    ids = torch.arange(12)[None]
    results = []
    for model in (plain, moved):
        with torch.no_grad():
            first = model(input_ids=ids, labels=ids).loss
        second, third = (model(input_ids=ids + n, labels=ids + n).loss for n in (1, 2))
        (first * second + third).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert [n for n, g in results[0].items() if not torch.equal(g, results[1][n])] == []


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_undone(kind: str) -> None:
    plain, moved = make(kind, "nf4"), make(kind, "nf4")
    path = fast.enable(moved)
    path.lend()
    step(moved)
    path.undo()
    assert emptied(moved) == []
    assert [n for n, p in plain.named_parameters() if not torch.equal(p, moved.get_parameter(n))] == []
    assert all("forward" not in vars(module) for module in unwrapped(moved).modules())
    assert not any(hasattr(p, "_ft_lent") for p in moved.parameters())


def test_trained_weights_stay() -> None:
    model = MAKE["llama"]()
    path = fast.enable(model)
    path.lend()
    assert emptied(model) == []
    assert isinstance(path.lent, LentWeights)
    assert path.lent.bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_on_a_gpu(quantization: str) -> None:
    plain, moved = make("llama", quantization, "cuda"), make("llama", quantization, "cuda")
    for model in (plain, moved):
        path = fast.enable(model)
        path.graphs.on = False
    path.lend()
    for seed in range(4):
        expected, found = step(plain, seed), step(moved, seed)
        assert found[0] == expected[0]
        assert [n for n, g in expected[1].items() if not torch.equal(g, found[1][n])] == []


@pytest.mark.parametrize("kind", ["llama", "tied"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_an_adapter_on_an_end_is_computed_and_saved(kind: str, targets: list[str], tmp_path: Any) -> None:
    """PEFT reads the weight beneath such an adapter itself, and writes it down: there the ends stay."""
    results = []
    for lends in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model: Any = get_peft_model(MAKE[kind]().to(torch.bfloat16), config).train()
        path = fast.enable(model)
        if lends:
            path.lend()
            assert len(emptied(model)) == 4 * 7 + (0 if len(targets) > 1 else 1 if kind == "tied" else 2)
        results.append(step(model))
        model.save_pretrained(tmp_path / str(lends))
    assert results[0][0] == results[1][0]
    assert [n for n, g in results[0][1].items() if not torch.equal(g, results[1][1][n])] == []
    files = [(tmp_path / str(lends) / "adapter_model.safetensors").read_bytes() for lends in (False, True)]
    assert files[0] == files[1]


def test_a_step_that_did_not_fit_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and backwards: what had no memory is not taken for what is there."""
    plain, moved = make("llama", "nf4"), make("llama", "nf4")
    fast.enable(plain)
    path = fast.enable(moved)
    path.lend()
    gone = emptied(moved)
    own, calls = torch.UntypedStorage.resize_, [0, 0]

    def failing(storage: Any, size: int) -> Any:
        calls[0] += size > 0
        if calls[0] == calls[1]:
            calls[0] += 1
            raise torch.OutOfMemoryError("none is left")
        return own(storage, size)

    expected = step(plain)
    for fails_at in (3, 8):  # the third layer forwards, the third from the end backwards
        calls[:] = 0, fails_at
        with monkeypatch.context() as patch:
            patch.setattr(torch.UntypedStorage, "resize_", failing)
            with pytest.raises(torch.OutOfMemoryError):
                step(moved)
        assert path.lent is not None
        path.lent.reset()
        assert emptied(moved) == gone
        found = step(moved)
        assert found[0] == expected[0]
        assert [n for n, g in expected[1].items() if not torch.equal(g, found[1][n])] == []
        assert emptied(moved) == gone


def test_a_lending_that_fails_leaves_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, moved = make("llama", "nf4"), make("llama", "nf4")
    fast.enable(plain)
    path = fast.enable(moved)
    own, count = lent._Group._home, [0]

    def full(group: Any, storage: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise RunError("the host's memory is full")
        return own(group, storage)

    with monkeypatch.context() as patch:
        patch.setattr(lent._Group, "_home", full)
        with pytest.raises(RunError, match="full"):
            path.lend()
    assert path.lent is None
    assert emptied(moved) == []
    expected, found = step(plain), step(moved)
    assert found[0] == expected[0]
