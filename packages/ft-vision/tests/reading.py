"""What models learn to read from: digits written by hand, numbers set in several typefaces; and models to learn it.

The models are small, of transformers' own configuration classes, with random weights: they have seen no image yet.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from importlib.metadata import files
from pathlib import Path
from typing import Any

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
GEMMA = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FONTS = {
    "font-roboto": ("Roboto-Regular.ttf", "Roboto-Bold.ttf"),
    "font-caladea": ("Caladea-Regular.ttf", "Caladea-Bold.ttf"),
    "font-source-serif-pro": ("SourceSerifPro-Regular.ttf",),
    "font-hanken-grotesk": ("HankenGrotesk-Medium.otf",),
}
"""Typefaces by the packages that bring them."""

PATCH = 8


def tokenizer(more: list[str], extra: dict[str, str], image: str) -> Any:
    """A token for each byte, save the words of the template and of the question."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        ["user\nRead.\n", "assistant\n"],
        trainers.BpeTrainer(
            vocab_size=320,
            min_frequency=1,
            special_tokens=SPECIAL + more,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        extra_special_tokens=extra,
    )
    made.chat_template = TEMPLATE.replace("IMAGE", image)
    return made


def make_qwen3_vl(folder: Path, *, width: int = 64, layers: int = 2, **_: Any) -> None:
    import transformers as t

    words = tokenizer(QWEN, {"image_token": QWEN[2]}, "<|vision_start|><|image_pad|><|vision_end|>")
    start, end, image, video = words.convert_tokens_to_ids(QWEN)
    text = _text(words, width, layers)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    vision = {
        "depth": layers,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_heads": 4,
        "patch_size": PATCH,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
        "initializer_range": width**-0.5,
    }
    config = t.Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    t.Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    sizes = {"shortest_edge": 16 * 16, "longest_edge": 128 * 128}
    t.Qwen2VLImageProcessorPil(patch_size=PATCH, size=sizes).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))


def make_gemma3(folder: Path, *, width: int = 64, layers: int = 2, side: int = 32, tokens: int = 16) -> None:
    import torch
    import transformers as t

    names = ("boi_token", "eoi_token", "image_token")
    words = tokenizer(GEMMA, dict(zip(names, GEMMA, strict=True)), GEMMA[0])
    boi, eoi, image = words.convert_tokens_to_ids(GEMMA)
    text = _text(words, width, layers)
    text |= {
        "sliding_window": 64,
        "query_pre_attn_scalar": text["head_dim"],
        "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
    }
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": side,
        "patch_size": PATCH,
    }
    config = t.Gemma3Config(
        text_config=text,
        vision_config=tower,
        mm_tokens_per_image=tokens,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=image,
        initializer_range=width**-0.5,
    )
    model = t.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # it begins as zeros, through which no image is seen
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=width**-0.5)
    model.save_pretrained(folder)
    images = t.Gemma3ImageProcessorPil(size={"height": side, "width": side})
    processor = t.Gemma3Processor(images, words, chat_template=words.chat_template, image_seq_length=tokens)
    processor.save_pretrained(folder)


def _text(words: Any, width: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": width**-0.5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


MODELS: dict[str, Callable[..., None]] = {"qwen3_vl": make_qwen3_vl, "gemma3": make_gemma3}


def row(image: str, answer: str) -> dict[str, Any]:
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "Read."}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def handwritten(folder: Path, *, side: int = 32, held_out: int = 297, digits: Sequence[int] = range(10)) -> None:
    """scikit-learn's digits, 8 x 8 pixels made larger: ``train.jsonl`` and ``held_out.jsonl``, no image in both."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    (folder / "images").mkdir()
    rows = []
    for number, (pixels, digit) in enumerate(zip(found.images, found.target, strict=True)):
        if digit in digits:
            name = f"images/{number}.png"
            image = Image.fromarray((255 - pixels * (255 / 16)).astype(np.uint8))
            image.resize((side, side), Image.Resampling.BICUBIC).save(folder / name)
            rows.append(row(name, str(digit)))
    random.Random(0).shuffle(rows)
    write(folder / "held_out.jsonl", rows[:held_out])
    write(folder / "train.jsonl", rows[held_out:])


def fonts() -> list[Path]:
    """The typefaces' files."""
    wanted = [(package, name) for package, names in FONTS.items() for name in names]
    return [Path(next(file for file in files(package) or () if file.name == name).locate()) for package, name in wanted]


def rendered(folder: Path, *, size: tuple[int, int], copies: int, held_out: int = 100, digits: int = 3) -> None:
    """Numbers of so many digits in several typefaces, turned, and under noise: ``train.jsonl`` and ``held_out.jsonl``.

    There are ``copies`` images of each number, save of those that are held out: they are in no training image, whatever
    the typeface.
    """
    chance = random.Random(0)
    (folder / "images").mkdir()
    faces = fonts()
    numbers = [f"{number:0{digits}}" for number in range(10**digits)]
    chance.shuffle(numbers)
    for name, part in (("held_out", numbers[:held_out]), ("train", numbers[held_out:] * copies)):
        rows = []
        for number, text in enumerate(part):
            path = f"images/{name}-{number}.png"
            draw(text, chance.choice(faces), size, chance).save(folder / path)
            rows.append(row(path, text))
        chance.shuffle(rows)
        write(folder / f"{name}.jsonl", rows)


def draw(text: str, face: Path, size: tuple[int, int], chance: random.Random) -> Any:
    """Text of 20 to 24 pixels' height, dark on light, turned by up to 8 degrees, with noise on every pixel."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    width, height = size
    font = ImageFont.truetype(face, chance.randint(20, 24))
    paper, ink = chance.randrange(190, 256), chance.randrange(0, 90)
    image = Image.new("L", size, paper)
    place = (width / 2 + chance.uniform(-2, 2), height / 2 + chance.uniform(-2, 2))
    ImageDraw.Draw(image).text(place, text, fill=ink, font=font, anchor="mm")
    image = image.rotate(chance.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=paper)
    noise = np.random.default_rng(chance.randrange(2**32)).normal(0, 12, (height, width))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
