"""Every family, from a tiny random model of transformers' own classes to an answer of what was saved.

What the chain finds of a family is a row of the table in ``docs/vision-models.md``, which is held to it here and
written by this file: ``python packages/ft-vision/tests/test_every_family.py``, with the transformers the page names.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from PIL import Image

from ft_core import fast
from ft_core.config.load import check_config
from ft_core.data import FORMATS, Collator
from ft_core.models import find_model, load_tokenizer
from ft_vision.collating import INPUTS, collator_for, packs
from ft_vision.documents import COUNTS, IMAGES, VisionRenderer, image_token_of, images_of, tokenize
from ft_vision.families.parts import FAMILIES as TYPES
from ft_vision.loading import load_processor
from ft_vision.rows import normalise

FAMILIES = {
    "qwen3_vl": "Qwen3-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "gemma3": "Gemma 3",
    "llava": "LLaVA 1.5",
    "llava_next": "LLaVA-NeXT",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics 3",
    "pixtral": "Pixtral",
    "mistral3": "Mistral 3",
}
PAGE = Path(__file__).parents[3] / "docs" / "vision-models.md"
BEGIN, END = "<!-- the table: begin -->", "<!-- the table: end -->"
HEAD = (
    "family",
    "model type",
    "language layers",
    "processor",
    "ids and pixels",
    "a step",
    "`ft verify`",
    "packed = alone",
    "on transformers' layers",
    "saved, reloaded, answers",
)
DEPENDS = ("processor", "on transformers' layers")
SHARE = 1e-4
"""Of the largest logit, float32, over two layers of a tower and two of a text model: sums in another order."""


class Parts(NamedTuple):
    """A model in float32 with its processor, and documents for it."""

    model: Any
    processor: Any
    rows: list[dict[str, Any]]
    features: list[dict[str, Any]]


def parts_of(folder: Path, pictures: list[Path]) -> Parts:
    """Conversations of one turn and two, with one, two and no image."""
    a, b, c = map(str, pictures)
    given = [
        ([[a, "which digit?"], ["1"]]),
        ([[b, " and ", c, "\n\nwhich?\n"], ["2"], ["which digit?"], ["3 4"]]),
        ([["no image"], ["5"]]),
    ]
    rows = [
        {
            "messages": [
                {
                    "role": "assistant" if number % 2 else "user",
                    "content": [
                        {"type": "image", "image": one} if one.endswith(".png") else {"type": "text", "text": one}
                        for one in turn
                    ],
                }
                for number, turn in enumerate(turns)
            ]
        }
        for turns in given
    ]
    source = find_model(str(folder))
    config = check_config({"model": str(folder), "task": "vision", "data": "none"})
    processor = load_processor(source, config, load_tokenizer(source))
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    normal = [normalise(row, FORMATS["messages"], None) for row in rows]
    renderer = VisionRenderer(processor)
    tokens, _ = tokenize(normal, renderer, max_length=512)
    taken = images_of(tokens, normal, renderer, image_token_of(model.config))
    features = [{**tokens[i], IMAGES: images, COUNTS: [len(images)]} for i, images in enumerate(taken)]
    return Parts(model, processor, normal, features)


def in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As some families' templates ask for it, which read no string."""
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
        for m in messages
    ]


def own_inputs(processor: Any, messages: list[dict[str, Any]], images: list[str], **options: Any) -> Any:
    """What transformers' own processor makes of a conversation."""
    return processor(
        text=[processor.apply_chat_template(in_parts(messages), tokenize=False, **options)],
        images=[[Image.open(path) for path in images]],
        return_tensors="pt",
        add_special_tokens=False,
    )


def transformers_own(processor: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The processor itself, save where ft has one of its own: then transformers', whose module is imported with its
    image processor for Pillow in the place of that for torchvision."""
    if not type(processor).__module__.startswith("ft_vision.families.pixtral"):
        return processor
    folder = "transformers.models.pixtral"
    with monkeypatch.context() as patch:
        pil = importlib.import_module(f"{folder}.image_processing_pil_pixtral")
        patch.setitem(sys.modules, f"{folder}.image_processing_pixtral", pil)
        kind = importlib.import_module(f"{folder}.processing_pixtral").PixtralProcessor
        del sys.modules[f"{folder}.processing_pixtral"]  # or it would be found where it is not to be had
    names = ("patch_size", "spatial_merge_size", "chat_template", "image_token", "image_break_token", "image_end_token")
    settings = {name: getattr(processor, name) for name in names}
    return kind(processor.image_processor, processor.tokenizer, **settings)


def check_pixels(name: str, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> str:
    own_processor = transformers_own(parts.processor, monkeypatch)
    collate = collator_for(parts.model, parts.processor, Collator(2, padding_free=False), name)
    for row, feature in zip(parts.rows[:2], parts.features, strict=False):
        own, batch = own_inputs(own_processor, row["messages"], row["images"]), collate([feature])
        assert batch["input_ids"].tolist() == own["input_ids"].tolist()
        named = [key for key in INPUTS if key in own]
        assert "pixel_values" in named
        assert all(torch.equal(batch[key], own[key]) for key in named)
        assert {key for key in INPUTS if key in batch} == set(named)
    return "to the bit"


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    given = {key: value for key, value in batch.items() if key not in ("labels", "use_cache")}
    with torch.no_grad():
        return model(**given, use_cache=False).logits


def check_packing(name: str, parts: Parts) -> tuple[str, str]:
    """By the fast layers a row is its documents; and whether it is by transformers' own."""
    own = "packed" if packs(parts.model, parts.processor, name) else "padded"
    fast.enable(parts.model)
    free = collator_for(parts.model, parts.processor, Collator(2, lengths=True), name)
    row = logits(parts.model, free(parts.features))[0]
    alone = [logits(parts.model, free([feature]))[0] for feature in parts.features]
    largest = max(one.abs().max() for one in alone)
    for one, part in zip(alone, row.split([len(one) for one in alone]), strict=True):
        assert (one - part).abs().max() < SHARE * largest
    return "yes", own


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def check_saved(folder: Path, run: Path) -> tuple[str, str]:
    """Plain transformers and PEFT answer from what was saved as the run did; by transformers' own processor, where that
    can be made without torchvision."""
    from peft import PeftModel

    plain = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, run / "adapter").eval()
    assert fast.fast_path_of(model) is None
    saved = json.loads((run / "adapter" / "processor_config.json").read_text())
    try:
        processor, kind = transformers.AutoProcessor.from_pretrained(run / "adapter"), "plain"
    except (ImportError, OSError):  # its part for videos is not there
        source = find_model(str(folder))
        config = check_config({"model": str(folder), "task": "vision", "data": "none"})
        source = dataclasses.replace(source, path=run / "adapter")
        (run / "adapter" / "config.json").write_text((folder / "config.json").read_text())
        processor, kind = load_processor(source, config, load_tokenizer(source)), "ft's"
    assert type(processor).__name__ == saved["processor_class"]
    measured = json.loads((run / "evaluation.json").read_text())
    held_out = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert len(measured["samples"]) == len(held_out) > 1
    for sample, row in zip(measured["samples"], held_out, strict=True):
        given = own_inputs(processor, row["messages"][:1], row["images"], add_generation_prompt=True)
        count = given["input_ids"].shape[1]
        with torch.no_grad():
            made = model.generate(**given, do_sample=False, max_new_tokens=64)[0, count:]
        answer = processor.tokenizer.decode(made, skip_special_tokens=True)
        assert made.numel()
        # The run asks for fewer tokens than 64 where answers are short.
        assert answer.startswith(sample["after"])
    return f"{saved['processor_class']}", kind


def chain(
    name: str, parts: Parts, folder: Path, run: Path, ft: Any, config: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """A row of the table: everything in it was found here."""
    pixels = check_pixels(name, parts, monkeypatch)
    packed, own = check_packing(name, parts)
    made = ft("train", config)
    assert made.code == 0, made.err
    said = made.out + made.err
    assert "fast layers: checked against transformers' own on" in said
    assert "tokens with images" in said
    assert len(losses(run)) == 3
    assert all(map(math.isfinite, losses(run)))
    verified = ft("verify", run, "--dtype", "float32", "--batches", "1", "--tokens", "24")
    assert verified.code == 0, verified.err
    assert "the same: no gradient is over" in verified.out
    processor, kind = check_saved(folder, run)
    layer = fast.fast_path_of(parts.model).layout.layer_class
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    where = f"`{processor}`" + ("" if kind == "plain" else ", made by ft without torchvision")
    return [FAMILIES[name], f"`{model_type}`", f"`{layer}`", where, pixels, "yes", "the same", packed, own, "yes"]


def rows_of(page: Path) -> dict[str, list[str]]:
    """The table's rows by their families."""
    inside = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in inside.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert tuple(cells[0]) == HEAD
    return {row[0]: row for row in cells[2:]}


def is_that_of_the_page() -> bool:
    """Whether the page was written where this is run: without torchvision, and by the same transformers."""
    from transformers.utils.import_utils import is_torchvision_available

    minor = ".".join(transformers.__version__.split(".")[:2])
    return f"transformers {minor}," in PAGE.read_text(encoding="utf-8") and not is_torchvision_available()


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Images of noise, of several shapes."""
    made = []
    for number, size in enumerate(((56, 56), (100, 40), (120, 200))):
        noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(number))
        made.append(tmp_path / f"noise-{number}.png")
        Image.fromarray(noise.to(torch.uint8).numpy()).save(made[-1])
    return made


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained in float32 by the fast layers, with the kernels' references in the kernels' places."""
    from ft_core.models import device, loading
    from ft_core.training import run, speed

    pick = device.pick_device
    for module in (run, loading):
        monkeypatch.setattr(module, "pick_device", lambda: dataclasses.replace(pick(), dtype="float32"))
    monkeypatch.setattr(speed, "runs_kernels", lambda device: True)


TRAINED: dict[str, Any] = {
    "eval_split": 2,
    "vision": {"tower": "lora", "projector": "full", "workers": 0},
    "training": {"max_steps": 3, "batch_size": 2, "learning_rate": 1.0e-2},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_way(
    name: str,
    family: Any,
    configure: Any,
    ft: Any,
    pictures: list[Path],
    tmp_path: Path,
    in_float32: None,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    folder = family(name)
    parts, config = parts_of(folder, pictures), configure(name, **TRAINED)
    found = chain(name, parts, folder, tmp_path / "run", ft, config, monkeypatch)
    record_property("row", found)
    if "--writing" not in sys.argv and PAGE.is_file():
        # With other versions another processor may be to be had, and transformers' own masks be right.
        held = range(len(HEAD)) if is_that_of_the_page() else set(range(len(HEAD))) - set(map(HEAD.index, DEPENDS))
        row = rows_of(PAGE)[FAMILIES[name]]
        assert [row[i] for i in held] == [found[i] for i in held]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_way_by_the_kernels(name: str, family: Any, configure: Any, ft: Any, tmp_path: Path) -> None:
    """In 16 bits, on the card, with the kernels themselves."""
    made = ft("train", configure(name, **TRAINED))
    assert made.code == 0, made.err
    assert "fast layers: checked against transformers' own on" in made.out + made.err
    assert "tokens with images" in made.out + made.err
    verified = ft("verify", tmp_path / "run", "--batches", "2", "--tokens", "96")
    assert verified.code == 0, verified.out + verified.err


@pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not beside this package")
def test_the_table_has_every_family() -> None:
    rows = rows_of(PAGE)
    assert list(rows) == list(FAMILIES.values())
    assert {row[1].strip("`") for row in rows.values()} == set(TYPES)


class _Collected:
    """Takes each family's row out of pytest's reports."""

    def __init__(self) -> None:
        self.rows: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        for key, value in report.user_properties if report.when == "call" and report.passed else ():
            if key == "row":
                self.rows[value[0]] = value


def write_table() -> int:
    """Run the chain for all families, and put what it finds into the page; 1 if a family fails."""
    collected = _Collected()
    code = pytest.main([__file__, "-q", "-k", "whole_way", "-p", "no:xdist"], plugins=[collected])
    missing = [title for title in FAMILIES.values() if title not in collected.rows]
    if code or missing:
        print(f"not written: {', '.join(missing)} failed")
        return 1
    rows = [HEAD, ["---"] * len(HEAD), *(collected.rows[title] for title in FAMILIES.values())]
    table = "\n".join(["", *(f"| {' | '.join(row)} |" for row in rows), ""])
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.argv.append("--writing")
    raise SystemExit(write_table())
