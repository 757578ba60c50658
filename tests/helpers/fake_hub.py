"""A Hugging Face Hub on the loopback: as much of its HTTP interface as huggingface_hub asks for."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A repository: the files of each commit, and the branches and tags that name commits."""

    commits: dict[str, Mapping[str, bytes]]
    refs: dict[str, str]
    token: str = ""  # gated, if set: the list of files is public, the files are not
    short: frozenset[str] = frozenset()  # files served with their last byte missing
    damaged: frozenset[str] = frozenset()  # files served with their last byte changed


@dataclass
class Hub:
    """A running Hub: its address, what it holds, and what was asked of it."""

    endpoint: str
    repositories: dict[str, Repository]
    requests: list[tuple[str, str]] = field(default_factory=list)
    down: bool = False

    def fetched(self) -> set[str]:
        """The names of the files that were asked for."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for _, path in self.requests
            if "/resolve/" in path
        }


class Missing(Exception):
    """Something a request names is not there; the status and code that say so."""


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """A Hub that holds `repositories`, for as long as the `with` lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories)
    server.hub = hub  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _serve(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path).strip("/")
        hub.requests.append((self.command, path))
        try:
            if hub.down:
                raise Missing(503, "Down")
            if path.startswith("api/models/"):
                self._answer(json.dumps(self._api(path.removeprefix("api/models/"))).encode())
            else:
                self._file(path)
        except Missing as missing:
            status, code = missing.args
            self._answer(b"", status, {"X-Error-Code": code, "X-Error-Message": code})

    def _api(self, path: str) -> object:
        name, _, rest = path.partition("/revision/")
        if "/tree/" in path:
            name, _, rest = path.partition("/tree/")
            return [_tree_entry(n, data) for n, data in self._commit(name, rest)[1].items()]
        commit, files = self._commit(name, rest or "main")
        return {"id": name, "sha": commit, "siblings": [{"rfilename": n} for n in files]}

    def _commit(self, name: str, revision: str) -> tuple[str, Mapping[str, bytes]]:
        repository = self.server.hub.repositories.get(name)  # type: ignore[attr-defined]
        if repository is None:
            raise Missing(404, "RepoNotFound")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise Missing(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    def _file(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit, files = self._commit(name, revision)
        repository: Repository = self.server.hub.repositories[name]  # type: ignore[attr-defined]
        if repository.token and self.headers["Authorization"] != f"Bearer {repository.token}":
            raise Missing(403, "GatedRepo")
        if file not in files:
            raise Missing(404, "EntryNotFound")
        data = files[file]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(file, data)}"'}
        if file in repository.short and self.command == "GET":
            data = data[:-1]
        if file in repository.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._answer(data, 200, headers)

    def _answer(
        self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(name: str, data: bytes) -> str:
    """The git blob id of a small file, the sha256 of a large one."""
    if name.endswith((".safetensors", ".bin")):
        return sha256(data).hexdigest()
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree_entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {
        "type": "file", "path": name, "size": len(data), "oid": _etag(name, data)[:40]
    }  # fmt: skip
    if name.endswith((".safetensors", ".bin")):
        entry["lfs"] = {"oid": _etag(name, data), "size": len(data), "pointerSize": 130}
    return entry
