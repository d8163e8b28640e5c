"""Facts about keys stand on the keys: which leave in a package, which a resumed run may change."""

from __future__ import annotations

import pytest
from pydantic.fields import FieldInfo

from fedtune.config.base import Key, facts_of, keys_of
from fedtune.config.schema import FedTuneConfig

KEYS = dict(keys_of(FedTuneConfig))


def holds_text(info: FieldInfo) -> bool:
    """Whether users may write any text, such as a path or an address."""
    return info.annotation is str or info.annotation == (str | None)


@pytest.mark.parametrize("path", [path for path, info in KEYS.items() if holds_text(info)])
def test_a_key_of_free_text_says_how_it_leaves(path: str) -> None:
    """A new key with a path or an address must say whether it may be published."""
    assert any(isinstance(each, Key) for each in KEYS[path].metadata), f"{path} needs Key(publishable=…)"


def test_paths_and_addresses_do_not_leave_whole() -> None:
    guarded = {path: facts_of(info).publishable for path, info in KEYS.items() if facts_of(info).publishable != "whole"}
    assert guarded == {
        "model.base": "name",
        "data.source": "name",
        "federation.ray_address": "never",
        "federation.superlink": "never",
        "federation.superlink_ca": "never",
    }


def test_what_a_resumed_run_may_change_moves_no_bit() -> None:
    free = {path for path, info in KEYS.items() if facts_of(info).resumable}
    assert {"communication.cap_mib", "federation.engine", "privacy.epsilon"} <= free
    assert not free & {"seed", "adapter.rank", "training.batch_size", "communication.codec", "privacy.noise_multiplier"}
