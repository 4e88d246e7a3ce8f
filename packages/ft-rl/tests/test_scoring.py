"""A reward model's pass without padding against the padded one: the same scores, losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from ft_core import fast
from ft_core.fast.scores import Backbone
from ft_rl.scoring import ScoreForward, last_tokens, put_scores, score_sequences, scorer_of

LENGTHS = (24, 3, 11, 17)
RIGHT = [(0, length) for length in LENGTHS]
ANYWHERE = [(24 - LENGTHS[0], 24), (4, 4 + LENGTHS[1]), (24 - LENGTHS[2], 24), (0, LENGTHS[3])]
PAD = 0


def make(folder: Path, *, adapter: bool = True, pad: int | None = PAD) -> Any:
    """A classifier in float64, with an adapter that has been trained."""
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, pad_token_id=pad
    )
    torch.nn.init.normal_(model.score.weight, std=0.5)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model.double().train()


def batch(vocabulary: int, runs: list[tuple[int, int]]) -> dict[str, Any]:
    """Tokens at these places of each row, none of them padding's."""
    ids = torch.randint(1, vocabulary, (len(runs), 24), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, (begin, end) in enumerate(runs):
        mask[row, begin:end] = 1
    return {"input_ids": ids * mask, "attention_mask": mask, "use_cache": False}


def ask(model: Any, given: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Scores, and the gradients of a loss that has a term of each."""
    scores = model(**given).logits
    assert scores.shape == (len(LENGTHS), 1)
    loss = (scores[:, 0] * torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=scores.dtype)).sum() + (scores**2).sum()
    return scores.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def check_equal(one: tuple[Any, list[Any]], other: tuple[Any, list[Any]], near: float = 1e-11) -> None:
    """In float64: a few hundred operations of 1e-16 each, of numbers up to 100: 1e-11 is a thousand times that.

    transformers computes angles and norms in float32 all the same: where these are of other positions, or computed in
    float64 by ft's layers, some units in float32's last place, 6e-8, of numbers up to 100: ``SINGLE``.
    """
    torch.testing.assert_close(one[0], other[0], rtol=near, atol=near)
    for mine, theirs in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=10 * near, atol=10 * near)


SINGLE = 5e-6


class Passes:
    """How many tokens each pass through the backbone has."""

    def __init__(self, model: Any) -> None:
        found = Backbone.of(model)
        assert found is not None
        self.tokens: list[int] = []
        found.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: self.tokens.append((args[0] if args else kwargs["input_ids"]).numel()),
            with_kwargs=True,
        )


@pytest.mark.parametrize("layers", ["transformers", "fast"])
@pytest.mark.parametrize("adapter", [True, False])
def test_packed_and_padded_are_one(tiny_model: Path, layers: str, adapter: bool) -> None:
    model = make(tiny_model, adapter=adapter)
    given = batch(model.config.vocab_size, RIGHT)
    plain = ask(model, given)
    if layers == "fast":
        fast.enable(model)
    expected = ask(model, given)
    forward = put_scores(model)
    assert isinstance(forward, ScoreForward)
    assert forward.padding_free
    passes = Passes(model)
    packed = ask(model, given)
    check_equal(packed, expected)
    check_equal(packed, plain, SINGLE)
    assert passes.tokens == [sum(LENGTHS)]
    forward.padding_free = False
    check_equal(ask(model, given), expected)
    assert passes.tokens[-1] == 4 * 24


@pytest.mark.parametrize("whole", [False, True], ids=["a prompt", "one is the other's beginning"])
def test_what_a_pair_shares_is_computed_once(tiny_model: Path, whole: bool) -> None:
    """By the fast layers; the scores and gradients are those of the padded batch."""
    model = make(tiny_model)
    fast.enable(model)
    given = batch(model.config.vocab_size, RIGHT)
    ids = given["input_ids"]
    shared = LENGTHS[3] if whole else 12
    ids[3, :shared] = ids[0, :shared]  # a pair: rows of 24 and 17 tokens
    expected = ask(model, given)
    put_scores(model)
    passes = Passes(model)
    check_equal(ask(model, given), expected)
    assert passes.tokens == [sum(LENGTHS) - shared]


@pytest.mark.parametrize("layers", ["transformers", "fast"])
def test_padding_may_lie_on_any_side(tiny_model: Path, layers: str) -> None:
    model = make(tiny_model)
    given = batch(model.config.vocab_size, ANYWHERE)
    expected = ask(model, given)
    if layers == "fast":
        fast.enable(model)
    put_scores(model)
    passes = Passes(model)
    check_equal(ask(model, given), expected, SINGLE)
    assert passes.tokens == [sum(LENGTHS)]


def test_in_float32(tiny_model: Path) -> None:
    """Sums of up to 64 products in two layers, with scores up to 5: some hundred units in the last place."""
    model = make(tiny_model).float()
    given = batch(model.config.vocab_size, RIGHT)
    expected = ask(model, given)
    put_scores(model)
    packed = ask(model, given)
    torch.testing.assert_close(packed[0], expected[0], rtol=0, atol=5 * 100 * 2**-24)
    for mine, theirs in zip(packed[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_the_last_token_is_transformers(tiny_model: Path) -> None:
    """Also where texts end in the token that pads, as with a tokenizer that has no other, or consist of it."""
    model = make(tiny_model)
    given = batch(model.config.vocab_size, RIGHT)
    for row, length in ((0, 24), (2, 10)):
        given["input_ids"][row, length - 1 :] = PAD
    given["input_ids"][1] = PAD
    expected = ask(model, given)
    put_scores(model)
    check_equal(ask(model, given), expected)
    kept = given["attention_mask"].bool()
    assert last_tokens(given["input_ids"], kept, PAD).nonzero()[:, 1].tolist() == [22, 0, 8, 16]


def test_other_calls_are_the_models_own(tiny_model: Path) -> None:
    model = make(tiny_model)
    given = batch(model.config.vocab_size, RIGHT)
    labels = torch.ones(4, 1, dtype=torch.float64)
    expected = model(**given, labels=labels).loss
    forward = put_scores(model)
    assert forward is not None
    passes = Passes(model)
    assert torch.equal(model(**given, labels=labels).loss, expected)
    assert model(**given, output_hidden_states=True).hidden_states[0].shape == (4, 24, 32)
    model.config.get_text_config().pad_token_id = None
    with pytest.raises(ValueError, match="no padding token"):
        model(**given)
    assert set(passes.tokens) == {4 * 24}
    assert put_scores(model) is forward


def test_a_model_whose_layers_carry_a_state_along_the_row_stays_padded(tiny_model: Path) -> None:
    model = make(tiny_model)

    def leak(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 0.1 * out.cumsum(1)

    model.base_model.model.model.layers[0].register_forward_hook(leak)
    given = batch(model.config.vocab_size, RIGHT)
    expected = ask(model, given)
    forward = put_scores(model)
    assert forward is not None
    assert not forward.padding_free
    passes = Passes(model)
    one = ask(model, given)
    assert torch.equal(one[0], expected[0])
    assert passes.tokens == [4 * 24]
    forward.padding_free = True  # what it would be otherwise
    assert not torch.allclose(ask(model, given)[0], expected[0], atol=1e-3)


def test_families_that_are_not_known_keep_their_own(tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=1)
    model = GPT2ForSequenceClassification(config).eval()
    model.config.pad_token_id = PAD
    assert put_scores(model) is None
    assert "forward" not in vars(model)
    given = batch(len(tokenizer), RIGHT)
    with torch.no_grad():
        expected = model(**given).logits[:, 0]
        made = scorer_of(model)(given["input_ids"], given["attention_mask"])
    assert torch.equal(made, expected)


@pytest.mark.parametrize("layers", ["transformers", "fast"])
@pytest.mark.parametrize("tokens", [1, 40, 1000])
def test_sequences_score_as_each_does_alone(tiny_model: Path, layers: str, tokens: int) -> None:
    model = make(tiny_model).eval()
    chance = torch.Generator().manual_seed(3)
    sequences = [
        torch.randint(1, model.config.vocab_size, (n,), generator=chance).tolist() for n in (5, 20, 2, 20, 9, 1)
    ]
    with torch.no_grad():
        expected = [float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]
    if layers == "fast":
        fast.enable(model)
    seen: list[tuple[int, int]] = []
    made = score_sequences(
        scorer_of(model), sequences, pad=PAD, tokens=tokens, progress=lambda done, total: seen.append((done, total))
    )
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), torch.tensor(expected).double(), rtol=0, atol=SINGLE)
    assert seen[0] == (0, 6)
    assert len(seen) == {1: 6, 40: 2, 1000: 1}[tokens]
    assert "forward" not in vars(model.get_base_model())
