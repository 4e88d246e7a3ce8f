"""``ft merge RUN``: write a 16-bit model from a run's adapter and its base."""

from __future__ import annotations

import argparse
import logging
import warnings
from functools import partial
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a PEFT adapter folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to write (default: RUN/merged)")
    parser.add_argument("--base", metavar="MODEL", help="the base model's folder or Hub name, if not the adapter's own")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), help="default: the base's; bfloat16 for fp32 bases")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge")
    parser.add_argument(
        "--skip-proof", action="store_true", help="do not compare what the models say (needs both in memory, in fp32)"
    )


def run(args: argparse.Namespace) -> int:
    """Merge and print what was checked.

    Raises:
        ft_core.errors.FtError: bad input, no space, or a failed check.
    """
    from ft_export.merging import merge
    from ft_export.plugin import as_ft_error, shown

    _quiet()
    result = as_ft_error(merge)(
        args.run,
        args.out,
        base=args.base,
        dtype=args.dtype,
        overwrite=args.overwrite,
        skip_proof=args.skip_proof,
        say=partial(print, flush=True),  # a pipe gets each line when it is true, not when the merge is over
        progress=shown(),
    )
    print(f"merged model: {result.folder}")
    return 0


def _quiet() -> None:
    """Silence the libraries' own chatter in this process; what matters is said by the merge itself."""
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
