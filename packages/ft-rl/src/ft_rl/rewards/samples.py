"""What a reward sees of a sample, and how one that scores samples singly says which of them it could not score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ft_core.errors import DataError, FtError

__all__ = ["SampleErrors", "Text", "column_of", "score_each", "start_of", "text_of"]

Text = str | Sequence[Mapping[str, Any]]
"""A prompt or a completion: a string, or messages with ``role`` and ``content``."""


class SampleErrors(Exception):
    """Some samples of a batch could not be scored; the others were.

    Args:
        values: a reward per sample; what stands in the place of a sample that failed has no meaning.
        errors: what went wrong, by the sample's place in the batch.
    """

    def __init__(self, values: Sequence[float | None], errors: Mapping[int, str]) -> None:
        super().__init__(f"{len(errors)} of {len(values)} samples could not be scored")
        self.values = list(values)
        self.errors = dict(errors)


def text_of(completion: Text) -> str:
    """What a completion says: a string as it is; of messages the last one of the assistant's.

    Content in blocks is the text of its text blocks.
    """
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role") == "assistant"] or list(completion)
    return _content(said[-1]) if said else ""


def start_of(prompt: Text, most: int = 60) -> str:
    """The first characters of a prompt on one line, to recognise a sample by; of messages the last one."""
    text = prompt if isinstance(prompt, str) else _content(prompt[-1]) if prompt else ""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(str(block.get("text") or "") for block in content if isinstance(block, Mapping))


def column_of(columns: Mapping[str, Any], *names: str) -> list[Any]:
    """The first of some columns that is there.

    Raises:
        DataError: none is; names those that are.
    """
    for name in names:
        if isinstance(columns.get(name), list):
            return list(columns[name])
    there = sorted(name for name, values in columns.items() if isinstance(values, list) and name != "completion_ids")
    wanted = " or ".join(repr(name) for name in names)
    raise DataError(f"the data has no column {wanted} (it has, beside the prompt: {', '.join(there) or 'none'})")


def score_each(count: int, score: Callable[[int], float | None]) -> list[float | None]:
    """``score(i)`` for each sample i of a batch; one that raises does not keep the others from being scored.

    Raises:
        SampleErrors: some raised.
        FtError: the first that was raised, since it is a mistake in the configuration or the data, not in a sample.
    """
    values: list[float | None] = []
    errors: dict[int, str] = {}
    for i in range(count):
        try:
            values.append(score(i))
        except FtError:
            raise
        except (Exception, SystemExit) as error:  # the user's code raises what it likes
            values.append(None)
            errors[i] = f"{type(error).__name__}: {error}"
    if errors:
        raise SampleErrors(values, errors)
    return values
