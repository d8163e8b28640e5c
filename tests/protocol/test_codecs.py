"""Packed formats: hand-computed blocks, error bounds, sizes, hostile bytes; error feedback and the client's state."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.budget.plan import plan
from fedtune.config.load import load_config
from fedtune.evaluation.driver import compare
from fedtune.federation.client import RESIDUAL, _reply
from fedtune.federation.client_state import ClientState
from fedtune.federation.node.policy import NODE_KEY, NodeSettings
from fedtune.federation.reply_validator import added
from fedtune.federation.train import train
from fedtune.protocol.arrays import decode, encode
from fedtune.protocol.codecs import pack, unpack
from fedtune.protocol.messages import WireError
from fedtune.protocol.wire_format import PACKED, PACKED_FORMATS, wire_bytes

SHAPES = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple), min_size=1, max_size=4).map(
    lambda shapes: {f"t{number}": shape for number, shape in enumerate(shapes)}
)
FORMS = st.sampled_from(sorted(PACKED_FORMATS))
DTYPES = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STEPS = {"packed-int8": 127, "packed-int4": 7}


def values(shapes: dict[str, tuple[int, ...]], seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def test_int8_by_hand() -> None:
    data = pack({"x": torch.tensor([1.0, -0.5, 0.0])}, "packed-int8")
    assert data == np.float32(1 / 127).tobytes() + bytes([127, 256 - 64, 0])
    assert unpack(data, {"x": (3,)}, "packed-int8")["x"].tolist() == pytest.approx([1.0, -64 / 127, 0.0])


def test_int4_by_hand() -> None:
    """Scale 1; steps 7, -3, 2 stand as 15, 5, 10, the first in the low half; the last half byte stands for 0."""
    data = pack({"x": torch.tensor([7.0, -3.0, 2.0])}, "packed-int4")
    assert data == np.float32(1).tobytes() + bytes([15 | 5 << 4, 10 | 8 << 4])
    assert unpack(data, {"x": (3,)}, "packed-int4")["x"].tolist() == [7.0, -3.0, 2.0]


@settings(deadline=None)
@given(shapes=SHAPES, form=FORMS, seed=st.integers(0, 99), power=st.integers(-30, 10))
def test_every_value_is_within_half_a_step(
    shapes: dict[str, tuple[int, ...]], form: str, seed: int, power: int
) -> None:
    tensors = values(shapes, seed, 10.0**power)
    record = encode(tensors, form)
    assert record.count_bytes() == wire_bytes(shapes, form)
    assert list(record) == [PACKED]
    read = decode(record, shapes, form)
    for name, tensor in tensors.items():
        if dtype := DTYPES.get(PACKED_FORMATS[form].dtype):
            assert torch.equal(read[name], tensor.to(dtype).float())
            continue
        error = (read[name] - tensor).abs().flatten()
        for start in range(0, error.numel(), PACKED_FORMATS[form].block):
            block = slice(start, start + PACKED_FORMATS[form].block)
            largest = tensor.flatten()[block].abs().max()
            assert error[block].max() <= largest / STEPS[form] * 0.5001 + 1e-44


@settings(deadline=None)
@given(shapes=SHAPES, form=FORMS, seed=st.integers(0, 99))
def test_bytes_that_are_not_of_the_agreed_length_are_refused(
    shapes: dict[str, tuple[int, ...]], form: str, seed: int
) -> None:
    record = encode(values(shapes, seed), form)
    with pytest.raises(WireError):
        decode(record, {**shapes, "more": (3,)}, form)
    with pytest.raises(WireError):
        decode(encode(values(shapes, seed), "float32"), shapes, form)
    with pytest.raises(WireError):
        decode(ArrayRecord(), shapes, form)


@given(data=st.binary(min_size=4 + 5, max_size=4 + 5))
def test_any_bytes_of_the_right_length_decode_to_numbers_or_to_what_the_screen_refuses(data: bytes) -> None:
    assert unpack(data, {"x": (5,)}, "packed-int8")["x"].shape == (5,)


def test_what_is_not_finite_stays_so() -> None:
    """Neither side turns a broken adapter into a plausible one."""
    for bad in (float("nan"), float("inf")):
        data = pack({"x": torch.tensor([1.0, bad])}, "packed-int8")
        assert not unpack(data, {"x": (2,)}, "packed-int8")["x"].isfinite().all()


def test_int8_on_gaussian_data_is_a_quarter_of_the_bytes_at_under_a_percent_of_error() -> None:
    shapes = {f"layer{number}": (32, 4096) for number in range(4)}
    tensors = values(shapes, 0)
    assert wire_bytes(shapes, "float32") / wire_bytes(shapes, "packed-int8") > 3.9
    read = decode(encode(tensors, "packed-int8"), shapes, "packed-int8")
    error = sum(float((read[n] - t).square().sum()) for n, t in tensors.items())
    assert (error / sum(float(t.square().sum()) for t in tensors.values())) ** 0.5 < 0.01


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_error_feedback_loses_nothing_over_rounds(codec: str) -> None:
    """What was sent plus what is owed is what was meant, after any number of rounds."""
    config = load_config(settings=[f"communication.uplink_codec={codec}"]).config
    shapes = {"w": (50, 7)}
    start = values(shapes, 0)
    kept: dict[str, torch.Tensor] = {}
    sent, meant = torch.zeros(50, 7), torch.zeros(50, 7)
    for number in range(1, 9):
        outcome = {"w": start["w"] + 0.1 * values(shapes, number)["w"]}
        record, kept = _reply(outcome, start, config, shapes, kept)
        received = added(decode(record, shapes, config.up_format), start)
        sent += received["w"] - start["w"]
        meant += outcome["w"] - start["w"]
        assert torch.allclose(sent + kept[RESIDUAL + "w"], meant, atol=1e-5)
    assert kept[RESIDUAL + "w"].abs().max() < 0.1


@pytest.mark.parametrize(("engine", "form"), [("in-process", "float32"), ("superlink", "joined-float32")])
def test_without_a_codec_the_adapter_itself_is_sent_and_nothing_owed(engine: str, form: str) -> None:
    config = load_config(settings=[f"federation.engine={engine}"]).config
    tensors = values({"w": (3, 2)}, 0)
    record, owed = _reply(tensors, values({"w": (3, 2)}, 1), config, {"w": (3, 2)}, {})
    assert torch.equal(decode(record, {"w": (3, 2)}, form)["w"], tensors["w"])
    assert owed == {}


def context(run_config: dict[str, str], node_config: dict[str, str] | None = None) -> Context:
    return Context(
        run_id=7, node_id=2, node_config=dict(node_config or {}), state=RecordDict(), run_config=dict(run_config)
    )


def contexts(tmp_path: Path) -> list[Context]:
    settings_ = NodeSettings(data="/x.jsonl", base="builtin:tiny", state=str(tmp_path / "node"))
    return [
        context({"run-dir": str(tmp_path / "run")}),
        context({"run-name": "../../etc"}, {NODE_KEY: settings_.to_json()}),
        context({}),
    ]


@pytest.mark.parametrize("place", range(3))
def test_a_client_takes_up_the_state_of_an_earlier_round(tmp_path: Path, place: int) -> None:
    state = ClientState(contexts(tmp_path)[place], partition=4)
    assert state.before(1) == {}
    for number in (1, 3, 4, 8):
        state.keep(number, {"w": torch.tensor([[float(number), 0.5]])})
    assert [state.before(number).get("w", torch.zeros(1, 1))[0, 0].item() for number in (9, 8, 5, 4)] == [8, 4, 4, 3]
    assert state.before(3) == {}, "only the last few are kept"
    state.keep(8, {"w": torch.tensor([[80.0]])})
    assert state.before(9)["w"].item() == 80
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    assert len(written) == (0 if place == 2 else 3)
    assert all(path.startswith(("run/state/clients/4/", "node/")) for path in written)


def test_a_node_keeps_nothing_where_its_owner_does_not_say(tmp_path: Path) -> None:
    settings_ = NodeSettings(data="/x.jsonl", base="builtin:tiny")
    state = ClientState(context({"run-dir": str(tmp_path)}, {NODE_KEY: settings_.to_json()}), 0)
    state.keep(1, {"w": torch.ones(2)})
    assert not list(tmp_path.rglob("*"))
    assert torch.equal(state.before(2)["w"], torch.ones(2))


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path) -> None:
    state = ClientState(contexts(tmp_path)[0], 0)
    state.keep(1, {"w": torch.ones(2)})
    state.keep(2, {"w": torch.zeros(2)})
    assert state.folder is not None
    (state.folder / "round-0002.safetensors").write_bytes(b"torn")
    assert torch.equal(state.before(3)["w"], torch.ones(2))


@pytest.mark.parametrize(
    ("recipe", "settings_", "fewer"),
    [
        ("aloe-8b-medical", ("communication.codec=int8",), 3.8),
        ("aloe-8b-medical", ("communication.codec=int4",), 7.0),
        ("aloe-8b-medical", ("communication.codec=int8", "strategy.name=ffa-lora"), 7.0),
        ("internlm3-8b-general-nlp", ("communication.codec=int8", "strategy.name=ffa-lora"), 7.0),
    ],
)
def test_bytes_saved_on_models_with_grouped_queries(recipe: str, settings_: tuple[str, ...], fewer: float) -> None:
    plain, small = (plan(load_config(recipe=recipe, settings=list(each)).config) for each in ((), settings_))
    assert plain.total_bytes / small.total_bytes >= fewer


@pytest.mark.slow
def test_int8_both_ways_learns_as_float32_does(tmp_path: Path) -> None:
    """Issue: at most one point lost and 3.8 times fewer bytes. Seeds differ by more than codecs: the mean of three is held."""
    accuracies: dict[str, list[float]] = {"none": [], "int8": []}
    used: dict[str, int] = {}
    for codec, found in accuracies.items():
        for seed in (42, 1, 7):
            config = load_config(challenge="tiny", settings=[f"communication.codec={codec}", f"seed={seed}"]).config
            result = train(config, out=tmp_path / codec / str(seed))
            (scored,) = compare(config, {"federation": result.adapter}, tmp_path / codec / f"scores-{seed}")[-1:]
            found.append(scored.score.accuracy)
            used[codec] = result.used_bytes
    assert used["none"] / used["int8"] >= 3.8
    assert sum(accuracies["int8"]) / 3 >= sum(accuracies["none"]) / 3 - 0.01, accuracies
