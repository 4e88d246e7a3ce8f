"""Supervised fine-tuning on TRL's SFTTrainer: rows tokenized, masked, packed and collated by ft_core.data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from ft_core.console import counted
from ft_core.data.collating import IGNORE
from ft_core.errors import ConfigError
from ft_core.training.modality import of_modality

if TYPE_CHECKING:
    from transformers import Trainer

    from ft_core.data import Collator
    from ft_core.training.job import Job

__all__ = ["MIXES", "SftSettings", "build", "check_head", "text_collator"]


WASTE = 0.25
"""Padding, as a share of the tokens, that costs less on a CPU than attention over a packed row."""

FEW_LOGITS = 2**27
"""Logits that may exist at once on a CPU: half a gigabyte in float32."""

MIXES = "this model would mix the documents of a packed row: each is a padded row of its own"
"""Said of a model that cannot be trained on packed rows."""

LEFT_OUT = ("{} text is empty", "no token of {} answer is within max_length")
"""Why rows are, which have no token to train on; {} is its or their."""


class SftSettings(BaseModel):
    """The section ``sft`` of a configuration.

    Attributes:
        train_on: which tokens the loss is taken over: those of the answers, or all. Plain text is always trained whole.
    """

    model_config = ConfigDict(extra="forbid")

    train_on: Literal["answers", "all"] = "answers"


def build(job: Job) -> Trainer:
    """The trainer of one run; see :class:`ft_core.training.Job`.

    Raises:
        ConfigError: an adapter on the head.
        DataError: no row has a token to train on within ``max_length``.
    """
    from trl import SFTConfig, SFTTrainer

    from ft_core.fast import fast_path_of
    from ft_core.training.trainer import RunTrainerMixin
    from ft_kernels.functional import cross_entropy

    class SftTrainer(RunTrainerMixin, SFTTrainer):
        """TRL's trainer with whole checkpoints, no telemetry, and on a CPU a head that skips what is not trained."""

        logs_behind = True  # where TRL counts accuracies of a step it waits for them, and they are logged with it

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if self.model.training and not return_outputs and not self.aux_loss_enabled and fast_path_of(self.model):
                return self._fast_loss(model, inputs, num_items_in_batch)
            kept = None if return_outputs else _kept_positions(inputs, self.model.config.get_text_config().vocab_size)
            if kept is None or self.aux_loss_enabled:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            values = {name: value for name, value in inputs.items() if name != "labels"}
            logits = model(**values, logits_to_keep=kept).logits
            targets = inputs["labels"][:, 1:][:, kept]
            trained = targets != IGNORE
            total = cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
            loss = total / (trained.sum() if num_items_in_batch is None else num_items_in_batch)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
            mode = "train" if self.model.training else "eval"
            right = (logits.detach().argmax(-1) == targets)[trained].float().mean().item()
            self._metrics[mode]["mean_token_accuracy"].append(right)
            return loss

        def _fast_loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
            """The fast path's head: the loss alone, without TRL's entropy and accuracy, which cost a pass each."""
            loss = model(**inputs, num_items_in_batch=num_items_in_batch).loss
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
            return loss

    check_head(job.model)
    dataset, collator = (
        of_modality(job.config, "dataset") or _dataset,
        of_modality(job.config, "collator") or text_collator,
    )
    collate = collator(job)
    train = dataset(job, job.train_rows, "train")
    held_out = dataset(job, job.eval_rows, "held_out") if job.eval_rows else None
    # Rows come prepared: TRL neither tokenizes, packs nor pads.
    arguments = SFTConfig(
        **job.arguments,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SftTrainer(
        model=job.model,
        args=arguments,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.tokenizer,
        callbacks=job.callbacks,
    )


def check_head(model: Any) -> None:
    """Refuse an adapter on the head: TRL's losses multiply by the head's weight itself, so it would never be trained.

    Raises:
        ConfigError: there is one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name for name, module in model.named_modules() if module is head).rpartition(".")[2]
        raise ConfigError(
            f"lora.targets: an adapter on the head {name!r} would not be trained, the loss uses its weight directly; "
            f"to train it whole, take it out and set lora.modules_to_save: [{name}]"
        )


def _kept_positions(inputs: dict[str, Any], vocabulary: int) -> Any | None:
    """Positions of the row whose next token is trained in any document of a batch on a CPU.

    TRL's head scores only trained positions on a GPU, but all of them on a CPU, where with short answers most of a
    step is then spent on what the loss leaves out. None for a GPU, no trained token, or more logits than FEW_LOGITS.
    """
    labels = inputs.get("labels")
    if labels is None or labels.device.type != "cpu":
        return None
    kept = (labels[:, 1:] != IGNORE).any(0).nonzero()[:, 0]
    return kept if 0 < len(kept) * len(labels) * vocabulary <= FEW_LOGITS else None


@dataclass(frozen=True)
class _Either:
    """Batches without padding, or padded where the documents are nearly equal, a document a row: for a CPU.

    Torch's attention on a CPU computes what the mask between documents then discards, and that costs more than the
    padding does.
    """

    free: Collator
    padded: Collator

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [n for f in features for n in f.get("seq_lengths") or [len(f["input_ids"])]]
        return self._pick(lengths)(features)

    def batch_tokens(self, lengths: Sequence[int]) -> int:
        """See :meth:`ft_core.data.Collator.batch_tokens`."""
        return self._pick(lengths).batch_tokens(lengths)

    def _pick(self, lengths: Sequence[int]) -> Collator:
        wasted = max(lengths) * len(lengths) / sum(lengths) - 1
        return self.padded if wasted <= WASTE else self.free


def text_collator(job: Job) -> Collator | _Either:
    """What makes batches of rows of tokens alone, as the model and the machine take them best."""
    from ft_core.data import keeps_documents_apart
    from ft_core.fast import fast_path_of

    padding_free = keeps_documents_apart(job.model)
    if not padding_free:
        job.say(MIXES)
    on_cpu, lengths = job.arguments["use_cpu"], fast_path_of(job.model) is not None
    return _collate(job.tokenizer.pad_token_id, padding_free=padding_free, on_cpu=on_cpu, lengths=lengths)


def _collate(pad: int, *, padding_free: bool, on_cpu: bool, lengths: bool) -> Collator | _Either:
    """Batches without padding, where the model keeps documents apart; on a CPU as it is cheaper."""
    from ft_core.data import Collator

    free, padded = Collator(pad, lengths=lengths), Collator(pad, padding_free=False)
    if not padding_free:
        return padded
    return _Either(free, padded) if on_cpu else free


def _dataset(job: Job, rows: Any, name: str) -> Any:
    """Tokenized rows, packed into rows of up to ``max_length`` tokens where packing is on."""
    from ft_core.data import Packed, tokenize_rows

    config = job.config
    what = name.replace("_", "-")
    train_on: Literal["answers", "all"] = getattr(job.settings, "train_on", "answers")
    tokens = tokenize_rows(rows, job.tokenizer, max_length=config.max_length, train_on=train_on)
    job.counts |= {f"{name}_tokens": tokens.tokens}
    if name == "train":
        job.counts |= {
            "trained_tokens": tokens.trained_tokens,
            "overlong_rows": tokens.overlong,
            "dropped_rows": tokens.dropped,
        }
    if tokens.overlong:
        done, verb = "split" if tokens.pieces else "cut", "is" if tokens.overlong == 1 else "are"
        job.say(
            f"{tokens.overlong} of {counted(tokens.rows, f'{what} row')} {verb} longer than max_length "
            f"{config.max_length}: {done}"
        )
    for count, why in zip((tokens.empty, tokens.dropped - tokens.empty), LEFT_OUT, strict=True):
        if count > 0:
            verb, whose = ("was", "its") if count == 1 else ("were", "their")
            job.say(f"{counted(count, f'{what} row')} {verb} left out: {why.format(whose)}")
    return Packed(tokens, config.max_length).dataset() if config.packing else tokens.dataset()
