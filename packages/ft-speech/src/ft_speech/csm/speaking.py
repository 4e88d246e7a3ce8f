"""Speaks with a CSM: frame by frame, each code drawn among those that its codec has, decoded as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np

from ft_core.errors import ConfigError, DataError
from ft_speech.csm.encoding import Encoder
from ft_speech.csm.loading import check_parts, plain, restore_codec
from ft_speech.csm.turns import read_speakers, speaker_of, text_ids
from ft_speech.speaking.drawing import draw

if TYPE_CHECKING:
    import numpy.typing as npt

    from ft_core.models.opening import Target

    Samples: TypeAlias = npt.NDArray[np.float32]
    Codes: TypeAlias = npt.NDArray[np.int64]

__all__ = ["CsmSpeaker", "frames"]

PIECE = 3
"""Frames that are decoded at a time: a quarter of a second."""
LESS_MEMORY = "lower --max-seconds, or free memory that other programs hold"


class CsmSpeaker:
    """See :class:`ft_speech.speaking.speaker.Speaker`.

    Args:
        model: the CSM, adapted or not. tokenizer: its tokenizer, with the numbers of its speakers.
        trim_silence: below how many dB the ends of a context's recordings are trimmed; None: not.
    """

    def __init__(self, model: Any, tokenizer: Any, trim_silence: float | None = None) -> None:
        from ft_speech.codecs.mimi import Mimi

        own = plain(model)
        self.model, self.tokenizer = model, tokenizer
        self._codec = Mimi(own.codec_model, int(own.config.num_codebooks))
        self.sample_rate = self._codec.sample_rate
        self.cut, self.trim_silence = False, trim_silence

    @classmethod
    def open(
        cls, target: Target, say: Callable[[str], None] = print, *, codec: str | None, codec_model: str | None
    ) -> Self:
        from transformers import CsmForConditionalGeneration

        from ft_core.models.opening import open_target

        if codec is not None or codec_model is not None:
            raise ConfigError(f"{target.reference} is a csm, which has its codec in itself: leave out --codec")
        model, tokenizer = open_target(target, auto=CsmForConditionalGeneration, say=say)
        if target.run is None:  # a run's is loaded so
            assert target.source is not None
            check_parts(model, target.reference)
            restore_codec(model, target.source.path)
        return cls(model, tokenizer)

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
        context: Iterator[Mapping[str, Any]] | tuple[Mapping[str, Any], ...] = (),
    ) -> Iterator[Samples]:
        """As the protocol says; and after ``context``, turns in the form of rows (``text``, ``audio``, ``voice``)."""
        from ft_speech.csm.documents import join, turn

        config = plain(self.model).config
        if not text.strip():
            raise DataError("the text is empty, so there is nothing to be spoken")
        if style:
            raise DataError(f"the style {style!r}: a csm knows no styles, only what the text says")
        audio, speakers = (config.audio_token_id, config.audio_eos_token_id), read_speakers(self.tokenizer)
        encoder, turns = Encoder(self.model, {}, self.trim_silence), []
        for row in context:
            ids = text_ids(row["text"], speaker_of(row.get("voice"), speakers), self.tokenizer, audio)
            codes = encoder.encode(dict(row), encoder.read(dict(row), config.max_position_embeddings).samples)
            turns.append(turn(ids, codes, config, trained=False))
        ids = text_ids(text.strip(), speaker_of(voice, speakers), self.tokenizer, audio)
        prompt = join([*turns, turn(ids, None, config, trained=False)])
        most = max(1, int(max_seconds * self.sample_rate / self._codec.frame_samples))
        stream = self._codec.stream()
        waiting: list[Codes] = []
        self.cut = True
        for frame in frames(self.model, prompt, most=most, temperature=temperature, top_p=top_p, seed=seed):
            if frame is None:
                self.cut = False
                break
            waiting.append(frame)
            if len(waiting) == PIECE:
                yield stream.push(np.stack(waiting))
                waiting = []
        if waiting:
            yield stream.push(np.stack(waiting))
        if len(piece := stream.finish()):
            yield piece


def frames(
    model: Any, prompt: Any, *, most: int, temperature: float, top_p: float, seed: int
) -> Iterator[Codes | None]:
    """The frames of codes ``[codebooks]`` that a model speaks, and None where it ends its speech itself.

    The first code of a frame is the backbone's, the others' are the depth decoder's, each of which sees those before.
    No code is drawn that the codec has not: the models have numbers for padding beside. Probabilities are computed in
    float32 on the CPU.

    Args:
        prompt: a :class:`ft_speech.csm.documents.Document`. most: frames after which the speech is cut.

    Raises:
        DataError: the prompt leaves no room in the model's positions. RunError: the memory is too small.
    """
    import torch
    from transformers import DynamicCache

    from ft_core.memory import enough_memory
    from ft_core.models.modes import modes_kept
    from ft_core.prompts import room
    from ft_speech.csm.collating import CsmCollator, inputs_of

    own = plain(model)
    codebooks, known = int(own.config.num_codebooks), int(own.codec_model.config.codebook_size)
    left = room(own, len(prompt), most, "the text")
    chance = torch.Generator().manual_seed(seed)
    row = {"input_ids": prompt.ids, "kinds": prompt.kinds, "codes": prompt.codes.reshape(-1).tolist()}
    batch = {k: v.to(own.device) for k, v in CsmCollator(0, codebooks, padding_free=False)([row]).items()}
    cache = DynamicCache(config=own.config)

    def drawn(logits: Any) -> int:
        return draw(logits[0, -1, :known].float().cpu(), temperature, top_p, chance)

    with modes_kept(own), enough_memory(f"speaking {left} frames", LESS_MEMORY):
        own.eval()
        embeds = None
        for _ in range(left):
            with torch.inference_mode():
                if embeds is None:
                    embeds = inputs_of(own, batch)["inputs_embeds"]
                states = own.backbone_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
                state = states.last_hidden_state[:, -1]
                frame = [drawn(own.lm_head(state[:, None]))]
                inner, given = DynamicCache(config=own.depth_decoder.config), [0, frame[0]]
                for place in range(1, codebooks):
                    logits = own.depth_decoder(
                        input_ids=torch.tensor([given], device=own.device),
                        backbone_last_hidden_state=state if place == 1 else None,
                        past_key_values=inner,
                        use_cache=True,
                        logits_to_keep=1,
                    ).logits
                    given = [drawn(logits)]
                    frame += given
                codes = torch.tensor([[frame]], device=own.device)
                embeds = own.backbone_model.embed_tokens(codes).to(embeds.dtype)
            if all(code == own.config.codebook_eos_token_id for code in frame):
                yield None
                return
            yield np.array(frame, dtype=np.int64)
