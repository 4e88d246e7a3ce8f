"""A codec fitted to sung words, and a small Llama that has learnt to sing them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from songs import RATE, WORDS, Outcome, Songs, sung


@pytest.fixture(scope="session")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Songs:
    """Not to be changed."""
    import itertools

    from spoken_numbers import llama

    from ft_speech import write_audio
    from ft_speech.codecs.mel import Mel

    folder = tmp_path_factory.mktemp("songs")
    texts = [" ".join(words) for count in (1, 2, 3) for words in itertools.product(WORDS, repeat=count)]
    held = {"two one", "one three two", "three three one"}
    files = {}
    for name in ("train", "held"):
        chosen = [text for text in texts if (text in held) == (name == "held")]
        rows = []
        for text in chosen:
            path = folder / f"{text.replace(' ', '-')}.wav"
            write_audio(path, sung(text), RATE)
            # As many rows of each length, or what is sung is as long as most are.
            again = {1: 9, 2: 3, 3: 1}[len(text.split())] if name == "train" else 1
            rows += [{"text": text, "audio": path.name, "speaker": "ann"}] * again
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    codec = Mel.fit([sung(text) for text in texts], codebooks=(24, 16), stack=5)
    codec.save(folder / "mel")
    names = (":", "ann")
    return Songs(
        folder, files["train"], files["held"], folder / "mel",
        llama(folder / "base", width=64, layers=2, words=names),
        llama(folder / "tied", width=64, layers=2, tied=True, words=names),
    )  # fmt: skip


@pytest.fixture(scope="session")
def singer(songs: Songs) -> Path:
    """A run that has learnt the songs."""
    from ft_core.training import train

    training = {"max_steps": 220, "batch_size": 4, "gradient_accumulation": 1, "learning_rate": 3e-3, "seed": 0}
    return train(songs.config(songs.folder / "singer", training=training), say=lambda line: None).run


@pytest.fixture
def ft(capsysbinary: pytest.CaptureFixture[bytes]) -> Callable[..., Outcome]:
    """Calls the command line in this process."""
    from ft_core.cli import main

    def call(*words: object) -> Outcome:
        capsysbinary.readouterr()
        code = main([str(word) for word in words])
        captured = capsysbinary.readouterr()
        return Outcome(code, captured.out.decode("latin-1"), captured.err.decode())

    return call
