"""The rewards in TRL's own GRPOTrainer: how it calls them, and what it makes of those that are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ft_rl.rewards import resolve_rewards

JUDGE = """
calls = []

def tone(prompts, completions, completion_ids, answer, **columns):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer)
    calls.append((columns["trainer_state"].global_step, sorted(columns), prompts, answer))
    # Only every other sample of a group can be judged.
    return [float(len(ids)) if i % 2 else float("nan") for i, ids in enumerate(completion_ids)]
"""


@pytest.mark.parametrize("messages", [False, True])
def test_trl_calls_them_and_leaves_out_what_is_skipped(
    toy: Any, tiny_model: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: bool
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(JUDGE)
    lines: list[str] = []
    rewards = resolve_rewards([{"name": "judge.py:tone", "on_error": "skip", "weight": 2.0}], say=lines.append)
    prompts: list[Any] = [f"tell me {word} " for word in ("sun", "cats", "the", "a")]
    if messages:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    data = Dataset.from_dict({"prompt": prompts, "answer": ["w", "x", "y", "z"]})
    torch.manual_seed(0)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        reward_funcs=list(rewards.functions),
        args=GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            max_steps=2,
            logging_steps=1,
            reward_weights=rewards.weights,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    scored: list[dict[str, Any]] = []
    generate = trainer._generate_and_score_completions

    def note(inputs: Any) -> Any:
        scored.append(generate(inputs))
        return scored[-1]

    monkeypatch.setattr(trainer, "_generate_and_score_completions", note)
    trainer.train()

    module = rewards.functions[0].function.__globals__
    steps = [step for step, *_ in module["calls"]]
    assert steps == [0, 1]
    _, names, first, answers = module["calls"][0]
    assert {"trainer_state", "log_metric", "log_extra"} <= set(names)
    assert first[:4] == [first[0]] * 4  # a group is the samples of one prompt
    assert answers == ["wxyz"[prompts.index(prompt)] for prompt in first]
    assert isinstance(first[0], list if messages else str)

    for batch in scored:
        advantages = batch["advantages"].view(2, 4)
        assert torch.equal(advantages[:, ::2], torch.zeros(2, 2))  # not scored: no advantage
        assert torch.allclose(advantages.sum(1), torch.zeros(2), atol=1e-4)  # the baseline is that of the scored
    logs = [row for row in trainer.state.log_history if "rewards/tone/mean" in row]
    assert len(logs) == 2
    assert all(row["rewards/tone/faults"] == 0.5 for row in logs)
    assert all(row["reward"] == pytest.approx(2 * row["rewards/tone/mean"]) for row in logs)
    assert rewards.faults == {"tone": 8}
    assert lines[0].startswith("reward 'tone': sample 1 of 8 (prompt 'tell me ")
    assert lines[-1] == "reward 'tone': 8 of 16 samples so far failed and were skipped"
