"""References to recordings, as rows in their normal form have them: made of what a data set gives, and opened.

A reference is an absolute path, or a ``data:`` URL that holds the encoded recording in base64.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ft_core.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "DATA",
    "audio_name",
    "decoded",
    "kind_of",
    "open_reference",
    "open_row",
    "reference_of",
    "short",
    "source_of",
]

DATA = "data:"
"""Begins a URL that holds the encoded recording itself."""

IN_DATA = "a recording in the data itself"
_KINDS = ((b"RIFF", "wav"), (b"fLaC", "flac"), (b"OggS", "ogg"))
_WAYS = "a path, a data: URL, bytes, or an object with 'bytes', 'path', or 'array' and 'sampling_rate'"


def reference_of(audio: Any, folder: Path | None = None, *, where: str = "audio") -> str:
    """The reference to a recording that a row gives in one of these ways:

    * a path, relative to the data file's folder, or a ``file:`` URL;
    * a ``data:`` URL with base64, or the encoded bytes;
    * an object with ``bytes`` or ``path``, or with ``array`` and ``sampling_rate``, as the Hub's data sets have them.

    Samples are kept as they are: 16-bit ones, and floats that 16 bits hold, as flac, others as a wav of float32.

    Args:
        audio: what the row gives. An array is int16, or floats of full scale -1 to 1, of shape [samples] or
            [channels, samples].
        folder: where relative paths are looked for; None: the row is of the Hub, whose paths are taken only where they
            lead into its caches, since whoever wrote them shall not choose what files of this machine are read.
        where: the column, for messages.

    Raises:
        DataError: it is given in another way, is a URL of the network, or, without a folder, a path outside the Hub's
            caches. Whether there is such a file, and what is in it, is not looked at.
    """
    if isinstance(audio, Mapping):
        audio = _of_object(audio, where)
    if isinstance(audio, bytes | bytearray | memoryview):
        return _url(bytes(audio))
    if isinstance(audio, os.PathLike):
        audio = os.fspath(audio)
    if isinstance(audio, str) and audio[: len(DATA)].lower() == DATA:
        decoded(audio, where)
        return audio
    return _absolute_path(audio, where, folder)


def open_reference(
    reference: str,
    sampling_rate: int | None = 16_000,
    *,
    max_seconds: float | None = None,
    start: float = 0.0,
    end: float | None = None,
) -> npt.NDArray[np.float32]:
    """The samples of a recording, float32 of one channel, as :func:`ft_speech.read_audio` reads them.

    Args:
        reference: as :func:`reference_of` makes it.
        sampling_rate: in Hz, of the result; None: its own.
        max_seconds: what is longer is refused; of a stretch, the stretch.
        start, end: the stretch to be read, in seconds; None: to its end.

    Raises:
        ft_speech.AudioError: as there, with the reference's name.
        DataError: a ``data:`` URL is not in base64.
    """
    from ft_speech.audio import read_audio

    return read_audio(source_of(reference), sampling_rate=sampling_rate, max_seconds=max_seconds, start=start, end=end)[
        0
    ]


def open_row(
    row: Mapping[str, Any],
    sampling_rate: int = 16_000,
    *,
    max_seconds: float | None = None,
    trim_silence: float | None = None,
) -> npt.NDArray[np.float32]:
    """The samples of a row in its normal form: of its ``audio``, from its ``start`` to its ``end`` where it has them.

    Args:
        trim_silence: both ends are trimmed (:func:`ft_speech.silence.without_ends`), what lies so many dB below the
            loudest being silence; None: not.

    Raises:
        ft_speech.AudioError: as :func:`open_reference`.
    """
    from ft_speech.silence import without_ends

    start, end = row.get("start") or 0.0, row.get("end")
    samples = open_reference(row["audio"], sampling_rate, max_seconds=max_seconds, start=start, end=end)
    return without_ends(samples, sampling_rate, trim_silence)


def source_of(reference: str) -> str | io.BytesIO:
    """A reference as :func:`ft_speech.read_audio` takes it: a path, or a file in memory that has a name for messages.

    Raises:
        DataError: a ``data:`` URL is not in base64.
    """
    return _Held(decoded(reference, IN_DATA)) if reference[: len(DATA)].lower() == DATA else reference


class _Held(io.BytesIO):
    name = IN_DATA


def audio_name(reference: str) -> str:
    """A reference, short, for a person."""
    return IN_DATA if reference[: len(DATA)].lower() == DATA else reference


def decoded(url: str, where: str) -> bytes:
    """What a ``data:`` URL holds.

    Raises:
        DataError: it is not in base64.
    """
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataError(f"{where} is a data: URL without base64: write data:audio/wav;base64,…")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters beyond ASCII
        raise DataError(f"{where} is no base64: {error}") from None


def short(text: str) -> str:
    """A text of at most 80 characters."""
    return text if len(text) <= 80 else text[:77] + "…"


def kind_of(value: Any) -> str:
    """What a value of a row is, for a person."""
    return {"NoneType": "null", "str": "text", "list": "a list", "dict": "an object"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )


def _of_object(audio: Mapping[str, Any], where: str) -> Any:
    if audio.get("array") is not None:
        return _encoded(audio["array"], audio.get("sampling_rate"), where)
    for key in ("bytes", "path"):
        if audio.get(key) is not None:
            return audio[key]
    names = ", ".join(repr(key) for key, value in audio.items() if value is not None) or "nothing"
    raise DataError(f"{where} must be {_WAYS}, not an object with {names}")


def _encoded(array: Any, rate: Any, where: str) -> bytes:
    """Samples as a file, of which the same samples are read again."""
    import numpy as np
    import soundfile

    from ft_speech.audio import SAMPLING_RATES

    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or rate not in SAMPLING_RATES:
        raise DataError(
            f"{where}'s sampling_rate must be a whole number of Hz from {SAMPLING_RATES[0]} to {SAMPLING_RATES[-1]}, "
            f"not {rate!r}"
        )
    try:
        samples = np.asarray(array)
    except ValueError:  # a list of lists of several lengths
        samples = np.empty(0, dtype=object)
    if samples.ndim not in (1, 2) or not (samples.dtype == np.int16 or samples.dtype.kind == "f") or not samples.size:
        raise DataError(
            f"{where}'s array must be int16 or floats of shape [samples] or [channels, samples], at least one; "
            f"not {samples.dtype} of shape {list(samples.shape)}"
        )
    if samples.dtype.kind == "f":
        if not np.isfinite(samples).all():
            raise DataError(f"{where}'s array has samples that are NaN or infinite")
        whole = samples * np.float64(32768)
        fits = (whole == np.rint(whole)).all() and whole.min() >= -32768 and whole.max() <= 32767
        samples = whole.astype(np.int16) if fits else samples.astype(np.float32)
    # flac has at most 8 channels and 655,350 Hz; wav has no such bound that matters
    flac = samples.dtype == np.int16 and rate <= 655_350 and (samples.ndim == 1 or len(samples) <= 8)
    subtype = "PCM_16" if samples.dtype == np.int16 else "FLOAT"
    file = io.BytesIO()
    soundfile.write(file, samples.T, int(rate), format="FLAC" if flac else "WAV", subtype=subtype)
    return file.getvalue()


def _absolute_path(given: Any, where: str, folder: Path | None) -> str:
    if not isinstance(given, str) or not given:
        raise DataError(f"{where} must be {_WAYS}, not {'empty' if given == '' else kind_of(given)}")
    if "\0" in given:
        raise DataError(f"{where} is {short(given)!r}: no path has a NUL character")
    is_file = given[:7].lower() == "file://"
    if "://" in given and not is_file:
        raise DataError(f"{where} is a URL, {short(given)}, which is not fetched: download it and give its path")
    try:
        path = _of_file_url(given, where) if is_file else Path(given).expanduser()
    except RuntimeError:  # pathlib's, of ~ and a name that no user has
        raise DataError(f"{where} is {short(given)}, of a user whom this machine does not know") from None
    if folder is None and not path.is_absolute():
        raise DataError(f"{where} is a relative path, {short(given)}, in rows that come from no file of this machine")
    if folder is None:
        return _in_cache(os.path.abspath(path), where)
    return os.path.abspath(folder / path)


def _in_cache(path: str, where: str) -> str:
    """A path that leads, links followed, to a file that was downloaded from the Hub."""
    from datasets import config
    from huggingface_hub import constants

    caches = (
        config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH,
        constants.HF_HUB_CACHE,
    )  # fmt: skip
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(cache)) for cache in caches):
        raise DataError(
            f"{where} is a path of this machine, {short(path)}, in a row of the Hub, which may name files of its "
            "caches alone: download the data set, and give its folder"
        )
    return path


def _of_file_url(url: str, where: str) -> Path:
    host, _, path = url[len("file://") :].partition("/")
    if host.lower() not in ("", "localhost"):  # RFC 8089, 2
        raise DataError(f"{where} is {short(url)}, a file of the host {short(host)}: write file:///folder/a.wav")
    return Path("/" + unquote(path))


def _url(data: bytes) -> str:
    kind = next((kind for mark, kind in _KINDS if data.startswith(mark)), "mpeg")
    return f"{DATA}audio/{kind};base64,{base64.b64encode(data).decode()}"
