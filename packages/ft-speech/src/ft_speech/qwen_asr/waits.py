"""The audio encoder without waiting: transformers asks the GPU for the windows' lengths in every layer.

Each time the host waits until all that it has launched is done. The lengths are the same in all layers: here they are
asked for once a pass, and the layers are handed what the host then knows. What is computed stays the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ft_core.fast.forwards import Replaced, has_other

__all__ = ["tell_lengths"]

KIND = "Qwen3ASRAudioAttention"
"""transformers' module whose forward takes ``cu_seqlens`` and splits by them, but with a flash attention."""


def tell_lengths(model: nn.Module) -> int:
    """Let the encoder's attention layers split by lengths that the host knows; how many layers there are."""
    lengths, found = _Lengths(), 0
    for module in model.modules():
        if type(module).__name__ != KIND or has_other(module):
            continue
        if not isinstance(vars(module).get("forward"), _AttentionForward):
            vars(module)["forward"] = _AttentionForward(module, lengths)
        found += 1
    return found


class _Lengths:
    """The host's copy of the last bounds."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor] | None = None

    def of(self, bounds: Tensor) -> Tensor:
        if bounds.device.type == "cpu":
            return bounds
        if self._known is None or self._known[0] is not bounds:
            self._known = (bounds, bounds.cpu())
        return self._known[1]


class _AttentionForward(Replaced):
    def __init__(self, module: nn.Module, lengths: _Lengths) -> None:
        super().__init__(module)
        self._lengths = lengths

    def __call__(self, hidden_states: Tensor, cu_seqlens: Tensor, *args: Any, **keywords: Any) -> Any:
        config: Any = self.module.config
        if "flash" not in str(config._attn_implementation):  # that wants them on the GPU
            cu_seqlens = self._lengths.of(cu_seqlens)
        return self.own(hidden_states, cu_seqlens, *args, **keywords)
