"""Merge an adapter into its base: fp32 arithmetic, a 16-bit model, two checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export import __version__
from ft_export.bases import (
    copy_tokenizer,
    find_base,
    load_tokenizer,
    name_stops,
    quantization_of,
    same_folder,
    stop_tokens,
    tokenizer_folder,
)
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError, one_line
from ft_export.folders import (
    clear_inside,
    clear_unfinished,
    key_of,
    new_folder,
    refuse_existing_folder,
    require_space,
    unfinished_bytes,
)
from ft_export.hearing import name_features, speaks
from ft_export.merging.adapter import Adapter, Replacement, base_of
from ft_export.merging.arithmetic import DEVICES, device_of, exact_products
from ft_export.merging.combination import Combination, Part, combination_of, parts_of
from ft_export.merging.combining import Combined, combined_adapter, put_together
from ft_export.merging.dequantizing import write_dequantized
from ft_export.merging.growing import grown_rows
from ft_export.merging.logprobs_check import LogprobsCheck, check_logprobs, gap_to_quantized
from ft_export.merging.outline import Outline
from ft_export.merging.record import MARKER, base_files, check_unchanged, fingerprint, is_current, sums
from ft_export.merging.tensors import merged_tensors
from ft_export.merging.texts import check_inputs, samples_told, texts_of
from ft_export.merging.weights_check import WeightsCheck, check_weights
from ft_export.progress import Progress, silent
from ft_export.runs import Source, open_source
from ft_export.writing import write_model

if TYPE_CHECKING:
    import torch

__all__ = ["DEVICES", "DTYPES", "MARKER", "MergeResult", "check_unchanged", "fingerprint", "is_current", "merge"]

DTYPES = ("bfloat16", "float16")
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class MergeResult:
    """What :func:`merge` made.

    Attributes:
        folder: the merged model, with ``merge.json``.
        weights: the check of every tensor.
        logprobs: the check of log-probabilities; None where it was skipped.
        lines: what was done and found, for people.
    """

    folder: Path
    weights: WeightsCheck
    logprobs: LogprobsCheck | None
    lines: tuple[str, ...]


@one_line
def merge(
    path: Path | str,
    out: Path | str | None = None,
    *,
    adapters: Sequence[tuple[Path | str, float]] = (),
    weight: float = 1.0,
    combination: str | None = None,
    density: float | None = None,
    majority_sign: str | None = None,
    rank: int | None = None,
    seed: int = 0,
    base: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    skip_proof: bool = False,
    say: Callable[[str], None] | None = None,
    progress: Progress = silent,
) -> MergeResult:
    """Merge a run's LoRA adapter into its 16-bit base and write a model that plain transformers loads.

    Tensor by tensor, large ones in blocks of rows, the base is read from its files, merged in fp32, rounded once and
    written: the weights are never in memory together. Then every written tensor is compared with base and adapter in
    float64 (:func:`~ft_export.merging.weights_check.check_weights`), and log-probabilities of sample texts with the
    adapter's on the base (:func:`~ft_export.merging.logprobs_check.check_logprobs`). Past a bound nothing is left.

    Args:
        path: a run folder or a PEFT adapter folder.
        out: the folder to write; ``path/merged`` by default.
        adapters: further adapters for the same base, each a run folder or an adapter folder and its weight. PEFT makes
            one of them and the first, and that is merged.
        weight: of the first adapter's change.
        combination: how they are combined, in PEFT's words (:data:`~ft_export.merging.combination.COMBINATIONS`).
            ``cat``, the default, is the weighted sum of the adapters' changes; PEFT's ``linear`` is not.
        density: the share of values in (0, 1] that TIES, DARE or pruning by magnitude keeps.
        majority_sign: how TIES elects a sign: ``total`` (the default) or ``frequency``.
        rank: of the result where the combination ends in ``svd``; by default the largest of the adapters'.
        seed: of DARE's random masks.
        base: a folder or Hub name to use in place of the one that the adapter names.
        dtype: ``bfloat16`` or ``float16``; by default the base's own, bfloat16 for an fp32 base.
        device: where the products are computed: ``cpu``, ``cuda``, or ``auto`` for cuda where there is one. The same
            checks hold all of them; their last bits may differ.
        overwrite: whether an earlier merge in ``out`` may be replaced.
        skip_proof: leave out the log-probabilities, for which both models are held in memory in fp32. It is said, and
            exporters merge again where they want the proof.
        say: called with each line about what was done and found.
        progress: called with (done, total, what) while something takes long; total 0: something without parts begins.

    Raises:
        ExportError: bad input, no space, or a check that failed. Nothing is left behind.
    """
    source = open_source(Path(path))
    if source.adapter is None:
        raise ExportError(f"nothing is to be merged: {source.path} was trained in full, its model is {source.model}")
    if dtype not in (None, *DTYPES):
        raise ExportError(f"--dtype {dtype!r} is not known (allowed: {', '.join(DTYPES)})")
    where = device_of(device)
    target = Path(out).expanduser() if out is not None else source.path / "merged"
    refuse_existing_folder(target, MARKER, overwrite)
    parts: list[Part] = []
    how = Combination("cat")
    if adapters or weight != 1:
        how = combination_of(combination, density, majority_sign, rank, seed)
        parts = parts_of(source, weight, adapters, how, base)
    elif any(setting is not None for setting in (combination, density, majority_sign, rank)):
        raise ExportError("how adapters are combined is said for one alone: name the others with --adapter PATH:WEIGHT")
    adapter = parts[0].adapter if parts else Adapter(source.adapter)
    for one in (part.adapter for part in parts) if parts else (adapter,):
        one.check_start()
    named = (base_of(part.source, part.adapter) for part in parts)
    reference = base or base_of(source, adapter) or next((name for name in named if name), None)
    if not reference:
        raise ExportError(f"{adapter.folder / 'adapter_config.json'} names no base model: name it with ft merge --base")
    folder = find_base(reference)
    sources = [taken for part in parts for taken in (part.source.path, part.adapter.folder)]
    for taken in (source.path, source.adapter, folder, *sources):
        if same_folder(target, taken):
            raise ExportError(f"the merged model cannot be written over its own source {taken}: choose another --out")
    with ExitStack() as stack:
        combined: Combined | None = None
        if parts:
            adapter, combined = stack.enter_context(combined_adapter(parts, how, folder, reference, target, progress))
        given = _Merge(source, adapter, folder, reference, dtype, where, target, skip_proof, combined, say, progress)
        return given.run()


class _Merge:
    """One merge; the steps share what they found on the way."""

    def __init__(
        self,
        source: Source,
        adapter: Adapter,
        base: Path,
        reference: str,
        dtype: str | None,
        device: str,
        out: Path,
        skip_proof: bool,
        combined: Combined | None,
        say: Callable[[str], None] | None,
        progress: Progress,
    ) -> None:
        self.source, self.adapter, self.base, self.reference = source, adapter, base, reference
        self.trained_on, self.rope = base, source.rope
        self.out = out
        self.asked, self.device, self.skip_proof = dtype, device, skip_proof
        self.combined, self.read = combined, base_files(base)
        self.lines: list[str] = []
        self._say = say
        self.progress = progress
        self.labels = _labels(adapter)

    def say(self, line: str) -> None:
        self.lines.append(line)
        if self._say:
            self._say(line)

    def run(self) -> MergeResult:
        for line in self.combined.lines() if self.combined is not None else ():
            self.say(line)
        method = quantization_of(self.base)
        as_run = self.source.quantization if method is None and self.source.on_quantized else None
        stored = Checkpoint(self.base)  # checks the files before anything is loaded
        stop_tokens(load_tokenizer(tokenizer_folder(self.adapter.folder, self.base)), self.base)
        if not self.skip_proof and self.labels is None:
            check_inputs(self.adapter.folder, self.base)  # said before the merge, not after it
        if self.labels is None and self.combined is None:
            self.adapter.rows = grown_rows(self.adapter, self.base)
        key = self._key(stored) if method is None and as_run is None else None
        clear_unfinished(self.out, key)  # before the space is asked for, of which it may hold much
        # 16-bit weights of a packed 4-bit base take up to four times its bytes, twice: base and merged model
        size = stored.parameters() * (16 if method is not None else 4 if as_run is not None else 2)
        there = 0 if key is None else unfinished_bytes(self.out, key)
        require_space(self.out.parent, int(size * 1.02) + 50_000_000 - there, "the merged model")
        with new_folder(self.out, key) as folder:
            clear_inside(folder, lambda path: path.suffix == ".safetensors")  # whole files of weights
            if whole := len(list(folder.glob("*.safetensors"))):
                self.say(f"going on with a merge that was interrupted, of which {whole} files are there")
            if method is not None or as_run is not None:
                self.base = write_dequantized(
                    self.base, folder / "base", method, as_run, self.source.dtype or "bfloat16",
                    self.asked or "bfloat16", self.labels, self.rope, self.progress,
                )  # fmt: skip
                why = (
                    f"is itself quantized ({method})"
                    if as_run is None
                    else f"was held in {as_run}, where the adapter began"
                )
                self.say(f"the base {self.reference} {why}: merged into its dequantized weights")
                stored = Checkpoint(self.base)
            report = self._into(folder, stored)
            if folder in self.base.parents:
                _remove(folder / "base")
            text = json.dumps(report.pop("json"), indent=2, ensure_ascii=False) + "\n"
            (folder / MARKER).write_text(text, encoding="utf-8")
        return MergeResult(self.out, report["weights"], report["logprobs"], tuple(self.lines))

    def _key(self, stored: Checkpoint) -> str:
        """What the merged files are made from; two merges with the same key write the same bytes."""
        rope = None if self.rope is None else asdict(self.rope)
        return key_of(self.base, stored.files, fingerprint(self.adapter.folder), self.asked, self.device, rope)

    def _into(self, folder: Path, stored: Checkpoint) -> dict[str, Any]:
        import torch

        was = stored.widest_float()
        dtype = getattr(torch, self.asked) if self.asked else (torch.bfloat16 if was == torch.float32 else was)
        if dtype not in (torch.bfloat16, torch.float16):
            raise ExportError(f"the base {self.base} has weights of type {was}: only 32- and 16-bit bases are merged")
        outline = Outline(self.base, stored, self.labels, self.rope, self.adapter.rows)
        self.adapter.check_shapes(outline.shapes)
        loosened = outline.loosen(self.adapter)
        tensors = merged_tensors(stored, self.adapter, outline, loosened, dtype, self.device)
        with exact_products():
            write_model(folder, tensors, progress=self.progress)
        outline.save_config(folder, dtype)
        if (self.base / GENERATION).is_file():
            (folder / GENERATION).write_bytes((self.base / GENERATION).read_bytes())
        written = outline.rename(Checkpoint(folder))
        tokenizer_from = copy_tokenizer(self.adapter.folder, self.base, folder)
        name_features(folder)
        if self.adapter.rows is not None:
            self.say(f"the vocabulary grew in training: the merged model has {self.adapter.rows} tokens")
        if self.rope is not None:
            kind, most = self.rope.rope_parameters.get("rope_type"), self.rope.max_position_embeddings
            self.say(f"config.json has the rotary scaling of the run: {kind}, {most} positions")

        weights = check_weights(written, stored, self.adapter, set(outline.shapes), outline.aliases, self.progress)
        self.say(
            f"checked {weights.merged + weights.replaced + weights.untouched} tensors against base and adapter: "
            f"{weights.merged} merged, {weights.replaced} replaced, {weights.untouched} untouched; "
            f"largest error {weights.largest_error:.3f} of the rounding of {_name(dtype)}"
        )
        tokenizer = load_tokenizer(folder)
        if self.labels is None and not speaks(outline.config):  # which ends with a code, not with a token
            stops = stop_tokens(tokenizer, self.base)
            name_stops(folder, stops)
            _check_stops(folder, stops, tokenizer)
        logprobs, gap = None, None
        if self.skip_proof:
            self.say(
                "NOT PROVEN: what the merged model says was not compared with the adapter on its base (--skip-proof); "
                "its tensors were"
            )
        else:
            logprobs, gap = self._prove(folder, tokenizer, dtype, was)
        first = self.adapter.folder if self.combined is None else self.combined.parts[0].adapter.folder
        report = {
            "merge_format": 1,
            "ft_export": __version__,
            "libraries": _versions(),
            "base": self.reference,
            "base_folder": str(self.trained_on.resolve()),
            "base_files": self.read,
            "base_dtype": _name(was),
            "dtype": _name(dtype),
            "dequantized_base": folder in self.base.parents,
            "adapter": str(first),
            "adapter_sha256": fingerprint(first),
            "combination": None if self.combined is None else self.combined.as_dict(),
            "adapters": None if self.combined is None else [part.as_dict() for part in self.combined.parts],
            "device": self.device,
            "files_sha256": sums(folder),
            "tokenizer_from": "adapter" if tokenizer_from == self.adapter.folder else "base",
            "samples": "held_out.jsonl" if self.source.held_out else "built in",
            "weights": asdict(weights),
            "logprobs": None if logprobs is None else logprobs.as_dict(),
            "quantized_run": gap,
            "rope": None if self.rope is None else asdict(self.rope),
        }
        return {"json": report, "weights": weights, "logprobs": logprobs}

    def _prove(
        self, folder: Path, tokenizer: Any, dtype: torch.dtype, was: torch.dtype
    ) -> tuple[LogprobsCheck, dict[str, Any] | None]:
        """Compare what the model says with the adapter on its base, and with the quantized run if it was one."""
        samples = texts_of(self.source, folder, tokenizer)
        rounded = set(self.adapter.changes) if dtype == was else None
        logprobs = check_logprobs(
            folder, self.base, self.adapter, samples, dtype, rounded, self.labels, self.rope, self.progress,
            None if self.combined is None else partial(put_together, parts=self.combined.parts, how=self.combined.how),
        )  # fmt: skip
        unit = "scores" if self.labels is not None else "log-probabilities"
        for line in samples_told(logprobs.texts):
            self.say(line)
        self.say(
            f"{unit} of {logprobs.merged.tokens} tokens, merged against adapter on its base: largest difference "
            f"{logprobs.merged.largest:.2e} (bound {logprobs.bound_largest:.2e}), mean {logprobs.merged.mean:.2e} "
            f"(bound {logprobs.bound_mean:.2e})"
        )
        base = self.trained_on if self.source.on_quantized else self.base
        gap = gap_to_quantized(
            self.source.quantization, base, self.adapter, logprobs, self.labels, self.rope, self.progress
        )
        if gap is not None:
            self.say(
                f"{unit} against the {self.source.quantization} run: "
                + (f"largest {gap['largest']:.2e}, mean {gap['mean']:.2e}" if "mean" in gap else gap["not_measured"])
            )
        return logprobs, gap


def _check_stops(folder: Path, stops: list[int], tokenizer: Any) -> None:
    """Ask transformers at which tokens it ends an answer of the written model.

    Raises:
        ExportError: one of ``stops`` is not among them; the model might never stop.
    """
    from transformers import GenerationConfig

    named = GENERATION if (folder / GENERATION).is_file() else "config.json"
    said = GenerationConfig.from_pretrained(folder, named, local_files_only=True).eos_token_id
    ends = [said] if isinstance(said, int) else list(said or [])
    for token in stops:
        if token not in ends:
            raise ExportError(
                f"the merged model would not stop at {tokenizer.decode([token])!r} ({token}): its {named} does not "
                "name it; nothing was written"
            )


def _labels(adapter: Adapter) -> int | None:
    if adapter.config.get("task_type") != "SEQ_CLS":
        return None
    for change in adapter.changes.values():
        if isinstance(change, Replacement) and change.tensor == "score.weight":
            return adapter.files.shape(change.key)[0]
    raise ExportError(f"{adapter.path} is for a score head (SEQ_CLS) and does not hold score.weight: it is incomplete")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
