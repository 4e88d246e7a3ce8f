"""The network of SNAC, with the parameter names of its published checkpoints.

H. Siuzdak, F. Grötschla, L. Lanzendörfer, "SNAC: Multi-Scale Neural Audio Codec" (2024), arXiv:2410.14411, built on
DAC (Kumar et al. 2023, arXiv:2306.06546). Written after the paper and the MIT-licensed library ``snac`` 1.2.1, whose
numbers it gives; without attention, which only the published models for music have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, embedding, normalize
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["SnacConfig", "SnacModel", "seeded_noise"]

DILATIONS = (1, 3, 9)
KERNEL = 7


@dataclass(frozen=True)
class SnacConfig:
    """What the ``config.json`` of a checkpoint says; the defaults are those of ``hubertsiuzdak/snac_24khz``.

    Attributes:
        sampling_rate: in Hz.
        encoder_dim: channels of the encoder's first layer; each block doubles them.
        encoder_rates: by how much each of the encoder's blocks shortens.
        decoder_dim: channels of the decoder's first layer; each block halves them.
        decoder_rates: by how much each of the decoder's blocks lengthens.
        codebook_size: codes of each codebook.
        codebook_dim: the width in which codes are looked up.
        vq_strides: latent steps that a code of each codebook stands for.
        noise: whether the decoder's blocks add noise.
        depthwise: whether convolutions are by channel.
        latent_dim: channels between encoder and decoder; None: what the encoder ends in.
    """

    sampling_rate: int = 24_000
    encoder_dim: int = 48
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    decoder_dim: int = 1024
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    codebook_size: int = 4096
    codebook_dim: int = 8
    vq_strides: tuple[int, ...] = (4, 2, 1)
    noise: bool = True
    depthwise: bool = True
    latent_dim: int | None = None

    @property
    def hop(self) -> int:
        """Samples of a latent step."""
        return math.prod(self.encoder_rates)

    @property
    def latent(self) -> int:
        return self.latent_dim or self.encoder_dim << len(self.encoder_rates)

    @property
    def decoder_reach(self) -> int:
        """Latent steps on either side that a sample of the decoder depends on, rounded up."""
        reach, length = float(KERNEL // 2), 1
        for rate in self.decoder_rates:
            reach += 1 / length  # a transposed convolution of two strides' width
            length *= rate
            reach += sum(dilation * (KERNEL // 2) for dilation in DILATIONS) / length
        return math.ceil(reach + KERNEL // 2 / length)


def seeded_noise(block: int, step: int, length: int, device: Any = "cpu") -> Tensor:
    """The noise of a decoder block over one latent step, the same each time: ``[length]``.

    The published decoder draws anew at each call. Here noise is a function of the place, so that decoding is
    repeatable, and a stream gives what the whole does. Drawn on the CPU: the same on each device.
    """
    generator = torch.Generator().manual_seed(step * 64 + block)
    return torch.randn(length, generator=generator).to(device)


class SnacModel(nn.Module):
    """Encoder, residual quantizers of several rates, and decoder."""

    def __init__(self, config: SnacConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = Quantizers(config)
        self.decoder = Decoder(config)

    def encode(self, audio: Tensor) -> list[Tensor]:
        """Codes of audio ``[1, 1, samples]``, of each codebook ``[steps / stride]``."""
        codes: list[Tensor] = self.quantizer.codes(self.encoder.block(audio))
        return codes

    def decode(self, codes: list[Tensor], first: int = 0) -> Tensor:
        """Audio ``[samples]`` of what :meth:`encode` gives.

        Args:
            first: the number of the first latent step, which the noise goes by.
        """
        latent = self.quantizer.latent(codes)
        for number, layer in enumerate(self.decoder.model):
            latent = layer(latent, first, number) if isinstance(layer, DecoderBlock) else layer(latent)
        return latent[0, 0]


class Snake(nn.Module):
    """``x + sin(a x)^2 / a``, with a learnt ``a`` a channel (Ziyin et al. 2020, arXiv:2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x).square() / (self.alpha + 1e-9)


def _conv(before: int, after: int, **options: Any) -> nn.Module:
    conv: nn.Module = weight_norm(nn.Conv1d(before, after, **options))
    return conv


class ResidualUnit(nn.Module):
    def __init__(self, channels: int, dilation: int, groups: int) -> None:
        super().__init__()
        padding = KERNEL // 2 * dilation
        self.block = nn.Sequential(
            Snake(channels),
            _conv(channels, channels, kernel_size=KERNEL, dilation=dilation, padding=padding, groups=groups),
            Snake(channels),
            _conv(channels, channels, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block(x)
        return out


class EncoderBlock(nn.Module):
    def __init__(self, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(ResidualUnit(channels, dilation, groups) for dilation in DILATIONS),
            Snake(channels),
            _conv(channels, 2 * channels, kernel_size=2 * stride, stride=stride, padding=math.ceil(stride / 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class Encoder(nn.Module):
    def __init__(self, config: SnacConfig) -> None:
        super().__init__()
        channels = config.encoder_dim
        layers = [_conv(1, channels, kernel_size=KERNEL, padding=KERNEL // 2)]
        for stride in config.encoder_rates:
            layers.append(EncoderBlock(channels, stride, channels if config.depthwise else 1))
            channels *= 2
        groups = channels if config.depthwise else 1
        layers.append(_conv(channels, channels, kernel_size=KERNEL, padding=KERNEL // 2, groups=groups))
        self.block = nn.Sequential(*layers)


class NoiseBlock(nn.Module):
    """Adds noise, as loud as a projection of the signal says."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = _conv(channels, channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        out: Tensor = x + noise * self.linear(x)
        return out


class DecoderBlock(nn.Module):
    def __init__(self, config: SnacConfig, place: int) -> None:
        super().__init__()
        before, channels = config.decoder_dim >> place, config.decoder_dim >> (place + 1)
        stride = config.decoder_rates[place]
        self.step = math.prod(config.decoder_rates[: place + 1])  # samples of this block for each latent step
        groups = channels if config.depthwise else 1
        up = nn.ConvTranspose1d(
            before,
            channels,
            kernel_size=2 * stride,
            stride=stride,
            padding=math.ceil(stride / 2),
            output_padding=stride % 2,
        )
        self.block = nn.Sequential(
            Snake(before),
            weight_norm(up),
            *([NoiseBlock(channels)] if config.noise else []),
            *(ResidualUnit(channels, dilation, groups) for dilation in DILATIONS),
        )

    def forward(self, x: Tensor, first: int, number: int) -> Tensor:
        for layer in self.block:
            if isinstance(layer, NoiseBlock):
                steps = range(first, first + x.shape[-1] // self.step)
                x = layer(x, torch.cat([seeded_noise(number, step, self.step, x.device) for step in steps]).to(x.dtype))
            else:
                x = layer(x)
        return x


class Decoder(nn.Module):
    def __init__(self, config: SnacConfig) -> None:
        super().__init__()
        latent, channels = config.latent, config.decoder_dim
        if config.depthwise:
            start = [
                _conv(latent, latent, kernel_size=KERNEL, padding=KERNEL // 2, groups=latent),
                _conv(latent, channels, kernel_size=1),
            ]
        else:
            start = [_conv(latent, channels, kernel_size=KERNEL, padding=KERNEL // 2)]
        last = channels >> len(config.decoder_rates)
        self.model = nn.Sequential(
            *start,
            *(DecoderBlock(config, place) for place in range(len(config.decoder_rates))),
            Snake(last),
            _conv(last, 1, kernel_size=KERNEL, padding=KERNEL // 2),
            nn.Tanh(),
        )


class Quantizer(nn.Module):
    """Looks up the code nearest by angle in a narrow projection (Yu et al. 2021, arXiv:2110.04627)."""

    def __init__(self, config: SnacConfig, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.in_proj = _conv(config.latent, config.codebook_dim, kernel_size=1)
        self.out_proj = _conv(config.codebook_dim, config.latent, kernel_size=1)
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)

    def codes(self, latent: Tensor) -> Tensor:
        narrow = self.in_proj(avg_pool1d(latent, self.stride, self.stride))[0].T
        return (normalize(narrow) @ normalize(self.codebook.weight).T).argmax(dim=-1)

    def latent(self, codes: Tensor) -> Tensor:
        wide: Tensor = self.out_proj(embedding(codes, self.codebook.weight).T[None])
        return wide.repeat_interleave(self.stride, dim=-1)


class Quantizers(nn.Module):
    def __init__(self, config: SnacConfig) -> None:
        super().__init__()
        self.quantizers: Any = nn.ModuleList(Quantizer(config, stride) for stride in config.vq_strides)

    def codes(self, latent: Tensor) -> list[Tensor]:
        found = []
        for quantizer in self.quantizers:
            found.append(quantizer.codes(latent))
            latent = latent - quantizer.latent(found[-1])
        return found

    def latent(self, codes: list[Tensor]) -> Tensor:
        return torch.stack([quantizer.latent(c) for quantizer, c in zip(self.quantizers, codes, strict=True)]).sum(
            dim=0
        )
