"""The reference of preference and reinforcement methods: the model as it was, of which there is no second copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ft_core.errors import ConfigError

if TYPE_CHECKING:
    from ft_core.config import TrainConfig

__all__ = ["adapter_off", "at_zero", "begins_neutral", "check_reference", "drop_copy", "put_switch", "take_switch"]

COPY = "ref"
"""The name under which TRL's trainers add a copy of the adapter as it begins."""


def check_reference(config: TrainConfig) -> None:
    """Refuse what an adapter that is switched off does not take back.

    Raises:
        ConfigError: the configuration trains biases of the base, or begins with an adapter that is not nothing.
    """
    if config.lora is not None and config.lora.init_lora_weights == "loftq":
        raise ConfigError(
            f"lora.init_lora_weights: loftq is not allowed with {config.method}: its reference is the model with the "
            "adapter switched off, which is not what training begins with (allowed: true, gaussian)"
        )
    if config.lora is not None and config.lora.bias != "none":
        raise ConfigError(
            f"lora.bias: {config.lora.bias} is not allowed with {config.method}: its reference is the model with the "
            "adapter switched off, and biases of the base would stay trained (allowed: none)"
        )


def begins_neutral(model: Any) -> bool:
    """Whether an adapter changes nothing yet, so that the model without it is the model that training begins with."""
    return not any(
        bool(parameter.any())
        for name, parameter in model.named_parameters()
        if ".lora_B." in name or ".lora_embedding_B." in name
    )


def drop_copy(model: Any, neutral: bool) -> None:
    """Let go of the copy of the adapter that TRL's constructor has made, where switching the adapter off does.

    Args:
        model: the model to train, with or without an adapter.
        neutral: whether the adapter was neutral before training (:func:`begins_neutral`).
    """
    if neutral and COPY in getattr(model, "peft_config", {}):
        model.delete_adapter(COPY)


@contextmanager
def adapter_off(model: Any) -> Iterator[bool]:
    """Within it the model is the reference, if it has an adapter; gives whether it has."""
    if not hasattr(model, "disable_adapter"):
        yield False
        return
    with model.disable_adapter():
        yield True


@contextmanager
def at_zero(model: Any) -> Iterator[None]:
    """Within it adapters that are switched off are computed, with the factor zero.

    The fast layers multiply a weight and its adapter in one product. Without an adapter it is another product, which
    rounds its sums elsewhere: in bfloat16 that alone moves the log-probability of a long answer by a nat or two. With
    the factor zero a reference is rounded as the policy is, and the two are equal where training begins.
    """
    from peft.tuners.lora import LoraLayer

    # DoRA's magnitude is no factor's to switch off: its layers stay as PEFT has them, off.
    layers = [
        m for m in _every(model)
        if isinstance(m, LoraLayer) and m.disable_adapters and not m.merged and not m.lora_variant
    ]  # fmt: skip
    factors = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = False
            layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
        yield
    finally:
        for layer, own in zip(layers, factors, strict=True):
            layer._disable_adapters = True
            layer.scaling.update(own)


def put_switch(model: Any) -> None:
    """Give a model with a LoRA adapter a quicker way to do without it, on the instance; :func:`take_switch` undoes it.

    PEFT's own looks at every parameter of the model, and sets for each of the adapter's whether it is trained: with 32
    layers a twentieth of a second, in each step, while the GPU waits.
    """
    if hasattr(model, "disable_adapter") and all(config.peft_type == "LORA" for config in model.peft_config.values()):
        model.disable_adapter = _Switch(model)


def take_switch(model: Any) -> None:
    """Undo :func:`put_switch`."""
    if isinstance(vars(model).get("disable_adapter"), _Switch):
        del model.disable_adapter


class _Switch:
    """In the place of PEFT's ``disable_adapter``: what is trained stays so, for nothing of it is used meanwhile."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        found = [m for m in _every(self.model) if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        before = [m._disable_adapters for m in found]
        was_off, self.model._adapters_disabled = self.model._adapters_disabled, True
        try:
            for module in found:
                module._disable_adapters = True
            yield
        finally:
            for module, was in zip(found, before, strict=True):
                module._disable_adapters = was
            self.model._adapters_disabled = was_off


def _every(module: Any) -> Iterator[Any]:
    """A module and all in it. torch's own walk, which names them, takes ten times as long."""
    waiting = [module]
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [child for child in module._modules.values() if child is not None]
