"""Completions written by vLLM in the training's own process: the engine ``vllm-colocate``.

TRL's ``VLLMGeneration`` in its mode ``colocate`` does it: vLLM sleeps while the model is trained, which gives its share
of the GPU's memory back, and is handed all weights, the adapter merged into them, when completions are wanted.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ft_core.config import TrainConfig
from ft_core.errors import ConfigError, FtError, RunError
from ft_core.memory import is_memory_error
from ft_core.training.ranks import Ranks
from ft_rl.rollouts.protocol import Completion, EngineJob, Sampling, checked

__all__ = ["ColocateSettings", "VllmColocate", "check", "file_name", "merged_parameters"]

NAME = "vllm-colocate"
BASE = "base_model.model."
"""What PEFT puts before the names of a model's weights."""
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ColocateSettings(BaseModel):
    """Settings of ``rollouts: {engine: vllm-colocate}``; TRL's names without ``vllm_``, and its defaults but for sleep.

    Attributes:
        gpu_memory_utilization: the share of the GPU's memory that vLLM takes while it writes: its copy of the weights,
            and the keys and values of completions.
        max_model_length: tokens of a prompt and its completion; unset means the configuration's ``max_length``.
        max_num_seqs: completions that are written side by side; unset means vLLM's own choice.
        enable_sleep_mode: whether vLLM gives its memory back while the model is trained.
        model_impl: whose layers vLLM computes by: ``vllm``, ``transformers``, or ``auto``, its own where it has them.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    max_model_length: int | None = Field(default=None, ge=1)
    max_num_seqs: int | None = Field(default=None, ge=1)
    enable_sleep_mode: bool = True
    model_impl: Literal["auto", "vllm", "transformers"] = "vllm"


def check(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    """Refuse what cannot work, before anything is loaded.

    Args:
        settings: the engine's own.

    Raises:
        ConfigError: wrong settings, no vLLM, weights in 4 or 8 bits, bounded memory, scaled positions, or several
            processes; one line.
    """
    checked(ColocateSettings, dict(settings), NAME)
    if config.quantization != "none":
        raise ConfigError(
            f"rollouts: {NAME} hands vLLM merged weights, and quantization: {config.quantization} has none that are "
            "exact: each step would round the base anew; set quantization: none, or rollouts: transformers"
        )
    if config.memory != "auto":
        raise ConfigError(
            f"rollouts: {NAME} takes its share of the GPU by rollouts.gpu_memory_utilization, which memory: "
            f"{config.memory} cannot bound; set memory: auto, or rollouts: transformers"
        )
    if config.rope_scaling is not None:
        raise ConfigError(
            f"rollouts: {NAME} loads the model as its folder has it, without rope_scaling; leave it out, or set "
            "rollouts: transformers"
        )
    if Ranks().count > 1:
        raise ConfigError(f"rollouts: {NAME} serves a training of one process; start it without torchrun")
    _check_installed()


def _check_installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollouts: {NAME} needs vLLM in this environment, and it is not installed: pip install 'trl[vllm]', on a "
            "machine with a GPU; or start a server of an environment of its own and set rollouts: {engine: vllm}"
        )


class VllmColocate:
    """See the module. vLLM is started when it is made, by the trainer's accelerator, and draws from torch's numbers."""

    def __init__(self, job: EngineJob) -> None:
        self._settings = checked(ColocateSettings, job.settings, NAME)
        _check_installed()
        _check_model(job.model)
        self._job, self._step = job, -1
        self._length = self._settings.max_model_length or job.max_length
        self._writer: Any = self._started()

    def generate(
        self, prompts: Sequence[Sequence[int]], copies: int, sampling: Sampling, *, step: int
    ) -> list[list[Completion]]:
        """See :class:`ft_rl.rollouts.protocol.Engine`."""
        if not prompts:
            return []
        limits = sampling.limits_of(len(prompts))
        self._check_room(max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)))
        if self._writer is None:
            self._writer = self._started()
        writer = self._writer
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            setattr(writer, name, getattr(sampling, name))
        # one number for all: where a prompt's own limit is less, vLLM may write on, up to the length it was started for
        writer.max_completion_length = sampling.max_new_tokens
        # what ends a completion is said here, not taken from the model's generation_config.json
        writer.generation_kwargs = {"stop_token_ids": sorted(sampling.stops), "ignore_eos": True}
        if step != self._step:
            with _faults_said("is handed the weights"):
                writer.sync_weights()
            self._step = step
        asked = [list(prompt) for prompt in prompts for _ in range(copies)]
        with _faults_said("writes"):
            _, ids, logprobs, _ = writer.generate(asked, None, copies)
        if logprobs is None or len(ids) != len(asked):
            raise RunError(f"rollouts: vLLM answers {len(asked)} prompts with {len(ids)} completions without logprobs")
        made = [_completion(*one) for one in zip(ids, logprobs, strict=True)]
        return [made[i : i + copies] for i in range(0, len(made), copies)]

    def close(self) -> None:
        """Let go of vLLM and its memory."""
        if self._writer is None:
            return
        self._writer, self._step = None, -1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _started(self) -> Any:
        """TRL's object, with vLLM asleep where it may sleep."""
        job, settings = self._job, self._settings
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM reports each start otherwise; it has no other switch
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM counts what torch keeps for later as taken
        try:
            with _random_numbers_kept(), _variables_kept():
                writer = _writer_class()(
                    model=job.model,
                    accelerator=job.accelerator,
                    processing_class=job.tokenizer,
                    mode="colocate",
                    gpu_memory_utilization=settings.gpu_memory_utilization,
                    max_model_length=self._length,
                    max_num_seqs=settings.max_num_seqs,
                    enable_sleep_mode=settings.enable_sleep_mode,
                    model_impl=settings.model_impl,
                    trust_remote_code=False,
                    logprobs=0,  # the drawn token's alone
                )
        except Exception as error:  # vLLM raises what it likes
            raise RunError(
                f"rollouts: vLLM does not start in this process ({_line_of(error)}); where that is for want of memory, "
                "change rollouts.gpu_memory_utilization"
            ) from error
        rest = "sleeps between phases" if settings.enable_sleep_mode else "keeps its memory while the model is trained"
        job.say(f"rollouts: vLLM writes in this process, and {rest}")
        return writer

    def _check_room(self, tokens: int) -> None:
        if self._length is not None and tokens > self._length:
            raise RunError(
                f"rollouts: vLLM was started for {self._length} tokens, and a prompt with its completion takes up to "
                f"{tokens}: set rollouts.max_model_length to {tokens} or more, and go on with --resume"
            )


@contextmanager
def _faults_said(doing: str) -> Iterator[None]:
    """Turn what vLLM raises into one line; a want of memory stays, for which the training has a line of its own.

    Raises:
        RunError: the body failed otherwise.
    """
    try:
        yield
    except FtError:
        raise
    except Exception as error:  # vLLM raises what it likes
        if is_memory_error(error):
            raise
        raise RunError(
            f"rollouts: vLLM fails as it {doing} ({type(error).__name__}: {_line_of(error)}): what it has printed may "
            "say why; go on with --resume, or set rollouts: transformers"
        ) from error


def _line_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def _completion(ids: Sequence[int], logprobs: Sequence[Sequence[float | None]]) -> Completion:
    """One completion; a token without a log-probability has NaN, which is left out where the gap is measured."""
    values = [float("nan") if of_token[0] is None else float(of_token[0]) for of_token in logprobs]
    if len(values) != len(ids):
        raise RunError(f"rollouts: vLLM gives {len(values)} log-probabilities of {len(ids)} tokens")
    return Completion([int(token) for token in ids], values)


def _writer_class() -> Any:
    """TRL's class, reading the weights without touching them."""
    from trl.generation.vllm_generation import VLLMGeneration

    class Writer(VLLMGeneration):
        def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
            """As TRL's, but the base is never merged in place: taking the adapter out again leaves rounding behind."""
            return merged_parameters(self.model)

    return Writer


@torch.no_grad()
def merged_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model with its active adapter merged, one layer at a time, by the names of the model's files.

    A layer is merged in a copy, as PEFT merges it, and the model's own weights stay the same tensors, bit for bit.
    TRL merges all in place and takes the adapter out again: in bfloat16 the base would drift a little with each step.

    Args:
        model: with PEFT's wrapping or without.

    Yields:
        Names, and tensors that hold until the next is asked for.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(model, "peft_config"):
        yield from ((name, parameter.data) for name, parameter in model.named_parameters())
        return
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    done: set[str] = set()
    for name, parameter in model.named_parameters():
        if name in done or not _is_sent(model, name):
            continue
        owner = name.rpartition(".base_layer.")[0]
        if not owner:
            yield file_name(name), parameter.data
            continue
        layer = layers[owner]
        own = {f"{owner}.base_layer.{part}": p for part, p in layer.get_base_layer().named_parameters(recurse=False)}
        kept = {part: p.data for part, p in own.items()}
        try:
            for p in own.values():
                p.data = p.data.clone()
            layer.merge()
            for part, p in own.items():
                done.add(part)
                yield file_name(part), p.data
            layer.unmerge()  # its state; the numbers are put back below
        finally:
            for part, p in own.items():
                p.data = kept[part]
            layer.merged_adapters.clear()


def file_name(name: str) -> str:
    """A weight's name without what PEFT put into it."""
    return re.sub(r"modules_to_save\.[^.]+\.", "", name.removeprefix(BASE).replace(".base_layer", ""))


def _check_model(model: Any) -> None:
    """Refuse a model that vLLM could not be handed.

    Raises:
        ConfigError: an adapter that is not LoRA's, or on tokens; an adapter or a saved copy of an embedding that is the
            head too; or weights that the model's files do not have under the names that they have here.
    """
    configs = getattr(model, "peft_config", {})
    for config in configs.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA" or getattr(config, "trainable_token_indices", None):
            what = f"adapters of the kind {kind}" if kind != "LORA" else "trained tokens (trainable_token_indices)"
            raise ConfigError(f"rollouts: {NAME} cannot merge {what}; set rollouts: transformers")
    _check_tied(model.get_input_embeddings(), model.get_output_embeddings())
    there = _names_in_files(Path(str(model.name_or_path)))
    names = [file_name(name) for name, _ in model.named_parameters() if _is_sent(model, name)]
    strange = [name for name in names if name not in there]
    if there and strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ConfigError(
            f"rollouts: {NAME} cannot hand vLLM this model: its files have no {strange[0]}{more}, under whose names "
            "the weights are held here; set rollouts: transformers"
        )


def _check_tied(embedding: Any, head: Any) -> None:
    """Refuse to change one side of an embedding and a head that share a weight: in training they differ then, and vLLM
    has one weight for both.

    Raises:
        ConfigError: an adapter, or a copy that is trained whole, on either side.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    weights = [getattr(_loaded(side), "weight", None) for side in (embedding, head)]
    if weights[0] is None or weights[0] is not weights[1]:
        return
    for side in (embedding, head):
        if isinstance(side, ModulesToSaveWrapper):
            raise ConfigError(
                f"rollouts: {NAME} cannot hand vLLM a trained copy of an embedding that is the head too, since the "
                "other stays as it is: leave both out of lora.modules_to_save, or set rollouts: transformers"
            )
        if isinstance(side, BaseTunerLayer):
            raise ConfigError(
                f"rollouts: {NAME} cannot merge an adapter on an embedding that is the head too: leave both out of "
                "lora.targets, or set rollouts: transformers"
            )


def _loaded(module: Any) -> Any:
    """A layer as it was before PEFT put its own around it."""
    for name in ("original_module", "base_layer"):
        module = getattr(module, name, module)
    return module


def _is_sent(model: Any, name: str) -> bool:
    """Whether vLLM has such a weight: not an adapter's, what a saved module took the place of, or what PPO's values
    have of their own, a head and their copies of saved modules."""
    if not hasattr(model, "peft_config"):
        return True
    adapter = name.partition(".modules_to_save.")[2].partition(".")[0]
    return (
        name.startswith(BASE)
        and model.prefix not in name
        and ".original_module." not in name
        and (not adapter or adapter in model.active_adapters)
    )


def _names_in_files(folder: Path) -> set[str]:
    """The names of the weights in a model's files; empty where there are none that can be looked into."""
    from safetensors import safe_open

    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(file.keys())
    return found


@contextmanager
def _variables_kept() -> Iterator[None]:
    """TRL tells vLLM by environment variables that there is one process; whatever is started later need not see them.

    A training that follows in this process would take them for torchrun's.
    """
    before = {name: os.environ.get(name) for name in VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """vLLM seeds the process's random numbers as it starts; after this they are where they were."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
