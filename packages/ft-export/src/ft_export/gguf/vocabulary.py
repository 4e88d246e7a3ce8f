"""A tokenizer as GGUF keys: tokens, merges or scores, special tokens, chat template, pre-tokenizer name.

Of a byte-level BPE llama.cpp has the splitting rules built in and the file only names them. Which name belongs to a
tokenizer follows from its rules. A SentencePiece tokenizer has scores in their place (:mod:`ft_export.gguf.pieces`).
The export proves either by tokenizing in llama.cpp.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ft_export.bases import load_tokenizer, stop_tokens
from ft_export.errors import ExportError
from ft_export.gguf.pieces import ADDED_SCORE, SPACE, UNUSED_SCORE, prefix_of, scores_of

__all__ = ["PRE_TOKENIZERS", "Vocabulary", "read_vocabulary", "write_vocabulary"]

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("bytes+words",): "gpt-2",
    ("digits", "bytes+words"): "smollm",
    (
        rf"split {CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
        "bytes",
    ): "llama-bpe",
    (
        rf"split {CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
        "bytes",
    ): "qwen2",
    (
        rf"split [^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
        "bytes",
    ): "tekken",
    (
        rf"split [^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
        rf"{CONTRACTIONS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
        "bytes",
    ): "gpt-4o",
}
"""llama.cpp's name for each set of splitting rules, written as :func:`_rules` writes them."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about the tokenizer.

    Attributes:
        tokens, types: by id, up to the embedding's rows; types are ``gguf.TokenType`` values.
        merges: pairs in their order, joined by a space; none in a SentencePiece tokenizer.
        scores: by id in a SentencePiece tokenizer, else none.
        pre: llama.cpp's name of the splitting rules.
        special: ids by role: ``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``pad``.
        add_bos, add_eos: whether tokenizing a text puts them around it.
        templates: chat templates by name; the default one is called ``default``.
        space_before: whether llama.cpp is to put a space before a text, of a SentencePiece tokenizer.
        plain, spaced: whether llama.cpp then splits texts like the tokenizer that have no special token before them,
            and those that begin with a space.
        strips: whether special tokens take the spaces after them, as those of Phi-3.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    pre: str
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    templates: dict[str, str]
    scores: tuple[float, ...] = ()
    space_before: bool = False
    plain: bool = True
    spaced: bool = True
    strips: bool = False


def read_vocabulary(folder: Path, rows: int, pre: str | None = None) -> Vocabulary:
    """Read a model folder's tokenizer.

    Args:
        rows: how many rows the embedding has; ids without a token get a placeholder.
        pre: llama.cpp's name of the splitting rules, for rules that the table does not have.

    Raises:
        ExportError: it is neither a byte-level BPE nor a SentencePiece one, has more tokens than ``rows``, or rules of
            an unknown name.
    """
    import gguf

    tokenizer = load_tokenizer(folder)
    # not the file: for some model types transformers puts splitting rules of its own in the place of the file's
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{folder} has a tokenizer without rules (no tokenizer.json): it cannot be converted to GGUF")
    data = json.loads(backend.to_str())
    model = data.get("model") or {}
    has_pieces = model.get("type") == "BPE" and bool(model.get("byte_fallback"))
    if has_pieces and pre:
        raise ExportError(f"{folder} has a SentencePiece tokenizer, which has no splitting rules: leave pre={pre} out")
    name = "default" if has_pieces else _name_of_rules(data, folder, pre)
    vocab = _without_doubles(backend) if has_pieces else model["vocab"]
    kinds = gguf.TokenType
    tokens: dict[int, tuple[str, int]] = {
        index: (token, int(kinds.BYTE if has_pieces and BYTE.fullmatch(token) else kinds.NORMAL))
        for token, index in vocab.items()
    }
    added = data.get("added_tokens") or []
    for token in added:
        control = token.get("special") or _looks_special(token["content"])
        # llama.cpp looks for these in the text before it turns spaces into what stands for them
        text = token["content"].replace(SPACE, " ") if has_pieces and not control else token["content"]
        tokens[token["id"]] = (text, int(kinds.CONTROL if control else kinds.USER_DEFINED))
    if tokens and max(tokens) >= rows:
        raise ExportError(f"{folder} has token ids up to {max(tokens)}, the model's embedding has {rows} rows")
    whole = [tokens.get(index, (f"[PAD{index}]", int(kinds.UNUSED))) for index in range(rows)]
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    special, templates = _special(tokenizer, folder), _templates(tokenizer)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    plain = Vocabulary(
        tokens=tuple(token for token, _ in whole),
        types=tuple(kind for _, kind in whole),
        merges=() if has_pieces else tuple(" ".join(pair) for pair in merges),
        pre=name,
        special=special,
        add_bos=len(dressed) > len(bare) and dressed[0] == special.get("bos"),
        add_eos=len(dressed) > len(bare) and dressed[-1] == special.get("eos"),
        templates=templates,
        strips=any(token.get("rstrip") for token in added),
    )
    if not has_pieces:
        return plain
    return _with_pieces(plain, vocab, data, merges, folder)


def _without_doubles(backend: Any) -> dict[str, int]:
    """Tokens in the order of their ids, one an id.

    A character that is named beside its byte (Gemma's tab) is left out: llama.cpp spells it by the byte. Of two such
    texts the serialized tokenizer has either, by chance.
    """
    vocab = backend.get_vocab(with_added_tokens=False)
    bytes_ids = {index for token, index in vocab.items() if BYTE.fullmatch(token)}
    kept = [(token, index) for token, index in vocab.items() if index not in bytes_ids or BYTE.fullmatch(token)]
    return dict(sorted(kept, key=lambda item: item[1]))


def _with_pieces(
    plain: Vocabulary, vocab: dict[str, int], data: dict[str, Any], merges: list[Any], folder: Path
) -> Vocabulary:
    found = prefix_of(data)
    if found is None:
        raise ExportError(
            f"{folder} has a BPE tokenizer with byte fallback whose steps are not SentencePiece's "
            f"({' + '.join(_rules(data)) or 'none'}): it cannot be converted to GGUF"
        )
    prefix, even_before_space = found
    contents = {token["content"] for token in data.get("added_tokens") or []}
    scores = scores_of(folder, vocab, merges, contents)
    ids = {token["id"] for token in data.get("added_tokens") or []}
    # llama.cpp puts a space before every piece of text or before none; of the two, what conversations need
    space_before = prefix == "always" or (prefix == "start" and not plain.templates)
    return replace(
        plain,
        scores=tuple(
            ADDED_SCORE if index in ids else scores.get(index, UNUSED_SCORE) for index in range(len(plain.tokens))
        ),
        space_before=space_before,
        plain=space_before or prefix == "never",
        spaced=even_before_space or not space_before,
    )


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the tokenizer's keys to a ``gguf.GGUFWriter``."""
    writer.add_tokenizer_model("llama" if vocabulary.scores else "gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_before)
    writer.add_token_types(list(vocabulary.types))
    if not vocabulary.scores:
        writer.add_token_merges(list(vocabulary.merges))
    for role, index in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.templates:
        others = [{"name": name, "template": text} for name, text in vocabulary.templates.items() if name != "default"]
        default = vocabulary.templates.get("default")
        if default is not None:
            writer.add_chat_template([*others, {"name": "default", "template": default}] if others else default)


def _name_of_rules(data: dict[str, Any], folder: Path, pre: str | None) -> str:
    """llama.cpp's name for a byte-level BPE's rules; ``pre`` where it is given."""
    rules = _rules(data)
    if (data.get("model") or {}).get("type") != "BPE" or not rules or not rules[-1].startswith("bytes"):
        raise ExportError(
            f"{folder} has neither a byte-level BPE tokenizer nor a SentencePiece one with byte fallback: "
            "others cannot be converted to GGUF"
        )
    name = pre or PRE_TOKENIZERS.get(rules)
    if name is None:
        raise ExportError(
            f"{folder}: llama.cpp's name for the tokenizer's splitting rules is not known ({' + '.join(rules)}): "
            f"name it with pre=NAME (known here: {', '.join(PRE_TOKENIZERS.values())})"
        )
    return name


def _rules(data: dict[str, Any]) -> tuple[str, ...]:
    """The splitting rules of a tokenizer (as ``tokenizer.json`` has them), one word or pattern a step."""
    steps: list[str] = []
    normalizer = data.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        steps.append(f"normalizer {normalizer.get('type')}")
    stack = [data.get("pre_tokenizer") or {}]
    while stack:
        step = stack.pop(0)
        kind = step.get("type")
        if kind == "Sequence":
            stack[:0] = step["pretokenizers"]
        elif kind == "Digits" and step.get("individual_digits"):
            steps.append("digits")
        elif kind == "ByteLevel":
            prefix = " with a space before" if step.get("add_prefix_space") else ""
            steps.append(("bytes+words" if step.get("use_regex", True) else "bytes") + prefix)
        elif kind == "Split" and (step.get("behavior"), bool(step.get("invert"))) in (
            ("Isolated", False),
            ("Removed", True),
        ):
            pattern = step["pattern"]
            steps.append(f"split {pattern.get('Regex', pattern.get('String'))}")
        else:
            steps.append(str(kind))
    return tuple(steps)


def _looks_special(token: str) -> bool:
    """Tokens such as ``<|im_end|>`` steer the model even where the tokenizer does not flag them; llama.cpp must too."""
    return bool(re.fullmatch(r"<[|\uff5c].*[|\uff5c]>|<pad>|<mask>|<2mass>|\[@BOS@\]|<unused\d+>", token))


def _special(tokenizer: Any, folder: Path) -> dict[str, int]:
    """Ids by role. llama.cpp stops at three of them, ``eos``, ``eot`` and ``eom``, so further stop tokens go there."""
    found = {
        role: int(index)
        for role in ("bos", "unk", "pad")
        if (index := getattr(tokenizer, f"{role}_token_id")) is not None
    }
    return {**found, **dict(zip(("eos", "eot", "eom"), stop_tokens(tokenizer, folder), strict=False))}


def _templates(tokenizer: Any) -> dict[str, str]:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return {str(name): str(text) for name, text in template.items()}
    return {"default": template} if template else {}
