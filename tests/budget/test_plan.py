"""The forecast, held against the ledger of exchanges that take place, and against the published figures."""

from __future__ import annotations

import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import constant
from flwr.supercore import constant as supercore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import exchange

from fedtune.budget.fit import WIRE_DTYPES
from fedtune.budget.ledger import Entry, read_ledger
from fedtune.budget.plan import Sizes, plan, shapes_of, transfer_time
from fedtune.config.facts import Architecture, load_preset, preset_names
from fedtune.config.load import load_config
from fedtune.config.schema import Codec, FedTuneConfig
from fedtune.config.strategies import STRATEGIES
from fedtune.config.strategies.base import Shapes
from fedtune.federation.engines.in_process import InProcessGrid
from fedtune.federation.flower import size
from fedtune.federation.flower.size import serialised_bytes
from fedtune.models.shapes import adapter_shapes
from fedtune.protocol import message_size, wire_format
from fedtune.protocol.arrays import encode
from fedtune.protocol.message_size import message_span, reply_span
from fedtune.protocol.wire_format import WIRE_FORMATS
from fedtune.units import parse_rate

NAMES = list(STRATEGIES)
NEEDED = {name: option(name=name).replies_needed for name, option in STRATEGIES.items()}
CODECS = typing.get_args(Codec)
FORMATS = [*WIRE_FORMATS, *wire_format.CODECS]
SMALL = Architecture(base="x", layers=1, hidden=12, heads=2, kv_heads=1, head_dim=6, default_targets=("q_proj",))
TARGETS = st.sets(st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj"]), min_size=1).map(sorted)


def config_of(**values: object) -> FedTuneConfig:
    quoted = {key: f'"{value}"' if isinstance(value, str) else value for key, value in values.items()}
    return load_config(settings=[f"{key.replace('__', '.')}={value}" for key, value in quoted.items()]).config


@pytest.mark.parametrize("recipe", preset_names("recipe"))
def test_the_published_figures_come_out(recipe: str) -> None:
    planned = plan(load_config(recipe=recipe).config)
    assert round(planned.total_bytes / 2**20, 2) == load_preset("recipe", recipe).published["budget_mib"]


def test_a_plan_by_hand() -> None:
    """Rank 2 on a hidden size of 12: A is 2 x 12, B 12 x 2; a key of 62 letters and an npy header of 128 bytes each."""
    config = config_of(adapter__rank=2, federation__clients=5, federation__fraction=0.4, federation__rounds=3)
    shapes = adapter_shapes(config.model, config.adapter, SMALL)
    planned = plan(config, shapes)
    assert {len(key) for key in shapes} == {62}
    message = 2 * (62 + 128 + 24 * 4)
    assert (planned.message_bytes, planned.reply_bytes, planned.parameters) == (message, message, 48)
    assert planned.client_round_bytes == 2 * message
    assert planned.round_bytes == 2 * 2 * message
    assert planned.down_bytes == planned.up_bytes == 3 * 2 * message
    assert planned.total_bytes == 3 * 2 * 2 * message
    assert planned.client_bytes == planned.total_bytes / 5


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bf16", 2), ("fp16", 2)])
def test_over_a_superlink_all_arrays_travel_as_one(dtype: str, width: int) -> None:
    """The values of both arrays under one key and one npy header; in each direction that has no codec."""
    words = {"federation__engine": "superlink", "communication__wire_dtype": dtype, "adapter__rank": 2}
    config = config_of(**words, communication__uplink_codec="int8")
    shapes = adapter_shapes(config.model, config.adapter, SMALL)
    planned = plan(config, shapes)
    assert (planned.down_format, planned.up_format) == (f"joined-{dtype}", "packed-int8")
    record = zeros(shapes, planned.down_format)
    assert planned.message_bytes == record.count_bytes() == len("packed") + 128 + 48 * width
    assert message_size.wire_record_bytes(shapes, planned.down_format) == size._array_record_bytes(record)


@st.composite
def configs(draw: st.DrawFn) -> FedTuneConfig:
    """Every strategy, as many clients as it needs or more, every way to write messages, each direction its own."""
    rank, name = draw(st.integers(1, 70)), draw(st.sampled_from(NAMES))
    asked = NEEDED[name] + draw(st.integers(0, 2))
    clients = asked + draw(st.integers(0, 4))
    codecs = {
        f"communication__{key}": codec
        for key in ("codec", "uplink_codec", "downlink_codec")
        if (codec := draw(st.sampled_from([None, *CODECS])))
    }
    ranks = draw(st.lists(st.integers(1, rank), max_size=3)) if name == "flexlora" else None
    return config_of(
        adapter__rank=rank,
        adapter__targets=draw(TARGETS),
        communication__wire_dtype=draw(st.sampled_from(WIRE_DTYPES)),
        strategy__name=name,
        **({} if ranks is None else {"strategy__ranks": ranks}),
        federation__rounds=draw(st.integers(1, 4)),
        federation__clients=clients,
        federation__fraction=min(1.0, (asked + draw(st.floats(0, 0.9))) / clients),
        training__max_steps=draw(st.integers(1, 12)),
        checkpoint__save_every=100,
        **codecs,
    )


@pytest.mark.usefixtures("flower_identity")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs())
def test_forecast_is_the_ledger_of_a_simulated_exchange(
    tmp_path_factory: pytest.TempPathFactory, config: FedTuneConfig
) -> None:
    shapes = adapter_shapes(config.model, config.adapter, SMALL)
    entries = exchange(tmp_path_factory.mktemp("run"), config, shapes)
    check(config, [entry for entry in entries if entry.kind == "train"], shapes)


def check(config: FedTuneConfig, training: list[Entry], shapes: Shapes) -> None:
    """The plan is what the ledger holds, to the byte; serialised bytes lie in their spans."""
    planned, sizes = plan(config, shapes), Sizes(config, shapes)
    assert {entry.status for entry in training} == {"ok"}
    for entry in training:
        place = entry.round, entry.node
        assert entry.bytes == sizes.pair(*place)[entry.direction == "up"]
        if entry.direction == "down":
            span = message_span(config, config.strategy.down_shapes(config, shapes, *place))
        else:
            span = reply_span(config, config.strategy.up_shapes(config, shapes, *place))
        assert span.low <= entry.serialised_bytes <= span.high
    by_round = [
        sum(entry.bytes for entry in training if entry.round == number) for number in range(1, planned.rounds + 1)
    ]
    assert by_round == [sizes.round(number) for number in range(1, planned.rounds + 1)]
    assert planned.round_bytes == max(by_round)
    for direction, total in (("down", planned.down_bytes), ("up", planned.up_bytes)):
        assert sum(entry.bytes for entry in training if entry.direction == direction) == total
    assert planned.total_bytes == sum(by_round)
    total = sum(entry.serialised_bytes for entry in training)
    assert planned.serialised_total.low <= total <= planned.serialised_total.high
    largest = max(sum(sizes.pair(entry.round, entry.node)) for entry in training)
    assert planned.client_round_bytes == planned.message_bytes + planned.reply_bytes == largest
    if not planned.varies:
        assert {entry.bytes for entry in training if entry.direction == "down"} == {planned.message_bytes}
        assert {entry.bytes for entry in training if entry.direction == "up"} == {planned.reply_bytes}


CASES = range(len(NAMES))


@pytest.mark.parametrize("case", CASES)
def test_forecast_is_the_ledger_of_a_tiny_run(tmp_path: Path, case: int) -> None:
    """A real run: base model, tokenizer, training, the client as it ships. Every strategy and way to write messages comes up."""
    from fedtune.federation.train import train

    name = NAMES[case % len(NAMES)]
    choices = [
        f"strategy.name={name}",
        f"communication.wire_dtype={WIRE_DTYPES[case % len(WIRE_DTYPES)]}",
        f"communication.codec={CODECS[case // 2 % len(CODECS)]}",
        f"adapter.dora={'true' if case == 0 else 'false'}",
        f"adapter.modules_to_save={['lm_head'] if case == 1 else []}",
        f"federation.fraction={max(2, NEEDED[name]) / 8}",
        f"federation.rounds={2 if name in ('flora', 'fedex-lora', 'rolora') else 1}",
    ]
    config = load_config(challenge="tiny", settings=[*choices, "training.max_steps=1", "training.batch_size=2"]).config
    result = train(config, out=tmp_path)
    training = [entry for entry in read_ledger(result.run / "ledger.jsonl") if entry.kind == "train"]
    check(config, training, shapes_of(config))


@pytest.mark.usefixtures("flower_identity")
@pytest.mark.parametrize("strategy", NAMES)
@pytest.mark.parametrize("form", FORMATS)
def test_the_bounds_of_a_span_are_reached(strategy: str, form: str) -> None:
    """The shortest and the longest message and reply that there can be, built and measured."""
    packed = form.removeprefix("packed-") if form in wire_format.CODECS else ""
    config = config_of(
        **({"communication__codec": packed} if packed else {"communication__wire_dtype": form}),
        strategy__name=strategy,
        federation__clients=200,
        federation__rounds=300,
        training__max_steps=40,
    )
    shapes = {"a.lora_A.weight": (3, 50), "a.lora_B.weight": (50, 3), "ünï": (1,)}
    a_round = config.federation.clients_per_round * config.adapter.rank
    grid = InProcessGrid(echo_app(), 200, {})
    rows = 40 * config.training.rows_per_step
    tokens = rows * config.training.sequence_length
    found, spans = [], []
    for node, server_round, steps, numbers in (
        (2, 1, 1, (1, 1, 1, 1)),
        (201, 300, 40, (config.federation.max_examples, rows, tokens, tokens)),
    ):
        down, up = (
            each(config, shapes, server_round, node - 2)
            for each in (config.strategy.down_shapes, config.strategy.up_shapes)
        )
        orders: dict[str, float] = {"proximal-mu": 0.1} if strategy == "fedprox" else {}
        if "offset-rank" in config.strategy.order_values(config, server_round):
            orders = {"offset-rank": (server_round - 1) * a_round}
        config_record = ConfigRecord({**orders, "learning-rate": 1e-5, "server-round": server_round})
        message = Message(RecordDict({"arrays": zeros(down, form), "config": config_record}), node, "train")
        examples, of_rows, of_tokens, of_response = numbers
        metrics = MetricRecord(
            {
                "server-round": server_round,
                "num-examples": examples,
                "train-loss": 0.5,
                "losses": [0.5] * steps,
                "rows": of_rows,
                "tokens": of_tokens,
                "response-tokens": of_response,
                "seconds": 1.0,
            }
        )
        ECHO["content"] = RecordDict({"arrays": zeros(up, form), "metrics": metrics})
        (answer,) = grid.send_and_receive([message])
        found.append((serialised_bytes(message), serialised_bytes(answer)))
        spans.append((message_span(config, down), reply_span(config, up)))
    (shortest, shortest_reply), (longest, longest_reply) = spans
    assert found == [(shortest.low, shortest_reply.low), (longest.high, longest_reply.high)]


def zeros(shapes: Shapes, form: str) -> ArrayRecord:
    return encode({name: torch.zeros(shape) for name, shape in shapes.items()}, form)


ECHO: dict[str, RecordDict] = {}


def echo_app():  # type: ignore[no-untyped-def]
    """Return a ClientApp that replies with what lies in ECHO."""
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: object) -> Message:
        return Message(ECHO["content"], reply_to=message)

    return app


def test_what_is_stated_twice_is_the_same() -> None:
    assert constant.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE == message_size._CHUNK_BYTES
    assert len(supercore.HEAD_BODY_DIVIDER) == len(supercore.HEAD_VALUE_DIVIDER) == 1
    assert set(WIRE_FORMATS) == set(WIRE_DTYPES)


def test_transfer_time_by_hand() -> None:
    """A message of m serialised bytes takes m / 12.5e6 s down at 100 Mbit/s and m / 2.5e6 s up at 20 Mbit/s."""
    config = load_config(recipe="aloe-8b-medical").config
    planned = plan(config)
    time = transfer_time(planned, uplink=parse_rate("20Mbit/s"), downlink=parse_rate("100Mbit/s"))
    assert time.down_s == planned.serialised_message.high / 12.5e6
    assert time.up_s == planned.serialised_reply.high / 2.5e6
    assert time.round_s == time.down_s + time.up_s
    assert time.total_s == pytest.approx(10 * time.round_s)


def test_a_large_array_is_cut_into_chunks() -> None:
    """What Flower cuts into objects of 5 MiB, the arithmetic does."""
    shapes = {"w": (1400, 1000)}
    values = np.random.default_rng(0).normal(size=(1400, 1000)).astype("float32")  # chunks that differ are not merged
    record = ArrayRecord({"w": Array(values)})
    plain = len(record.deflate()) + sum(
        len(array.deflate()) + sum(len(chunk.deflate()) for chunk in (array.children or {}).values())
        for array in record.values()
    )
    assert message_size.adapter_record_bytes(shapes, WIRE_FORMATS["float32"]) == plain
