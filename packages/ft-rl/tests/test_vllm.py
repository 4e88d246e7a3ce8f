"""The engine ``vllm`` against a server that speaks as vLLM does, and writes by a model of its own.

The stand-in has a copy of the base model and loads adapters from the folders that it is told, so that it writes by what
the engine has handed it. That vLLM speaks so is looked at by ``integration_tests/serve/rollouts.py``.
"""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import ft_core as ft
from ft_core.errors import ConfigError, RunError
from ft_core.training import train
from ft_rl.rollouts.own_model import OwnModel
from ft_rl.rollouts.protocol import EngineJob, Sampling
from ft_rl.rollouts.vllm import Vllm, start_command
from ft_rl.rollouts.vllm_server import VllmSettings

REWARD = """
KIND = {"please", "gladly", "thanks", "welcome", "sure"}

def kindness(prompts, completions, **columns):
    return [sum(word in KIND for word in text.split()) / max(len(text.split()), 1) for text in completions]
"""
CONTEXT = 48


class StandIn:
    """vLLM's endpoints.

    Attributes:
        loaded: the adapters that were handed over, by name, in order. there: those that were not forgotten.
        asked: the bodies of requests for completions.
        raw: whether log-probabilities are those before the temperature.
        fault: may answer in place of the server: from a path and a body to a status and an answer, or None.
        spoil: may change the choices of an answer.
    """

    def __init__(self, base: Path) -> None:
        from peft import PeftModel

        model, self._tokenizer = ft.load(str(base), dtype="float32")
        self._wrap = lambda name, folder: PeftModel.from_pretrained(model, folder, adapter_name=name)
        self._base, self._model, self._lock = base, model, threading.Lock()
        self.loaded: dict[str, Path] = {}
        self.there: dict[str, Path] = {}
        self.asked: list[dict[str, Any]] = []
        self.raw = False
        self.fault: Callable[[str, dict[str, Any] | None], tuple[int, Any] | None] = lambda path, body: None
        self.spoil: Callable[[list[dict[str, Any]]], Any] = lambda choices: None

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        with self._lock:
            faulty = self.fault(path, body)
            if faulty is not None:
                return faulty
            if path == "/v1/models":
                return 200, {"object": "list", "data": self._cards()}
            assert body is not None
            if path == "/tokenize":
                return 200, {"tokens": self._tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
            if path == "/v1/load_lora_adapter":
                return self._load(body["lora_name"], Path(body["lora_path"]))
            if path == "/v1/unload_lora_adapter":
                known = self.there.pop(body["lora_name"], None)
                return (200, "Success") if known else (404, {"error": {"message": "cannot be found"}})
            assert path == "/v1/completions"
            self.asked.append(body)
            if body["model"] not in self.there:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(body["seed"])
                choices = self._write(body)
            self.spoil(choices)
            return 200, {"choices": choices}

    def _cards(self) -> list[dict[str, Any]]:
        base = {"id": "toy", "root": str(self._base), "parent": None, "max_model_len": CONTEXT}
        return [base, *({"id": n, "root": str(f), "parent": "toy"} for n, f in self.there.items())]

    def _load(self, name: str, folder: Path) -> tuple[int, Any]:
        if name in self.loaded:  # an unknown one: vLLM keeps what prompts became under the name
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        if not (folder / "adapter_config.json").is_file():
            return 404, {"error": {"message": f"Loading lora {name} failed: No adapter found for {folder}"}}
        if self.loaded:
            self._model.load_adapter(folder, adapter_name=name)
        else:
            self._model = self._wrap(name, folder)
        self.loaded[name] = self.there[name] = folder
        return 200, "Success"

    def _write(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        assert body["ignore_eos"]
        assert body["return_token_ids"]
        self._model.set_adapter(body["model"])
        sampling = Sampling(
            body["max_tokens"],
            *(body[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")),
            frozenset(body["stop_token_ids"]),
        )
        engine = OwnModel(EngineJob(self._model, self._tokenizer, {}, None, print))
        ((*made,),) = engine.generate([body["prompt"]], body["n"], sampling, step=0)
        choices = []
        for index, one in enumerate(made):
            logprobs = self._logprobs(body["prompt"], one.ids, 1.0 if self.raw else body["temperature"])
            said = {"token_logprobs": logprobs.gather(1, torch.tensor(one.ids)[:, None])[:, 0].tolist()}
            if body["logprobs"]:
                top = logprobs.topk(body["logprobs"])
                pairs = (
                    zip(*each, strict=True) for each in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                )
                said["top_logprobs"] = [{f"token_id:{token}": value for token, value in each} for each in pairs]
            choices.append({"index": index, "text": "", "token_ids": one.ids, "logprobs": said})
        return choices[::-1]  # the order is not what counts

    @torch.no_grad()
    def _logprobs(self, prompt: list[int], ids: list[int], temperature: float) -> torch.Tensor:
        logits = self._model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits.float() / temperature, -1)


class Connections(ThreadingHTTPServer):
    """Lets as many wait as ask at a time; by itself it resets the sixth connection."""

    daemon_threads = True
    request_queue_size = 128


@pytest.fixture
def serve() -> Iterator[Callable[[Path], tuple[StandIn, str]]]:
    """Starts a stand-in for a base model; gives it and its address."""
    servers = []

    def start(base: Path) -> tuple[StandIn, str]:
        stand_in = StandIn(base)

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # or the body waits 40 ms for the headers to be acknowledged

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: dict[str, Any] | None) -> None:
                status, said = stand_in.answer(self.path, body)
                data = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        server = Connections(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return stand_in, f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def config(toy: Any, model: Path, folder: Path, method: str, url: str, **settings: Any) -> dict[str, Any]:
    prompts = [{"prompt": row["prompt"].strip()} for row in toy.rows(64, seed=1)]
    toy.write_rows(folder / "prompts.jsonl", prompts)
    (folder / "kind.py").write_text(REWARD)
    return {
        "model": str(model),
        "method": method,
        "data": str(folder / "prompts.jsonl"),
        "eval_split": 16,
        "rewards": [f"{folder / 'kind.py'}:kindness"],
        "max_length": 32,
        "lora": {"r": 8},
        "output": str(folder / "run"),
        "training": {"max_steps": 20, "batch_size": 16, "gradient_accumulation": 2, "learning_rate": 2e-2},
        method: {"max_completion_length": 8, "rollouts": {"engine": "vllm", "url": url}, **settings},
    }


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_training_is_written_for_by_the_adapter_of_each_step(
    toy: Any, steep_model: Path, tmp_path: Path, serve: Any, method: str
) -> None:
    stand_in, url = serve(steep_model)
    result = train(config(toy, steep_model, tmp_path, method, url, temperature=0.7), say=lambda line: None)
    rows = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train" and "reward" in row]
    assert len(rows) == (5 if method == "ppo" else 20)  # PPO writes at every fourth step
    # In float32 the two differ by rounding; by an adapter that is a step old they differ by a hundredth of a nat.
    assert all(row["sampling/gap"] < 1e-4 and row["sampling/corrected"] == 0 for row in rows)
    assert [name.split("-")[1] for name in stand_in.loaded] == [str(i) for i in range(0, 20, 20 // len(rows))]
    assert not stand_in.there
    assert not (result.run / ".rollouts").exists()
    if method == "grpo":
        assert rows[-1]["reward"] > rows[0]["reward"] + 0.2


@pytest.mark.usefixtures("float32")
def test_an_adapter_that_is_a_step_old_is_seen(
    toy: Any, steep_model: Path, tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the bound of the test above is worth."""
    _, url = serve(steep_model)
    renew = Vllm._renew
    monkeypatch.setattr(Vllm, "_renew", lambda self, step: renew(self, step) if self._name is None else None)
    values = config(toy, steep_model, tmp_path, "grpo", url)
    values["training"]["max_steps"] = 4
    result = train(values, say=lambda line: None)
    rows = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["sampling/gap"] for row in rows if row["kind"] == "train"]
    assert gaps[0] < 1e-4
    assert min(gaps[1:]) > 1e-2


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path, serve: Any) -> SimpleNamespace:
    """A stand-in, a model with a trained adapter, and what makes an engine of both."""
    stand_in, url = serve(tiny_model)
    model, tokenizer = ft.load(str(tiny_model), dtype="float32")
    adapted: Any = ft.add_lora(model, r=4)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    said: list[str] = []

    def engine(**settings: Any) -> Vllm:
        return Vllm(EngineJob(adapted, tokenizer, {"url": url, **settings}, str(tmp_path), said.append))

    return SimpleNamespace(stand_in=stand_in, url=url, model=adapted, tokenizer=tokenizer, engine=engine, said=said)


PROMPTS = [[10, 11, 12], [13], [10, 11, 12]]
SAMPLING = Sampling(6, stops=frozenset({1}), seed=3)


def test_completions_depend_on_the_seed_the_step_and_the_place(made: Any) -> None:
    one, other = made.engine(), made.engine(url=f"{made.url}/v1/")
    first = one.generate(PROMPTS, 4, SAMPLING, step=5)
    assert [len(group) for group in first] == [4, 4, 4]
    assert first[0] != first[2]  # the same prompt twice
    assert len({tuple(c.ids) for c in first[0]}) > 1
    again = one.generate(PROMPTS, 4, SAMPLING, step=5)
    assert again != first
    assert len(made.stand_in.loaded) == 1  # one adapter a step
    one.close()
    # As a training that goes on would: other names, the same completions.
    assert other.generate(PROMPTS, 4, SAMPLING, step=5) == first
    assert other.generate(PROMPTS, 4, SAMPLING, step=5) == again
    assert other.generate(PROMPTS, 4, SAMPLING, step=6) != first
    other.close()
    assert len(made.stand_in.loaded) == 3
    assert made.said[0] == f"rollouts: vLLM at {made.url} writes, on its model toy"
    seeds = [body["seed"] for body in made.stand_in.asked]
    assert len(seeds) == 15
    assert len(set(seeds)) == 9


def test_the_likeliest_tokens_are_asked_for_once(made: Any) -> None:
    engine = made.engine()
    greedy = Sampling(6, 0.0, stops=SAMPLING.stops)
    made.stand_in._logprobs = lambda prompt, ids, temperature: torch.full((len(ids), 31), -1.0)
    ((*copies,), _, _) = engine.generate(PROMPTS, 3, greedy, step=0)
    own = OwnModel(EngineJob(made.model, made.tokenizer, {}, None, print)).generate(PROMPTS[:1], 1, greedy, step=0)
    assert [c.ids for c in copies] == [own[0][0].ids] * 3
    assert {body["n"] for body in made.stand_in.asked} == {1}


def test_what_an_earlier_start_left_goes(made: Any, tmp_path: Path) -> None:
    dead = made.engine()
    dead.generate(PROMPTS, 1, SAMPLING, step=0)
    (left,) = made.stand_in.there
    made.stand_in.there["theirs"] = tmp_path / "elsewhere"
    (tmp_path / ".rollouts/.ft-9.partial").mkdir()
    engine = made.engine()
    engine.generate(PROMPTS, 1, SAMPLING, step=0)
    assert left not in made.stand_in.there
    assert "theirs" in made.stand_in.there
    assert [folder.name for folder in (tmp_path / ".rollouts").iterdir()] == [list(made.stand_in.loaded)[1]]


def test_logprobs_before_the_temperature_are_refused(made: Any) -> None:
    made.stand_in.raw = True
    engine = made.engine()
    engine.generate(PROMPTS, 2, SAMPLING, step=0)  # at temperature 1 they are the same
    for sampling in (Sampling(6, 0.7), Sampling(6, top_p=0.9), Sampling(6, repetition_penalty=1.1)):
        with pytest.raises(RunError, match=r"before temperature, .*--logprobs-mode processed_logprobs"):
            engine.generate(PROMPTS, 2, sampling, step=0)
    made.stand_in.raw = False
    engine.generate(PROMPTS, 2, Sampling(6, 0.7, stops=SAMPLING.stops), step=0)


def error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "code": status}}


START = r"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve \S*tiny-llama --enable-lora --max-lora-rank 8 "
START += r"--logprobs-mode processed_logprobs --host 127.0.0.1 --port \d+$"
AT = r"^rollouts: (the vLLM server at )?http://127.0.0.1:\d+"
ANSWERS = [
    ("/v1/models", (200, "<html>"), AT + "/v1/models answers what is no JSON.*" + START),
    ("/v1/models", (200, {"models": []}), AT + " does not list models as vLLM does.*" + START),
    ("/v1/models", (200, {"data": []}), AT + r" serves not one base model \(it serves: none\).*" + START),
    ("/v1/models", (401, {"error": "Unauthorized"}), AT + r" answers 401 .*\(Unauthorized\); set rollouts.token_file"),
    ("/tokenize", (200, {"tokens": [1, 2]}), AT.replace("rollouts: ", "rollouts: 'toy', which ") + ".*another model"),
    ("/tokenize", (200, {}), AT + " does not answer /tokenize as vLLM does.*" + START),
    ("/v1/load_lora_adapter", (404, {"detail": "Not Found"}), AT + " loads no adapters while it runs; .*" + START),
    (
        "/v1/load_lora_adapter",
        error(500, "LoRA rank 4 is greater than max_lora_rank 2."),
        AT + r" does not take the adapter \(LoRA rank 4 is greater than max_lora_rank 2\.\).*" + START,
    ),
    (
        "/v1/load_lora_adapter",
        error(404, "Loading lora x failed: No adapter found for /y"),
        AT + r" does not find the adapter in \S+: it has to see the run's folder under the same path",
    ),
    ("/v1/completions", error(404, "No such model"), AT + r" answers 404 .*has it been started anew\? .*--resume"),
    ("/v1/completions", error(400, "bad\nprompt"), AT + r" answers 400 to /v1/completions \(bad prompt\)"),
    ("/v1/completions", (500, "Internal Server Error"), AT + r" answers 500 .*\(Internal Server Error\)"),
    ("/v1/completions", (200, {"choices": None}), AT + " answers without choices.*" + START),
]


@pytest.mark.parametrize(("path", "answer", "said"), ANSWERS)
def test_faults_of_the_server_are_one_line(made: Any, path: str, answer: Any, said: str) -> None:
    made.stand_in.fault = lambda at, body: answer if at == path else None
    engine = made.engine()
    with pytest.raises(RunError, match=said) as caught:
        engine.generate(PROMPTS, 2, SAMPLING, step=0)
    assert "\n" not in str(caught.value)
    made.stand_in.fault = lambda at, body: None
    engine.close()
    assert engine.generate(PROMPTS, 2, SAMPLING, step=0)  # it may be used again


def without(key: str) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda choices: [choice.pop(key) for choice in choices]


def change(**values: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda choices: choices[0].update(values)


SPOILT = [
    (lambda choices: choices.pop(), AT + " answers with 1 completions where 2 were asked for.*" + START),
    (without("token_ids"), AT + " answers without the tokens of a completion.*" + START),
    (change(token_ids=[]), AT + " answers without the tokens of a completion"),
    (without("logprobs"), AT + " answers without a log-probability for each token.*" + START),
    (change(logprobs=None), AT + " answers without a log-probability for each token"),
    (change(token_ids=[1], logprobs={"token_logprobs": [None]}), AT + " answers without a log-probability"),
    (change(token_ids=[1], logprobs={"token_logprobs": [3.5]}), AT + " answers without a log-probability"),  # a logit
    (
        change(token_ids=[99], logprobs={"token_logprobs": [-1.0]}),
        AT + " writes a token 99 .* knows 31: it serves anot",
    ),
    (change(token_ids=[8], logprobs={"token_logprobs": [-1.0]}), AT + " has ended a completion after 1 of 6 tokens"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILT)
def test_answers_that_cannot_be_trained_on_are_one_line(made: Any, spoil: Any, said: str) -> None:
    made.stand_in.spoil = spoil
    with pytest.raises(RunError, match=said):
        made.engine().generate(PROMPTS, 2, SAMPLING, step=0)


def test_a_server_that_is_not_there_or_does_not_answer(made: Any, tmp_path: Path) -> None:
    engine = made.engine(url="http://127.0.0.1:1")
    with pytest.raises(RunError, match=r"^rollouts: no vLLM server can be reached at http://127.0.0.1:1 \(.*--port 1$"):
        engine.generate(PROMPTS, 2, SAMPLING, step=0)
    slow = threading.Event()
    made.stand_in.fault = lambda path, body: (slow.wait(20), None)[1] if path == "/v1/completions" else None
    engine = made.engine(timeout=5)  # long enough for what a busy machine answers at once
    with pytest.raises(RunError, match=AT + r" has not answered /v1/completions within 5 s: raise rollouts.timeout"):
        engine.generate(PROMPTS[:1], 2, SAMPLING, step=0)
    slow.set()


def test_there_has_to_be_room(made: Any) -> None:
    with pytest.raises(RunError, match=f"has room for {CONTEXT} tokens, .* up to 53: start it with --max-model-len 53"):
        made.engine().generate(PROMPTS, 2, Sampling(50), step=0)


def test_each_prompt_has_a_room_of_its_own(made: Any) -> None:
    """The longest prompt with the largest room of another would need more than any of them."""
    engine, long = made.engine(), [10] * (CONTEXT - 4)
    found = engine.generate([long, [13]], 2, Sampling(20, limits=(4, 20)), step=0)
    assert {len(body["prompt"]): body["max_tokens"] for body in made.stand_in.asked} == {len(long): 4, 1: 20}
    assert [[len(one.ids) for one in group] for group in found] == [[4, 4], [20, 20]]
    with pytest.raises(RunError, match=f"up to {CONTEXT + 1}: start it"):
        engine.generate([long, [13]], 2, Sampling(20, limits=(5, 20)), step=0)


def test_the_model_can_be_named(made: Any) -> None:
    assert made.engine(model="toy").generate(PROMPTS, 1, SAMPLING, step=0)
    with pytest.raises(RunError, match=r"serves no model 'other' \(it serves: toy\): set rollouts.model"):
        made.engine(model="other").generate(PROMPTS, 1, SAMPLING, step=0)


def test_a_key_goes_along(made: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"token_file .*/none cannot be read: No such file"):
        made.engine(token_file=str(tmp_path / "none"))
    (tmp_path / "key").write_text("s3cret\n")
    assert made.engine(token_file=str(tmp_path / "key"))._server._headers["Authorization"] == "Bearer s3cret"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"urls": "x"}, r"unknown key 'rollouts.urls' \(allowed with engine vllm: url, model, timeout, token_file\)"),
        ({"url": "127.0.0.1:8000"}, r"rollouts.url: '127.0.0.1:8000' is not allowed .*begins with http://"),
        ({"url": "http://me:word@host"}, r"rollouts.url: .* an address without a password"),
        ({"timeout": 0}, r"rollouts.timeout: 0 is not allowed \(allowed: greater than 0"),
    ],
)
def test_wrong_settings_are_one_line(made: Any, settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        made.engine(**settings)
    assert "word" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "vllm cannot serve lora.dora"),
        ({"bias": "all"}, "vllm cannot serve lora.bias: all"),
        ({"modules_to_save": ["lm_head"]}, "vllm cannot serve lora.modules_to_save"),
        ({"trainable_token_indices": [1]}, "vllm cannot serve trained tokens"),
        ({"init_lora_weights": "pissa"}, "vllm cannot serve lora.init_lora_weights: pissa"),
        ({"quantized_from": "bfloat16"}, "vllm cannot serve lora.init_lora_weights: loftq"),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_refused(made: Any, changes: dict[str, Any], said: str) -> None:
    vars(made.model.peft_config["default"]).update(changes)
    with pytest.raises(ConfigError, match=said):
        made.engine()


def test_full_fine_tuning_and_several_processes_are_refused(
    made: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: Any
) -> None:
    values = config(toy, tiny_model, tmp_path, "grpo", made.url) | {"lora": None}
    with pytest.raises(ConfigError, match=r"rollouts: vllm hands the server an adapter, and lora: null trains the mod"):
        train(values, say=lambda line: None)
    monkeypatch.setattr("ft_rl.rollouts.vllm.Ranks", lambda: SimpleNamespace(count=2))
    with pytest.raises(ConfigError, match="vllm serves a training of one process"):
        made.engine()


def test_the_readme_says_what_to_start(tiny_model: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"## Completions by a vLLM server\n(.*?)\n## ", readme, re.DOTALL)
    (command,), (example,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("sh", "yaml"))
    given = yaml.safe_load(example)["grpo"]["rollouts"]
    assert given.pop("engine") == "vllm"
    settings = VllmSettings.model_validate(given)
    model, _ = ft.load(str(tiny_model), dtype="float32")
    expected = shlex.split(start_command(ft.add_lora(model, r=12), settings.url))
    found = shlex.split(command.replace("\\\n", " "))
    assert [*found[:3], *found[4:]] == [*expected[:3], *expected[4:]]
    named = re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`? \|", section, re.MULTILINE)
    assert {name: yaml.safe_load(default) for name, default in named} == VllmSettings().model_dump()
