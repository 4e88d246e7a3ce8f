"""``from_pretrained`` of transformers, its weights streamed to the GPU where this knows how (:mod:`.streaming`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ft_core.models.device import Device
from ft_core.models.source import weight_files
from ft_core.models.streaming import Reader, read_headers

__all__ = ["STREAMED", "from_pretrained"]

STREAMED = ("cuda",)
"""The types of devices to stream to: a CPU computes with the pages of the file itself, without a copy."""

MAPPINGS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
}
"""Where transformers keeps the classes of the auto classes that are used here."""


def from_pretrained(auto: Any, folder: Path, config: Any, device: Device, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model from a folder's safetensors, on a device, as ``auto.from_pretrained`` makes it; and its loading report.

    Args:
        auto: one of transformers' auto classes.
        folder: a checked model folder.
        config: its configuration.
        device: where the whole model goes.
        options: of ``from_pretrained``.

    Raises:
        Exception: whatever transformers raises; ``OSError`` for a file that cannot be read.
    """
    options |= {
        "config": config,
        "device_map": {"": torch.cuda.current_device() if device.type == "cuda" else device.type},
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    known = _class_of(auto, config)
    reader = None if known is None else _reader(folder, config, device)
    if known is None or reader is None:
        model, report = auto.from_pretrained(folder, use_safetensors=True, **options)
        return model, report
    with reader:
        model, report = known.from_pretrained(None, state_dict=reader.slices(), **options)
    _add_what_the_folder_says(model, folder)
    return model, report


def _class_of(auto: Any, config: Any) -> Any:
    """transformers' class for a configuration; None where an auto class does more than look it up."""
    import transformers

    mapping = MAPPINGS.get(auto.__name__)
    known = None if mapping is None else getattr(transformers, mapping).get(type(config), None)
    return known if isinstance(known, type) and getattr(known, "config_class", None) is type(config) else None


def _reader(folder: Path, config: Any, device: Device) -> Reader | None:
    """The folder's weights to be streamed; None where transformers reads something else, or reads it in another way."""
    from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

    if (
        device.type not in STREAMED
        or getattr(config, "quantization_config", None) is not None
        or getattr(config, "transformers_weights", None) is not None
        or bool(getattr(type(config), "extra_files", None))
        or (folder / "adapter_config.json").exists()
        or is_deepspeed_zero3_enabled()
        or is_fsdp_enabled()
    ):
        return None
    # transformers copies on each thread's own current stream; ours are on one only if that is everybody's default.
    if device.type == "cuda" and torch.cuda.current_stream() != torch.cuda.default_stream():
        return None
    entries = read_headers(weight_files(folder, str(folder)))
    if entries is None:
        return None
    where = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else torch.device(device.type)
    return Reader(entries, where)


def _add_what_the_folder_says(model: Any, folder: Path) -> None:
    """What ``from_pretrained`` takes from a folder beside configuration and weights: its name, how to generate."""
    from transformers import GenerationConfig, PreTrainedModel

    model.config.name_or_path = str(folder)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = module.config.name_or_path
    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:  # there is none: it is made from the model's configuration
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
