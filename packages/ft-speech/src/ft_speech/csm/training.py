"""Trains a CSM by transformers' own forward pass: the backbone on every frame, the depth decoder on some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ft_core.data.collating import LENGTHS
from ft_speech.csm.collating import codes_in, collator, inputs_of, keep_some
from ft_speech.csm.documents import KINDS, dataset
from ft_speech.csm.loading import plain
from ft_speech.csm.settings import csm_of

if TYPE_CHECKING:
    from transformers import Trainer

    from ft_core.training import Job

__all__ = ["trainer"]


def trainer(job: Job) -> Trainer:
    """The trainer of one run; see :attr:`ft_core.plugins.ModalitySpec.trainer`.

    The loss is transformers': the mean cross-entropy of the codes of the first codebook, by the backbone, and that of
    the other codebooks', by the depth decoder, added. Both are means over all micro-batches of a step.

    Raises:
        DataError: as :func:`ft_speech.csm.documents.dataset`.
    """
    from transformers import Trainer, TrainingArguments

    from ft_core.fast import fast_path_of
    from ft_core.training.trainer import RunTrainerMixin

    class CsmTrainer(RunTrainerMixin, Trainer):
        """transformers' trainer with whole checkpoints, on frames of codes that were made before."""

        share = csm_of(job.config).depth_frames
        codebooks = int(plain(job.model).config.num_codebooks)

        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            # The loss below is a mean over the whole step: nobody is to divide it by its micro-batches again.
            self.model_accepts_loss_kwargs = True
            self._parts: dict[str, list[Any]] = {}
            self._in_step = self.args.gradient_accumulation_steps

        def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
            """How many codes the two losses of these micro-batches are the means of, over all processes."""
            import torch

            self._parts, self._in_step = {}, len(batch_samples)  # a step begins; an epoch's last may be short
            counts = [codes_in(batch[KINDS], self.share, self.codebooks) for batch in batch_samples]
            found = torch.tensor(counts, device=device, dtype=torch.float32).sum(0)
            if self.args.world_size > 1:
                found = self.accelerator.gather(found[None]).sum(0)
            return found

        def compute_loss(
            self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            import torch

            kinds = inputs[KINDS]
            share = self.share if self.model.training else 1.0
            kept = None if share == 1 else keep_some(kinds, share)
            path = fast_path_of(model)
            if path is not None:  # the documents' lengths, of which its layers need not ask the GPU then
                path.told = {LENGTHS: inputs[LENGTHS]} if LENGTHS in inputs else {}
            try:
                outputs = model(**inputs_of(model, inputs, kept))
            finally:
                if path is not None:
                    path.told = {}
            counts = torch.tensor(codes_in(kinds, share, self.codebooks), device=kinds.device, dtype=torch.float32)
            whole = counts if num_items_in_batch is None else num_items_in_batch
            parts = torch.stack([outputs.backbone_loss, outputs.depth_decoder_loss]) * (counts / whole)
            if self.model.training:
                for name, part in zip(("backbone_loss", "depth_decoder_loss"), parts.detach(), strict=True):
                    self._parts.setdefault(name, []).append(part)
            loss = parts.sum()
            if num_items_in_batch is not None:  # the gradients of all processes are averaged
                loss = loss * self.accelerator.num_processes
            return (loss, outputs) if return_outputs else loss

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **keywords: Any) -> tuple[Any, None, None]:
            """The loss of held-out rows, over all of their frames."""
            import torch

            with torch.no_grad(), self.compute_loss_context_manager():
                return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

        def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
            """As the trainer's own, with the two parts of the loss."""
            if "loss" in logs and self._parts:
                last = self._in_step  # of a step that was begun again there are more
                logs = {**logs, **{name: float(sum(parts[-last:])) for name, parts in self._parts.items()}}
                self._parts = {}
            super().log(logs, *args, **keywords)

        def first_batch(self) -> dict[str, Any]:
            """A batch of the first row's first document, by which fast layers are compared with transformers' own."""
            row = dict(self.train_dataset[0])
            length = row["seq_lengths"][0]
            frames = sum(kind != 0 for kind in row[KINDS][:length]) * self.codebooks
            one = {"input_ids": row["input_ids"][:length], KINDS: row[KINDS][:length], "codes": row["codes"][:frames]}
            batch = self._prepare_inputs(self.data_collator([one]))
            return inputs_of(self.model, {name: value for name, value in batch.items() if name != LENGTHS})

    collate = collator(job)
    train = dataset(job, job.train_rows, "train")
    held_out = dataset(job, job.eval_rows, "held_out") if job.eval_rows else None
    return CsmTrainer(
        model=job.model,
        args=TrainingArguments(**job.arguments),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.processor or job.tokenizer,
        callbacks=job.callbacks,
    )
