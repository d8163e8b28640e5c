"""A hub on this machine's loopback: the calls that `huggingface_hub` makes to publish and to load, with real bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub.hf_api
import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "loopbacktoken" * 2  # has the form of a token, and is none
OWNER = "me"


def account(role: str = "write", **more: Any) -> dict[str, Any]:
    """Return what `whoami-v2` says of a token of that role; `more` belongs to the token."""
    orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
    token = {"displayName": "test", "role": role, **more}
    return {"type": "user", "name": OWNER, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}


@dataclass
class Commit:
    files: dict[str, bytes]
    large: frozenset[str]
    """Names of the files that lie in large file storage."""
    message: str
    parent: str | None


@dataclass
class Repo:
    private: bool = True
    gated: bool | str = False
    writable: bool = True
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, bytes], large: frozenset[str], message: str) -> str:
        parent = self.branches.get(branch)
        identity = repr((sorted(files), [hashlib.sha256(each).hexdigest() for each in files.values()], message, parent))
        commit = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[commit] = Commit(files, large, message, parent)
        self.branches[branch] = commit
        return commit

    def at(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def history(self, branch: str = "main") -> list[str]:
        """Messages of the commits on a branch, the last one first."""
        commit, messages = self.branches.get(branch), []
        while commit is not None:
            messages.append(self.commits[commit].message)
            commit = self.commits[commit].parent
        return messages

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]].files


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches `pattern`, so many times."""

    pattern: str
    times: int
    act: Callable[[Handler], None]


class LoopbackHub:
    """The state of the hub, and what it was asked and sent."""

    def __init__(self) -> None:
        self.accounts: dict[str, dict[str, Any]] = {TOKEN: account()}
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.asked: list[str] = []
        """Every request, as "METHOD /path"."""
        self.sent: list[bytes] = []
        """The body of every request."""
        self.faults: list[Fault] = []
        self.on_commit: Callable[[], None] = lambda: None
        self.card_warning = ""
        self.url = ""

    def model(self, name: str, files: Mapping[str, bytes] | None = None, **settings: Any) -> Repo:
        """Put a repository there."""
        repo = self.repos[name] = Repo(**settings)
        repo.add("main", {".gitattributes": b"*.safetensors lfs\n", **(files or {})}, frozenset(), "initial commit")
        return repo

    def fail(self, pattern: str, status: int, times: int = 1000, **headers: str) -> None:
        """Answer so to matching requests instead of doing what they ask."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, times, lambda handler: handler.reply(status, {"error": "no"}, sent)))

    def drop(self, pattern: str, times: int = 1, *, after: bool) -> None:
        """Cut the line of matching requests, before they are worked on or `after` it."""

        def act(handler: Handler) -> None:
            if after:
                handler.silent = True
                handler.work()
            handler.close_connection = True

        self.faults.append(Fault(pattern, times, act))

    def everything(self) -> bytes:
        """All bytes that have reached this hub, plainly and as they were encoded."""
        kept = [
            each for repo in self.repos.values() for commit in repo.commits.values() for each in commit.files.values()
        ]
        return b"\n".join([*self.sent, *self.storage.values(), *kept])

    def writes(self) -> list[str]:
        """The requests that may have changed something."""
        return [each for each in self.asked if not each.startswith(("GET", "HEAD"))]


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    hub: LoopbackHub
    silent = False

    def handle_one(self) -> None:
        self.route = unquote(self.path.partition("?")[0])
        self.body = self._read()
        request = f"{self.command} {self.route}"
        self.hub.asked.append(request)
        if self.body:
            self.hub.sent.append(self.body)
        for fault in self.hub.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault.act(self)
        return self.work()

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    def work(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.account = self.hub.accounts.get(token)
        if token and self.account is None:
            message = "Invalid credentials in Authorization header"
            return self.reply(401, {"error": message}, {"X-Error-Message": message})
        for pattern, name in ROUTES:
            command, _, path = pattern.partition(" ")
            match = re.fullmatch(path, self.route)
            if match and self.command in command.split("|"):
                return getattr(self, name)(*match.groups())
        return self.reply(404, {"error": "no such page"})

    # --- accounts and repositories

    def whoami(self) -> None:
        self.reply(200 if self.account else 401, self.account or {"error": "Invalid username or password."})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self.reply(409, {"error": "You already created this model repo", **url})
        self.hub.model(name, private=asked["visibility"] == "private")
        return self.reply(200, url)

    def info(self, name: str, revision: str = "main") -> None:
        if (repo := self.readable(name)) is None:
            return None
        if (commit := repo.at(revision)) is None:
            return self.reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = [{"rfilename": file} for file in repo.commits[commit].files]
        return self.reply(
            200,
            {"id": name, "sha": commit, "siblings": files, "private": repo.private, "gated": repo.gated, "tags": []},
        )

    def may_write(self, name: str) -> None:
        if (repo := self.readable(name)) is not None:
            self.reply(200 if repo.writable else 403, {})

    def branch(self, name: str, branch: str) -> None:
        repo = self.hub.repos[name]
        if branch in repo.branches:
            return self.reply(409, {"error": "Reference already exists"})
        repo.branches[branch] = repo.branches["main"]
        return self.reply(200, {})

    # --- writing

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        if "base_model: /" in content:
            return self.reply(
                400, {"errors": [{"message": '"base_model" with value "/…" is not valid.'}], "warnings": []}
            )
        return self.reply(200, {"warnings": [{"message": self.hub.card_warning}] if self.hub.card_warning else []})

    def preupload(self, name: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.reply(200, {"files": files})

    def batch(self, name: str) -> None:
        objects = []
        for each in json.loads(self.body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/storage/{each['oid']}"}}
            objects.append(each if each["oid"] in self.hub.storage else {**each, "actions": action})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.reply(400, {"error": "other content"})
        self.hub.storage[oid] = self.body
        return self.reply(200, {})

    def commit(self, name: str, branch: str) -> None:
        repo = self.hub.repos[name]
        header, *lines = (json.loads(line) for line in self.body.splitlines())
        head = repo.branches[branch]
        if header["value"].get("parentCommit", head) != head:
            return self.reply(412, {"error": "A commit has happened since. Please refresh and try again."})
        files, large = dict(repo.commits[head].files), set(repo.commits[head].large)
        for line in lines:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
                large.discard(path)
                self.hub.sent.append(files[path])
            elif line["key"] == "lfsFile":
                files[path] = self.hub.storage[value["oid"]]
                large.add(path)
            else:
                del files[path]
                large.discard(path)
        commit = repo.add(branch, files, frozenset(large), header["value"]["summary"])
        self.hub.on_commit()
        return self.reply(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    # --- reading

    def tree(self, name: str, revision: str) -> None:
        if (repo := self.readable(name)) is None:
            return
        commit = repo.commits[str(repo.at(revision))]
        entries = []
        for path, content in commit.files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
            if path in commit.large:
                sha256 = hashlib.sha256(content).hexdigest()
                entry |= {
                    "oid": git_blob(sha256.encode()),
                    "lfs": {"oid": sha256, "size": len(content), "pointerSize": 134},
                }
            entries.append(entry)
        self.reply(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self.readable(name)) is None:
            return None
        commit = str(repo.at(revision))
        content = repo.commits[commit].files.get(path)
        if content is None:
            return self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(content).hexdigest() if path in repo.commits[commit].large else git_blob(content)
        return self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    # --- common

    def readable(self, name: str) -> Repo | None:
        """Return the repository, or None after having refused it as the hub does."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.account is None):
            self.reply(
                404 if self.account else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
            return None
        return repo

    def reply(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        if self.silent:
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"GET /api/models/{NAME}", "info"),
    (rf"GET /api/models/{NAME}/revision/(.+)", "info"),
    (rf"GET /api/models/{NAME}/auth-check/write", "may_write"),
    (rf"GET /api/models/{NAME}/tree/(.+)", "tree"),
    (rf"POST /api/models/{NAME}/branch/(.+)", "branch"),
    (rf"POST /api/models/{NAME}/preupload/(.+)", "preupload"),
    (rf"POST /api/models/{NAME}/commit/(.+)", "commit"),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /storage/(\w+)", "store"),
    (rf"GET|HEAD /{NAME}/resolve/([^/]+)/(.+)", "resolve"),
]


def git_blob(content: bytes) -> str:
    """Return the name that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def loopback_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[LoopbackHub]:
    """Serve a hub, and turn `huggingface_hub` in this process to it, logged in with a token that may write."""
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # what its module-level functions use
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(cache / "stored_tokens"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(cache / "harnesses.json"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
