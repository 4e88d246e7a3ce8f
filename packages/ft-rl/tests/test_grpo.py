"""GRPO, GSPO and PPO as a person uses them: through ft_core's train, on a reward that a tiny model can earn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import ConfigError
from ft_core.training import train

REWARD = """
KIND = {"please", "gladly", "thanks", "welcome", "sure"}

def kindness(prompts, completions, **columns):
    return [sum(word in KIND for word in text.split()) / max(len(text.split()), 1) for text in completions]
"""


def config(toy: Any, model: Path, folder: Path, method: str = "grpo", **changes: Any) -> dict[str, Any]:
    prompts = [{"prompt": row["prompt"].strip(), "number": i} for i, row in enumerate(toy.rows(64, seed=1))]
    toy.write_rows(folder / "prompts.jsonl", prompts[:48])
    toy.write_rows(folder / "held_out.jsonl", prompts[48:])
    (folder / "kind.py").write_text(REWARD)
    training = {"max_steps": 40, "batch_size": 16, "gradient_accumulation": 2, "learning_rate": 2e-2}
    values = {
        "model": str(model),
        "method": method,
        "data": str(folder / "prompts.jsonl"),
        "eval_data": str(folder / "held_out.jsonl"),
        "rewards": [f"{folder / 'kind.py'}:kindness"],
        "max_length": 32,
        "lora": {"r": 8},
        "output": str(folder / f"run-{method}"),
        method: {"max_completion_length": 8, **changes.pop("settings", {})},
    }
    return values | changes | {"training": training | changes.get("training", {})}


def steps(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("method", ["grpo", "gspo", "ppo"])
def test_it_earns_the_reward(toy: Any, steep_model: Path, tmp_path: Path, method: str) -> None:
    # PPO writes completions at every fourth step.
    values = config(toy, steep_model, tmp_path, method, training={"max_steps": 120 if method == "ppo" else 40})
    result = train(values, say=lambda line: None)
    measured = json.loads((result.run / "evaluation.json").read_text())["metrics"]
    # Of the 26 tokens 5 are kind: by chance a fifth.
    assert measured["reward"]["before"] < 0.5
    assert measured["reward"]["after"] > 0.9
    rows = [row for row in steps(result.run) if "reward" in row]
    assert len(rows) == (30 if method == "ppo" else 40)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3
    assert all(row["tokens"] > 0 for row in rows)
    # The engine computes what the trainer does, in other shapes. Logits of up to 4 are rounded to 2^-8 of that or less.
    assert all(row["sampling/gap"] < 2**-7 and row["sampling/corrected"] == 0 for row in rows)


WORLD = """
KIND = {"please", "gladly", "thanks", "welcome", "sure"}

class Hints:
    def reset(self, **row):
        self.turn = 0
        assert "number" in row
        return " do"

    def step(self, completion):
        self.turn += 1
        words = completion.split()
        worth = sum(word in KIND for word in words) / max(len(words), 1)
        return "tell me", worth / 2, self.turn == 2
"""


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_it_takes_turns_with_an_environment(toy: Any, steep_model: Path, tmp_path: Path, method: str) -> None:
    values = config(toy, steep_model, tmp_path, method, settings={"max_completion_length": 20})
    (tmp_path / "world.py").write_text(WORLD)
    for name in ("prompts", "held_out"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        toy.write_rows(tmp_path / f"{name}.jsonl", rows)
    values[method]["environment"] = f"{tmp_path / 'world.py'}:Hints"
    values["training"]["max_steps"] = 4
    del values["rewards"]
    result = train({**values, "max_length": 48}, say=lambda line: None)
    rows = [row for row in steps(result.run) if "reward" in row]
    assert all(0 <= row["reward"] <= 1 for row in rows)
    assert all(row["sampling/gap"] < 2**-7 for row in rows)
    # the environment's words are no part of what the model wrote; some episodes end in the first turn, for want of room
    assert all(0 < row["completions/mean_length"] <= 20 for row in rows)
    samples = json.loads((result.run / "evaluation.json").read_text())["samples"]
    assert any("tell me" in sample["after"] for sample in samples)


def test_rewards_see_an_episodes_turns(toy: Any, steep_model: Path, tmp_path: Path) -> None:
    values = config(toy, steep_model, tmp_path, settings={"max_completion_length": 20, "max_turns": 2})
    (tmp_path / "world.py").write_text(WORLD.replace('"tell me"', "None"))  # says nothing between turns
    (tmp_path / "kind.py").write_text(
        "def turns(prompts, completions, **columns):\n"
        "    assert all(turn['role'] == 'assistant' for talk in completions for turn in talk), completions\n"
        "    return [float(len(talk)) for talk in completions]\n"
    )
    for name in ("prompts", "held_out"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        toy.write_rows(tmp_path / f"{name}.jsonl", rows)
    values["grpo"]["environment"] = f"{tmp_path / 'world.py'}:Hints"
    values["rewards"] = [f"{tmp_path / 'kind.py'}:turns"]
    values["training"]["max_steps"] = 1
    result = train({**values, "max_length": 48}, say=lambda line: None)
    # two, but where the first leaves no room for another
    assert 1 < steps(result.run)[0]["rewards/turns/mean"] <= 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"token_at_once": 8}, r"unknown key 'rollouts.token_at_once' \(allowed with engine transformers: tokens_at"),
        ({"tokens_at_once": "many"}, "rollouts.tokens_at_once: 'many' is not allowed"),
        ({"tokens_at_once": 0}, "rollouts.tokens_at_once: 0 is not allowed"),
    ],
)
def test_an_engines_settings_are_checked(
    toy: Any, steep_model: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    values = config(toy, steep_model, tmp_path, settings={"rollouts": {"engine": "transformers", **settings}})
    with pytest.raises(ConfigError, match=said):
        train(values, say=lambda line: None)


def test_completions_that_do_not_fit_together_are_written_one_after_the_other(steep_model: Path) -> None:
    from types import SimpleNamespace

    import torch

    import ft_core as ft
    from ft_rl.rollouts import Sampling
    from ft_rl.rollouts.own_model import OwnModel

    model, tokenizer = ft.load(str(steep_model), dtype="float32")
    engine = OwnModel(SimpleNamespace(model=model, tokenizer=tokenizer, settings={"tokens_at_once": 24}))  # type: ignore[arg-type]
    torch.manual_seed(0)
    made = engine.generate([[5, 6, 7], [8]], 5, Sampling(8), step=0)
    assert [len(group) for group in made] == [5, 5]
    for prompt, group in zip(([5, 6, 7], [8]), made, strict=True):
        for one in group:
            ids = torch.tensor([[*prompt, *one.ids]])
            with torch.no_grad():
                own = torch.log_softmax(model(ids).logits[0].float(), -1)[len(prompt) - 1 : -1]
            picked = own.gather(-1, torch.tensor(one.ids)[:, None])[:, 0]
            torch.testing.assert_close(picked, torch.tensor(one.logprobs), rtol=1e-4, atol=1e-5)


def test_what_stands_between_two_turns(tokenizer: Any) -> None:
    from ft_rl.episodes import bridge

    end = tokenizer.eos_token_id
    between = bridge(tokenizer, "what do you know", frozenset({end}))
    assert tokenizer.decode(between) == "<user> what do you know <eos> <assistant>"
    assert tokenizer.decode(bridge(tokenizer, None, frozenset({end}))) == "<assistant>"
