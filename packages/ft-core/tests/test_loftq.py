"""An adapter that begins as what quantization lost."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ft_core
from ft_core.errors import ConfigError


def distances(model: Any, plain: Any) -> dict[str, tuple[float, float, Any]]:
    """Of each adapted layer: how far from the weight it is without its adapter and with it, and what is missing."""
    from bitsandbytes.functional import dequantize_4bit

    weights = dict(plain.named_parameters())
    found = {}
    for name, module in model.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        held = module.get_base_layer().weight
        lost = weights[f"{name}.weight"].detach().float() - dequantize_4bit(held.data, held.quant_state).float()
        a, b = (side["default"].weight.detach() for side in (module.lora_A, module.lora_B))
        update = module.scaling["default"] * b @ a
        found[name] = float(lost.norm()), float((lost - update).norm()), lost
    return found


@pytest.mark.parametrize("alpha", [4, 8, 3])
def test_the_adapted_layer_is_nearer_to_the_weight(tiny: Path, alpha: float) -> None:
    import torch

    plain, _ = ft_core.load(tiny)
    model, _ = ft_core.load(tiny, quantization="nf4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = ft_core.add_lora(model, r=4, alpha=alpha, init_lora_weights="loftq")
    found = distances(adapted, plain)
    assert len(found) == 7 * plain.config.num_hidden_layers
    for name, (without, with_it, lost) in found.items():
        assert with_it < without, name
        # Nothing of rank 4 is nearer than the sum of the other singular values' squares (Eckart and Young 1936). The
        # random columns, of which there are 24 for 64 at least, cost less than a hundredth of it.
        nearest = float(torch.linalg.svdvals(lost)[4:].norm())
        assert nearest * (1 - 1e-5) <= with_it <= 1.01 * nearest, name
    after = adapted.get_base_model().state_dict()
    for name, value in before.items():
        other = name.replace("_proj.weight", "_proj.base_layer.weight")
        assert torch.equal(value, after[other]), name


def test_it_is_saved_as_an_adapter_on_the_quantized_model(tiny: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    adapted = ft_core.add_lora(ft_core.load(tiny, quantization="nf4")[0], r=4, init_lora_weights="loftq").eval()
    adapted.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["init_lora_weights"] is True
    mark = json.loads((tmp_path / "loftq.json").read_text(encoding="utf-8"))
    dtype = str(adapted.dtype).removeprefix("torch.")
    assert mark == {"loftq_format": 1, "quantization": "nf4", "dtype": dtype}
    copy.deepcopy(adapted).save_pretrained(tmp_path / "copy")
    names = [path.name for path in tmp_path.iterdir() if path.is_file()]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "copy").iterdir())
    again = PeftModel.from_pretrained(ft_core.load(tiny, quantization="nf4")[0], tmp_path).eval()
    ids = torch.tensor([[1, 5, 9]], device=adapted.device)
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, again(ids).logits)


def test_factors_of_matrices_that_have_fewer_ranks() -> None:
    import torch

    from ft_core.loftq import low_rank

    torch.manual_seed(0)
    for x in (torch.randn(3, 20), torch.zeros(20, 30), torch.randn(50, 2) @ torch.randn(2, 40)):
        left, right = low_rank(x, 8)
        assert (left.shape, right.shape) == ((x.shape[0], 8), (8, x.shape[1]))
        # Sums of up to 50 products, each rounded to fp32, over a few orthogonalizations.
        assert (left @ right - x).norm() <= 1e-5 * x.norm()


def refused(*args: Any, **named: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ft_core.add_lora(*args, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_where_it_cannot_begin_so(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    key = "lora.init_lora_weights: "
    plain, _ = ft_core.load(tiny)
    assert refused(plain, init_lora_weights="loftq") == (
        f"{key}loftq needs quantization: nf4, and no adapted layer of this model is in 4 bits"
    )
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    model, tokenizer = ft_core.load(folder, quantization="nf4")
    assert refused(model, init_lora_weights="pissa") == f"{key}'pissa' is not allowed (allowed: true, gaussian, loftq)"
    assert refused(model, init_lora_weights="loftq", dora=True) == (
        f"{key}loftq and lora.dora exclude each other: give one"
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    shape = list(tensors.pop(name).shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    missing = f"has no {name} of shape {shape}"
    assert (
        refused(model, init_lora_weights="loftq") == f"{key}loftq needs the unquantized weights, and {folder} {missing}"
    )
    shutil.rmtree(folder)
    model, _ = ft_core.load(tiny, quantization="nf4")
    model.save_pretrained(folder)  # quantized already
    tokenizer.save_pretrained(folder)
    again, _ = ft_core.load(folder)
    assert missing in refused(again, init_lora_weights="loftq")


def test_in_a_training(ft: Any, configure: Any, tmp_path: Path) -> None:
    done = ft("train", configure(quantization="nf4", lora={"r": 4, "init_lora_weights": "loftq"}))
    assert done.code == 0, done
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()
    marked = {path.parent for path in (tmp_path / "run").rglob("loftq.json")}
    assert adapter in marked
    assert marked == {path.parent for path in (tmp_path / "run").rglob("adapter_config.json")}  # checkpoints too
