"""Documents and batches with images against what transformers' own processors and models make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ft_core.config.load import check_config
from ft_core.data import FORMATS, Collator
from ft_core.errors import ConfigError, DataError
from ft_core.models import find_model, load_tokenizer
from ft_vision.collating import INPUTS, UnusableImage, VisionCollator, collator_for, packs
from ft_vision.documents import COUNTS, IMAGES, VisionRenderer, image_token_of, images_of, tokenize
from ft_vision.images import ImageError, image_size, read_image
from ft_vision.loading import load_processor
from ft_vision.rows import normalise

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "gemma3", "llava", "idefics3", "llava_next", "mistral3", "pixtral", "smolvlm")
SIZES = ((56, 56), (100, 40), (33, 90), (200, 120))


@dataclass
class Made:
    """A tiny model with documents for it."""

    model: Any
    processor: Any
    features: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    collate: Callable[..., VisionCollator]


def talk(*turns: Any) -> dict[str, Any]:
    """Turns of user and assistant by turns; an image is a path, or an image itself."""
    messages = []
    for number, turn in enumerate(turns):
        parts = [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": str(p)} for p in turn
        ]
        messages.append({"role": "assistant" if number % 2 else "user", "content": parts})
    return {"messages": messages}


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As some families' templates ask for it, which read no string."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
        for m in messages
    ]


@pytest.fixture
def make(family: Any, tmp_path: Path) -> Callable[..., Made]:
    """`make(name, rows)`: a tiny model, its processor and the documents of these rows; images lie in `tmp_path`."""

    def made(name: str, rows: list[dict[str, Any]], **options: Any) -> Made:
        from transformers import AutoModelForImageTextToText

        config = check_config({"model": str(family(name)), "task": "vision", "data": "none"})
        source = find_model(str(family(name)))
        processor = load_processor(source, config, load_tokenizer(source))
        model = AutoModelForImageTextToText.from_pretrained(source.path).eval()
        normal = [normalise(row, FORMATS["messages"], tmp_path) for row in rows]
        renderer = VisionRenderer(processor)
        tokens, bad = tokenize(normal, renderer, max_length=512, **options)
        assert not bad
        taken = images_of(tokens, normal, renderer, image_token_of(model.config))
        features = [{**tokens[i], IMAGES: images, COUNTS: [len(images)]} for i, images in enumerate(taken)]

        def collate(**more: Any) -> VisionCollator:
            return collator_for(model, processor, Collator(2, **more), name)

        return Made(model, processor, features, normal, collate)

    return made


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Images of noise, of several sizes."""
    paths = []
    for number, size in enumerate(SIZES):
        noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
        paths.append(tmp_path / f"noise-{number}.png")
        Image.fromarray(noise.to(torch.uint8).numpy()).save(paths[-1])
    return paths


@pytest.fixture
def talks(pictures: list[Path]) -> list[dict[str, Any]]:
    a, b, c, d = pictures
    return [
        talk((a, "which digit?"), ("1",)),
        talk((b, " and ", c, "\n\nwhich digit?\n"), ("2",), ("which digit? ", d), ("3 4",)),
        talk(("no image",), ("5",)),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_pixels_are_those_of_transformers(
    name: str, make: Any, talks: list[dict[str, Any]], pictures: list[Path]
) -> None:
    made = make(name, talks)
    # The second conversation has three images in two turns.
    own = made.processor(
        text=[made.processor.apply_chat_template(in_parts(made.rows[1]["messages"]), tokenize=False)],
        images=[[Image.open(path) for path in pictures[1:]]],
        return_tensors="pt",
        add_special_tokens=False,
    )
    batch = made.collate(padding_free=False)([made.features[1]])
    assert batch["input_ids"].tolist() == own["input_ids"].tolist()
    assert made.features[1][COUNTS] == [3]
    for key in (*INPUTS, "mm_token_type_ids", "token_type_ids"):
        if key in own and (key in batch or key != "mm_token_type_ids"):
            assert torch.equal(batch[key], own[key]), key
    assert "pixel_values" in batch
    assert set(batch) - {"labels"} == set(own)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_answers_are_trained(name: str, make: Any, talks: list[dict[str, Any]]) -> None:
    made = make(name, talks)
    learnt = [
        made.processor.tokenizer.decode([token for token in feature["labels"] if token != -100])
        for feature in made.features
    ]
    end = made.processor.tokenizer.eos_token
    space = " " if name in ("idefics3", "llava_next", "smolvlm") else ""  # which their templates write before an answer
    expected = [["1"], ["2", "3 4"], ["5"]]
    assert learnt == ["".join(f"{space}{answer}{end}" for answer in answers) for answers in expected]
    token = image_token_of(made.model.config)
    assert all(token not in feature["labels"] for feature in made.features)


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    batch = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_what_stands_for_images_is_never_trained(name: str, make: Any, talks: list[dict[str, Any]]) -> None:
    """Where all is trained, too: neither an image's pieces, nor what a processor writes around and between them."""
    whole, answers = (make(name, talks, train_on=which) for which in ("all", "answers"))
    for one, other, row in zip(whole.features, answers.features, whole.rows, strict=True):
        assert one["input_ids"] == other["input_ids"]
        encode = whole.processor.tokenizer
        renderer = VisionRenderer(whole.processor)
        words = [renderer.word(image_size(image)) for image in row["images"]]
        shown = sum(len(encode(word, add_special_tokens=False)["input_ids"]) for word in words)
        left_out = [i for i, label in enumerate(one["labels"]) if label == -100]
        # Where a line break of the text and one of the image are one token, it is either's.
        assert 1 + shown - 2 * len(words) <= len(left_out) <= 1 + shown + 2 * len(words)
        assert name == "gemma3" or len(left_out) == 1 + shown
        token = image_token_of(whole.model.config)
        assert {i for i, found in enumerate(one["input_ids"]) if found == token} <= set(left_out)
        assert all(a == b for a, b in zip(one["labels"], one["input_ids"], strict=True) if a != -100)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_row_is_its_documents(name: str, make: Any, talks: list[dict[str, Any]], pictures: list[Path]) -> None:
    made = make(name, talks)
    apart = packs(made.model, made.processor, name)
    assert apart or name == "gemma3"  # whose documents some versions of transformers mix up
    packed = logits(made.model, made.collate()(made.features))[0]
    alone = [logits(made.model, made.collate(padding_free=False)([f]))[0] for f in made.features]
    largest = max(one.abs().max() for one in alone)
    lengths = [len(f["input_ids"]) for f in made.features]
    if not apart:
        wrong = [(one - part).abs().max() for one, part in zip(alone, packed.split(lengths), strict=True)]
        assert wrong[1] > 1e-2 * largest
        return
    for one, part in zip(alone, packed.split(lengths), strict=True):
        # Sums in another order: measured at most 3e-6 of the largest, in float32 over four layers.
        assert (one - part).abs().max() < 1e-4 * largest
    # Another image in the first document of the row changes nothing of the others, and much of its own.
    other = [{**made.features[0], IMAGES: [str(pictures[0].with_name("other.png"))]}, *made.features[1:]]
    Image.new("RGB", SIZES[0], "red").save(other[0][IMAGES][0])
    changed = logits(made.model, made.collate()(other))[0]
    assert (changed - packed)[lengths[0] :].abs().max() < 1e-6 * largest
    assert (changed - packed)[: lengths[0]].abs().max() > 1e-2 * largest


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_is_its_documents(name: str, make: Any, talks: list[dict[str, Any]]) -> None:
    made = make(name, talks)
    padded = logits(made.model, made.collate(padding_free=False)(made.features))
    for row, feature in zip(padded, made.features, strict=True):
        alone = logits(made.model, made.collate(padding_free=False)([feature]))[0]
        assert (row[: len(alone)] - alone).abs().max() < 1e-4 * alone.abs().max()


def test_positions_are_counted_for_each_document(make: Any, talks: list[dict[str, Any]]) -> None:
    made = make("qwen3_vl", talks)
    batch = made.collate()(made.features)
    assert batch["position_ids"].shape == (4, 1, batch["input_ids"].shape[1])
    starts = torch.cumsum(torch.tensor([0] + [len(f["input_ids"]) for f in made.features[:-1]]), 0)
    assert (batch["position_ids"][:, 0, starts] == 0).all()
    at = 0
    for feature in made.features:
        own, _ = made.model.model.get_rope_index(
            torch.tensor([feature["input_ids"]]),
            (torch.tensor([feature["input_ids"]]) == made.model.config.image_token_id).long(),
            made.collate().pixels(feature[IMAGES])["image_grid_thw"] if feature[IMAGES] else None,
        )
        assert torch.equal(batch["position_ids"][1:, :, at : at + own.shape[2]], own)
        at += own.shape[2]


def test_a_template_that_forgets_gives_each_turn_its_images(make: Any, pictures: list[Path], family: Any) -> None:
    """Where a template rewrites earlier answers every trained turn is a document of its own, with the images so far."""
    rows = [talk((pictures[0], "one"), ("1",), (pictures[1], "two"), ("2",))]
    made = make("qwen3_vl", rows)
    made.processor.chat_template = made.processor.chat_template.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}(gone)\n{% continue %}{% endif %}",
    )
    renderer = VisionRenderer(made.processor)
    tokens, _ = tokenize(made.rows, renderer, max_length=512)
    token = image_token_of(made.model.config)
    taken = list(images_of(tokens, made.rows, renderer, token))
    assert [len(images) for images in taken] == [1, 2]


def test_what_is_too_long_is_left_out_whole(make: Any, pictures: list[Path]) -> None:
    made = make("qwen3_vl", [talk((pictures[0], "q"), ("1",))])
    rows = [*made.rows, normalise(talk((pictures[3], "q" * 40), ("1",)), FORMATS["messages"], None)]
    tokens, _ = tokenize(rows, VisionRenderer(made.processor), max_length=30)
    assert (len(tokens), tokens.left_out, tokens.dropped, tokens.overlong) == (1, 1, 1, 1)


def test_a_bad_image_is_named_or_skipped(make: Any, pictures: list[Path], tmp_path: Path) -> None:
    made = make("qwen3_vl", [talk((pictures[0], "q"), ("1",))])
    whole = pictures[1].read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (2, 900)).save(tmp_path / "thin.png")
    names = ("gone.png", "cut.png", "empty.png", "thin.png")
    bad = [normalise(talk((tmp_path / n, "q"), ("1",)), FORMATS["messages"], None) for n in names]
    rows = [*made.rows, *bad]
    tokens, lines = tokenize(rows, VisionRenderer(made.processor), max_length=512, on_bad_image="skip")
    assert len(tokens) == 1
    assert [
        name in line and line.startswith(f"row {i}: ")
        for i, (name, line) in enumerate(zip(names, lines, strict=True), 2)
    ]
    assert all(name in line for name, line in zip(names, lines, strict=True))
    for number in (0, 2, 3):
        with pytest.raises(DataError, match=rf"^row 2: .*{names[number]}.*on_bad_image: skip"):
            tokenize([made.rows[0], bad[number]], VisionRenderer(made.processor), max_length=512)
    # From a header a damaged image looks whole; it is named when its batch is made.
    tokens, _ = tokenize(bad[1:2], VisionRenderer(made.processor), max_length=512)
    with pytest.raises(UnusableImage, match=r"cut\.png: is a truncated or damaged png file"):
        made.collate()([{**tokens[0], IMAGES: bad[1]["images"], COUNTS: [1]}])


def test_an_error_in_a_worker_is_one_line(make: Any, pictures: list[Path], tmp_path: Path) -> None:
    made = make("qwen3_vl", [talk((pictures[0], "q"), ("1",))])
    gone = [{**made.features[0], IMAGES: [str(tmp_path / "gone.png")]}]
    loader = torch.utils.data.DataLoader(gone, collate_fn=made.collate(), num_workers=1)
    with pytest.raises(UnusableImage) as raised:
        next(iter(loader))
    assert str(raised.value).startswith(f"{tmp_path}/gone.png: cannot be read")


def test_a_text_that_holds_the_models_own_word_is_refused(make: Any, pictures: list[Path]) -> None:
    made = make("qwen3_vl", [talk((pictures[0], "q"), ("1",))])
    row = normalise(talk((pictures[0], "<|image_pad|>"), ("1",)), FORMATS["messages"], None)
    with pytest.raises(DataError, match="writes 2 places for 1 image"):
        tokenize([row], VisionRenderer(made.processor), max_length=512)


def test_pixels_have_a_budget(family: Any, pictures: list[Path]) -> None:
    source = find_model(str(family("qwen3_vl")))
    values = {"model": str(family("qwen3_vl")), "task": "vision", "data": "none"}
    sizes = {}
    for budget in (28 * 28, 4 * 28 * 28, None):
        config = check_config({**values, "vision": {"max_pixels": budget}})
        processor = load_processor(source, config, load_tokenizer(source))
        made = processor.image_processor([Image.open(pictures[3])], return_tensors="pt")
        sizes[budget] = int(made["image_grid_thw"].prod()) // 4
    assert sizes[28 * 28] == 1
    assert 1 < sizes[4 * 28 * 28] <= 4 < sizes[None]
    small = check_config({**values, "vision": {"max_pixels": 28 * 28 - 1}})
    with pytest.raises(ConfigError, match="28 x 28 = 784; give at least that"):
        load_processor(source, small, load_tokenizer(source))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_size_is_that_of_the_image_that_is_read(form: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "image"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20), "red").save(path, form, exif=exif)
    assert image_size(str(path)) == read_image(str(path)).size
    assert image_size(path.read_bytes()) == image_size(str(path))


def test_a_size_is_refused_as_the_image_is(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    for wrong in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(ImageError):
            image_size(str(wrong))
    with pytest.raises(ImageError, match="max_pixels"):
        image_size(str(tmp_path / "a.png"), max_pixels=599)
