"""llama.cpp's roundings, put on a transformers model: the yardstick of what a GGUF type costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["RoundedProducts", "round_to"]


class RoundedProducts:
    """While it is entered, the model multiplies as llama.cpp does: weights and inputs of its linear layers rounded."""

    def __init__(self, model: Any, type: str) -> None:
        import torch

        self._type = type
        self._layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        self._weights = {id(p): p for m in model.modules() for p in m.parameters(recurse=False) if p.dim() > 1}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for weight in self._weights.values():
            weight.data.copy_(round_to(weight.data, self._type))
        for layer in self._layers:
            self._handles.append(layer.register_forward_pre_hook(self._inputs))

    def _inputs(self, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_to(args[0], self._type), *args[1:])

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def round_to(value: torch.Tensor, type: str) -> torch.Tensor:
    """To F16 and back, or to Q8_0 and back: blocks of 32 in 255 steps of largest / 127, the step itself in F16."""
    if type == "f16" or value.shape[-1] % 32:
        return value.half().to(value.dtype)
    blocks = value.reshape(*value.shape[:-1], -1, 32)
    step = (blocks.abs().amax(dim=-1, keepdim=True) / 127).half().to(value.dtype)
    steps = (blocks / step.clamp_min(1e-12)).round()
    return (steps * step).reshape(value.shape)
