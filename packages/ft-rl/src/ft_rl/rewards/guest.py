"""A reward model as a guest on the policy's base: its adapter is in the layers while it scores, and nowhere otherwise.

What PEFT, the optimizer, checkpoints and saving see of the policy is what they see without it: no name, no parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ft_core.data.collating import keeps_documents_apart
from ft_core.errors import ModelError, RunError
from ft_core.fast.find import NotFast, unwrapped
from ft_core.fast.scores import Backbone
from ft_rl.rewards.stored import HEAD, PART, WEIGHTS, StoredAdapter, why_no_score
from ft_rl.scoring import last_tokens

if TYPE_CHECKING:
    from ft_core.config import TrainConfig

__all__ = ["Guest", "NotShared", "Policy"]

NAME = "reward"
"""The adapter's name while it is there."""


class NotShared(Exception):
    """Why a reward model needs a base of its own, in words that follow "is loaded beside the policy: "."""


@dataclass(frozen=True)
class Policy:
    """The model whose completions are scored.

    Attributes:
        model: with its adapter. config: the configuration that trains it, or that it was trained with.
        say: prints one line.
    """

    model: Any
    config: TrainConfig
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class _Place:
    """A layer of PEFT's, and what it computes beside its weight while the guest is there."""

    layer: Any
    a: nn.Linear
    b: nn.Linear
    scaling: float


class Guest:
    """Scores by the policy's base, with an adapter and a head of its own.

    Args:
        policy: whose base it is. stored: the adapter, which fits it (:meth:`StoredAdapter.why_apart`).

    Attributes:
        backbone: of the policy. head: float32 ``[1, H]``. places: one for each adapted layer.
        padding_free: whether padding is left out.

    Raises:
        NotShared: the policy's layers are not those that the adapter is for, or such as ft's cannot compute.
        ModelError: the adapter's file cannot be read.
    """

    def __init__(self, policy: Policy, stored: StoredAdapter) -> None:
        from transformers.integrations import is_fsdp_enabled

        if is_fsdp_enabled():
            raise NotShared("the policy's base is sharded")
        try:
            backbone = Backbone.need(policy.model)
        except NotFast as error:
            raise NotShared(f"ft's layers cannot compute the policy: {error}") from None
        # Of the model itself: what its configuration said beforehand, and `ft plan` with it.
        layers = _adapted(backbone.model)
        sizes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
        hidden = backbone.model.config.get_text_config().hidden_size
        if (reason := why_no_score(backbone.model.config) or stored.why_unfit(hidden, sizes)) is not None:
            raise NotShared(reason)
        self.backbone = backbone
        tensors = _read(stored)
        self.head = tensors.pop(HEAD).to(backbone.model.device)
        self.places = _places(layers, tensors, stored.settings)
        self.padding_free = keeps_documents_apart(backbone.model)

    @contextmanager
    def there(self) -> Iterator[None]:
        """Within it the model computes with the guest's adapter alone, whatever it computed with before.

        Raises:
            RunError: the policy's adapter is merged into the base.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.backbone.model.modules() if isinstance(m, BaseTunerLayer)]
        if any(layer.merged for layer in layers):
            raise RunError("a reward model cannot score on the policy's base while an adapter is merged into it")
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
        try:
            for place in self.places:
                place.layer.lora_A[NAME], place.layer.lora_B[NAME] = place.a, place.b
                place.layer.lora_dropout[NAME], place.layer.scaling[NAME] = nn.Identity(), place.scaling
            # PEFT's own set_adapter would freeze the policy's, and forget that it was switched off.
            for layer in layers:
                layer._active_adapter, layer._disable_adapters = [NAME], False
            yield
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled
            for place in self.places:
                for kept in (place.layer.lora_A, place.layer.lora_B, place.layer.lora_dropout, place.layer.scaling):
                    if NAME in kept:
                        del kept[NAME]

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, pad: int) -> Tensor:
        """The scores of a batch, float32 ``[B]``.

        Args:
            input_ids, attention_mask: int64 ``[B, L]``, padded on the right. pad: the id of padding.
        """
        device = self.head.device
        ids, mask = input_ids.to(device), attention_mask.to(device)
        wanted = last_tokens(ids, mask.bool(), pad)
        with self.there():
            hidden = self.backbone.hidden_at(ids, mask, wanted, padding_free=self.padding_free)
        with torch.autocast(device.type, enabled=False):
            scores: Tensor = (hidden.float() @ self.head.T)[:, 0]
        return scores


def _read(stored: StoredAdapter) -> dict[str, Tensor]:
    """The tensors by PEFT's names, float32, as PEFT has adapters that it loads."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.float() for name, tensor in load_file(stored.folder / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter {stored.folder} cannot be loaded: {error}") from error


def _adapted(model: Any) -> dict[str, Any]:
    """PEFT's layers with an adapter, by their names in the model itself."""
    from peft.tuners.lora import LoraLayer

    modules = unwrapped(model).named_modules()
    return {path: layer for path, layer in modules if isinstance(layer, LoraLayer) and len(layer.lora_A)}


def _places(layers: Mapping[str, Any], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> list[_Place]:
    rank = settings["r"]
    scaling = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
    places = []
    for path in dict.fromkeys(part[1] for part in map(PART.fullmatch, tensors) if part is not None):
        layer = layers[path]
        device = layer.get_base_layer().weight.device
        a, b = (tensors[f"base_model.model.{path}.lora_{which}.weight"].to(device) for which in "AB")
        places.append(_Place(layer, _frozen(a), _frozen(b), scaling))
    return places


def _frozen(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made
