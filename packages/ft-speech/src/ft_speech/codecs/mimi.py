"""Mimi: 12.5 frames a second of up to 32 codes, as CSM speaks. The network is transformers' ``MimiModel``.

A. Défossez et al., "Moshi: a speech-text foundation model for real-time dialogue" (2024), arXiv:2410.00037.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from ft_speech.codecs.checking import as_codes, as_samples, whole_frames
from ft_speech.codecs.errors import CodecError
from ft_speech.codecs.loading import read_config
from ft_speech.codecs.protocol import Codes, Layout, Samples

if TYPE_CHECKING:
    from transformers import MimiModel

__all__ = ["Mimi", "MimiStream"]


class Mimi:
    """A Mimi codec.

    A frame has a code of each codebook, coarse to fine; the first is the semantic one. With ``kyutai/mimi`` that is
    1920 samples at 24 kHz and 32 codes of 2048 a frame.

    The streaming decoder gives each frame at once: Mimi's decoder is causal. It keeps the keys and values of the
    decoder's transformer, as transformers' cache does, and the few latent steps that the convolutions after it still
    see. What it gives is ``decode``'s but for rounding.

    Args:
        model: transformers' ``MimiModel``, of its own or out of a CSM (``model.codec_model``).
        codebooks: how many of its codebooks are used, coarse ones first; None: all.
        device: where it is moved to; None: nowhere.

    Raises:
        CodecError: the model is not causal or has another number of channels than one.
        ValueError: ``codebooks`` is not from the number of semantic codebooks to that of all.
    """

    name: ClassVar[str] = "mimi"

    def __init__(self, model: MimiModel, codebooks: int | None = None, device: Any = None) -> None:
        config = model.config
        if not config.use_causal_conv or config.trim_right_ratio != 1.0 or config.audio_channels != 1:
            raise CodecError("a mimi codec is causal and mono (use_causal_conv, trim_right_ratio 1, audio_channels 1)")
        count = config.num_quantizers if codebooks is None else codebooks
        if not config.num_semantic_quantizers <= count <= config.num_quantizers:
            raise ValueError(
                f"codebooks is from {config.num_semantic_quantizers} to {config.num_quantizers}, not {codebooks}"
            )
        self.model = model.eval() if device is None else model.to(device).eval()
        self.codebooks = count
        self.sample_rate = int(config.sampling_rate)
        self.frame_samples = round(config.sampling_rate / config.frame_rate)
        self.layout = Layout((int(config.codebook_size),) * count)

    @classmethod
    def load(cls, folder: Path, device: Any = "cpu", *, codebooks: int | None = None) -> Self:
        """The codec of a folder such as ``kyutai/mimi`` has.

        Raises:
            CodecError: a file is missing, damaged, or of another codec.
        """
        folder = Path(folder)
        kind = read_config(folder, cls.name).get("model_type")
        if kind != "mimi":
            raise CodecError(f"mimi codec {folder}: config.json is of model_type {kind!r}, not 'mimi'")
        if not (folder / "model.safetensors").is_file():
            raise CodecError(f"mimi codec {folder}: it has no model.safetensors")
        from transformers import MimiModel

        try:
            model, report = MimiModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # transformers, safetensors and torch raise each their own
            raise CodecError(f"mimi codec {folder}: {type(error).__name__}: {error}") from None
        if report["missing_keys"] or report["mismatched_keys"]:
            bad = [*report["missing_keys"], *report["mismatched_keys"]]
            raise CodecError(f"mimi codec {folder}: the weights lack {bad[0]} ({len(bad)} in all)")
        return cls(model, codebooks, device)

    @torch.inference_mode()
    def encode(self, samples: Samples) -> Codes:
        samples = whole_frames(as_samples(samples), self.frame_samples)
        if not len(samples):
            return np.zeros((0, self.codebooks), np.int64)
        audio = torch.from_numpy(samples).to(self.model.device, self.model.dtype)[None, None]
        codes = self.model.encode(audio, num_quantizers=self.codebooks, use_streaming=False).audio_codes
        return np.asarray(codes[0].T.cpu().numpy(), np.int64)

    @torch.inference_mode()
    def decode(self, codes: Codes) -> Samples:
        codes = as_codes(codes, self.layout)
        if not len(codes):
            return np.zeros(0, np.float32)
        audio = self.model.decode(self._tensor(codes)).audio_values
        return np.asarray(audio[0, 0].float().cpu().numpy())

    def stream(self) -> MimiStream:
        return MimiStream(self)

    def _tensor(self, codes: Codes) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(codes.T)).to(self.model.device)[None]


class MimiStream:
    """Decodes frames as they come; see :class:`Mimi`."""

    def __init__(self, codec: Mimi) -> None:
        from transformers import DynamicCache

        self._codec, model = codec, codec.model
        # From transformers 5.2x on the halves are models of their own.
        half = model.decoder if hasattr(model.decoder, "decoder_seanet") else model
        self._upsample, self._transformer = half.upsample, half.decoder_transformer
        self._convolutions = half.decoder_seanet if hasattr(half, "decoder_seanet") else half.decoder
        self._cache = DynamicCache(config=self._transformer.config)
        self._reach = _reach(model.config)
        self._latent: Tensor | None = None  # the last frame's, before it is lengthened
        self._steps: Tensor | None = None  # what the convolutions still see, [1, width, steps]

    @torch.inference_mode()
    def push(self, codes: Codes) -> Samples:
        codes = as_codes(codes, self._codec.layout)
        if not len(codes):
            return np.zeros(0, np.float32)
        latent = self._codec.model.quantizer.decode(self._codec._tensor(codes))
        new = self._lengthen(latent)
        new = self._transformer(new.transpose(1, 2), past_key_values=self._cache, use_cache=True).last_hidden_state
        new = new.transpose(1, 2)
        seen = new if self._steps is None else torch.cat([self._steps, new], dim=-1)
        self._steps = seen[..., -self._reach :]
        audio = self._convolutions(seen)[0, 0]
        settled = audio[-len(codes) * self._codec.frame_samples :]
        return np.asarray(settled.float().cpu().numpy())

    def finish(self) -> Samples:
        return np.zeros(0, np.float32)

    def _lengthen(self, latent: Tensor) -> Tensor:
        """Latents at the convolutions' rate; each step is made of a frame and the one before it."""
        if self._upsample is None:
            return latent
        before, self._latent = self._latent, latent[..., -1:]
        if before is None:
            made: Tensor = self._upsample(latent)
            return made
        longer: Tensor = self._upsample(torch.cat([before, latent], dim=-1))
        return longer[..., longer.shape[-1] // (latent.shape[-1] + 1) :]


def _reach(config: Any) -> int:
    """Steps before its own that a sample of the decoder's convolutions depends on, rounded up."""
    length = 1
    reach: float = config.kernel_size - 1
    for ratio in config.upsampling_ratios:
        reach += 1 / length  # a transposed convolution of two strides' width, cut at the right
        length *= ratio
        dilations = sum(config.dilation_growth_rate**layer for layer in range(config.num_residual_layers))
        reach += dilations * (config.residual_kernel_size - 1) / length
    return int(np.ceil(reach + (config.last_kernel_size - 1) / length))
