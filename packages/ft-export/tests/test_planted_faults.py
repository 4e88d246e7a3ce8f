"""Faults planted in what makes a file, never in what checks it: each is refused in a line that names it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

from ft_export import ExportError, export_gguf, merge
from ft_export.gguf import architectures, converter, rules, vocabulary
from ft_export.merging import merger, tensors
from ft_export.merging.adapter import Adapter, Replacement

NOT_THE_MODEL = r"llama\.cpp is not the model: at prompt \d+, token \d+, .*'.*' \(\d+\)"


def _refused(job: Callable[[], Any], message: str, *gone: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        job()
    assert "\n" not in str(caught.value)
    for path in gone:
        assert not path.exists()


# --- a wrong permutation of queries and keys


def _with_rules(*rules: rules.Rule) -> Callable[[Any], rules.Architecture]:
    """The table's row with some rules put before its own."""
    right = architectures.find_architecture

    def find(config: Any) -> rules.Architecture:
        row = right(config)
        return dataclasses.replace(row, rules=(*rules, *row.rules))

    return find


def _rule(layers: str, tensor: str, operation: Any) -> rules.Rule:
    pattern = rf"(?P<layer>model\.layers\.{layers}\.self_attn)\.{re.escape(tensor)}"
    return rules.Rule(pattern, (("{layer}." + tensor, operation),))


PERMUTATIONS = {
    "queries left as they are": _rule(r"\d+", "q_proj.weight", rules.same),
    "keys of one layer left as they are": _rule("1", "k_proj.weight", rules.same),
    "keys cut into as many heads as queries": _rule(r"\d+", "k_proj.weight", architectures.permute_queries),
    "biases of queries left as they are": _rule(r"\d+", "q_proj.bias", rules.same),
}


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("fault", PERMUTATIONS)
def test_a_wrong_permutation(
    fault: str, type: str, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", attention_bias=True)
    monkeypatch.setattr(converter, "find_architecture", _with_rules(PERMUTATIONS[fault]))
    _refused(lambda: export_gguf(model, tmp_path / "out", type=type), NOT_THE_MODEL, tmp_path / "out")


# --- a dropped stop token


@pytest.mark.parametrize("role", ["eos", "eot"])
def test_a_dropped_stop_token_that_is_never_said(
    role: str, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No continuation needs to come to it: the model would have to be asked for long to see that it never stops."""
    model = make_model(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    plain = {id: token for token, id in tokenizer["model"]["vocab"].items()}
    generation = json.loads((model / "generation_config.json").read_text())
    generation["eos_token_id"] = [generation["eos_token_id"], 300]
    (model / "generation_config.json").write_text(json.dumps(generation))
    made = export_gguf(model, tmp_path / "right")
    assert "llama.cpp ends an answer at each of 2 stop tokens" in made.lines
    right = vocabulary._special
    monkeypatch.setattr(
        vocabulary, "_special", lambda t, f: {key: token for key, token in right(t, f).items() if key != role}
    )
    # <|im_end|> itself ends an answer wherever llama.cpp reads its text; what the file does not name is then another
    message = {
        "eos": rf"takes '{re.escape(plain[11])}' for the end of a text, not '<\|im_end\|>' \(2\)",
        "eot": r"llama\.cpp goes on after the stop token '.*' \(300\): it would never stop",
    }[role]
    _refused(lambda: export_gguf(model, tmp_path / "out"), message, tmp_path / "out")


def test_more_stop_tokens_than_the_file_has_places_for(make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    generation = json.loads((model / "generation_config.json").read_text())
    generation["eos_token_id"] = [generation["eos_token_id"], 300, 301, 302]
    (model / "generation_config.json").write_text(json.dumps(generation))
    _refused(lambda: export_gguf(model, tmp_path / "out"), r"goes on after the stop token '.*' \(302\)")


def test_a_stop_token_that_the_merge_drops(
    make_model: Any, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base", eos_token_id=0)  # the chat template ends a turn with another one
    adapter = make_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(merger, "name_stops", lambda folder, stops: None)
    _refused(
        lambda: merge(adapter, tmp_path / "out"),
        r"the merged model would not stop at '<\|im_end\|>' \(2\): its generation_config\.json does not name it",
        tmp_path / "out",
    )


# --- a chat template with one space more


@pytest.mark.parametrize("where", ["where the assistant speaks", "where tools are", "at the end"])
def test_a_template_with_one_space_more(
    where: str, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the branch for tools no conversation without tools would show it."""
    import transformers

    model = make_model(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% if tools %}Tools: {{ tools }}\n{% endif %}" + tokenizer.chat_template + "\n"
    tokenizer.save_pretrained(model)
    export_gguf(model, tmp_path / "right")
    old, new = {
        "where the assistant speaks": ("<|im_start|>assistant", "<|im_start|> assistant"),
        "where tools are": ("Tools:", "Tools: "),
        "at the end": ("{% endif %}\n", "{% endif %} \n"),
    }[where]
    right = vocabulary._templates
    monkeypatch.setattr(
        vocabulary, "_templates", lambda t: {name: text.replace(old, new) for name, text in right(t).items()}
    )
    _refused(
        lambda: export_gguf(model, tmp_path / "out"),
        r"the chat template in the file is not the tokenizer's: from character \d+ on ' ",
        tmp_path / "out",
    )


# --- one layer left unmerged, a LoRA scaled twice


@pytest.mark.parametrize("module", ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"])
def test_one_layer_left_unmerged(
    module: str, base: Path, make_run: Any, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export of the run stops with the merge."""
    run = make_run(base=base)
    make_adapter(run / "adapter", base, tokenizer=True)
    right = tensors.merged_weight
    seen: list[str] = []

    def wrong(adapter: Any, change: Any, base: Any, shape: Any, dtype: Any) -> Any:
        if change.module.endswith(module):
            seen.append(module)
            return (block.to(dtype) for block in base())
        return right(adapter, change, base, shape, dtype)

    monkeypatch.setattr(tensors, "merged_weight", wrong)
    _refused(lambda: export_gguf(run), rf"the merged model\.{re.escape(module)}\.weight is wrong", run / "merged")
    assert seen
    assert not (run / "export").exists()


@pytest.mark.parametrize("alpha", [8, 0.5])
def test_a_lora_scaled_twice(
    alpha: float, base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the small alpha it moves log-probabilities by less than rounding does; its weights show it all the same."""
    adapter = make_adapter(tmp_path / "adapter", base, lora_alpha=alpha)
    merge(adapter, tmp_path / "right")
    right = tensors.merged_weight

    def wrong(adapter: Any, change: Any, base: Any, shape: Any, dtype: Any) -> Any:
        # a scale of 2 comes in twice by itself; the small one is doubled, which is not scaling by a small one again
        scale = change.scale**2 if alpha == 8 else 2 * change.scale
        return right(adapter, dataclasses.replace(change, scale=scale), base, shape, dtype)

    monkeypatch.setattr(tensors, "merged_weight", wrong)
    _refused(
        lambda: merge(adapter, tmp_path / "out"),
        r"the merged model\.layers\.0\..*_proj\.weight is wrong: .* where base and adapter make",
        tmp_path / "out",
    )


def test_a_merge_that_was_changed_since(base: Path, make_run: Any, make_adapter: Any) -> None:
    """One layer of it is the base's again: the export of the run would take it for the checked merge."""
    from safetensors.torch import load_file, save_file

    run = make_run(base=base)
    adapter = make_adapter(run / "adapter", base, tokenizer=True)
    merge(run)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not isinstance(Adapter(adapter).changes[name], Replacement)
    weights = run / "merged" / "model.safetensors"
    values = load_file(weights)
    values[name] = load_file(base / "model.safetensors")[name]
    save_file(values, weights, metadata={"format": "pt"})
    changed = weights.read_bytes()
    _refused(
        lambda: export_gguf(run), r"merged/model\.safetensors is not what the merge left there .*: remove .*/merged to"
    )
    assert not (run / "export").exists()
    assert weights.read_bytes() == changed  # whoever changed it may want it
    shutil.rmtree(run / "merged")
    assert export_gguf(run).file.is_file()
