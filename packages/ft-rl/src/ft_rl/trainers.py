"""What ft-rl adds to the trainers that it derives from TRL's: the policy's head, and no copy of the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ft_rl.policy import PolicyForward, put_head
from ft_rl.reference import begins_neutral, drop_copy, put_switch, take_switch

if TYPE_CHECKING:
    from transformers import Trainer as _Base

    from ft_core.training.inputs import Inputs
else:
    _Base = object

__all__ = ["PolicyTrainerMixin"]


class PolicyTrainerMixin(_Base):
    """Puts :class:`ft_rl.policy.PolicyForward` in the place of the head that TRL's constructor gives the model.

    Put it before ``RunTrainerMixin`` and the trainer class.

    Attributes:
        fields: what the trainer reads of the head (see :class:`ft_rl.policy.PolicyForward`).
        policy: the model's forward, or None where it is TRL's.
        inputs: sees to what rows hold beside text; set before the constructor is called.
    """

    fields: Sequence[str] = ("log_probs", "entropy", "mean_logits", "is_top1")
    policy: PolicyForward | None = None
    inputs: Inputs | None = None
    _head_is_put: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        neutral = begins_neutral(kwargs["model"])
        super().__init__(*args, **kwargs)
        self.put_head()
        drop_copy(self.model, neutral)
        put_switch(self.model)

    def finish(self) -> None:
        """Called once all steps are done: no copy of the adapter is left to be saved."""
        take_switch(self.model)
        drop_copy(self.model, neutral=True)

    @property
    def head_temperature(self) -> float:
        """What logits are divided by."""
        return 1.0

    @property
    def head_entropy(self) -> Literal[True, "detached"]:
        """True where the entropy is trained, not only looked at."""
        return "detached"

    def put_head(self) -> None:
        """Once TRL's own head is there; called from its constructor too, where that uses it already."""
        if self._head_is_put:
            return
        self._head_is_put = True
        packs = None if self.inputs is None else self.inputs.packs(self.model)
        self.policy = put_head(
            self.model, temperature=self.head_temperature, fields=self.fields, entropy=self.head_entropy, packs=packs
        )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Rows come tokenized: TRL does nothing to them."""
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self.put_head()
        return super()._precompute_ref_logps(*args, **kwargs)
