"""What is asked for: the options of the target ``hub``, checked before anything is done."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ft_export.errors import ExportError
from ft_export.exporting import check_options
from ft_export.gguf.mixes import FILE_TYPES
from ft_export.hub.licence import Licence, check_licence, said_licence
from ft_export.runs import Source

__all__ = ["HUB_NAME", "OPTIONS", "TYPES", "Wanted", "check_type", "read_options"]

TYPES = ("merged", "adapter", *FILE_TYPES)
"""What ``--type`` may be: the whole model in 16 bits, the adapter alone, or a GGUF file of one of its types."""
OPTIONS = {
    "repo": "USER/NAME, where to push; made if it is not there",
    "private": "yes (the default) or no",
    "dry": "yes lays everything out, shows it and sends nothing",
    "license": "one of the Hub's identifiers, in place of the base model's; or other",
    "license_name": "the name of a licence that is license=other",
    "license_link": "its address",
    "revision": "a branch, made if it is not there",
    "base": "USER/NAME of the base model on the Hub, where the run was trained from a folder",
    "pre": "the tokenizer's splitting rules, for a GGUF type",
}
"""The ``key=value`` options, and what each is."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""A repository with its owner, ``USER/NAME``."""
BRANCH = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
ANSWERS = {"yes": True, "true": True, "no": False, "false": False}
MAIN = "main"


@dataclass(frozen=True)
class Wanted:
    """What to push, and where to.

    Attributes:
        repo: ``USER/NAME``.
        type: one of :data:`TYPES`.
        private: whether only its owner may see it.
        dry: whether nothing is to be sent.
        licence: the one that the person named, or None to take the base model's.
        revision: the branch.
        base: the base model's name on the Hub, or None to take the one that the run knows.
        pre: for GGUF, see :func:`ft_export.export_gguf`.
    """

    repo: str
    type: str = "merged"
    private: bool = True
    dry: bool = False
    licence: Licence | None = None
    revision: str = MAIN
    base: str | None = None
    pre: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.type in FILE_TYPES


def read_options(options: Mapping[str, str] | None, type: str) -> Wanted:
    """The options as what they mean.

    Raises:
        ExportError: one is unknown, missing, or has a value that is not allowed.
    """
    said = check_options(options, OPTIONS, "hub")
    if type not in TYPES:
        raise ExportError(f"type {type!r} is not known for hub (allowed: {', '.join(TYPES)})")
    if "repo" not in said:
        raise ExportError("where to push is not said: add repo=USER/NAME")
    if said.get("pre") and type not in FILE_TYPES:
        raise ExportError(f"pre= names a GGUF file's tokenizer rules, and the type is {type}: leave it out")
    check_licence(said.get("license"), said.get("license_name"), said.get("license_link"))
    _check(said, "revision", BRANCH, "a branch, such as main")
    for key in ("repo", "base"):
        _check(said, key, HUB_NAME, "USER/NAME, of letters, digits, '-', '_' and '.'")
        name = said.get(key, "")
        if "--" in name or ".." in name or name.endswith((".git", "-", ".")) or len(name.partition("/")[2]) > 96:
            raise ExportError(f"{key}={name} is no name that the Hub allows: no '--' or '..', no .git at its end")
    return Wanted(
        repo=said["repo"],
        type=type,
        private=_answer(said, "private", True),
        dry=_answer(said, "dry", False),
        licence=said_licence(said.get("license"), said.get("license_name"), said.get("license_link")),
        revision=said.get("revision", MAIN),
        base=said.get("base"),
        pre=said.get("pre"),
    )


def check_type(source: Source, type: str) -> None:
    """Refuse an adapter that others could not use by its files alone.

    Raises:
        ExportError: there is no adapter, or it belongs to a base that is not the one that its files name.
    """
    if type != "adapter":
        return
    if source.adapter is None:
        raise ExportError(f"{source.path} holds no adapter: push it with --type merged, or as GGUF")
    if source.rope is not None:
        raise ExportError(
            f"{source.adapter} was trained on a base with other rotary scaling (rope_scaling), which an adapter's "
            "files cannot say: push it with --type merged"
        )
    if source.on_quantized:
        raise ExportError(
            f"{source.adapter} began as what {source.quantization} lost and is wrong on the unquantized base: "
            "push it with --type merged"
        )


def _check(said: Mapping[str, str], key: str, pattern: re.Pattern[str], allowed: str) -> None:
    if key in said and not pattern.fullmatch(said[key]):
        raise ExportError(f"{key}={said[key]} is not allowed (allowed: {allowed})")


def _answer(said: Mapping[str, str], key: str, default: bool) -> bool:
    word = said.get(key)
    if word is None:
        return default
    if word.lower() not in ANSWERS:
        raise ExportError(f"{key}={word} is not allowed (allowed: yes, no)")
    return ANSWERS[word.lower()]
