"""Tiny models of every family, of transformers' own configuration classes, and documents with images for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from ft_core.data.collating import LENGTHS

VOCABULARY, IMAGE, START, END = 99, 90, 91, 92
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
SEEN: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
Document = dict[str, Tensor]


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Family:
    """How a family's models and batches are made.

    Attributes:
        make: a model with random weights.
        see: the pixels of images, and what goes with them, as its processor makes them for one row.
        types: the keyword that says which tokens are an image's, or None.
        tower, projector: what the paths of their parameters have in them.
        three: whether positions are of time, height and width.
        rows: whether images lie in a row of their own for each row of tokens, ``[B, images, ...]``.
        type: the configuration's model type, where it is not the family's name.
        packs_wrongly: whether transformers by itself computes a row of documents other than each alone.
    """

    make: Callable[[], Any]
    see: Callable[[list[Image.Image]], dict[str, Tensor]]
    types: str | None = None
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    three: bool = False
    rows: bool = False
    type: str | None = None
    packs_wrongly: bool = False

    def document(self, model: Any, seed: int, images: int, length: int = 9) -> Document:
        """One row: text, each image between a start and an end, text; labels on the second half of the text."""
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(1, 80, (length,), generator=generator).tolist()
        sizes = ((32, 32), (48, 32))
        pictures = [picture(seed * 10 + i, *sizes[i % 2]) for i in range(images)]
        seen = self.see(pictures) if pictures else {}
        ids, where = words[:2], [0, 0]
        for count in self._counts(model, seen, images):
            ids += [START, *[IMAGE] * count, END]
            where += [0, *[1] * count, 0]
        where += [0] * (length - 2)
        ids += words[2:]
        labels = [-100] * (len(ids) - length + 4) + words[4:]
        made = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), **seen}
        if self.types is not None:
            made[self.types] = torch.tensor([where])
        return made

    def _counts(self, model: Any, seen: dict[str, Tensor], images: int) -> list[int]:
        """How many tokens stand for each image."""
        if not images:
            return []
        with torch.no_grad():
            features = [len(each) for each in model.get_image_features(**seen).pooler_output]
        return features if len(features) == images else [sum(features) // images] * images

    def positions(self, model: Any, document: Document) -> Tensor:
        """``[1, S]``, or with those of time, height and width after them ``[4, 1, S]``."""
        text = torch.arange(document["input_ids"].shape[1])[None]
        if not self.three:
            return text
        assert self.types is not None
        grids = {name: value for name, value in document.items() if name.endswith("grid_thw")}
        three, _ = model.model.get_rope_index(document["input_ids"], document[self.types], **grids)
        return torch.cat([text[None], three])

    def packed(self, model: Any, documents: Sequence[Document]) -> dict[str, Any]:
        """One row of documents."""
        batch: dict[str, Any] = {}
        for name in _names(documents):
            along = -1 if name in ("input_ids", "labels", self.types) else int(self.rows)
            batch[name] = _joined([each[name] for each in documents if name in each], along)
        batch["position_ids"] = torch.cat([self.positions(model, each) for each in documents], -1)
        batch[LENGTHS] = [each["input_ids"].shape[1] for each in documents]
        return batch

    def padded(self, documents: Sequence[Document]) -> dict[str, Any]:
        """A row for each document, padded on the right."""
        batch: dict[str, Any] = {}
        for name in _names(documents):
            fill = -100 if name == "labels" else 0
            batch[name] = _joined([each[name] for each in documents if name in each], 0, fill)
        lengths = torch.tensor([each["input_ids"].shape[1] for each in documents])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch


def _names(documents: Sequence[Document]) -> list[str]:
    return list(dict.fromkeys(name for each in documents for name in each))


def _joined(parts: Sequence[Tensor], along: int, fill: int = 0) -> Tensor:
    """One after the other along a dimension, filled up in the others."""
    along %= parts[0].dim()
    sizes = [max(part.shape[i] for part in parts) for i in range(parts[0].dim())]
    filled = []
    for part in parts:
        more = [(0, 0 if i == along else sizes[i] - part.shape[i]) for i in range(part.dim())]
        filled.append(torch.nn.functional.pad(part, [n for pair in reversed(more) for n in pair], value=fill))
    return torch.cat(filled, along)


def _by(processor: str, rows: bool = False, **settings: Any) -> Callable[[list[Image.Image]], dict[str, Tensor]]:
    """What one of transformers' image processors makes with Pillow alone."""

    def see(images: list[Image.Image]) -> dict[str, Tensor]:
        try:
            made = getattr(transformers, processor)(**settings)(
                images=[images] if rows else images, return_tensors="pt"
            )
        except ImportError:  # transformers 5.17 has some of them with torchvision only
            assert rows
            pixels = [np.asarray(image.resize((32, 32)), np.float32) / 127.5 - 1 for image in images]
            values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)[None]
            made = {"pixel_values": values, "pixel_attention_mask": torch.ones(1, len(images), 32, 32).long()}
        return {name: torch.as_tensor(value) for name, value in made.items() if name != "num_crops"}

    return see


def _qwen(kind: str, vision: dict[str, Any], text: dict[str, Any], rope: dict[str, Any]) -> Callable[[], Any]:
    def build() -> Any:
        seen = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8, "out_hidden_size": 32}
        angles = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **rope}
        config = getattr(transformers, f"{kind}Config")(
            text_config={**TEXT, **text, "rope_parameters": angles},
            vision_config={**seen, **vision},
            image_token_id=IMAGE,
            video_token_id=93,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    return build


def _guest(kind: str, text: dict[str, Any], vision: dict[str, Any], **settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, f"{kind}Config")(
            text_config={**TEXT, **text}, vision_config={**SEEN, **vision}, image_token_id=IMAGE, **settings
        )
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    return build


def _gemma() -> Any:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**TEXT, "head_dim": 8, "sliding_window": 3, "layer_types": layers, "query_pre_attn_scalar": 10}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=SEEN, image_token_id=IMAGE, mm_tokens_per_image=4, boi_token_id=START,
        eoi_token_id=END,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


LLAMA, MISTRAL = {"model_type": "llama"}, {"model_type": "mistral", "head_dim": 8, "sliding_window": 9}
CLIP, PIXTRAL = {"model_type": "clip_vision_model"}, {"model_type": "pixtral", "image_size": 64, "head_dim": 8}
GRID = [[32, 64], [64, 32]]
SMALL: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
ROW: dict[str, Any] = {
    "rows": True,
    "do_image_splitting": False,
    "size": {"longest_edge": 32},
    "max_image_size": {"longest_edge": 32},
}
QWEN: dict[str, Any] = {
    # Images keep their sizes: they are 2 x 2 and 2 x 3 tokens.
    "see": _by("Qwen2VLImageProcessorPil", patch_size=8, size={"shortest_edge": 256, "longest_edge": 4096}),
    "types": "mm_token_type_ids",
    "tower": "visual.blocks",
    "projector": "visual.merger",
    "three": True,
}
FAMILIES: dict[str, Family] = {
    "qwen3_vl": Family(
        make=_qwen(
            "Qwen3VL",
            {"depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            {"head_dim": 8},
            {"mrope_interleaved": True},
        ),
        **QWEN,
    ),
    "qwen2_5_vl": Family(
        make=_qwen("Qwen2_5_VL", {"depth": 2, "window_size": 32, "fullatt_block_indexes": [1]}, {}, {}), **QWEN
    ),
    "llava": Family(make=_guest("Llava", LLAMA, CLIP), see=_by("LlavaImageProcessorPil", **SMALL)),
    "pixtral": Family(
        make=_guest("Llava", MISTRAL, PIXTRAL, vision_feature_layer=-1, vision_feature_select_strategy="full"),
        see=_by("PixtralImageProcessorPil", size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}),
        type="llava",
    ),
    "llava_next": Family(
        make=_guest("LlavaNext", LLAMA, CLIP, image_grid_pinpoints=GRID),
        see=_by("LlavaNextImageProcessorPil", **SMALL, image_grid_pinpoints=GRID),
    ),
    "smolvlm": Family(
        make=_guest("SmolVLM", LLAMA, {}, scale_factor=2),
        see=_by("SmolVLMImageProcessorPil", **ROW),
        tower="vision_model",
        projector="connector",
        rows=True,
    ),
    "idefics3": Family(
        make=_guest("Idefics3", LLAMA, {}, scale_factor=2),
        see=_by("Idefics3ImageProcessorPil", **ROW),
        tower="vision_model",
        projector="connector",
        rows=True,
    ),
    "mistral3": Family(
        make=_guest("Mistral3", MISTRAL, PIXTRAL, spatial_merge_size=2),
        see=_by("PixtralImageProcessorPil", size={"longest_edge": 64}, patch_size={"height": 16, "width": 16}),
    ),
    "gemma3": Family(
        make=_gemma,
        see=_by("Gemma3ImageProcessorPil", size={"height": 32, "width": 32}),
        types="token_type_ids",
        packs_wrongly=True,
    ),
}


def make(family: str, trained: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model in training mode, and what is trained of it.

    Args:
        trained: ``lora``, an adapter on all linear layers, the tower's too; ``all``; ``projector``, that alone; or
            ``none``, which leaves it to the caller.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = FAMILIES[family].make().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers begins with norms of one and small numbers; here every part is to count.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if trained == "lora":
        config = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    elif trained == "projector":
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(FAMILIES[family].projector in name)
    return model.train()
