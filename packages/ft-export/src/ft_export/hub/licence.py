"""Under which licence a model goes out: the one said, or the base model's, which is looked up and never guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Licence", "find_licence", "licence_files", "read_front_matter"]

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


def find_licence(
    said: str | None, folder: Path | None, base: str | None, base_card: Mapping[str, Any] | None
) -> Licence:
    """The licence, from the first of these that tells one.

    Args:
        said: the person's own word.
        folder: the base model's folder: the metadata of its ``README.md``, then its ``LICENSE``.
        base: the base model's name on the Hub.
        base_card: the metadata of its card there, or None where that is not known.
    """
    if said is not None:
        return Licence(said, f"Published under `{said}`, as its publisher says.")
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
