"""What processes images: Pillow, torchvision where it is installed, and what is said where it is not."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ft_core.config.load import check_config
from ft_core.errors import ConfigError, ModelError
from ft_core.models import find_model, load_tokenizer
from ft_vision.documents import VisionRenderer
from ft_vision.loading import image_backend, load_processor

AVAILABLE = "ft_vision.loading._has_torchvision"


def processor_of(folder: Path, backend: str) -> Any:
    source = find_model(str(folder))
    values = {"model": str(folder), "task": "vision", "data": "none", "vision": {"backend": backend}}
    return load_processor(source, check_config(values), load_tokenizer(source))


@pytest.mark.parametrize("there", [False, True])
def test_the_choice_is_transformers_unless_it_is_made(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AVAILABLE, lambda: there)
    assert image_backend("auto") is None
    assert image_backend("pillow") == ("pil" if there else None)  # without it there is nothing else
    if there:
        assert image_backend("torchvision") == "torchvision"
    else:
        with pytest.raises(
            ConfigError, match=r"vision.backend: torchvision is not installed; install .* backend: auto"
        ):
            image_backend("torchvision")


def test_transformers_is_asked_for_what_was_chosen(
    family: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    asked = []
    plain = processor_of(family("qwen3_vl"), "pillow").image_processor
    load = AutoImageProcessor.from_pretrained

    def recorded(path: Any, **options: Any) -> Any:
        if "backend" not in options:
            return load(path, **options)
        asked.append((Path(path), options["backend"]))
        return plain

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", recorded)
    monkeypatch.setattr(AVAILABLE, lambda: True)
    made = [processor_of(family("qwen3_vl"), backend).image_processor for backend in ("pillow", "torchvision")]
    assert processor_of(family("qwen3_vl"), "auto").image_processor is not plain
    assert asked == [(family("qwen3_vl"), "pil"), (family("qwen3_vl"), "torchvision")]
    assert made == [plain, plain]


def test_without_torchvision_a_run_that_asks_for_it_is_refused(
    configure: Callable[..., Path], ft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AVAILABLE, lambda: False)
    made = ft("train", configure(vision={"backend": "torchvision"}))
    assert made.code == 2
    assert "vision.backend: torchvision is not installed" in made.message


def test_a_processor_that_needs_a_library_says_what_to_install(
    family: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoProcessor

    def missing(*args: Any, **options: Any) -> Any:
        raise ImportError(
            "\nGemma3Processor requires the Torchvision library but it was not found in your environment.\n"
        )

    if find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    with pytest.raises(ModelError, match=r"needs a library that is not installed; pip install torchvision$"):
        processor_of(family("gemma3"), "auto")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "gemma3", "llava"])
def test_torchvision_sees_what_pillow_sees(name: str, family: Callable[[str], Path]) -> None:
    """Where torchvision is installed, as on a GPU host."""
    pytest.importorskip("torchvision")
    ways = {backend: processor_of(family(name), backend) for backend in ("auto", "pillow", "torchvision")}
    generator = torch.Generator().manual_seed(0)
    for size in ((56, 56), (100, 40), (200, 120)):
        noise = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(noise.numpy())
        made = {way: one.image_processor([image], return_tensors="pt") for way, one in ways.items()}
        assert torch.equal(made["auto"]["pixel_values"], made["torchvision"]["pixel_values"])
        assert len({VisionRenderer(one).word(size) for one in ways.values()}) == 1
        # Both resize 8-bit pixels to 8-bit pixels: a level of 255 in rounding each, of which 1 / std are one unit.
        unit = 1 / 255 / min(ways["pillow"].image_processor.image_std)
        assert (made["pillow"]["pixel_values"] - made["torchvision"]["pixel_values"]).abs().max() <= 2.01 * unit
