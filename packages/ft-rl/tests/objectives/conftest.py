"""TRL's own trainers, and a stand-in for their model that answers with the log-probabilities it is given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

PRECISIONS = [
    # Everything TRL and we do to a given log-probability is a few roundings and a sum of some dozen terms.
    pytest.param(torch.float64, 1e-12, id="float64"),
    pytest.param(torch.float32, 1e-6, id="float32"),
]


class Scored:
    """Called as TRL calls a model with its fused head: one table of log-probabilities, [B, L - 1], a call."""

    def __init__(self, *tables: torch.Tensor) -> None:
        self.tables = list(tables)

    def __call__(self, *, input_ids: torch.Tensor, labels: torch.Tensor, fused_lm_head: bool, **rest: Any) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        assert fused_lm_head
        table = self.tables.pop(0)
        untrained = labels[:, 1:] == -100
        assert table.shape == untrained.shape
        flat = torch.zeros_like(table.detach())
        return FusedCausalLMOutput(  # whose fields are zero where the label is -100
            log_probs=table.masked_fill(untrained, 0), entropy=flat, mean_logits=flat, is_top1=flat.bool()
        )


def completion_masks(lengths: list[tuple[int, int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and completion masks, [B, width], of sequences of (prompt, completion) tokens, padded on the right."""
    position = torch.arange(width)
    prompt, both = (torch.tensor(x)[:, None] for x in zip(*((p, p + c) for p, c in lengths), strict=True))
    attended = position < both
    return attended.long(), (attended & (position >= prompt)).long()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, given: list[torch.Tensor], tolerance: float) -> None:
    """Equal values, and equal gradients by each of the given tensors."""
    assert ours.dtype == given[0].dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_dtype=False)
    for one, other in zip(torch.autograd.grad(ours, given), torch.autograd.grad(theirs, given), strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The helpers above, for tests."""
    return SimpleNamespace(Scored=Scored, completion_masks=completion_masks, assert_same=assert_same)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"dtype", "tolerance"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("dtype", "tolerance"), PRECISIONS)


@pytest.fixture(scope="session")
def trl(tiny_model: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make one of TRL's trainers around the tiny model."""

    def make(trainer: type, config: type, rows: dict[str, list[Any]], settings: dict[str, Any], **more: Any) -> Any:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM

        class Quiet(trainer):  # type: ignore[valid-type, misc]
            def _send_telemetry(self) -> None:
                pass

        folder = str(tmp_path_factory.mktemp("trl"))
        return Quiet(
            model=AutoModelForCausalLM.from_pretrained(tiny_model),
            args=config(folder, use_cpu=True, bf16=False, report_to="none", **settings),
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
            **more,
        )

    return make
