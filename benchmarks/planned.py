"""The table of docs/long-context.md, from the planner: python benchmarks/planned.py

For models of four sizes under LoRA r=16 on nf4 weights, the longest single row that fits each card, and its speed. The
model folders are made in a temporary folder and hold a config.json each; nothing is loaded, and no GPU is needed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ft_core.config.load import check_config
from ft_core.models.source import ModelSource
from ft_core.planning import find_card, plan
from ft_core.planning.engine import with_length

CARDS = (
    "RTX 4060 Ti 8GB", "RTX 3080", "RTX 3060", "RTX 4080", "RTX 4090", "RTX 5090", "A100 40GB", "L40S", "H100 80GB",
    "H200",
)  # fmt: skip
MODELS = {  # hidden, inner, layers, heads, keys' heads, vocabulary
    "8B": ("llama", 4096, 14336, 32, 32, 8, 128256),
    "14B": ("qwen2", 5120, 13824, 48, 40, 8, 152064),
    "32B": ("qwen2", 5120, 27648, 64, 40, 8, 152064),
    "70B": ("llama", 8192, 28672, 80, 64, 8, 128256),
}
SHORT = 4096


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"| card | {' | '.join(MODELS)} |")
        print(f"|---|{'---|' * len(MODELS)}")
        for name in CARDS:
            card = find_card(name)
            cells = [cell(make(Path(folder) / size, *sizes), card) for size, sizes in MODELS.items()]
            print(f"| {card.name}, {card.memory / 2**30:.0f} GiB | {' | '.join(cells)} |", flush=True)


def make(
    folder: Path, family: str, hidden: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int
) -> Path:  # fmt: skip
    """A folder with a config.json that sets no bound on the length."""
    folder.mkdir(exist_ok=True)
    kind = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[family]
    values = {
        "architectures": [kind], "model_type": family, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys,
        "vocab_size": vocabulary, "max_position_embeddings": 2**22, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def cell(folder: Path, card: Any) -> str:
    """Tokens a second at 4096 tokens, and the longest row with its own."""
    config = check_config(
        {
            "model": str(folder), "data": "rows.jsonl", "quantization": "nf4", "max_length": SHORT,
            "training": {"batch_size": 1, "gradient_accumulation": 1},
        }
    )  # fmt: skip
    source = ModelSource(str(folder), folder, folder.name)
    short = plan(config, source, card, quick=True)
    longest = short.planner.longest(config, card)
    if longest < 256:
        return "-"
    long = plan(with_length(config, longest), source, card, quick=True)
    assert long.fits
    assert long.times is not None
    said = f"{longest:,} at {long.times.rate:,.0f}"
    return f"{said}; {short.times.rate:,.0f}" if short.fits and short.times is not None else said


if __name__ == "__main__":
    main()
