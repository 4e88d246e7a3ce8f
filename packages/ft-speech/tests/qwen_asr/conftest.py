"""A tiny Qwen3-ASR made on the spot, tones to train it on, and `ft` called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
import yaml

TEMPLATE = (
    "<|im_start|>system\n{% for m in messages if m['role'] == 'system' %}{% for p in m['content'] %}{{ p['text'] }}"
    "{% endfor %}{% endfor %}<|im_end|>\n{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
    "{% for p in m['content'] %}{% if p['type'] == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>{% else %}"
    "{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of the form that the model's card shows."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"]
WORDS = ("low", "high", "quick beats", "noise")
"""What the sounds of :func:`sound` are called."""


class Outcome(NamedTuple):
    """What a call of `ft` gave."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line that says what is wrong: the last on stderr, after progress."""
        return self.err.rstrip("\n").rpartition("\n")[2]


def sound(kind: int, seed: int, seconds: float = 0.6) -> np.ndarray[Any, Any]:
    """One of four sounds at 16 kHz, its pitch, loudness and beginning drawn: a low tone, a high one, beats, noise."""
    chance = np.random.default_rng([kind, seed])
    time = np.arange(round(seconds * 16_000)) / 16_000
    tone = np.sin(2 * np.pi * (3_000, 300)[kind == 0] * chance.uniform(0.9, 1.1) * time + chance.uniform(0, 6))
    if kind == 2:
        tone *= np.sin(2 * np.pi * 12 * time) > 0
    if kind == 3:
        tone = chance.normal(0, 0.7, len(time))
    return (tone * chance.uniform(0.2, 0.4)).clip(-1, 1).astype(np.float32)


def make_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["system user assistant\n", "language English", *WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        extra_special_tokens={"audio_bos_token": SPECIAL[3], "audio_eos_token": SPECIAL[4], "audio_token": SPECIAL[5]},
    )
    tokenizer.add_tokens([AddedToken("<asr_text>", special=False, normalized=False)])
    return tokenizer


def make_model(tokenizer: Any, *, tied: bool = False, **text: Any) -> Any:
    """Random weights, larger than a fresh model's: those let so little of a sound through that nothing hangs on it."""
    import torch
    from transformers import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen3ASRConfig(
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 16,
            "output_dim": 32,
            "downsample_hidden_size": 8,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
            **text,
        },
        audio_token_id=tokenizer.convert_tokens_to_ids(SPECIAL[5]),
        eos_token_id=[0, 2],
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    model = Qwen3ASRForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return model


def make_processor(tokenizer: Any) -> Any:
    from transformers import Qwen3ASRFeatureExtractor, Qwen3ASRProcessor

    return Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(feature_size=16), tokenizer, chat_template=TEMPLATE)


class Parts(NamedTuple):
    """What makes a tiny model, for tests that change it."""

    make_tokenizer: Callable[[], Any]
    make_model: Callable[..., Any]
    make_processor: Callable[[Any], Any]
    sound: Callable[..., Any]


@pytest.fixture(scope="session")
def parts() -> Parts:
    """What makes a tiny model."""
    return Parts(make_tokenizer, make_model, make_processor, sound)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model; not to be changed."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(path)
    make_processor(tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def sounds(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`sounds(count, kinds=(0, 1), seconds=(0.6,))`: rows that name the sounds of files in `sounds/`."""

    def make(count: int, kinds: Sequence[int] = (0, 1), seconds: Sequence[float] = (0.6,)) -> list[dict[str, Any]]:
        (tmp_path / "sounds").mkdir(exist_ok=True)
        rows = []
        for number in range(count):
            kind = kinds[number % len(kinds)]
            path = tmp_path / "sounds" / f"{number}.wav"
            soundfile.write(path, sound(kind, number, seconds[number % len(seconds)]), 16_000)
            rows.append({"audio": f"sounds/{number}.wav", "text": WORDS[kind], "language": "en"})
        return rows

    return make


@pytest.fixture
def configure(tmp_path: Path, folder: Path, sounds: Any) -> Callable[..., Path]:
    """Writes `config.yaml`, a short LoRA run on rows in `rows.jsonl` (sounds, unless they are given)."""

    def write(*, rows: list[Any] | None = None, training: dict[str, Any] | None = None, **changes: Any) -> Path:
        data = tmp_path / "rows.jsonl"
        lines = sounds(12) if rows is None else rows
        data.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        values: dict[str, Any] = {
            "model": str(folder),
            "data": str(data),
            "max_length": 128,
            "lora": {"r": 8},
            "output": str(tmp_path / "run"),
            **changes,
        }
        values["training"] = {
            "max_steps": 3,
            "batch_size": 1,
            "gradient_accumulation": 1,
            "learning_rate": 5.0e-3,
            "optimizer": "adamw_torch",
            **(training or {}),
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def ft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Calls the command line in this process."""
    from ft_core.cli import main

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse's way out
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call
