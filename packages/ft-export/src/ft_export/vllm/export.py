"""The exporter ``vllm``: a whole model in 16 or 8 bits, or an adapter, with the files that start vLLM on it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from ft_export.errors import ExportError, one_line
from ft_export.exporting import Exported, check_options, check_target
from ft_export.progress import Progress, silent
from ft_export.runs import open_source
from ft_export.serving.export import OPTIONS, export_whole
from ft_export.serving.forms import FORMS, form_of
from ft_export.serving.launch import MARKER, Service
from ft_export.serving.limits import UTILIZATION
from ft_export.vllm.lora import export_lora

__all__ = ["IMAGE", "TYPES", "export", "service"]

TYPES = (*FORMS, "lora")
IMAGE = "vllm/vllm-openai:v0.32.0"
PORT = 8000


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
    """Write a folder that vLLM serves, with ``launch.sh``, ``compose.yaml`` and ``proof.json``.

    Args:
        path: a run folder, a PEFT adapter folder or a transformers model folder; an adapter is merged first, save for
            ``lora``.
        out: the folder to write; ``path/export/vllm`` by default.
        type: ``16bit`` (the merge's own type), ``bf16``, ``f16``, ``fp8`` or ``w8a8`` (compressed-tensors), or
            ``lora``: the adapter as it is, to be served on its base.
        overwrite: whether an earlier export in ``out`` may be replaced.
        options: ``memory``: of the card, as ``24GiB``; ``context``: the longest conversation in tokens. ``engine``: a
            ``vllm`` program, a Python or an environment's folder, to start the server on the files and compare what it
            says; ``engine_args``: further words for it; ``engine_wait``: seconds for its start and for each answer.
        progress: see :data:`ft_export.progress.Progress`.

    Raises:
        ExportError: bad input, no space, or a check that failed; nothing is left behind.
    """
    source = open_source(Path(path))
    folder = Path(out).expanduser() if out is not None else source.path / "export" / "vllm"
    said = check_options(options, OPTIONS, "vllm")
    if type not in TYPES:
        raise ExportError(f"--type {type!r} is not known for vllm (allowed: {', '.join(TYPES)})")
    check_target(folder, source, MARKER, overwrite)
    if type == "lora":
        proof, lines = export_lora(source, folder, said, service, progress)
    else:
        proof, lines = export_whole(
            source,
            folder,
            form_of(type, TYPES, "vllm"),
            said,
            "vllm",
            lambda name, dtype, context, _: service(".", "/model", name, dtype, context, [], {"/model": "."}),
            progress,
        )
    return Exported(folder, proof, tuple(lines), f"sh {shlex.quote(str(folder / MARKER))}")


def service(
    here: str,
    there: str,
    name: str,
    dtype: str,
    context: int,
    more: list[tuple[str, str | None, str | None]],
    mounts: Mapping[str, str],
) -> Service:
    """How vLLM is started.

    Args:
        here, there: the model's folder or Hub name, on this machine and in the container.
        name: what clients call the model.
        dtype: what it computes in.
        context: tokens of the longest conversation.
        more: further words: a flag, and what follows it on this machine and in the container (None: nothing).
        mounts: paths in the container and what of this machine lies there.
    """
    shared = ["--served-model-name", name, "--dtype", dtype, "--max-model-len", str(context)]
    shared += ["--gpu-memory-utilization", f"{UTILIZATION:.2f}"]
    outside = [word for flag, value, _ in more for word in (flag, value) if word is not None]
    inside = [word for flag, _, value in more for word in (flag, value) if word is not None]
    mounted = there.startswith("/")
    return Service(
        name="vllm",
        image=IMAGE,
        start=("vllm", "serve"),
        entrypoint=("vllm", "serve"),
        arguments=[here, *shared, *outside],
        contained=[there, *shared, *inside],
        port=PORT,
        # nothing is asked of the network where all files are here, and nobody is told what is served
        environment={**({"HF_HUB_OFFLINE": "1"} if mounted else {}), "VLLM_NO_USAGE_STATS": "1"},
        mounts=mounts,
    )
