"""Attaches a standard PEFT adapter to a model."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from ft_core.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["add_lora"]


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
) -> PeftModel:
    """Attach a LoRA adapter (Hu et al. 2021, arXiv:2106.09685): y = W x + (alpha/r) B A x, B starting at zero.

    Args:
        model: a transformers model, quantized or not. It is wrapped, its weights frozen.
        r: rank of the update.
        alpha: scaling numerator; unset means 2r.
        dropout: dropout on x.
        targets: ``all-linear`` or names of linear modules, such as ``q_proj``.
        rslora, dora, bias, modules_to_save: as in :class:`ft_core.config.LoraSettings`.

    Returns:
        A ``peft.PeftModel``; any transformers or TRL trainer runs it. The adapter's weights are float32.

    Raises:
        ConfigError: a target or module that the model doesn't have.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    for key, names in (("targets", targets), ("modules_to_save", modules_to_save)):
        if isinstance(names, list):
            _check_names(model, f"lora.{key}", names)
    is_score = type(model).__name__.endswith("ForSequenceClassification")
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # PEFT takes any number
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=rslora,
        use_dora=dora,
        bias=bias,
        modules_to_save=modules_to_save,
        task_type=TaskType.SEQ_CLS if is_score else TaskType.CAUSAL_LM,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora cannot be attached: {error}") from error


def _check_names(model: Any, key: str, names: list[str]) -> None:
    modules = [name for name, module in model.named_modules() if name and not list(module.children())]
    lasts = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    lasts = [name for name in lasts if not name.isdigit()]
    for name in names:
        if not any(module == name or module.endswith("." + name) for module in modules):
            close = difflib.get_close_matches(name, lasts, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{key}: the model has no module {name!r}{hint} (it has: {', '.join(lasts)})")
