"""One module for families that are alike: how the language side of each maps onto ft-core's fast layers.

Each function takes transformers' configuration of the whole model. What sees (the vision tower, and the projector
behind it) stays transformers' own; where its parts lie, and what a batch has for them, is in ``parts``.
"""

__all__: list[str] = []
