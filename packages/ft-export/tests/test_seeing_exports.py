"""Runs of models that see, for vLLM, SGLang, the Hub, Ollama and Open WebUI: what is exported, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="models that see are proven on images: pip install pillow")

import transformers
import yaml
from vision_models import add_adapter, make_seeing, write_run

from ft_export import ExportError
from ft_export.checkpoints import Checkpoint
from ft_export.hub.export import export as export_hub
from ft_export.ollama.export import export as export_ollama
from ft_export.ollama.modelfile import read_modelfile
from ft_export.open_webui.export import export as export_open_webui
from ft_export.sglang.export import export as export_sglang
from ft_export.vllm.export import export as export_vllm


@pytest.fixture(scope="module")
def trained(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny Qwen3-VL, merged once for all exports; not to be changed."""
    folder = tmp_path_factory.mktemp("seeing")
    base = make_seeing(folder / "base", "qwen3_vl", make_tokenizer())
    run = write_run(folder / "my run", base, folder / "a.png")
    add_adapter(run / "adapter", base)
    from ft_export import merge

    merge(run)
    return run


def test_servers_get_the_merged_model_with_its_processor(trained: Path, tmp_path: Path) -> None:
    for export, target in ((export_vllm, "vllm"), (export_sglang, "sglang")):
        made = export(trained, tmp_path / target)
        files = {path.name for path in made.file.iterdir()}
        assert {"model.safetensors", "preprocessor_config.json", "chat_template.jinja", "launch.sh"} <= files
        proof = json.loads(made.proof.read_text())
        assert proof["with_images"]
        assert proof["samples"] == 4
        whose = "4 of the rows' own, none drawn"
        assert f"transformers reads 4 texts with images from the folder: {whose}" in made.lines
        transformers.AutoModelForImageTextToText.from_pretrained(made.file)


def test_rounded_to_another_type_it_is_compared_on_images(trained: Path, tmp_path: Path) -> None:
    made = export_vllm(trained, tmp_path / "out", type="f16")
    gap = json.loads(made.proof.read_text())["gap"]
    assert 0 < gap["weights"]["mean"] <= gap["bound_mean"]


def test_what_cannot_be_done_is_refused_in_a_line(trained: Path, tmp_path: Path) -> None:
    for type in ("w8a8", "fp8"):
        with pytest.raises(ExportError, match=r"a model that sees, which is exported to vllm in 16 bits"):
            export_vllm(trained, tmp_path / "out", type=type)
    with pytest.raises(ExportError, match=r"whose adapters are not served here: use --type 16bit"):
        export_vllm(trained, tmp_path / "out", type="lora")
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with pytest.raises(ExportError, match=r"engine= compares texts alone"):
        export_vllm(trained, tmp_path / "out", options={"engine": str(program)})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("type", ["merged", "adapter"])
def test_the_hub_is_told_that_it_takes_images(type: str, trained: Path, tmp_path: Path) -> None:
    options = {"repo": "me/mine", "dry": "yes", "license": "mit", "base": "me/base"}
    made = export_hub(trained, tmp_path / "out", type=type, options=options)
    card = (made.file / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert (made.file / ("preprocessor_config.json" if type == "merged" else "adapter_config.json")).is_file()


def test_the_hub_gets_both_gguf_files(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')
    options = {"repo": "me/mine", "dry": "yes", "license": "mit", "base": "me/base"}
    made = export_hub(trained, tmp_path / "out", type="q8_0", options=options)
    assert {"my-run-q8_0.gguf", "mmproj-my-run-q8_0.gguf"} <= {path.name for path in made.file.iterdir()}
    assert (
        "llama-server -m my-run-q8_0.gguf --mmproj mmproj-my-run-q8_0.gguf --jinja"
        in (made.file / "README.md").read_text()
    )


def test_ollama_and_open_webui_are_given_both_files(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')
    made = export_ollama(trained, tmp_path / "ollama")
    commands = read_modelfile((made.file / "Modelfile").read_text())
    assert commands[:2] == [("model", "./my-run-f16.gguf"), ("model", "./mmproj-my-run-f16.gguf")]
    assert (made.file / "mmproj-my-run-f16.gguf").is_file()
    assert any("puts a message's images before its text" in line for line in made.lines)

    made = export_open_webui(trained, tmp_path / "web")
    services = yaml.safe_load((made.file / "compose.yaml").read_text())["services"]
    words = services["llama-server"]["command"]
    assert words[words.index("--mmproj") + 1] == "/model/mmproj-my-run-f16.gguf"
    assert words[words.index("--image-max-tokens") + 1] == "64"
    assert [volume["target"] for volume in services["llama-server"]["volumes"]] == [
        "/model/my-run-f16.gguf", "/model/mmproj-my-run-f16.gguf",
    ]  # fmt: skip
    model = json.loads((made.file / "model.json").read_text())["models"][0]
    assert model["meta"]["capabilities"]["vision"] is True


def test_a_model_trained_in_full_is_exported_as_it_is(make_tokenizer: Any, tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", "llava", make_tokenizer())
    run = write_run(tmp_path / "run", base, tmp_path / "a.png")
    shutil.copytree(base, run / "model")
    made = export_vllm(run)
    assert json.loads(made.proof.read_text())["tensors"]["kept"] > 50
    assert not any("the base's names" in line for line in made.lines)
    # as transformers 5.23 saves it, without a part of the tower's names that other engines look for
    transformers.AutoModelForImageTextToText.from_pretrained(base).save_pretrained(run / "model")
    saved = set(Checkpoint(run / "model"))
    made = export_vllm(run, overwrite=True)
    assert set(Checkpoint(made.file)) == set(Checkpoint(base))
    assert any("the base's names" in line for line in made.lines) == (saved != set(Checkpoint(base)))
    pushed = export_hub(run, type="merged", options={"repo": "me/mine", "dry": "yes", "license": "mit"})
    assert set(Checkpoint(pushed.file)) == set(Checkpoint(base))
    assert set(Checkpoint(run / "model")) == saved
    before, after = Checkpoint(base), Checkpoint(pushed.file)
    assert all(before.tensor(name).equal(after.tensor(name)) for name in before)
    transformers.AutoModelForImageTextToText.from_pretrained(pushed.file)
