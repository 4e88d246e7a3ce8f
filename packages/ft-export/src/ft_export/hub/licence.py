"""Under which licence a model goes out: the one said, or the base model's, which is looked up and never guessed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.errors import ExportError

__all__ = [
    "IDENTIFIERS",
    "Licence",
    "check_licence",
    "find_licence",
    "licence_files",
    "read_front_matter",
    "said_licence",
]

IDENTIFIERS = frozenset(
    {
        "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
        "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
        "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
        "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
        "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
        "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
        "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "grok2-community",
        "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2", "llama3",
        "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl",
        "odc-by", "ofl-1.1", "openmdw-1.0", "openmdw-1.1", "openrail", "openrail++", "osl-3.0", "pddl",
        "postgresql", "unknown", "unlicense", "wtfpl", "zlib", "other",
    }
)  # fmt: skip
"""What the Hub takes for ``license`` in a card (November 2026); huggingface_hub has no list of them. Any other licence
is ``other`` with a name."""
LIST = "https://huggingface.co/docs/hub/repositories-licenses"
OWN_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)
LINK = re.compile(r"https://[^\s<>()\"'`]+")

TEXTS = (
    ("apache-2.0", re.compile(r"\s*Apache License\s+Version 2\.0, January 2004\b")),
    ("mit", re.compile(r"\s*(The )?MIT License\b.{0,300}?Permission is hereby granted, free of charge", re.DOTALL)),
)
"""Licences that are known by how their text begins; any other is handed on as the file that it is."""
NAME = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)(\.(txt|md))?", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """A licence as the card's metadata and its text say it.

    Attributes:
        id: the Hub's identifier; ``other`` where there is none, or none is known.
        sentence: for people, where it comes from.
        name, link: of one that the Hub has no identifier for, or None.
    """

    id: str
    sentence: str
    name: str | None = None
    link: str | None = None


def check_licence(said: str | None, name: str | None, link: str | None) -> None:
    """Refuse what the Hub would not take for a card's licence: its own check comes after the weights were sent.

    Args:
        said: ``license=``, an identifier.
        name, link: ``license_name=`` and ``license_link=``, of a licence that has none.

    Raises:
        ExportError: no identifier of the Hub's, ``other`` without a name, or a name or link that does not belong.
    """
    if said is not None and said not in IDENTIFIERS:
        close = difflib.get_close_matches(said.lower().replace(" ", "-"), sorted(IDENTIFIERS), 1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise ExportError(
            f"license={said} is not allowed{hint} (allowed: the identifiers in {LIST}, such as apache-2.0; for any "
            "other licence license=other license_name=NAME)"
        )
    if said == "other" and name is None:
        raise ExportError("license=other needs the licence's name: add license_name=NAME (and license_link=https://…)")
    for key, value in (("license_name", name), ("license_link", link)):
        if value is not None and said != "other":
            raise ExportError(f"{key}={value} is for license=other, of the others the Hub knows it: leave it out")
    if name is not None and not OWN_NAME.fullmatch(name):
        raise ExportError(f"license_name={name} is not allowed (allowed: letters, digits, '.', '-', '_' and '+')")
    if link is not None and not LINK.fullmatch(link):
        raise ExportError(f"license_link={link} is not allowed (allowed: an address that begins with https://)")


def find_licence(
    said: Licence | None, folder: Path | None, base: str | None, base_card: Mapping[str, Any] | None
) -> Licence:
    """The licence, from the first of these that tells one.

    Args:
        said: the person's own word, see :func:`said_licence`.
        folder: the base model's folder: the metadata of its ``README.md``, then its ``LICENSE``.
        base: the base model's name on the Hub.
        base_card: the metadata of its card there, or None where that is not known.
    """
    if said is not None:
        return said
    if folder is not None:
        card = read_front_matter(folder / "README.md")
        found = _from_card(card, base, "the base model's card")
        if found is not None:
            return found
        for file in licence_files(folder):
            if file.name.upper().startswith("LICEN"):
                return _from_text(file)
    if base_card is not None:
        found = _from_card(base_card, base, f"the card of the base model {base} on the Hub")
        if found is not None:
            return found
    if base is None and folder is None:
        return Licence("other", "The licence is not known: ask the publisher before using the model.")
    return Licence(
        "other", "The licence of the base model is not known here. It holds for this model too: look it up before use."
    )


def said_licence(said: str | None, name: str | None = None, link: str | None = None) -> Licence | None:
    """The licence that the options name, which :func:`check_licence` has let pass; None where they name none."""
    if said is None:
        return None
    shown = f"[`{name or said}`]({link})" if link else f"`{name or said}`"
    return Licence(said, f"Published under {shown}, as its publisher says.", name, link)


def licence_files(folder: Path) -> list[Path]:
    """The files of a model's folder that say what may be done with it; they travel with what is made of it."""
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_file())


def read_front_matter(path: Path) -> dict[str, Any]:
    """The metadata at the top of a model card; empty where there is none that can be read."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if block is None:
        return {}
    try:
        said = yaml.safe_load(block[1])
    except yaml.YAMLError:
        return {}
    return said if isinstance(said, dict) else {}


def _from_card(card: Mapping[str, Any], base: str | None, where: str) -> Licence | None:
    said = card.get("license")
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    if not isinstance(said, str) or not said:
        return None
    name, link = card.get("license_name"), card.get("license_link")
    name = name if isinstance(name, str) else None
    link = link if isinstance(link, str) else None
    if link is not None and "://" not in link:  # beside the base's card
        link = f"https://huggingface.co/{base}/blob/main/{link.lstrip('./')}" if base is not None else None
    shown = (name if said == "other" and name else said).replace("`", "")
    return Licence(said, f"`{shown}`, from {where}: a model made from another is under its licence.", name, link)


def _from_text(file: Path) -> Licence:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    for name, beginning in TEXTS:
        if beginning.match(text):
            return Licence(name, f"`{name}`, the base model's: its text is in `{file.name}`.")
    return Licence("other", f"The base model's, in `{file.name}`.", None, file.name)
