"""The audit, on exchanges with faults planted in them, and on any ledger that hypothesis can write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import Faults, KilledError, exchange

from fedtune.budget.audit import Audit, audit, explain
from fedtune.budget.ledger import Entry, read_ledger
from fedtune.budget.plan import Sizes, plan
from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import ConfigError, MissingError, UsageError
from fedtune.models.shapes import Shapes
from fedtune.runs.directory import RunDirectory


def small(*settings: str) -> tuple[FedTuneConfig, Shapes]:
    """A config whose adapter is the medical template's at rank 1, and its shapes: the forecast needs no network."""
    from fedtune.budget.plan import shapes_of

    defaults = [
        *("adapter.rank=1", 'adapter.targets=["v_proj"]', "federation.clients=3", "federation.fraction=1.0"),
        *("federation.rounds=3", "checkpoint.save_every=100"),
    ]
    config = load_config(challenge="medical", settings=[*defaults, *settings]).config
    return config, dict(shapes_of(config))


def causes(found: Audit) -> dict[str, tuple[int, int]]:
    assert found.forecast is not None
    assert sum(cause.bytes for cause in found.causes) == found.total.bytes - found.forecast.total_bytes
    return {cause.text: (cause.messages, cause.bytes) for cause in found.causes}


pytestmark = pytest.mark.usefixtures("flower_identity")


def test_a_finished_run_sent_what_was_forecast(tmp_path: Path) -> None:
    config, shapes = small()
    entries = exchange(tmp_path / "run", config, shapes)
    found = audit(RunDirectory(tmp_path / "run"))
    assert (found.state, found.rounds_done, found.torn_line) == ("finished", 3, False)
    assert causes(found) == {}
    assert found.forecast == plan(config)
    assert found.total.bytes == plan(config).total_bytes
    assert found.total.down_bytes == found.total.up_bytes == plan(config).down_bytes
    assert [use.bytes for use in found.rounds] == [plan(config).round_bytes] * 3
    assert [(use.number, use.bytes, use.asked, use.accepted) for use in found.clients] == [
        (partition, 3 * plan(config).client_round_bytes, 3, 3) for partition in range(3)
    ]
    queries = [entry for entry in entries if entry.kind == "query"]
    assert found.queries == len(queries) == 2 * 3  # a question and an answer for each client
    assert found.query_bytes == sum(entry.serialised_bytes for entry in queries)


def test_refused_replies_and_errors_are_told_apart(tmp_path: Path) -> None:
    """A refused reply was sent in full; an error reply has no adapter, which is one message less."""
    config, shapes = small()
    exchange(tmp_path / "run", config, shapes, Faults(error={(0, 1), (1, 3)}, refused={(2, 2)}))
    found = audit(RunDirectory(tmp_path / "run"))
    message = plan(config).message_bytes
    assert causes(found) == {
        "replies that are an error and carry no adapter": (2, -2 * message),
        "replies that were refused: sent and counted, not averaged": (1, 0),
    }
    assert [(use.errors, use.refused, use.accepted) for use in found.clients] == [(1, 0, 2), (1, 0, 2), (0, 1, 2)]
    assert [use.bytes for use in found.rounds] == [5 * message, 6 * message, 5 * message]


def test_a_killed_run_and_its_continuation(tmp_path: Path) -> None:
    """Killed while client 1 trains in round 2: three messages went down and one came up, in vain."""
    config, shapes = small()
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(KilledError):
        exchange(run.path, config, shapes, Faults(killed={(1, 2)}))
    message = plan(config).message_bytes
    found = audit(run)
    assert (found.state, found.rounds_done) == ("stopped", 1)
    assert found.total.bytes == 10 * message
    assert causes(found) == {"not sent: the run stopped": (8, -8 * message)}  # two replies of round 2, six of round 3
    exchange(run.path, config, shapes)
    found = audit(run)
    assert found.state == "finished"
    assert causes(found) == {"sent in rounds that a crash undid": (4, 4 * message)}
    assert [use.lost_bytes for use in found.rounds] == [0, 4 * message, 0]
    assert found.total.bytes == 22 * message


def test_a_running_run_is_read_and_not_touched(tmp_path: Path) -> None:
    """Another process holds the run's lock and is half-way through a line and a state."""
    config, shapes = small("federation.rounds=2")
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(KilledError):
        exchange(run.path, config, shapes, Faults(killed={(0, 2)}))
    with run.ledger_file.open("a") as file:
        file.write('{"round": 2, "nod')
    half = run.state_folder / ".round-0002.1.tmp"
    half.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(run.state_folder / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
        found = audit(run)
        assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
        process.communicate("\n")
    assert (found.state, found.rounds_done, found.torn_line) == ("running", 1, True)
    assert set(causes(found)) == {"not sent yet"}
    assert half.is_dir()
    assert audit(run).state == "stopped"


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    config, shapes = small("federation.rounds=1")
    run = RunDirectory(tmp_path / "run")
    exchange(run.path, config, shapes)
    lines = run.ledger_file.read_text().splitlines()
    line = json.loads(lines[4])
    for change in (
        {"bytes": -1},
        {"bytes": "many"},
        {"round": True},
        {"direction": "sideways"},
        {"status": "fine"},
        {"node": 1.5},
    ):
        damaged = [*lines[:4], json.dumps({**line, **change}), *lines[5:]]
        run.ledger_file.write_text("\n".join(damaged) + "\n")
        with pytest.raises(UsageError, match=f"{next(iter(change))} is .* in line 5 of .*ledger.jsonl"):
            audit(run)
    run.ledger_file.write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]) + "\n")
    with pytest.raises(UsageError, match="line 5 of"):
        audit(run)
    run.ledger_file.unlink()
    with pytest.raises(MissingError, match=r"ledger\.jsonl is missing, though 1 rounds"):
        audit(run)
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace('"rounds": 1', '"rounds": 0'))
    with pytest.raises(ConfigError, match=r"federation\.rounds: 0 .*config\.json"):
        audit(run)
    run.config_file.write_text(text[:50])
    with pytest.raises(UsageError, match="cannot be parsed"):
        audit(run)
    run.config_file.unlink()
    with pytest.raises(MissingError, match=r"no config\.json"):
        audit(run)


def test_without_shapes_the_totals_stand_alone(tmp_path: Path) -> None:
    config, shapes = small("federation.rounds=1")
    run = RunDirectory(tmp_path / "run")
    exchange(run.path, config, shapes)
    table = json.loads(run.config_file.read_text())
    table["model"]["base"] = str(tmp_path / "gone")
    run.config_file.write_text(json.dumps(table))
    found = audit(run)
    assert found.forecast is None
    assert "gone" in found.forecast_unknown_because
    assert found.total.bytes == plan(config).total_bytes
    assert {use.forecast_bytes for use in (*found.rounds, *found.clients, found.total)} == {None}


ENTRIES = st.lists(
    st.builds(
        Entry,
        round=st.integers(1, 5),
        node=st.integers(-1, 4),
        direction=st.sampled_from(["down", "up"]),
        kind=st.just("train"),
        bytes=st.sampled_from([0, 7, 1000, 2000]),
        serialised_bytes=st.just(0),
        status=st.sampled_from(["ok", "error", "refused", "lost"]),
    ),
    max_size=40,
)


SIZES = [
    Sizes(small(*settings)[0], {"m.lora_A.weight": (2, 20), "m.lora_B.weight": (10, 2)})
    for settings in (
        (),
        ("strategy.name=rolora",),
        ("strategy.name=fedex-lora", "federation.fraction=0.7"),
        ("strategy.name=flexlora", "strategy.ranks=[1, 2]", "adapter.rank=2", "federation.fraction=0.7"),
    )
]
"""Messages that are all the same, that differ by round, and that differ by client."""


@given(ENTRIES, st.sampled_from(SIZES), st.integers(0, 4), st.sampled_from(["finished", "running", "stopped"]))
def test_the_causes_always_add_up(entries: list[Entry], sizes: Sizes, done: int, state: str) -> None:
    found = explain(entries, sizes, done, state)  # type: ignore[arg-type]
    forecast = plan(sizes.config, sizes.shapes)
    assert sum(cause.bytes for cause in found) == sum(entry.bytes for entry in entries) - forecast.total_bytes


def test_an_empty_run(tmp_path: Path) -> None:
    """Stopped before the first message."""
    from fedtune.runs.atomic import write_json

    config, _ = small()
    write_json(tmp_path / "config.json", config.model_dump(mode="json"))
    found = audit(RunDirectory(tmp_path))
    assert (found.state, found.total.bytes, found.rounds, found.clients) == ("stopped", 0, (), ())
    assert read_ledger(tmp_path / "ledger.jsonl") == []
    assert causes(found) == {"not sent: the run stopped": (18, -plan(config).total_bytes)}
