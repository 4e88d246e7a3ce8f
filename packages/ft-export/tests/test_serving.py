"""The exporters ``vllm`` and ``sglang``, as far as they go without a server; ``nox -s serve`` starts real ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ft_export import ExportError
from ft_export.bases import load_model
from ft_export.serving import checks, folder
from ft_export.serving.forms import FORMS, Form
from ft_export.serving.stream import Planned, write_tensors
from ft_export.sglang.export import export as export_sglang
from ft_export.vllm.export import export as export_vllm


@pytest.fixture
def run(base: Path, make_run: Any, make_adapter: Any) -> Path:
    path: Path = make_run()
    make_adapter(path / "adapter", base, tokenizer=True)
    return path


def _proof(made: Any) -> dict[str, Any]:
    return dict(json.loads(made.proof.read_text(encoding="utf-8")))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("export", [export_vllm, export_sglang])
def test_sixteen_bits(export: Any, run: Path) -> None:
    made = export(run)
    merged = run / "merged"
    name = "vllm" if export is export_vllm else "sglang"
    assert made.file == run / "export" / name
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (made.file / file).read_bytes() == (merged / file).read_bytes()
    proof = _proof(made)
    assert proof["type"] == "16bit"
    assert proof["tensors"] == {"compressed": 0, "cast": 0, "kept": len(load_file(merged / "model.safetensors"))}
    assert proof["merge"]["adapter_sha256"] == json.loads((merged / "merge.json").read_text())["adapter_sha256"]
    listed = {path.relative_to(made.file).as_posix() for path in made.file.rglob("*") if path.is_file()}
    assert set(proof["sha256"]) == listed - {"proof.json"}
    for file, value in proof["sha256"].items():
        assert hashlib.sha256((made.file / file).read_bytes()).hexdigest() == value
    assert json.loads((made.file / "generation_config.json").read_text())["eos_token_id"] == 2
    assert proof["stop_tokens"] == [2]

    shutil.rmtree(merged)  # it stands alone
    assert load_model(made.file, torch.float32).config.architectures == ["LlamaForCausalLM"]


def test_a_merge_is_linked_and_a_foreign_model_copied(run: Path, base: Path, tmp_path: Path) -> None:
    made = export_vllm(run)
    assert _proof(made)["weights_linked_to_the_merge"]
    assert os.path.samefile(made.file / "model.safetensors", run / "merged" / "model.safetensors")
    made = export_vllm(base, tmp_path / "out")
    assert not _proof(made)["weights_linked_to_the_merge"]
    assert not os.path.samefile(made.file / "model.safetensors", base / "model.safetensors")


@pytest.mark.parametrize("type", ["w8a8", "fp8"])
@pytest.mark.parametrize("tied", [False, True])
def test_compressed(type: str, tied: bool, make_model: Any, tmp_path: Path) -> None:
    """Against a plain statement of the format: codes times scale is the nearest such number to the weight."""
    model = make_model(tmp_path / "model", "Qwen2", tie_word_embeddings=tied)
    made = export_vllm(model, tmp_path / "out", type=type)
    was, now = load_file(model / "model.safetensors"), load_file(made.file / "model.safetensors")
    linear = {name for name in was if name.endswith("_proj.weight")}
    assert len(linear) == 14
    assert set(now) == set(was) | {f"{name}_scale" for name in linear}
    largest, code = (127, torch.int8) if type == "w8a8" else (448, torch.float8_e4m3fn)
    for name, tensor in was.items():
        if name not in linear:
            assert torch.equal(now[name], tensor)
            continue
        scale = now[f"{name}_scale"]
        assert now[name].dtype == code
        assert scale.dtype == torch.bfloat16
        assert scale.shape == (len(tensor), 1)
        expected = (tensor.float().abs().amax(1, keepdim=True) / largest).bfloat16()
        assert torch.equal(scale, expected)
        wanted = (tensor.float() / expected.float()).clamp(-largest, largest)
        assert torch.equal(now[name].float(), (wanted.round() if type == "w8a8" else wanted).to(code).float())
    config = json.loads((made.file / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["dtype"] == "bfloat16"
    proof = _proof(made)
    gap = proof["gap"]
    assert 0 < gap["weights"]["mean"] <= gap["bound_mean"]
    assert 0 < gap["weights"]["largest"] <= gap["bound_largest"]
    assert gap["with_rounded_activations"]["mean"] > 0
    assert gap["greedy_equal"] > 0.7 * gap["weights"]["tokens"]
    assert sum(path.stat().st_size for path in made.file.glob("*.safetensors")) < 0.8 * sum(
        path.stat().st_size for path in model.glob("*.safetensors")
    )


@pytest.mark.parametrize("type", ["w8a8", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compressed_tensors_reads_the_same_weights(type: str, dtype: str, make_model: Any, tmp_path: Path) -> None:
    """The library whose format it is, through transformers, dequantizes to codes times scale, in the scale's type."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    import transformers

    model = make_model(tmp_path / "model", dtype=dtype)
    made = export_vllm(model, tmp_path / "out", type=type)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        made.file, dtype=torch.float32, quantization_config=config
    )
    now, parameters = load_file(made.file / "model.safetensors"), dict(loaded.named_parameters())
    compared = 0
    for name, tensor in now.items():
        if f"{name}_scale" in now:
            scale = now[f"{name}_scale"]
            assert scale.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
            assert torch.equal(parameters[name], (tensor.to(scale.dtype) * scale).float()), name
            compared += 1
        elif not name.endswith("_scale"):
            assert torch.equal(parameters[name], tensor.float()), name
    assert compared == 14


def test_shards_keep_their_names(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    load_model(model, torch.bfloat16).save_pretrained(model, max_shard_size="100KB")
    (model / "model.safetensors").unlink()
    made = export_vllm(model, tmp_path / "out", type="w8a8")
    names = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(path.name for path in made.file.glob("*.safetensors")) == names
    index = json.loads((made.file / "model.safetensors.index.json").read_text())
    there = {key: path.name for path in made.file.glob("*.safetensors") for key in load_file(path)}
    assert index["weight_map"] == there
    again = export_sglang(model, tmp_path / "plain")
    assert load_model(again.file, torch.float32).num_parameters() > 0


def test_fp32_becomes_bfloat16_and_what_does_not_fit_is_refused(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype="float32")
    made = export_vllm(model, tmp_path / "out")
    was, now = load_file(model / "model.safetensors"), load_file(made.file / "model.safetensors")
    assert all(torch.equal(now[name], tensor.bfloat16()) for name, tensor in was.items())
    assert _proof(made)["gap"]["weights"]["mean"] > 0
    assert json.loads((made.file / "config.json").read_text())["dtype"] == "bfloat16"
    assert "--dtype bfloat16" in (made.file / "launch.sh").read_text()
    was["model.embed_tokens.weight"][3, 4] = 70000.0
    save_file(was, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"model.embed_tokens.weight has values that are too large .* --type bf16"):
        export_vllm(model, tmp_path / "half", type="f16")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("type", ["w8a8", "fp8"])
@pytest.mark.parametrize("fault", ["scale", "code", "small"])
def test_one_wrong_scale_or_code_is_caught(
    type: str, fault: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    compress = Form.compress
    seen = []

    def wrong(self: Form, weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = compress(self, weight, scale_dtype)
        seen.append(weight)
        if len(seen) == 5:
            if fault == "code":
                codes[7, 3] = (codes[7, 3].float() * -1 + 9).to(codes.dtype)
            else:
                scales[7] *= 1.5 if fault == "scale" else 1.01
        return codes, scales

    monkeypatch.setattr(Form, "compress", wrong)
    said = "is off by more than half a step, in row 7" if fault == "code" else "_scale is not the model's .* in row 7"
    with pytest.raises(ExportError, match=said):
        export_vllm(base, tmp_path / "out", type=type)
    assert contents(tmp_path) == []


@pytest.mark.parametrize("fault", ["scale", "norm", "rope", "tie"])
def test_log_probabilities_catch_what_the_weights_do_not_show(
    fault: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first check out of the way, faults of one kind each break the bound of the second."""

    def spoil(plan: Any, to: Path, progress: Any = None) -> dict[str, int]:
        path = to / "model.safetensors"
        tensors = load_file(path)
        if fault == "scale":
            tensors["model.layers.1.mlp.down_proj.weight_scale"] *= 2
        elif fault == "norm":
            tensors["model.norm.weight"] = tensors["model.layers.0.input_layernorm.weight"].clone()
        elif fault == "tie":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        else:
            _edit(to / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
        save_file(tensors, path, metadata={"format": "pt"})
        return {"compressed": 0, "cast": 0, "kept": 0}

    monkeypatch.setattr("ft_export.serving.export.check_stored", spoil)
    with pytest.raises(ExportError, match=r"the w8a8 model does not say what the model says"):
        export_vllm(base, tmp_path / "out", type="w8a8")


def test_a_copy_that_went_wrong_is_caught(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_over = folder._take_over

    def spoil(plan: Any, files: Any, to: Path) -> bool:
        linked = take_over(plan, files, to)
        with (to / "model.safetensors").open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            byte = file.read(1)
            file.seek(-100, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        return linked

    monkeypatch.setattr(folder, "_take_over", spoil)
    with pytest.raises(ExportError, match=r"is not the model's: nothing was written"):
        export_vllm(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stops(make_model: Any, tmp_path: Path) -> None:
    """What ends a turn is named for the server; a model without any stop is refused."""
    model = make_model(tmp_path / "model")
    _edit(model / "tokenizer_config.json", eos_token="<|endoftext|>")
    _edit(model / "generation_config.json", eos_token_id=0)
    _edit(model / "config.json", eos_token_id=0)
    made = export_sglang(model, tmp_path / "out")
    assert any("did not name <|im_end|> as a stop token: it does now" in line for line in made.lines)
    assert json.loads((made.file / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == 0  # the model's own stays

    _edit(model / "tokenizer_config.json", eos_token=None)
    (model / "chat_template.jinja").unlink()
    (model / "generation_config.json").unlink()
    _edit(model / "config.json", eos_token_id=None)
    with pytest.raises(ExportError, match=r"it would never stop; give its tokenizer an eos_token"):
        export_sglang(model, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_refused(run: Path, base: Path, make_model: Any, tmp_path: Path, contents: Any) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportError, match=r"'q8_0' is not known for vllm .allowed: 16bit, bf16, f16, fp8, w8a8, lora"):
        export_vllm(run, out, type="q8_0")
    with pytest.raises(ExportError, match=r"'w8a8' is not known for sglang .allowed: 16bit, bf16, f16"):
        export_sglang(run, out, type="w8a8")
    with pytest.raises(ExportError, match=r"option 'gpu' is not known for vllm .allowed: memory, context"):
        export_vllm(run, out, options={"gpu": "4090"})
    with pytest.raises(ExportError, match=r"context=513 is not allowed .1 to 512"):
        export_vllm(run, out, options={"context": "513"})
    assert not (run / "merged").exists()  # said before the merge, which takes its time
    experts = make_model(tmp_path / "moe", "Mixtral", num_local_experts=2)
    with pytest.raises(ExportError, match=r"experts and convolutions are not compressed here"):
        export_vllm(experts, out, type="w8a8")
    assert export_vllm(experts, tmp_path / "experts").file.is_dir()
    _edit(experts / "config.json", architectures=["MixtralForSequenceClassification"])
    with pytest.raises(ExportError, match=r"is a MixtralForSequenceClassification, which writes no text"):
        export_vllm(experts, out)
    quantized = shutil.copytree(base, tmp_path / "quantized")
    _edit(quantized / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ExportError, match=r"is quantized already .awq.: export the 16-bit model"):
        export_vllm(quantized, out)
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for type in ("16bit", "w8a8"):
        with pytest.raises(ExportError, match=r"layers.1.mlp.up_proj.weight holds values that are no numbers"):
            export_vllm(broken, out, type=type)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"no weights for model.layers.1.mlp.up_proj.weight .1 missing."):
        export_vllm(broken, out, type="w8a8")
    assert not out.exists()
    assert not [name for name in contents(tmp_path) if "partial" in name]


def test_a_folder_that_is_taken(run: Path, base: Path, tmp_path: Path) -> None:
    made = export_vllm(run)
    with pytest.raises(ExportError, match=r"is already there: pass --overwrite"):
        export_vllm(run, type="w8a8")
    assert export_vllm(run, type="w8a8", overwrite=True).file == made.file
    assert "int-quantized" in (made.file / "config.json").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/proof.json").write_text("{}")
    with pytest.raises(ExportError, match=r"holds something else .it has no launch.sh."):
        export_vllm(run, tmp_path / "mine", overwrite=True)
    served = export_vllm(base, tmp_path / "served").file
    with pytest.raises(ExportError, match=r"holds what is to be exported"):
        export_sglang(served, served, overwrite=True)
    assert load_model(served, torch.float32) is not None


DISK_FULL = """
import resource, sys
from ft_export import ExportError
from ft_export.vllm.export import export
base, out = sys.argv[1:]
import transformers, torch  # whatever caches these write on import, they write before the limit
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
for type in ("16bit", "w8a8"):
    try:
        export(base, out, type=type)
    except ExportError as error:
        print(f"LINE {error}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_disk_full(forks: Any, base: Path, tmp_path: Path, contents: Any) -> None:
    """A real EFBIG: the system refuses to let a file grow past 64 KiB."""
    done = forks.run(DISK_FULL, base, tmp_path / "out")
    lines = [line for line in done.stdout.splitlines() if line.startswith("LINE ")]
    assert len(lines) == 2, done.stderr
    assert all("File too large" in line for line in lines)
    assert contents(tmp_path) == []


def test_stream_refuses_what_was_not_planned(tmp_path: Path) -> None:
    plan = {"a": Planned((2,), torch.int8), "b": Planned((1,), torch.float32)}
    a, b = torch.ones(2, dtype=torch.int8), torch.ones(1)
    write_tensors(tmp_path / "x", plan, [{"a": a}, {"b": b}])
    assert all(torch.equal(load_file(tmp_path / "x")[name], tensor) for name, tensor in {"a": a, "b": b}.items())
    for wrong in ([{"b": b}], [{"a": a}], [{"a": b}], [{"a": a, "b": b}, {"c": b}]):
        with pytest.raises(ExportError, match=r"fault of ft-export"):
            write_tensors(tmp_path / "x", plan, wrong)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_compression_in_blocks_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(11, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[4] = 0
    for name in ("w8a8", "fp8"):
        whole = FORMS[name].compress(weight, torch.bfloat16)
        monkeypatch.setattr("ft_export.serving.forms.BLOCK", 32 * rows)
        parts = FORMS[name].compress(weight, torch.bfloat16)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, parts, strict=True))
        assert not parts[0][4].float().any()
        assert parts[1][4] == 1


def test_check_reads_in_blocks(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "BLOCK", 200)
    assert _proof(export_vllm(base, tmp_path / "out", type="w8a8"))["tensors"]["compressed"] == 14
