"""Answers of a model by its fast layers: which sessions there are, and the tokens as they come."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from ft_core.fast.decoding.able import able
from ft_core.fast.decoding.layers import Layers, looks
from ft_core.fast.decoding.sampling import choose
from ft_core.fast.decoding.session import Session, bytes_of
from ft_core.fast.decoding.trial import trial
from ft_core.fast.find import NotFast, unwrapped

__all__ = ["Decoder", "decoder_of", "forget", "rest"]

HANDLE = "_ft_decoder"
AHEAD = 4
"""Steps that are handed to the GPU before a token is read, so that it never waits for the host."""
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From logits to tokens, and what is told of them."""
SHARE = 0.9
"""The share of the free memory that keys and values may take."""


class Decoder:
    """Writes answers of one model.

    Attributes:
        reason: why the model cannot be answered by its fast layers now, or None.
        session: the last one, kept for the next answers that fit into it.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.session: Session | None = None
        self._layers: Layers | None = None
        self._seen: Any = None
        self._problem: str | None = None
        self._busy = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the model makes its own

    def ready(self, model: Any) -> bool:
        """Read the model as it is now; False where only transformers can answer (see ``reason``)."""
        self.reason = None
        plain = unwrapped(model)
        try:
            layout = able(model)
            seen = looks(plain, layout)
            if self._layers is None or seen != self._seen:
                self._layers = self.session = None
                made, tried = Layers(plain, layout), seen == self._seen
                made.refresh()
                if not tried:
                    self._problem = trial(made, model)
                self._layers, self._seen = made, looks(plain, layout)
                if self._problem is not None and not tried:
                    warnings.warn(f"answers are written by transformers' own layers: {self._problem}", stacklevel=2)
            if self._problem is not None:
                self.reason = self._problem
            self._layers.refresh()
        except NotFast as reason:
            self._layers = self.session = None
            self.reason = str(reason)
        return self.reason is None

    def why_not(self, rows: int, slots: int) -> str | None:
        """Why so many sequences of so many tokens cannot be written now, or None."""
        if self._busy.locked():
            return "another answer of this model is being written"
        return None if self._fits(rows, slots) else "their keys and values do not fit into the free memory"

    def _fits(self, rows: int, slots: int) -> bool:
        layers, known = self._layers, self.session
        assert layers is not None
        if layers.device.type != "cuda" or (known is not None and known.rows >= rows and known.slots >= slots):
            return True
        free, _ = torch.cuda.mem_get_info(layers.device)
        free += torch.cuda.memory_reserved(layers.device) - torch.cuda.memory_allocated(layers.device)
        if known is not None:
            free += known.kept.numel() * known.kept.itemsize
        return self._bytes(rows, slots) <= SHARE * free

    def steps(
        self, prompts: Sequence[Sequence[int]], *, new: int, temperature: float = 0.0, top_p: float = 1.0
    ) -> Generator[list[int], None, None]:
        """The tokens that follow prompts, one of each at a time; closing the iterator ends it.

        While another answer of this model is being written it waits (:meth:`why_not` says so before). What follows a
        sequence's end token means nothing: whoever reads closes the iterator when all have ended.

        Args:
            prompts: token ids, none empty.
            new: how many tokens follow each.
            temperature, top_p: as :func:`ft_core.generation.generate_ids` has them.

        Raises:
            ValueError: ``new`` is less than one.
            RuntimeError: :meth:`ready` was not called.
        """
        yield from self.drawn(prompts, lambda logits: (_chosen(logits, temperature, top_p),) * 2, new=new)

    def drawn(
        self, prompts: Sequence[Sequence[int]], draw: Draw, *, new: int, copies: int = 1
    ) -> Generator[Any, None, None]:
        """What ``draw`` tells of each token that follows prompts; as :meth:`steps`, with a way to choose of one's own.

        Args:
            draw: from logits ``[n, V]`` to the tokens, int64 ``[n]``, and a tensor that is sent to the host, which is
                given as ``tolist`` gives it. It may not wait for the device.
            copies: how many sequences follow each prompt, which is read once; n is prompts times copies, and the copies
                of a prompt stand together.

        Raises:
            ValueError: ``new`` is less than one.
            RuntimeError: :meth:`ready` was not called.
        """
        if new < 1:
            raise ValueError(f"max_new_tokens is {new}: it must be greater than 0")
        count = len(prompts) * copies
        self._busy.acquire()
        try:
            session = self._session(count, max(map(len, prompts)) + new)
            tokens, told = draw(session.begin(prompts, copies))
            sent = deque([_Sent(told)])
            for step in range(1, new):
                if len(sent) > (AHEAD if session.recorded else 0):
                    yield sent.popleft().read()
                tokens, told = draw(session.follow(tokens, new - step)[:count])
                sent.append(_Sent(told))
            while sent:
                yield sent.popleft().read()
        finally:
            self._busy.release()

    def rest(self) -> None:
        """Let go of keys, values and weights, unless an answer is being written."""
        if self._busy.acquire(blocking=False):
            self.session = self._layers = None
            self._busy.release()

    def answers(
        self, prompts: Sequence[Sequence[int]], *, new: int, stops: Collection[int], temperature: float, top_p: float
    ) -> list[list[int]]:
        """The tokens that follow each prompt, without the end token and what is behind it."""
        found: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        steps = self.steps(prompts, new=new, temperature=temperature, top_p=top_p)
        try:
            for tokens in steps:
                for row in list(going):
                    if tokens[row] in stops:
                        going.remove(row)
                    else:
                        found[row].append(tokens[row])
                if not going:
                    break
        finally:
            steps.close()
        return found

    def _session(self, rows: int, slots: int) -> Session:
        layers = self._layers
        if layers is None:
            raise RuntimeError("the model was not read: call ready(model) first")
        known = self.session
        if known is None or known.rows < rows or known.slots < slots or known.rows > 2 * _rows(rows):
            self.session = known = None  # its memory is free before the next one's is asked for
            self.session = known = Session(layers, _rows(rows), _slots(slots))
        return known

    def _bytes(self, rows: int, slots: int) -> int:
        layers = self._layers
        assert layers is not None
        return bytes_of(layers.layout, len(layers.layers), _rows(rows), _slots(slots), layers.dtype)


@torch.inference_mode()
def _chosen(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    return choose(logits, temperature, top_p)


class _Sent:
    """Tokens, or what is told of them, on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.tokens = tokens
        if tokens.is_cuda:
            with torch.cuda.device(tokens.device):
                self.tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
                self.tokens.copy_(tokens, non_blocking=True)
                self.event = torch.cuda.Event()
                self.event.record()

    def read(self) -> Any:
        if self.event is not None:
            self.event.synchronize()
        return self.tokens.tolist()


def _rows(rows: int) -> int:
    """Sequences that a session is made for: a power of two up to 8, above a multiple of 8, so that few differ."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


def _slots(slots: int) -> int:
    """Tokens that a session's sequences may have: at most an eighth more than asked for, or a multiple of 256."""
    step = max(256, 1 << max(0, (slots - 1).bit_length() - 3))
    return -(-slots // step) * step


def decoder_of(model: Any, *, anywhere: bool = False) -> Decoder | None:
    """What writes a model's answers by its fast layers, ready for the model as it is now, or with the reason why not.

    Args:
        model: a transformers model, with or without PEFT's wrapping.
        anywhere: on other devices than a GPU too, where it computes the same and is not faster.

    Returns:
        The model's decoder, which cannot write if its ``reason`` is not None; None on another device.
    """
    plain = unwrapped(model)
    if not anywhere and plain.device.type != "cuda":
        return None
    decoder = vars(plain).get(HANDLE)
    if decoder is None:
        decoder = vars(plain)[HANDLE] = Decoder()
    assert isinstance(decoder, Decoder)
    decoder.ready(model)
    return decoder


def forget(model: Any) -> None:
    """Give back what was kept for further answers of a model."""
    vars(unwrapped(model)).pop(HANDLE, None)


def rest(model: Any) -> None:
    """Give back the memory that was kept for further answers of a model; that its layers were tried is remembered."""
    decoder = vars(unwrapped(model)).get(HANDLE)
    if isinstance(decoder, Decoder):
        decoder.rest()
