"""Kernels run on the GPU if there is one, otherwise on CPU tensors by triton's interpreter; the tests are the same."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported, so before any test module is

# No shrinking: a failing example is printed as drawn, and a search for a smaller one would take minutes here.
settings.register_profile("ft", deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
settings.load_profile("ft")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if CUDA else "cpu"


@pytest.fixture(scope="session", autouse=True)
def poisoned() -> Iterator[None]:
    """Every output of every kernel starts as NaN (integers as 113): an element that is not written shows."""
    from ft_kernels import dispatch

    plain = dispatch.allocate

    def allocate_nan(*args: object) -> Tensor:
        tensor = plain(*args)  # type: ignore[arg-type]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

    dispatch.allocate = allocate_nan
    yield
    dispatch.allocate = plain


@pytest.fixture(scope="session")
def launched() -> Callable[..., contextlib.AbstractContextManager[None]]:
    """``with launched("name", ...)`` fails unless exactly those kernels are launched inside, each at least once."""
    pytest.importorskip("triton")
    from ft_kernels.dispatch import launches

    @contextlib.contextmanager
    def check(*names: str) -> Iterator[None]:
        before = launches.copy()
        yield
        assert set(launches - before) == set(names)

    return check


@pytest.fixture(scope="session")
def exact_enough() -> Callable[[str, Tensor, Tensor, Tensor], None]:
    """The rule: error against float64 at most 1.1 times the larger of torch eager's and that of rounding once.

    Errors are L2 norms over all elements given. Triton's interpreter stores bf16 by cutting fp32 off where a GPU rounds
    to nearest, so there, for bf16, "rounding once" is cutting off once: still one operation, of at most one ulp.
    """

    def check(what: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert exact.dtype == torch.float64
        assert actual.shape == exact.shape, what
        if actual.dtype == torch.bfloat16 and not CUDA:
            once = (exact.float().view(torch.int32) & -65536).view(torch.float32)
        else:
            once = exact.to(actual.dtype)
        error, by_eager, by_rounding = ((v.double() - exact).norm().item() for v in (actual, eager, once))
        bound = 1.1 * (max(by_eager, by_rounding) if math.isfinite(by_eager) else by_rounding)
        assert error <= bound, f"{what}: error {error:.3e}, eager {by_eager:.3e}, rounding once {by_rounding:.3e}"

    return check
