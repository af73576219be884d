"""A small hub on localhost that speaks what huggingface_hub's client uses, for tests.

Repositories with commits, branches and tags; regular and LFS uploads; `resolve` with HEAD, ranges, ETag and
X-Repo-Commit; listings; private and gated repositories. Everything is in memory. `Hub.fault` makes a request fail the
way networks and hubs do: a status, a connection that drops at once or midway, bytes that were damaged on the way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, USER = "hf_local", "me"
LFS_SUFFIXES = (".safetensors", ".npz", ".pt", ".bin", ".parquet", ".arrow")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
KIND = r"(?P<kind>model|dataset)s"


def sha1(*parts: object) -> str:
    return hashlib.sha1(repr(parts).encode()).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def etag_of(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)


@dataclass
class Repo:
    """Files of every commit, by path."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = sha1(len(self.commits), branch, sorted(files))
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def sha_of(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[revision]]


@dataclass
class Fault:
    """What goes wrong with requests whose line (`GET /me/repo/...`) matches, the first `times` times."""

    pattern: str
    status: int | None = None
    code: str | None = None
    drop_after: int | None = None
    corrupt: bool = False
    reset: bool = False
    times: int = 10**9


class Hub:
    """The state behind the server, and what it was asked for."""

    def __init__(self) -> None:
        self.url = ""
        self.cache: Path | None = None
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.sent = 0
        self.lock = threading.Lock()

    def add(self, repo: str, files: dict[str, bytes], *, kind: str = "model", **options: Any) -> Repo:
        """A repository with one commit."""
        made = self.repos[kind, repo] = Repo(**options)
        made.commit("main", dict(files))
        return made

    def fault(self, pattern: str, **what: Any) -> Fault:
        self.faults.append(Fault(pattern, **what))
        return self.faults[-1]

    def fault_for(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, line):
                fault.times -= 1
                return fault
        return None

    def downloaded(self) -> list[str]:
        """Paths of the files whose bytes were asked for, in order."""
        return [line.partition("/resolve/")[2].partition("/")[2] for line in self.requests
                if line.startswith("GET") and "/resolve/" in line]  # fmt: skip

    def forget(self) -> None:
        """Start the lists of requests anew."""
        self.requests.clear()
        self.ranges.clear()
        self.sent = 0


class HTTPError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (TimeoutError, ConnectionError):
            self.close_connection = True

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), parts.path
        length = int(self.headers.get("Content-Length") or 0)
        line = f"{self.command} {unquote(path)}"
        with self.hub.lock:
            self.hub.requests.append(line)
            fault = self.hub.fault_for(line)
        if fault is not None and fault.reset:
            self.reset()
            return
        if fault is not None and self.command in ("PUT", "POST") and fault.drop_after is not None:
            self.rfile.read(min(length, fault.drop_after))
            self.reset()
            return
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        self.body = self.read_chunks() if chunked else self.rfile.read(length)
        try:
            if fault is not None and fault.status is not None:
                raise HTTPError(fault.status, fault.code or "", "this was to fail")
            for method, pattern, handler in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    groups = {name: unquote(value) if value else value for name, value in match.groupdict().items()}
                    handler(self, fault=fault, **groups)
                    return
            raise HTTPError(404, "", f"no route for {line}")
        except HTTPError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.reply({"error": error.message}, error.status, headers)

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reset(self) -> None:
        """End the connection as a broken network does: with a reset, not with an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Type": "application/json"} | (headers or {})).items():
            if text:
                self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks, and for what.

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def writer(self) -> None:
        if not self.has_token():
            raise HTTPError(401, "", "Invalid username or password.")

    def repo_of(self, kind: str, repo: str) -> Repo:
        found = self.hub.repos.get((kind, repo))
        if found is None or (found.private and not self.has_token()):
            raise HTTPError(401 if not self.has_token() else 404, "RepoNotFound", "Repository not found")
        return found

    def commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.sha_of(revision)
        if sha is None:
            raise HTTPError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # Routes.

    def whoami(self, fault: Fault | None) -> None:
        self.writer()
        self.reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, fault: Fault | None) -> None:
        self.writer()
        asked = json.loads(self.body)
        repo, kind = f"{asked.get('organization') or USER}/{asked['name']}", asked.get("type") or "model"
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        if (kind, repo) in self.hub.repos:
            self.reply({"error": "You already created this model repo", "url": url}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[kind, repo] = Repo(private=private)
        self.hub.repos[kind, repo].commit("main", {".gitattributes": b""})
        self.reply({"url": url, "name": repo, "id": repo})

    def info(self, kind: str, repo: str, rev: str | None, fault: Fault | None) -> None:
        found = self.repo_of(kind, repo)
        sha = self.commit_of(found, rev or "main")
        files = [{"rfilename": path} for path in sorted(found.commits[sha])]
        self.reply({"_id": "0", "id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": files,
                    "gated": "manual" if found.gated else False, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def refs(self, kind: str, repo: str, fault: Fault | None) -> None:
        found = self.repo_of(kind, repo)
        lists = {
            name: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": sha} for n, sha in table.items()]
            for name, ref, table in (("branches", "heads", found.branches), ("tags", "tags", found.tags))
        }
        self.reply(lists | {"converts": []})

    def tree(self, kind: str, repo: str, rev: str, path: str | None, fault: Fault | None) -> None:
        found = self.repo_of(kind, repo)
        sha = self.commit_of(found, rev)
        top, recursive = PurePosixPath(path or "."), self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        entries: dict[str, dict[str, Any]] = {}
        for name, content in sorted(found.commits[sha].items()):
            if top != PurePosixPath(".") and top not in PurePosixPath(name).parents:
                continue
            below = PurePosixPath(name).relative_to(top).parts
            for depth in range(1, len(below)):
                folder = str(top.joinpath(*below[:depth]))
                if recursive or depth == 1:
                    entries[folder] = {"type": "directory", "path": folder, "oid": sha1(folder), "size": 0}
            if recursive or len(below) == 1:
                entry = {"type": "file", "path": name, "oid": git_oid(content), "size": len(content)}
                if is_lfs(name):
                    entry["lfs"] = {"oid": etag_of(name, content), "size": len(content), "pointerSize": 130}
                entries[name] = entry
        if not entries and path:
            raise HTTPError(404, "EntryNotFound", f"{path} does not exist on {rev!r}")
        self.reply(list(entries.values()))

    def resolve(self, repo: str, rev: str, path: str, fault: Fault | None, datasets: str | None = None) -> None:
        found = self.repo_of("dataset" if datasets else "model", repo)
        if found.gated and not self.has_token():
            raise HTTPError(401, "GatedRepo", f"Access to model {repo} is restricted.")
        sha = self.commit_of(found, rev)
        commit = {"X-Repo-Commit": sha}
        content = found.commits[sha].get(path)
        if content is None:
            self.reply({"error": "Entry not found"}, 404, commit | {"X-Error-Code": "EntryNotFound"})
            return
        headers = commit | {"ETag": f'"{etag_of(path, content)}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        status, start, size = 200, 0, len(content)
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            with self.hub.lock:
                self.hub.ranges.append(f"{path} {asked[0]}")
            first, last = asked[1], asked[2]
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            if start >= size:
                raise HTTPError(416, "", "Range not satisfiable")
            content, status = content[start:end], 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        if fault is not None and fault.corrupt and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
        if fault is None or fault.drop_after is None or self.command == "HEAD":
            if self.command != "HEAD":
                self.hub.sent += len(content)
            self.reply(content, status, headers)
            return
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: fault.drop_after])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)  # what was sent arrives, the rest never does
        self.close_connection = True

    def preupload(self, kind: str, repo: str, rev: str, fault: Fault | None) -> None:
        self.writer()
        found = self.repo_of(kind, repo)
        files = found.commits[self.commit_of(found, rev)]
        answer = []
        for file in json.loads(self.body)["files"]:
            content = files.get(file["path"])
            answer.append({
                "path": file["path"], "uploadMode": "lfs" if is_lfs(file["path"]) else "regular", "shouldIgnore": False,
                "oid": None if content is None else etag_of(file["path"], content),
            })  # fmt: skip
        self.reply({"files": answer})

    def lfs_batch(self, repo: str, fault: Fault | None, datasets: str | None = None) -> None:
        self.writer()
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.lfs:
                verify = {"href": f"{self.hub.url}/lfs-verify"}
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}, "verify": verify}
            objects.append(answer)
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str, fault: Fault | None) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HTTPError(400, "", "the sha256 of the content is another")
        self.hub.lfs[oid] = self.body
        self.reply({})

    def lfs_verify(self, fault: Fault | None) -> None:
        asked = json.loads(self.body)
        if len(self.hub.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise HTTPError(422, "", "the object is not there")
        self.reply({})

    def commit(self, kind: str, repo: str, rev: str, fault: Fault | None) -> None:
        self.writer()
        found = self.repo_of(kind, repo)
        parent = self.commit_of(found, rev)
        files = dict(found.commits[parent])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                if value.get("parentCommit") not in (None, parent):
                    raise HTTPError(412, "", "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise HTTPError(400, "", f"LFS pointer points to a file that does not exist: {value['path']}")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise HTTPError(400, "", f"unknown operation {item['key']}")
        sha = found.commit(rev, files)
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def branch(self, kind: str, repo: str, name: str, fault: Fault | None, what: str) -> None:
        self.writer()
        found = self.repo_of(kind, repo)
        table = found.tags if what == "tag" else found.branches
        if name in table:
            raise HTTPError(409, "", f"{what} {name} already exists")
        table[name] = self.commit_of(found, json.loads(self.body or b"{}").get("startingPoint") or "main")
        self.reply({})

    def validate_yaml(self, fault: Fault | None) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        self.reply({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)


def card_errors(content: str) -> list[str]:
    """What the real hub refuses in a card's metadata, as far as our cards can go wrong."""
    import yaml

    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        return ["the card has no metadata"]
    texts = ("library_name", "license")
    errors = [f"{key} must be a string" for key in texts if not isinstance(data.get(key, ""), str)]
    for key in ("base_model", "datasets"):
        names = data.get(key, [])
        for name in names if isinstance(names, list) else [names]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
                errors.append(f"{key} {name!r} is not a repository")
    for model in data.get("model-index", []):
        if not model.get("name"):
            errors.append("a model of the model-index has no name")
        for result in model.get("results", [{}]):
            if not result.get("task", {}).get("type"):
                errors.append("a result has no task type")
            if not {"type", "name"} <= result.get("dataset", {}).keys():
                errors.append("a result has no dataset")
            if not result.get("metrics") or not all({"type", "value"} <= m.keys() for m in result["metrics"]):
                errors.append("a result has no metrics")
    return errors


API = rf"/api/{KIND}/{REPO}"
REV = r"(?P<rev>[^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("GET",), rf"{API}(/revision/{REV})?", Handler.info),
    (("GET",), rf"{API}/refs", Handler.refs),
    (("GET",), rf"{API}/tree/{REV}(/(?P<path>.+))?", Handler.tree),
    (("POST",), rf"{API}/preupload/{REV}", Handler.preupload),
    (("POST",), rf"{API}/commit/{REV}", Handler.commit),
    (("POST",), rf"{API}/(?P<what>branch|tag)/(?P<name>[^/]+)", Handler.branch),
    (("POST",), rf"/(?P<datasets>datasets/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    (("POST",), r"/lfs-verify", Handler.lfs_verify),
    (("GET", "HEAD"), rf"/(?P<datasets>datasets/)?{REPO}/resolve/{REV}/(?P<path>.+)", Handler.resolve),
]


def connect(hub: Hub, monkeypatch: Any) -> None:
    """Point huggingface_hub at a hub, in this process (which has read its settings already) and in those it starts."""
    import huggingface_hub.file_download
    import huggingface_hub.hf_api
    from huggingface_hub import constants

    for name, value in {
        "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(hub.cache), "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # what functions such as `create_repo` use
    if "transformers.utils.hub" in sys.modules:  # keeps the client that it made first, with the address of then
        monkeypatch.setattr(sys.modules["transformers.utils.hub"], "_hf_api", None, raising=False)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)  # between attempts
    for name, value in {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(hub.cache), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `hub.url` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
