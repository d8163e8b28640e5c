"""What of fedtune's log records a command shows: warnings, and everything with --debug."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from fedtune.runs.log import current_log, is_ours, reroute_libraries, traceback_of

Say = Callable[[str], None]


class TerminalHandler(logging.Handler):
    """Hands records to the console: each text once, and a traceback where it is written nowhere else."""

    def __init__(self, warn: Say, note: Say, *, debug: bool) -> None:
        super().__init__(logging.DEBUG if debug else logging.WARNING)
        self._warn, self._note, self._debug = warn, note, debug
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        if not is_ours(record) and record.levelno < logging.WARNING:
            return
        try:
            text, trace, file = record.getMessage(), traceback_of(record), current_log()
            if trace and file is not None and not self._debug:
                text, trace = f"{text.removesuffix('.')}; the traceback is in {file}", ""
            if not is_ours(record):
                text = f"{record.name}: {text}"
            # A node's errors are told as often as they happen, for each belongs to another message.
            if text not in self._shown or trace or record.levelno >= logging.ERROR:
                self._shown.add(text)
                (self._warn if record.levelno >= logging.WARNING else self._note)(text)
                if trace:
                    self._note(trace)
        except Exception:
            self.handleError(record)


@contextmanager
def shown_records(warn: Say, note: Say, *, debug: bool) -> Iterator[None]:
    """Show fedtune's warnings inside the block; with `debug` everything of fedtune's, and libraries' warnings.

    Args:
        warn: Shows a warning.
        note: Shows any other text.
        debug: Whether the command was given --debug.
    """
    handler = TerminalHandler(warn, note, debug=debug)
    logger = logging.getLogger() if debug else logging.getLogger("fedtune")
    ours = logging.getLogger("fedtune")
    level = ours.level
    with ExitStack() as stack:
        if debug:
            stack.enter_context(reroute_libraries())
            ours.setLevel(logging.DEBUG)
            stack.callback(ours.setLevel, level)
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)
        yield
