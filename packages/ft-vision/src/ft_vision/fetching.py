"""Images behind URLs, fetched once into a cache, from hosts that may be asked and from nowhere else.

A row's URL is written by whoever made the data set, and a request goes out from the machine that trains. So a name is
looked up here, a connection made to an address that was looked at, and a redirection treated as a URL of its own: none
leads to a file, to this machine or to its network, unless the configuration names that host. Proxies that the
environment names are not used.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import ipaddress
import math
import os
import secrets
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from ft_vision.images import ImageError, image_size

__all__ = ["LISTED", "MAX_FETCHED", "cached", "check_url", "is_url", "url_of"]

LISTED = "listed:"
"""Begins a reference to a URL whose host the configuration names, so that it may be a private one."""

MAX_FETCHED = 64 * 1024 * 1024
"""The largest image that is fetched, in bytes."""

SECONDS = 20.0
"""How long a host may say nothing."""
SECONDS_IN_ALL = 120.0
"""How long all of a URL may take from the first connection on: its tries and redirections, and however a host drips."""
TRIES = 3
PAUSE = 0.5
"""Seconds before the second try, and twice as many before the third."""
REDIRECTIONS = 5
AGAIN = (408, 429, 500, 502, 503, 504)
"""Answers after which it is worth asking once more."""
PARTIAL = ".partial-"
LEFT_OVER = 24 * 3600.0
"""Seconds after which nothing is writing a partial file any more."""
FORGET = 60.0
"""Seconds for which a URL that could not be fetched is not asked for again: many rows may have it."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052, 2.1
_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that is given out of IPv6's global unicast (RFC 4291, 2.4). Outside lie site-local addresses, IPv4 ones in the
forms "compatible" and "translated" (::/96, ::ffff:0:0:0/96), and NAT64's of a network's own (64:ff9b:1::/48)."""

_SPECIAL = [
    ipaddress.ip_network(network)
    for network in (
        *("2001::/23", "2001:db8::/32", "3fff::/20"),  # protocols (Teredo's 2001::/32 among them), documentation
        *("192.0.0.0/24", "192.88.99.0/24"),  # protocols, 6to4's relays: RFC 6890, 7526
        "168.63.129.16/32",  # what an Azure machine's host answers it on, as others do on link-local addresses
    )
]
"""Addresses that lead to no public host, beside those that Python's ipaddress knows: its lists grew from 3.11 on."""

_failed: dict[str, tuple[float, str]] = {}
_locks: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()
"""A reference's lock, for as long as a thread has it or waits for it."""
_lock = threading.Lock()


def is_url(text: str) -> bool:
    """Whether a reference is to an image behind a URL."""
    return text.removeprefix(LISTED).lower().startswith(("http://", "https://"))


def url_of(reference: str) -> str:
    """The URL that a reference is to."""
    return reference.removeprefix(LISTED)


def check_url(url: str, allowed: bool | Sequence[str]) -> str:
    """The reference to a URL, where a configuration's ``vision.allow_urls`` allows it. No host is asked.

    Raises:
        ImageError: it is none, or is not allowed.
    """
    parts = _parts(url)
    if allowed is True:
        return url
    if not allowed:
        raise ImageError("nothing is downloaded unless vision.allow_urls says so; set it, or give the path of a file")
    host = (parts.hostname or "").lower()
    bracketed = f"[{host}]" if ":" in host else host  # else an address and a port would read as another address
    if {host, bracketed, f"{bracketed}:{_port(parts)}"}.isdisjoint(one.lower() for one in allowed):
        raise ImageError(f"its host is not among vision.allow_urls ({', '.join(allowed)})")
    return LISTED + url


def cached(reference: str) -> Path:
    """The file that a URL's image is in, fetched unless it is there. Several threads and processes may ask.

    The file is named by the SHA-256 of the URL, and lies in ``ft-vision`` of the Hugging Face cache. What was fetched
    holds an image that :func:`ft_vision.read_image` takes, as far as its header says, or it is not kept.

    Raises:
        ImageError: it cannot be fetched, or is no such image.
    """
    from huggingface_hub import constants

    url = url_of(reference)
    folder = Path(constants.HF_HOME) / "ft-vision"
    path = folder / hashlib.sha256(url.encode()).hexdigest()
    if path.is_file():
        return path
    with _lock:
        own = _locks.setdefault(reference, threading.Lock())
    with own:
        since, why = _failed.get(reference, (0.0, ""))
        if why and time.monotonic() - since < FORGET:
            raise ImageError(why)
        if path.is_file():
            return path
        try:
            _keep(_fetched(url, private=reference.startswith(LISTED)), url, path)
        except ImageError as error:  # noted before another thread can look
            _failed[reference] = (time.monotonic(), str(error))
            raise
    return path


def _keep(data: bytes, url: str, path: Path) -> None:
    """Check the image's header, and put the bytes into their place."""
    try:
        image_size(data)
    except ImageError as error:
        raise ImageError(f"{_short(url)}: what was fetched is of no use: {error}") from error
    beside = path.parent / f"{PARTIAL}{secrets.token_hex(16)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        # Not by tempfile, whose files no one else may read: of a cache that is shared, others have their part.
        with open(beside, "xb") as file:
            file.write(data)
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(beside)
        raise ImageError(f"{_short(url)}: cannot be kept in {path.parent}: {error.strerror or error}") from error


@functools.cache  # once is enough: a cache may hold a million files
def _sweep(folder: Path) -> None:
    """Delete what processes left there that were killed as they wrote."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(PARTIAL):
                with suppress(OSError):  # another process may be as quick
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFT_OVER:
                        os.unlink(entry)


def _fetched(url: str, *, private: bool) -> bytes:
    """The body that a URL answers with.

    Raises:
        ImageError: it cannot be had.
    """
    why, until = "", time.monotonic() + SECONDS_IN_ALL
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE * number)
        try:
            return _asked(url, private, until)
        except _Transient as error:
            why = str(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= until:
                why = f"it took more than {SECONDS_IN_ALL:.0f} seconds"
                break
            why = _reason(error)
            if isinstance(error, ssl.SSLError | ValueError):
                break
    raise ImageError(f"{_short(url)}: cannot be fetched: {why}")


class _Transient(Exception):
    """An answer that may be another one in a moment."""


def _asked(url: str, private: bool, until: float) -> bytes:
    """One attempt, its redirections followed; ``until``, by the monotonic clock, it may take."""
    first, at = _parts(url), url
    for _ in range(REDIRECTIONS + 1):
        parts = _parts(at)
        if (parts.scheme, private) == ("http", False) and first.scheme == "https":
            raise ImageError(f"{_short(url)}: leads from https to http")
        if private and (parts.hostname, parts.port) != (first.hostname, first.port):
            raise ImageError(f"{_short(url)}: leads to another host, {parts.hostname}: give the URL there")
        connection = _connection(parts, private, until)
        try:
            target = quote(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", safe=_SAFE)
            connection.request("GET", target, headers=_HEADERS)
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308) and answer.getheader("Location"):
                at = urljoin(at, str(answer.getheader("Location")))
                continue
            if answer.status in AGAIN:
                raise _Transient(f"HTTP {answer.status} {answer.reason}")
            if answer.status != 200:
                raise ImageError(f"{_short(url)}: cannot be fetched: HTTP {answer.status} {answer.reason}")
            return _body(answer, url)
        finally:
            connection.close()
    raise ImageError(f"{_short(url)}: is redirected more than {REDIRECTIONS} times")


def _body(answer: http.client.HTTPResponse, url: str) -> bytes:
    length = answer.getheader("Content-Length")
    announced = int(length) if length is not None and length.isdigit() else 0
    made = bytearray()
    while max(announced, len(made)) <= MAX_FETCHED:
        part = answer.read1(1 << 20)
        if not part:
            if len(made) < announced:
                raise _Transient("the answer ended too early")
            return bytes(made)
        made += part
    raise ImageError(f"{_short(url)}: is larger than {MAX_FETCHED:,} bytes")


_SAFE = "/%:=&?~#+!$,;'@()*[]|"
_HEADERS: Mapping[str, str] = {"User-Agent": "ft-vision", "Accept": "image/*", "Accept-Encoding": "identity"}


def _parts(url: str) -> SplitResult:
    """A URL's parts, of a scheme that is asked.

    Raises:
        ImageError: it is no such URL.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an address or a port that is none
        raise ImageError(f"{_short(url)}: is no URL") from None
    if not good:
        raise ImageError(f"{_short(url)}: is no http or https URL")
    if parts.username is not None or parts.password is not None:
        raise ImageError(f"{_short(url.rpartition('@')[2])}: has a name or password in it, which is not sent")
    return parts


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _connection(parts: SplitResult, private: bool, until: float) -> http.client.HTTPConnection:
    host = (parts.hostname or "").encode("idna").decode() if not _is_address(parts.hostname or "") else parts.hostname
    assert host is not None
    # The port is always told: without one, http.client takes what follows the last colon of an IPv6 address for it.
    if parts.scheme == "https":
        return _Https(host, _port(parts), private, until)
    return _Http(host, _port(parts), private, until)


class _Http(http.client.HTTPConnection):
    """A connection to an address that was looked at."""

    def __init__(self, host: str, port: int, private: bool, until: float) -> None:
        super().__init__(host, port, timeout=SECONDS)
        self._private, self._until = private, until

    def connect(self) -> None:
        self.sock = _socket(self.host, self.port, self._private, self._until)


class _Https(http.client.HTTPSConnection):
    """The same, with the host's certificate checked."""

    def __init__(self, host: str, port: int, private: bool, until: float) -> None:
        self._checking = ssl.create_default_context()
        self._checking.sslsocket_class = _Secure
        super().__init__(host, port, timeout=SECONDS, context=self._checking)
        self._private, self._until = private, until

    def connect(self) -> None:
        plain = _socket(self.host, self.port, self._private, self._until)
        try:
            made = self._checking.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        except BaseException:
            plain.close()
            raise
        try:
            assert isinstance(made, _Secure)
            made.until = self._until
            made.settimeout(_left(self._until))
            made.do_handshake()  # of all of which a timeout is the limit
        except BaseException:
            made.close()
            raise
        self.sock = made


def _left(until: float) -> float:
    """The seconds for which a host may be waited for."""
    left = min(SECONDS, until - time.monotonic())
    if left <= 0:
        raise TimeoutError
    return left


class _Plain(socket.socket):
    """A socket that is read from until a moment: a timeout alone begins anew with every byte."""

    until = math.inf

    def recv_into(self, *given: Any, **named: Any) -> int:  # what http.client reads with
        self.settimeout(_left(self.until))
        return super().recv_into(*given, **named)


class _Secure(ssl.SSLSocket):
    """The same of TLS."""

    until = math.inf

    def recv_into(self, *given: Any, **named: Any) -> int:
        self.settimeout(_left(self.until))
        return super().recv_into(*given, **named)


def _socket(host: str, port: int, private: bool, until: float) -> socket.socket:
    """A socket that is connected to the host, or to none of its addresses if one of them is not public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not private and (hidden := [where[0] for *_, where in found if not _is_public(str(where[0]))]):
        raise ImageError(
            f"the host {host} is {hidden[0]}, which is no public address: to ask it, name it in vision.allow_urls"
        )
    failure: OSError | None = None
    for family, kind, protocol, _, where in found:
        made = _Plain(family, kind, protocol)
        made.until = until
        try:
            made.settimeout(_left(until))
            made.connect(where)
            return made
        except OSError as error:
            made.close()
            failure = error
    raise failure or OSError(f"the host {host} has no address")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_public(text: str) -> bool:
    """Whether an address is one of the public internet. An IPv4 address in an IPv6 one is what counts of it."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        inner = inner or address.ipv4_mapped or address.sixtofour
        if inner is None and address not in _UNICAST:
            return False
        address = inner or address
    return address.is_global and not address.is_multicast and not any(address in network for network in _SPECIAL)


def _reason(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return "its host is not known"
    if isinstance(error, TimeoutError):
        return f"no answer for {SECONDS:.0f} seconds"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _short(url: str) -> str:
    return url if len(url) <= 120 else url[:117] + "…"
