"""The one loop: sample, send, validate, aggregate, commit; knows how to resume.

Flower's own loop always begins at round 1 and goes on when every client has failed. This one asks an algorithm what to send
(`strategies/`), and commits after every round: killed at any moment, it goes on from the last committed round and ends with
the same bytes. Everything random is a function of (seed, round, partition), so the state holds no generator.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from safetensors.torch import load, save_file

from fedtune.budget.ledger import Entry, Ledger, comm_cost_lines
from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.errors import CapError, FederationError
from fedtune.federation.clients import Roster
from fedtune.federation.events import AdapterSaved, ReplyArrived, RoundDone, RoundStarted, tell
from fedtune.federation.failures import FailureHistory, kind_of
from fedtune.federation.flower.size import serialised_bytes
from fedtune.federation.privacy import Accountant, new_key, noisy_average
from fedtune.federation.progress import (
    Prefix,
    Progress,
    check_clients,
    check_config,
    check_inputs,
    client_states,
    decisive_values,
    inputs_sha256,
)
from fedtune.federation.reply_validator import Accepted, Client, Expected, Refused, ReplyValidator
from fedtune.federation.strategies import build_algorithm
from fedtune.federation.strategies.base import Outgoing, weights_of
from fedtune.models.adapter import AdapterTensors, write_adapter
from fedtune.protocol.arrays import decode, encode
from fedtune.protocol.messages import ARRAYS, CONFIG, TrainOrder
from fedtune.protocol.sampling import sample
from fedtune.protocol.wire_format import CODECS, wire_bytes
from fedtune.runs.atomic import read_json_lines, sync_folder, write_text
from fedtune.runs.directory import RunDirectory, append_line, cut_to
from fedtune.training.schedule import learning_rate

_NOISE_KEY = "noise.key"

log = logging.getLogger(__name__)


class Rounds:
    """One run's loop over rounds."""

    def __init__(
        self,
        grid: Grid,
        config: FedTuneConfig,
        run: RunDirectory,
        *,
        initial: AdapterTensors,
        target_modules: Sequence[str] = (),
        revision: str | None,
        resolved: Mapping[str, Any] | None = None,
        read_back: Callable[[Path, Mapping[str, Any]], None] | None = None,
    ) -> None:
        """Set up the loop.

        Args:
            grid: Where messages go.
            config: The run's config.
            run: Where the run is kept; a state in it is continued.
            initial: The adapter before round 1, names to float32 tensors.
            target_modules: Module names that the adapter is attached to, where `resolved` is not given.
            revision: Commit of the base model, None for a local one.
            resolved: PEFT's resolved config of the adapter, for its `adapter_config.json`.
            read_back: Loads the first adapter that is saved with PEFT, and compares it (`models.shapes.read_back`).
        """
        self.grid = grid
        self.config = config
        self.run = run
        self.target_modules = list(target_modules)
        self.resolved = resolved
        self.read_back = read_back
        self.revision = revision
        self.tensors = initial
        self.shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
        self.algorithm = build_algorithm(config, self.shapes)
        self.accountant = Accountant(config) if config.privacy.mode != "none" else None
        self.noise_key = new_key()
        """Secret of the central noise; travels nowhere, and lies in the state for a resumed run to go on with."""
        self.ledger = Ledger(run.ledger_file, config.communication.cap_mib)
        self.decisive = decisive_values(config)
        self.prefixes = Prefix(run.ledger_file), Prefix(run.metrics_file)
        self.clients: dict[str, str] = {}
        self.done = self._restore()

    def run_rounds(self) -> None:
        """Run the remaining rounds.

        Raises:
            FederationError: a round ended with fewer accepted replies than `federation.min_success`, or a client failed in the
                same way in two rounds and `federation.min_success` is not set.
            CapError: the next round's messages would pass the cap, or the round the privacy budget; the last adapter is saved.
        """
        if self.done >= self.config.federation.rounds:
            self._save_last()
            return
        roster = Roster(self.grid, self.config.federation, self._note_question)
        roster.wait_for_clients()
        for server_round in range(self.done + 1, self.config.federation.rounds + 1):
            self._round(server_round, roster.current())

    def _round(self, server_round: int, clients: Sequence[Client]) -> None:
        started = time.monotonic()
        rate = learning_rate(self.config.training, server_round, self.config.federation.rounds)
        self._check_privacy(server_round)
        chosen = sample_clients(clients, self.config, server_round)
        tell(RoundStarted(server_round, [client.partition for client in chosen], rate))

        replies: list[Accepted] = []
        rejected: list[Refused] = []
        for verdict in self._exchange(server_round, chosen, rate):
            if isinstance(verdict, Accepted):
                replies.append(verdict)
            else:
                rejected.append(verdict)
                log.warning("Round %d: %s.", server_round, self._in_words(verdict))
            self._note(server_round, verdict, rate)
        self._check_failures(server_round, chosen, replies, rejected)
        loss = self._aggregate(server_round, replies, len(chosen))
        self._commit(server_round, chosen)
        tell(
            RoundDone(
                round=server_round,
                loss=loss,
                learning_rate=rate,
                accepted=len(replies),
                asked=len(chosen),
                used_bytes=self.ledger.used_bytes,
                epsilon=self._epsilon_after(server_round),
                tokens=sum(reply.report.tokens for reply in replies),
                seconds=time.monotonic() - started,
            )
        )

    def _check_failures(
        self, server_round: int, chosen: Sequence[Client], replies: Sequence[Accepted], rejected: Sequence[Refused]
    ) -> None:
        """End the run where a round's failures do not allow it to go on."""
        answered = {reply.client.partition for reply in replies}
        failed = {
            verdict.client.partition: verdict
            for verdict in rejected
            if verdict.client is not None and verdict.client.partition not in answered
        }
        alike = len({kind_of(verdict.reason) for verdict in failed.values()}) == 1 and not any(
            verdict.absent for verdict in failed.values()
        )
        needed, because = self.config.federation.required_replies, ""
        hint = f"fedtune train --resume {self.run.path}"
        if len(failed) == len(chosen) > 1 and alike:
            because = f"All {len(chosen)} clients of round {server_round} failed in the same way: "
            because += self._reason(failed[min(failed)])
        elif len(replies) < needed:
            last = self._in_words(rejected[-1]) if rejected else "no client replied"
            because = f"Round {server_round} has {len(replies)} usable replies of {len(chosen)}, and "
            because += f"federation.min_success is {needed}; {last}"
        elif self.config.federation.min_success is None:
            for partition in sorted(failed):
                verdict = failed[partition]
                if earlier := None if verdict.absent else self.failures.before(server_round, partition, verdict.reason):
                    because = f"Client {partition} failed in the same way in rounds {earlier} and {server_round}: "
                    because += self._reason(verdict)
                    hint += ", with --set federation.min_success=1 to train on without such clients"
                    break
        if because:
            raise FederationError(f"{because}. The state after round {self.done} is saved.", hint=hint)
        for partition, verdict in failed.items():
            if not verdict.absent:
                self.failures.add(server_round, partition, verdict.reason)

    def _in_words(self, verdict: Refused) -> str:
        """Return what happened to a reply, without a full stop."""
        if verdict.client is None:
            return f"the reply of an unknown node was rejected: {self._reason(verdict)}"
        if verdict.status == "refused":
            return f"the reply of client {verdict.client.partition} was rejected: {self._reason(verdict)}"
        return f"client {verdict.client.partition} failed: {self._reason(verdict)}"

    def _reason(self, verdict: Refused) -> str:
        """Return why a reply was not accepted; where a traceback was logged, with the place."""
        reason = verdict.reason.removesuffix(".")
        if (
            verdict.status == "error" and reason.isidentifier()
        ):  # an exception's class, which is all that a client tells
            if self.config.federation.engine == "superlink":
                return f"{reason}; the traceback is in its node's own log"
            if self.run.log_file.is_file():
                return f"{reason}; the traceback is in {self.run.log_file}"
        return reason

    def _exchange(self, server_round: int, chosen: Sequence[Client], rate: float) -> Iterator[Accepted | Refused]:
        """Send each of the chosen clients what the algorithm says, and yield a verdict on each reply as it arrives."""
        timeout_s = self.config.federation.client_timeout_s
        outgoing = self.algorithm.outgoing(server_round, self.tensors, chosen)
        messages = self._messages(server_round, outgoing, rate)
        read: dict[int, AdapterTensors] = {}
        expected = [self._expected(server_round, *pair, read) for pair in zip(outgoing, messages, strict=True)]
        replies_bytes = sum(wire_bytes(each.shapes, self.config.up_format) for each in expected)
        try:
            self.ledger.reserve(sum(map(counted_bytes, messages)) + replies_bytes)
        except CapError as error:
            self._save_last()
            raise CapError(
                f"{error.message} The run stopped after round {self.done} of {self.config.federation.rounds}; its state and "
                f"adapter are saved.",
                hint=f"Raise the cap and go on: fedtune train --resume {self.run.path} --set communication.cap_mib=…",
            ) from None
        for message, each in zip(messages, expected, strict=True):
            self._enter(server_round, each.client.partition, "down", message, "ok")
        validator = ReplyValidator(
            server_round,
            expected,
            self.config.up_format,
            self.config.federation.max_examples,
            with_loss=self.config.privacy.mode != "local",
        )
        answered = set()
        for reply in self.grid.send_and_receive(messages, timeout=timeout_s):
            verdict = validator.validate(reply)
            partition = verdict.client.partition if verdict.client else -1
            self._enter(server_round, partition, "up", reply, verdict.status)
            answered.add(partition)
            yield verdict
        for client in chosen:
            if client.partition not in answered:
                yield Refused(client, f"no reply within {timeout_s:g} s", "error", absent=True)

    def _expected(
        self, server_round: int, sent: Outgoing, message: Message, read: dict[int, AdapterTensors]
    ) -> Expected:
        """Return what a client is to reply; `read` keeps what clients read of their messages, once for those that share it."""
        reference: AdapterTensors = {}
        if self.config.up_format in CODECS:
            # Differences are from what the client has read, which a codec on the way to it has rounded.
            place = id(sent.tensors)
            if place not in read:
                shapes = {name: tuple(tensor.shape) for name, tensor in sent.tensors.items()}
                arrays = message.content.array_records[ARRAYS]
                read[place] = decode(arrays, shapes, self.config.down_format)
            reference = self.algorithm.reference(server_round, read[place])
        return Expected(
            sent.client,
            self.config.strategy.up_shapes(self.config, self.shapes, server_round, sent.client.partition),
            reference,
        )

    def _check_privacy(self, server_round: int) -> None:
        """Stop before a round that would pass the privacy budget."""
        privacy, epsilon = self.config.privacy, self._epsilon_after(server_round)
        if epsilon is None or epsilon <= privacy.epsilon:
            return
        if self.accountant is not None and not self.done:
            raise CapError(
                f"The privacy budget, privacy.epsilon = {privacy.epsilon:g} at delta {privacy.delta:g}, does not last for a "
                f"single round: that takes {epsilon:.2f}.",
                hint=f"For all rounds: --set privacy.noise_multiplier={self.accountant.noise_needed():g}",
            )
        self._save_last()
        raise CapError(
            f"Round {server_round} would bring epsilon to {epsilon:.2f}, above privacy.epsilon = {privacy.epsilon:g} (delta "
            f"{privacy.delta:g}). The run stopped after round {self.done} of {self.config.federation.rounds}; its state and "
            f"adapter are saved.",
            hint=f"A larger budget: fedtune train --resume {self.run.path} --set privacy.epsilon=…",
        )

    def _epsilon_after(self, server_round: int) -> float | None:
        """Return what the client that was asked most often has spent after a round; None without privacy."""
        if self.accountant is None:
            return None
        return self.accountant.epsilon_after(self.accountant.participations(server_round))

    def _save_last(self) -> None:
        """Write the adapter of the last committed round, if that was none that is kept."""
        if self.done and not self.run.adapter_folder(self.done).is_dir():
            self._save_adapter(self.done)

    def _messages(self, server_round: int, outgoing: Sequence[Outgoing], rate: float) -> list[Message]:
        """Return a message for each client, encoded; clients that are sent the same share one content."""
        form = self.config.down_format
        arrays: dict[int, ArrayRecord] = {}
        contents: dict[tuple[object, ...], RecordDict] = {}
        messages = []
        for sent in outgoing:
            place = id(sent.tensors)
            if place not in arrays:
                arrays[place] = encode(sent.tensors, form)
            key = (place, *sent.values.items())
            if key not in contents:
                order = TrainOrder(server_round, rate, sent.values).to_record()
                contents[key] = RecordDict({ARRAYS: arrays[place], CONFIG: order})
            messages.append(Message(contents[key], sent.client.node, MessageType.TRAIN))
        return messages

    def _aggregate(self, server_round: int, replies: Sequence[Accepted], asked: int) -> float | None:
        """Let the algorithm aggregate the accepted replies, in partition order; return the mean loss, if clients told theirs."""
        ordered = sorted(replies, key=lambda reply: reply.client.partition)
        central = self.config.privacy.mode == "central"
        averaged = self._privatised(server_round, ordered, asked) if central else ordered
        self.tensors = self.algorithm.aggregate(server_round, self.tensors, averaged)
        losses = [reply.report.loss for reply in ordered if reply.report.loss is not None]
        if len(losses) < len(ordered):
            return None
        return sum(loss * weight for loss, weight in zip(losses, weights_of(ordered), strict=True))

    def _privatised(self, server_round: int, replies: Sequence[Accepted], asked: int) -> list[Accepted]:
        """Return the replies with the noisy average in the place of each: an algorithm sees nothing else of them."""
        average = noisy_average(
            {name: self.tensors[name] for name in replies[0].tensors},
            {reply.client.partition: reply.tensors for reply in replies},
            self.config.privacy,
            asked=asked,
            key=self.noise_key,
            server_round=server_round,
        )
        return [replace(reply, tensors=average, report=replace(reply.report, examples=1)) for reply in replies]

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

    def _note_question(self, partition: int, question: Message, reply: Message) -> None:
        self._enter(self.done, partition, "down", question, "ok")
        self._enter(self.done, partition, "up", reply, "ok")

    def _note(self, server_round: int, verdict: Accepted | Refused, rate: float) -> None:
        """Write a client's line in metrics.jsonl, and tell of it."""
        report = verdict.report if isinstance(verdict, Accepted) else None
        metrics = report.as_values() if report else {}
        partition = verdict.client.partition if verdict.client else -1
        line = {
            "round": server_round,
            "partition": partition,
            "status": verdict.status,
            **({"reason": verdict.reason} if verdict.reason else {}),
            **({"absent": True} if isinstance(verdict, Refused) and verdict.absent else {}),
            "learning_rate": rate,
            **{key.replace("-", "_"): value for key, value in metrics.items() if key != "server-round"},
        }
        append_line(self.run.metrics_file, line)
        tell(
            ReplyArrived(
                round=server_round,
                partition=partition,
                status=verdict.status,
                reason=verdict.reason,
                loss=report.loss if report else None,
                tokens=report.tokens if report else 0,
                seconds=report.seconds if report else 0.0,
            )
        )

    def _commit(self, server_round: int, chosen: Sequence[Client]) -> None:
        """Make the round permanent: checkpoint, files of the run, then the state that resume starts from."""
        write_text(self.run.comm_cost_file, "".join(line + "\n" for line in comm_cost_lines(self.ledger.entries)))
        if self.config.is_checkpoint(server_round):
            self._save_adapter(server_round)
        sync_folder(self.run.path)
        ledger, metrics = self.prefixes
        ledger.grow()
        metrics.grow()
        self.clients = _newest(self.clients | client_states(self.run, (c.partition for c in chosen), server_round))
        progress = Progress(
            round=server_round,
            ledger_entries=len(self.ledger.entries),
            metrics_bytes=metrics.bytes,
            ledger_marks=ledger.marks,
            metrics_marks=metrics.marks,
            decisive=self.decisive,
            inputs_sha256=inputs_sha256(self.run),
            clients=self.clients,
        )

        def fill(folder: Path) -> None:
            save_file(self.tensors, folder / "adapter.safetensors")
            if self.config.privacy.mode == "central":
                (folder / _NOISE_KEY).touch(mode=0o600)
                (folder / _NOISE_KEY).write_bytes(self.noise_key)
            if state := self.algorithm.state():
                save_file(state, folder / "algorithm.safetensors")
            (folder / "progress.json").write_text(json.dumps(vars(progress)), encoding="utf-8")

        self.run.commit_state(server_round, fill)
        self.done = server_round

    def _save_adapter(self, server_round: int) -> None:
        folder = self.run.adapter_folder(server_round)
        tensors, settings = self.algorithm.published(self.tensors)
        write_adapter(
            folder,
            tensors,
            settings,
            base_name=self.config.model.base,
            revision=self.revision,
            target_modules=self.target_modules,
            resolved=self.resolved,
            read_back=self.read_back,
        )
        self.read_back = None  # every later adapter has the same names and the same config
        tell(AdapterSaved(server_round, folder))

    def _restore(self) -> int:
        """Load the last committed state, if there is one; return its round."""
        state = self.run.last_state()
        progress = Progress()
        if state is not None:
            progress = Progress(**json.loads((state / "progress.json").read_text(encoding="utf-8")))
            check_inputs(progress, self.run)
            check_config(progress, self.decisive)
            ledger, metrics = self.prefixes
            ledger.check(progress.ledger_marks, progress.round)
            metrics.check(progress.metrics_marks, progress.round)
            check_clients(progress, self.run)
            self.clients = dict(progress.clients)
            # Read, not mapped: the folder goes when newer states are there.
            loaded = load((state / "adapter.safetensors").read_bytes())
            self.tensors = {name: loaded[name] for name in self.shapes}  # files are in alphabetical order
            if (secret := state / _NOISE_KEY).is_file():
                self.noise_key = secret.read_bytes()
            if (kept := state / "algorithm.safetensors").is_file():
                self.algorithm.restore(load(kept.read_bytes()))
        cut_to(self.run.metrics_file, progress.metrics_bytes)
        self.failures = FailureHistory(read_json_lines(self.run.metrics_file))
        if len(self.ledger.entries) > progress.ledger_entries:
            self.ledger.mark_lost(progress.ledger_entries)
        return progress.round


def _newest(states: Mapping[str, str]) -> dict[str, str]:
    """Return one state for each client's folder, the newest."""
    by_folder = {Path(name).parent: name for name in sorted(states)}
    return {name: states[name] for name in by_folder.values()}


def sample_clients(clients: Sequence[Client], config: FedTuneConfig, server_round: int) -> list[Client]:
    """Return the clients of a round, in partition order; clients stand in the order of their partitions."""
    return [clients[index] for index in sample(config, server_round)]


def counted_bytes(message: Message) -> int:
    """Return the leaderboard's count of a message: its ArrayRecords' `count_bytes()` (protocol, section 3)."""
    if not message.has_content():
        return 0
    return sum(record.count_bytes() for record in message.content.array_records.values())
