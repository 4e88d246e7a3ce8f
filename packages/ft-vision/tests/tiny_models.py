"""Tiny models of every family, of transformers' own configuration classes, and documents with images for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
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
Document = dict[str, Tensor]


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Family:
    """How a family's models and batches are made.

    Attributes:
        make: a model with random weights. see: the pixels of images as its processor makes them, and how many tokens
            stand for each.
        join: the names of what the processor makes and the dimension along which more images are more.
        types: the keyword that says which tokens are an image's, or None.
        tower: a name in the paths of the tower's parameters. projector: of what follows it.
        three: whether positions are of time, height and width.
    """

    make: Callable[[], Any]
    see: Callable[[Sequence[Image.Image]], tuple[dict[str, Tensor], list[int]]]
    join: dict[str, int]
    types: str | None = None
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    three: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def document(self, model: Any, seed: int, images: int, length: int = 9) -> Document:
        """One row: text, each image between a start and an end, text; labels on the second half of the text."""
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(1, 80, (length,), generator=generator).tolist()
        sizes = ((32, 32), (48, 32))
        pictures = [picture(seed * 10 + i, *sizes[i % 2]) for i in range(images)]
        seen, counts = self.see(pictures) if pictures else ({}, [])
        ids, where = words[:2], [0, 0]
        for count in counts:
            ids += [START, *[IMAGE] * count, END]
            where += [0, *[1] * count, 0]
        where += [0] * (length - 2)
        ids += words[2:]
        labels = [-100] * (len(ids) - length + 4) + words[4:]
        made = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), **seen}
        if self.types is not None:
            made[self.types] = torch.tensor([where])
        return made

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
        for name in dict.fromkeys(name for each in documents for name in each):
            parts = [each[name] for each in documents if name in each]
            batch[name] = torch.cat(parts, self.join.get(name, -1))
        batch["position_ids"] = torch.cat([self.positions(model, each) for each in documents], -1)
        batch[LENGTHS] = [each["input_ids"].shape[1] for each in documents]
        return batch

    def padded(self, documents: Sequence[Document]) -> dict[str, Any]:
        """A row for each document, padded on the right."""
        longest = max(each["input_ids"].shape[1] for each in documents)
        batch: dict[str, Any] = {}
        for name in dict.fromkeys(name for each in documents for name in each):
            parts = [each[name] for each in documents if name in each]
            if name not in self.join:
                fill = -100 if name == "labels" else 0
                parts = [torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=fill) for x in parts]
            batch[name] = torch.cat(parts, 0)
        lengths = torch.tensor([each["input_ids"].shape[1] for each in documents])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch


def _qwen_images(images: Sequence[Image.Image], patch: int) -> tuple[dict[str, Tensor], list[int]]:
    from transformers import Qwen2VLImageProcessorPil

    # Each has its own size here: of 2 x 2 and 2 x 3 tokens.
    processor = Qwen2VLImageProcessorPil(patch_size=patch, size={"shortest_edge": 256, "longest_edge": 4096})
    made = processor(images=list(images), return_tensors="pt")
    return dict(made), [int(grid.prod()) // 4 for grid in made["image_grid_thw"]]


def _qwen3() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 93}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))


def _qwen2_5() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8, "out_hidden_size": 32,
        "window_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = {**TEXT, "rope_parameters": rope}
    ids = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 93}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


_QWEN: dict[str, Any] = {
    "see": lambda images: _qwen_images(images, 8),
    "join": {"pixel_values": 0, "image_grid_thw": 0},
    "types": "mm_token_type_ids",
    "tower": "visual.blocks",
    "projector": "visual.merger",
    "three": True,
}
FAMILIES: dict[str, Family] = {
    "qwen3_vl": Family(make=_qwen3, **_QWEN),
    "qwen2_5_vl": Family(make=_qwen2_5, **_QWEN),
}


def make(family: str, trained: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model in training mode, and what is trained of it.

    Args:
        trained: ``lora``, an adapter on all linear layers, the tower's too; ``all``; ``projector``, that alone.
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
