"""Open WebUI itself imports what was exported, and a chat through it reaches the model in llama-server.

``pip install open-webui==0.12.4`` in an environment of its own, whose ``bin`` is on PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

from ft_export.bases import load_tokenizer
from ft_export.gguf.engine import llama_cpp
from ft_export.open_webui.export import export

pytestmark = pytest.mark.serve

Call = Callable[..., Any]
STARTS_WITHIN = 300.0
"""Seconds; it takes half a minute on two cores with nothing else to do."""


@contextmanager
def open_webui(folder: Path, engine: str) -> Iterator[Call]:
    """Open WebUI with its data in ``folder``, as compose.yaml sets it up but without accounts; yields how to ask it."""
    program = shutil.which("open-webui")
    if program is None:
        pytest.skip("needs Open WebUI: pip install open-webui==0.12.4 in an environment of its own, on PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "DATA_DIR": str(folder),
        "ENABLE_OLLAMA_API": "false",
        "ENABLE_PERSISTENT_CONFIG": "false",
        "OFFLINE_MODE": "true",
        "OPENAI_API_BASE_URLS": f"{engine}/v1",
        "OPENAI_API_KEYS": "none",
        "RAG_EMBEDDING_ENGINE": "openai",  # else it fetches a model
        "WEBUI_AUTH": "false",
        "WEBUI_SECRET_KEY": "for the test alone",
    }
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(path: str, body: Any = None, token: str = "") -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)

    words = [program, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + STARTS_WITHIN
        while True:
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            assert time.monotonic() < until, "Open WebUI does not start"
            try:
                call("/health")
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield call
    finally:
        process.terminate()
        process.wait(60)


def test_a_chat_through_open_webui(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny model", max_position_embeddings=2048)
    system = 'Say "yes", in one\nword.'
    made = export(model, tmp_path / "out", options={"system": system})
    exported = json.loads((made.file / "model.json").read_text())
    data = tmp_path / "data"
    data.mkdir()
    question = {"role": "user", "content": "What is 3?"}
    with (
        llama_cpp(made.file / "tiny-model-f16.gguf", 2048, "tiny-model") as engine,
        open_webui(data, engine.address) as ask,
    ):
        token = ask("/api/v1/auths/signin", {"email": "admin@localhost", "password": "admin"})["token"]
        assert ask("/api/v1/models/import", exported, token) is True
        kept = ask("/api/v1/models/model?id=tiny-model-chat", token=token)
        assert kept["params"] == exported["models"][0]["params"]
        assert {"tiny-model", "tiny-model-chat"} == {one["id"] for one in ask("/api/models", token=token)["data"]}
        body = {"model": "tiny-model-chat", "stream": False, "messages": [question], "max_tokens": 8}
        answer = ask("/api/chat/completions", body, token)
    assert answer["model"] == "tiny-model"
    # llama-server got the system prompt before the question, in the chat template
    tokenizer = load_tokenizer(model)
    conversation = [{"role": "system", "content": system}, question]
    prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert answer["usage"]["prompt_tokens"] == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
