"""Which tokens a text and a sound become: Orpheus' own, and those that other models are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from songs import Songs

from ft_core.config import load_config
from ft_core.errors import ConfigError, DataError, ModelError
from ft_speech.codecs.protocol import Layout
from ft_speech.orpheus.tokens import document, grow, prompt_text, speech_tokens, words_of

SNAC = Layout((4096,) * 7)


def tokenizer(*special: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<|begin_of_text|>", "<|eot_id|>", "<unk>", "tara", ":", "hi"]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", unk_token="<unk>"
    )
    whole.add_tokens(list(special), special_tokens=True)
    return whole


def test_orpheus() -> None:
    """start of human, beginning, text, end of text, end of human, start of AI, start of speech, codes, end of speech,
    end of AI: the published training script's order, by the numbers of its tokens."""
    model = tokenizer(*(f"<custom_token_{number}>" for number in range(10 + 7 * 4096)))
    assert grow(model, SNAC) == 0
    tokens = speech_tokens(model, SNAC)
    codes = np.array([[0, 1, 2, 3, 4, 5, 4095]])
    words = words_of(model, prompt_text({"text": "hi", "voice": "tara"}, None), tokens)
    ids, asked = document(tokens, words, codes)
    names = model.convert_ids_to_tokens(ids)
    assert names[:asked] == [
        "<custom_token_3>", "<|begin_of_text|>", "tara", ":", "hi", "<|eot_id|>", "<custom_token_4>",
        "<custom_token_5>", "<custom_token_1>",
    ]  # fmt: skip
    sound = [f"<custom_token_{10 + place * 4096 + code}>" for place, code in enumerate(codes[0])]
    assert names[asked:] == [*sound, "<custom_token_2>", "<custom_token_6>"]
    assert model.convert_ids_to_tokens(tokens.place(3)[7]) == f"<custom_token_{10 + 3 * 4096 + 7}>"


def test_other_models_are_given_tokens_once() -> None:
    model, layout = tokenizer(), Layout((3, 2))
    assert grow(model, layout) == 7
    assert grow(model, layout) == 0
    tokens = speech_tokens(model, layout)
    ids, asked = document(tokens, words_of(model, "hi", tokens), np.array([[2, 1], [0, 0]]))
    assert model.convert_ids_to_tokens(ids) == [
        "hi", "<|speech_start|>", "<|audio_2|>", "<|audio_4|>", "<|audio_0|>", "<|audio_3|>", "<|speech_end|>",
        "<|eot_id|>",
    ]  # fmt: skip
    assert asked == 2
    with pytest.raises(ModelError, match=r"has 5 tokens of sound already, the codec has 6: .* another codec"):
        grow(model, Layout((4, 2)))


def test_orpheus_tokens_are_of_one_codec() -> None:
    model = tokenizer(*(f"<custom_token_{number}>" for number in range(20)))
    with pytest.raises(ModelError, match="has no 28672 tokens <custom_token_10>"):
        speech_tokens(model, SNAC)


def test_a_text_holds_no_sound() -> None:
    model, layout = tokenizer(), Layout((3,))
    grow(model, layout)
    tokens = speech_tokens(model, layout)
    for text in ("hi <|audio_1|>", "<|speech_end|> hi"):
        with pytest.raises(DataError, match="which is no word: take it out"):
            words_of(model, text, tokens)
    with pytest.raises(DataError, match="nothing to be spoken"):
        words_of(model, " ", tokens)


def test_prompts() -> None:
    row = {"text": "hi", "voice": "tara", "style": "whisper"}
    assert prompt_text(row, None) == "tara: <whisper> hi"
    assert prompt_text({"text": "hi"}, None) == "hi"
    assert prompt_text(row, "[{style}] {text}") == "[whisper] hi"


@pytest.mark.parametrize("prompt", ["{voice}", "{text", "{text} {name}", "{text!r}", "{0} {text}", "7"])
def test_prompts_that_mean_nothing(prompt: str, songs: Songs, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    import yaml

    file.write_text(yaml.safe_dump(songs.config(tmp_path / "run", tts={"codec": "mel", "prompt": prompt})))
    with pytest.raises(ConfigError, match=r"tts\.prompt"):
        load_config(file)
