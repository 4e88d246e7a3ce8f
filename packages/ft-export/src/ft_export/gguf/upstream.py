"""llama.cpp's own converter, run as the program that the user has named: for architectures that our table has not.

It is run by this Python, as a process of its own, on a folder that holds links to the model's weights, configuration
and tokenizer and nothing else: it asks transformers to run code that comes with a model, and there none is found. What
it writes is read back here and written once more (:mod:`ft_export.gguf.foreign`), and has to pass all checks that
our own files have to.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

from ft_export.bases import DOWNLOADED, check_complete, read_config
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.folders import check_inside, require_space
from ft_export.gguf.converter import Converted
from ft_export.gguf.foreign import check_rounded, read_foreign, rewrite

__all__ = ["OUT_TYPES", "SCRIPT", "convert_upstream", "find_script"]

SCRIPT = "convert_hf_to_gguf.py"
OUT_TYPES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""Its ``--outtype``, as far as ours has it, and the bytes of a weight. All other types are rounded from f32."""
LINES, LONGEST = 3, 400
"""How many of the script's last lines an error has, and how many characters of them."""


def find_script(path: str) -> Path:
    """The script that ``converter=PATH`` names: a llama.cpp folder, or the script in it.

    Raises:
        ExportError: it is neither.
    """
    named = Path(path).expanduser()
    script = named / SCRIPT if named.is_dir() else named
    if not path or not script.is_file() or script.suffix != ".py":
        raise ExportError(
            f"converter={path} is no converter: name the folder of a llama.cpp source tree, or the {SCRIPT} in it"
        )
    return script.absolute()


def convert_upstream(script: Path, model: Path, out: Path, scratch: Path, *, type: str, name: str) -> Converted:
    """Write ``model`` as the GGUF file ``out``, by llama.cpp's script.

    Args:
        script: what :func:`find_script` has found. It is run.
        model: a transformers folder with safetensors weights.
        scratch: an empty folder on the same disk, for what is needed on the way.
        type: of :data:`ft_export.gguf.converter.TYPES`.
        name: the model's name in the file.

    Raises:
        ExportError: broken or incomplete weights, a model whose weights cannot be rounded to this type here, no space,
            or a script that failed, was killed or has written no GGUF file; its last lines are told.
    """
    weights = Checkpoint(model)
    check_complete(model, read_config(model), {key: weights.shape(key) for key in weights})
    first = type if type in OUT_TYPES else "f32"
    size = OUT_TYPES[first] + OUT_TYPES.get(type, OUT_TYPES["q8_0"])
    require_space(out.parent, int(weights.parameters() * size * 1.02) + 50_000_000, "the GGUF file")
    _lay_out(model, weights, scratch / "model")
    made = scratch / "made.gguf"
    _run(script, scratch, ["model", "--outfile", made.name, "--outtype", first, "--model-name", name])
    if not made.is_file() or not made.stat().st_size:
        raise ExportError(f"{script} ended without an error and wrote no file")
    found = read_foreign(made, model, first, str(script))
    if first != type:
        check_rounded(found, type)
    rewrite(made, out, model, type, first)
    return read_foreign(out, model, type, str(script))


def _lay_out(model: Path, weights: Checkpoint, to: Path) -> None:
    """Links to what is read of a model; no code, no pickles, no weights in another layout."""
    to.mkdir()
    for path in sorted(model.iterdir()):
        wanted = any(fnmatch(path.name, pattern) for pattern in DOWNLOADED)
        if path.is_file() and (path in weights.files if path.suffix == ".safetensors" else wanted):
            check_inside(path, model)
            try:
                os.symlink(path.resolve(), to / path.name)
            except OSError:  # Windows lets only some users
                shutil.copyfile(path, to / path.name)


def _run(script: Path, folder: Path, words: list[str]) -> None:
    """Run the script in a folder.

    Raises:
        ExportError: it failed, or was killed.
    """
    nowhere = str(folder / "cache")
    environment = {
        **os.environ,
        # nothing is fetched, and no code of a model's that an earlier program has fetched is found
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": nowhere,
        "HF_HUB_CACHE": nowhere,
        "HF_MODULES_CACHE": nowhere,
        "PYTHONDONTWRITEBYTECODE": "1",  # the folder is the user's
    }
    done = subprocess.run(
        [sys.executable, str(script), *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line.strip() for line in re.split(r"[\r\n]+", done.stderr.decode(errors="replace")) if line.strip()]
        said = " ".join(lines[-LINES:])[-LONGEST:] or "it said nothing"
        how = f"failed with {done.returncode}"
        if done.returncode < 0:
            how = f"was killed by {signal.Signals(-done.returncode).name}"
        raise ExportError(f"{script} {how}: {said}")
