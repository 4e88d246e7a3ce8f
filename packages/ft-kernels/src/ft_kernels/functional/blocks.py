"""The halves of a decoder layer, each a single operation with as little memory traffic as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ft_kernels.functional.checked_blocks import AttentionBlock, Keep, MLPBlock
from ft_kernels.functional.lora_mlp import Activation
from ft_kernels.functional.lora_weights import BaseWeight, Part
from ft_kernels.functional.rope import RopeLayout
from ft_kernels.ops.blocks.parts import Norm

__all__ = ["AttentionBlock", "Keep", "MLPBlock", "Norm", "attention_block", "mlp_block"]


def attention_block(
    x: Tensor,
    norm: Norm,
    qkv: BaseWeight | Sequence[Part],
    o: BaseWeight,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    cos: Tensor | None,
    sin: Tensor | None,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    scaling: float | Sequence[float] = 1.0,
    bias: Sequence[Tensor | None] | None = None,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    rotary_dim: int | None = None,
    layout: RopeLayout = "half",
    dropout: float = 0.0,
    training: bool = True,
    keep: Keep = "most",
    tile: int | None = None,
) -> Tensor:
    """``x + o(attention(rope(q_norm(q)), rope(k_norm(k)), v))`` with ``q, k, v = qkv(rms_norm(x))``.

    The first half of a decoder layer that normalizes before (Llama, Mistral, Qwen). The products are those of
    :func:`lora_qkv` and :func:`lora_linear`, with low-rank updates of frozen weights inside. The norm writes into the
    product's own input, the rotation into its output, and x is added by the last product (with a bias, in fp32, or
    where a plain weight has an update: after it), so that no other pass goes over memory.

    ``keep`` is what stays in memory between forward and backward, in bytes a token, with e bytes an element, H the
    width of x, N and G the widths of q and k, r and s the ranks of q, k and v together and of o, each rounded up to a
    multiple of 16, w(n) the next multiple of 64, f = 4 (8 in fp32, or for norms of up to 32 numbers), and T what
    ``attention`` keeps of its own (its output N·e, and for torch's and our kernels 4 · heads):

    ========== =======================================================================================================
    "all"      (H + N + 2·G + r + s)·e + f + T, and for the normed rows w(H + r)·e. With norms of q and k,
               (N + G)·e + (heads + kv_heads)·f more.
    "most"     (H + N + 2·G + r + s)·e + f + T. In 16 bits, for up to 128 ranks, the kernel that sums A's gradient
               norms x as it reads it, which costs no pass over memory: so this is the default. Elsewhere the norm is
               computed again, and where q and k are normed these and their rotation are.
    "inputs"   (H + r + s)·e + T: the product for q, k and v is computed again.
    "none"     (H + r + s)·e: the attention too.
    ========== =======================================================================================================

    What needs no gradient is left out: r, s, the normed rows or the output where there are no adapters. Gradients are
    the same bit for bit with each, as far as ``attention`` itself gives the same twice.

    With a ``tile`` and more rows than that, the rows are computed so many at a time, in parts of nearly one size. Whole
    are then only q, k and v, the attention's output, their gradients, and those of x and of the result: at the most
    (3·H + 4·N + 4·G)·e bytes a token with x and the result's gradient, (N + G)·e more where q and k are normed, and
    what ``attention`` takes. "all" keeps what "most" does. See :func:`mlp_block` for how results compare.

    Args:
        x: ``[B, S, H]`` or ``[S, H]`` in the weights' dtype, any strides.
        norm: before the product; its weight ``[H]``.
        qkv: the weights of q, k and v, one below the other or as a list, in a form that :func:`lora_qkv` takes; frozen.
        o: ``[H, heads · head_dim]``, in a form that :func:`lora_linear` takes; frozen.
        a, b: of q, k, v and o, each a tensor or None; all of one dtype. All None: gradients of x alone.
        heads, kv_heads, head_dim: of the attention.
        cos, sin: angles of x's tokens, ``[S, n]`` or ``[B or 1, S, n]``, as :func:`rope` takes them; None for both
            where nothing is rotated.
        attention: from q ``[..., S, heads, D]``, k and v ``[..., S, kv_heads, D]`` to ``[..., S, heads, D]``, by
            operations that autograd can differentiate and that write over none of the three (a
            ``functools.partial(packed_attention, plan=plan)``, whose kernels are then launched without a graph around
            them). It gets no other gradients than theirs; with "none" it
            is called again in backward, and must then draw no random numbers.
        scaling: of the updates; one number, or one for each of q, k, v and o.
        bias: of q, k, v and o, each ``[N_i]`` or None; frozen. None for none.
        q_norm, k_norm: norms of each head before the rotation (Qwen3); weights ``[head_dim]``.
        rotary_dim, layout: as for :func:`rope`.
        dropout: from 0 to below 1, of the adapters' inputs. training: whether it is on.
        keep: see above. tile: a number of rows (tokens), or None for all at once. Without the kernels (on a CPU, in
            float64) neither has an effect, and autograd keeps what it does.

    Returns:
        ``[..., S, H]`` in x's dtype. Gradients come back for x, a and b, once: a second backward through the same
        graph raises a RuntimeError unless keep is "none".

        Under autocast everything is computed in x's dtype all the same. ``torch.compile`` does not look into the
        block: the graph breaks around it.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: shapes, devices or settings do not fit, a tile has no rows, or a frozen tensor requires a gradient.
    """
    block = AttentionBlock(
        norm, qkv, o, a, b, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scaling=scaling, bias=bias,
        q_norm=q_norm, k_norm=k_norm, rotary_dim=rotary_dim, layout=layout, dropout=dropout,
    )  # fmt: skip
    return block(x, cos=cos, sin=sin, attention=attention, training=training, keep=keep, tile=tile)


def mlp_block(
    x: Tensor,
    norm: Norm,
    gate_up: BaseWeight | Sequence[Part],
    down: BaseWeight,
    a: Sequence[Tensor | None],
    b: Sequence[Tensor | None],
    *,
    activation: Activation = "silu",
    scaling: float | Sequence[float] = 1.0,
    bias: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    training: bool = True,
    keep: Keep = "most",
    tile: int | None = None,
) -> Tensor:
    """``x + down(activation(gate(n)) · up(n))`` with ``n = rms_norm(x)``.

    The second half of a decoder layer that normalizes before. The product is that of :func:`lora_mlp`; the norm writes
    into its input, and x is added by its last product, so that no other pass goes over memory.

    ``keep``, in bytes a token, with the letters of :func:`attention_block`, I the width of gate and of up, r the ranks
    of both, and s that of down:

    ========== ==================================================================================
    "all"      (H + 2·I + r + s)·e + f, and for the normed rows w(H + r)·e.
    "most"     (H + 2·I + r + s)·e + f: the norm is computed again, as for :func:`attention_block`.
    "inputs"   (H + r + s)·e: the product for gate and up is computed again. "none" is the same.
    ========== ==================================================================================

    The product of the activation and up is never kept: the pass that makes the gradients of gate and up, which it
    writes over them, makes it again.

    With a ``tile`` and more rows than that, nothing of gate and up is ever whole: forward computes so many rows at a
    time, in parts of nearly one size, and backward computes their gate and up again. So "inputs" is kept whatever
    ``keep`` says; what "most" and "all" keep more would be as large as what a tile saves. Beside x, the result and
    their gradients this takes about (3·I + 2·H)·e bytes a row of a tile, and for quantized weights both of them once,
    expanded. Tiles compute the same function with the same dropout, the same bits each time. Gradients of a and b are
    sums over tiles in fp32, in order, rounded once. The result and the gradient of x have no sums over rows: they are
    the untiled ones, but for matrix products (and splits of a row's sum in our kernels) that round differently for
    another number of rows.

    Args:
        x, norm, scaling, bias, dropout, training, keep, tile: as for :func:`attention_block`, of gate, up and down.
        gate_up: gate's weight above up's, ``[2·I, H]``, in a form that :func:`lora_qkv` takes, or both as a list.
        down: ``[H, I]``, in a form that :func:`lora_linear` takes.
        a, b: of gate, up and down, each a tensor or None; all of one dtype.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.

    Returns:
        ``[..., H]`` in x's dtype. Gradients come back for x, a and b; with "all" or "most", without tiles, once: a
        second backward through the same graph raises a RuntimeError.

    Raises:
        TypeError, ValueError: as :func:`attention_block`.
    """
    block = MLPBlock(norm, gate_up, down, a, b, activation=activation, scaling=scaling, bias=bias, dropout=dropout)
    return block(x, training=training, keep=keep, tile=tile)
