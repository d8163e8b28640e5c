"""The screen by itself: limits to the byte, values of every kind, and what a rejected text looks like."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from fedtune.federation import reply_validator as module
from fedtune.federation.reply_validator import Accepted, Client, Expected, Refused, ReplyValidator, printable
from fedtune.protocol.arrays import encode
from fedtune.protocol.messages import ARRAYS, METRICS
from fedtune.protocol.wire_format import wire_bytes

pytestmark = pytest.mark.usefixtures("flower_identity")

SHAPES = {"a": (2, 3), "b": (4,)}
CLIENT = Client(node=7, partition=2, rows=10)


def screen_of(
    form: str = "float32", *, reference: Mapping[str, torch.Tensor] | None = None, **options: bool
) -> ReplyValidator:
    return ReplyValidator(3, [Expected(CLIENT, SHAPES, dict(reference or {}))], form, 1000, **options)


def reply(form: str = "float32", *, value: float = 1.0, error: Error | None = None, **metrics: object) -> Message:
    """A reply of the client to round 3 with all values `value`; `metrics` of None are left out."""
    question = Message(RecordDict(), CLIENT.node, "train")
    numbers = {"server-round": 3, "num-examples": 10, "train-loss": 0.5}
    numbers |= {name.replace("_", "-"): number for name, number in metrics.items()}  # type: ignore[misc]
    known = MetricRecord({name: number for name, number in numbers.items() if number is not None})
    arrays = encode({name: torch.full(shape, value) for name, shape in SHAPES.items()}, form)
    answer = Message(error or RecordDict({ARRAYS: arrays, METRICS: known}), reply_to=question)
    answer.metadata.__dict__["_src_node_id"] = CLIENT.node
    return answer


def reason(message: Message, **options: bool) -> str:
    verdict = screen_of(**options).validate(message)
    assert isinstance(verdict, Refused)
    assert (verdict.client, verdict.status, verdict.absent) == (CLIENT, "refused", False)
    return verdict.reason


def test_what_is_in_order_is_accepted() -> None:
    verdict = screen_of().validate(reply())
    assert isinstance(verdict, Accepted)
    assert (verdict.client, verdict.report.examples) == (CLIENT, 10)
    assert all(torch.equal(verdict.tensors[name], torch.ones(shape)) for name, shape in SHAPES.items())


def test_a_node_that_was_not_asked() -> None:
    message = reply()
    message.metadata.__dict__["_src_node_id"] = 8
    assert screen_of().validate(message) == Refused(None, "this node was not asked in this round")


def test_the_size_limit_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays' counted bytes, 512 for each array, and 1 MiB; it is held before anything is decoded."""
    largest = wire_bytes(SHAPES, "float32") + 2 * 512 + 2**20
    monkeypatch.setattr(module, "serialised_bytes", lambda message: largest)
    assert isinstance(screen_of().validate(reply()), Accepted)
    monkeypatch.setattr(module, "serialised_bytes", lambda message: largest + 1)
    monkeypatch.setattr(module, "decode", None)
    assert reason(reply()) == f"the reply is {largest + 1} bytes; at most {largest} were expected"


@pytest.mark.parametrize("examples", [0, -1, 11, 1e12, math.nan, math.inf, -math.inf, None, [10], [1.0, 2.0]])
def test_examples_that_cannot_be(examples: object) -> None:
    assert reason(reply(num_examples=examples)) == f"num-examples is {examples!r}, not a number above 0 and at most 10"


def test_the_most_examples_of_any_client() -> None:
    screen = ReplyValidator(3, [Expected(CLIENT, SHAPES, {})], "float32", 5)
    verdict = screen.validate(reply())
    assert isinstance(verdict, Refused)
    assert "at most 5" in verdict.reason
    assert isinstance(
        ReplyValidator(3, [Expected(CLIENT, SHAPES, {})], "float32", 5).validate(reply(num_examples=5)), Accepted
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf, [0.5]])
@pytest.mark.parametrize("with_loss", [True, False])
def test_a_loss_that_is_told_is_a_finite_number(loss: object, with_loss: bool) -> None:
    assert reason(reply(train_loss=loss), with_loss=with_loss) == f"train-loss is {loss!r}, not a finite number"


def test_a_loss_is_told_unless_clients_keep_it() -> None:
    assert reason(reply(train_loss=None)) == "train-loss is None, not a finite number"
    assert isinstance(screen_of(with_loss=False).validate(reply(train_loss=None)), Accepted)
    assert isinstance(screen_of(with_loss=False).validate(reply(train_loss=1)), Accepted)


def test_packed_tensors_are_differences_from_the_reference_and_others_whole() -> None:
    """`a` has a reference of 10, `b` none."""
    reference = {"a": torch.full((2, 3), 10.0)}
    verdict = screen_of("packed-int8", reference=reference).validate(reply("packed-int8", value=1.0))
    assert isinstance(verdict, Accepted)
    assert torch.equal(verdict.tensors["a"], torch.full((2, 3), 11.0))
    assert torch.equal(verdict.tensors["b"], torch.ones(4))
    whole = screen_of("float32", reference=reference).validate(reply("float32", value=1.0))
    assert isinstance(whole, Accepted)
    assert torch.equal(whole.tensors["a"], torch.ones(2, 3))


def test_a_sum_that_is_not_finite_is_rejected_too() -> None:
    reference = {"a": torch.full((2, 3), 3e38)}
    verdict = screen_of("packed-bf16", reference=reference).validate(reply("packed-bf16", value=3e38))
    assert isinstance(verdict, Refused)
    assert verdict.reason == "a holds values that are not finite"


def test_one_bad_value_among_good_ones_is_enough() -> None:
    message = reply()
    array = np.zeros(4, "float32")
    array[3] = np.nan
    message.content.array_records[ARRAYS]["b"] = Array(array)
    assert reason(message) == "b holds values that are not finite"


def test_records_of_another_kind() -> None:
    message = reply()
    for content in (RecordDict({ARRAYS: MetricRecord({"x": 1}), METRICS: MetricRecord({"x": 1})}), RecordDict()):
        answer = Message(content, reply_to=Message(RecordDict(), CLIENT.node, "train"))
        answer.metadata.__dict__["_src_node_id"] = message.metadata.src_node_id
        assert reason(answer) == "the reply lacks its 'arrays' record"
    swapped = RecordDict({ARRAYS: ArrayRecord(), METRICS: ArrayRecord()})
    answer = Message(swapped, reply_to=Message(RecordDict(), CLIENT.node, "train"))
    answer.metadata.__dict__["_src_node_id"] = CLIENT.node
    assert reason(answer) == "the reply lacks its 'metrics' record"


@pytest.mark.parametrize(
    ("code", "text", "expected", "absent"),
    [(2, "KeyError", "KeyError", False), (2, "", "no reason given", False), (1, "a\n\x1b[31mb", "a [31mb", False)],
)
def test_an_error_reply(code: int, text: str, expected: str, absent: bool) -> None:
    verdict = screen_of().validate(reply(error=Error(code, text)))
    assert verdict == Refused(CLIENT, expected, "error", absent)


def test_a_second_reply_is_rejected_whatever_the_first_was() -> None:
    screen = screen_of()
    assert isinstance(screen.validate(reply(error=Error(2, "KeyError"))), Refused)
    assert screen.validate(reply()) == Refused(CLIENT, "this client has already replied in this round")


def test_a_clients_text_is_one_line_and_not_long() -> None:
    assert printable("x" * 300) == "x" * 300
    assert printable("x" * 301) == "x" * 300 + " …"
    assert printable("abc", 2) == "ab …"
    assert printable("  a\tb\r\nc\u0000\u0085d é 漢 ") == "a b c d é 漢"
