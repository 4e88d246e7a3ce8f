"""Answers from a model: in batches, or one conversation at a time as it is written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["encode_prompt", "generate", "generate_ids", "render_chat", "stop_ids", "stream"]

BATCH_TOKENS = 8192
"""Prompts are batched up to about this many tokens, answer included, padding counted."""


def render_chat(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the model's chat template writes it, ready for the answer.

    Raises:
        DataError: the tokenizer has no chat template, or it refuses these messages (a role it doesn't know).
    """
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template: give plain prompts, or use an instruct model")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's; its errors have no common type
        raise DataError(f"the model's chat template refuses these messages: {error}") from error
    return str(text)


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt that is whole: a rendered conversation, or a text with its beginning-of-sequence token."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the generation configuration and the tokenizer's own."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    known = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        known.append(tokenizer.eos_token_id)
    return known


def _settings(model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float) -> Any:
    from transformers import GenerationConfig

    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(model, tokenizer) or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )


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
) -> list[str]:
    """Answer prompts given as token ids, in batches of similar length padded on the left.

    Args:
        prompts: token ids, a list per prompt.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 takes the likeliest token each time (greedy); above, samples.
        top_p: nucleus sampling's share, with a temperature.
        batch_tokens: the most tokens (prompt and answer, padded) in a batch.
        progress: called with (answered, all).

    Returns:
        The answers in the order of ``prompts``, without special tokens.
    """
    import torch

    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p)
    last = _last_position(model)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    if progress:
        progress(0, len(order))
    try:
        start = 0
        while start < len(order):
            width = len(prompts[order[start]]) + max_new_tokens
            batch = order[start : start + max(1, batch_tokens // width)]
            ids, mask = _left_padded([prompts[i] for i in batch], tokenizer.pad_token_id or 0, model.device)
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=settings, tokenizer=tokenizer, **last
                )
            for i, tokens in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = tokenizer.decode(tokens, skip_special_tokens=True)
            start += len(batch)
            if progress:
                progress(start, len(order))
    finally:
        model.train(was_training)
    return answers


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


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Any, Any]:
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(list(row), dtype=torch.long)
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


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
) -> list[str]:
    """Answer prompts: a string is one user turn where the model has a chat template, else the text to go on from.

    Args:
        prompts: strings, or conversations as lists of ``{"role", "content"}``.
        system: a system message put before each conversation that has none.

    Returns:
        The answers, in order. The other arguments are :func:`generate_ids`'s.
    """
    ids = [encode_prompt(_render(prompt, tokenizer, system), tokenizer) for prompt in prompts]
    return generate_ids(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        progress=progress,
    )


def _render(prompt: str | Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, system: str | None) -> str:
    from ft_core.data import render_prompt

    if isinstance(prompt, str):
        if not tokenizer.chat_template:
            return render_prompt({"text": prompt}, tokenizer)[0]
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = list(prompt)
    if system and not (messages and messages[0].get("role") == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return render_chat(messages, tokenizer)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Generator[str, None, None]:
    """Answer a conversation piece by piece, as the model writes it. Closing the iterator ends the generation."""
    from threading import Event, Thread

    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    stopped = Event()

    class Closed(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            import torch

            return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device, dtype=torch.bool)

    text = _render(messages if tokenizer.chat_template else messages[-1]["content"], tokenizer, None)
    ids, mask = _left_padded([encode_prompt(text, tokenizer)], 0, model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=_settings(model, tokenizer, max_new_tokens, temperature, top_p),
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
        stopped.set()
        thread.join()
    if failed:
        raise failed[0]
