"""LoRA adapters as GGUF files of their own, on their base in llama.cpp."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

import gguf
import xllamacpp

from ft_export import ExportError, export_gguf
from ft_export.bases import load_tokenizer, stop_tokens
from ft_export.checkpoints import Checkpoint
from ft_export.gguf import adapter as adapter_module
from ft_export.gguf import architectures, convert, rules
from ft_export.gguf.adapter import check_lora, read_lora, write_lora
from ft_export.gguf.checking import check_in_llama_cpp
from ft_export.runs import open_source

YES = {"adapter": "yes"}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama, rslora": ("Llama", {}, {"use_rslora": True, "r": 8}),
    "llama, patterns": (
        "Llama",
        {},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    ),
    "llama, tied, some weights": ("Llama", {"tie_word_embeddings": True}, {"target_modules": ["k_proj", "down_proj"]}),
    "llama, head": ("Llama", {}, {"target_modules": ["q_proj", "lm_head"]}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen3": ("Qwen3", {}, {}),
}


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items()}, {
        tensor.name: tensor.data.copy() for tensor in reader.tensors
    }


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, make_model: Any, make_adapter: Any, tmp_path: Path) -> None:
    name, settings, lora = KINDS[kind]
    base = make_model(tmp_path / "base", name, **settings)
    adapter = make_adapter(tmp_path / "my adapter", base, **lora)
    made = export_gguf(adapter, tmp_path / "out", options=YES)
    assert made.file == tmp_path / "out" / "my-adapter-adapter-f16.gguf"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [made.file.name, "proof.json"]
    proof = json.loads(made.proof.read_text())["files"][made.file.name]
    found = proof["continuations"]
    assert found["error"]["largest"] <= found["bound_largest"]
    assert proof["moves"]["mean"] > 3 * found["bound_mean"]  # without the adapter the comparison would have failed
    fields, tensors = _read(made.file)
    assert set(tensors) == set(proof["tensors"])
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert not (adapter / "merged").exists()
    if kind == "llama, rslora":  # one alpha for all does it, and B is the adapter's own
        assert math.isclose(fields["adapter.lora.alpha"], 8 * math.sqrt(8), rel_tol=1e-6)
        own = Checkpoint(adapter, "adapter_model").tensor("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
        assert (tensors["blk.1.ffn_up.weight.lora_b"] == own.half().numpy()).all()
    elif "patterns" not in kind:
        assert fields["adapter.lora.alpha"] == 8


def test_a_run_in_f32(base: Path, make_run: Any, make_adapter: Any) -> None:
    run = make_run("a run", base=base)
    make_adapter(run / "adapter", base, tokenizer=True)
    made = export_gguf(run, type="f32", options=YES)
    assert made.file == run / "export" / "gguf" / "a-run-adapter-f32.gguf"
    assert not (run / "merged").exists()
    assert f"--to gguf --out '{made.file.parent}' && llama-server -m '{made.file.parent}/llama-f16.gguf'" in (
        made.next_command
    )
    assert any("What is 0?" in line for line in made.lines)
    with pytest.raises(ExportError, match="already there: pass --overwrite"):
        export_gguf(run, type="f32", options=YES)
    whole = export_gguf(run)  # the merged model's file lies beside it
    assert set(json.loads(whole.proof.read_text())["files"]) == {made.file.name, whole.file.name}


# --- planted faults


def _refused(job: Callable[[], Any], message: str, out: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        job()
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_lora_scaled_twice(base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the adapter is: so small that llama.cpp's answers do not show it."""
    adapter = make_adapter(tmp_path / "adapter", base, lora_alpha=0.001)
    right = gguf.GGUFWriter.add_float32
    monkeypatch.setattr(gguf.GGUFWriter, "add_float32", lambda self, key, value: right(self, key, 2 * value))
    _refused(
        lambda: export_gguf(adapter, tmp_path / "out", options=YES),
        r"lora_B of model\.layers\.0\..*_proj\.weight in the file is not the adapter's: it is off by",
        tmp_path / "out",
    )


def test_a_wrong_permutation(base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["k_proj", "v_proj"])
    right = adapter_module.write_lora

    def wrong(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(architectures, "_interleave", lambda weight, heads: weight)
            return right(*args)

    monkeypatch.setattr(adapter_module, "write_lora", wrong)
    _refused(
        lambda: export_gguf(adapter, tmp_path / "out", options=YES),
        r"lora_B of model\.layers\.0\.self_attn\.k_proj\.weight in the file is not the adapter's",
        tmp_path / "out",
    )


def test_one_layer_left_out(base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    right = adapter_module._pairs

    def wrong(*args: Any) -> Any:
        pairs = right(*args)
        del pairs["blk.1.ffn_gate.weight"]
        return pairs

    monkeypatch.setattr(adapter_module, "_pairs", wrong)
    _refused(
        lambda: export_gguf(adapter, tmp_path / "out", options=YES),
        r"the file lacks lora_A of model\.layers\.1\.mlp\.gate_proj\.weight, which the adapter changes",
        tmp_path / "out",
    )


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_llama_cpp_takes_another_scale(
    scale: float, base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    right = xllamacpp.CommonAdapterLoraInfo
    monkeypatch.setattr(xllamacpp, "CommonAdapterLoraInfo", lambda path, _: right(path, scale))
    _refused(
        lambda: export_gguf(adapter, tmp_path / "out", options=YES), "is not the model: at prompt", tmp_path / "out"
    )


def test_llama_cpp_sees_a_permutation_too(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    """The second check by itself, on a file that the first would not have let pass."""
    lora = read_lora(open_source(make_adapter(tmp_path / "adapter", base)))
    made = convert(base, tmp_path / "base.gguf")
    model, tokenizer = adapter_module._adapted(lora), load_tokenizer(base)
    kinds = adapter_module._kinds(model, made.kinds, "f16")

    def check(file: Path) -> None:
        check_in_llama_cpp(
            made, lambda: model, tokenizer, stop_tokens(tokenizer, base), None, "f16", kinds, [], adapter=file
        )

    write_lora(lora, tmp_path / "right.gguf", "f16", "x")
    check_lora(lora, tmp_path / "right.gguf")
    check(tmp_path / "right.gguf")
    as_they_are = {weight: (change, rules.same) for weight, (change, _) in lora.pairs.items()}
    lora.pairs.update(as_they_are)
    write_lora(lora, tmp_path / "wrong.gguf", "f16", "x")
    with pytest.raises(ExportError, match="is not the model: at prompt"):
        check(tmp_path / "wrong.gguf")


# --- what llama.cpp cannot do, and bad input

CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, r"is DoRA \(model\.layers"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"holds lm_head\.weight whole \(modules_to_save"),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, r"changes the embeddings \(model\.embed_tokens"),
    "biases": (
        {"target_modules": ["q_proj"], "lora_bias": True},
        r"has a bias in its product \(lora_bias, model\.layers",
    ),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_llama_cpp_cannot_do(kind: str, make_model: Any, make_adapter: Any, tmp_path: Path) -> None:
    settings, message = CANNOT[kind]
    base = make_model(tmp_path / "base", attention_bias=kind == "biases")
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    message += r".*, which an adapter in llama\.cpp cannot: leave adapter=yes out, and the merged model is exported$"
    _refused(lambda: export_gguf(adapter, tmp_path / "out", options=YES), message, tmp_path / "out")


def test_a_head_that_is_tied(make_model: Any, make_adapter: Any, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    _refused(
        lambda: export_gguf(adapter, tmp_path / "out", options=YES),
        "changes the head, which is the embeddings' in the base's GGUF",
        tmp_path / "out",
    )


def test_a_tokenizer_of_its_own(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, tokenizer=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(adapter)
    out = tmp_path / "out"
    _refused(lambda: export_gguf(adapter, out, options=YES), r"brings a chat template that its base .* has not", out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(adapter)
    _refused(lambda: export_gguf(adapter, out, options=YES), r"brings tokens that its base .* has not", out)


def test_a_stop_token_that_the_base_s_file_has_not(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, tokenizer=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(300)
    tokenizer.save_pretrained(adapter)
    out = tmp_path / "out"
    _refused(lambda: export_gguf(adapter, out, options=YES), r"goes on after the stop token '.*' \(300\)|brings", out)


def test_other_refusals(base: Path, make_run: Any, make_adapter: Any, make_model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapter = make_adapter(tmp_path / "adapter", base)
    _refused(
        lambda: export_gguf(base, out, options=YES), r"holds no adapter but a whole model: leave adapter=yes out", out
    )
    _refused(
        lambda: export_gguf(adapter, out, options={"adapter": "1"}), r"adapter=1 is not known .*allowed: yes, no", out
    )
    _refused(
        lambda: export_gguf(adapter, out, type="q8_0", options=YES),
        r"'q8_0' is not known for gguf with adapter=yes \(allowed: f16, f32\)",
        out,
    )
    rope = {
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0},
    }
    run = make_run(base=base, rope=rope)
    make_adapter(run / "adapter", base)
    _refused(lambda: export_gguf(run, out, options=YES), "trained with rotary scaling that its base has not", out)
    other = make_adapter(tmp_path / "other", make_model(tmp_path / "wide", hidden_size=96))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    _refused(
        lambda: export_gguf(other, out, options=YES), r"is for another base: it changes .* as .*x.*, the base", out
    )
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))
    _refused(lambda: export_gguf(other, out, options=YES), "has lora_alpha 0: the adapter does nothing", out)


def test_values_that_f16_cannot_hold(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter, out = make_adapter(tmp_path / "adapter", base), tmp_path / "out"
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "layers.0.mlp.up_proj.lora_B" in name)
    small = {**tensors, name: 1e-6 * tensors[name]}
    save_file(small, weights, metadata={"format": "pt"})
    _refused(
        lambda: export_gguf(adapter, out, options=YES), r"up_proj\.lora_B.* F16 cannot hold: pass --type f32$", out
    )
    assert export_gguf(adapter, out, type="f32", options=YES).file.is_file()
    shutil.rmtree(out)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    _refused(lambda: export_gguf(adapter, out, options=YES), r"up_proj\.lora_B.* not finite: it is broken", out)
