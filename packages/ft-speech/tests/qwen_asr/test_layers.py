"""Qwen3-ASR's language side computes by the fast layers what transformers' own compute, behind the encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import ft_kernels
from ft_core import fast
from ft_core.data import Collator, keeps_documents_apart
from ft_core.data.collating import LENGTHS
from ft_core.fast.find import layout_of
from ft_speech.qwen_asr import waits
from ft_speech.qwen_asr.collating import AsrCollator, collator_for, drawn, packs

SHARE = 5e-5
"""fp32, a few hundred sums in each of some ten layers, rounded at 6e-8: of each, and of their gradients."""
SHAPES = ((7, 0.3), (12, 1.4), (5, 9.3))
"""Of documents: how many words, and how many seconds before them; the encoder's convolutions see one at once,
its attention eight."""


class Made(NamedTuple):
    model: Any
    processor: Any
    documents: list[dict[str, Any]]

    def batch(self, documents: Sequence[dict[str, Any]], *, packed: bool = True) -> dict[str, Any]:
        return self.collate(packed)(documents)

    def collate(self, packed: bool = True) -> AsrCollator:
        text = Collator(0, padding_free=packed, lengths=packed)
        return collator_for(self.model, self.processor, text)


def make(trained: str, tiny: Any, **text: Any) -> Made:
    """A tiny model in training mode.

    Args:
        trained: ``lora``, an adapter on all linear layers, the encoder's too; ``all``; or ``projector``, that alone.
    """
    from peft import LoraConfig, get_peft_model

    tokenizer, make_model, processor = tiny
    model = make_model(tokenizer, **text)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers begins with norms of one and biases of zero; here every part is to count.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if trained == "lora":
        config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    elif trained == "projector":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("multi_modal_projector" in name)
    return Made(model.train(), processor, drawn(processor, SHAPES, 0))


@pytest.fixture(scope="module")
def tiny(parts: Any) -> Any:
    tokenizer = parts.make_tokenizer()
    return tokenizer, parts.make_model, parts.make_processor(tokenizer)


def step(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradient of every parameter that has one."""
    path = fast.fast_path_of(model)
    given = {name: value for name, value in batch.items() if name != LENGTHS or path is not None}
    given["use_cache"] = False
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Any, two: Any, share: float = SHARE) -> None:
    assert abs(one[0] - two[0]) <= share * abs(two[0])
    assert one[1].keys() == two[1].keys()
    largest = max(g.norm() for g in two[1].values())
    for name, gradient in two[1].items():
        # Some gradients are nothing but rounding: that of k's bias moves no score.
        assert (one[1][name] - gradient).norm() <= share * max(gradient.norm(), 1e-3 * largest), name


@contextmanager
def attentions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The plans that packed attention is called with: the proof that the fast layers compute."""
    plans: list[Any] = []
    own = ft_kernels.packed_attention

    def spy(*args: Any, **keywords: Any) -> Tensor:
        plans.append(keywords.get("plan"))
        return own(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(ft_kernels, "packed_attention", spy)
        yield plans


@pytest.mark.parametrize("trained", ["lora", "all", "projector"])
def test_losses_and_gradients_are_those_of_transformers_layers(
    trained: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(trained, tiny)
    forms = {
        "one": made.batch(made.documents[1:2], packed=False),
        "padded": made.batch(made.documents, packed=False),
        "packed": made.batch(made.documents),
    }
    plain = {form: step(made.model, batch) for form, batch in forms.items()}
    fast.enable(made.model)
    for form, batch in forms.items():
        with attentions(monkeypatch) as plans:
            found = step(made.model, batch)
        assert len(plans) == 2, form  # one for each layer
        if LENGTHS in batch:
            assert all(list(plan.lengths) == batch[LENGTHS] for plan in plans)
        assert_same(found, plain[form])
    names = plain["one"][1]
    assert any("audio_tower" in name for name in names) == (trained != "projector")
    assert any("language_model" in name for name in names) == (trained != "projector")
    assert all(plain[form][1][name].any() for form in forms for name in names if "multi_modal_projector" in name)


@pytest.mark.parametrize(
    "form",
    [{"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, {"tied": True}],
    ids=["a sliding window", "a tied head, as the released ones have"],
)
def test_other_language_sides_too(form: Any, tiny: Any) -> None:
    made = make("all", tiny, **form)
    batch = made.batch(made.documents[:2])
    plain = step(made.model, batch)
    fast.enable(made.model)
    assert_same(step(made.model, batch), plain)


@pytest.mark.parametrize("fast_layers", [False, True], ids=["transformers", "fast"])
def test_a_document_in_a_row_is_as_it_is_alone(fast_layers: bool, tiny: Any) -> None:
    made = make("all", tiny)
    if fast_layers:
        fast.enable(made.model)
    counts = [int((torch.tensor(one["labels"][1:]) != -100).sum()) for one in made.documents]
    alone = [step(made.model, made.batch([one])) for one in made.documents]
    loss = sum(n * each[0] for n, each in zip(counts, alone, strict=True)) / sum(counts)
    gradients = {
        name: sum(n * each[1][name] for n, each in zip(counts, alone, strict=True)) / sum(counts)
        for name in alone[0][1]
    }
    assert_same(step(made.model, made.batch(made.documents)), (loss, gradients))


def test_the_other_document_changes_nothing(tiny: Any) -> None:
    """Bit for bit: neither what the second document says nor what is heard in it reaches the first one's states."""
    made = make("projector", tiny)
    model = made.model.eval()
    fast.enable(model)
    second = drawn(made.processor, SHAPES[:1], 7)[0]  # of the first's length
    first, last = made.documents[0], made.documents[1]
    with torch.no_grad():
        one, two = (
            model(**{k: v for k, v in made.batch([before, last]).items() if k not in ("labels", "use_cache")},
                  use_cache=False).logits
            for before in (first, second)
        )  # fmt: skip
    length = len(first["input_ids"])
    assert torch.equal(one[:, length:], two[:, length:])
    assert not torch.equal(one[:, :length], two[:, :length])


def test_the_trial_before_training_says_that_it_packs(tiny: Any) -> None:
    made = make("projector", tiny)
    assert packs(made.model, made.processor)
    own = made.collate()

    def leaking(features: Any) -> dict[str, Any]:
        batch = own(features)
        del batch[LENGTHS]
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    documents = drawn(made.processor, ((9, 0.3), (9, 0.3), (32, 0.6)), 0)
    assert not keeps_documents_apart(made.model, documents, leaking)


def test_generation_is_transformers_own(tiny: Any) -> None:
    made = make("projector", tiny)
    model = made.model.eval()
    batch = made.batch(made.documents[1:2], packed=False)
    del batch["labels"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**batch, **settings)
    fast.enable(model)
    assert torch.equal(model.generate(**batch, **settings), plain)


def test_switched_off_and_taken_out(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make("lora", tiny)
    batch = made.batch(made.documents)
    plain = step(made.model, batch)
    path = fast.enable(made.model)
    path.on = False
    with attentions(monkeypatch) as plans:
        assert_same(step(made.model, batch), plain, 0.0)
    path.on = True
    path.undo()
    assert not plans
    assert not [name for name, module in made.model.named_modules() if "forward" in vars(module)]


def test_the_layout_is_that_of_its_language_side(tiny: Any) -> None:
    layout = layout_of(make("all", tiny).model)
    assert (layout.backbone, layout.body, layout.plain) == ("model.language_model", "model", False)
    assert (layout.layer_class, layout.heads, layout.kv_heads, layout.head_dim) == ("Qwen3DecoderLayer", 2, 1, 16)


def test_telling_the_lengths_changes_no_number(tiny: Any) -> None:
    made = make("all", tiny)
    batch = made.batch(made.documents)
    plain = step(made.model, batch)
    assert waits.tell_lengths(made.model) == 2  # layers of the encoder
    assert waits.tell_lengths(made.model) == 2  # and again, once each
    assert_same(step(made.model, batch), plain, 0.0)


def test_the_gpu_is_asked_for_lengths_once_a_pass() -> None:
    class Bounds:
        """Stands for bounds that lie on a GPU, and counts how often they are fetched."""

        device = torch.device("cuda")
        fetched = 0

        def cpu(self) -> Tensor:
            self.fetched += 1
            return torch.tensor([0, 3])

    lengths, first, second = waits._Lengths(), Bounds(), Bounds()
    for bounds in (first, first, first, second, second):
        assert lengths.of(bounds).tolist() == [0, 3]  # type: ignore[arg-type]
    assert (first.fetched, second.fetched) == (1, 1)
    host = torch.tensor([0, 5])
    assert lengths.of(host) is host
