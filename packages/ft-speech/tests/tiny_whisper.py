"""A tiny Whisper made on the spot, with the parts of a real one: byte-level tokens, languages, tasks, timestamps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

SPECIAL = [
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|translate|>", "<|transcribe|>",
    "<|startoflm|>", "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>",
]  # fmt: skip
TIMES = [f"<|{number * 0.02:.2f}|>" for number in range(1501)]
RATE = 16_000


def tokenizer_file() -> dict[str, Any]:
    """A tokenizer.json of bytes alone and the special tokens, without timestamps."""
    from tokenizers import pre_tokenizers

    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(vocab) + number, "content": word, **flags, "special": True} for number, word in enumerate(SPECIAL)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "vocab": vocab, "merges": [],
        },
    }  # fmt: skip


def make_whisper(folder: Path, *, seconds: int = 2, width: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """A random Whisper that hears so many seconds at a time, as a model folder of transformers."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    file = tokenizer_file()
    first = len(file["model"]["vocab"])
    ids = {word: first + number for number, word in enumerate(SPECIAL)}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    times = [{"id": first + len(SPECIAL) + number, "content": word, **plain} for number, word in enumerate(TIMES)]
    size = first + len(SPECIAL) + len(TIMES)
    torch.manual_seed(seed)
    ending = ids["<|endoftext|>"]
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=size, d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width,
            max_source_positions=50 * seconds, max_target_positions=64, num_mel_bins=80, bos_token_id=ending,
            eos_token_id=ending, pad_token_id=ending, decoder_start_token_id=ids["<|startoftranscript|>"],
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(
        bos_token_id=ending, eos_token_id=ending, pad_token_id=ending, max_length=64, is_multilingual=True,
        decoder_start_token_id=ids["<|startoftranscript|>"], no_timestamps_token_id=ids["<|notimestamps|>"],
        lang_to_id={word: ids[word] for word in SPECIAL[2:5]}, return_timestamps=False,
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}, max_initial_timestamp_index=50,
        prev_sot_token_id=ids["<|startofprev|>"],
    )  # fmt: skip
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80, chunk_length=seconds).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({**file, "added_tokens": [*file["added_tokens"], *times]}))
    settings = {
        "tokenizer_class": "WhisperTokenizer", "processor_class": "WhisperProcessor", "add_prefix_space": False,
        "additional_special_tokens": SPECIAL[1:], "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


WORDS = {"low": (220, 330), "high": (1760, 880), "up": (300, 1200), "down": (1200, 300)}
"""Words of two tones, in Hz."""


def spoken(path: Path, words: list[str], seed: int = 0) -> Path:
    """Tones for words, 0.4 s each, of a loudness, pitch and noise that the seed draws."""
    chance = np.random.default_rng(seed)
    pieces = []
    for word in words:
        shift = chance.uniform(0.95, 1.05)
        for frequency in WORDS[word]:
            time = np.arange(int(0.2 * RATE)) / RATE
            pieces.append(chance.uniform(0.2, 0.6) * np.sin(2 * np.pi * shift * frequency * time))
    samples = np.concatenate(pieces)
    soundfile.write(path, samples + 0.01 * chance.standard_normal(len(samples)), RATE)
    return path
