"""Tiny random models with a tokenizer trained on the spot, and real PEFT adapters for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog while the sun is shining on the hill.",
    "A model is trained, merged and exported; what was trained is what is served.",
    "In 1969 and 2024 there were 365 or 366 days: 12 months, 52 weeks.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 40))\n",
    "Größe und Maße, façade, naïve; it's what we'll see, WE'LL SEE.",
] * 4

ModelMaker = Callable[..., Path]
AdapterMaker = Callable[..., Path]


def _train_tokenizer(pre_tokenizer: Any, ignore_merges: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def _make_model(
    folder: Path,
    kind: str = "Llama",
    *,
    dtype: str = "bfloat16",
    pre_tokenizer: Any = None,
    ignore_merges: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """A random model of two layers that has opinions: weights large enough for attention and order to matter."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    tokenizer = _train_tokenizer(pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False), ignore_merges)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": 416,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.25,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
            **settings,
        }
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # as initialised they are ones and zeros, which hide mistakes
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _make_adapter(folder: Path, base: Path, *, seed: int = 1, tokenizer: bool = False, **settings: Any) -> Path:
    """A PEFT adapter with random weights on ``base``, saved as PEFT saves it."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            if "magnitude" in name:
                parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    if tokenizer:
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model() -> ModelMaker:
    return _make_model


@pytest.fixture(scope="session")
def make_adapter() -> AdapterMaker:
    return _make_adapter


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 with a head of its own."""
    return _make_model(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run folder as docs/run-folder.md describes it, without a trained model in it."""

    def make(
        name: str = "my run",
        quantization: str = "none",
        run_format: int = 1,
        base: Path | None = None,
        rope: dict[str, Any] | None = None,
    ) -> Path:
        run = tmp_path / name
        run.mkdir()
        known: dict[str, Any] = {"reference": "x", "path": str(base), "name": "x", **(rope or {})}
        environment = {"run_format": run_format, "base_model": known}
        (run / "environment.json").write_text(json.dumps(environment))
        (run / "config.yaml").write_text(f"model: x\nmethod: sft\nquantization: {quantization}\n")
        rows = [
            {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": str(n)}]}
            for n in range(10)
        ]
        (run / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run

    return make


@pytest.fixture
def contents() -> Callable[[Path], list[str]]:
    """The names in a folder, hidden ones too: to see that a failure left nothing."""
    return lambda folder: sorted(path.name for path in folder.iterdir())
