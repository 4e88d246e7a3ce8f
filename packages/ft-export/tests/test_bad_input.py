"""What is broken, hostile or does not belong together: one clear line, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

from ft_export import ExportError, export_gguf, merge
from ft_export.gguf import convert, converter
from ft_export.vllm.export import export as export_vllm

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Breaker = Callable[[Path], object]


def _refused(job: Callable[[], Any], message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        job()
    assert "\n" not in str(caught.value)


def _header(value: Any) -> Breaker:
    data = json.dumps(value).encode()
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(data)) + data)


def _sharded(change: Callable[[dict[str, Any]], Any], broken: Breaker = lambda folder: None) -> Breaker:
    """Weights in two files with an index; ``change`` is made to its map of tensors, ``broken`` to the folder."""

    def make(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        where = {name: FIRST if at < 10 else SECOND for at, name in enumerate(names)}
        for shard in (FIRST, SECOND):
            part = {name: tensors[name] for name in names if where[name] == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": change(where)}))
        broken(folder)

    return make


def _json(name: str, **values: Any) -> Breaker:
    def change(folder: Path) -> None:
        said = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**said, **values}))

    return change


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor], file: str = WEIGHTS) -> Breaker:
    def make(folder: Path) -> None:
        tensors = load_file(folder / file)
        key = next(key for key in tensors if name in key)
        save_file({**tensors, key: change(tensors[key]).contiguous()}, folder / file, metadata={"format": "pt"})

    return make


def _nan(value: torch.Tensor) -> torch.Tensor:
    value.view(-1)[3] = float("nan")
    return value


def _cut(name: str) -> Breaker:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


PLAIN = r"index\.json names {}, which is no plain file name of safetensors: refused"
MODELS: dict[str, tuple[Breaker, str, str]] = {
    "a header that is a list": (_header([1]), r"model\.safetensors is not a safetensors file: its header holds no", ""),
    "a header without places": (
        _header({"a": {"dtype": "F32", "shape": [2]}}),
        r"is not a safetensors file: its header does not say where and what 'a' is",
        "",
    ),
    "a header with a place before the file": (
        _header({"a": {"dtype": "F32", "shape": [0], "data_offsets": [-4, 0]}}),
        r"is not a safetensors file: its header does not say where and what 'a' is",
        "",
    ),
    "a file of nothing": (
        lambda f: (f / WEIGHTS).write_bytes(b""),
        "is not a whole safetensors file: get it again",
        "",
    ),
    "an index to the folder above": (
        _sharded(lambda m: {**m, "a": "../x.safetensors"}),
        PLAIN.format(r"'\.\./x\.safetensors'"),
        "",
    ),
    "an index to the folder above itself": (_sharded(lambda m: {**m, "a": ".."}), PLAIN.format(r"'\.\.'"), ""),
    "an index to the folder itself": (_sharded(lambda m: {**m, "a": ""}), PLAIN.format("''"), ""),
    "an index to the root": (_sharded(lambda m: {**m, "a": "/etc/passwd"}), PLAIN.format("'/etc/passwd'"), ""),
    "an index with Windows' folders": (_sharded(lambda m: {**m, "a": r"..\x.safetensors"}), PLAIN.format(".*"), ""),
    "an index to a pickle": (_sharded(lambda m: {**m, "a": "model.bin"}), PLAIN.format(r"'model\.bin'"), ""),
    "an index to a number": (_sharded(lambda m: {**m, "a": 5}), PLAIN.format("5"), ""),
    "an index that is a list": (_sharded(lambda m: [1]), r"has no weight_map, which says where each tensor is", ""),
    "an index of nothing": (_sharded(lambda m: {}), r"has no weight_map, which says where each tensor is", ""),
    "an index to a tensor that is not there": (
        _sharded(lambda m: {**m, "model.more": SECOND}),
        rf"{SECOND} lacks model\.more, which the index says it has: get it again",
        "",
    ),
    "an index without its second file": (
        _sharded(lambda m: {name: shard for name, shard in m.items() if shard == FIRST}),
        r"has no weights for model\.layers\.\d\..*: it is incomplete",
        "",
    ),
    "a missing shard": (_sharded(dict, lambda f: (f / SECOND).unlink()), f"{SECOND} is missing: get the model's", ""),
    "a truncated shard": (_sharded(dict, _cut(SECOND)), f"{SECOND} is truncated: it has", ""),
    "a number in words": (
        _json("config.json", num_attention_heads="four"),
        r"(cannot be loaded|loads): Validation error for field 'num_attention_heads'",
        "",
    ),
    "no heads": (_json("config.json", num_attention_heads=0), r"integer modulo by zero", ""),
    "other widths": (
        _json("config.json", intermediate_size=256),
        r"has model\.layers\.0\.mlp\.gate_proj\.weight as 128x64, its config\.json asks for 256x64: they do not belong",
        "",
    ),
    "more layers": (_json("config.json", num_hidden_layers=3), r"no weights for model\.layers\.2\..*incomplete", ""),
    "code of its own": (
        _json("config.json", model_type="x", auto_map={"AutoConfig": "x.Y"}),
        "contains custom code",
        "",
    ),
    "an end that is no token": (
        _json("generation_config.json", eos_token_id="</s>"),
        r"generation_config\.json has eos_token_id '</s>' \(allowed: token ids\)",
        "",
    ),
    "an end before all tokens": (_json("generation_config.json", eos_token_id=[2, -1]), r"\[2, -1\] \(allowed", ""),
    "a tokenizer that is not JSON": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        r"/model has no tokenizer that transformers loads",
        "",
    ),
    "a tokenizer of an unknown kind": (
        _json("tokenizer.json", model={"type": "Unheard"}),
        r"/model has no tokenizer that transformers loads",
        "",
    ),
    "a tokenizer with code of its own": (
        _json("tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["x.Y", None]}),
        "contains custom code",
        "",
    ),
    "NaN in the embeddings": (
        _tensor("embed_tokens", _nan),
        r"the base's model\.embed_tokens\.weight holds values that are not finite: it is broken",
        r"tensor model\.embed_tokens\.weight holds values that are not finite: the model is broken",
    ),
    "NaN in a layer": (
        _tensor("layers.1.self_attn.v_proj", _nan),
        r"holds values that are not finite: tensor model\.layers\.1\.self_attn\.v_proj",
        r"tensor model\.layers\.1\.self_attn\.v_proj\.weight holds values that are not finite: the model is broken",
    ),
}


@pytest.fixture(scope="module")
def an_adapter(base: Path, make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = make_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base)
    return made


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str, base: Path, an_adapter: Path, tmp_path: Path, contents: Any) -> None:
    """Merged into and exported: the same line, but where the two see a fault at different places."""
    spoil, merging, exporting = MODELS[kind]
    shutil.copytree(base, tmp_path / "model")
    spoil(tmp_path / "model")
    _refused(lambda: merge(an_adapter, tmp_path / "out", base=str(tmp_path / "model")), merging)
    _refused(lambda: export_gguf(tmp_path / "model", tmp_path / "out"), exporting or merging)
    assert contents(tmp_path) == ["model"]


def test_an_end_that_the_model_has_no_row_for(base: Path, tmp_path: Path) -> None:
    """As small models of a large one's configuration have: it can never be said."""
    shutil.copytree(base, tmp_path / "model")
    _json("generation_config.json", eos_token_id=[2, 50256])(tmp_path / "model")
    made = export_gguf(tmp_path / "model", tmp_path / "out")
    assert json.loads(made.proof.read_text())["files"][made.file.name]["stop_tokens"] == [2]


def test_a_chat_template_that_is_none(base: Path, tmp_path: Path, contents: Any) -> None:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}\n{% if %}")
    _refused(
        lambda: export_gguf(tmp_path / "model", tmp_path / "out"),
        r"the chat template of .*/model cannot be read: Expected an expression, .*, line 2",
    )
    assert contents(tmp_path) == ["model"]


ADAPTERS: dict[str, tuple[Breaker, str]] = {
    "truncated": (_cut(ADAPTER), r"adapter_model\.safetensors is truncated: it has"),
    "no weights": (lambda f: (f / ADAPTER).unlink(), r"has no adapter_model\.safetensors: it holds no weights"),
    "an index to the folder above": (
        lambda f: ((f / ADAPTER).unlink(), _json(f"{ADAPTER}.index.json", weight_map={"a": "../x"})(f)),
        r"names '\.\./x', which is no plain file name of safetensors: refused",
    ),
    "in several files": (
        lambda f: (
            (f / ADAPTER).rename(f / "adapter_model-1.safetensors"),
            _json(
                f"{ADAPTER}.index.json",
                weight_map={"base_model.model.lm_head.lora_A.weight": "adapter_model-1.safetensors"},
            )(f),
        ),
        r"has its adapter in several files|lacks base_model\.model\.lm_head",
    ),
    "another rank": (_json(ADAPTER_CONFIG, r=5), r"down_proj has rank 4, adapter_config\.json says 5"),
    "an alpha in words": (_json(ADAPTER_CONFIG, lora_alpha="x"), r"has lora_alpha 'x' \(allowed: a number\)"),
    "no rank": (_json(ADAPTER_CONFIG, r=None), r"has r None \(allowed: a number\)"),
    "a pattern that is none": (_json(ADAPTER_CONFIG, rank_pattern={"(": 4}), "maps no regular expressions to numbers"),
    "patterns in a list": (_json(ADAPTER_CONFIG, alpha_pattern=[1]), "maps no regular expressions to numbers"),
    "a base that is nowhere": (
        _json(ADAPTER_CONFIG, base_model_name_or_path="../../nowhere"),
        r"the base model \.\./\.\./nowhere is not there; name its folder",
    ),
    "other names": (
        lambda f: save_file(
            {name.replace("up_proj", "w1"): tensor for name, tensor in load_file(f / ADAPTER).items()}, f / ADAPTER
        ),
        r"is for another base: it changes model\.layers\.0\.mlp\.w1\.weight, which the base does not have",
    ),
    "another shape": (
        _tensor("mlp.down_proj.lora_A", lambda a: torch.cat([a, a], dim=1), ADAPTER),
        r"is for another base: it changes model\.layers\.0\.mlp\.down_proj\.weight as 64x256, the base has 64x128",
    ),
    "ranks that do not meet": (
        _tensor("mlp.down_proj.lora_B", lambda b: b[:, :3], ADAPTER),
        r"lora_A and lora_B of model\.layers\.0\.mlp\.down_proj are 4x128 and 64x3: no product",
    ),
    "one dimension": (_tensor("mlp.down_proj.lora_A", lambda a: a[0], ADAPTER), r"are 128 and 64x4: no product"),
    "whole numbers": (
        _tensor("mlp.down_proj.lora_A", lambda a: a.to(torch.int32), ADAPTER),
        r"down_proj\.lora_A\.weight holds torch\.int32, not floating-point numbers",
    ),
    "NaN": (
        _tensor("mlp.down_proj.lora_A", _nan, ADAPTER),
        r"(down_proj.* holds values that are not finite|not finite: tensor .*down_proj)",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind: str, an_adapter: Path, tmp_path: Path, contents: Any) -> None:
    """Merged, and as a GGUF file."""
    spoil, message = ADAPTERS[kind]
    shutil.copytree(an_adapter, tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    _refused(lambda: merge(tmp_path / "adapter", tmp_path / "out"), message)
    _refused(lambda: export_gguf(tmp_path / "adapter", tmp_path / "out", options={"adapter": "yes"}), message)
    assert contents(tmp_path) == ["adapter"]


# --- disks


def _mounted(folder: Path, options: str) -> Iterator[Path]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a file system needs Linux and root")
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    yield from _mounted(tmp_path / "small", "size=64m")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may write to; for root it must be a file system of its own."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        yield from _mounted(tmp_path / "locked", "ro,size=64m")
    else:
        (tmp_path / "locked").mkdir(mode=0o555)
        yield tmp_path / "locked"


def test_a_read_only_folder(read_only: Path, base: Path, an_adapter: Path) -> None:
    message = r"(Read-only file system|Permission denied) \(.*locked.*\): nothing was written; free space or choose"
    for out in (read_only / "out", read_only / "more" / "out"):
        _refused(lambda out=out: merge(an_adapter, out), message)  # type: ignore[misc]
        _refused(lambda out=out: export_gguf(base, out), message)  # type: ignore[misc]
        _refused(lambda out=out: export_gguf(an_adapter, out, options={"adapter": "yes"}), message)  # type: ignore[misc]
    assert not any(read_only.iterdir())


def _fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return


def test_a_disk_that_fills_up(
    small_disk: Path, base: Path, an_adapter: Path, contents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room when it is asked for, and none when the files are written: a real ENOSPC."""

    def told(done: int, total: int, what: str) -> None:
        if what == "tensors written" and done == 1:
            _fill(small_disk)

    message = r"(No space left on device|the disk is full)"
    _refused(lambda: merge(an_adapter, small_disk / "out", progress=told), message)
    assert contents(small_disk) == ["filler"]
    (small_disk / "filler").unlink()
    right = converter.require_space

    def asked(*words: Any) -> None:
        right(*words)
        _fill(small_disk)

    monkeypatch.setattr(converter, "require_space", asked)
    for job in (
        lambda: export_gguf(base, small_disk / "out"),
        lambda: export_gguf(an_adapter, small_disk / "out", options={"adapter": "yes"}),
    ):
        _refused(job, message)
        assert contents(small_disk) == ["filler"]
        (small_disk / "filler").unlink()


def test_a_disk_with_too_little_room(small_disk: Path, base: Path, an_adapter: Path, contents: Any) -> None:
    _fill(small_disk)
    message = r"needs \d+ MB on the disk of .*small.*, 0 MB are free: free space or choose another folder with --out"
    _refused(lambda: merge(an_adapter, small_disk / "out"), message)
    _refused(lambda: convert(base, small_disk / "x.gguf"), message)
    _refused(lambda: export_gguf(base, small_disk / "out"), message)
    _refused(lambda: export_vllm(base, small_disk / "out", type="w8a8"), message)
    assert contents(small_disk) == ["filler"]
