"""Exports for Open WebUI: what is to be imported, the compose file, and llama-server asked by the model's name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')

from ft_export import ExportError
from ft_export.conversations import Serving
from ft_export.ollama.modelfile import read_modelfile
from ft_export.open_webui import export as export_module
from ft_export.open_webui.compose import ENGINES, Wiring, check_compose, compose
from ft_export.open_webui.export import export
from ft_export.open_webui.model_json import model_json, unescaped

SETTINGS = Serving(
    context=4096,
    context_from="asked for",
    sampling={"temperature": 0.6, "repetition_penalty": 1.1},
    system="Be brief.",
    stops={"<|im_end|>": 2, "<\uff5cend\u2581of\u2581sentence\uff5c>": 3, "\\n": 4},
    questions=("One?", "x" * 201, "Two?", "Three?", "Four?", "Five?"),
)


@pytest.fixture
def run(base: Path, make_run: Any, make_adapter: Any) -> Path:
    """A run with an adapter on a base with a name, its held-out rows in English and others."""
    folder: Path = make_run()
    make_adapter(folder / "adapter", base)
    environment = json.loads((folder / "environment.json").read_text())
    environment["base_model"]["name"] = "someone/Base"
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def parts(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The model, the compose file and the proof."""
    models = json.loads((folder / "model.json").read_text())["models"]
    assert len(models) == 1
    return (
        models[0],
        yaml.safe_load((folder / "compose.yaml").read_text()),
        json.loads((folder / "proof.json").read_text()),
    )


def test_a_run_for_llama_server(run: Path, contents: Any) -> None:
    made = export(run)
    folder = run / "export" / "open-webui"
    assert made.file == folder
    assert contents(folder) == ["compose.yaml", "model.json", "my-run-f16.gguf", "proof.json"]
    model, content, proof = parts(folder)
    assert (model["id"], model["base_model_id"], model["name"]) == ("my-run-chat", "my-run", "my run")
    assert model["meta"]["description"] == "my run, fine-tuned from someone/Base"
    assert model["meta"]["suggestion_prompts"] == [{"content": f"What is {n}?"} for n in range(4)]
    assert model["params"] == {"stop": ["<|im_end|>"]}
    assert model["is_active"] is True
    assert model["access_grants"] == []
    server, web = content["services"]["llama-server"], content["services"]["open-webui"]
    assert server["command"][server["command"].index("--alias") + 1] == model["base_model_id"]
    assert server["command"][server["command"].index("-m") + 1] == server["volumes"][0]["target"]
    assert (folder / server["volumes"][0]["source"]).is_file()
    assert server["volumes"][0]["read_only"] is True
    assert "ports" not in server
    assert web["ports"] == ["127.0.0.1:3000:8080"]
    assert web["environment"]["WEBUI_AUTH"] == "true"
    assert web["environment"]["OPENAI_API_BASE_URLS"] == "http://llama-server:8080/v1"
    assert "llama-server serves the model as my-run, and answers a chat under that name" in made.lines
    assert proof["open_webui"]["asked_over_http"] is True
    assert proof["files"]["my-run-f16.gguf"]["continuations"]["tokens"] > 0
    assert made.next_command == f"docker compose -f '{folder}/compose.yaml' up -d"
    with pytest.raises(ExportError, match="already there: pass --overwrite"):
        export(run)


def test_for_ollama(run: Path, contents: Any) -> None:
    folder = export(run, options={"engine": "ollama", "system": "Be kind.", "suggestions": "no", "port": "8081"}).file
    assert contents(folder) == ["Modelfile", "compose.yaml", "model.json", "my-run-f16.gguf", "proof.json"]
    model, content, proof = parts(folder)
    assert model["base_model_id"] == "my-run:latest"
    assert model["id"] == "my-run-chat"
    assert model["meta"]["suggestion_prompts"] is None
    assert model["params"] == {"system": "Be kind.", "stop": ["<|im_end|>"], "num_ctx": 512}
    assert dict(read_modelfile((folder / "Modelfile").read_text()))["system"] == "Be kind."
    assert content["services"]["create"]["command"] == ["create", "my-run", "-f", "/model/Modelfile"]
    assert content["services"]["open-webui"]["ports"] == ["127.0.0.1:8081:8080"]
    assert {"files", "ollama", "open_webui"} <= set(proof)
    assert proof["open_webui"]["asked_over_http"] is False


def test_for_vllm(run: Path, contents: Any) -> None:
    folder = export(run, options={"engine": "vllm", "num_ctx": "256"}).file
    assert contents(folder) == ["compose.yaml", "model.json", "proof.json"]
    _, content, proof = parts(folder)
    service = content["services"]["vllm"]
    assert service["volumes"][0]["source"] == str(run / "merged")
    assert service["command"][:5] == ["/model", "--served-model-name", "my-run", "--max-model-len", "256"]
    assert proof["merge"]["weights"]["merged"] > 0


def test_parameters_are_what_each_engine_reads() -> None:
    names = {}
    for engine in ENGINES:
        made = model_json("m", "M", "d", SETTINGS, engine, system="Be brief.", suggest=True)["models"][0]
        names[engine] = sorted(made["params"])
        # Open WebUI reads escapes in stop texts, by which it would lose what is no ASCII
        assert unescaped(made["params"]) == list(SETTINGS.stops)
        assert [one["content"] for one in made["meta"]["suggestion_prompts"]] == ["One?", "Two?", "Three?", "Four?"]
    assert names["llama-server"] == ["repeat_penalty", "stop", "system", "temperature"]
    assert names["ollama"] == ["num_ctx", "repeat_penalty", "stop", "system", "temperature"]
    assert names["vllm"] == ["repetition_penalty", "stop", "system", "temperature"]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_open_to_other_machines(engine: str) -> None:
    content = compose(Wiring(engine, "m", "./m.gguf", 4096, 3000, "m-open-webui-1"))
    ports = [port for service in content["services"].values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:3000:8080"]
    assert all(":" in service["image"].rpartition("/")[2] for service in content["services"].values())
    assert not any(service["image"].endswith((":latest", ":main")) for service in content["services"].values())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_compose_file_that_names_what_is_not_there_is_seen(engine: str, tmp_path: Path) -> None:
    wiring = Wiring(engine, "m", "./a $1 file", 4096, 3000, "m-open-webui-1")
    (tmp_path / "a $1 file").touch()
    check_compose(compose(wiring), tmp_path)
    with pytest.raises(ExportError, match="which is not there"):
        check_compose(compose(dataclasses.replace(wiring, source="./other")), tmp_path)
    content = compose(wiring)
    del content["volumes"]["open-webui"]
    with pytest.raises(ExportError, match="open-webui mounts open-webui"):
        check_compose(content, tmp_path)
    content = compose(wiring)
    content["services"]["engine"] = content["services"].pop(engine)
    with pytest.raises(ExportError, match="which is no service"):
        check_compose(content, tmp_path)


def test_a_server_under_another_name_is_seen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_export.gguf.engine import llama_cpp

    monkeypatch.setattr(export_module, "llama_cpp", lambda file, context, name: llama_cpp(file, context, "other"))
    with pytest.raises(ExportError, match=r"llama-server calls the model other, .*model.json calls it my-run"):
        export(run)
    assert not (run / "export" / "open-webui").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"engine": "sglang"}, "allowed: llama-server, ollama, vllm"),
        ({"suggestions": "maybe"}, "allowed: yes, no"),
        ({"port": "70000"}, "no port"),
        ({"port": "0"}, "no whole number"),
        ({"template": "x"}, "template= is Ollama's"),
        ({"create": "x"}, "allowed: engine, system"),
        ({"num_ctx": "1000"}, "more than the model has positions"),
    ],
)
def test_bad_options_leave_nothing(
    options: dict[str, str], why: str, base: Path, tmp_path: Path, contents: Any
) -> None:
    with pytest.raises(ExportError, match=why):
        export(base, tmp_path / "out", options=options)
    assert contents(tmp_path) == []


def test_vllm_takes_no_gguf_type(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--type q8_0 is for a GGUF file"):
        export(base, tmp_path / "out", type="q8_0", options={"engine": "vllm"})


def test_another_folder_is_not_replaced(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds something else \(it has no model.json\)"):
        export(base, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
