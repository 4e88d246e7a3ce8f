"""CSM's backbone on ft_core's fast layers; its depth decoder stays on transformers' own."""

from __future__ import annotations

from typing import Any

from ft_core.fast.layout import Layout, Mlp, activation

__all__ = ["describe", "fast"]

TRIED = 160
"""Places of a trial: from 128 on, products take the way that long rows take."""
NO_HEAD = "no_head"
"""An attribute that no model has. Two losses follow from the backbone's states, so that the one fused head of language
models cannot take the whole model's place: layers and last norm are computed fast, and the rest is transformers'."""


def describe(config: Any) -> Layout:
    """The layout of a CSM's backbone, whose layers are a Llama's."""
    return Layout.of(
        config, "CsmDecoderLayer", backbone="backbone_model", head=NO_HEAD, mlp=Mlp(activation=activation(config))
    )


def fast(model: Any) -> Any:
    """Put the fast layers into the backbone and try them on this machine; see
    :attr:`ft_core.plugins.ModalitySpec.fast`.

    Raises:
        ft_core.fast.NotFast: they are not made for this model, or fail here.
    """
    from ft_core import fast as layers
    from ft_core.memory import is_memory_error

    path = layers.enable(model)
    try:
        _try(path.model)
    except Exception as error:
        if is_memory_error(error):
            raise
        layers.disable(model)
        words = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        raise layers.NotFast(f"the fast ones fail on this machine ({words})") from error
    return path


def _try(model: Any) -> None:
    """Forward and backward of the backbone on a few embedded places, as :func:`ft_core.fast.trial` does of tokens."""
    import torch

    from ft_core.models.modes import modes_kept

    backbone = model.backbone_model
    device, dtype = model.device, next(backbone.layers.parameters()).dtype
    drawn = torch.randn(1, TRIED, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    embeds = drawn.to(device, dtype).requires_grad_()
    with modes_kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        backbone.train()
        with torch.autocast(device.type, dtype, enabled=dtype.itemsize == 2):
            hidden = backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state
        trained = [p for p in backbone.parameters() if p.requires_grad]
        torch.autograd.grad(hidden.float().sum(), [embeds, *trained], allow_unused=True)
