"""``launch.sh`` and ``compose.yaml``, and the arithmetic of what a card has room for."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_export import ExportError
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
