"""Which backend computes packed attention: one table, by hardware, documents and settings, with its reasons."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ft_kernels import tuning

__all__ = ["BACKENDS", "LONG", "PLANNED", "ROUND", "Backend", "Case", "case_of", "choose", "has_cudnn", "why_not"]

Backend = Literal["chunked", "dense", "flash", "flash_attn", "flex", "reference", "sdpa", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_INSTALLED = frozenset(name for name in ("triton", "flash_attn") if importlib.util.find_spec(name) is not None)

HOPPER_MIXED: tuple[tuple[int, Backend], ...] = ((0, "triton"), (3072, "flex"))
"""For documents of different lengths on compute capability 9.0 and later: from this longest document on, this backend.

Forward and backward of 16384 tokens, 32 and 8 heads of 128, bf16, longest documents 768 / 3072 / 12288, in TF/s on an
H100: triton 195 / 327 / 385, flex 174 / 311 / 388, flash 150 / 257 / 310.
"""

LONG = 4096
"""Documents of this mean length are dense attention, one after the other: 4096 and 12288 tokens, as above, take 9.5 ms
that way, 12.4 by flex; 1024 and 3072, many of them, 4.1 ms against 3.9."""

ROUND = 64
"""A packed document of a multiple of this length was cut to it, and others like it follow; any other length is that of
a text, and the next batch's is another."""

PLANNED = 16384
"""From this length on cuDNN is worth a plan that is used in one batch only. Making one, there and back, took 150 ms on
an H100, whatever the length; flex takes longer than cuDNN by 1.5 ms a layer at 8192 tokens, by 6 at 16384."""


@dataclass(frozen=True)
class Case:
    """What the choice depends on.

    Attributes:
        device: the type of the tensors' device.
        capability: its compute capability; (0, 0) where it has none.
        dtype, head_dim: of q, k and v.
        max_length: the longest document.
        equal: all documents have max_length tokens, as far as the host knows.
        counted: the host knows how many documents there are; without that, there are no cu_seqlens without waiting.
        mean_length: of the documents, where the host knows their lengths; else 0.
        recurring: batches of the same lengths will follow, as far as one can tell (``ROUND``).
        causal, window, softcap, sinks: the settings, as far as they change anything.
        together: some tokens see what follows them, in their run.
        installed: of "triton" and "flash_attn" those that are there.
        hip: an AMD card.
    """

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    max_length: int
    equal: bool
    counted: bool = True
    mean_length: int = 0
    recurring: bool = True
    causal: bool = True
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    together: bool = False
    installed: frozenset[str] = frozenset({"triton"})
    hip: bool = False


def choose(case: Case) -> Backend:
    """The backend for a case.

    - Not a GPU: torch's own attention, a batch for each length of document; what it doesn't know is computed in chunks.
    - fp32 and float64: the GPU's fast kernels are for 16 bits, so in chunks, exactly.
    - Documents of one length are a batch: dense attention without a copy or a mask, by cuDNN from Hopper on (1.6 to 1.8
      times FlashAttention-2 there).
    - Hopper and later, documents that fill the card one by one (``LONG``): each by itself, by cuDNN.
    - cuDNN plans anew for each new length, which takes longer than all layers' attention over a few thousand tokens; so
      neither of these for lengths that will not come again, unless they are long (``PLANNED``).
    - Hopper and later, other documents: ``HOPPER_MIXED``. Softcap and sinks too: flex has both.
    - Ampere and Ada: FlashAttention-2 is at its best there, and needs no compilation; it has no softcap.
    - Whatever is left from Ampere on (softcap, heads of odd sizes): our own kernel, which does all.
    - Runs that see each other both ways (images) are in what our kernel and flex compute; where neither can, the whole
      mask is made.
    - Before Ampere there is neither, and Triton computes products there without the tensor cores: torch's attention,
      a batch for each length; in chunks what it doesn't know.
    """
    preferred: list[Backend] = []
    nvidia = case.device == "cuda" and not case.hip
    by_cudnn = nvidia and case.capability >= (9, 0)
    planned = case.recurring or max(case.mean_length, case.max_length * case.equal) >= PLANNED
    if case.equal and (planned or not by_cudnn):
        preferred.append("dense")
    if nvidia:
        if by_cudnn:
            if case.mean_length >= LONG and planned:
                preferred.append("sdpa")
            preferred.append([name for least, name in HOPPER_MIXED if case.max_length >= least][-1])
        preferred += ["flash", "triton", "flex"]
    elif case.device == "cuda":
        preferred.append("triton")
    preferred.append("sdpa")
    last: Backend = "reference" if case.together else "chunked"
    return next((backend for backend in preferred if why_not(backend, case) is None), last)


def why_not(backend: str, case: Case) -> str | None:
    """Why a backend cannot compute a case, or None if it can."""
    sixteen = case.dtype in (torch.float16, torch.bfloat16)
    nvidia = case.device == "cuda" and not case.hip
    settings = {"a window": case.window, "a softcap": case.softcap, "sinks": case.sinks}

    def lacks(*names: str) -> str | None:
        return next((f"it knows no {name.removeprefix('a ')}" for name in names if settings[name]), None)

    if case.together and backend not in ("triton", "flex", "reference"):
        return "it knows no tokens that see what follows them"
    if backend in ("chunked", "reference"):
        return None
    if backend == "sdpa":
        if case.device == "cuda" and not (
            case.dtype == torch.float16 or (sixteen and (case.hip or case.capability >= (8, 0)))
        ):
            return "it takes fp16 there, and bf16 from compute capability 8.0 on"
        return lacks("a window", "a softcap", "sinks")
    if backend == "dense":
        if not case.equal:
            return "it takes documents of one length, known to the host"
        if why_not("sdpa", replace(case, window=False, softcap=False, sinks=False)):
            return "it takes fp16 there, and bf16 from compute capability 8.0 on"
        if case.sinks and not (nvidia and _cudnn_takes(case)):
            return "it knows sinks on compute capability 9.0 and later only"
        return lacks("a window", "a softcap")
    if not sixteen:
        return "it takes fp16 or bf16"
    if backend == "triton":
        if "triton" not in case.installed or case.head_dim > 256:
            return "it needs triton and heads of at most 256"
        return None if case.hip or case.capability >= (8, 0) else "it needs compute capability 8.0"
    if backend == "flex":
        able = case.device == "cpu" or (case.capability >= (8, 0) and case.head_dim >= 16)
        return None if able else "it needs compute capability 8.0 and heads of at least 16"
    if not nvidia or case.capability < (8, 0):
        return "it needs compute capability 8.0"
    if backend in ("flash", "flash_attn") and (case.head_dim % 8 or case.head_dim > 256):
        return "it takes heads of a multiple of 8, at most 256"
    if not case.counted:
        return "it needs cu_seqlens, or lengths known to the host"
    if backend == "flash":
        return lacks("a softcap")
    return lacks("sinks") if "flash_attn" in case.installed else "the package flash_attn is not installed"


def _cudnn_takes(case: Case) -> bool:
    return case.capability >= (9, 0) and case.head_dim % 8 == 0 and case.head_dim <= 128


def has_cudnn(q: torch.Tensor) -> bool:
    """Whether cuDNN computes plain attention for such a tensor."""
    case = case_of(q, max_length=1, equal=True)
    sixteen = case.dtype in (torch.float16, torch.bfloat16)
    return sixteen and case.device == "cuda" and not case.hip and _cudnn_takes(case)


def case_of(
    q: torch.Tensor,
    *,
    max_length: int,
    equal: bool,
    counted: bool = True,
    mean_length: int = 0,
    recurring: bool = True,
    causal: bool = True,
    window: bool = False,
    softcap: bool = False,
    sinks: bool = False,
    together: bool = False,
) -> Case:
    """The case of a tensor ``[T, H, D]`` on this machine."""
    return Case(
        device=q.device.type,
        capability=tuning.capability(q.device),
        dtype=q.dtype,
        head_dim=q.shape[-1],
        max_length=max_length,
        equal=equal,
        counted=counted,
        mean_length=mean_length,
        recurring=recurring,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        together=together,
        installed=_INSTALLED,
        hip=torch.version.hip is not None,
    )
