"""The trainer of Whisper, on transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

    from ft_core.training import Job

__all__ = ["trainer"]


def trainer(job: Job) -> Trainer:
    """The trainer of one run; see :attr:`ft_core.plugins.ModalitySpec.trainer`.

    The loss is the mean over all labels of an optimizer step: of the text, of ``<|endoftext|>``, and of what Whisper
    writes before it (language, task, timestamps), as in transformers' own recipe.

    Raises:
        DataError: as :func:`ft_speech.whisper.documents.dataset`.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    from ft_core.fast import compare
    from ft_core.memory import bytes_of
    from ft_core.training.speed import GAPS
    from ft_core.training.trainer import RunTrainerMixin
    from ft_speech.fast.whisper import path_of
    from ft_speech.whisper.collating import collator
    from ft_speech.whisper.documents import dataset

    class WhisperTrainer(RunTrainerMixin, Trainer):
        """transformers' trainer with whole checkpoints, and a loss that counts each token of a step once."""

        logs_behind = True
        loss_is_scaled_for_ga = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = True  # compute_loss takes the count of a whole step

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], int]:
            """The batches of a step, and how many labels they have together, of all processes."""
            batches, _ = super().get_batch_samples(*args, **kwargs)
            count = sum(batch["tokens"] for batch in batches)
            if self.accelerator.num_processes > 1:
                count = int(self.accelerator.reduce(torch.tensor(count, device=self.args.device)))
            return batches, count

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.state.num_input_tokens_seen += inputs["tokens"] * self.accelerator.num_processes
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(input_features=inputs["input_features"], labels=inputs["labels"])
            loss = outputs.loss
            if num_items_in_batch is not None:  # a mean over this batch becomes its share of the step's
                loss = loss * (inputs["tokens"] * self.accelerator.num_processes / num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

        def longest(self) -> dict[str, Any] | None:
            """The rows with the most labels: every recording is as long as another to the model."""
            lengths = [len(labels) for labels in self.train_dataset["labels"]]
            most = sorted(range(len(lengths)), key=lengths.__getitem__)[-self.args.per_device_train_batch_size :]
            batch: dict[str, Any] = self.data_collator([self.train_dataset[number] for number in most])
            return batch

        def _tighter(self, inputs: dict[str, Any]) -> str | None:
            path = path_of(self.model)
            if path is None or not path.on:
                return super()._tighter(inputs)
            alone = self.replans and self.accelerator.num_processes == 1
            return path.tighter() if alone else None  # others are in the middle of their step

        @property
        def fast_layers(self) -> bool:
            """Whether the model computes with fast layers."""
            path = path_of(self.model)
            return path is not None and path.on

        def compared(self) -> tuple[Any, str] | None:
            """The fast layers beside transformers' own on the first recording; None without them."""
            path = path_of(self.model)
            if path is None or not path.on:
                return None
            batch = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))
            given = {name: batch[name] for name in ("input_features", "labels")}
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            layers, states = len(path.layers), self.model.config.max_source_positions
            found = compare(path, self.model, given, dtype, layers=layers, terms=states)
            return found, f"a recording and its {batch['tokens']} tokens"

    path = path_of(job.model)
    if path is not None:  # it chooses by itself what is computed again
        job.arguments |= {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None}
        memory = job.config.memory
        path.choose(job.config.activations, memory=None if memory == "auto" else int(GAPS * bytes_of(memory)))
    collate = collator(job)
    train = dataset(job, job.train_rows, "train")
    held_out = dataset(job, job.eval_rows, "held_out") if job.eval_rows else None
    return WhisperTrainer(
        model=job.model,
        args=TrainingArguments(**job.arguments),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.tokenizer,
        callbacks=job.callbacks,
    )
