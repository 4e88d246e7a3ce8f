"""The values of a policy's states: a second adapter on its base, and a head of one number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ft_rl.policy import PolicyForward

__all__ = ["ADAPTER", "ValueModel"]

ADAPTER = "value"
"""The name of the values' adapter on the model."""
HEAD = "value_head.safetensors"
STATE = "ppo.json"


class ValueModel:
    """Values by the adapter ``value`` and a linear head in fp32, which begins at zero.

    Attributes:
        model: the model with PEFT's wrapping. policy: its forward, which takes padding out.
    """

    def __init__(self, model: Any, policy: PolicyForward) -> None:
        self.model, self.policy = model, policy
        text = policy.scorer.model.config.get_text_config()
        trained = [p for p in model.parameters() if p.requires_grad]
        (active,) = model.active_adapters
        model.add_adapter(ADAPTER, model.peft_config[active])
        names = [name for name, _ in model.named_parameters() if f".{ADAPTER}." in name]
        for name in names:  # an adapter that is added gets the model's type; training wants float32
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.float()
        model.value_head = nn.Linear(text.hidden_size, 1, device=model.device, dtype=torch.float32)
        nn.init.zeros_(model.value_head.weight)
        nn.init.zeros_(model.value_head.bias)
        self._policy_adapter = active
        self._trained = [*trained, *map(model.get_parameter, names), *model.value_head.parameters()]
        self._all_trained()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the model's adapter is the values'. Whatever is to be differentiated has to be, within it: layers
        that are computed again in backward take the adapter that is on then."""
        self.model.set_adapter(ADAPTER)
        self._all_trained()
        try:
            yield
        finally:
            self.model.set_adapter(self._policy_adapter)
            self._all_trained()

    def values(self, input_ids: Tensor, attention_mask: Tensor, labelled: Tensor) -> Tensor:
        """The value of the state before each labelled token, fp32 ``[N]``, row after row; call it within ``active``.

        Args:
            input_ids, attention_mask: ``[B, L]``, padded. labelled: bool ``[B, L − 1]``, at the position before.
        """
        hidden = self.policy.hidden_before(input_ids, attention_mask, labelled)
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.model.value_head(hidden.float())[:, 0]
        return values

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write the head, and what else belongs to it, beside the adapters of a checkpoint."""
        from safetensors.torch import save_file

        save_file({name: p.detach().cpu() for name, p in self.model.value_head.state_dict().items()}, folder / HEAD)
        (folder / STATE).write_text(json.dumps(state))

    def load(self, folder: Path) -> dict[str, Any]:
        """Take over what :meth:`save` wrote, once the adapters have been loaded.

        transformers loads every adapter but the one that is on as one that stays as it is.
        """
        from safetensors.torch import load_file

        self._all_trained()
        self.model.value_head.load_state_dict(load_file(folder / HEAD))
        found: dict[str, Any] = json.loads((folder / STATE).read_text())
        return found

    def remove(self) -> None:
        """Leave the model as it was, with the policy's adapter alone."""
        if ADAPTER in self.model.peft_config:
            self.model.delete_adapter(ADAPTER)
            del self.model.value_head
            self.model.set_adapter(self._policy_adapter)

    def _all_trained(self) -> None:
        """PEFT trains the adapter that is on; here both are."""
        for parameter in self._trained:
            parameter.requires_grad_(True)
