"""What answers the prompts of ``ft generate`` and ``ft chat``: a run or a model of text, or of another modality."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol

from ft_core.errors import DataError, RunError

if TYPE_CHECKING:
    from ft_core.models.opening import Target

__all__ = ["Answerer", "Question", "TextAnswerer", "answerer_of", "turn"]


@dataclass(frozen=True)
class Question:
    """A prompt as it was given.

    Attributes:
        prompt: text, or a conversation as a list of messages that ends before the answer.
        images: what the row gives beside it: paths, or whatever else the training data may hold; None if nothing.
        where: the file and line that it stands in, for messages; empty for one of the command line's.
    """

    prompt: Any
    images: tuple[Any, ...] | None = None
    where: str = ""

    def as_row(self) -> dict[str, Any]:
        """What is written of it beside its answer."""
        return {"prompt": self.prompt} if self.images is None else {"prompt": self.prompt, "images": [*self.images]}

    def wrong(self, what: object) -> DataError:
        """What is wrong with it, as an error that says where it stands."""
        return DataError(f"{self.where}: {what}" if self.where else str(what))


class Answerer(Protocol):
    """What a run or a model answers with; made by :attr:`ft_core.plugins.ModalitySpec.answerer` of a
    :class:`ft_core.models.opening.Target`, nothing being loaded yet.

    Attributes:
        images: whether it looks at images.
        model, tokenizer: once it is open.
    """

    images: bool
    model: Any
    tokenizer: Any

    def check(self, questions: Sequence[Question], folder: Path) -> list[Any]:
        """What :meth:`encode` takes of each question. It is called before :meth:`open`.

        Args:
            folder: where relative paths are looked for.

        Raises:
            DataError: a prompt that cannot be used, or an image of one; it says where.
        """
        ...

    def open(self, say: Callable[[str], None]) -> None:
        """Load the model.

        Raises:
            FtError: it cannot be loaded.
        """
        ...

    def encode(self, checked: Sequence[Any], system: str | None) -> list[Any]:
        """What :meth:`answers` takes; whatever is wrong with a prompt is said here, before the first is answered.

        Raises:
            DataError: as :func:`ft_core.generation.encode_prompts`.
        """
        ...

    def answers(self, encoded: Sequence[Any], **settings: Any) -> list[str]:
        """The answers, in order; ``settings`` are those of :func:`ft_core.generation.generate_ids`."""
        ...

    def stream(
        self, history: Sequence[dict[str, Any]], folder: Path, stopped: Event | None = None, **settings: Any
    ) -> Generator[str, None, None]:
        """The answer to a conversation piece by piece; as :func:`ft_core.generation.stream`."""
        ...


def answerer_of(reference: str, *, images: bool = False) -> Answerer:
    """What a command's RUN answers with.

    Args:
        images: whether images are asked about, which a model of text does not see.

    Raises:
        DataError: it sees none.
        RunError: it is a model of a task that answers no prompts.
        PluginError: a package that would show them to it is not installed.
        RunError, ModelError: as :func:`ft_core.models.opening.find_target`.
    """
    from ft_core.models.opening import find_target
    from ft_core.plugins import ModalitySpec, registry, resolve

    target = find_target(reference)
    spec = registry().get(ModalitySpec, target.task)
    named = spec.answerer
    if named is None and target.task != "text":
        commands = [shlex.join(word.format(run=reference) for word in words) for words in spec.next]
        instead = f": ft {commands[0]}" if commands else ""
        raise RunError(f"{reference} is a model of the task {target.task}, which answers no prompts{instead}")
    answerer: Answerer = TextAnswerer(target) if named is None else resolve(named)(target)
    if images and not answerer.images:
        if target.run is None:  # without ft-vision no model is known to see, whether it does or not
            registry().get(ModalitySpec, "vision")
        what = (
            f"was trained with task: {target.task}" if target.run is not None else "is no model that task: vision knows"
        )
        raise DataError(f"--image: {reference} {what}, so that it sees no images: leave it, or take one that does")
    return answerer


def turn(asked: str, images: Sequence[str] = ()) -> dict[str, Any]:
    """A user's message, with images before its text."""
    if not images:
        return {"role": "user", "content": asked}
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": asked}]}


class TextAnswerer:
    """Answers of a language model; see :class:`Answerer`."""

    images = False

    def __init__(self, target: Target) -> None:
        self._target = target
        self.model: Any = None
        self.tokenizer: Any = None

    def check(self, questions: Sequence[Question], folder: Path) -> list[Any]:
        for question in questions:
            if question.images is not None:
                raise question.wrong(f"has images, and {self._target.reference} sees none")
            turns = () if isinstance(question.prompt, str) else question.prompt
            if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in turns):
                raise question.wrong("a message is {'role': …, 'content': text}")
        return [question.prompt for question in questions]

    def open(self, say: Callable[[str], None]) -> None:
        from ft_core.models.opening import open_target

        self.model, self.tokenizer = open_target(self._target, say=say)

    def encode(self, checked: Sequence[Any], system: str | None) -> list[Any]:
        from ft_core.generation import encode_prompts

        return [*encode_prompts(self.model, self.tokenizer, checked, system=system)]

    def answers(self, encoded: Sequence[Any], **settings: Any) -> list[str]:
        from ft_core.generation import generate_ids

        return generate_ids(self.model, self.tokenizer, encoded, **settings)

    def stream(
        self, history: Sequence[dict[str, Any]], folder: Path, stopped: Event | None = None, **settings: Any
    ) -> Generator[str, None, None]:
        from ft_core.generation import stream

        return stream(self.model, self.tokenizer, history, stopped=stopped, **settings)
