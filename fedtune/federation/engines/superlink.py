"""The superlink engine: submits the run to a running SuperLink, follows it, and brings its results back here.

Data and base model lie with the nodes (`fedtune node`), the ServerApp runs on the SuperLink's machine. What is submitted is a
bundle that holds no code: it names the ServerApp and ClientApp of the fedtune that is installed there. The ServerApp keeps its
own run directory, so a run that is submitted again under its name goes on from the last committed round; what comes back, and
how, is said in `mirror.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from uuid import uuid4

import httpx
import tomli_w

from fedtune.config.schema import FederationConfig, FedTuneConfig
from fedtune.data.partition import PartitionSummary
from fedtune.errors import FederationError, FedTuneError
from fedtune.federation.engines.base import Engine, without_data_set
from fedtune.federation.engines.run_sync import Failed, Receiver, Signed, copies_in
from fedtune.federation.events import ClientsMet, DataReady, RoundDone, RunOpened, tell
from fedtune.federation.flower.compat import (
    ApiErrorCode,
    ControlHttpClient,
    Fab,
    FlowerError,
    Status,
    SubStatus,
    build_fab_from_files,
    control_pb2,
    fab_to_proto,
    run_pb2,
    user_config_to_proto,
)
from fedtune.federation.flower.connection import connected
from fedtune.runs.atomic import write_json
from fedtune.runs.directory import RunDirectory
from fedtune.runs.log import Logged

_SILENCE_S = 60.0
"""A SuperLink that has not answered for so long is gone."""

_RETRY_S = 2.0


class _Forgotten(Exception):  # noqa: N818
    """The SuperLink does not know the run: it has been started anew, without its memory."""


@dataclass(frozen=True)
class Submitted:
    """What is remembered of a run between two calls, in the run's `superlink_file`."""

    name: str
    """The run's name on the SuperLink's machine."""
    run_id: int = 0
    """Flower's id of the last submission, 0 before the first."""
    event: int = 0
    """The last task event that was taken in."""
    rounds: int = 0
    """Rounds whose results are here."""
    rows: tuple[int, ...] = ()
    """Rows of each client, as the nodes have told; empty until then."""


def check(config: FederationConfig) -> int:
    """Make sure that the SuperLink answers, and return how many nodes are connected to it.

    Raises:
        UsageError: the SuperLink is not named, or not in a way that can be used.
        MissingError: it cannot be reached, or refuses to talk.
    """
    with connected(config) as client:
        return sum(node.status == "online" for node in client.ListNodes(control_pb2.ListNodesRequest()).nodes_info)


class SuperLinkEngine(Engine, name="superlink"):
    """Runs federations on a SuperLink's nodes."""

    is_local = False
    joins_arrays = True

    def check(self, config: FedTuneConfig) -> None:
        """Make sure that the SuperLink answers."""
        check(config.federation)

    def rounds_done(self, run: RunDirectory) -> int:
        """Return how many rounds' results have come back."""
        return _remembered(run).rounds

    def run(self, config: FedTuneConfig, run: RunDirectory) -> None:
        """Run the remaining rounds; return when their results are here.

        Raises:
            MissingError: the SuperLink cannot be reached.
            FederationError: the SuperLink, its ServerApp or the federation failed; the hint says how to go on.
            FedTuneError: whatever the ServerApp raised.
            KeyboardInterrupt: as it came, after the run was stopped on the SuperLink.
        """
        with connected(config.federation) as client:
            following = _Following(client, config, run)
            try:
                if not following.attach():
                    following.submit(_without_places(config))
                    following.follow()
            except _Forgotten:
                raise FederationError(
                    f"The SuperLink {config.federation.superlink} was started anew and has forgotten the run. "
                    f"The state after round {following.submitted.rounds} is saved.",
                    hint=f"fedtune train --resume {run.path}",
                ) from None
            except KeyboardInterrupt:
                following.stop()
                raise


class _Following:
    """One run on the SuperLink, from here."""

    def __init__(self, client: ControlHttpClient, config: FedTuneConfig, run: RunDirectory) -> None:
        self.client = client
        self.config = config
        self.run = run
        self.receiver = Receiver(run)
        self.submitted = _remembered(run)
        self.seen = self.submitted.event
        """The last task event of this call; what is remembered is the last after which all files were whole."""
        self.failed: Failed | None = None
        self.told_data = False

    def attach(self) -> bool:
        """Take in what the last submission has sent since, and follow it if it still runs; return whether the run has ended well.

        Raises:
            FedTuneError: it was still running, and has failed.
        """
        if not self.submitted.run_id:
            return False
        try:
            running = self._status().status != Status.FINISHED
            self.follow()
        except _Forgotten:
            return False
        except FedTuneError:
            # What was over before is what this call is to mend; and Flower notices only after a minute that a ServerApp is gone.
            if running and self.failed is not None:
                raise
            self.failed = None
            return False
        return True

    def submit(self, config_json: str) -> None:
        """Start the run; from its last committed round, if the SuperLink's machine has one."""
        self.receiver, self.seen = Receiver(self.run), 0
        fab, _ = build_fab_from_files({"pyproject.toml": _bundle().encode()})
        overrides: dict[str, str] = {
            "fedtune-config": config_json,
            "fedtune-version": version("fedtune"),
            "fedtune-have": copies_in(self.run),
            "run-name": self.submitted.name,
        }
        request = control_pb2.StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})),
            override_config=user_config_to_proto(dict(overrides)),
        )
        self._remember(run_id=self.client.StartRun(request).run_id, event=0)

    def follow(self) -> None:
        """Take in what the run sends until it ends.

        Raises:
            _Forgotten: the SuperLink has forgotten the run.
            FedTuneError: the run has failed.
        """
        lost = None
        while True:
            request = control_pb2.StreamRunEventsRequest(run_id=self.submitted.run_id, after_task_event_id=self.seen)
            try:
                self._status()  # is it there?
                lost = None
                with _forgetting():
                    for response in self.client.StreamRunEvents(request):
                        self._take(response.task_event.id, response.task_event.data)
                        self.seen = response.task_event.id
                status = self._status()
                break
            except httpx.TransportError as error:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > _SILENCE_S:
                    raise FederationError(
                        f"The SuperLink {self.config.federation.superlink} has not answered for {_SILENCE_S:.0f} s "
                        f"({type(error).__name__}). The state after round {self.submitted.rounds} is saved.",
                        hint=f"When it is back: fedtune train --resume {self.run.path}",
                    ) from None
                time.sleep(_RETRY_S)
        self._judge(status)

    def stop(self) -> None:
        """Stop the run on the SuperLink; what is committed stays there and here."""
        with contextlib.suppress(httpx.HTTPError):
            self.client.StopRun(control_pb2.StopRunRequest(run_id=self.submitted.run_id))

    def _take(self, number: int, text: str) -> None:
        event = self.receiver.take(text)
        match event:
            case None:
                return
            case Failed():
                self.failed = event
                return
            case Signed():
                self._remember(event=number)
                return
            case RunOpened():
                # The run directory was announced already; only another round than expected is news.
                if event.resumed_after == self.submitted.rounds:
                    return
                event = RunOpened(self.run.path, event.resumed_after)
                self._remember(rounds=event.resumed_after)
            case Logged():
                event.log_here(written=False)
                return
            case ClientsMet():
                self._remember(rows=tuple(event.rows))
                self._tell_data([f"node {node}" for node in event.nodes])
                return
            case RoundDone():
                self._remember(rounds=event.round, event=number)
        tell(event)

    def _judge(self, status: run_pb2.RunStatus) -> None:
        """Return if the run has come to its end, raise what it failed with otherwise."""
        if self.failed is not None:
            raise self.failed.as_error(self.run.path)
        adapter = self.run.adapter_folder(self.config.federation.rounds)
        if status.sub_status == SubStatus.COMPLETED and adapter.is_dir():
            if not self.told_data:  # the nodes were asked in an earlier call
                self._tell_data([str(partition) for partition in range(len(self.submitted.rows))])
            return
        log = self.run.path / "superlink.log"
        with contextlib.suppress(httpx.HTTPError):
            parts = self.client.StreamLogs(control_pb2.StreamLogsRequest(run_id=self.submitted.run_id))
            log.write_text("".join(part.log_output for part in parts), encoding="utf-8")
        details = " ".join(status.details.split())[:300].rstrip(".") or "no reason given"
        raise FederationError(
            f"The run ended on the SuperLink as {status.sub_status or status.status}: {details}. "
            f"The state after round {self.submitted.rounds} is saved; the ServerApp's log is {log}.",
            hint="Start the SuperLink with --disable-runtime-dependency-installation."
            if "`uv` is not available" in details
            else f"fedtune train --resume {self.run.path}",
        )

    def _tell_data(self, names: Sequence[str]) -> None:
        """Tell what is known of the clients' rows, which lie with the nodes."""
        named = enumerate(zip(names, self.submitted.rows, strict=True))
        table = [PartitionSummary(number, name, rows, None, None, None) for number, (name, rows) in named]
        # A node counts only rows that it can learn from.
        tell(DataReady(table, 0, sum(self.submitted.rows)))
        self.told_data = True

    def _status(self) -> run_pb2.RunStatus:
        run_id = self.submitted.run_id
        with _forgetting():
            status: run_pb2.RunStatus = (
                self.client.ListRuns(control_pb2.ListRunsRequest(run_id=run_id)).run_dict[run_id].status
            )
        return status

    def _remember(self, **changes: object) -> None:
        self.submitted = replace(self.submitted, **changes)  # type: ignore[arg-type]
        write_json(self.run.superlink_file, asdict(self.submitted))


@contextlib.contextmanager
def _forgetting() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        known = FlowerError.from_json(error.response.text)
        if known is not None and known.code == ApiErrorCode.RUN_ID_NOT_FOUND:
            raise _Forgotten from None
        raise


def _remembered(run: RunDirectory) -> Submitted:
    file = run.superlink_file
    if not file.is_file():
        # Two machines may have runs of one name.
        return Submitted(f"{run.path.resolve().name}-{uuid4().hex[:8]}")
    return Submitted(**run.read_superlink())


def _without_places(config: FedTuneConfig) -> str:
    """Return the config that travels, as JSON: without what only means something on this machine."""
    federation = config.federation.model_copy(update={"superlink": None, "superlink_ca": None, "ray_address": ""})
    return without_data_set(config).model_copy(update={"federation": federation}).model_dump_json()


def _bundle() -> str:
    """Return the bundle's only file."""
    return tomli_w.dumps(
        {
            "project": {
                "name": "fedtune",
                "version": version("fedtune"),
                "description": "Federated LoRA fine-tuning of language models",
                "license": "Apache-2.0",
                "dependencies": [],
            },
            "tool": {
                "flwr": {
                    "app": {
                        "publisher": "fedtune",
                        "components": {
                            "serverapp": "fedtune.federation.engines.superlink_app:app",
                            "clientapp": "fedtune.federation.client:app",
                        },
                        "config": dict.fromkeys(("fedtune-config", "fedtune-version", "fedtune-have", "run-name"), ""),
                    }
                }
            },
        }
    )
