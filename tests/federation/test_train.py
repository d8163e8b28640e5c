"""The real ClientApp on the tiny base, through the in-process engine: strategies, privacy of errors, loading once."""

from pathlib import Path

import pytest
import torch

from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import FederationError, MissingError, UsageError
from fedtune.federation import workspace
from fedtune.federation.events import DataReady, Event, ReplyArrived, StepDone
from fedtune.federation.train import TrainResult, differences, pin_revisions, train
from fedtune.models.adapter import read_adapter
from fedtune.runs.atomic import read_json_lines

SMALL = ("federation.rounds=1", "federation.fraction=0.25", "training.max_steps=3", "training.batch_size=4")


def config_of(*settings: str) -> FedTuneConfig:
    return load_config(challenge="tiny", settings=[*SMALL, *settings]).config


def run(tmp_path: Path, *settings: str) -> tuple[TrainResult, list[Event]]:
    events: list[Event] = []
    return train(config_of(*settings), out=tmp_path, listener=events.append), events


def tensors_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return read_adapter(result.adapter).tensors


def test_fedprox_pulls_towards_the_global_adapter(tmp_path: Path) -> None:
    """At mu = 0 it is FedAvg to the bit; as mu grows, the adapter stays nearer to the one that it started from.

    B starts at zero, so its norm is its distance from the global adapter.
    """
    average = tensors_of(run(tmp_path / "avg")[0])
    distances = []
    for mu in (0.0, 1.0, 30.0):
        result = run(tmp_path / str(mu), "strategy.name=fedprox", f"strategy.proximal_mu={mu}")[0]
        tensors = tensors_of(result)
        if mu == 0.0:
            assert all(torch.equal(tensors[name], average[name]) for name in average)
        distances.append(sum(float(t.norm() ** 2) for name, t in tensors.items() if "lora_B" in name))
    assert distances[0] > distances[1] > distances[2] > 0


def test_the_base_is_loaded_once_and_rows_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("load_base", "tokenize_rows"):
        real = getattr(workspace, name)
        monkeypatch.setattr(workspace, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    workspace.workspace_of.cache_clear()
    run(tmp_path, "federation.rounds=3", "federation.fraction=0.5")
    assert calls.count("load_base") == 1
    assert calls.count("tokenize_rows") == 8  # one a client, not one a round


def test_events_and_files_tell_the_same(tmp_path: Path) -> None:
    result, events = run(tmp_path)
    (data,) = [event for event in events if isinstance(event, DataReady)]
    assert [row.name for row in data.table][:2] == ["Candlecombe", "Farthing Rock"]
    assert data.skipped == 0
    steps = [event for event in events if isinstance(event, StepDone)]
    replies = [event for event in events if isinstance(event, ReplyArrived)]
    assert len(steps) == 2 * 3
    assert len(replies) == 2
    lines = read_json_lines(result.run / "metrics.jsonl")
    assert [line["train_loss"] for line in lines] == [reply.loss for reply in replies]
    assert lines[0]["losses"] == [step.loss for step in steps[:3]]
    assert result.first_loss == result.last_loss > 0
    # Two clients drew 12 rows each.
    seen = 2 * 12 / sum(row.rows for row in data.table)
    assert result.share_seen == pytest.approx(seen)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_narrow_wire_trains_as_well(tmp_path: Path, dtype: str) -> None:
    wide = run(tmp_path / "wide", "federation.rounds=2")[0]
    narrow = run(tmp_path / "narrow", "federation.rounds=2", f"communication.wire_dtype={dtype}")[0]
    assert narrow.used_bytes < 0.55 * wide.used_bytes
    assert narrow.last_loss == pytest.approx(wide.last_loss, rel=0.05)


def test_a_client_that_is_out_of_time_costs_itself_only(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="Training took longer than 1e-06 s") as caught:
        run(tmp_path, "federation.client_timeout_s=0.000001")
    assert caught.value.exit_code == 4
    assert "--resume" in caught.value.hint
    # The report is there even though the run failed.
    assert list(tmp_path.glob("*/report.html"))


def test_bad_data_is_no_clients_fault(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"none\.jsonl"):
        run(tmp_path, "data.source=none.jsonl")
    assert not tmp_path.exists() or not list(tmp_path.iterdir())  # no run directory is left behind
    empty = tmp_path / "rows.jsonl"
    empty.parent.mkdir(exist_ok=True)
    empty.write_text('{"instruction": "a", "input": "b", "output": ""}\n' * 16)
    with pytest.raises(UsageError, match="16 of 16"):
        run(tmp_path / "runs", f"data.source={empty}", "data.partitioner=iid")


def test_differences_that_matter() -> None:
    saved = pin_revisions(config_of(), "a" * 40, None)
    assert differences(saved, config_of()) == []  # a revision that is left open is the run's
    assert differences(saved, config_of("communication.cap_mib=9.0", "checkpoint.save_every=1")) == []
    assert [problem.path for problem in differences(saved, config_of("seed=1", "strategy.name=fedprox"))] == [
        "seed",
        "strategy.name",
        "strategy.proximal_mu",
    ]


def test_dora_and_rslora_train(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "adapter.dora=true", "adapter.rslora=true", "adapter.rank=2")
    assert any(name.endswith("lora_magnitude_vector") for name in tensors_of(result))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_trains_on_the_cpu(tmp_path: Path, quantization: str) -> None:
    result, _ = run(tmp_path, f"model.quantization={quantization}", "training.optimizer=paged_adamw_8bit")
    assert result.refused == 0
    assert result.last_loss > 0


def test_the_text_of_a_clients_exception_stays_with_it(flower_identity: None) -> None:
    """On Flower's own engines as well: they would send the text of an exception to the server."""
    from flwr.app import Context, Message, RecordDict

    from fedtune.federation import client

    secret = {"fedtune-config": '{"data": {"source": "/home/ward7/secret.jsonl"}}'}
    context = Context(run_id=1, node_id=2, node_config={"partition-id": 0}, state=RecordDict(), run_config=dict(secret))
    reply = client.app(Message(RecordDict(), 2, "query"), context)
    assert reply.has_error()
    assert reply.error.reason == "MissingError"
