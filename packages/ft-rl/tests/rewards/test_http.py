"""The reward `http` against a real server on this machine."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ft_core.errors import ConfigError, DataError, RunError
from ft_rl.rewards import resolve_rewards


class Judge:
    """A server that says what it is told to, in turn, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[tuple[int, bytes] | float] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            disable_nagle_algorithm = True  # or the body waits 40 ms for the headers to be acknowledged

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.asked.append(body)
                judge.headers.append(dict(self.headers))
                answer = judge.answers.pop(0) if judge.answers else None
                if isinstance(answer, float):  # seconds
                    time.sleep(answer)
                    answer = None
                rewards = [float(len(text)) for text in body["completions"]]
                status, text = answer or (200, json.dumps({"rewards": rewards}).encode())
                self.send_response(status)
                if status in (301, 302, 307):
                    self.send_header("Location", judge.url + "/elsewhere")
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def judge() -> Iterator[Judge]:
    found = Judge()
    thread = threading.Thread(target=found.server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


def reward_of(judge: Judge | str, **settings: Any) -> Any:
    url = judge if isinstance(judge, str) else judge.url
    (reward,) = resolve_rewards(
        [{"name": "http", "url": url, "wait": 0.01, **settings}], say=lambda line: None
    ).functions
    return reward


def ask(reward: Any, **columns: Any) -> list[float | None]:
    return reward(prompts=["p", "q"], completions=["a", "bb"], **columns)


def test_what_is_sent_and_what_comes_back(judge: Judge) -> None:
    reward = reward_of(judge)
    assert ask(reward, answer=["x", "y"], completion_ids=[[1], [2]], trainer_state=object(), log_metric=print) == [1, 2]
    assert judge.asked == [{"prompts": ["p", "q"], "completions": ["a", "bb"], "columns": {"answer": ["x", "y"]}}]
    assert "Authorization" not in judge.headers[0]
    judge.answers = [(200, b"[0.5, null]")]
    assert ask(reward) == [0.5, None]


def test_messages_and_chosen_columns(judge: Judge) -> None:
    reward = reward_of(judge, columns=["answer"])
    turns = [[{"role": "assistant", "content": "hi"}]]
    assert reward(prompts=["p"], completions=turns, answer=["x"], secret=["y"]) == [1.0]
    assert judge.asked[0]["completions"] == turns
    assert judge.asked[0]["columns"] == {"answer": ["x"]}
    assert reward.columns == ("answer",)
    with pytest.raises(DataError, match="reward 'http': the data has no column 'answer'"):
        ask(reward, other=[1, 2])


def test_in_parts(judge: Judge) -> None:
    assert ask(reward_of(judge, batch=1), answer=["x", "y"]) == [1.0, 2.0]
    assert [asked["columns"]["answer"] for asked in judge.asked] == [["x"], ["y"]]


def test_a_token_goes_along_and_stays_out_of_the_configuration(judge: Judge, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("word\n")
    ask(reward_of(judge, token_file=str(file)))
    assert judge.headers[0]["Authorization"] == "Bearer word"
    with pytest.raises(ConfigError, match=r"token_file .* cannot be read: No such file"):
        reward_of(judge, token_file=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="an address without a password"):
        reward_of("http://me:word@127.0.0.1/")


def test_a_server_that_is_busy_is_asked_again(judge: Judge) -> None:
    judge.answers = [(503, b"later"), (429, b"")]
    assert ask(reward_of(judge)) == [1.0, 2.0]
    assert len(judge.asked) == 3


@pytest.mark.parametrize(
    ("answer", "said", "requests"),
    [
        ((500, b"it\nbroke"), r"answers 500 Internal Server Error: it broke, tried 3 times", 3),
        ((400, b"no"), r"answers 400 Bad Request: no", 1),
        ((307, b""), r"answers 307 Temporary Redirect", 1),
        ((200, b"<html>"), r"answers what is no JSON: '<html>'", 1),
        ((200, b'{"scores": []}'), r"answers '\{\"scores\": \[\]\}', without a list of rewards", 1),
        ((200, b"[1]"), r"answers with 1 rewards for 2 completions", 1),
        ((200, b"[1, NaN]"), r"answers with the reward nan, which is no number", 1),
        ((200, b'[1, "2"]'), r"answers with the reward '2', which is no number", 1),
        ((200, b"[1, true]"), r"answers with the reward True, which is no number", 1),
    ],
)
def test_one_clear_error(judge: Judge, answer: tuple[int, bytes], said: str, requests: int) -> None:
    judge.answers = [answer] * 5
    with pytest.raises(
        RunError, match=rf"^reward 'http': sample 1 of 2 \(prompt 'p'\): {judge.url} {said} \(and 1 more\); "
    ):
        ask(reward_of(judge, retries=2))
    assert len(judge.asked) == requests


def test_a_server_that_is_slow_and_one_that_is_not_there(judge: Judge) -> None:
    judge.answers = [1.0]
    with pytest.raises(RunError, match=r"cannot be reached \(timed out\)"):
        ask(reward_of(judge, timeout=0.2, retries=0))
    judge.answers = [4.0]
    assert ask(reward_of(judge, timeout=2.0)) == [1.0, 2.0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RunError, match=r"cannot be reached \(.*refused\), tried 2 times"):
        ask(reward_of(f"http://127.0.0.1:{port}", retries=1))


def test_a_part_that_fails_takes_no_other_with_it(judge: Judge) -> None:
    judge.answers = [(400, b"no")]
    reward = reward_of(judge, batch=1, on_error="skip")
    assert ask(reward) == [None, 2.0]
    assert reward.faults == 1


def test_no_proxy_is_asked(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(reward_of(judge)) == [1.0, 2.0]


def test_what_is_no_json_is_said(judge: Judge) -> None:
    with pytest.raises(DataError, match=r"reward 'http': a column cannot be sent as JSON \(Object of type bytes"):
        ask(reward_of(judge), image=[b"1", b"2"])
