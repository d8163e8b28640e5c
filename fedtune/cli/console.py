"""The two consoles: data goes to stdout, everything else to stderr; and how an error ends a command."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import typer
from rich.console import Console

from fedtune.cli.log import shown_records
from fedtune.errors import FedTuneError, MissingError
from fedtune.runs.atomic import os_error_in


def _console(stream: TextIO | None, *, to_stderr: bool) -> Console:
    # In a file or a pipe nobody's window is narrow.
    width = None if (stream is not None and stream.isatty()) or "COLUMNS" in os.environ else 120
    return Console(stderr=to_stderr, width=width)


stdout = _console(sys.stdout, to_stderr=False)
stderr = _console(sys.stderr, to_stderr=True)

INTERRUPTED = 130

Command = TypeVar("Command", bound=Callable[..., None])


def guarded(command: Command) -> Command:
    """Turn a subcommand's exceptions into one short paragraph on stderr and an exit code (see `fedtune/errors.py`)."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        # SIGTERM ends a command just as Ctrl-C does: what is committed stays, the rest is dropped.
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            with shown_records(warn, note, debug=bool(kwargs.get("debug"))):
                command(*args, **kwargs)
            sys.stdout.flush()  # a full disk behind `>` shows here
        except FedTuneError as error:
            if kwargs.get("debug"):
                stderr.print_exception()
            fail(error.message, error.hint, error.exit_code)
        except KeyboardInterrupt as interrupt:
            fail("Interrupted.", str(interrupt), INTERRUPTED)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            raise typer.Exit(1) from None
        except Exception as error:
            if kwargs.get("debug"):
                stderr.print_exception()
            if (trouble := os_error_in(error)) is not None:
                fail(sentence_of(trouble), "", MissingError.exit_code)
            if _is_out_of_memory(error):
                hint = "Use a smaller model.base, adapter.rank or training.batch_size, or a machine with more memory."
                fail(f"Memory does not suffice{_amount(error)}.", hint, MissingError.exit_code)
            hint = "" if kwargs.get("debug") else "Run the same command with --debug to see where."
            fail(f"internal error: {type(error).__name__}: {error}", hint, FedTuneError.exit_code)
        finally:
            signal.signal(signal.SIGTERM, before)

    return run  # type: ignore[return-value]


def _amount(error: Exception) -> str:
    """Return how much memory an error asked for, as the end of a sentence; empty where it does not say."""
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))
    return f": {int(asked[1]) / 2**30:,.1f} GiB were requested" if asked else ""


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from fedtune.models.base import is_out_of_memory

    return is_out_of_memory(error)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def sentence_of(error: OSError) -> str:
    """Return what the operating system says, with the file that it is about: `no space left on device: runs/…`."""
    reason = error.strerror or os.strerror(error.errno or 0)
    reason = reason[:1].lower() + reason[1:]
    return f"{reason}: {error.filename}." if error.filename is not None else f"{reason}."


def report(error: OSError) -> None:
    """Say what is wrong outside of a command, on stderr."""
    stderr.print(f"[bold red]error:[/] {_plain(sentence_of(error))}", highlight=False, soft_wrap=True)


@contextmanager
def resumable(hint: Callable[[], str]) -> Iterator[None]:
    """Say how to go on where the block ends with the disk full, read-only or failing.

    Raises:
        MissingError: in place of such an error; its hint is what `hint` returns.
    """
    try:
        yield
    except Exception as error:
        trouble = os_error_in(error)
        if trouble is None or not (text := hint()):
            raise
        raise MissingError(sentence_of(trouble), hint=text) from error


def fail(message: str, hint: str, exit_code: int) -> NoReturn:
    """Say what is wrong and what to type next, and end the command."""
    stderr.print(f"[bold red]error:[/] {_plain(message)}", highlight=False, soft_wrap=True)
    if hint:
        stderr.print(f"[bold]→[/] {_plain(hint)}", highlight=False, soft_wrap=True)
    raise typer.Exit(exit_code)


def note(text: str) -> None:
    """Say something on stderr."""
    stderr.print(_plain(text), highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Warn of something on stderr."""
    stderr.print(f"[bold yellow]warning:[/] {_plain(text)}", highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; records become objects, paths strings."""
    sys.stdout.write(json.dumps(value, default=_as_json, indent=2, ensure_ascii=False) + "\n")


def print_data(text: str) -> None:
    """Print text on stdout just as it is."""
    sys.stdout.write(text)


def _as_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    return str(value)


def _plain(text: str) -> str:
    """Keep rich from reading brackets in a text as its markup."""
    return text.replace("[", r"\[")
