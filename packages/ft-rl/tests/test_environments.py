"""Environments of several turns: found, checked, and played to their end."""

from __future__ import annotations

import importlib
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ft_core.errors import ConfigError, DataError, RunError
from ft_core.training import train
from ft_rl.environments import EnvironmentClass, Episode, play, resolve_environment
from ft_rl.episodes import Episodes, bridge
from ft_rl.grpo_trainer import GrpoTrainer
from ft_rl.rollouts import Completion, Sampling

FILE = '''
class Guess:
    """A number to be found in few turns."""

    def reset(self, low, high, number, **row):
        self.number = number
        return f"It is from {low} to {high}."

    def step(self, completion):
        guess = int(completion)
        if guess == self.number:
            return "right", 1.0, True
        return ("higher" if guess < self.number else "lower"), -0.1, False


class Tools:
    """TRL's kind."""

    def reset(self, **row):
        self.found = 0

    def look(self, place: str) -> str:
        """Look somewhere.

        Args:
            place: where to look.
        """
        return place

    def get_reward(self):
        return 1.0


class Silent(Tools):
    def hear(self, place: str) -> str:
        return place

class Untyped(Tools):
    def look(self, place):
        """Look somewhere.

        Args:
            place: where to look.
        """

class NoReset:
    def step(self, completion):
        return None, 0.0, True

class Narrow(Guess):
    def reset(self, low):
        return None

class Deaf(Guess):
    def step(self):
        return None, 0.0, True

class Late(Guess):
    async def step(self, completion):
        return None, 0.0, True

class Empty:
    def reset(self, **row):
        return None

class Needy(Guess):
    def __init__(self, size):
        pass

class Broken(Guess):
    answers = None
    def reset(self, what, **row):
        self.what = what
        return 3 if what == "reset" else None
    def step(self, completion):
        return {"two": (None, 1.0), "text": (3, 1.0, True), "nan": (None, float("nan"), True), "raise": None}[
            self.what if self.what != "raise" else completion
        ]

def function():
    pass
'''


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("worlds.py").write_text(FILE)


def search(conversations: list[list[dict[str, Any]]]) -> list[str]:
    """Halves the interval, as the messages tell it: no state of its own."""
    answers = []
    for messages in conversations:
        low, high = (int(word.strip(".")) for word in messages[0]["content"].split()[-3::2])
        guess = (low + high) // 2
        for message in messages[1:]:
            if message["role"] == "assistant":
                guess = int(message["content"])
            elif message["content"] == "higher":
                low = guess + 1
            else:
                high = guess - 1
            if message["role"] == "user":
                guess = (low + high) // 2
        answers.append(str(guess))
    return answers


def rows(*numbers: int) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    made = [{"low": 1, "high": 100, "number": number, "other": "x"} for number in numbers]
    return [[{"role": "user", "content": "Find it. "}] for _ in numbers], made


def test_episodes_are_played_side_by_side_to_their_own_end() -> None:
    guess = resolve_environment("worlds.py:Guess")
    assert (guess.kind, guess.owns_reward) == ("turns", True)
    asked: list[int] = []

    def answer(conversations: list[list[dict[str, Any]]]) -> list[str]:
        asked.append(len(conversations))
        return search(conversations)

    prompts, made = rows(50, 25, 1, 100)
    episodes = play(guess, prompts, made, answer, max_turns=7)
    assert [len(episode.rewards) for episode in episodes] == [1, 2, 6, 7]
    assert asked == [4, 3, 2, 2, 2, 2, 1]
    assert all(episode.done for episode in episodes)
    assert [episode.reward for episode in episodes] == pytest.approx([1.0, 0.9, 0.5, 0.4])
    assert episodes[0].prompt == [{"role": "user", "content": "Find it. It is from 1 to 100."}]
    assert prompts[0] == [{"role": "user", "content": "Find it. "}]  # as it was
    assert episodes[1].completion == [
        {"role": "assistant", "content": "50"},
        {"role": "user", "content": "lower"},
        {"role": "assistant", "content": "25"},
    ]


def test_one_that_runs_out_of_turns_ends_with_the_models_word() -> None:
    prompts, made = rows(100)
    (episode,) = play(resolve_environment("worlds.py:Guess"), prompts, made, search, max_turns=3)
    assert not episode.done
    assert [message["role"] for message in episode.completion] == [
        "assistant",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert episode.reward == pytest.approx(-0.3)


def test_one_without_room_for_another_turn_ends_with_the_models_word() -> None:
    prompts, made = rows(100, 25)

    def answer(conversations: list[list[dict[str, Any]]]) -> list[str | None]:
        """Of the first row, two turns; of the second as many as it takes."""
        return [
            None if messages[-1]["content"] == "higher" and len(messages) > 4 else said
            for messages, said in zip(conversations, search(conversations), strict=True)
        ]

    long, short = play(resolve_environment("worlds.py:Guess"), prompts, made, answer, max_turns=7)
    assert [message["content"] for message in long.completion] == ["50", "higher", "75"]
    assert long.rewards == [-0.1, -0.1]
    assert not long.done
    assert short.done
    assert short.rewards == [-0.1, 1.0]


class Echo:
    """An engine that says as many of the same word as there is room for, up to three, and ends its turn."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def generate(self, prompts: Any, copies: int, sampling: Sampling, *, step: int) -> list[list[Completion]]:
        self.asked.append((len(prompts), sampling.max_new_tokens))
        ids = [8, 8, 8, 1][: sampling.max_new_tokens]
        return [[Completion(ids, [-1.0] * len(ids))] for _ in prompts]

    def close(self) -> None:
        pass


class Talks:
    """An environment that is never done; it counts the turns that it sees."""

    turns = 0

    def reset(self, **row: Any) -> None:
        return None

    def step(self, completion: str) -> tuple[str, float, bool]:
        Talks.turns += 1
        return "the sun is round", 1.0, False


def test_an_episode_whose_tokens_are_used_up_is_not_played_on(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = len(bridge(tokenizer, "the sun is round", frozenset({1})))
    assert told == 7  # what a turn of the environment's takes between two of four tokens
    for room, own in ((4, [4]), (10, [4]), (11, [4]), (12, [4, 1]), (15, [4, 4]), (26, [4, 4, 4]), (60, [4] * 5)):
        monkeypatch.setattr(Talks, "turns", 0)
        engine = Echo()
        world = EnvironmentClass(Talks, "turns", "Talks", owns_reward=True)
        player = Episodes(world, engine, tokenizer, Sampling(room, stops=frozenset({1})), 5)
        (one,) = player.written([[{"role": "user", "content": "tell me"}]], [{}], step=0)
        assert one.episode is not None
        assert Talks.turns == len(engine.asked) == len(one.episode.rewards) == len(own)
        assert one.mask == [1] * own[0] + [token for n in own[1:] for token in [0] * told + [1] * n]
        assert len(one.ids) == len(one.logprobs) == len(one.mask) <= room
        assert one.episode.completion[-1]["role"] == "assistant"
        assert len(one.episode.completion) == 2 * len(own) - 1
        assert not one.episode.done


def test_a_turn_after_tools_has_the_room_of_its_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own loop cuts further turns to it; an engine of so many tokens, as vLLM is, has to know it before."""
    trl_module = importlib.import_module("trl.trainer.grpo_trainer")
    monkeypatch.setattr(trl_module, "parse_response", lambda tokenizer, ids, **kw: {"role": "assistant", "content": ""})
    asked: list[tuple[list[list[int]], Sampling]] = []

    class Notes(Echo):
        def generate(self, prompts: Any, copies: int, sampling: Sampling, *, step: int) -> list[list[Completion]]:
            asked.append((prompts, sampling))
            return [[Completion([8] * limit, [-1.0] * limit)] for limit in sampling.limits_of(len(prompts))]

    new, told = 12, 4
    trainer: Any = GrpoTrainer.__new__(GrpoTrainer)
    tools: list[dict[str, Any]] = [{"look": lambda: "a tree"}] * 3
    vars(trainer).update(
        engine=Notes(), _sampling=Sampling(new), state=SimpleNamespace(global_step=0), _tokenizer=None,
        accelerator=SimpleNamespace(autocast=nullcontext), max_tool_calling_iterations=1, max_completion_length=new,
        _sync_tool_dicts=tools, _async_tool_dicts=[{}] * 3, use_vllm=False, _is_vlm=False, environment_factories=None,
        tools=list(tools[0].values()), model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=99)),
        _get_tool_suffix_ids=lambda messages: [5] * told,
    )  # fmt: skip
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
    begun, own = [[2] * 9, [2] * 3 + [3], [4]], [1, 3, new - told]  # the last has room for what it is told alone
    _, _, ids, logprobs, calls, failures, _ = trainer._tool_call_loop(
        [[{"role": "user", "content": "look"}] for _ in begun], begun, [[7] * n for n in own],
        [[dict(call)] for _ in own], [[-1.0] * n for n in own], None, None,
    )  # fmt: skip
    assert (calls, failures) == (3, 0)
    ((prompts, sampling),) = asked
    assert prompts == [[*begun[i], *[7] * own[i], *[5] * told] for i in (0, 1)]
    assert sampling.limits == (new - 1 - told, new - 3 - told)
    assert sampling.max_new_tokens == new - 1 - told
    assert [len(each) for each in ids] == [len(each) for each in logprobs] == [new] * 3
    asked.clear()
    trainer._generate_single_turn([[2] * 30], None, {}, 1)  # a first turn, of the next step
    assert [(s.max_new_tokens, s.limits) for _, s in asked] == [(new, ())]


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_an_environment_is_looked_at_before_a_model_is_loaded(
    toy: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    run = importlib.import_module("ft_core.training.run")
    monkeypatch.setattr(run, "prepare_model", lambda *args: pytest.fail("a model was loaded"))
    toy.write_rows(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": "tell me"}]}] * 4)
    values = {"model": str(tiny_model), "method": method, "data": str(tmp_path / "prompts.jsonl")}
    values |= {"output": str(tmp_path / "run"), "max_length": 32}
    for name, said in (
        ("nowhere.py:Guess", "environment: no file nowhere.py"),
        ("worlds.py:Gues", "worlds.py has no 'Gues'; did you mean 'Guess'"),
        ("worlds.py:Deaf", "worlds.py:Deaf.step must take what the model said"),
    ):
        section = {"environment": name, "max_completion_length": 8}
        with pytest.raises(ConfigError, match=re.escape(said)):
            train(values | {method: section}, say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_prompts_without_turns_are_refused_when_the_trainer_is_built(
    toy: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Episodes, "written", lambda *args, **kwargs: pytest.fail("played"))
    prompts = [{"prompt": [{"role": "user", "content": "tell me"}]}, {"prompt": "tell me"}]
    for rows_of in (prompts[1:] * 4, prompts * 2):
        toy.write_rows(tmp_path / "prompts.jsonl", rows_of)
        values = {
            "model": str(tiny_model), "method": "grpo", "data": str(tmp_path / "prompts.jsonl"),
            "output": str(tmp_path / "run"), "max_length": 32, "training": {"max_steps": 1},
            "grpo": {"environment": "worlds.py:Guess", "max_completion_length": 8},
        }  # fmt: skip
        with pytest.raises(
            DataError, match=r"row [12]: grpo\.environment takes turns in conversations: give prompts as"
        ):
            train(values, say=lambda line: None)


def test_every_rows_object_is_its_own() -> None:
    made = [Episode([]) for _ in range(2)]
    made[0].completion.append({})
    assert made[1].completion == []
    prompts, values = rows(10, 90)
    one, other = play(resolve_environment("worlds.py:Guess"), prompts, values, lambda c: ["50"] * len(c), max_turns=2)
    assert one.completion[1]["content"] == "lower"
    assert other.completion[1]["content"] == "higher"


def test_trls_kind() -> None:
    tools = resolve_environment("worlds.py:Tools")
    assert (tools.kind, tools.owns_reward) == ("tools", True)
    assert tools.make().look("here") == "here"
    with pytest.raises(ValueError, match="has no step"):
        play(tools, [], [], search, max_turns=1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("worlds", "grpo.environment: 'worlds' is not allowed (allowed: file.py:Class)"),
        ("nowhere.py:Guess", "grpo.environment: no file nowhere.py, looked for from "),
        ("worlds.py:Gues", "grpo.environment: worlds.py has no 'Gues'; did you mean 'Guess'? (it has: "),
        (
            "worlds.py:function",
            "grpo.environment: worlds.py:function is of type function: give a class with reset and ",
        ),
        ("worlds.py:NoReset", "grpo.environment: worlds.py:NoReset has no method reset(self, **row), with which "),
        (
            "worlds.py:Narrow",
            "grpo.environment: worlds.py:Narrow.reset must take any keyword, since it is handed the row",
        ),
        (
            "worlds.py:Deaf",
            "grpo.environment: worlds.py:Deaf.step must take what the model said: step(self, completion)",
        ),
        ("worlds.py:Late", "grpo.environment: worlds.py:Late.step is a coroutine function: give a plain one"),
        ("worlds.py:Empty", "grpo.environment: worlds.py:Empty has neither a method step(self, completion) nor one "),
        ("worlds.py:Needy", "grpo.environment: worlds.py:Needy() fails: TypeError: "),
        ("worlds.py:Silent", "grpo.environment: worlds.py:Silent.hear has no docstring, by which the model is told "),
        ("worlds.py:Untyped", "grpo.environment: worlds.py:Untyped.look cannot be described to the model: "),
    ],
)
def test_a_class_that_is_no_environment(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_environment(name, "grpo.environment")
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("reset", "reset of row 2 (prompt 'again'): returns 3 (int): text, or None"),
        ("two", "turn 1 of row 2 (prompt 'again'): returns (None, 1.0) (tuple): (text or None, reward, whether"),
        ("text", "turn 1 of row 2 (prompt 'again'): tells 3 (int): text, or None"),
        ("nan", "turn 1 of row 2 (prompt 'again'): gives the reward nan (float): a finite number"),
        ("raise", "turn 1 of row 2 (prompt 'again'): raises KeyError: 'hello'"),
    ],
)
def test_what_an_environment_must_not_do(what: str, said: str) -> None:
    broken = resolve_environment("worlds.py:Broken")
    prompts = [[{"role": "user", "content": "once"}], [{"role": "user", "content": "again"}]]
    fine = EnvironmentClass(lambda: _First(broken.make()), "turns", "worlds.py:Broken", True)
    with pytest.raises(RunError) as caught:
        play(fine, prompts, [{"what": "fine"}, {"what": what}], lambda c: ["hello"] * len(c), max_turns=2)
    assert str(caught.value).startswith(f"environment worlds.py:Broken, {said}")


class _First:
    """Lets the row `fine` pass, so that it is the second that goes wrong."""

    def __init__(self, world: Any) -> None:
        self.world, self.fine = world, False

    def reset(self, what: str, **row: Any) -> Any:
        self.fine = what == "fine"
        return None if self.fine else self.world.reset(what=what, **row)

    def step(self, completion: str) -> Any:
        return (None, 0.0, True) if self.fine else self.world.step(completion)


def test_numbers_that_differ() -> None:
    guess = resolve_environment("worlds.py:Guess")
    prompts, made = rows(1, 2)
    with pytest.raises(ValueError, match="1 prompts, 2 rows"):
        play(guess, prompts[:1], made, search, max_turns=1)
    with pytest.raises(ValueError, match="0 turns"):
        play(guess, prompts, made, search, max_turns=0)
    with pytest.raises(ValueError, match="1 answers to 2 conversations"):
        play(guess, prompts, made, lambda conversations: ["1"], max_turns=1)
