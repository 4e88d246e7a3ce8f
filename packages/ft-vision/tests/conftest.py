"""Tiny vision-language models made on the spot, drawn digits to train them on, and `ft` called in this process."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from more_families import MORE

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
GEMMA = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
FAMILIES = ("qwen3_vl", "qwen2_5_vl", "gemma3", "llava")


class Outcome(NamedTuple):
    """What a call of `ft` gave."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line that says what is wrong: the last on stderr, after progress."""
        return self.err.rstrip("\n").rpartition("\n")[2]


def draw_digit(folder: Path, number: int, *, seed: int = 0, size: tuple[int, int] = (56, 56)) -> Path:
    """A picture of a digit: large, in some shade, at a place that the seed draws."""
    from PIL import Image, ImageDraw, ImageFont

    chance = random.Random(f"{number}:{seed}:{size}")
    image = Image.new("RGB", size, (250, 250, 250))
    shade = tuple(chance.randrange(90) for _ in range(3))
    place = (chance.randrange(max(1, size[0] // 3)), chance.randrange(max(1, size[1] // 6)))
    ImageDraw.Draw(image).text(place, str(number), fill=shade, font=ImageFont.load_default(int(min(size) * 0.7)))
    path = folder / f"digit-{number}-{seed}-{size[0]}x{size[1]}.png"
    image.save(path)
    return path


def _rows(folder: Path, count: int, *, digits: int = 4, size: tuple[int, int] = (56, 56)) -> list[dict[str, Any]]:
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        digit = number % digits
        path = draw_digit(folder / "images", digit, seed=number, size=size)
        asked = [{"type": "image", "image": f"images/{path.name}"}, {"type": "text", "text": "which digit?"}]
        answer = [{"type": "text", "text": str(digit)}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    return rows


def _tokenizer(folder: Path, more: list[str], image: str, extra: dict[str, str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL + more,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["user which digit?\n\n", "assistant\n0 1 2 3 4 5 6 7 8 9"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        extra_special_tokens=extra,
    )
    tokenizer.chat_template = CHATML.replace("IMAGE", image)
    return tokenizer


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **more,
    }


def _save(model: Any, folder: Path) -> None:
    """Five times a fresh model's weights: those let so little of an image through that its words drown it. Gemma 3's
    projector begins as zeros and would let nothing through."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5) if weight.any() else weight.normal_(std=0.1)
    model.save_pretrained(folder)


def _make_qwen(folder: Path, name: str) -> None:
    import transformers as t

    tokenizer = _tokenizer(folder, QWEN, "<|vision_start|><|image_pad|><|vision_end|>", {"image_token": QWEN[2]})
    ids = dict(
        zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
            tokenizer.convert_tokens_to_ids(QWEN),
            strict=True,
        )
    )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    text = _text(tokenizer, rope_parameters=rope)
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    if name == "qwen3_vl":
        vision |= {
            "patch_size": 14,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        }
        config = t.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
        model: Any = t.Qwen3VLForConditionalGeneration(config)
    else:
        vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56}
        config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
        model = t.Qwen2_5_VLForConditionalGeneration(config)
    _save(model, folder)
    tokenizer.save_pretrained(folder)
    images = t.Qwen2VLImageProcessorPil(patch_size=14, size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112})
    images.save_pretrained(folder)
    kind = "Qwen3VLProcessor" if name == "qwen3_vl" else "Qwen2_5_VLProcessor"
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind}))


def _make_gemma3(folder: Path) -> None:
    import transformers as t

    extra = {"boi_token": GEMMA[0], "eoi_token": GEMMA[1], "image_token": GEMMA[2]}
    tokenizer = _tokenizer(folder, GEMMA, GEMMA[0], extra)
    boi, eoi, image = tokenizer.convert_tokens_to_ids(GEMMA)
    config = t.Gemma3Config(
        text_config=_text(
            tokenizer, sliding_window=32, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"]
        ),
        vision_config=TOWER,
        mm_tokens_per_image=4,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=image,
    )
    _save(t.Gemma3ForConditionalGeneration(config), folder)
    images = t.Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    t.Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4).save_pretrained(
        folder
    )


def _make_llava(folder: Path) -> None:
    import transformers as t

    tokenizer = _tokenizer(folder, ["<image>"], "<image>", {"image_token": "<image>"})
    config = t.LlavaConfig(
        text_config={**_text(tokenizer), "model_type": "llama"},
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    _save(t.LlavaForConditionalGeneration(config), folder)
    images = t.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    t.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`family(name)`: the folder of a tiny random model of that type; not to be changed."""
    import torch

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            folder.mkdir()
            torch.manual_seed(0)
            if name == "gemma3":
                _make_gemma3(folder)
            elif name == "llava":
                _make_llava(folder)
            elif name in MORE:
                MORE[name](folder, (_tokenizer, _text, _save))
            else:
                _make_qwen(folder, name)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def digits(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`digits(count, digits=4, size=(56, 56))`: rows that ask which digit is drawn; the images lie in `images/`."""

    def make(count: int, **options: Any) -> list[dict[str, Any]]:
        return _rows(tmp_path, count, **options)

    return make


@pytest.fixture
def configure(tmp_path: Path, family: Callable[[str], Path], digits: Any) -> Callable[..., Path]:
    """Writes `config.yaml`, a short LoRA run on rows in `rows.jsonl` (drawn digits, unless they are given)."""

    def write(
        name: str = "qwen3_vl", *, rows: list[Any] | None = None, training: dict[str, Any] | None = None, **changes: Any
    ) -> Path:
        data = tmp_path / "rows.jsonl"
        lines = digits(16) if rows is None else rows
        data.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        values: dict[str, Any] = {
            "model": str(family(name)),
            "task": "vision",
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
