"""Publishing on a hub that this machine plays: what is checked, sent and compared, and what happens when it goes wrong."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import OWNER, TOKEN, Fault, Handler, LoopbackHub, account, loopback_hub

import fedtune.hub
from fedtune.config.schema import AdapterConfig, FedTuneConfig, ModelConfig
from fedtune.errors import FedTuneError, MissingError, UsageError
from fedtune.export.checkpoint import RunCheckpoint, open_run
from fedtune.export.package import MANIFEST, Package, package
from fedtune.export.publish import Published, publish
from fedtune.export.targets.folder import Folder
from fedtune.models.adapter import WEIGHTS_FILE, attach, read_adapter, write_adapter
from fedtune.models.base import Base, load_base
from fedtune.models.hub import fetch_adapter

REPO = f"{OWNER}/adapter"
COMMIT = rf"POST /api/models/{REPO}/commit/"
TINY = ModelConfig(base="builtin:tiny", quantization="none")


@pytest.fixture(scope="module")
def base() -> Base:
    torch.set_num_threads(1)
    return load_base(TINY)


@pytest.fixture(scope="module")
def finished(base: Base, tmp_path_factory: pytest.TempPathFactory) -> RunCheckpoint:
    """A run directory with one adapter, as `fedtune train` leaves it."""
    folder = tmp_path_factory.mktemp("work") / "runs" / "tiny-1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(FedTuneConfig(model=TINY).model_dump_json())
    settings = AdapterConfig(rank=2, alpha=8, targets="all-linear")
    adapted = attach(base, settings)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in adapted.shapes.items()}
    targets = adapted.target_modules
    adapted.detach()
    write_adapter(folder / "peft_1", tensors, settings, base_name="builtin:tiny", revision=None, target_modules=targets)
    message = {"node": 0, "direction": "down", "kind": "train", "serialised_bytes": 2**20 + 9, "bytes": 2**20}
    (folder / "ledger.jsonl").write_text(json.dumps({"round": 1, **message}) + "\n")
    return open_run(str(folder))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(fedtune.hub, "DEADLINE_S", 60.0)  # for a busy machine
    with loopback_hub(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits cost no time here, and are noted."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def small(finished: RunCheckpoint) -> Package:
    """A package of one large file and two small ones."""
    return package(
        {
            WEIGHTS_FILE: finished.adapter / WEIGHTS_FILE,
            "README.md": "---\nlicense: mit\n---\n# An adapter\n",
            "results.json": "[]\n",
        }
    )


def with_base(finished: RunCheckpoint, name: str) -> RunCheckpoint:
    model = finished.config.model.model_copy(update={"base": name, "revision": "b" * 40})
    return replace(finished, config=finished.config.model_copy(update={"model": model}))


def all_of(made: Package) -> dict[str, bytes]:
    files = {name: each if isinstance(each, bytes) else each.read_bytes() for name, each in made.files.items()}
    return {**files, MANIFEST: made.manifest()}


def assert_there(hub: LoopbackHub, made: Package, branch: str = "main") -> None:
    assert hub.repos[REPO].files(branch) == {".gitattributes": b"*.safetensors lfs\n", **all_of(made)}


def refusal(call: Callable[[], object], error: type[FedTuneError] = MissingError) -> str:
    """Return the one paragraph that `call` ends with."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.hint
    assert TOKEN not in text
    return text


def test_the_adapter_comes_back_by_its_id(hub: LoopbackHub, finished: RunCheckpoint, base: Base) -> None:
    from peft import PeftModel
    from peft.utils import load_peft_weights

    made = Folder().package(finished)
    published = publish(finished, made, REPO)
    assert published == Published(
        repo=REPO,
        url=f"{hub.url}/{REPO}",
        commit=hub.repos[REPO].branches["main"],
        sizes={name: len(content) for name, content in sorted(all_of(made).items())},
        created=True,
        unchanged=False,
        notes=("The base model is not on the hub, so the card does not name it.",),
    )
    assert_there(hub, made)
    assert hub.repos[REPO].private
    assert hub.repos[REPO].history() == ["peft_1 of tiny-1, exported by fedtune", "initial commit"], "one commit"
    assert list(hub.storage.values()) == [(finished.adapter / WEIGHTS_FILE).read_bytes()], "weights in large storage"

    read = read_adapter(fetch_adapter(REPO)).tensors
    assert read.keys() == finished.saved.tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in finished.saved.tensors.items())
    by_peft = load_peft_weights(REPO, device="cpu")
    assert all(torch.equal(by_peft[name], tensor) for name, tensor in finished.saved.tensors.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in words that the next one drops
        model = PeftModel.from_pretrained(base.model, REPO)
    kept = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    model.unload()
    assert kept.keys() == read.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in read.items())


def test_repeating_makes_no_commit(hub: LoopbackHub, finished: RunCheckpoint) -> None:
    first = publish(finished, Folder().package(finished), REPO)
    hub.asked.clear()
    again = publish(finished, Folder().package(finished), REPO)
    assert (again.created, again.unchanged, again.commit) == (False, True, first.commit)
    assert hub.writes() == []


def test_an_update_replaces_the_former_package_and_nothing_else(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package
) -> None:
    repo = hub.model(REPO, {"NOTES.md": b"the owner's own", "results.json": b"[1]"})
    publish(finished, package({**small.files, "old.json": "{}"}), REPO)
    assert repo.files()["old.json"] == b"{}"
    changed = package({**small.files, "results.json": "[2]\n"})
    hub.sent.clear()
    published = publish(finished, changed, REPO)
    assert not published.unchanged
    assert repo.files() == {".gitattributes": b"*.safetensors lfs\n", "NOTES.md": b"the owner's own", **all_of(changed)}
    assert len(repo.history()) == 3
    (body,) = (each for each in hub.sent if b'"parentCommit"' in each)
    lines = [json.loads(line) for line in body.splitlines()][1:]
    kinds = {line["value"]["path"]: line["key"] for line in lines}
    assert kinds == {"old.json": "deletedFile", "results.json": "file", MANIFEST: "file"}, "only what differs"


@pytest.mark.parametrize(
    "foreign", [b'{"NOTES.md": "a web app\'s"}', b'["NOTES.md"]', b"\xff no JSON", b'{"gone.txt": "%s"}' % (b"0" * 64)]
)
def test_a_manifest_of_something_else_deletes_nothing(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package, foreign: bytes
) -> None:
    repo = hub.model(REPO, {"NOTES.md": b"the owner's own", MANIFEST: foreign})
    publish(finished, small, REPO)
    assert repo.files()["NOTES.md"] == b"the owner's own"
    assert repo.files()[MANIFEST] == small.manifest()


def test_visibility_is_chosen_once_and_never_changed(hub: LoopbackHub, finished: RunCheckpoint, small: Package) -> None:
    publish(finished, small, f"{OWNER}/open", public=True)
    publish(finished, small, "team/shared")
    assert not hub.repos[f"{OWNER}/open"].private
    assert hub.repos["team/shared"].private
    said = publish(finished, small, f"{OWNER}/open").notes
    assert any("is public already and stays public" in note for note in said)
    assert not hub.repos[f"{OWNER}/open"].private
    hub.repos["team/shared"].gated = "auto"
    said = publish(finished, small, "team/shared", public=True).notes
    assert any("is private and stays private" in note for note in said)
    assert any("is gated and stays gated" in note for note in said)
    assert hub.repos["team/shared"].private


def test_a_branch_of_its_own(hub: LoopbackHub, finished: RunCheckpoint, small: Package) -> None:
    published = publish(finished, small, REPO, revision="rank-2", message="second try")
    repo = hub.repos[REPO]
    assert published.url.endswith(f"{REPO}/tree/rank-2")
    assert published.commit == repo.branches["rank-2"]
    assert repo.history("rank-2") == ["second try", "initial commit"]
    assert repo.history() == ["initial commit"]
    assert publish(finished, small, REPO, revision="rank-2", message="other words").unchanged


@pytest.mark.parametrize(
    "repo", ["adapter", "a/b/c", "me/", "me/a b", "me/x..y", "-me/x", "me/x.git", "me/" + "x" * 99]
)
def test_names_of_repositories(hub: LoopbackHub, finished: RunCheckpoint, small: Package, repo: str) -> None:
    assert "--repo USER/NAME" in refusal(lambda: publish(finished, small, repo), UsageError)
    assert hub.asked == []


@pytest.mark.parametrize("revision", ["", "a b", "refs/pr/1", "0" * 40, "a..b", "-x", "x/", "x~1", "v1."])
def test_names_of_branches(hub: LoopbackHub, finished: RunCheckpoint, small: Package, revision: str) -> None:
    assert "--revision" in refusal(lambda: publish(finished, small, REPO, revision=revision), UsageError)
    assert hub.asked == []


def scoped(name: str, *permissions: str) -> dict[str, object]:
    kind = "model" if "/" in name else "user"
    return account(
        "fineGrained", fineGrained={"scoped": [{"entity": {"type": kind, "name": name}, "permissions": permissions}]}
    )


@pytest.mark.parametrize(
    ("repo", "who", "said"),
    [
        (REPO, None, "does not accept your token"),
        (REPO, account("read"), "Your token may only read. Create one that may write at"),
        ("you/adapter", account(), f"You are logged in as me, who is not a member of you. Publish as --repo {REPO}"),
        ("readers/adapter", account(), "As a member of readers you may read"),
        (REPO, scoped(OWNER, "repo.content.read"), "Your fine-grained token may not write to me/adapter"),
        (REPO, scoped("team", "repo.write"), "Your fine-grained token may not write to me/adapter"),
        (REPO, account("fineGrained", fineGrained={"scoped": []}), "Your fine-grained token may not write"),
    ],
)
def test_who_may_not_write_sends_nothing(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package, repo: str, who: dict[str, object] | None, said: str
) -> None:
    hub.accounts = {TOKEN: who} if who else {}
    assert said in refusal(lambda: publish(finished, small, repo))
    assert hub.writes() == []
    assert hub.repos == {}


@pytest.mark.parametrize(
    "who",
    [
        scoped(OWNER, "repo.content.read", "repo.write"),
        scoped(REPO, "repo.write"),
        account("fineGrained"),  # it does not say
        {"name": OWNER, "orgs": []},
        {"name": OWNER.upper(), "auth": {"type": "oauth"}},
    ],
)
def test_who_may_write_does(hub: LoopbackHub, finished: RunCheckpoint, small: Package, who: dict[str, object]) -> None:
    hub.accounts = {TOKEN: who}
    publish(finished, small, REPO)
    assert_there(hub, small)


def test_no_token(hub: LoopbackHub, finished: RunCheckpoint, small: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refusal(lambda: publish(finished, small, REPO))
    assert hub.asked == []


def test_an_existing_repository_that_may_not_be_written(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package
) -> None:
    hub.model(REPO, writable=False)
    assert "does not let your token write to me/adapter (403)" in refusal(lambda: publish(finished, small, REPO))
    assert hub.writes() == []
    hub.repos[REPO].writable = True
    hub.fail("auth-check", 404)
    publish(finished, small, REPO)  # a hub that does not know the question
    assert_there(hub, small)


def test_the_base_model_is_looked_up(hub: LoopbackHub, finished: RunCheckpoint, small: Package) -> None:
    hub.model("them/base", private=False)
    assert publish(with_base(finished, "them/base"), small, REPO).notes == ()
    hub.repos["them/base"].gated = "manual"
    assert "them/base is gated" in publish(with_base(finished, "them/base"), small, REPO).notes[0]
    hub.fail("GET /api/models/them/base", 403, times=1, X_Error_Code="GatedRepo")
    assert "them/base is gated" in publish(with_base(finished, "them/base"), small, REPO).notes[0]
    hub.asked.clear()
    said = refusal(lambda: publish(with_base(finished, "them/bose"), small, REPO))
    assert "There is no base model them/bose" in said
    assert hub.writes() == []


# --- dry runs ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_asks_and_sends_nothing(hub: LoopbackHub, finished: RunCheckpoint, small: Package) -> None:
    published = publish(finished, small, REPO, dry_run=True)
    assert (published.commit, published.created, published.unchanged) == (None, True, False)
    assert published.sizes == small.sizes()
    hub.model(REPO, private=False)
    published = publish(finished, small, REPO, dry_run=True)
    assert not published.created
    assert any("is public already" in note for note in published.notes)
    hub.accounts[TOKEN] = account("read")
    assert "may only read" in publish(finished, small, REPO, dry_run=True).notes[0]
    assert hub.writes() == []
    assert hub.sent == []


def test_a_dry_run_needs_no_network_and_no_token(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> str:
        published = publish(finished, small, REPO, dry_run=True)
        assert (published.commit, published.created) == (None, False)
        (note,) = published.notes
        return note

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE keeps the hub out" in said()
    assert "HF_HUB_OFFLINE" in refusal(lambda: publish(finished, small, REPO))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in said()
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in said()
    assert hub.asked == []


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        *(
            "whoami",
            rf"GET /api/models/{REPO}$",
            "create",
            "validate-yaml",
            "preupload",
            "objects/batch",
            "PUT /storage",
        ),
        *("commit", rf"GET /api/models/{REPO}/revision", "tree", "resolve"),
    ],
)
def test_503_twice_then_ok(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package, where: str, slept: list[float]
) -> None:
    hub.fail(where, 503, times=2)
    publish(finished, small, REPO)
    assert_there(hub, small)
    assert len(hub.repos[REPO].history()) == 2
    assert slept == [1, 2]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("where", [COMMIT, "POST /api/repos/create", "PUT /storage"])
def test_a_line_cut_before_or_after_the_hub_has_stored(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package, where: str, after: bool
) -> None:
    hub.drop(where, after=after)
    published = publish(finished, small, REPO)
    assert_there(hub, small)
    assert len(hub.repos[REPO].history()) == 2, "stored once"
    assert published.commit == hub.repos[REPO].branches["main"]
    assert (published.created, published.unchanged) == (True, False)
    commits = [each for each in hub.asked if each.startswith(COMMIT)]
    assert len(commits) == (2 if where == COMMIT and not after else 1)


def test_another_commit_in_between_is_seen(hub: LoopbackHub, finished: RunCheckpoint, small: Package) -> None:
    publish(finished, small, REPO)
    repo = hub.repos[REPO]

    def overtake(handler: Handler) -> None:
        theirs = {**repo.files(), "theirs.txt": b"theirs", "results.json": b"theirs as well"}
        repo.add("main", theirs, repo.commits[repo.branches["main"]].large, "theirs")
        handler.work()

    hub.faults.append(Fault(COMMIT, 1, overtake))
    changed = package({**small.files, "README.md": "# Another card\n"})  # results.json need not be sent, at first
    publish(finished, changed, REPO)
    assert repo.files() == {".gitattributes": b"*.safetensors lfs\n", "theirs.txt": b"theirs", **all_of(changed)}
    assert len(repo.history()) == 4


@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        ({"Retry_After": "7"}, [7]),
        ({"RateLimit": '"api";r=0;t=55'}, [56]),
        ({"RateLimit": '"api";r=3;t=55'}, [1]),
        ({"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}, [1]),
    ],
)
@pytest.mark.parametrize("where", ["whoami", COMMIT])
def test_429_waits_as_long_as_the_hub_says(
    hub: LoopbackHub,
    finished: RunCheckpoint,
    small: Package,
    slept: list[float],
    where: str,
    headers: dict[str, str],
    waits: list[float],
) -> None:
    hub.fail(where, 429, times=1, **headers)
    publish(finished, small, REPO)
    assert slept == waits
    assert_there(hub, small)


def test_429_for_too_long_ends(hub: LoopbackHub, finished: RunCheckpoint, small: Package, slept: list[float]) -> None:
    hub.fail("whoami", 429, Retry_After="3600")
    assert "answers 429" in refusal(lambda: publish(finished, small, REPO))
    assert slept == []


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "does not accept your token"), (403, "does not let your token write to me/adapter")],
)
@pytest.mark.parametrize("where", ["create", "preupload", "PUT /storage", COMMIT])
def test_a_refusal_on_the_way_is_one_sentence(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package, slept: list[float], where: str, status: int, said: str
) -> None:
    hub.fail(where, status)
    text = refusal(lambda: publish(finished, small, REPO))
    assert said in text
    assert "hf auth login" in text
    assert slept == []


def test_a_hub_that_stays_down_and_the_same_command_later(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package, slept: list[float]
) -> None:
    hub.fail(COMMIT, 503)
    assert "answers 503 for me/adapter" in refusal(lambda: publish(finished, small, REPO))
    assert slept == list(fedtune.hub.WAITS_S)
    hub.faults.clear()
    hub.asked.clear()
    published = publish(finished, small, REPO)
    assert (published.created, published.unchanged) == (False, False)
    assert_there(hub, small)
    assert not any("PUT /storage" in each for each in hub.asked), "what was uploaded is not sent again"


@pytest.mark.parametrize("where", ["create", "PUT /storage", COMMIT])
def test_interrupted_and_repeated_ends_in_the_same_state(
    hub: LoopbackHub,
    finished: RunCheckpoint,
    small: Package,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    hub.drop(where, after=True)  # the hub did it, and we stop before we know
    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            publish(finished, small, REPO)
    publish(finished, small, REPO)
    assert_there(hub, small)
    assert len(hub.repos[REPO].history()) == 2
    assert hub.repos[REPO].private


def test_what_came_back_is_compared(hub: LoopbackHub, finished: RunCheckpoint, small: Package) -> None:
    def spoil(name: str) -> Callable[[], None]:
        return lambda: hub.repos[REPO].files().__setitem__(name, hub.repos[REPO].files()[name] + b" ")

    for name in (WEIGHTS_FILE, "README.md", MANIFEST):
        hub.repos.clear()
        hub.on_commit = spoil(name)
        said = refusal(lambda: publish(finished, small, REPO), FedTuneError)
        assert f"the hub holds other contents than were sent to {REPO}: {name}." in said
    hub.on_commit = lambda: None
    publish(finished, small, REPO)
    assert_there(hub, small)


def test_a_card_that_the_hub_refuses_or_doubts(hub: LoopbackHub, finished: RunCheckpoint, small: Package) -> None:
    local = package({**small.files, "README.md": "---\nbase_model: /home/x\n---\n"})
    assert "The hub refuses the model card" in refusal(lambda: publish(finished, local, REPO), UsageError)
    assert hub.storage == {}
    hub.card_warning = "license is\nnot known"
    assert "The hub says about the card: license is not known" in publish(finished, small, REPO).notes


def test_another_status_is_told_with_the_hubs_own_words(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_oauth_a.b.c"  # another form than a user's own
    monkeypatch.setenv("HF_TOKEN", token)
    hub.accounts[token] = account()
    words = {"error": f"Private storage is full\n{token} {TOKEN}"}
    hub.faults.append(Fault("create", 1, lambda handler: handler.reply(402, words)))
    with pytest.raises(MissingError, match="answers 402 for me/adapter: Private storage is full") as caught:
        publish(finished, small, REPO)
    assert token not in str(caught.value)
    assert TOKEN not in str(caught.value)


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_canaries_never_reach_the_hub(
    hub: LoopbackHub,
    finished: RunCheckpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    canary, token = b"CANARY", "hf_" + "canary" * 6
    outside = tmp_path / "outside.txt"
    outside.write_bytes(canary)
    run = tmp_path / "runs" / "tiny-1"
    for file in (path for path in finished.run.path.rglob("*") if path.is_file()):
        copy = run / file.relative_to(finished.run.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for folder in (run, run / "peft_1"):
        (folder / ".env").write_bytes(canary)
        (folder / "id_rsa").write_bytes(canary)
        (folder / "link.json").symlink_to(outside)
        (folder / "adapter_model.bin").write_bytes(canary)
    table = json.loads((run / "config.json").read_text())
    table["data"]["source"] = f"/home/CANARY/{token}.jsonl"
    (run / "config.json").write_text(json.dumps(table))
    with_canaries = open_run(str(run))
    publish(with_canaries, Folder().package(with_canaries), REPO)
    reached = hub.everything()
    assert WEIGHTS_FILE.encode() in reached
    assert (finished.adapter / WEIGHTS_FILE).read_bytes() in reached, "this looks where it should"
    shown = capfd.readouterr()
    for secret in (canary, token.encode(), TOKEN.encode(), str(tmp_path).encode()):
        assert secret not in reached
    for text in (caplog.text, shown.out, shown.err):
        assert TOKEN not in text
        assert token not in text
    assert set(hub.repos[REPO].files()) - {".gitattributes"} == {*Folder().package(with_canaries).files, MANIFEST}


def test_addresses_that_let_their_reader_upload_are_in_no_log(
    hub: LoopbackHub,
    finished: RunCheckpoint,
    small: Package,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    before = logging.getLogger("huggingface_hub").level
    hub.fail("PUT /storage", 503, times=2)
    publish(finished, small, REPO)
    assert "/storage/" not in caplog.text
    assert logging.getLogger("huggingface_hub").level == before


def test_a_link_in_place_of_the_weights_is_refused(finished: RunCheckpoint, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).symlink_to(finished.adapter / WEIGHTS_FILE)
    with pytest.raises(UsageError, match="is a link"):
        package({WEIGHTS_FILE: tmp_path / WEIGHTS_FILE})


def test_the_wait_for_a_hub_that_hangs_ends(
    hub: LoopbackHub, finished: RunCheckpoint, small: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    hub.faults.append(Fault("whoami", 1, lambda handler: done.wait(10) and None))
    monkeypatch.setattr(fedtune.hub, "DEADLINE_S", 0.2)
    began = time.monotonic()
    assert "did not answer within 0.2 s" in refusal(lambda: publish(finished, small, REPO))
    assert time.monotonic() - began < 3
    done.set()


@pytest.mark.slow
def test_the_command_finds_the_hub_by_hf_endpoint(hub: LoopbackHub, finished: RunCheckpoint, tmp_path: Path) -> None:
    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedtune.cli.app", "export", str(finished.run.path), "--to", "hf-hub", *words],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    done = typed("--repo", REPO)
    assert (done.returncode, done.stdout) == (0, f"{hub.url}/{REPO}\n"), done.stderr
    assert_there(hub, Folder().package(finished))
    done = typed("--repo", "you/adapter")
    assert (done.returncode, done.stdout) == (3, "")
    assert "not a member of you" in done.stderr
    assert TOKEN not in done.stderr
