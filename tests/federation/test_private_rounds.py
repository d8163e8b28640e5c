"""Privacy in the loop: what is aggregated, what the budget stops, what a resumed run goes on with."""

from pathlib import Path

import pytest
import torch
from arithmetic import SHAPES
from test_rounds import config_of, rounds_of

from fedtune.errors import CapError, ConfigError
from fedtune.federation.events import Event, RoundDone, listening
from fedtune.federation.privacy import Accountant, noisy_average

pytestmark = pytest.mark.usefixtures("flower_identity")

QUIET = ("privacy.mode=central", "privacy.noise_multiplier=1e-9", "privacy.epsilon=1e30")


def test_updates_are_clipped_and_count_the_same(tmp_path: Path) -> None:
    """Clients add 1, 2, 3 to 12 values: norms 3.46, 6.93, 10.39; clipped to sqrt(12) each adds 1, whatever its rows."""
    rounds = rounds_of(tmp_path / "run", config_of(*QUIET, f"privacy.clip={12**0.5}", "federation.rounds=1"))
    rounds.run_rounds()
    assert all(torch.allclose(tensor, torch.ones_like(tensor)) for tensor in rounds.tensors.values())


def test_noise_is_added_once_with_the_right_deviation(tmp_path: Path) -> None:
    """With the run's key the noise is known: the adapter is the noisy average of the replies, and not that with noise again.

    `test_the_noise_is_gaussian` holds the deviation of one such average.
    """
    settings = ("privacy.mode=central", "privacy.noise_multiplier=6e6", "privacy.clip=1e-6", "federation.rounds=1")
    config = config_of(*settings)
    rounds = rounds_of(tmp_path / "run", config)
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    replies = {partition: {name: tensor + partition + 1 for name, tensor in zeros.items()} for partition in range(3)}
    expected = noisy_average(zeros, replies, config.privacy, asked=3, key=rounds.noise_key, server_round=1)
    rounds.run_rounds()
    for name, tensor in expected.items():
        assert torch.allclose(rounds.tensors[name], tensor, rtol=1e-5, atol=0)
        assert (tensor != 0).all()


def test_the_key_survives_and_travels_nowhere(tmp_path: Path) -> None:
    settings = ("privacy.mode=central", "privacy.epsilon=1e9", "federation.rounds=3")
    whole = rounds_of(tmp_path / "whole", config_of(*settings))
    key = whole.noise_key
    whole.run_rounds()
    kept = tmp_path / "whole" / "state" / "round-0003" / "noise.key"
    assert kept.read_bytes() == key
    assert kept.stat().st_mode & 0o077 == 0
    again = rounds_of(tmp_path / "whole", config_of(*settings))
    assert again.noise_key == key
    texts = [path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file() and path != kept]
    assert not any(key in text or key.hex().encode() in text for text in texts if len(text) != 16)
    other = rounds_of(tmp_path / "other", config_of(*settings))
    other.run_rounds()
    assert any(not torch.equal(other.tensors[name], whole.tensors[name]) for name in SHAPES), (
        "the seed does not make it"
    )


def test_the_run_stops_at_the_budget_and_says_what_is_spent(tmp_path: Path) -> None:
    config = config_of(
        "privacy.mode=central", "privacy.noise_multiplier=4", "privacy.epsilon=5", "federation.rounds=50"
    )
    fits = Accountant(config).rounds_within()
    assert 0 < fits < 50
    rounds = rounds_of(tmp_path / "run", config)
    told: list[Event] = []
    with listening(told.append), pytest.raises(CapError, match=f"Round {fits + 1} would bring epsilon to") as stop:
        rounds.run_rounds()
    assert f"fedtune train --resume {tmp_path / 'run'}" in stop.value.hint
    spent = [event.epsilon for event in told if isinstance(event, RoundDone)]
    assert len(spent) == fits
    assert spent == sorted(spent)  # type: ignore[type-var]
    assert spent[-1] is not None
    assert spent[-1] <= 5
    assert (tmp_path / "run" / f"peft_{fits}").is_dir()
    larger = config_of(
        "privacy.mode=central", "privacy.noise_multiplier=4", "privacy.epsilon=1e9", "federation.rounds=50"
    )
    again = rounds_of(tmp_path / "run", larger)
    assert again.done == fits
    again.run_rounds()


@pytest.mark.parametrize("name", ["fedmedian", "scaffold", "flora", "flexlora"])
def test_strategies_that_are_no_average_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="its bound rests on an average"):
        config_of("privacy.mode=central", f"strategy.name={name}")


def test_a_budget_that_lasts_for_no_round_is_said_at_once_with_the_noise_that_would_do(tmp_path: Path) -> None:
    config = config_of("privacy.mode=central", "privacy.noise_multiplier=0.5", "federation.rounds=3")
    with pytest.raises(CapError, match="does not last for a single round") as stop:
        rounds_of(tmp_path / "run", config).run_rounds()
    needed = float(stop.value.hint.rpartition("=")[2])
    rounds_of(tmp_path / "enough", config_of("privacy.mode=central", f"privacy.noise_multiplier={needed}")).run_rounds()
