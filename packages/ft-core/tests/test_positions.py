"""More positions than a model has, by rotary scaling: what is written into its configuration, what is refused, and that
what was trained with it is asked with it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ft_core import load
from ft_core.config import RopeScaling
from ft_core.config.load import check_config, read_rope_scaling
from ft_core.errors import ConfigError, FtError, ModelError
from ft_core.models import load_run
from ft_core.models.positions import check_length, check_scaled, positions, scale
from ft_core.runs import Run

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PAIRS = 8
THETA = 10000.0
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(PAIRS)], "long_factor": [1.0 + i for i in range(PAIRS)]}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}


def scaled(config: Any, value: Any, max_length: int | None = None) -> RopeScaling:
    asked = read_rope_scaling(value)
    assert asked is not None
    return scale(config, asked, max_length, "the model")


def refused(config: Any, value: Any, max_length: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        scaled(config, value, max_length)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def llama(**rope: Any) -> Any:
    return LlamaConfig(**SIZES, **({"rope_parameters": {"rope_theta": THETA, **rope}} if rope else {}))


# -- what is written


def test_the_factor_follows_from_the_length() -> None:
    config = llama()
    assert scaled(config, "yarn", 512) == RopeScaling(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=128
    )
    assert config.max_position_embeddings == positions(config) == 512
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": THETA,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }


def test_dynamic_scaling_keeps_the_positions_that_its_base_is_relative_to() -> None:
    config = llama()
    scaled(config, "dynamic", 512)
    assert config.max_position_embeddings == 128
    assert positions(config) == 512


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3", "longrope"])
@pytest.mark.parametrize("length", [300, 512, 511])
def test_what_was_resolved_gives_the_same_again(kind: str, length: int) -> None:
    """Also with factors that no decimal number is."""
    first, second = llama(), llama()
    resolved = scaled(first, {"rope_type": kind, **(FACTORS if kind == "longrope" else {})}, length)
    stored = yaml.safe_load(yaml.safe_dump(resolved.model_dump(mode="json")))
    assert scaled(second, stored, length) == resolved
    assert second.to_dict() == first.to_dict()
    assert positions(second) == length


@pytest.mark.parametrize(
    ("rope", "length", "factor"),
    [
        # 128 positions are what a factor of 4 made of 32
        ({"rope_type": "linear", "factor": 4.0}, 256, 8.0),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 256, 8.0),
        # as Llama 3.1's: the positions are more than the factor times the original ones
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "low_freq_factor": 1.0,
                "high_freq_factor": 2.0,
            },
            256,
            16.0,
        ),
        # a factor of 2 gives 256 of the 128
        ({"rope_type": "dynamic", "factor": 2.0}, 512, 4.0),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_a_scaled_model_is_extended_by_its_own_type(rope: dict[str, Any], length: int, factor: float) -> None:
    config = llama(**rope)
    resolved = scaled(config, rope["rope_type"], length)
    assert resolved.factor == factor
    assert config.rope_parameters == {"rope_theta": THETA, **rope, "factor": factor}
    assert positions(config) == length
    other = "yarn" if rope["rope_type"] == "linear" else "linear"
    most = positions(llama(**rope))
    assert refused(llama(**rope), other, length) == (
        f"rope_scaling: the model has its {most} positions by {rope['rope_type']} already, which {other} would "
        f"replace: set rope_scaling: {rope['rope_type']}, or leave it out"
    )


def test_positions_that_a_configuration_does_not_spell_out() -> None:
    """Qwen 2.5's documentation adds yarn to config.json and leaves max_position_embeddings as it was."""
    assert positions(llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)) == 512
    assert positions(llama(rope_type="linear", factor=4.0)) == 128
    assert positions(llama()) == 128
    assert positions(GPT2Config()) == 1024


def test_fewer_original_positions_than_the_model_has() -> None:
    """Qwen 3 has 40960 positions and was trained on texts of 32768."""
    config = llama()
    resolved = scaled(config, {"rope_type": "yarn", "original_max_position_embeddings": 96}, 384)
    assert (resolved.factor, resolved.original_max_position_embeddings) == (4.0, 96)
    assert positions(config) == 384


def test_a_factor_beyond_what_the_length_needs() -> None:
    """Trained on shorter texts than it will be asked with."""
    config = llama()
    assert scaled(config, {"type": "yarn", "factor": 4}, 64).factor == 4.0
    assert positions(config) == 512


# -- the angles: transformers' modules on the configuration, against the papers' formulas


def angles(model: Any) -> tuple[torch.Tensor, float]:
    rotary = model.model.rotary_emb
    return rotary.inv_freq.double(), float(rotary.attention_scaling)


WAVES = THETA ** -(torch.arange(PAIRS, dtype=torch.float64) / PAIRS)


def of_yarn(factor: float, original: int) -> torch.Tensor:
    """Peng et al. 2023, equations 18 to 22, its ramp over the dimensions' numbers as in the authors' code."""

    def number(turns: float) -> float:
        return 2 * PAIRS * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(number(32)), 0), min(math.ceil(number(1)), 2 * PAIRS - 1)
    ramp = ((torch.arange(PAIRS, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return WAVES / factor * ramp + WAVES * (1 - ramp)


def of_llama3(factor: float, original: int) -> torch.Tensor:
    ramp = (original * WAVES / (2 * math.pi) - 1.0) / (4.0 - 1.0)
    return WAVES * ((1 - ramp.clamp(0, 1)) / factor + ramp.clamp(0, 1))


EXPECTED = {
    "linear": (WAVES / 4, 1.0),
    "yarn": (of_yarn(4.0, 128), 0.1 * math.log(4.0) + 1),
    "llama3": (of_llama3(4.0, 128), 1.0),
    # Ding et al. 2024; the factor on attention as in its authors' code
    "longrope": (WAVES / torch.tensor(FACTORS["short_factor"]), math.sqrt(1 + math.log(4.0) / math.log(128))),
    "dynamic": (WAVES, 1.0),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", EXPECTED)
def test_the_angles_are_the_papers(family: str, kind: str, tmp_path: Path) -> None:
    make_config, make = FAMILIES[family]
    config = make_config(**SIZES)
    value = {"rope_type": kind, **(FACTORS if kind == "longrope" else {})}
    if family == "phi3" and kind != "longrope":  # transformers would read it back as another one
        assert refused(config, value, 512).startswith(f"rope_scaling: {kind} is not for the model: ")
        return
    scaling = scaled(config, value, 512)
    model = make(config)
    check_scaled(model, scaling, "the model")
    frequencies, attention = angles(model)
    # fp32: powers, products and quotients of a few roundings of 6e-8 each.
    torch.testing.assert_close(frequencies, EXPECTED[kind][0], rtol=1e-6, atol=0)
    assert attention == pytest.approx(EXPECTED[kind][1], rel=1e-12)
    if kind in ("dynamic", "longrope"):
        model.model.rotary_emb(torch.empty(0), torch.arange(512)[None])
        base = THETA * (4.0 * 512 / 128 - 3.0) ** (2 * PAIRS / (2 * PAIRS - 2))
        grown = base ** -(torch.arange(PAIRS, dtype=torch.float64) / PAIRS)
        long = grown if kind == "dynamic" else WAVES / torch.tensor(FACTORS["long_factor"])
        torch.testing.assert_close(angles(model)[0], long, rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert positions(again.config) == 512
    assert angles(again)[1] == attention
    if kind != "dynamic":
        assert again.config.max_position_embeddings == 512
    fresh = make_config(**SIZES)
    scaled(fresh, value, 512)
    assert torch.equal(angles(again)[0], angles(make(fresh))[0])


# -- what is refused


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "yran",
            "rope_scaling.rope_type: 'yran' is not allowed; did you mean 'yarn'? (allowed: linear, dynamic, yarn, "
            "llama3, longrope)",
        ),
        ({"rope_type": "yarn", "factor": 0.5}, "rope_scaling.factor: 0.5 is not allowed (allowed: greater than or "
         "equal to 1)"),
        ({"rope_type": "yarn", "factor": True}, "rope_scaling.factor: True is not allowed (allowed: a number)"),
        ({"factor": 2}, "rope_scaling.rope_type: is missing, and has no default"),
        (4, "rope_scaling: 4 is not allowed (allowed: a type such as yarn, or keys with values)"),
        (
            {"type": "linear", "beta_fast": 3},
            "rope_scaling: {'rope_type': 'linear', 'beta_fast': 3} is not allowed (allowed: beta_fast with yarn only)",
        ),
        (
            {"type": "yarn", "beta_fast": 1},
            "rope_scaling: {'rope_type': 'yarn', 'beta_fast': 1} is not allowed (allowed: beta_fast, 32 if unset, "
            "above beta_slow, 1 if unset)",
        ),
        (
            {"type": "longrope", "long_factor": [1]},
            "rope_scaling: {'rope_type': 'longrope', 'long_factor': [1]} is not allowed (allowed: short_factor and "
            "long_factor both, or neither)",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_in_the_value(value: Any, message: str) -> None:
    """The same words in a configuration and in a call."""
    with pytest.raises(ConfigError) as called:
        load("nowhere", rope_scaling=value)
    with pytest.raises(FtError) as configured:
        check_config({"model": "m", "data": "d", "max_length": 512, "rope_scaling": value})
    assert str(called.value) == str(configured.value) == message


def test_an_unknown_key() -> None:
    with pytest.raises(
        ConfigError, match=r"^unknown key 'rope_scaling\.facter'; did you mean 'rope_scaling\.factor'\?"
    ):
        read_rope_scaling({"rope_type": "yarn", "facter": 2})


def test_neither_length_nor_factor() -> None:
    line = (
        "rope_scaling: yarn: its factor follows from max_length, which is not set: set max_length, or "
        "rope_scaling.factor"
    )
    assert refused(llama(), "yarn") == line
    with pytest.raises(FtError) as caught:
        check_config({"model": "m", "data": "d", "rope_scaling": "yarn"})
    assert str(caught.value) == line


def test_what_does_not_fit() -> None:
    assert refused(llama(), "yarn", 100) == (
        "rope_scaling: yarn: max_length 100 is within the 128 positions of the model: leave rope_scaling out, or give "
        "rope_scaling.factor"
    )
    assert refused(llama(), {"rope_type": "yarn", "factor": 2}, 512) == (
        "rope_scaling.factor: 2 times 128 positions is 256, fewer than max_length 512: leave the factor out, or give "
        "at least 4"
    )
    assert refused(llama(rope_type="linear", factor=4.0), {"rope_type": "linear", "factor": 2}) == (
        "rope_scaling.factor: 2 times 32 positions is no more than the 128 of the model: give a larger factor, or "
        "leave rope_scaling out"
    )
    assert refused(llama(), {"rope_type": "yarn", "original_max_position_embeddings": 129}, 512) == (
        "rope_scaling.original_max_position_embeddings: 129 is more than the 128 positions of the model"
    )
    own = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert refused(llama(**own), {"rope_type": "yarn", "original_max_position_embeddings": 64}, 512) == (
        "rope_scaling.original_max_position_embeddings: 64 is not the model's own, 32"
    )
    assert refused(llama(**own, attention_factor=1.5), "yarn", 512) == (
        "rope_scaling: the model states an attention_factor (1.5) for its own factor: give "
        "rope_scaling.attention_factor for 16"
    )
    assert refused(GPT2Config(), "yarn", 2048) == (
        "rope_scaling: the model has no rotary embedding and cannot be scaled: leave it out"
    )


def test_longrope_needs_factors_that_were_searched() -> None:
    assert refused(llama(), "longrope", 512) == (
        "rope_scaling: longrope needs short_factor and long_factor searched for this length; the model carries none: "
        "give both, or set max_length to at most 128"
    )
    own = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32, **FACTORS}
    assert refused(llama(**own), "longrope", 512) == (
        "rope_scaling: longrope needs short_factor and long_factor searched for this length; those of the model were "
        "searched for its 128 positions: give both, or set max_length to at most 128"
    )
    more = llama(**own)
    assert scaled(more, {"rope_type": "longrope", **FACTORS}, 512).factor == 16.0
    assert refused(llama(), {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, 512) == (
        "rope_scaling.short_factor: 1 numbers are not one for each of the model's 8 pairs"
    )


@pytest.mark.parametrize(
    ("config", "way"),
    [
        (llama(), ", or set rope_scaling: yarn"),
        (llama(rope_type="linear", factor=2.0), ", or set rope_scaling: linear"),
        (llama(rope_type="longrope", factor=4.0, original_max_position_embeddings=32, **FACTORS), ""),
        (Phi3Config(**SIZES), ""),
    ],
    ids=["plain", "linear", "longrope", "phi3"],
)
def test_a_length_beyond_the_positions(config: Any, way: str) -> None:
    check_length(config, 128, "the model")
    with pytest.raises(ModelError) as caught:
        check_length(config, 129, "the model")
    assert str(caught.value) == f"max_length 129 is more than the 128 positions of the model: lower it to 128{way}"


def test_a_class_that_does_not_read_it() -> None:
    model = LlamaForCausalLM(llama())
    with pytest.raises(ConfigError, match="transformers' LlamaForCausalLM \\(m\\) computes no yarn: leave it out"):
        check_scaled(model, RopeScaling(rope_type="yarn", factor=2.0), "m")


# -- loaded, trained and asked


def test_loading(tiny: Path) -> None:
    model, _ = load(tiny, max_length=2048, rope_scaling="yarn", dtype="float32")
    config = AutoConfig.from_pretrained(tiny)
    scaled(config, "yarn", 2048)
    plain = AutoModelForCausalLM.from_pretrained(tiny, config=config, dtype=torch.float32)
    ids = torch.randint(3, 90, (1, 700), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert positions(model.config) == 2048


def test_a_run_is_asked_as_it_was_trained(
    ft: Any, configure: Any, tiny: Path, tmp_path: Path, sums: Any, write_rows: Any
) -> None:
    """Texts of 96 tokens on a model of 48 positions; a command refuses a prompt beyond the scaled ones only."""
    from ft_core.generation import generate_ids

    short = Path(shutil.copytree(tiny, tmp_path / "short"))
    values = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 48}), encoding="utf-8")
    refusal = ft("train", configure(model=str(short), max_length=96))
    assert refusal.code == 2
    assert refusal.message == (
        f"ft train: max_length 96 is more than the 48 positions of {short}: lower it to 48, or set rope_scaling: yarn"
    )
    path = configure(model=str(short), max_length=96, rope_scaling="yarn", eval_split=6)
    done = ft("train", path)
    assert done.code == 0, done.err
    run = Run.open(tmp_path / "run")
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 48}
    assert run.values()["rope_scaling"] == rope
    base = run.environment["base_model"]
    assert base["max_position_embeddings"] == 96
    assert base["rope_parameters"] == {"rope_theta": THETA, **rope}
    assert ft("train", path, "training.max_steps=5", "--resume").code == 0
    other = ft("train", path, "training.max_steps=6", "rope_scaling=linear", "--resume")
    assert other.code == 2
    assert "rope_scaling.rope_type was 'yarn' and is 'linear'" in other.message

    model, tokenizer = load_run(run, say=lambda _: None)
    assert positions(model.config) == 96
    assert model.get_base_model().model.rotary_emb.rope_type == "yarn"
    assert model.get_base_model().model.rotary_emb.attention_scaling == 0.1 * math.log(2.0) + 1
    generate_ids(model, tokenizer, [[5] * 80], max_new_tokens=4)
    with pytest.raises(FtError, match="leaves none of the model's 96 positions"):
        generate_ids(model, tokenizer, [[5] * 96], max_new_tokens=4)
    assert ft("eval", tmp_path / "run").code == 0


def test_full_fine_tuning_keeps_it_in_the_model(ft: Any, configure: Any, tmp_path: Path) -> None:
    path = configure(
        lora=None, max_length=64, rope_scaling={"rope_type": "linear", "factor": 2}, training={"max_steps": 1}
    )
    done = ft("train", path)
    assert done.code == 0, done.err
    model, _ = load_run(Run.open(tmp_path / "run"), say=lambda _: None)
    assert model.config.rope_parameters == {"rope_theta": THETA, "rope_type": "linear", "factor": 2.0}
    assert positions(model.config) == 1024


def test_a_factor_without_a_length(ft: Any, configure: Any, tmp_path: Path) -> None:
    """The default length is lowered to the scaled positions."""
    path = configure(rope_scaling={"rope_type": "dynamic", "factor": 2}, training={"max_steps": 1})
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    del values["max_length"]
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = ft("train", path)
    assert done.code == 0, done.err
    assert "max_length is 1024: tiny has no more positions\n" in done.err
    assert Run.open(tmp_path / "run").values()["max_length"] == 1024
