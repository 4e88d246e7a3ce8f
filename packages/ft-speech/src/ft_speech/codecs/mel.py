"""The mel codec: codebooks of spectral envelopes, pitch and voicing, fitted to recordings in seconds on a CPU.

It needs no weights of anybody's, and speaks as its recordings do: it's made for a voice or a few, not for all sounds.

    python -m ft_speech.codecs.mel RECORDINGS… --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from ft_core.errors import FtError
from ft_speech.audio import read_audio
from ft_speech.codecs.checking import as_codes, as_samples, whole_frames
from ft_speech.codecs.errors import CodecError
from ft_speech.codecs.kmeans import residual_codebooks, residual_codes
from ft_speech.codecs.loading import read_config, read_weights
from ft_speech.codecs.protocol import Codes, Layout, Samples
from ft_speech.codecs.spectra import Analysis, heard
from ft_speech.codecs.vocoder import Vocoder

__all__ = ["Mel", "MelStream"]

Floats: TypeAlias = npt.NDArray[np.float32]

RANGES: dict[str, tuple[type, float, float]] = {
    "sample_rate": (int, 8_000, 192_000),
    "hop": (int, 16, 8_192),
    "window": (int, 16, 16_384),
    "bands": (int, 4, 128),
    "lowest_pitch": (float, 20, 1_000),
    "highest_pitch": (float, 40, 4_000),
    "pitch_weight": (float, 0.01, 1_000),
    "voicing_weight": (float, 0.01, 1_000),
    "stack": (int, 1, 64),
}
"""What a configuration's numbers may be."""

VERSION = 1
"""Of what :meth:`Mel.save` writes, and of how it is analysed and synthesised: codes mean something to one of them."""


class Mel:
    """A codec of envelopes, pitches and voicing (see :mod:`.spectra`), without learnt networks.

    A frame is ``stack`` hops. Their log powers, log pitches and voicing are one vector; a frame's codes are its
    residual vector quantization: place 0 is the nearest vector of the first codebook, place 1 the nearest of the
    second one to what that leaves, and so on. Decoding adds the vectors up and hands them to the :class:`Vocoder`.

    The streaming decoder is the whole one: it gives the same samples bit for bit, a hop and a half late.

    Attributes:
        analysis: how audio is analysed.
        stack: hops of a frame.
        books: the codebooks, each ``[codes, stack * (bands + 2)]``.
    """

    name: ClassVar[str] = "mel"

    def __init__(self, analysis: Analysis, stack: int, books: Sequence[Floats]) -> None:
        self.analysis, self.stack, self.books = analysis, stack, list(books)
        self.sample_rate = analysis.sample_rate
        self.frame_samples = analysis.hop * stack
        self.layout = Layout(tuple(len(book) for book in books))

    @classmethod
    def fit(
        cls,
        recordings: Iterable[Samples],
        sample_rate: int = 16_000,
        *,
        codebooks: tuple[int, ...] = (512, 512),
        stack: int = 3,
        hop_seconds: float = 0.01,
        bands: int = 40,
        rounds: int = 20,
        seed: int = 0,
    ) -> Self:
        """A codec of what recordings sound like.

        Args:
            recordings: mono audio, each ``[samples]``, of full scale -1 to 1. Some minutes of one voice will do.
            sample_rate: theirs, in Hz, and the codec's.
            codebooks: how many codes there are at each place of a frame.
            stack: hops of a frame.
            hop_seconds: from one analysis to the next. There are ``len(codebooks) / (stack * hop_seconds)`` tokens a
                second.
            bands: of the envelope.
            rounds, seed: of :func:`ft_speech.codecs.kmeans.kmeans`.

        Raises:
            CodecError: the recordings have fewer frames than the largest codebook codes.
            ValueError: a recording is no mono audio, or a number makes no sense.
        """
        hop = round(hop_seconds * sample_rate)
        if min(codebooks, default=0) < 2 or stack < 1 or hop < 16 or not 4 <= bands <= 128 or sample_rate < 8_000:
            raise ValueError(
                "a mel codec has codebooks of 2 codes or more, stack >= 1, hops of 16 samples or more, "
                f"4 to 128 bands and 8 kHz or more; not {codebooks=}, {stack=}, {hop=}, {bands=}, {sample_rate=}"
            )
        analysis = Analysis(sample_rate, hop, window=round(0.025 * sample_rate), bands=bands)
        bare = cls(analysis, stack, [])
        vectors = [bare._vectors(as_samples(recording)) for recording in recordings]
        points = np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)
        if len(points) < max(codebooks):
            seconds = max(codebooks) * stack * hop / sample_rate
            raise CodecError(
                f"the recordings have {len(points)} frames, and a codebook of {max(codebooks)} codes wants that many "
                f"({seconds:.0f} s) at the least: give more recordings or smaller codebooks"
            )
        return cls(analysis, stack, residual_codebooks(points, codebooks, rounds=rounds, seed=seed))

    def encode(self, samples: Samples) -> Codes:
        return residual_codes(self._vectors(as_samples(samples)), self.books)

    def decode(self, codes: Codes) -> Samples:
        stream = self.stream()
        return np.concatenate([stream.push(codes), stream.finish()])

    def stream(self) -> MelStream:
        return MelStream(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``; the folder appears whole or not at all.

        Raises:
            CodecError: it is there already, with something in it, or cannot be written.
        """
        from safetensors.numpy import save_file

        target = Path(folder)
        beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        config = {"codec": self.name, "version": VERSION, "stack": self.stack, **asdict(self.analysis)}
        try:
            if target.exists():
                target.rmdir()  # an empty one may be there
            beside.mkdir(parents=True)
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            books = {f"codebooks.{place}": np.ascontiguousarray(book) for place, book in enumerate(self.books)}
            save_file(books, beside / "model.safetensors")
            os.replace(beside, target)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise CodecError(f"mel codec {target}: cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, folder: Path, device: Any = "cpu") -> Self:
        """The codec that :meth:`save` wrote. It computes on the CPU, whatever the device.

        Raises:
            CodecError: a file is missing, damaged, or of another codec.
        """
        folder = Path(folder)
        config = read_config(folder, cls.name)
        if config.get("codec") != cls.name or config.get("version") != VERSION:
            raise CodecError(
                f"mel codec {folder}: config.json is not of a mel codec of version {VERSION} "
                f"(codec: {config.get('codec')!r}, version: {config.get('version')!r})"
            )
        analysis, stack = _analysis(config, folder)
        weights = read_weights(folder, cls.name)
        width = stack * (analysis.bands + 2)
        books = []
        for place in range(len(weights)):
            book: Any = weights.get(f"codebooks.{place}")
            good = book is not None and book.ndim == 2 and book.shape[1] == width and book.is_floating_point()
            if not good or not book.isfinite().all():
                raise CodecError(
                    f"mel codec {folder}: model.safetensors has no codebooks.{place} of finite numbers [codes, {width}]"
                )
            books.append(book.float().numpy())
        if not books:
            raise CodecError(f"mel codec {folder}: model.safetensors has no codebooks")
        return cls(analysis, stack, books)

    def _vectors(self, samples: Samples) -> Floats:
        """What is quantized of each frame: ``[frames, stack * (bands + 2)]``."""
        samples = whole_frames(samples, self.frame_samples)
        if not len(samples):
            return np.zeros((0, self.stack * (self.analysis.bands + 2)), np.float32)
        bands, pitch, voicing = heard(samples, self.analysis)
        hops = np.column_stack(
            [bands, self.analysis.pitch_weight * np.log2(pitch), self.analysis.voicing_weight * voicing]
        )
        return hops.reshape(len(samples) // self.frame_samples, -1).astype(np.float32)

    def _hops(self, codes: Codes) -> tuple[Floats, Floats, Floats]:
        """Log powers, pitches and voicing of codes."""
        total = np.zeros((len(codes), self.books[0].shape[1]), np.float32)
        for place, book in enumerate(self.books):
            total += book[codes[:, place]]
        hops = total.reshape(-1, self.analysis.bands + 2)
        pitch = 2 ** (hops[:, -2] / self.analysis.pitch_weight)
        pitch = np.clip(pitch, self.analysis.lowest_pitch, self.analysis.highest_pitch)
        return hops[:, :-2], pitch, np.clip(hops[:, -1] / self.analysis.voicing_weight, 0, 1)


class MelStream:
    """Decodes frames as they come, giving all samples but those of the last hop and a half; see :class:`Mel`."""

    def __init__(self, codec: Mel) -> None:
        self._codec, self._vocoder = codec, Vocoder(codec.analysis)

    def push(self, codes: Codes) -> Samples:
        return self._vocoder.push(*self._codec._hops(as_codes(codes, self._codec.layout)))

    def finish(self) -> Samples:
        return self._vocoder.finish()


def _analysis(config: dict[str, Any], folder: Path) -> tuple[Analysis, int]:
    """The analysis and stack that a configuration says.

    Raises:
        CodecError: a key is missing, or its value makes no sense.
    """
    values = {}
    for key, (kind, least, most) in RANGES.items():
        value: Any = config.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (kind is float and isinstance(value, float))) or not least <= value <= most:
            raise CodecError(
                f"mel codec {folder}: config.json: {key} is {value!r}; it is a number from {least} to {most}"
            )
        values[key] = kind(value)
    stack = values.pop("stack")
    analysis = Analysis(**values)
    if analysis.window < analysis.hop or analysis.lowest_pitch >= analysis.highest_pitch:
        raise CodecError(
            f"mel codec {folder}: config.json: a window is a hop or longer, the lowest pitch below the highest"
        )
    return analysis, stack


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``python -m ft_speech.codecs.mel``; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ft_speech.codecs.mel", description="Fit a mel codec to recordings of a voice or a few."
    )
    parser.add_argument("recordings", nargs="+", help="audio files: wav, flac, ogg or mp3")
    parser.add_argument("--out", required=True, help="the folder to write, which must not be there yet")
    parser.add_argument("--sample-rate", type=int, default=16_000, help="of the codec, in Hz (default: 16000)")
    parser.add_argument(
        "--codebooks", type=int, nargs="+", default=[512, 512], help="codes at each place of a frame (default: 512 512)"
    )
    parser.add_argument("--stack", type=int, default=3, help="hops of a frame (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the first centres (default: 0)")
    chosen = parser.parse_args(arguments)
    try:
        read = (read_audio(path, sampling_rate=chosen.sample_rate)[0] for path in chosen.recordings)
        codec = Mel.fit(
            read, chosen.sample_rate, codebooks=tuple(chosen.codebooks), stack=chosen.stack, seed=chosen.seed
        )
        codec.save(chosen.out)
    except (FtError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rate = codec.sample_rate / codec.frame_samples * len(codec.books)
    print(f"{chosen.out}: {codec.layout.tokens} audio tokens, {rate:.0f} a second, {codec.sample_rate} Hz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
