"""SNAC and Mimi: their real architectures, with random weights or made-up ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from ft_core.errors import PluginError  # noqa: E402
from ft_core.plugins import Registry  # noqa: E402
from ft_speech.codecs import Codec, CodecError, Layout, load_codec  # noqa: E402
from ft_speech.codecs.mimi import Mimi  # noqa: E402
from ft_speech.codecs.snac import Snac, frame_order  # noqa: E402
from ft_speech.codecs.snac_model import SnacConfig, SnacModel  # noqa: E402

# As published: https://huggingface.co/hubertsiuzdak/snac_24khz/blob/main/config.json
PUBLISHED = {
    "sampling_rate": 24000, "encoder_dim": 48, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 1024,
    "decoder_rates": [8, 8, 4, 2], "attn_window_size": None, "codebook_size": 4096, "codebook_dim": 8,
    "vq_strides": [4, 2, 1], "noise": True, "depthwise": True,
}  # fmt: skip
SMALL = PUBLISHED | {
    "encoder_dim": 4, "encoder_rates": [2, 3], "decoder_dim": 16, "decoder_rates": [3, 2], "codebook_size": 16,
    "codebook_dim": 4,
}  # fmt: skip


def small_snac(**changes: Any) -> SnacModel:
    values: dict[str, Any] = {k: v for k, v in (SMALL | changes).items() if k != "attn_window_size"}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return SnacModel(SnacConfig(**values))


@pytest.fixture(scope="module")
def snac() -> Snac:
    """``snac_24khz`` with random weights."""
    torch.manual_seed(0)
    return Snac(SnacModel(SnacConfig()))


@pytest.fixture(scope="module")
def mimi() -> Mimi:
    """Mimi's own strides and codebooks, its layers narrower, its window of attention shorter than what is decoded."""
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(0)
    config = MimiConfig(num_filters=8, num_hidden_layers=2, sliding_window=12)
    model = MimiModel(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "layer_scale" in name:
                tensor.fill_(0.5)  # 0.01 would hide what the transformer does
            if "embed_sum" in name:
                tensor.normal_()
    return Mimi(model)


def chunked(codec: Codec, codes: np.ndarray, sizes: tuple[int, ...]) -> Iterator[np.ndarray]:
    stream, at, turn = codec.stream(), 0, 0
    while at < len(codes):
        size = sizes[turn % len(sizes)]
        yield stream.push(codes[at : at + size])
        at, turn = at + size, turn + 1
    yield stream.finish()


def random_codes(codec: Codec, frames: int) -> Any:
    return np.random.default_rng(0).integers(0, codec.layout.sizes, (frames, len(codec.layout.sizes)))


def test_the_published_snac(snac: Snac) -> None:
    assert (snac.sample_rate, snac.frame_samples, snac.layout) == (24_000, 2048, Layout((4096,) * 7))
    # 19.8 million parameters: https://github.com/hubertsiuzdak/snac
    assert round(sum(p.numel() for p in SnacModel(SnacConfig()).parameters()) / 1e6, 1) == 19.8
    codes = snac.encode(np.random.default_rng(0).normal(size=5000).astype(np.float32) / 10)
    assert (codes.shape, codes.dtype) == ((3, 7), np.int64)
    audio = snac.decode(codes)
    assert (audio.shape, audio.dtype) == ((3 * 2048,), np.float32)
    assert np.array_equal(audio, snac.decode(codes))


def test_every_token_of_a_frame_is_in_orpheus_place(snac: Snac) -> None:
    # Orpheus: token = 128266 + place * 4096 + code; codebook 0 at place 0, codebook 1 at 1 and 4, codebook 2 elsewhere
    assert frame_order((4, 2, 1)) == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (2, 2), (2, 3)]
    assert [snac.layout.offset(place) for place in range(7)] == [0, 4096, 8192, 12288, 16384, 20480, 24576]
    assert snac.layout.tokens == 28_672
    samples = np.random.default_rng(1).normal(size=2 * 2048).astype(np.float32) / 10
    with torch.inference_mode():
        coarse, middle, fine = (book.tolist() for book in snac.model.encode(torch.from_numpy(samples)[None, None]))
    expected = [
        [coarse[f], middle[2 * f], *fine[4 * f : 4 * f + 2], middle[2 * f + 1], *fine[4 * f + 2 : 4 * f + 4]]
        for f in range(2)
    ]
    assert snac.encode(samples).tolist() == expected


def test_each_code_of_snac_sounds_in_its_own_stretch() -> None:
    torch.manual_seed(0)
    codec = Snac(small_snac())
    codes = random_codes(codec, 40)
    heard = codec.decode(codes)
    changed = codes.copy()
    changed[20, 6] = (changed[20, 6] + 8) % 16  # the last step of frame 20
    where = np.flatnonzero(np.abs(codec.decode(changed) - heard) > 1e-7)
    step = codec.frame_samples // 4
    centre = 20 * codec.frame_samples + 3 * step
    reach = codec.model.config.decoder_reach * step
    assert len(where)
    assert centre - reach <= where.min() <= centre + step
    assert where.max() < centre + step + reach


@pytest.mark.parametrize("sizes", [(1,), (3, 0, 5)])
def test_snac_streams(snac: Snac, sizes: tuple[int, ...]) -> None:
    codes = random_codes(snac, 9)
    whole, parts = snac.decode(codes), list(chunked(snac, codes, sizes))
    assert np.abs(np.concatenate(parts) - whole).max() < 1e-5
    if sizes == (1,):
        assert [len(part) // 2048 for part in parts] == [0, 0, 0, 1, 1, 1, 1, 1, 1, 3]


def test_snac_gives_what_its_library_gives() -> None:
    """The numbers were made with ``snac`` 1.2.1 and the weights that are made up here."""
    model = small_snac(noise=False)
    with torch.no_grad():
        for n, (name, tensor) in enumerate(sorted(model.state_dict().items())):
            v = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 1.7 * (1 + n % 5) + n).reshape(
                tensor.shape
            )
            if name.endswith("alpha"):
                v = 1 + v / 4
            elif name.endswith("original0"):
                v = 0.4 + v / 4
            elif not name.endswith(("original1", "codebook.weight")):
                v = v / 20
            tensor.copy_(v)
        codes = model.encode(torch.sin(torch.arange(72) ** 1.3 / 5)[None, None].float() * 0.5)
        assert [book.tolist() for book in codes] == [[1, 1, 1], [6, 6, 7, 6, 6, 7], [1] * 12]
        books = [torch.tensor([(7 * i + 3 * b) % 16 for i in range(n)]) for b, n in enumerate((3, 6, 12))]
        audio = model.decode(books)
    expected = [0.011263, 0.002817, 0.003473, 0.011749, 0.02037, 0.016086]
    expected += [0.00602, 0.009991, 0.012306, 0.007602, 0.006316, 0.006667]
    assert np.abs(audio[::6].numpy() - expected).max() < 2e-6  # they are written with six digits
    assert np.isclose(audio.abs().mean(), 0.018170660)


def test_snac_beside_its_library() -> None:
    library = pytest.importorskip("snac")
    theirs = library.SNAC(**PUBLISHED)
    ours = SnacModel(SnacConfig())
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}


def save_snac(folder: Path, config: dict[str, Any], weights: dict[str, Any], pickled: bool = False) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("pickled", [False, True])
def test_snac_from_a_folder(tmp_path: Path, pickled: bool) -> None:
    torch.manual_seed(0)
    model = small_snac()
    save_snac(tmp_path / "snac", SMALL, model.state_dict(), pickled)
    codec = load_codec("snac", tmp_path / "snac")
    codes = random_codes(codec, 5)
    assert np.array_equal(codec.decode(codes), Snac(model).decode(codes))


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_damaged_snac_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = small_snac().state_dict()
    first = next(iter(weights))
    cases: list[tuple[dict[str, Any], Any, str]] = [
        (SMALL | {"attn_window_size": 32}, weights, "only SNAC without attention"),
        (SMALL | {"vq_strides": [3, 2, 1]}, weights, "each is a multiple of the next"),
        (SMALL | {"encoder_rates": "2"}, weights, "encoder_rates is '2'; it is a list of positive numbers"),
        (SMALL | {"decoder_rates": [2, 2]}, weights, "do not fit the encoder's"),
        (SMALL | {"codebook_size": 32}, weights, "not those of its config.json: size mismatch"),
        (SMALL, {k: v for k, v in weights.items() if k != first}, f"the weights lack {first}"),
        (SMALL, weights | {"more": torch.ones(1)}, "have an unknown more"),
        ({"model_type": "mimi"}, weights, "is this a SNAC"),
    ]
    for number, (config, tensors, message) in enumerate(cases):
        folder = tmp_path / str(number)
        save_snac(folder, config, tensors)
        with pytest.raises(CodecError, match=message) as caught:
            load_codec("snac", folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
    save_snac(tmp_path / "evil", SMALL, {"weight": Evil()}, pickled=True)
    with pytest.raises(CodecError, match="holds no plain tensors"):
        load_codec("snac", tmp_path / "evil")
    assert "run" not in capsys.readouterr().out


def test_mimi(mimi: Mimi) -> None:
    assert (mimi.sample_rate, mimi.frame_samples, mimi.layout) == (24_000, 1920, Layout((2048,) * 32))
    codes = mimi.encode(np.random.default_rng(0).normal(size=5000).astype(np.float32) / 10)
    assert (codes.shape, codes.dtype) == ((3, 32), np.int64)
    audio = mimi.decode(codes)
    assert (audio.shape, audio.dtype) == ((3 * 1920,), np.float32)
    assert np.array_equal(audio, mimi.decode(codes))
    eight = Mimi(mimi.model, 8)
    samples = np.random.default_rng(0).normal(size=5000).astype(np.float32) / 10
    assert np.array_equal(eight.encode(samples), codes[:, :8])
    assert eight.decode(codes[:, :8]).shape == audio.shape


@pytest.mark.parametrize("sizes", [(1,), (3, 0, 5)])
def test_mimi_streams(mimi: Mimi, sizes: tuple[int, ...]) -> None:
    codes = random_codes(mimi, 24)  # 48 steps of the transformer, four of its windows
    whole, parts = mimi.decode(codes), list(chunked(mimi, codes, sizes))
    assert np.abs(whole).max() > 1e-2
    assert np.abs(np.concatenate(parts) - whole).max() < 1e-5 * max(1, np.abs(whole).max())
    if sizes == (1,):
        assert [len(part) for part in parts] == [1920] * 24 + [0]


def test_mimi_from_a_folder(mimi: Mimi, tmp_path: Path) -> None:
    folder = tmp_path / "mimi"
    mimi.model.save_pretrained(folder)
    codec = load_codec("mimi", str(folder))
    codes = random_codes(codec, 3)
    assert np.array_equal(codec.decode(codes), mimi.decode(codes))
    with pytest.raises(CodecError, match="is this a SNAC"):
        load_codec("snac", folder)
    with pytest.raises(CodecError, match="not of a mel codec"):
        load_codec("mel", folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CodecError) as caught:
        load_codec("mimi", folder)
    assert "\n" not in str(caught.value)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CodecError, match=r"has no model\.safetensors"):
        load_codec("mimi", folder)


@pytest.mark.parametrize("kind", ["snac", "mimi"])
def test_bad_codes(kind: str, request: pytest.FixtureRequest) -> None:
    codec = request.getfixturevalue(kind)
    codes = random_codes(codec, 2)
    codes[1, 3] = codec.layout.sizes[3]
    for decode in (codec.decode, codec.stream().push):
        with pytest.raises(ValueError, match="at place 3 of frame 1: a code there is from 0 to"):
            decode(codes)
        with pytest.raises(ValueError, match="codes are integers of shape"):
            decode(codes[:, :2])
    with pytest.raises(ValueError, match="mono"):
        codec.encode(np.ones((2, 100), np.float32))
    assert codec.encode(np.zeros(0, np.float32)).shape == (0, len(codec.layout.sizes))
    assert codec.decode(codes[:0]).shape == codec.stream().finish().shape == (0,)


class Loud:
    """A third party's codec."""

    name = "loud"
    sample_rate, frame_samples, layout = 8_000, 1, Layout((3,))

    @classmethod
    def load(cls, folder: Path, device: Any = "cpu") -> Loud:
        return cls()

    def encode(self, samples: np.ndarray) -> Any:
        return (np.sign(samples) + 1).astype(np.int64)[:, None]

    def decode(self, codes: np.ndarray) -> Any:
        return codes[:, 0].astype(np.float32) - 1


def test_a_third_partys_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_core.plugins import CodecSpec

    module: Any = type(pytest)("their_codec")
    module.LOUD = CodecSpec(name="loud", summary="as loud as can be", codec="their_codec:Loud")
    module.GONE = CodecSpec(name="gone", summary="of a class that is not there", codec="their_codec:Gone")
    module.Loud = Loud
    monkeypatch.setitem(__import__("sys").modules, "their_codec", module)
    points = [EntryPoint(n, f"their_codec:{n.upper()}", "ft.codecs") for n in ("loud", "gone")]
    monkeypatch.setattr("ft_core.plugins.registry", lambda: Registry(points))
    codec = load_codec("loud", tmp_path)
    assert codec.decode(codec.encode(np.array([0.3, -0.2, 0.0]))).tolist() == [1, -1, 0]
    with pytest.raises(PluginError, match=r"'gone'.*fails to import"):
        load_codec("gone", tmp_path)
    with pytest.raises(PluginError, match="did you mean 'loud'"):
        load_codec("lout", tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="no codec folder"):
        load_codec("snac", tmp_path / "nothing")
    with pytest.raises(CodecError, match=r"no codec folder \./nothing/at/all"):
        load_codec("snac", "./nothing/at/all")
    (tmp_path / "file").write_text("")
    with pytest.raises(CodecError, match="is a file"):
        load_codec("snac", str(tmp_path / "file"))
