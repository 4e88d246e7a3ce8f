"""The exporter ``hub``: lay out exactly what is to be pushed, show it, send it, and look at what arrived."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ft_export.bases import local_base, read_config
from ft_export.errors import ExportError, one_line
from ft_export.exporting import PROOF, Exported, check_target, whole_model
from ft_export.folders import new_folder
from ft_export.gguf.export import export as export_gguf
from ft_export.gguf.export import new_folder_with_gguf, projector_beside
from ft_export.hearing import CSM, FAMILIES
from ft_export.hub.card import Subject, write_card
from ft_export.hub.licence import Licence, find_licence, licence_files, read_front_matter
from ft_export.hub.proof import FORMAT, Proof, of_combination, of_gguf, of_weights, write_proof, write_pushed
from ft_export.hub.record import Record, is_local, read_record
from ft_export.hub.repository import Repository, base_card, data_sets, token_of
from ft_export.hub.staging import File, check_clean, listed, place, place_model
from ft_export.hub.usage import LISTENS, SEES, SPEAKS
from ft_export.hub.wanted import MAIN, Wanted, check_type, read_options
from ft_export.progress import Progress, silent
from ft_export.runs import Source, open_source, read_json
from ft_export.seeing import sees
from ft_export.serving.folder import take_names

__all__ = ["export"]

LEFT_NAMED = 8
"""Files left behind that a line names at most."""


@one_line
def export(
    path: Path | str,
    out: Path | str | None = None,
    *,
    type: str = "merged",
    overwrite: bool = False,
    options: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Exported:
    """Push a model to the Hub, from the folder ``OUT`` that holds exactly what is pushed and ``proof.json``.

    All files appear there in one commit or none does. A push that was interrupted is finished by asking for it again.

    Args:
        path: a run folder, a PEFT adapter folder or a transformers model folder.
        out: the folder to lay the files out in; ``path/export/hub`` by default. An earlier one of these is replaced.
        type: ``merged`` (the whole model in 16 bits), ``adapter``, or a GGUF type such as ``q8_0``.
        overwrite: whether other files of the same names in the repository, and other weights, may be replaced.
        options: ``repo``: ``USER/NAME``. ``private``: ``yes`` (the default) or ``no``. ``dry``: ``yes`` shows what
            would be sent and sends nothing. ``license``: an identifier of the Hub's, or ``other`` with
            ``license_name`` and ``license_link``. ``revision``: the branch. ``base``: the base model's name on the Hub,
            where the run knows only a folder. ``pre``: as for GGUF.
        progress: see :func:`ft_export.merge`. The list of files goes through it before anything is sent; that of a dry
            run is in the result's lines.

    Raises:
        ExportError: bad input, no token or right, a check that failed, or a Hub that refuses or is not reached.
    """
    source = open_source(Path(path))
    wanted = read_options(options, type)
    check_type(source, type)
    folder = Path(out).expanduser() if out is not None else source.path / "export" / "hub"
    check_target(folder, source, PROOF, overwrite=True)
    if (folder / PROOF).is_file() and FORMAT not in read_json(folder / PROOF):
        raise ExportError(f"{folder} holds another export: choose another folder with --out")
    record = read_record(source, wanted.base)
    _check_base(source, wanted, record)
    token = token_of()
    lines: list[str] = []
    repository = None if wanted.dry else Repository(wanted, token, progress)
    if repository is not None:
        lines += repository.check()
    licence, sets = _look_up(wanted, record, token, progress)
    with new_folder_with_gguf(folder, source, type) if wanted.is_gguf else new_folder(folder) as partial:
        laid = listed(partial, _lay_out(_Layout(source, wanted, record, licence, sets, partial, progress), lines))
        check_clean(laid, token)
    files = listed(folder, laid)
    plan = _plan(files, wanted)
    proof, again = folder / PROOF, _command(path, out, type, options)
    if repository is None:
        return Exported(folder, proof, (*lines, *plan, "a dry run: nothing was sent"), again)
    for line in plan:  # now, since a push of gigabytes can be stopped while it is young
        progress(0, 0, line)
    repository.create()
    send, gone = repository.differing(files, overwrite)
    commit = repository.push(send, gone, f"{wanted.type} model by ft-export")
    arrived = repository.check_arrived(files, commit)
    url = f"{repository.api.endpoint}/{wanted.repo}"
    write_pushed(folder, {"repo": wanted.repo, "revision": wanted.revision, "commit": commit, "files": arrived})
    lines.append(
        f"sent {len(send)} of {len(files)} files, {_size(sum(file.size for file in send))}"
        + (f", {len(files) - len(send)} were there already" if len(send) < len(files) else "")
        + (f"; removed {', '.join(gone)}" if gone else "")
    )
    lines.append(f"the Hub holds all {len(files)} files with the sizes and checksums of those here: {url}")
    return Exported(folder, proof, tuple(lines), _fetch(wanted))


@dataclass(frozen=True)
class _Layout:
    """What is laid out, from what, and where."""

    source: Source
    wanted: Wanted
    record: Record
    licence: Licence
    sets: list[str]
    folder: Path
    progress: Progress


def _check_base(source: Source, wanted: Wanted, record: Record) -> None:
    """An adapter is of use to others only where they can get its base by the name that its files give."""
    if wanted.type != "adapter" or wanted.base is not None:
        return
    assert source.adapter is not None  # check_type
    said = read_json(source.adapter / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(said, str) and said and not is_local(said):
        return
    hint = record.base or "USER/NAME"
    raise ExportError(
        f"the adapter's base is {f'the folder {said}' if said else 'not named'}, which nobody else has: add "
        f"base={hint} with the name that these weights have on the Hub, or push --type merged"
    )


def _look_up(wanted: Wanted, record: Record, token: str | None, progress: Progress) -> tuple[Licence, list[str]]:
    """The licence and the data sets on the Hub; asks the Hub only for what the files here do not say."""
    folder, card = record.base_folder, None
    known = folder is not None and (read_front_matter(folder / "README.md").get("license") or licence_files(folder))
    if record.base is not None and (wanted.base is not None or (wanted.licence is None and not known)):
        card = base_card(record.base, token, wanted.repo, progress, strict=not wanted.dry)
        if card is None and wanted.base is not None and not wanted.dry:
            raise ExportError(f"the Hub shows no model {wanted.base} with this token: look at base={wanted.base}")
    sets = data_sets(record.data_sets, token, wanted.repo, progress, strict=not wanted.dry)
    return find_licence(wanted.licence, folder, record.base, card), sets


def _lay_out(layout: _Layout, lines: list[str]) -> list[File]:
    """Fill the folder: the files, their licence, the card, and ``proof.json`` with the checksums of these, returned."""
    source, wanted, folder = layout.source, layout.wanted, layout.folder
    trained = source.adapter is not None or source.is_run or layout.record.config != {}
    if wanted.is_gguf:
        file, proof, model = _gguf(layout, lines)
    else:
        adapter = wanted.type == "adapter"
        made = source.adapter if adapter else whole_model(source, lines, layout.progress)
        assert made is not None  # check_type
        left = place_model(made, folder, layout.record.base, adapter)
        own = local_base(source.base) if source.adapter is None and source.base else None
        if own is not None and _sees(folder) and (renamed := take_names(folder, own)):
            lines.append(f"{renamed} tensors have the base's names of them, not those that transformers saved")
        file, proof, model = None, of_weights(folder, made, adapter), folder
        if left:
            more = f" and {len(left) - LEFT_NAMED} more" if len(left) > LEFT_NAMED else ""
            lines.append(f"not pushed: {', '.join(left[:LEFT_NAMED])}{more}")
    for text in licence_files(layout.record.base_folder) if layout.record.base_folder is not None else []:
        place(text, folder / text.name)
    task = _task(source, model, layout.record.base_folder)
    if source.adapter is not None and wanted.type != "adapter":
        proof = replace(proof, lines=(*of_combination(source.path / "merged"), *proof.lines))
    about = Subject(
        wanted,
        task,
        template=_has_template(model, layout.record.base_folder),
        tokenizer=wanted.repo if (folder / "tokenizer_config.json").is_file() else layout.record.base,
        trained=trained,
        file=file,
        tags=_tags(layout, trained),
        proof=[*proof.lines, "`proof.json` holds these figures and the checksum of every file."],
        projector=eyes.name if file is not None and (eyes := projector_beside(folder / file)) is not None else None,
    )
    write_card(folder, about, layout.record, layout.licence, layout.sets)
    layout.progress(0, 0, "taking checksums")
    files = listed(folder)
    write_proof(folder, proof, wanted.type, files)
    return files


def _gguf(layout: _Layout, lines: list[str]) -> tuple[str, Proof, Path]:
    """Make the GGUF file by its own exporter, with all its checks; its texts and paths stay out of the proof."""
    made = export_gguf(
        layout.source.path,
        layout.folder,
        type=layout.wanted.type,
        options={"pre": layout.wanted.pre} if layout.wanted.pre else None,
        progress=layout.progress,
    )
    lines += made.lines
    proof = of_gguf(read_json(made.proof)["files"][made.file.name])
    made.proof.unlink()
    model = layout.source.model or layout.source.path / "merged"
    return made.file.name, proof, model


def _tags(layout: _Layout, trained: bool) -> list[str]:
    wanted, config = layout.wanted, layout.record.config
    tags = ["ft"]
    if wanted.is_gguf:
        tags += ["gguf", "llama.cpp"]
    if layout.source.adapter is not None:
        tags.append("lora")
    method = config.get("method")
    return [*tags, *([method] if trained and isinstance(method, str) else [])]


def _sees(folder: Path) -> bool:
    return "vision_config" in read_json(folder / "config.json") and sees(read_config(folder))


def _task(source: Source, model: Path, base: Path | None) -> str | None:
    """What it does, in the Hub's words, from the configurations; None where they do not say."""
    for folder in (model, base):
        if folder is not None and (folder / "config.json").is_file():
            if _sees(folder):
                return SEES
            if (family := read_json(folder / "config.json").get("model_type")) in FAMILIES:
                return SPEAKS if family == CSM else LISTENS
            break
    if source.task == "tts":
        return SPEAKS
    if source.adapter is not None:
        kind = read_json(source.adapter / "adapter_config.json").get("task_type")
        return {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}.get(str(kind))
    named = read_json(model / "config.json").get("architectures") if (model / "config.json").is_file() else None
    for name in named if isinstance(named, list) else []:
        if str(name).endswith("ForCausalLM"):
            return "text-generation"
        if str(name).endswith("ForSequenceClassification"):
            return "text-classification"
    return None


def _has_template(model: Path, base: Path | None) -> bool:
    for folder in (model, base):
        if folder is None or not (folder / "tokenizer_config.json").is_file():
            continue
        said = read_json(folder / "tokenizer_config.json").get("chat_template")
        return bool(said) or (folder / "chat_template.jinja").is_file()
    return False


def _plan(files: list[File], wanted: Wanted) -> list[str]:
    """What is pushed, a line each, and where to."""
    width = max(len(f"{file.size:,}") for file in files)
    seen = "private" if wanted.private else "public"
    branch = "" if wanted.revision == MAIN else f", branch {wanted.revision}"
    total = _size(sum(file.size for file in files))
    lines = [f"to {wanted.repo} ({seen}{branch}): {len(files)} files, {total}"]
    return lines + [f"  {file.size:>{width},} bytes  {file.name}" for file in files]


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _command(path: Path | str, out: Path | str | None, type: str, options: Mapping[str, str] | None) -> str:
    """The command that sends what a dry run has shown."""
    words = ["ft", "export", str(path), "--to", "hub", "--type", type]
    words += ["--out", str(out)] if out is not None else []
    return shlex.join([*words, *(f"{key}={value}" for key, value in (options or {}).items() if key != "dry")])


def _fetch(wanted: Wanted) -> str:
    """The command that gets it back."""
    return f"hf download {wanted.repo}" + ("" if wanted.revision == MAIN else f" --revision {wanted.revision}")
