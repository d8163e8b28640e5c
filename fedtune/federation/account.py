"""A client's account of what it has released under local privacy; a client whose account cannot be read does not train.

The account belongs to the client's data and not to a run, whose name the server chooses: on a data owner's node it is found by
the sha256 of the data file's bytes and adds up over all runs and restarts. In a simulation it lies in the run directory.

A release is on disk before the reply that holds it leaves the client; a crash between the two costs budget and gives none back.
An account that has vanished, is damaged, or holds fewer releases than this process has seen is refused. An older copy that is
put back while no node runs cannot be told from the account as it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedtune.config.schema import PrivacyConfig
from fedtune.errors import ClientError, MissingError
from fedtune.federation.privacy import composed_epsilon, exceeds, new_key, release_mu
from fedtune.models.adapter import AdapterTensors
from fedtune.runs.atomic import sync_folder, write_bytes

FOLDER, FILE, LOCK, MADE = "privacy", "account.json", "lock", "made"
"""Where accounts lie in a folder of state; `made` stays there, and shows that there has been an account."""

ACCOUNT_OF_RUN = "this run"
"""Name of a client's account in a simulation, where the book lies in the run directory."""

_VERSION = 1
_REFUSAL = "This client's privacy account cannot be read, so it does not train."
"""What a server is told; the place and the damage are for the owner."""


@dataclass(frozen=True)
class Release:
    """One noisy adapter that a client has let out."""

    digest: str
    """Hash of its bits: the same bits released again tell nothing new."""
    mu: float
    """Sensitivity of the update in standard deviations of its noise."""
    round: int


@dataclass(frozen=True)
class Account:
    """The releases of one data set."""

    key: bytes
    """Secret of the noise, 16 bytes."""
    releases: tuple[Release, ...] = ()

    def epsilon(self, delta: float, *further: float) -> float:
        """Return epsilon at `delta` of all releases, and of `further` ones of the given mu."""
        return composed_epsilon([*(release.mu for release in self.releases), *further], delta)


class AccountBook:
    """The accounts in one folder of state, by name; processes that share the folder take turns."""

    _seen: dict[Path, dict[str, int]] = {}  # noqa: RUF012  # of this process, whichever object asks
    """Releases of each account that this process has read or written."""

    def __init__(self, state: Path) -> None:
        """Name the folder of state; nothing is read or made yet."""
        self.state = state.absolute()
        self.folder = self.state / FOLDER
        self.file = self.folder / FILE

    def open(self) -> None:
        """Make the book where nothing is in the folder of state yet; read it where it is.

        Raises:
            MissingError: the folder of state has been in use and its book is gone; or the book is damaged.
        """
        if self.is_new:
            try:
                self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.folder.mkdir(
                    mode=0o700, exist_ok=True
                )  # it holds keys, also where the folder of state is open to others
                sync_folder(self.state)
            except OSError as error:
                raise MissingError(f"The folder {self.folder} cannot be made: {error.strerror}.") from None
        with self._locked():
            if self.is_new:  # no other process has been faster
                self._write({})
            (self.folder / MADE).touch(mode=0o600)
            self._read()

    def account(self, name: str) -> Account | None:
        """Return the account `name`, None where there is none yet; nothing is written.

        Raises:
            MissingError: the book is gone or damaged.
        """
        with self._locked():
            return self._read().get(name)

    def others(self, name: str) -> list[Account]:
        """Return all accounts but `name` that have releases."""
        with self._locked():
            return [account for other, account in self._read().items() if other != name and account.releases]

    def key(self, name: str) -> bytes:
        """Return the noise key of `name`, after an account was made if there was none.

        Raises:
            MissingError: the book is gone or damaged.
        """
        with self._locked():
            accounts = self._read()
            if name not in accounts:
                accounts[name] = Account(new_key())
                self._write(accounts)
            return accounts[name].key

    def check(self, name: str, privacy: PrivacyConfig, server_round: int) -> None:
        """Refuse a round that cannot end in a release; a repeated round may give the same bits, which cost nothing.

        Raises:
            ClientError: the budget is spent.
            MissingError: the book is gone or damaged.
        """
        account = self.account(name)
        if account is not None and all(release.round != server_round for release in account.releases):
            _check_budget(account, privacy)

    def release(self, name: str, private: AdapterTensors, privacy: PrivacyConfig, server_round: int) -> None:
        """Put `private` on the account; it is on disk when this returns, and only then may the reply leave.

        Args:
            name: The account's name.
            private: The noisy tensors.
            privacy: The run's; its epsilon is compared with all releases so far, at its delta.
            server_round: From 1.

        Raises:
            ClientError: the release would pass the budget.
            MissingError: the book is gone or damaged, or cannot be written.
        """
        digest = _digest(private)
        with self._locked():
            accounts = self._read()
            account = accounts.get(name)
            if account is None:
                raise MissingError(f"{self.file} has lost the account that this release belongs to.")
            if any(release.digest == digest for release in account.releases):
                return
            _check_budget(account, privacy)
            new = Release(digest, release_mu(privacy), server_round)
            accounts[name] = Account(account.key, (*account.releases, new))
            self._write(accounts)

    @property
    def is_new(self) -> bool:
        """Whether there is no book yet, and `open` would make one."""
        return not self.file.is_file() and self.state not in self._seen and self._is_unused()

    def _is_unused(self) -> bool:
        """Whether the folder of state holds nothing, or what a process has that makes the book at this moment."""
        if not self.state.is_dir():
            return not self.state.exists()
        if not self.folder.is_dir():
            return not any(self.state.iterdir())
        inside = {path.name for path in self.folder.iterdir() if not path.name.startswith(f".{FILE}.")}
        return {path.name for path in self.state.iterdir()} == {FOLDER} and inside <= {LOCK}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time read, change and write the book."""
        try:
            handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise MissingError(f"The privacy account {self.file} cannot be opened: {error.strerror}.") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _read(self) -> dict[str, Account]:
        """Read all accounts; whatever is not exactly as it was written is damage."""
        try:
            raw = self.file.read_bytes()
        except OSError as error:
            raise MissingError(
                f"The privacy account {self.file} cannot be read ({error.strerror}), and there has been one.",
                hint=_HINT,
            ) from None
        try:
            table = json.loads(raw)
            accounts = {
                name: Account(bytes.fromhex(one["key"]), tuple(Release(**release) for release in one["releases"]))
                for name, one in table["accounts"].items()
            }
            intact = raw == _serialised(accounts)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            intact = False
        if not intact:
            raise MissingError(f"The privacy account {self.file} is damaged.", hint=_HINT)
        self._compare(accounts)
        return accounts

    def _compare(self, accounts: Mapping[str, Account]) -> None:
        """Refuse an older copy of what this process has seen."""
        seen = self._seen.setdefault(self.state, {})
        for name, count in seen.items():
            if name not in accounts or len(accounts[name].releases) < count:
                raise MissingError(
                    f"The privacy account {self.file} holds fewer releases than a moment ago; an older copy was put back.",
                    hint=_HINT,
                )
        seen.update({name: len(account.releases) for name, account in accounts.items()})

    def _write(self, accounts: Mapping[str, Account]) -> None:
        try:
            write_bytes(self.file, _serialised(accounts))
        except OSError as error:
            raise MissingError(f"The privacy account {self.file} cannot be written: {error.strerror}.") from None
        self._compare(accounts)


_HINT = (
    "Put back the last copy of it. A new folder of state begins with nothing spent, which the data does not know of."
)


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what is wrong with an account into the error that a server may be told."""
    try:
        yield
    except MissingError as error:
        raise ClientError(_REFUSAL) from error


def _check_budget(account: Account, privacy: PrivacyConfig) -> None:
    spent = account.epsilon(privacy.delta, release_mu(privacy))
    if exceeds(spent, privacy.epsilon):
        raise ClientError(
            f"Another reply would bring this client's epsilon to {spent:.2f}, above its budget of {privacy.epsilon:g}."
        )


def _digest(tensors: AdapterTensors) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(json.dumps([name, *tensors[name].shape]).encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _serialised(accounts: Mapping[str, Account]) -> bytes:
    """Return the book as it lies on disk: one text for one content, with the sha256 of everything before it."""
    table: dict[str, Any] = {
        "version": _VERSION,
        "accounts": {
            name: {"key": account.key.hex(), "releases": [asdict(release) for release in account.releases]}
            for name, account in sorted(accounts.items())
        },
    }
    body = json.dumps(table, indent=1)
    return json.dumps({**table, "sha256": hashlib.sha256(body.encode()).hexdigest()}, indent=1).encode() + b"\n"
