"""GGUF files made from tiny models, read back, and run in llama.cpp; what the checks catch; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Regex, pre_tokenizers

from ft_export import ExportError, export_gguf
from ft_export.bases import load_tokenizer
from ft_export.checkpoints import Checkpoint
from ft_export.gguf import architectures, convert, converter, rope, rules, vocabulary
from ft_export.gguf.engine import llama_cpp
from ft_export.gguf.rounding import round_inputs
from ft_export.gguf.text_check import check_tokens
from ft_export.samples import read_rows

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied, with biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN, "max_position_embeddings": 64}),
    "llama, yarn, attention of its own": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.7}}),
    "qwen3, yarn, mscale": ("Qwen3", {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}}),
    "llama, wide heads": ("Llama", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, sliding window": ("Mistral", {"sliding_window": 96}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_architectures_in_llama_cpp(kind: str, make_model: Any, tmp_path: Path) -> None:
    name, settings = MODELS[kind]
    model = make_model(tmp_path / "a model", name, **settings)
    made = export_gguf(model, tmp_path / "out")
    assert made.file == tmp_path / "out" / "a-model-f16.gguf"
    proof = json.loads(made.proof.read_text())["files"]["a-model-f16.gguf"]
    found = proof["continuations"]
    assert found["tokens"] >= 24
    assert found["error"]["largest"] <= found["bound_largest"] < 0.5
    assert found["answers_equal"] or found["close"] > 0
    assert any("byte for byte" in line for line in made.lines)
    assert proof["conversations_with_equal_template"] == 3


def test_a_name_that_llama_cpp_takes_for_phi_3(make_model: Any, tmp_path: Path) -> None:
    """It looks up <|endoftext|> in every model of such a name."""
    model = make_model(tmp_path / "my-phi3-run")
    for file in model.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<|endoftext|>", "<|nothing|>"))
    assert export_gguf(model, tmp_path / "out").file.name == "my-phi3-run-f16.gguf"


def test_nothing_is_merged_for_what_cannot_be_converted(
    make_run: Any, make_model: Any, make_adapter: Any, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", "Olmo")
    run = make_run(base=other)
    make_adapter(run / "adapter", other)
    with pytest.raises(ExportError, match="Olmo"):
        export_gguf(run)
    assert not (run / "merged").exists()
    assert not (run / "export").exists()


def test_q8_0(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    small = export_gguf(model, tmp_path / "out", type="q8_0")
    large = export_gguf(model, tmp_path / "out")
    files = json.loads(large.proof.read_text())["files"]
    assert set(files) == {small.file.name, large.file.name}  # the second export keeps the first one's proof
    assert small.file.stat().st_size < large.file.stat().st_size
    coarse, fine = (files[made.file.name]["continuations"]["error"]["mean"] for made in (small, large))
    assert coarse > fine


def test_what_is_written(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    made = convert(model, tmp_path / "x.gguf", type="q8_0")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert {tensor.name for tensor in reader.tensors} == set(made.tensors)
    source = Checkpoint(model)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["output_norm.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.attn_q.weight"] == "F16"  # 48 values a row cannot be cut into blocks of 32
    assert kinds["blk.0.attn_output.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    down = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    value = source.tensor("model.layers.0.mlp.down_proj.weight").float()
    back = gguf.quants.dequantize(down.data, down.tensor_type)
    assert np.abs(back - value.numpy()).max() <= value.abs().max().item() / 127 * 0.51
    # transformers' halves of a head lie interleaved in the file
    query = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_q.weight").data
    rows = source.tensor("model.layers.1.self_attn.q_proj.weight").half().numpy()
    for head in range(3):
        for pair in range(8):
            assert (query[head * 16 + 2 * pair] == rows[head * 16 + pair]).all()
            assert (query[head * 16 + 2 * pair + 1] == rows[head * 16 + 8 + pair]).all()
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = load_tokenizer(model)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["llama.context_length"] == 512
    assert len(fields["tokenizer.ggml.tokens"]) == 416
    assert fields["tokenizer.ggml.tokens"][415].startswith("[PAD")


def test_llama3_factors_are_transformers(make_model: Any, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(head_dim=64, rope_parameters=LLAMA3)
    ((name, factors),) = rope.llama3_factors(config)
    plain = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert name == "rope_freqs.weight"
    assert torch.allclose((plain / factors).float(), scaled, rtol=1e-6)
    assert factors[0] == 1
    assert factors[-1] == 8


def test_inputs_are_rounded_as_gguf_rounds_to_q8_0() -> None:
    value = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    packed = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType.Q8_0)
    expected = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    # the quantizer divides by the step before it is rounded to F16, which may move a value on the border by one step
    step = value.reshape(8, 3, 32).abs().amax(-1, keepdim=True).expand(8, 3, 32).reshape(8, 96) / 127
    for kind in ("Q8_0", "Q4_0", "Q5_1"):
        assert ((round_inputs(value, kind) - expected).abs() <= step * 1.001).all()
        assert (round_inputs(value, kind) == expected).float().mean() > 0.98
    wide = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    most = wide.reshape(4, 2, 256).abs().amax(-1, keepdim=True)
    rounded = round_inputs(wide, "Q4_K").reshape(4, 2, 256) / most * 127
    assert (rounded - rounded.round()).abs().max() < 1e-3  # whole steps of a 127th of a block's largest
    assert ((round_inputs(wide, "Q6_K") - wide).reshape(4, 2, 256).abs() <= most / 127 * 0.501).all()


def test_weights_are_rounded_to_what_the_file_holds(make_model: Any, tmp_path: Path) -> None:
    from ft_export.bases import load_model
    from ft_export.gguf.rounding import round_weights

    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    made = convert(model, tmp_path / "x.gguf", type="q3_k_m")
    loaded = load_model(model, torch.float32)
    round_weights(loaded, made.kinds)
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for mine, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v"), ("mlp.gate_proj", "ffn_gate")):
        tensor = written[f"blk.1.{theirs}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert (loaded.get_parameter(f"model.layers.1.{mine}.weight").detach().numpy() == expected).all()


def test_a_table_can_split_stack_and_drop() -> None:
    row = rules.Architecture(
        classes=("X",),
        name="x",
        check=lambda config: None,
        keys=(),
        rules=(
            rules.Rule(
                r"(?P<layer>l\d)\.fused",
                (
                    ("{layer}.gate", lambda t, c: t[0].chunk(2)[0]),
                    ("{layer}.up", lambda t, c: t[0].chunk(2)[1]),
                ),
            ),
            rules.Rule(
                r"(?P<layer>l\d)\.experts\.(?P<index>\d+)", (("{layer}.experts", lambda t, c: torch.stack(list(t))),)
            ),
            rules.Rule(r".*\.unused"),
        ),
    )
    names = ["l0.fused", "l0.experts.10", "l0.experts.2", "l0.unused", "l0.norm"]
    outputs = {output.name: output for output in rules.plan(row, None, names)}
    assert list(outputs) == ["l0.gate", "l0.up", "l0.experts", "l0.norm"]
    assert outputs["l0.experts"].sources == ("l0.experts.2", "l0.experts.10")
    assert outputs["l0.up"].make([torch.arange(4)], None).tolist() == [2, 3]


# --- tokenizers

RULES = {name: rules for rules, name in vocabulary.PRE_TOKENIZERS.items()}


def _pre_tokenizer(rules: tuple[str, ...]) -> Any:
    steps: list[Any] = []
    for rule in rules:
        if rule.startswith("split "):
            steps.append(pre_tokenizers.Split(Regex(rule.removeprefix("split ")), "isolated"))
        elif rule == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule == "bytes+words"))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


@pytest.mark.parametrize("pre", RULES)
def test_splitting_rules_are_llama_cpp_s(pre: str, make_model: Any, tmp_path: Path) -> None:
    model = make_model(
        tmp_path / "model", pre_tokenizer=_pre_tokenizer(RULES[pre]), ignore_merges=pre in ("llama-bpe", "tekken")
    )
    made = convert(model, tmp_path / "x.gguf")
    assert made.vocabulary.pre == pre
    more = [
        "<|im_start|>user\nHi<|im_end|>",
        "a1b22c333 d4444",
        "x  y   z\r\n\r\n \t",
        "IT'S it's",
        "ÉCOLE École",
        "a/b//c\n/d",
    ]
    with llama_cpp(tmp_path / "x.gguf", 64) as engine:
        assert check_tokens(engine, load_tokenizer(model), more) == 5 + len(more)


def test_unknown_rules_want_a_name_and_a_wrong_one_is_caught(make_model: Any, tmp_path: Path, contents: Any) -> None:
    rules = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,2}|[^\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model = make_model(tmp_path / "model", pre_tokenizer=rules)
    with pytest.raises(ExportError, match=r"with pre=NAME \(known here: gpt-2, .*, tekken, gpt-4o\)"):
        export_gguf(model)
    with pytest.raises(ExportError, match=r"splits .* otherwise than the tokenizer: token \d+ is '.*' \(\d+\), not '"):
        export_gguf(model, options={"pre": "gpt-2"})
    with pytest.raises(ExportError, match=r"llama\.cpp cannot load"):
        export_gguf(model, options={"pre": "no-such-rules"})
    assert not (model / "export").exists()


def test_a_tokenizer_that_is_no_byte_level_bpe(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    data = json.loads((model / "tokenizer.json").read_text())
    data["model"]["byte_fallback"] = True
    (model / "tokenizer.json").write_text(json.dumps(data))
    steps = r"a BPE tokenizer with byte fallback whose steps are not SentencePiece's \(bytes\+words\)"
    with pytest.raises(ExportError, match=steps):
        convert(model, tmp_path / "x.gguf")
    data["model"] = {"type": "WordLevel", "vocab": data["model"]["vocab"], "unk_token": "<|endoftext|>"}
    (model / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ExportError, match="neither a byte-level BPE tokenizer nor a SentencePiece one"):
        convert(model, tmp_path / "x.gguf")


# --- planted faults


def _refused(model: Path, out: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_gguf(model, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_wrong_permutation_is_caught(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")
    monkeypatch.setattr(architectures, "_interleave", lambda weight, heads: weight)
    with pytest.raises(ExportError):  # the table's functions look the name up when they are called
        export_gguf(model, tmp_path / "out")
    _refused(model, tmp_path / "out", r"llama.cpp is not the model: at prompt \d+, token \d+, .*'.*' \(\d+\)")


@pytest.mark.parametrize("lost", ["attn_factors", "factor", "orig_ctx_len", "type"])
def test_a_yarn_key_that_is_lost_is_caught(
    lost: str, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So llama.cpp reads each of them, and the comparison sees it."""
    model = make_model(tmp_path / "model", rope_parameters={**YARN, "attention_factor": 1.7})
    monkeypatch.setattr(gguf.GGUFWriter, f"add_rope_scaling_{lost}", lambda *_: None)
    with pytest.raises(ExportError, match=r"llama\.cpp is not the model|parts from transformers"):
        export_gguf(model, tmp_path / "out")


def test_a_dropped_rope_tensor_is_caught(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model", rope_parameters={**LLAMA3, "original_max_position_embeddings": 8})
    monkeypatch.setattr(converter, "find_architecture", _without_extra_tensors)
    _refused(model, tmp_path / "out", "llama.cpp is not the model")


def _without_extra_tensors(config: Any) -> Any:
    import dataclasses

    return dataclasses.replace(architectures.find_architecture(config), extra_tensors=None)


def test_a_dropped_stop_token_is_caught(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "model")
    plain = export_gguf(model, tmp_path / "plain")
    prompt = load_tokenizer(model)(read_rows(None)[0]["text"].rsplit(" ", 8)[0])["input_ids"]
    with llama_cpp(plain.file, 256) as engine:
        tokens = engine.greedy(prompt, 12, 1).tokens
    # make a token that the model is going to say a stop token
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    generation = json.loads((model / "generation_config.json").read_text())
    generation["eos_token_id"] = [generation["eos_token_id"], stop]
    (model / "generation_config.json").write_text(json.dumps(generation))
    stopping = export_gguf(model, tmp_path / "stopping")
    with llama_cpp(stopping.file, 256) as engine:
        run = engine.greedy(prompt, 12, 1)
    assert run.stopped
    assert run.tokens[-1] == stop
    right = vocabulary._special
    monkeypatch.setattr(
        vocabulary, "_special", lambda t, f: {role: i for role, i in right(t, f).items() if role != "eot"}
    )
    _refused(model, tmp_path / "out", r"llama.cpp goes on after the stop token .*: it would never stop")


# --- runs


def test_a_run_is_merged_and_exported(base: Path, make_run: Any, make_adapter: Any) -> None:
    run = make_run("a run")
    make_adapter(run / "adapter", base, tokenizer=True)
    made = export_gguf(run)
    assert made.file == run / "export" / "gguf" / "a-run-f16.gguf"
    assert (run / "merged" / "merge.json").is_file()
    assert made.next_command == f"llama-server -m '{made.file}' --jinja"
    proof = json.loads(made.proof.read_text())["files"]["a-run-f16.gguf"]
    assert proof["prompts"] == 8
    assert proof["conversations_with_equal_template"] == 6  # three of ours, three held out
    assert "What is 0?" in made.lines[-1]
    before = (run / "merged" / "merge.json").stat().st_mtime_ns
    with pytest.raises(ExportError, match="already there: pass --overwrite"):
        export_gguf(run)
    again = export_gguf(run, overwrite=True)
    assert (run / "merged" / "merge.json").stat().st_mtime_ns == before
    assert again.lines[0].startswith("used the merge in")
    shutil.rmtree(run / "adapter")
    make_adapter(run / "adapter", base, seed=5, tokenizer=True)  # trained on: the merge is of another adapter now
    export_gguf(run, type="q8_0")
    assert (run / "merged" / "merge.json").stat().st_mtime_ns != before


def test_a_fully_trained_run_is_exported_as_it_is(base: Path, make_run: Any) -> None:
    run = make_run()
    shutil.copytree(base, run / "model")
    made = export_gguf(run)
    assert made.file.is_file()
    assert not (run / "merged").exists()


def scaled(**rope: Any) -> dict[str, Any]:
    """What a run that was trained with 2048 positions says of its base, which has 512."""
    return {"max_position_embeddings": 2048, "rope_parameters": {"rope_theta": 10000.0, **rope}}


def test_a_run_with_scaled_positions(base: Path, make_run: Any, make_adapter: Any) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    run = make_run(base=base, rope=scaled(**rope))
    make_adapter(run / "adapter", base, tokenizer=True)
    made = export_gguf(run)
    config = json.loads((run / "merged" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 10000.0, **rope}
    assert config["max_position_embeddings"] == 2048
    fields = {name: field.contents() for name, field in gguf.GGUFReader(made.file).fields.items()}
    assert fields["llama.context_length"] == 2048
    assert fields["llama.rope.scaling.type"] == "yarn"
    assert fields["llama.rope.scaling.factor"] == 4.0
    assert fields["llama.rope.scaling.original_context_length"] == 512
    assert "llama.rope.scaling.attn_factor" not in fields  # llama.cpp's own formula is the paper's


def test_a_run_whose_scaling_cannot_be_written_is_not_merged(base: Path, make_run: Any, make_adapter: Any) -> None:
    run = make_run(base=base, rope=scaled(rope_type="dynamic", factor=4.0))
    make_adapter(run / "adapter", base, tokenizer=True)
    with pytest.raises(ExportError, match="rope_type 'dynamic' cannot be written to GGUF"):
        export_gguf(run)
    assert not (run / "merged").exists()


# --- bad input


def test_unknown_architecture_and_options(base: Path, make_model: Any, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=416, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        ExportError,
        match=r"GPT2LMHeadModel cannot be converted to GGUF \(known: LlamaForCausalLM, MistralForCausalLM, Qwen2",
    ):
        convert(tmp_path / "gpt2", tmp_path / "x.gguf")
    with pytest.raises(ExportError, match=r"'q4_k' is not known for gguf \(allowed: f16, f32, bf16, .*, q4_0\)"):
        export_gguf(base, tmp_path / "out", type="q4_k")
    with pytest.raises(ExportError, match=r"option 'prr' is not known for gguf \(allowed: adapter, converter, pre\)"):
        export_gguf(base, tmp_path / "out", options={"prr": "x"})
    dynamic = make_model(
        tmp_path / "dynamic", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    with pytest.raises(ExportError, match="rope_type 'dynamic' cannot be written to GGUF"):
        export_gguf(dynamic, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("beta_fast", 16.0), ("beta_slow", 0.5), ("truncate", False)])
def test_a_ramp_that_llama_cpp_does_not_compute(key: str, value: Any, make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", rope_parameters={**YARN, key: value})
    with pytest.raises(
        ExportError, match=rf"^rope_type 'yarn' with {key} {value} cannot be written to GGUF: llama\.cpp"
    ):
        export_gguf(model, tmp_path / "out")


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (1e6, "beyond F16's 65504")])
def test_bad_values(value: float, message: str, make_model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 3] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    _refused(model, tmp_path / "out", rf"model\.layers\.1\.mlp\.gate_proj\.weight .*{message}")


def test_truncated_weights(base: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    _refused(model, tmp_path / "out", r"model\.safetensors is truncated")


@pytest.mark.parametrize("missing", ["gguf", "xllamacpp"])
def test_missing_extras(missing: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    right = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else right(name))
    _refused(base, tmp_path / "out", "pip install gguf xllamacpp")
