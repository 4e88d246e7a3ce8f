"""Conversations with images as documents of tokens: every image as many tokens as the model will see of it.

How many follows from the image's size alone, so that only headers are read here; pixels are made when a batch is
(:mod:`ft_vision.collating`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from ft_core.console import counted
from ft_core.data import Packed, Tokenized
from ft_core.data.rendering import Draft, Renderer
from ft_core.data.tokenizing import RowTokenizer
from ft_core.errors import DataError
from ft_core.training.job import LEFT_OUT
from ft_vision.budgets import can_be_bounded
from ft_vision.families.parts import image_token_of
from ft_vision.families.processors import image_options
from ft_vision.fetching import is_url
from ft_vision.images import ImageError, image_size, read_image
from ft_vision.loading import settings_of
from ft_vision.rows import image_name, open_reference, said_of

if TYPE_CHECKING:
    from ft_core.training import Job

__all__ = ["COUNTS", "IMAGES", "VisionRenderer", "dataset", "fault_of", "image_token_of", "images_of", "tokenize"]

IMAGES = "image_references"
"""The column with a row's images, in the order of their tokens. TRL would take one named ``images`` for its own."""
COUNTS = "image_counts"
"""The column that says how many of them each document of the row has."""

CHEAPLY: dict[str, Any] = {"resample": 0, "do_rescale": False, "do_normalize": False, "do_pad": False}
"""What an image processor is told where only sizes matter: Pillow's nearest pixel, and no arithmetic on pixels."""

BATCH = 64
"""Rows that are looked at together."""
THREADS = 8

Row = Mapping[str, Any]


class VisionRenderer(Renderer):
    """Writes conversations with images as text, by the processor's chat template and its own words for an image.

    Args:
        processor: the model's, as :func:`ft_vision.loading.load_processor` gives it.

    Attributes:
        sizes: width and height of the images by their references, to be filled before rows with them are written.
        options: what the processor tells its image processor.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__(processor.tokenizer, processor)
        self.processor = processor
        self.options: Mapping[str, Any] = image_options(processor)
        self.sizes: dict[str, tuple[int, int]] = {}
        self.left_out: list[int] = []
        self._words: dict[tuple[int, int], str] = {}

    def drafts(self, row: Row) -> list[Draft]:
        """As :meth:`ft_core.data.rendering.Renderer.drafts`, with each image written out; never to be cut in two.

        Raises:
            DataError: as there; the text has another number of places for images than the row has images.
        """
        drafts = super().drafts(row)
        if not drafts:
            return drafts
        most = max(one.text.count(self.processor.image_token) for one in drafts)
        self._check(most, row)
        return [self._expanded(one, row["images"]) for one in drafts]

    def prompt(self, row: Row) -> tuple[str, str | None]:
        """As :meth:`ft_core.data.rendering.Renderer.prompt`, with each image written out."""
        text, expected = super().prompt(row)
        return self._expanded(Draft(text, ()), row["images"]).text, expected

    def question(self, row: Row) -> str:
        """A conversation that is to be answered, ready for the answer, with each image written out.

        Raises:
            DataError: as :meth:`drafts`.
        """
        text = self._render(row["messages"], row.get("tools"), prompting=True)
        self._check(text.count(self.processor.image_token), row)
        return self._expanded(Draft(text, ()), row["images"]).text

    def tokens(
        self, messages: Sequence[Row], images: Sequence[str], *, prompting: bool = False, **options: Any
    ) -> list[int]:
        """The tokens of a conversation with these images, as it stands or up to where an answer begins.

        Args:
            images: references, whose sizes are known. prompting: whether a generation prompt follows.
            options: further arguments of the chat template.

        Raises:
            DataError: as :meth:`drafts`.
        """
        text = str(self._apply(messages, None, tokenize=False, add_generation_prompt=prompting, **options))
        self._check(text.count(self.processor.image_token), {"images": images})
        text = self._expanded(Draft(text, ()), images).text
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def word(self, size: tuple[int, int]) -> str:
        """What stands for an image of this width and height in a text.

        Raises:
            ImageError: the processor refuses the size.
        """
        if size not in self._words:
            from PIL import Image

            try:
                blank = Image.new("RGB", size)
                made = self.processor.image_processor([blank], **{**self.options, **CHEAPLY})
                self._words[size] = str(self.processor.replace_image_token(made, image_idx=0))
            except ValueError as error:  # an extreme shape
                raise ImageError(f"has {size[0]} x {size[1]} pixels, which the model cannot see: {error}") from error
        return self._words[size]

    def _check(self, places: int, row: Row) -> None:
        images = len(row["images"])
        if places != images:
            raise DataError(
                f"the chat template writes {counted(places, 'place')} for {counted(images, 'image')}: "
                f"either it knows no images, or a text holds {self.processor.image_token!r} itself"
            )

    def _expanded(self, one: Draft, images: Sequence[str]) -> Draft:
        """The draft with every place filled, and the trained ranges where they have moved to."""
        pieces = one.text.split(self.processor.image_token)
        words = [self.word(self.sizes[image]) for image in images[: len(pieces) - 1]]
        grown = []  # where a place ends in the old text, and by how much the text has grown by then
        shown = []
        at = more = 0
        for piece, word in zip(pieces, words, strict=False):
            at += len(piece) + len(self.processor.image_token)
            more += len(word) - len(self.processor.image_token)
            grown.append((at, more))
            shown.append((at + more - len(word), at + more))

        def moved(place: int) -> int:
            return place + next((by for end, by in reversed(grown) if end <= place), 0)

        text = "".join(piece + word for piece, word in zip(pieces, [*words, ""], strict=True))
        spans = tuple((moved(start), moved(end)) for start, end in one.spans)
        return replace(one, text=text, spans=spans, uncuttable=bool(words), shown=tuple(shown))


def tokenize(
    rows: Sequence[Row],
    renderer: VisionRenderer,
    *,
    max_length: int,
    train_on: Literal["answers", "all"] = "answers",
    on_bad_image: Literal["stop", "skip"] = "stop",
) -> tuple[Tokenized, list[str]]:
    """Documents of rows in normal form, and a line for each row that was left out for an image.

    Only headers are read, save where bad images are skipped: what is damaged shows in the pixels alone, so that each
    image is then decoded once.

    Raises:
        DataError: a row cannot be written, or, unless they are skipped, has an image that cannot be used; with its
            number.
    """
    result = Tokenized()
    adding = RowTokenizer(renderer.processor.tokenizer, max_length, train_on, renderer)
    bad: list[str] = []
    numbered = iter(enumerate(rows))
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(numbered, BATCH)):
            checked = []
            faults = pool.map(
                lambda item: _measure(item[1], renderer, on_bad_image == "skip") or fault_of(item[1], renderer), batch
            )
            for (number, row), fault in zip(batch, faults, strict=True):
                if fault is None:
                    checked.append((number, row))
                elif on_bad_image == "stop":
                    raise DataError(f"row {number + 1}: {fault} (vision.on_bad_image: skip leaves such rows out)")
                else:
                    bad.append(f"row {number + 1}: {fault}")
                    renderer.left_out.append(number)
            adding(checked, result)
    return result, bad


def _measure(row: Row, renderer: VisionRenderer, whole: bool) -> str | None:
    """Note the sizes of a row's images; what is wrong with one, if anything is."""
    for image in row["images"]:
        if image not in renderer.sizes:
            try:
                source = open_reference(image)
                renderer.sizes[image] = read_image(source).size if whole else image_size(source)
            except ImageError as error:
                return said_of(image, error)
    return None


def fault_of(row: Row, renderer: VisionRenderer) -> str | None:
    """What the processor has against one of a row's images, if anything."""
    for image in row["images"]:
        try:
            renderer.word(renderer.sizes[image])
        except ImageError as error:
            return f"{image_name(image)}: {error}"
    return None


def dataset(job: Job, rows: Sequence[Row], name: str) -> Any:
    """Training rows, packed up to ``max_length`` where packing is on; see :attr:`ft_core.plugins.ModalitySpec.dataset`.

    Returns:
        a ``datasets.Dataset``, with the columns that :class:`ft_vision.collating.VisionCollator` takes.

    Raises:
        DataError: as :func:`tokenize`; or no row is left.
    """
    config, what = job.config, name.replace("_", "-")
    renderer = VisionRenderer(job.processor)
    if settings_of(config).allow_urls and (urls := {image for row in rows for image in row["images"] if is_url(image)}):
        job.say(f"{counted(len(urls), 'image')} of the {what} rows behind URLs: fetched unless in the cache")
    tokens, bad = tokenize(
        rows,
        renderer,
        max_length=config.max_length,
        train_on=getattr(job.settings, "train_on", "answers"),
        on_bad_image=settings_of(config).on_bad_image,
    )
    job.kept[LEFT_OUT] = {**job.kept.get(LEFT_OUT, {}), name: renderer.left_out}
    for line in bad[:3]:
        job.say(f"left out: {what} {line}")
    if len(bad) > 3:
        job.say(f"left out: {counted(len(bad), f'{what} row')} in all with an image that cannot be used")
    if tokens.left_out:
        verb = "is" if tokens.left_out == 1 else "are"
        bounded = can_be_bounded(job.processor.image_processor, renderer.options)
        job.say(
            f"{counted(tokens.left_out, f'{what} row')} with images {verb} longer than max_length {config.max_length} "
            f"and left out: raise max_length{', or lower vision.max_pixels' if bounded else ''}"
        )
    if (cut := tokens.overlong - tokens.left_out) > 0:
        job.say(f"{counted(cut, f'{what} row')} of text alone, longer than max_length {config.max_length}: cut")
    if (empty := tokens.dropped - tokens.left_out) > 0:
        job.say(f"{counted(empty, f'{what} document')} without a token of an answer within max_length: left out")
    if not len(tokens):
        raise DataError(
            f"none of {counted(len(rows), f'{what} row')} can be trained on: {tokens.left_out} longer than max_length "
            f"{config.max_length}, {len(bad)} with an image that cannot be used"
        )
    job.counts |= {f"{name}_tokens": tokens.tokens}
    if name == "train":
        job.counts |= {
            "trained_tokens": tokens.trained_tokens,
            "overlong_rows": tokens.overlong,
            "dropped_rows": tokens.dropped + len(bad),
            "bad_image_rows": len(bad),
        }
    packed = Packed(tokens, config.max_length).documents if config.packing else [[i] for i in range(len(tokens))]
    token = image_token_of(job.model.config)
    taken = list(images_of(tokens, rows, renderer, token))
    if name == "train":
        job.counts |= {"images": sum(map(len, taken))}
    made = tokens.dataset(packed)
    made = made.add_column(IMAGES, [[image for i in row for image in taken[i]] for row in packed])
    return made.add_column(COUNTS, [[len(taken[i]) for i in row] for row in packed])


def images_of(tokens: Tokenized, rows: Sequence[Row], renderer: VisionRenderer, token: int) -> Iterator[list[str]]:
    """The images of each document: of a conversation that is several, those of the turns up to its last."""
    each: dict[tuple[int, int], int] = {}
    for index in range(len(tokens)):
        left = tokens[index]["input_ids"].count(token)
        images = []
        for image in rows[tokens.row_of[index]]["images"]:
            if left <= 0:
                break
            size = renderer.sizes[image]
            if size not in each:
                ids = renderer.processor.tokenizer(renderer.word(size), add_special_tokens=False)["input_ids"]
                each[size] = ids.count(token)
            left -= each[size]
            images.append(image)
        yield images
