"""Processors: what their files say wins, and what is wrong with them is one line before anything is trained."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ft_core.errors import ModelError
from ft_core.models import find_model, load_tokenizer
from ft_vision.documents import VisionRenderer
from ft_vision.families.processors import image_options
from ft_vision.loading import processor_of

FAMILIES = ("qwen3_vl", "gemma3", "llava", "llava_next", "smolvlm", "idefics3", "pixtral", "mistral3")


def copied(folder: Path, to: Path, name: str, **changes: Any) -> Path:
    """A model's folder with other values in one of its files; None takes a value out."""
    shutil.copytree(folder, to)
    values = json.loads((to / name).read_text()) | changes
    (to / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return to


def processor(folder: Path) -> Any:
    source = find_model(str(folder))
    return processor_of(source, load_tokenizer(source))


@pytest.mark.parametrize("name", FAMILIES)
def test_words_are_found_cheaply(name: str, family: Any) -> None:
    """Without the arithmetic on pixels they are what the processor itself writes, for images of all shapes."""
    made = processor(family(name))
    renderer, chance = VisionRenderer(made), random.Random(0)
    sizes = [(chance.randrange(20, 260), chance.randrange(20, 260)) for _ in range(12)]
    for size in (*sizes, (400, 30), (30, 400)):
        own = made(text=[made.image_token], images=[[Image.new("RGB", size)]], add_special_tokens=False)["input_ids"]
        assert made.tokenizer(renderer.word(size), add_special_tokens=False)["input_ids"] == list(own[0])


def test_what_processors_tell_their_image_processors(family: Any) -> None:
    assert image_options(processor(family("mistral3")))["patch_size"] == 28
    assert image_options(processor(family("pixtral")))["patch_size"] == 14
    assert image_options(processor(family("smolvlm"))) == {"return_row_col_info": True}
    assert image_options(processor(family("llava_next"))) == {"do_pad": True}


def test_their_word_wins_over_the_image_processors_own(family: Any, tmp_path: Path) -> None:
    """LLaVA-NeXT's pads whatever the image processor's file says, as transformers' own does."""
    folder = copied(family("llava_next"), tmp_path / "m", "preprocessor_config.json", do_pad=False)
    made = processor(folder)
    images = [Image.new("RGB", size) for size in ((56, 56), (112, 112))]
    own = made(images=images, return_tensors="pt")["pixel_values"]
    ours = made.image_processor(images, return_tensors="pt", **image_options(made))["pixel_values"]
    assert own.shape == ours.shape == (2, 5, 3, 56, 56)


def test_the_class_that_the_files_name(family: Any, tmp_path: Path) -> None:
    """The first SmolVLM are Idefics 3 by their files."""
    folder = copied(family("smolvlm"), tmp_path / "m", "processor_config.json", processor_class="Idefics3Processor")
    made = processor(folder)
    assert type(made).__name__ == "Idefics3Processor"
    size = (120, 200)
    assert VisionRenderer(made).word(size) == VisionRenderer(processor(family("smolvlm"))).word(size)


@pytest.mark.parametrize("numbers", [None, str], ids=["without num2words", "with it"])
def test_a_smolvlm_keeps_what_it_is_saved_with(
    numbers: Any, family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", numbers)
    made = processor(family("smolvlm"))
    made.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert (saved["processor_class"], saved["image_seq_len"]) == ("SmolVLMProcessor", 4)
    asked = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert made.apply_chat_template(asked).count("User: a") == 1


def test_a_value_that_the_files_lack(family: Any, tmp_path: Path) -> None:
    folder = copied(family("llava_next"), tmp_path / "m", "processor_config.json", patch_size=None)
    with pytest.raises(ModelError, match=r"cannot write an image as tokens: .*patch_size\?\)$") as raised:
        processor(folder)
    assert "\n" not in str(raised.value)


def test_files_of_two_models(family: Any, tmp_path: Path) -> None:
    folder = copied(family("pixtral"), tmp_path / "m", "config.json", image_token_index=9, image_token_id=9)
    with pytest.raises(ModelError, match=r"writes images without the token 9, .*not of one model$"):
        processor(folder)


def test_other_counts_than_the_tower_makes(family: Any, configure: Any, ft: Any, tmp_path: Path) -> None:
    folder = copied(family("smolvlm"), tmp_path / "m", "processor_config.json", image_seq_len=5)
    made = ft("train", configure("smolvlm", model=str(folder)))
    assert made.code == 2
    assert "writes 5 tokens for an image of which its model makes another number" in made.message
