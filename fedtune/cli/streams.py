"""The command's output streams, whatever the shell has made of them: closed (`>&-`), full (`> /dev/full`), or a broken pipe.

What a command says on stderr is never worth a run: errors of writing are passed over there. On stdout, where the data goes, the
first one ends the command with one sentence.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDOUT_NAME = "standard output"


class Output(io.RawIOBase):
    """Writes to a file descriptor; a failed write names the stream, and everything after it is dropped."""

    def __init__(self, descriptor: int, name: str | None) -> None:
        """Set up writing to `descriptor`; its first error names `name`, or is passed over without a name."""
        self._descriptor = descriptor
        self._name = name
        self._failed = False

    def write(self, data: ReadableBuffer, /) -> int:
        """Write bytes; return how many were taken."""
        size = memoryview(data).nbytes
        if self._failed:
            return size
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            # Python flushes the streams when it exits, and would report the same error once more.
            self._failed = True
            if self._name is not None:
                raise OSError(error.errno, error.strerror, self._name) from None
            return size

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return os.isatty(self._descriptor)


def prepare_streams() -> None:
    """Make the standard streams of this process usable, and put `Output` behind the two that are written."""
    _open_closed()
    sys.stdout = _stream(sys.stdout, 1, STDOUT_NAME)
    sys.stderr = _stream(sys.stderr, 2, None)


def _stream(before: TextIO | None, descriptor: int, name: str | None) -> TextIO:
    if before is not None:
        before.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Output(descriptor, name)),
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",  # names of files need not be UTF-8
        line_buffering=descriptor == 2 or os.isatty(descriptor),
    )


def _open_closed() -> None:
    """Open the standard descriptors that are closed: otherwise the next file that is opened gets their number, and their text."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != descriptor:
                os.dup2(nothing, descriptor)
                os.close(nothing)
