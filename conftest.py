"""Shared by the tests of all packages: what the libraries do again for each tiny model, and need not."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest

_modules = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Take what has been imported out of the garbage collector's rounds.

    transformers' trainer asks for a whole round at the end of each training: through half a million objects of the
    libraries, a quarter of a second, half of what training a tiny model takes.
    """
    global _modules
    if len(sys.modules) > _modules + 100:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def compiled_once() -> Iterator[None]:
    """Compile each template of a model card once; PEFT has it compiled for every adapter and checkpoint it saves."""
    try:
        from jinja2 import Environment
    except ImportError:  # a package whose libraries have no use for it, tested alone
        yield
        return
    plain = Environment.compile

    @functools.cache
    def compiled(environment: Any, source: str, *args: Any) -> Any:
        return plain(environment, source, *args)

    def compile(self: Any, source: Any, *args: Any, **keywords: Any) -> Any:
        if keywords or not isinstance(source, str):
            return plain(self, source, *args, **keywords)
        return compiled(self, source, *args)

    Environment.compile = compile  # type: ignore[method-assign]
    yield
    Environment.compile = plain  # type: ignore[method-assign]
