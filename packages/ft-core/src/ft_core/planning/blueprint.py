"""A model's sizes from its configuration alone: built by transformers on the meta device, which holds no numbers."""

from __future__ import annotations

import difflib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ft_core.config import LoraSettings, TrainConfig
from ft_core.errors import ConfigError, ModelError
from ft_core.models import gguf
from ft_core.models.source import ModelSource, check_local
from ft_core.planning.front import Front, stands_in

__all__ = ["Blueprint", "Matrix", "Outline", "find_outline", "outline_of"]


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weight, ``[out, into]``."""

    name: str
    out: int
    into: int

    @property
    def count(self) -> int:
        """Numbers of the weight."""
        return self.out * self.into


@dataclass(frozen=True)
class Outline:
    """What is trained, and how.

    Attributes:
        trained: how many numbers each trained tensor has, an adapter's and, in full training, the model's. whole: those
            of modules that are trained whole beside an adapter. targets: names of the adapted layers. rank: of an
            adapter.
        able: whether the fast layers' halves are one operation each. full: no adapter, all is trained.
    """

    trained: tuple[int, ...]
    targets: frozenset[str]
    rank: int
    able: bool
    full: bool
    whole: tuple[int, ...] = ()

    @property
    def all(self) -> tuple[int, ...]:
        """How many numbers each tensor has that the optimizer updates."""
        return self.trained + self.whole


@dataclass(frozen=True)
class Blueprint:
    """A model's sizes.

    Attributes:
        name: of the model. text: its text configuration. layout: of its family, None if that is unknown.
        names: of the parameters. apart: modules that stand before the layers, such as a vision tower.
        reason: why it has none. linears: all linear layers but the head. head: the head.
        tensors: how many numbers each parameter has. modules: names of all modules.
        used: the share of a mixture's experts that one token goes through. experts: numbers in stacked experts.
        stored: ``nf4`` or ``int8`` where the files are quantized already.
        dense: what ``all-linear`` adapts in a mixture; None for all linear layers.
    """

    name: str
    text: Any
    layout: Any
    reason: str
    linears: tuple[Matrix, ...]
    head: Matrix
    tensors: tuple[int, ...]
    modules: tuple[str, ...]
    used: float
    experts: int
    stored: str | None
    dense: tuple[str, ...] | None
    names: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    @property
    def inner(self) -> tuple[Matrix, ...]:
        """The linear layers of the language model alone."""
        return tuple(m for m in self.linears if not stands_in(m.name, self.apart)) if self.apart else self.linears

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(self.tensors)

    @property
    def used_numbers(self) -> float:
        """Numbers of the layers' matrices that one token is multiplied with; of a mixture's experts a share."""
        inner = self.inner
        routed = self.experts + sum(m.count for m in inner if ".experts." in m.name)
        return sum(m.count for m in inner) + self.experts - routed * (1 - self.used)

    @property
    def layers(self) -> int:
        """How many decoder layers."""
        return int(self.text.num_hidden_layers)

    @classmethod
    def of(
        cls, source: ModelSource, head: str = "language-model", auto: Any = None, apart: tuple[str, ...] = ()
    ) -> Blueprint:
        """Of a folder with a ``config.json``.

        Args:
            auto: transformers' auto class, where it is not that of ``head``. apart: see :class:`Blueprint`.

        Raises:
            ModelError: its configuration cannot be used.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

        from ft_core.fast.find import NotFast, layout_of
        from ft_core.models.loading import _first_sentence

        score = head == "score"
        auto = auto or (AutoModelForSequenceClassification if score else AutoModelForCausalLM)
        try:
            config = AutoConfig.from_pretrained(
                source.path, trust_remote_code=False, **({"num_labels": 1} if score else {})
            )
            stored = _stored(getattr(config, "quantization_config", None))
            with torch.device("meta"):
                model = auto.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        except Exception as error:  # an unknown type, a key missing, or a field that the class refuses
            raise ModelError(f"the model {source.reference} cannot be planned: {_first_sentence(error)}") from error
        layout, reason = None, ""
        try:
            layout = layout_of(model)
        except NotFast as why:
            reason = str(why)
        return cls._read(source.name, model, layout, reason, stored, score, apart)

    @classmethod
    def _read(
        cls, name: str, model: Any, layout: Any, reason: str, stored: str | None, score: bool, apart: tuple[str, ...]
    ) -> Blueprint:
        import torch

        text = model.config.get_text_config()
        output = getattr(model, "score", None) if score else model.get_output_embeddings()
        linears, head = [], None
        for path, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear) and type(module).__name__ != "Conv1D":  # GPT-2's, transposed
                continue
            sizes = tuple(module.weight.shape)
            out, into = sizes if isinstance(module, torch.nn.Linear) else sizes[::-1]
            matrix = Matrix(path, int(out), int(into))
            if module is output:
                head = matrix
            else:
                linears.append(matrix)
        if head is None:
            head = Matrix("", int(getattr(text, "vocab_size", 1)), int(text.hidden_size))
        tensors = tuple(parameter.numel() for parameter in model.parameters())
        experts = sum(p.numel() for path, p in model.named_parameters() if ".experts." in path and p.dim() == 3)
        linear_experts = any(".experts." in matrix.name for matrix in linears)
        share = _used(text) if experts or linear_experts else 1.0
        dense = None
        if share < 1.0:
            with suppress(Exception):  # a family whose experts PEFT does not know adapts all of its linear layers
                from ft_core.adapters import dense_targets

                found = dense_targets(model)
                dense = None if found is None else tuple(found)
        return cls(
            name=name, text=text, layout=layout, reason=reason, linears=tuple(linears), head=head,
            tensors=tensors, modules=tuple(path for path, _ in model.named_modules()), used=share, experts=experts,
            stored=stored, dense=dense, names=tuple(path for path, _ in model.named_parameters()), apart=apart,
        )  # fmt: skip

    def outline(self, lora: LoraSettings | None, front: Front | None = None) -> Outline:
        """What this adapter, or None, makes of the model; ``front`` says what is trained of what stands before it.

        Raises:
            ConfigError: a target or module that the model doesn't have.
        """
        front = front or Front()
        sizes = list(zip(self.names, self.tensors, strict=True)) if self.apart else []
        if lora is None:
            kept = [count for name, count in sizes if not stands_in(name, front.frozen)]
            return Outline(tuple(kept) if self.apart else self.tensors, frozenset(), 0, False, True)
        for key, wanted in (("targets", lora.targets), ("modules_to_save", lora.modules_to_save)):
            if isinstance(wanted, list):
                self._check_names(f"lora.{key}", wanted)
        names = self.dense if lora.targets == "all-linear" else tuple(lora.targets)
        targets, trained = [], []
        without = (*front.frozen, *front.whole)
        for matrix in self.linears:
            if without and stands_in(matrix.name, without):
                continue
            if names is None or any(matrix.name == n or matrix.name.endswith("." + n) for n in names):
                targets.append(matrix.name)
                trained += [lora.r * matrix.into, matrix.out * lora.r]
                trained += [matrix.out] if lora.dora else []
        for path in lora.modules_to_save or ():
            trained += [m.count for m in (*self.linears, self.head) if m.name == path or m.name.endswith("." + path)]
            if path.startswith("embed"):
                trained.append(self.head.count)
        layout = self.layout
        able = (
            layout is not None
            and not lora.dora
            and lora.bias == "none"
            and layout.norms.after_attention is None
            and layout.norms.after_mlp is None
            and layout.residual_scale == 1.0
            and len(layout.attention.qkv) == 3
            and len(layout.mlp.gate_up) == 2
        )
        whole = tuple(count for name, count in sizes if stands_in(name, front.whole))
        return Outline(tuple(trained), frozenset(targets), lora.r, able, False, whole)

    def _check_names(self, key: str, names: list[str]) -> None:
        lasts = dict.fromkeys(path.rpartition(".")[2] for path in self.modules)
        for name in names:
            if not any(path == name or path.endswith("." + name) for path in self.modules):
                close = difflib.get_close_matches(name, [last for last in lasts if not last.isdigit()], 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"{key}: the model has no module {name!r}{hint}")


def find_outline(config: TrainConfig) -> ModelSource:
    """:func:`outline_of` a configuration's model."""
    return outline_of(config.model)


def outline_of(reference: str) -> ModelSource:
    """Where a model's ``config.json`` is; weights need not be there.

    A folder on this machine goes before a Hub name. Of a GGUF file the header is read, and of a Hub name only
    ``config.json`` is asked for, and only if it is not in the cache.

    Raises:
        ModelError: there is none.
    """
    local = Path(reference).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"model {local} has no config.json: it is no transformers model folder")
        return ModelSource(reference, local.resolve(), local.resolve().name)
    check_local(reference)
    if local.is_file() or reference.startswith("package:"):
        path, name = gguf.outline(reference)
        return ModelSource(reference, path, name)
    return ModelSource(reference, _from_hub(reference), reference, is_hub=True)


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent
    try:
        HfApi().model_info(name, timeout=20)  # asked once, where a download would be tried for half a minute
        return Path(hf_hub_download(name, "config.json")).parent
    except GatedRepoError:
        reason = "is gated: accept its terms on its Hub page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is no folder here, and is not on the Hub (a private one needs `hf auth login`)"
    except Exception as error:  # whatever the network, the Hub or its client has
        reason = (
            "is no folder here and not in the Hub's cache, and its config.json cannot be fetched "
            f"({type(error).__name__}): check the name or the connection, or give a folder with a config.json"
        )
    raise ModelError(f"model {name!r} {reason}")


def _stored(quantization: Any) -> str | None:
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    four = bool(values.get("load_in_4bit")) or values.get("bits", values.get("num_bits")) == 4
    return "nf4" if four else "int8"


def _used(text: Any) -> float:
    """The share of a mixture's experts that one token goes through."""
    values = json.loads(text.to_json_string(use_diff=False))
    of = next((values[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if values.get(k)), None)
    some = next((values[k] for k in ("num_experts_per_tok", "moe_topk", "top_k") if values.get(k)), None)
    return min(float(some) / float(of), 1.0) if of and some else 1.0
