"""The loop: hand-computed averages, hostile replies, the cap, and resuming."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from arithmetic import SHAPES, Tamper, client_app
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedtune.budget.ledger import read_ledger
from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import CapError, FederationError
from fedtune.federation.engines.in_process import InProcessGrid
from fedtune.federation.events import Event, ReplyArrived, listening
from fedtune.federation.reply_validator import Client
from fedtune.federation.rounds import Rounds, sample_clients
from fedtune.federation.strategies.flower import NodesOfRound
from fedtune.protocol.messages import ARRAYS, METRICS
from fedtune.protocol.wire_format import adapter_bytes
from fedtune.runs.atomic import read_json_lines
from fedtune.runs.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("flower_identity")


def config_of(*settings: str) -> FedTuneConfig:
    defaults = ["federation.clients=3", "federation.fraction=1.0", "federation.rounds=2", "checkpoint.save_every=2"]
    return load_config(settings=[*defaults, *settings]).config


def rounds_of(run: Path, config: FedTuneConfig, tamper: Tamper | None = None, grid: Grid | None = None) -> Rounds:
    run.mkdir(exist_ok=True)
    return Rounds(
        grid or InProcessGrid(client_app(tamper, config.down_format), config.federation.clients, {}),
        config,
        RunDirectory(run),
        initial={name: torch.zeros(shape) for name, shape in SHAPES.items()},
        target_modules=["q_proj"],
        revision=None,
    )


def value(rounds: Rounds) -> float:
    """All values of the adapter are the same number; return it."""
    (number,) = {float(x) for tensor in rounds.tensors.values() for x in tensor.flatten()}
    return number


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """Clients with 1, 2, 3 examples add 1, 2, 3: each round adds (1·1 + 2·2 + 3·3) / 6 = 14/6."""
    config = config_of()
    rounds = rounds_of(tmp_path / "run", config)
    rounds.run_rounds()
    assert value(rounds) == pytest.approx(2 * 14 / 6)
    lines = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(line["round"], line["partition"]) for line in lines] == [(r, p) for r in (1, 2) for p in (0, 1, 2)]
    assert lines[4]["train_loss"] == 12.0
    ledger = read_ledger(tmp_path / "run" / "ledger.jsonl")
    training = [entry for entry in ledger if entry.kind == "train"]
    assert len(training) == 2 * 3 * 2
    assert {entry.bytes for entry in training} == {adapter_bytes(SHAPES)}
    assert all(entry.serialised_bytes > entry.bytes for entry in training)
    assert [path.name for path in sorted((tmp_path / "run").glob("peft_*"))] == ["peft_2"]
    cost = (tmp_path / "run" / "comm_cost.txt").read_text().splitlines()
    assert len(cost) == 4
    total = sum(entry.bytes for entry in training) / 2**20
    assert cost[-1].startswith(f"Communication budget: used {total:.2f} MB")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_wire_halves_the_bytes_and_averages_in_float32(tmp_path: Path, dtype: str) -> None:
    rounds = rounds_of(tmp_path / "run", config_of(f"communication.wire_dtype={dtype}"))
    rounds.run_rounds()
    # Round 1 adds 14/6 exactly in float32; only what travels in round 2 is rounded.
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    sent = float(torch.tensor(14 / 6).to(narrow).to(torch.float32))
    replies = [float(torch.tensor(sent + number).to(narrow)) for number in (1, 2, 3)]
    assert value(rounds) == pytest.approx(sum(w * x for w, x in zip((1, 2, 3), replies, strict=True)) / 6)
    entry = read_ledger(tmp_path / "run" / "ledger.jsonl")[-1]
    assert entry.bytes == adapter_bytes(SHAPES) - 2 * 12  # two bytes less for each of 12 values


def test_joined_arrays_give_the_same_bits(tmp_path: Path) -> None:
    """As over a SuperLink: one array a message, the same adapter."""
    plain, joined = (
        rounds_of(tmp_path / engine, config_of(f"federation.engine={engine}")) for engine in ("ray", "superlink")
    )
    plain.run_rounds()
    joined.run_rounds()
    assert all(torch.equal(joined.tensors[name], plain.tensors[name]) for name in SHAPES)
    entry = read_ledger(tmp_path / "superlink" / "ledger.jsonl")[-1]
    assert entry.bytes == len("packed") + 128 + 4 * 12


def test_sampling_depends_on_seed_and_round_alone() -> None:
    clients = [Client(node=1000 - number, partition=number, rows=1) for number in range(20)]
    config = config_of("federation.clients=20", "federation.fraction=0.1")
    draws = [[client.partition for client in sample_clients(clients, config, number)] for number in range(1, 101)]
    renamed = [Client(node=number * 7, partition=number, rows=5) for number in range(20)]
    assert draws == [[client.partition for client in sample_clients(renamed, config, n)] for n in range(1, 101)]
    assert all(len(set(draw)) == 2 and draw == sorted(draw) for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 60
    assert set(sum(draws, [])) == set(range(20))  # noqa: RUF017
    other = load_config(settings=["federation.clients=20", "federation.fraction=0.1", "seed=43"]).config
    assert draws != [[client.partition for client in sample_clients(clients, other, n)] for n in range(1, 101)]


def metrics(content: RecordDict, **changes: float) -> RecordDict:
    changed = {**content[METRICS], **{key.replace("_", "-"): value for key, value in changes.items()}}
    return RecordDict({ARRAYS: content[ARRAYS], METRICS: MetricRecord(changed)})  # type: ignore[arg-type]


def arrays(content: RecordDict, **changes: Array) -> RecordDict:
    record = {**content.array_records[ARRAYS], **{"model.lora_A.weight": Array(np.ones((2, 3), "float32"))}, **changes}
    return RecordDict({ARRAYS: ArrayRecord(record), METRICS: content[METRICS]})


def a_weight(array: np.ndarray) -> Tamper:
    return lambda p, r, content: arrays(content, **{"model.lora_A.weight": Array(array)}) if p == 1 else content


HOSTILE: dict[str, tuple[Tamper, str]] = {
    "raises": (lambda p, r, c: None if p == 1 else c, "RuntimeError"),
    "nan": (a_weight(np.full((2, 3), np.nan, "float32")), "not finite"),
    "inf": (a_weight(np.full((2, 3), np.inf, "float32")), "not finite"),
    "broadcasting shape": (a_weight(np.ones((1, 3), "float32")), "has shape"),
    "float64": (a_weight(np.ones((2, 3))), "float64"),
    "huge": (a_weight(np.ones((2000, 3000), "float32")), "bytes; at most"),
    "extra key": (lambda p, r, c: arrays(c, x=Array(np.ones(1, "float32"))) if p == 1 else c, "unknown 1"),
    "empty": (lambda p, r, c: RecordDict({ARRAYS: ArrayRecord(), METRICS: c[METRICS]}) if p == 1 else c, "misses 2"),
    "no metrics": (lambda p, r, c: RecordDict({ARRAYS: c[ARRAYS]}) if p == 1 else c, "lacks"),
    "no arrays": (lambda p, r, c: RecordDict({METRICS: c[METRICS]}) if p == 1 else c, "lacks"),
    "too many examples": (lambda p, r, c: metrics(c, num_examples=1e12) if p == 1 else c, "num-examples"),
    "negative examples": (lambda p, r, c: metrics(c, num_examples=-25) if p == 1 else c, "num-examples"),
    "zero examples": (lambda p, r, c: metrics(c, num_examples=0) if p == 1 else c, "num-examples"),
    "nan examples": (lambda p, r, c: metrics(c, num_examples=float("nan")) if p == 1 else c, "num-examples"),
    "more than announced": (lambda p, r, c: metrics(c, num_examples=3) if p == 1 else c, "at most 2"),
    "another round": (lambda p, r, c: metrics(c, server_round=r - 1) if p == 1 else c, "is of round"),
    "nan loss": (lambda p, r, c: metrics(c, train_loss=float("nan")) if p == 1 else c, "train-loss"),
    "record under another key": (
        lambda p, r, c: RecordDict({"x": c[ARRAYS], METRICS: c[METRICS]}) if p == 1 else c,
        "lacks",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_reply_costs_its_client_and_not_the_run(tmp_path: Path, kind: str) -> None:
    """Without client 1 the average of a round is (1·1 + 3·3) / 4 = 2.5."""
    tamper, words = HOSTILE[kind]
    events: list[Event] = []
    rounds = rounds_of(tmp_path / "run", config_of("federation.rounds=1"), tamper)
    with listening(events.append):
        rounds.run_rounds()
    (refused,) = [event for event in events if isinstance(event, ReplyArrived) and event.status != "ok"]
    assert refused.partition == 1
    assert words in refused.reason
    assert "hunter2" not in refused.reason  # an exception's text stays on the client
    assert "/home" not in refused.reason
    assert value(rounds) == pytest.approx(2.5)
    (line,) = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if line["status"] != "ok"]
    assert (line["partition"], words in line["reason"]) == (1, True)
    statuses = [e.status for e in read_ledger(tmp_path / "run" / "ledger.jsonl") if e.node == 1 and e.direction == "up"]
    assert statuses[-1] == ("error" if kind == "raises" else "refused")


class DoublingGrid(InProcessGrid):
    """Delivers every reply twice."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for reply in super().send_and_receive(messages, timeout=timeout):
            yield reply
            yield reply


def test_doubled_replies_count_once(tmp_path: Path) -> None:
    config = config_of("federation.rounds=1")
    rounds = rounds_of(tmp_path / "run", config, grid=DoublingGrid(client_app(), 3, {}))
    rounds.run_rounds()
    assert value(rounds) == pytest.approx(14 / 6)
    assert sum(e.status == "refused" for e in read_ledger(tmp_path / "run" / "ledger.jsonl")) == 3


class StrangeGrid(InProcessGrid):
    """Delivers client 2's reply to training as one of a node that was not asked."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for reply in super().send_and_receive(messages, timeout=timeout):
            if reply.metadata.src_node_id == 4 and reply.metadata.message_type == "train":
                reply.metadata.__dict__["_src_node_id"] = 99
            yield reply


def test_a_reply_of_a_node_that_was_not_asked_is_rejected(tmp_path: Path) -> None:
    """Without client 2 the average of a round is (1·1 + 2·2) / 3; the stranger has no partition, and is no client's failure."""
    rounds = rounds_of(tmp_path / "run", config_of(), grid=StrangeGrid(client_app(), 3, {}))
    rounds.run_rounds()
    assert value(rounds) == pytest.approx(2 * 5 / 3)
    lines = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if line["status"] != "ok"]
    assert [(line["partition"], line["reason"]) for line in lines] == [
        (-1, "this node was not asked in this round"),
        (2, "no reply within 3600 s"),
    ] * 2


class BackwardsGrid(InProcessGrid):
    """Delivers the replies in the opposite order."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        yield from reversed(list(super().send_and_receive(messages, timeout=timeout)))


def test_arrival_order_does_not_move_a_bit(tmp_path: Path) -> None:
    def jitter(partition: int, server_round: int, content: RecordDict) -> RecordDict:
        values = np.random.default_rng([partition, server_round]).normal(size=(2, 3)).astype("float32")
        return arrays(content, **{"model.lora_A.weight": Array(values)})

    one = rounds_of(tmp_path / "one", config_of(), grid=InProcessGrid(client_app(jitter), 3, {}))
    two = rounds_of(tmp_path / "two", config_of(), grid=BackwardsGrid(client_app(jitter), 3, {}))
    one.run_rounds()
    two.run_rounds()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in SHAPES)


class SilentGrid(InProcessGrid):
    """Client 1 never answers a training message."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for reply in super().send_and_receive(messages, timeout=timeout):
            if reply.metadata.message_type != "train" or reply.metadata.src_node_id != 3:
                yield reply


def test_a_silent_client_is_counted_as_failed(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path / "run", config_of("federation.rounds=1"), grid=SilentGrid(client_app(), 3, {}))
    rounds.run_rounds()
    assert value(rounds) == pytest.approx(2.5)
    assert "no reply within" in read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1]["reason"]


def test_a_round_with_too_few_replies_fails_the_run_and_keeps_its_state(tmp_path: Path) -> None:
    """All clients of round 2 fail: exit 4; mended, the run goes on from round 1's state."""
    config = config_of()
    rounds = rounds_of(tmp_path / "run", config, lambda p, r, c: None if r == 2 else c)
    with pytest.raises(
        FederationError, match="All 3 clients of round 2 failed in the same way: RuntimeError"
    ) as caught:
        rounds.run_rounds()
    assert caught.value.exit_code == 4
    assert "--resume" in caught.value.hint
    again = rounds_of(tmp_path / "run", config)
    assert again.done == 1
    again.run_rounds()
    assert value(again) == pytest.approx(2 * 14 / 6)
    lost = [entry for entry in read_ledger(tmp_path / "run" / "ledger.jsonl") if entry.status == "lost"]
    assert len(lost) == 6  # three messages down, three error replies
    assert len(read_json_lines(tmp_path / "run" / "metrics.jsonl")) == 6  # the failed round's lines are gone


def test_min_success(tmp_path: Path) -> None:
    config = config_of("federation.min_success=3", "federation.rounds=1")
    with pytest.raises(FederationError, match="2 usable replies of 3"):
        rounds_of(tmp_path / "run", config, HOSTILE["nan"][0]).run_rounds()


def test_the_run_stops_before_the_cap_and_goes_on_when_it_is_raised(tmp_path: Path) -> None:
    a_round = 6 * adapter_bytes(SHAPES) / 2**20
    config = config_of(f"communication.cap_mib={1.5 * a_round}")
    rounds = rounds_of(tmp_path / "run", config)
    with pytest.raises(CapError, match="after round 1 of 2") as caught:
        rounds.run_rounds()
    assert caught.value.exit_code == 5
    assert sum(e.bytes for e in read_ledger(tmp_path / "run" / "ledger.jsonl")) == 6 * adapter_bytes(SHAPES)
    assert (tmp_path / "run" / "peft_1" / "adapter_model.safetensors").is_file()
    more = rounds_of(tmp_path / "run", config_of(f"communication.cap_mib={2 * a_round}"))
    more.run_rounds()
    assert value(more) == pytest.approx(2 * 14 / 6)


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path: Path) -> None:
    """A flipped bit is found by its sha256: the round before is taken, and the same bytes come out."""
    config = config_of("federation.rounds=3")
    whole = rounds_of(tmp_path / "whole", config)
    whole.run_rounds()
    rounds_of(tmp_path / "run", config_of("federation.rounds=3")).run_rounds()
    last = tmp_path / "run" / "state" / "round-0003" / "adapter.safetensors"
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    again = rounds_of(tmp_path / "run", config)
    assert again.done == 2
    again.run_rounds()
    assert all(torch.equal(again.tensors[name], whole.tensors[name]) for name in SHAPES)


def test_a_strategy_cannot_send_past_the_ledger() -> None:
    nodes = NodesOfRound([2, 4])
    assert list(nodes.get_node_ids()) == [2, 4]
    for call in (nodes.push_messages, nodes.send_and_receive, nodes.pull_messages):
        with pytest.raises(NotImplementedError):
            call([])


def test_state_is_json_and_safetensors_only(tmp_path: Path) -> None:
    rounds_of(tmp_path / "run", config_of()).run_rounds()
    state = tmp_path / "run" / "state" / "round-0002"
    assert {path.name for path in state.iterdir()} == {"adapter.safetensors", "progress.json", "manifest.json"}
    assert json.loads((state / "progress.json").read_text())["round"] == 2
