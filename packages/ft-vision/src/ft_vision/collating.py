"""Batches of documents with images: pixels made by the model's own processor, positions as the family counts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ft_core.data import Collator, keeps_documents_apart
from ft_core.data.collating import IGNORE
from ft_core.errors import DataError, ModelError
from ft_vision.documents import COUNTS, IMAGES, VisionRenderer, image_token_of
from ft_vision.families.parts import Family, family_of
from ft_vision.families.processors import image_options
from ft_vision.images import ImageError, read_image
from ft_vision.loading import settings_of
from ft_vision.rows import open_reference, reference_of, said_of

if TYPE_CHECKING:
    import torch

    from ft_core.training import Job

__all__ = ["TRIED", "UnusableImage", "VisionCollator", "collator", "collator_for", "drawn", "packs"]

WORKERS = 4
"""Processes that make batches ahead of a GPU, unless the configuration says how many."""
LOOKED_AT = 64
"""Rows among which the shortest documents are found."""
TRIED = (64, 64)
"""Width and height of the images that a model is tried with."""
INPUTS = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")
"""What forward passes take of what image processors make."""


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
    the batch, in their order: ``pixel_values``, float32 [images, 3, height, width], where images have sizes of their
    own filled up with zeros, and ``image_sizes``, int64 [images, 2], says how far; of Qwen's families [patches, values]
    with ``image_grid_thw``, int64 [images, 3]; of LLaVA-NeXT [images, tiles, 3, height, width] with ``image_sizes``; of
    SmolVLM and Idefics 3 [rows, tiles, 3, height, width] with ``pixel_attention_mask``, [rows, tiles, height, width].
    A row without ``image_references`` is text.

    Padding-free, position ids of such a family are int64 [4, 1, T]: each token's place in its document, by which
    attention is kept within it, and its three coordinates, counted for each document alone.

    Attributes:
        text: batches the text.
        processor: the model's image processor.
        token: the id of an image's tokens.
        family: what the model's forward pass takes.
        positions: the model's ``get_rope_index``, for a family with grids.
        options: what the image processor is told beside the images.

    Raises:
        UnusableImage: when it is called: an image that cannot be read any more, or is damaged.
    """

    text: Collator
    processor: Any
    token: int
    family: Family
    positions: Callable[..., Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.text(features)
        ids = batch["input_ids"]
        seen = [image for feature in features for image in feature.get(IMAGES) or ()]
        if seen and self.family.nested and not self.text.padding_free:
            batch |= self._made([document[IMAGES] for feature in features for document in _documents(feature)])
        elif seen:
            batch |= self.pixels(seen)
        kinds = (ids == self.token).long() if seen else ids * 0
        if self.family.types is not None:
            batch[self.family.types] = kinds
        if self.positions is not None and self.text.padding_free:
            batch["position_ids"] = self._coordinates(features, batch, kinds)
        return batch

    def pixels(self, images: Sequence[str]) -> dict[str, Any]:
        """What the forward pass is handed of the images of one row."""
        return self._made([images])

    def _made(self, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
        read = [[_read(image) for image in row] for row in rows]
        given = read if self.family.nested else read[0]
        made = self.processor(given, return_tensors="pt", **self.options)
        return {name: made[name] for name in INPUTS if name in made}

    def checked(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """A row of two documents, or of the only one, that are the shortest among the first rows: one with images
        last, so that what is before it counts. None where no document has any; see
        :attr:`ft_core.plugins.ModalitySpec.collator`."""
        found = [one for number in range(min(len(rows), LOOKED_AT)) for one in _documents(rows[number])]
        seeing = min((one for one in found if one[IMAGES]), key=_length, default=None)
        if seeing is None:
            return None
        other = min((one for one in found if one is not seeing), key=_length, default=None)
        taken = [seeing] if other is None else [other, seeing]
        joined = {name: [value for one in taken for value in one[name]] for name in ("input_ids", "labels", IMAGES)}
        return joined | {"seq_lengths": list(map(_length, taken)), COUNTS: [len(one[IMAGES]) for one in taken]}

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


def _documents(feature: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents of a row, each with its own images."""
    ids, labels, images = iter(feature["input_ids"]), iter(feature["labels"]), iter(feature.get(IMAGES) or ())
    lengths = feature.get("seq_lengths") or [len(feature["input_ids"])]
    return [
        {"input_ids": _next(ids, length), "labels": _next(labels, length), IMAGES: _next(images, count)}
        for length, count in zip(lengths, _counts(feature), strict=True)
    ]


def _next(values: Iterator[Any], count: int) -> list[Any]:
    return list(islice(values, count))


def _length(document: Mapping[str, Any]) -> int:
    return len(document["input_ids"])


def _counts(feature: Mapping[str, Any]) -> Sequence[int]:
    documents = len(feature.get("seq_lengths") or (0,))
    counts: Sequence[int] | None = feature.get(COUNTS)
    if counts is None:  # a row of one document need not say it
        return [len(feature.get(IMAGES) or ())] if documents == 1 else [0] * documents
    return counts


def _read(image: str) -> Any:
    try:
        return read_image(open_reference(image))
    except ImageError as error:
        raise UnusableImage(
            f"{said_of(image, error)} (mend it, and go on; vision.on_bad_image: skip leaves such rows out)"
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

    Raises:
        ModelError: its tower makes more or less of an image than the processor writes tokens for.
    """
    collate = collator_for(model, processor, Collator(0), name)
    collate = replace(collate, options={**collate.options, **collate.family.tried})
    documents = drawn(collate, processor, ((4, 4, TRIED), (4, 4, TRIED), (24, 8, TRIED)), 0)
    try:
        return keeps_documents_apart(model, documents, collate)
    except (ValueError, RuntimeError) as error:
        if "Image features and image tokens do not match" not in str(error):
            raise
        count = sum(token == collate.token for token in documents[0]["input_ids"])
        raise ModelError(
            f"the processor of {name} writes {count} tokens for an image of which its model makes another number: its "
            "processor_config.json is not that of this model (patch_size, num_additional_image_tokens, image_seq_len "
            "and the like)"
        ) from error


def drawn(
    collate: VisionCollator, processor: Any, shapes: Sequence[tuple[int, int, tuple[int, int] | None]], seed: int
) -> list[dict[str, Any]]:
    """Documents to try a model with: ordinary tokens drawn at random, and an image of noise among them.

    Args:
        collate: whose options the images are to be made with.
        processor: the model's.
        shapes: of each document how many tokens stand before and after its image, and the image's width and height, or
            None for no image.
        seed: other documents for another.

    Returns:
        rows as the collator takes them; labels are -100 on what stands for an image.
    """
    import torch
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    tokenizer = processor.tokenizer
    renderer = VisionRenderer(processor)
    renderer.options = collate.options
    special = {collate.token, *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    usual = [token for token in range(len(tokenizer)) if token not in special]
    documents = []
    for before, after, size in shapes:
        text = [usual[i] for i in torch.randint(len(usual), (before + after,), generator=generator)]
        word: list[int] = []
        images = []
        if size is not None:
            word = tokenizer(renderer.word(size), add_special_tokens=False)["input_ids"]
            pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
            images.append(reference_of(Image.fromarray(pixels.numpy())))
        ids = [*text[:before], *word, *text[before:]]
        labels = [*text[:before], *[IGNORE] * len(word), *text[before:]]
        documents.append({"input_ids": ids, "labels": labels, IMAGES: images, COUNTS: [len(images)]})
    return documents


def collator_for(model: Any, processor: Any, text: Collator, name: str) -> VisionCollator:
    """A collator for a model, its adapter attached or not."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = family_of(plain.config, name)
    positions = _without_weights(plain.model).get_rope_index if family.has_grids else None
    return VisionCollator(
        text, processor.image_processor, image_token_of(plain.config), family, positions, image_options(processor)
    )


def _without_weights(model: Any) -> Any:
    """An object of a model's class with its configuration alone, which is all that positions are counted by: a worker
    is handed no weights."""
    bare = object.__new__(type(model))
    bare.__dict__["config"] = model.config
    return bare
