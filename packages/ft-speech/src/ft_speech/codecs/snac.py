"""SNAC: residual codebooks of several rates, as Orpheus speaks. The network is :mod:`.snac_model`'s."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch.nn.utils import parametrize

from ft_speech.codecs.checking import as_codes, as_samples, whole_frames
from ft_speech.codecs.errors import CodecError
from ft_speech.codecs.loading import read_config, read_weights
from ft_speech.codecs.protocol import Codes, Layout, Samples
from ft_speech.codecs.snac_model import SnacConfig, SnacModel

__all__ = ["Snac", "SnacStream", "frame_order"]


class Snac:
    """A SNAC codec.

    A frame is the stretch of one code of the coarsest codebook. Its codes stand in the order of Orpheus: each code is
    followed by those of the next codebook that share its stretch. With ``hubertsiuzdak/snac_24khz`` that is
    [c0, c1a, c2a, c2b, c1b, c2c, c2d], 2048 samples and 7 codes of 4096 a frame.

    Decoding is repeatable: the noise that the decoder adds is a function of the place (``snac_model.seeded_noise``).

    The streaming decoder gives a frame once its decoder cannot see any that come later (three frames with
    ``snac_24khz``), and keeps as many before it; what it gives is ``decode``'s but for rounding.

    Args:
        model: is taken over: moved, and its weight norms folded into plain weights.
        device: of torch's.
    """

    name: ClassVar[str] = "snac"

    def __init__(self, model: SnacModel, device: Any = "cpu") -> None:
        config = model.config
        self.model = model.to(device).eval().requires_grad_(False)
        for module in model.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        self.device = torch.device(device)
        self.order = frame_order(config.vq_strides)
        self.steps = config.vq_strides[0]
        self.sample_rate = config.sampling_rate
        self.frame_samples = config.hop * self.steps
        self.layout = Layout((config.codebook_size,) * len(self.order))
        self.context = math.ceil(config.decoder_reach / self.steps)

    @classmethod
    def load(cls, folder: Path, device: Any = "cpu") -> Self:
        """The codec of a folder such as ``hubertsiuzdak/snac_24khz`` has.

        Raises:
            CodecError: a file is missing, damaged, or of another codec or a SNAC with attention.
        """
        folder = Path(folder)
        model = SnacModel(_config(read_config(folder, cls.name), folder))
        weights = read_weights(folder, cls.name)
        try:
            missing, unknown = model.load_state_dict(weights, strict=False)
        except RuntimeError as error:  # a tensor of another shape
            reason = str(error).split("\n\t")[-1]
            raise CodecError(f"snac codec {folder}: the weights are not those of its config.json: {reason}") from None
        for names, what in ((missing, "lack"), (unknown, "have an unknown")):
            if names:
                raise CodecError(f"snac codec {folder}: the weights {what} {names[0]} ({len(names)} in all)")
        return cls(model, device)

    @torch.inference_mode()
    def encode(self, samples: Samples) -> Codes:
        samples = whole_frames(as_samples(samples), self.frame_samples)
        frames = len(samples) // self.frame_samples
        if not frames:
            return np.zeros((0, len(self.order)), np.int64)
        books = self.model.encode(torch.from_numpy(samples).to(self.device)[None, None])
        # [frames, codes of the book in a frame]
        shaped = [book.reshape(frames, -1) for book in books]
        found = torch.stack([shaped[book][:, place] for book, place in self.order], dim=1)
        return np.asarray(found.cpu().numpy(), np.int64)

    def decode(self, codes: Codes) -> Samples:
        return self._decode(as_codes(codes, self.layout), 0)

    def stream(self) -> SnacStream:
        return SnacStream(self)

    @torch.inference_mode()
    def _decode(self, codes: Codes, first: int) -> Samples:
        """The samples of frames, of which the first has a number."""
        if not len(codes):
            return np.zeros(0, np.float32)
        tensor = torch.from_numpy(np.ascontiguousarray(codes)).to(self.device)
        books = [
            tensor[:, [place for place, (of, _) in enumerate(self.order) if of == book]].reshape(-1)
            for book in range(1 + max(book for book, _ in self.order))
        ]
        audio = self.model.decode(books, first * self.steps)
        return np.asarray(audio.float().cpu().numpy())


class SnacStream:
    """Decodes frames as they come; see :class:`Snac`."""

    def __init__(self, codec: Snac) -> None:
        self._codec = codec
        self._codes: Codes = np.zeros((0, len(codec.order)), np.int64)  # the context and what is not given yet
        self._first = 0  # the number of the first of them
        self._given = 0  # frames given

    def push(self, codes: Codes) -> Samples:
        self._codes = np.concatenate([self._codes, as_codes(codes, self._codec.layout)])
        return self._give(self._first + len(self._codes) - self._codec.context)

    def finish(self) -> Samples:
        return self._give(self._first + len(self._codes))

    def _give(self, until: int) -> Samples:
        if until <= self._given:
            return np.zeros(0, np.float32)
        size = self._codec.frame_samples
        made = self._codec._decode(self._codes, self._first)
        made = made[(self._given - self._first) * size : (until - self._first) * size]
        self._given = until
        gone = max(0, until - self._codec.context - self._first)
        self._codes, self._first = self._codes[gone:], self._first + gone
        return made


def frame_order(strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """The codes of a frame in their order, each as its codebook and its place among that codebook's codes.

    >>> frame_order((4, 2, 1))
    [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (2, 2), (2, 3)]
    """

    def after(book: int, place: int) -> list[tuple[int, int]]:
        order = [(book, place)]
        if book + 1 < len(strides):
            shares = strides[book] // strides[book + 1]
            for share in range(shares):
                order += after(book + 1, place * shares + share)
        return order

    return after(0, 0)


def _config(values: dict[str, Any], folder: Path) -> SnacConfig:
    """A checkpoint's configuration.

    Raises:
        CodecError: a key is missing, or its value makes no sense or is not done here.
    """
    where = f"snac codec {folder}: config.json"
    if values.get("attn_window_size") is not None:
        raise CodecError(
            f"{where}: attn_window_size is {values['attn_window_size']!r}; only SNAC without attention is known here, "
            "such as hubertsiuzdak/snac_24khz"
        )
    given: dict[str, Any] = {}
    for field in fields(SnacConfig):
        value: Any = values.get(field.name)
        if value is None and field.name == "latent_dim":
            continue
        many, yes = field.name.endswith(("rates", "strides")), field.name in ("noise", "depthwise")
        if yes:
            good = isinstance(value, bool)
        else:
            numbers: Any = value if many else [value]
            good = isinstance(numbers, list) and 0 < len(numbers) <= 16
            good = good and all(type(n) is int and 0 < n <= 1 << 20 for n in numbers)
        if not good:
            kind = "true or false" if yes else "a list of positive numbers" if many else "a positive number"
            raise CodecError(f"{where}: {field.name} is {value!r}; it is {kind}: is this a SNAC?")
        given[field.name] = tuple(value) if many else value
    config = SnacConfig(**given)
    strides = config.vq_strides
    if strides[-1] != 1 or any(a % b for a, b in pairwise(strides)):
        raise CodecError(f"{where}: vq_strides are {list(strides)}; each is a multiple of the next, the last is 1")
    if math.prod(config.decoder_rates) != config.hop or config.decoder_dim >> len(config.decoder_rates) < 1:
        raise CodecError(f"{where}: the decoder's rates and channels do not fit the encoder's")
    return config
