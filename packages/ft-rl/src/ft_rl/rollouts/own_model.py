"""Completions written by the model that is trained, in its own process: the engine ``transformers``.

A prompt is read once for all its completions, and its keys and values are repeated. Completions that have ended leave
the batch, so that the rest goes on faster. On a GPU, models that the fast layers can answer for write by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ft_core.config import TrainConfig
from ft_core.fast.beside import Beside
from ft_core.fast.decoding import Decoder, decoder_of
from ft_core.fast.find import unwrapped
from ft_core.models.modes import modes_kept
from ft_core.training.wrapped import as_loaded
from ft_rl.rollouts.drawing import draw
from ft_rl.rollouts.protocol import TOKENS_AT_ONCE, Asked, Completion, EngineJob, Sampling, checked

__all__ = ["OwnModel", "OwnModelSettings", "check"]

LEAVE = 0.75
"""Rows are dropped once this share of a batch or less is still being written."""


class OwnModelSettings(BaseModel):
    """Settings of ``rollouts: {engine: transformers}``.

    Attributes:
        tokens_at_once: the most tokens, of prompts and completions together, whose keys and values are kept at a time.
    """

    model_config = ConfigDict(extra="forbid")

    tokens_at_once: int = Field(default=TOKENS_AT_ONCE, ge=1)


def check(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    """Refuse wrong settings before anything is loaded.

    Raises:
        ConfigError: one line.
    """
    checked(OwnModelSettings, dict(settings), "transformers")


class OwnModel:
    """See the module."""

    def __init__(self, job: EngineJob) -> None:
        self._model, self._pad = job.model, job.tokenizer.pad_token_id or 0
        self._tokens = checked(OwnModelSettings, job.settings, "transformers").tokens_at_once
        self._anywhere = False  # on a CPU the fast layers' references gain nothing

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        sampling: Sampling,
        *,
        step: int,
        beside: Asked | None = None,
    ) -> list[list[Completion]]:
        """See :class:`ft_rl.rollouts.protocol.Engine`; draws from torch's random numbers."""
        made: list[list[Completion]] = [[] for _ in prompts]
        longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        at_once = max(self._tokens // longest, 1)
        if copies > at_once:  # those of one prompt do not fit together
            for first in range(0, copies, at_once):
                some = self.generate(prompts, min(at_once, copies - first), sampling, step=step, beside=beside)
                made = [[*before, *more] for before, more in zip(made, some, strict=True)]
            return made
        with _answering(self._model), as_loaded(self._model):
            for batch in self._batches([len(prompt) for prompt in prompts], copies, sampling.max_new_tokens):
                ask = None if beside is None else partial(beside, batch)
                written = self._write([prompts[i] for i in batch], copies, sampling, ask)
                for number, own in zip(batch, written, strict=True):
                    made[number] = own
        return made

    def close(self) -> None:
        """Nothing is held between calls."""

    def _batches(self, lengths: Sequence[int], copies: int, new: int) -> Iterator[list[int]]:
        """Positions of prompts of similar length, whose completions fit together."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if batch and (len(batch) + 1) * copies * (lengths[batch[0]] + new) > self._tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _write(self, prompts: list[Sequence[int]], copies: int, sampling: Sampling, ask: Any) -> list[list[Completion]]:
        decoder = self._decoder(sampling) if ask is None else None
        slots = max(map(len, prompts)) + sampling.max_new_tokens
        if decoder is not None and decoder.why_not(len(prompts) * copies, slots) is None:
            rows = _by_fast_layers(decoder, prompts, copies, sampling)
        else:
            batch = _Batch(self._model, prompts, copies, sampling, self._pad, ask)
            while batch.step():
                pass
            rows = [Completion(ids, logprobs) for ids, logprobs in zip(batch.ids, batch.logprobs, strict=True)]
        return [rows[i * copies : (i + 1) * copies] for i in range(len(prompts))]

    def _decoder(self, sampling: Sampling) -> Decoder | None:
        """What writes by the fast layers; None where transformers' own have to. A penalty needs what was written."""
        if sampling.repetition_penalty != 1:
            return None
        decoder = decoder_of(self._model, anywhere=self._anywhere)
        return decoder if decoder is not None and decoder.reason is None else None


def _by_fast_layers(
    decoder: Decoder, prompts: list[Sequence[int]], copies: int, sampling: Sampling
) -> list[Completion]:
    rows: list[Completion] = [Completion([], []) for _ in range(len(prompts) * copies)]
    going = set(range(len(rows)))

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        tokens, logprobs = draw(logits, sampling)
        return tokens, torch.stack([tokens.double(), logprobs.double()])

    steps = decoder.drawn(prompts, choose, new=sampling.max_new_tokens, copies=copies)
    try:
        for tokens, logprobs in steps:
            for row in list(going):
                rows[row].ids.append(int(tokens[row]))
                rows[row].logprobs.append(logprobs[row])
                if rows[row].ids[-1] in sampling.stops:
                    going.remove(row)
            if not going:
                break
    finally:
        steps.close()
    return rows


class _Batch:
    """Completions that are written together.

    Attributes:
        ids, logprobs: of each completion so far.
    """

    def __init__(
        self, model: Any, prompts: list[Sequence[int]], copies: int, sampling: Sampling, pad: int, ask: Any = None
    ) -> None:
        self._model, self._sampling = model, sampling
        self.ids: list[list[int]] = [[] for _ in range(len(prompts) * copies)]
        self.logprobs: list[list[float]] = [[] for _ in self.ids]
        self._rows = list(range(len(self.ids)))  # the completion that each row of the batch writes
        self._going = torch.ones(len(self.ids), dtype=torch.bool)
        device, longest = model.device, max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        beside: Beside | None = None if ask is None else ask(ids.cpu(), mask.cpu())
        more = {"position_ids": positions} if beside is None else beside.padded(positions)
        out = model(input_ids=ids, attention_mask=mask, use_cache=True, **more, **_last(model))
        ahead = None if beside is None else beside.ahead(mask)
        self._ahead: Tensor | None = None if ahead is None else ahead.repeat_interleave(copies, 0)
        self._cache = out.past_key_values
        if copies > 1:
            self._cache.batch_repeat_interleave(copies)
        self._logits: Tensor = out.logits[:, -1].repeat_interleave(copies, 0)
        self._mask: Tensor = mask.repeat_interleave(copies, 0)
        self._position: Tensor = mask.sum(1).repeat_interleave(copies, 0)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros_like(out.logits[:, -1], dtype=torch.int64).scatter_add_(1, ids, mask) > 0
            self._seen = seen.repeat_interleave(copies, 0)

    def step(self) -> bool:
        """Write one token of each completion that has not ended; whether another is wanted."""
        tokens, logprobs = draw(self._logits, self._sampling, self._seen)
        values = torch.stack([tokens.double(), logprobs.double()]).tolist()
        for row, (token, logprob) in enumerate(zip(*values, strict=True)):
            if not self._going[row]:
                continue
            completion = self._rows[row]
            self.ids[completion].append(int(token))
            self.logprobs[completion].append(logprob)
            if int(token) in self._sampling.stops or len(self.ids[completion]) >= self._sampling.max_new_tokens:
                self._going[row] = False
        if not self._going.any():
            return False
        if self._going.float().mean() <= LEAVE:
            tokens = self._leave(tokens)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        out = self._model(
            input_ids=tokens[:, None],
            attention_mask=self._mask,
            position_ids=self._positions(),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._position = self._position + 1
        self._logits, self._cache = out.logits[:, -1], out.past_key_values
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return True

    def _positions(self) -> Tensor:
        """``[B, 1]``, or of a model with coordinates ``[4, B, 1]``: after a prompt all three go on as text does."""
        text = self._position[:, None]
        return text if self._ahead is None else torch.stack([text, *[text + self._ahead[:, None]] * 3])

    def _leave(self, tokens: Tensor) -> Tensor:
        """Go on with those that have not ended."""
        kept = self._going.nonzero()[:, 0].to(tokens.device)
        self._cache.batch_select_indices(kept)
        self._rows = [row for row, going in zip(self._rows, self._going.tolist(), strict=True) if going]
        self._going = torch.ones(len(self._rows), dtype=torch.bool)
        self._mask, self._position = self._mask[kept], self._position[kept]
        self._ahead = None if self._ahead is None else self._ahead[kept]
        if self._seen is not None:
            self._seen = self._seen[kept]
        return tokens[kept]


def _last(model: Any) -> dict[str, int]:
    """The keyword that asks for the last position's logits alone, where the model knows it."""
    import inspect

    known = inspect.signature(unwrapped(model).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """Within it the model is in evaluation mode, without gradients and without checkpointing, which forbids a cache."""
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield
