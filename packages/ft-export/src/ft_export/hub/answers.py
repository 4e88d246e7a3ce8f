"""What the Hub answers, in one line each: whether to ask again, and what the person can do about it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

from ft_export.errors import ExportError
from ft_export.progress import Progress

__all__ = ["WAITS", "answered", "status_of"]

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try, where the Hub does not say how long to wait."""
LONGEST_WAIT = 300
"""Seconds that the Hub may ask to wait; it counts requests in windows of five minutes."""
BUSY = (429, 500, 502, 503, 504)
# huggingface_hub itself asks these (and each PUT) again, five times: asking further would only multiply that
RETRIED = ("/preupload/", "/info/lfs/")
RETRIED_SINCE_2_1 = ("/tree/",)


def answered(call: Callable[[], T], doing: str, repo: str, progress: Progress, tries: int = len(WAITS) + 1) -> T:
    """What ``call`` returns, which asks the Hub; asked again a few times where that may help.

    Args:
        call: may run several times.
        doing: what it does, for people: ``"creating the repository"``.

    Raises:
        ExportError: the Hub refuses, stays busy, or is not reached; says what and what to do.
    """
    for attempt in range(tries):
        try:
            return call()
        except ExportError:
            raise
        except Exception as error:
            cause = _cause(error)
            if cause is None:
                raise
            wait = _wait(cause, attempt)
            if wait is None or attempt == tries - 1:
                raise ExportError(_said(cause, doing, repo)) from error
            progress(0, 0, f"{doing}: {_short(cause)}; asking again in {wait:.0f} s")
            time.sleep(wait)
    raise AssertionError("tries is at least 1")


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of huggingface_hub's came from, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _cause(error: BaseException | None) -> BaseException | None:
    """The answer or the broken connection that an error came from; None where it came from something else.

    huggingface_hub wraps what goes wrong in its threads into a RuntimeError.
    """
    while error is not None:
        if status_of(error) is not None or _unreached(error):
            return error
        error = error.__cause__
    return None


def _unreached(error: BaseException) -> bool:
    """Whether there was no answer of the Hub's: httpx's errors (huggingface_hub 2 brings httpx2), being told to stay
    offline, or an answer that is no JSON, which something between here and there gave."""
    known = type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
    return known or isinstance(error, ConnectionError | TimeoutError | json.JSONDecodeError)


def _wait(error: BaseException, attempt: int) -> float | None:
    """Seconds before asking again; None where that is no use."""
    if type(error).__name__ == "OfflineModeIsEnabled" or attempt >= len(WAITS):
        return None
    method, path = _asked(error)
    if method == "PUT" or any(part in path for part in _asked_again_by_itself()):
        return None
    status = status_of(error)
    if status is None:
        return WAITS[attempt]
    if status not in BUSY:
        return None
    said = str(getattr(error, "response").headers.get("retry-after", ""))  # noqa: B009 - of an error of any class
    if said.isdigit():
        return float(said) if int(said) <= LONGEST_WAIT else None
    return WAITS[attempt]


def _asked_again_by_itself() -> tuple[str, ...]:
    from huggingface_hub import __version__

    major, minor, *_ = __version__.split(".")
    return RETRIED + (RETRIED_SINCE_2_1 if (int(major), int(minor)) >= (2, 1) else ())


def _asked(error: BaseException) -> tuple[str, str]:
    """The method and the path that the Hub was asked with; empty where that is not known."""
    try:
        request = getattr(getattr(error, "response", error), "request", None)
    except RuntimeError:  # httpx's word for a request that it was not told of
        request = None
    return str(getattr(request, "method", "")), str(getattr(getattr(request, "url", None), "path", ""))


def _short(error: BaseException) -> str:
    status = status_of(error)
    return f"the Hub answered {status}" if status is not None else "the Hub is not reached"


def _said(error: BaseException, doing: str, repo: str) -> str:
    status = status_of(error)
    if status is None:
        if type(error).__name__ == "OfflineModeIsEnabled":
            return f"{doing}: HF_HUB_OFFLINE is set, and pushing needs the Hub: unset it, or look with dry=yes"
        return (
            f"{doing}: the Hub is not reached ({type(error).__name__}): look after the connection and run the same "
            "command again, what has arrived is not sent again"
        )
    if status == 401:
        return (
            f"{doing}: the Hub does not take the token (401), it is wrong or was revoked: make one that may write at "
            "https://huggingface.co/settings/tokens and log in with `hf auth login`, or set HF_TOKEN"
        )
    if status == 403:
        return (
            f"{doing}: the token has no right to write to {repo} (403){_own_words(error)}: use a token of "
            f"{repo.partition('/')[0]} that may write, or another repo="
        )
    if status == 404:
        return f"{doing}: the Hub has no {repo}, or shows it to others only (404): look at the name, or the token"
    if status == 429:
        return (
            f"{doing}: the Hub asks to wait (429) and was asked several times: run the same command again in five "
            "minutes, what has arrived is not sent again"
        )
    if status >= 500:
        return (
            f"{doing}: the Hub answered {status} several times: run the same command again later, what has arrived is "
            "not sent again"
        )
    return f"{doing}: the Hub answered {status}{_own_words(error)}"


def _own_words(error: BaseException) -> str:
    """What the server said, cut short."""
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f", {said[:200]!r}" if said else ""
