"""Models that listen and models that speak: which transformers class they are, and rows as what they take.

What a proof compares is what a model says of a row's audio, so a row becomes the decoder's tokens beside the features
of its sound (Whisper), tokens with the sound's places among them (Qwen3-ASR), or frames of a codec's codes (CSM). The
codec itself is frozen in training; its tensors are compared bit for bit and not run here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.runs import read_json
from ft_export.samples import Row
from ft_export.sounds import Sound, sound_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "CODEC", "CSM", "FAMILIES", "QWEN_ASR", "WHISPER", "Heard", "Spoken", "feature_extractor", "features_of",
    "heard_rows", "listens", "name_features", "refuse", "speaks", "speech_class", "speech_end",
    "speech_family",
]  # fmt: skip

WHISPER, QWEN_ASR, CSM = "whisper", "qwen3_asr", "csm"
FAMILIES = {
    WHISPER: "AutoModelForSpeechSeq2Seq",
    QWEN_ASR: "AutoModelForSpeechSeq2Seq",
    CSM: "AutoModelForTextToWaveform",
}
"""By ``model_type``, the transformers class that loads a model of speech. Language models that speak are plain ones."""
KINDS = {WHISPER: "a model that listens", QWEN_ASR: "a model that listens", CSM: "a model that speaks"}
ELSEWHERE = {
    WHISPER: "export it to ctranslate2 (for faster-whisper), vllm or hub",
    QWEN_ASR: "transformers loads what ft merge writes, and --to hub pushes it",
    CSM: "transformers loads what ft merge writes, and --to hub pushes it",
}
"""By ``model_type``, where a model goes that a target does not take."""
CODEC = "codec_model."
"""What the names of a codec's tensors begin with, in a model that holds one; a merge leaves them in their own type."""
TEXT_TOKENS = 64
"""Of a row's text, at most."""
FRAMES = 12
"""Of codes, in a sample of a model that speaks."""


class Heard(tuple[int, ...]):
    """Token ids of what was said, and the sound of it, as a model takes both.

    Attributes:
        inputs: by the keyword of the model's forward.
        keyword: that of the ids themselves.
        made: why the sound was made and not the row's own; nothing where it is.
    """

    inputs: dict[str, torch.Tensor]
    keyword: str
    made: str

    def __new__(
        cls, ids: Sequence[int], inputs: Mapping[str, torch.Tensor], keyword: str = "input_ids", made: str = ""
    ) -> Heard:
        new = super().__new__(cls, ids)
        new.inputs, new.keyword, new.made = dict(inputs), keyword, made
        return new


class Spoken(tuple[int, ...]):
    """Token ids of a text, and codes of a codec that follow it.

    Attributes:
        codes: ``[frames, codebooks]``.
    """

    codes: torch.Tensor

    def __new__(cls, ids: Sequence[int], codes: torch.Tensor) -> Spoken:
        new = super().__new__(cls, ids)
        new.codes = codes
        return new

    def read(self, model: Any) -> torch.Tensor:
        """Log-probabilities of all codes, first codebook and depth decoder's, ``[frames * codebooks]``, fp32."""
        import torch

        model = _base(model)
        ids = torch.tensor([list(self)])
        with torch.inference_mode():
            text = model.embed_text_tokens(ids)
            sound = model.backbone_model.embed_tokens(self.codes[None])
            labels = torch.full((1, ids.shape[1] + self.codes.shape[0], self.codes.shape[1]), -100)
            labels[0, ids.shape[1] :] = self.codes
            made = model(inputs_embeds=torch.cat([text, sound], 1), labels=labels, use_cache=False)
        first = torch.log_softmax(made.logits[0, ids.shape[1] - 1 : -1].float(), -1)
        deep = torch.log_softmax(made.depth_decoder_logits.float(), -1)  # [frames, codebooks - 1, vocabulary]
        said = [first.gather(1, self.codes[:, :1]), deep.gather(2, self.codes[:, 1:, None])[..., 0]]
        return torch.cat(said, 1).flatten().cpu()


def speech_family(config: Any) -> str | None:
    """The ``model_type`` of a model of speech's configuration; None for all others."""
    found = getattr(config, "model_type", None)
    return found if found in FAMILIES else None


def listens(config: Any) -> bool:
    """Whether a model writes down what it hears."""
    return speech_family(config) in (WHISPER, QWEN_ASR)


def speaks(config: Any) -> bool:
    """Whether a model makes codes of more than one codebook at a time, which no engine for texts knows."""
    return speech_family(config) == CSM


def speech_class(config: Any) -> Any:
    """The transformers class that loads a model of speech; None for all others."""
    import transformers

    family = speech_family(config)
    return None if family is None else getattr(transformers, FAMILIES[family])


def refuse(config: Any, what: object, target: str) -> None:
    """
    Args:
        config: transformers' configuration. what: the folder, for the message.

    Raises:
        ExportError: it is of a model of speech, which ``target`` does not take; says where it goes.
    """
    family = speech_family(config)
    if family is not None:
        raise ExportError(f"{what} is {KINDS[family]} ({family}), not exported to {target}: {ELSEWHERE[family]}")


def speech_end(tokenizer: Any) -> list[int]:
    """The token that ends the sound of a language model that speaks, by ft-speech's name of it or Orpheus's."""
    known = tokenizer.get_vocab()
    names = (("<|speech_start|>", "<|speech_end|>"), ("<custom_token_10>", "<custom_token_2>"))
    return [known[end] for other, end in names if other in known and end in known][:1]


def feature_extractor(folder: Path) -> Any:
    """What turns samples into features, of a model's folder.

    Raises:
        ExportError: there is none that transformers loads.
    """
    import transformers

    try:
        return transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"{folder} has no feature extractor that transformers loads: {reason}") from error


def name_features(folder: Path) -> None:
    """Give a folder whose processor holds its feature extractor inside, as transformers 5 saves it, its own file of it.

    Engines read ``preprocessor_config.json``; one that is there stays.
    """
    whole, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    if own.is_file() or not whole.is_file():
        return
    inner = read_json(whole).get("feature_extractor")
    if isinstance(inner, dict):
        own.write_text(json.dumps(inner, indent=2) + "\n", encoding="utf-8")


def features_of(extractor: Any, sound: Sound, config: Any) -> dict[str, torch.Tensor]:
    """A sound as a model takes it, by the keyword of its forward.

    Raises:
        ExportError: the feature extractor does not take it.
    """
    is_qwen = speech_family(config) == QWEN_ASR
    made = extractor(
        sound.samples, sampling_rate=extractor.sampling_rate, return_attention_mask=is_qwen, return_tensors="pt"
    )
    found: dict[str, torch.Tensor] = {"input_features": made["input_features"]}
    if is_qwen:
        found["input_features_mask"] = made["attention_mask"]
    return found


def heard_rows(rows: Sequence[Row], tokenizer: Any, folder: Path, model: Any) -> Iterator[Heard | Spoken]:
    """Whole rows, what was said included, as what a model of speech takes.

    Args:
        folder: of the processor. model: the transformers model, or an adapter on it.

    Raises:
        ExportError: the model does not take its feature extractor's features.
    """
    config = _base(model).config
    if speech_family(config) == CSM:
        yield from _spoken(rows, tokenizer, config)
        return
    extractor = feature_extractor(folder)
    for seed, row in enumerate(rows):
        longest = float(getattr(extractor, "chunk_length", 30) or 30)
        sound = sound_of(row, extractor.sampling_rate, min(longest, 30.0), seed)
        inputs = features_of(extractor, sound, config)
        if speech_family(config) == WHISPER:
            yield Heard(_whisper_ids(row, tokenizer, config), inputs, "decoder_input_ids", sound.made)
        else:
            yield Heard(_ids_around(row, tokenizer, config, inputs, model), inputs, made=sound.made)


def _whisper_ids(row: Row, tokenizer: Any, config: Any) -> list[int]:
    """The decoder's: the start, what the tokenizer puts before a text, the text and its end."""
    start = config.decoder_start_token_id
    ids = list(tokenizer(str(row.get("text") or ""))["input_ids"])
    ids = ids if ids[:1] == [start] else [start, *ids]
    return ids[: min(TEXT_TOKENS, config.max_target_positions)]


def _ids_around(row: Row, tokenizer: Any, config: Any, inputs: Mapping[str, torch.Tensor], model: Any) -> list[int]:
    """A place for each of the sound's features, and the text behind them."""
    import torch

    try:
        with torch.inference_mode():
            features = _base(model).get_audio_features(**inputs).pooler_output
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"the model does not take the features that its processor makes: {reason}") from error
    count = features.numel() // features.shape[-1]
    vocabulary = tokenizer.get_vocab()
    begin, end = ([vocabulary[name]] if name in vocabulary else [] for name in ("<|audio_start|>", "<|audio_end|>"))
    words = tokenizer(str(row.get("text") or ""), add_special_tokens=False)["input_ids"][:TEXT_TOKENS]
    return [*begin, *[config.audio_token_id] * count, *end, *words]


def _spoken(rows: Sequence[Row], tokenizer: Any, config: Any) -> Iterator[Spoken]:
    """Texts with codes that are drawn: a codec that rounds would make others of the same sound now and then."""
    import torch

    for seed, row in enumerate(rows):
        words = tokenizer(str(row.get("text") or " "))["input_ids"][:TEXT_TOKENS]
        chance = torch.Generator().manual_seed(seed)
        shape = (FRAMES, config.num_codebooks)
        # the codebook's own codes: those past it are ends and fillings
        most = min(config.vocab_size, getattr(config.codec_config, "codebook_size", config.vocab_size))
        yield Spoken(words, torch.randint(most, shape, generator=chance))


def _base(model: Any) -> Any:
    """The transformers model under an adapter, whose layers stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
