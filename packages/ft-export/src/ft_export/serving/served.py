"""Whether a server says what the model says: its greedy tokens and their log-probabilities, against transformers.

What a server answers over HTTP is read by the same model in transformers in fp32 (for compressed weights with
activations rounded as a server rounds them):

- a token's log-probability may be off by four times the largest, and on average by three times the mean, of what
  transformers itself is off in the server's 16-bit type on the same tokens;
- a token may be another than the likeliest only where the two candidates are closer than twice the largest error found;
- an answer ends at a stop token or where it was cut off, and none goes on after one;
- the chat endpoint makes the same tokens of a conversation as the chat template, and its answers are held to the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.errors import ExportError
from ft_export.logprobs import all_logprobs, evaluation_error
from ft_export.progress import Progress, counting, silent
from ft_export.samples import Row, prompt_text, read_rows
from ft_export.serving.engine import Answer, Engine, Server, running

if TYPE_CHECKING:
    import torch

__all__ = ["NOT_RUN", "Question", "Served", "check_served", "questions"]

NEW_TOKENS = 24
PROMPTS = 8
LONGEST = 512
"""Tokens of a prompt; of a longer one the end is taken."""
LARGEST_FACTOR, MEAN_FACTOR, GAP_FACTOR = 4, 3, 2
NOT_RUN = "not run in {}: engine=PROGRAM would start it on these files"


@dataclass(frozen=True)
class Served:
    """What a server said, and how far that is from the model in transformers; log-probabilities in nats.

    Attributes:
        prompts, chats: how many prompts were asked by their tokens, and how many conversations.
        tokens: of all answers.
        equal: how many of them are the likeliest in transformers.
        largest_gap: between the likeliest token's log-probability and the one taken, the largest.
        largest, mean: error of log-probabilities.
        bound_largest, bound_mean: what they may be.
        ended: answers that a stop token ended.
        seconds_to_start, seconds_to_answer: for whom the time is of interest.
    """

    prompts: int
    chats: int
    tokens: int
    equal: int
    largest_gap: float
    largest: float
    mean: float
    bound_largest: float
    bound_mean: float
    ended: int
    seconds_to_start: float
    seconds_to_answer: float

    def told(self, target: str) -> str:
        others = "" if self.equal == self.tokens else f", the others as likely within {self.largest_gap:.2g} nats"
        return (
            f"{target} was started by launch.sh and answered {self.prompts} prompts and {self.chats} chats as "
            f"transformers would: {self.equal} of {self.tokens} greedy tokens equal{others}; log-probabilities off by "
            f"{self.mean:.2e} on average (bound {self.bound_mean:.2e}), {self.largest:.2e} at most (bound "
            f"{self.bound_largest:.2e}); {self.ended} "
            "answers ended at a stop token"
        )

    def as_dict(self, engine: Engine) -> dict[str, Any]:
        return {"engine": engine.target, "args": list(engine.words), **asdict(self)}


@dataclass(frozen=True)
class Question:
    """What a server is asked: the tokens of a prompt, and the conversation that they are, if the whole of it."""

    ids: tuple[int, ...]
    messages: tuple[dict[str, Any], ...] | None


def questions(held_out: Path | None, tokenizer: Any, context: int) -> list[Question]:
    """Up to eight prompts of held-out rows, else of built-in sentences, with room for an answer in the context."""
    room = min(LONGEST, context - min(NEW_TOKENS, context // 2))
    found = []
    for row in read_rows(held_out, PROMPTS):
        text, special = prompt_text(row, tokenizer)
        ids = tokenizer(text, add_special_tokens=not special)["input_ids"]
        messages = _conversation(row) if special and len(ids) <= room else None
        if ids:
            found.append(Question(tuple(ids[-room:]), messages))
    return found


def _conversation(row: Row) -> tuple[dict[str, Any], ...] | None:
    """The messages before the answer, where they are texts alone."""
    messages = list(row.get("messages") or [])
    while len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages.pop()
    plain = all(set(message) == {"role", "content"} and isinstance(message["content"], str) for message in messages)
    return tuple(messages) if messages and plain and not row.get("tools") else None


def check_served(
    engine: Engine,
    folder: Path,
    name: str,
    asked: Sequence[Question],
    stops: Sequence[int],
    context: int,
    dtype: torch.dtype,
    reference: Callable[[], Any],
    progress: Progress = silent,
) -> Served:
    """Start the server on the folder, ask it, end it, and compare.

    Args:
        name: what the server calls the model.
        context: the tokens that a prompt and its answer may have.
        dtype: what the server computes in.
        reference: makes the model that is served, in transformers in fp32; called when the server has ended, so that
            both need not fit into memory.

    Raises:
        ExportError: the server does not come up or answer, changes the folder, or says something else than the model.
    """
    count = min(NEW_TOKENS, context // 2)
    before = _listing(folder)
    began = time.monotonic()
    progress(0, 0, f"starting {engine.target}")
    with running(engine, folder) as server:
        started = time.monotonic()
        pairs, chats = _answers(server, name, asked, count, progress)
        ended = time.monotonic()
    changed = sorted(set(before.items()) ^ set(_listing(folder).items()))
    if changed:
        raise ExportError(f"{engine.target} changed {changed[0][0]} in the folder that it served: nothing was written")
    _check_ends(engine.target, pairs, stops, count)
    progress(0, 0, "loading the model in fp32")
    found = _compare(pairs, reference(), dtype, counting(progress, 2 * len(pairs), "answers read by the model"))
    served = Served(
        prompts=len(asked), chats=chats, ended=sum(answer.tokens[-1] in stops for _, answer in pairs),
        seconds_to_start=round(started - began, 1), seconds_to_answer=round(ended - started, 1), **found,
    )  # fmt: skip
    _check_bounds(engine.target, served)
    return served


def _answers(
    server: Server, name: str, asked: Sequence[Question], count: int, progress: Progress
) -> tuple[list[tuple[tuple[int, ...], Answer]], int]:
    """Each prompt with its answer, and how many of them came from the chat endpoint."""
    conversations = [question for question in asked if question.messages is not None]
    step = counting(progress, len(asked) + len(conversations), f"questions to {server.target}")
    pairs = []
    for question in asked:
        pairs.append((question.ids, server.complete(name, question.ids, count)))
        step()
    for question in conversations:
        answer = server.chat(name, question.messages or (), count)
        if answer.prompt != question.ids:
            apart = _apart(question.ids, answer.prompt or ())
            raise ExportError(f"{server.target} makes other tokens of a conversation than the chat template: {apart}")
        pairs.append((question.ids, answer))
        step()
    return pairs, len(conversations)


def _apart(one: Sequence[int], other: Sequence[int]) -> str:
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{list(other[place : place + 4])} in place of {list(one[place : place + 4])}, from token {place} on"


def _check_ends(target: str, pairs: Sequence[tuple[tuple[int, ...], Answer]], stops: Sequence[int], count: int) -> None:
    for _, answer in pairs:
        if not answer.tokens:
            raise ExportError(f"{target} answers a prompt with no token at all")
        if any(token in stops for token in answer.tokens[:-1]) or len(answer.tokens) > count:
            raise ExportError(f"{target} does not end an answer where it should: {list(answer.tokens)}")
        if len(answer.tokens) < count and answer.tokens[-1] not in stops:
            raise ExportError(f"{target} ends an answer at {answer.tokens[-1]}, which is no stop token")


def _compare(
    pairs: Sequence[tuple[tuple[int, ...], Answer]], exact: Any, dtype: torch.dtype, step: Callable[[], None]
) -> dict[str, Any]:
    import torch

    def read(prompt: Sequence[int], tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """All log-probabilities where the answer's tokens are said, and those of the tokens."""
        rows = all_logprobs(exact, [*prompt, *tokens])[len(prompt) - 1 : -1]
        step()
        return rows, rows.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)

    vocabulary = exact.get_input_embeddings().weight.shape[0]
    gaps, errors, chosen, equal = [], [], [], 0
    for prompt, answer in pairs:
        if not all(0 <= token < vocabulary for token in answer.tokens):
            raise ExportError(f"the server says tokens that the model has not: {list(answer.tokens)}")
        rows, values = read(prompt, answer.tokens)
        gaps.append(rows.max(dim=1).values - values)
        equal += int((rows.argmax(dim=1) == torch.tensor(answer.tokens)).sum())
        errors.append((values - torch.tensor(answer.logprobs)).abs())
        chosen.append(values)
    exact.to(dtype)
    noise = torch.cat(
        [
            (read(prompt, answer.tokens)[1] - values).abs()
            for (prompt, answer), values in zip(pairs, chosen, strict=True)
        ]
    )
    error, floor = torch.cat(errors), evaluation_error(chosen)
    return {
        "tokens": error.numel(),
        "equal": equal,
        "largest_gap": torch.cat(gaps).max().item(),
        "largest": error.max().item(),
        "mean": error.mean().item(),
        "bound_largest": LARGEST_FACTOR * noise.max().item() + floor,
        "bound_mean": MEAN_FACTOR * noise.mean().item() + floor,
    }


def _check_bounds(target: str, served: Served) -> None:
    # written so that what is not a number fails
    if not (served.largest <= served.bound_largest and served.mean <= served.bound_mean):
        raise ExportError(
            f"{target} does not say what the model says: log-probabilities are off by up to {served.largest:.3g} "
            f"(bound {served.bound_largest:.3g}), {served.mean:.3g} on average (bound {served.bound_mean:.3g}); "
            f"{served.equal} of {served.tokens} tokens equal"
        )
    if not served.largest_gap <= GAP_FACTOR * served.largest:
        raise ExportError(
            f"{target} takes a token that is {served.largest_gap:.3g} nats less likely than the likeliest, where its "
            f"log-probabilities are off by {served.largest:.3g} at most"
        )


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file."""
    files = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (said.st_size, said.st_mtime_ns) for name, said in files.items()}
