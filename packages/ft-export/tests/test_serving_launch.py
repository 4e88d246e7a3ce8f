"""``launch.sh`` and ``compose.yaml``, and the arithmetic of what a card has room for."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_export import ExportError
from ft_export.open_webui.export import export as export_open_webui
from ft_export.serving.launch import mounts_of, project_name
from ft_export.serving.limits import ALLOWANCE, GIB, limits_of, memory_of
from ft_export.sglang.export import export as export_sglang
from ft_export.vllm.export import export as export_vllm


def test_launch_files(base: Path, make_run: Any, make_adapter: Any, tmp_path: Path) -> None:
    """The script runs the command it shows, in its own folder, and hands on what it is given."""
    run = make_run()
    make_adapter(run / "adapter", base)
    made = export_vllm(run, tmp_path / "it's $HOME", options={"memory": "24GiB"})
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "vllm").write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$VLLM_NO_USAGE_STATS" "$@"\n')
    (programs / "vllm").chmod(0o755)
    done = subprocess.run(
        [*shlex.split(made.next_command), "--port", "9"],
        env={"PATH": f"{programs}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split("\n")[:-1] == [
        str(made.file), "1", "serve", ".", "--served-model-name", "my-run", "--dtype", "bfloat16", "--max-model-len",
        "512", "--gpu-memory-utilization", "0.90", "--host", "127.0.0.1", "--port", "8000", "--port", "9",
    ]  # fmt: skip
    text = (made.file / "compose.yaml").read_text()
    assert "# Of the card's 24.00 GiB the server takes 90%" in text
    service = yaml.safe_load(text)["services"]["vllm"]
    assert service["image"].startswith("vllm/vllm-openai:v")
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["volumes"] == [{"type": "bind", "source": ".", "target": "/model", "read_only": True}]
    assert service["command"][:3] == ["/model", "--served-model-name", "my-run"]
    service = yaml.safe_load((export_sglang(run, options={"memory": "24GiB"}).file / "compose.yaml").read_text())
    command = service["services"]["sglang"]["command"]
    assert command[command.index("--mem-fraction-static") + 1] == "0.81"  # 0.9 less 2 of 24


@pytest.fixture
def llama8b(tmp_path: Path) -> Path:
    """The configuration alone, of the shape of Llama 3.1 8B: 131072 bytes of keys and values a token."""
    (tmp_path / "8b").mkdir()
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    (tmp_path / "8b/config.json").write_text(json.dumps({**config, "max_position_embeddings": 131072}))
    return tmp_path / "8b"


def test_limits(llama8b: Path) -> None:
    weights = 8_030_261_248 * 2
    limits = limits_of(llama8b, weights, None, None)
    assert limits.token == 2 * 2 * 32 * 8 * 128
    assert limits.context == 131072
    assert limits.needed == pytest.approx((weights + ALLOWANCE + 16 * GIB) / 0.9)
    card = 24 * GIB
    limits = limits_of(llama8b, weights, card, None)
    assert limits.context % 16 == 0
    assert weights + ALLOWANCE + limits.context * limits.token <= 0.9 * card
    assert weights + ALLOWANCE + (limits.context + 16) * limits.token > 0.9 * card
    assert limits_of(llama8b, weights, card, "4096").context == 4096
    assert limits_of(llama8b, weights, 80 * GIB, None).context == 131072
    with pytest.raises(ExportError, match=r"need a card of 19.0 GiB, memory= says 16.00 GiB: use a smaller --type"):
        limits_of(llama8b, weights, 16 * GIB, None)
    with pytest.raises(ExportError, match=r"the model does not fit"):
        limits_of(llama8b, weights, card, "131072")
    for wrong in ("0", "131073", "-5", "many", "1e3"):
        with pytest.raises(ExportError, match=rf"context={wrong} is not allowed .1 to 131072"):
            limits_of(llama8b, weights, None, wrong)
    config = json.loads((llama8b / "config.json").read_text())
    (llama8b / "config.json").write_text(json.dumps({**config, "num_hidden_layers": None}))
    with pytest.raises(ExportError, match=r"does not say layers, heads and width"):
        limits_of(llama8b, weights, None, None)


def test_a_smaller_card_is_named_where_it_would_do(llama8b: Path) -> None:
    """An 8B asks for 38.8 GiB with all its tokens; a card of 32 GiB serves it with fewer."""
    said = "export again with memory=32GiB"
    assert said in limits_of(llama8b, 8_030_261_248 * 2, None, None).told()[-1]
    assert limits_of(llama8b, 8_030_261_248 * 2, 32 * GIB, None).context >= 1024  # the advice can be followed
    # with the context asked for a smaller card is refused, and to a small model every card is large enough
    assert not any("export again" in line for line in limits_of(llama8b, 8_030_261_248 * 2, None, "131072").told())
    config = json.loads((llama8b / "config.json").read_text())
    (llama8b / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    assert not any("export again" in line for line in limits_of(llama8b, 100_000, None, None).told())


def test_memory() -> None:
    assert memory_of(None) is None
    assert memory_of("24GiB") == memory_of("24 gib") == 24 * GIB == memory_of(str(24 * GIB))
    assert memory_of("24GB") == 24 * 10**9
    assert memory_of("23.5GiB") == int(23.5 * GIB)
    for wrong in ("", "24", "24G", "GiB", "-24GiB", "rtx4090", "1e9"):
        with pytest.raises(ExportError, match=r"is not the memory of a card .allowed: bytes, or as in 24GiB"):
            memory_of(wrong)


def test_a_base_in_the_hub_s_cache(base: Path, make_run: Any, make_adapter: Any, tmp_path: Path) -> None:
    """Its files are links, which lead nowhere in a container: each is mounted as what it is a link to."""
    cache = tmp_path / "hub/models--me--base"
    snapshot = cache / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    files = sorted(file for file in base.iterdir() if file.is_file())  # other tests export from it
    for number, file in enumerate(files):
        shutil.copy(file, cache / f"blobs/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    run = make_run()
    make_adapter(run / "adapter", snapshot, tokenizer=True)
    volumes = _compose(export_vllm(run, type="lora").file)["services"]["vllm"]["volumes"]
    mounts = {volume["target"]: Path(volume["source"]) for volume in volumes}
    assert mounts.pop("/export") == Path(".")
    assert set(mounts) == {f"/base/{file.name}" for file in files}
    for there, here in mounts.items():
        assert here.parent == cache / "blobs"
        assert not here.is_symlink()
        assert here.read_bytes() == (base / Path(there).name).read_bytes()

    made = export_open_webui(snapshot, tmp_path / "out", options={"engine": "vllm"})
    mounts = {v["target"]: Path(v["source"]) for v in _compose(made.file)["services"]["vllm"]["volumes"]}
    assert set(mounts) == {f"/model/{file.name}" for file in files}
    assert all(here.parent == cache / "blobs" for here in mounts.values())

    (cache / "blobs/0").unlink()
    with pytest.raises(ExportError, match=r"is a link to ../../blobs/0, which is not there"):
        mounts_of(snapshot, "/base")


def test_links_inside_a_folder_are_mounted_with_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a").write_text("1")
    (tmp_path / "model/b").symlink_to("a")
    assert mounts_of(tmp_path / "model", "/base") == {"/base": str(tmp_path / "model")}
    (tmp_path / "link").symlink_to("model")  # the folder itself may be one: it is looked up on this machine
    assert mounts_of(tmp_path / "link", "/base") == {"/base": str(tmp_path / "link")}


def test_compose_files_of_two_runs_have_two_names(base: Path, tmp_path: Path) -> None:
    """Without a name it is that of the folder, which every run has: the second would replace the first's services."""
    names = []
    for folder in ("one", "two"):
        shutil.copytree(base, tmp_path / folder / "My Run é")
        for export in (export_vllm, export_sglang):
            names.append(_compose(export(tmp_path / folder / "My Run é").file)["name"])
            assert re.fullmatch(r"my-run-(vllm|sglang)-[0-9a-f]{6}", names[-1])
    assert len(set(names)) == 4
    assert project_name("__é__", "vllm", tmp_path).startswith("model-vllm-")  # Docker Compose wants a letter or digit


def _compose(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "compose.yaml").read_text(encoding="utf-8")))
