"""One module for families that are alike: how the language side of each maps onto ft-core's fast layers.

Each function takes transformers' configuration of the whole model. What sees (the vision tower, and the projector
behind it) stays transformers' own.
"""

__all__: list[str] = []
