"""What others may import. A change here is a change of the interface, for the changelog."""

from __future__ import annotations

import importlib
import subprocess
import sys

EXPECTED = {
    "ft_rl": ["__version__"],
    "ft_rl.begun_again": ["BegunAgainMixin", "longest_prompts", "made_up"],
    "ft_rl.collating": ["BESIDE", "LabelledCollator", "PairCollator", "padded"],
    "ft_rl.dpo": ["DpoSettings", "build", "evaluate", "margins_of"],
    "ft_rl.environments": ["Environment", "EnvironmentClass", "Episode", "play", "resolve_environment"],
    "ft_rl.episodes": ["Episodes", "REWARD", "Written", "bridge", "environment_reward"],
    "ft_rl.given": ["GivenMixin"],
    "ft_rl.grpo": [
        "GrpoSettings",
        "GspoSettings",
        "WritingSettings",
        "build",
        "check",
        "evaluate",
        "generations_of",
        "scored_by",
    ],
    "ft_rl.grpo_trainer": ["GrpoTrainer", "make_engine"],
    "ft_rl.inputs": [
        "GIVEN",
        "NUMBER",
        "beside_of",
        "check_inputs",
        "first_batch",
        "inputs_of",
        "prepare_inputs",
        "usable_rows",
    ],
    "ft_rl.kto": ["KtoSettings", "build", "check", "evaluate"],
    "ft_rl.likelihoods": ["Likelihoods", "batches_of", "likelihoods"],
    "ft_rl.loads": ["answers", "completions", "pairs", "pairs_with_reference", "with_values"],
    "ft_rl.objectives": [
        "AdaptiveKL",
        "FixedKL",
        "bradley_terry",
        "dpo",
        "flatten",
        "gae",
        "group_advantages",
        "grpo",
        "kl",
        "kto",
        "kto_kl",
        "orpo",
        "overlong_penalty",
        "penalised_rewards",
        "ppo_policy",
        "ppo_value",
        "sampler_weights",
        "sequence_lengths",
        "sequence_sums",
        "unflatten",
        "whiten",
    ],
    "ft_rl.objectives.bradley_terry": ["bradley_terry"],
    "ft_rl.objectives.dpo": ["DPOLoss", "dpo"],
    "ft_rl.objectives.gae": ["gae", "whiten"],
    "ft_rl.objectives.group_advantages": ["RewardScale", "group_advantages"],
    "ft_rl.objectives.grpo": ["GRPOLoss", "ImportanceLevel", "grpo", "overlong_penalty"],
    "ft_rl.objectives.kl": ["KLEstimator", "kl"],
    "ft_rl.objectives.kto": ["KTOLoss", "kto", "kto_kl"],
    "ft_rl.objectives.orpo": ["orpo"],
    "ft_rl.objectives.ppo": ["AdaptiveKL", "FixedKL", "penalised_rewards", "ppo_policy", "ppo_value"],
    "ft_rl.objectives.precision": ["bounded_exp", "widen"],
    "ft_rl.objectives.sampler": ["sampler_weights"],
    "ft_rl.objectives.tokens": ["check_tokens", "flatten", "sequence_lengths", "sequence_sums", "unflatten"],
    "ft_rl.orpo": ["OrpoSettings", "build", "evaluate"],
    "ft_rl.orpo_trainer": ["MetricsMixin", "OrpoTrainer"],
    "ft_rl.pairs": ["Labelled", "Pairs", "content_of", "part_of", "show", "tokenize_labelled", "tokenize_pairs"],
    "ft_rl.plugin": [
        "CODE",
        "DPO",
        "EXACT_MATCH",
        "FORMAT",
        "GRPO",
        "GSPO",
        "HTTP",
        "JSON_SCHEMA",
        "KTO",
        "LENGTH",
        "MATH",
        "NUMERIC",
        "ORPO",
        "PPO",
        "REASONING_GYM",
        "REGEX",
        "REWARD",
        "REWARD_MODEL",
        "TRANSFORMERS",
        "VLLM",
        "VLLM_COLOCATE",
    ],
    "ft_rl.policy": ["PolicyForward", "Scores", "check_layers", "put_head"],
    "ft_rl.ppo": ["PpoSettings", "build", "check", "evaluate"],
    "ft_rl.ppo_trainer": ["PpoTrainer"],
    "ft_rl.preference": ["asked_of", "pair_samples", "pairs_dataset", "samples_of", "say_dropout", "shown", "too_long"],
    "ft_rl.prompting": ["ids_of", "prompts_dataset"],
    "ft_rl.prompts": ["as_completion", "check_conversations", "prompt_ids"],
    "ft_rl.recording": ["RolloutRecords", "shares"],
    "ft_rl.reference": [
        "adapter_off",
        "at_zero",
        "begins_neutral",
        "check_reference",
        "drop_copy",
        "put_switch",
        "take_switch",
    ],
    "ft_rl.reward": ["RewardSettings", "build", "evaluate"],
    "ft_rl.rewards": ["Reward", "Rewards", "resolve_rewards"],
    "ft_rl.rewards.code": ["CodeSettings", "code", "code_in", "share_passed"],
    "ft_rl.rewards.exact": ["ExactMatchSettings", "Gold", "exact_match", "normalise"],
    "ft_rl.rewards.extraction": ["Part", "PartName", "boxed", "extract", "in_tag"],
    "ft_rl.rewards.faults": ["OnError", "Reward"],
    "ft_rl.rewards.guest": ["Guest", "NotShared", "Policy"],
    "ft_rl.rewards.gym": ["ReasoningGymSettings", "reasoning_gym", "verified"],
    "ft_rl.rewards.json_schema": ["JsonSchemaSettings", "json_in", "json_schema"],
    "ft_rl.rewards.judge": ["HttpSettings", "http"],
    "ft_rl.rewards.length": ["LengthSettings", "length", "near_target", "soft_overlong"],
    "ft_rl.rewards.math_worker": ["compare", "is_formula", "main", "read"],
    "ft_rl.rewards.numeric": ["NumericSettings", "last_number", "numeric"],
    "ft_rl.rewards.patterns": ["FormatSettings", "RegexSettings", "format_reward", "regex", "tags_kept"],
    "ft_rl.rewards.resolving": ["Rewards", "load_attribute", "resolve_rewards"],
    "ft_rl.rewards.reward_model": ["RewardModelSettings", "Scorer", "reward_model"],
    "ft_rl.rewards.samples": ["SampleErrors", "Text", "column_of", "score_each", "start_of", "text_of"],
    "ft_rl.rewards.sandbox": ["Limits", "NoIsolation", "Outcome", "check_isolation", "run_python"],
    "ft_rl.rewards.sandbox_child": ["main"],
    "ft_rl.rewards.stored": ["HEAD", "PART", "StoredAdapter", "WEIGHTS", "run_of", "stored_adapter", "why_no_score"],
    "ft_rl.rewards.symbolic": ["Comparer", "MathSettings", "math_reward"],
    "ft_rl.rollouts": ["Completion", "Engine", "Sampling"],
    "ft_rl.rollouts.drawing": ["draw"],
    "ft_rl.rollouts.kept": ["load_kept", "save_kept"],
    "ft_rl.rollouts.own_model": ["OwnModel", "OwnModelSettings", "check"],
    "ft_rl.rollouts.protocol": [
        "Asked",
        "Completion",
        "Engine",
        "EngineJob",
        "Sampling",
        "SeeingEngine",
        "TOKENS_AT_ONCE",
        "checked",
    ],
    "ft_rl.rollouts.vllm": ["Vllm", "check", "start_command"],
    "ft_rl.rollouts.vllm_colocate": ["ColocateSettings", "VllmColocate", "check", "file_name", "merged_parameters"],
    "ft_rl.rollouts.vllm_server": ["Refused", "Server", "VllmSettings", "completions_of"],
    "ft_rl.samples_log": ["SamplesLog", "best_and_worst", "readable"],
    "ft_rl.scoring": ["ScoreForward", "last_tokens", "put_scores", "score_sequences", "scorer_of"],
    "ft_rl.stops": ["stops_of"],
    "ft_rl.trainers": ["PolicyTrainerMixin"],
    "ft_rl.values": ["ADAPTER", "ValueModel"],
    "ft_rl.web": ["bearer", "check_address", "direct"],
}


def test_the_public_names() -> None:
    found = {module: sorted(importlib.import_module(module).__all__) for module in EXPECTED}
    assert found == EXPECTED


def test_every_public_name_is_there() -> None:
    for module, names in EXPECTED.items():
        for name in names:
            assert getattr(sys.modules.get(module) or importlib.import_module(module), name) is not None


def test_checking_a_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, ft_rl, ft_rl.plugin, ft_rl.reward, ft_rl.pairs\n"
        "from ft_core.plugins import RewardSpec, registry, resolve\n"
        "specs = [registry().get(RewardSpec, e.name) for e in registry().entries('ft.rewards') if e.own]\n"
        "assert len([resolve(reference) for spec in specs for reference in (spec.reward, spec.settings)]) >= 22\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'sympy', 'jsonschema', 'reasoning_gym'}\n"
        "print(heavy & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
