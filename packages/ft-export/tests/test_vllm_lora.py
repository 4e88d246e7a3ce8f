"""``--to vllm --type lora``: an adapter as vLLM takes it, and what it does not take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ft_export import ExportError
from ft_export.vllm.export import export


def _words(folder: Path) -> list[str]:
    import shlex

    return shlex.split((folder / "launch.sh").read_text().rpartition("\nexec ")[2])


def _after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_lora(base: Path, make_run: Any, make_adapter: Any) -> None:
    run = make_run(quantization="nf4")
    adapter = make_adapter(run / "adapter", base, r=9, use_rslora=True, tokenizer=True)
    made = export(run, type="lora")
    assert not (run / "merged").exists()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (made.file / "adapter" / file).read_bytes() == (adapter / file).read_bytes()
    assert (made.file / "tokenizer/tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in made.file.iterdir()) == [
        "adapter", "compose.yaml", "generation_config.json", "launch.sh", "proof.json", "tokenizer",
    ]  # fmt: skip
    words = _words(made.file)
    assert words[:3] == ["vllm", "serve", str(base)]
    assert _after(words, "--max-lora-rank") == "16"
    assert _after(words, "--lora-modules") == "my-run=adapter"
    assert _after(words, "--served-model-name") == "my-run-base"
    assert _after(words, "--tokenizer") == "tokenizer"
    service = yaml.safe_load((made.file / "compose.yaml").read_text())["services"]["vllm"]
    assert _after(service["command"], "--lora-modules") == "my-run=/export/adapter"
    assert {mount["target"]: mount["source"] for mount in service["volumes"]} == {"/export": ".", "/base": str(base)}
    proof = json.loads(made.proof.read_text())
    assert proof["rank"] == 9
    assert proof["base"] == str(base)
    assert "adapter/adapter_model.safetensors" in proof["sha256"]
    assert any("changes 14 weights" in line and "largest rank 9" in line for line in made.lines)
    assert any("held its base in nf4" in line for line in made.lines)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "is a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "holds whole modules .lm_head."),
        ({"lora_bias": True, "bias": "none"}, "has trained biases"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts model.embed_tokens, an embedding or head"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head, an embedding or head"),
        ({"r": 513, "target_modules": ["q_proj"]}, "has rank 513, vLLM serves up to 512"),
        ({"task_type": "FEATURE_EXTRACTION"}, "is for FEATURE_EXTRACTION"),
    ],
)
def test_what_vllm_does_not_serve(
    settings: dict[str, Any], said: str, base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    if "task_type" in settings:
        adapter = make_adapter(tmp_path / "adapter", base)
        config = adapter / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    else:
        adapter = make_adapter(tmp_path / "adapter", base, **settings)
    with pytest.raises(ExportError, match=rf"{said}.*use --type 16bit"):
        export(adapter, tmp_path / "out", type="lora")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_another(base: Path, make_model: Any, make_adapter: Any, make_run: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    config = adapter / "adapter_config.json"
    began = json.loads(config.read_text())
    config.write_text(json.dumps({**began, "init_lora_weights": "pissa"}))
    with pytest.raises(ExportError, match=r"belongs to a base with other weights .init_lora_weights: pissa."):
        export(adapter, tmp_path / "out", type="lora")
    other = make_model(tmp_path / "other", intermediate_size=96)
    config.write_text(json.dumps({**began, "base_model_name_or_path": str(other)}))
    with pytest.raises(ExportError, match=r"is for another base: it changes .* the base has"):
        export(adapter, tmp_path / "out", type="lora")
    config.write_text(json.dumps(began))
    rope = {"max_position_embeddings": 1024, "rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                                                 "rope_theta": 10000.0}}  # fmt: skip
    run = make_run(base=base, rope=rope)
    adapter.rename(run / "adapter")
    with pytest.raises(ExportError, match=r"was trained with a rotary scaling that its base does not have"):
        export(run, type="lora")
    with pytest.raises(ExportError, match=r"has no adapter .it was trained in full."):
        export(base, tmp_path / "out", type="lora")
    assert not (tmp_path / "out").exists()
    assert not (run / "export").exists()


def test_numbers_that_are_none_and_tokens_that_the_base_has_not(
    base: Path, make_model: Any, make_adapter: Any, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    broken = {**tensors, name: torch.full_like(tensors[name], float("inf"))}
    save_file(broken, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"holds values that are no numbers: the adapter is broken"):
        export(adapter, tmp_path / "out", type="lora")
    save_file(tensors, path, metadata={"format": "pt"})
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra {n}>" for n in range(40)])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(ExportError, match=r"tokenizer has .* tokens, its base 416: use --type 16bit"):
        export(adapter, tmp_path / "out", type="lora")
    assert not (tmp_path / "out").exists()
