"""The privacy account: it belongs to the data, adds up over runs, is on disk before a reply leaves, and fails closed."""

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from test_node import bundle, config_json, context, question, rows

from fedtune.config.load import load_config
from fedtune.config.schema import PrivacyConfig
from fedtune.errors import ClientError, MissingError
from fedtune.federation import account as module
from fedtune.federation import client
from fedtune.federation.account import ACCOUNT_OF_RUN, AccountBook
from fedtune.federation.node.policy import NO_STATE, NodeSettings, config_on_node
from fedtune.federation.node.run import answer
from fedtune.federation.privacy import composed_epsilon, exceeds, gaussian_epsilon, release_mu
from fedtune.federation.train import train
from fedtune.federation.workspace import NodeWorkspace
from fedtune.models.adapter import initial_tensors
from fedtune.protocol.arrays import encode
from fedtune.runs.directory import RunDirectory, file_sha256

PRIVACY = PrivacyConfig(mode="local", noise_multiplier=5.0, epsilon=4.0)
REFUSAL = "This client's privacy account cannot be read, so it does not train."


@pytest.fixture(autouse=True)
def restarted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forget what this process has seen, as a node that is started again has."""

    def forget() -> None:
        monkeypatch.setattr(AccountBook, "_seen", {})

    forget()
    return forget


def private(number: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), float(number))}


def fits(noise: float = 5.0, epsilon: float = 4.0) -> int:
    """Releases of one noise multiplier that a budget holds, by the closed form for equal ones."""
    count = 0
    while gaussian_epsilon(2 * math.sqrt(count + 1) / noise, 1e-5) <= epsilon:
        count += 1
    return count


def opened(state: Path, name: str = "data") -> AccountBook:
    book = AccountBook(state)
    book.open()
    book.key(name)
    return book


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_releases_of_different_noise_add_up_by_the_squares_of_mu() -> None:
    """Noise 2, 2, 1 and 1: mu = 1, 1, 2, 2, together √10; epsilon as of one Gaussian with that mu."""
    assert [release_mu(PrivacyConfig(noise_multiplier=noise)) for noise in (2.0, 1.0)] == [1.0, 2.0]
    assert release_mu(PrivacyConfig(noise_multiplier=2.0, clip=7.0)) == 1.0  # noise is in units of the clip
    assert composed_epsilon([1.0, 1.0, 2.0, 2.0], 1e-5) == pytest.approx(
        gaussian_epsilon(math.sqrt(10), 1e-5), rel=1e-12
    )
    assert composed_epsilon([], 1e-5) == 0


def test_a_budget_holds_to_the_last_release_of_it() -> None:
    assert not exceeds(4.0, 4.0)
    assert not exceeds(4.0 * (1 + 1e-12), 4.0)  # the order of a sum
    assert exceeds(4.0 * (1 + 1e-8), 4.0)


def test_the_budget_is_that_of_equal_releases(tmp_path: Path) -> None:
    book = opened(tmp_path / "state")
    for number in range(fits()):
        book.release("data", private(number), PRIVACY, number + 1)
    with pytest.raises(ClientError, match=r"epsilon to 4\.\d+, above its budget of 4\."):
        book.release("data", private(-1), PRIVACY, 99)
    account = book.account("data")
    assert account is not None
    assert len(account.releases) == fits() >= 3
    assert account.epsilon(1e-5) <= 4


def test_other_noise_delta_and_epsilon_count_with_what_was_released_before(tmp_path: Path) -> None:
    """mu = 0.4 three times is 0.48 squared; one release of mu = 1 brings the square to 1.48."""
    book = opened(tmp_path / "state")
    for number in range(3):
        book.release("data", private(number), PRIVACY, number + 1)
    together = gaussian_epsilon(math.sqrt(3 * 0.4**2 + 1), 1e-5)
    stronger = PrivacyConfig(mode="local", noise_multiplier=2.0, epsilon=together * 0.999)
    with pytest.raises(ClientError, match=f"epsilon to {together:.2f}"):
        book.release("data", private(7), stronger, 1)
    at_another_delta = stronger.model_copy(update={"delta": 1e-3})
    assert gaussian_epsilon(math.sqrt(1.48), 1e-3) < stronger.epsilon
    book.release("data", private(7), at_another_delta, 1)
    account = book.account("data")
    assert account is not None
    assert [release.mu for release in account.releases] == [0.4, 0.4, 0.4, 1.0]


def test_the_same_bits_are_one_release_and_other_bits_another(tmp_path: Path) -> None:
    book = opened(tmp_path / "state")
    for tensors in (private(1), private(1), {"w": torch.ones(3, 1)}, {"v": torch.ones(3)}):
        book.release("data", tensors, PRIVACY, 1)
    account = book.account("data")
    assert account is not None
    assert len(account.releases) == 3


def test_a_round_that_cannot_end_in_a_release_is_refused_before_training(tmp_path: Path) -> None:
    """A round that has been released may be a repetition, which costs nothing."""
    book = opened(tmp_path / "state")
    for number in range(fits()):
        book.check("data", PRIVACY, number + 1)
        book.release("data", private(number), PRIVACY, number + 1)
    book.check("data", PRIVACY, fits())
    with pytest.raises(ClientError, match="above its budget"):
        book.check("data", PRIVACY, fits() + 1)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_an_account_survives_a_restart_with_its_key(tmp_path: Path, restarted: Callable[[], None]) -> None:
    book = opened(tmp_path / "state")
    book.release("data", private(1), PRIVACY, 1)
    before = book.account("data")
    restarted()
    again = opened(tmp_path / "state")
    assert again.account("data") == before
    assert again.key("data") == book.key("data")
    assert len(again.key("data")) == 16
    assert (tmp_path / "state" / "privacy").stat().st_mode & 0o777 == 0o700


def test_accounts_of_other_data_are_separate(tmp_path: Path) -> None:
    book = opened(tmp_path / "state")
    book.release("data", private(1), PRIVACY, 1)
    assert book.key("other") != book.key("data")
    assert book.account("other") == module.Account(book.key("other"))
    (other,) = book.others("other")
    assert other == book.account("data")
    assert book.others("data") == []  # it has released nothing
    with pytest.raises(MissingError, match="has lost the account"):
        book.release("never opened", private(1), PRIVACY, 1)


@pytest.mark.parametrize("restart", [True, False])
def test_every_flipped_byte_is_damage(tmp_path: Path, restarted: Callable[[], None], restart: bool) -> None:
    book = opened(tmp_path / "state")
    for number in range(2):
        book.release("data", private(number), PRIVACY, number + 1)
    whole = book.file.read_bytes()
    for place in range(len(whole)):
        book.file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if restart:
            restarted()
        with pytest.raises(MissingError, match="is damaged"):
            AccountBook(tmp_path / "state").open()
    book.file.write_bytes(whole)
    AccountBook(tmp_path / "state").open()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"version": 1, "accounts": {}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"accounts": {"x": {}}}',
    ],
)
def test_another_content_is_damage(tmp_path: Path, restarted: Callable[[], None], content: bytes) -> None:
    book = opened(tmp_path / "state")
    restarted()
    book.file.write_bytes(content)
    with pytest.raises(MissingError, match="is damaged"):
        AccountBook(tmp_path / "state").open()


def test_every_truncation_is_damage(tmp_path: Path, restarted: Callable[[], None]) -> None:
    book = opened(tmp_path / "state")
    book.release("data", private(1), PRIVACY, 1)
    whole = book.file.read_bytes()
    for size in range(len(whole)):
        book.file.write_bytes(whole[:size])
        restarted()
        with pytest.raises(MissingError, match="is damaged"):
            AccountBook(tmp_path / "state").open()


def vanish(state: Path, what: str) -> None:
    match what:
        case "the file":
            (state / "privacy" / "account.json").unlink()
        case "the folder of the account":
            shutil.rmtree(state / "privacy")
        case "the folder of state":
            shutil.rmtree(state)


@pytest.mark.parametrize("what", ["the file", "the folder of the account", "the folder of state"])
def test_what_vanishes_while_the_node_lives_is_refused(tmp_path: Path, what: str) -> None:
    book = opened(tmp_path / "state")
    book.release("data", private(1), PRIVACY, 1)
    vanish(tmp_path / "state", what)
    for _ in range(2):
        with pytest.raises(MissingError):
            AccountBook(tmp_path / "state").open()
        for call in (book.account, book.key, lambda name: book.check(name, PRIVACY, 1)):
            with pytest.raises(MissingError):
                call("data")
    assert not book.file.exists()


@pytest.mark.parametrize("what", ["the file", "the folder of the account"])
def test_what_has_vanished_before_a_restart_is_refused(
    tmp_path: Path, restarted: Callable[[], None], what: str
) -> None:
    """The folder of state has been in use: something else is left in it."""
    opened(tmp_path / "state")
    (tmp_path / "state" / "debug.log").write_text("the node's own log\n")
    vanish(tmp_path / "state", what)
    restarted()
    with pytest.raises(MissingError):
        AccountBook(tmp_path / "state").open()


def test_an_older_copy_is_refused_while_the_node_lives(tmp_path: Path, restarted: Callable[[], None]) -> None:
    """After a restart it cannot be told: that would need a second place, as the docs say."""
    book = opened(tmp_path / "state")
    older = book.file.read_bytes()
    book.release("data", private(1), PRIVACY, 1)
    book.file.write_bytes(older)
    with pytest.raises(MissingError, match="fewer releases"):
        book.account("data")
    restarted()
    assert book.account("data") is not None


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingError, match="cannot be"):
        AccountBook(tmp_path / "file" / "state").open()
    with pytest.raises(MissingError, match="cannot be"):
        AccountBook(tmp_path / "file").open()


def test_a_release_that_cannot_be_written_does_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    book = opened(tmp_path / "state")
    monkeypatch.setattr(module, "write_bytes", full)
    with pytest.raises(MissingError, match="cannot be written: No space left on device"):
        book.release("data", private(1), PRIVACY, 1)
    monkeypatch.undo()
    account = book.account("data")
    assert account is not None
    assert account.releases == ()


def test_the_file_and_its_folder_are_flushed_before_a_release_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = opened(tmp_path / "state")
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (flushed.append(str(Path(f"/proc/self/fd/{file}").readlink())), fsync(file))[1]
    )
    book.release("data", private(1), PRIVACY, 1)
    names = [Path(path).name for path in flushed]
    assert names[0].startswith(".account.json.")
    assert names[1] == "privacy"


def release_many(state: str, first: int, count: int) -> None:
    book = AccountBook(Path(state))
    book.open()
    for number in range(first, first + count):
        book.key("data")
        book.release("data", private(number), PrivacyConfig(mode="local", noise_multiplier=1000.0), number + 1)


def open_at_once(state: str, barrier: Any) -> None:
    barrier.wait()
    AccountBook(Path(state)).open()


def test_processes_that_start_at_once_make_one_book(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for attempt in range(5):
        barrier = fork.Barrier(4)
        arguments = (str(tmp_path / f"state-{attempt}"), barrier)
        workers = [fork.Process(target=open_at_once, args=arguments) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0] * 4


def test_processes_that_share_a_folder_lose_no_release(tmp_path: Path) -> None:
    """Two nodes by mistake: each release of either is counted, from the first, which both want to make the book for."""
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=release_many, args=(str(tmp_path / "state"), 100 * k, 25)) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    account = AccountBook(tmp_path / "state").account("data")
    assert account is not None
    assert len({release.round for release in account.releases}) == len(account.releases) == 75


# --- a node -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> NodeSettings:
    """An owner with five rows, the built-in base model and a folder of state."""
    return NodeSettings(data=str(rows(tmp_path)), base="builtin:tiny", state=str(tmp_path / "state"))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rounds in which a client's training has begun."""
    begun: list[int] = []
    train_locally = client.train_locally

    def counted(*args: object, seed: tuple[int, ...], **options: object) -> object:
        begun.append(seed[1])
        return train_locally(*args, seed=seed, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "train_locally", counted)
    return begun  # type: ignore[return-value]


class Server:
    """A server that asks a node whatever it likes."""

    def __init__(self, own: NodeSettings, *settings: str) -> None:
        self.own = own
        self.text = config_json("privacy.mode=local", "privacy.noise_multiplier=5.0", "privacy.epsilon=4.0", *settings)
        workspace = NodeWorkspace(config_on_node(self.text, "", own))
        self.first = initial_tensors(workspace.adapted, seed=1)

    def ask(self, run: str = "run", server_round: int = 1, move: float = 0.0, kind: str = MessageType.TRAIN) -> Message:
        """Return the node's answer to one message of the run called `run`."""
        node = context(self.text)
        node.run_config["run-name"] = run
        orders = ConfigRecord({"server-round": server_round, "learning-rate": 1e-3})
        tensors = {name: tensor + move for name, tensor in self.first.items()}
        content = RecordDict({"arrays": encode(tensors, "float32"), "config": orders})
        return answer(question(kind, content), node, bundle(), self.own)

    @property
    def book(self) -> AccountBook:
        return AccountBook(Path(str(self.own.state)))

    def released(self) -> int:
        account = self.book.account(file_sha256(Path(self.own.data)))
        return 0 if account is None else len(account.releases)


def values(message: Message) -> np.ndarray:
    arrays = message.content.array_records["arrays"]
    return np.concatenate([arrays[name].numpy().ravel() for name in sorted(arrays)])


@pytest.mark.usefixtures("flower_identity")
def test_another_run_name_gives_no_further_budget(
    own: NodeSettings, restarted: Callable[[], None], trainings: list[int]
) -> None:
    """Neither does a restart of the node, nor a run of another seed, rank, noise multiplier or clip."""
    server = Server(own)
    for number in range(fits()):
        assert not server.ask(f"run {number}", move=1e-4 * number).has_error()
    assert server.released() == fits()
    trained = len(trainings)
    others = [
        server,
        Server(own, "seed=7"),
        Server(own, "adapter.rank=4"),
        Server(own, "privacy.noise_multiplier=4.0"),
        Server(own, "privacy.clip=0.5"),
    ]
    for other in others:
        restarted()
        refused = other.ask("quite another run", server_round=2, move=0.5)
        assert "above its budget of 4." in (refused.error.reason or "")
    assert len(trainings) == trained, "refused before training"
    assert server.released() == fits()


@pytest.mark.usefixtures("flower_identity")
def test_a_repeated_round_is_one_release_also_under_another_name(own: NodeSettings) -> None:
    server = Server(own)
    assert np.array_equal(values(server.ask("one")), values(server.ask("two")))
    assert server.released() == 1


@pytest.mark.usefixtures("flower_identity")
def test_the_key_of_several_runs_does_not_give_the_noise_away(own: NodeSettings) -> None:
    """The same update under two noise multipliers: with the same draws, 2 · one - other would be the bare update."""
    loud, louder = (Server(own, f"privacy.noise_multiplier={noise}") for noise in (20.0, 40.0))
    one, other = values(loud.ask("one")), values(louder.ask("other"))
    sent = np.concatenate([loud.first[name].numpy().ravel() for name in sorted(loud.first)])
    bare = 2 * (one - sent) - (other - sent)
    # Independent draws: a deviation of √(2² · 20² + 40²) clips; the same ones would leave the update alone, of norm 1 at most.
    assert bare.std() == pytest.approx(math.sqrt(2) * 40, rel=0.05)
    again = values(Server(own, "privacy.noise_multiplier=20.0", "privacy.clip=2.0").ask("clip"))
    assert (2 * (one - sent) - (again - sent)).std() == pytest.approx(math.sqrt(2) * 40, rel=0.05)


@pytest.mark.usefixtures("flower_identity")
@pytest.mark.parametrize(
    "what", ["flipped", "truncated", "the file", "the folder of the account", "the folder of state"]
)
def test_a_node_with_a_damaged_account_does_not_train(
    own: NodeSettings, what: str, trainings: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """The server is told that much and no path; the owner is told which file."""
    server = Server(own)
    assert not server.ask().has_error()
    file = server.book.file
    whole = file.read_bytes()
    if what == "flipped":
        file.write_bytes(whole.replace(b'"round": 1', b'"round": 3'))
    elif what == "truncated":
        file.write_bytes(whole[:-30])
    else:
        vanish(Path(str(own.state)), what)
    for run in ("run", "another"):
        assert server.ask(run).error.reason == REFUSAL
    assert trainings == [1]
    assert str(file.parent) in caplog.text


@pytest.mark.usefixtures("flower_identity")
def test_the_release_is_recorded_before_the_reply_is_made(own: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between the two costs budget; the same round again gives the same bits and costs no more."""
    server = Server(own)

    def crash(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(client, "_reply", crash)
        assert server.ask().error.reason == "MemoryError"
    assert server.released() == 1
    assert not server.ask().has_error()
    assert server.released() == 1


@pytest.mark.slow
@pytest.mark.usefixtures("flower_identity")
def test_a_killed_node_has_its_release_on_disk(own: NodeSettings) -> None:
    """kill -9 right after the release was recorded, in a process of its own."""
    code = (
        "import os, signal, sys\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "from fedtune.federation import client\n"
        "from fedtune.federation.engines.in_process import identity\n"
        "from fedtune.federation.node.policy import NodeSettings\n"
        "from test_account import Server\n"
        "client._reply = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with identity():\n"
        "    Server(NodeSettings.from_json(sys.stdin.read())).ask()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(Path(__file__).parents[1])],
        input=own.to_json(),
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -9, done.stderr
    assert Server(own).released() == 1


@pytest.mark.usefixtures("flower_identity")
@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN])
def test_a_node_without_state_refuses_runs_with_local_privacy(own: NodeSettings, kind: str) -> None:
    server = Server(own)
    server.own = replace(own, state=None)
    assert server.ask(kind=kind).error.reason == NO_STATE


@pytest.mark.usefixtures("flower_identity")
def test_a_changed_file_is_other_data(own: NodeSettings, tmp_path: Path) -> None:
    """What the docs say: the account is that of the file's bytes. A renamed copy is the same data, a changed one is not."""
    server = Server(own)
    server.ask()
    renamed = Path(own.data).rename(tmp_path / "renamed.jsonl")
    server = Server(replace(own, data=str(renamed)))
    assert server.released() == 1
    renamed.write_bytes(renamed.read_bytes() + b"\n")
    server = Server(replace(own, data=str(renamed)), "seed=3")  # another config: the rows are read again
    assert server.released() == 0
    assert not server.ask().has_error()
    assert server.released() == 1
    assert len(json.loads(server.book.file.read_text())["accounts"]) == 2


@pytest.mark.usefixtures("flower_identity")
def test_a_file_that_changes_while_it_is_read_is_refused(own: NodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.federation import workspace

    read_file = workspace.read_file

    def replaced(path: Path, *columns: object) -> object:
        table = read_file(path, *columns)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes() + b"\n")
        return table

    server = Server(own, "seed=11")
    monkeypatch.setattr(workspace, "read_file", replaced)
    assert server.ask().error.reason == "This node's data file changed while it was read."


@pytest.mark.usefixtures("flower_identity")
def test_a_client_without_any_folder_refuses() -> None:
    """A ClientApp on Flower's own SuperNode: what Flower keeps with the run is gone with the run."""
    node = context(config_json("privacy.mode=local", "privacy.epsilon=1e9"))
    orders = ConfigRecord({"server-round": 1, "learning-rate": 1e-3})
    reply = client.app(
        question(MessageType.TRAIN, RecordDict({"arrays": encode({}, "float32"), "config": orders})), node
    )
    assert reply.error.reason == NO_STATE


# --- a simulation -----------------------------------------------------------------------------------------------------


SIMULATION = (
    *(
        "privacy.mode=local",
        "privacy.epsilon=1e9",
        "federation.clients=2",
        "federation.fraction=1.0",
        "data.partitioner=iid",
    ),
    *("federation.rounds=2", "training.max_steps=1", "communication.cap_mib=1.5"),
)


@pytest.mark.parametrize("what", ["the file", "the folder of the account", "the folder of state", "flipped"])
def test_a_resumed_simulation_without_its_accounts_is_refused_before_training(
    tmp_path: Path, what: str, restarted: Callable[[], None], trainings: list[int]
) -> None:
    from fedtune.errors import CapError

    config = load_config(challenge="tiny", settings=SIMULATION).config
    with pytest.raises(CapError):
        train(config, out=tmp_path)
    (path,) = tmp_path.iterdir()
    run = RunDirectory(path)
    books = [AccountBook(run.client_state(partition)) for partition in range(2)]
    accounts = [book.account(ACCOUNT_OF_RUN) for book in books]
    assert [len(account.releases) for account in accounts if account] == [1, 1]
    if what == "flipped":
        books[1].file.write_bytes(books[1].file.read_bytes().replace(b'"round": 1', b'"round": 2'))
    else:
        vanish(books[1].state, what)
    restarted()
    begun = len(trainings)
    more = config.model_copy(update={"communication": config.communication.model_copy(update={"cap_mib": 500.0})})
    with pytest.raises(MissingError, match="privacy account"):
        train(more, out=tmp_path, resume=run)
    assert len(trainings) == begun
