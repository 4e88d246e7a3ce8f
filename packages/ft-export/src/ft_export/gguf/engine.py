"""llama.cpp itself, loaded into this process through xllamacpp, asked over its own HTTP interface on localhost."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.errors import ExportError

__all__ = ["Continuation", "LlamaCpp", "llama_cpp", "require_llama_cpp"]

TIMEOUT = 600.0
"""Seconds for one request; a large model on a CPU is slow."""


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation.

    Attributes:
        tokens: the ids chosen, with the one that ended it.
        candidates: for each of ``tokens`` the likeliest ids with their log-probabilities; empty where
            llama.cpp gives none.
        text: the tokens as text, without the one that ended it.
        stopped: whether the last token ended it.
        read: tokens of the prompt, those of images too.
    """

    tokens: tuple[int, ...]
    candidates: tuple[dict[int, float], ...]
    text: str
    stopped: bool
    read: int = 0


class LlamaCpp:
    """A running llama.cpp server; made by :func:`llama_cpp`."""

    def __init__(self, address: str) -> None:
        self.address = address
        # whatever proxy the machine uses has no business on localhost
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _post(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else None  # without a body it is a GET
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise ExportError(f"llama.cpp answers {path} with {error.code}: {said}") from error
        except OSError as error:
            raise ExportError(f"llama.cpp does not answer {path}: {error}") from error

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of a text; special tokens written in it are recognised, as transformers does."""
        return list(
            self._post("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})["tokens"]
        )

    def apply_template(self, messages: Sequence[dict[str, Any]]) -> str:
        """The conversation in the file's chat template, ending where the assistant speaks."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def models(self) -> list[str]:
        """The names under which the model is served."""
        return [str(model["id"]) for model in self._post("/v1/models", None)["data"]]

    def chat(self, model: str, messages: Sequence[dict[str, Any]], count: int) -> tuple[str, str]:
        """An answer of up to ``count`` tokens over the OpenAI interface, and the name of the model that gave it."""
        body = {"model": model, "messages": list(messages), "max_tokens": count, "temperature": 0}
        answer = self._post("/v1/chat/completions", body)
        return str(answer["choices"][0]["message"].get("content") or ""), str(answer["model"])

    def chat_length(self, model: str, messages: Sequence[dict[str, Any]]) -> int:
        """How many tokens the OpenAI interface makes of a conversation, its images and the beginning of an answer."""
        body = {"model": model, "messages": list(messages), "max_tokens": 1, "temperature": 0}
        return int(self._post("/v1/chat/completions", body)["usage"]["prompt_tokens"])

    def template(self) -> str:
        """The file's chat template, as it stands there."""
        return str(self._post("/props", None)["chat_template"])

    def end_token(self) -> str:
        """The text of the token that is llama.cpp's end of a text."""
        return str(self._post("/props", None)["eos_token"])

    def ends_at(self, token: int) -> bool:
        """Whether an answer is over once ``token`` is said; it is made the likeliest by far, so that it is said."""
        answer = self._post(
            "/completion",
            {
                "prompt": [token],
                "n_predict": 2,
                "temperature": 0,
                "samplers": ["temperature"],
                "logit_bias": [[token, 1e4]],
                "cache_prompt": False,
                "return_tokens": True,
            },
        )
        return [int(one) for one in answer["tokens"]] == [token] and answer["stop_type"] == "eos"

    def marker(self) -> str:
        """What stands for an image in a prompt; drawn anew when a server starts."""
        return str(self._post("/props", None)["media_marker"])

    def greedy(self, ids: Sequence[int] | Mapping[str, Any], count: int, candidates: int) -> Continuation:
        """The likeliest token after a prompt, ``count`` times over; samplers and the prompt cache are off.

        Args:
            ids: the prompt; or a text with :meth:`marker` for each image, and the images (``prompt_string``,
                ``multimodal_data``).
        """
        answer = self._post(
            "/completion",
            {
                "prompt": dict(ids) if isinstance(ids, Mapping) else list(ids),
                "n_predict": count,
                "temperature": 0,
                "n_probs": candidates,
                "samplers": ["temperature"],
                "repeat_penalty": 1.0,
                "cache_prompt": False,
                "return_tokens": True,
            },
        )
        tokens = tuple(int(token) for token in answer["tokens"])
        steps = answer.get("completion_probabilities", [])  # none where the first token ends it
        places = _places(tokens, [int(step["id"]) for step in steps])
        candidates_at: list[dict[int, float]] = [{} for _ in tokens]
        for step, place in zip(steps, places, strict=True):
            if place is not None:
                candidates_at[place] = {int(top["id"]): float(top["logprob"]) for top in step["top_logprobs"]}
        read = int(answer["tokens_evaluated"])
        return Continuation(tokens, tuple(candidates_at), answer["content"], answer["stop_type"] == "eos", read)


def _places(tokens: Sequence[int], known: Sequence[int]) -> list[int | None]:
    """Where in ``tokens`` each of ``known`` lies.

    llama.cpp leaves out the log-probabilities of a token that ends in the middle of a character. What is left is a
    subsequence; a place is certain where matching from the left and from the right agree, and None elsewhere.
    """

    def match(tokens: Sequence[int], known: Sequence[int]) -> list[int]:
        found, at = [], 0
        for token in known:
            while at < len(tokens) and tokens[at] != token:
                at += 1
            found.append(at)
            at += 1
        return found

    left = match(tokens, known)
    right = [len(tokens) - 1 - place for place in match(tokens[::-1], known[::-1])][::-1]
    return [one if one == other else None for one, other in zip(left, right, strict=True)]


def require_llama_cpp() -> None:
    """
    Raises:
        ExportError: xllamacpp is not installed.
    """
    from importlib.util import find_spec

    if find_spec("xllamacpp") is None:
        raise ExportError("checking a GGUF file needs llama.cpp: pip install gguf xllamacpp")


@contextmanager
def llama_cpp(
    file: Path, context: int, alias: str | None = None, adapter: Path | None = None, projector: Path | None = None,
    budget: tuple[int, int] | None = None,
) -> Iterator[LlamaCpp]:  # fmt: skip
    """Load a GGUF file on the CPU; it is unloaded at the end of the block.

    Args:
        context: how many tokens a prompt and its continuation may have.
        alias: the name to serve it under, as llama-server's ``--alias``.
        adapter: the GGUF file of a LoRA adapter to put on it, with the scale that it says itself.
        projector: the GGUF file of a tower and projector, as llama-server's ``--mmproj``.
        budget: the least and the most tokens that it may make of an image.

    Raises:
        ExportError: xllamacpp is not installed, or llama.cpp cannot load the file.
    """
    require_llama_cpp()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = context
    if alias is not None:
        params.model_alias = {alias}
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.use_jinja = True
    params.verbosity = -1
    params.port = 0
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    if projector is not None:
        params.mmproj.path = str(projector)
        params.mmproj_use_gpu = False
    if budget is not None:
        params.image_min_tokens, params.image_max_tokens = budget
    try:
        server = xllamacpp.Server(params)
    except Exception as error:
        both = " with ".join(one.name for one in (file, adapter, projector) if one is not None)
        raise ExportError(f"llama.cpp cannot load {both}: {error}") from error
    try:
        engine = LlamaCpp(server.listening_address)
        # A server that is unloaded before its loop of tasks has begun waits for ever (one in some 500, measured, where
        # a text's tokens alone were asked for); an answer comes from that loop.
        engine.greedy([0], 1, 1)
        yield engine
    finally:
        del server
