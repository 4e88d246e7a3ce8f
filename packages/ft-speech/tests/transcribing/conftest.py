"""A tiny Whisper that says what it is told to say, whatever it hears: what is made of it is then known."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent))

RATE = 16_000


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def ft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Calls the command line in this process."""
    from ft_core.cli import main

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper that hears two seconds; not to be changed."""
    import torch
    from tiny_whisper import make_whisper
    from transformers import WhisperForConditionalGeneration

    folder = make_whisper(tmp_path_factory.mktemp("models") / "tiny", width=128)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():  # its end is its padding too, of which random models have a row of zeros and never write it
        model.get_input_embeddings().weight[model.config.eos_token_id].normal_(0, 0.02)
    model.save_pretrained(folder)
    return folder


def script(model: Any, tokens: Sequence[int], first: int = 0) -> None:
    """Have a Whisper write these tokens from its position ``first`` on, and no others.

    Attention and feed-forward add nothing; every position's embedding is that of the token to come, many times over.
    """
    import torch

    decoder = model.get_decoder()
    with torch.no_grad():
        for layer in decoder.layers:
            for last in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
                last.weight.zero_()
                last.bias.zero_()
        for place, token in enumerate(tokens, first):
            decoder.embed_positions.weight[place] = 30 * decoder.embed_tokens.weight[token]
        decoder.layer_norm.weight.fill_(20)  # so sure that no window is heard again


class Parrot:
    """The tiny model with a script."""

    def __init__(self, folder: Path) -> None:
        from ft_speech.listening.recogniser import open_recogniser

        self.recogniser: Any = open_recogniser(str(folder))
        self.tokenizer = self.recogniser.tokenizer

    def ids(self, said: str) -> list[int]:
        """Tokens of a text in which ``<|1.20|>`` and its like are tokens too."""
        return self.tokenizer(said, add_special_tokens=False)["input_ids"]

    def says(self, said: str, *, timed: bool = False, language: str = "de") -> Any:
        """Have it find this language, and write this text at once after what it is given without a prompt."""
        known = self.recogniser.vocabulary
        script(self.recogniser._plain, [known.languages[language]], 0)
        script(self.recogniser._plain, [*self.ids(said), known.end], 2 if timed else 3)
        return self.recogniser

    def script(self, model: Any, said: str, first: int) -> None:
        """Have another model of these tokens write a text from a position on."""
        script(model, [*self.ids(said), self.recogniser.vocabulary.end], first)

    def save(self, folder: Path) -> Path:
        import shutil

        shutil.copytree(self.recogniser.name, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        self.recogniser.model.save_pretrained(folder)
        return folder


@pytest.fixture
def parrot(tiny: Path) -> Parrot:
    return Parrot(tiny)


@pytest.fixture
def noise() -> Callable[..., np.ndarray]:
    """``noise(seconds)``: samples that are not silent."""

    def make(seconds: float, seed: int = 0) -> np.ndarray:
        return (np.random.default_rng(seed).standard_normal(round(seconds * RATE)) / 20).astype(np.float32)

    return make


@pytest.fixture
def recordings(tmp_path: Path, noise: Callable[..., np.ndarray]) -> Path:
    """A folder with two recordings, a damaged one, an empty one, and a file that is none."""
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    soundfile.write(folder / "a.wav", noise(1.0), RATE)
    soundfile.write(folder / "more" / "b.flac", noise(5.0), 44_100)
    (folder / "damaged.wav").write_text("no audio")
    (folder / "empty.mp3").touch()
    (folder / "notes.txt").write_text("not to be heard")
    return folder
