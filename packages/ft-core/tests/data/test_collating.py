"""A document's logits are the same alone, padded and packed; where they aren't, the check says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ft_core.data import Collator, keeps_documents_apart

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_llama(attention: str = "sdpa") -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=211, attn_implementation=attention)
    return LlamaForCausalLM(config).eval()


def features(lengths: list[int], vocabulary: int = 211) -> list[dict[str, list[int]]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": list(row)} for row in rows]


def test_a_padding_free_batch() -> None:
    packed = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, -100, 5], "seq_lengths": [3, 2]}
    batch = Collator(pad_token_id=0)([packed, {"input_ids": [6, 7], "labels": [6, 7]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["use_cache"] is False
    assert set(batch) == {"input_ids", "labels", "position_ids", "use_cache"}
    assert packed["labels"] == [1, 2, 3, -100, 5]


def test_a_padded_batch_has_a_row_for_each_document() -> None:
    packed = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, -100, 5], "seq_lengths": [3, 2]}
    batch = Collator(pad_token_id=9, padding_free=False)([packed])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_lengths_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="documents of 4 tokens"):
        Collator(0)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seq_lengths": [2, 2]}])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_loss_are_those_of_the_documents_alone(attention: str) -> None:
    import torch

    model, rows = tiny_llama(attention), features([5, 17, 1, 9])
    # fp32 sums over at most 96 terms in 2 layers, in another order where the shapes differ
    tolerance = {"rtol": 1e-5, "atol": 96 * torch.finfo(torch.float32).eps}
    with torch.no_grad():
        together = model(**Collator(0)(rows))
        alone = [model(**Collator(0)([row])) for row in rows]
        padded = model(**Collator(0, padding_free=False)(rows))
    torch.testing.assert_close(together.logits[0], torch.cat([one.logits[0] for one in alone]), **tolerance)
    torch.testing.assert_close(together.loss, padded.loss, **tolerance)
    predicted = [len(row["input_ids"]) - 1 for row in rows]
    mean = sum(one.loss * n for one, n in zip(alone, predicted, strict=True) if n) / sum(predicted)
    torch.testing.assert_close(together.loss, mean, **tolerance)


def test_with_a_cache_documents_would_see_each_other() -> None:
    # why the batch says use_cache=False: transformers masks packed documents only without a cache
    import torch

    model, batch = tiny_llama(), Collator(0)(features([12, 12]))
    with torch.no_grad():
        right, wrong = model(**batch).logits, model(**{**batch, "use_cache": True}).logits
    assert (right - wrong)[0, 12:].abs().max() > 0.01 * right.abs().max()


def test_gradients_do_not_cross_documents() -> None:
    import torch

    model, batch = tiny_llama(), Collator(0)(features([6, 8]))
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    batch["labels"][0, :6] = -100
    model(inputs_embeds=embedded, **batch).loss.backward()
    assert torch.equal(embedded.grad[0, :6], torch.zeros_like(embedded.grad[0, :6]))
    assert embedded.grad[0, 6:13].abs().sum(-1).min() > 0


@pytest.mark.parametrize(
    ("family", "apart"),
    [("Llama", True), ("Mixtral", True), ("GPT2", True), ("Qwen3Next", False), ("Mamba", False), ("OPT", False)],
)
def test_which_families_keep_documents_apart(family: str, apart: bool) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, "vocab_size": 211, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "OPT":
        sizes |= {"ffn_dim": 96, "word_embed_proj_dim": 64}
    if family in ("Mixtral", "Qwen3Next"):
        sizes |= {"num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    model.base_model.eval()
    assert keeps_documents_apart(model) is apart
    assert model.training
    assert not model.base_model.training
    assert keeps_documents_apart(model.bfloat16()) is apart


@pytest.mark.slow
def test_smollm2_computes_the_same_packed(smollm2_gguf: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(smollm2_gguf.parent),
        gguf_file=smollm2_gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    assert keeps_documents_apart(model)
    rows = features([40, 25, 60], vocabulary=model.config.vocab_size)
    with torch.no_grad():
        together = model(**Collator(0)(rows)).logits[0].log_softmax(-1)
        alone = torch.cat([model(**Collator(0)([row])).logits[0].log_softmax(-1) for row in rows])
    # 30 layers, 61 sums of up to 1536 fp32 products each, whose errors add up as a random walk at most
    assert (together - alone).abs().max() < alone.abs().max() * (61 * 1536) ** 0.5 * torch.finfo(torch.float32).eps
