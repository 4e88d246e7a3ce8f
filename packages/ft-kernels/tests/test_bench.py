"""The bench without a GPU: it says so; and its cases compare what computes the same."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ft_kernels import dispatch
from ft_kernels.bench import __main__ as bench
from ft_kernels.bench import harness, report
from ft_kernels.bench.harness import Case, Model, Times

TINY = Model(hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocabulary=67)
TOKENS = 64


def cases(group: str) -> list[Case]:
    return list(importlib.import_module(f"ft_kernels.bench.{group}").cases(["8b"], TOKENS))


@pytest.fixture
def tiny(monkeypatch):
    """Small arguments on the CPU, and the reference in place of the interpreter."""
    monkeypatch.setattr(harness, "DEVICE", "cpu")
    monkeypatch.setitem(harness.MODELS, "8b", TINY)
    monkeypatch.setattr(dispatch, "_INTERPRETING", False)
    for group in ("heads", "lora"):
        monkeypatch.setattr(importlib.import_module(f"ft_kernels.bench.{group}"), "TOKENS", TOKENS, raising=False)
    monkeypatch.setattr(importlib.import_module("ft_kernels.bench.attention"), "LENGTHS", (8, 32))


def run(function, arguments, allow_unused=False) -> list[Tensor]:
    leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    result = function(*arguments)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    differentiable = [t for t in outputs if t.requires_grad]
    if not differentiable:
        return outputs
    torch.manual_seed(1)
    upstream = [torch.randn(t.shape).to(t.dtype) for t in differentiable]
    return [*outputs, *torch.autograd.grad(differentiable, leaves, upstream, allow_unused=allow_unused)]


@pytest.mark.parametrize("group", bench.GROUPS)
def test_ours_and_eager_compute_the_same(tiny, group):
    for case in cases(group):
        results = []
        for name in ("ours", "eager"):
            if name in case.variants:
                torch.manual_seed(0)
                results.append(run(case.variants[name], case.make()))
        for ours, eager in zip(*results, strict=True) if len(results) == 2 else ():
            difference = (ours.double() - eager.double()).norm() / eager.double().norm().clamp_min(1e-9)
            assert difference < 2e-2, (case.op, case.shape, float(difference))


@pytest.mark.parametrize("group", bench.GROUPS)
def test_a_floor_runs(tiny, group):
    for case in cases(group):
        for name in ("floor", "left out"):
            if name in case.variants:
                run(case.variants[name], case.make(), allow_unused=True)


def test_without_a_gpu_it_says_so_in_one_line():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "ft_kernels.bench"], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr


def test_a_model_that_is_not_known(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--models", "8b,9b"])
    assert "9b unknown; allowed are 1b, 8b, 70b" in capsys.readouterr().err


ROOF = {"copy": 3.0, "copy of 128 MiB": 2.9, "product": 700.0}


def times(forward: float, backward: float | None = None, peak: float = 0.0) -> Times:
    return Times(forward, backward, 0.01, peak, 1.0)


def case(op: str, **arguments: object) -> Case:
    return Case(op, "8b", "a shape", make=tuple, variants={}, **arguments)


def test_shares_and_ratios():
    swiglu = case("swiglu", moved={"forward": 3 * 10**9, "backward": 5 * 10**9})
    measured = {"ours": times(1.0, 2.0), "eager": times(2.0, 3.0), "liger": times(1.0, 1.9)}
    forward, backward, both = report.rows_of(swiglu, measured, {"compile": "it broke"}, ROOF)
    assert (forward["TB/s"], forward["share"]) == (3.0, 1.0)
    assert both["TB/s"] == pytest.approx(8 / 3)
    assert forward["ratios"] == {"eager": 2.0, "liger": 1.0}
    assert report.judge(forward, 16384) == []
    assert report.judge(backward, 16384) == ["83% of the copy, not 85%", "5% slower than liger"]
    assert report.judge(both, 16384) == ["3% slower than liger"]
    assert report.judge(backward, 4096) == ["5% slower than liger"]
    attention = [{**row, "op": "packed_attention", "ratios": {"triton": 0.85}} for row in (backward, both)]
    assert [report.judge(row, 4096) for row in attention] == [[], ["18% slower than triton"]]
    text = report.table([forward, {**backward, "missed": ["slow"]}, both])
    assert "error" in text
    assert text.splitlines()[2].endswith("FAIL: slow")
    assert text.splitlines()[1].endswith("pass")


def test_a_gradient_made_in_forward_is_compared_as_a_whole():
    both = case("cross_entropy", moved={"forward": 1, "backward": 2}, split=False)
    rows = report.rows_of(both, {"ours": times(1, 2), "liger": times(2.9, 0.0)}, {}, ROOF)
    assert ["ratios" in row for row in rows] == [False, False, True]


def test_floors_and_peaks():
    head = case("linear_cross_entropy", flop={"forward": 10**9})
    (_, _, both) = report.rows_of(head, {"ours": times(1.3, 0.0, peak=1.5), "floor": times(1.0)}, {}, ROOF)
    assert report.judge(both, 16384) == ["1.300 of the floor, not 1.25", "1.50 GiB, not 1.0"]
    layer = case("lora_layer_nf4")
    measured = {"ours": times(1.5, 2.5), "floor": times(1.0, 2.0), "left out": times(0.45, 0.4)}
    forward, _, both = report.rows_of(layer, measured, {}, ROOF)
    assert (forward["over_floor"], both["over_floor"]) == (pytest.approx(1.05), pytest.approx(1.05))
    assert report.judge(forward, 16384) == []


def test_the_mean_of_nf4():
    rows = [{"op": "nf4_dequantize", "model": "8b", "TB/s": rate} for rate in (2.5, 2.6, 2.7)]
    mean = report.mean_row(rows)
    assert mean["TB/s"] == pytest.approx(2.6)
    assert report.judge(mean, 16384) == ["2.60 TB/s, not 2.65"]
    assert report.mean_row([]) is None


def test_ours_failing_is_a_line_of_its_own():
    (row,) = report.rows_of(case("rope"), {"eager": times(1.0, 1.0)}, {"ours": "RuntimeError: no"}, ROOF)
    assert report.judge(row, 16384) == ["no result"]
    assert row["errors"] == {"ours": "RuntimeError: no"}
    assert "FAIL: no result" in report.table([{**row, "missed": ["no result"]}])


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, capsys):
    out = tmp_path / "results" / "kernels.jsonl"
    arguments = ["--ops", "rms_norm", "--models", "1b", "--tokens", "256", "--no-compile", "--out", str(out)]
    assert bench.main(arguments) in (0, 1)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["pass"] for row in rows] == ["forward", "backward", "both"]
    assert {"date", "gpu", "driver", "versions", "roofline", "ms", "share"} <= set(rows[0])
    assert "rms_norm" in capsys.readouterr().out
