"""The exactness benchmark measures on a CPU what it says, and holds it against the bar."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
exactness = pytest.importorskip("exactness")


@pytest.mark.parametrize("family", exactness.FAMILIES)
def test_heads_are_128_wide(family: str) -> None:
    config = exactness.FAMILIES[family](256, 1).config
    assert (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) == 128


def test_a_row_for_each_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    results = tmp_path / "exactness.jsonl"
    small = "--device cpu --families qwen2 --dtypes fp32,bf16 --hidden 128 --layers 1 --tokens 24 --batches 2 --worst 1"
    monkeypatch.setattr(sys, "argv", ["exactness.py", *small.split(), "--results", str(results)])
    exactness.main()
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [(row["dtype"], row["mode"]) for row in rows] == [
        ("fp32", "adapter"), ("fp32", "full"), ("bf16", "adapter"), ("bf16", "full"),
    ]  # fmt: skip
    assert [row["parameters"] for row in rows] == [14, 15, 14, 15]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ft"] / row["eager"])
        assert row["mismatches"] == []
    assert "of 4 within the bar" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["exactness.py", "--device", "cpu", "--families", "gpt"])
    with pytest.raises(SystemExit) as stop:
        exactness.main()
    assert stop.value.code == 2
    assert "unknown: gpt" in capsys.readouterr().err
