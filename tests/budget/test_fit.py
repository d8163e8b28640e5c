"""What fits under a cap: the search against the plain way, and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.budget.fit import PATHS, What, fit, grid, largest, with_value
from fedtune.budget.plan import plan
from fedtune.config.load import load_config
from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import CapError, MissingError
from fedtune.units import to_mib

MEDICAL = load_config(recipe="aloe-8b-medical").config


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 30), st.integers(0, 1200))
def test_the_search_is_the_plain_search(steps: list[int], slope: int, cap: int) -> None:
    """On any sum that never falls: the last value that stays under the cap."""

    def bytes_of(value: int) -> int:
        assert value >= 1
        return sum(steps[:value]) + slope * max(0, value - len(steps))

    plain = 0
    while bytes_of(plain + 1) <= cap:
        plain += 1
    assert largest(bytes_of, cap) == plain


@pytest.mark.parametrize("what", PATHS)
@pytest.mark.parametrize("cap_mib", [1200.0, to_mib(5 * 10**9), 200_000.0])
def test_the_largest_value_stays_under_and_the_next_does_not(what: What, cap_mib: float) -> None:
    found = fit(MEDICAL, what, cap_mib)
    assert found.plan == plan(found.config)
    assert found.plan.total_bytes <= cap_mib * 2**20 < found.next_bytes
    assert found.next_bytes == plan(with_value(MEDICAL, what, found.value + 1)).total_bytes


def test_fits_by_hand() -> None:
    """A round is 218,201,440 bytes: 22 rounds are 4.80 GB and 23 are 5.02; a rank adds 65 MiB to a base of 0.93."""
    assert fit(MEDICAL, "rounds", to_mib(5 * 10**9)).value == 22
    assert fit(MEDICAL, "rank", to_mib(5 * 10**9)).value == 73
    # Four clients a round stay under 5 GB, and 49 clients at a tenth are four a round.
    clients = fit(MEDICAL, "clients", to_mib(5 * 10**9))
    assert (clients.value, clients.plan.clients_per_round) == (49, 4)


def test_the_cap_itself_fits() -> None:
    exact = plan(MEDICAL).total_bytes
    assert fit(MEDICAL, "rounds", to_mib(exact)).value == 10
    assert fit(MEDICAL, "rounds", to_mib(exact - 1)).value == 9


def test_nothing_fits() -> None:
    for what in PATHS:
        with pytest.raises(CapError, match="Not even") as caught:
            fit(MEDICAL, what, 1.0)
        assert caught.value.exit_code == 5
    demanding = load_config(recipe="aloe-8b-medical", settings=["federation.min_success=2"]).config
    with pytest.raises(CapError, match="min_success"):
        fit(demanding, "clients", 1500.0)  # one client a round would fit


@pytest.mark.parametrize("strategy", ["rolora", "scaffold", "ffa-lora", "fedex-lora"])
@pytest.mark.parametrize("what", PATHS)
def test_messages_that_change_over_the_rounds(strategy: str, what: What) -> None:
    config = load_config(recipe="aloe-8b-medical", settings=[f"strategy.name={strategy}"]).config
    found = fit(config, what, 5000.0)
    assert found.plan == plan(found.config)
    assert (
        found.plan.total_bytes
        <= 5000 * 2**20
        < found.next_bytes
        == plan(with_value(config, what, found.value + 1)).total_bytes
    )


def test_no_fewer_clients_than_the_strategy_needs() -> None:
    """Krum needs three replies even against nobody; under 1500 MiB there is one client a round."""
    settings = ["federation.clients=30", "strategy.name=krum", "strategy.malicious=0"]
    config = load_config(recipe="aloe-8b-medical", settings=settings).config
    assert fit(config, "clients", 4000.0).plan.clients_per_round == 3
    with pytest.raises(CapError, match="3 clients a round"):
        fit(config, "clients", 1500.0)


def test_rank_on_the_meta_device() -> None:
    """The tiny base's shapes come from its config.json: all-linear, DoRA included."""
    config = load_config(challenge="tiny", settings=["adapter.dora=true"]).config
    found = fit(config, "rank", to_mib(plan(config).total_bytes))
    assert found.value == config.adapter.rank
    assert found.plan == plan(config)


def test_grid_holds_every_plan_and_says_what_it_cannot_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(model: ModelConfig, adapter: AdapterConfig) -> None:
        raise MissingError(f"{model.base} cannot be reached")

    monkeypatch.setattr("fedtune.models.shapes._meta_form", offline)
    rows = grid(MEDICAL)
    for row in rows:
        if row.total_bytes is None:
            assert row.targets == "all-linear"
            assert "HPAI-BSC" in row.unknown_because
            continue
        for dtype, total in row.total_bytes.items():
            targets = '", "'.join(row.targets.split(","))
            settings = [
                f"adapter.rank={row.rank}",
                f'adapter.targets=["{targets}"]',
                f"communication.wire_dtype={dtype}",
            ]
            assert plan(load_config(recipe="aloe-8b-medical", settings=settings).config).total_bytes == total
    assert {row.targets for row in rows} == {"q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj", "all-linear"}


def test_grid_on_the_tiny_base_has_its_own_row() -> None:
    config = load_config(challenge="tiny", settings=["adapter.rank=5"]).config
    rows = grid(config)
    (own,) = [row for row in rows if (row.rank, row.targets) == (5, "all-linear")]
    assert own.total_bytes is not None
    assert own.total_bytes["float32"] == plan(config).total_bytes
    assert len({(row.rank, row.targets) for row in rows}) == len(rows)
