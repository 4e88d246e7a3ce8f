"""Several adapters merged as one: held against PEFT's own model with all of them, and against float64."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from ft_export import ExportError, merge
from ft_export.checkpoints import Checkpoint
from ft_export.merging import combining
from ft_export.merging.adapter import Adapter, LowRank
from ft_export.merging.combination import COMBINATIONS, weighted

BF16 = 2.0**-8
IDS = torch.arange(3, 40).unsqueeze(0)


def _delta(adapter: Path, name: str) -> torch.Tensor:
    """The change of a weight in float64."""
    mine = Adapter(adapter)
    change = mine.changes.get(name)
    if not isinstance(change, LowRank):
        return torch.zeros(())
    low, high = (mine.files.tensor(change.parts[which]).double() for which in ("A", "B"))
    return change.scale * high @ low


def _of_peft(base: Path, parts: Sequence[tuple[Path, float]], kind: str, seed: int = 0, **options: Any) -> torch.Tensor:
    """Logits of PEFT's own model, as its documentation says that adapters are combined."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(model, parts[0][0], adapter_name="a0")
    for number, (folder, _) in enumerate(parts[1:], 1):
        wrapped.load_adapter(folder, adapter_name=f"a{number}")
    names = [f"a{number}" for number in range(len(parts))]
    torch.manual_seed(seed)
    wrapped.add_weighted_adapter(names, [w for _, w in parts], "all", combination_type=kind, **options)
    wrapped.set_adapter("all")
    with torch.inference_mode():
        return wrapped.eval()(IDS).logits


def _logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.fixture(scope="module")
def pair(base: Path, make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return make_adapter(folder / "one", base, seed=1), make_adapter(folder / "two", base, seed=2, lora_alpha=4)


def _options(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if kind.startswith(("ties", "dare", "magnitude")):
        found["density"] = 0.6
    return found


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_says_what_peft_s_own_model_says(kind: str, base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    result = merge(
        one, tmp_path / "out", adapters=[(two, -0.5)], weight=0.75, combination=kind, seed=7, **_options(kind)
    )
    options = {**_options(kind), **({"svd_full_matrices": False} if kind.endswith("svd") else {})}
    theirs = _of_peft(base, [(one, 0.75), (two, -0.5)], kind, seed=7, **options)
    assert (_logits(result.folder) - theirs).norm() / theirs.norm() < 10 * BF16
    plain = _logits(base)
    assert (plain - theirs).norm() / theirs.norm() > 100 * BF16  # so that the comparison says something
    said = json.loads((result.folder / "merge.json").read_text())
    assert [part["weight"] for part in said["adapters"]] == [0.75, -0.5]
    assert said["combination"]["type"] == kind
    assert said["combination"]["seed"] == (7 if kind.startswith("dare") else None)
    assert said["logprobs"]["samples"] > 0
    assert said["combination"]["checked"] == (kind in ("cat", "linear", "svd"))
    assert (said["combination"]["from_the_sum"] < 1e-6) == (kind == "cat")


def test_the_weighted_sum_in_float64(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """``cat``, the default, is the sum of the changes; PEFT's ``linear`` is far from it."""
    one, two = pair
    exact = merge(one, tmp_path / "cat", adapters=[(two, 0.5)], weight=2.0)
    other = merge(one, tmp_path / "linear", adapters=[(two, 0.5)], weight=2.0, combination="linear")
    away = []
    stored, written, rough = Checkpoint(base), Checkpoint(exact.folder), Checkpoint(other.folder)
    for name in Adapter(one).changes:
        wanted = stored.tensor(name).double() + 2.0 * _delta(one, name) + 0.5 * _delta(two, name)
        off = (written.tensor(name).double() - wanted).abs()
        # half of the last of bfloat16's 8 binary digits is at most 2^-8 of a value; what fp32 adds is far below 2^-20
        assert bool((off <= 2.0**-8 * wanted.abs() + 2.0**-20).all()), name
        away.append(((rough.tensor(name).double() - wanted).norm() / wanted.norm()).item())
    assert min(away) > 20 * BF16
    assert "in float64 the weighted sum of their changes, in 14 weights" in exact.lines[0]
    assert "; off the weighted sum of their changes by " in other.lines[0]


def test_a_weight_for_one_adapter_alone(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = merge(pair[0], tmp_path / "out", weight=-0.5)
    name = "model.layers.1.mlp.up_proj.weight"
    wanted = Checkpoint(base).tensor(name).double() - 0.5 * _delta(pair[0], name)
    off = (Checkpoint(result.folder).tensor(name).double() - wanted).abs()
    assert bool((off <= 2.0**-8 * wanted.abs() + 2.0**-20).all())


OTHERS: dict[str, dict[str, Any]] = {
    "other ranks": {"r": 6},
    "other modules": {"target_modules": ["q_proj", "down_proj"]},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "the embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_that_differ(
    kind: str, first: bool, base: Path, pair: tuple[Path, Path], make_adapter: Any, tmp_path: Path
) -> None:
    """Every one as what it stands for by itself: PEFT would scale by the root of the rank, or lose layers."""
    parts = [pair[0], make_adapter(tmp_path / "other", base, seed=5, **OTHERS[kind])]
    parts = parts[::-1] if first else parts
    result = merge(parts[0], tmp_path / "out", adapters=[(parts[1], 0.5)])
    stored, written = Checkpoint(base), Checkpoint(result.folder)
    for name in {*Adapter(parts[0]).changes, *Adapter(parts[1]).changes}:
        change = _delta(parts[0], name) + 0.5 * _delta(parts[1], name)
        wanted = stored.tensor(name).double() + (change.T if "embed" in name else change)
        off = (written.tensor(name).double() - wanted).abs()
        assert bool((off <= 2.0**-8 * wanted.abs() + 2.0**-20).all()), name


@pytest.mark.parametrize("kind", ["linear", "svd", "ties", "dare_linear"])
@pytest.mark.parametrize("other", ["rsLoRA", "some layers"])
def test_other_combinations_of_adapters_that_differ(
    kind: str, other: str, base: Path, pair: tuple[Path, Path], make_adapter: Any, tmp_path: Path
) -> None:
    """The first one's configuration, which PEFT gives to the result, does not change the result."""
    parts = [make_adapter(tmp_path / "other", base, seed=5, **OTHERS[other]), pair[0]]
    result = merge(parts[0], tmp_path / "out", adapters=[(parts[1], 0.5)], combination=kind, **_options(kind))
    assert result.weights.merged == 14
    assert result.logprobs is not None


def test_turned_weights(tmp_path: Path, make_adapter: Any, base: Path) -> None:
    """GPT-2 keeps its weights as (in, out)."""
    config = transformers.GPT2Config(vocab_size=416, n_embd=32, n_layer=2, n_head=2, n_positions=256)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "gpt2" / name)
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    one = make_adapter(tmp_path / "one", tmp_path / "gpt2", **settings)
    two = make_adapter(tmp_path / "two", tmp_path / "gpt2", seed=2, **settings)
    for kind in ("cat", "svd"):
        merge(one, tmp_path / kind, adapters=[(two, 0.5)], combination=kind)
    name = "transformer.h.0.attn.c_proj.weight"  # square: its shape does not tell which way it lies
    wanted = Checkpoint(tmp_path / "gpt2").tensor(name).double() + (_delta(one, name) + 0.5 * _delta(two, name)).T
    off = (Checkpoint(tmp_path / "cat").tensor(name).double() - wanted).abs()
    assert bool((off <= 2.0**-8 * wanted.abs() + 2.0**-20).all())


def test_masks_are_the_seed_s(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def made(name: str, seed: int) -> torch.Tensor:
        out = tmp_path / name
        merge(pair[0], out, adapters=[(pair[1], 1.0)], combination="dare_ties", density=0.5, seed=seed, skip_proof=True)
        return Checkpoint(out).tensor("model.layers.0.mlp.up_proj.weight")

    before = torch.random.get_rng_state()
    one, again, other = made("one", 1), made("again", 1), made("other", 2)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)  # the process's own numbers are left alone


def test_from_runs(base: Path, make_run: Any, make_adapter: Any) -> None:
    """Held-out rows and tokenizer are the first run's."""
    runs = [make_run("one"), make_run("two")]
    for seed, run in enumerate(runs):
        make_adapter(run / "adapter", base, seed=seed, tokenizer=True)
    template = runs[1] / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    result = merge(runs[0], adapters=[(runs[1], 1.0)])
    said = json.loads((runs[0] / "merged" / "merge.json").read_text())
    assert said["samples"] == "held_out.jsonl"
    assert said["tokenizer_from"] == "adapter"
    assert f"the chat template is that of {runs[0]}: {runs[1]} brings another one" in result.lines
    assert sorted(path.name for path in runs[0].iterdir()) == [
        "adapter", "config.yaml", "environment.json", "held_out.jsonl", "merged",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("which", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["q_proj"]])
def test_tied_embeddings(which: list[str], kind: str, make_model: Any, make_adapter: Any, tmp_path: Path) -> None:
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    parts = [make_adapter(tmp_path / name, tied, seed=seed, target_modules=which) for seed, name in enumerate("ab")]
    result = merge(parts[0], tmp_path / "out", adapters=[(parts[1], 0.5)], combination=kind, rank=None)
    theirs = _of_peft(tied, [(parts[0], 1.0), (parts[1], 0.5)], kind, **({} if kind == "cat" else {"svd_rank": 4}))
    assert (_logits(result.folder) - theirs).norm() / theirs.norm() < 10 * BF16


def test_on_a_quantized_base(base: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason='pip install "ft-export[bitsandbytes]"')
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "packed")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "packed")
    result = merge(pair[0], tmp_path / "out", adapters=[(pair[1], 0.5)], base=str(tmp_path / "packed"))
    assert any("merged into its dequantized weights" in line for line in result.lines)
    assert result.weights.merged == 14
    assert result.logprobs is not None


KILLED = """
import os, signal, sys
from ft_export import merge, writing
writing.SHARD = 20_000
def show(done, total, what):
    if what == "tensors written" and done == 9:
        os.kill(os.getpid(), signal.SIGKILL)
merge(sys.argv[1], sys.argv[3], adapters=[(sys.argv[2], 0.5)], combination="dare_ties", density=0.5, progress=show)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks on folders")
def test_a_killed_one_goes_on_and_nothing_stays(
    forks: Any, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    """The same seed draws the same masks: what was written is gone on with."""
    from ft_export import writing

    monkeypatch.setattr(writing, "SHARD", 20_000)
    out = tmp_path / "deep" / "out"
    ended = forks.run(KILLED, *pair, out)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list(out.parent.glob(".out.*.partial"))) == 2  # the combined adapter's too
    result = merge(pair[0], out, adapters=[(pair[1], 0.5)], combination="dare_ties", density=0.5)
    assert any("going on with a merge that was interrupted" in line for line in result.lines)
    assert contents(out.parent) == ["out"]


# --- planted faults


@pytest.mark.parametrize("fault", ["a weight lost", "scaled by alpha again", "one module of another"])
def test_a_wrong_combination_is_caught(
    fault: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    right = combining._through_peft

    def wrong(model: Any, parts: Any, how: Any, fan_in_fan_out: bool) -> Any:
        peft = right(model, parts, how, fan_in_fan_out)
        layers = dict(combining._layers(peft))
        layer = layers["model.layers.1.mlp.up_proj"]
        if fault == "a weight lost":
            layer.lora_A[combining.RESULT].weight.data[2:] *= 2
        elif fault == "scaled by alpha again":
            layer.lora_B[combining.RESULT].weight.data *= 2
        else:
            other = layers["model.layers.0.mlp.up_proj"]
            layer.lora_A[combining.RESULT].weight.data = other.lora_A[combining.RESULT].weight.data.clone()
        return peft

    monkeypatch.setattr(combining, "_through_peft", wrong)
    for kind in ("cat", "svd", "linear"):
        with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj\.weight.* is not "):
            merge(pair[0], tmp_path / "out", adapters=[(pair[1], 0.5)], combination=kind)
    assert contents(tmp_path) == []


def test_a_wrong_combination_of_the_others_is_caught_by_what_it_says(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    right = combining.combine

    def wrong(parts: Any, how: Any, *words: Any) -> Any:
        return right(parts[::-1], how, *words)  # elected by the wrong signs

    monkeypatch.setattr(combining, "combine", wrong)
    with pytest.raises(ExportError, match="does not say what the adapter on its base says"):
        merge(pair[0], tmp_path / "out", adapters=[(pair[1], 0.5)], combination="dare_ties", density=0.5)
    assert contents(tmp_path) == []


# --- what is refused

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"combination": "sum"}, "combination 'sum' is not known (allowed: cat, linear, svd, ties"),
    ({"combination": "ties"}, "combination ties needs a density"),
    ({"density": 0.5}, "combination cat keeps every value: leave the density out"),
    ({"combination": "ties", "density": 0.0}, "density 0 is not allowed (more than 0, at most 1)"),
    ({"combination": "dare_ties", "density": 1.5}, "density 1.5 is not allowed"),
    ({"combination": "ties", "density": float("nan")}, "density nan is not allowed"),
    ({"majority_sign": "total"}, "combination cat elects no signs"),
    ({"combination": "ties", "density": 0.5, "majority_sign": "loudest"}, "majority sign 'loudest' is not known"),
    ({"rank": 4}, "combination cat has no rank to choose"),
    ({"combination": "svd", "rank": 0}, "rank 0 is not allowed"),
    ({"combination": "dare_linear", "density": 0.5, "seed": -1}, "seed -1 is not allowed"),
    ({"weight": float("nan")}, "is nan (allowed: a number that is not 0)"),
    ({"weight": 0.0}, "is 0.0 (allowed: a number that is not 0)"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_that_are_refused(
    settings: dict[str, Any], message: str, pair: tuple[Path, Path], tmp_path: Path, contents: Any
) -> None:
    with pytest.raises(ExportError) as caught:
        merge(pair[0], tmp_path / "deep" / "out", adapters=[(pair[1], 1.0)], **settings)
    assert message in str(caught.value)
    assert contents(tmp_path) == []


def test_a_combination_of_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="said for one alone: name the others with --adapter PATH:WEIGHT"):
        merge(pair[0], tmp_path / "out", combination="ties", density=0.5)


def test_adapters_that_are_refused(
    base: Path, pair: tuple[Path, Path], make_model: Any, make_adapter: Any, make_run: Any, tmp_path: Path
) -> None:
    one = pair[0]
    other_base = make_model(tmp_path / "other base", seed=3)
    wide = make_model(tmp_path / "wide", hidden_size=32)
    loftq = make_adapter(tmp_path / "loftq", base)
    (loftq / "loftq.json").write_text(json.dumps({"loftq_format": 1, "quantization": "nf4", "dtype": "bfloat16"}))
    rope = {"max_position_embeddings": 2048, "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4}}
    scaled = make_run("scaled", base=base, rope=rope)
    make_adapter(scaled / "adapter", base)
    words = make_adapter(tmp_path / "words", base, tokenizer=True)
    more = transformers.AutoTokenizer.from_pretrained(words)
    more.add_tokens(["<new>"])
    more_words = make_adapter(tmp_path / "more words", base)
    more.save_pretrained(more_words)
    resized = make_adapter(tmp_path / "resized", base, target_modules=["embed_tokens"])
    from safetensors.torch import load_file, save_file

    tensors = load_file(resized / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] *= 1.5
    save_file(tensors, resized / "adapter_model.safetensors")
    kinds: list[tuple[Path, Path, str, dict[str, Any]]] = [
        (one, one, "is named twice: name it once, with the sum of its weights", {}),
        (one, base, "has no adapter (it was trained in full): only adapters are combined", {}),
        (one, tmp_path / "none", "is not a folder", {}),
        (one, make_adapter(tmp_path / "dora", base, use_dora=True), "is a DoRA adapter", {}),
        (one, make_adapter(tmp_path / "saved", base, target_modules=["q_proj"], modules_to_save=["lm_head"]),
         "holds lm_head.weight whole", {}),
        (one, make_adapter(tmp_path / "foreign", other_base), "adapters of different bases cannot be combined", {}),
        (one, make_adapter(tmp_path / "narrow", wide), "is for another base: it changes", {"base": str(base)}),
        (one, loftq, "began as what the base's quantization lost (LoftQ)", {}),
        (one, scaled, "were trained with different rotary scaling", {}),
        (words, more_words, "bring tokenizers with different tokens", {}),
        (one, make_adapter(tmp_path / "kind", base, task_type=None), "has task_type None", {}),
        (one, make_adapter(tmp_path / "r6", base, r=6), "needs equal ranks: ", {"combination": "linear"}),
        (make_adapter(tmp_path / "q", base, target_modules=["q_proj"]),
         make_adapter(tmp_path / "k", base, target_modules=["k_proj"], r=2), "needs equal ranks (4 in ",
         {"combination": "ties", "density": 0.5}),
        (one, resized, "holds model.embed_tokens.weight whole and not as the base has it", {}),
    ]  # fmt: skip
    for first, second, message, settings in kinds:
        with pytest.raises(ExportError) as caught:
            merge(first, tmp_path / "out", adapters=[(second, 1.0)], **settings)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*"))


def test_words_of_the_command_line(tmp_path: Path) -> None:
    assert weighted("runs/other:0.5") == ("runs/other", 0.5)
    assert weighted("runs/other:-2") == ("runs/other", -2.0)
    assert weighted("runs/other") == ("runs/other", 1.0)
    assert weighted("C:\\runs\\other") == ("C:\\runs\\other", 1.0)
    (tmp_path / "run:2").mkdir()
    assert weighted(f"{tmp_path}/run:2") == (f"{tmp_path}/run:2", 1.0)
    with pytest.raises(ExportError, match="--adapter :2 names no folder"):
        weighted(":2")


# --- what no low-rank product on the base's weights can say


@pytest.mark.parametrize("several", [False, True])
def test_an_adapter_that_began_as_a_part_of_its_base(
    several: bool, base: Path, pair: tuple[Path, Path], make_adapter: Any, tmp_path: Path
) -> None:
    """PEFT takes that part from the base again when it loads the adapter; a merge into the whole base has it twice."""
    pissa = make_adapter(tmp_path / "pissa", base, init_lora_weights="pissa")
    others = [(pissa, 1.0)] if several else []
    with pytest.raises(ExportError, match=r"began as a part of its base's weights.*\(init_lora_weights: pissa\)"):
        merge(pair[0] if several else pissa, tmp_path / "out", adapters=others, skip_proof=True)
    assert not (tmp_path / "out").exists()
    if not several:  # as the message says: its base, saved without that part
        peft_s = PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), pissa
        )
        rest = peft_s.unload()
        rest.save_pretrained(tmp_path / "rest")
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "rest")
        config = json.loads((pissa / "adapter_config.json").read_text())
        (pissa / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
        assert merge(pissa, tmp_path / "out", base=str(tmp_path / "rest")).weights.merged == 14


def test_an_adapter_that_acts_on_some_tokens_only(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, alora_invocation_tokens=[3, 4])
    with pytest.raises(ExportError, match="uses alora_invocation_tokens, which cannot be merged here"):
        merge(adapter, skip_proof=True)
