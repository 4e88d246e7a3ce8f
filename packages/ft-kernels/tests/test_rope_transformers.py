from __future__ import annotations

import pytest
import torch

from ft_kernels import nn, rope

FORWARD = "rope"


def table(positions, pairs, base=100.0):
    """Angles of positions ``[...]`` as ``[..., pairs]``, in float64."""
    return torch.as_tensor(positions)[..., None].double() * base ** (-torch.arange(pairs).double() / pairs)


def heads_first(batch, length, d, *heads):
    return [torch.randn(batch, length, h, d).transpose(1, 2) for h in heads]


def test_llama_of_transformers(device, launched):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = modeling.LlamaConfig(hidden_size=64, num_attention_heads=4)
    q, k = heads_first(2, 7, 16, 4, 2)
    cos, sin = modeling.LlamaRotaryEmbedding(config)(q, torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 3, 9]]))
    wanted = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    with launched(FORWARD):
        turned = rope(*(t.to(device) for t in (q, k, cos, sin)), heads_dim=1)
    torch.testing.assert_close([t.cpu() for t in turned], list(wanted))


def test_gptj_of_transformers(device, launched):
    modeling = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    q, k = (torch.randn(2, 7, 3, 16) for _ in range(2))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 3, 9]])
    sin, cos = modeling.create_sinusoidal_positions(10, 8).chunk(2, -1)
    wanted = [torch.cat((modeling.apply_rotary_pos_emb(t[..., :8], sin[positions], cos[positions]), t[..., 8:]), -1)
              for t in (q, k)]  # fmt: skip
    with launched(FORWARD):
        turned = rope(
            *(t.to(device) for t in (q, k, cos, sin)), position_ids=positions.to(device), rotary_dim=8,
            layout="interleaved",
        )  # fmt: skip
    torch.testing.assert_close([t.cpu() for t in turned], wanted)


def test_glm_of_transformers(device, launched):
    modeling = pytest.importorskip("transformers.models.glm.modeling_glm")
    q, k = heads_first(2, 7, 16, 4, 2)
    angles = table(torch.arange(7), 4).float().expand(2, 7, 4)
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    wanted = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    with launched(FORWARD):
        turned = rope(*(t.to(device) for t in (q, k, cos, sin)), rotary_dim=8, layout="interleaved", heads_dim=1)
    torch.testing.assert_close([t.cpu() for t in turned], list(wanted))


def test_cohere_of_transformers(device, launched):
    modeling = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    q, k = heads_first(2, 7, 8, 4, 2)
    angles = table(torch.arange(7), 4).float().expand(2, 7, 4).repeat_interleave(2, -1)
    wanted = modeling.apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    with launched(FORWARD):
        turned = rope(
            *(t.to(device) for t in (q, k, angles.cos()[..., ::2], angles.sin()[..., ::2])), rotary_dim=8,
            layout="interleaved", heads_dim=1,
        )  # fmt: skip
    torch.testing.assert_close([t.cpu() for t in turned], list(wanted))


def test_deepseek_products_of_transformers(device, launched):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    q, k = heads_first(2, 7, 8, 4, 1)
    angles = table(torch.arange(7), 4).float().expand(2, 7, 4)
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    wanted_q, wanted_k = modeling.apply_rotary_pos_emb_interleave(q, k, cos, sin)
    with launched(FORWARD):
        new_q, new_k = rope(*(t.to(device) for t in (q, k, cos, sin)), layout="interleaved", heads_dim=1)
    torch.testing.assert_close((new_q @ new_k.mT).cpu(), wanted_q @ wanted_k.mT)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_qwen_vl_of_transformers(device, launched, family):
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    name = {"qwen2_vl": "Qwen2VL", "qwen3_vl": "Qwen3VLText"}[family]
    sections = [2, 3, 3] if family == "qwen2_vl" else [4, 2, 2]
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, "mrope_interleaved": True}
    config = getattr(modeling, "Qwen2VLTextConfig", None) or getattr(modeling, f"{name}Config")
    config = config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_parameters=parameters
    )
    q, k = heads_first(2, 7, 16, 4, 2)
    positions = torch.randint(0, 40, (3, 2, 7))
    cos, sin = getattr(modeling, f"{name}RotaryEmbedding")(config)(q, positions)
    if cos.dim() == 4:  # transformers before 5.20 or so: the streams come as they are
        wanted = modeling.apply_multimodal_rotary_pos_emb(q, k, cos, sin, sections)
    else:
        wanted = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    layer = nn.RotaryEmbedding(
        16, heads_dim=1, sections=sections, interleaved_sections=family == "qwen3_vl", device=device
    )
    whole = table(torch.arange(40), 8, 10000.0).float()
    with launched(FORWARD):
        results = [
            layer(q.to(device), k.to(device), positions.to(device)),
            rope(
                *(t.to(device) for t in (q, k, whole.cos(), whole.sin())), position_ids=positions.to(device),
                rotary_dim=16, heads_dim=1, sections=sections, interleaved_sections=family == "qwen3_vl",
            ),
            rope(
                *(t.to(device) for t in (q, k, cos, sin)), heads_dim=1, sections=sections if cos.dim() == 4 else None
            ),
        ]  # fmt: skip
    for turned in results:
        torch.testing.assert_close([t.cpu() for t in turned], list(wanted), rtol=1e-4, atol=1e-5)
