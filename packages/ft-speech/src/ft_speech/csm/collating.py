"""Batches of documents of a CSM, and what its forward pass takes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ft_core.data import keeps_documents_apart
from ft_core.data.collating import IGNORE, LENGTHS
from ft_speech.csm.documents import CODES, END, HEARD, KINDS, SPOKEN, TEXT
from ft_speech.csm.loading import plain

if TYPE_CHECKING:
    from torch import Tensor

    from ft_core.training import Job

__all__ = ["CsmCollator", "codes_in", "collator", "inputs_of", "keep_some", "packs"]

AT_ONCE = 256
"""Frames whose codes are embedded at a time: each is as many vectors as there are codebooks before they are added."""


@dataclass(frozen=True)
class CsmCollator:
    """Makes a batch of rows, each with the columns that :func:`ft_speech.csm.documents.dataset` makes.

    ``input_ids`` and ``kinds`` are int64 [B, S], ``codes`` int64 [B, S, codebooks], zeros at text. Padding-free, the
    batch is one row of all documents, with ``position_ids`` [1, S] that restart at each and ``document_lengths``, a
    list; otherwise each document is a row, padded on the right, with an ``attention_mask`` [B, S].

    Attributes:
        pad_token_id: what fills the ends of shorter rows. codebooks: codes of a frame.
        padding_free: which of the two.
    """

    pad_token_id: int
    codebooks: int
    padding_free: bool = True

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        documents = [document for feature in features for document in self._documents(feature)]
        lengths = [len(ids) for ids, _, _ in documents]
        if self.padding_free:
            ids, kinds, codes = (torch.cat(parts)[None] for parts in zip(*documents, strict=True))
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            batch: dict[str, Any] = {"input_ids": ids, KINDS: kinds, CODES: codes}
            return {**batch, "position_ids": positions, LENGTHS: lengths}
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([d[0] for d in documents], batch_first=True, padding_value=self.pad_token_id),
            KINDS: pad([d[1] for d in documents], batch_first=True, padding_value=TEXT),
            CODES: pad([d[2] for d in documents], batch_first=True),
            "attention_mask": pad([torch.ones_like(d[0]) for d in documents], batch_first=True),
        }

    def batch_tokens(self, lengths: Sequence[int]) -> int:
        """See :meth:`ft_core.data.Collator.batch_tokens`."""
        return sum(lengths) if self.padding_free else len(lengths) * max(lengths)

    def _documents(self, feature: Mapping[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
        import torch

        ids = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
        kinds = torch.as_tensor(feature[KINDS], dtype=torch.int64)
        codes = torch.zeros(len(ids), self.codebooks, dtype=torch.int64)
        codes[kinds != TEXT] = torch.as_tensor(feature[CODES], dtype=torch.int64).view(-1, self.codebooks)
        lengths = list(feature.get("seq_lengths") or [len(ids)])
        return list(zip(ids.split(lengths), kinds.split(lengths), codes.split(lengths), strict=True))


def keep_some(kinds: Tensor, share: float) -> Tensor:
    """Which frames of a batch the depth decoder is trained on, bool of ``kinds``' shape.

    The frames that end a turn, and of the others the share, drawn at random and rounded up, so that how many they are
    follows from the batch alone.
    """
    import torch

    kept = kinds == END
    spoken = (kinds == SPOKEN).flatten().nonzero()[:, 0]
    count = _some(len(spoken), share)
    drawn = spoken if count == len(spoken) else spoken[torch.randperm(len(spoken), device=kinds.device)[:count]]
    kept.view(-1)[drawn] = True
    return kept


def codes_in(kinds: Tensor, share: float, codebooks: int) -> tuple[int, int]:
    """How many codes a batch's two losses are the means of: of the backbone's, and of the depth decoder's."""
    spoken, ends = int((kinds == SPOKEN).sum()), int((kinds == END).sum())
    return spoken + ends, (_some(spoken, share) + ends) * (codebooks - 1)


def _some(count: int, share: float) -> int:
    return -int(-count * share // 1)


def inputs_of(model: Any, batch: Mapping[str, Any], kept: Tensor | None = None) -> dict[str, Any]:
    """What ``CsmForConditionalGeneration`` takes of a batch: ``inputs_embeds`` [B, S, hidden] and, where anything is
    trained, ``labels`` [B, S, codebooks], as it makes them itself of waveforms.

    Args:
        model: a CSM, adapted or not. batch: of :class:`CsmCollator`, on the model's device.
        kept: the frames that the depth decoder is trained on, bool [B, S]; None for all.
    """
    import torch

    own = plain(model)
    ids, kinds, codes = batch["input_ids"], batch[KINDS], batch[CODES]
    embeds = own.embed_text_tokens(ids)
    frames = kinds != TEXT
    if bool(frames.any()):
        parts = [own.backbone_model.embed_tokens(part[None])[0] for part in codes[frames].split(AT_ONCE)]
        embeds = embeds.index_put((frames,), torch.cat(parts).to(embeds.dtype))
    trained = kinds > HEARD
    labels = torch.where(trained[..., None], codes, IGNORE)
    if kept is not None:
        labels[..., 1:] = labels[..., 1:].masked_fill(~kept[..., None], IGNORE)
    made = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
    return {**made, "inputs_embeds": embeds, "labels": labels, "use_cache": False}


def collator(job: Job) -> CsmCollator:
    """The collator of a training; see :attr:`ft_core.plugins.ModalitySpec.collator`."""
    padding_free = packs(job.model)
    if not padding_free:
        from ft_core.training.sft import MIXES

        job.say(MIXES)
    return _collator(job.model, job.tokenizer, padding_free=padding_free)


def _collator(model: Any, tokenizer: Any, *, padding_free: bool) -> CsmCollator:
    return CsmCollator(int(tokenizer.pad_token_id), int(plain(model).config.num_codebooks), padding_free)


def packs(model: Any) -> bool:
    """Whether the model keeps the documents of a row apart, by :func:`ft_core.data.keeps_documents_apart`."""
    import torch

    config = plain(model).config
    generator = torch.Generator().manual_seed(0)
    collate = CsmCollator(0, config.num_codebooks)
    codec = plain(model).codec_model.config.codebook_size

    def document() -> dict[str, Any]:
        text, frames = torch.randint(config.text_vocab_size, (8,), generator=generator).tolist(), 8
        codes = torch.randint(codec, (frames * config.num_codebooks,), generator=generator).tolist()
        kinds = [TEXT] * len(text) + [SPOKEN] * frames
        return {"input_ids": text + [config.audio_token_id] * frames, KINDS: kinds, CODES: codes}

    def batch(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        made = {name: value.to(model.device) for name, value in collate(rows).items() if name != LENGTHS}
        return inputs_of(model, made)

    return keeps_documents_apart(model, [document() for _ in range(3)], batch)
