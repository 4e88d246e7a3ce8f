"""A Whisper of CTranslate2, as faster-whisper uses it, becomes a model folder of transformers.

    python -m ft_speech.whisper.from_ctranslate2 FOLDER [FOLDER …] OUT

``FOLDER`` holds ``model.bin`` (or ``model.bin.part1``, ``model.bin.part2``, …, which may lie in several folders),
``config.json`` and ``tokenizer.json``. ``OUT`` is what ``ft train`` and transformers load.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ft_core.errors import FtError, ModelError
from ft_speech.whisper.ctranslate2_file import Array, CTranslate2File, read_file
from ft_speech.whisper.vocabulary import ENGLISH_ONLY

__all__ = ["convert", "main", "weights"]

LAYER = re.compile(r"(encoder|decoder)/layer_(\d+)/")
PARTS = re.compile(r"model\.bin\.part(\d+)")
LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
TIMESTAMPS = 1501
"""Tokens for 0 to 30 s, 0.02 s apart."""
HEAD = 64
"""Values of one head of attention, in every Whisper; older revisions of the format do not say how many heads it has."""


def convert(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "float16"] = "float32",
) -> Path:
    """Write a Whisper of CTranslate2 as a model folder of transformers.

    Weights, the tokens that are never written, the languages and the heads that align words with time are the
    source's; what the format does not hold, the features of sound, is the same for every Whisper.

    Args:
        folders: where the source's files are.
        out: the folder to make; it may not exist, or be empty.
        dtype: the number format of the weights. Those of a source in float16 lose nothing in either.

    Returns:
        ``out``.

    Raises:
        ModelError: a file is missing or damaged, it is no Whisper, or ``out`` is not free.
    """
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    places, target = [Path(folder) for folder in folders], Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} is there already: give a folder that is not, or remove it")
    found = read_file(_binary(places))
    if found.spec != "WhisperSpec":
        raise ModelError(f"{places[0]}: is a {found.spec}, not a Whisper (WhisperSpec)")
    described = _json(_find(places, "config.json"))
    tokenizer = _json(_find(places, "tokenizer.json"))
    state = {name: torch.from_numpy(_owned(value)).to(torch.float32) for name, value in weights(found).items()}
    size, width = state["model.decoder.embed_tokens.weight"].shape
    tokens = _Tokens(tokenizer, size, places[0])
    config = _config(found, state, tokens)
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    missing = set(model.state_dict()) ^ set(state)
    if missing - {"proj_out.weight"}:  # it is the embedding's own
        raise ModelError(f"{places[0]}: weights of a Whisper of width {width} do not match: {sorted(missing)[:3]}")
    model = model.to_empty(device="cpu")
    model.tie_weights()
    model.load_state_dict(state, strict=False)
    model.generation_config = _generation(config, described, tokens)
    beside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        model.to(getattr(torch, dtype)).save_pretrained(beside)
        WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(beside)
        _write(beside / "tokenizer.json", tokens.file())
        _write(beside / "tokenizer_config.json", tokens.settings())
        if target.exists():
            target.rmdir()
        os.replace(beside, target)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def weights(found: CTranslate2File) -> dict[str, Array]:
    """The weights of a Whisper by the names that transformers' ``WhisperForConditionalGeneration`` has for them.

    CTranslate2 keeps queries, keys and values in one product, and keys with a bias, which Whisper has none of.

    Raises:
        ModelError: a weight is missing, or keys have a bias.
    """
    try:
        return dict(_weights(found))
    except KeyError as error:
        raise ModelError(f"the model.bin holds no weight {error.args[0]}") from None


def _weights(found: CTranslate2File) -> Iterator[tuple[str, Array]]:
    yield "model.decoder.embed_tokens.weight", found.weight("decoder/embeddings/weight")
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            yield f"model.encoder.{conv}.{kind}", found.weight(f"encoder/{conv}/{kind}")
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", found.weight(f"{side}/position_encodings/encodings")
        yield from _norm(found, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for number in range(_layers(found, side)):
            theirs, ours = f"{side}/layer_{number}", f"model.{side}.layers.{number}"
            own, crossed = f"{ours}.self_attn", f"{ours}.encoder_attn"
            yield from _linear(found, f"{theirs}/self_attention/linear_0", [f"{own}.{x}_proj" for x in "qkv"])
            yield from _linear(found, f"{theirs}/self_attention/linear_1", [f"{own}.out_proj"])
            yield from _norm(found, f"{theirs}/self_attention/layer_norm", f"{own}_layer_norm")
            if side == "decoder":
                yield from _linear(found, f"{theirs}/attention/linear_0", [f"{crossed}.q_proj"])
                yield from _linear(found, f"{theirs}/attention/linear_1", [f"{crossed}.{x}_proj" for x in "kv"])
                yield from _linear(found, f"{theirs}/attention/linear_2", [f"{crossed}.out_proj"])
                yield from _norm(found, f"{theirs}/attention/layer_norm", f"{crossed}_layer_norm")
            yield from _linear(found, f"{theirs}/ffn/linear_0", [f"{ours}.fc1"])
            yield from _linear(found, f"{theirs}/ffn/linear_1", [f"{ours}.fc2"])
            yield from _norm(found, f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")


def _linear(found: CTranslate2File, theirs: str, ours: list[str]) -> Iterator[tuple[str, Array]]:
    """A product, or several that are one: their rows in turn."""
    weight, bias = found.weight(f"{theirs}/weight"), found.weight(f"{theirs}/bias")
    rows = len(weight) // len(ours)
    for number, name in enumerate(ours):
        part = slice(number * rows, (number + 1) * rows)
        yield f"{name}.weight", weight[part]
        if not name.endswith("k_proj"):
            yield f"{name}.bias", bias[part]
        elif bias[part].any():
            raise ModelError(f"the model.bin has a bias on the keys of {theirs}, which no Whisper has")


def _norm(found: CTranslate2File, theirs: str, ours: str) -> Iterator[tuple[str, Array]]:
    yield f"{ours}.weight", found.weight(f"{theirs}/gamma")
    yield f"{ours}.bias", found.weight(f"{theirs}/beta")


def _layers(found: CTranslate2File, side: str) -> int:
    numbers = [int(match[2]) for name in found.variables if (match := LAYER.match(name)) and match[1] == side]
    return max(numbers, default=-1) + 1


class _Tokens:
    """A tokenizer's file, and the numbers of Whisper's own tokens in it."""

    def __init__(self, file: dict[str, Any], size: int, place: Path) -> None:
        try:
            self.added: list[dict[str, Any]] = file["added_tokens"]
            self.ids = {token["content"]: int(token["id"]) for token in self.added}
            self.no_timestamps = self.ids["<|notimestamps|>"]
            self.end, self.start = self.ids["<|endoftext|>"], self.ids["<|startoftranscript|>"]
            self.previous = self.ids["<|startofprev|>"]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{place}: its tokenizer.json is not a Whisper's: {error} is missing") from None
        if self.no_timestamps + 1 + TIMESTAMPS != size:
            raise ModelError(
                f"{place}: its tokenizer.json is of another Whisper: with timestamps it has "
                f"{self.no_timestamps + 1 + TIMESTAMPS} tokens, the model {size}"
            )
        self._file = file
        self.tasks = {name: self.ids[f"<|{name}|>"] for name in ("transcribe", "translate")}
        last = min(self.tasks.values())
        between = {name: number for name, number in self.ids.items() if self.start < number < last}
        self.languages = {name: number for name, number in between.items() if LANGUAGE.fullmatch(name)}
        self.multilingual = size != ENGLISH_ONLY

    def file(self) -> dict[str, Any]:
        """The file with the timestamps, as OpenAI's have them: tokens that are not special."""
        have = set(self.ids.values())
        more = []
        for number in range(TIMESTAMPS):
            if (place := self.no_timestamps + 1 + number) not in have:
                plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
                more.append({"id": place, "content": f"<|{number * 0.02:.2f}|>", **plain})
        return {**self._file, "added_tokens": [*self.added, *more]}

    def settings(self) -> dict[str, Any]:
        """The content of ``tokenizer_config.json``."""
        special = [token["content"] for token in self.added if token.get("special")]
        ending = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
        return {
            "tokenizer_class": "WhisperTokenizer",
            "processor_class": "WhisperProcessor",
            "additional_special_tokens": [token for token in special if token != "<|endoftext|>"],
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 1024,
            "return_attention_mask": False,
            **ending,
        }


def _config(found: CTranslate2File, state: Mapping[str, Any], tokens: _Tokens) -> Any:
    from transformers import WhisperConfig

    size, width = state["model.decoder.embed_tokens.weight"].shape
    values: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        heads = found.variables.get(f"{side}/num_heads")
        values[f"{side}_layers"] = _layers(found, side)
        values[f"{side}_attention_heads"] = width // HEAD if heads is None else int(heads)
        values[f"{side}_ffn_dim"] = len(state[f"model.{side}.layers.0.fc1.weight"])
    return WhisperConfig(
        **values,
        vocab_size=size,
        d_model=width,
        num_mel_bins=state["model.encoder.conv1.weight"].shape[1],
        max_source_positions=len(state["model.encoder.embed_positions.weight"]),
        max_target_positions=len(state["model.decoder.embed_positions.weight"]),
        bos_token_id=tokens.end,
        eos_token_id=tokens.end,
        pad_token_id=tokens.end,
        decoder_start_token_id=tokens.start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _generation(config: Any, described: Mapping[str, Any], tokens: _Tokens) -> Any:
    from transformers import GenerationConfig

    known = {
        "suppress_tokens": described.get("suppress_ids"),
        "begin_suppress_tokens": described.get("suppress_ids_begin"),
        "alignment_heads": described.get("alignment_heads"),
    }
    if tokens.multilingual:
        known |= {"lang_to_id": tokens.languages, "task_to_id": tokens.tasks}
    return GenerationConfig(
        **{name: value for name, value in known.items() if value},
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        is_multilingual=tokens.multilingual,
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        no_timestamps_token_id=tokens.no_timestamps,
        prev_sot_token_id=tokens.previous,
        return_timestamps=False,
    )


def _owned(value: Array) -> Array:
    """An array that torch may have: contiguous, of its own."""
    return value.copy(order="C")


def _binary(places: Sequence[Path]) -> list[Path]:
    for place in places:
        if (place / "model.bin").is_file():
            return [place / "model.bin"]
    parts: dict[int, Path] = {}
    for place in places:
        for path in place.glob("model.bin.part*"):
            if match := PARTS.fullmatch(path.name):
                parts[int(match[1])] = path
    if not parts or sorted(parts) != list(range(1, len(parts) + 1)):
        have = (
            f"there are the parts {', '.join(map(str, sorted(parts)))}" if parts else "looked for model.bin.part1 too"
        )
        raise ModelError(f"{', '.join(map(str, places))}: holds no model.bin of CTranslate2 ({have})")
    return [parts[number] for number in sorted(parts)]


def _find(places: Sequence[Path], name: str) -> Path:
    found = next((place / name for place in places if (place / name).is_file()), None)
    if found is None:
        raise ModelError(f"{', '.join(map(str, places))}: holds no {name}, which the model.bin needs beside it")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return values


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ft_speech.whisper.from_ctranslate2",
        description="Write a Whisper of CTranslate2 (faster-whisper) as a model folder of transformers.",
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="with model.bin or its parts, and the files beside"
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: %(default)s")
    args = parser.parse_args(words)
    try:
        print(f"written to {convert(args.folders, args.out, dtype=args.dtype)}")
    except FtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
