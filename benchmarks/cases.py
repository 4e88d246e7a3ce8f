"""What several benchmarks share: a limit on their time, rows that are written at once, measured steps, and plans.

A case that fails is a row with its error, and what it held is given back before the next one begins.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fast_path

GIB = 2**30
FOLDER = Path(__file__).with_name("results")
PINNING = 3e9
"""Bytes of host memory that are pinned in a second, about."""
VOCABULARY = {"cuda": 128000, "cpu": 512}


class Limit:
    """Seconds that a program may take: a case that would not end in time is left out, and said to be."""

    def __init__(self, until: float | None) -> None:
        self.until = until

    @classmethod
    def of(cls, seconds: float | None) -> Limit:
        """So many from now on; None for no limit."""
        return cls(None if seconds is None else time.time() + seconds)

    def allows(self, what: str, seconds: float) -> bool:
        """Whether a case of about so many seconds may begin; says what is begun or left out."""
        left = float("inf") if self.until is None else self.until - time.time()
        if seconds > left:
            print(f"# {what}: left out, about {seconds:.0f} s and {max(left, 0):.0f} s are left", flush=True)
            return False
        print(f"# {what}: about {seconds:.0f} s", flush=True)
        return True


class Rows:
    """Rows of a results file, each written as soon as it is measured, and printed.

    Args:
        file: to which lines of JSON are added. device: ``cuda`` or ``cpu``. line: a row as it is printed.
        facts: what all rows have in common.
    """

    def __init__(self, file: Path, device: str, line: Callable[[dict[str, Any]], str], **facts: Any) -> None:
        import torch

        gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
        self.file, self.line = file, line
        self.last: dict[str, Any] = {}
        self.facts = {"date": now(), **facts, "gpu": gpu, "versions": fast_path.versions()}

    def add(self, row: dict[str, Any]) -> None:
        """Write a row down and print it."""
        self.last = row = {**self.facts, **row}
        write(self.file, row)
        print(self.line(row), flush=True)


def now() -> str:
    """The time, as rows have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a file."""
    file.parent.mkdir(exist_ok=True)
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is none."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def tidy() -> None:
    """Give back memory that nothing needs any more: the GPU's, and the host's that is pinned."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        # torch keeps pinned memory for others of the same size, which the next case has none of.
        empty = getattr(torch._C, "_host_emptyCache", None)
        if empty is not None:
            empty()


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work gives; where it fails ``error``, in a line, and ``out_of_memory``, with its memory given back."""
    from ft_core.memory import is_memory_error

    try:
        return work()
    except Exception as error:
        words = (str(error).strip().splitlines() or [""])[0][:300]
        found = {"error": f"{type(error).__name__}: {words}", "out_of_memory": _is_memory(error, is_memory_error)}
    tidy()
    return found


def _is_memory(error: BaseException | None, says_so: Callable[[BaseException], bool]) -> bool:
    while error is not None:
        if says_so(error):
            return True
        error = error.__cause__
    return False


def forget(path: Any, host: bool = True) -> None:
    """Let a model's fast path forget the case before: its recorded steps and, with ``host``, its pinned memory."""
    from ft_core.fast.graphs import Graphs

    path.graphs = Graphs()
    path.host.begin()
    if host:  # pinning it takes seconds, so rows of the same length had better share it
        path.host.pools.clear()
    tidy()


def steps(
    model: Any, optimizer: Any, rows: int, tokens: int, device: str, *, warm: int, timed: int,
    seconds: float = float("inf"), mask: bool = False, before: Callable[[], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Take steps on random tokens and measure them: the median of those after the first, and the most memory.

    Args:
        warm: steps before those that are timed. timed: these, fewer where they take more than ``seconds`` together.
        mask: give an attention mask of ones. before: called before each step.
    """
    import torch

    cuda = device == "cuda"
    tidy()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken: list[float] = []
    value, first = 0.0, time.perf_counter()
    try:
        for step in range(warm + timed):
            if before is not None:
                before()
            ids = torch.randint(3, VOCABULARY[device], (rows, tokens),
                                generator=torch.Generator().manual_seed(step)).to(device)  # fmt: skip
            keywords = {"attention_mask": torch.ones_like(ids)} if mask else {}
            began = _now(cuda)
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids.clone(), **keywords).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            taken.append(_now(cuda) - began)
            value = loss.item()
            del loss
            if step >= warm and sum(taken[warm:]) >= seconds:
                break
    finally:
        optimizer.zero_grad(set_to_none=True)
    median = statistics.median(taken[warm:])
    return {
        "rows": rows, "tokens": tokens, "step_s": round(median, 4), "tokens_per_second": round(rows * tokens / median),
        "timed": len(taken) - warm, "warm": warm, "all_s": round(time.perf_counter() - first, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if cuda else 0.0,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3) if cuda else 0.0, "loss": round(value, 5),
    }  # fmt: skip


def _now(cuda: bool) -> float:
    import torch

    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def configuration(
    folder: Path, length: int, *, quantization: str, rows: int = 1, rank: int = 16, memory: str = "auto",
    activations: str = "auto",
) -> Any:  # fmt: skip
    """A configuration of ``ft train``: LoRA on all linear layers, rows without padding."""
    from ft_core.config.load import check_config

    return check_config(
        {
            "model": str(folder), "data": str(folder / "rows.jsonl"), "quantization": quantization,
            "max_length": length, "packing": False, "memory": memory, "activations": activations,
            "lora": {"r": rank, "alpha": rank},
            "training": {"batch_size": rows, "gradient_accumulation": 1},
        }
    )  # fmt: skip


def plan(config: Any, wanted: str = "auto", *, limit: int | None = None, host: int | None = None) -> Any:
    """What ``ft plan`` says for the card that is here, or without one for an H200.

    Args:
        wanted: what all layers keep; ``auto`` for the configuration's own ``activations``.
        limit: bytes that torch may have, in place of the card's. host: bytes of host memory, in place of this
            machine's.
    """
    from ft_core.models.device import host_memory
    from ft_core.planning import card_here, find_card, find_outline, plan, with_memory
    from ft_core.planning.engine import CONTEXT

    card = card_here() or find_card("H200")
    if limit is not None:
        card = with_memory(card, min(card.memory, limit + CONTEXT))
    planned = plan(config, find_outline(config), card, host=host_memory()[1] if host is None else host, quick=True)
    if wanted == "auto":
        return planned
    peak = planned.planner.peak(config, card, wanted)
    return dataclasses.replace(planned, peak=peak, times=planned.planner.times(config, card, peak))


@contextmanager
def capped(config: Any) -> Iterator[None]:
    """Within it torch may have no more than the configuration's ``memory``, enforced as in ``ft train``."""
    from ft_core.models import pick_device
    from ft_core.training.memory import memory_capped

    with memory_capped(config, pick_device(), lambda line: None):
        yield


def ft_model(folder: Path, quantization: str, rank: int) -> tuple[Any, Any, Any]:
    """A model on the fast path with its adapter; the path; and the optimizer, of all that is trained."""
    import torch

    import ft_core as ft
    from ft_core import fast

    torch.manual_seed(0)
    model, _ = ft.load(str(folder), quantization=quantization, dtype="bfloat16")
    model.config.use_cache = False
    adapted: Any = ft.add_lora(model, r=rank, alpha=rank)
    adapted.train()
    path = fast.enable(adapted)  # on a GPU it is on already
    optimizer = fast_path.adamw8bit("ft", [p for p in adapted.parameters() if p.requires_grad])
    tidy()
    return adapted, path, optimizer
