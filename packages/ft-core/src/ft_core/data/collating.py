"""From tokenized rows to a batch of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["IGNORE", "LENGTHS", "Collator", "keeps_documents_apart"]

IGNORE = -100
"""The label that torch's and transformers' cross-entropy leave out."""
LENGTHS = "document_lengths"
"""The key of a batch, and the keyword of a forward pass, that states the documents' lengths."""


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows, each a dict of ``input_ids``, ``labels`` and, where packed, ``seq_lengths``.

    Padding-free, the batch is one row of all T tokens: ``input_ids``, ``labels`` and ``position_ids`` are int64 [1, T],
    the positions restart at 0 at each document, and there is no attention mask: transformers derives from the
    positions a mask that keeps the documents apart. It does so only without a key-value cache, so the batch says
    ``use_cache=False`` too; with a cache, documents would see each other without a word.

    Otherwise every document, packed or not, is a row of its own: ``input_ids``, ``labels`` and ``attention_mask`` are
    int64 [B, L], padded on the right.

    In both, a document's first token has the label -100, so nothing is predicted across a boundary.

    Attributes:
        pad_token_id: what fills the ends of shorter rows; never trained nor attended to.
        padding_free: which of the two.
        lengths: a padding-free batch states its documents' lengths too, ``document_lengths``, a list: ft's fast layers
            then need not ask the GPU for them. transformers' own layers do not know the word.
    """

    pad_token_id: int
    padding_free: bool = True
    lengths: bool = False

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        documents = [document for feature in features for document in _documents(feature)]
        if self.padding_free:
            lengths = {LENGTHS: [len(ids) for ids, _ in documents]} if self.lengths else {}
            return {
                **lengths,
                "input_ids": torch.cat([ids for ids, _ in documents])[None],
                "labels": torch.cat([labels for _, labels in documents])[None],
                "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in documents])[None],
                "use_cache": False,
            }
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([ids for ids, _ in documents], batch_first=True, padding_value=self.pad_token_id),
            "labels": pad([labels for _, labels in documents], batch_first=True, padding_value=IGNORE),
            "attention_mask": pad([torch.ones_like(ids) for ids, _ in documents], batch_first=True),
        }

    def batch_tokens(self, lengths: Sequence[int]) -> int:
        """Tokens, padding included, of the batch of documents of these lengths, one at least."""
        return sum(lengths) if self.padding_free else len(lengths) * max(lengths)


def _documents(feature: Mapping[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The (input_ids, labels) of each document of a row, int64 [length] each."""
    import torch

    ids = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
    labels = torch.as_tensor(feature["labels"], dtype=torch.int64).clone()
    lengths = list(feature.get("seq_lengths") or [len(ids)])
    if sum(lengths) != len(ids) or len(labels) != len(ids):
        raise ValueError(f"a row of {len(ids)} tokens has {len(labels)} labels and documents of {sum(lengths)} tokens")
    pairs = list(zip(ids.split(lengths), labels.split(lengths), strict=True))
    for _, document_labels in pairs:
        document_labels[:1] = IGNORE
    return pairs


def keeps_documents_apart(
    model: PreTrainedModel,
    documents: Sequence[Mapping[str, Any]] | None = None,
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]] | None = None,
) -> bool:
    """Whether the model computes in a padding-free batch what it computes for each document alone.

    Tried on the model itself, with two documents in a row, of 16 random tokens unless others are given. The second's
    logits (of a model that ends in a score, its last hidden states) must not change when the first's tokens do, and
    must equal those of the second alone. Families whose layers carry a state along the row
    (state-space models and other linear attention) or that take no position ids fail; they are trained with
    ``Collator(padding_free=False)``. The model's mode and weights stay as they are.

    The bounds are shares of the largest of these. Rows of equal shape leave no room for rounding, save where a mixture
    of experts regroups its tokens (3e-7 measured in fp32), and leaking families moved by 4e-3 to 0.5: 1e-3. Different
    shapes may sum in another order, whose error grows over the layers: 32 units in the last place where that is more.

    Args:
        documents: three to try instead: two of equal length for the first's place, and the second.
        collate: makes a batch of some of them; a padding-free :class:`Collator` otherwise.
    """
    import torch

    from ft_core.models.modes import modes_kept

    if documents is None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        drawn = [torch.randint(vocabulary, (16,), generator=generator).tolist() for _ in range(3)]
        documents = [{"input_ids": ids, "labels": ids} for ids in drawn]
    one, two, second = documents
    last = len(second["input_ids"])
    collate = collate or Collator(pad_token_id=0)
    with modes_kept(model), torch.no_grad():
        model.eval()
        results = []
        for row in ([one, second], [two, second], [second]):
            made = collate(row)
            batch = {key: value.to(model.device) if key != "use_cache" else value for key, value in made.items()}
            del batch["labels"]
            found = model(**batch).logits
            if found.dim() == 2:  # a score, which is of one token
                found = getattr(model, model.base_model_prefix)(**batch).last_hidden_state
            results.append(found[0, -last:])
    one_before, two_before, alone = results
    largest = alone.abs().max()
    unmoved = (one_before - two_before).abs().max() <= 1e-3 * largest
    rounding = max(1e-3, 32 * torch.finfo(alone.dtype).eps)
    return bool(unmoved and (one_before - alone).abs().max() <= rounding * largest)
