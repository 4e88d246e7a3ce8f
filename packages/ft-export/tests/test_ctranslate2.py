"""Whisper for CTranslate2: files, variables, what is refused, and what CTranslate2 itself writes."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ctranslate2", reason='pip install "ft-export[ctranslate2]"')

import torch
import transformers
from speech_models import add_speech_adapter, make_whisper, write_speech_run

from ft_export import ExportError
from ft_export.ctranslate2.checking import check_file
from ft_export.ctranslate2.convert import convert
from ft_export.ctranslate2.decoding import check_decoding
from ft_export.ctranslate2.export import export
from ft_export.ctranslate2.layout import EMBEDDINGS, HEAD, variables_of
from ft_export.ctranslate2.reading import ModelFile


@pytest.fixture(scope="module")
def trained(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny Whisper, merged once for all exports; not to be changed."""
    from ft_export import merge

    folder = tmp_path_factory.mktemp("whisper")
    base = make_whisper(folder / "base", make_tokenizer())
    run = write_speech_run(folder / "my run", base)
    add_speech_adapter(run / "adapter", base)
    merge(run)
    return run


@pytest.mark.parametrize("type", ["float16", "float32", "int8"])
def test_a_run_is_exported_and_decoded(type: str, trained: Path, tmp_path: Path) -> None:
    made = export(trained, tmp_path / "out", type=type)
    files = {path.name for path in made.file.iterdir()}
    assert files == {
        "model.bin", "config.json", "vocabulary.json", "tokenizer.json", "preprocessor_config.json", "proof.json",
    }  # fmt: skip
    proof = json.loads(made.proof.read_text())
    assert proof["decoded"]["sounds"] == 4
    assert proof["decoded"]["tokens"] >= 4
    assert proof["decoded"]["largest"] <= proof["decoded"]["bound_largest"]
    assert set(proof["sha256"]) == files - {"proof.json"}
    assert proof["merge"]["samples"] == "held_out.jsonl"
    # two convolutions, eighteen products of attention and of the feed-forward, embeddings and head
    compressed = 2 + 2 * (2 + 2) + 2 * (2 + 3 + 2) + 2 if type == "int8" else 0
    assert proof["variables"]["compressed"] == compressed
    assert "sounds: 4 of the rows' own, none made" in made.lines
    config = json.loads((made.file / "config.json").read_text())
    ids = transformers.AutoTokenizer.from_pretrained(trained / "merged").convert_tokens_to_ids(["<|en|>", "<|fr|>"])
    assert config["lang_ids"] == ids
    assert config["suppress_ids"] == [3, 5]
    assert config["alignment_heads"] == [[1, 0], [1, 2]]
    assert "faster_whisper" in made.next_command
    file = ModelFile(made.file / "model.bin")
    assert file.aliases[HEAD] == EMBEDDINGS
    with pytest.raises(ExportError, match="pass --overwrite"):
        export(trained, tmp_path / "out", type=type)


def test_a_head_of_its_own_and_a_model_trained_in_full(make_tokenizer: Any, tmp_path: Path) -> None:
    """An fp32 model without adapter, whose tokenizer and features are as transformers 5 saves them."""
    base = make_whisper(tmp_path / "base", make_tokenizer(), dtype="float32", tie_word_embeddings=False)
    run = write_speech_run(tmp_path / "run", base, rows=2)
    shutil.copytree(base, run / "model")
    transformers.AutoProcessor.from_pretrained(base).save_pretrained(run / "model")
    (run / "model" / "preprocessor_config.json").unlink()
    generation = json.loads((base / "generation_config.json").read_text())
    for name in ("lang_to_id", "alignment_heads", "suppress_tokens", "begin_suppress_tokens"):
        del generation[name]
    (run / "model" / "generation_config.json").write_text(json.dumps(generation))
    made = export(run)
    assert made.file == run / "export" / "ctranslate2"
    file = ModelFile(made.file / "model.bin")
    assert HEAD not in file.aliases
    assert any("no alignment_heads" in line for line in made.lines)
    config = json.loads((made.file / "config.json").read_text())
    assert len(config["lang_ids"]) == 2
    assert config["suppress_ids"] == []
    assert json.loads((made.file / "preprocessor_config.json").read_text())["feature_size"] == 16


def _spoil(path: Path, name: str, change: Any) -> None:
    """Change a variable's bytes in a written file."""
    said = ModelFile(path).variable(name)
    data = bytearray(path.read_bytes())
    data[said.place : said.place + said.size] = change(bytes(data[said.place : said.place + said.size]))
    path.write_bytes(data)


def test_a_wrong_variable_is_named(trained: Path, tmp_path: Path) -> None:
    model = trained / "merged"
    config = transformers.AutoConfig.from_pretrained(model)
    tmp_path.joinpath("f").mkdir()
    convert(model, tmp_path / "f", "float16")
    path = tmp_path / "f" / "model.bin"
    whole = path.read_bytes()
    assert check_file(ModelFile(path), model, config, "float16")["compressed"] == 0

    # key and query of one attention the other way round: as large, as many, and wrong
    name = "decoder/layer_1/self_attention/linear_0/weight"
    third = ModelFile(path).variable(name).size // 3
    _spoil(path, name, lambda data: data[third : 2 * third] + data[:third] + data[2 * third :])
    with pytest.raises(ExportError, match=f"{name} is not the model's in float16"):
        check_file(ModelFile(path), model, config, "float16")
    path.write_bytes(whole)
    _spoil(path, "encoder/num_heads", lambda data: struct.pack("<H", 2))
    with pytest.raises(ExportError, match="encoder/num_heads is 2, not 4"):
        check_file(ModelFile(path), model, config, "float16")
    path.write_bytes(whole[:-7])
    with pytest.raises(ExportError, match=r"is no whole model\.bin"):
        ModelFile(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match="bytes, its sizes ask for"):
        ModelFile(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ExportError, match="has more in it"):
        ModelFile(path)


def test_codes_of_8_bits_are_checked_one_by_one(trained: Path, tmp_path: Path) -> None:
    model = trained / "merged"
    config = transformers.AutoConfig.from_pretrained(model)
    convert(model, tmp_path, "int8")
    path = tmp_path / "model.bin"
    whole = path.read_bytes()
    assert check_file(ModelFile(path), model, config, "float32")["compressed"] == 26
    name = "encoder/layer_0/ffn/linear_1/weight"
    _spoil(path, name, lambda data: bytes([data[0] + 1 & 255]) + data[1:])
    with pytest.raises(ExportError, match=f"{name} is off by more than half a step, in row 0"):
        check_file(ModelFile(path), model, config, "float32")
    path.write_bytes(whole)
    _spoil(path, f"{name}_scale", lambda data: data[:8] + struct.pack("<f", 1.0) + data[12:])
    with pytest.raises(ExportError, match=f"{name}_scale is not 127 over the largest value, in row 2"):
        check_file(ModelFile(path), model, config, "float32")


def test_an_engine_that_says_something_else_is_found(trained: Path, tmp_path: Path) -> None:
    """The file is of another model: with fewer heads in the encoder, or with other words forbidden."""
    model = trained / "merged"
    convert(model, tmp_path, "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lines: list[str] = []
    check_decoding(tmp_path, model, trained / "held_out.jsonl", tokenizer, "float32", lines)
    path = tmp_path / "model.bin"
    whole = path.read_bytes()
    _spoil(path, "encoder/num_heads", lambda data: struct.pack("<H", 2))
    with pytest.raises(ExportError, match="CTranslate2 does not say what the model says"):
        check_decoding(tmp_path, model, trained / "held_out.jsonl", tokenizer, "float32", lines)
    path.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "suppress_ids": [3, 5, 9]}))
    with pytest.raises(ExportError, match=r"CTranslate2 forbids token 9 at step 1 of sound 1"):
        check_decoding(tmp_path, model, trained / "held_out.jsonl", tokenizer, "float32", lines)


def test_what_cannot_be_exported_is_refused_in_a_line(
    base: Path, trained: Path, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match="is a llama, and only Whisper is exported to ctranslate2"):
        export(base, tmp_path / "out")
    with pytest.raises(ExportError, match=r"--type 'q8_0' is not known for ctranslate2 \(allowed: float16, "):
        export(trained, tmp_path / "out", type="q8_0")
    with pytest.raises(ExportError, match="option 'beam' is not known"):
        export(trained, tmp_path / "out", options={"beam": "2"})
    other = make_whisper(tmp_path / "relu", make_tokenizer(), activation_function="relu")
    with pytest.raises(ExportError, match="activation_function 'relu', CTranslate2's Whisper has gelu"):
        export(other, tmp_path / "out")
    large = tmp_path / "large"
    shutil.copytree(trained / "merged", large)
    (large / "merge.json").unlink()
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(large, dtype=torch.bfloat16)
    model.model.encoder.layers[0].fc1.weight.data[0, 0] = 1e38
    model.save_pretrained(large)
    with pytest.raises(ExportError, match="too large for float16: use --type float32"):
        export(large, tmp_path / "out")
    monkeypatch.setattr("ft_export.ctranslate2.convert.find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install ctranslate2"):
        export(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_parameter_of_a_whisper_is_in_the_layout(trained: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(trained / "merged")
    with torch.device("meta"):
        model = transformers.AutoModelForSpeechSeq2Seq.from_config(config)
    named = {part.parameter for parts in variables_of(config).values() for part in parts} - {None}
    assert named == {name for name, _ in model.named_parameters(remove_duplicate=False)}
