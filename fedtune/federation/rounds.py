"""The one loop: sample, send, screen, aggregate, commit; knows how to resume.

Flower's own loop always begins at round 1 and goes on when every client has failed. This one drives the same public methods
of a strategy, `configure_train` and `aggregate_train`, and commits after every round: killed at any moment, it goes on from
the last committed round and ends with the same bytes. Everything random is a function of (seed, round, partition), so the
state holds no generator.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors.torch import load_file, save_file

from fedtune.budget.count import serialised_bytes
from fedtune.budget.ledger import Entry, Ledger, comm_cost_lines
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import CapError, FederationError
from fedtune.federation.events import AdapterSaved, ReplyArrived, RoundDone, RoundStarted, tell
from fedtune.federation.screen import ARRAYS, METRICS, Accepted, Client, Refused, Screen, printable
from fedtune.federation.strategies import build_strategy
from fedtune.federation.wire import Shapes, decode, encode, message_bytes
from fedtune.models.adapter import AdapterTensors, write_adapter
from fedtune.runs.atomic import sync_folder, write_text
from fedtune.runs.directory import RunDirectory, append_line, cut_to
from fedtune.training.schedule import learning_rate

_SAMPLING = 1
"""Keeps the stream of client sampling apart from other streams of the same seed."""

_POLL_S = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a run has come; the small part of a committed state."""

    round: int
    """Rounds that are committed."""
    ledger_entries: int
    metrics_bytes: int


class Rounds:
    """One run's loop over rounds."""

    def __init__(
        self,
        grid: Grid,
        config: FedTuneConfig,
        run: RunDirectory,
        *,
        initial: AdapterTensors,
        target_modules: Sequence[str],
        revision: str | None,
    ) -> None:
        """Set up the loop.

        Args:
            grid: Where messages go.
            config: The run's config.
            run: Where the run is kept; a state in it is continued.
            initial: The adapter before round 1, names to float32 tensors.
            target_modules: Module names that the adapter is attached to, for its `adapter_config.json`.
            revision: Commit of the base model, None for a local one.
        """
        self.grid = grid
        self.config = config
        self.run = run
        self.target_modules = list(target_modules)
        self.revision = revision
        self.tensors = initial
        self.shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
        self.strategy: Strategy = build_strategy(config.strategy)
        self.ledger = Ledger(run.ledger_file, config.communication.cap_mib)
        self.done = self._restore()

    def go(self) -> None:
        """Run the remaining rounds.

        Raises:
            FederationError: a round ended with fewer accepted replies than `federation.min_success`.
            CapError: the next round's messages would pass the cap; the last adapter is saved.
        """
        if self.done >= self.config.federation.rounds:
            return
        clients = self._meet_clients()
        for server_round in range(self.done + 1, self.config.federation.rounds + 1):
            self._round(server_round, clients)

    def _round(self, server_round: int, clients: Sequence[Client]) -> None:
        started = time.monotonic()
        rate = learning_rate(self.config.training, server_round, self.config.federation.rounds)
        chosen = sample_clients(clients, self.config, server_round)
        tell(RoundStarted(server_round, [client.partition for client in chosen], rate))

        replies: list[Accepted] = []
        reason = "nobody replied"
        for verdict in self._exchange(server_round, chosen, rate):
            if isinstance(verdict, Accepted):
                replies.append(verdict)
            else:
                reason = f"client {verdict.client.partition if verdict.client else '?'}: {verdict.reason}"
            self._note(server_round, verdict, rate)
        needed = self.config.federation.min_success
        if len(replies) < needed:
            raise FederationError(
                f"Round {server_round} has {len(replies)} usable replies of {len(chosen)}, and "
                f"federation.min_success is {needed}; {reason}. "
                f"The state after round {self.done} is saved.",
                hint=f"fedtune train --resume {self.run.path}",
            )
        loss = self._aggregate(server_round, replies)
        self._commit(server_round)
        tell(
            RoundDone(
                round=server_round,
                loss=loss,
                learning_rate=rate,
                accepted=len(replies),
                asked=len(chosen),
                used_bytes=self.ledger.used_bytes,
                tokens=sum(_number(reply, "tokens") for reply in replies),
                seconds=time.monotonic() - started,
            )
        )

    def _exchange(self, server_round: int, chosen: Sequence[Client], rate: float) -> Iterator[Accepted | Refused]:
        """Send the adapter to the chosen clients, and yield a verdict on each reply as it arrives."""
        dtype = self.config.communication.wire_dtype
        by_node = {client.node: client for client in chosen}
        nodes = NodesOfRound(self.grid, list(by_node))
        orders = ConfigRecord({"learning-rate": rate})
        arrays = encode(self.tensors, "float32")
        messages = sorted(
            self.strategy.configure_train(server_round, arrays, orders, nodes),
            key=lambda message: by_node[message.metadata.dst_node_id].partition,
        )
        outgoing = self._encode_messages(messages)
        reply_bytes = message_bytes(self.shapes, dtype)
        try:
            self.ledger.reserve(sum(counted_bytes(message) + reply_bytes for message in outgoing))
        except CapError as error:
            if self.done and not self.run.adapter_folder(self.done).is_dir():
                self._save_adapter(self.done)
            raise CapError(
                f"{error.message} The run stopped after round {self.done} of {self.config.federation.rounds}; its state and "
                f"adapter are saved.",
                hint=f"Raise the cap and go on: fedtune train --resume {self.run.path} --set communication.cap_mib=…",
            ) from None
        for message in outgoing:
            partition = by_node[message.metadata.dst_node_id].partition
            self._enter(server_round, partition, "down", message, "ok")
        screen = Screen(server_round, by_node, self.shapes, dtype, self.config.federation.max_examples)
        answered = set()
        for reply in self.grid.send_and_receive(outgoing, timeout=self.config.federation.client_timeout_s):
            verdict = screen.admit(reply)
            partition = verdict.client.partition if verdict.client else -1
            self._enter(server_round, partition, "up", reply, verdict.status)
            answered.add(partition)
            yield verdict
        for client in chosen:
            if client.partition not in answered:
                yield Refused(client, f"no reply within {self.config.federation.client_timeout_s:g} s", "error")

    def _encode_messages(self, messages: Sequence[Message]) -> list[Message]:
        """Put the messages' adapters into the wire dtype; messages that share a content go on sharing it."""
        dtype = self.config.communication.wire_dtype
        if dtype == "float32":
            return list(messages)
        encoded: dict[int, RecordDict] = {}
        for message in messages:
            content = message.content
            if id(content) not in encoded:
                arrays = content.array_records[ARRAYS]
                tensors = decode(arrays, self.shapes, "float32")
                encoded[id(content)] = RecordDict({**content, ARRAYS: encode(tensors, dtype)})
            message.content = encoded[id(content)]
        return list(messages)

    def _aggregate(self, server_round: int, replies: Sequence[Accepted]) -> float:
        """Let the strategy aggregate the accepted replies in partition order, in float32; return the mean loss."""
        ordered = sorted(replies, key=lambda reply: reply.client.partition)
        messages = [_for_strategy(reply) for reply in ordered]
        arrays, metrics = self.strategy.aggregate_train(server_round, messages)
        if arrays is None or metrics is None:
            raise FederationError(f"The strategy aggregated nothing in round {server_round}.")
        self.tensors = decode(_as_float32(arrays), self.shapes, "float32")
        return float(metrics["train-loss"])  # type: ignore[arg-type]

    def _enter(self, server_round: int, partition: int, direction: str, message: Message, status: str) -> None:
        self.ledger.add(
            Entry(
                round=server_round,
                node=partition,
                direction=direction,  # type: ignore[arg-type]
                kind=message.metadata.message_type.partition(".")[0],
                bytes=counted_bytes(message),
                serialised_bytes=serialised_bytes(message),
                status=status,  # type: ignore[arg-type]
            )
        )

    def _note(self, server_round: int, verdict: Accepted | Refused, rate: float) -> None:
        """Write a client's line in metrics.jsonl, and tell of it."""
        metrics = dict(verdict.metrics) if isinstance(verdict, Accepted) else {}
        partition = verdict.client.partition if verdict.client else -1
        line = {
            "round": server_round,
            "partition": partition,
            "status": verdict.status,
            **({"reason": verdict.reason} if verdict.reason else {}),
            "learning_rate": rate,
            **{key.replace("-", "_"): value for key, value in metrics.items() if key != "server-round"},
        }
        append_line(self.run.metrics_file, line)
        loss, tokens, seconds = metrics.get("train-loss"), metrics.get("tokens", 0), metrics.get("seconds", 0.0)
        tell(
            ReplyArrived(
                round=server_round,
                partition=partition,
                status=verdict.status,
                reason=verdict.reason,
                loss=None if loss is None else float(loss),  # type: ignore[arg-type]
                tokens=int(tokens),  # type: ignore[arg-type]
                seconds=float(seconds),  # type: ignore[arg-type]
            )
        )

    def _meet_clients(self) -> list[Client]:
        """Wait for the federation's nodes and ask each for its partition id and number of rows."""
        wanted = self.config.federation.clients
        deadline = time.monotonic() + self.config.federation.client_timeout_s
        while len(nodes := list(self.grid.get_node_ids())) < wanted:
            if time.monotonic() > deadline:
                raise FederationError(f"{len(nodes)} of {wanted} clients are connected after the time limit.")
            time.sleep(_POLL_S)
        questions = {node: Message(RecordDict(), node, MessageType.QUERY) for node in nodes}
        clients: dict[int, Client] = {}
        failed = ""
        for reply in self.grid.send_and_receive(questions.values(), timeout=self.config.federation.client_timeout_s):
            if reply.has_error():
                failed = f"; node {reply.metadata.src_node_id}: {printable(reply.error.reason or '')}"
                continue
            metrics = reply.content.metric_records[METRICS]
            partition, rows = int(metrics["partition-id"]), int(metrics["rows"])  # type: ignore[arg-type]
            # Only the answer says which client the question went to.
            self._enter(self.done, partition, "down", questions[reply.metadata.src_node_id], "ok")
            self._enter(self.done, partition, "up", reply, "ok")
            if 0 <= partition < wanted and rows > 0:
                clients.setdefault(partition, Client(reply.metadata.src_node_id, partition, rows))
        if len(clients) < wanted:
            missing = sorted(set(range(wanted)) - set(clients))
            raise FederationError(f"Clients {missing[:10]} of {wanted} did not say how many rows they have{failed}.")
        return [clients[partition] for partition in range(wanted)]

    def _commit(self, server_round: int) -> None:
        """Make the round permanent: checkpoint, files of the run, then the state that resume starts from."""
        write_text(self.run.comm_cost_file, "".join(line + "\n" for line in comm_cost_lines(self.ledger.entries)))
        if self.config.is_checkpoint(server_round):
            self._save_adapter(server_round)
        sync_folder(self.run.path)
        progress = Progress(server_round, len(self.ledger.entries), self.run.metrics_file.stat().st_size)

        def fill(folder: Path) -> None:
            save_file(self.tensors, folder / "adapter.safetensors")
            (folder / "progress.json").write_text(json.dumps(vars(progress)), encoding="utf-8")

        self.run.commit_state(server_round, fill)
        self.done = server_round

    def _save_adapter(self, server_round: int) -> None:
        folder = self.run.adapter_folder(server_round)
        write_adapter(
            folder,
            self.tensors,
            self.config.adapter,
            base_name=self.config.model.base,
            revision=self.revision,
            target_modules=self.target_modules,
        )
        tell(AdapterSaved(server_round, folder))

    def _restore(self) -> int:
        """Load the last committed state, if there is one; return its round."""
        state = self.run.last_state()
        progress = Progress(0, 0, 0)
        if state is not None:
            progress = Progress(**json.loads((state / "progress.json").read_text(encoding="utf-8")))
            self.tensors = load_file(state / "adapter.safetensors")
        cut_to(self.run.metrics_file, progress.metrics_bytes)
        if len(self.ledger.entries) > progress.ledger_entries:
            self.ledger.mark_lost(progress.ledger_entries)
        return progress.round


class NodesOfRound(Grid):
    """The grid as a strategy sees it: this round's clients, nobody else, and no way to send past the ledger."""

    def __init__(self, grid: Grid, nodes: Sequence[int]) -> None:
        self._grid = grid
        self._nodes = list(nodes)

    def get_node_ids(self) -> Iterable[int]:
        """Return this round's clients."""
        return list(self._nodes)

    def set_run(self, run: object) -> None:
        """Refused: the run is the engine's business."""
        raise NotImplementedError("a strategy does not set the run")

    @property
    def run(self):  # type: ignore[no-untyped-def]
        """The engine's run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message to a node."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refused: messages go through the ledger."""
        raise NotImplementedError("a strategy sends nothing itself")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refused: messages go through the ledger."""
        raise NotImplementedError("a strategy receives nothing itself")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Refused: messages go through the ledger."""
        raise NotImplementedError("a strategy sends nothing itself")


def sample_clients(clients: Sequence[Client], config: FedTuneConfig, server_round: int) -> list[Client]:
    """Return the clients of a round, drawn without replacement by partition id, in that order.

    The draw depends on the seed and the round alone, not on node ids, which Flower makes up anew for every run.
    """
    generator = np.random.default_rng([_SAMPLING, config.seed, server_round])
    drawn = generator.choice(len(clients), size=config.federation.clients_per_round, replace=False)
    return [clients[index] for index in sorted(drawn.tolist())]


def counted_bytes(message: Message) -> int:
    """Return the leaderboard's count of a message: its ArrayRecords' `count_bytes()` (protocol, section 3)."""
    if not message.has_content():
        return 0
    return sum(record.count_bytes() for record in message.content.array_records.values())


def _for_strategy(reply: Accepted) -> Message:
    """Return the reply as a strategy wants it: float32 arrays, and of the metrics only those that are averaged."""
    content = RecordDict(
        {
            ARRAYS: encode(reply.tensors, "float32"),
            METRICS: MetricRecord({key: reply.metrics[key] for key in ("num-examples", "train-loss")}),
        }
    )
    message = Message(RecordDict(), reply.client.node, MessageType.TRAIN)
    answer = Message(content, reply_to=message)
    answer.metadata.__dict__["_src_node_id"] = reply.client.node
    return answer


def _number(reply: Accepted, name: str) -> int:
    """Return one of a reply's whole numbers, 0 where the client said nothing of the kind."""
    value = reply.metrics.get(name, 0)
    return int(value) if isinstance(value, int | float) else 0


def _as_float32(record: ArrayRecord) -> ArrayRecord:
    """Return the strategy's arrays in float32; some strategies compute in float64."""
    return ArrayRecord({name: Array(array.numpy().astype("<f4", copy=False)) for name, array in record.items()})
