"""A run's debug.log: warnings and tracebacks of fedtune and of the libraries that it uses.

While a run is open, everything that fedtune logs and every library's warning is appended to `<run>/debug.log` with time,
level, process and logger. Several processes may write to one file. A log that cannot be written never ends a run.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

LOG_NAME = "debug.log"
"""Name of the log in a run directory."""

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "flwr",
    "huggingface_hub",
    "lm_eval",
    "peft",
    "ray",
    "transformers",
)
"""Loggers of libraries that print on the terminal by themselves, or that do not hand their records on."""

FORWARDED = "fedtune_forwarded"
"""Attribute of a record that another process has already written to the run's log."""

_OURS = "fedtune"
_WARNINGS = "py.warnings"
"""The logger that `logging.captureWarnings` also uses."""

_MOST_REMEMBERED = 10_000
"""So many different library messages are remembered, each of which is written once."""

log = logging.getLogger(__name__)


def is_ours(record: logging.LogRecord) -> bool:
    """Whether a record comes from fedtune itself."""
    return record.name == _OURS or record.name.startswith(f"{_OURS}.")


class RunLog(logging.Handler):
    """Appends records to a file; keeps them in memory until the file is named."""

    def __init__(self, *, mode: int = 0o666) -> None:
        """Set up a log without a file yet.

        Args:
            mode: Permissions of a file that is made; the process's umask applies.
        """
        super().__init__(logging.DEBUG)
        self.path: Path | None = None
        self._mode = mode
        self._waiting: list[str] = []
        self._known: set[int] = set()
        self._failed = False
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"))

    def write_to(self, path: Path) -> None:
        """Append what has been logged, and what will be, to the file `path`."""
        self.acquire()
        try:
            self.path = path.absolute()
            waiting, self._waiting = self._waiting, []
            if waiting:
                self._append("".join(waiting))
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a library's only from WARNING up, and each of its messages once."""
        if getattr(record, FORWARDED, False):
            return
        try:
            if not is_ours(record) and (record.levelno < logging.WARNING or self._is_repeated(record)):
                return
            text = self.format(record) + "\n"
        except Exception:
            # A message with the wrong arguments is the library's mistake; the run must not end with it.
            text = f"{record.levelname} {record.name}: {record.msg!r} could not be formatted\n"
        if self.path is None:
            self._waiting.append(text)
        else:
            self._append(text)

    def _is_repeated(self, record: logging.LogRecord) -> bool:
        """Whether this message of a library has been written; bitsandbytes, for one, repeats its own in every pass."""
        key = hash((record.name, record.levelno, record.getMessage()))
        if key in self._known:
            return True
        if len(self._known) < _MOST_REMEMBERED:
            self._known.add(key)
        return False

    def _append(self, text: str) -> None:
        assert self.path is not None
        try:
            # Opened anew for every record: one write in append mode stays whole beside those of other processes.
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, self._mode)
            try:
                os.write(file, text.encode("utf-8", "backslashreplace"))
            finally:
                os.close(file)
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.warning("%s cannot be written (%s); the run goes on without it.", self.path, error.strerror)


_open: list[RunLog] = []
"""The logs that are open in this process, the innermost last."""


def current_log() -> Path | None:
    """Return the file of the log that is open in this process, None where none is."""
    return _open[-1].path if _open else None


@contextmanager
def run_log(path: Path | None = None, *, mode: int = 0o666) -> Iterator[RunLog]:
    """Log to the file `path` inside the block; without it, keep records until the log's `write_to` names the file.

    Library messages and Python warnings go to the log instead of the terminal. In a block that logs to the same file already,
    nothing changes.
    """
    if _open and (path is None or _open[-1].path == path.absolute()):
        yield _open[-1]
        return
    handler = RunLog(mode=mode)
    if path is not None:
        handler.write_to(path)
    with ExitStack() as stack:
        stack.enter_context(reroute_libraries())
        stack.enter_context(_warnings_logged())
        stack.enter_context(_all_of_ours())
        logging.getLogger().addHandler(handler)
        stack.callback(logging.getLogger().removeHandler, handler)
        _open.append(handler)
        stack.callback(_open.remove, handler)
        yield handler


@dataclass(frozen=True)
class Logged:
    """A record of fedtune's that was made in another process."""

    level: int
    logger: str
    text: str
    trace: str = ""
    """The traceback that belongs to it."""

    def log_here(self, *, written: bool) -> None:
        """Hand the record to this process's handlers; `written` says that the run's log has it already."""
        logger = logging.getLogger(self.logger)
        if not (self.logger == _OURS or self.logger.startswith(f"{_OURS}.")) or not logger.isEnabledFor(self.level):
            return
        record = logger.makeRecord(self.logger, self.level, "", 0, "%s", (self.text,), None, extra={FORWARDED: written})
        record.exc_text = self.trace or None
        logger.handle(record)


@contextmanager
def forwarded_records(send: Callable[[Logged], None], *, level: int = logging.DEBUG) -> Iterator[None]:
    """Send fedtune's records from `level` up to another process, whose user sees them."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                send(Logged(record.levelno, record.name, record.getMessage(), traceback_of(record)))
            except Exception:
                self.handleError(record)

    handler, logger = Forward(level), logging.getLogger(_OURS)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def traceback_of(record: logging.LogRecord) -> str:
    """Return the traceback that belongs to a record, or an empty string."""
    if record.exc_info and record.exc_info[1] is not None:
        return "".join(traceback.format_exception(record.exc_info[1])).rstrip()
    return record.exc_text or ""


@contextmanager
def _all_of_ours() -> Iterator[None]:
    """Create fedtune's records of every level in the block; other handlers see those that they would have seen without it."""
    ours, root = logging.getLogger(_OURS), logging.getLogger()
    before, shown_from = ours.level, ours.getEffectiveLevel()
    # Without any handler, Python prints warnings on stderr. The log's own handler must not take that away.
    fallback = logging.lastResort if not ours.hasHandlers() else None

    def as_before(record: logging.LogRecord) -> bool:
        return not is_ours(record) or record.levelno >= shown_from

    others = list(root.handlers)
    for handler in others:
        handler.addFilter(as_before)
    ours.setLevel(logging.DEBUG)
    if fallback is not None:
        ours.addHandler(fallback)
    try:
        yield
    finally:
        if fallback is not None:
            ours.removeHandler(fallback)
        ours.setLevel(before)
        for handler in others:
            handler.removeFilter(as_before)


@contextmanager
def reroute_libraries() -> Iterator[None]:
    """Take the known libraries' log lines off the terminal; warnings and errors go to the root logger's handlers."""
    with ExitStack() as stack:
        for name in LIBRARIES:
            stack.enter_context(_rerouted(logging.getLogger(name)))
        yield


@contextmanager
def _rerouted(logger: logging.Logger) -> Iterator[None]:
    printing = [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
    level, propagate, nowhere = logger.level, logger.propagate, logging.NullHandler()
    for handler in printing:
        logger.removeHandler(handler)
    logger.addHandler(nowhere)  # without a handler, Python itself would print
    logger.propagate = True
    logger.setLevel(raised := max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        if logger.level == raised:  # a library that was imported in the block has set up its own
            logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(nowhere)
        for handler in printing:
            logger.addHandler(handler)


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Keep libraries' progress bars, log lines and warnings off the terminal; their warnings are logged, errors still raise.

    Where a run is open they reach its debug.log. The hub client's bars stay, since a download may take minutes.
    """
    with reroute_libraries(), _no_bars(), warnings.catch_warnings():
        warnings.simplefilter("default")
        with _warnings_logged():
            yield


@contextmanager
def _no_bars() -> Iterator[None]:
    """Turn off the progress bars of the libraries that are loaded; this file itself must load none of them."""
    restore: list[Callable[[], None]] = []
    if (transformers := sys.modules.get("transformers.utils.logging")) and transformers.is_progress_bar_enabled():
        transformers.disable_progress_bar()
        restore.append(transformers.enable_progress_bar)
    if (datasets := sys.modules.get("datasets.utils")) and not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
        restore.append(datasets.enable_progress_bars)
    try:
        yield
    finally:
        for enable in restore:
            enable()


@contextmanager
def _warnings_logged() -> Iterator[None]:
    """Log Python warnings in the block instead of printing them."""
    logger, nowhere, before = logging.getLogger(_WARNINGS), logging.NullHandler(), warnings.showwarning
    logger.addHandler(nowhere)
    warnings.showwarning = _log_warning
    try:
        yield
    finally:
        warnings.showwarning = before
        logger.removeHandler(nowhere)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    logging.getLogger(_WARNINGS).warning("%s", text.rstrip())
