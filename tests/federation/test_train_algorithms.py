"""Real tiny runs: client state, codecs and algorithms through train(), stopped and continued, and what clients let out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.federation.events import Event, RoundDone, listening
from fedtune.federation.train import train
from fedtune.runs.atomic import read_json_lines
from fedtune.runs.directory import RunDirectory


def tiny(*settings: str) -> FedTuneConfig:
    small = ["federation.rounds=3", "federation.fraction=0.25", "training.max_steps=1", "training.batch_size=2"]
    return load_config(challenge="tiny", settings=[*small, "checkpoint.save_every=1", *settings]).config


class Stopped(BaseException):
    """Ends a run as a signal would."""


def stop_after(server_round: int):  # type: ignore[no-untyped-def]
    def hear(event: Event) -> None:
        if isinstance(event, RoundDone) and event.round == server_round:
            raise Stopped

    return hear


@pytest.mark.parametrize(
    "settings",
    [
        ("strategy.name=scaffold", "communication.codec=int8"),
        ("strategy.name=fedex-lora", "communication.uplink_codec=int4"),
        ("strategy.name=rolora", "communication.downlink_codec=int8"),
        ("strategy.name=flexlora", "strategy.ranks=[2, 8, 4]", "communication.codec=bf16"),
        ("strategy.name=flora", "communication.codec=int8"),
        ("strategy.name=ffa-lora", "communication.codec=int8"),
    ],
    ids=lambda settings: settings[0].partition("=")[2],
)
def test_stopped_and_continued_it_ends_with_the_same_bits(tmp_path: Path, settings: tuple[str, ...]) -> None:
    config = tiny(*settings)
    whole = train(config, out=tmp_path / "whole")
    with pytest.raises(Stopped), listening(None):
        train(config, out=tmp_path / "parts", listener=stop_after(2))
    (run,) = (tmp_path / "parts").iterdir()
    # What a client wrote in a round that is repeated must not be taken up.
    for path in (run / "state").glob("round-0002"):
        (path / "manifest.json").write_text('{"gone": "0"}')
    again = train(config, out=tmp_path / "parts", resume=RunDirectory(run))
    expected, found = (load_file(each.adapter / "adapter_model.safetensors") for each in (whole, again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert whole.refused == 0


def test_local_privacy_lets_out_no_losses(tmp_path: Path) -> None:
    result = train(tiny("privacy.mode=local", "privacy.epsilon=1e9", "federation.rounds=1"), out=tmp_path)
    assert result.first_loss is None
    lines = read_json_lines(result.run / "metrics.jsonl")
    assert {tuple(sorted(line)) for line in lines} == {
        ("learning_rate", "num_examples", "partition", "round", "status")
    }
    assert {line["num_examples"] for line in lines} == {1}
    assert (result.run / "report.html").is_file()
    books = sorted(result.run.glob("state/clients/*/privacy/account.json"))
    assert len(books) == len(set(result.run.glob("state/clients/*"))) == 8
    assert {path.parent.stat().st_mode & 0o777 for path in books} == {0o700}
    accounts = [json.loads(path.read_text())["accounts"] for path in books]
    used = [account["this run"] for account in accounts if account]
    assert [len(account["releases"]) for account in used] == [1] * len(lines)
    assert len({account["key"] for account in used}) == len(lines) == 2, "each client has a key of its own"
