"""What a vision tower and its projector leave in memory for backward, counted on transformers' own code.

Their layers are run once, on weights that hold no numbers, as a training on a GPU in bfloat16 would run them: matrix
products, convolutions and attention make results of the right shape and note what they save, and what autocast would
cast is cast. What autograd keeps then is what it keeps there, whatever the family. Attention saves queries, keys,
values, its output and a sum a row, as fused kernels do (Dao et al. 2022, arXiv:2205.14135, algorithm 1).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Counted", "count_tower"]

SIDE = 8
"""Patches along each side of the image that families with images of any size are counted with: whole merges."""


@dataclass(frozen=True)
class Counted:
    """Of one image.

    Attributes:
        tokens: how many it becomes. pixels: numbers of it that the tower is handed. patches: of all its tiles.
        kept: bytes that wait from forward to backward. copies: bytes of trained 32-bit weights in 16 bits.
    """

    tokens: int
    pixels: int
    patches: int
    kept: int
    copies: int


def count_tower(
    model: Any,
    grids: bool,
    blocks: str | None,
    lower: Collection[Any] | None = None,
    upper: Collection[Any] | None = None,
) -> Counted:
    """Run a tower and its projector on one image.

    Args:
        model: with the tower's and projector's parameters on the CPU, of any content, trained or not; the rest may be
            on the meta device. Its tower is left with fewer layers.
        grids: whether images have a size of their own, told in patches.
        blocks: the list of the tower's layers, by its path; where images are of one size it is run with two and three
            of them, and the others are counted like the third. None: with all.
        lower, upper: what autocast computes in 16 and in 32 bits; as on a GPU unless given, and nothing where
            ``lower`` is empty.

    Raises:
        ValueError: the tower takes its images in no way that is known here.
    """
    mode = _AsOnAGpu(model, LOWER if lower is None else lower, UPPER if upper is None else upper)
    whole = 0 if blocks is None or grids else len(model.get_submodule(blocks))
    if whole <= 3:
        return _run(model, grids, mode)
    assert blocks is not None
    parent, _, name = blocks.rpartition(".")
    layers = list(model.get_submodule(blocks))
    configs = [model.config.vision_config, *(getattr(one, "config", None) for one in model.modules())]
    found = []
    for count in (3, 2):  # what looks at layers is attached once, to those that are there
        setattr(model.get_submodule(parent), name, nn.ModuleList(layers[:count]))
        for config in configs:  # by which layers that are looked at are counted from the last
            if type(config) is type(model.config.vision_config):
                config.num_hidden_layers = count
        mode.forget()
        found.append(_run(model, grids, mode))
    three, two = found
    kept, copies = (
        getattr(two, name) + (whole - 2) * (getattr(three, name) - getattr(two, name)) for name in ("kept", "copies")
    )
    return Counted(two.tokens, two.pixels, two.patches, kept, copies)


def _run(model: Any, grids: bool, mode: _AsOnAGpu) -> Counted:
    vision = model.config.vision_config
    size = getattr(vision, "image_size", None)
    reasons = []
    for given in _ways(vision, grids, size):
        try:
            with _noted(model) as kept, mode:
                features, deep = _handed_on(model.model.get_image_features(**given))
            gc.collect()  # what a tower makes and nobody takes
            waiting = kept()
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        pixels = given["pixel_values"]
        patch = int(getattr(vision, "patch_size", 1))
        patches = pixels.shape[0] if grids else pixels.numel() // (3 * patch * patch)
        del deep
        tokens = sum(len(one.reshape(-1, one.shape[-1])) for one in features)
        return Counted(tokens, pixels.numel(), int(patches), waiting, mode.copied())
    raise ValueError("; ".join(reasons) if reasons else "no size of its images is known")


def _ways(vision: Any, grids: bool, size: Any) -> Iterator[dict[str, Any]]:
    """What an image may be handed over as, by the families there are."""
    if grids:
        side = SIDE * int(getattr(vision, "spatial_merge_size", 2)) // 2
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        yield {"pixel_values": torch.ones(side * side, values), "image_grid_thw": torch.tensor([[1, side, side]])}
    if not isinstance(size, int):
        return
    if getattr(vision, "model_type", None) == "pixtral":  # takes any size
        side = 2 * SIDE * int(vision.patch_size)
        yield {"pixel_values": torch.ones(1, 3, side, side), "image_sizes": torch.tensor([[side, side]])}
    one, sizes = torch.ones(1, 3, size, size), torch.tensor([[size, size]])
    yield {"pixel_values": one}
    yield {"pixel_values": one, "image_sizes": sizes}
    yield {"pixel_values": one[None]}
    for tiles in range(2, 8):
        yield {"pixel_values": one.expand(tiles, -1, -1, -1)[None], "image_sizes": sizes}


def _handed_on(made: Any) -> tuple[list[Tensor], Any]:
    """What the language model is handed: an image's features, and those of its tower's earlier layers."""
    found = getattr(made, "pooler_output", made)
    return [found] if isinstance(found, Tensor) else list(found), getattr(made, "deepstack_features", None)


@contextmanager
def _noted(model: Any) -> Iterator[Callable[[], int]]:
    """Note what autograd saves; the function says how many bytes of it are still kept, weights left out.

    Of layers that are computed again (``gradient_checkpointing``) that is what they are handed.
    """
    own = {_place(tensor) for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "meta"}
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        if not getattr(tensor, "_is_weight", False):
            alive.add(saved)
        return saved

    def kept() -> int:
        sizes = {_place(one.tensor): one.tensor.untyped_storage().nbytes() for one in alive}
        return sum(size for place, size in sizes.items() if place not in own)

    held: list[_Saved] = []

    def again(layer: Callable[..., Any], *args: Any) -> Any:
        given = [one for one in (*args, *getattr(layer, "keywords", {}).values()) if isinstance(one, Tensor)]
        held.extend(_Saved(tensor) for tensor in given)
        alive.update(held)
        with torch.no_grad():
            made = layer(*args)
        found = made[0] if isinstance(made, tuple) else made
        needs = torch.ones((), requires_grad=True)  # backward goes on into it
        found = _Through.apply(found, needs)  # type: ignore[no-untyped-call]
        return (found, *made[1:]) if isinstance(made, tuple) else found

    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module._gradient_checkpointing_func = again
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield kept


class _Through(torch.autograd.Function):
    """A layer's output that was made without a graph, as a node of one that keeps nothing."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, needs: Tensor) -> Tensor:
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("nothing is differentiated here")


class _Saved:
    """A tensor that waits for backward. What made it is let go of: a result that its own node saves would hold it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


LOWER = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv2d, torch.conv3d, torch.matmul, torch.mm, torch.bmm}
LOWER |= {Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
"""What autocast computes in 16 bits: products."""
UPPER = {F.layer_norm, torch.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax}
UPPER |= {
    torch.pow,
    Tensor.pow,
    Tensor.__pow__,
    torch.rsqrt,
    Tensor.rsqrt,
    torch.exp,
    Tensor.exp,
    torch.sum,
    Tensor.sum,
}
UPPER |= {torch.norm, Tensor.norm, torch.reciprocal, Tensor.reciprocal}
"""What autocast computes in 32 bits (torch's documentation of CUDA ops that autocast to float32)."""


class _AsOnAGpu(TorchFunctionMode):
    """Autocast to bfloat16 as CUDA's, products and attention without their arithmetic."""

    def __init__(self, model: Any, lower: Collection[Any], upper: Collection[Any]) -> None:
        super().__init__()
        self._casts_at_all, self._upper = bool(lower), upper
        self._weights = {id(parameter) for parameter in model.parameters()}
        self._casts: dict[int, Tensor] = {}

    def forget(self) -> None:
        """Begin anew: no weight was cast yet."""
        self._casts = {}

    def copied(self) -> int:
        """Bytes of the casts of trained weights."""
        return sum(cast.nbytes for cast in self._casts.values() if cast.requires_grad)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._cast(one, torch.bfloat16) for one in args[:3])
            return _Attention.apply(q, k, v)  # type: ignore[no-untyped-call]
        if func is F.multi_head_attention_forward:  # SigLIP's pooling, of which nothing is made here
            return torch.zeros_like(args[0]), None
        if func in LOWER:
            given = [self._cast(one, torch.bfloat16) for one in args]
            named = {name: self._cast(one, torch.bfloat16) for name, one in kwargs.items()}
            return _Product.apply(func, named, *given)  # type: ignore[no-untyped-call]
        if func in self._upper:
            args = [self._cast(one, torch.float32) for one in args]
            kwargs = {name: self._cast(one, torch.float32) for name, one in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """A tensor in this format; of a weight one copy, which is not counted among what is kept."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not self._casts_at_all:
            return value
        if id(value) not in self._weights:
            return value.to(dtype)
        if id(value) not in self._casts:
            made = torch.empty(value.shape, dtype=dtype, requires_grad=value.requires_grad)
            made._is_weight = True  # type: ignore[attr-defined]
            self._casts[id(value)] = made
        return self._casts[id(value)]


class _Product(torch.autograd.Function):
    """A result of the shape that a product has; it keeps each factor that the gradient of another one needs."""

    @staticmethod
    def forward(ctx: Any, func: Any, named: dict[str, Any], *args: Any) -> Tensor:
        bare = [one.to("meta") if isinstance(one, Tensor) else one for one in args]
        with torch.no_grad():
            made = func(*bare, **{n: one.to("meta") if isinstance(one, Tensor) else one for n, one in named.items()})
        needs = ctx.needs_input_grad[2:]
        first, second = args[0], args[1]
        ctx.save_for_backward(first if needs[1] else None, second if needs[0] else None)
        return torch.zeros(made.shape, dtype=made.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("nothing is differentiated here")


class _Attention(torch.autograd.Function):
    """A result of attention's shape, and what a fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, heads, length, _ = q.shape
        made = torch.zeros(rows, length, heads, v.shape[-1], dtype=q.dtype).transpose(1, 2)  # as the kernels lay it
        ctx.save_for_backward(q, k, v, made, torch.zeros(q.shape[:-1], dtype=torch.float32))
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("nothing is differentiated here")
