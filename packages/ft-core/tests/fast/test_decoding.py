"""The fast layers write the answers that transformers writes: token for token, batch for batch, draw for draw."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ft_core import fast
from ft_core.errors import DataError
from ft_core.fast.decoding import Decoder, decoder_of, forget
from ft_core.fast.decoding.decoder import _rows, _slots

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MAKE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True)),
    "llama3": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, mlp_bias=True, rope_parameters={**LLAMA3, "original_max_position_embeddings": 64})
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24)),
    # bitsandbytes on a CPU expands 4-bit weights wrongly where a block of 64 goes on in the next row.
    "blocks": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 128}, attention_bias=True)),
}
FAMILIES = [family for family in MAKE if family != "blocks"]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32], [44, 3, 90, 12]]
"""Of different lengths, so that transformers has to pad them."""


def make(family: str, adapter: str = "none") -> Any:
    """A tiny model with random weights everywhere, norms and biases too, and a head of some decision."""
    torch.manual_seed(0)
    model: Any = MAKE[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1).add_(torch.randn_like(parameter) * 0.1)
    if adapter == "none":
        return model.eval()
    config = LoraConfig(
        r=5,
        lora_alpha=9,
        target_modules=["q_proj", "v_proj", "down_proj", "lm_head"] if adapter == "some" else "all-linear",
        init_lora_weights=False,
        use_rslora=adapter == "rslora",
        use_dora=adapter == "dora",
        modules_to_save=["lm_head"] if adapter == "saved" else None,
    )
    return get_peft_model(model, config).eval()


def by_transformers(model: Any, prompts: list[list[int]], new: int, **settings: Any) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    config = GenerationConfig(max_new_tokens=new, pad_token_id=0, **{"do_sample": False, **settings})
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    rows: list[list[int]] = out[:, longest:].tolist()
    return rows


def ready(model: Any) -> Decoder:
    decoder = decoder_of(model, anywhere=True)
    assert decoder is not None
    assert decoder.reason is None
    return decoder


def by_ft(model: Any, prompts: list[list[int]], new: int, **settings: Any) -> list[list[int]]:
    steps = list(ready(model).steps(prompts, new=new, **settings))
    return [[tokens[row] for tokens in steps] for row in range(len(prompts))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["none", "all", "some", "rslora"])
def test_greedy_answers_are_those_of_transformers(family: str, adapter: str) -> None:
    """In float32, whose rounding (1e-6 of logits that lie 1e-2 apart) decides nothing here."""
    model = make(family, adapter)
    expected = by_transformers(model, PROMPTS, 24)
    assert by_ft(model, PROMPTS, 24) == expected
    assert len({token for row in expected for token in row}) > 10  # no answer of one word
    for prompt, row in zip(PROMPTS, expected, strict=True):
        assert by_ft(model, [prompt], 24) == [row]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_step(family: str) -> None:
    """Those of transformers on the whole text, to float32's rounding over two layers of sums of up to 112 products."""
    model = make(family, "all")
    decoder = ready(model)
    session = decoder._session(3, 40)
    texts = [list(prompt) for prompt in PROMPTS[:3]]
    logits = session.begin(texts)
    for step in range(12):
        with torch.no_grad():
            exact = [copy.copy(model)(torch.tensor([text])).logits[0, -1] for text in texts]
        for row, expected in enumerate(exact):
            error = (logits[row] - expected).norm() / expected.norm()
            assert error < 112**0.5 * 2**-21, (step, row)
        tokens = torch.tensor([7, 11 + step, 23])
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        logits = session.follow(tokens, 1)


def test_an_adapter_switched_off_merged_trained_or_changed_is_seen() -> None:
    model = make("qwen3", "all")
    adapted = by_ft(model, PROMPTS, 12)
    with model.disable_adapter():
        plain = by_ft(model, PROMPTS, 12)
        assert plain == by_transformers(model, PROMPTS, 12)
    assert by_ft(model, PROMPTS, 12) == adapted != plain
    with torch.no_grad():  # as an optimizer does it: in place
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(-1.5)
    trained = by_ft(model, PROMPTS, 12)
    assert trained == by_transformers(model, PROMPTS, 12) != adapted
    model.merge_adapter()
    assert by_ft(model, PROMPTS, 12) == by_transformers(model, PROMPTS, 12) == trained
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    model.set_adapter("other")
    assert by_ft(model, PROMPTS, 12) == by_transformers(model, PROMPTS, 12) != trained


@pytest.mark.parametrize(("temperature", "top_p"), [(1.5, 1.0), (0.7, 0.8), (1.0, 0.0)])
def test_the_same_seed_draws_the_same_tokens(temperature: float, top_p: float) -> None:
    """All rows are drawn from at each step, as transformers does."""
    model = make("llama")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    torch.manual_seed(3)
    expected = by_transformers(model, PROMPTS, 16, **sampling)
    torch.manual_seed(3)
    drawn = by_ft(model, PROMPTS, 16, temperature=temperature, top_p=top_p)
    assert drawn == expected
    assert (drawn == by_ft(model, PROMPTS, 16)) == (top_p == 0.0)


def test_what_is_drawn_follows_the_distribution() -> None:
    """Of 4000 draws the share of each token is within five standard deviations of its probability."""
    model = make("llama")
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    probabilities = (logits / 3.0).softmax(-1)
    torch.manual_seed(0)
    draws = torch.tensor(by_ft(model, [PROMPTS[0]] * 4000, 1, temperature=3.0))[:, 0]
    shares = torch.bincount(draws, minlength=VOCABULARY) / 4000
    assert ((shares - probabilities).abs() <= 5 * (probabilities * (1 - probabilities) / 4000).sqrt() + 1e-3).all()


def test_answers_end_at_their_end_tokens() -> None:
    model = make("llama")
    whole = by_ft(model, PROMPTS, 20)
    stops = {whole[0][3], whole[2][9]}
    found = ready(model).answers(PROMPTS, new=20, stops=stops, temperature=0.0, top_p=1.0)
    for said, row in zip(found, whole, strict=True):
        end = next((i for i, token in enumerate(row) if token in stops), 20)
        assert said == row[:end]
    assert len(found[0]) <= 3
    passes: list[int] = []
    decoder = ready(model)
    steps = decoder.steps([PROMPTS[0]], new=400)
    for tokens in steps:
        passes.append(tokens[0])
        if len(passes) == 2:
            break
    assert "another answer" in str(decoder.why_not(1, 8))
    steps.close()
    assert decoder.why_not(1, 8) is None
    assert passes == whole[0][:2]
    assert by_ft(model, PROMPTS, 20) == whole


def test_sessions_are_kept_and_replaced() -> None:
    model = make("mistral")
    expected = by_transformers(model, PROMPTS, 12)
    assert by_ft(model, PROMPTS, 12) == expected
    session = ready(model).session
    assert by_ft(model, PROMPTS[:3], 12) == expected[:3]  # a row is left over
    assert ready(model).session is session
    assert by_ft(model, PROMPTS[:1], 300)[0][:12] == expected[0]
    other = ready(model).session
    assert other is not session
    assert other is not None
    assert (other.rows, other.slots) == (1, 512)
    assert vars(copy.deepcopy(model))["_ft_decoder"] is None
    assert by_ft(copy.deepcopy(model), PROMPTS, 12) == expected
    forget(model)
    assert "_ft_decoder" not in vars(model)
    assert [_rows(n) for n in (1, 2, 3, 5, 8, 9, 17)] == [1, 2, 4, 8, 8, 16, 24]
    assert [_slots(n) for n in (1, 256, 257, 2049, 5000)] == [256, 256, 512, 2560, 5120]


def test_weights_that_are_moved_leave_no_memory_behind() -> None:
    """The fast layers move frozen weights when they first train or measure, 4.8 GB of a model of 8 billion."""
    model = make("llama3", "all")
    memory, places = [], []
    for layer in model.get_base_model().model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
            numbers = module.base_layer.weight.detach().numpy().copy()
            module.base_layer.weight.data = torch.from_numpy(numbers)
            memory.append(weakref.ref(numbers))
            places.append(module.base_layer.weight)
    del numbers
    expected = by_ft(model, PROMPTS, 4)
    assert all(reference() is not None for reference in memory)
    for weight in places:
        weight.data = weight.data.clone()
    assert not any(reference() is not None for reference in memory)
    assert by_ft(model, PROMPTS, 4) == expected


def test_a_step_of_training_has_the_memory_that_answers_kept() -> None:
    model = make("qwen3", "all")
    fast.enable(model)
    expected = by_ft(model, PROMPTS, 4)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert "_ft_decoder" in vars(model.get_base_model())
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    resting = vars(model.get_base_model())["_ft_decoder"]
    assert resting.session is None
    assert resting._layers is None
    model.eval()
    assert by_ft(model, PROMPTS, 4) == expected
    fast.forget(model)
    assert "_ft_decoder" not in vars(model.get_base_model())


def test_too_few_tokens() -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        next(ready(make("llama")).steps([[1]], new=0))


def refused(model: Any) -> str:
    decoder = decoder_of(model, anywhere=True)
    assert decoder is not None
    assert decoder.reason is not None
    assert "\n" not in decoder.reason
    return decoder.reason


def test_refusals() -> None:
    assert "only be computed by its own code" in refused(make("llama", "dora"))
    assert "only be computed by its own code" in refused(make("qwen2", "saved"))
    model = make("llama")
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert refused(model) == "model.layers.1.mlp has a hook"
    handle.remove()
    assert decoder_of(model, anywhere=True).reason is None  # type: ignore[union-attr]
    model.model.norm.forward = model.model.norm.forward  # as whoever replaced it for a while puts it back
    assert decoder_of(model, anywhere=True).reason is None  # type: ignore[union-attr]
    model.model.norm.forward = lambda x: x
    assert refused(model) == "the forward of model.norm is somebody else's"
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert refused(get_peft_model(make("llama"), prompt)) == "its adapter is a learned prompt"
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dynamic))
    assert refused(model) == "its rotary embedding (dynamic) changes with the length of the text"
    dropping = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    assert "dropout" in refused(dropping.train())
    mixed = make("llama")
    mixed.model.layers[0].mlp.up_proj.half()
    assert "is torch.float16" in refused(mixed)
    assert decoder_of(make("llama")) is None  # a CPU has no reason to


def in_few_bits(model: Any, quantization: str) -> Any:
    """The model with bitsandbytes' layers in the places of its linear ones."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit

    for layer in model.model.layers:
        for part, name in ((p, n) for p in (layer.self_attn, layer.mlp) for n, _ in list(p.named_children())):
            old = getattr(part, name)
            if not isinstance(old, torch.nn.Linear):
                continue
            bias = old.bias is not None
            if quantization == "nf4":
                new = Linear4bit(old.in_features, old.out_features, bias=bias, quant_type="nf4")
                new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
                new.support_avx512bf16_for_cpu = False
            else:
                new = Linear8bitLt(old.in_features, old.out_features, bias=bias, has_fp16_weights=False)
                new.load_state_dict(old.state_dict())
            new.bias = old.bias
            setattr(part, name, new.to("cpu"))
    return model.eval()


@pytest.mark.parametrize("weights", ["nf4", "side by side", "bfloat16"])
@pytest.mark.parametrize("how", ["in place", "other memory"])
def test_biases_that_were_trained_are_seen(weights: str, how: str) -> None:
    """A step's logits, of one row, follow biases that an optimizer changes in place after the first answer."""
    model = make("blocks" if weights == "nf4" else "qwen2")
    if weights == "nf4":
        model = in_few_bits(model, "nf4")
    elif weights == "bfloat16":
        model = model.to(torch.bfloat16)
    else:
        for layer in model.model.layers:  # one below the other in memory, as the fast layers move them
            parts = [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]
            whole = torch.cat([part.data for part in parts])
            for part, memory in zip(parts, whole.split([part.shape[0] for part in parts]), strict=True):
                part.data = memory
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], bias="all")).eval()

    def error() -> float:
        decoder = ready(model)
        session = decoder._session(1, 40)
        session.begin([PROMPTS[0]])
        found = session.follow(torch.tensor([3]), 1)[0].float()
        with torch.no_grad():
            expected = model(torch.tensor([[*PROMPTS[0], 3]])).logits[0, -1].float()
        return float((found - expected).norm() / expected.norm())

    # Of float32, over two layers of sums of up to 112 products; in bfloat16 the roundings of some ten operations in
    # each layer, of both, where a bias is off by its own size.
    bound = 40**0.5 * 2**-8 if weights == "bfloat16" else 112**0.5 * 2**-21
    assert error() < bound
    products = [product for layer in ready(model)._layers.layers for product in layer.products]  # type: ignore[union-attr]
    places = [product.bias.data_ptr() for product in products if product.bias is not None]
    changed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_proj.bias", "base_layer.bias")):
                changed += 1
                if how == "in place":
                    parameter.add_(torch.randn_like(parameter) * 3)
                else:
                    parameter.data = parameter + torch.randn_like(parameter) * 3
    assert changed
    assert error() < bound
    assert [product.bias.data_ptr() for product in products if product.bias is not None] == places  # graphs hold them


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized(quantization: str) -> None:
    """Logits within the error of rounding activations: bitsandbytes' 8-bit layers round them to 1/127 of the largest,
    ours do not; 4-bit weights are expanded to the same numbers."""
    model = in_few_bits(make("blocks"), quantization)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = adapted(torch.tensor([PROMPTS[0]])).logits[0, -1]
    decoder = ready(adapted)
    logits = decoder._session(1, 20).begin([PROMPTS[0]])[0]
    assert (logits - expected).norm() / expected.norm() < (1e-5 if quantization == "nf4" else 0.05)
    if quantization == "nf4":
        assert by_ft(adapted, PROMPTS, 12) == by_transformers(adapted, PROMPTS, 12)


FAULTS = {
    "the newest token is not seen": lambda plain, q, k, v, n, **s: plain(q, k, v, n - 1, **s),
    "another scale": lambda plain, q, k, v, n, **s: plain(q, k, v, n, **{**s, "scale": 2 * s["scale"]}),
    "heads in another order": lambda plain, q, k, v, n, **s: plain(q, k.flip(2), v, n, **s),
    "broken": lambda *_, **s: torch.ops.aten.nothing(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_on_a_machine_is_noticed_before_the_first_answer(monkeypatch, fault, dtype):
    """In a model of some depth: rounding adds up over layers, and so must not hide what is wrong."""
    from ft_core.fast.decoding import session

    plain = session.kernels.decode_attention
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 16}, initializer_range=0.1))
    model = model.to(dtype).eval()
    decoder = decoder_of(model, anywhere=True)
    assert decoder is not None
    assert decoder.reason is None
    forget(model)
    monkeypatch.setattr(session.kernels, "decode_attention", functools.partial(FAULTS[fault], plain))
    with pytest.warns(UserWarning, match="by transformers' own layers"):
        decoder = decoder_of(model, anywhere=True)
    assert decoder is not None
    assert ("fail on this machine" if fault == "broken" else "differ") in str(decoder.reason)
    monkeypatch.undo()
    assert decoder_of(model, anywhere=True).reason == decoder.reason  # not tried, and said, again and again
    forget(model)
    assert decoder_of(model, anywhere=True).reason is None


@pytest.mark.parametrize(
    ("given", "word"),
    [({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 0.0}, "top_p"),
     ({"top_p": 1.5}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens")],
)  # fmt: skip
def test_numbers_that_mean_nothing(given, word):
    from ft_core.generation import generate_ids, stream

    with pytest.raises(DataError, match=word):
        generate_ids(make("llama"), None, PROMPTS, **given)
    with pytest.raises(DataError, match=word):
        next(stream(make("llama"), None, [], **given))
