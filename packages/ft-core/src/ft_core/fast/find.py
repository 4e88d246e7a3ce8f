"""Which layout a model has, through the registry of architectures, or why it has none."""

from __future__ import annotations

from typing import Any

from torch import nn

from ft_core.errors import PluginError
from ft_core.fast.layout import Layout, at
from ft_core.installing import how_to_install
from ft_core.plugins import EXTRAS, ArchitectureSpec, registry, resolve

__all__ = ["NotFast", "described", "layout_of", "unwrapped"]


class NotFast(Exception):
    """Why a model cannot run on the fast layers, in words that follow "trained on transformers' own layers: "."""


def unwrapped(model: Any) -> Any:
    """The transformers model that PEFT, DDP or torch.compile may have wrapped."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def layout_of(model: Any) -> Layout:
    """The layout of a model, checked against its modules.

    Raises:
        NotFast: the family is unknown, or this model has parts that the layout doesn't know.
    """
    config, text = model.config, model.config.get_text_config()
    # A model of images and text is a family of its own, though its layers may be those of a Llama.
    own = config is text or _extra(config.model_type) is not None or _spec(config.model_type) is not None
    layout = described(config if own else text)
    _check(model, text, layout)
    return layout


def described(config: Any) -> Layout:
    """The layout that a configuration's family states.

    Args:
        config: transformers', of a language model or of one that sees or hears, too.

    Raises:
        NotFast: the family is unknown, or has no layout for this configuration.
    """
    spec = _spec(config.model_type)
    if spec is None and (extra := _extra(config.model_type)) is not None:
        raise NotFast(f"the family {config.model_type} needs a package that is not here: {how_to_install(extra)}")
    if spec is None:
        raise NotFast(f"the family {config.model_type} is not known to them (`ft models` lists those that are)")
    if spec.describe is None:
        raise NotFast(f"the family {config.model_type} has layers of its own, for its own task alone")
    try:
        layout: Layout = resolve(spec.describe)(config)
    except (ValueError, AttributeError) as error:
        raise NotFast(str(error)) from error
    return layout


def _spec(model_type: str) -> ArchitectureSpec | None:
    known = registry()
    for name in known.names(ArchitectureSpec.group):
        try:
            spec = known.get(ArchitectureSpec, name)
        except PluginError:
            continue  # one that cannot be imported harms no other; `ft plugins` names it
        if model_type in spec.model_types:
            return spec
    return None


def _extra(model_type: str) -> str | None:
    """The extra of ft-core that brings the family, whether it is installed or not."""
    return EXTRAS[ArchitectureSpec.group].get(model_type)


def _check(model: Any, config: Any, layout: Layout) -> None:
    try:
        at(model, layout.outer)
        backbone = at(model, layout.backbone)
        layers = at(backbone, layout.layers)
        at(backbone, layout.norm), at(backbone, layout.rotary)
    except AttributeError as error:
        raise NotFast(f"it is not built as its family: {error}") from None
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise NotFast("it lies on several devices")
    if getattr(config, "attention_dropout", 0.0):
        raise NotFast(f"its attention has a dropout of {config.attention_dropout}")
    for layer in layers:
        if (kind := _kind(layer)) != layout.layer_class:
            raise NotFast(f"its layers are {kind}, not {layout.layer_class}")
        _check_layer(layer, layout)


def _kind(layer: nn.Module) -> str:
    """The name of a layer's class. FSDP2 gives a module that it shards a class of its own, over FSDPModule and that."""
    names = [kind.__name__ for kind in type(layer).__mro__]
    return names[2] if names[1] == "FSDPModule" else names[0]


def _check_layer(layer: nn.Module, layout: Layout) -> None:
    attention, mlp, norms = layout.attention, layout.mlp, layout.norms
    inside = {
        attention.module: (*attention.qkv, attention.out, attention.q_norm, attention.k_norm),
        mlp.module: (*mlp.gate_up, mlp.down),
    }
    names = [n for n in (norms.attention, norms.mlp, norms.after_attention, norms.after_mlp) if n is not None]
    names += [f"{module}.{name}" for module, parts in inside.items() for name in parts if name is not None]
    try:
        found = [at(layer, name) for name in names]
    except AttributeError as error:
        raise NotFast(f"its layers are not built as its family's: {error}") from None
    known = {id(part) for part in found}
    for name, module in layer.named_modules():
        # What has parameters and is in no part that the layout names would be left out of the computation.
        if list(module.parameters(recurse=False)) and not any(id(part) in known for part in _around(layer, name)):
            raise NotFast(f"its layers have a part {name!r} that its family's have not")


def _around(layer: nn.Module, name: str) -> list[nn.Module]:
    """A module and the modules that it lies in, up to but not counting the layer."""
    parts = name.split(".")
    return [at(layer, ".".join(parts[: i + 1])) for i in range(len(parts))]
