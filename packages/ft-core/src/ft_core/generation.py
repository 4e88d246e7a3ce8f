"""Answers from a model: in batches, or one conversation at a time as it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError, RunError
from ft_core.memory import enough_memory
from ft_core.models.modes import modes_kept
from ft_core.prompts import encode_prompt, encode_prompts, render, render_chat, room, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ft_core.fast.decoding import Decoder

__all__ = [
    "encode_prompt",
    "encode_prompts",
    "generate",
    "generate_ids",
    "render_chat",
    "stop_ids",
    "stream",
    "stream_ids",
]

BATCH_TOKENS = 8192
"""Prompts are batched up to about this many tokens, answer included, padding counted."""

Inputs = Callable[[Sequence[int]], Mapping[str, Any]]
"""From the numbers of prompts that are answered together, from 0, to what ``generate`` of the model is handed."""

LESS_MEMORY = "shorten the prompts or the answers (--max-new-tokens), or free memory that other programs hold"


def _settings(tokenizer: Any, stops: list[int], max_new_tokens: int, temperature: float, top_p: float) -> Any:
    from transformers import GenerationConfig

    # top_k 0 is none: transformers would take the likeliest 50 where nothing is said.
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )


@contextmanager
def _no_settings_of_its_own(model: Any) -> Iterator[None]:
    """Take the model's generation configuration away for the time of a call.

    transformers fills from it what a call leaves unset, so that a repetition penalty or a least length in a model's
    generation_config.json would change greedy answers unseen.
    """
    from transformers import GenerationConfig

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    holders = [one for one in (model, plain) if "generation_config" in vars(one)]
    own = [one.generation_config for one in holders]
    try:
        for one in holders:
            one.generation_config = GenerationConfig()
        yield
    finally:
        for one, config in zip(holders, own, strict=True):
            one.generation_config = config


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    fast: bool | None = None,
    inputs: Inputs | None = None,
) -> list[str]:
    """Answer prompts given as token ids, in batches of similar length.

    A model of a known family on a GPU answers by its fast layers (:mod:`ft_core.fast`), any other, or one that has more
    on it than they compute, by transformers' own ``generate``.

    These arguments alone decide; of the model's own generation configuration only the end tokens count.

    Args:
        prompts: token ids, a list per prompt.
        max_new_tokens: the longest answer, in tokens; an answer also ends at the model's last position.
        temperature: 0 takes the likeliest token each time (greedy); above, samples from all tokens.
        top_p: nucleus sampling's share, with a temperature.
        batch_tokens: the most tokens (prompt and answer, padded) in a batch.
        progress: called with (answered, all).
        fast: False never answers by the fast layers; True does so on any device, or refuses.
        inputs: makes a batch of prompts that are more than text: ``input_ids`` and ``attention_mask``, int64 [B, S],
            padded on the left, and whatever else the model takes. transformers answers them then.

    Returns:
        The answers in the order of ``prompts``, without special tokens.

    Raises:
        DataError: a prompt is empty or fills the model's positions, or a number is outside its range.
        RunError: the memory is too small for a batch, or the fast layers were asked for and cannot answer.
    """
    import torch

    _check(max_new_tokens, temperature, top_p)
    stops = stop_ids(model, tokenizer)
    left = [room(model, len(ids), max_new_tokens, f"prompt {number}") for number, ids in enumerate(prompts, 1)]
    last = _last_position(model)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    answers = [""] * len(prompts)
    if progress:
        progress(0, len(order))
    with modes_kept(model):
        model.eval()
        decoder = _decoder(model, fast if inputs is None else False)
        start = 0
        while start < len(order):
            new = left[order[start]]
            batch = order[start : start + max(1, batch_tokens // (len(prompts[order[start]]) + new))]
            batch = [
                i for i in batch if left[i] == new
            ]  # the first ones: where room is short, it grows along the order
            given = [prompts[i] for i in batch]
            longest = len(given[0])
            with enough_memory(f"answering prompts of {longest} tokens with up to {new}", LESS_MEMORY):
                if decoder is not None and _able(decoder, fast, len(given), longest + new):
                    said = decoder.answers(given, new=new, stops=stops, temperature=temperature, top_p=top_p)
                else:
                    asked = _left_padded(given, tokenizer.pad_token_id or 0) if inputs is None else inputs(batch)
                    settings = _settings(tokenizer, stops, new, temperature, top_p)
                    with _no_settings_of_its_own(model), torch.inference_mode():
                        out = model.generate(
                            **_on(model.device, asked), generation_config=settings, tokenizer=tokenizer, **last
                        )
                    said = [
                        list(takewhile(lambda token: token not in stops, tokens))
                        for tokens in out[:, longest:].tolist()
                    ]
            for i, tokens in zip(batch, said, strict=True):
                answers[i] = tokenizer.decode(tokens, skip_special_tokens=True)
            start += len(batch)
            if progress:
                progress(start, len(order))
    return answers


def _decoder(model: Any, fast: bool | None) -> Decoder | None:
    """What answers by the fast layers, or None where transformers does."""
    from ft_core.fast.decoding import decoder_of

    with enough_memory("trying the fast layers", LESS_MEMORY):
        decoder = None if fast is False else decoder_of(model, anywhere=fast is True)
    return decoder if decoder is not None and not _refused(decoder.reason, fast) else None


def _able(decoder: Decoder | None, fast: bool | None, rows: int, slots: int) -> bool:
    """Whether the fast layers write the answers of so many sequences of so many tokens."""
    return decoder is not None and not _refused(decoder.why_not(rows, slots), fast)


def _refused(reason: str | None, fast: bool | None) -> bool:
    if reason is not None and fast:
        raise RunError(f"the fast layers cannot write this model's answers: {reason}")
    return reason is not None


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse what means nothing, whoever would answer."""
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
    if not 0 <= temperature < math.inf:
        raise DataError(f"temperature is {temperature}: give 0 (the likeliest token each time) or more")
    if not 0 < top_p <= 1:
        raise DataError(f"top_p is {top_p}: give a share above 0, up to 1 (all tokens)")


def _last_position(model: Any) -> dict[str, Any]:
    """On a CPU, an argument for ``generate`` that has the head score the last position of a copy instead of a view.

    torch multiplies a view into a batch of sequences by a copy of the head for each: six gigabytes for 100 prompts and
    a head of 56 megabytes.
    """
    import inspect

    import torch

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if model.device.type != "cpu" or "logits_to_keep" not in inspect.signature(plain.forward).parameters:
        return {}
    return {"logits_to_keep": torch.tensor([-1])}


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(list(row), dtype=torch.long)
        mask[i, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _on(device: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) for name, value in inputs.items()}


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[dict[str, str]]],
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    fast: bool | None = None,
) -> list[str]:
    """Answer prompts: a string is one user turn where the model has a chat template, else the text to go on from.

    Args:
        prompts: strings, or conversations as lists of ``{"role", "content"}``.
        system: a system message put before each conversation that has none.

    Returns:
        The answers, in order. The other arguments are :func:`generate_ids`'s.
    """
    return generate_ids(
        model,
        tokenizer,
        encode_prompts(model, tokenizer, prompts, system=system),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        progress=progress,
        fast=fast,
    )


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stopped: Event | None = None,
    fast: bool | None = None,
) -> Generator[str, None, None]:
    """Answer a conversation piece by piece, as the model writes it.

    Setting ``stopped``, from any thread or a signal's handler, ends the answer at the next token; so does closing the
    iterator. Without a chat template the last message alone is the text to go on from. The other arguments are
    :func:`generate_ids`'s.

    Raises:
        DataError: the conversation fills the model's positions, or the chat template refuses it.
        RunError: the memory is too small, or the fast layers were asked for and cannot answer.
    """
    _check(max_new_tokens, temperature, top_p)
    text = render(messages if tokenizer.chat_template else messages[-1]["content"], tokenizer, None)
    yield from stream_ids(
        model,
        tokenizer,
        encode_prompt(text, tokenizer),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stopped=stopped,
        fast=fast,
    )


def stream_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stopped: Event | None = None,
    fast: bool | None = None,
    inputs: Inputs | None = None,
) -> Generator[str, None, None]:
    """As :func:`stream`, of a prompt's token ids; ``inputs`` as for :func:`generate_ids`.

    Raises:
        DataError: the prompt is empty or fills the model's positions.
        RunError: as :func:`stream`.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    _check(max_new_tokens, temperature, top_p)
    ended = Event()

    def over() -> bool:
        return ended.is_set() or (stopped is not None and stopped.is_set())

    class Closed(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), over(), device=input_ids.device, dtype=torch.bool)

    class Streamer(TextIteratorStreamer):
        def put(self, value: Any) -> None:
            """A token that ends the answer may be none that decoding knows as special."""
            if self.next_tokens_are_prompt or int(value.flatten()[-1]) not in stops:
                super().put(value)

    stops = stop_ids(model, tokenizer)
    new = room(model, len(prompt), max_new_tokens, "the conversation")
    settings = _settings(tokenizer, stops, new, temperature, top_p)
    asked = _on(model.device, _left_padded([prompt], 0) if inputs is None else inputs([0]))
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    memory = enough_memory(f"answering {len(prompt)} tokens with up to {new}", LESS_MEMORY)
    failed: list[BaseException] = []
    decoder = _decoder(model, fast if inputs is None else False)

    def write(decoder: Decoder) -> None:
        streamer.put(asked["input_ids"])
        steps = decoder.steps([prompt], new=new, temperature=temperature, top_p=top_p)
        try:
            for tokens in steps:
                streamer.put(torch.tensor(tokens))
                if tokens[0] in stops or over():
                    break
        finally:
            steps.close()
        streamer.end()

    def work() -> None:
        try:
            with memory:
                if decoder is not None and _able(decoder, fast, 1, len(prompt) + new):
                    write(decoder)
                    return
                with _no_settings_of_its_own(model):
                    model.generate(
                        **asked,
                        generation_config=settings,
                        stopping_criteria=StoppingCriteriaList([Closed()]),
                        streamer=streamer,
                    )
        except BaseException as error:  # handed to the caller's thread below
            failed.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        ended.set()
        thread.join()
    if failed:
        raise failed[0]
