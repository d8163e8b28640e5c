"""A Flower of one's own: a private home, environment and app, and processes that end when we do.

`flwr run` would otherwise use one SuperLink, home and port for everything that a user runs. What is started here has a keeper
between itself and us, `python -m fedtune.federation.flower.home PID COMMAND...`: it ends the command and whatever came
of it when it is told to, when the command ends, and when process PID, which is us, is gone, kill -9 included.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import tomli_w

CONNECTION = "fedtune"
"""What the home's configuration calls its SuperLink."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LOOK_EVERY_S = 0.1
_ENDING_S = 60.0
"""How long a keeper goes on killing; what is left then waits inside the kernel."""

_LONGEST_ROOT = 40
"""Ray's Unix sockets lie in the home, and such a name may have no more than 107 bytes (103 on macOS)."""


@dataclass(frozen=True)
class FlowerHome:
    """One private Flower home."""

    path: Path

    def environment(self) -> dict[str, str]:
        """Return the environment for what is started here: ours, with Flower and Ray kept to this home and this machine."""
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return {
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            **inherited,
            "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{inherited.get('PATH', '')}",
            "FLWR_HOME": str(self.path),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_TMPDIR": str(self.path),
            # A SuperLink of ours is on the loopback, where no proxy leads.
            "NO_PROXY": ",".join(filter(None, (inherited.get("NO_PROXY"), "127.0.0.1,localhost"))),
        }

    def write_app(self, serverapp: str, clientapp: str, run_config: Mapping[str, str | int | float | bool]) -> Path:
        """Write the Flower app that `flwr run` sends: no code, only the names of two apps of an installed package.

        Args:
            serverapp: `module:attribute` of the ServerApp.
            clientapp: `module:attribute` of the ClientApp.
            run_config: What both find in `context.run_config`.
        """
        folder = self.path / "app"
        folder.mkdir()
        app = {
            "publisher": "fedtune",
            "components": {"serverapp": serverapp, "clientapp": clientapp},
            "config": dict(run_config),
        }
        project = {
            "name": "fedtune-run",
            "description": "A run of fedtune's",
            "version": version("fedtune"),
            "license": {"text": "Apache-2.0"},
        }
        text = tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}})
        (folder / "pyproject.toml").write_text(text, encoding="utf-8")
        return folder

    @contextmanager
    def owned(self, *command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command inside the block; its output goes to the end of `log`. Nothing of it is left after the block.

        Yields:
            The keeper, whose returncode is the command's.
        """
        with log.open("ab") as sink:
            keeper = subprocess.Popen(
                # -P: a file of the user's that is called like a module of Python's is none.
                [sys.executable, "-P", "-m", "fedtune.federation.flower.home", str(os.getpid()), *command],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        try:
            yield keeper
        finally:
            keeper.terminate()
            keeper.wait()


@contextmanager
def flower_home(address: str) -> Iterator[FlowerHome]:
    """Make a Flower home for the block, whose one SuperLink is that at `address`, on this machine."""
    root = tempfile.gettempdir()
    path = Path(tempfile.mkdtemp(prefix="fedtune-", dir=root if len(root) <= _LONGEST_ROOT else "/tmp"))
    superlinks = {"default": CONNECTION, CONNECTION: {"address": address, "insecure": True}}
    try:
        (path / "config.toml").write_text(tomli_w.dumps({"superlink": superlinks}), encoding="utf-8")
        yield FlowerHome(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def keep(owner: int, command: list[str]) -> int:
    """Run `command` until it ends, SIGTERM comes or process `owner` is gone; end all that came of it; return its exit code."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    linked = None
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        # Flower's daemons leave their session and lose their parents: orphans come to this process, not to init.
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        linked = partial(prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # should the keeper itself be killed
    if os.getppid() != owner:
        return 1
    process = subprocess.Popen(command, preexec_fn=linked)
    while (ended := process.poll()) is None and not told and os.getppid() == owner:
        time.sleep(_LOOK_EVERY_S)
    _end_descendants()
    if os.getppid() != owner:  # who would have removed it
        shutil.rmtree(os.environ["FLWR_HOME"], ignore_errors=True)
    return 1 if ended is None else ended


def _end_descendants() -> None:
    """Kill until nothing is left.

    A look at the tree of processes may miss some, while others end and theirs are handed on. The kernel knows better: as all
    orphans come here, who has no child has no descendant.
    """
    until = time.monotonic() + _ENDING_S
    while time.monotonic() < until:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue  # one more that has ended
            time.sleep(_LOOK_EVERY_S / 10)
            continue
        return


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))
