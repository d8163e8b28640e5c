"""Engines are found by name, and say the same of messages as the config does."""

from typing import get_args

import pytest

from fedtune.config.schema import FederationConfig, FedTuneConfig
from fedtune.federation.engines.base import Engine, engine_named

NAMES = get_args(FederationConfig.model_fields["engine"].annotation)


@pytest.mark.parametrize("name", NAMES)
def test_every_engine_of_the_config_is_found_by_its_name(name: str) -> None:
    engine = engine_named(name)
    assert isinstance(engine, Engine)
    assert type(engine).__module__ == f"fedtune.federation.engines.{name.replace('-', '_')}"
    config = FedTuneConfig(federation=FederationConfig(engine=name))  # type: ignore[arg-type]
    assert engine.joins_arrays == config.down_format.startswith("joined-") == config.up_format.startswith("joined-")
    assert engine.is_local == (name != "superlink")
