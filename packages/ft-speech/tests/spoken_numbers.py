"""Numbers that espeak-ng speaks, a codec fitted to it, and a small Llama with a vocabulary of words."""

from __future__ import annotations

import json
import random
import re
import subprocess
from pathlib import Path
from typing import Any

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEAD = "my number is"


def sentences(count: int, *, seed: int, digits: tuple[int, int] = (2, 4), without: set[str] | None = None) -> list[str]:
    """``my number is three five one``, none of them twice nor among ``without``."""
    chance = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        text = f"{LEAD} {' '.join(chance.choice(DIGITS) for _ in range(chance.randint(*digits)))}"
        if text not in (without or ()):
            made[text] = None
    return list(made)


def say(text: str, path: Path) -> None:
    """espeak-ng's recording of a text, with 40 ms between two words, so that Whisper tells them apart."""
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-g", "4", "-w", str(path), text], check=True, timeout=60)


def corpus(folder: Path, texts: list[str], name: str) -> Path:
    """Recordings of texts, and the file of rows that names them."""
    (folder / name).mkdir(parents=True)
    rows = []
    for number, text in enumerate(texts):
        say(text, folder / name / f"{number}.wav")
        rows.append({"text": text, "audio": f"{name}/{number}.wav"})
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def llama(folder: Path, *, width: int = 256, layers: int = 4, tied: bool = False, words: tuple[str, ...] = ()) -> Path:
    """A Llama of random weights whose tokenizer knows the words of :func:`sentences`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *LEAD.split(), *DIGITS, *words]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(names), hidden_size=width, intermediate_size=int(2.75 * width) // 8 * 8,
        num_hidden_layers=layers, num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 64),
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def fitted(folder: Path, recordings: list[Path], codebooks: tuple[int, ...], stack: int = 4) -> Any:
    """A mel codec of recordings, in ``folder``."""
    from ft_speech.audio import read_audio
    from ft_speech.codecs.mel import Mel

    codec = Mel.fit([read_audio(path)[0] for path in recordings], codebooks=codebooks, stack=stack)
    codec.save(folder)
    return codec


def plain(text: str) -> str:
    """Words alone, each digit of a number as its word: Whisper writes "235" for "two three five"."""
    text = re.sub(r"\d", lambda found: f" {DIGITS[int(found[0])]} ", text.lower())
    return " ".join(re.sub(r"[^a-z]", " ", text).split())
