"""The page in a real browser: no errors, nothing fetched, nothing cut, from a telephone to a wide screen."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ft_core.report import write_report

MakeRun = Callable[..., Path]


@pytest.fixture
def page(make_run: MakeRun) -> Path:
    word = "averyveryverylongwordwithoutaspace" * 6
    rows = [
        {
            "kind": "train",
            "step": step,
            "loss": math.nan if step == 50 else 3 / step,
            "learning_rate": 2e-5 / step,
            "tokens_per_second": 123456.7,
            "memory": 70 * 2**30,
            "seconds": step,
            "rewards/chosen_and_rejected": step - 50.0,
            "reward": step * 1e3,
            **{f"rewards/{word}{i}/share": step * i * 1e3 for i in range(5)},
        }
        for step in range(1, 101)
    ]
    sample = {"prompt": word, "expected": word, "before": "<script>document.title='owned'</script>", "after": word * 3}
    run = make_run(
        name="a-run-with-a-rather-long-name-that-has-to-go-somewhere",
        metrics=[*rows, {"kind": "eval", "step": 100, "loss": 0.5}],
        evaluation={
            "data": "held_out.jsonl",
            "rows": 100,
            "metrics": {
                "exact_match": {"before": 0.03, "after": 0.98},
                "perplexity": {"before": 1.2e9, "after": 1.0206},
                "mean_length_of_the_answers": {"before": 12345.6, "after": None},
            },
            "samples": [sample] * 12,
        },
    )
    written = [
        {
            "step": step,
            "rank": rank,
            "reward": -12345.678,
            "rewards": {word: 1.0, "b": 2.0},
            "prompt": word,
            "completion": word * 9,
        }
        for step in (1, 2, 3, 100_000)
        for rank in ("best", "worst")
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return write_report(run)


def requests(browser: Any) -> list[str]:
    return [event["request"]["url"] for event in browser.happened("Network.requestWillBeSent")]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 768, 1400, 2560])
def test_it_opens_whole(browser: Any, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert requests(browser) == [page.resolve().as_uri()]
    assert browser.happened("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    assert browser.ask("document.documentElement.scrollWidth") == width
    past = (
        "[...document.querySelectorAll('main *')].filter(e => {const r = e.getBoundingClientRect();"
        " return r.width > 1 && (r.right > innerWidth + 1 || r.left < -1)}).map(e => e.outerHTML.slice(0, 80))"
    )
    assert browser.ask(past) == []
    assert browser.ask("document.title").endswith("→ a-run-with-a-rather-long-name-that-has-to-go-somewhere")
    assert browser.ask("document.querySelectorAll('figure .area svg path.line').length") >= 5
    assert browser.ask("document.querySelectorAll('table').length") >= 7
    light = browser.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]") > 128
    assert light is not dark


def test_lines_are_drawn_over_the_whole_plot(browser: Any, page: Path) -> None:
    browser.open(page, width=1000)
    share = browser.ask(
        "(() => {const line = document.querySelector('#learning-rate path.line').getBoundingClientRect();"
        " const area = document.querySelector('#learning-rate .area').getBoundingClientRect();"
        " return [line.width / area.width, line.height / area.height]})()"
    )
    assert share[0] == pytest.approx(1, abs=0.05)
    assert 0.9 < share[1] < 1.05


def test_values_are_read_with_pointer_and_keys(browser: Any, page: Path) -> None:
    browser.open(page, width=1000)
    at = browser.ask(
        "(() => {const r = document.querySelector('#loss .area').getBoundingClientRect();"
        " scrollTo(0, r.top - 100); return [r.left + r.width / 2, 110]})()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
    said = browser.ask("document.querySelector('#loss .readout').innerText")
    assert "step 51" in said
    assert "0.058824" in said  # 3/51
    browser.ask("document.querySelector('#loss .area').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    assert "step 52" in browser.ask("document.querySelector('#loss .readout').innerText")
    assert browser.happened("Runtime.exceptionThrown") == []


def test_the_page_is_whole_without_script(browser: Any, page: Path) -> None:
    count = "[document.querySelectorAll('svg path').length, document.body.innerText.length]"
    browser.open(page, width=1000)
    with_script = browser.ask(count)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page, width=1000)
        assert browser.ask(count) == with_script
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_text_is_legible_on_its_ground(browser: Any, page: Path) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 for text, in both schemes."""
    script = """(() => {
      const parse = (c) => c.match(/[\\d.]+/g).map(Number);
      const light = (c) => {
        const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = parse(c).slice(0, 3).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ground = (e) => {
        const c = getComputedStyle(e).backgroundColor;
        return parse(c)[3] === 0 ? ground(e.parentElement) : c;
      };
      const poor = new Set();
      for (const e of document.querySelectorAll("main *")) {
        if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
        if (e.closest("svg, script")) continue;
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        if (contrast < 4.5) poor.add(e.tagName + "." + e.className + " " + contrast.toFixed(2));
      }
      return [...poor];
    })()"""
    for dark in (False, True):
        browser.open(page, width=1000, dark=dark)
        assert browser.ask(script) == []


def test_it_prints(browser: Any, page: Path) -> None:
    browser.open(page, width=1000, dark=True)
    made = base64.b64decode(browser.call("Page.printToPDF")["data"])
    assert made.startswith(b"%PDF-")
    assert made.count(b"/Type /Page\n") >= 2
