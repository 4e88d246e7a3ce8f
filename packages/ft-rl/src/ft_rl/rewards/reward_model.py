"""The reward ``reward-model``: a trained model's score of the prompt with the completion."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from ft_core.errors import ConfigError, DataError, ModelError, RunError
from ft_rl.rewards.samples import SampleErrors, Text

if TYPE_CHECKING:
    from ft_rl.rewards.guest import Policy
    from ft_rl.rewards.stored import StoredAdapter

__all__ = ["RewardModelSettings", "Scorer", "reward_model"]


class RewardModelSettings(BaseModel):
    """Settings of ``reward-model``.

    Attributes:
        model: a run of ``method: reward``, or a checkpoint of its adapter; or a transformers model that ends in one
            score per sequence (``AutoModelForSequenceClassification`` with ``num_labels`` 1), a folder or a Hub name;
            or the folder of a PEFT adapter on such a one. An adapter whose base is the policy's is put on that base.
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
        model: a sequence classifier, which returns ``logits`` of shape [sequences, 1]; or, with ``score``, whatever
            that scores by.
        tokenizer: its own; messages go through its chat template.
        max_length: the longest sequence that is scored, in tokens; None: any.
        batch_tokens: how many tokens are scored at a time, padding counted.
        score: the scores of a padded batch, by ids, mask and the id of padding, where the model itself gives none; it
            stays as it is then.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int | None,
        batch_tokens: int,
        score: Callable[..., Any] | None = None,
    ) -> None:
        from ft_rl.scoring import scorer_of

        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if score is not None:
            self._score: Callable[..., Any] = partial(score, pad=tokenizer.pad_token_id)
            return
        model.eval().requires_grad_(False)
        # The model finds the last token of a padded sequence by this id, which its configuration may lack.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self._score = scorer_of(model)

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


def reward_model(settings: RewardModelSettings, policy: Policy | None = None) -> Any:
    """The reward function; the model is loaded here, once.

    Args:
        policy: on whose base it is put, as a further adapter, where it is one that was trained on the same.

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
        if policy is not None and (shared := _shared(settings, policy)) is not None:
            return shared
        model, tokenizer = _load(settings.model)
        made = _scorer(settings, model, tokenizer)
        speed_up(made.model, pick_device(), say=lambda line: None)  # once nothing of it is trained
    return made


def _scorer(settings: RewardModelSettings, model: Any, tokenizer: Any, score: Any = None) -> Scorer:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = settings.max_length or positions
    return Scorer(model, tokenizer, max_length=length, batch_tokens=settings.batch_tokens, score=score)


def _shared(settings: RewardModelSettings, policy: Policy) -> Scorer | None:
    """What scores on the policy's base; None where it cannot, which is said of an adapter."""
    from ft_rl.rewards.guest import Guest, NotShared
    from ft_rl.rewards.stored import stored_adapter

    stored = stored_adapter(settings.model)
    if stored is None or not stored.scores:
        return None
    try:
        if (reason := stored.why_apart(policy.config)) is not None:
            raise NotShared(reason)
        guest = Guest(policy, stored)
    except NotShared as error:
        policy.say(f"the reward model {settings.model} is loaded beside the policy: {error}")
        return None
    made = _scorer(settings, policy.model, _tokenizer(stored), guest.score)
    policy.say(f"the reward model {settings.model} scores on the policy's base, as a further adapter")
    return made


def _tokenizer(stored: StoredAdapter) -> Any:
    """That of an adapter's folder, or else of its base."""
    from ft_core.models import find_model, load_tokenizer
    from ft_core.models.loading import TOKENIZER_FILES
    from ft_core.models.source import ModelSource

    if any((stored.folder / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(ModelSource(str(stored.folder), stored.folder, str(stored.folder)))
    return load_tokenizer(find_model(stored.reference))


def _load(reference: str) -> tuple[Any, Any]:
    from ft_core.models import find_model, load_tokenizer, pick_device
    from ft_core.models.loading import load_run
    from ft_core.plugins import MethodSpec, registry
    from ft_core.runs import Run
    from ft_rl.rewards.stored import run_of, stored_adapter

    stored, run = stored_adapter(reference), run_of(reference)
    if run is not None:
        run = Run.open(run.path)
        if registry().get(MethodSpec, run.config.method).head != "score":
            raise RunError(f"{reference} was trained with {run.config.method}: it gives no scores")
        checkpoint = None if stored is None or stored.folder == run.adapter else stored.folder
        return load_run(run, say=lambda line: None, adapter=checkpoint)
    if stored is not None:
        return _adapted(stored)

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


def _adapted(stored: StoredAdapter) -> tuple[Any, Any]:
    """An adapter that ft has not made, on its base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from ft_core.models import find_model, pick_device
    from ft_rl.rewards.stored import HEAD

    if not stored.scores or HEAD not in stored.shapes:  # its head would be random
        raise ModelError(f"the adapter {stored.folder} is no reward model's: it lacks {HEAD}, or task_type SEQ_CLS")
    if stored.settings.get("revision") is not None:
        raise ModelError(
            f"the adapter {stored.folder} is for a revision of its base: download that, and name its folder"
        )
    source, device = find_model(stored.reference), pick_device()
    try:
        base = AutoModelForSequenceClassification.from_pretrained(
            source.path,
            num_labels=1,
            dtype=getattr(torch, device.dtype),
            trust_remote_code=False,
            use_safetensors=True,
        )
        model = PeftModel.from_pretrained(base.to(device.type), stored.folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{stored.folder} cannot be loaded as a reward model: {str(error).splitlines()[0]}") from error
    return model, _tokenizer(stored)


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
