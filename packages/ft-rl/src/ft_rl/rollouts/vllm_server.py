"""A vLLM server over HTTP: what it serves, adapters that come and go, completions with their log-probabilities.

The endpoints are vLLM's ``/v1/models``, ``/tokenize``, ``/v1/load_lora_adapter``, ``/v1/unload_lora_adapter`` and
``/v1/completions``, as of vLLM 0.32.
"""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ft_core.errors import RunError
from ft_rl.rollouts.protocol import Completion
from ft_rl.web import bearer, check_address, direct

__all__ = ["Refused", "Server", "VllmSettings", "completions_of"]

ANSWER = 2**30
"""Bytes of the longest answer that is read."""


class VllmSettings(BaseModel):
    """Settings of ``rollouts: {engine: vllm}``.

    Attributes:
        url: the server's address, without ``/v1``.
        model: the name under which it serves the base model; unset, the one base model that it has.
        timeout: seconds that one request may take, such as writing all completions of one prompt.
        token_file: a file with the key that the server was started with (``--api-key``).
    """

    model_config = ConfigDict(extra="forbid")

    url: str = "http://127.0.0.1:8000"
    model: str | None = Field(default=None, min_length=1)
    timeout: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    token_file: str | None = None

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        return check_address(url).rstrip("/").removesuffix("/v1")


class Refused(RunError):
    """The server has answered, but not with what it was asked for.

    Attributes:
        status: of HTTP. said: what the server said.
    """

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message)
        self.status, self.said = status, said


class Server:
    """See the module. Whatever fails is a RunError of one line; nothing is asked twice.

    Attributes:
        url: its address. start: the command that starts such a server, for messages.
    """

    def __init__(self, settings: VllmSettings, start: str) -> None:
        self.url, self.start, self._timeout = settings.url, start, settings.timeout
        self._headers = {"Content-Type": "application/json", **bearer(settings.token_file)}
        self._opener = direct()

    def models(self) -> list[dict[str, Any]]:
        """What is served, base models and adapters: ``id``, ``root``, ``parent``, ``max_model_len`` and more."""
        answer = self._json("/v1/models", None)
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards):
            raise RunError(f"rollouts: {self.url} does not list models as vLLM does; start it with: {self.start}")
        return cards

    def tokens(self, model: str, text: str) -> list[int]:
        """A text's tokens, without special ones."""
        answer = self._json("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list):
            raise RunError(f"rollouts: {self.url} does not answer /tokenize as vLLM does; start it with: {self.start}")
        return tokens

    def load(self, name: str, folder: Path) -> None:
        """Have it load an adapter from a folder that it sees too."""
        try:
            self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except Refused as refused:
            if "No adapter found" in refused.said:
                raise RunError(
                    f"rollouts: the vLLM server at {self.url} does not find the adapter in {folder}: it has to see the "
                    "run's folder under the same path, on the same machine or a shared disk"
                ) from refused
            missing = refused.status in (404, 405)
            why = "loads no adapters while it runs" if missing else f"does not take the adapter ({refused.said})"
            raise RunError(f"rollouts: the vLLM server at {self.url} {why}; start it with: {self.start}") from refused

    def unload(self, name: str) -> None:
        """Have it forget an adapter; one that it does not know is forgotten already."""
        try:
            self._ask("/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as refused:
            if refused.status != 404:
                raise

    def complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of one request to ``/v1/completions``, as many as it asks for, in their order."""
        try:
            answer = self._json("/v1/completions", body)
        except Refused as refused:
            if refused.status == 404:
                raise RunError(f"{refused}; has it been started anew? Go on with --resume") from refused
            raise
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise RunError(f"rollouts: {self.url} answers without choices; start it with: {self.start}")
        if len(choices) != body["n"]:
            raise RunError(
                f"rollouts: {self.url} answers with {len(choices)} completions where {body['n']} were asked for; is "
                f"something between it and the training? Start it with: {self.start}"
            )
        return sorted(choices, key=lambda choice: int(choice.get("index", 0)))

    def _json(self, path: str, body: dict[str, Any] | None) -> Any:
        answer = self._ask(path, body)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            shown = answer[:60].decode(errors="replace")
            raise RunError(
                f"rollouts: {self.url}{path} answers what is no JSON ({shown!r}); start a server with: {self.start}"
            ) from None

    def _ask(self, path: str, body: dict[str, Any] | None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                read: bytes = answer.read(ANSWER + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = _said(error.read(4096)) or str(error.reason)
            hint = "; set rollouts.token_file to a file with its key" if error.code in (401, 403) else ""
            message = f"rollouts: the vLLM server at {self.url} answers {error.code} to {path} ({said}){hint}"
            raise Refused(message, error.code, said) from error
        except (OSError, http.client.HTTPException) as error:  # a URLError is an OSError
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise RunError(
                    f"rollouts: the vLLM server at {self.url} has not answered {path} within {self._timeout:g} s: "
                    "raise rollouts.timeout, or see what it is doing; go on with --resume"
                ) from error
            raise RunError(
                f"rollouts: no vLLM server can be reached at {self.url} ({reason or type(error).__name__}); start one "
                f"with: {self.start}"
            ) from error
        if len(read) > ANSWER:
            raise RunError(f"rollouts: {self.url}{path} answers with more than {ANSWER // 2**20} MiB")
        return read


def completions_of(server: Server, choices: list[dict[str, Any]], vocabulary: int) -> list[Completion]:
    """Choices with tokens and log-probabilities, checked.

    Args:
        vocabulary: how many tokens the trained model knows.

    Raises:
        RunError: a choice lacks its tokens or their log-probabilities, or has other tokens than the model.
    """
    made = []
    for choice in choices:
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise RunError(
                f"rollouts: {server.url} answers without the tokens of a completion (token_ids), as vLLM "
                f"does that knows return_token_ids; start it with: {server.start}"
            )
        if not isinstance(logprobs, list) or len(logprobs) != len(ids) or not all(map(_is_logprob, logprobs)):
            raise RunError(
                f"rollouts: {server.url} answers without a log-probability for each token; start it with: "
                f"{server.start}"
            )
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise RunError(
                f"rollouts: {server.url} writes a token {max(ids)} and the model that is trained knows {vocabulary}: "
                f"it serves another model; start it with: {server.start}"
            )
        made.append(Completion(ids, [float(value) for value in logprobs]))
    return made


def _is_logprob(value: Any) -> bool:
    # A little above 0 is rounding; logits (--logprobs-mode raw_logits) are well above it.
    return isinstance(value, int | float) and math.isfinite(value) and value < 1e-2


def _said(answer: bytes) -> str:
    """What an error's answer says, in one line."""
    text = answer.decode(errors="replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = text
    if isinstance(said, dict):
        said = said.get("error", said.get("detail", said))
        said = said.get("message", said) if isinstance(said, dict) else said
    line = " ".join(str(said).split())
    return line if len(line) <= 300 else f"{line[:300]}…"
