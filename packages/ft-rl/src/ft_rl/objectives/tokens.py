"""Batches as flat tokens, so that a padded batch and a packed one are the same thing to an objective.

An objective over tokens takes what belongs to the N trained tokens of a batch of B sequences as tensors of shape [N],
and ``sequences``, int64 of shape [N]: the number, from 0 to B - 1, of the sequence each token belongs to. Tokens of one
sequence follow each other in their order. A sequence may have no trained token, so B is told apart from
``sequences``. A packed batch is in this form once its trained positions are picked out; for a padded one there is
:func:`flatten`.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_tokens", "flatten", "sequence_lengths", "sequence_sums", "unflatten"]


def flatten(padded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The trained tokens of a padded batch.

    Args:
        padded: a value for each position, of shape [B, L].
        mask: which positions are trained tokens, of shape [B, L]; bool, or 0 and 1.

    Returns:
        The values of shape [N], row after row, and ``sequences``, int64 of shape [N]. Gradients flow back to
        ``padded``.

    Raises:
        ValueError: the shapes are not [B, L], or differ.
    """
    if padded.ndim != 2 or padded.shape != mask.shape:
        raise ValueError(f"padded and mask are of one shape [B, L], not {list(padded.shape)} and {list(mask.shape)}")
    mask = mask.bool()
    return padded[mask], mask.nonzero()[:, 0]


def unflatten(values: Tensor, mask: Tensor) -> Tensor:
    """The way back: [N] values at the places of a [B, L] mask, with zeros elsewhere.

    Raises:
        ValueError: the mask is not of shape [B, L], or has not as many places as there are values.
    """
    if mask.ndim != 2 or values.ndim != 1:
        raise ValueError(
            f"values are of shape [N] and mask of shape [B, L], not {list(values.shape)} and {list(mask.shape)}"
        )
    mask = mask.bool()
    if int(mask.sum()) != len(values):
        raise ValueError(f"mask has {int(mask.sum())} places for {len(values)} values; it must have one for each")
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def sequence_sums(values: Tensor, sequences: Tensor, num_sequences: int) -> Tensor:
    """The sum over each sequence's tokens, of shape [B]; 0 for a sequence without tokens.

    Sums run in float64: 20,000 terms added one after another in float32 can be off by 1e-5 of the sum. The result has
    the values' type.
    """
    wide = values if values.device.type == "mps" else values.double()  # Apple's GPUs have no float64
    return wide.new_zeros(num_sequences).index_add(0, sequences, wide).to(values.dtype)


def sequence_lengths(sequences: Tensor, num_sequences: int) -> Tensor:
    """The number of tokens of each sequence, int64 of shape [B]."""
    return sequences.new_zeros(num_sequences).index_add(0, sequences, torch.ones_like(sequences))


def check_tokens(sequences: Tensor, num_sequences: int | None = None, /, **per_token: Tensor | None) -> None:
    """Refuse per-token inputs that do not fit together.

    Args:
        sequences: the number of each token's sequence.
        num_sequences: B, where the caller knows it.
        per_token: the other inputs by name; None is one that was not given.

    Raises:
        ValueError: names the input, what it is and what it may be.
    """
    if sequences.ndim != 1 or sequences.dtype != torch.int64:
        raise ValueError(f"sequences is int64 of shape [N], not {sequences.dtype} of shape {list(sequences.shape)}")
    for name, value in per_token.items():
        if value is not None and value.shape != sequences.shape:
            raise ValueError(
                f"{name} is of shape {list(sequences.shape)}, a value for each token of sequences, "
                f"not {list(value.shape)}"
            )
    if num_sequences is not None and num_sequences < 1:
        raise ValueError(f"a batch has at least one sequence, not {num_sequences}")
    # On a GPU looking at the numbers would wait for it, and indexing with a wrong one fails there by itself.
    if sequences.device.type == "cpu" and sequences.numel():
        low, high = int(sequences.min()), int(sequences.max())
        if low < 0 or (num_sequences is not None and high >= num_sequences):
            allowed = "0 or more" if num_sequences is None else f"from 0 to {num_sequences - 1}"
            raise ValueError(f"the numbers in sequences are {allowed}, not from {low} to {high}")
