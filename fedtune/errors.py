"""Every error that a user may meet, with the exit code it ends the command with.

FedTuneError                 1   an internal error
├── UsageError               2   the command line or the config is wrong
│   └── ConfigError          2   one or more config values, each with its dotted path
├── MissingError             3   something is not there: network, token, data, device, adapter
├── FederationError          4   the federation failed: too few usable replies
│   └── ClientError          4   one client failed; costs that client, never the run
└── CapError                 5   the communication cap would be passed

An error's text is one short paragraph: what is wrong, where, and the next command to type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class FedTuneError(Exception):
    """Base of all errors that end a command with a message instead of a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        """`message` says what is wrong and where; `hint` is the next command to type or thing to do."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(FedTuneError):
    """The command line or a file that the user wrote cannot be used as it stands."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config."""

    path: str
    """Dotted path, such as `adapter.rank`."""
    message: str
    """What is wrong with the value."""
    origin: str = ""
    """Where the value came from: a file, a flag, a challenge."""
    nearest: str = ""
    """The nearest key that does exist, for a misspelt one."""

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        if self.nearest:
            text += f"; did you mean {self.nearest}?"
        if self.origin:
            text += f" (from {self.origin})"
        return text


class ConfigError(UsageError):
    """The config was refused; carries all problems at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(f"The config has {count}:\n{lines}")
        self.problems = tuple(problems)


class MissingError(FedTuneError):
    """Something that the command needs is not there."""

    exit_code = 3


class FederationError(FedTuneError):
    """The federation cannot go on."""

    exit_code = 4


class ClientError(FederationError):
    """One client's local training failed; its text is safe to send to the server (no paths, no data)."""


class CapError(FedTuneError):
    """The next message would pass the communication cap."""

    exit_code = 5
