"""What a row of the table of architectures is made of, and what follows from it for the tensors of one model.

A rule maps source names (a regular expression) to one or more targets; sources that share a target are handed to its
operation together, in the order of the ``index`` group. So a permutation is one to one, a split of a fused weight is
one to many, a stack of experts is many to one, and dropping is one to none.

Names of targets are transformers' style; ``gguf.TensorNameMap`` turns them into llama.cpp's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Architecture", "Operation", "Output", "Rule", "plan", "same"]

Operation = Callable[[Sequence["torch.Tensor"], Any], "torch.Tensor"]
"""From the source tensors and the transformers configuration to the target tensor. Must work on meta tensors."""


@dataclass(frozen=True)
class Rule:
    """Sources whose whole name matches ``pattern`` become ``targets``: templates of names with the pattern's groups."""

    pattern: str
    targets: tuple[tuple[str, Operation], ...] = ()


@dataclass(frozen=True)
class Output:
    """One tensor to write: its name in transformers' style, where it comes from, and how."""

    name: str
    sources: tuple[str, ...]
    make: Operation


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        classes: the transformers classes (``architectures`` in config.json) that it covers.
        name: llama.cpp's name of the architecture.
        check: raises ExportError where a configuration has what llama.cpp's graph has not.
        keys: GGUFWriter methods and the configuration's attributes that they take.
        rules: how tensors are made; the first rule that matches counts, and a tensor without a rule stays as it is.
        extra_keys: writes the keys that are more than one attribute.
        extra_tensors: makes tensors that the source does not have, in fp32, by their GGUF name.
        float32: endings of GGUF names that stay in F32 besides norms and one-dimensional tensors.
        activation: the one that llama.cpp's graph has, by transformers' name.
        parameter: from a source's name to the name of the parameter that it becomes part of in the loaded model.
        has_mixes: whether :mod:`ft_export.gguf.mixes` says what type each of its tensors gets.
    """

    classes: tuple[str, ...]
    name: str
    check: Callable[[Any], None]
    keys: tuple[tuple[str, str], ...]
    rules: tuple[Rule, ...] = ()
    extra_keys: Callable[[Any, Any], None] | None = None
    extra_tensors: Callable[[Any], Iterator[tuple[str, torch.Tensor]]] | None = None
    float32: tuple[str, ...] = ()
    activation: str = "silu"
    parameter: Callable[[str], str] = str
    has_mixes: bool = True


def same(tensors: Sequence[torch.Tensor], config: Any) -> torch.Tensor:
    """The source as it is."""
    return tensors[0]


def plan(architecture: Architecture, config: Any, sources: Sequence[str]) -> list[Output]:
    """What to write, in the sources' order.

    The head is left out where it is tied to the embeddings: llama.cpp then takes these.
    """
    gathered: dict[str, tuple[Operation, list[tuple[int, str]]]] = {}
    for source in sources:
        if source == "lm_head.weight" and getattr(config, "tie_word_embeddings", False):
            continue
        for template, operation, index in _targets(architecture, source):
            gathered.setdefault(template, (operation, []))[1].append((index, source))
    return [
        Output(name, tuple(source for _, source in sorted(members)), operation)
        for name, (operation, members) in gathered.items()
    ]


def _targets(architecture: Architecture, source: str) -> list[tuple[str, Operation, int]]:
    for rule in architecture.rules:
        match = re.fullmatch(rule.pattern, source)
        if match:
            groups = match.groupdict()
            index = int(groups.get("index") or 0)
            return [(template.format(**groups), operation, index) for template, operation in rule.targets]
    return [(source, same, 0)]
