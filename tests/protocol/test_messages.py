"""The records of messages: what is written is read again, and nothing else is."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, MetricRecord
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.load import load_config
from fedtune.config.strategies import STRATEGIES
from fedtune.protocol.messages import ClientDescription, TrainOrder, TrainReply, WireError

FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 2**40)
REPLIES = st.builds(
    TrainReply,
    server_round=st.integers(1, 10_000),
    examples=st.integers(1, 10_000),
    loss=FINITE,
    losses=st.lists(FINITE, min_size=1, max_size=5).map(tuple),
    rows=COUNT,
    tokens=COUNT,
    response_tokens=COUNT,
    seconds=st.floats(0, 1e9),
)


@given(reply=REPLIES)
def test_a_report_is_read_as_it_was_written(reply: TrainReply) -> None:
    assert TrainReply.from_record(reply.to_record(), reply.server_round, 10_000, with_loss=True) == reply


def test_a_private_report_holds_what_anyone_knows() -> None:
    reply = TrainReply(7, examples=1)
    assert reply.as_values() == {"server-round": 7, "num-examples": 1}
    assert TrainReply.from_record(reply.to_record(), 7, 1, with_loss=False) == reply
    with pytest.raises(WireError, match="train-loss is None"):
        TrainReply.from_record(reply.to_record(), 7, 1, with_loss=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("tokens", value) for value in ([1, 2], float("nan"), -1)),
        *(("rows", value) for value in ([], float("inf"), -3)),
        *(("losses", value) for value in (1.0, [float("nan")])),
        *(("seconds", value) for value in ([0.5], -0.5)),
        *(("train-loss", value) for value in ([1.0], float("inf"))),
        *(("num-examples", value) for value in (0, 11, [3], float("nan"))),
        *(("server-round", value) for value in (2, [3])),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(key: str, value: object) -> None:
    """A client may send anything; a list of tokens would end the run where a number is added up."""
    values = TrainReply(3, 5, 0.5, (0.5,), 5, 40, 20, 1.0).as_values() | {key: value}  # type: ignore[dict-item]
    with pytest.raises(WireError, match=key if key != "server-round" else "round"):
        TrainReply.from_record(MetricRecord(values), 3, 10, with_loss=True)


@given(server_round=st.integers(1, 10_000), rate=st.floats(0, 1), mu=st.floats(0, 10), rank=st.integers(0, 10_000))
def test_an_order_is_read_as_it_was_written(server_round: int, rate: float, mu: float, rank: int) -> None:
    order = TrainOrder(server_round, rate, {"proximal-mu": mu, "offset-rank": rank})
    read = TrainOrder.from_record(order.to_record())
    assert (read, read.proximal_mu, read.delta_rank) == (order, mu, rank)


@pytest.mark.parametrize("record", [None, MetricRecord({"server-round": 1}), ConfigRecord({"server-round": "1"})])
def test_what_is_no_order_is_refused(record: object) -> None:
    with pytest.raises(WireError):
        TrainOrder.from_record(record)


@pytest.mark.parametrize("name", STRATEGIES)
def test_bounds_enclose_a_runs_records(name: str) -> None:
    config = load_config(challenge="medical", settings=[f"strategy.name={name}", "federation.fraction=0.5"]).config
    low, high = TrainOrder.bounds(config)
    assert (low.server_round, high.server_round) == (1, config.federation.rounds)
    assert low.values.keys() == high.values.keys()
    least, most = TrainReply.bounds(config)
    assert (least.tokens, most.losses) == (1, (0.0,) * config.training.max_steps)


@pytest.mark.parametrize(
    "values",
    [{}, {"partition-id": 3, "rows": 1}, {"partition-id": -1, "rows": 1}, {"partition-id": 0, "rows": 0}],
)
def test_who_is_no_client(values: dict[str, int]) -> None:
    with pytest.raises(WireError):
        ClientDescription.from_record(MetricRecord(values), 3)
    assert ClientDescription.from_record(ClientDescription(2, 9).to_record(), 3) == ClientDescription(2, 9)
