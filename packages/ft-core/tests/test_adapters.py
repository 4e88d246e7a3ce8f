"""What is trained of a model, in which number format, and on how many GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_an_adapter_is_float32_whatever_its_base(ft: Any, configure: Any, tmp_path: Path, quantization: str) -> None:
    """TRL's trainers round the adapter of a quantized model to bfloat16, where small updates are lost."""
    import torch
    from safetensors.torch import load_file

    run = tmp_path / "run"
    assert ft("train", configure(quantization=quantization, training={"max_steps": 2, "save_every": 1})).code == 0
    for folder in (run / "adapter", run / "checkpoints" / "checkpoint-2"):
        assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    state = torch.load(run / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert {s["exp_avg"].dtype for s in state.values()} == {torch.float32}


@pytest.fixture
def mixture(tiny: Path, tmp_path: Path) -> Path:
    """A random mixture of experts, its first layer dense, with the tiny model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path / "mixture"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def test_what_is_trained_of_a_mixture_of_experts_can_be_merged(
    ft: Any, configure: Any, tmp_path: Path, mixture: Path
) -> None:
    """PEFT's own `all-linear` would add adapters to the experts' stacked tensors and to the router."""
    run = tmp_path / "run"
    done = ft("train", configure(model=str(mixture)))
    assert done.code == 0, done.err
    names = ["k_proj", "o_proj", "q_proj", "v_proj"]
    frozen = "the experts of this model stay frozen (adapters on them cannot be merged); trained: "
    assert f"{frozen}{', '.join(names)}\n" in done.err
    settings = read(run / "adapter" / "adapter_config.json")
    assert not settings["target_parameters"]
    assert sorted(settings["target_modules"]) == names
    pytest.importorskip("ft_export", reason="ft-export is not installed")
    done = ft("merge", run)
    assert done.code == 0, done.err


@pytest.mark.parametrize("targets", [["gate", "q_proj"], ["gate_proj", "up_proj", "q_proj"]])
def test_the_experts_of_a_mixture_are_no_targets(
    ft: Any, configure: Any, tmp_path: Path, mixture: Path, targets: list[str]
) -> None:
    done = ft("train", configure(model=str(mixture), lora={"targets": targets}))
    assert done.code == 2
    assert done.message == (
        f"ft train: lora.targets: {', '.join(targets[:-1])} would adapt this model's experts or router, "
        "which cannot be merged again; leave them out"
    )
    assert not (tmp_path / "run").exists()


def test_one_process_trains_on_one_gpu(tiny: Path, tmp_path: Path) -> None:
    """Else transformers would wrap the model in nn.DataParallel and multiply the batch."""
    import transformers

    from ft_core.training.trainer import RunTrainerMixin

    class Trainer(RunTrainerMixin, transformers.Trainer):
        pass

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=3, use_cpu=True, report_to="none"
    )
    arguments._n_gpu = 4  # what it is on a host with four
    assert arguments.train_batch_size == 12
    trainer = Trainer(model=transformers.AutoModelForCausalLM.from_pretrained(tiny), args=arguments)
    assert (trainer._train_batch_size, trainer.args.n_gpu) == (3, 1)
