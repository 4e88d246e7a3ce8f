"""What ft-core itself registers, the way any other package would."""

from __future__ import annotations

from ft_core.plugins.specs import ArchitectureSpec, CommandSpec, MethodSpec, ModalitySpec

__all__ = [
    "BENCH",
    "CHAT",
    "DOCTOR",
    "EVAL",
    "EXPORT",
    "GENERATE",
    "LLAMA",
    "MISTRAL",
    "MODELS",
    "PLAN",
    "PLUGINS",
    "QWEN2",
    "QWEN3",
    "REPORT",
    "SFT",
    "TEXT",
    "TRAIN",
    "VERIFY",
]

SFT = MethodSpec(
    name="sft",
    summary="supervised fine-tuning on answers, and continued pre-training on plain text",
    settings="ft_core.training.sft:SftSettings",
    trainer="ft_core.training.sft:build",
    evaluate="ft_core.evaluation:evaluate_answers",
    formats=("messages", "prompt-completion", "alpaca", "sharegpt", "text"),
)
TEXT = ModalitySpec(name="text", summary="language models on text", load="ft_core.models:load_for_training")


def _family(name: str, summary: str, module: str) -> ArchitectureSpec:
    describe = f"ft_core.fast.families.{module}:describe_{name}"
    return ArchitectureSpec(name=name, summary=summary, model_types=(name,), describe=describe)


LLAMA = _family("llama", "Llama 2 and 3, SmolLM2 and other models of the type llama", "llama")
MISTRAL = _family("mistral", "Mistral 7B and its relatives, with or without a sliding window", "llama")
QWEN2 = _family("qwen2", "Qwen 2 and 2.5, with biases on q, k and v", "qwen")
QWEN3 = _family("qwen3", "Qwen 3, dense, with norms on each head's queries and keys", "qwen")


def _command(name: str, summary: str) -> CommandSpec:
    return CommandSpec(name=name, summary=summary, module=f"ft_core.commands.{name}")


DOCTOR = _command("doctor", "say what this machine can do, and what is missing")
TRAIN = _command("train", "train from a configuration")
CHAT = _command("chat", "talk to a run or a model")
GENERATE = _command("generate", "answer a prompt, or a file of them")
EVAL = _command("eval", "measure a run on held-out data, before and after")
EXPORT = _command("export", "write a run in the form that an engine serves")
REPORT = _command("report", "write a run's report again")
PLAN = _command("plan", "say whether a configuration fits a GPU, and how fast it trains there")
PLUGINS = _command("plugins", "list plugins, and say which are broken")
BENCH = _command("bench", "time the parts of a configuration's training step")
MODELS = _command("models", "list model families, and what of each runs on the fast layers")
VERIFY = _command("verify", "measure the fast layers and transformers' own against float64")
