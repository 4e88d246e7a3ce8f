"""What a plan knows of a model that sees: its tower, its projector, and how many of the data's tokens are images."""

from __future__ import annotations

import copy
import functools
import logging
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ft_core.errors import DataError, FtError, ModelError
from ft_core.models import load_tokenizer
from ft_core.planning.front import Front, stands_in
from ft_vision.documents import image_token_of
from ft_vision.families.parts import family_of
from ft_vision.loading import load_processor, settings_of
from ft_vision.tower import Counted, count_tower

if TYPE_CHECKING:
    from ft_core.config import LoraSettings, TrainConfig
    from ft_core.models import ModelSource

__all__ = ["VisionFronts", "materialize"]

log = logging.getLogger(__name__)

SAMPLED = 64
"""Rows of the data whose images are counted: their headers are read."""
ROUGH = "the vision tower's memory is counted, but no plan with one was measured on a GPU; nor were its times"


class VisionFronts:
    """The tower and the projector of one model; an :class:`ft_core.planning.front.Fronts`.

    Args:
        config: a configuration of it, whose data say how many tokens are images.
        source: the model's folder, of which ``config.json`` is read; its processor too, where it is there.

    Attributes:
        auto, modules: see there.

    Raises:
        ModelError: the model is of no family that is known.
    """

    def __init__(self, config: TrainConfig, source: ModelSource) -> None:
        from transformers import AutoModelForImageTextToText

        from ft_vision.loading import config_of

        self.auto: Any = AutoModelForImageTextToText
        self._config, self._name = config_of(source), source.reference
        self._family = family_of(self._config, source.reference)
        tower, projector = (
            tuple(f"model.{name}" for name in names) for names in (self._family.tower, self._family.projector)
        )
        self._tower, self._projector = tower, projector
        self.modules = tower + projector
        self._share, self._row_tokens, self._seen = _sampled(config, source, image_token_of(self._config))
        self._count = functools.lru_cache(maxsize=16)(self._counted)

    def __call__(self, config: TrainConfig) -> Front:
        """See :class:`ft_core.planning.front.Fronts`."""
        settings = settings_of(config)
        each = ((settings.tower, self._tower), (settings.projector, self._projector))
        frozen, whole = (
            tuple(n for how, names in each if how == wanted for n in names) for wanted in ("frozen", "full")
        )
        lora = None if config.lora is None else config.lora.model_dump_json()
        counted, flops, depth = self._count(frozen, whole, lora, False)
        again = counted.kept
        if counted.kept and settings.tower != "frozen":
            again = self._count(frozen, whole, lora, True)[0].kept
        vision, text = self._config.vision_config, self._config.get_text_config()
        hidden = int(vision.hidden_size)
        inner = int(getattr(vision, "intermediate_size", 0) or 4 * hidden)
        patches = counted.patches / counted.tokens
        deep = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        beside = f", as in the first {self._seen} rows" if self._seen else ""
        return Front(
            frozen=frozen,
            whole=whole,
            share=self._share,
            inputs=4 * counted.pixels / counted.tokens,
            kept=counted.kept / counted.tokens,
            kept_again=again / counted.tokens,
            layer=(counted.kept - again) / max(depth, 1) / counted.tokens,
            features=2 * int(text.hidden_size) * (1 + deep),
            # a layer's perceptron and its norm in 32 bits; forward or backward, of each the larger half
            work=patches * (4 * inner + 12 * hidden),
            flops=flops / counted.tokens,
            passes={"frozen": 1.0, "lora": 2.0, "full": 3.0}[settings.tower],
            copies=counted.copies if config.lora is None or whole else 0,
            itemsize=4,
            row_tokens=self._row_tokens,
            notes=(f"images are assumed to be {self._share:.0%} of a row's tokens{beside}", ROUGH),
        )

    def _counted(
        self, frozen: tuple[str, ...], whole: tuple[str, ...], lora: str | None, again: bool
    ) -> tuple[Counted, float, int]:
        """Of one image: what is counted, operations of its tower's forward pass, and the tower's layers.

        Args:
            again: whether those are computed again in backward.
        """
        import torch

        config = copy.deepcopy(self._config)
        text = config.get_text_config()
        text.num_hidden_layers = 1
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
        with torch.device("meta"):
            model = self.auto.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        tower = [m for n, m in model.named_modules() if stands_in(n, self._tower) and isinstance(m, torch.nn.Linear)]
        numbers = sum(m.weight.numel() for m in tower)
        blocks = _blocks(model, self._tower)
        depth = len(model.get_submodule(blocks)) if blocks else 0
        model = materialize(model, frozen, whole, None if lora is None else _settings(lora), self.modules)
        for layer in model.get_submodule(blocks) if blocks else ():
            layer.gradient_checkpointing = again
        try:
            counted = count_tower(model, self._family.has_grids, blocks)
        except ValueError as error:
            raise ModelError(f"the model {self._name} cannot be planned: its tower takes no image ({error})") from error
        scores = 4.0 * counted.patches * int(config.vision_config.hidden_size) * depth
        return counted, counted.patches * (2.0 * numbers + scores), depth


def _settings(lora: str) -> LoraSettings:
    from ft_core.config import LoraSettings

    return LoraSettings.model_validate_json(lora)


def materialize(
    model: Any, frozen: tuple[str, ...], whole: tuple[str, ...], lora: LoraSettings | None, modules: tuple[str, ...]
) -> Any:
    """A model on the meta device, with what stands before its layers on the CPU, as it is trained; numbers of no
    meaning.

    Args:
        frozen, whole: see :class:`ft_core.planning.front.Front`. lora: the adapter, on what else there is.
        modules: what stands before the layers.
    """
    import torch

    from ft_core.adapters import inject_lora

    inside = _language_model(model)
    for path, module in list(model.named_modules()):
        if path == inside or path.startswith(f"{inside}.") or not path.startswith("model"):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            full, is_whole = lora is None, stands_in(f"{path}.{name}", whole)
            dtype = torch.float32 if full or is_whole else parameter.dtype  # what is trained itself is in 32 bits
            trained = (full and not stands_in(f"{path}.{name}", frozen)) or is_whole
            empty = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=trained))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype), persistent=False)
    adapted = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and stands_in(path, modules) and not stands_in(path, (*frozen, *whole))
    ]
    if lora is not None and lora.targets != "all-linear":
        adapted = [path for path in adapted if path.rpartition(".")[2] in lora.targets or path in lora.targets]
    if lora is not None and adapted:
        inject_lora(model, r=lora.r, alpha=2 * lora.r, dropout=lora.dropout, targets=adapted)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
            elif not stands_in(name.replace(".base_layer", ""), whole):
                parameter.requires_grad_(False)
    return model.train()


def _language_model(model: Any) -> str:
    """The path of the text model, which no tower lies in."""
    inner = model.get_decoder()
    return str(next(path for path, module in model.named_modules() if module is inner))


def _blocks(model: Any, tower: tuple[str, ...]) -> str | None:
    """The longest list of modules in the tower, by its path: its layers."""
    import torch

    lists = {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and stands_in(path, tower)
    }
    return max(lists, key=lambda path: lists[path]) if lists else None


def _sampled(config: TrainConfig, source: ModelSource, token: int) -> tuple[float, float | None, int]:
    """Of the first rows of the data: the largest share of images in a row of the training, the mean tokens of one, and
    how many rows were looked at. All tokens are taken for images where that cannot be told."""
    try:
        return _look(config, source, token)
    except FtError:  # what is wrong with the data is said when it is read for training
        log.debug("the images of the data are not counted", exc_info=True)
        return 1.0, None, 0


def _look(config: TrainConfig, source: ModelSource, token: int) -> tuple[float, float | None, int]:
    from ft_core.config.load import method_settings
    from ft_core.data import Packed, RowStream
    from ft_core.plugins import MethodSpec, registry
    from ft_vision.documents import VisionRenderer, tokenize
    from ft_vision.rows import normalise

    names = [config.data] if isinstance(config.data, str) else [one.path for one in config.data]
    if not all(Path(name).expanduser().exists() for name in names):
        return 1.0, None, 0  # the Hub is not asked for data by a plan
    formats = registry().get(MethodSpec, config.method).formats
    rows = list(islice(RowStream(config.data, formats, form=normalise), SAMPLED))
    renderer = VisionRenderer(load_processor(source, config, load_tokenizer(source)))
    train_on: Literal["answers", "all"] = getattr(method_settings(config), "train_on", "answers")
    tokenized = functools.partial(tokenize, rows, renderer, max_length=config.max_length, train_on=train_on)
    try:
        tokens, _ = tokenized()  # headers alone are read
    except DataError:
        tokens, _ = tokenized(on_bad_image="skip")
    if not len(tokens):
        return 1.0, None, 0
    images = [tokens[number]["input_ids"].count(token) for number in range(len(tokens))]
    lengths = tokens.lengths
    packed = Packed(tokens, config.max_length).documents if config.packing else [[i] for i in range(len(tokens))]
    share = max(sum(images[i] for i in row) / sum(lengths[i] for i in row) for row in packed)
    return share, sum(lengths) / len(rows), len(rows)
