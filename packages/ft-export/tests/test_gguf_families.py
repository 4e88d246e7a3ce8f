"""Gemma 2, Gemma 3, Phi-3 and Phi-4 in llama.cpp, with tokenizers of their kind; what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

import gguf
import torch

from ft_export import ExportError, export_gguf
from ft_export.bases import load_model, load_tokenizer, stop_tokens
from ft_export.gguf import convert, converter, pieces, proof, vocabulary
from ft_export.gguf.engine import llama_cpp
from ft_export.gguf.proof import Prompt, compare
from ft_export.gguf.undecided import undecided
from ft_export.runs import Rope

GEMMA: dict[str, Any] = {"pieces": "gemma", "tie_word_embeddings": True, "query_pre_attn_scalar": 16}
LOCAL = {"rope_type": "default", "rope_theta": 500.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.5, 3.0, 7.0, 11.0],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.5,
}
WINDOWS = {**GEMMA, "sliding_window": 8}
FULL, SLIDING = "full_attention", "sliding_attention"
DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "Gemma2",
        {**WINDOWS, "num_hidden_layers": 4, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma2, other layers": ("Gemma2", {**WINDOWS, "num_hidden_layers": 3, "layer_types": [FULL, SLIDING, SLIDING]}),
    "gemma3": (
        "Gemma3",
        {
            **WINDOWS,
            "num_hidden_layers": 7,
            "rope_parameters": {FULL: {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}, SLIDING: LOCAL},
        },
    ),
    "gemma3, other layers": (
        "Gemma3",
        {**WINDOWS, "num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL], "final_logit_softcapping": 5.0},
    ),
    "gemma3, no window": ("Gemma3", {**WINDOWS, "layer_types": [FULL, FULL]}),
    "phi3": ("Phi3", {"pieces": "phi3"}),
    "phi4": (
        "Phi3",
        {"tie_word_embeddings": True, "rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
    ),
    "qwen3 moe": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "deepseek": ("DeepseekV3", DEEPSEEK),
    "deepseek, yarn": (
        "DeepseekV3",
        {
            **DEEPSEEK,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "llama2": ("Llama", {"pieces": "llama2"}),
    "mistral": ("Mistral", {"pieces": "llama2", "sliding_window": None}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_families_in_llama_cpp(family: str, type: str, make_model: Any, tmp_path: Path) -> None:
    kind, settings = FAMILIES[family]
    model = make_model(tmp_path / "a model", kind, **settings)
    made = export_gguf(model, tmp_path / "out", type=type)
    found = json.loads(made.proof.read_text())["files"][made.file.name]["continuations"]
    assert found["tokens"] >= 24
    assert found["error"]["largest"] <= found["bound_largest"]
    assert any("byte for byte" in line for line in made.lines)


def test_long_factors_are_those_of_a_long_context(make_model: Any, tmp_path: Path) -> None:
    """llama.cpp takes them by the context that it is given, transformers by the text; so it gets them as short ones."""
    kind, settings = FAMILIES["phi4"]
    model = make_model(tmp_path / "model", kind, **settings)
    made = convert(model, tmp_path / "x.gguf")
    tokenizer = load_tokenizer(model)
    prompts = [Prompt(text, tuple(tokenizer(text)["input_ids"])) for text in ("The quick brown fox", "In 1969 two")]
    long = Rope(512, {**LONGROPE, "short_factor": LONGROPE["long_factor"]})
    with llama_cpp(tmp_path / "x.gguf", 512) as engine:
        stops = set(stop_tokens(tokenizer, model))
        found = compare(
            engine, load_model(model, torch.float32, rope=long), tokenizer, prompts, "f16", made.kinds, stops, 24
        )
        assert found.error.largest <= found.bound_largest
        with pytest.raises(ExportError, match=r"llama\.cpp is not the model|parts from transformers"):
            compare(engine, load_model(model, torch.float32), tokenizer, prompts, "f16", made.kinds, stops, 24)


LOST = [
    ("gemma2", "add_attn_logit_softcapping"),
    ("gemma2", "add_final_logit_softcapping"),
    ("gemma2", "add_sliding_window"),
    ("gemma2, other layers", "add_sliding_window_pattern"),
    ("gemma3", "add_rope_freq_base"),
    ("gemma3", "add_rope_freq_base_swa"),
    ("gemma3", "add_rope_scaling_factor"),
    ("gemma3", "add_sliding_window"),
    ("deepseek", "add_expert_gating_func"),
    ("deepseek", "add_expert_weights_scale"),
    ("deepseek", "add_expert_weights_norm"),
    ("deepseek, yarn", "add_rope_scaling_yarn_log_mul"),
    ("phi4", "add_rope_dimension_count"),
    ("phi4", "add_rope_scaling_attn_factors"),
]


@pytest.mark.parametrize(("family", "method"), LOST)
def test_a_key_that_is_lost_is_caught(
    family: str, method: str, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So llama.cpp reads each of them, and the comparison sees it."""
    kind, settings = FAMILIES[family]
    model = make_model(tmp_path / "model", kind, **settings)
    monkeypatch.setattr(gguf.GGUFWriter, method, lambda *_: None)
    with pytest.raises(ExportError, match=r"llama\.cpp is not the model|parts from transformers|cannot load"):
        export_gguf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_norms_are_written_with_the_one(family: str, make_model: Any, tmp_path: Path) -> None:
    kind, settings = FAMILIES[family]
    model = make_model(tmp_path / "model", kind, **settings)
    norms = gguf_norms(model, tmp_path)
    assert len(norms) == 4 * settings["num_hidden_layers"] + 1 + (2 * 7 if family == "gemma3" else 0)
    assert all(0.2 < float(values.mean()) < 1.8 for values in norms.values())  # about one, as the files' are about zero


def gguf_norms(model: Path, work: Path) -> dict[str, Any]:
    convert(model, work / "norms.gguf")
    tensors = gguf.GGUFReader(work / "norms.gguf").tensors
    return {tensor.name: tensor.data for tensor in tensors if tensor.name.endswith("_norm.weight")}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 32}, "divides queries by the root of 16, this model .* 32"),
        ("gemma2", {"attn_logit_softcapping": None}, "caps logits, this model has attn_logit_softcapping None"),
        ("gemma2", {"tie_word_embeddings": False}, "has no head of its own"),
        ("gemma2", {"layer_types": [FULL] * 4}, "needs layers with a sliding window"),
        ("gemma2", {"hidden_activation": "silu"}, "has the activation gelu_pytorch_tanh, this model has silu"),
        ("gemma2", {"use_bidirectional_attention": True}, "looks back only"),
        (
            "gemma3",
            {"rope_parameters": {FULL: LOCAL, SLIDING: {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}},
            r"'linear' of sliding_attention cannot be written to GGUF for Gemma 3 \(allowed: default\)",
        ),
        ("phi3", {"head_dim": 32}, "heads of 16 values, this model has head_dim 32"),
        ("deepseek", {"rope_interleave": False}, "rotates neighbours"),
        ("deepseek", {"q_lora_rank": None}, "of 3 layers needs a latent for queries, this model has q_lora_rank None"),
        (
            "deepseek",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 16}},
            "with beta_fast 16 cannot be written",
        ),
        (
            "deepseek",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.7}},
            "only with mscale 1 and mscale_all_dim 1",
        ),
        ("qwen3 moe", {"norm_topk_prob": False}, "divides the experts' weights by their sum"),
        ("qwen3 moe", {"mlp_only_layers": [0]}, "has experts in every layer"),
    ],
)
def test_what_the_graph_has_not_is_refused(
    family: str, settings: dict[str, Any], message: str, make_model: Any, tmp_path: Path
) -> None:
    kind, usual = FAMILIES[family]
    model = make_model(tmp_path / "model", kind, **{**usual, **settings})
    with pytest.raises(ExportError, match=message) as caught:
        export_gguf(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "type"), [("deepseek", "f32"), ("qwen3 moe", "f16")])
def test_a_choice_of_experts_that_rounding_turns_is_not_compared(
    family: str, type: str, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of each of these goes to another expert in llama.cpp, and moves by a nat."""
    kind, settings = FAMILIES[family]
    model = make_model(tmp_path / "model", kind, **settings)
    made = export_gguf(model, tmp_path / "out", type=type)
    found = json.loads(made.proof.read_text())["files"][made.file.name]["continuations"]
    assert 0 < found["undecided"] < found["tokens"] / 5
    assert found["error"]["largest"] <= found["bound_largest"] < 0.5
    line = f"{found['undecided']} tokens hang on a choice of experts that rounding turns: not compared further"
    assert line in made.lines
    monkeypatch.setattr(proof, "undecided", lambda *_: None)
    with pytest.raises(ExportError, match=r"^llama\.cpp is not the model"):
        export_gguf(model, tmp_path / "other", type=type)


def test_a_model_without_experts_has_nothing_undecided(make_model: Any, tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path / "model"), torch.float32)
    assert undecided(model, "f16", lambda: pytest.fail("nothing is to be computed")) is None


def test_experts_may_lie_stacked_in_the_files(make_model: Any, tmp_path: Path) -> None:
    """As other tools write them: gate and way up in one, all experts in one."""
    from safetensors.torch import load_file, save_file

    kind, settings = FAMILIES["qwen3 moe"]
    model = make_model(tmp_path / "model", kind, **settings)
    apart = convert(model, tmp_path / "apart.gguf")
    tensors = load_file(model / "model.safetensors")
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: torch.stack([tensors.pop(f"{place}.{expert}.{part}_proj.weight") for expert in range(6)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{place}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{place}.down_proj"] = parts["down"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert convert(model, tmp_path / "stacked.gguf").tensors == apart.tensors


def test_experts_have_no_mixes(make_model: Any, tmp_path: Path) -> None:
    kind, settings = FAMILIES["qwen3 moe"]
    model = make_model(tmp_path / "model", kind, **settings)
    with pytest.raises(ExportError, match=r"q4_k_m is not known for qwen3moe \(allowed: f16, f32, bf16, q8_0\)"):
        export_gguf(model, tmp_path / "out", type="q4_k_m")
    assert not (tmp_path / "out").exists()


# --- tokenizers


def test_the_tokens_of_phi_3_take_the_spaces_after_them(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which llama.cpp knows by the model's name alone, whatever the folder is called."""
    model = make_model(tmp_path / "my-run", "Phi3", pieces="phi3")
    made = export_gguf(model, tmp_path / "out")
    assert gguf.GGUFReader(made.file).fields["general.name"].contents() == "my-run (Phi-3)"
    monkeypatch.setattr(converter, "_safe_name", lambda name, vocabulary: name)
    with pytest.raises(
        ExportError, match=r"otherwise than the tokenizer: .*; llama\.cpp has no other way of splitting"
    ):
        export_gguf(model, tmp_path / "other")
    with pytest.raises(ExportError, match="has no splitting rules: leave pre=gpt-2 out"):
        export_gguf(model, tmp_path / "other", options={"pre": "gpt-2"})


def test_a_tab_named_beside_its_byte(make_model: Any, tmp_path: Path) -> None:
    """As in Gemma's own tokenizer.json."""
    model = make_model(tmp_path / "model", "Gemma2", **GEMMA)
    plain = vocabulary.read_vocabulary(model, 448)
    data = json.loads((model / "tokenizer.json").read_text())
    data["model"]["vocab"]["\t"] = data["model"]["vocab"]["<0x09>"]
    (model / "tokenizer.json").write_text(json.dumps(data))
    assert vocabulary.read_vocabulary(model, 448) == plain
    export_gguf(model, tmp_path / "out")  # whose texts have tabs


@pytest.mark.parametrize("kind", ["gemma", "phi3", "llama2"])
def test_scores_are_those_of_the_model_file(kind: str, make_model: Any, save_pieces_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "Llama", pieces=kind)
    made = vocabulary.read_vocabulary(model, 448)
    save_pieces_model(model, kind)
    stated = vocabulary.read_vocabulary(model, 448)
    learned = [i for i, (t, k) in enumerate(zip(made.tokens, made.types, strict=True)) if k == 1 and len(t) > 1]
    assert len(learned) > 40
    order = sorted(learned, key=lambda index: -made.scores[index])
    assert order == sorted(learned, key=lambda index: -stated.scores[index])
    assert (made.tokens, made.types) == (stated.tokens, stated.types)
    kinds = gguf.TokenType
    assert [made.tokens[i] for i, k in enumerate(made.types) if k == kinds.BYTE][65] == "<0x41>"
    assert all(made.scores[i] == -10000 for i, k in enumerate(made.types) if k == kinds.UNUSED)
    if kind == "gemma":
        assert made.types[made.tokens.index("  ")] == kinds.USER_DEFINED  # as it stands in a text


def test_a_model_file_of_another_tokenizer_does_not_count(
    make_model: Any, save_pieces_model: Any, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", "Llama", pieces="llama2")
    right = vocabulary.read_vocabulary(model, 448)
    file = model / "tokenizer.model"
    file.write_bytes(b"\x0a\x0a\x0a\x03abc\x15\x00\x00\x80\xbf")  # one piece, "abc", score -1
    assert list(pieces.read_model(file)) == [("abc", -1.0)]
    assert vocabulary.read_vocabulary(model, 448) == right
    save_pieces_model(model, "llama2")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ExportError, match=r"tokenizer\.model is not a whole SentencePiece model: .*; get it again"):
        vocabulary.read_vocabulary(model, 448)


def test_merges_that_scores_cannot_say(make_model: Any, tmp_path: Path) -> None:
    tokens = {token: index for index, token in enumerate(("a", "b", "c", "ab", "bc", "abc", "<s>"))}
    ab, bc, one, other = ("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")
    scores = pieces.scores_of(tmp_path, tokens, [ab, bc, one, other], ("<s>",))
    assert scores == {3: 0, 4: -1, 5: -2, 0: -3, 1: -3, 2: -3}
    with pytest.raises(ExportError, match=r"\('a' and 'bc' are not merged into 'abc'\)"):
        pieces.scores_of(tmp_path, tokens, [ab, bc, one], ("<s>",))
    with pytest.raises(ExportError, match=r"\(merges of 'abc' do not follow each other\)"):
        pieces.scores_of(tmp_path, tokens, [ab, one, bc, other], ("<s>",))
    model = make_model(tmp_path / "model", "Llama", pieces="llama2")
    data = json.loads((model / "tokenizer.json").read_text())
    data["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ExportError, match=r"merges that are not those of a SentencePiece model"):
        convert(model, tmp_path / "x.gguf")


def test_what_llama_cpp_cannot_split_is_told(make_model: Any, tmp_path: Path) -> None:
    """Llama 2's, as transformers has it: a space only where a text begins, and none after a special token."""
    model = make_model(tmp_path / "model", "Llama", pieces="llama2")
    made = export_gguf(model, tmp_path / "out")
    assert any(
        line.startswith("a text with no special token before it begins without the space") for line in made.lines
    )
    (model / "chat_template.jinja").unlink()
    made = export_gguf(model, tmp_path / "plain")
    assert any(line.startswith("a text that begins with a space begins with one space more") for line in made.lines)
    fields = gguf.GGUFReader(made.file).fields
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
