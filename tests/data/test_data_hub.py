"""The hub path against a small hub of our own on the loopback interface: loads, caches, and says what is wrong."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from flwr_datasets import federated_dataset
from huggingface_hub import constants

import fedtune.hub
from fedtune.config.schema import DataConfig
from fedtune.data import hub
from fedtune.data.source import load_rows
from fedtune.errors import MissingError, UsageError

ROOT = Path(__file__).parents[2]
COMMIT = "a" * 40
ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(5)]
CONTENT = "\n".join(map(json.dumps, ROWS)).encode()

REFUSALS = {
    "gated": (403, {"X-Error-Code": "GatedRepo"}, "is gated", "Ask for access"),
    "absent": (404, {"X-Error-Code": "RepoNotFound"}, "There is no data set me/absent", "hf auth login"),
    "private": (401, {}, "or it is private", "hf auth login"),
    "plain404": (404, {}, "There is no data set", "Check the name"),
    "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "refuses your token", "login"),
    "forbidden": (403, {}, "refuses your token", "hf auth login"),
    "revision": (404, {"X-Error-Code": "RevisionNotFound"}, "has no revision", "/datasets/me/revision/commits/main"),
    "broken": (500, {}, "answers with status 500", "--data FILE"),
    "html": (200, {}, "is no hub", "--data FILE"),
}


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that loading one data set takes; `done` ends those that hang."""

    protocol_version = "HTTP/1.1"
    done = threading.Event()

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        fields = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **(headers or {})}
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.split("/")[4] if path.startswith("/api/datasets/") else ""
        if name in REFUSALS:
            self.reply(*REFUSALS[name][:1], b"<html>", REFUSALS[name][1])
        elif name == "hangs":
            self.done.wait(30)
        elif name == "trickles":
            with contextlib.suppress(OSError):
                self.send_response(200)
                while not self.done.wait(0.1):
                    self.wfile.write(b"X-Slow: 1\r\n")
        elif path.endswith("/auth-check"):
            self.reply(403, headers={"X-Error-Code": "GatedRepo"})
        elif "/tree/" in path:
            entry = {"type": "file", "path": "train.jsonl", "size": len(CONTENT), "oid": "b" * 40}
            self.reply(200, json.dumps([entry]).encode())
        elif name in ("toy", "gated-later"):
            info = {
                "id": f"me/{name}",
                "sha": COMMIT,
                "siblings": [],
                "gated": "auto" if name == "gated-later" else False,
            }
            self.reply(200, json.dumps(info).encode())
        elif path.endswith("/train.jsonl"):
            self.reply(200, CONTENT, {"ETag": '"1"'})
        else:
            self.reply(404, headers={"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    Hub.done.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    Hub.done.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def at_endpoint(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return endpoint


@pytest.mark.parametrize("name", [*REFUSALS, "gated-later"])
def test_each_refusal_says_what_to_do(name: str, at_endpoint: str, capfd: pytest.CaptureFixture[str]) -> None:
    _, _, said, hint = REFUSALS.get(name, REFUSALS["gated"])
    with pytest.raises(MissingError) as caught:
        load_rows(DataConfig(source=f"me/{name}"), 0)
    assert caught.value.exit_code == 3
    assert said in caught.value.message
    assert at_endpoint in str(caught.value)
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["hangs", "trickles"])
def test_preflight_ends_in_time_whatever_the_server_does(
    name: str, at_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedtune.hub, "DEADLINE_S", 0.5)
    start = time.monotonic()
    with pytest.raises(MissingError, match=r"did not answer within 0\.5 s") as caught:
        load_rows(DataConfig(source=f"me/{name}"), 0)
    assert time.monotonic() - start < 3
    assert "--data FILE" in caught.value.hint
    assert "HF_HOME" in caught.value.hint


def test_offline_mode_is_named(at_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE"):
        load_rows(DataConfig(source="me/toy"), 0)


def test_rows_come_through_federated_dataset_without_telemetry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_endpoint: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("telemetry was sent")

    monkeypatch.setattr(federated_dataset, "event", refuse)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/train.jsonl").write_bytes(CONTENT)
    assert hub.download(str(tmp_path / "toy"), None, "train").to_list() == ROWS
    monkeypatch.setattr(hub, "find_copy", lambda *_: hub.HubCopy(COMMIT, None))
    with pytest.raises(UsageError, match="'nope' is not present") as caught:
        hub.load_hub(str(tmp_path / "toy"), None, "nope")
    assert "data.split" in caught.value.hint


def test_failed_download_is_missing_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("the line broke\nin the middle")

    monkeypatch.setattr(hub, "find_copy", lambda *_: hub.HubCopy(COMMIT, None))
    monkeypatch.setattr(hub, "download", fail)
    with pytest.raises(MissingError, match=r"cannot be downloaded from .*: the line broke\.") as caught:
        hub.load_hub("me/toy", None, "train")
    assert "--data FILE" in caught.value.hint


SCRIPT = """
import sys
from fedtune.config.schema import DataConfig
from fedtune.data.source import load_rows, resolved_revision
from fedtune.errors import FedTuneError
for revision in sys.argv[2:]:
    config = DataConfig(source=sys.argv[1], revision=revision or None)
    try:
        print(resolved_revision(config), *load_rows(config, 7)["instruction"])
    except FedTuneError as error:
        print(error.exit_code, error)
"""


def run(endpoint: str, home: Path, source: str, *revisions: str, **variables: str) -> list[str]:
    environment = {
        "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HOME": str(home), "PATH": os.environ["PATH"], **variables
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, source, *revisions],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return process.stdout.splitlines()


def test_hub_data_set_loads_and_then_works_without_the_hub(endpoint: str, tmp_path: Path) -> None:
    online = run(endpoint, tmp_path, "me/toy", "main", "")
    commit, *rows = online[0].split()
    assert commit == COMMIT
    assert sorted(rows) == [row["instruction"] for row in ROWS]
    assert online[1] == online[0]

    assert not list(tmp_path.rglob("cache-*")), "the shuffle was written to disk"

    other = "c" * 40
    nowhere = "http://127.0.0.1:9"
    *offline, refused = run(nowhere, tmp_path, "me/toy", "", "main", COMMIT, other)
    assert offline == [online[0]] * 3
    assert refused.startswith(f"3 The data set me/toy at revision {other} is not in the local cache, and {nowhere}")
    assert f"The cache holds revision {COMMIT}" in refused
    assert hub.cached_copies("me/toy", tmp_path / "datasets").keys() == {COMMIT}
    with pytest.raises(ValueError, match="nope"):
        hub.read_cached("me/toy", hub.cached_copies("me/toy", tmp_path / "datasets")[COMMIT], "nope")


def test_process_ends_soon_with_a_hub_that_hangs(endpoint: str, tmp_path: Path) -> None:
    start = time.monotonic()
    lines = run(endpoint, tmp_path, "me/hangs", "", HF_HUB_ETAG_TIMEOUT="1")
    assert time.monotonic() - start < 15
    assert "did not answer within 1 s" in lines[0]
