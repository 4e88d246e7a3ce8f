"""How long `ft --help` and `import ft_core` take, as whole processes. Run: python benchmarks/startup.py [--runs 10]

Prints the median, smallest and largest wall time of each, and what a bare interpreter takes, and writes a row to
benchmarks/results/startup.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import ft_core": [sys.executable, "-c", "import ft_core"],
    "ft --help": [sys.executable, "-m", "ft_core", "--help"],
    "ft plugins": [sys.executable, "-m", "ft_core", "plugins"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    row: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "seconds": {},
    }
    print(f"{'':<16}{'median':>8}{'min':>8}{'max':>8}  seconds, {runs} runs after one to warm the file cache")
    for name, command in COMMANDS.items():
        times = []
        for _ in range(runs + 1):
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        times = times[1:]
        median = statistics.median(times)
        row["seconds"][name] = round(median, 4)  # type: ignore[index]
        print(f"{name:<16}{median:>8.3f}{min(times):>8.3f}{max(times):>8.3f}")
    results = Path(__file__).with_name("results") / "startup.jsonl"
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
