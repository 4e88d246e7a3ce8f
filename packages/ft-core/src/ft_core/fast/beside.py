"""What a padded batch holds beside text, such as images, and where it belongs once padding is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ft_core.fast.scores import Unpadded

__all__ = ["Beside"]


@dataclass(frozen=True, eq=False)
class Beside:
    """What stands behind some tokens of a padded batch ``[B, L]``; a piece of it (an image) is held once, however many
    rows show it. All of it lies on the CPU until a pass needs it.

    Attributes:
        pieces: of each keyword of the forward pass what every piece has for it; several are joined along dimension 0.
        number: int64 ``[B, L]``, the piece that a token stands for, -1 where it is a word.
        begins: bool ``[B, L]``, at the first of a piece's tokens.
        tokens: keywords with a value for each token, ``[B, L]``.
        coordinates: int64 ``[3, B, L]``, of families whose positions are of time, height and width.
    """

    pieces: Mapping[str, Sequence[Tensor]]
    number: Tensor
    begins: Tensor
    tokens: Mapping[str, Tensor]
    coordinates: Tensor | None = None

    def told_apart(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Token ids ``[B, L]`` that are equal only where what stands behind them is: two images' tokens look alike."""
        number: npt.NDArray[np.int64] = self.number.numpy()
        return np.where(number < 0, ids, -1 - number)

    def padded(self, places: Tensor) -> dict[str, Any]:
        """Keywords of the forward pass for the batch as it is.

        Args:
            places: int64 ``[B, L]``, each token's place in its row, on the device of the pass.
        """
        order = self.number[self.begins].tolist()
        tokens = {name: value.to(places.device) for name, value in self.tokens.items()}
        return self._joined(order, places.device) | tokens | {"position_ids": self._positions(places, self.coordinates)}

    def packed(self, row: Unpadded) -> dict[str, Any]:
        """The same for its tokens as one row of documents, where what rows share stands once."""
        _, firsts = np.unique(row.at.cpu()[self.begins].numpy(), return_index=True)
        order = self.number[self.begins].numpy()[firsts].tolist()
        device, to = row.ids.device, row.at[row.kept]

        def spread(value: Tensor) -> Tensor:
            made = value.new_zeros((*value.shape[:-2], 1, row.ids.shape[1]), device=device)
            made[..., 0, to] = value.to(device)[..., row.kept]
            return made

        coordinates = None if self.coordinates is None else spread(self.coordinates)
        tokens = {name: spread(value) for name, value in self.tokens.items()}
        return self._joined(order, device) | tokens | {"position_ids": self._positions(row.positions, coordinates)}

    def ahead(self, attention_mask: Tensor) -> Tensor | None:
        """By how much the coordinates of what follows each row differ from its place in the row: int64 ``[B]``.

        Args:
            attention_mask: ``[B, L]``, nonzero at tokens.
        """
        if self.coordinates is None:
            return None
        mask = attention_mask.bool().cpu()
        last = self.coordinates.amax(0).masked_fill(~mask, -1).amax(1)
        return (last + 1 - mask.sum(1)).to(attention_mask.device)

    def _joined(self, order: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        if not order:
            return {}
        return {name: torch.cat([every[i] for i in order]).to(device) for name, every in self.pieces.items()}

    def _positions(self, places: Tensor, coordinates: Tensor | None) -> Tensor:
        """``[B, L]``, or with the coordinates behind them ``[4, B, L]``."""
        return places if coordinates is None else torch.cat([places[None], coordinates.to(places.device)])
