"""A conversation on a terminal: a real one, which a process of its own is given."""

from __future__ import annotations

import io
import os
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")


@pytest.fixture
def typed(ft: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls `ft chat` with these lines typed, no terminal being there."""

    def call(lines: list[str], *words: object) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return ft("chat", *words)

    return call


def test_the_history_is_kept(typed: Any, tiny: Path) -> None:
    """The second answer is the model's to the whole conversation, as its template writes it."""
    from ft_core.generation import generate
    from ft_core.models import load

    model, tokenizer = load(tiny)

    def answer(*turns: str) -> str:
        roles = ["system", "user", "assistant", "user"]
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        return generate(model, tokenizer, [messages], max_new_tokens=24)[0]

    opening = "add 1 and 2"
    first = answer("be brief", opening)
    # A random model hardly looks back, so a question is sought whose answer does depend on what came before it.
    questions = [f"and {number}" for number in range(40)]
    question = next(q for q in questions if answer("be brief", opening, first, q) != answer("be brief", q))
    words = (tiny, "--system", "be brief", "--max-new-tokens", 24)
    done = typed([opening, "", question], *words)
    assert (done.code, done.out) == (0, f"{first}\n{answer('be brief', opening, first, question)}\n\n")
    done = typed([opening, "/new", question], *words)
    assert done.out == f"{first}\n{answer('be brief', question)}\n\n"


@pytest.fixture
def bare(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model without a chat template."""
    folder = Path(shutil.copytree(tiny, tmp_path / "bare"))
    (folder / "chat_template.jinja").unlink()
    return folder


def test_without_a_chat_template_each_line_is_a_new_text(typed: Any, bare: Path) -> None:
    from ft_core.generation import generate
    from ft_core.models import load

    model, tokenizer = load(bare)
    done = typed(["add 1", "and 2"], bare, "--max-new-tokens", 9)
    answers = generate(model, tokenizer, ["add 1", "and 2"], max_new_tokens=9)
    assert (done.code, done.out) == (0, "".join(f"{answer}\n" for answer in answers) + "\n")
    said = "this model has no chat template: each line is a new text that it goes on from, nothing is remembered\n"
    assert done.err.count(said) == 1
    refused = typed(["add 1"], bare, "--system", "be brief")
    assert (refused.code, refused.out) == (2, "")
    assert refused.message == (
        "ft chat: the model's tokenizer has no chat template, so it knows no system message: leave --system"
    )


def test_a_byte_that_is_no_utf8_is_a_character_not_understood(
    ft: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = []
    for typed in (b"caf\xe9\n", "caf\N{REPLACEMENT CHARACTER}\n".encode()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        done = ft("chat", tiny, "--max-new-tokens", 8)
        assert done.code == 0, done.err
        outs.append(done.out)
    assert outs[0] == outs[1] != ""


def test_a_conversation_that_fills_the_positions(typed: Any, tiny: Path) -> None:
    done = typed(["a", "b" * 600], tiny, "--max-new-tokens", 4)
    assert done.code == 2
    assert re.fullmatch(
        r"ft chat: the conversation has \d+ tokens and leaves none of the model's 512 positions: shorten it",
        done.message,
    )


def test_a_model_that_is_not_there(typed: Any, tmp_path: Path) -> None:
    done = typed([], tmp_path / "nowhere")
    assert (done.code, done.out) == (2, "")
    assert done.message.startswith(f"ft chat: no run or model folder {tmp_path}/nowhere: {tmp_path} holds no run")


class Terminal:
    """`ft` in a process whose terminal is ours to read and to type on."""

    def __init__(self, *words: object) -> None:
        import pty

        self.pid, self._end = pty.fork()
        if not self.pid:
            os.execv(sys.executable, [sys.executable, "-m", "ft_core", *map(str, words)])
        self.seen = ""

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What is shown from here to the first match of the pattern, which must come."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen!r}"
            if select.select([self._end], [], [], left)[0]:
                try:
                    self.seen += os.read(self._end, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert re.search(pattern, self.seen), f"no {pattern!r} in {self.seen!r}"
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def chat(tiny: Path) -> Iterator[Terminal]:
    terminal = Terminal("chat", tiny, "--max-new-tokens", 450)
    yield terminal
    try:
        os.kill(terminal.pid, signal.SIGKILL)
        os.waitpid(terminal.pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_a_conversation_on_a_terminal(chat: Terminal) -> None:
    """It streams; Ctrl-C stops an answer and no more; Ctrl-D ends."""
    chat.until(r"Ctrl-D \(or Ctrl-C at the prompt\) ends.*\n> ")
    chat.type("add 1 and 2\r")
    chat.until(r"add 1 and 2\r\n")
    chat.until(r"\S{3}")  # the answer has begun
    chat.type("\x03")
    stopped = chat.until(r"\(stopped\)\r\n\r\n> ")
    assert "Traceback" not in stopped
    assert len(stopped) < 3000
    chat.type("go on\r")
    chat.until(r"go on\r\n")
    chat.until(r"\S{3}")
    chat.type("\x03")
    chat.until(r"\(stopped\)\r\n\r\n> ")
    chat.type("\x04")
    assert chat.wait() == 0
