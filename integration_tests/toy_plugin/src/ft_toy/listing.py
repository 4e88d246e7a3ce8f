"""``ft export RUN --to toy``."""

import os

from ft_core.errors import RunError
from ft_core.plugins import ExportRequest, ExportResult


def export(request: ExportRequest) -> ExportResult:
    target = request.out / "files.txt"
    if target.exists() and not request.overwrite:
        raise RunError(f"{target} is there already: add --overwrite to replace it")
    names = sorted(path.name for path in request.run.iterdir() if path.is_file())
    if request.type == "loud":
        names = [name.upper() for name in names]
    request.out.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(".files.txt.partial")
    beside.write_text(request.options.get("separator", "\n").join(names))
    os.replace(beside, target)
    return ExportResult(files=(target,), checks=(f"{len(names)} files",), next_command=f"cat {target}")
