"""Which node is which client: nodes that come late, go, come back as another, fail, or are not who they should be."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from arithmetic import client_app
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from test_rounds import config_of, rounds_of, value

from fedtune.budget.ledger import read_ledger
from fedtune.errors import FederationError
from fedtune.federation import clients as module
from fedtune.federation.engines.in_process import InProcessGrid
from fedtune.federation.events import ClientsAwaited, ClientsMet, Event, RoundDone, listening
from fedtune.protocol.messages import METRICS
from fedtune.runs.atomic import read_json_lines

pytestmark = pytest.mark.usefixtures("flower_identity")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.001)


class Visitors(InProcessGrid):
    """A grid whose nodes are, each time it is asked, the next of a list; the last stays. `clients` says who is who."""

    def __init__(self, *visits: Iterable[int], clients: dict[int, int]) -> None:
        super().__init__(client_app(), 0, {})
        self.visits = [list(visit) for visit in visits]
        self.here: list[int] = []
        self.asked: list[int] = []
        self.unavailable: list[int] = []
        """Nodes whose next answer is Flower's: that they are gone."""
        for node, partition in clients.items():
            config: dict[str, str | int | float | bool] = {"partition-id": partition}
            self._contexts[node] = Context(
                run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={}
            )

    def get_node_ids(self) -> list[int]:
        self.here = self.visits.pop(0) if len(self.visits) > 1 else self.visits[0]
        return self.here

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            if message.metadata.message_type == "query":
                self.asked.append(node)
            if node in self.unavailable or node not in self.here:
                if node in self.unavailable:
                    self.unavailable.remove(node)
                reply = Message(Error(5, "Node Unavailable"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = node
                yield reply
            else:
                yield from super().send_and_receive([message], timeout=timeout)


def go(folder: Path, grid: Visitors, *settings: str) -> tuple[float, list[Event]]:
    """Run the loop of tests/federation/test_rounds.py on the nodes of a grid."""
    rounds, events = rounds_of(folder, config_of(*settings), grid=grid), list[Event]()
    with listening(events.append):
        rounds.run_rounds()
    return value(rounds), events


def test_nodes_are_asked_as_they_come_and_the_waiting_is_told(tmp_path: Path) -> None:
    grid = Visitors([], [7], [7], [7, 5, 6], clients={5: 0, 6: 2, 7: 1})
    number, events = go(tmp_path / "run", grid)
    assert number == pytest.approx(2 * 14 / 6)
    assert grid.asked == [7, 5, 6]
    assert [event for event in events if isinstance(event, ClientsAwaited)] == [
        ClientsAwaited([0, 1, 2], 3),
        ClientsAwaited([0, 2], 3),
    ]
    assert ClientsMet([5, 7, 6], [1, 2, 3]) in events
    queries = [entry for entry in read_ledger(tmp_path / "run" / "ledger.jsonl") if entry.kind == "query"]
    assert sorted((entry.node, entry.direction) for entry in queries) == [
        (p, d) for p in (0, 1, 2) for d in ("down", "up")
    ]


def test_a_node_that_is_gone_when_it_is_asked_is_asked_again(tmp_path: Path) -> None:
    grid = Visitors([5, 6, 7], clients={5: 0, 6: 1, 7: 2})
    grid.unavailable = [6, 6]
    number, _ = go(tmp_path / "run", grid)
    assert number == pytest.approx(2 * 14 / 6)
    assert grid.asked == [5, 6, 7, 6, 6]


def test_a_client_that_comes_back_as_another_node_takes_part_again(tmp_path: Path) -> None:
    """Gone in round 2; in round 3 it is node 9. The stranger 8, whose partition has a node, is never sent an adapter."""
    everybody = [5, 6, 7]
    grid = Visitors(everybody, everybody, [5, 7], [5, 7, 9, 8], clients={5: 0, 6: 1, 7: 2, 9: 1, 8: 0})
    number, events = go(tmp_path / "run", grid, "federation.rounds=4")
    replies = {
        (line["round"], line["partition"]): line["status"]
        for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")
    }
    assert replies[2, 1] == "error"
    assert [status for place, status in replies.items() if place != (2, 1)] == ["ok"] * 11
    assert [event.accepted for event in events if isinstance(event, RoundDone)] == [3, 2, 3, 3]
    assert number == pytest.approx(3 * 14 / 6 + (1 * 1 + 3 * 3) / 4)
    assert grid.asked == [5, 6, 7, 8, 9]


def test_the_loop_waits_for_no_client_for_ever(tmp_path: Path) -> None:
    grid = Visitors([5, 6, 7], clients={5: 0, 6: 1, 7: 2})
    said = r"after 0\.1 s: 3 of 5 clients are there, missing 3, 4\."
    with pytest.raises(FederationError, match=said) as caught:
        go(tmp_path / "run", grid, "federation.clients=5", "federation.client_timeout_s=0.1")
    assert "--resume" in caught.value.hint


def test_who_says_it_is_somebody_else_is_named_while_waiting(tmp_path: Path) -> None:
    """Two hospitals typed the same number: the coordinator sees which, and the run goes on when the third is there."""
    grid = Visitors([5, 6, 7], [5, 6, 7], [5, 6, 8], clients={5: 0, 6: 2, 7: 2, 8: 1})
    _, events = go(tmp_path / "run", grid)
    assert ClientsAwaited([1], 3, "two nodes say they are client 2") in events
    assert str(ClientsAwaited([1], 3, "two nodes say they are client 2")) == (
        "2 of 3 clients are there, missing 1 (two nodes say they are client 2)"
    )


@pytest.mark.parametrize("wrong", [6, 7])
def test_a_node_that_is_started_again_with_its_right_number_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """With its key it is the same node to Flower, and nothing says that it was started anew; be it the first or the second."""
    monkeypatch.setattr(module, "_AGAIN_S", 0.05)
    grid = Visitors([5, 6, 7], clients={5: 0, 6: 2, 7: 2})
    rounds = rounds_of(tmp_path / "run", config_of(), grid=grid)
    met: list[ClientsMet] = []

    def mend(event: Event) -> None:
        if isinstance(event, ClientsAwaited):
            assert event.remark == "two nodes say they are client 2"
            grid._contexts[wrong].node_config["partition-id"] = 1
        if isinstance(event, ClientsMet):
            met.append(event)

    with listening(mend):
        rounds.run_rounds()
    assert value(rounds) == pytest.approx(2 * 14 / 6)
    assert grid.asked == [5, 6, 7, 6, 7]
    assert met == [ClientsMet([5, wrong, 13 - wrong], [1, 2, 3])]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (RecordDict({METRICS: MetricRecord({"partition-id": 7, "rows": 3})}), "says it is client 7, and .* 0 to 2"),
        (RecordDict({METRICS: MetricRecord({"partition-id": 1, "rows": 0})}), "client 1 and has no rows"),
        (RecordDict({METRICS: MetricRecord({"partition-id": 1, "rows": [3]})}), "client 1 and has no rows"),
        (RecordDict({METRICS: MetricRecord({"partition-id": 1.5, "rows": 3})}), "says it is client 1.5"),
        (RecordDict({METRICS: MetricRecord({"rows": 3})}), "does not say which client it is"),
        (RecordDict(), "does not say which client it is"),
        (None, "node 6: RuntimeError"),
    ],
)
def test_who_cannot_be_a_client_ends_the_run_once_all_are_there(
    tmp_path: Path, content: RecordDict | None, said: str
) -> None:
    grid = Visitors([6], [5, 6, 7], clients={5: 0, 6: 1, 7: 2})
    honest = grid._app

    def app(message: Message, context: Context) -> Message:
        if context.node_id != 6:
            return honest(message, context)
        if content is None:
            raise RuntimeError("a row of somebody's data")
        return Message(content, reply_to=message)

    grid._app = app  # type: ignore[assignment]
    with pytest.raises(FederationError, match=f"2 of 3 clients are there, missing 1 .*{said}"):
        go(tmp_path / "run", grid)
    grid.visits = [[5, 6, 7, 8]]  # another takes its place: who is of no use does no harm
    grid._contexts[8] = Context(run_id=1, node_id=8, node_config={"partition-id": 1}, state=RecordDict(), run_config={})
    assert go(tmp_path / "again", grid)[0] == pytest.approx(2 * 14 / 6)
