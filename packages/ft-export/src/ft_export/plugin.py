"""What this package registers with ft; the only module that imports ft_core."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ft_core.errors import FtError
from ft_core.plugins import CommandSpec, ExporterSpec, ExportRequest, ExportResult
from ft_export.ctranslate2.convert import TYPES as CTRANSLATE2_TYPES
from ft_export.errors import ExportError
from ft_export.gguf.export import OPTIONS as GGUF_OPTIONS
from ft_export.gguf.mixes import FILE_TYPES
from ft_export.hub import TYPES
from ft_export.hub.wanted import OPTIONS as HUB_OPTIONS
from ft_export.ollama.export import OPTIONS as OLLAMA_OPTIONS
from ft_export.open_webui.export import OPTIONS as OPEN_WEBUI_OPTIONS
from ft_export.progress import Progress
from ft_export.serving.export import OPTIONS as SERVER_OPTIONS
from ft_export.sglang.export import TYPES as SGLANG_TYPES
from ft_export.vllm.export import TYPES as VLLM_TYPES

if TYPE_CHECKING:
    from ft_export.exporting import Exported

__all__ = [
    "CTRANSLATE2",
    "GGUF",
    "HUB",
    "MERGE",
    "OLLAMA",
    "OPEN_WEBUI",
    "SGLANG",
    "VLLM",
    "as_ft_error",
    "export_ctranslate2",
    "export_gguf",
    "export_hub",
    "export_ollama",
    "export_open_webui",
    "export_sglang",
    "export_vllm",
    "shown",
]

LLAMA_SERVER = "llama-server"
RELEASES = "https://github.com/ggml-org/llama.cpp/releases"
"""Where that program is; xllamacpp, in which files are checked, brings the library alone."""

P = ParamSpec("P")
R = TypeVar("R")

MERGE = CommandSpec(
    name="merge",
    summary="merge a run's adapter into its 16-bit base and check the result",
    module="ft_export.commands.merge",
)

GGUF = ExporterSpec(
    name="gguf",
    summary="a GGUF file for llama.cpp, checked in llama.cpp",
    export="ft_export.plugin:export_gguf",
    types=tuple(FILE_TYPES),
    options=GGUF_OPTIONS,
)

HUB = ExporterSpec(
    name="hub",
    summary="a private repository on the Hugging Face Hub, with a card made from the run's files",
    export="ft_export.plugin:export_hub",
    types=TYPES,
    options=HUB_OPTIONS,
)

VLLM = ExporterSpec(
    name="vllm",
    summary="a folder for vLLM, in 16 or 8 bits or as an adapter, with the files that start it",
    export="ft_export.plugin:export_vllm",
    types=VLLM_TYPES,
    options=SERVER_OPTIONS,
)

CTRANSLATE2 = ExporterSpec(
    name="ctranslate2",
    summary="a Whisper for CTranslate2 and faster-whisper, checked in CTranslate2",
    export="ft_export.plugin:export_ctranslate2",
    types=CTRANSLATE2_TYPES,
)

SGLANG = ExporterSpec(
    name="sglang",
    summary="a 16-bit folder for SGLang, with the files that start it",
    export="ft_export.plugin:export_sglang",
    types=SGLANG_TYPES,
    options=SERVER_OPTIONS,
)

OLLAMA = ExporterSpec(
    name="ollama",
    summary="a GGUF file and a Modelfile for Ollama, its template proven equal to the chat template",
    export="ft_export.plugin:export_ollama",
    types=tuple(FILE_TYPES),
    options=OLLAMA_OPTIONS,
)

OPEN_WEBUI = ExporterSpec(
    name="open-webui",
    summary="a model to import into Open WebUI, and a compose file that wires it to an engine",
    export="ft_export.plugin:export_open_webui",
    types=tuple(FILE_TYPES),
    options=OPEN_WEBUI_OPTIONS,
)


def as_ft_error(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, raising ft_core's error in place of this package's."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ExportError as error:
            raise FtError(str(error)) from error

    return inner


def shown() -> Progress:
    """Progress on stderr, as ft's own commands show it."""
    from ft_core.console import progress, say

    parts: dict[str, Callable[[int, int], None]] = {}

    def show(done: int, total: int, what: str) -> None:
        if total == 0:
            say(f"{what} …")
            return
        if what not in parts:
            parts[what] = progress(what)
        parts[what](done, total)

    return show


def export_gguf(request: ExportRequest) -> ExportResult:
    """``ft export RUN --to gguf``.

    Raises:
        FtError: bad input, no space, a missing extra, or a check that failed; the file is not left behind.
    """
    from ft_export.gguf.export import export

    return _result(partial(export, skip_proof=request.skip_proof), replace(request, skip_proof=False), "f16")


def export_hub(request: ExportRequest) -> ExportResult:
    """``ft export RUN --to hub repo=USER/NAME``.

    Raises:
        FtError: bad input, no token or right, a check that failed, or a Hub that refuses or is not reached.
    """
    from ft_export.hub.export import export

    return _result(export, request, "merged")


def export_vllm(request: ExportRequest) -> ExportResult:
    """``ft export RUN --to vllm``.

    Raises:
        FtError: bad input, no space, or a check that failed; nothing is left behind.
    """
    from ft_export.vllm.export import export

    return _result(export, request, "16bit")


def export_sglang(request: ExportRequest) -> ExportResult:
    """``ft export RUN --to sglang``.

    Raises:
        FtError: as :func:`export_vllm`.
    """
    from ft_export.sglang.export import export

    return _result(export, request, "16bit")


def export_ctranslate2(request: ExportRequest) -> ExportResult:
    """``ft export RUN --to ctranslate2``.

    Raises:
        FtError: as :func:`export_vllm`.
    """
    from ft_export.ctranslate2.export import export

    return _result(export, request, "float16")


def export_ollama(request: ExportRequest) -> ExportResult:
    """``ft export RUN --to ollama``.

    Raises:
        FtError: as for ``gguf``; a template that is not the chat template; ``ollama`` failed where it was asked for.
    """
    from ft_export.ollama.export import export

    return _result(export, request, "f16")


def export_open_webui(request: ExportRequest) -> ExportResult:
    """``ft export RUN --to open-webui``.

    Raises:
        FtError: as for ``gguf``, or for ``ollama`` where that is the engine.
    """
    from ft_export.open_webui.export import export

    return _result(export, request, "f16")


def _result(export: Callable[..., Exported], request: ExportRequest, default: str) -> ExportResult:
    if request.skip_proof:
        raise FtError("--skip-proof is for gguf alone: leave it out, or export to gguf")
    made = as_ft_error(export)(
        request.run,
        request.out,
        type=request.type or default,
        overwrite=request.overwrite,
        options=request.options,
        progress=shown(),
    )
    then = made.next_command
    if f" {LLAMA_SERVER} " in f" {then}" and shutil.which(LLAMA_SERVER) is None:
        then += f"  # {LLAMA_SERVER} comes with llama.cpp: {RELEASES}"  # a comment to the shell that it is pasted into
    return ExportResult(files=(made.file, made.proof), checks=made.lines, next_command=then)
