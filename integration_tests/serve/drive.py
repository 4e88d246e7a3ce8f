"""Train, export by ``ft export``, serve what came of it by real servers, and compare what they say.

Run by ``nox -s serve`` in the shared environment; each server has an environment of its own. vLLM and SGLang are
started by the export itself (``engine=``), which compares their greedy tokens and log-probabilities with transformers'
and leaves nothing where they differ: what is told here stands in each ``proof.json``. Open WebUI imports its export
and chats with llama.cpp's server (``webui.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dates import write_config
from webui import chat_through_open_webui

CONTEXT = 512
SYSTEM = 'Write "dates" in\nnumbers.'
PARTS = ("vllm/16bit", "vllm/lora", "vllm/w8a8", "sglang/16bit", "open-webui")
# of these machines' processors, not of the export: no graphs, and little room for keys and values
ON_CPU = {
    "vllm": "--enforce-eager",
    "sglang": "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none "
    "--disable-radix-cache --max-total-tokens 2048",
}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the run and the exports")
    parser.add_argument("--run", type=Path, help="a finished run to use in place of a new one")
    for name in ("vllm", "sglang", "open-webui"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="the folder of the programs of its environment")
    parser.add_argument("--only", nargs="+", default=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}")
    args = parser.parse_args()
    wanted = [part for part in PARTS if part in args.only or part.partition("/")[0] in args.only]
    if not wanted or any(not any(name in (part, part.partition("/")[0]) for part in PARTS) for name in args.only):
        parser.error(f"--only {' '.join(args.only)} (allowed: {', '.join(PARTS)})")
    args.work.mkdir(parents=True, exist_ok=True)
    run = args.run or make_run(args.work)
    found: list[dict[str, Any]] = []
    for part in wanted:
        print(f"\n{part}", flush=True)
        target, _, kind = part.partition("/")
        programs = getattr(args, target.replace("-", "_")).absolute()
        began = time.monotonic()
        try:
            said = serve(run, args.work, target, kind, programs)
            found.append({"part": part, "fault": None, **said})
        except (Failed, AssertionError, OSError) as error:
            found.append({"part": part, "fault": str(error)})
        found[-1]["seconds"] = round(time.monotonic() - began)
    (args.work / "serve.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return tell(found)


class Failed(Exception):
    """A command of ft ended with another code than 0."""


def ft(*words: object) -> None:
    """
    Raises:
        Failed: with the last line that the command wrote.
    """
    # a line at a time, as it comes: a server takes a minute to start
    command = [sys.executable, "-m", "ft_core", *map(str, words)]
    print("$ ft", *command[3:], flush=True)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **ENVIRONMENT}
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    if process.wait():
        raise Failed(f"ft {words[0]} ended with {process.returncode}: {last}")


def make_run(work: Path) -> Path:
    """A LoRA run of a few steps on SmolLM2-135M-Instruct, which its package carries."""
    run = work / "run"
    if (run / "adapter/adapter_config.json").is_file():
        return run
    ft("train", write_config(work, run), "--overwrite")  # what is there was not finished
    return run


def serve(run: Path, work: Path, target: str, kind: str, programs: Path) -> dict[str, Any]:
    """Export and serve; what was found.

    Raises:
        Failed: the export failed, in the server or before.
        AssertionError: Open WebUI does otherwise than it should.
    """
    folder = work / f"{target}-{kind}".strip("-")
    words = ["export", run, "--to", target, "--out", folder, "--overwrite"]
    if target == "open-webui":
        ft(*words, f"num_ctx={CONTEXT}", f"system={SYSTEM}")
        return chat_through_open_webui(folder, run, programs, work)
    ft(*words, "--type", kind, f"context={CONTEXT}", f"engine={programs}", f"engine_args={ON_CPU[target]}")
    served: dict[str, Any] = json.loads((folder / "proof.json").read_text(encoding="utf-8"))["served"]
    return served


def tell(found: list[dict[str, Any]]) -> int:
    """A table for people; the exit code."""
    print(f"\n{'':13}{'tokens equal':>14}{'mean error (bound)':>24}{'largest (bound)':>20}{'ended':>7}{'seconds':>9}")
    for one in found:
        cells = [""] * 4
        if "tokens" in one:
            cells = [
                f"{one['equal']} of {one['tokens']}",
                f"{one['mean']:.2e} ({one['bound_mean']:.2e})",
                f"{one['largest']:.3f} ({one['bound_largest']:.3f})",
                str(one["ended"]),
            ]
        widths = (14, 24, 20, 7)
        row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        print(f"{one['part']:13}{row}{one['seconds']:>9}  {one['fault'] or one.get('said', 'as transformers says')}")
    failed = sum(one["fault"] is not None for one in found)
    print(f"{len(found) - failed} of {len(found)} as they should be", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
