"""One small call of every operation, forward and backward, for compute-sanitizer on a machine with a GPU:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --kernel-regex-exclude kns=nvjet \
        --error-exitcode 1 python sanitize.py [OP ...]

The kernels left out are cuBLAS's own products for Hopper, whose hand-over by barriers racecheck takes for a race.
Without the caching allocator every tensor is an allocation of its own, so that a stray access leaves it.
"""

from __future__ import annotations

import sys

import torch
from compile_cases import CASES, Make

from ft_kernels.dispatch import launches


def main() -> int:
    if not torch.cuda.is_available():
        print("sanitize.py: no CUDA device here, so there is nothing to check", file=sys.stderr)
        return 2
    unknown = set(sys.argv[1:]) - {case.__name__ for case in CASES}
    if unknown:
        print(f"sanitize.py: {', '.join(sorted(unknown))} unknown; there are {', '.join(c.__name__ for c in CASES)}")
        return 2
    failed = 0
    for case in CASES:
        if sys.argv[1:] and case.__name__ not in sys.argv[1:]:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            before = launches.copy()
            try:
                case(Make(dtype, "cuda"))
                torch.cuda.synchronize()
            except Exception as error:
                failed += 1
                print(f"{case.__name__} {dtype}: {type(error).__name__}: {error}")
            else:
                print(f"{case.__name__} {dtype}: {dict(launches - before)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
