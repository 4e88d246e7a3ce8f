"""Images for methods that make batches of their own, as :class:`ft_core.training.inputs.Inputs` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ft_core.data import Collator
from ft_core.errors import DataError, ModelError
from ft_core.fast.beside import Beside
from ft_vision.collating import WORKERS, _read, collator_for, packs
from ft_vision.documents import THREADS, VisionRenderer, _measure, fault_of
from ft_vision.loading import settings_of

if TYPE_CHECKING:
    from torch import Tensor

    from ft_core.config import TrainConfig

__all__ = ["VisionInputs"]

TRIED = ((56, 56), (84, 56))
"""Sizes of the images by which a family's tensors are looked at."""


class VisionInputs:
    """The images of rows in normal form (:mod:`ft_vision.asking`); see :class:`ft_core.training.inputs.Inputs`.

    Args:
        config: the training's. model: the one that is trained, for its configuration and its way to count positions.
        processor: as :func:`ft_vision.loading.load_processor` gives it.

    Raises:
        ModelError: the family's images do not come one by one.
    """

    column = "images"

    def __init__(self, config: TrainConfig, model: Any, processor: Any) -> None:
        self._settings, self._name = settings_of(config), config.model
        self._renderer = VisionRenderer(processor)
        self._collate = collator_for(model, processor, Collator(0), config.model)
        self._skips = self._settings.on_bad_image == "skip"
        self._counts: dict[tuple[int, int], int] = {}
        self.never = frozenset({self._collate.token})
        self._look(processor, config)

    def usable(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[str]]:
        """See :meth:`ft_core.training.inputs.Inputs.usable`."""

        def fault(row: Mapping[str, Any]) -> str | None:
            return _measure(row, self._renderer, self._skips)

        numbers: list[int] = []
        lines: list[str] = []
        with ThreadPoolExecutor(THREADS) as pool:
            for number, found in enumerate(pool.map(fault, rows)):
                line = found or fault_of(rows[number], self._renderer)
                if line is None:
                    numbers.append(number)
                elif self._skips:
                    lines.append(f"row {number + 1}: {line}")
                else:
                    raise DataError(f"row {number + 1}: {line} (vision.on_bad_image: skip leaves such rows out)")
        return numbers, lines

    def ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        given: Sequence[str],
        *,
        prompting: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """See :meth:`ft_core.training.inputs.Inputs.ids`."""
        return self._renderer.tokens(messages, given, prompting=prompting, **(options or {}))

    def beside(self, given: Sequence[Sequence[str]], ids: Tensor, mask: Tensor) -> Beside | None:
        """See :meth:`ft_core.training.inputs.Inputs.beside`.

        Raises:
            UnusableImage: an image cannot be read any more, or is damaged.
            ValueError: a row has other tokens of images than its images have.
        """
        import torch

        images, types = list(dict.fromkeys(image for row in given for image in row)), self._collate.family.types
        if not images and types is None:
            return None
        places = {image: place for place, image in enumerate(images)}
        stands = (ids == self._collate.token) & mask.bool()
        number, begins = torch.full_like(ids, -1), torch.zeros_like(stands)
        for line, row in enumerate(given):
            at = stands[line].nonzero()[:, 0]
            counts = torch.tensor([self._count(image) for image in row], dtype=torch.int64)
            if int(counts.sum()) != len(at):
                raise ValueError(f"a row has {len(at)} tokens of images, whose images are {int(counts.sum())}")
            shown = torch.tensor([places[image] for image in row], dtype=torch.int64)
            number[line, at] = shown.repeat_interleave(counts)
            begins[line, at[counts.cumsum(0) - counts]] = True
        pieces: dict[str, Sequence[Tensor]] = self._cut(self._collate.pixels(images), len(images)) if images else {}
        kinds = stands.long()
        coordinates = None
        if images and self._collate.positions is not None:
            grids = torch.cat([pieces["image_grid_thw"][i] for i in number[begins].tolist()])
            coordinates, _ = self._collate.positions(
                ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=mask
            )
        return Beside(pieces, number, begins, {} if types is None else {types: kinds}, coordinates)

    def packs(self, model: Any) -> bool:
        """See :func:`ft_vision.collating.packs`."""
        return packs(model, self._renderer.processor, self._name)

    def workers(self, on_cpu: bool) -> int:
        """See :attr:`ft_vision.settings.VisionSettings.workers`."""
        wanted = self._settings.workers
        return (0 if on_cpu else WORKERS) if wanted is None else wanted

    def opened(self, given: Sequence[str]) -> list[Any]:
        """PIL images, RGB, as :func:`ft_vision.read_image` gives them.

        Raises:
            UnusableImage: one cannot be read any more, or is damaged.
        """
        return [_read(image) for image in given]

    def named(self, messages: Sequence[Mapping[str, Any]], given: Sequence[str]) -> list[dict[str, Any]]:
        """Messages whose parts of images hold the images' references."""
        left = iter(given)

        def part(one: Mapping[str, Any]) -> dict[str, Any]:
            return {**one, "image": next(left)} if one["type"] == "image" else dict(one)

        return [
            {**message, "content": [part(one) for one in message["content"]]}
            if isinstance(message.get("content"), list)
            else dict(message)
            for message in messages
        ]

    def _count(self, image: str) -> int:
        """How many tokens stand for an image whose row was found usable."""
        if image not in self._renderer.sizes:  # in a worker that was started anew, or of rows that were kept
            self._renderer.sizes[image] = self.opened([image])[0].size
        size = self._renderer.sizes[image]
        if size not in self._counts:
            word = self._renderer.processor.tokenizer(self._renderer.word(size), add_special_tokens=False)
            self._counts[size] = word["input_ids"].count(self._collate.token)
        return self._counts[size]

    def _cut(self, made: Mapping[str, Tensor], count: int) -> dict[str, Sequence[Tensor]]:
        """What each image has of the tensors of all."""
        cut: dict[str, Sequence[Tensor]] = {}
        for name, value in made.items():
            if name == "pixel_values" and "image_grid_thw" in made:
                cut[name] = value.split(made["image_grid_thw"].prod(1).tolist())
            elif len(value) == count:
                cut[name] = value.split(1)
            else:
                raise ValueError(f"{name} has the shape {list(value.shape)} for {count} images")
        return cut

    def _look(self, processor: Any, config: TrainConfig) -> None:
        from PIL import Image

        from ft_vision.rows import reference_of

        blank = [reference_of(Image.new("RGB", size)) for size in TRIED]
        try:
            self._cut(self._collate.pixels(blank), len(blank))
        except ValueError as error:
            kind = type(processor).__name__
            raise ModelError(f"method: {config.method} does not know how {kind} has its images: {error}") from error
