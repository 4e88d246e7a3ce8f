"""What ft-rl registers."""

from __future__ import annotations

from ft_core.plugins.specs import MethodSpec, RewardSpec, RolloutSpec

__all__ = [
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
]

REWARD = MethodSpec(
    name="reward",
    summary="reward modelling: a score that ranks the chosen answer above the rejected one",
    settings="ft_rl.reward:RewardSettings",
    trainer="ft_rl.reward:build",
    evaluate="ft_rl.reward:evaluate",
    formats=("preference",),
    head="score",
    load="ft_rl.loads:pairs",
)

DPO = MethodSpec(
    name="dpo",
    summary="direct preference optimization: chosen answers likelier than rejected ones, against a reference",
    settings="ft_rl.dpo:DpoSettings",
    trainer="ft_rl.dpo:build",
    evaluate="ft_rl.dpo:evaluate",
    formats=("preference",),
    load="ft_rl.loads:pairs_with_reference",
    check="ft_rl.reference:check_reference",
    inputs=True,
)

ORPO = MethodSpec(
    name="orpo",
    summary="odds ratio preference optimization: fine-tuning and preference in one, without a reference",
    settings="ft_rl.orpo:OrpoSettings",
    trainer="ft_rl.orpo:build",
    evaluate="ft_rl.orpo:evaluate",
    formats=("preference",),
    load="ft_rl.loads:pairs",
)

KTO = MethodSpec(
    name="kto",
    summary="Kahneman-Tversky optimization: answers that are each wanted or not, no pairs needed",
    settings="ft_rl.kto:KtoSettings",
    trainer="ft_rl.kto:build",
    evaluate="ft_rl.kto:evaluate",
    formats=("labelled", "preference"),
    load="ft_rl.loads:answers",
    check="ft_rl.kto:check",
)

GRPO = MethodSpec(
    name="grpo",
    summary="group relative policy optimization: completions better than their group's mean, by your rewards",
    settings="ft_rl.grpo:GrpoSettings",
    trainer="ft_rl.grpo:build",
    evaluate="ft_rl.grpo:evaluate",
    formats=("prompt",),
    rewards=True,
    load="ft_rl.loads:completions",
    check="ft_rl.grpo:check",
    inputs=True,
)

GSPO = MethodSpec(
    name="gspo",
    summary="group sequence policy optimization: GRPO with importance weights of whole sequences",
    settings="ft_rl.grpo:GspoSettings",
    trainer="ft_rl.grpo:build",
    evaluate="ft_rl.grpo:evaluate",
    formats=("prompt",),
    rewards=True,
    load="ft_rl.loads:completions",
    check="ft_rl.grpo:check",
    inputs=True,
)

PPO = MethodSpec(
    name="ppo",
    summary="proximal policy optimization: rewards against values that are learnt with them, held to a reference",
    settings="ft_rl.ppo:PpoSettings",
    trainer="ft_rl.ppo:build",
    evaluate="ft_rl.ppo:evaluate",
    formats=("prompt",),
    rewards=True,
    load="ft_rl.loads:with_values",
    check="ft_rl.ppo:check",
)

TRANSFORMERS = RolloutSpec(
    name="transformers",
    summary="the model that is trained writes, in its own process",
    engine="ft_rl.rollouts.own_model:OwnModel",
    check="ft_rl.rollouts.own_model:check",
)
VLLM = RolloutSpec(
    name="vllm",
    summary="a vLLM server writes, which is handed the adapter after each step",
    engine="ft_rl.rollouts.vllm:Vllm",
    check="ft_rl.rollouts.vllm:check",
)
VLLM_COLOCATE = RolloutSpec(
    name="vllm-colocate",
    summary="vLLM writes in the training's process, asleep while the model is trained",
    engine="ft_rl.rollouts.vllm_colocate:VllmColocate",
    check="ft_rl.rollouts.vllm_colocate:check",
)

EXACT_MATCH = RewardSpec(
    name="exact-match",
    summary="the answer is one of the row's",
    reward="ft_rl.rewards.exact:exact_match",
    settings="ft_rl.rewards.exact:ExactMatchSettings",
)
NUMERIC = RewardSpec(
    name="numeric",
    summary="the answer's number is the row's",
    reward="ft_rl.rewards.numeric:numeric",
    settings="ft_rl.rewards.numeric:NumericSettings",
)
MATH = RewardSpec(
    name="math",
    summary="the answer equals the row's as a formula (math-verify)",
    reward="ft_rl.rewards.symbolic:math_reward",
    settings="ft_rl.rewards.symbolic:MathSettings",
)
REGEX = RewardSpec(
    name="regex",
    summary="a regular expression matches the completion",
    reward="ft_rl.rewards.patterns:regex",
    settings="ft_rl.rewards.patterns:RegexSettings",
)
FORMAT = RewardSpec(
    name="format",
    summary="the completion is made of tags, such as think and answer",
    reward="ft_rl.rewards.patterns:format_reward",
    settings="ft_rl.rewards.patterns:FormatSettings",
)
LENGTH = RewardSpec(
    name="length",
    summary="the completion is near a length, or not beyond one (DAPO)",
    reward="ft_rl.rewards.length:length",
    settings="ft_rl.rewards.length:LengthSettings",
)
JSON_SCHEMA = RewardSpec(
    name="json-schema",
    summary="the completion is JSON that fits a schema (jsonschema)",
    reward="ft_rl.rewards.json_schema:json_schema",
    settings="ft_rl.rewards.json_schema:JsonSchemaSettings",
)
CODE = RewardSpec(
    name="code",
    summary="the completion's Python passes the row's tests, in a sandbox",
    reward="ft_rl.rewards.code:code",
    settings="ft_rl.rewards.code:CodeSettings",
)
REWARD_MODEL = RewardSpec(
    name="reward-model",
    summary="the score of a trained reward model",
    reward="ft_rl.rewards.reward_model:reward_model",
    settings="ft_rl.rewards.reward_model:RewardModelSettings",
)
HTTP = RewardSpec(
    name="http",
    summary="what a server says, at an address of yours",
    reward="ft_rl.rewards.judge:http",
    settings="ft_rl.rewards.judge:HttpSettings",
)
REASONING_GYM = RewardSpec(
    name="reasoning-gym",
    summary="what reasoning-gym's verifier says, in a sandbox",
    reward="ft_rl.rewards.gym:reasoning_gym",
    settings="ft_rl.rewards.gym:ReasoningGymSettings",
)
