"""Speaks with a language model that writes a codec's tokens: each drawn among those that may stand at its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np

from ft_core.errors import ConfigError, DataError, RunError
from ft_speech.orpheus.loading import FILE, SpeechProcessor, codec_of, settings_of
from ft_speech.orpheus.tokens import prompt_text, words_of
from ft_speech.speaking.drawing import draw

if TYPE_CHECKING:
    import numpy.typing as npt

    from ft_core.models.opening import Target
    from ft_speech.codecs.protocol import Codes

    Samples: TypeAlias = npt.NDArray[np.float32]

__all__ = ["OrpheusSpeaker", "frames"]

PIECE = 0.2
"""Seconds of sound that are decoded at a time, about."""
LESS_MEMORY = "lower --max-seconds, or free memory that other programs hold"


class OrpheusSpeaker:
    """See :class:`ft_speech.speaking.speaker.Speaker`.

    Args:
        model: the language model, adapted or not, in evaluation mode. processor: its tokens and its codec.
    """

    def __init__(self, model: Any, processor: SpeechProcessor) -> None:
        self.model, self.processor = model, processor
        self.sample_rate = int(processor.codec.sample_rate)
        self.cut = False

    @classmethod
    def open(
        cls, target: Target, say: Callable[[str], None] = print, *, codec: str | None, codec_model: str | None
    ) -> Self:
        from ft_core.models.opening import open_target

        told = _told(target)
        name, reference = codec or told.get("codec") or "snac", codec_model or told.get("codec_model")
        if reference is None:
            raise ConfigError(
                f"{target.reference} does not say what codec its tokens are of: give --codec and --codec-model"
            )
        loaded = codec_of(name, reference)  # a codec that isn't there is said before the model is loaded
        model, tokenizer = open_target(target, say=say)
        return cls(model, SpeechProcessor(tokenizer, loaded, name, reference, told.get("prompt")))

    def speak(
        self,
        text: str,
        *,
        voice: str | None = None,
        style: str | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        seed: int = 0,
        max_seconds: float = 30.0,
    ) -> Iterator[Samples]:
        processor, codec = self.processor, self.processor.codec
        row = {"text": text.strip(), "voice": voice, "style": style}
        if not row["text"]:
            raise DataError("the text is empty, so there is nothing to be spoken")
        words = words_of(processor.tokenizer, prompt_text(row, processor.prompt), processor.tokens)
        most = max(1, int(max_seconds * codec.sample_rate / codec.frame_samples))
        stream, waiting = codec.stream(), []
        at_once = max(1, round(PIECE * codec.sample_rate / codec.frame_samples))
        self.cut = True
        for frame in frames(self.model, processor, words, most=most, temperature=temperature, top_p=top_p, seed=seed):
            if frame is None:
                self.cut = False
                break
            waiting.append(frame)
            if len(waiting) == at_once:
                if len(piece := stream.push(np.stack(waiting))):
                    yield piece
                waiting = []
        if waiting and len(piece := stream.push(np.stack(waiting))):
            yield piece
        if len(piece := stream.finish()):
            yield piece


def _told(target: Target) -> dict[str, Any]:
    """What a run's configuration, or the file beside a model's tokenizer, says of the codec and the prompt."""
    if target.run is not None:
        settings = settings_of(target.run.config)
        told = {"codec": settings.codec, "codec_model": settings.codec_model, "prompt": settings.prompt}
        return told | (_file(target.run.adapter / FILE) or _file(target.run.model / FILE))
    assert target.source is not None
    return _file(target.source.path / FILE)


def _file(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {error}") from None
    return values if isinstance(values, dict) else {}


def frames(
    model: Any,
    processor: SpeechProcessor,
    words: list[int],
    *,
    most: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[Codes | None]:
    """The frames of codes ``[places]`` that a model writes, and None where it ends its speech itself.

    Only the tokens of the place at hand may be drawn, and at the first place of a frame the end; so whatever the model
    says is sound of whole frames. The probabilities are computed in float32 on the CPU.

    Args:
        words: the text's tokens. most: frames after which it is cut.

    Raises:
        DataError: the text leaves no room in the model's positions. RunError: the memory is too small.
    """
    import torch

    from ft_core.memory import enough_memory
    from ft_core.models.modes import modes_kept
    from ft_core.prompts import room

    tokens = processor.tokens
    places = len(tokens.layout.sizes)
    prompt = [*tokens.before, *words, *tokens.after]
    left = room(model, len(prompt), most * places + 1, "the text")
    chance = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt], device=model.device)
    cache = None
    frame: list[int] = []
    with modes_kept(model), enough_memory(f"speaking {left} tokens", LESS_MEMORY):
        model.eval()
        for number in range(left):
            with torch.inference_mode():
                made = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = made.past_key_values
                allowed = tokens.place(number % places)
                scores = made.logits[0, -1, allowed.start : allowed.stop].float().cpu()
                if not frame:
                    scores = torch.cat([scores, made.logits[0, -1, tokens.end : tokens.end + 1].float().cpu()])
                drawn = draw(scores, temperature, top_p, chance)
            if not frame and drawn == len(allowed):
                yield None
                return
            if not frame and number == most * places:
                return
            frame.append(drawn)
            if len(frame) == places:
                yield np.array(frame, dtype=np.int64)
                frame = []
            ids = torch.tensor([[allowed[drawn]]], device=model.device)
