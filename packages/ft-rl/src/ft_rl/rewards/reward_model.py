"""The reward ``reward-model``: a trained model's score of the prompt with the completion."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ft_core.errors import ConfigError, DataError, ModelError, RunError
from ft_rl.rewards.samples import SampleErrors, Text

__all__ = ["RewardModelSettings", "Scorer", "reward_model"]


class RewardModelSettings(BaseModel):
    """Settings of ``reward-model``.

    Attributes:
        model: a run of ``method: reward``, or a transformers model that ends in one score per sequence
            (``AutoModelForSequenceClassification`` with ``num_labels`` 1): a folder, or a Hub name.
        max_length: the longest sequence in tokens that is scored; unset, as many as the model has positions. A longer
            one is a fault of its sample.
        batch_tokens: how many tokens are scored at a time, padding counted.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    max_length: int | None = Field(default=None, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)


class Scorer:
    """A model with a scalar head and the tokenizer that it was trained with.

    Args:
        model: a sequence classifier, which returns ``logits`` of shape [sequences, 1].
        tokenizer: its own; messages go through its chat template.
        max_length: the longest sequence that is scored, in tokens; None: any.
        batch_tokens: how many tokens are scored at a time, padding counted.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_length: int | None, batch_tokens: int) -> None:
        from ft_rl.scoring import scorer_of

        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The model finds the last token of a padded sequence by this id, which its configuration may lack.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self._score = scorer_of(self.model)

    def ids(self, prompt: Text, completion: Text) -> list[int]:
        """The tokens of a prompt with its completion, as reward modelling has them.

        Strings are joined and the end-of-sequence token appended where it isn't there; messages go through the chat
        template.

        Raises:
            DataError: messages, and the tokenizer has no chat template; or one is a string and the other messages.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            end = self.tokenizer.eos_token or ""
            return list(self.tokenizer(prompt + completion.removesuffix(end) + end)["input_ids"])
        if isinstance(prompt, str) or isinstance(completion, str):
            raise DataError("prompt and completion are both strings or both messages")
        if self.tokenizer.chat_template is None:
            raise DataError("the prompts are messages, but the reward model's tokenizer has no chat template")
        return list(
            self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)["input_ids"]
        )

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        from ft_rl.scoring import score_sequences

        sequences = [self.ids(p, c) for p, c in zip(prompts, completions, strict=True)]
        errors = {
            i: f"{len(ids)} tokens, and the reward model takes {self.max_length}"
            for i, ids in enumerate(sequences)
            if self.max_length is not None and len(ids) > self.max_length
        }
        fitting = [i for i in range(len(sequences)) if i not in errors]
        made = score_sequences(
            self._score, [sequences[i] for i in fitting], pad=self.tokenizer.pad_token_id, tokens=self.batch_tokens
        )
        scores: list[float | None] = [None] * len(sequences)
        for i, score in zip(fitting, made.tolist(), strict=True):
            scores[i] = score
        if errors:
            raise SampleErrors(scores, errors)
        return scores


def reward_model(settings: RewardModelSettings) -> Any:
    """The reward function; the model is loaded here, once.

    Raises:
        RunError: the run isn't there or isn't finished, or its method trains no score.
        ModelError: the model cannot be loaded.
        ConfigError: it gives another number of scores than one.
    """
    from ft_core.models import pick_device
    from ft_core.models.opening import check_reference
    from ft_core.training.speed import speed_up

    check_reference(settings.model)
    with _same_chance():
        model, tokenizer = _load(settings.model)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        made = Scorer(model, tokenizer, max_length=settings.max_length or positions, batch_tokens=settings.batch_tokens)
        speed_up(made.model, pick_device(), say=lambda line: None)  # once nothing of it is trained
    return made


def _load(reference: str) -> tuple[Any, Any]:
    from ft_core.models import find_model, load_tokenizer, pick_device
    from ft_core.models.loading import load_run
    from ft_core.plugins import MethodSpec, registry
    from ft_core.runs import Run

    run = Run(reference)
    if run.path.is_dir() and run.is_run:
        run = Run.open(reference)
        if registry().get(MethodSpec, run.config.method).head != "score":
            raise RunError(f"{reference} was trained with {run.config.method}: it gives no scores")
        return load_run(run, say=lambda line: None)

    import torch
    from transformers import AutoModelForSequenceClassification

    source, device = find_model(reference), pick_device()
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source.path,
            dtype=getattr(torch, device.dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{reference} cannot be loaded as a reward model: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:  # they would be random
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(f"{reference} is no reward model: it lacks {missing}, such as method: reward trains")
    if model.config.num_labels != 1:
        raise ConfigError(f"{reference} gives {model.config.num_labels} scores a sequence: a reward model gives one")
    return model.to(device.type), load_tokenizer(source)


@contextmanager
def _same_chance() -> Iterator[None]:
    """Loading draws random numbers and sets seeds, of which the training must notice nothing."""
    import numpy
    import torch

    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
