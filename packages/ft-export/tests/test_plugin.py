"""What ft sees of this package, where ft-core is installed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ft_core", reason="pip install ft-core")

from ft_core.errors import FtError
from ft_core.plugins import CommandSpec, ExporterSpec, ExportRequest, registry, resolve


def test_registered() -> None:
    merge = registry().get(CommandSpec, "merge")
    exporter = registry().get(ExporterSpec, "gguf")
    assert merge.module == "ft_export.commands.merge"
    assert exporter.types[:4] == ("f16", "f32", "bf16", "q8_0")
    assert {"q2_k", "q3_k_m", "q4_k_m", "q5_k_s", "q6_k", "q4_0", "q5_1"} < set(exporter.types)
    assert callable(resolve(exporter.export))
    hub = registry().get(ExporterSpec, "hub")
    assert hub.types[:3] == ("merged", "adapter", "f16")
    assert callable(resolve(hub.export))
    vllm, sglang = registry().get(ExporterSpec, "vllm"), registry().get(ExporterSpec, "sglang")
    assert vllm.types == ("16bit", "bf16", "f16", "fp8", "w8a8", "lora")
    assert sglang.types == ("16bit", "bf16", "f16")
    whisper = registry().get(ExporterSpec, "ctranslate2")
    assert whisper.types == ("float16", "float32", "int8")
    assert callable(resolve(whisper.export))
    for name in ("ollama", "open-webui"):
        spec = registry().get(ExporterSpec, name)
        assert spec.types == exporter.types
        assert callable(resolve(spec.export))


def _merge(*words: str) -> int:
    from ft_export.commands import merge

    parser = argparse.ArgumentParser()
    merge.add_arguments(parser)
    return merge.run(parser.parse_args(list(words)))


def test_merge_command(base: Path, make_run: Any, make_adapter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    make_adapter(run / "adapter", base)
    assert _merge(str(run), "--dtype", "float16") == 0
    out = capsys.readouterr().out
    assert f"merged model: {run / 'merged'}" in out
    assert "log-probabilities of" in out
    with pytest.raises(FtError, match="already there: pass --overwrite"):
        _merge(str(run))


def test_several_adapters_on_the_command_line(
    base: Path, make_run: Any, make_adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    make_adapter(run / "adapter", base)
    others = [make_adapter(tmp_path / name, base, seed=seed) for seed, name in enumerate(("two", "three"), 2)]
    words = ["--adapter", f"{others[0]}:0.5", "--adapter", str(others[1]), "--weight", "2"]
    assert _merge(str(run), *words, "--combination", "dare_linear", "--density", "0.5", "--seed", "4") == 0
    captured = capsys.readouterr()
    assert f"2 x {run}, 0.5 x {others[0]}, 1 x {others[1]}, combined by PEFT (dare_linear)" in captured.out
    assert "combining 3 adapters by dare_linear" in captured.err
    said = json.loads((run / "merged" / "merge.json").read_text())["combination"]
    assert (said["type"], said["density"], said["seed"]) == ("dare_linear", 0.5, 4)
    with pytest.raises(FtError, match="--adapter :1 names no folder"):
        _merge(str(run), "--adapter", ":1", "--overwrite")
    with pytest.raises(FtError, match="combination ties needs a density"):
        _merge(str(run), "--adapter", str(others[0]), "--combination", "ties", "--overwrite")


def test_exporter(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
    pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')
    export = resolve(registry().get(ExporterSpec, "gguf").export)
    result = export(ExportRequest(run=base, out=tmp_path / "out"))
    assert [path.name for path in result.files] == ["llama-f16.gguf", "proof.json"]
    assert all(path.is_file() for path in result.files)
    assert any(line.startswith("llama.cpp's answer to") for line in result.checks)
    with pytest.raises(FtError, match="allowed: f16, f32, bf16, q8_0"):
        export(ExportRequest(run=base, out=tmp_path / "out", type="q2_k_s"))


def test_a_dry_push(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = resolve(registry().get(ExporterSpec, "hub").export)
    options = {"repo": "me/dates", "dry": "yes"}
    result = export(ExportRequest(run=base, out=tmp_path / "out", options=options))
    assert result.files == (tmp_path / "out", tmp_path / "out" / "proof.json")
    assert result.checks[-1] == "a dry run: nothing was sent"
    assert any(line.endswith(" bytes  model.safetensors") for line in result.checks)
    assert "model.safetensors" not in capsys.readouterr().err  # the list once, where ft export prints the checks
    with pytest.raises(FtError, match="where to push is not said"):
        export(ExportRequest(run=base, out=tmp_path / "out"))


def test_a_proof_that_is_skipped(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded in llama.cpp; other targets do not take the word for nothing."""
    from ft_export.gguf import checking

    monkeypatch.setattr(checking, "llama_cpp", None)
    export = resolve(registry().get(ExporterSpec, "gguf").export)
    result = export(ExportRequest(run=base, out=tmp_path / "out", skip_proof=True))
    assert result.checks[-1].startswith("NOT PROVEN: ")
    said = json.loads((tmp_path / "out" / "proof.json").read_text())["files"][result.files[0].name]
    assert said["skipped"]
    assert said["checks"] == list(result.checks)
    for target in ("hub", "ollama", "open-webui", "sglang", "vllm"):
        other = resolve(registry().get(ExporterSpec, target).export)
        with pytest.raises(FtError, match="--skip-proof is for gguf alone"):
            other(ExportRequest(run=base, out=tmp_path / target, skip_proof=True))


def test_a_model_s_folder_on_the_command_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next command of an adapter's export makes the file of its base; and no llama.cpp is needed unproven."""
    import importlib.metadata

    from ft_core.cli import main

    right = importlib.metadata.version

    def version(name: str) -> str:
        if name == "xllamacpp":
            raise importlib.metadata.PackageNotFoundError(name)
        return right(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["export", str(base), "--to", "gguf", "--out", str(tmp_path / "out"), "--skip-proof"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "NOT PROVEN: " in out
    assert out.endswith(
        "--jinja  # llama-server comes with llama.cpp: https://github.com/ggml-org/llama.cpp/releases\n"
    )
    (tmp_path / "llama-server").write_text("#!/bin/sh\n")
    (tmp_path / "llama-server").chmod(0o755)
    assert main([*words, "--overwrite"]) == 0
    assert capsys.readouterr().out.endswith("--jinja\n")
    assert list((tmp_path / "out").glob("*.gguf"))
    assert main(["export", str(tmp_path), "--to", "gguf"]) == 2
    assert "is no run folder" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_exporters_for_servers(target: str, base: Path, make_run: Any, make_adapter: Any) -> None:
    run = make_run()
    make_adapter(run / "adapter", base)
    export = resolve(registry().get(ExporterSpec, target).export)
    result = export(ExportRequest(run=run, out=run / "export" / target))
    assert result.files == (run / "export" / target, run / "export" / target / "proof.json")
    assert result.next_command == f"sh '{run / 'export' / target / 'launch.sh'}'"
    assert any("equal bit for bit" in line for line in result.checks)
    with pytest.raises(FtError, match=r"already there: pass --overwrite"):
        export(ExportRequest(run=run, out=run / "export" / target))


@pytest.mark.parametrize(("name", "file"), [("ollama", "Modelfile"), ("open-webui", "model.json")])
def test_exporters_over_gguf(name: str, file: str, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
    pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')
    export = resolve(registry().get(ExporterSpec, name).export)
    result = export(ExportRequest(run=base, out=tmp_path / "out", options={"num_ctx": "256"}))
    assert result.files == (tmp_path / "out", tmp_path / "out" / "proof.json")
    assert (tmp_path / "out" / file).is_file()
    with pytest.raises(FtError, match="pass --overwrite"):
        export(ExportRequest(run=base, out=tmp_path / "out"))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_was_trained_with_scaled_positions_is_served_with_them(
    quantization: str, make_model: Any, tmp_path: Path
) -> None:
    """From a run of ``ft train`` on texts longer than the base has positions to llama.cpp, which is compared with the
    merged model, as that is with the adapter on its scaled base."""
    pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
    pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')
    import torch

    from ft_core import train
    from ft_core.models import load_run
    from ft_core.runs import Run
    from ft_export.bases import load_model

    base = make_model(tmp_path / "base", max_position_embeddings=48, initializer_range=0.1)
    turns = [
        [("user", f"What is {n} and {n}?"), ("assistant", f"{2 * n}. " + "The sun is shining. " * 8)] for n in range(12)
    ]
    rows = [{"messages": [{"role": role, "content": said} for role, said in turn]} for turn in turns]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = train(
        {
            "model": str(base),
            "data": str(tmp_path / "rows.jsonl"),
            "eval_split": 4,
            "quantization": quantization,
            "max_length": 96,
            "rope_scaling": "yarn",
            "lora": {"r": 8},
            "training": {"max_steps": 3, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 5e-3,
                         "optimizer": "adamw_torch"},
            "output": str(tmp_path / "run"),
        },
        say=lambda _: None,
    )  # fmt: skip
    export = resolve(registry().get(ExporterSpec, "gguf").export)
    export(ExportRequest(run=result.run, out=tmp_path / "out"))
    merged = load_model(result.run / "merged", torch.float32)
    trained, _ = load_run(Run.open(result.run), say=lambda _: None)
    plain = trained.get_base_model()
    assert merged.config.rope_parameters == plain.config.rope_parameters
    assert merged.config.max_position_embeddings == plain.config.max_position_embeddings == 96
    assert torch.equal(merged.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq.cpu())
    assert merged.model.rotary_emb.attention_scaling == plain.model.rotary_emb.attention_scaling > 1


def test_a_merge_says_how_far_it_is_and_clears_away_a_killed_one(
    base: Path, make_run: Any, make_adapter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    make_adapter(run / "adapter", base)
    left = run / ".merged.abcdefgh.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert _merge(str(run)) == 0
    assert not left.exists()
    said = capsys.readouterr().err
    for line in (
        " tensors written  ", " tensors checked  ",
        " texts read by the adapter on its base  ", " texts read by the merged model  ",
        " texts read with rounding's noise  ",
    ):  # fmt: skip
        assert line in said
