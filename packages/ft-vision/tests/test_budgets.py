"""A pixel budget in each image processor's own words, kept by what it makes and saved with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ft_core.config.load import check_config
from ft_core.errors import ConfigError
from ft_core.models import find_model, load_tokenizer
from ft_vision.documents import VisionRenderer
from ft_vision.loading import load_processor, processor_of

SHAPES = ((200, 120), (120, 200), (56, 56), (300, 300), (400, 30))


def processor(folder: Path, **vision: Any) -> Any:
    source = find_model(str(folder))
    config = check_config({"model": str(folder), "task": "vision", "data": "none", "vision": vision})
    return load_processor(source, config, load_tokenizer(source))


def tokens(made: Any, size: tuple[int, int]) -> int:
    return VisionRenderer(made).word(size).count(made.image_token)


@pytest.mark.parametrize(("name", "square"), [("pixtral", 14), ("mistral3", 28)])
def test_the_longer_edge_of_a_pixtral(name: str, square: int, family: Any, tmp_path: Path) -> None:
    """No image has more pixels than the budget, with the patches that its edges are rounded up to."""
    for budget in (28 * 28, 3000, 6272, 56 * 56, 10**9):
        made = processor(family(name), max_pixels=budget)
        for shape in SHAPES:
            pixels = made.image_processor([Image.new("RGB", shape)], patch_size=square, return_tensors="pt")
            height, width = pixels["image_sizes"][0]
            assert height * width <= min(budget, 112 * 112)
            assert tokens(made, shape) * square**2 == height * width
    # 3000 would let an edge of 54 through: three patches of 14, one of 28.
    size = dict(processor(family(name), max_pixels=3000).image_processor.size)
    assert size["longest_edge"] == (54 // square) * square
    assert dict(made.image_processor.size)["longest_edge"] == 112  # never more than the model's own
    small = processor(family(name), max_pixels=56 * 56)
    small.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((family(name) / "config.json").read_text())
    source = find_model(str(family(name)))
    again = processor_of(type(source)(str(tmp_path), tmp_path, str(tmp_path)), load_tokenizer(source))
    assert [tokens(again, shape) for shape in SHAPES] == [tokens(small, shape) for shape in SHAPES]
    assert tokens(again, (300, 300)) == (56 // square) ** 2
    with pytest.raises(ConfigError, match=rf"^vision.max_pixels: 100 is less .* {square} x {square} = {square**2}"):
        processor(family(name), max_pixels=100)
    with pytest.raises(ConfigError, match=r"^vision.min_pixels: .* no smallest size"):
        processor(family(name), min_pixels=100)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_the_tiles_of_a_smolvlm(name: str, family: Any, tmp_path: Path) -> None:
    """As many tiles, squared, as the budget holds, beside the one of the whole image; one tile stands alone."""
    for budget, most in ((56 * 56, 1), (112 * 112 - 1, 1), (112 * 112, 5), (10**9, 5)):
        made = processor(family(name), max_pixels=budget)
        for shape in SHAPES:
            pixels = made.image_processor([Image.new("RGB", shape)], return_tensors="pt")["pixel_values"]
            assert pixels.shape[1] <= most
            assert tokens(made, shape) == 4 * pixels.shape[1]
        assert tokens(made, (300, 300)) == 4 * most
        made.save_pretrained(tmp_path)
        source = find_model(str(family(name)))
        (tmp_path / "config.json").write_text((family(name) / "config.json").read_text())
        again = processor_of(type(source)(str(tmp_path), tmp_path, str(tmp_path)), load_tokenizer(source))
        assert tokens(again, (300, 300)) == 4 * most
    with pytest.raises(ConfigError, match=r"^vision.max_pixels: 3135 is less .* 56 x 56 = 3136; give at least that$"):
        processor(family(name), max_pixels=56 * 56 - 1)
    with pytest.raises(ConfigError, match=r"^vision.min_pixels: "):
        processor(family(name), min_pixels=1)


@pytest.mark.parametrize(
    ("name", "why"),
    [("llava", "every image at the same size"), ("gemma3", "the same size"), ("llava_next", "image_grid_pinpoints")],
)
@pytest.mark.parametrize("key", ["max_pixels", "min_pixels"])
def test_a_family_without_a_choice(name: str, why: str, key: str, family: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^vision.{key}: .*{why}.*; remove the key$"):
        processor(family(name), **{key: 10000})


def test_images_that_are_not_split_have_one_size(family: Any, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(family("smolvlm"), folder)
    images = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**images, "do_image_splitting": False}))
    assert tokens(processor(folder), (300, 300)) == 4
    with pytest.raises(ConfigError, match=r"^vision.max_pixels: .*at the same size"):
        processor(folder, max_pixels=56 * 56)


@pytest.mark.parametrize(("name", "bounded"), [("smolvlm", True), ("mistral3", True), ("llava_next", False)])
def test_what_to_do_about_rows_that_are_too_long(name: str, bounded: bool, configure: Any, ft: Any) -> None:
    made = ft("train", configure(name, max_length=14))
    assert made.code == 2
    said = made.out + made.err
    assert "16 train rows with images are longer than max_length 14 and left out: raise max_length" in said
    assert ("lower vision.max_pixels" in said) == bounded
