"""Several adapters to be merged as one: how they are combined, their weights, and what cannot be combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.bases import load_tokenizer, local_base, same_folder
from ft_export.errors import ExportError
from ft_export.merging.adapter import Adapter, LowRank, base_of
from ft_export.merging.record import fingerprint
from ft_export.runs import Source, open_source

if TYPE_CHECKING:
    import torch

__all__ = [
    "COMBINATIONS", "DEFAULT", "SIGNS", "Combination", "Part", "combination_of", "other_templates", "parts_of",
    "weighted",
]  # fmt: skip

DEFAULT = "cat"
COMBINATIONS = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
"""PEFT's names, ``combination_type`` of its ``add_weighted_adapter``. ``cat`` is the weighted sum of the changes."""
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How adapters become one, in PEFT's terms.

    Attributes:
        type: one of :data:`COMBINATIONS`.
        density: the share of values that pruning leaves, in (0, 1]; None for a type that prunes nothing.
        majority_sign: how TIES elects a sign: by the ``total`` of the values or by their ``frequency``; else None.
        rank: of the result of a type that ends in ``svd``; None for the largest of the adapters'.
        seed: of DARE's random masks; None for a type that draws nothing.
    """

    type: str
    density: float | None = None
    majority_sign: str | None = None
    rank: int | None = None
    seed: int | None = None

    @property
    def by_svd(self) -> bool:
        """Whether the changes themselves are combined, and the result is cut to a rank by its singular values."""
        return self.type.endswith("svd")

    @property
    def needs_equal_ranks(self) -> bool:
        """Whether the A's are combined with each other, and the B's, so that these have to be of one size."""
        return self.type != "cat" and not self.by_svd


@dataclass(frozen=True)
class Part:
    """One of the adapters.

    Attributes:
        source: where it is from. adapter: its files. weight: what its change is multiplied by; it may be negative.
    """

    source: Source
    adapter: Adapter
    weight: float

    @property
    def changes(self) -> dict[str, LowRank]:
        return {name: change for name, change in self.adapter.changes.items() if isinstance(change, LowRank)}

    def low(self, change: LowRank) -> torch.Tensor:
        """A, ``(rank, in)``."""
        return self.adapter.files.tensor(change.parts["A"])

    def high(self, change: LowRank) -> torch.Tensor:
        """B, ``(out, rank)``."""
        return self.adapter.files.tensor(change.parts["B"])

    def rank(self, change: LowRank) -> int:
        return self.adapter.files.shape(change.parts["A"])[0]

    def as_dict(self) -> dict[str, Any]:
        """For ``merge.json``."""
        folder = self.adapter.folder.absolute()
        return {"path": str(folder), "sha256": fingerprint(folder), "weight": self.weight}


def weighted(text: str) -> tuple[str, float]:
    """What ``PATH:WEIGHT`` on the command line names; without a number behind a colon the weight is 1.

    Raises:
        ExportError: nothing stands before the colon.
    """
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).expanduser().is_dir():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not path:
        raise ExportError(f"--adapter {text} names no folder (PATH or PATH:WEIGHT, such as runs/other:0.5)")
    return path, weight


def combination_of(
    type: str | None, density: float | None, majority_sign: str | None, rank: int | None, seed: int
) -> Combination:
    """The settings, checked.

    Raises:
        ExportError: one is not known, is missing, or would do nothing.
    """
    type = type or DEFAULT
    if type not in COMBINATIONS:
        raise ExportError(f"combination {type!r} is not known (allowed: {', '.join(COMBINATIONS)})")
    prunes = type.startswith(("ties", "dare", "magnitude"))
    if density is None and prunes:
        raise ExportError(f"combination {type} needs a density, the share of values that it keeps (--density 0.5)")
    if density is not None and not prunes:
        raise ExportError(f"combination {type} keeps every value: leave the density out, or choose one that prunes")
    if density is not None and not 0 < density <= 1:  # written so that what is no number fails
        raise ExportError(f"density {density:g} is not allowed (more than 0, at most 1)")
    elects = "ties" in type
    if majority_sign is not None and not elects:
        raise ExportError(f"combination {type} elects no signs: leave the majority sign out, or choose ties")
    if majority_sign not in (None, *SIGNS):
        raise ExportError(f"majority sign {majority_sign!r} is not known (allowed: {', '.join(SIGNS)})")
    if rank is not None and not type.endswith("svd"):
        raise ExportError(f"combination {type} has no rank to choose: leave it out, or choose svd")
    if rank is not None and rank < 1:
        raise ExportError(f"rank {rank} is not allowed (1 or more)")
    if not 0 <= seed < 2**63:
        raise ExportError(f"seed {seed} is not allowed (0 to 2**63 - 1)")
    sign = (majority_sign or SIGNS[0]) if elects else None
    return Combination(type, density, sign, rank, seed if type.startswith("dare") else None)


def parts_of(
    first: Source, weight: float, adapters: Sequence[tuple[Path | str, float]], how: Combination, base: str | None
) -> list[Part]:
    """The adapters, all of which can be combined.

    Args:
        base: the one that was named for all of them; None: each names its own, and these have to be the same.

    Raises:
        ExportError: one cannot be; says which and why.
    """
    parts: list[Part] = []
    for source, share in [(first, weight), *((open_source(Path(path)), share) for path, share in adapters)]:
        if source.adapter is None:
            raise ExportError(f"{source.path} has no adapter (it was trained in full): only adapters are combined")
        if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share) or share == 0:
            raise ExportError(f"the weight of {source.path} is {share} (allowed: a number that is not 0)")
        part = Part(source, Adapter(source.adapter), float(share))
        _check_kind(part)
        for other in parts:
            _check_pair(other, part, base)
        parts.append(part)
    if how.needs_equal_ranks:
        _check_ranks(parts, how)
    return parts


def _check_kind(part: Part) -> None:
    """Refuse what is more than low-rank products on a base."""
    adapter = part.adapter
    for name, change in adapter.changes.items():
        if not isinstance(change, LowRank):
            raise ExportError(f"{adapter.path} holds {name} whole, which cannot be combined with another adapter's")
        if "magnitude" in change.parts:
            raise ExportError(f"{adapter.path} is a DoRA adapter, whose norms cannot be combined: merge it by itself")
        if "bias" in change.parts:
            raise ExportError(f"{adapter.path} trained biases (lora_bias), which PEFT does not combine")
    if part.source.on_quantized:
        raise ExportError(
            f"{adapter.folder} began as what the base's quantization lost (LoftQ), which a sum would have as often as "
            "it has adapters or weights: merge it by itself"
        )


def _check_pair(one: Part, other: Part, base: str | None) -> None:
    mine, its = one.adapter, other.adapter
    if same_folder(mine.folder, its.folder):
        raise ExportError(f"the adapter {its.folder} is named twice: name it once, with the sum of its weights")
    for key in ("task_type", "fan_in_fan_out"):
        if (mine.config.get(key) or None) != (its.config.get(key) or None):
            raise ExportError(
                f"{its.folder} has {key} {its.config.get(key)!r}, {mine.folder} has {mine.config.get(key)!r}: "
                "they cannot be combined"
            )
    if one.source.rope != other.source.rope:
        raise ExportError(
            f"{other.source.path} and {one.source.path} were trained with different rotary scaling of the base: "
            "they cannot be combined"
        )
    if base is None:
        _check_bases(one, other)
    brings = [part for part in (one, other) if (part.adapter.folder / "tokenizer_config.json").is_file()]
    if len(brings) == 2:
        words = [load_tokenizer(part.adapter.folder).get_vocab() for part in brings]
        if words[0] != words[1]:
            raise ExportError(
                f"{its.folder} and {mine.folder} bring tokenizers with different tokens: they cannot be combined"
            )


def _check_bases(one: Part, other: Part) -> None:
    names = [base_of(part.source, part.adapter) for part in (one, other)]
    if names[0] == names[1] or None in names:  # one that names none is taken to belong to what the others belong to
        return
    folders = [local_base(str(name)) for name in names]  # nothing is fetched for a base that is then refused
    if folders[0] is None or folders[1] is None or not same_folder(folders[0], folders[1]):
        raise ExportError(
            f"{other.source.path} was trained on {names[1]}, {one.source.path} on {names[0]}: adapters of different "
            "bases cannot be combined; if both are the same model, name it with ft merge --base"
        )


def _check_ranks(parts: Sequence[Part], how: Combination) -> None:
    seen: dict[str, tuple[int, Path]] = {}
    largest: dict[Path, int] = {}
    for part in parts:
        for name, change in part.changes.items():
            rank = part.rank(change)
            known, whose = seen.setdefault(name, (rank, part.adapter.folder))
            if rank != known:
                raise ExportError(
                    f"combination {how.type} needs equal ranks: {name} has rank {known} in {whose} and {rank} in "
                    f"{part.adapter.folder}; choose cat or one that ends in svd"
                )
            largest[part.adapter.folder] = max(rank, largest.get(part.adapter.folder, 0))
    if len(set(largest.values())) > 1:  # what PEFT asks for, also of adapters that share no module
        said = ", ".join(f"{rank} in {folder}" for folder, rank in largest.items())
        raise ExportError(f"combination {how.type} needs equal ranks ({said}): choose cat or one that ends in svd")


def other_templates(parts: Sequence[Part]) -> list[str]:
    """A line on each adapter that brings another chat template than the first one's, which is the merged model's."""
    templates = [_template(part) for part in parts]
    return [
        f"the chat template is that of {parts[0].source.path}: {part.source.path} brings another one"
        for part, template in zip(parts, templates, strict=True)
        if template is not None and template != templates[0]
    ]


def _template(part: Part) -> str | None:
    folder = part.adapter.folder
    if not (folder / "tokenizer_config.json").is_file():
        return None
    template = load_tokenizer(folder).chat_template
    return None if template is None else str(template)
