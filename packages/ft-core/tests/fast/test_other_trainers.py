"""A model on the fast layers is still a plain object: other people's trainers and processes run it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ft_core import fast

WORDS = ["add 1 and 2 is 3", "seven is a number", "add 30 and 14 is 44", "what is it"]


def tiny_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes))
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def test_trl_s_own_trainer(tiny, tmp_path):
    """Its head, our layers; its packing, its data, its saving."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    results = []
    for is_fast in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32),
            LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
        if is_fast:
            fast.enable(model)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(tmp_path / str(is_fast)), max_steps=4, per_device_train_batch_size=2, use_cpu=True,
                bf16=False, learning_rate=1e-2, logging_steps=1, report_to="none", packing=True, max_length=32,
                packing_strategy="bfd", disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, seed=1,
            ),
            train_dataset=Dataset.from_dict({"text": WORDS * 8}),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        results.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        trainer.save_model(str(tmp_path / f"saved-{is_fast}"))
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    again = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32), tmp_path / "saved-True"
    )
    given = tokenizer(WORDS[0], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(again(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)


def test_a_bare_loop_and_gradient_accumulation():
    """Two halves of a batch, each loss divided by the tokens of both, give the gradient of the whole."""
    model = tiny_model().train()
    fast.enable(model)
    ids = torch.randint(400, (4, 10), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :6] = -100
    count = (labels[:, 1:] != -100).sum()
    model(input_ids=ids, labels=labels, num_items_in_batch=count).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        model(input_ids=ids[half], labels=labels[half], num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-7)


def test_neftune_and_trained_embeddings():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                        num_attention_heads=4))  # fmt: skip
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(base, config).train()
    ids = torch.randint(60, (2, 9))

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def noise(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.randn_like(output) * 0.1

    model.get_input_embeddings().register_forward_hook(noise)
    plain = step()
    fast.enable(model)
    for name, gradient in step().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-6)
    assert any("embed_tokens" in name for name in plain)


def _rank(folder: str) -> None:
    import torch.distributed as distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    assert distributed.get_world_size() == 2
    model = tiny_model().train()
    fast.enable(model)
    wrapped = DistributedDataParallel(model)
    ids = _rows()[rank * 2 : rank * 2 + 2]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, f"{folder}/gradients.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def _rows() -> torch.Tensor:
    return torch.randint(400, (4, 10), generator=torch.Generator().manual_seed(5))


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store")
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, run_ranks: Any) -> None:
    """DDP averages over two halves of a batch: equal to the batch in one process."""
    ranks = run_ranks(Path(__file__), "_rank", tmp_path)
    assert [rank.code for rank in ranks] == [0] * 2, ranks
    model = tiny_model().train()
    fast.enable(model)
    ids = _rows()
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_a_copy_of_a_model_is_its_own():
    model = tiny_model().train()
    fast.enable(model)
    other = copy.deepcopy(model)
    assert fast.fast_path_of(other) is not fast.fast_path_of(model)
    ids = _rows()
    before = other(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert other(input_ids=ids, labels=ids).loss == before
    assert model(input_ids=ids, labels=ids).loss != before
    fast.disable(other)
    assert other(input_ids=ids, labels=ids, use_cache=False).loss.item() == pytest.approx(before.item(), rel=1e-5)
    assert not any("forward" in vars(module) for module in other.modules())
    assert fast.fast_path_of(model) is not None
