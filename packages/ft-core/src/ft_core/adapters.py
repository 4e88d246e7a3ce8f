"""Attaches a standard PEFT adapter to a model."""

from __future__ import annotations

import copy
import difflib
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from ft_core.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["add_lora", "dense_targets", "inject_lora"]

EXPERT_PARTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""Names that PEFT reads as the router or parts of the experts where a model keeps its experts in stacked tensors."""


def add_lora(
    model: PreTrainedModel,
    r: int = 16,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    rslora: bool = False,
    dora: bool = False,
    bias: str = "none",
    modules_to_save: list[str] | None = None,
    init_lora_weights: Literal[True, "gaussian", "loftq"] = True,
    exclude: str | None = None,
) -> PeftModel:
    """Attach a LoRA adapter (Hu et al. 2021, arXiv:2106.09685): y = W x + (alpha/r) B A x, B starting at zero.

    Args:
        model: a transformers model, quantized or not. It is wrapped, its weights frozen.
        r: rank of the update.
        alpha: scaling numerator; unset means 2r.
        dropout: dropout on x.
        targets: ``all-linear`` (every linear layer save the head; the experts of a mixture stay frozen, see
            :func:`dense_targets`) or names of linear modules, such as ``q_proj``.
        rslora, dora, bias, modules_to_save, init_lora_weights: as in :class:`ft_core.config.LoraSettings`.
        exclude: a regular expression; modules whose whole name it matches stay as they are (``exclude_modules``).

    Returns:
        A ``peft.PeftModel``; any transformers or TRL trainer runs it. The adapter's weights are float32. On a GPU a
        model of a known family computes with the fast layers from here on (:mod:`ft_core.fast`).

    Raises:
        ConfigError: a target or module that the model doesn't have, or a start that it cannot have.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    if init_lora_weights not in (True, "gaussian", "loftq"):
        raise ConfigError(
            f"lora.init_lora_weights: {init_lora_weights!r} is not allowed (allowed: true, gaussian, loftq)"
        )
    if init_lora_weights == "loftq" and dora:
        raise ConfigError("lora.init_lora_weights: loftq and lora.dora exclude each other: give one")
    for key, names in (("targets", targets), ("modules_to_save", modules_to_save)):
        if isinstance(names, list):
            _check_names(model, f"lora.{key}", names)
    is_score = type(model).__name__.endswith("ForSequenceClassification")
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # PEFT takes any number
        lora_dropout=dropout,
        exclude_modules=exclude,
        target_modules=(dense_targets(model) or targets) if targets == "all-linear" else targets,
        use_rslora=rslora,
        use_dora=dora,
        bias=bias,
        modules_to_save=modules_to_save,
        # LoftQ replaces the weights below; recorded, it would be done again whenever PEFT loads the adapter.
        init_lora_weights=True if init_lora_weights == "loftq" else init_lora_weights,
        # PEFT's classes for a task hand on token ids, which a model that is given something else does not take.
        task_type=TaskType.SEQ_CLS if is_score else TaskType.CAUSAL_LM if _takes_ids(model) else None,
    )
    if _adapts_experts(config, model):
        parts = [name for name in targets if name.rpartition(".")[2] in EXPERT_PARTS]
        raise ConfigError(
            f"lora.targets: {', '.join(parts)} would adapt this model's experts or router, which cannot be merged "
            "again; leave them out"
        )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora cannot be attached: {error}") from error
    if init_lora_weights == "loftq":
        from ft_core.loftq import init_loftq

        init_loftq(adapted)
    if next(model.parameters()).device.type == "cuda":
        from ft_core import fast

        with suppress(fast.NotFast):  # `ft train` says why
            fast.enable(adapted)
    return adapted


def _takes_ids(model: Any) -> bool:
    return bool(getattr(model, "main_input_name", "input_ids") == "input_ids")


def inject_lora(model: Any, *, r: int, alpha: float, dropout: float, targets: list[str]) -> None:
    """Put LoRA into these linear layers, by their paths, of anything that has some; without PEFT's wrapping."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets), model)


def dense_targets(model: PreTrainedModel) -> list[str] | None:
    """The linear layers that ``all-linear`` adapts in a mixture of experts, by the last part of their names.

    For some families (Qwen3-MoE, DeepSeek-V3) PEFT's own ``all-linear`` adds adapters to the stacked tensors of experts
    and to the router, which are no layers; those cannot be merged into the model yet, so experts and router stay
    frozen. So does a dense layer named like a part of an expert (``up_proj``), since PEFT takes its name for that part.

    Returns:
        None for any other model, where ``all-linear`` means what PEFT makes of it.
    """
    import torch
    from peft import LoraConfig

    if not _adapts_experts(LoraConfig(target_modules="all-linear"), model):
        return None
    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return sorted(names.difference(EXPERT_PARTS, ("score", "classifier")))


def _adapts_experts(config: Any, model: Any) -> bool:
    """Whether PEFT turns some of the targets into adapters on tensors, as it does when it attaches the adapter."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, model, None)
    except ValueError:  # said when the adapter is attached
        return False
    return bool(converted.target_parameters)


def _check_names(model: Any, key: str, names: list[str]) -> None:
    modules = [name for name, module in model.named_modules() if name and not list(module.children())]
    lasts = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    lasts = [name for name in lasts if not name.isdigit()]
    allowed = modules
    if key == "lora.modules_to_save":  # a module of several layers can be trained whole too
        allowed = [name for name, _ in model.named_modules() if name]
    for name in names:
        if not any(module == name or module.endswith("." + name) for module in allowed):
            close = difflib.get_close_matches(name, lasts, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{key}: the model has no module {name!r}{hint} (it has: {', '.join(lasts)})")
