"""A byte-level BPE tokenizer as GGUF keys: tokens, merges, special tokens, chat template, pre-tokenizer name.

llama.cpp has the splitting rules built in and the file only names them. Which name belongs to a tokenizer follows from
its rules; the export proves the choice by tokenizing in llama.cpp.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.bases import load_tokenizer, stop_tokens
from ft_export.errors import ExportError

__all__ = ["PRE_TOKENIZERS", "Vocabulary", "read_vocabulary", "write_vocabulary"]

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
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
}
"""llama.cpp's name for each set of splitting rules, written as :func:`_rules` writes them."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about the tokenizer.

    Attributes:
        tokens, types: by id, up to the embedding's rows; types are ``gguf.TokenType`` values.
        merges: pairs in their order, joined by a space.
        pre: llama.cpp's name of the splitting rules.
        special: ids by role: ``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``pad``.
        add_bos, add_eos: whether tokenizing a text puts them around it.
        templates: chat templates by name; the default one is called ``default``.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    pre: str
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    templates: dict[str, str]


def read_vocabulary(folder: Path, rows: int, pre: str | None = None) -> Vocabulary:
    """Read a model folder's tokenizer.

    Args:
        rows: how many rows the embedding has; ids without a token get a placeholder.
        pre: llama.cpp's name of the splitting rules, for rules that the table does not have.

    Raises:
        ExportError: it is no byte-level BPE, has more tokens than ``rows``, or rules of an unknown name.
    """
    import gguf

    tokenizer = load_tokenizer(folder)
    # not the file: for some model types transformers puts splitting rules of its own in the place of the file's
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{folder} has a tokenizer without rules (no tokenizer.json): it cannot be converted to GGUF")
    data = json.loads(backend.to_str())
    model = data.get("model") or {}
    rules = _rules(data)
    if model.get("type") != "BPE" or model.get("byte_fallback") or not rules or not rules[-1].startswith("bytes"):
        raise ExportError(
            f"{folder} has no byte-level BPE tokenizer (SentencePiece and others cannot be converted to GGUF here)"
        )
    name = pre or PRE_TOKENIZERS.get(rules)
    if name is None:
        raise ExportError(
            f"{folder}: llama.cpp's name for the tokenizer's splitting rules is not known ({' + '.join(rules)}): "
            f"name it with pre=NAME (known here: {', '.join(PRE_TOKENIZERS.values())})"
        )
    tokens: dict[int, tuple[str, int]] = {
        index: (token, int(gguf.TokenType.NORMAL)) for token, index in model["vocab"].items()
    }
    for added in data.get("added_tokens") or []:
        control = added.get("special") or _looks_special(added["content"])
        kind = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], int(kind))
    if tokens and max(tokens) >= rows:
        raise ExportError(f"{folder} has token ids up to {max(tokens)}, the model's embedding has {rows} rows")
    filler = int(gguf.TokenType.UNUSED)
    whole = [tokens.get(index, (f"[PAD{index}]", filler)) for index in range(rows)]
    special = _special(tokenizer, folder)
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    return Vocabulary(
        tokens=tuple(token for token, _ in whole),
        types=tuple(kind for _, kind in whole),
        merges=tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]),
        pre=name,
        special=special,
        add_bos=len(dressed) > len(bare) and dressed[0] == special.get("bos"),
        add_eos=len(dressed) > len(bare) and dressed[-1] == special.get("eos"),
        templates=_templates(tokenizer),
    )


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the tokenizer's keys to a ``gguf.GGUFWriter``."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
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
    return bool(re.fullmatch(r"<[|\uff5c].*[|\uff5c]>|<pad>|<mask>|<unused\d+>", token))


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
