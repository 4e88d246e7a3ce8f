"""Merge an adapter into its base: fp32 arithmetic, a 16-bit model, two checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export import __version__
from ft_export.bases import (
    copy_tokenizer,
    find_base,
    load_model,
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
    KEY,
    clear_unfinished,
    new_folder,
    refuse_existing_folder,
    require_space,
    unfinished_bytes,
)
from ft_export.merging.adapter import Adapter, Replacement
from ft_export.merging.logprobs_check import LogprobsCheck, as_trained, check_logprobs, gap_to_quantized
from ft_export.merging.outline import Outline
from ft_export.merging.record import MARKER, check_unchanged, fingerprint, is_current, sums
from ft_export.merging.tensors import merged_tensors
from ft_export.merging.weights_check import WeightsCheck, check_weights
from ft_export.progress import Progress, silent
from ft_export.runs import Source, open_source
from ft_export.samples import Row, read_rows, token_ids
from ft_export.writing import write_model

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "MARKER", "MergeResult", "check_unchanged", "fingerprint", "is_current", "merge"]

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
    base: str | None = None,
    dtype: str | None = None,
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
        base: a folder or Hub name to use in place of the one that the adapter names.
        dtype: ``bfloat16`` or ``float16``; by default the base's own, bfloat16 for an fp32 base.
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
    target = Path(out).expanduser() if out is not None else source.path / "merged"
    refuse_existing_folder(target, MARKER, overwrite)
    adapter = Adapter(source.adapter)
    reference = base or adapter.base or source.base
    if not reference:
        raise ExportError(f"{adapter.folder / 'adapter_config.json'} names no base model: name it with ft merge --base")
    folder = find_base(reference)
    for taken in (source.path, source.adapter, folder):
        if same_folder(target, taken):
            raise ExportError(f"the merged model cannot be written over its own source {taken}: choose another --out")
    return _Merge(source, adapter, folder, reference, dtype, target, skip_proof, say, progress).run()


class _Merge:
    """One merge; the steps share what they found on the way."""

    def __init__(
        self,
        source: Source,
        adapter: Adapter,
        base: Path,
        reference: str,
        dtype: str | None,
        out: Path,
        skip_proof: bool,
        say: Callable[[str], None] | None,
        progress: Progress,
    ) -> None:
        self.source, self.adapter, self.base, self.reference = source, adapter, base, reference
        self.trained_on, self.rope = base, source.rope
        self.out = out
        self.asked, self.skip_proof = dtype, skip_proof
        self.lines: list[str] = []
        self._say = say
        self.progress = progress
        self.labels = _labels(adapter)

    def say(self, line: str) -> None:
        self.lines.append(line)
        if self._say:
            self._say(line)

    def run(self) -> MergeResult:
        method = quantization_of(self.base)
        as_run = self.source.quantization if method is None and self.source.on_quantized else None
        stored = Checkpoint(self.base)  # checks the files before anything is loaded
        stop_tokens(load_tokenizer(tokenizer_folder(self.adapter.folder, self.base)), self.base)
        key = self._key(stored) if method is None and as_run is None else None
        clear_unfinished(self.out, key)  # before the space is asked for, of which it may hold much
        # 16-bit weights of a packed 4-bit base take up to four times its bytes, twice: base and merged model
        size = stored.parameters() * (16 if method is not None else 4 if as_run is not None else 2)
        there = 0 if key is None else unfinished_bytes(self.out, key)
        require_space(self.out.parent, int(size * 1.02) + 50_000_000 - there, "the merged model")
        with new_folder(self.out, key) as folder:
            for path in folder.iterdir():  # all but whole files of weights is made anew
                if path.suffix != ".safetensors" and path.name != KEY:
                    _remove(path) if path.is_dir() else path.unlink()
            if whole := len(list(folder.glob("*.safetensors"))):
                self.say(f"going on with a merge that was interrupted, of which {whole} files are there")
            if method is not None or as_run is not None:
                self._dequantize(folder / "base", method, as_run)
                stored = Checkpoint(self.base)
            report = self._into(folder, stored)
            if folder in self.base.parents:
                _remove(folder / "base")
            text = json.dumps(report.pop("json"), indent=2, ensure_ascii=False) + "\n"
            (folder / MARKER).write_text(text, encoding="utf-8")
        return MergeResult(self.out, report["weights"], report["logprobs"], tuple(self.lines))

    def _key(self, stored: Checkpoint) -> str:
        """What the merged files are made from; two merges with the same key write the same bytes."""
        files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in stored.files]
        rope = None if self.rope is None else asdict(self.rope)
        said = [__version__, fingerprint(self.adapter.folder), str(self.base.resolve()), files, self.asked, rope]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def _dequantize(self, to: Path, method: str | None, as_run: str | None) -> None:
        """Write the base without its quantization (its own, or that of the run) and go on with that."""
        import torch

        if method is not None and method not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
            raise ExportError(
                f"the base {self.base} is quantized by {method}: name an unquantized base with ft merge --base"
            )
        if not _importable("bitsandbytes"):
            what = "is quantized" if method is not None else "was quantized in the run, with loftq"
            raise ExportError(f"the base {self.base} {what}: pip install bitsandbytes")
        dtype = torch.float16 if self.asked == "float16" else torch.bfloat16
        self.progress(0, 0, "loading the base, to write it without its quantization")
        if as_run is None:
            model = load_model(self.base, dtype, labels=self.labels, rope=self.rope)
        else:  # from weights of the format that the run quantized
            was = getattr(torch, self.source.dtype or "bfloat16", torch.bfloat16)
            held = as_trained(as_run, was)
            model = load_model(self.base, was, labels=self.labels, rope=self.rope, quantization_config=held)
        model = model.dequantize(dtype=dtype).to(dtype)
        # a model that was loaded quantized cannot be saved as what it now is; a plain one of its class can
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with torch.device("meta"):
            plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(to)
        for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
            if (self.base / name).is_file():
                (to / name).write_bytes((self.base / name).read_bytes())
        why = f"is itself quantized ({method})" if as_run is None else f"was held in {as_run}, where the adapter began"
        self.say(f"the base {self.reference} {why}: merged into its dequantized weights")
        self.base = to

    def _into(self, folder: Path, stored: Checkpoint) -> dict[str, Any]:
        import torch

        was = stored.widest_float()
        dtype = getattr(torch, self.asked) if self.asked else (torch.bfloat16 if was == torch.float32 else was)
        if dtype not in (torch.bfloat16, torch.float16):
            raise ExportError(f"the base {self.base} has weights of type {was}: only 32- and 16-bit bases are merged")
        outline = Outline(self.base, stored, self.labels, self.rope)
        self.adapter.check_shapes(outline.shapes)
        tensors = merged_tensors(stored, self.adapter, outline, outline.loosen(self.adapter), dtype)
        write_model(folder, tensors, progress=self.progress)
        outline.save_config(folder, dtype)
        if (self.base / GENERATION).is_file():
            (folder / GENERATION).write_bytes((self.base / GENERATION).read_bytes())
        written = outline.rename(Checkpoint(folder))
        tokenizer_from = copy_tokenizer(self.adapter.folder, self.base, folder)
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
        if self.labels is None:
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
        report = {
            "merge_format": 1,
            "ft_export": __version__,
            "libraries": _versions(),
            "base": self.reference,
            "base_dtype": _name(was),
            "dtype": _name(dtype),
            "dequantized_base": folder in self.base.parents,
            "adapter": str(self.adapter.folder),
            "adapter_sha256": fingerprint(self.adapter.folder),
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
        rows = read_rows(self.source.held_out)
        samples = _samples(rows, tokenizer) or _samples(read_rows(None), tokenizer)
        rounded = set(self.adapter.changes) if dtype == was else None
        logprobs = check_logprobs(
            folder, self.base, self.adapter, samples, dtype, rounded, self.labels, self.rope, self.progress
        )
        unit = "scores" if self.labels is not None else "log-probabilities"
        self.say(
            f"{unit} of {logprobs.merged.tokens} tokens, merged against adapter on its base: largest difference "
            f"{logprobs.merged.largest:.2e} (bound {logprobs.bound_largest:.2e}), mean {logprobs.merged.mean:.2e} "
            f"(bound {logprobs.bound_mean:.2e})"
        )
        base = self.trained_on if self.source.on_quantized else self.base
        gap = gap_to_quantized(
            self.source.quantization, base, self.adapter, samples, logprobs, self.labels, self.rope, self.progress
        )
        if gap is not None:
            self.say(
                f"{unit} against the {self.source.quantization} run: "
                + (f"largest {gap['largest']:.2e}, mean {gap['mean']:.2e}" if "mean" in gap else gap["not_measured"])
            )
        return logprobs, gap


def _samples(rows: list[Row], tokenizer: Any) -> list[list[int]]:
    return [ids for ids in (token_ids(row, tokenizer) for row in rows) if len(ids) > 1]


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


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
