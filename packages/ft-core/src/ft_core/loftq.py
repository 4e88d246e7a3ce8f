"""LoftQ: an adapter that begins as what quantization took away (Li et al. 2023, arXiv:2310.08659)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ft_core.errors import ConfigError
from ft_core.models.source import weight_files
from ft_core.runs import write_json

if TYPE_CHECKING:
    _Config = object
else:
    from peft import LoraConfig as _Config

__all__ = ["MARK", "init_loftq", "low_rank"]

MARK = "loftq.json"
"""The file in an adapter's folder that says which base the adapter belongs to (the page on run folders has it)."""
KEY = "lora.init_lora_weights"
ROUNDS = 4
"""Power iterations: the errors of a quantization have a flat spectrum, in which one would miss half of the gain."""


def init_loftq(adapted: Any, name: str = "default") -> None:
    """Set an adapter's weights on 4-bit layers so that ``Q + scaling · B A`` is as near to the weight as its rank lets.

    Q stays what bitsandbytes made of the weight W, so the adapter is one on the quantized model as anybody loads it:
    one step of the paper's alternation (its algorithm 1 with T = 1), as PEFT's ``replace_lora_weights_loftq`` takes it,
    but divided by the adapter's scaling, which PEFT leaves out. W is read from the folder that the model was loaded
    from. Layers that aren't quantized begin as they always do.

    ``save_pretrained`` writes :data:`MARK` beside such an adapter: nothing in PEFT's own files says that it belongs to
    the quantized weights alone. PEFT does not read it, so one that PEFT has loaded and saves again has none.

    Args:
        adapted: a ``peft.PeftModel`` on a model that was loaded with ``quantization="nf4"``.
        name: of the adapter.

    Raises:
        ConfigError: no adapted layer is in 4 bits, or the unquantized weights are not in the model's folder.
        OSError: they cannot be read.
    """
    from safetensors import safe_open

    layers = {path: module for path, module in adapted.named_modules() if _is_quantized(module, name)}
    if not layers:
        raise ConfigError(f"{KEY}: loftq needs quantization: nf4, and no adapted layer of this model is in 4 bits")
    base = adapted.get_base_model()
    folder = Path(base.name_or_path)
    if not folder.is_dir():
        raise ConfigError(f"{KEY}: loftq needs the unquantized weights, and the model does not come from a folder")
    files: list[Any] = [safe_open(file, framework="pt") for file in weight_files(folder, str(folder))]
    places = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    whole = {id(module): path for path, module in base.named_modules()}
    for module in layers.values():
        key = f"{whole[id(module)]}.weight"
        short = key.removeprefix(f"{base.base_model_prefix}.")  # in a checkpoint of the body alone
        found = key if key in places else short
        shape = list(module.get_base_layer().weight.quant_state.shape)
        if found not in places or places[found].get_slice(found).get_shape() != shape:
            raise ConfigError(f"{KEY}: loftq needs the unquantized weights, and {folder} has no {key} of shape {shape}")
        _set(module, name, places[found].get_tensor(found))
    held = next(iter(layers.values())).get_base_layer().weight.quant_state
    adapted.peft_config[name] = _MarkedConfig.of(adapted.peft_config[name], held.dtype)


class _MarkedConfig(_Config):
    """PEFT's configuration of an adapter, whose ``save_pretrained`` leaves :data:`MARK` beside it."""

    quantized_from: str

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> _MarkedConfig:
        made = cls.__new__(cls)
        vars(made).update(vars(config), quantized_from=str(dtype).removeprefix("torch."))
        return made

    def save_pretrained(self, save_directory: str, **named: Any) -> None:
        parent: Any = super()
        parent.save_pretrained(save_directory, **named)
        mark = {"loftq_format": 1, "quantization": "nf4", "dtype": self.quantized_from}
        write_json(Path(save_directory) / MARK, mark)


def _is_quantized(module: Any, name: str) -> bool:
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or name not in module.lora_A:
        return False
    return getattr(getattr(module.get_base_layer(), "weight", None), "quant_state", None) is not None


@torch.no_grad()
def _set(module: Any, name: str, weight: Tensor) -> None:
    from bitsandbytes.functional import dequantize_4bit

    held = module.get_base_layer().weight
    lost = weight.to(held.device, torch.float32) - dequantize_4bit(held.data, held.quant_state).float()
    b, a = low_rank(lost / module.scaling[name], module.r[name])
    module.lora_A[name].weight.copy_(a)
    module.lora_B[name].weight.copy_(b)


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors whose product is near to the nearest matrix of a rank, and never further from ``x`` than zero.

    By a randomized singular value decomposition (Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1), of more
    columns than are kept; of all columns of a small matrix, which makes it exact.

    Args:
        x: ``[N, K]`` in fp32.
        rank: of the product; above N or K the factors end in zeros.

    Returns:
        ``[N, rank]`` and ``[rank, K]``, with the singular values' roots in both.
    """
    columns = min(2 * rank + 16, *x.shape)
    u, s, v = torch.svd_lowrank(x, q=columns, niter=ROUNDS)
    kept = min(rank, columns)
    root = s[:kept].sqrt()
    left, right = x.new_zeros(x.shape[0], rank), x.new_zeros(rank, x.shape[1])
    left[:, :kept], right[:kept] = u[:, :kept] * root, (v[:, :kept] * root).T
    return left, right
