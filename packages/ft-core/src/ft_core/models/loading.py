"""Loads models and tokenizers: plain transformers objects, in the right number format, on the right device."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ft_core.errors import ConfigError, ModelError, RunError
from ft_core.installing import what_knows
from ft_core.models.device import Device, pick_device
from ft_core.models.positions import check_length, check_scaled, scale
from ft_core.models.savable import make_savable
from ft_core.models.source import ModelSource, find_model, read_ahead

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ft_core.config import RopeScaling, TrainConfig
    from ft_core.runs import Run

__all__ = [
    "Quantization",
    "load",
    "load_base",
    "load_for_training",
    "load_found",
    "load_layers",
    "load_run",
    "load_tokenizer",
]

Quantization = Literal["none", "nf4", "int8"]
DTYPES = ("bfloat16", "float16", "float32")
NO_TEXT = "it is no language model that goes on from a text"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load(
    model: str | Path,
    *,
    quantization: Quantization = "none",
    max_length: int | None = None,
    rope_scaling: str | Mapping[str, Any] | RopeScaling | None = None,
    dtype: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, as transformers' own classes.

    Args:
        model: a folder, a Hub name, a ``.gguf`` file, or ``package:NAME``.
        quantization: ``none``; ``nf4``: 4-bit NormalFloat with double-quantized scales (Dettmers et al. 2023,
            arXiv:2305.14314); ``int8``: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339). Both through bitsandbytes.
        max_length: the longest sequence you mean to use, in tokens; refused where the model has fewer positions.
        rope_scaling: how it gets them nevertheless, as in a configuration: ``"yarn"``, or
            ``{"rope_type": "yarn", "factor": 4.0}``.
        dtype: ``bfloat16``, ``float16`` or ``float32``; unset takes what the hardware computes fast in.

    Returns:
        The model, in evaluation mode, on the best device; and the tokenizer, with a pad token.

    Raises:
        ModelError: the model cannot be found, is damaged, holds pickled weights, or needs code of its own.
        ConfigError: a value is not allowed, or ``rope_scaling`` not for this model and length.
    """
    from ft_core.config.load import read_rope_scaling

    _check("quantization", quantization, get_args(Quantization))
    _check("dtype", dtype, (None, *DTYPES))
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise ConfigError(f"max_length: {max_length!r}: give a whole number of tokens, or None")
    scaling = read_rope_scaling(rope_scaling)
    return load_found(find_model(str(model)), quantization, max_length, dtype, {}, scaling=scaling)


def _check(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: {value!r} (allowed: {', '.join(map(str, allowed))})")


def load_found(
    source: ModelSource,
    quantization: str = "none",
    max_length: int | None = None,
    dtype: str | None = None,
    trained: dict[str, Any] | None = None,
    *,
    scaling: RopeScaling | None = None,
    auto: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """:func:`load` for a model that was found; ``trained`` and ``auto`` as for :func:`_load`."""
    read_ahead(source)
    device = pick_device()
    tokenizer = load_tokenizer(source)
    number = dtype or device.dtype
    loaded = _load(source, device, quantization, number, "language-model", max_length, scaling, trained, auto)
    loaded.eval()
    return loaded, tokenizer


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """A model's tokenizer, given a pad token (the end-of-text token) where it has none.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((source.path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"the model {source.reference} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json raises whatever the parser's language raises
        raise ModelError(f"the tokenizer of {source.reference} cannot be loaded: {_first_sentence(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {source.reference} has neither a pad nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_for_training(
    source: ModelSource, config: TrainConfig, device: Device, head: str = "language-model", auto: Any = None
) -> PreTrainedModel:
    """The model that ``config`` trains: quantized or 16-bit under an adapter, 32-bit weights when trained in full.
    ``auto`` is the auto class of transformers that knows it, where that is not the one for ``head``.

    Full fine-tuning keeps float32 weights and computes in 16 bits under autocast: an update at a usual learning rate is
    smaller than half a bfloat16 step of the weight and would be lost.
    """
    dtype = "float32" if config.lora is None else device.dtype
    trained = None
    if config.lora is not None and not config.lora.dora and config.lora.modules_to_save is None and auto is None:
        trained = config.lora.model_dump(include={"r", "alpha", "dropout", "targets"})
        tokens = config.max_length  # in rows of their own, or packed into one; a few for the trial before
        trained["shapes"] = ((config.training.batch_size, tokens), (1, tokens), (1, 160))
    scaling = config.rope_scaling
    model = _load(source, device, config.quantization, dtype, head, config.max_length, scaling, trained, auto)
    model.config.use_cache = False
    if device.type == "cpu":
        _keep_trainable(model)
    return model


def _keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights of this model for inference.

    On processors with AVX512-BF16 its first forward pass without gradients does so for good, and from then on no
    gradient reaches what lies before the layer: a loss measured before or during training would spoil the training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _load(
    source: ModelSource,
    device: Device,
    quantization: str,
    dtype: str,
    head: str,
    max_length: int | None,
    scaling: RopeScaling | None,
    trained: dict[str, Any] | None = None,
    auto: Any = None,
) -> PreTrainedModel:
    """``trained``: how it will be trained, for :func:`ft_core.fast.compile_ahead`; None if it may not be. ``auto``:
    transformers' auto class, where it is not that of ``head``."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from ft_core.models.pretrained import from_pretrained

    auto = auto or (AutoModelForCausalLM if head == "language-model" else AutoModelForSequenceClassification)
    options: dict[str, Any] = {}
    try:
        config = AutoConfig.from_pretrained(
            source.path, trust_remote_code=False, **({"num_labels": 1} if head == "score" else {})
        )
    except Exception as error:  # an unknown type, a key missing, or a field that the class refuses
        raise ModelError(f"the model {source.reference} cannot be used: {_first_sentence(error)}") from error
    if auto is AutoModelForCausalLM and getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"the model {source.reference} cannot be loaded: {NO_TEXT}")
    if scaling is not None:  # before the model is built: its rotary embedding reads the configuration then
        scale(config, scaling, max_length, source.reference)
    check_length(config, max_length, source.reference)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        options["quantization_config"] = _quantization_config(quantization, dtype)
    elif quantization != "none" and not _is_bitsandbytes(stored, quantization):
        raise ModelError(
            f"the model {source.reference} is already quantized ({_method(stored)}): set quantization to none, "
            "or give the model it was made from"
        )
    if trained is not None and device.type == "cuda" and stored is None and head == "language-model":
        from ft_core import fast

        fast.compile_ahead(config, getattr(torch, dtype), quantization, **trained)
    try:
        model, report = from_pretrained(
            auto,
            source.path,
            config,
            device,
            dtype=getattr(torch, dtype),
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    except torch.OutOfMemoryError as error:
        smaller = "a smaller model" if quantization == "nf4" else "quantization: nf4, or a smaller model"
        raise ModelError(f"the model {source.reference} does not fit in {_room(device)}: try {smaller}") from error
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
        missing = what_knows(config.model_type)
        why = _first_sentence(error) + (f"; {missing} knows it" if missing else "")
        raise ModelError(f"the model {source.reference} cannot be loaded: {why}") from error
    _check_weights(model, report, source, head)
    make_savable(model)
    if scaling is not None:
        check_scaled(model, scaling, source.reference)
    if head == "score" and model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = model.config.get_text_config().eos_token_id
    return model


def _room(device: Device) -> str:
    """The memory that a model was to fit in, for a message."""
    import torch

    share = torch.cuda.get_per_process_memory_fraction() if device.type == "cuda" else 1.0
    if share < 1:
        return f"the {share * device.memory / 2**30:.1f} GiB that memory allows of {device.name}'s"
    return f"{device.memory / 2**30:.0f} GiB of {device.name}"


def load_layers(
    source: ModelSource, device: Device, quantization: str, dtype: str, layers: int, auto: Any = None
) -> PreTrainedModel:
    """A causal language model's first layers with its own embeddings, last norm and head; all, if it has no more.
    ``auto`` is the auto class of transformers that knows it, where that is another: what sees or hears stays whole.

    Raises:
        ModelError: as :func:`load`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ft_core.models.pretrained import from_pretrained

    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        text = config.get_text_config()
        for name in ("num_hidden_layers", "decoder_layers"):  # of an encoder and a decoder the first is the encoder's
            if hasattr(text, name):
                setattr(text, name, min(layers, getattr(text, name)))
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        model, _ = from_pretrained(
            auto or AutoModelForCausalLM,
            source.path,
            config,
            device,
            dtype=getattr(torch, dtype),
            quantization_config=_quantization_config(quantization, dtype),
        )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, AttributeError) as error:
        raise ModelError(f"the model {source.reference} cannot be loaded: {_first_sentence(error)}") from error
    if device.type == "cpu":
        _keep_trainable(model)
    return model


def _check_weights(model: Any, report: dict[str, Any], source: ModelSource, head: str) -> None:
    """Refuse weights that do not fill the model: transformers would go on with random numbers in their places.

    Only a new score head begins with random numbers.
    """
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in report["missing_keys"] if head != "score" or key.startswith(body))
    if missing:
        raise ModelError(
            f"the model {source.reference} lacks {len(missing)} of its weights, {missing[0]} first: "
            "its files are not all there, or are not those of its config.json"
        )
    others = sorted(entry for entry in report["mismatched_keys"] if head != "score" or entry[0].startswith(body))
    if others:
        key, stored, wanted = others[0]
        raise ModelError(
            f"the model {source.reference}: {key} has the shape {list(stored)}, its config.json says {list(wanted)}"
        )


def _quantization_config(quantization: str, dtype: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def _method(stored: Any) -> str:
    values = stored if isinstance(stored, dict) else stored.to_dict()
    return str(values.get("quant_method", "unknown method"))


def _is_bitsandbytes(stored: Any, quantization: str) -> bool:
    values = stored if isinstance(stored, dict) else stored.to_dict()
    return bool(values.get("load_in_4bit" if quantization == "nf4" else "load_in_8bit"))


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return "it needs Python code of its own (auto_map), which ft does not run; take a model that transformers knows"
    if text.startswith("Unrecognized configuration class"):
        return NO_TEXT
    return text if len(text) <= 300 else text[:297] + "…"


def load_base(run: Run, *, say: Callable[[str], None] = print) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A run's base model as it was before training (quantized as it was trained), and the tokenizer."""
    from ft_core.plugins import MethodSpec, registry
    from ft_core.training.modality import of_modality

    config = run.config
    source = find_model(config.model)
    device = pick_device()
    head = registry().get(MethodSpec, config.method).head
    if head == "score":
        from transformers import set_seed

        set_seed(config.training.seed)  # a new head starts from random numbers: the same as when it was trained
    if config.task != "text":
        model = of_modality(config, "load")(source, _as_adapted(config), device, head)
    else:
        length = config.max_length if config.rope_scaling else None
        model = _load(source, device, config.quantization, device.dtype, head, length, config.rope_scaling)
    say(f"{source.name} on {device}")
    return model.eval(), load_tokenizer(source)


def _as_adapted(config: TrainConfig) -> TrainConfig:
    """A configuration by which a modality loads a model in 16 bits: trained in full, it has 32."""
    from ft_core.config import LoraSettings

    return config if config.lora is not None else config.model_copy(update={"lora": LoraSettings()})


def load_run(
    run: Run, *, say: Callable[[str], None] = print, adapter: Path | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """What a run trained: its base model with the adapter (a ``peft.PeftModel``), or its full model; and the tokenizer.

    Args:
        adapter: a checkpoint of the run's, to be put on the base in place of the adapter that the run ended with.

    Raises:
        RunError: the run has neither, because it isn't finished or its files were removed.
    """
    if adapter is not None or run.adapter.is_dir():
        from peft import PeftModel

        folder = run.adapter if adapter is None else adapter
        model, tokenizer = load_base(run, say=say)
        try:
            adapted = PeftModel.from_pretrained(model, folder)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise RunError(f"the adapter {folder} cannot be loaded: {_first_sentence(error)}") from error
        if adapter is None or any((folder / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = load_tokenizer(ModelSource(str(folder), folder, str(folder)))
        return adapted.eval(), tokenizer
    if run.model.is_dir():
        from ft_core.plugins import MethodSpec, registry
        from ft_core.training.modality import of_modality

        source = find_model(str(run.model))
        device = pick_device()
        head = registry().get(MethodSpec, run.config.method).head
        if run.config.task != "text":
            model = of_modality(run.config, "load")(source, _as_adapted(run.config), device, head)
        else:
            model = _load(source, device, "none", device.dtype, head, None, None)  # its own config.json has the scaling
        say(f"{run.path} on {device}")
        return model.eval(), load_tokenizer(source)
    if run.finished:
        raise RunError(f"{run.path} is finished, but its adapter/ or model/ is gone")
    raise RunError(
        f"{run.path} is not finished, it has no adapter/ or model/ yet: "
        + shlex.join(["ft", "train", f"{run.path}/config.yaml", "--resume"])
    )
