"""Base models from a hub, played by a server on this machine's loopback."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import fedtune.hub
from fedtune.config.schema import BUILTIN_TINY, ModelConfig
from fedtune.errors import MissingError
from fedtune.models.hub import resolve_base

BAD_TOKEN = "Invalid credentials in Authorization header"
COMMIT = "c" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the same weights again",
    "modeling.py": b"code",
    "original/params.json": b"{}",
    "README.md": b"words",
}
Answer = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def serve(files: dict[str, bytes]) -> Answer:
    """Answer as a hub with one repository, me/base."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        body, extra = b"", {}
        if "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(b), "oid": n.rjust(40, "0")} for n, b in files.items()]
            body = json.dumps(entries).encode()
        elif path.startswith("/api/models/me/base"):
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": "me/base", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"/me/base/resolve/{COMMIT}/"):
            name = path.split(COMMIT + "/")[1]
            body, extra = files[name], {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
        else:
            return status(404)(handler)
        handler.send_response(200)
        for name, value in {**extra, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)
        return None

    return answer


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()


@pytest.fixture
def hub_that(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], list[str]]]:
    """Start a hub that answers so; returns the list of paths that it will have been asked for."""
    servers = []

    def start(answer: Answer) -> list[str]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "me/base" in self.path:  # the library may ask for other things, once a process
                    asked.append(self.path)
                answer(self)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
        )
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
    huggingface_hub.close_session()


def refusal(config: ModelConfig) -> MissingError:
    with pytest.raises(MissingError) as caught:
        resolve_base(config)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (status(404, X_Error_Code="RepoNotFound"), "There is no base model me/base"),
        (status(404), "There is no base model me/base"),
        (status(401, X_Error_Code="RepoNotFound"), "There is no base model me/base at .* or it is private"),
        (status(401, X_Error_Message=BAD_TOKEN), r"refuses your token for the base model me/base \(401\)"),
        (status(403, X_Error_Code="GatedRepo"), "me/base at .* is gated"),
        (status(403), r"refuses your token for the base model me/base \(403\)"),
        (status(404, X_Error_Code="RevisionNotFound"), "me/base at .* has no revision v9"),
        (status(500), "is not cached, and http.* answers with status 500"),
        (serve({"config.json": b"", "pytorch_model.bin": b""}), "no weights as safetensors; fedtune loads no pickles"),
        (serve({"adapter_config.json": b""}), "is an adapter, not a base model"),
    ],
)
def test_refusals_are_one_sentence_and_a_hint(
    hub_that: Callable[[Answer], list[str]], answer: Answer, part: str
) -> None:
    asked = hub_that(answer)
    error = refusal(ModelConfig(base="me/base", revision="v9"))
    assert re.search(part, error.message), error.message
    assert len(asked) == 1, "asked once, not again and again"


def test_a_hub_that_hangs_is_given_up_soon(
    hub_that: Callable[[Answer], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fedtune.hub.DEADLINE_S <= 10
    monkeypatch.setattr(fedtune.hub, "DEADLINE_S", 0.3)
    hub_that(lambda handler: time.sleep(3))
    started = time.monotonic()
    error = refusal(ModelConfig(base="me/base"))
    assert "did not answer within 0.3 s" in error.message
    assert "--challenge tiny" in error.hint
    assert time.monotonic() - started < 2


def test_no_hub_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert "cannot be reached" in refusal(ModelConfig(base="me/base")).message


def fetched(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_needed_is_fetched_and_used_again_offline(
    hub_that: Callable[[Answer], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_that(serve(FILES))
    first = resolve_base(ModelConfig(base="me/base"))
    assert first.revision == COMMIT
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    assert fetched(first.folder) == wanted
    pinned = ModelConfig(base="me/base", revision=COMMIT, trust_remote_code=True)
    assert resolve_base(pinned) == first, "what is cached at a pinned commit is asked for nowhere"
    asked = hub_that(status(503))
    assert resolve_base(ModelConfig(base="me/base", revision=COMMIT)) == first
    assert asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_base(ModelConfig(base="me/base", revision=COMMIT)) == first


def test_code_is_fetched_only_on_request(hub_that: Callable[[Answer], list[str]]) -> None:
    hub_that(serve(FILES))
    found = resolve_base(ModelConfig(base="me/base", revision=COMMIT, trust_remote_code=True))
    assert "modeling.py" in fetched(found.folder)
    assert not {"pytorch_model.bin", "consolidated.safetensors"} & fetched(found.folder)


def test_config_alone(hub_that: Callable[[Answer], list[str]]) -> None:
    hub_that(serve(FILES))
    assert fetched(resolve_base(ModelConfig(base="me/base"), only_config=True).folder) == {"config.json"}
    assert "model.safetensors" in fetched(resolve_base(ModelConfig(base="me/base")).folder)


def test_an_incomplete_copy_is_not_taken_for_the_model(hub_that: Callable[[Answer], list[str]]) -> None:
    hub_that(serve(FILES))
    resolve_base(ModelConfig(base="me/base"), only_config=True)
    hub_that(status(500))
    for revision in (None, COMMIT):
        refusal(ModelConfig(base="me/base", revision=revision))


def test_a_broken_fetch_says_how_to_go_on(hub_that: Callable[[Answer], list[str]]) -> None:
    repository = serve(FILES)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        (status(403) if "/resolve/" in handler.path else repository)(handler)

    hub_that(answer)
    error = refusal(ModelConfig(base="me/base"))
    assert "broke off" in error.message
    assert "again" in error.hint


def test_folders_and_names(llama_folder: Path, tmp_path: Path) -> None:
    found = resolve_base(ModelConfig(base=str(llama_folder)))
    assert (found.folder, found.revision) == (llama_folder, None)
    for missing in (str(tmp_path / "none"), "./none", "~/none/at/all", "a/b/c"):
        assert f"There is no folder {missing}" in refusal(ModelConfig(base=missing)).message
    assert "neither a folder nor a name on the hub" in refusal(ModelConfig(base="no such name")).message


def test_builtin_tiny_lies_in_the_package() -> None:
    try:
        found = resolve_base(ModelConfig(base=BUILTIN_TINY))
    except MissingError:
        pytest.skip("the tiny base has not been made")
    assert found.folder.parts[-3:] == ("models", "builtin", "tiny")
    assert found.revision is None
