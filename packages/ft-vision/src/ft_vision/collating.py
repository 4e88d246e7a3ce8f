"""Batches of documents with images: pixels made by the model's own processor, positions as the family counts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_core.data import Collator, keeps_documents_apart
from ft_core.errors import DataError
from ft_vision.documents import COUNTS, IMAGES, VisionRenderer, image_token_of
from ft_vision.families.parts import Family, family_of
from ft_vision.images import ImageError, read_image
from ft_vision.loading import settings_of
from ft_vision.rows import open_reference, reference_of, said_of

if TYPE_CHECKING:
    import torch

    from ft_core.training import Job

__all__ = ["UnusableImage", "VisionCollator", "collator", "collator_for", "packs"]

WORKERS = 4
"""Processes that make batches ahead of a GPU, unless the configuration says how many."""


TRIED = (64, 64)
"""Width and height of the images that a model is tried with."""


class UnusableImage(DataError):
    """An image that turned out to be unusable when its batch was made. It stays one line on its way out of a worker,
    whose exceptions torch makes again with their whole traceback for a message."""

    def __init__(self, message: str) -> None:
        last = message.rstrip().rpartition("\n")[2]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


@dataclass(frozen=True)
class VisionCollator:
    """Makes a batch of rows, each a dict of ``input_ids``, ``labels`` and, where packed, ``seq_lengths``, with
    ``image_references`` (in the order of their tokens) and ``image_counts`` (how many each document has).

    Text is batched as :class:`ft_core.data.Collator` does. Beside it stands what the processor makes of all images of
    the batch, in their order: ``pixel_values``, float32 [images, 3, height, width], or of a family whose images have a
    size of their own [patches, values] with ``image_grid_thw``, int64 [images, 3]. A row without
    ``image_references`` is text.

    Padding-free, position ids of such a family are int64 [4, 1, T]: each token's place in its document, by which
    attention is kept within it, and its three coordinates, counted for each document alone.

    Attributes:
        text: batches the text.
        processor: the model's image processor.
        token: the id of an image's tokens.
        family: what the model's forward pass takes.
        positions: the model's ``get_rope_index``, for a family with grids.

    Raises:
        UnusableImage: when it is called: an image that cannot be read any more, or is damaged.
    """

    text: Collator
    processor: Any
    token: int
    family: Family
    positions: Callable[..., Any] | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.text(features)
        ids = batch["input_ids"]
        seen = [image for feature in features for image in feature.get(IMAGES) or ()]
        if seen:
            batch |= self.pixels(seen)
        kinds = (ids == self.token).long() if seen else ids * 0
        if self.family.types is not None:
            batch[self.family.types] = kinds
        if self.positions is not None and self.text.padding_free:
            batch["position_ids"] = self._coordinates(features, batch, kinds)
        return batch

    def pixels(self, images: Sequence[str]) -> dict[str, Any]:
        """What the forward pass is handed of images."""
        made = self.processor([_read(image) for image in images], return_tensors="pt")
        return {name: made[name] for name in ("pixel_values", "image_grid_thw") if name in made}

    def batch_tokens(self, lengths: Sequence[int]) -> int:
        """See :meth:`ft_core.data.Collator.batch_tokens`."""
        return self.text.batch_tokens(lengths)

    def _coordinates(
        self, features: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], kinds: torch.Tensor
    ) -> torch.Tensor:
        import torch

        assert self.positions is not None
        lengths = [n for f in features for n in f.get("seq_lengths") or [len(f["input_ids"])]]
        counts = [n for f in features for n in _counts(f)]
        ids, grids = batch["input_ids"], batch.get("image_grid_thw", ())
        parts, at, image = [], 0, 0
        for length, count in zip(lengths, counts, strict=True):
            part = slice(at, at + length)
            found, _ = self.positions(
                ids[:, part],
                mm_token_type_ids=kinds[:, part],
                image_grid_thw=grids[image : image + count] if count else None,
            )
            parts.append(found)
            at, image = at + length, image + count
        return torch.cat([batch["position_ids"][None], torch.cat(parts, dim=2)])


def _counts(feature: Mapping[str, Any]) -> Sequence[int]:
    documents = len(feature.get("seq_lengths") or (0,))
    counts: Sequence[int] | None = feature.get(COUNTS)
    return [0] * documents if counts is None else counts


def _read(image: str) -> Any:
    try:
        return read_image(open_reference(image))
    except ImageError as error:
        raise UnusableImage(
            f"{said_of(image, error)} (it was there when training began; mend it, and go on with --resume)"
        ) from error


def collator(job: Job) -> VisionCollator:
    """The collator of a training; see :attr:`ft_core.plugins.ModalitySpec.collator`. Batches are made in workers."""
    from ft_core.fast import fast_path_of
    from ft_core.training.sft import MIXES

    workers = settings_of(job.config).workers
    if workers is None:
        workers = 0 if job.arguments["use_cpu"] else WORKERS
    job.arguments["dataloader_num_workers"] = workers
    padding_free = packs(job.model, job.processor, job.config.model)
    if not padding_free:
        job.say(MIXES)
    lengths = padding_free and fast_path_of(job.model) is not None
    text = Collator(job.tokenizer.pad_token_id, padding_free=padding_free, lengths=lengths)
    return collator_for(job.model, job.processor, text, job.config.model)


def packs(model: Any, processor: Any, name: str) -> bool:
    """Whether the model keeps documents with images in one row apart, by :func:`ft_core.data.keeps_documents_apart`.

    transformers' own layers of Gemma 3 do not in 5.23 (in 5.17 they do): in their sliding layers a document's tokens
    attend as if its images stood where those of the row's first document do.
    """
    import torch
    from PIL import Image

    collate = collator_for(model, processor, Collator(0), name)
    generator = torch.Generator().manual_seed(0)
    word = processor.tokenizer(VisionRenderer(processor).word(TRIED), add_special_tokens=False)["input_ids"]
    special = {collate.token, *processor.tokenizer.all_special_ids}
    usual = [token for token in range(min(256, len(processor.tokenizer))) if token not in special]
    documents = []
    for before, after in ((4, 4), (4, 4), (24, 8)):
        text = [usual[i] for i in torch.randint(len(usual), (before + after,), generator=generator)]
        pixels = torch.randint(256, (TRIED[1], TRIED[0], 3), generator=generator, dtype=torch.uint8)
        ids = [*text[:before], *word, *text[before:]]
        image = reference_of(Image.fromarray(pixels.numpy()))
        documents.append({"input_ids": ids, "labels": ids, IMAGES: [image], COUNTS: [1]})
    return keeps_documents_apart(model, documents, collate)


def collator_for(model: Any, processor: Any, text: Collator, name: str) -> VisionCollator:
    """A collator for a model, its adapter attached or not."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = family_of(plain.config, name)
    positions = _without_weights(plain.model).get_rope_index if family.has_grids else None
    return VisionCollator(text, processor.image_processor, image_token_of(plain.config), family, positions)


def _without_weights(model: Any) -> Any:
    """An object of a model's class with its configuration alone, which is all that positions are counted by: a worker
    is handed no weights."""
    bare = object.__new__(type(model))
    bare.__dict__["config"] = model.config
    return bare
