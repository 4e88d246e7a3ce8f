"""What of models that listen and speak a server takes, and what is refused in a line that says where they go."""

from __future__ import annotations

from pathlib import Path

from ft_export.bases import read_config
from ft_export.errors import ExportError
from ft_export.hearing import WHISPER, refuse, speech_family

__all__ = ["check_speech", "refuse_speech"]


def check_speech(folder: Path, compressed: bool, proven: bool, target: str) -> bool:
    """Whether it is a Whisper, which vLLM serves.

    What vLLM makes of one was read from its source (``vllm/model_executor/models/whisper.py``): it leaves out
    ``proj_out`` and takes the embeddings for the head. Qwen3-ASR it reads in the layout of Qwen's own checkpoint.

    Args:
        compressed: whether the weights are to be. proven: whether the server is to be asked.

    Raises:
        ExportError: it is one that ``target`` does not serve as it is, or not in this form.
    """
    config = read_config(folder)
    family = speech_family(config)
    if family is None:
        return False
    if family != WHISPER or target != "vllm":
        refuse(config, folder, target)
    if compressed:
        raise ExportError(f"{folder} is a model that listens, exported to {target} in 16 bits: use --type 16bit")
    if proven:
        raise ExportError(
            f"{folder} is a model that listens, and engine= compares texts alone: leave it out, and try the server by "
            "hand"
        )
    if not config.tie_word_embeddings:
        raise ExportError(
            f"{folder} has a head of its own (tie_word_embeddings: false), and vLLM's Whisper takes the embeddings for "
            "it: export it to ctranslate2"
        )
    return True


def refuse_speech(folder: Path, target: str, task: str = "text") -> None:
    """
    Args:
        task: of the run: language models that speak are those of ``tts``.

    Raises:
        ExportError: it is a model that listens or speaks, of which ``target`` takes none.
    """
    refuse(read_config(folder), folder, target)
    if task == "tts":
        raise ExportError(
            f"{folder} answers with a codec's tokens, which {target} shows as text: export it to gguf, vllm or sglang"
        )
