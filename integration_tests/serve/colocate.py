"""Train by GRPO with a real vLLM in the training's own process, on a processor, as far as that goes.

Run by the Python of vLLM's environment, with the packages of the shared one (``--packages``) behind its own. The model,
the prompts and the bound are those of ``rollouts.py``; an adapter is trained, and then all weights are.

Two things are not as on a GPU. vLLM cannot sleep on a processor, so it stays awake. And its products there work on
copies of the weights in a form of their own, which weights that come later do not reach: here they are torch's.
"""

from __future__ import annotations

import argparse
import site
import sys
from pathlib import Path
from typing import Any

import rollouts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and the runs")
    parser.add_argument("--packages", type=Path, required=True, help="the folder of the shared environment's packages")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    site.addsitedir(str(args.packages))  # behind vLLM's own; those that are edited in place are found too
    products_of_torch()
    base, temperature = rollouts.make_base(args.work), 0.8
    mean = rollouts.noise(base, temperature)
    print(f"bfloat16 is off by {mean:.3g} nats a token on average", flush=True)
    faults = []
    engine = {"engine": "vllm-colocate", "enable_sleep_mode": False, "max_num_seqs": 8}
    trainings: dict[str, dict[str, Any]] = {"an adapter": {}, "all weights": {"in_full": True, "learning_rate": 1e-4}}
    for what, changes in trainings.items():
        print(f"trained: {what}", flush=True)
        found = rollouts.faults_of(rollouts.trained(args.work, base, engine, temperature, **changes), 3 * mean)
        faults += [f"{what}: {fault}" for fault in found]
    print("\n".join(faults) or "as it should be", flush=True)
    return 1 if faults else 0


def products_of_torch() -> None:
    """Let vLLM's linear layers multiply by the weights that they have."""
    import torch
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain


if __name__ == "__main__":
    sys.exit(main())
