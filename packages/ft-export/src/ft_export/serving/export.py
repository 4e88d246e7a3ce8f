"""The part of the exporters ``vllm`` and ``sglang`` that is the same: a whole model, checked, with its launch files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export import __version__
from ft_export.bases import TOKENIZER_FILES, load_tokenizer, local_base, name_stops, read_config, stop_tokens
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.exporting import PROOF, file_name, save_proof, whole_model
from ft_export.folders import clear_inside, files_in, key_of, new_folder, sha256_of
from ft_export.merging.merger import MARKER as MERGED
from ft_export.merging.merger import check_unchanged
from ft_export.merging.texts import texts_of
from ft_export.progress import Progress, silent
from ft_export.runs import Source, read_json
from ft_export.samples import read_rows, token_ids
from ft_export.seeing import sees, told
from ft_export.serving.checks import Gap, Samples, check_gap, check_reads, check_stored, served_model
from ft_export.serving.engine import OPTIONS as ENGINE_OPTIONS
from ft_export.serving.engine import Engine, engine_of
from ft_export.serving.folder import Plan, plan_whole, write_whole
from ft_export.serving.forms import Form
from ft_export.serving.launch import Service, project_name, write_launch
from ft_export.serving.limits import limits_of, memory_of
from ft_export.serving.listening import check_speech
from ft_export.serving.served import NOT_RUN, check_served, questions

if TYPE_CHECKING:
    import torch

__all__ = ["OPTIONS", "check_stops", "export_whole", "merge_of", "prove", "write_proof"]

OPTIONS = {
    "memory": "of the card that serves it, such as 24GiB: the context and the server's share are made to fit",
    "context": "tokens that a conversation may have; the model's positions by default",
    **ENGINE_OPTIONS,
}
"""What ``key=value`` may be for a server, and what each is."""


def export_whole(
    source: Source,
    folder: Path,
    form: Form,
    said: dict[str, str],
    target: str,
    service: Callable[[str, str, int, float | None], Service],
    progress: Progress = silent,
) -> tuple[Path, list[str]]:
    """Write a whole model with launch files and proof into ``folder``; an adapter is merged first.

    Args:
        said: the options, all of which are known.
        target: the exporter's name.
        service: makes the description of the server from the model's name, its type (``bfloat16``), the longest
            context, and the share of a card that weights, keys and values may take (None where the card is not known).

    Returns:
        The proof's path, and what was checked and found, for people.

    Raises:
        ExportError: bad input, no space, or a check that failed; nothing is left behind.
    """
    memory = memory_of(said.get("memory"))
    engine = engine_of(said, target)
    lines: list[str] = []

    def fits(base: Path, _: Path) -> None:
        """Refuse before the merge what would be refused after it."""
        check_speech(base, form.codes is not None, engine is not None, target)
        _check_seeing(base, form, engine, target)
        if source.rope is None:  # which changes the context
            limits_of(base, Checkpoint(base).parameters() * (1 if form.codes else 2), memory, said.get("context"))

    model = whole_model(source, lines, progress, fits)
    heard = check_speech(model, form.codes is not None, engine is not None, target)
    sighted = _check_seeing(model, form, engine, target)
    more = sighted or heard
    own = local_base(source.base) if more and source.adapter is None and source.base else None
    plan = plan_whole(model, form, own)
    limits = limits_of(model, plan.bytes(), memory, said.get("context"))
    name = file_name(source)
    with new_folder(folder, _key(plan)) as partial:
        clear_inside(partial, lambda path: path.suffix == ".safetensors")
        if there := len(list(partial.glob("*.safetensors"))):
            lines.append(f"went on with an export that was interrupted, of which {there} files were whole")
        whole = write_whole(plan, partial, progress)
        if plan.names:
            lines.append(f"{len(plan.names)} tensors have the base's names of them, not those that transformers saved")
        tensors = check_stored(plan, partial, progress)
        lines.append(
            f"{sum(tensors.values())} tensors read back: {tensors['compressed']} compressed to within half a step, "
            f"{tensors['cast']} rounded to {_plain(plan.dtype)}, {tensors['kept']} equal bit for bit"
        )
        tokenizer = _check_tokenizer(model, partial, lines)
        stops = check_stops(tokenizer, partial, lines)
        gap: Gap | None = None
        samples = 0
        if more or plan.compressed or plan.cast:
            read: list[Sequence[int]] = []
            texts = _samples(source, tokenizer, partial, read) if more else _texts(source, tokenizer)
            if plan.compressed or plan.cast:
                gap = check_gap(plan, partial, texts, progress)
                samples = gap.samples
                lines.extend(_told(gap, form))
            else:
                samples = check_reads(partial, texts, progress)
            if sighted:
                whose = told(why for text in read for why in getattr(text, "drawn", ()))
                lines.append(f"transformers reads {samples} texts with images from the folder: {whose}")
            if heard:
                whose = told((getattr(text, "made", "") for text in read), "made")
                lines.append(f"transformers reads {samples} texts with their sounds from the folder: {whose}")
                lines.append(f"{target} takes sounds at /v1/audio/transcriptions and /v1/audio/translations")
        share = None if memory is None else int(100 * (limits.weights + limits.room) / memory) / 100
        project = project_name(source.name, target, source.path)
        write_launch(partial, service(name, _plain(plan.dtype), limits.context, share), limits, project)
        lines.append(f"{limits.context} tokens of context: {' '.join(limits.told())}")
        served = prove(
            engine, target, partial, partial, name, source, stops, limits.context, plan.dtype,
            lambda: served_model(plan, partial), lines, progress,
        )  # fmt: skip
        report = {
            "type": form.name,
            "dtype": _plain(plan.dtype),
            "weights_linked_to_the_merge": whole.linked,
            "merge": merge_of(model),
            "tensors": tensors,
            "stop_tokens": stops,
            "samples": samples,
            "with_images": sighted,
            "with_sounds": heard,
            "gap": None if gap is None else gap.as_dict(),
            "context": limits.context,
            "served": served,
        }
        write_proof(partial, target, report, lines)
    return folder / PROOF, lines


def _check_seeing(folder: Path, form: Form, engine: Engine | None, target: str) -> bool:
    """Whether it is a model that sees.

    Raises:
        ExportError: it is, and is to be compressed, or compared in the server, which is asked texts alone.
    """
    if not sees(read_config(folder)):
        return False
    if form.codes:
        raise ExportError(f"{folder} is a model that sees, which is exported to {target} in 16 bits: use --type 16bit")
    if engine is not None:
        raise ExportError(
            f"{folder} is a model that sees, and engine= compares texts alone: leave it out, and try the server by hand"
        )
    return True


def _samples(source: Source, tokenizer: Any, folder: Path, read: list[Sequence[int]]) -> Samples:
    """Held-out rows with images or sounds, made of the model's own; ``read`` gets them once they are."""
    texts = texts_of(source, folder, tokenizer)

    def made(model: Any) -> Sequence[Sequence[int]]:
        read[:] = texts(model) if callable(texts) else texts
        return read

    return made


def _texts(source: Source, tokenizer: Any) -> list[list[int]]:
    """Held-out rows as token ids, else built-in sentences."""
    texts = [token_ids(row, tokenizer) for row in read_rows(source.held_out)]
    return [ids for ids in texts if len(ids) > 1] or [token_ids(row, tokenizer) for row in read_rows(None)]


def _key(plan: Plan) -> str | None:
    """What weights that are made anew are made from; files that are linked or copied are not worth going on with."""
    if not plan.compressed and not plan.cast:
        return None
    return key_of(plan.model, plan.stored.files, plan.form.name, _plain(plan.dtype), sorted(plan.compressed))


def prove(
    engine: Engine | None,
    target: str,
    folder: Path,
    words: Path,
    name: str,
    source: Source,
    stops: list[int],
    context: int,
    dtype: torch.dtype,
    reference: Callable[[], Any],
    lines: list[str],
    progress: Progress,
) -> dict[str, Any] | str:
    """Start the server on the finished folder, if there is one, and compare; see :mod:`ft_export.serving.served`.

    Args:
        words: the tokenizer's folder.
        name: what the server calls the model.
        lines: gets what was found, or that no server was run.

    Returns:
        What ``proof.json`` says of it.

    Raises:
        ExportError: the server does not come up, or does not say what the model says.
    """
    if engine is None:
        lines.append(NOT_RUN.format(target))
        return lines[-1]
    asked = questions(source.held_out, load_tokenizer(words), context)
    served = check_served(engine, folder, name, asked, stops, context, dtype, reference, progress)
    lines.append(served.told(target))
    return served.as_dict(engine)


def merge_of(model: Path) -> dict[str, Any] | None:
    """What a merge says of itself, if its weights are still what it left."""
    if not (model / MERGED).is_file():
        return None
    check_unchanged(model)
    return read_json(model / MERGED)


def check_stops(tokenizer: Any, folder: Path, lines: list[str]) -> list[int]:
    """Let ``generation_config.json`` name all that ends an answer, where servers look for it.

    Raises:
        ExportError: nothing ends one, so the model would never stop.
    """
    stops = stop_tokens(tokenizer, folder)
    if not stops:
        raise ExportError(
            "the model has no token that ends an answer (no eos_token in the tokenizer, none in its configuration): "
            "it would never stop; give its tokenizer an eos_token"
        )
    added = name_stops(folder, stops)
    if added:
        names = ", ".join(str(tokenizer.convert_ids_to_tokens(stop)) for stop in added)
        lines.append(f"generation_config.json did not name {names} as a stop token: it does now")
    said = read_json(folder / "generation_config.json").get("eos_token_id")
    if not set(stops) <= set([said] if isinstance(said, int) else said or []):
        raise ExportError(f"generation_config.json names {said} as stop tokens, not {stops}: nothing was written")
    return stops


def _check_tokenizer(model: Path, folder: Path, lines: list[str]) -> Any:
    """The written tokenizer, which has to be the model's: file by file, and as transformers loads it."""
    for name in TOKENIZER_FILES:
        one, other = model / name, folder / name
        if one.is_file() != other.is_file() or (one.is_file() and one.read_bytes() != other.read_bytes()):
            raise ExportError(f"{name} is not the model's: nothing was written")
    was, tokenizer = load_tokenizer(model), load_tokenizer(folder)
    if was.chat_template != tokenizer.chat_template:
        raise ExportError("the chat template is not the model's: nothing was written")
    template = "and chat template are" if tokenizer.chat_template else "is (it has no chat template)"
    lines.append(f"tokenizer {template} the model's byte for byte")
    return tokenizer


def write_proof(folder: Path, target: str, report: dict[str, Any], lines: list[str]) -> None:
    """``proof.json``: what was found, and the SHA-256 of each file beside it."""
    from importlib.metadata import version

    proof = {
        "proof_format": 1,
        "target": target,
        "ft_export": __version__,
        "libraries": {name: version(name) for name in ("torch", "transformers", "safetensors")},
        **report,
        "checks": lines,
        "sha256": {path.relative_to(folder).as_posix(): sha256_of(path) for path in files_in(folder)},
    }
    save_proof(folder, proof)


def _told(gap: Gap, form: Form) -> list[str]:
    before, after = gap.perplexity
    lines = [
        f"{form.name} costs log-probabilities {gap.found.mean:.2e} nats on average (bound {gap.bound_mean:.2e}), "
        f"{gap.found.largest:.2e} at most (bound {gap.bound_largest:.2e}), over {gap.found.tokens} tokens; perplexity "
        f"{before:.4g} before, {after:.4g} after; {gap.greedy} likeliest tokens equal"
    ]
    if gap.served is not None:
        lines.append(
            f"with activations in 8 bits as a server rounds them: {gap.served.mean:.2e} nats on average, "
            f"{gap.served.largest:.2e} at most; {gap.served_greedy} likeliest tokens equal"
        )
    return lines


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
