"""``ft merge RUN``: write a 16-bit model from a run's adapter and its base."""

from __future__ import annotations

import argparse
import logging
import warnings
from functools import partial
from pathlib import Path

from ft_export.merging.combination import COMBINATIONS, SIGNS, weighted

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a PEFT adapter folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to write (default: RUN/merged)")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="PATH[:WEIGHT]",
        help="another run or adapter on the same base, and its weight (default: 1); may be given several times",
    )  # fmt: skip
    parser.add_argument("--weight", type=float, default=1.0, metavar="W", help="the weight of RUN's own (default: 1)")
    parser.add_argument(
        "--combination", choices=COMBINATIONS,
        help="how several adapters become one, in PEFT's words; default: cat, the weighted sum of their changes",
    )  # fmt: skip
    parser.add_argument(
        "--density", type=float, metavar="D", help="the share of values that ties, dare and pruning keep"
    )
    parser.add_argument("--majority-sign", choices=SIGNS, help="how ties elects a sign (default: total)")
    parser.add_argument("--rank", type=int, help="of the result of an svd (default: the largest of the adapters')")
    parser.add_argument("--seed", type=int, default=0, help="of dare's random masks (default: 0)")
    parser.add_argument("--base", metavar="MODEL", help="the base model's folder or Hub name, if not the adapter's own")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), help="default: the base's; bfloat16 for fp32 bases")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda|auto", help="where to compute (default: cpu)")
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
        adapters=as_ft_error(lambda: [weighted(text) for text in args.adapter])(),
        weight=args.weight,
        combination=args.combination,
        density=args.density,
        majority_sign=args.majority_sign,
        rank=args.rank,
        seed=args.seed,
        base=args.base,
        dtype=args.dtype,
        device=args.device,
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
