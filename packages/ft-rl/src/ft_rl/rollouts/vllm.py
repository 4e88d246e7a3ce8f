"""Completions written by a vLLM server: the engine ``vllm``.

The server has the base model; after each optimizer step it is handed the adapter as it is then. The adapter is saved
in the run's folder, which the server has to see under the same path.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ft_core.config import TrainConfig
from ft_core.errors import ConfigError, RunError
from ft_core.training.ranks import Ranks
from ft_rl.rollouts.protocol import Completion, EngineJob, Sampling, checked
from ft_rl.rollouts.vllm_server import Server, VllmSettings, completions_of

__all__ = ["Vllm", "check", "start_command"]

SCRATCH = ".rollouts"
"""The folder in the run's, in which adapters wait for the server."""
AT_ONCE = 128
"""Prompts that are asked for at a time; the server makes its own batches of them."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` may be."""
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""``init_lora_weights`` that leave the base's weights as they are."""
SAMPLE = "Words, números 3.14159, Größe, 数学 и формулы: def f(x):\n\treturn x**2  # 🙂"
"""A text that tokenizers of different models take apart differently."""


NO_ADAPTER = (
    "rollouts: vllm hands the server an adapter, and lora: null trains the model itself; set lora, or "
    "rollouts: transformers"
)


def check(config: TrainConfig, settings: Mapping[str, Any]) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        ConfigError: wrong settings, no adapter, or several processes; one line.
    """
    checked(VllmSettings, dict(settings), "vllm")
    if config.lora is None:
        raise ConfigError(NO_ADAPTER)
    _check_processes()


def _check_processes() -> None:
    if Ranks().count > 1:
        raise ConfigError("rollouts: vllm serves a training of one process; start it without torchrun")


class Vllm:
    """See the module."""

    def __init__(self, job: EngineJob) -> None:
        settings = checked(VllmSettings, job.settings, "vllm")
        _check_adapter(job.model)
        _check_processes()
        self._model, self._tokenizer, self._say = job.model, job.tokenizer, job.say
        self._asked_for = settings.model
        self._scratch = Path(job.folder).absolute() / SCRATCH
        self._server = Server(settings, start_command(job.model, settings.url))
        self._vocabulary = int(job.model.get_input_embeddings().weight.shape[0])
        # No name is used twice: a server may hold keys and values of prompts that an adapter of this name has read.
        self._token = secrets.token_hex(4)
        self._loads = 0
        self._base: str | None = None  # what the server calls the base model, once it has been met
        self._context: int | None = None
        self._mode_is_right = False
        self._name: str | None = None  # of the adapter that it has
        self._step, self._call = -1, 0

    def generate(
        self, prompts: Sequence[Sequence[int]], copies: int, sampling: Sampling, *, step: int
    ) -> list[list[Completion]]:
        """See :class:`ft_rl.rollouts.protocol.Engine`.

        A prompt's random numbers depend on the seed, the step, and where the prompt stands in the step alone.
        """
        if self._base is None:
            self._base = self._meet()
        if self._name is None or step != self._step:
            self._renew(step)
        own = [replace(sampling, max_new_tokens=limit, limits=()) for limit in sampling.limits_of(len(prompts))]
        self._check_room(max(len(prompt) + s.max_new_tokens for prompt, s in zip(prompts, own, strict=True)))
        if not self._mode_is_right and (sampling.temperature != 1 or not sampling.plain):
            self._check_mode(prompts[0])
        first, self._call = self._call, self._call + len(prompts)
        # One that is asked for the likeliest tokens is asked once: vLLM refuses copies of them.
        asked = copies if sampling.temperature > 0 else 1
        bodies = [
            self._body(prompt, asked, s, place)
            for place, (prompt, s) in enumerate(zip(prompts, own, strict=True), first)
        ]
        with ThreadPoolExecutor(min(len(bodies), AT_ONCE)) as pool:
            answers = list(pool.map(self._server.complete, bodies))
        made = [completions_of(self._server, choices, self._vocabulary) for choices in answers]
        for group, s in zip(made, own, strict=True):
            for completion in group:
                self._check_end(completion, s)
        return [group * (copies // asked) for group in made]

    def close(self) -> None:
        """Have the server forget the adapter, and remove the folder it was in."""
        if self._name is not None:
            with suppress(RunError):  # it may be why the training ends, which is then said already
                self._server.unload(self._name)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._name, self._base, self._context, self._mode_is_right = None, None, None, False

    def _meet(self) -> str:
        """Check that the server has the base model; the name that it goes by. Adapters of an earlier start go."""
        server = self._server
        cards = server.models()
        bases = {str(card["id"]): card for card in cards if card.get("parent") is None}
        name = self._asked_for or next(iter(bases), "")
        if name not in bases or (self._asked_for is None and len({card.get("root") for card in bases.values()}) > 1):
            wanted = f"no model {self._asked_for!r}" if self._asked_for else "not one base model"
            raise RunError(
                f"rollouts: {server.url} serves {wanted} (it serves: {', '.join(bases) or 'none'}): set "
                f"rollouts.model, or start it with: {server.start}"
            )
        if server.tokens(name, SAMPLE) != self._tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]:
            raise RunError(
                f"rollouts: {name!r}, which {server.url} serves, takes text apart into other tokens than the model "
                f"that is trained: it is another model; start it with: {server.start}"
            )
        context = bases[name].get("max_model_len")
        self._context = context if isinstance(context, int) else None
        for card in cards:
            if card.get("parent") is not None and self._scratch in Path(str(card.get("root") or "")).parents:
                server.unload(str(card["id"]))
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._say(f"rollouts: vLLM at {server.url} writes, on its model {name}")
        return name

    def _renew(self, step: int) -> None:
        """Hand the server the adapter as it is now; the one before goes."""
        old, name = self._name, f"ft-{step}-{self._token}-{self._loads}"
        self._loads += 1
        folder = self._save(name)
        self._server.load(name, folder)
        self._name, self._step, self._call = name, step, 0
        if old is not None:
            self._server.unload(old)
            shutil.rmtree(self._scratch / old, ignore_errors=True)

    def _save(self, name: str) -> Path:
        """Write the adapter that is on beside its place, and rename it."""
        (active,) = self._model.active_adapters
        folder, beside = self._scratch / name, self._scratch / f".{name}.partial"
        try:
            beside.mkdir(parents=True)
            self._model.save_pretrained(beside, selected_adapters=[active], save_embedding_layers=False)
            # PEFT gives one that is not called "default" a folder of its own.
            os.replace(beside if active == "default" else beside / active, folder)
        except OSError as error:
            raise RunError(
                f"rollouts: cannot save the adapter in {self._scratch}: {error.strerror or error}"
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return folder

    def _body(self, prompt: Sequence[int], copies: int, sampling: Sampling, place: int) -> dict[str, Any]:
        """A request. Whatever the server would take from the model's generation_config.json is said here."""
        words = f"{sampling.seed} {self._step} {place}".encode()
        return {
            "model": self._name,
            "prompt": list(prompt),
            "n": copies,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(sampling.stops),
            "ignore_eos": True,  # what ends a completion is in the line above
            "seed": int.from_bytes(hashlib.sha256(words).digest()[:6], "big"),  # vLLM adds the copy's number
            "logprobs": 0,  # the drawn token's alone
            "return_token_ids": True,
        }

    def _check_room(self, tokens: int) -> None:
        if self._context is not None and tokens > self._context:
            raise RunError(
                f"rollouts: the vLLM server at {self._server.url} has room for {self._context} tokens, and a prompt "
                f"with its completion takes up to {tokens}: start it with --max-model-len {tokens} or more"
            )

    def _check_mode(self, prompt: Sequence[int]) -> None:
        """Refuse log-probabilities before temperature and cuts: half the temperature has to double their spread."""
        spreads = []
        for temperature in (1.0, 0.5):
            body = self._body(prompt, 1, Sampling(1, temperature), 0)
            body |= {"logprobs": 5, "return_tokens_as_token_ids": True}
            (choice,) = self._server.complete(body)
            completions_of(self._server, [choice], self._vocabulary)
            spreads.append((choice["logprobs"].get("top_logprobs") or [{}])[0])
        both = [token for token in spreads[0] if token in spreads[1]]
        plain, halved = (max(each[t] for t in both) - min(each[t] for t in both) if both else 0.0 for each in spreads)
        if plain < 1e-2:
            return  # the likeliest tokens are equally likely, which says nothing; the next prompts may
        if halved < 1.5 * plain:
            raise RunError(
                f"rollouts: the vLLM server at {self._server.url} gives log-probabilities as they are before "
                "temperature, top_p, top_k, min_p and repetition_penalty; they have to be those of what is drawn "
                f"from (--logprobs-mode processed_logprobs): start it with: {self._server.start}"
            )
        self._mode_is_right = True

    def _check_end(self, completion: Completion, sampling: Sampling) -> None:
        ended = completion.ids[-1] in sampling.stops or len(completion.ids) == sampling.max_new_tokens
        if not ended or len(completion.ids) > sampling.max_new_tokens:
            raise RunError(
                f"rollouts: the vLLM server at {self._server.url} has ended a completion after {len(completion.ids)} "
                f"of {sampling.max_new_tokens} tokens, without a token that ends one; start it without "
                f"--generation-config and --override-generation-config: {self._server.start}"
            )


def _check_adapter(model: Any) -> None:
    """Refuse what vLLM cannot compute.

    Raises:
        ConfigError: there is none, or it changes more than vLLM's LoRA can.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise ConfigError(NO_ADAPTER)
    (active,) = model.active_adapters
    config = configs[active]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    start = getattr(config, "init_lora_weights", True)
    found = {
        f"adapters of the kind {kind}": kind != "LORA",
        "lora.dora": getattr(config, "use_dora", False),
        f"lora.bias: {config.bias}": config.bias != "none",
        "lora.modules_to_save": config.modules_to_save,
        "trained tokens (trainable_token_indices)": getattr(config, "trainable_token_indices", None),
        "lora.init_lora_weights: loftq": hasattr(config, "quantized_from"),
        f"lora.init_lora_weights: {start}": isinstance(start, str) and start.lower() not in STARTS,
    }
    for what, there in found.items():
        if there:
            raise ConfigError(f"rollouts: vllm cannot serve {what}; leave it out, or set rollouts: transformers")


def start_command(model: Any, url: str) -> str:
    """The command that starts a server at an address for training a model's adapter."""
    (active,) = model.active_adapters
    adapter = model.peft_config[active]
    rank = max([adapter.r, *(adapter.rank_pattern or {}).values()])
    served = next((size for size in RANKS if size >= rank), rank)
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    # Where it is asked on the machine itself, nobody else has to reach it: whoever does can have it read folders.
    host = f" --host {parts.hostname}" if parts.hostname in ("127.0.0.1", "localhost", "::1") else ""
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {shlex.quote(str(model.name_or_path))} --enable-lora "
        f"--max-lora-rank {served} --logprobs-mode processed_logprobs{host} --port {port}"
    )
