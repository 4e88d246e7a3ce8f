"""The second check of a ``model.bin``: CTranslate2 decodes sounds greedily, and transformers reads along.

CTranslate2 is given the features of each sound and the tokens before a text, and writes greedily, with what the model's
generation configuration forbids forbidden. transformers, in fp32 and with the file's weights, reads the same tokens. Of
each step the log-probabilities of the five likeliest tokens are compared, and the token that was taken.

- What is forbidden in CTranslate2 has to be exactly what ``generation_config.json`` forbids.
- In a float type both compute in fp32 here: log-probabilities may differ by ``FLOAT_FACTOR`` times what two fp32
  evaluations of one function may (:func:`ft_export.logprobs.evaluation_error`; measured on Whisper base: 0.13 times).
- In 8 bits CTranslate2 rounds what goes into each product as well, in 8 bits with a scale for each row. The same is
  done to transformers' layers, and the error that it makes on the same tokens is the yardstick: the largest error may
  be ``LARGEST_FACTOR`` times its largest, the mean ``MEAN_FACTOR`` times its mean (measured on Whisper base: 0.5 times
  the largest, 1.0 times the mean).
- Where the token that was taken is not transformers' likeliest, the two must be closer than twice the largest error:
  each may be off by that much. So every token whose best two are further apart is equal.
- ``SHARES`` of all tokens have to be the likeliest of the merged model too, before its weights were rounded: what the
  type costs. In float types that is nearly all: the rounding of weights may turn a tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_export.bases import load_model
from ft_export.ctranslate2.layout import variables_of
from ft_export.ctranslate2.reading import ModelFile
from ft_export.errors import ExportError
from ft_export.hearing import feature_extractor, features_of
from ft_export.logprobs import evaluation_error
from ft_export.progress import Progress, counting, silent
from ft_export.runs import read_json
from ft_export.samples import read_rows
from ft_export.seeing import told
from ft_export.sounds import sound_of

if TYPE_CHECKING:
    import torch

__all__ = ["SHARES", "Decoded", "check_decoding"]

SOUNDS = 6
NEW_TOKENS = 24
CANDIDATES = 5
FLOAT_FACTOR = 4.0
LARGEST_FACTOR, MEAN_FACTOR = 4.0, 3.0
SHARES = {"float16": 0.98, "float32": 0.98, "int8": 0.75}
"""By type, the share of greedy tokens that are the merged model's likeliest."""
FORBIDDEN = -1e9
"""CTranslate2 puts the lowest number of fp32 in the place of what may not be said."""
CODES = 127


@dataclass(frozen=True)
class Decoded:
    """What was compared; log-probabilities in nats.

    Attributes:
        sounds: how many. tokens: that CTranslate2 wrote for them, ends included.
        equal: how many of them are the likeliest of transformers with the file's weights.
        equal_before: how many are the likeliest of the merged model.
        close: how much likelier the other token was where they differ, at most.
        largest, mean: error of log-probabilities.
        bound_largest, bound_mean: what they may be.
        text: what was written for the first sound.
    """

    sounds: int
    tokens: int
    equal: int
    equal_before: int
    close: float
    largest: float
    mean: float
    bound_largest: float
    bound_mean: float
    text: str

    def lines(self, type: str) -> list[str]:
        close = "" if self.equal == self.tokens else f", the others within {self.close:.2g} nats of it"
        return [
            f"CTranslate2 wrote {self.tokens} tokens for {self.sounds} sounds: {self.equal} are transformers' "
            f"likeliest with the file's weights{close}; {self.equal_before} are the merged model's "
            f"({self.equal_before / self.tokens:.0%}, {SHARES[type]:.0%} are asked for)",
            f"log-probabilities against transformers: largest difference {self.largest:.2e} (bound "
            f"{self.bound_largest:.2e}), mean {self.mean:.2e} (bound {self.bound_mean:.2e})",
        ]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Run:
    """A sound, what CTranslate2 wrote, and the scores that it chose from: ``[tokens, vocabulary]``."""

    features: torch.Tensor
    ids: tuple[int, ...]
    scores: torch.Tensor
    made: str


def check_decoding(
    folder: Path, model: Path, held_out: Path | None, tokenizer: Any, type: str, lines: list[str],
    progress: Progress = silent,
) -> Decoded:  # fmt: skip
    """Load ``folder`` in CTranslate2 and compare with the transformers model in ``model``.

    Args:
        held_out: a file of rows to take sounds from; sounds are made without.
        type: of the file, one of :data:`SHARES`.
        lines: gets what was found.

    Raises:
        ExportError: CTranslate2 cannot load it, or says something else than the model.
    """
    import torch

    progress(0, 0, "loading the model in fp32")
    exact = load_model(model, torch.float32)
    config = exact.config
    prompt = _prompt(tokenizer, config, model)
    forbidden = _forbidden(model)
    rows = read_rows(held_out, SOUNDS)
    runs = _written(folder, model, rows, prompt, config, type, progress)
    for number, run in enumerate(runs, 1):
        _check_forbidden(run, forbidden, number)
    lines.append(f"sounds: {told((run.made for run in runs), 'made')}")

    def read(what: str) -> list[torch.Tensor]:
        step = counting(progress, len(runs), what)
        return [_along(exact, prompt, run, step) for run in runs]

    before = read("sounds heard by the merged model")
    _put(exact, ModelFile(folder / "model.bin"))
    with_file = read("sounds heard with the file's weights")
    near = with_file
    if type == "int8":
        with _rounded_inputs(exact):
            near = read("sounds heard with rounded inputs")
    found = _compared(runs, before, with_file, near, type, tokenizer)
    lines.extend(found.lines(type))
    return found


def _written(
    folder: Path, model: Path, rows: Sequence[dict[str, Any]], prompt: list[int], config: Any, type: str,
    progress: Progress,
) -> list[_Run]:  # fmt: skip
    """What CTranslate2 writes for the rows' sounds, on the processor."""
    import ctranslate2
    import numpy as np
    import torch

    extractor = feature_extractor(model)
    computed = "int8_float32" if type == "int8" else "float32"
    # it takes half of that for what is new, as Whisper keeps the other half for the text before
    most = min(2 * NEW_TOKENS, config.max_target_positions)
    try:
        engine = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type=computed)
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"CTranslate2 cannot load the model: {error}") from error
    step = counting(progress, len(rows), "sounds heard by CTranslate2")
    runs = []
    for seed, row in enumerate(rows):
        sound = sound_of(row, extractor.sampling_rate, min(float(extractor.chunk_length), 30.0), seed)
        features = features_of(extractor, sound, config)["input_features"].float()
        try:
            said = engine.generate(
                ctranslate2.StorageView.from_array(np.ascontiguousarray(features.numpy())), [prompt], beam_size=1,
                max_length=most, return_logits_vocab=True,
            )[0]  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"CTranslate2 cannot hear with the model: {error}") from error
        scores = torch.from_numpy(np.stack([np.array(step) for step in said.logits[0]]))
        ids = [int(token) for token in said.sequences_ids[0]]
        if len(scores) == len(ids) + 1:  # it keeps the end to itself
            ids.append(int(config.eos_token_id))
        if len(scores) != len(ids):
            raise ExportError(f"CTranslate2 wrote {len(ids)} tokens and scores for {len(scores)}")
        runs.append(_Run(features, tuple(ids), scores, sound.made))
        step()
    return runs


def _prompt(tokenizer: Any, config: Any, model: Path) -> list[int]:
    """The tokens before a text: the start, English and transcribing where the model has languages, and no times."""
    vocabulary = tokenizer.get_vocab()
    names = [tokenizer.convert_ids_to_tokens(config.decoder_start_token_id)]
    names += ["<|en|>", "<|transcribe|>"] if _generation(model).get("is_multilingual", True) else []
    return [int(vocabulary[name]) for name in (*names, "<|notimestamps|>") if name in vocabulary]


def _forbidden(model: Path) -> tuple[set[int], set[int]]:
    """What may not be said anywhere, and at the beginning, as the model's generation configuration has it."""
    said = _generation(model)
    always = {int(token) for token in said.get("suppress_tokens") or []}
    return always, always | {int(token) for token in said.get("begin_suppress_tokens") or []}


def _generation(model: Path) -> dict[str, Any]:
    path = model / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _check_forbidden(run: _Run, forbidden: tuple[set[int], set[int]], number: int) -> None:
    for step, scores in enumerate(run.scores):
        found = set((scores < FORBIDDEN).nonzero().flatten().tolist())
        right = forbidden[1] if step == 0 else forbidden[0]
        if found != right:
            token = min(found ^ right)
            does = "forbids" if token in found else "does not forbid"
            raise ExportError(
                f"CTranslate2 {does} token {token} at step {step + 1} of sound {number}, unlike generation_config.json"
            )


def _along(model: Any, prompt: list[int], run: _Run, step: Any) -> torch.Tensor:
    """Log-probabilities from which each token would be chosen, what CTranslate2 forbids left out."""
    import torch

    ids = torch.tensor([[*prompt, *run.ids[:-1]]])
    with torch.inference_mode():
        scores = model(input_features=run.features, decoder_input_ids=ids, use_cache=False).logits[0].float()
    step()
    return _logprobs(scores[len(prompt) - 1 :], run)


def _logprobs(scores: torch.Tensor, run: _Run) -> torch.Tensor:
    import torch

    return torch.log_softmax(scores.masked_fill(run.scores < FORBIDDEN, -torch.inf), -1)


def _put(model: Any, file: ModelFile) -> None:
    """Give a transformers model the weights that a file stands for."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parts in variables_of(model.config).items():
        values = file.values(name)
        start = 0
        for part in parts:
            if part.parameter is not None:
                parameters[part.parameter].data.copy_(values[start : start + part.rows])
            start += part.rows


@contextmanager
def _rounded_inputs(model: Any) -> Iterator[None]:
    """Let each product round what goes into it, in 8 bits with a scale for each row, as CTranslate2 does."""
    import torch

    def rounded(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        scale = CODES / inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-30)
        return ((inputs[0] * scale).round() / scale, *inputs[1:])

    hooks = [
        module.register_forward_pre_hook(rounded) for module in model.modules() if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _compared(
    runs: Sequence[_Run], before: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], near: Sequence[torch.Tensor],
    type: str, tokenizer: Any,
) -> Decoded:  # fmt: skip
    import torch

    errors, yardstick, gaps = [], [], []
    equal = equal_before = tokens = 0
    for run, first, right, coarse in zip(runs, before, exact, near, strict=True):
        written, taken = _logprobs(run.scores, run), torch.tensor(run.ids)
        places = right.topk(min(CANDIDATES, right.shape[-1])).indices
        errors.append((written.gather(1, places) - right.gather(1, places)).abs().flatten())
        yardstick.append((coarse.gather(1, places) - right.gather(1, places)).abs().flatten())
        gaps.append(right.amax(-1) - right.gather(1, taken[:, None])[:, 0])
        equal += int((right.argmax(-1) == taken).sum())
        equal_before += int((first.argmax(-1) == taken).sum())
        tokens += len(run.ids)
    error, rough, gap = torch.cat(errors), torch.cat(yardstick), torch.cat(gaps)
    floor = FLOAT_FACTOR * evaluation_error([rows[rows.isfinite()] for rows in exact])
    found = Decoded(
        sounds=len(runs), tokens=tokens, equal=equal, equal_before=equal_before, close=gap.max().item(),
        largest=error.max().item(), mean=error.mean().item(),
        bound_largest=LARGEST_FACTOR * rough.max().item() + floor, bound_mean=MEAN_FACTOR * rough.mean().item() + floor,
        text=tokenizer.decode(runs[0].ids, skip_special_tokens=True),
    )  # fmt: skip
    # written so that what is not a number fails
    if not (found.largest <= found.bound_largest and found.mean <= found.bound_mean):
        raise ExportError(
            f"CTranslate2 does not say what the model says: log-probabilities are off by up to {found.largest:.3g} "
            f"(bound {found.bound_largest:.3g}), {found.mean:.3g} on average (bound {found.bound_mean:.3g})"
        )
    if not found.close <= 2 * max(found.largest, rough.max().item()):
        raise ExportError(
            f"CTranslate2 takes a token that is {found.close:.3g} nats less likely than the likeliest, where its "
            f"log-probabilities are off by {found.largest:.3g} at most"
        )
    if not equal_before >= SHARES[type] * tokens:
        raise ExportError(
            f"of {tokens} tokens that CTranslate2 writes in {type} {equal_before} are the model's likeliest, fewer "
            f"than {SHARES[type]:.0%}: use --type float16"
        )
    return found
