"""Open WebUI itself imports an export, and a chat through it reaches the model in llama.cpp's server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ft_export.bases import load_tokenizer
from ft_export.gguf.engine import llama_cpp

__all__ = ["chat_through_open_webui"]

STARTS_WITHIN = 300.0
"""Seconds; it takes half a minute on two cores with nothing else to do."""
NEW_TOKENS = 24


def chat_through_open_webui(folder: Path, run: Path, programs: Path, work: Path) -> dict[str, Any]:
    """Import ``folder/model.json`` and ask the first held-out questions.

    Args:
        folder: what ``ft export RUN --to open-webui system=TEXT`` wrote.
        programs: of Open WebUI's environment.

    Returns:
        What was seen, for people (``said``).

    Raises:
        AssertionError: the import, the system prompt or an answer is not what it should be.
    """
    exported = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    model = exported["models"][0]
    (file,) = folder.glob("*.gguf")
    context = json.loads((folder / "proof.json").read_text(encoding="utf-8"))["open_webui"]["context"]
    tokenizer = load_tokenizer(run / "merged")
    rows = [json.loads(line) for line in (run / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:4]]
    data = work / "open-webui-data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    with llama_cpp(file, context, model["base_model_id"]) as engine, open_webui(programs, data, engine.address) as ask:
        token = ask("/api/v1/auths/signin", {"email": "admin@localhost", "password": "admin"})["token"]
        assert ask("/api/v1/models/import", exported, token) is True, "Open WebUI did not import model.json"
        kept = ask(f"/api/v1/models/model?id={model['id']}", token=token)
        assert kept["params"] == model["params"], f"Open WebUI kept other parameters: {kept['params']}"
        names = {one["id"] for one in ask("/api/models", token=token)["data"]}
        assert names == {model["id"], model["base_model_id"]}, f"Open WebUI offers {names}"
        for row in rows:
            question = [message for message in row["messages"] if message["role"] != "assistant"]
            body = {"model": model["id"], "stream": False, "messages": question}
            answer = ask("/api/chat/completions", {**body, "max_tokens": NEW_TOKENS, "temperature": 0}, token)
            assert answer["model"] == model["base_model_id"], f"{answer['model']} answered"
            # the engine got the system prompt before the question, in the chat template
            whole = [{"role": "system", "content": model["params"]["system"]}, *question]
            text = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
            wanted = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            assert answer["usage"]["prompt_tokens"] == wanted, f"{answer['usage']} for a prompt of {wanted} tokens"
            said = answer["choices"][0]["message"]["content"]
            direct = engine.chat(model["base_model_id"], whole, NEW_TOKENS)[0]
            print(f"{question[-1]['content']!r}: {said!r} by Open WebUI, {direct!r} by the engine alone", flush=True)
            assert said == direct, "the answer through Open WebUI is another than the engine's own"
    return {"said": f"imported as {model['id']}; {len(rows)} chats as the engine alone answers"}


@contextmanager
def open_webui(programs: Path, data: Path, engine: str) -> Iterator[Callable[..., Any]]:
    """Open WebUI with its data in a folder, as compose.yaml sets it up but without accounts; yields how to ask it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "DATA_DIR": str(data),
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
        sent = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", sent, headers)
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)

    words = [str(programs / "open-webui"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (data / "log").open("wb") as log:
        process = subprocess.Popen(words, env=environment, cwd=data, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + STARTS_WITHIN
        while True:
            assert process.poll() is None, f"Open WebUI ended: {(data / 'log').read_text(errors='replace')[-500:]}"
            assert time.monotonic() < until, f"Open WebUI does not start; see {data / 'log'}"
            try:
                call("/health")
                break
            except OSError:
                time.sleep(1)
        yield call
    finally:
        process.terminate()
        process.wait(60)
