"""Ends the processes of a private Ray when the process that started it is gone, kill -9 included.

`python -m fedtune.federation.engines.ray_cleanup FOLDER` waits until its standard input is closed, as the end of its parent
closes it; then it kills every process of the Ray in FOLDER, and removes the folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import suppress

import psutil  # type: ignore[import-untyped]

_KILLING_S = 60.0
_POLL_S = 0.1


def clean_up(folder: str) -> None:
    """Kill what belongs to the Ray in `folder` until nothing is left, and remove the folder."""
    until = time.monotonic() + _KILLING_S
    while (found := _processes(folder)) and time.monotonic() < until:
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(_POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


def _processes(folder: str) -> list[psutil.Process]:
    """Return the living processes of the Ray in `folder`, also those that left their parents.

    They inherited `RAY_TMPDIR=folder`, which those that change their title overwrite; those write their logs in the folder.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid == os.getppid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get("RAY_TMPDIR") == folder or any(
                file.path.startswith(f"{folder}/") for file in process.open_files()
            ):
                found.append(process)
    return found


if __name__ == "__main__":
    sys.stdin.read()
    clean_up(sys.argv[1])
