"""A server that is installed, started by the ``launch.sh`` of an export, and asked over HTTP on this machine."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.conversations import whole_number
from ft_export.errors import ExportError
from ft_export.serving.launch import MARKER

__all__ = ["OPTIONS", "Answer", "Engine", "Server", "engine_of", "running"]

OPTIONS = {
    "engine": "the server's program, its Python or its environment's folder: it is started on the export and compared",
    "engine_args": "further words for its command line",
    "engine_wait": "seconds that it may take to start, and again for one answer (900)",
}
"""What ``key=value`` may be for a server that is started to prove an export, and what each is."""
WAIT = 900
"""Seconds that a server may take to start, and again for one answer, unless ``engine_wait`` says otherwise."""
MODULES = {"vllm": "vllm.entrypoints.cli.main"}
"""What a Python runs in place of the program that ``launch.sh`` begins with; SGLang's begins with Python itself."""
ENDS_WITHIN = 30.0
"""Seconds until a server that was told to end is made to."""


@dataclass(frozen=True)
class Engine:
    """How a server is started for a proof.

    Attributes:
        target: ``vllm`` or ``sglang``.
        program: the server's own program, or the Python of its environment.
        words: further words for the server, after those of ``launch.sh``.
        wait: seconds for the start, and for each answer.
    """

    target: str
    program: Path
    words: tuple[str, ...] = ()
    wait: float = WAIT

    @property
    def is_python(self) -> bool:
        return self.program.name.startswith("python")

    def script(self) -> tuple[str, str]:
        """The name by which ``launch.sh`` calls the server, and a script for it."""
        program = shlex.quote(str(self.program))
        if not self.is_python:
            return self.program.name, f'#!/bin/sh\nexec {program} "$@"\n'
        module = MODULES.get(self.target)
        name, words = (self.target, f"-m {module} ") if module else ("python", "")
        return name, f'#!/bin/sh\nexec {program} {words}"$@"\n'


def engine_of(said: Mapping[str, str], target: str) -> Engine | None:
    """The server that ``engine=`` names: a program, a Python or an environment's folder. None without that option.

    Raises:
        ExportError: it is none of these, or ``engine_args`` or ``engine_wait`` cannot be read.
    """
    if "engine" not in said:
        for key in ("engine_args", "engine_wait"):
            if key in said:
                raise ExportError(f"{key}= is for the server that engine= names: name it, or leave {key}= out")
        return None
    named = said["engine"]
    names = [target, "python"] if target in MODULES else ["python"]
    place = Path(named).expanduser()
    if place.is_dir():
        found = [place / below / name for name in names for below in ("bin", "")]
        program = next((one for one in found if os.access(one, os.X_OK) and one.is_file()), None)
    elif os.sep in named:
        program = place if place.is_file() and os.access(place, os.X_OK) else None
    else:
        program = Path(there) if (there := shutil.which(named)) else None
    allowed = " or ".join(["a Python" if name == "python" else f"a {name} program" for name in names])
    if program is None or not (program.name in names or program.name.startswith("python")):
        raise ExportError(f"engine={named} is not {allowed}, nor an environment's folder with one in it")
    try:
        words = shlex.split(said.get("engine_args", ""))
    except ValueError as error:
        raise ExportError(f"engine_args={said['engine_args']} cannot be split into words: {error}") from error
    # not resolved: the link to a Python in an environment is how it knows its environment
    return Engine(target, program.absolute(), tuple(words), whole_number(dict(said), "engine_wait") or WAIT)


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        tokens: ids, with the one that ended it.
        logprobs: of each of them, in nats.
        prompt: the ids that the server was asked, where it tells them.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt: tuple[int, ...] | None = None


class Server:
    """A server that answers; made by :func:`running`."""

    def __init__(self, target: str, address: str, wait: float) -> None:
        self.target = target
        self.address = address
        self.wait = wait
        # whatever proxy the machine uses has no business on localhost
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def is_up(self) -> bool:
        try:
            with self._opener.open(f"{self.address}/health", timeout=5):
                return True
        except (OSError, http.client.HTTPException):
            return False

    def complete(self, name: str, ids: Sequence[int], count: int) -> Answer:
        """The greedy continuation of a prompt given by its tokens.

        Raises:
            ExportError: the server does not answer, or not as it should.
        """
        if self.target == "sglang":
            sampling = {"temperature": 0, "max_new_tokens": count}
            said = self._ask("/generate", {"input_ids": list(ids), "sampling_params": sampling, "return_logprob": True})
            with self._as_it_should("/generate"):
                pairs = said["meta_info"]["output_token_logprobs"]
                return Answer(tuple(int(pair[1]) for pair in pairs), tuple(float(pair[0]) for pair in pairs))
        asked = {"prompt": list(ids), "logprobs": 0, "return_tokens_as_token_ids": True}
        said = self._ask("/v1/completions", {"model": name, **asked, **_greedy(count)})
        with self._as_it_should("/v1/completions"):
            found = said["choices"][0]["logprobs"]
            tokens = tuple(int(token.removeprefix("token_id:")) for token in found["tokens"])
            return Answer(tokens, tuple(float(value) for value in found["token_logprobs"]))

    def chat(self, name: str, messages: Sequence[Mapping[str, Any]], count: int) -> Answer:
        """The greedy answer to a conversation, with the prompt that the server's chat template made of it.

        Raises:
            ExportError: as :meth:`complete`.
        """
        path = "/v1/chat/completions"
        asked = {"messages": list(messages), "logprobs": True, "return_token_ids": True}
        said = self._ask(path, {"model": name, **asked, **_greedy(count)})
        with self._as_it_should(path):
            choice = said["choices"][0]
            prompt = choice["prompt_token_ids"] if self.target == "sglang" else said["prompt_token_ids"]
            tokens = choice["response_token_ids"] if self.target == "sglang" else choice["token_ids"]
            values = [float(one["logprob"]) for one in choice["logprobs"]["content"]]
            if len(values) != len(tokens):
                raise ValueError("another number of tokens than of log-probabilities")
            return Answer(tuple(map(int, tokens)), tuple(values), tuple(map(int, prompt)))

    @contextmanager
    def _as_it_should(self, path: str) -> Iterator[None]:
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ExportError(f"{self.target} answers {path} otherwise than it should: {error!r}") from error

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.wait) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise ExportError(f"{self.target} answers {path} with {error.code}: {said}") from error
        except TimeoutError as error:
            raise ExportError(
                f"{self.target} does not answer {path} within {self.wait:g} seconds (engine_wait= says how many)"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise ExportError(f"{self.target} does not answer {path}: {error!r}") from error
        except ValueError as error:
            raise ExportError(f"{self.target} answers {path} with something that is no JSON: {error}") from error


def _greedy(count: int) -> dict[str, Any]:
    # the last two so that what generation_config.json says of sampling is not put on top
    return {"temperature": 0, "max_tokens": count, "top_p": 1.0, "repetition_penalty": 1.0}


@contextmanager
def running(engine: Engine, folder: Path) -> Iterator[Server]:
    """Start the server by the folder's ``launch.sh`` on a free port; it is ended with the block.

    Raises:
        ExportError: it does not come up. What it said is kept in a file that the message names, as with any error
            inside the block.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(engine.target, f"http://127.0.0.1:{port}", engine.wait)
    with tempfile.NamedTemporaryFile("wb", prefix=f"{engine.target}-", suffix=".log", delete=False) as file:
        log = Path(file.name)
        try:
            with _ends_when_told(), tempfile.TemporaryDirectory() as programs:
                process = _start(engine, folder, Path(programs), port, file)
                try:
                    _wait_for(server, process, log)
                    yield server
                    _still_there(server, process)
                finally:
                    _end(process)
        except ExportError as error:
            raise ExportError(f"{error}; what the server said is in {log}") from error
    log.unlink()


@contextmanager
def _ends_when_told() -> Iterator[None]:
    """Let SIGTERM leave the block as Ctrl-C does: the server is in a session of its own, and would stay behind."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(engine: Engine, folder: Path, programs: Path, port: int, log: Any) -> subprocess.Popen[bytes]:
    name, script = engine.script()
    (programs / name).write_text(script, encoding="utf-8")
    (programs / name).chmod(0o755)
    # this process's own libraries are not the server's
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment["PATH"] = f"{programs}{os.pathsep}{environment.get('PATH', os.defpath)}"
    words = ["sh", str(folder / MARKER), *engine.words, "--port", str(port)]
    # a session of its own, so that all processes of the server can be ended
    return subprocess.Popen(
        words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _still_there(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Refuse answers that were another program's, which had taken the port."""
    if (code := process.poll()) is not None:
        raise ExportError(f"{server.target} ended with code {code} while it was asked; what answered may not be it")


def _wait_for(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + server.wait
    while not server.is_up():
        code = process.poll()
        if code is not None:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            last = said[-1].strip()[:300] if said else "nothing"
            raise ExportError(f"{server.target} ended with code {code} before it answered, saying last: {last}")
        if time.monotonic() > until:
            raise ExportError(
                f"{server.target} did not come up within {server.wait:g} seconds (engine_wait= says how many)"
            )
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(ENDS_WITHIN)
    with suppress(ProcessLookupError):  # what does not end by itself, or outlives its parent
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
