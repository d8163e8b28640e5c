"""The ledger and the byte counts, held against Flower's own."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.budget.count import adapter_bytes, npy_header, serialised_bytes
from fedtune.budget.ledger import Entry, Ledger, comm_cost_lines, read_ledger
from fedtune.errors import CapError, UsageError

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=60), st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), max_size=8
)


def record(shapes: dict[str, tuple[int, ...]], dtype: str = "float32") -> ArrayRecord:
    generator = np.random.default_rng(0)
    return ArrayRecord({name: Array(generator.normal(size=shape).astype(dtype)) for name, shape in shapes.items()})


@given(SHAPES, st.sampled_from(["float32", "float16", "uint16"]))
def test_forecast_equals_flowers_count(shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    assert adapter_bytes(shapes, dtype) == record(shapes, dtype).count_bytes()


def plain_serialised_bytes(message: InflatableObject) -> int:
    """The plain way: deflate every object of the tree, an object that occurs twice counted twice."""
    return len(message.deflate()) + sum(map(plain_serialised_bytes, (message.children or {}).values()))


@pytest.mark.usefixtures("flower_identity")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the identity is the same for every example
@given(SHAPES, st.floats(allow_nan=False), st.lists(st.floats(allow_nan=False), max_size=5))
def test_serialised_bytes_equal_the_deflated_objects(
    shapes: dict[str, tuple[int, ...]], loss: float, losses: list[float]
) -> None:
    content = RecordDict(
        {
            "arrays": record(shapes),
            "metrics": MetricRecord({"loss": loss, "losses": losses}),
            "config": ConfigRecord({"server-round": 3, "name": "x"}),
        }
    )
    message = Message(content, 7, "train")
    # Arrays of the same content share an object in Flower's tree; one-element arrays could collide otherwise.
    assert serialised_bytes(message) == plain_serialised_bytes(message)
    error = Message(Error(2, "ValueError"), reply_to=message)
    assert serialised_bytes(error) == plain_serialised_bytes(error)


def test_npy_header_is_numpys() -> None:
    array = np.arange(6, dtype="float32").reshape(2, 3)
    assert Array(array).data == npy_header("<f4", (2, 3)) + array.tobytes()


def entry(server_round: int, direction: str, count: int, kind: str = "train") -> Entry:
    return Entry(server_round, 0, direction, kind, count, count + 10)  # type: ignore[arg-type]


def test_comm_cost_has_the_leaderboards_form() -> None:
    """Protocol, section 3: one line per direction and round, in mebibytes that it calls MB."""
    half = 2**20 * 104 + 52429  # 104.05 MiB
    entries = [entry(0, "up", 99, "query"), entry(1, "up", half), entry(1, "down", half - 5), entry(1, "down", 5)]
    assert comm_cost_lines(entries) == [
        "Communication budget: used 104.05 MB (+104.05 MB this round) / 200,000 MB",
        "Communication budget: used 208.10 MB (+104.05 MB this round) / 200,000 MB",
    ]


def test_ledger_survives_its_process(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, cap_mib=1.0)
    ledger.add(entry(1, "down", 1000))
    ledger.add(entry(1, "up", 500))
    with path.open("a") as file:
        file.write('{"round": 2, "no')  # killed in the middle of a line
    again = Ledger(path, cap_mib=1.0)
    assert again.entries == ledger.entries
    assert again.used_bytes == 1500
    again.mark_lost(1)
    assert [one.status for one in read_ledger(path)] == ["ok", "lost"]
    assert Ledger(path, cap_mib=1.0).used_bytes == 1500  # what was sent was sent


def test_the_cap_is_a_cap(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", cap_mib=1.0)
    ledger.add(entry(1, "down", 2**20 - 100))
    ledger.reserve(100)
    with pytest.raises(CapError) as caught:
        ledger.reserve(101)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("damage", ["not json", '["a"]', '{"round": 1}', '{"unknown": 1}'])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path, 1.0).add(entry(1, "down", 1))
    path.write_text(path.read_text() + damage + "\n")
    with pytest.raises(UsageError, match="ledger is damaged"):
        read_ledger(path)
