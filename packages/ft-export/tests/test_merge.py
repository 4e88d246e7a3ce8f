"""Merging real PEFT adapters: what is written, what the checks catch, what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from ft_export import ExportError, merge
from ft_export.bases import load_model
from ft_export.checkpoints import Checkpoint
from ft_export.merging import merge as merge_function
from ft_export.merging.adapter import Adapter
from ft_export.merging.logprobs_check import check_logprobs
from ft_export.merging.weights_check import half_ulp
from ft_export.runs import Rope

assert merge is merge_function

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "modules_to_save": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
    "embeddings with DoRA": {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
    "trained biases": {"target_modules": ["q_proj"], "lora_bias": True},
}


def _difference(merged: Path, base: Path, adapter: Path) -> float:
    """Of the logits, between the merged model and the adapter on its base, both in fp32, relative to their size."""
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.inference_mode():
        plain = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        wrapped = PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
        )
        one, other = plain(ids).logits, wrapped(ids).logits
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapter(kind: str, base: Path, make_model: Any, make_adapter: Any, tmp_path: Path) -> None:
    if kind == "trained biases":
        base = make_model(tmp_path / "biased", attention_bias=True)
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    result = merge(adapter, tmp_path / "out")
    # each of some ten rounded weights on the way adds at most bfloat16's 2^-8, most of it averaged out
    assert _difference(tmp_path / "out", base, adapter) < 10 * 2**-8
    assert result.weights.merged > 0


@pytest.mark.parametrize("kind", KINDS)
def test_in_blocks_and_several_files(
    kind: str, base: Path, make_model: Any, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ft_export import checkpoints, writing

    monkeypatch.setattr(checkpoints, "BLOCK", 500)
    monkeypatch.setattr(writing, "SHARD", 20_000)
    if kind == "trained biases":
        base = make_model(tmp_path / "biased", attention_bias=True)
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    result = merge(adapter, tmp_path / "out")
    files = sorted(path.name for path in result.folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    assert _difference(tmp_path / "out", base, adapter) < 10 * 2**-8
    assert result.weights.largest_error <= 1
    written = Checkpoint(tmp_path / "out")
    assert {written.dtype(name) for name in written} == {torch.bfloat16}
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["logprobs"]["merged"]["largest"] <= report["logprobs"]["bound_largest"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<|im_start|>" in tokenizer.chat_template


def test_replaced_tensors_are_the_adapters(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS["modules_to_save"])
    result = merge(adapter, tmp_path / "out")
    assert result.weights.replaced == 2
    mine = Adapter(adapter)
    expected = mine.files.tensor(mine.changes["lm_head.weight"].key)  # type: ignore[union-attr]
    assert torch.equal(Checkpoint(tmp_path / "out").tensor("lm_head.weight"), expected.bfloat16())


@pytest.mark.parametrize("kind", ["lora on embeddings", "lora on the head", "saved embeddings"])
def test_tied_embeddings_are_untied_where_one_end_changes(
    kind: str, make_model: Any, make_adapter: Any, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "tied", tie_word_embeddings=True)
    settings: dict[str, Any] = {
        "lora on embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
        "lora on the head": {"target_modules": ["lm_head", "q_proj"]},
        "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    }[kind]
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    merge(adapter, tmp_path / "out")
    assert _difference(tmp_path / "out", base, adapter) < 10 * 2**-8
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


KILLED = """
import os, signal, sys
from ft_export import merge, writing
from ft_export.merging import merger
writing.SHARD = 20_000
def show(done, total, what):
    if what == "tensors written" and done == 9:
        if sys.argv[3] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt
merge(sys.argv[1], sys.argv[2], progress=show)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks on folders")
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_an_interrupted_merge_goes_on(
    how: str, forks: Any, base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    from ft_export import writing

    monkeypatch.setattr(writing, "SHARD", 20_000)
    adapter = make_adapter(tmp_path / "adapter", base)
    merge(adapter, tmp_path / "whole")
    ended = forks.run(KILLED, adapter, tmp_path / "out", how)
    assert ended.returncode == -(signal.SIGKILL if how == "kill" else signal.SIGINT), ended.stderr
    (left,) = tmp_path.glob(".out.*.partial")
    whole = {path.name: path.stat().st_mtime_ns for path in left.glob("*.safetensors")}
    assert whole
    lines: list[str] = []
    result = merge(adapter, tmp_path / "out", say=lines.append)
    assert lines[0] == f"going on with a merge that was interrupted, of which {len(whole)} files are there"
    assert {name: (result.folder / name).stat().st_mtime_ns for name in whole} == whole
    for file in (tmp_path / "whole").iterdir():
        if file.name != "merge.json":
            assert (result.folder / file.name).read_bytes() == file.read_bytes()
    assert sorted(contents(tmp_path)) == ["adapter", "out", "whole"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks on folders")
def test_what_was_left_of_another_adapter_is_not_gone_on_with(
    forks: Any, base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    forks.run(KILLED, make_adapter(tmp_path / "one", base), tmp_path / "out", "kill")
    (left,) = tmp_path.glob(".out.*.partial")
    result = merge(make_adapter(tmp_path / "two", base, lora_alpha=32), tmp_path / "out")
    assert not any("interrupted" in line for line in result.lines)
    assert not left.exists()


def test_a_proof_that_was_skipped(base: Path, make_adapter: Any, make_run: Any) -> None:
    from ft_export.exporting import whole_model
    from ft_export.runs import open_source

    run = make_run()
    make_adapter(run / "adapter", base, tokenizer=True)
    result = merge(run, skip_proof=True)
    assert result.logprobs is None
    assert any(line.startswith("NOT PROVEN: ") for line in result.lines)
    source, lines = open_source(run), []
    assert whole_model(source, lines, skip_proof=True) == result.folder
    assert lines == [f"used the merge in {result.folder}, made from this adapter"]
    assert whole_model(source, lines) == result.folder  # again, with the proof
    assert json.loads((result.folder / "merge.json").read_text())["logprobs"]["samples"] > 0


def test_tied_embeddings_stay_tied_otherwise(make_model: Any, make_adapter: Any, tmp_path: Path) -> None:
    base = make_model(tmp_path / "tied", tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge(adapter, tmp_path / "out")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out")
    assert _difference(tmp_path / "out", base, adapter) < 10 * 2**-8


def test_transposed_weights(tmp_path: Path, make_adapter: Any, base: Path) -> None:
    """GPT-2 keeps its weights as (in, out)."""
    config = transformers.GPT2Config(vocab_size=416, n_embd=32, n_layer=2, n_head=2, n_positions=256)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "gpt2" / name)
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "gpt2", target_modules=["c_attn", "c_proj"])
    result = merge(adapter, tmp_path / "out")
    assert result.weights.merged == 6  # attention's two and the last of the MLP, in two layers
    assert _difference(tmp_path / "out", tmp_path / "gpt2", adapter) < 10 * 2**-8


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        ("float32", None, torch.bfloat16),
        ("float32", "float16", torch.float16),
        ("float16", None, torch.float16),
        ("bfloat16", "float16", torch.float16),
    ],
)
def test_types(
    stored: str, asked: str | None, written: torch.dtype, make_model: Any, make_adapter: Any, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", dtype=stored)
    adapter = make_adapter(tmp_path / "adapter", base)
    merge(adapter, tmp_path / "out", dtype=asked)
    found = Checkpoint(tmp_path / "out")
    assert {found.dtype(name) for name in found} == {written}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(written).removeprefix("torch.")


def test_out_of_range_for_float16(make_model: Any, make_adapter: Any, tmp_path: Path, contents: Any) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, lora_alpha=4_000_000)
    with pytest.raises(ExportError, match=r"_proj\.weight is out of the range of float16: pass --dtype bfloat16"):
        merge(adapter, tmp_path / "out", dtype="float16")
    assert contents(tmp_path) == ["adapter", "base"]


def test_names_that_transformers_changes_on_loading(make_adapter: Any, tmp_path: Path, base: Path) -> None:
    """GPT-NeoX's files say embed_out for what the model calls lm_head."""
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=416, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "neox")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "neox")
    assert "embed_out.weight" in Checkpoint(tmp_path / "neox")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "neox")
    result = merge(adapter)
    assert result.weights.merged == 8
    assert "embed_out.weight" in Checkpoint(result.folder)


def test_the_end_of_a_turn_ends_an_answer(make_model: Any, make_adapter: Any, tmp_path: Path) -> None:
    """A base model's end-of-text token is not the one that ends a turn in its chat template."""
    import transformers

    model = make_model(tmp_path / "base", eos_token_id=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    merged = merge(make_adapter(tmp_path / "adapter", model)).folder
    assert transformers.GenerationConfig.from_pretrained(merged).eos_token_id == [0, end]


def test_half_ulp() -> None:
    values = torch.tensor([1.0, 1.5, 0.75, 3.0, 2.0**-14, 2.0**-20], dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        expected = (torch.nextafter(values.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double() - values) / 2
        assert torch.equal(half_ulp(values, dtype), expected)


# --- planted faults


@pytest.mark.parametrize("fault", ["one layer left unmerged", "scaled twice", "a wrong permutation", "a norm touched"])
def test_weights_check_catches(
    fault: str, base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    from ft_export.merging import tensors

    right, cast = tensors.merged_weight, tensors._cast

    def wrong(adapter: Any, change: Any, base: Any, shape: Any, dtype: Any) -> Any:
        if change.module != "model.layers.1.mlp.up_proj" or fault == "a norm touched":
            yield from right(adapter, change, base, shape, dtype)
        elif fault == "one layer left unmerged":
            yield from cast(base, dtype)
        elif fault == "scaled twice":
            yield from right(adapter, replace(change, scale=2 * change.scale), base, shape, dtype)
        else:
            yield torch.cat(list(right(adapter, change, base, shape, dtype))).flip(0)

    def touched(blocks: Any, dtype: Any) -> Any:
        for block in cast(blocks, dtype):
            block = block.clone()
            if block.dim() == 1:
                block[3] *= 1.0079
            yield block

    monkeypatch.setattr(tensors, "merged_weight", wrong)
    if fault == "a norm touched":
        monkeypatch.setattr(tensors, "_cast", touched)
    adapter = make_adapter(tmp_path / "adapter", base)
    name = r"layers\.0\.input_layernorm" if fault == "a norm touched" else r"layers\.1\.mlp\.up_proj\.weight is wrong"
    with pytest.raises(ExportError, match=name):
        merge(adapter, tmp_path / "out")
    assert contents(tmp_path) == ["adapter"]


@pytest.mark.parametrize("fault", ["rope", "scaled twice"])
def test_logprobs_check_catches(fault: str, base: Path, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    merge(adapter, out)
    samples = [list(range(3, 60)), list(range(100, 160))]
    mine = Adapter(adapter)
    check_logprobs(out, base, mine, samples, torch.bfloat16, set(mine.changes), None)
    if fault == "rope":  # nothing that the weights would show
        config = json.loads((out / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 20000.0
        (out / "config.json").write_text(json.dumps(config))
    else:
        made = make_adapter(tmp_path / "twice", base, lora_alpha=16)  # the same weights, twice the scale
        out = tmp_path / "out twice"
        merge(made, out)
    with pytest.raises(ExportError, match="does not say what the adapter on its base says"):
        check_logprobs(out, base, mine, samples, torch.bfloat16, set(mine.changes), None)


def test_a_base_without_one_tensor(base: Path, make_adapter: Any, tmp_path: Path, contents: Any) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(ExportError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight \(1 missing\)"):
        merge(adapter, tmp_path / "out", base=str(tmp_path / "base"))
    assert contents(tmp_path) == ["adapter", "base"]


# --- run folders


def scaled(**rope: Any) -> dict[str, Any]:
    """What a run that was trained with 2048 positions says of its base, which has 512."""
    return {"max_position_embeddings": 2048, "rope_parameters": {"rope_theta": 10000.0, **rope}}


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("which", ["the run", "its adapter"])
def test_scaled_positions(
    kind: str, which: str, base: Path, make_run: Any, make_adapter: Any, tmp_path: Path, contents: Any
) -> None:
    """The merged model has them by itself, the adapter on its base by the run's word only."""
    rope = {"rope_type": kind, "factor": 4.0, **({"original_max_position_embeddings": 512} if kind == "yarn" else {})}
    run = make_run(base=base, rope=scaled(**rope))
    make_adapter(run / "adapter", base, tokenizer=True)
    result = merge(run if which == "the run" else run / "adapter", tmp_path / "out")
    assert any(f"the rotary scaling of the run: {kind}, 2048 positions" in line for line in result.lines)
    model = load_model(result.folder, torch.float32)
    assert model.config.rope_parameters == {"rope_theta": 10000.0, **rope}
    assert model.config.max_position_embeddings == 2048
    assert model.model.rotary_emb.rope_type == kind
    said = json.loads((result.folder / "merge.json").read_text())
    assert said["rope"] == scaled(**rope)


def test_a_merge_that_lost_the_scaling_is_caught(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    rope = Rope(
        2048, {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    )
    adapter = make_adapter(tmp_path / "adapter", base)
    merge(adapter, tmp_path / "out")
    mine, samples = Adapter(adapter), [list(range(3, 60)), list(range(100, 160))]
    with pytest.raises(ExportError, match="does not say what the adapter on its base says"):
        check_logprobs(tmp_path / "out", base, mine, samples, torch.bfloat16, set(mine.changes), None, rope)


def test_a_run_that_does_not_say_how_its_base_was_scaled(base: Path, make_run: Any, make_adapter: Any) -> None:
    run = make_run(base=base)
    make_adapter(run / "adapter", base, tokenizer=True)
    with (run / "config.yaml").open("a") as file:
        file.write("rope_scaling: {rope_type: yarn, factor: 4.0}\n")
    with pytest.raises(
        ExportError, match=r"trained with rope_scaling, but its environment\.json has no base_model\.rope"
    ):
        merge(run)


def test_run_folder(base: Path, make_run: Any, make_adapter: Any) -> None:
    run = make_run()
    make_adapter(run / "adapter", base, tokenizer=True)
    lines: list[str] = []
    result = merge(run, say=lines.append)
    assert result.folder == run / "merged"
    report = json.loads((run / "merged" / "merge.json").read_text())
    assert report["samples"] == "held_out.jsonl"
    assert report["logprobs"]["samples"] == 8
    assert report["tokenizer_from"] == "adapter"
    assert report["quantized_run"] is None
    assert list(result.lines) == lines
    with pytest.raises(ExportError, match="already there: pass --overwrite"):
        merge(run)
    (run / "merged" / "stale").touch()
    merge(run, overwrite=True)
    assert not (run / "merged" / "stale").exists()


def test_quantized_run_reports_the_gap(base: Path, make_run: Any, make_adapter: Any) -> None:
    pytest.importorskip("bitsandbytes", reason='pip install "ft-export[bitsandbytes]"')
    run = make_run(quantization="nf4")
    make_adapter(run / "adapter", base)
    result = merge(run)
    gap = json.loads((run / "merged" / "merge.json").read_text())["quantized_run"]
    assert "not_measured" not in gap, gap
    # 4 bits are far coarser than bfloat16's rounding
    assert gap["mean"] > 3 * result.logprobs.merged.mean
    assert any("against the nf4 run: largest" in line for line in result.lines)


def test_an_adapter_that_began_as_what_quantization_lost(base: Path, make_run: Any, make_adapter: Any) -> None:
    """LoftQ: in the unquantized weights that would be there twice."""
    pytest.importorskip("bitsandbytes", reason='pip install "ft-export[bitsandbytes]"')
    gaps = []
    for name, start in (("plain", "true"), ("loftq", "loftq")):
        run = make_run(name, quantization="nf4")
        with open(run / "config.yaml", "a") as file:
            file.write(f"lora: {{init_lora_weights: {start}}}\n")
        make_adapter(run / "adapter", base)
        result = merge(run)
        report = json.loads((run / "merged" / "merge.json").read_text())
        assert report["dequantized_base"] == (start == "loftq")
        assert not (run / "merged" / "base").exists()
        gaps.append(report["quantized_run"]["mean"])
    assert "was held in nf4, where the adapter began: merged into its dequantized weights" in result.lines[0]
    # What remains is that the dequantized weights and the merged ones are rounded to bfloat16: 8 bits against nf4's 4.
    assert gaps[1] < gaps[0] / 4


@pytest.mark.parametrize("where", ["in its run", "by itself"])
def test_the_adapters_folder_alone_says_where_it_began(
    base: Path, make_run: Any, make_adapter: Any, tmp_path: Path, where: str
) -> None:
    """``ft merge RUN/adapter`` makes what ``ft merge RUN`` makes; a copy elsewhere has a file that says so."""
    pytest.importorskip("bitsandbytes", reason='pip install "ft-export[bitsandbytes]"')
    run = make_run(quantization="nf4")
    with open(run / "config.yaml", "a") as file:
        file.write("lora: {init_lora_weights: loftq}\n")
    adapter = make_adapter(run / "adapter", base)
    expected = merge(run).folder
    if where == "by itself":
        adapter = Path(shutil.move(adapter, tmp_path / "alone"))
        mark = {"loftq_format": 1, "quantization": "nf4", "dtype": "bfloat16"}
        (adapter / "loftq.json").write_text(json.dumps(mark))
        PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)  # reads it still
    result = merge(adapter, tmp_path / "out")
    assert "was held in nf4, where the adapter began" in result.lines[0]
    found, wanted = Checkpoint(result.folder), Checkpoint(expected)
    assert list(found) == list(wanted)
    assert all(torch.equal(found.tensor(name), wanted.tensor(name)) for name in wanted)


def test_a_word_on_where_it_began_that_is_not_known(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    for mark, message in (
        ({"loftq_format": 2}, "has loftq_format 2, this ft-export reads up to 1: upgrade ft-export"),
        ({"loftq_format": 1, "quantization": "int4"}, "has quantization 'int4' and dtype None (allowed: nf4; bfloat16"),
    ):
        (adapter / "loftq.json").write_text(json.dumps(mark))
        with pytest.raises(ExportError) as caught:
            merge(adapter)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (adapter / "merged").exists()


def test_a_quantized_base_is_dequantized(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason='pip install "ft-export[bitsandbytes]"')
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "packed")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "packed")
    adapter = make_adapter(tmp_path / "adapter", base)
    result = merge(adapter, tmp_path / "out", base=str(tmp_path / "packed"))
    assert "dequantized" in result.lines[0]
    assert not (tmp_path / "out" / "base").exists()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["dequantized_base"]


def test_a_score_head(base: Path, tmp_path: Path) -> None:
    """A reward model's adapter brings its head along."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "out")
    assert result.weights.replaced == 1
    assert any(line.startswith("scores of") for line in result.lines)
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 30).unsqueeze(0)
    with torch.inference_mode():
        expected = wrapped.eval()(ids).logits
        assert (scorer(ids).logits - expected).abs().item() < 10 * 2**-8 * expected.abs().item() + 2**-6


def test_other_rows(base: Path, make_run: Any, make_adapter: Any) -> None:
    run = make_run()
    make_adapter(run / "adapter", base)
    rows = [
        {"prompt": "One and", "completion": " two"},
        {"text": "Plain text."},
        {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Ho"}]},
        {"unknown": 1},
    ]
    (run / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert merge(run).logprobs.samples == 3
    (run / "held_out.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ExportError, match=r"held_out\.jsonl, line 2 is not JSON"):
        merge(run, overwrite=True)
    assert (run / "merged" / "merge.json").is_file()  # the earlier merge is still there


# --- bad input


def test_full_fine_tuning_has_nothing_to_merge(base: Path, make_run: Any) -> None:
    run = make_run()
    shutil.copytree(base, run / "model")
    with pytest.raises(ExportError, match=r"nothing is to be merged: .*its model is .*model$"):
        merge(run)


def test_unfinished_and_newer_runs(make_run: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has not finished"):
        merge(make_run("one"))
    with pytest.raises(ExportError, match="run_format 2, this ft-export reads up to 1"):
        merge(make_run("two", run_format=2))
    with pytest.raises(
        ExportError, match=r"nowhere is not a folder \(the runs in .* are one, two\): name a run folder"
    ):
        merge(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"twoo is not a folder \(the runs in .* are two, one\)"):
        merge(tmp_path / "twoo")
    with pytest.raises(ExportError, match="else is not a folder: name a run folder"):
        merge(tmp_path / "somewhere" / "else")
    with pytest.raises(ExportError, match=r"holds no environment\.json"):
        merge(tmp_path)


def test_adapter_for_another_base(base: Path, make_model: Any, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    narrow = make_model(tmp_path / "narrow", hidden_size=32)
    with pytest.raises(ExportError, match=r"is for another base: it changes .* as \d+x\d+, the base has \d+x\d+"):
        merge(adapter, tmp_path / "out", base=str(narrow))
    shallow = make_model(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"changes model\.layers\.1\..*, which the base does not have"):
        merge(adapter, tmp_path / "out", base=str(shallow))
    assert not (tmp_path / "out").exists()


def _broken(kind: str, base: Path) -> str:
    weights = base / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
        return r"model\.safetensors is truncated"
    if kind == "garbage":
        weights.write_bytes(b"<html>not found</html>" * 10)
        return r"model\.safetensors is not a whole safetensors file"
    weights.unlink()
    if kind == "none":
        return r"has no model\.safetensors: it holds no weights"
    if kind == "pickle":
        (base / "pytorch_model.bin").write_bytes(b"\x80\x02")
        return r"as pickle \(pytorch_model\.bin\)"
    shard = "../../evil.safetensors" if kind == "path trick" else "model-00001-of-00002.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    return "no plain file name" if kind == "path trick" else r"model-00001-of-00002\.safetensors is missing"


@pytest.mark.parametrize("kind", ["truncated", "garbage", "none", "pickle", "path trick", "missing shard"])
def test_broken_base(kind: str, base: Path, make_adapter: Any, tmp_path: Path, contents: Any) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    adapter = make_adapter(tmp_path / "adapter", base)
    message = _broken(kind, copy)
    with pytest.raises(ExportError, match=message) as caught:
        merge(adapter, tmp_path / "out", base=str(copy))
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == ["adapter", "base"]


def test_values_that_are_not_finite(base: Path, make_adapter: Any, tmp_path: Path, contents: Any) -> None:
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(tmp_path / "adapter", base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"not finite: tensor model\.layers"):
        merge(adapter, tmp_path / "out")
    assert contents(tmp_path) == ["adapter"]


def test_other_adapters_and_arguments(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    for bad, message in (
        ({"dtype": "float8"}, "allowed: bfloat16, float16"),
        ({"base": str(tmp_path / "gone")}, "is not there; name its folder"),
        ({"out": tmp_path}, "holds something else"),
        ({"out": adapter / "adapter_config.json"}, "exists and is no folder"),
    ):
        with pytest.raises(ExportError, match=message):
            merge(adapter, **{"out": tmp_path / "out", **bad})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ExportError, match="is a IA3 adapter: only LORA"):
        merge(adapter, tmp_path / "out")


DISK_FULL = """
import resource, sys
from ft_export import ExportError, merge
from ft_export.gguf import convert
adapter, base, out = sys.argv[1:]
import transformers, peft, torch, bitsandbytes  # whatever caches these write on import, they write before the limit
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
for job in (lambda: merge(adapter, out), lambda: convert(base, out + ".gguf")):
    try:
        job()
    except ExportError as error:
        print(f"LINE {error}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_disk_full(forks: Any, base: Path, make_adapter: Any, tmp_path: Path, contents: Any) -> None:
    """A real EFBIG: the system refuses to let a file grow past 64 KiB."""
    pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
    adapter = make_adapter(tmp_path / "adapter", base)
    code = DISK_FULL.replace(", bitsandbytes", "") if not _has("bitsandbytes") else DISK_FULL
    done = forks.run(code, adapter, base, tmp_path / "out")
    lines = [line for line in done.stdout.splitlines() if line.startswith("LINE ")]
    assert len(lines) == 2, done.stderr
    assert "File too large" in lines[0]
    assert "File too large" in lines[1]
    assert "out" not in contents(tmp_path)
    assert not any("partial" in name for name in contents(tmp_path))


def _has(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
