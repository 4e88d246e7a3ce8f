"""Runs of models that listen and speak, for vLLM, GGUF, the Hub and the others: what is exported, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from speech_models import add_speech_adapter, grow, make_csm, make_whisper, sound_tokens, wav, write_speech_run

from ft_export import ExportError, export_gguf, merge
from ft_export.hub.export import export as export_hub
from ft_export.ollama.export import export as export_ollama
from ft_export.open_webui.export import export as export_open_webui
from ft_export.sglang.export import export as export_sglang
from ft_export.vllm.export import export as export_vllm


@pytest.fixture(scope="module")
def listening(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny Whisper, merged once for all exports; not to be changed."""
    folder = tmp_path_factory.mktemp("listening")
    base = make_whisper(folder / "base", make_tokenizer())
    run = write_speech_run(folder / "my run", base)
    add_speech_adapter(run / "adapter", base)
    merge(run)
    return run


@pytest.fixture(scope="module")
def speaking(make_model: Any, make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny Llama that got a codec's tokens, merged once for all exports; not to be changed."""
    folder = tmp_path_factory.mktemp("speaking")
    run = grow(folder, make_model(folder / "base", "Llama"), make_tokenizer(), "whole")
    merge(run)
    return run


def test_vllm_gets_a_whisper_with_its_processor(listening: Path, tmp_path: Path) -> None:
    made = export_vllm(listening, tmp_path / "vllm")
    files = {path.name for path in made.file.iterdir()}
    assert {"model.safetensors", "preprocessor_config.json", "generation_config.json", "launch.sh"} <= files
    proof = json.loads(made.proof.read_text())
    assert (proof["with_sounds"], proof["samples"], proof["context"]) == (True, 4, 64)
    whose = "4 of the rows' own, none made"
    assert f"transformers reads 4 texts with their sounds from the folder: {whose}" in made.lines
    assert "vllm takes sounds at /v1/audio/transcriptions and /v1/audio/translations" in made.lines
    words = (made.file / "launch.sh").read_text()
    assert "--max-model-len 64" in words
    # keys and values of 64 tokens and of 100 places of a sound, of width 64 in two layers, in 16 bits
    assert "text of 64 tokens and its sound" in words
    transformers.AutoModelForSpeechSeq2Seq.from_pretrained(made.file)
    transformers.AutoProcessor.from_pretrained(made.file)


def test_rounded_to_another_type_it_is_compared_on_sounds(listening: Path, tmp_path: Path) -> None:
    made = export_vllm(listening, tmp_path / "out", type="f16")
    gap = json.loads(made.proof.read_text())["gap"]
    assert 0 < gap["weights"]["mean"] <= gap["bound_mean"]


def test_a_whisper_trained_in_full_is_served_as_it_is(listening: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(listening, run, ignore=shutil.ignore_patterns("adapter", "merged", "export"))
    shutil.copytree(listening / "merged", run / "model", ignore=shutil.ignore_patterns("merge.json"))
    proof = json.loads(export_vllm(run).proof.read_text())
    assert proof["tensors"]["cast"] == 0
    assert proof["tensors"]["kept"] > 50


def test_what_a_server_does_not_take_of_a_whisper_is_refused(
    listening: Path, make_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=r"a model that listens, exported to vllm in 16 bits: use --type 16bit"):
        export_vllm(listening, tmp_path / "out", type="w8a8")
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with pytest.raises(ExportError, match="engine= compares texts alone"):
        export_vllm(listening, tmp_path / "out", options={"engine": str(program)})
    with pytest.raises(ExportError, match=r"a model of speech, whose adapters are not served here: use --type 16bit"):
        export_vllm(listening, tmp_path / "out", type="lora")
    with pytest.raises(ExportError, match=r"memory= says 0\.25 GiB: use a smaller"):
        export_vllm(listening, tmp_path / "out", options={"memory": "256MiB"})
    other = make_whisper(tmp_path / "other", make_tokenizer(), tie_word_embeddings=False)
    with pytest.raises(ExportError, match=r"has a head of its own .* export it to ctranslate2"):
        export_vllm(other, tmp_path / "out")
    for export in (export_sglang, export_gguf, export_ollama, export_open_webui):
        with pytest.raises(ExportError, match=r"is a model that listens \(whisper\), .* export it to ctranslate2"):
            export(listening, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_whisper_is_refused_before_it_is_merged(listening: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(listening, run, ignore=shutil.ignore_patterns("merged", "export"))
    for export in (export_sglang, export_gguf, export_ollama, export_open_webui):
        with pytest.raises(ExportError, match="is a model that listens"):
            export(run, tmp_path / "out")
    with pytest.raises(ExportError, match="is a model that listens"):
        export_open_webui(run, tmp_path / "out", options={"engine": "vllm"})
    assert not (run / "merged").exists()


def test_csm_goes_to_transformers_and_the_hub(make_tokenizer: Any, tmp_path: Path) -> None:
    model = make_csm(tmp_path / "csm", make_tokenizer())
    for export in (export_vllm, export_sglang, export_gguf, export_ollama, export_open_webui):
        with pytest.raises(ExportError, match=r"is a model that speaks \(csm\), .* ft merge"):
            export(model, tmp_path / "out")
    made = export_hub(model, tmp_path / "hub", options={"repo": "me/mine", "dry": "yes", "license": "mit"})
    assert yaml.safe_load((made.file / "README.md").read_text().split("---")[1])["pipeline_tag"] == "text-to-speech"


@pytest.mark.parametrize("type", ["merged", "adapter"])
def test_the_hub_is_told_that_it_listens(type: str, listening: Path, tmp_path: Path) -> None:
    options = {"repo": "me/mine", "dry": "yes", "license": "mit", "base": "me/base"}
    made = export_hub(listening, tmp_path / "out", type=type, options=options)
    card = (made.file / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "automatic-speech-recognition"
    assert ("AutoModelForSpeechSeq2Seq.from_pretrained" in card) == (type == "merged")
    assert (made.file / ("preprocessor_config.json" if type == "merged" else "adapter_config.json")).is_file()
    if type == "merged" and find_spec("soundfile") is not None:  # the card's lines, as they stand, on the folder
        (tmp_path / "speech.wav").write_bytes(wav(1.0))
        code = card.split("```python\n")[1].split("```")[0].replace('"me/mine"', repr(str(made.file)))
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_language_model_that_speaks_goes_where_language_models_go(speaking: Path, tmp_path: Path) -> None:
    tokens = len(transformers.AutoTokenizer.from_pretrained(speaking / "adapter"))
    for export, target in ((export_vllm, "vllm"), (export_sglang, "sglang")):
        made = export(speaking, tmp_path / target)
        assert json.loads((made.file / "config.json").read_text())["vocab_size"] == tokens
    for export in (export_ollama, export_open_webui):
        with pytest.raises(ExportError, match=r"answers with a codec's tokens, .* export it to gguf, vllm or sglang"):
            export(speaking, tmp_path / "out")
    options = {"repo": "me/mine", "dry": "yes", "license": "mit", "base": "me/base"}
    made = export_hub(speaking, tmp_path / "hub", options=options)
    assert yaml.safe_load((made.file / "README.md").read_text().split("---")[1])["pipeline_tag"] == "text-to-speech"


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_its_gguf_has_the_codecs_tokens(type: str, speaking: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')
    made = export_gguf(speaking, tmp_path / "out", type=type)
    assert any("the file is the language model alone" in line for line in made.lines)
    # five texts of our own, the four rows', the built-in conversations, and one of a codec's tokens
    assert any(line.startswith("llama.cpp splits 13 texts into the same tokens") for line in made.lines)
    import gguf

    fields = gguf.GGUFReader(made.file).fields
    names = fields["tokenizer.ggml.tokens"].contents()
    assert names[-60:] == sound_tokens()
