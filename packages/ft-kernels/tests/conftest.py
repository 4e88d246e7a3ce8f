"""Kernels run on the GPU if there is one, otherwise on CPU tensors by triton's interpreter; the tests are the same."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported, so before any test module is


def patch_once() -> None:
    """Let triton's interpreter replace the language's functions once for a launch and module.

    It does so again at each call of a function inside of a kernel, with the same result, which is a sixth of its time.
    """
    try:
        from triton.runtime import interpreter

        patch, empty = interpreter._patch_lang, interpreter._LangPatchScope
    except (ImportError, AttributeError):  # another triton: slower, and the same
        return
    patched: set[int] = set()

    class Scope(empty):  # type: ignore[misc, valid-type]
        def restore(self) -> None:
            patched.clear()
            super().restore()

    @functools.cache
    def languages(fn: Any) -> set[int]:
        known = {id(interpreter.tl), id(interpreter.tl.core)}
        return {id(value) for value in fn.__globals__.values()} & known

    def patch_unless_done(fn: Any) -> Any:
        modules = languages(fn)
        if modules <= patched:
            return empty()
        outermost = not patched
        scope = patch(fn)
        patched.update(modules)
        if not outermost:
            return scope
        whole = Scope()
        whole._changes = scope._changes
        return whole

    interpreter._patch_lang = patch_unless_done


def leave_out_what_is_thrown_away() -> None:
    """A fifth and a tenth of the interpreter's time: the same results without work that nothing comes of.

    Each sum and product of integers is computed again in int64 to see whether it overflows, for an assertion that is
    made in debugging alone; and numpy's name of a type is looked up in a table that is built for each look.
    """
    try:
        from triton import language as tl
        from triton.runtime import interpreter

        builder, plain = interpreter.interpreter_builder, interpreter._get_np_dtype
        if not builder.options.debug:
            builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):  # another triton: slower, and the same
        return
    known = functools.cache(plain)

    def looked_up_once(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return plain(scalar) if isinstance(scalar, tl.pointer_type) else known(scalar)

    interpreter._get_np_dtype = looked_up_once


if not CUDA:
    patch_once()
    leave_out_what_is_thrown_away()

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
def exact_enough() -> Callable[[str, Tensor, Tensor | Sequence[Tensor], Tensor], None]:
    """The rule: error against float64 at most 1.1 times the larger of torch eager's and that of rounding once.

    Errors are L2 norms over all elements given. Triton's interpreter stores bf16 by cutting fp32 off where a GPU rounds
    to nearest, so there, for bf16, "rounding once" is cutting off once: still one operation, of at most one ulp.
    Of several results of eager, the one with the largest error counts.
    """

    def check(what: str, actual: Tensor, eager: Tensor | Sequence[Tensor], exact: Tensor) -> None:
        assert exact.dtype == torch.float64
        assert actual.shape == exact.shape, what
        if actual.dtype == torch.bfloat16 and not CUDA:
            once = (exact.float().view(torch.int32) & -65536).view(torch.float32)
        else:
            once = exact.to(actual.dtype)
        error, by_rounding = ((v.double() - exact).norm().item() for v in (actual, once))
        eagers = [eager] if isinstance(eager, Tensor) else eager
        by_eager = max((v.double() - exact).norm().item() for v in eagers)
        bound = 1.1 * (max(by_eager, by_rounding) if math.isfinite(by_eager) else by_rounding)
        assert error <= bound, f"{what}: error {error:.3e}, eager {by_eager:.3e}, rounding once {by_rounding:.3e}"

    return check


@pytest.fixture(scope="session")
def in_other_orders() -> Callable[[Callable[..., Any], torch.dtype], list[Callable[..., Any]]]:
    """A head's function, and in fp32, where the products round as much as all else, the same with features shuffled.

    That changes nothing but the order in which products add up: one order of eager's shows but one sample of its error.
    Gradients come back in the given order.
    """

    def shuffled(function: Callable[..., Any], seed: int) -> Callable[..., Any]:
        def run(hidden: Tensor, weight: Tensor, *others: Any, lora: Any, **keywords: Any) -> Any:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed)).to(weight.device)
            lora = None if lora is None else (lora[0][:, order], *lora[1:])
            return function(hidden[..., order], weight[:, order], *others, lora=lora, **keywords)

        return run

    def several(function: Callable[..., Any], dtype: torch.dtype) -> list[Callable[..., Any]]:
        return [function, *(shuffled(function, seed) for seed in range(4 if dtype == torch.float32 else 0))]

    return several
