"""Files of every type are those that llama.cpp's own tool writes, byte for byte, and are proven in llama.cpp."""

from __future__ import annotations

import base64
import filecmp
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

import gguf
import numpy as np

from ft_export import ExportError, export_gguf
from ft_export.exporting import Exported
from ft_export.gguf import convert, kernels, mixes
from ft_export.gguf.mixes import FILE_TYPES

# libllama, prebuilt (MIT): its llama_model_quantize is what `llama-quantize` calls.
ORACLE = "https://registry.npmjs.org/@node-llama-cpp/linux-x64/-/linux-x64-3.22.1.tgz"
DIGEST = "5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg=="
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libllama."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the prebuilt libllama is for Linux on x86-64")
    try:
        with urllib.request.urlopen(ORACLE, timeout=60) as answer:
            data = answer.read()
    except (urllib.error.URLError, OSError) as error:
        pytest.skip(f"needs {ORACLE}: {error}")
    assert base64.b64encode(hashlib.sha512(data).digest()).decode() == DIGEST
    folder = tmp_path_factory.mktemp("llama.cpp")
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        for member in archive.getmembers():
            if member.name.startswith("package/bins/linux-x64/lib") and member.isfile():
                file = archive.extractfile(member)
                assert file is not None
                (folder / Path(member.name).name).write_bytes(file.read())
    return folder


def same_files(model: Path, types: list[str], oracle: Path, work: Path) -> None:
    """Ours from the model, and llama.cpp's from the same model in F32."""
    whole = work / "whole.gguf"
    convert(model, whole, type="f32", name="m")
    codes = {kind: int(gguf.LlamaFileType[FILE_TYPES[kind].code]) for kind in types}
    words = [f"{code}={work / kind}-theirs.gguf" for kind, code in codes.items()]
    script = Path(__file__).with_name("quantize_by_llama_cpp.py")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(oracle)}
    subprocess.run([sys.executable, script, oracle, whole, *words], env=environment, check=True, capture_output=True)
    for kind in types:
        convert(model, work / f"{kind}.gguf", type=kind, name="m")
        assert filecmp.cmp(work / f"{kind}.gguf", work / f"{kind}-theirs.gguf", shallow=False), kind


ALL = [kind for kind in FILE_TYPES if kind != "f32"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {**SIZES, "num_hidden_layers": 9, "num_key_value_heads": 2}),
        ("Llama", {**SIZES, "num_hidden_layers": 17, "num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("Llama", {"tie_word_embeddings": True}),  # rows of 64, which no block of 256 fits
        ("Qwen3", {**SIZES, "num_key_value_heads": 8}),
        ("Phi3", {**SIZES, "num_key_value_heads": 2, "pieces": "phi3"}),
        (
            "Gemma2",
            {
                **SIZES,
                "num_key_value_heads": 4,
                "query_pre_attn_scalar": 32,
                "tie_word_embeddings": True,
                "pieces": "gemma",
            },
        ),
        (
            "Gemma3",
            {
                **SIZES,
                "num_key_value_heads": 4,
                "query_pre_attn_scalar": 32,
                "tie_word_embeddings": True,
                "num_hidden_layers": 9,
                "pieces": "gemma",
            },
        ),
    ],
    ids=["grouped", "tied", "narrow", "qwen3", "phi3", "gemma2", "gemma3"],
)
def test_files_are_llama_cpp_s_own(
    kind: str, settings: dict[str, Any], make_model: Any, oracle: Path, tmp_path: Path
) -> None:
    # The others give every tensor one type, however many layers there are; the first of these models shows that.
    mixed = "num_hidden_layers" in settings and settings.get("num_key_value_heads") != 2
    types = [kind for kind in ALL if FILE_TYPES[kind].mix] if mixed else ALL
    same_files(make_model(tmp_path / "model", kind, **settings), types, oracle, tmp_path)


@pytest.mark.parametrize(
    ("kind", "keys", "types"),
    [("Llama", 2, ["q4_k_m", "q3_k_s"]), ("Llama", 4, ["q4_k_m"]), ("Qwen2", 2, ["q4_k_m"])],
    ids=["large", "not grouped", "no Llama"],
)
def test_eighty_layers_are_taken_for_a_large_model(
    kind: str, keys: int, types: list[str], make_model: Any, oracle: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
    model = make_model(tmp_path / "model", kind, num_hidden_layers=80, num_key_value_heads=keys, **sizes)
    same_files(model, types, oracle, tmp_path)


@pytest.fixture(scope="module")
def exported(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """`exported(type)`: one model as a file of the type, made once."""
    folder = tmp_path_factory.mktemp("exported")
    model = make_model(folder / "model", **SIZES, num_key_value_heads=2)
    return functools.cache(lambda kind: export_gguf(model, folder / "out", type=kind))


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_each_type_is_proven(kind: str, exported: Callable[[str], Exported]) -> None:
    made = exported(kind)
    found = json.loads(made.proof.read_text())["files"][f"model-{kind}.gguf"]["continuations"]
    assert found["tokens"] > 20
    # llama.cpp is as far from the model as its roundings are, whatever the type
    assert found["error"]["mean"] <= 2.5 * found["yardstick"]["mean"]
    assert found["cost"]["mean"] == 0 if kind in ("f32", "bf16") else found["cost"]["mean"] > 0
    assert any(line.startswith(f"{kind} costs") and "perplexity" in line for line in made.lines)


def test_fewer_bits_cost_more(exported: Callable[[str], Exported]) -> None:
    made = [exported(kind) for kind in ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")]
    files = json.loads(made[-1].proof.read_text())["files"]
    costs = [files[one.file.name]["continuations"]["cost"]["mean"] for one in made]
    sizes = [one.file.stat().st_size for one in made]
    assert costs == sorted(costs)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("kind", ["q6_k", "q4_k_m", "q2_k"])
def test_a_wrong_conversion_is_seen_through_a_coarse_type(
    kind: str, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys in transformers' order: less than what two bits cost, and far more than llama.cpp may be off."""
    from ft_export.gguf import architectures

    model = make_model(tmp_path / "model", **SIZES, num_key_value_heads=2)
    monkeypatch.setattr(architectures, "_interleave", lambda weight, heads: weight)
    with pytest.raises(ExportError, match=r"^llama\.cpp is not the model: at prompt \d"):
        export_gguf(model, tmp_path / "out", type=kind)
    assert not (tmp_path / "out").exists()


def test_rows_may_be_rounded_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    value = np.random.default_rng(0).standard_normal((37, 512), dtype=np.float32)
    whole = kernels.quantize(value, "Q4_K")
    assert whole.shape == (37, 288)
    monkeypatch.setattr(kernels, "PIECE", 5 * 512)
    assert (kernels.quantize(value, "Q4_K") == whole).all()


def test_llama_cpp_s_q8_0_is_gguf_s() -> None:
    """Two implementations of one rounding."""
    value = np.random.default_rng(1).standard_normal((8, 96), dtype=np.float32)
    assert (kernels.quantize(value, "Q8_0") == gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)).all()


@pytest.mark.parametrize(
    ("name", "dimensions", "kind", "expected"),
    [
        ("blk.0.attn_norm.weight", (4096,), "q4_k_m", "F32"),
        ("blk.0.attn_q.bias", (4096,), "q4_k_m", "F32"),
        ("blk.0.attn_q_norm.weight", (1, 128), "q4_k_m", "F32"),
        ("blk.4.attn_v.weight", (1024, 4096), "q4_k_m", "Q4_K"),
        ("blk.6.attn_v.weight", (1024, 4096), "q4_k_m", "Q6_K"),  # every third between the eighths
        ("blk.31.ffn_down.weight", (4096, 14336), "q5_k_m", "Q6_K"),
        ("output.weight", (128256, 4096), "q2_k", "Q6_K"),
        ("token_embd.weight", (128256, 4096), "q4_k_m", "Q4_K"),
        ("blk.0.ffn_down.weight", (576, 1536), "q4_k_s", "Q5_K"),
        ("blk.9.ffn_up.weight", (1536, 576), "q4_k_s", "Q5_0"),  # no whole blocks of 256
        ("blk.9.ffn_up.weight", (1536, 48), "q4_0", "F16"),
    ],
)
def test_the_table(name: str, dimensions: tuple[int, ...], kind: str, expected: str) -> None:
    assert mixes.kind_of(name, dimensions, kind, mixes.Shape(32, 4)) == expected
