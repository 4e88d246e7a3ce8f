"""The exporter ``ollama``: a GGUF file, a Modelfile, and the proof that Ollama's prompts are the chat template's."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export.bases import load_tokenizer
from ft_export.conversations import Serving, all_rows, conversation, serving, whole_number
from ft_export.errors import ExportError, one_line
from ft_export.exporting import PROOF, Exported, check_options, check_target, save_proof, whole_model
from ft_export.gguf.converter import check_convertible, check_type, require_gguf
from ft_export.gguf.engine import require_llama_cpp
from ft_export.gguf.export import export as export_gguf
from ft_export.gguf.export import new_folder_with_gguf, projector_beside
from ft_export.ollama.deriving import Candidate, Chat, candidates
from ft_export.ollama.equality import Proven, adds_bos, chat_of, prove, prove_any
from ft_export.ollama.modelfile import Command, write_modelfile
from ft_export.ollama.program import check_name, create, push, require_ollama, run_name
from ft_export.progress import Progress, silent
from ft_export.runs import Source, open_source, read_json
from ft_export.serving.listening import refuse_speech

__all__ = ["MODELFILE", "OPTIONS", "Filled", "export", "fill"]

OPTIONS = {
    "template": "a file with a Go template, proven in place of the one derived from the chat template",
    "system": "a system prompt in place of the data's; empty for none",
    "num_ctx": "tokens of context",
    "create": "a name: runs `ollama create` with it",
    "push": "a name: runs `ollama push` after that",
    "pre": "as for gguf",
}
"""The ``key=value`` options, and what each is."""
MODELFILE = "Modelfile"
SAMPLING = {"repetition_penalty": "repeat_penalty"}
"""Ollama's names of samplings where they are not transformers'."""


@dataclass(frozen=True)
class Filled:
    """What :func:`fill` put into a folder.

    Attributes:
        gguf: the name of the GGUF file.
        settings: what the servers of the model are told.
        lines: what was checked and found, for people.
        sees: whether the model takes images.
    """

    gguf: str
    settings: Serving
    lines: tuple[str, ...]
    sees: bool = False


@one_line
def export(
    path: Path | str,
    out: Path | str | None = None,
    *,
    type: str = "f16",
    overwrite: bool = False,
    options: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write ``OUT/<name>-<type>.gguf``, ``OUT/Modelfile`` and ``OUT/proof.json``.

    The GGUF file is made and checked as by :func:`ft_export.export_gguf`. The Modelfile's template is derived from the
    model's chat template and compared with it byte for byte.

    Args:
        path: a run folder, a PEFT adapter folder or a transformers model folder.
        out: the folder to write to; ``path/export/ollama`` by default. Only an earlier export of this kind is replaced.
        type: of the GGUF file.
        overwrite: whether an earlier export may be replaced.
        options: ``template``: a file with a Go template, to be compared in place of a derived one. ``system``: a system
            prompt in place of the one that all held-out rows have; empty for none. ``num_ctx``: tokens of context.
            ``create``, ``push``: a name under which the ``ollama`` program is to make the model, and to push it.
            ``pre``: as for ``gguf``.
        progress: of a merge; see :func:`ft_export.merge`.

    Raises:
        ExportError: bad input, a missing library, no space, or a check that failed; nothing is left then. Where it is
            ``ollama`` that fails, the folder stays.
    """
    source = open_source(Path(path))
    folder = Path(out).expanduser() if out is not None else source.path / "export" / "ollama"
    said = check_options(options, OPTIONS, "ollama")
    names = {key: check_name(key, said[key]) for key in ("create", "push") if key in said}
    if names:
        require_ollama()
    check_target(folder, source, MODELFILE, overwrite)
    with new_folder_with_gguf(folder, source, type) as partial:
        filled = fill(partial, source, type, said, progress)
    lines = list(filled.lines)
    for name in dict.fromkeys(names.values()):
        create(name, folder)
        lines.append(f"ollama made {name}")
    if "push" in names:
        push(names["push"], folder)
        lines.append(f"ollama pushed {names['push']}")
    name = next(iter(names.values()), run_name(source.name))
    serve = f"ollama run {name}"
    if not names:
        serve = f"ollama create {name} -f {shlex.quote(str(folder / MODELFILE))} && {serve}"
    return Exported(folder, folder / PROOF, tuple(lines), serve)


def fill(folder: Path, source: Source, type: str, options: Mapping[str, str], progress: Progress = silent) -> Filled:
    """Write the GGUF file, the Modelfile and ``proof.json`` into an empty folder.

    Args:
        options: those of ``OPTIONS`` but ``create`` and ``push``.

    Raises:
        ExportError: as :func:`export`. What is in the folder then is unfinished.
    """
    check_type(type)
    require_gguf()
    require_llama_cpp()
    own, context = _own_template(options), whole_number(dict(options), "num_ctx")
    held_out = [messages for messages in map(conversation, all_rows(source)) if messages is not None]
    lines: list[str] = []

    def check(base: Path, words: Path) -> None:
        refuse_speech(base, "ollama", source.task)
        check_convertible(base, words, options.get("pre"), source.rope)
        _prove(chat_of(load_tokenizer(words)), own, held_out)

    model = whole_model(source, lines, progress, check)
    refuse_speech(model, "ollama", source.task)
    tokenizer = load_tokenizer(model)
    proven = _prove(chat_of(tokenizer), own, held_out)
    settings = serving(source, model, tokenizer, context)
    system = _system(options, settings, proven, lines)
    stops = _stops(settings, proven)
    pre = {"pre": options["pre"]} if "pre" in options else {}
    if system is not None:
        write_modelfile([("model", "./x.gguf"), ("system", system)])  # refused before the conversion, which takes time
    made = export_gguf(source.path, folder, type=type, options=pre, progress=progress)
    _require_bos(made.file, tokenizer)
    beside = projector_beside(made.file)
    commands = _commands(made.file.name, proven, settings, system, stops)
    if beside is not None:
        commands.insert(1, ("model", f"./{beside.name}"))
    text = write_modelfile(commands)
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    told = [*lines, *(line for line in made.lines if not line.startswith("used the merge")), *_told(proven, tokenizer)]
    if beside is not None:
        told.append(
            "Ollama puts a message's images before its text, wherever they stood; what it makes of their pixels was "
            "not run"
        )
    told.append(
        f"the Modelfile has num_ctx {settings.context} ({settings.context_from}), stops {', '.join(stops)}, "
        + ("a system prompt" if system is not None else "no system prompt")
    )
    _write_proof(folder, proven, settings, commands, text, told)
    return Filled(made.file.name, settings, tuple(told), beside is not None)


def _own_template(options: Mapping[str, str]) -> str | None:
    if "template" not in options:
        return None
    path = Path(options["template"]).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ExportError(f"template={path} cannot be read: {reason}") from error


def _prove(chat: Chat, own: str | None, held_out: Sequence[Sequence[dict[str, str]]]) -> Proven:
    if own is None:
        return prove_any(chat, held_out)
    between = next((candidate.answer_to_user for candidate in candidates(chat)), "")
    return prove(Candidate("given", own, between, True), chat, held_out)


def _system(options: Mapping[str, str], settings: Serving, proven: Proven, lines: list[str]) -> str | None:
    """The system prompt for the Modelfile.

    Raises:
        ExportError: one is asked for, and the chat template takes none.
    """
    asked = options.get("system")
    system = settings.system if asked is None else asked or None
    if system is not None and not proven.takes_system:
        if asked is not None:
            raise ExportError("the chat template takes no system message: leave system= out")
        lines.append("the held-out rows' system prompt is left out: the chat template takes no system message")
        return None
    return system


def _stops(settings: Serving, proven: Proven) -> tuple[str, ...]:
    """The stop tokens' texts; and what leads to the user's turn, where no such token stands there."""
    stops = tuple(settings.stops)
    between = proven.answer_to_user.strip()
    if len(between) > 1 and not any(stop in between for stop in stops):
        stops += (between,)
    return stops


def _commands(gguf: str, proven: Proven, settings: Serving, system: str | None, stops: Sequence[str]) -> list[Command]:
    commands: list[Command] = [("model", f"./{gguf}"), ("template", proven.text)]
    commands += [("system", system)] if system is not None else []
    commands.append(("num_ctx", str(settings.context)))
    commands += [(SAMPLING.get(name, name), str(value)) for name, value in settings.sampling.items()]
    return commands + [("stop", stop) for stop in stops]


def _require_bos(file: Path, tokenizer: Any) -> None:
    """
    Raises:
        ExportError: the file says otherwise than the tokenizer whether a text gets a beginning-of-sequence token, by
            which the template was made.
    """
    import gguf

    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.add_bos_token")
    if field is None or bool(field.contents()) != adds_bos(tokenizer):
        raise ExportError(
            f"{file.name} says otherwise than the tokenizer whether a text begins with a token of its own"
        )


def _told(proven: Proven, tokenizer: Any) -> list[str]:
    lines = [
        f"Ollama's template says what the chat template says, byte for byte, in {len(proven.conversations)} kinds of "
        f"conversation ({proven.form})"
    ]
    if not proven.takes_system:
        lines.append("the chat template takes no system message: Ollama leaves it out")
    lines += [f"not the same in Ollama: {name}" for name in proven.differing]
    if adds_bos(tokenizer) and not _begins(tokenizer):
        lines.append(
            f"Ollama puts {tokenizer.bos_token} before each prompt, as the tokenizer does, the chat template not"
        )
    if "strftime_now" in str(tokenizer.chat_template):
        lines.append("the chat template may write the current date: Ollama's has the date of this export")
    return lines


def _begins(tokenizer: Any) -> bool:
    """Whether the chat template itself writes the beginning-of-sequence token."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    return str(text).startswith(str(tokenizer.bos_token))


def _write_proof(
    folder: Path, proven: Proven, settings: Serving, commands: Sequence[Command], text: str, lines: Sequence[str]
) -> None:
    """Add ``ollama`` to the GGUF exporter's ``proof.json``."""
    proof = read_json(folder / PROOF)
    proof["ollama"] = {
        "modelfile_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "template": {**proven.as_dict(), "rendered_by": "ft-export's reader of Go templates"},
        "stop_tokens": settings.stops,
        "parameters": [[name, value] for name, value in commands if name not in ("model", "template", "system")],
        "num_ctx_from": settings.context_from,
        "checks": list(lines),
        "run_in_ollama": False,
    }
    save_proof(folder, proof)
