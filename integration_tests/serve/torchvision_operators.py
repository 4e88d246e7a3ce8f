"""Lets torchvision be imported beside a torch of another build, as far as SGLang needs it: for text that is nowhere.

torchvision's library does not load beside the processor's torch. What it brings is then missing when torchvision
describes two of its operators to torch, and that fails. Here they are declared, without anything that computes them,
when torchvision is about to be imported. ``nox -s sglang`` puts this file into its environment, where every Python
imports it at its start: SGLang's own processes too. Nothing but the standard library is imported until then.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder

__all__: list[str] = []

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _Declares(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Declare the operators when torchvision is asked for, and leave the search to others."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(operator)
            self.library = library  # what it declares goes with it
            kept.append(self)


kept: list[_Declares] = []
sys.meta_path.insert(0, _Declares())
