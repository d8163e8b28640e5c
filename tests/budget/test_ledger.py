"""The ledger and the byte counts, held against Flower's own."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.budget.ledger import Entry, Ledger, comm_cost_lines, read_ledger
from fedtune.errors import CapError, UsageError
from fedtune.federation.flower.size import serialised_bytes
from fedtune.protocol.wire_format import adapter_bytes, npy_header

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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(
            ({name: value}, f"{name} is {value!r}")
            for name in ("round", "bytes", "serialised_bytes")
            for value in (-1, 1.0, "1", True, None)
        ),
        *(({"node": value}, f"node is {value!r}") for value in (-2, 0.0, "0", False, None)),
        *(({"direction": value}, f"direction is {value!r}") for value in ("sideways", "", None, "UP")),
        *(({"status": value}, f"status is {value!r}") for value in ("fine", "", None)),
    ],
)
def test_a_value_that_no_message_has_is_named_with_its_line(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    path = tmp_path / "ledger.jsonl"
    good = {"round": 0, "node": -1, "direction": "up", "kind": "train", "bytes": 0, "serialised_bytes": 0}
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}) + "\n")
    with pytest.raises(UsageError, match=re.escape(f"The ledger is damaged: {said} in line 2 of {path}.")):
        read_ledger(path)
    path.write_text(json.dumps(good) + "\n")
    assert read_ledger(path) == [Entry(0, -1, "up", "train", 0, 0, "ok")]


@pytest.mark.parametrize("status", ["ok", "error", "refused", "lost"])
@pytest.mark.parametrize("direction", ["down", "up"])
def test_every_status_and_direction_is_read_back(tmp_path: Path, status: str, direction: str) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", 1.0)
    added = replace(entry(1, direction, 3), status=status)  # type: ignore[arg-type]
    ledger.add(added)
    assert (ledger.entries, ledger.used_bytes, read_ledger(ledger.path)) == ([added], 3, [added])


def test_rounds_and_directions_stand_in_order_and_add_up() -> None:
    """Rounds by number, down before up, whatever the order of the entries; queries are not counted."""
    entries = [entry(r, d, c * 2**20) for r, d, c in ((10, "up", 8), (2, "up", 2), (2, "down", 1), (10, "down", 4))]
    assert [line.split("used ")[1].split(" this")[0] for line in comm_cost_lines(entries)] == [
        "1.00 MB (+1.00 MB",
        "3.00 MB (+2.00 MB",
        "7.00 MB (+4.00 MB",
        "15.00 MB (+8.00 MB",
    ]
    assert comm_cost_lines([entry(1, "up", 9, "query")]) == []


def test_the_cap_is_held_against_what_was_sent_and_what_is_planned(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", cap_mib=2.0)
    ledger.add(entry(1, "down", 2**20))
    with pytest.raises(CapError, match=r"next messages \(1\.50 MiB\) would pass communication.cap_mib = 2: 1\.00 MiB"):
        ledger.reserve(2**20 + 2**19)
    assert (ledger.used_bytes, len(ledger.entries)) == (2**20, 1)  # nothing was sent
    ledger.reserve(2**20)
