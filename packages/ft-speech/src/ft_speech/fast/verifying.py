"""What ``ft verify`` compares of a Whisper: its first layers, on noise that it is to write random tokens of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ft_core.errors import ModelError

if TYPE_CHECKING:
    from ft_core.models import Device, ModelSource

__all__ = ["prepare"]

ROWS = 3


def prepare(
    source: ModelSource, device: Device, *, quantization: str, dtype: str, layers: int, batches: int, tokens: int
) -> tuple[Callable[[bool], Any], list[dict[str, Any]]]:
    """How to load the model, and what to compare it on; see :attr:`ft_core.plugins.ModalitySpec.verify`.

    A batch is three sequences of features of noise ``[3, mels, frames]`` and random tokens, ``tokens`` in all, as far
    as the decoder has places for them; the last one's second half is padding.

    Raises:
        ModelError: the model cannot be loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSpeechSeq2Seq

    from ft_core.models.loading import load_layers

    try:
        config: Any = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    except Exception as error:  # a key missing, or a field that the class refuses
        raise ModelError(f"the model {source.reference} cannot be used: {error}") from error
    length = max(2, min(tokens // ROWS, config.max_target_positions))
    inputs = []
    for seed in range(batches):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(ROWS, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        labels = torch.randint(config.vocab_size, (ROWS, length), generator=generator)
        labels[-1, length // 2 :] = -100
        inputs.append({"input_features": features, "labels": labels})

    def load(exact: bool) -> Any:
        kind = "none" if exact else quantization
        return load_layers(source, device, kind, dtype, layers, AutoModelForSpeechSeq2Seq)

    return load, inputs
