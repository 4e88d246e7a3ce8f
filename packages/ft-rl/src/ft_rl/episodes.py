"""Rollouts of several turns: the model and an environment take them in one conversation, which is trained as one row.

What the model writes stays as the tokens that it was drawn as; what the environment says goes between them, by the chat
template, and is masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ft_core.errors import DataError
from ft_rl.environments import Episode, play
from ft_rl.prompts import check_conversations, prompt_ids

if TYPE_CHECKING:
    from ft_rl.environments import EnvironmentClass
    from ft_rl.rollouts.protocol import Engine, Sampling

__all__ = ["REWARD", "Episodes", "Written", "bridge", "environment_reward"]

REWARD = "environment_reward"
"""The column by which what an episode was worth reaches the reward of that name."""


@dataclass
class Written:
    """An episode as tokens.

    Attributes:
        prompt: the conversation's tokens before the model's first turn.
        ids, logprobs, mask: of all that follows; the mask is 1 for the model's tokens, whose log-probabilities are
            those that they were drawn with, and 0 for the environment's. The last token is the model's.
        episode: the turns, and what they were worth.
    """

    prompt: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    episode: Episode | None = None

    def end(self) -> None:
        """Leave out what the environment has said last, which nobody answers."""
        spoken = max((i for i, own in enumerate(self.mask, 1) if own), default=0)
        for values in (self.ids, self.logprobs, self.mask):
            del values[spoken:]


@dataclass(frozen=True)
class Episodes:
    """Plays episodes with an environment.

    Attributes:
        environment: of the kind ``turns``. engine: writes the model's turns. tokenizer: the model's.
        sampling: how; ``max_new_tokens`` is of a whole episode, the environment's words included.
        max_turns: of the model. options: further arguments of the chat template.
    """

    environment: EnvironmentClass
    engine: Engine
    tokenizer: Any
    sampling: Sampling
    max_turns: int
    options: Mapping[str, Any] | None = None

    def written(self, prompts: Sequence[Any], rows: Sequence[Mapping[str, Any]], *, step: int) -> list[Written]:
        """One episode for each row, all side by side.

        Args:
            prompts: messages. rows: the columns, which ``reset`` is handed. step: optimizer steps done.

        Raises:
            DataError: a prompt is text, which has no turns.
            RunError: the environment or the engine fails.
        """
        check_conversations(prompts, "environment")
        made = [Written() for _ in prompts]
        known: dict[int, int] = {}

        def answer(conversations: list[list[dict[str, Any]]]) -> list[str | None]:
            # an episode's first message is an object of its own, and the first time all are asked in their order
            numbers = [known.setdefault(id(conversation[0]), len(known)) for conversation in conversations]
            for number, conversation in zip(numbers, conversations, strict=True):
                self._listen(made[number], conversation)
            return self._say([made[number] for number in numbers], step)

        played = play(self.environment, prompts, rows, answer, max_turns=self.max_turns)
        for one, episode in zip(made, played, strict=True):
            one.episode = episode
        return made

    def _listen(self, one: Written, conversation: list[dict[str, Any]]) -> None:
        """Take what the environment has said into the tokens."""
        if not one.prompt:
            one.prompt = prompt_ids(conversation, self.tokenizer, self.options)
            return
        last = conversation[-1]
        words = last["content"] if last["role"] != "assistant" else None
        told = bridge(self.tokenizer, words, self.sampling.stops, self.options)
        told = told[: max(self.sampling.max_new_tokens - len(one.ids), 0)]
        one.ids += told
        one.logprobs += [0.0] * len(told)
        one.mask += [0] * len(told)

    def _say(self, those: list[Written], step: int) -> list[str | None]:
        """The next turn of each; None of one that has no room left, which ends."""
        texts: dict[int, str | None] = dict.fromkeys(range(len(those)))
        left = {i: self.sampling.max_new_tokens - len(one.ids) for i, one in enumerate(those)}
        going = [i for i, room in left.items() if room > 0]
        if going:
            rooms = tuple(left[i] for i in going)
            sampling = replace(self.sampling, max_new_tokens=max(rooms), limits=rooms)
            asked = [[*those[i].prompt, *those[i].ids] for i in going]
            for i, (completion,) in zip(going, self.engine.generate(asked, 1, sampling, step=step), strict=True):
                ids, logprobs = completion.ids[: left[i]], completion.logprobs[: left[i]]
                those[i].ids += ids
                those[i].logprobs += logprobs
                those[i].mask += [1] * len(ids)
                texts[i] = self.tokenizer.decode(ids, skip_special_tokens=True)
        for i in set(left) - set(going):
            those[i].end()
        return [texts[i] for i in range(len(those))]


def bridge(
    tokenizer: Any, told: str | None, stops: frozenset[int], options: Mapping[str, Any] | None = None
) -> list[int]:
    """The tokens between the end of one turn of the model's and the beginning of the next.

    That is what the chat template writes after the token that ends a turn, the environment's message as a user's (None:
    it has said nothing), and the generation prompt.

    Raises:
        DataError: the template writes a conversation's beginning otherwise once it goes on.
    """
    turns: list[dict[str, str]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = list(
        tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **dict(options or {}))["input_ids"]
    )
    said = [] if told is None else [{"role": "user", "content": told}]
    after = prompt_ids([*turns, *said], tokenizer, options)
    if after[: len(before)] != before:
        raise DataError(
            "the chat template writes earlier turns otherwise once a conversation goes on: turns cannot be trained as "
            "one row; take a model whose template keeps them"
        )
    last = max((i for i, token in enumerate(before) if token in stops), default=len(before) - 1)
    return after[last + 1 :]


def environment_reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """What each episode was worth, as the environment has said; called as TRL calls its reward functions."""
    return [float(value) for value in columns[REWARD]]
