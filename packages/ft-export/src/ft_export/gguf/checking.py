"""What a GGUF file has to pass in llama.cpp before it is put in its place, and the proof of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_export import __version__
from ft_export.errors import ExportError
from ft_export.exporting import PROOF, new_proof, save_proof
from ft_export.folders import new_file
from ft_export.gguf.converter import Converted
from ft_export.gguf.engine import LlamaCpp, llama_cpp
from ft_export.gguf.mmproj import Projector
from ft_export.gguf.pictures import (
    Pictures,
    budget_of,
    check_image_template,
    leave_unturned,
    pictures,
    without_images,
)
from ft_export.gguf.proof import FINE, Comparison, Prompt, compare
from ft_export.gguf.text_check import check_readable, check_stops, check_template, check_tokens, rendered
from ft_export.gguf.towers import Tower
from ft_export.gguf.vocabulary import Vocabulary
from ft_export.runs import read_json
from ft_export.samples import Row, prompt_text, read_rows
from ft_export.seeing import told

__all__ = ["Prove", "Sight", "check_in_llama_cpp", "proven_file", "versions"]

NEW_TOKENS = 24
LONGEST_PROMPT = 256

Prove = Callable[[Converted, Mapping[str, Any], list[str]], Path]
"""What :func:`proven_file` gives beside the place to write to."""


@dataclass(frozen=True)
class Sight:
    """Attributes:
    projector: the file of a model's tower and projector. tower: its row. model: the folder that both came from.
    """

    projector: Projector
    tower: Tower
    model: Path

    def budget(self, model: Any) -> tuple[int, int] | None:
        """Tokens that an image may become, as its processor says."""
        return budget_of(self.model, model.config, self.tower)


def check_in_llama_cpp(
    made: Converted,
    load: Callable[[], Any],
    tokenizer: Any,
    stops: Sequence[int],
    held_out: Path | None,
    type: str,
    kinds: Mapping[str, str],
    lines: list[str],
    adapter: Path | None = None,
    sight: Sight | None = None,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """Load a file in llama.cpp, with an adapter's if there is one, and compare it with transformers.

    Args:
        made: the file of a whole model.
        load: gives the transformers model in fp32 that the two files are to be.
        tokenizer: the one that the model was trained with.
        stops: the ids that end an answer, the tokenizer's own end first.
        held_out: a file of rows to take prompts from; built-in sentences without.
        type: of the file, for what its rounding may cost.
        kinds: the types of tensors, by the names that they have in what ``load`` gives.
        lines: gets what was found.
        adapter: the GGUF file of an adapter to put on the model.
        sight: the file of its tower and projector, and where it was made from, of a model that sees.
        more: texts that have to be split alike, beside the prompts.

    Returns:
        What goes into ``proof.json``.

    Raises:
        ExportError: llama.cpp cannot load it, or a check failed; names the text or the token.
    """
    check_readable(tokenizer)
    rows = read_rows(held_out)
    model, seen_, still, pictured = None, None, None, rows
    if sight is not None:
        model, rows = load(), without_images(rows) if held_out is not None else rows
        seen_ = pictures(sight.model, sight.tower, model, pictured, tokenizer)
    prompts = _prompts(rows, tokenizer) or _prompts(read_rows(None), tokenizer)
    vocabulary = made.vocabulary
    longest = max(len(prompt.ids) for prompt in [*prompts, *(seen_.prompts if seen_ is not None else ())])
    eyes: dict[str, Any] = {}
    if sight is not None:
        eyes = {"projector": sight.projector.file, "budget": sight.budget(model)}
    with llama_cpp(made.file, longest + NEW_TOKENS + 8, adapter=adapter, **eyes) as engine:
        written = [*(prompt.text for prompt in prompts), *rendered(tokenizer), *more]
        how: dict[str, Any] = {"plain": vocabulary.plain, "spaced": vocabulary.spaced}
        if vocabulary.scores:
            how["advice"] = "llama.cpp has no other way of splitting for a SentencePiece tokenizer"
        texts = check_tokens(engine, tokenizer, written, **how)
        lines.append(
            f"llama.cpp splits {texts} text{'' if texts == 1 else 's'} into the same tokens (rules: {vocabulary.pre})"
        )
        lines.extend(_exceptions(vocabulary))
        conversations = 0
        if vocabulary.templates:
            bos = tokenizer.bos_token if vocabulary.add_bos else ""
            conversations = check_template(engine, tokenizer, _conversations(rows), bos)
            several = "conversation" if conversations == 1 else "conversations"
            lines.append(f"llama.cpp renders {conversations} {several} in the chat template byte for byte alike")
        else:
            lines.append("the model has no chat template: none was written")
        ends = check_stops(engine, tokenizer, stops)
        lines.append(f"llama.cpp ends an answer at each of {ends} stop token{'' if ends == 1 else 's'}")
        model = load() if model is None else model
        if seen_ is not None and sight is not None:
            bos = (tokenizer.bos_token or "") if vocabulary.add_bos else ""
            lines.extend(_asked_with_images(engine, tokenizer, sight, seen_, bos))
            still = leave_unturned(model, [*seen_.prompts, *prompts])
            prompts = [*seen_.asked(engine.marker(), bos), *prompts[: max(1, len(prompts) - len(seen_.prompts))]]
            kinds = {**kinds, **sight.projector.kinds}
        found = compare(engine, model, tokenizer, prompts, type, kinds, set(stops), NEW_TOKENS)
    if seen_ is not None:
        lines.extend(_told_of_images(seen_, found))
    if still is not None:
        lines.append(
            f"llama.cpp leaves {still[0]} of {still[1]} frequencies of positions unturned (mrope_section), and so did "
            f"transformers here: that moves the likeliest first tokens by {still[2]:.2e} nats"
        )
    lines.extend(_told(found, prompts[0], type))
    return {
        "texts_with_equal_tokens": texts,
        "conversations_with_equal_template": conversations,
        "stop_tokens": sorted(stops),
        "prompts": len(prompts),
        "unturned": None if still is None else dict(zip(("frequencies", "of", "nats"), still, strict=True)),
        "prompts_with_images": 0 if seen_ is None else len(seen_.prompts),
        "continuations": found.as_dict(),
    }


def _asked_with_images(engine: LlamaCpp, tokenizer: Any, sight: Sight, seen_: Pictures, bos: str) -> list[str]:
    answer = check_image_template(engine, tokenizer, sight.tower, seen_, bos)
    if answer is None:
        return []
    return [f"llama.cpp's chat takes an image where the chat template puts it, and answers {answer!r}"]


def _told_of_images(seen_: Pictures, found: Comparison) -> list[str]:
    size = "{} x {}".format(*seen_.images[0].size)
    lines = [
        f"{len(seen_.prompts)} of the prompts have an image of {size} pixels, which neither side resizes "
        f"({told(seen_.drawn)}); the same inverted moves the likeliest first tokens by {seen_.sight:.2e} nats"
    ]
    if not seen_.sight > found.bound_mean:
        lines.append(
            "NOT PROVEN with images: the model says nearly the same of an image and of the same inverted, so that a "
            "wrong mmproj file could not be told from a right one"
        )
    if seen_.around is not None:
        lines.append(
            "llama.cpp's chat puts no blank lines around an image, as the model's processor does (compared with them): "
            f"without them the likeliest first tokens move by {seen_.around:.2e} nats"
        )
    return lines


def _exceptions(vocabulary: Vocabulary) -> list[str]:
    """What llama.cpp cannot do as the tokenizer does it; such texts were not compared."""
    told = []
    if not vocabulary.plain:
        told.append(
            "a text with no special token before it begins without the space in llama.cpp that the tokenizer puts there"
        )
    if not vocabulary.spaced:
        told.append("a text that begins with a space begins with one space more in llama.cpp")
    return told


def _told(found: Comparison, prompt: Prompt, type: str) -> list[str]:
    before, after = found.perplexity
    model = "transformers" if type in FINE else "transformers with the rounded weights"
    lines = [
        f"{type} costs {found.cost.mean:.2e} nats on average, {found.cost.largest:.2e} at most; perplexity of the "
        f"prompts {before:.4g}, rounded {after:.4g}",
        f"greedy continuations: {found.equal} of {found.tokens} tokens are the likeliest of {model}"
        + (f", the others within {found.close:.2e} nats of it" if found.equal < found.tokens else ""),
        f"log-probabilities against {model} in fp32: largest difference {found.error.largest:.2e} (bound "
        f"{found.bound_largest:.2e} for {type}), mean {found.error.mean:.2e} (bound {found.bound_mean:.2e})",
    ]
    if found.undecided:
        lines.append(f"{found.undecided} tokens hang on a choice of experts that rounding turns: not compared further")
    same = "equal to transformers'" if found.answers_equal else f"transformers says {found.generated!r}"
    asked = prompt.text if len(prompt.text) <= 160 else f"…{prompt.text[-160:]}"
    lines.append(f"llama.cpp's answer to {asked!r}: {found.answer!r}, {same}")
    return lines


def _prompts(rows: list[Row], tokenizer: Any) -> list[Prompt]:
    prompts = []
    for row in rows:
        text, special = prompt_text(row, tokenizer)
        ids = tokenizer(text, add_special_tokens=not special)["input_ids"][:LONGEST_PROMPT]
        if ids:
            prompts.append(Prompt(text, tuple(ids)))
    return prompts


def _conversations(rows: list[Row]) -> list[list[dict[str, Any]]]:
    """Those held-out conversations that end with the user, where the assistant is to speak."""
    found = []
    for row in rows:
        messages = list(row.get("messages") or [])
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        if messages:
            found.append(messages)
    return found[:3]


def versions() -> dict[str, str]:
    """Of the libraries that make and check a file, as far as they are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for name in ("gguf", "xllamacpp", "transformers", "torch"):
        with suppress(PackageNotFoundError):  # without its proof a file is written without llama.cpp
            found[name] = version(name)
    return found


@contextmanager
def proven_file(file: Path, key: str | None = None) -> Iterator[tuple[Path, Prove]]:
    """:func:`ft_export.folders.new_file` for a file with an entry in the ``proof.json`` beside it.

    The entry of an earlier file in its place goes before that does, and the new one is put there after the file:
    whenever a process ends, ``proof.json`` says nothing of a file that is not there, nor of another than is there.

    Yields:
        Where to write the file, and the function that gives what its entry says: called once, with what was converted,
        what was found and the lines for people. It returns the path of ``proof.json``.
    """
    with ExitStack() as after, new_file(file, key) as partial:  # ended in the other order

        def prove(made: Converted, found: Mapping[str, Any], lines: list[str]) -> Path:
            return after.enter_context(_proof(file, made, found, lines))

        yield partial, prove


@contextmanager
def _proof(file: Path, made: Converted, found: Mapping[str, Any], lines: list[str]) -> Iterator[Path]:
    """Write ``proof.json`` with the file's entry beside its place, which it takes when the block ends well.

    Entries of other files in the folder stay, those that another export writes meanwhile too.
    """
    path = file.parent / PROOF

    def others() -> dict[str, Any]:
        try:
            said = read_json(path).get("files")
        except ExportError:
            if path.exists():
                raise
            return {}  # none yet, or just taken away with its last entry
        return {name: entry for name, entry in said.items() if name != file.name} if isinstance(said, dict) else {}

    entry = {
        "architecture": made.architecture,
        "pre_tokenizer": made.vocabulary.pre,
        "ft_export": __version__,
        "libraries": versions(),
        **found,
        "checks": lines,
    }
    with new_proof(file.parent, lambda: {"proof_format": 1, "files": {**others(), file.name: entry}}):
        if others():
            save_proof(file.parent, lambda: {"proof_format": 1, "files": others()})
        else:
            path.unlink(missing_ok=True)
        yield path
