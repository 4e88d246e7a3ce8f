"""What a modality does for methods that make batches of their own: pairs, or completions of the model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ft_core.fast.beside import Beside

__all__ = ["Inputs"]

Row = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class Inputs(Protocol):
    """What rows of a modality hold beside text; see :attr:`ft_core.plugins.ModalitySpec.inputs`.

    A row in normal form names it in ``column``, a list of references (texts), in the order in which the messages of its
    ``prompt`` have places for them.

    Attributes:
        column: its name.
        never: ids of tokens that stand for it, which a model must not write.
    """

    column: str
    never: frozenset[int]

    def usable(self, rows: Sequence[Row]) -> tuple[list[int], list[str]]:
        """The numbers, from 0, of rows whose inputs can be used, and a line for each other row.

        Raises:
            DataError: one cannot be used, and the configuration does not say that such rows are left out.
        """
        ...

    def ids(
        self,
        messages: Messages,
        given: Sequence[str],
        *,
        prompting: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The tokens of a conversation, all of those included that stand for what is given.

        Args:
            given: a usable row's references. prompting: whether a generation prompt follows.
            options: further arguments of the chat template.

        Raises:
            DataError: the template refuses the conversation, or has another number of places.
        """
        ...

    def beside(self, given: Sequence[Sequence[str]], ids: Tensor, mask: Tensor) -> Beside | None:
        """What a padded batch holds beside text; None if nothing.

        Args:
            given: each row's references. ids, mask: int64 ``[B, L]``, on the CPU.
        """
        ...

    def packs(self, model: Any) -> bool:
        """Whether the model keeps documents with such inputs apart in one row."""
        ...

    def workers(self, on_cpu: bool) -> int:
        """Processes that make batches ahead."""
        ...

    def opened(self, given: Sequence[str]) -> list[Any]:
        """What the references stand for, as a reward function is handed it."""
        ...

    def named(self, messages: Messages, given: Sequence[str]) -> list[dict[str, Any]]:
        """Messages whose places say in their parts what stands there, for people and reward functions."""
        ...
