"""What llama.cpp computes from a GGUF file against what transformers computes from the model it came from.

llama.cpp continues prompts greedily, and transformers, in
fp32, is asked for its log-probabilities along the same tokens. Where llama.cpp took another token than transformers'
likeliest, the two candidates must lie closer in transformers than twice the error measured at all other steps (or than
twice the yardstick below, where that is larger): each of the two may be off by that much. So every token whose best two
candidates are further apart is equal, for each type; how many that leaves is what the type costs.

How large that error may be is measured too. llama.cpp multiplies with the file's rounded weights, and rounds the other
factor of each product in the same way (to F16, or to Q8_0's blocks of 32 with one scale). The same two roundings are
put on transformers' linear layers, and the error that they make, on the same tokens, is the yardstick. What is rounded
besides, to F16 in all types, is the cache and attention: for f16 as much again (measured: 1.3 to 2 times the
yardstick), for q8_0 little (1.0 to 1.2 times). ``FACTORS`` allow about four times what was measured for f16 and three
for q8_0; a conversion that is wrong is off by nats.

In a type of fewer bits (``COARSE``) the weights' rounding alone is off by nats, and would hide a wrong conversion.
There transformers gets the rounded weights first, by llama.cpp's own rounding of its own weights, and llama.cpp has to
be that model: what is left between the two is the rounding of the other factors (measured: 0.7 to 1.4 times the
yardstick, 0.9 to 1.1 on average). What the type itself costs is told beside it, for all types: the distance of
log-probabilities with and without the weights' rounding, and the perplexity of the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.gguf.engine import Continuation, LlamaCpp
from ft_export.gguf.rounding import round_weights, rounded_inputs, rounded_tower
from ft_export.gguf.text_check import shown
from ft_export.gguf.undecided import undecided
from ft_export.logprobs import Difference, all_logprobs, difference, evaluation_error, token_logprobs
from ft_export.seeing import Seen, extended

if TYPE_CHECKING:
    import torch

__all__ = ["FINE", "Comparison", "Prompt", "compare"]

CANDIDATES = 5
FINE = {"f16": (8.0, 6.0), "f32": (8.0, 6.0), "bf16": (4.0, 3.0), "q8_0": (4.0, 3.0)}
"""By type, how many times the yardstick's largest and its mean the error may be."""
COARSE = (4.0, 3.0)
"""The same for all other types, whose yardstick is the rounding of the other factors alone."""


@dataclass(frozen=True)
class Prompt:
    """What a continuation starts from.

    Attributes:
        ids: with what goes with them into transformers, where there are images (:class:`ft_export.seeing.Seen`).
        asked: what llama.cpp is sent in their place, where there are.
    """

    text: str
    ids: tuple[int, ...]
    asked: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Comparison:
    """Greedy continuations in both.

    Attributes:
        tokens: how many tokens llama.cpp chose.
        equal: how many of them are transformers' likeliest too.
        undecided: how many hang on a choice of experts that rounding turns, and were not compared further.
        close: the largest distance (nats) of the two candidates where they differ, 0 if they never do.
        error: llama.cpp's log-probabilities of the likeliest candidates against transformers'.
        yardstick: the error that rounding weights and activations makes in transformers.
        bound_largest, bound_mean: what ``error`` may be.
        cost: log-probabilities of the likeliest candidates with the weights rounded against those without.
        perplexity: of the prompts' own tokens, before and after the weights were rounded.
        answer: llama.cpp's continuation of the first prompt.
        generated: transformers' own continuation of the first prompt.
        answers_equal: whether the two have the same tokens.
    """

    tokens: int
    equal: int
    undecided: int
    close: float
    error: Difference
    yardstick: Difference
    bound_largest: float
    bound_mean: float
    cost: Difference
    perplexity: tuple[float, float]
    answer: str
    generated: str
    answers_equal: bool

    def as_dict(self) -> dict[str, Any]:
        told = {name: getattr(self, name).as_dict() for name in ("error", "yardstick", "cost")}
        return {**self.__dict__, **told, "perplexity": dict(zip(("before", "after"), self.perplexity, strict=True))}


@dataclass
class _Errors:
    """Distances of log-probabilities, with the place of the largest."""

    values: list[float] = field(default_factory=list)
    worst: tuple[float, int, int, int] = (-1.0, 0, 0, 0)

    def add(self, value: float, prompt: int, step: int, token: int) -> None:
        self.values.append(value)
        if not value <= self.worst[0]:
            self.worst = (value, prompt, step, token)

    def summary(self) -> Difference:
        if not self.values:
            return Difference(0.0, 0.0, 0)
        return Difference(self.worst[0], sum(self.values) / len(self.values), len(self.values))


def compare(
    engine: LlamaCpp, model: Any, tokenizer: Any, prompts: Sequence[Prompt], type: str, kinds: Mapping[str, str],
    stops: set[int], count: int,
) -> Comparison:  # fmt: skip
    """Continue ``prompts`` by up to ``count`` tokens in llama.cpp and compare with ``model``.

    Args:
        model: the transformers model in fp32; its weights are rounded in the course of this and stay so.
        type: the GGUF file's type. kinds: its tensors' types by the names of the model's weights.
        stops: the ids that must end a continuation.

    Raises:
        ExportError: a difference past its bound, or a continuation that ends where it should not or does not end where
            it should. Names the prompt and the token.
    """
    continuations = [engine.greedy(prompt.asked or prompt.ids, count, CANDIDATES) for prompt in prompts]
    for number, (prompt, run) in enumerate(zip(prompts, continuations, strict=True), 1):
        if run.read != len(prompt.ids):
            raise ExportError(
                f"llama.cpp reads {run.read} tokens of prompt {number}, which has {len(prompt.ids)} in transformers"
            )

    def measured() -> list[torch.Tensor]:
        return [_along(model, prompt, run) for prompt, run in zip(prompts, continuations, strict=True)]

    continuations = [_before_images(model, *pair) for pair in zip(prompts, continuations, strict=True)]
    is_coarse = type not in FINE
    texts = [prompt.ids for prompt in prompts]
    skipped = undecided(model, type, measured) or [[False] * len(run.tokens) for run in continuations]
    whole, before = measured(), token_logprobs(model, texts)
    generated = [] if is_coarse else _generate(model, prompts[0], stops, count)
    round_weights(model, kinds)
    weighted, after = measured(), token_logprobs(model, texts)
    if is_coarse:
        generated = _generate(model, prompts[0], stops, count)
    with rounded_inputs(model, kinds), rounded_tower(model):
        coarse = measured()
    exact = weighted if is_coarse else whole
    first = continuations[0]
    if isinstance(prompts[0].ids, Seen) and not first.stopped:  # it may have been cut
        generated = generated[: len(first.tokens)]
    if first.stopped and first.tokens[-1] not in stops:
        # llama.cpp ends at every token that looks like an end, transformers at the configured ones
        generated = generated[: len(first.tokens)]

    error, yardstick = _Errors(), _Errors()
    differing: list[tuple[float, int, int, int, int]] = []
    tokens = undecided_differing = 0
    for number, run in enumerate(continuations):
        for step, (token, tops) in enumerate(zip(run.tokens, run.candidates, strict=True)):
            row, near = exact[number][step], coarse[number][step]
            best = int(row.argmax())
            tokens += 1
            if token in stops and not (run.stopped and step == len(run.tokens) - 1):
                raise ExportError(
                    f"llama.cpp goes on after the stop token {shown(tokenizer, token)} (prompt {number + 1})"
                )
            for candidate, value in tops.items():
                yardstick.add(abs(near[candidate].item() - row[candidate].item()), number, step, candidate)
                if token == best and not skipped[number][step]:
                    error.add(abs(value - row[candidate].item()), number, step, candidate)
            if token != best and skipped[number][step]:
                undecided_differing += 1
            elif token != best:
                differing.append((row[best].item() - row[token].item(), number, step, token, best))

    left_out = sum(map(sum, skipped))
    if 2 * left_out > tokens:
        raise ExportError(
            f"{left_out} of {tokens} tokens hang on a choice of experts that rounding turns: too few are left"
        )
    found, coarse_error = error.summary(), yardstick.summary()
    floor = evaluation_error([rows for rows in exact if rows.numel()])
    largest_factor, mean_factor = FINE.get(type, COARSE)
    bound_largest = largest_factor * coarse_error.largest + floor
    bound_mean = mean_factor * coarse_error.mean + floor
    if not (found.largest <= bound_largest and found.mean <= bound_mean):
        value, number, step, token = error.worst
        raise ExportError(
            f"llama.cpp is not the model: at prompt {number + 1}, token {step + 1}, the log-probability of "
            f"{shown(tokenizer, token)} is off by {value:.3g} (bound {bound_largest:.3g}; mean {found.mean:.3g}, "
            f"bound {bound_mean:.3g})"
        )
    for gap, number, step, token, best in differing:
        if not gap <= 2 * max(found.largest, coarse_error.largest):
            raise ExportError(
                f"llama.cpp is not the model: at prompt {number + 1}, token {step + 1}, it says "
                f"{shown(tokenizer, token)} where transformers says {shown(tokenizer, best)}, which is likelier by "
                f"{gap:.3g} nats (measured error {found.largest:.3g})"
            )
    _check_answer(generated, continuations[0], differing, skipped[0], tokenizer)
    return Comparison(
        tokens=tokens,
        equal=tokens - len(differing) - undecided_differing,
        undecided=left_out,
        close=max((gap for gap, *_ in differing), default=0.0),
        error=found,
        yardstick=coarse_error,
        bound_largest=bound_largest,
        bound_mean=bound_mean,
        cost=_cost(whole, weighted),
        perplexity=(_perplexity(before), _perplexity(after)),
        answer=continuations[0].text,
        generated=tokenizer.decode([token for token in generated if token not in stops]),
        answers_equal=list(continuations[0].tokens) == generated,
    )


def _before_images(model: Any, prompt: Prompt, run: Continuation) -> Continuation:
    """A continuation up to where it says the token of an image's pieces, for which transformers wants an image."""
    if not isinstance(prompt.ids, Seen) or model.config.image_token_id not in run.tokens:
        return run
    at = run.tokens.index(model.config.image_token_id)
    return replace(run, tokens=run.tokens[:at], candidates=run.candidates[:at], stopped=False)


def _cost(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """Of each token's likeliest candidates, as llama.cpp names so many of them."""
    places = [rows.topk(min(CANDIDATES, rows.shape[-1])).indices for rows in one]
    pick = [[rows.gather(1, at) for rows, at in zip(side, places, strict=True)] for side in (one, other)]
    return difference(*pick)


def _perplexity(samples: Sequence[torch.Tensor]) -> float:
    """Of all tokens together; NaN where there are none."""
    values = [value for sample in samples for value in sample.tolist()]
    return math.exp(-sum(values) / len(values)) if values else math.nan


def _along(model: Any, prompt: Prompt, run: Continuation) -> torch.Tensor:
    """Log-probabilities from which each token of the continuation was chosen: ``(len(tokens), vocabulary)``."""
    return all_logprobs(model, extended(prompt.ids, run.tokens[:-1]))[len(prompt.ids) - 1 :]


def _generate(model: Any, prompt: Prompt, stops: set[int], count: int) -> list[int]:
    """Transformers' own greedy continuation, token by token with its cache, with the token that ends it."""
    import torch

    chosen: list[int] = []
    if isinstance(prompt.ids, Seen):  # whole each time: a model's own count of positions is not relied on
        ends = {*stops, model.config.image_token_id}
        while len(chosen) < count and (not chosen or chosen[-1] not in ends):
            chosen.append(int(all_logprobs(model, extended(prompt.ids, chosen))[-1].argmax()))
        return chosen[:-1] if chosen and chosen[-1] == model.config.image_token_id else chosen
    ids = torch.tensor([prompt.ids])
    cache = None
    with torch.inference_mode():
        while len(chosen) < count:
            answer = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, token = answer.past_key_values, int(answer.logits[0, -1].argmax())
            chosen.append(token)
            if token in stops:
                break
            ids = torch.tensor([[token]])
    return chosen


def _check_answer(
    generated: list[int],
    run: Continuation,
    differing: Sequence[tuple[float, int, int, int, int]],
    skipped: Sequence[bool],
    tokenizer: Any,
) -> None:
    """The first prompt's answers may part only where the two candidates are too close to call, or experts are."""
    if list(run.tokens) == generated:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(run.tokens, generated, strict=False)) if a != b),
        min(len(run.tokens), len(generated)),
    )
    close = {step for _, number, step, _, _ in differing if number == 0}
    if at < len(run.tokens) and (at in close or skipped[at]):
        return
    raise ExportError(
        f"llama.cpp's answer parts from transformers' at token {at + 1}: {run.text[-60:]!r} against "
        f"{tokenizer.decode(generated)[-60:]!r}"
    )
