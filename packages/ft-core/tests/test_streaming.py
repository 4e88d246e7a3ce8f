"""Weights that are streamed: the model is the one that transformers loads by itself, whatever order it asks in."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import ModelError
from ft_core.models import find_model, load, pretrained


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code streams to a CPU."""
    monkeypatch.setattr(pretrained, "STREAMED", ("cuda", "cpu"))


def write(folder: Path, family: str) -> Path:
    """A tiny model in 16 bits, in several files where it is large enough."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if family == "llama":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    elif family == "qwen2, tied":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, tie_word_embeddings=True))
    elif family == "phi3, fused":
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="150KB")
    return folder


FAMILIES = ["llama", "qwen2, tied", "phi3, fused", "qwen3, experts"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_model_is_the_same(family: str, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ft_core.models import pick_device
    from ft_core.models.loading import _load

    source = find_model(str(write(tmp_path / "model", family)))
    assert len(list(source.path.glob("*.safetensors"))) > 1
    begun: list[Any] = []
    own = pretrained.Reader

    def small(*args: Any) -> Any:
        begun.append(own(*args, piece=999, ahead=3))
        return begun[-1]

    monkeypatch.setattr(pretrained, "Reader", small)
    models = []
    for devices in [(), ("cuda", "cpu")]:
        monkeypatch.setattr(pretrained, "STREAMED", devices)
        models.append(_load(source, pick_device(), quantization, "bfloat16", "language-model", None, None))
    assert len(begun) == 1
    plain, streamed = models
    expected, found = plain.state_dict(), streamed.state_dict()
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert value.dtype == found[name].dtype, name
        assert torch.equal(value, found[name]), name
    assert type(plain) is type(streamed)
    assert plain.config.to_dict() == streamed.config.to_dict()
    assert plain.generation_config.to_dict() == streamed.generation_config.to_dict()
    assert plain.name_or_path == streamed.name_or_path == str(source.path)
    assert plain.base_model.name_or_path == streamed.base_model.name_or_path
    assert set(vars(plain)) == set(vars(streamed))
    assert type(getattr(plain, "hf_quantizer", None)) is type(getattr(streamed, "hf_quantizer", None))
    assert getattr(plain, "is_loaded_in_4bit", None) == getattr(streamed, "is_loaded_in_4bit", None)
    assert [(n, p.requires_grad, type(p)) for n, p in plain.named_parameters()] == [
        (n, p.requires_grad, type(p)) for n, p in streamed.named_parameters()
    ]
    ids = torch.tensor([[1, 5, 9, 2]], device=plain.device)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, streamed(ids).logits)


@pytest.mark.usefixtures("streamed")
def test_it_is_saved_and_loaded_again(tiny: Path, tmp_path: Path) -> None:
    import torch

    model, tokenizer = load(tiny, quantization="nf4")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    values = again.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


@pytest.mark.usefixtures("streamed")
def test_weights_that_do_not_fill_the_model_are_named(tmp_path: Path, tiny: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, model\.layers\.0\.mlp\.up_proj\.weight first"):
        load(folder)
    save_file({**tensors, "model.layers.0.mlp.up_proj.weight": gone[:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight has the shape"):
        load(folder)


def some(tmp_path: Path, count: int = 40) -> tuple[Any, dict[str, Any]]:
    """Tensors of all formats and of sizes from nothing to several pieces, and where they lie."""
    import torch
    from safetensors.torch import save_file

    from ft_core.models.streaming import DTYPES, read_headers

    made = {}
    dtypes = list(DTYPES.values())
    for i in range(count):
        shape = [(), (0, 3), (7,), (13, 5), (64, 33)][i % 5]
        made[f"layers.{i}.weight"] = (torch.rand(shape) * 100).to(dtypes[i % len(dtypes)])
    names = list(made)
    save_file({name: made[name] for name in names[::2]}, tmp_path / "a.safetensors")
    save_file({name: made[name] for name in names[1::2]}, tmp_path / "b.safetensors")
    return read_headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]), made


@pytest.mark.parametrize("order", ["as planned", "backwards", "shuffled", "twice", "half"])
@pytest.mark.parametrize("threads", [1, 4])
def test_tensors_in_any_order(tmp_path: Path, order: str, threads: int) -> None:
    import torch

    from ft_core.models.streaming import Reader

    entries, made = some(tmp_path)
    names = sorted(made, key=lambda name: int(name.split(".")[1]))
    if order == "backwards":
        names.reverse()
    elif order == "shuffled":
        random.Random(0).shuffle(names)
    elif order == "twice":
        names = [name for name in names for _ in range(2)]
    elif order == "half":
        names = names[::2]
    device = torch.device("cpu")
    # Fewer and smaller pieces than a tensor has, so that memory is short all the time.
    with Reader(entries, device, piece=100, ahead=2, asked=1, threads=threads) as reader:
        slices = reader.slices()
        for name in names:
            found = slices[name][...]
            assert found.dtype == made[name].dtype
            assert torch.equal(found, made[name])
            assert slices[name].get_shape() == list(made[name].shape)
    with Reader(entries, device, piece=100, ahead=2, asked=1, threads=threads) as reader:  # transformers' own threads
        slices = reader.slices()
        with ThreadPoolExecutor(4) as pool:
            for name, found in zip(names, pool.map(lambda name: slices[name][...], names), strict=True):
                assert torch.equal(found, made[name])
    assert not [thread for thread in threading.enumerate() if thread.name == "ft-read"]


def test_a_file_that_has_become_shorter(tmp_path: Path) -> None:
    import torch

    from ft_core.models.streaming import Reader

    entries, _ = some(tmp_path)
    file = tmp_path / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    there = [name for name in entries if entries[name].file == file and entries[name].size]
    last = max(there, key=lambda name: entries[name].start)
    with (
        Reader(entries, torch.device("cpu"), piece=100, ahead=2) as reader,
        pytest.raises(OSError, match=r"b\.safetensors ends early"),
    ):
        reader.take(last)
    with pytest.raises(OSError, match="is not read any more"):
        reader.take(last)


def test_who_waits_when_reading_stops_is_told(tmp_path: Path) -> None:
    import torch

    from ft_core.models.streaming import Reader

    entries, _ = some(tmp_path)
    reader = Reader(entries, torch.device("cpu"), threads=0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.take, "layers.4.weight")
        while not reader._asked:
            pass
        reader.close()
        with pytest.raises(OSError, match="is not read any more"):
            waiting.result()


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """A model of 400 billion parameters has more than a hundred, of which eight threads read."""
    import os

    import torch
    from safetensors.torch import save_file

    from ft_core.models.streaming import THREADS, Reader, read_headers

    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    files = [tmp_path / f"{i:03}.safetensors" for i in range(60)]
    for i, file in enumerate(files):
        save_file({f"layers.{i}.{j}": torch.full((64,), float(i)) for j in range(2 * THREADS)}, file)
    entries = read_headers(files)
    assert entries is not None
    was = resource.getrlimit(resource.RLIMIT_NOFILE)
    numbers = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]  # the lowest that are free, not side by side
    open_now = max(numbers)
    for number in numbers:
        os.close(number)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 2 * THREADS, was[1]))
        with Reader(entries, torch.device("cpu"), piece=64) as reader:
            for name in entries:
                assert reader.take(name)[0] == int(name.split(".")[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, was)


def test_closed_while_others_take(tmp_path: Path) -> None:
    """Whoever takes gets its tensor or an OSError, and nobody waits for ever."""
    import sys
    import time

    import torch

    from ft_core.models.streaming import Reader

    entries, _ = some(tmp_path, 400)
    told = 0
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for trial in range(60):
            reader = Reader(entries, torch.device("cpu"), piece=64, threads=4)

            def work(first: int, reader: Any = reader) -> int:
                try:
                    for name in list(entries)[first::4]:
                        reader.take(name)
                except OSError:
                    return 1
                return 0

            with ThreadPoolExecutor(4) as pool:
                waiting = [pool.submit(work, first) for first in range(4)]
                time.sleep(0.005 + 0.001 * (trial % 7))
                reader.close()
                told += sum(future.result(timeout=30) for future in waiting)
    finally:
        sys.setswitchinterval(interval)
    assert told


def test_too_little_memory_for_a_tensor_takes_none_from_the_others(tmp_path: Path) -> None:
    import torch

    from ft_core.models.streaming import Entry, Reader

    resource = pytest.importorskip("resource", reason="needs POSIX limits")
    statistics = Path("/proc/self/statm")
    if not statistics.is_file():
        pytest.skip("needs Linux's /proc, to know how much memory is in use")
    file, size = tmp_path / "a.safetensors", 256 << 20
    with open(file, "wb") as stream:
        stream.truncate(size)
    # The first fills what is read ahead; the second is then read when it is asked for.
    shape = (size,)
    entries = {f"layers.{i}": Entry(file, 0, size, torch.uint8, shape) for i in range(2)}
    was = resource.getrlimit(resource.RLIMIT_AS)
    with Reader(entries, torch.device("cpu"), piece=1 << 20) as reader, ThreadPoolExecutor(1) as pool:
        while reader._free[True]:
            pass
        assert list(reader._begun) == ["layers.0"]
        now = int(statistics.read_text().split()[0]) * resource.getpagesize()
        try:
            resource.setrlimit(resource.RLIMIT_AS, (now + size // 2, was[1]))
            with pytest.raises(RuntimeError, match="memory"):
                reader.take("layers.1")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, was)
        again = pool.submit(reader.take, "layers.1")
        try:
            assert again.result(timeout=30).shape == shape
        finally:
            reader.close()


def test_formats_that_are_not_known_are_left_to_transformers(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from ft_core.models.streaming import read_headers

    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    assert read_headers([tmp_path / "a.safetensors"]) is None


@pytest.mark.gpu
def test_one_tensor_at_a_time_is_on_the_gpu_before_it_is_quantized(tmp_path: Path) -> None:
    import torch
    import transformers

    from ft_core.models import pick_device
    from ft_core.models.loading import _load

    sizes = {"vocab_size": 1000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=16)
    with torch.device("cuda"):
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = _load(find_model(str(tmp_path)), pick_device(), "nf4", "bfloat16", "language-model", None, None)
    peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    assert held < 0.3 * 2 * model.num_parameters()
    # The largest tensor in 16 bits; its scales before they are quantized, one float32 for 64 numbers, thrice.
    largest = 2 * 2048 * 8192
    assert peak - held <= largest * (1 + 3 * 2 / 64) + (4 << 20)
