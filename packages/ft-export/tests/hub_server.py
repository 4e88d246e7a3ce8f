"""A small Hub on this machine, enough of its HTTP interface for huggingface_hub to push to and to read from.

Repositories live in memory. Switches let it refuse, ask to wait, break, or cut a connection, a stated number of times.
What it was asked is kept, so that a test sees what was sent and what was not.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "aB3" * 12  # looks like one, so that a leak is found
USER = "me"
LARGE = (".safetensors", ".gguf", ".bin")


@dataclass
class Blob:
    """A file: its content, and whether large file storage holds it."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_id(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        held = pointer.encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()


@dataclass
class Repo:
    """A repository: by branch its newest commit, by commit its files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        said = repr((branch, len(self.commits), sorted((name, blob.sha256) for name, blob in files.items())))
        oid = hashlib.sha1(said.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> dict[str, Blob] | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Fault:
    """What goes wrong: for requests that fit, ``times`` times.

    Attributes:
        status: the answer, or 0 to close the connection without one, after the ``after`` first bytes were read.
    """

    method: str
    path: str
    status: int
    times: int
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)
    after: int = 0


class HubServer:
    """The server; ``url`` is what ``HF_ENDPOINT`` has to be."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def reset(self) -> None:
        """Be a server that nobody has asked yet, at the same address."""
        self.repos: dict[str, Repo] = {}
        self.data_sets: set[str] = set()
        self.cards: dict[str, dict[str, Any]] = {}
        self.storage: dict[str, bytes] = {}
        self.organisations = ["team"]
        self.role = "write"
        self.tokens = {TOKEN}
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, str, int]] = []
        """Method, path and bytes received, of every request that was read to its end."""
        self.received = threading.Event()
        """Set once a file has come in."""
        self.hold = threading.Event()
        """Uploads wait for it; set unless a test clears it."""
        self.hold.set()
        self.lost: set[str] = set()
        """Names of files that the tree tells wrong checksums of."""
        self.before_commit: Callable[[Repo], Any] = lambda repo: None
        """Called with the repository before each commit to it: what others push in the meantime."""
        self.swallow = 0
        """Commits that are made and whose answer is lost."""

    def add_repo(self, repo: str, private: bool, files: dict[str, bytes] | None = None) -> Repo:
        made = Repo(private)
        first = {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}
        first |= {name: Blob(content, name.endswith(LARGE)) for name, content in (files or {}).items()}
        made.commit("main", first, "initial commit")
        self.repos[repo] = made
        return made

    def fail(self, method: str, path: str, status: int, times: int = 1, **more: Any) -> None:
        self.faults.append(Fault(method, path, status, times, **more))

    def count(self, method: str, path: str) -> int:
        return sum(1 for one, other, _ in self.asked if one == method and re.search(path, other))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo].at(revision)
        assert found is not None
        return {name: blob.content for name, blob in found.items()}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()
    thread = threading.Thread(target=hub.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.hold.set()
        hub.http.shutdown()
        hub.http.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer's second part would wait 40 ms for the other side to take the first

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        try:
            self._answer_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer_request(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        fault = self._fault(path)
        if fault is not None and fault.status == 0:
            self.rfile.read(fault.after)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        with self.hub.lock:
            self.hub.asked.append((self.command, path, len(body)))
        if fault is not None:
            self._json(fault.status, fault.body or {"error": "planted"}, fault.headers)
            return
        if self.command == "PUT":
            self._put(path, body)
        elif path.startswith("/api/"):
            self._api(path.removeprefix("/api/"), body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(match[1], json.loads(body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        else:
            self._json(404, {"error": "no such page"})

    def _fault(self, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times > 0 and fault.method == self.command and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._bytes(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _known(self) -> bool:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") in self.hub.tokens

    def _api(self, path: str, body: bytes) -> None:
        if path == "whoami-v2":
            if not self._known():
                self._json(401, {"error": "Invalid credentials in Authorization header"})
                return
            names = [{"name": name, "roleInOrg": "write"} for name in self.hub.organisations]
            self._json(200, {"name": USER, "orgs": names, "auth": {"accessToken": {"role": self.hub.role}}})
        elif path == "repos/create":
            self._create(json.loads(body))
        elif path == "validate-yaml":
            self._json(200, {"errors": [], "warnings": []})
        elif path.startswith("datasets/"):
            name = path.removeprefix("datasets/")
            if name in self.hub.data_sets:
                self._json(200, {"id": name, "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
            else:
                self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif match := re.fullmatch(r"models/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+))?(?:/(.+))?)?", path):
            self._model(match[1], match[2], match[3], match[4], body)
        else:
            self._json(404, {"error": "no such page"})

    def _create(self, said: dict[str, Any]) -> None:
        name = f"{said.get('organization') or USER}/{said['name']}"
        if not self._known():
            self._json(401, {"error": "Invalid credentials in Authorization header"})
        elif name in self.hub.repos:
            self._json(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        else:
            self.hub.add_repo(name, said.get("visibility") == "private")
            self._json(200, {"url": f"{self.hub.url}/{name}"})

    def _model(self, name: str, what: str | None, revision: str | None, rest: str | None, body: bytes) -> None:
        if name in self.hub.cards:
            known = {"id": name, "private": False, "tags": [], "siblings": [], "cardData": self.hub.cards[name]}
            self._json(200, {**known, "sha": "0" * 40})
            return
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._known()):
            status = 404 if self._known() else 401
            self._json(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        if what == "branch":
            assert revision is not None
            fresh = revision not in repo.branches
            if fresh:
                repo.branches[revision] = repo.branches["main"]
            self._json(200 if fresh else 409, {})
            return
        files = repo.at(revision or "main")
        if files is None:
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif what in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            oid = repo.branches.get(revision or "main", revision)
            self._json(200, {"id": name, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings})
        elif what == "tree":
            self._tree(files, rest)
        elif what == "preupload":
            asked = json.loads(body)["files"]
            self._json(200, {"files": [self._mode(entry["path"], files.get(entry["path"])) for entry in asked]})
        elif what == "commit":
            assert revision is not None
            self._commit(name, repo, revision, dict(files), body)
        else:
            self._json(404, {"error": f"no {what}"})

    def _mode(self, path: str, there: Blob | None) -> dict[str, Any]:
        large = path.endswith(LARGE)
        known = {} if there is None else {"oid": there.sha256 if there.large else there.git_id}
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known}

    def _tree(self, files: dict[str, Blob], folder: str | None) -> None:
        inside = {name: blob for name, blob in files.items() if folder is None or name.startswith(f"{folder}/")}
        if folder is not None and not inside:
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            for parent in sorted({name.rpartition("/")[0] for name in inside} - {"", folder})
        ]
        for name, blob in inside.items():
            entry = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.git_id}
            if blob.large:
                oid = "0" * 64 if name in self.hub.lost else blob.sha256
                entry["lfs"] = {"oid": oid, "size": len(blob.content), "pointerSize": 134}
            entries.append(entry)
        self._json(200, entries)

    def _batch(self, name: str, said: dict[str, Any]) -> None:
        objects = []
        for entry in said["objects"]:
            known = entry["oid"] in self.hub.storage
            href = f"{self.hub.url}/storage/{entry['oid']}"
            objects.append({**entry, **({} if known else {"actions": {"upload": {"href": href, "header": {}}}})})
        self._json(200, {"transfer": "basic", "objects": objects})

    def _put(self, path: str, body: bytes) -> None:
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            self._json(400, {"error": "the content is not what its checksum says"})
            return
        if self.hub.received.is_set() and not self.hub.hold.wait(60):
            return
        self.hub.storage[oid] = body
        self.hub.received.set()
        self._bytes(200, b"", {})

    def _commit(self, name: str, repo: Repo, branch: str, files: dict[str, Blob], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        self.hub.before_commit(repo)
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.branches[branch]:
            self._json(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    self._json(400, {"error": f"{value['path']} was never uploaded"})
                    return
                files[value["path"]] = Blob(self.hub.storage[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(branch, files, lines[0]["value"]["summary"])
        if self.hub.swallow > 0:
            self.hub.swallow -= 1
            self.close_connection = True
            self.connection.close()
            return
        self._json(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._known()):
            self._json(404 if self._known() else 401, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            return
        files = repo.at(revision)
        blob = (files or {}).get(path)
        oid = repo.branches.get(revision, revision)
        if blob is None:
            code = "RevisionNotFound" if files is None else "EntryNotFound"
            self._json(404, {"error": "no"}, {"X-Error-Code": code, "X-Repo-Commit": oid})
            return
        tag = blob.sha256 if blob.large else blob.git_id
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(blob.content))}
        self._bytes(200, blob.content, headers)
