"""What asking a server of the user's has in common: which addresses are taken, and how they are called."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ft_core.errors import ConfigError

__all__ = ["bearer", "check_address", "direct"]


def check_address(url: str) -> str:
    """The address as it is.

    Raises:
        ValueError: it is not one of http or https, or holds a password, which would stand in the run's folder.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an address that begins with http:// or https://")
    if parts.password:
        raise ValueError("an address without a password: it would stand in the run's folder; use token_file")
    return url


class _Stays(urllib.request.HTTPRedirectHandler):
    """A server that sends what it is given elsewhere is not followed."""

    def redirect_request(self, *_: Any) -> None:
        return None


def direct() -> urllib.request.OpenerDirector:
    """What opens an address itself: by no proxy, following no redirection."""
    return urllib.request.build_opener(_Stays, urllib.request.ProxyHandler({}))


def bearer(token_file: str | None) -> dict[str, str]:
    """The header that lets a request in, from the file that holds its token; empty without one.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not token_file:
        return {}
    try:
        token = Path(token_file).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"token_file {token_file} cannot be read: {error.strerror or error}") from error
    return {"Authorization": f"Bearer {token}"}
