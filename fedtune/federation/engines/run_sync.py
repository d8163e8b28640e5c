"""A run directory on the SuperLink's machine, copied into the local one as it grows.

Flower 1.41 brings no files back from a ServerApp: its artefacts need the enterprise edition, and its log is text that is cut
off when the ServerApp ends. What it does bring back in order, whole, and again from any point is a task's events, each a JSON
object. So the ServerApp tells what happens (`events.py`) and sends its files in parts as such events, and signs every
batch of files with their sha256; nothing shows in the local run directory before its hash was right.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedtune import errors
from fedtune.errors import ConfigError, FederationError, FedTuneError, MissingError, UsageError
from fedtune.federation.events import AdapterSaved, Event, RoundDone
from fedtune.runs.atomic import sync_folder, write_folder
from fedtune.runs.directory import RunDirectory, file_sha256

PART_BYTES = 2**22
"""Most bytes of a file in one event."""

_GROWING = ("metrics.jsonl", "ledger.jsonl", "comm_cost.txt")
_ALLOWED = re.compile(r"peft_[0-9]+/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_EVENTS: Mapping[str, type[Any]] = {member.__name__: member for member in get_args(Event)}
_ERRORS: Mapping[str, type[FedTuneError]] = {
    name: kind
    for name, kind in vars(errors).items()
    # A ConfigError is made of problems; here it is the UsageError that it is.
    if isinstance(kind, type) and issubclass(kind, FedTuneError) and not issubclass(kind, ConfigError)
}


class _Frame(BaseModel):
    # Bytes travel as base64.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class Copy(_Frame):
    """What a file is to be: its length in bytes and the sha256 of all of them."""

    size: int = Field(ge=0)
    sha256: str


class Part(_Frame):
    """Bytes of a file, from `offset` on; a part at 0 begins the file anew."""

    kind: Literal["part"] = "part"
    path: str
    offset: int = Field(ge=0)
    data: bytes


class Signed(_Frame):
    """The files whose parts were sent are complete."""

    kind: Literal["signed"] = "signed"
    files: dict[str, Copy]


class Told(_Frame):
    """Something happened: an event of `events.py`."""

    kind: Literal["told"] = "told"
    name: str
    event: dict[str, Any]


class Failed(_Frame):
    """The ServerApp ended with an error that is meant for the user."""

    kind: Literal["failed"] = "failed"
    error: str
    """The class's name."""
    message: str
    hint: str
    run: str
    """The ServerApp's own run directory, as it stands in message and hint."""

    def as_error(self, run: Path) -> FedTuneError:
        """Return the error as it reads for the local run directory `run`."""
        kind = _ERRORS.get(self.error, FederationError)
        message, hint = (text.replace(self.run, str(run)) for text in (self.message, self.hint))
        if kind in (UsageError, MissingError):
            message = f"On the SuperLink's machine: {message}"
        return kind(message, hint=hint)


_FRAMES: TypeAdapter[Part | Signed | Told | Failed] = TypeAdapter(
    Annotated[Part | Signed | Told | Failed, Field(discriminator="kind")]
)
_COPIES: TypeAdapter[dict[str, Copy]] = TypeAdapter(dict[str, Copy])


class Mirror:
    """The ServerApp's side: a listener to the run that sends on what it hears, and the files when they have changed."""

    def __init__(self, run: RunDirectory, have: Mapping[str, Copy], push: Callable[[str], None]) -> None:
        """Set up the sending side.

        Args:
            run: The run directory that is sent.
            have: The files that the other side has.
            push: Sends one JSON object.
        """
        self.run = run
        self._push = push
        # A growing file is compared when it is sent; an adapter that differs is sent whole.
        self._have = {name: copy for name, copy in have.items() if name in _GROWING or self._is_here(name, copy)}

    def __call__(self, event: Event) -> None:
        """Send an event on; the files that it speaks of go first."""
        if isinstance(event, RoundDone | AdapterSaved):
            self.sync()
        self._send(Told(name=type(event).__name__, event=TypeAdapter(type(event)).dump_python(event, mode="json")))

    def sync(self) -> None:
        """Send what has changed since the last time."""
        signed: dict[str, Copy] = {}
        for unit in self._units():
            copies = {name: copy_of(self.run.path / name) for name in unit}
            if all(self._have.get(name) == copy for name, copy in copies.items()):
                continue
            for name in unit:
                self._send_file(name, self._kept(name) if name in _GROWING else 0)
            signed |= copies
        if signed:
            self._send(Signed(files=signed))
            self._have |= signed

    def fail(self, error: FedTuneError) -> None:
        """Send the error that the run ends with."""
        kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _ERRORS)
        self._send(Failed(error=kind, message=error.message, hint=error.hint, run=str(self.run.path)))

    def _units(self) -> Iterator[list[str]]:
        """Yield what is sent together: each growing file, and each adapter with all its files."""
        for name in _GROWING:
            if (self.run.path / name).is_file():
                yield [name]
        for number in self.run.adapters():
            folder = self.run.adapter_folder(number)
            names = sorted(f"{folder.name}/{path.name}" for path in folder.iterdir())
            # A complete adapter never changes, and hashing all of them in every round would take longer and longer.
            if not all(name in self._have for name in names):
                yield names

    def _is_here(self, name: str, copy: Copy) -> bool:
        return (
            bool(_ALLOWED.fullmatch(name))
            and (self.run.path / name).is_file()
            and copy_of(self.run.path / name) == copy
        )

    def _kept(self, name: str) -> int:
        """Return how many bytes at the file's beginning the other side has."""
        have = self._have.get(name)
        if have is None:
            return 0
        with (self.run.path / name).open("rb") as file:
            same = hashlib.sha256(file.read(have.size)).hexdigest() == have.sha256
        return have.size if same else 0

    def _send_file(self, name: str, offset: int) -> None:
        with (self.run.path / name).open("rb") as file:
            file.seek(offset)
            while (data := file.read(PART_BYTES)) or offset == 0:
                self._send(Part(path=name, offset=offset, data=data))
                if not data:  # an empty file is one empty part
                    break
                offset += len(data)

    def _send(self, frame: Part | Signed | Told | Failed) -> None:
        self._push(frame.model_dump_json())


class Receiver:
    """The local side: puts the parts together beside the run directory's files, and in place when they are signed."""

    def __init__(self, run: RunDirectory) -> None:
        """Set up the receiving side for the run directory `run`; parts of an earlier call are dropped."""
        self.run = run
        self._folder = run.state_folder / "incoming"
        shutil.rmtree(self._folder, ignore_errors=True)

    def take(self, text: str) -> Event | Signed | Failed | None:
        """Take one frame; return what the caller may want to know of.

        Raises:
            FederationError: it is no frame, names a file that a run has no business to send, or a file is damaged.
        """
        try:
            frame = _FRAMES.validate_json(text)
        except ValidationError:
            raise FederationError("The SuperLink sent something that this version of fedtune does not know.") from None
        match frame:
            case Part():
                self._append(frame)
                return None
            case Signed():
                self._install(frame.files)
                return frame
            case Told():
                return self._event(frame)
            case Failed():
                return frame

    def _append(self, part: Part) -> None:
        staged = self._staged(part.path)
        staged.parent.mkdir(parents=True, exist_ok=True)
        here = self.run.path / part.path
        if part.offset and not staged.exists() and here.is_file():
            with here.open("rb") as file:
                staged.write_bytes(file.read(part.offset))
        with staged.open("ab" if part.offset else "wb") as file:
            if file.tell() < part.offset:
                raise FederationError(f"A part of {part.path} is missing.")
            file.truncate(part.offset)  # what follows was sent by a ServerApp that did not come to sign it
            file.write(part.data)

    def _install(self, files: Mapping[str, Copy]) -> None:
        for name, copy in files.items():
            staged = self._staged(name)
            if not staged.is_file() or copy_of(staged) != copy:
                raise FederationError(f"{name} was damaged on its way from the SuperLink: its sha256 is another.")
        for folder in sorted({Path(name).parent for name in files} - {Path()}):
            write_folder(self.run.path / folder, partial(self._move, folder))
        for name in (name for name in files if "/" not in name):
            with self._staged(name).open("rb") as file:
                os.fsync(file.fileno())  # a power cut leaves the old file or the new one
            self._staged(name).replace(self.run.path / name)
        sync_folder(self.run.path)

    def _move(self, folder: Path, beside: Path) -> None:
        for path in (self._folder / folder).iterdir():
            path.replace(beside / path.name)

    def _event(self, told: Told) -> Event | None:
        kind = _EVENTS.get(told.name)
        if kind is None:
            return None
        try:
            event: Event = TypeAdapter(kind).validate_python(told.event)
        except ValidationError:
            return None
        return replace(event, path=self.run.adapter_folder(event.round)) if isinstance(event, AdapterSaved) else event

    def _staged(self, name: str) -> Path:
        # What comes from another machine must not say where it is written.
        if name not in _GROWING and not _ALLOWED.fullmatch(name):
            raise FederationError(f"The SuperLink sent a file that no run has: {name!r}.")
        return self._folder / name


def copy_of(path: Path) -> Copy:
    """Return length and sha256 of a file."""
    return Copy(size=path.stat().st_size, sha256=file_sha256(path))


def copies_in(run: RunDirectory) -> str:
    """Return, as JSON, what of a run is in the directory already."""
    adapters = (path for number in run.adapters() for path in run.adapter_folder(number).iterdir())
    paths = [run.path / name for name in _GROWING] + sorted(adapters)
    copies = {path.relative_to(run.path).as_posix(): copy_of(path) for path in paths if path.is_file()}
    return _COPIES.dump_json(copies).decode()


def read_copies(text: str) -> dict[str, Copy]:
    """Return what `copies_in` has written; nothing for an empty text."""
    return _COPIES.validate_json(text) if text else {}
