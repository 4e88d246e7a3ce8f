"""How long the quickstart takes and how much memory: python benchmarks/quickstart.py, in an environment that has it.

The model's conversion is kept in the user's cache; --cold gives the run an empty one. Writes a row to
benchmarks/results/quickstart.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cold", action="store_true", help="with an empty cache of converted models")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **({"XDG_CACHE_HOME": f"{folder}/cache"} if args.cold else {})}
        command = [sys.executable, "-m", "ft_core.quickstart", "--out", f"{folder}/run"]
        start = time.perf_counter()
        subprocess.run(command, check=True, env=environment)
        seconds = time.perf_counter() - start
        evaluation = json.loads(Path(folder, "run", "run", "evaluation.json").read_text(encoding="utf-8"))
        summary = json.loads(Path(folder, "run", "run", "summary.json").read_text(encoding="utf-8"))
    row = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(seconds, 1),
        "training_seconds": round(summary["seconds"], 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "exact_match": evaluation["metrics"]["exact_match"],
    }
    print(json.dumps(row))
    with open(Path(__file__).with_name("results") / "quickstart.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
