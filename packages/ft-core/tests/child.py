"""The body of a process that runs `ft`: WORDS are its words, LOG the file that takes what it prints."""

from __future__ import annotations

import gc
import os
import sys

from ft_core.cli import main

gc.freeze()  # what was imported before the fork is no garbage, and a round through it takes a quarter of a second
words: list[str] = globals()["WORDS"]
log = os.open(globals()["LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1)
os.dup2(log, 2)
sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  # open for as long as the process is there
sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
sys.exit(main(words))
