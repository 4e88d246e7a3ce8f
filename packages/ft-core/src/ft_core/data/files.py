"""Reads one file as numbered rows, streaming where the format allows."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_core.errors import DataError

__all__ = ["EXTENSIONS", "at", "nearest", "read_file"]

Numbered = Iterator[tuple[int, Any]]

_BOM = b"\xef\xbb\xbf"
_NESTED = ("messages", "conversations")
"""Columns whose cells in a csv file are JSON."""
_RECORDINGS = "wavs"
"""The folder that LJSpeech's recordings lie in."""
_DELIMITERS = (";", "\t", "|")
"""What other programs write between the cells of a csv file instead of commas."""


def at(name: str, number: int) -> str:
    """Where a row is, in words: text files count lines, the others rows."""
    by_line = Path(name).suffix.lower() in (".jsonl", ".csv")
    return f"{name}, {'line' if by_line else 'row'} {number}"


def nearest(path: Path) -> str:
    """`` (did you mean 'x'?)`` where the path's folder has a similar name, and nothing otherwise."""
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {str(folder)!r})" if folder != Path(".") else ""
    try:
        close = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], 1)
    except OSError:
        return ""
    return f" (did you mean {str(folder / close[0])!r}?)" if close else ""


def read_file(path: Path) -> Numbered:
    """The rows of a file, each with the number of its line or row, counted from 1.

    Raises:
        DataError: as it is iterated: the file cannot be opened, is not UTF-8, or is broken; with file and line.
    """
    try:
        yield from _READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _jsonl(path: Path) -> Numbered:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line.removeprefix(_BOM) if number == 1 else line, at(str(path), number))
            if text.strip():  # without its end, so that what a line lacks is not said to be at the next one's beginning
                yield number, _parse(text.rstrip("\r\n"), at(str(path), number))


def _json(path: Path) -> Numbered:
    text = _decode(path.read_bytes().removeprefix(_BOM), str(path))
    start = text.lstrip()[:1]
    if start == "{":  # one object a line, as many tools name .json
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = None
        if whole is None or "\n" not in text.strip():
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield number, _parse(line, f"{path}, line {number}")
            return
        raise DataError(f"{path}: a .json file must hold a list of rows or one row a line, not one object")
    if not start:
        return
    whole = _parse(text, str(path))
    if not isinstance(whole, list):
        raise DataError(f"{path}: a .json file must hold a list of rows, not {type(whole).__name__}")
    yield from enumerate(whole, start=1)


def _csv(path: Path) -> Numbered:
    if path.name == "metadata.csv" and (path.parent / _RECORDINGS).is_dir() and _begins_without_header(path):
        yield from _ljspeech(path)
        return

    def lines() -> Iterator[str]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _decode(line.removeprefix(_BOM) if number == 1 else line, at(str(path), number))

    limit = csv.field_size_limit(2**31 - 1)  # the module's one setting; its default cuts off at 128 KiB
    try:
        reader = csv.reader(lines(), strict=True)
        header: list[str] | None = None
        start = 1
        for cells in reader:
            number, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                if len(cells) == 1 and (found := [mark for mark in _DELIMITERS if mark in cells[0]]):
                    raise DataError(
                        f"{at(str(path), number)}: the header {cells[0]!r} is one column, as if {found[0]!r} separated "
                        "the cells: separate them by commas"
                    )
                if len(set(header)) < len(header):
                    raise DataError(f"{at(str(path), number)}: the header names a column twice: {', '.join(header)}")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{at(str(path), number)}: has {len(cells)} cells where the header names {len(header)} columns; "
                    "quote cells that hold commas or line breaks"
                )
            row: dict[str, Any] = dict(zip(header, cells, strict=True))
            for column in _NESTED:
                if column in row:
                    row[column] = _parse(row[column], f"{at(str(path), number)}, column {column!r}")
            yield number, row
    except csv.Error as error:
        raise DataError(f"{at(str(path), reader.line_num)}: broken csv: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _begins_without_header(path: Path) -> bool:
    """Whether the first line names a recording that is there, as LJSpeech's does, and no columns."""
    with path.open("rb") as file:
        cells = file.readline().removeprefix(_BOM).decode("utf-8", "replace").split("|")
    return len(cells) > 1 and (path.parent / _RECORDINGS / f"{cells[0]}.wav").is_file()


def _ljspeech(path: Path) -> Numbered:
    """LJSpeech's ``metadata.csv``: a line is the name of a file in ``wavs``, the text, and perhaps the text as it is
    read out, with ``|`` between them, no header and no quotes."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line.removeprefix(_BOM) if number == 1 else line, at(str(path), number)).rstrip("\r\n")
            cells = text.split("|")
            if not text.strip():
                continue
            if len(cells) not in (2, 3):
                raise DataError(
                    f"{at(str(path), number)}: has {len(cells)} cells; beside a folder {_RECORDINGS}, as in LJSpeech, "
                    "a line is a file's name, the text, and perhaps the text as it is read out, with | between them"
                )
            row = dict(zip(("audio", "text", "normalized_text"), cells, strict=False))
            yield number, {**row, "audio": f"{_RECORDINGS}/{cells[0]}.wav"}


def _parquet(path: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is no whole parquet file: {error}") from error


def _txt(path: Path) -> Numbered:
    text = _decode(path.read_bytes().removeprefix(_BOM), str(path))
    if text.strip():
        yield 1, {"text": text}


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        guess = "it looks like UTF-16" if utf16 else f"byte 0x{data[error.start]:02x} at {error.start}"
        raise DataError(f"{where}: is not UTF-8 ({guess}); convert it, for example with iconv -t UTF-8") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise DataError(f"{where}: broken JSON: {error.msg} at {place}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON that cannot be read: {error}") from error


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}

EXTENSIONS = tuple(_READERS)
"""The file name endings that are read."""
