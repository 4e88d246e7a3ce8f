"""What ft sees of this package, where ft-core is installed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ft_core", reason="pip install ft-core")

from ft_core.errors import FtError
from ft_core.plugins import CommandSpec, ExporterSpec, ExportRequest, registry, resolve


def test_registered() -> None:
    merge = registry().get(CommandSpec, "merge")
    exporter = registry().get(ExporterSpec, "gguf")
    assert merge.module == "ft_export.commands.merge"
    assert exporter.types == ("f16", "q8_0")
    assert callable(resolve(exporter.export))


def _merge(*words: str) -> int:
    from ft_export.commands import merge

    parser = argparse.ArgumentParser()
    merge.add_arguments(parser)
    return merge.run(parser.parse_args(list(words)))


def test_merge_command(base: Path, make_run: Any, make_adapter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    make_adapter(run / "adapter", base)
    assert _merge(str(run), "--dtype", "float16") == 0
    out = capsys.readouterr().out
    assert f"merged model: {run / 'merged'}" in out
    assert "log-probabilities of" in out
    with pytest.raises(FtError, match="already there: pass --overwrite"):
        _merge(str(run))


def test_exporter(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
    pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')
    export = resolve(registry().get(ExporterSpec, "gguf").export)
    result = export(ExportRequest(run=base, out=tmp_path / "out"))
    assert [path.name for path in result.files] == ["llama-f16.gguf", "proof.json"]
    assert all(path.is_file() for path in result.files)
    assert any(line.startswith("llama.cpp's answer to") for line in result.checks)
    with pytest.raises(FtError, match="allowed: f16, q8_0"):
        export(ExportRequest(run=base, out=tmp_path / "out", type="q4_0"))
