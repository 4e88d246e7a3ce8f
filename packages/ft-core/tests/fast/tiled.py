"""Gradients of a tiny model with its layers in tiles, by the kernels: on a CPU under triton's interpreter.

A process of its own: the interpreter has to be on before triton is imported. It prints, in JSON, the largest distance
of a gradient from the untiled one for each choice (its words), and how many products of gate and up a step makes.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from ft_core import fast
from ft_kernels.ops.blocks import mlp_tiles
from ft_kernels.ops.lora import weight_side


def main() -> None:
    weight_side.SMALL = 0
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1)
    model = get_peft_model(Qwen3ForCausalLM(config).to(torch.float16), lora).train()
    path = fast.enable(model)
    path.host.least = 0
    ids = torch.randint(97, (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    counts = {"count": 0}
    project = mlp_tiles._Pass.product

    def counted(self, *given, **settings):  # type: ignore[no-untyped-def]
        counts["count"] += 1
        return project(self, *given, **settings)

    mlp_tiles._Pass.product = counted  # type: ignore[method-assign]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None] + [torch.rand(2)]

    untiled, found = gradients(), {}
    for choice in sys.argv[1:]:
        path.choose(choice)
        path.tile, counts["count"] = 8, 0
        tiled = gradients()
        far = [((one - two).norm() / two.norm()).item() for one, two in zip(tiled, untiled, strict=True)]
        found[choice] = (max(far), counts["count"])
    path.tile = 20
    path.choose("keep")
    found["a tile of all tokens"] = (max((a - b).norm().item() for a, b in zip(gradients(), untiled, strict=True)), 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
