"""The body of one of several processes that work together: FILE is run, and of it FUNCTION is called with WORDS.

Without a FUNCTION the file is a program, and WORDS are its words. ENVIRONMENT is what a launcher would set, and LOG the
file that takes what is printed.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
from typing import Any

given: dict[str, Any] = globals()["GIVEN"]
gc.freeze()  # as in child.py
os.environ.update(given["environment"])
log = os.open(given["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1)
os.dup2(log, 2)
sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # open for as long as the process is there
sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
if given["function"] is None:
    sys.argv = [given["file"], *given["words"]]
    runpy.run_path(given["file"], run_name="__main__")
else:
    runpy.run_path(given["file"])[given["function"]](*given["words"])
