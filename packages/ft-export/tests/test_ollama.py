"""Exports for Ollama: the template is the chat template, the Modelfile survives being read, what differs is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

from ft_export import ExportError
from ft_export.bases import load_tokenizer
from ft_export.ollama.deriving import Candidate
from ft_export.ollama.equality import prove, prove_any
from ft_export.ollama.export import export
from ft_export.ollama.go_template import GoTemplateError, parse, quoted
from ft_export.ollama.modelfile import read_modelfile, write_modelfile
from ft_export.ollama.program import run_name
from ft_export.ollama.rendering import render

from .chat_formats import FORMATS, chat_of

ALL_TRIMMED = ("blanks at the ends of messages",)
DIFFERING = {
    "llama 3": ALL_TRIMMED,
    "llama 2": ALL_TRIMMED,
    "gemma 2, which takes no system message": ALL_TRIMMED,
    "gemma 3, system inside the first question": ALL_TRIMMED,
    "chatml with no thoughts": (),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_has_a_template(name: str) -> None:
    chat = chat_of(FORMATS[name])
    proven = prove_any(chat, [])
    assert set(DIFFERING.get(name, ())) <= set(proven.differing)
    assert {"one question", "two questions", "four questions", "signs of many scripts"} - set(proven.conversations) <= {
        "signs of many scripts"  # has a system message
    }
    assert proven.takes_system == (name != "gemma 2, which takes no system message")
    assert (proven.form == "system before the last user") == name.startswith("mistral")
    messages = [{"role": "user", "content": "A question that no check has"}]
    assert render(parse(proven.text), messages) == chat(messages, True)


def test_an_answer_that_comes_last_is_gone_on_with() -> None:
    proven = prove_any(chat_of(FORMATS["chatml"]), [])
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b and"}]
    assert render(parse(proven.text), messages) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb and"


@pytest.mark.parametrize(
    "wrong",
    ["<|im_end|> \\n", "\\n", "<|im_end|>"],
    ids=["one blank more", "no end of a turn", "no line's end"],
)
def test_a_wrong_template_is_seen(wrong: str) -> None:
    chat = chat_of(FORMATS["chatml"])
    right = prove_any(chat, []).text
    planted = right.replace(
        '{{ if ne $before "" }}{{ "<|im_end|>\\n" }}', f'{{{{ if ne $before "" }}}}{{{{ "{wrong}" }}}}'
    )
    assert planted != right
    with pytest.raises(ExportError, match=r"chat template in 'a system message and a question': from character [23]"):
        prove(Candidate("given", planted, "", True), chat, [])


def test_a_wrong_template_is_seen_on_held_out_rows_alone() -> None:
    """A chat template that treats one word otherwise, which no conversation of the check says."""
    odd = FORMATS["chatml"].replace("{{ m['content'] }}", "{{ m['content'] | replace('colour', 'color') }}")
    held_out = [[{"role": "user", "content": text}] for text in ("Which one?", "Which colour?")]
    assert "2 held-out conversations" in prove_any(chat_of(FORMATS["chatml"]), held_out).conversations
    with pytest.raises(ExportError, match=r"no template of Ollama's .* 'held-out conversation 2': .* template=FILE"):
        prove_any(chat_of(odd), held_out)


def test_held_out_rows_that_ollama_changes_are_told() -> None:
    held_out = [
        [{"role": "user", "content": " Hi "}],
        [{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}],
        [{"role": "user", "content": "Hi"}],
    ]
    proven = prove_any(chat_of(FORMATS["llama 3"]), held_out)
    assert "1 held-out conversations" in proven.conversations
    assert proven.differing[-2:] == (
        "1 held-out conversations, in blanks at the ends of messages",
        "1 held-out conversations with neighbours of one role",
    )


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "it writes a message not once"),
        ("{% for m in messages | reverse %}{{ m.content }}|{% endfor %}", "it writes a message not once"),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "from character"),
        ("{{ raise_exception('no') }}", "it writes a message not once"),
    ],
)
def test_a_chat_template_that_no_template_is_equal_to_is_refused(template: str, why: str) -> None:
    with pytest.raises(ExportError, match=rf"no template of Ollama's.*{why}.*template=FILE"):
        prove_any(chat_of(template), [])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{ .Prompt | upper }}", r"'\| upper"),
        ("{{ upper .Prompt }}", "function 'upper'"),
        ("{{ with .Prompt }}{{ end }}", "'with'"),
        ("{{ if .Prompt }}", "if has no end"),
        ("{{ end }}", "outside"),
        ("{{ .Prompt ", "no end"),
        ("{{ $x }}", r"variable \$x is not declared"),
        ("{{ range $x := .Messages }}{{ end }}{{ $x }}", r"variable \$x is not declared"),
        ("{{ if .Prompt }}{{ else }}{{ else }}{{ end }}", "two else"),
        ("{{ }}", "empty"),
        ('{{ "\\q" }}', "escape"),
        ("{{ (.Prompt).X }}", "blank"),
        ("{{ len .Prompt .Prompt }}", "len takes"),
        ("{{ range .Messages }}{{ .Colour }}{{ end }}", "no field .Colour"),
        ("{{ .Messages }}", "no text and no number"),
    ],
)
def test_what_is_not_read_of_go_is_refused(text: str, why: str) -> None:
    with pytest.raises(GoTemplateError, match=why):
        render(parse(text), [{"role": "user", "content": "Hi"}])


def test_turns_with_system_prompt_and_response() -> None:
    template = parse("{{ if .System }}[{{ .System }}]{{ end }}<{{ .Prompt }}>{{ .Response }};")
    messages = [
        {"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    assert render(template, messages) == "[s]<a>b;<c>"
    assert render(parse("{{ .Prompt }}:"), messages) == "a:bc:"


@pytest.mark.parametrize("text", ['"quotes"', "two\nlines\t", "{{ x }}", "\\n `r`", "a\u00a0b\u200d", "𝄞\x00\x7f"])
def test_quoted_text_is_read_back(text: str) -> None:
    assert parse("{{ " + quoted(text) + " }}").execute({}) == text
    assert quoted(text).isprintable()


SURVIVES = ["plain", " blanks at the ends ", 'say "yes"', '"quoted"', "two\n\nlines\n", '""', '"""', "# no comment"]
SURVIVES += [
    'ends with "',
    "\ttab",
    "Größe 東京 🙂",
    "{{ .System }}",
    "a\r\nb",
    "'",
    'FROM x\nPARAMETER stop "x"\nSYSTEM y',
]


@pytest.mark.parametrize("system", SURVIVES)
def test_texts_survive_a_modelfile(system: str) -> None:
    commands = [("model", "./x.gguf"), ("template", "{{ .Prompt }}\n"), ("system", system), ("num_ctx", "4096"),
                ("temperature", "0.7"), ("stop", "<|im_end|>"), ("stop", "\nUser:"), ("stop", 'a "b"')]  # fmt: skip
    assert read_modelfile(write_modelfile(commands)) == commands


@pytest.mark.parametrize(
    ("system", "why"),
    [
        ('three """ quotes"""\n', 'holds """'),
        ("no\u00a0break", r"U\+00A0, which Ollama drops"),
        ("👩\u200d💻", r"U\+200D, which Ollama drops"),
        ("bell\a", r"U\+0007"),
    ],
)
def test_texts_that_would_not_survive_are_refused(system: str, why: str) -> None:
    with pytest.raises(ExportError, match=why):
        write_modelfile([("model", "./x.gguf"), ("system", system)])


@pytest.mark.parametrize("text", ["", "SYSTEM x\n", "FROM x\nCOLOUR red\n", 'FROM x\nSYSTEM """a\n', "FROM"])
def test_what_is_no_modelfile(text: str) -> None:
    with pytest.raises(ExportError, match="Modelfile"):
        read_modelfile(text)


def test_names() -> None:
    assert run_name("My run (2)") == "my-run-2"
    assert run_name("東京") == "model"


@pytest.fixture
def run(base: Path, make_run: Any, make_adapter: Any) -> Path:
    """A run with an adapter, trained with one system prompt."""
    folder: Path = make_run()
    make_adapter(folder / "adapter", base)
    (folder / "config.yaml").write_text("model: x\nmethod: sft\nmax_length: 256\n")
    rows = [
        {"messages": [{"role": "system", "content": 'You say "no".\nAlways.'},
                      {"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": str(n)}]}
        for n in range(4)
    ]  # fmt: skip
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_is_exported(run: Path, contents: Any) -> None:
    made = export(run, type="q8_0")
    folder = run / "export" / "ollama"
    assert made.file == folder
    assert contents(folder) == ["Modelfile", "my-run-q8_0.gguf", "proof.json"]
    commands = dict(read_modelfile((folder / "Modelfile").read_text()))
    assert commands["model"] == "./my-run-q8_0.gguf"
    assert commands["system"] == 'You say "no".\nAlways.'
    assert (commands["num_ctx"], commands["stop"]) == ("512", "<|im_end|>")
    chat = load_tokenizer(run / "merged").apply_chat_template
    messages = [{"role": "system", "content": commands["system"]}, {"role": "user", "content": "What is 9?"}]
    expected = chat(messages, tokenize=False, add_generation_prompt=True)
    assert render(parse(commands["template"]), messages) == expected
    proof = json.loads(made.proof.read_text())
    assert "4 held-out conversations" in proof["ollama"]["template"]["equal"]
    assert proof["ollama"]["run_in_ollama"] is False
    assert proof["files"]["my-run-q8_0.gguf"]["continuations"]["tokens"] > 0
    assert made.next_command == f"ollama create my-run -f '{folder}/Modelfile' && ollama run my-run"

    with pytest.raises(ExportError, match="already there: pass --overwrite"):
        export(run)
    before = (folder / "Modelfile").read_bytes()
    with pytest.raises(ExportError, match=r"U\+00A0.*system=TEXT"):
        export(run, overwrite=True, options={"system": "a\u00a0b"})
    assert (folder / "Modelfile").read_bytes() == before
    export(run, overwrite=True, options={"system": "", "num_ctx": "128"})
    commands = dict(read_modelfile((folder / "Modelfile").read_text()))
    assert "system" not in commands
    assert commands["num_ctx"] == "128"
    assert contents(folder) == ["Modelfile", "my-run-f16.gguf", "proof.json"]


def test_sampling_of_the_model_is_taken(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    said = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": 2}
    (model / "generation_config.json").write_text(json.dumps(said))
    export(model, tmp_path / "out")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "PARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.05\nPARAMETER stop" in text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_ctx": "513"}, "more than the model has positions"),
        ({"num_ctx": "-1"}, "no whole number"),
        ({"create": "--help"}, "no name of Ollama's"),
        ({"push": "a b"}, "no name of Ollama's"),
        ({"template": "no-such-file"}, "cannot be read"),
        ({"colour": "red"}, "allowed: template, system, num_ctx"),
    ],
)
def test_bad_options_leave_nothing(
    options: dict[str, str], why: str, base: Path, tmp_path: Path, contents: Any
) -> None:
    with pytest.raises(ExportError, match=why):
        export(base, tmp_path / "out", options=options)
    assert contents(tmp_path) == []


def test_a_template_of_the_users_own(base: Path, tmp_path: Path, contents: Any) -> None:
    own = tmp_path / "own.gotmpl"
    own.write_text(
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    )
    made = export(base, tmp_path / "out", options={"template": str(own)})
    assert dict(read_modelfile((made.file / "Modelfile").read_text()))["template"] == own.read_text()
    assert "not the same in Ollama: an answer to go on with" in made.lines
    own.write_text(own.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    with pytest.raises(ExportError, match="says otherwise than the chat template in 'one question'"):
        export(base, tmp_path / "other", options={"template": str(own)})
    own.write_text("{{ .Prompt | js }}")
    with pytest.raises(ExportError, match="cannot be checked"):
        export(base, tmp_path / "other", options={"template": str(own)})
    assert contents(tmp_path) == ["out", "own.gotmpl"]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the ``ollama`` program, which writes down what it is asked; no Ollama can be had in tests."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "ollama"
    program.write_text(
        '#!/bin/sh\necho "$PWD|$*" >> "$(dirname "$0")/asked"\n'
        'if [ "$1" = push ]; then echo "pulling" >&2; echo "Error: not signed in" >&2; exit 1; fi\n'
        'test -f Modelfile && test -f "$(sed -n "s/^FROM //p" Modelfile)"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "asked"


def test_ollama_is_asked(base: Path, tmp_path: Path, recorder: Path, contents: Any) -> None:
    made = export(base, tmp_path / "out", options={"create": "me/dates:f16"})
    assert made.next_command == "ollama run me/dates:f16"
    with pytest.raises(ExportError, match=r"push me/dates failed with 1: Error: not signed in; .*/pushed is whole"):
        export(base, tmp_path / "pushed", options={"push": "me/dates"})
    assert contents(tmp_path / "pushed") == ["Modelfile", "llama-f16.gguf", "proof.json"]
    assert recorder.read_text().splitlines() == [
        f"{tmp_path}/out|create me/dates:f16 -f Modelfile",
        f"{tmp_path}/pushed|create me/dates -f Modelfile",
        f"{tmp_path}/pushed|push me/dates",
    ]


def test_without_ollama_nothing_is_begun(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="no ollama on PATH"):
        export(base, tmp_path / "out", options={"create": "dates"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("written", [True, False])
def test_the_beginning_is_not_written_twice(written: bool, make_model: Any, tmp_path: Path) -> None:
    """A tokenizer that puts a token before each text, under a chat template that writes it, and one that does not."""
    from tokenizers import processors

    model = make_model(tmp_path / "model")
    tokenizer = load_tokenizer(model)
    bos = "<|endoftext|>"
    special = [(bos, tokenizer.convert_tokens_to_ids(bos))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=special
    )
    tokenizer.bos_token = bos
    tokenizer.chat_template = ("{{ bos_token }}" if written else "") + FORMATS["chatml"]
    tokenizer.save_pretrained(model)
    made = export(model, tmp_path / "out")
    text = dict(read_modelfile((made.file / "Modelfile").read_text()))["template"]
    assert bos not in text
    question = [{"role": "user", "content": "Hi"}]
    # what Ollama tokenizes, with the token before it, is what transformers tokenizes
    expected = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    found = tokenizer(render(parse(text), question))["input_ids"]
    assert found == (expected if written else [special[0][1], *expected])
    assert any(line.startswith(f"Ollama puts {bos} before each prompt") for line in made.lines) is not written


def test_where_no_token_ends_a_turn_the_next_turn_is_a_stop(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = FORMATS["alpaca"]
    tokenizer.save_pretrained(model)
    text = (export(model, tmp_path / "out").file / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "### Instruction:"' in text


def test_a_date_in_the_chat_template_is_told(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = "{{ strftime_now('%Y') }}|" + FORMATS["chatml"]
    tokenizer.save_pretrained(model)
    assert any("has the date of this export" in line for line in export(model, tmp_path / "out").lines)


def test_a_model_without_a_chat_template_is_refused(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    for path in model.glob("chat_template*"):
        path.unlink()
    with pytest.raises(ExportError, match="no chat template"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_proof_of_the_gguf_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any
) -> None:
    from ft_export.gguf import architectures

    monkeypatch.setattr(architectures, "_interleave", lambda weight, heads: weight)
    with pytest.raises(ExportError, match=r"llama\.cpp is not the model"):
        export(base, tmp_path / "out")
    assert contents(tmp_path) == []
