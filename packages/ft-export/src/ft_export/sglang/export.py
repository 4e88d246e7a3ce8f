"""The exporter ``sglang``: the whole model in 16 bits, checked, with the files that start SGLang on it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from ft_export.errors import one_line
from ft_export.exporting import Exported, check_options, check_target
from ft_export.progress import Progress, silent
from ft_export.runs import open_source
from ft_export.serving.export import OPTIONS, export_whole
from ft_export.serving.forms import form_of
from ft_export.serving.launch import MARKER, Service

__all__ = ["IMAGE", "TYPES", "export"]

TYPES = ("16bit", "bf16", "f16")
IMAGE = "lmsysorg/sglang:v0.5.23"
PORT = 30000


@one_line
def export(
    path: Path | str,
    out: Path | str | None = None,
    *,
    type: str = "16bit",
    overwrite: bool = False,
    options: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write a folder that SGLang serves: the whole model, ``launch.sh``, ``compose.yaml`` and ``proof.json``.

    Args:
        path: a run folder, a PEFT adapter folder or a transformers model folder; an adapter is merged first.
        out: the folder to write; ``path/export/sglang`` by default.
        type: ``16bit`` (the merge's own type), ``bf16`` or ``f16``.
        overwrite: whether an earlier export in ``out`` may be replaced.
        options: ``memory``, ``context``, ``engine`` (a Python or an environment's folder), ``engine_args`` and
            ``engine_wait``: as for vLLM.
        progress: see :data:`ft_export.progress.Progress`.

    Raises:
        ExportError: bad input, no space, or a check that failed; nothing is left behind.
    """
    source = open_source(Path(path))
    folder = Path(out).expanduser() if out is not None else source.path / "export" / "sglang"
    said = check_options(options, OPTIONS, "sglang")
    form = form_of(type, TYPES, "sglang")
    check_target(folder, source, MARKER, overwrite)
    proof, lines = export_whole(source, folder, form, said, "sglang", _service, progress)
    return Exported(folder, proof, tuple(lines), f"sh {shlex.quote(str(folder / MARKER))}")


def _service(name: str, dtype: str, context: int, share: float | None) -> Service:
    shared = ["--served-model-name", name, "--context-length", str(context), "--dtype", dtype]
    if share is not None:
        shared += ["--mem-fraction-static", f"{share:.2f}"]
    start = ("python", "-m", "sglang.launch_server")
    return Service(
        name="sglang",
        image=IMAGE,
        start=start,
        entrypoint=("python3", *start[1:]),
        arguments=["--model-path", ".", *shared],
        contained=["--model-path", "/model", *shared],
        port=PORT,
        environment={"HF_HUB_OFFLINE": "1"},
        mounts={"/model": "."},
    )
