"""Images behind URLs: a local server stands for the internet; which hosts may be asked, and what is kept."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ft_vision import fetching, read_image
from ft_vision.fetching import LISTED, cached, check_url
from ft_vision.images import ImageError
from ft_vision.rows import open_reference


class Server(ThreadingHTTPServer):
    """Answers by path, and counts what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: Counter[str] = Counter()
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}"

    def image(self, path: str, colour: Any = "red", size: tuple[int, int] = (56, 56)) -> str:
        buffer = io.BytesIO()
        Image.new("RGB", size, colour).save(buffer, "PNG")
        return self.add(path, buffer.getvalue())

    def add(self, path: str, body: bytes = b"", status: int = 200, **headers: str) -> str:
        self.answers[path] = (status, headers, body)
        return self.url + path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        server.asked[self.path] += 1
        status, headers, body = server.answers.get(self.path, (404, {}, b""))
        if status == 503:  # and then it works
            server.answers[self.path] = (200, headers, body)
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "_failed", {})
    monkeypatch.setattr(fetching, "PAUSE", 0.0)
    return tmp_path / "cache" / "ft-vision"


def asking(*urls: str) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": url}, {"type": "text", "text": "which digit?"}],
                },
                {"role": "assistant", "content": "1"},
            ]
        }
        for url in urls
    ]


def test_it_is_fetched_once_and_kept(server: Server, cache: Path) -> None:
    url = LISTED + server.image("/a.png?size=1&x=%20")
    for _ in range(2):
        assert read_image(open_reference(url)).getpixel((0, 0)) == (255, 0, 0)
    assert server.asked == {"/a.png?size=1&x=%20": 1}
    assert [len(path.name) for path in cache.iterdir()] == [64]


def test_others_may_read_what_is_kept_as_the_umask_says(server: Server) -> None:
    before = os.umask(0o027)
    try:
        assert cached(LISTED + server.image("/a.png")).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_what_a_killed_process_left_goes_after_a_day(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    for name, hours in ((".partial-old", 25), (".partial-new", 23), ("other", 25)):
        (cache / name).write_bytes(b"x")
        os.utime(cache / name, (time.time() - hours * 3600,) * 2)
    kept = cached(LISTED + server.image("/a.png"))
    assert {path.name for path in cache.iterdir()} == {".partial-new", "other", kept.name}


def test_a_failure_is_known_to_a_thread_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    url, held = "https://a.org/a.png", []

    class Noted(dict[str, Any]):
        def __setitem__(self, reference: str, what: Any) -> None:
            held.append(fetching._locks[reference].locked())
            super().__setitem__(reference, what)

    def fetched(url: str, *, private: bool) -> bytes:
        raise ImageError("gone")

    monkeypatch.setattr(fetching, "_failed", Noted())
    monkeypatch.setattr(fetching, "_fetched", fetched)
    for _ in range(2):
        with pytest.raises(ImageError, match="gone"):
            cached(url)
    assert held == [True]  # once: that it is known is no failure anew, which would never be forgotten
    assert not fetching._locks


def test_a_url_has_one_lock_while_a_thread_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    url, waits, held = "https://a.org/a.png", threading.Event(), []

    class Counted:
        """The lock of the locks, which says when a second thread has found the URL's."""

        def __init__(self) -> None:
            self.inner, self.count = threading.Lock(), 0

        def __enter__(self) -> None:
            self.inner.acquire()

        def __exit__(self, *what: object) -> None:
            self.count += 1
            if self.count == 2:
                waits.set()
            self.inner.release()

    def fetched(address: str, *, private: bool) -> bytes:
        if threading.current_thread() is first:
            assert waits.wait(30)
        else:
            first.join()
            lock = fetching._locks.get(url)  # what a third thread would wait for
            held.append(lock is not None and lock.locked())
        raise ImageError("gone")

    def ask() -> None:
        with suppress(ImageError):
            cached(url)

    monkeypatch.setattr(fetching, "FORGET", 0.0)
    monkeypatch.setattr(fetching, "_lock", Counted())
    monkeypatch.setattr(fetching, "_fetched", fetched)
    first, second = (threading.Thread(target=ask) for _ in range(2))
    first.start()
    while url not in fetching._locks:
        time.sleep(0.001)
    second.start()
    for thread in (first, second):
        thread.join()
    assert held == [True]


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        (b"<html>", {}, "what was fetched is of no use: .* holds no image format"),
        (b"", {}, "is empty"),
        (b"", {"status": 404}, "HTTP 404"),
        (b"", {"status": 302, "Location": "file:///etc/passwd"}, "file:///etc/passwd: is no http or https URL"),
        (b"", {"status": 302, "Location": "http://localhost/"}, "leads to another host, localhost"),
        (b"", {"status": 302, "Location": "/x"}, "redirected more than 5 times"),
        (b"", {"Content_Length": str(10**9)}, "larger than 67,108,864 bytes"),
        (b"\x89PNG", {"Content_Length": "9"}, "the answer ended too early"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_not_kept(
    body: bytes, options: dict[str, Any], message: str, server: Server, cache: Path
) -> None:
    url = LISTED + server.add("/x", body, **options)
    for _ in range(2):  # the second time it is not asked for
        with pytest.raises(ImageError, match=message) as raised:
            cached(url)
        assert "\n" not in str(raised.value)
    assert server.asked["/x"] == {"the answer ended too early": 3, "redirected more than 5 times": 6}.get(message, 1)
    assert not cache.exists() or not list(cache.iterdir())


def test_an_answer_without_a_length_has_a_limit(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_FETCHED", 1000)
    url = server.add("/long", b"x" * 1001, Content_Length="")
    with pytest.raises(ImageError, match="larger than 1,000 bytes"):
        cached(LISTED + url)


def test_a_busy_host_is_asked_again(server: Server) -> None:
    url = server.image("/a.png")
    server.add("/a.png", server.answers["/a.png"][2], 503)
    assert read_image(str(cached(LISTED + url))).size == (56, 56)
    assert server.asked["/a.png"] == 2


DRIPS: dict[str, tuple[bytes, bytes]] = {
    "the status line": (b"HTTP/1.1 200 ", b"x"),
    "headers": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "the body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "TLS": (b"\x16\x03\x03\x40\x00", b"\x00"),  # the head of a handshake's record, RFC 8446, 5.1
}


@pytest.mark.parametrize("what", DRIPS)
def test_a_host_that_drips_has_a_limit(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It never says nothing for long, and is never done: nothing but the limit on all of it ends the fetch."""
    first, then = DRIPS[what]
    monkeypatch.setattr(fetching, "SECONDS_IN_ALL", 0.4)
    monkeypatch.setattr(fetching, "SECONDS", 30.0)
    stop, asked = threading.Event(), 0

    def serve() -> None:
        nonlocal asked
        while True:
            try:
                other, _ = listening.accept()
            except OSError:
                return
            asked += 1
            with other, suppress(OSError):
                other.sendall(first)
                for _ in range(150):
                    if stop.wait(0.02):
                        break
                    other.sendall(then)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"{'https' if what == 'TLS' else 'http'}://127.0.0.1:{listening.getsockname()[1]}/x"
        try:
            with pytest.raises(ImageError, match="it took more than 0 seconds"):
                cached(LISTED + url)
        finally:
            stop.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert asked <= 1  # no other try


def test_a_redirection_on_the_same_host_is_followed(server: Server) -> None:
    server.image("/real.png")
    assert read_image(str(cached(LISTED + server.add("/a", status=302, Location="/real.png")))).size == (56, 56)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
        *("::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::"),
    ],
)
def test_a_private_address_is_asked_only_by_name(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a public name leads to is looked at before a connection is made."""

    def found(name: str, port: int, **options: Any) -> list[Any]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return [(socket.AF_INET, 0, 0, "", ("93.184.216.34", port)), (family, 0, 0, "", (host, port))]

    monkeypatch.setattr(fetching.socket, "getaddrinfo", found)
    monkeypatch.setattr(fetching, "_Plain", lambda *_: pytest.fail("a connection was made"))
    with pytest.raises(ImageError, match="which is no public address: to ask it, name it in vision"):
        cached("http://images.example.org/a.png")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((address, True) for address in ("8.8.8.8", "93.184.216.34", "2606:4700::1111", "2a00:1450::", "2001:4860::")),
        # IPv4 in IPv6: mapped, NAT64, 6to4, each of a public and of a private address
        *((address, True) for address in ("::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1")),
        *((address, False) for address in ("::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1", "2002:a83f:8110::")),
        # compatible, translated, NAT64 of a network's own, Teredo: of no public host, whatever they hold
        *((address, False) for address in ("::7f00:1", "::a00:1", "::ffff:0:7f00:1", "64:ff9b:1::7f00:1")),
        *((address, False) for address in ("2001:0:4136:e378:8000:63bf:80ff:fffe", "::8.8.8.8", "::", "::1")),
        # site-local, link-local, unique local, multicast, documentation, discarded, segment routing
        *((address, False) for address in ("fec0::1", "fe80::1%eth0", "fd00:ec2::254", "ff0e::1")),
        *((address, False) for address in ("2001:db8::1", "3fff::1", "100::1", "5f00::1", "4000::1")),
        *((address, False) for address in ("168.63.129.16", "::ffff:168.63.129.16", "169.254.169.254", "192.0.0.192")),
        *((address, False) for address in ("192.88.99.1", "100.100.100.200", "198.18.0.1", "240.0.0.1", "224.0.0.1")),
    ],
)
def test_what_is_a_public_address(address: str, public: bool) -> None:
    assert fetching._is_public(address) is public


def test_a_public_url_may_not_lead_to_a_private_host(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.add("/a", status=302, Location=f"{server.url}/b")
    monkeypatch.setattr(fetching, "_is_public", lambda address: not server.asked)
    with pytest.raises(ImageError, match="no public address"):
        cached(url)
    assert server.asked == {"/a": 1}


def test_https_does_not_lead_to_http(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        status, reason = 301, "Moved"

        def __init__(self, parts: Any, private: bool, until: float) -> None:
            assert parts.scheme == "https"

        def request(self, *words: Any, **options: Any) -> None: ...
        def close(self) -> None: ...
        def getresponse(self) -> Any:
            return self

        def getheader(self, name: str) -> str:
            return "http://a.org/b.png"

    monkeypatch.setattr(fetching, "_connection", Connection)
    with pytest.raises(ImageError, match=r"https://a.org/a.png: leads from https to http"):
        cached("https://a.org/a.png")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, to make a certificate")
def test_a_certificate_is_checked(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "2"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made, *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = LISTED + server.image("/a.png").replace("http:", "https:")
    with pytest.raises(ImageError, match=r"cannot be fetched: .*certificate verify failed"):
        cached(url)
    assert not server.asked
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # as if a known authority had signed it
    monkeypatch.setattr(fetching, "_failed", {})
    assert read_image(str(cached(url))).size == (56, 56)


@pytest.mark.parametrize(
    ("url", "allowed", "message"),
    [
        ("http://a.org/x", False, "nothing is downloaded unless vision.allow_urls says so"),
        ("http://a.org/x", ["b.org", "a.org:8000"], r"its host is not among vision.allow_urls \(b.org, a.org:8000\)"),
        ("http://u:p@a.org/x", True, "a.org/x: has a name or password in it"),
        ("http:///x", True, "is no http or https URL"),
        ("http://a.org:99999/x", True, "is no URL"),
    ],
)
def test_what_is_not_allowed(url: str, allowed: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        check_url(url, allowed)


def test_hosts_are_named_with_or_without_a_port() -> None:
    for allowed in (["A.org"], ["a.org:443"]):
        assert check_url("https://a.org/x", allowed) == f"{LISTED}https://a.org/x"
    assert check_url("https://a.org/x", True) == "https://a.org/x"


def test_an_ipv6_address_is_allowed_in_brackets() -> None:
    url = "http://[2606:4700::1111]/x"
    for allowed in ("2606:4700::1111", "[2606:4700::1111]", "[2606:4700::1111]:80"):
        assert check_url(url, [allowed]) == LISTED + url
    with pytest.raises(ImageError, match="its host is not among"):
        check_url(url, ["2606:4700::1111:80"])  # another address


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://[2606:4700::1111]/", ("2606:4700::1111", 80)),
        ("https://[2606:4700::1111]/", ("2606:4700::1111", 443)),
        ("http://[2606:4700::1111]:8080/", ("2606:4700::1111", 8080)),
        ("https://a.org/", ("a.org", 443)),
    ],
)
def test_the_address_that_is_asked_is_that_of_the_url(
    url: str, asked: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, int]] = []

    def look(host: str, port: int, **options: Any) -> list[Any]:
        found.append((host, port))
        raise socket.gaierror

    monkeypatch.setattr(fetching.socket, "getaddrinfo", look)
    with pytest.raises(ImageError, match="its host is not known"):
        cached(url)
    assert set(found) == {asked}


def test_a_run_fetches_before_it_trains_and_goes_on_without_the_host(
    configure: Callable[..., Path], ft: Callable[..., Any], server: Server, tmp_path: Path
) -> None:
    urls = [server.image(f"/{n}.png", (n * 60, 0, 0)) for n in range(4)]
    rows = asking(*urls, server.url + "/gone.png")
    made = ft("train", configure(rows=rows))
    assert made.code == 2
    assert (
        f"line 1: image 1 is a URL, {urls[0]}: nothing is downloaded unless vision.allow_urls says so" in made.message
    )
    made = ft("train", configure(rows=rows, vision={"allow_urls": True}))
    assert made.code == 2
    assert "is 127.0.0.1, which is no public address" in made.message
    assert not server.asked
    allowed: dict[str, Any] = {"allow_urls": [server.host]}
    made = ft("train", configure(rows=rows, vision=allowed))
    assert made.code == 2
    assert f"row 5: {server.url}/gone.png: cannot be fetched: HTTP 404" in made.message
    allowed["on_bad_image"] = "skip"
    training = {"max_steps": 2, "save_every": 1}
    assert ft("train", configure(rows=rows, vision=allowed, training=training, eval_split=1)).code == 0
    assert all(server.asked[f"/{n}.png"] == 1 for n in range(4))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    held_out = (tmp_path / "run" / "held_out.jsonl").read_text()
    assert summary["data"]["bad_image_rows"] == (0 if "gone" in held_out else 1)
    before = server.asked.total()
    del server.answers["/0.png"]
    made = ft(
        "train", configure(rows=rows, vision=allowed, training={**training, "max_steps": 3}, eval_split=1), "--resume"
    )
    assert made.code == 0, made.err
    assert ft("eval", tmp_path / "run").code == 0
    assert server.asked.total() - before <= server.asked["/gone.png"]


def test_a_fetched_file_that_broke_is_named_by_its_url(
    configure: Callable[..., Path], ft: Callable[..., Any], server: Server, cache: Path
) -> None:
    url = server.image("/a.png")
    cached(LISTED + url).write_bytes(b"broken")
    made = ft("train", configure(rows=asking(url), vision={"allow_urls": [server.host]}))
    assert made.code == 2
    assert f"row 1: {url}, fetched to {cache}" in made.message
