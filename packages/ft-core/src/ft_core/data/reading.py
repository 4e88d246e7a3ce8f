"""Reads training data from files, folders and the Hub into rows of normal form; every mistake is one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ft_core.data.files import EXTENSIONS, at, nearest, read_file
from ft_core.data.formats import FORMATS, Format, check_columns, needs, recognise
from ft_core.data.rows import Rows, encode
from ft_core.errors import DataError

__all__ = ["RowStream", "check_sources", "read_rows"]

AT_ONCE = 2**25
"""Bytes of a file that is parsed whole up to which a look at its first row costs nothing."""
_WHOLE = (".json", ".txt")

Form = Callable[[Mapping[str, Any], Format, Path | None], dict[str, Any]]
"""From a row, its format and the folder of its file (None: it is the Hub's) to a normal form. It may have an attribute
``columns``, a function that gives a row the columns of a format (see :class:`ft_core.training.modality.RowForm`)."""

_HUB_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)((:(?P<config>[\w.-]+))?:(?P<split>\w[^/\\]*))?"
)


def read_rows(sources: Any, formats: Sequence[str], *, seed: int, form: Form | None = None) -> Rows:
    """Read the data that a configuration names.

    A source is one of:

    * a .jsonl, .json, .csv, .parquet or .txt file in UTF-8; a .json file holds a list of objects, or one object a line;
      a .txt file is one row;
    * a folder: all such files in it and below, in the order of their names, save hidden ones and those of run folders;
      .txt files only where there are no others (beside data, a text is a note about it);
    * a Hub data set: ``name`` (its split ``train``), ``name:split`` or ``name:config:split``. A path that exists goes
      before it.

    The format is recognised by the columns of a file's first row unless the source names it.

    Args:
        sources: a path or name, or a list of them and of ``{path, weight, format}`` (mappings, or objects with these
            attributes). A row of a source with weight w > 0 appears w times on average: 2 gives each twice, 0.5 a half
            that the seed draws.
        formats: the names of the formats that the method can train on.
        seed: for the fractions of weights.
        form: brings a row to its normal form instead of ``format.normalise``, for rows of more than text.

    Returns:
        the rows in normal form, in the order of the sources.

    Raises:
        DataError: anything that is wrong with a file or row, with file, line and what is allowed.
    """
    parts = []
    for number, (path, weight, format) in enumerate(_sources(sources)):
        part = Rows.of_encoded(chain.from_iterable(_read_source(path, format, formats, form=form)))
        if weight != 1:
            part = part.weighted(weight, seed=f"{seed}:weight:{number}")
            if not len(part):
                raise DataError(f"{path}: weight {weight} leaves none of its rows")
        parts.append(part)
    return parts[0] if len(parts) == 1 else Rows.joined(parts)


def check_sources(sources: Any, formats: Sequence[str], form: Form | None = None) -> None:
    """Look whether data is there, and at the first row of each source's first file, as :func:`read_rows` would.

    The Hub is not asked, and a large file that can only be parsed whole is not read.

    Raises:
        DataError: as :func:`read_rows` raises it.
    """
    for name, _, format in _sources(sources):
        rows = next(_read_source(name, format, formats, form=form))
        path = Path(name).expanduser()
        if path.is_dir():
            path = _files(path)[0]
        if path.is_file() and not (path.suffix.lower() in _WHOLE and path.stat().st_size > AT_ONCE):
            next(rows)


class RowStream(Iterable[dict[str, Any]]):
    """The rows of :func:`read_rows`, read anew by each pass and never all in memory.

    Files of lines (.jsonl, .csv) and .parquet are read as they are passed through, a Hub data set is downloaded so;
    .json and .txt files are read whole, one at a time. The order is that of the sources, whose weights must be 1.

    Args:
        sources, formats, form: as for :func:`read_rows`.

    Raises:
        DataError: a source is wrong, or, while it is iterated, a row; with file, line and what is allowed.
    """

    def __init__(self, sources: Any, formats: Sequence[str], *, form: Form | None = None) -> None:
        self._sources, self._formats, self._form = _sources(sources), formats, form
        for path, weight, _ in self._sources:
            if weight != 1:
                raise DataError(f"{path}: weight {weight}: the rows of a stream are not counted, so its weight is 1")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path, _, format in self._sources:
            for row in chain.from_iterable(_read_source(path, format, self._formats, streaming=True, form=self._form)):
                yield json.loads(row)


def _sources(sources: Any) -> list[tuple[str, float, str | None]]:
    """Path or name, weight and format of each source."""
    if isinstance(sources, (str, Path, Mapping)) or hasattr(sources, "path"):
        sources = [sources]
    found = [_source(source) for source in sources]
    for path, _, format in found:
        if format is not None and format not in FORMATS:
            raise DataError(f"{path}: there is no format {format!r}; allowed are {', '.join(FORMATS)}")
    if not found:
        raise DataError("data names no source: give a file, a folder or a Hub data set")
    return found


def _source(source: Any) -> tuple[str, float, str | None]:
    if isinstance(source, (str, Path)):
        return str(source), 1.0, None
    keys = ("path", "weight", "format")
    mapping = isinstance(source, Mapping)
    path, weight, format = (source.get(key) if mapping else getattr(source, key, None) for key in keys)
    if path is None:
        raise DataError(f"a data source needs a 'path': {source!r}")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not (0 < weight < math.inf):
        raise DataError(f"{path}: weight must be a number above 0, not {weight!r}")
    return str(path), float(weight), format


def _read_source(
    name: str, format: str | None, formats: Sequence[str], *, streaming: bool = False, form: Form | None = None
) -> Iterator[Iterator[bytes]]:
    """The rows of each file of a source, encoded."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = _files(path)
        if not files:
            raise DataError(f"{name}: the folder has no data files; {_extensions()} are read")
        for file in files:
            yield _read_one(str(file), read_file(file), format, formats, form, file.parent)
        return
    if path.exists():
        if path.suffix.lower() not in EXTENSIONS:
            raise DataError(f"{name}: data files end in {_extensions()}, not in {path.suffix or 'no extension'!r}")
        yield _read_one(name, read_file(path), format, formats, form, path.parent)
        return
    on_hub = _HUB_NAME.fullmatch(name)
    if path.suffix.lower() in EXTENSIONS or on_hub is None or path.is_symlink():
        raise DataError(f"{name}: no such file or folder{nearest(path)}")
    yield _read_one(name, _read_hub(path, **on_hub.groupdict(), streaming=streaming), format, formats, form, None)


def _files(folder: Path) -> list[Path]:
    """The data files of a folder and those below, by name.

    Raises:
        DataError: the folder is a run's.
    """
    below = sorted(folder.rglob("*"))
    runs = {
        file.parent for file in below if file.name == "environment.json" and file.with_name("config.yaml").is_file()
    }
    if folder in runs:
        raise DataError(f"{folder}: is a run folder; the rows that it kept from training are in its held_out.jsonl")
    found = [
        file
        for file in below
        if file.suffix.lower() in EXTENSIONS
        and runs.isdisjoint(file.parents)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    return [file for file in found if file.suffix.lower() != ".txt"] or found


def _read_hub(
    path: Path, name: str, config: str | None, split: str | None, *, streaming: bool
) -> Iterator[tuple[int, Any]]:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    near = nearest(path) if path.parent.is_dir() else ""
    missing = f"{name}: no such file or folder{near}, and it cannot be loaded as a Hub data set"
    try:
        HfApi().dataset_info(name, timeout=20)
    except HfHubHTTPError as error:
        raise DataError(f"{missing}: {_first_line(error)}") from error
    except Exception as error:  # the Hub is not reached; asked once, while load_dataset would retry for half a minute
        cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
        if not cached.is_dir():
            raise DataError(f"{missing}: the Hub is not reached ({_first_line(error)})") from error
    try:
        data = datasets.load_dataset(name, config, split=split or "train", streaming=streaming)
        for column, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Audio):  # as it is encoded: to decode it datasets asks for torchcodec
                data = data.cast_column(column, datasets.Audio(feature.sampling_rate, decode=False))
        yield from enumerate(data, start=1)
    except Exception as error:  # what datasets raises has no common base
        raise DataError(f"{name}: cannot be loaded from the Hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _read_one(
    name: str,
    numbered: Iterable[tuple[int, Any]],
    format: str | None,
    formats: Sequence[str],
    form: Form | None = None,
    folder: Path | None = None,
) -> Iterator[bytes]:
    """The rows of one file, each checked, normalised and encoded."""
    count = 0
    chosen = FORMATS[format] if format else None
    columns = getattr(form, "columns", None)
    for number, row in numbered:
        if not isinstance(row, dict):
            kind = "null" if row is None else type(row).__name__
            raise DataError(f"{at(name, number)}: a row must be a JSON object with columns, not {kind}")
        try:
            row = row if columns is None else columns(row)
            if chosen is None:
                chosen = FORMATS[recognise(row, formats)]
            if chosen.name not in formats:
                raise DataError(f"is in the {chosen.name} format, which this method cannot train on; {needs(formats)}")
            check_columns(row, chosen)
            encoded = encode(chosen.normalise(row) if form is None else form(row, chosen, folder))
        except DataError as error:
            raise type(error)(f"{at(name, number)}: {error}") from None
        yield encoded
        count += 1
    if not count:
        raise DataError(f"{name}: the file is empty" if Path(name).suffix else f"{name}: there are no rows")


def _extensions() -> str:
    return ", ".join(EXTENSIONS)
