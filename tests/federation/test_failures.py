"""A client that keeps failing in the same way ends the run; one that is gone for a while does not."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from arithmetic import Tamper, client_app
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from test_rounds import HOSTILE, DoublingGrid, config_of, rounds_of, value

from fedtune.budget.fit import fit
from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import ConfigError, FederationError
from fedtune.federation.engines.in_process import InProcessGrid
from fedtune.federation.failures import FailureHistory, kind_of
from fedtune.runs.atomic import read_json_lines
from fedtune.runs.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("flower_identity")


def failing(*rounds: int, partition: int = 1) -> Tamper:
    """Client `partition` raises in the given rounds."""
    return lambda p, r, content: None if p == partition and r in rounds else content


@pytest.mark.parametrize("rounds", [(1, 2), (1, 4), (2, 3)])
def test_the_same_failure_in_two_rounds_ends_the_run(tmp_path: Path, rounds: tuple[int, int]) -> None:
    """Also with rounds between them in which the client replied: it would be left out again and again."""
    first, second = rounds
    run = rounds_of(tmp_path / "run", config_of("federation.rounds=5"), failing(*rounds))
    with pytest.raises(FederationError) as caught:
        run.run_rounds()
    assert f"Client 1 failed in the same way in rounds {first} and {second}: RuntimeError" in caught.value.message
    assert f"The state after round {second - 1} is saved." in caught.value.message
    assert f"fedtune train --resume {tmp_path / 'run'}" in caught.value.hint
    assert "federation.min_success=1" in caught.value.hint
    assert caught.value.exit_code == 4
    again = rounds_of(tmp_path / "run", config_of("federation.rounds=5"))
    assert again.done == second - 1
    again.run_rounds()
    assert again.done == 5


def test_a_failure_is_remembered_by_a_resumed_run(tmp_path: Path) -> None:
    """The first failure is in a committed round of the call before; what that call did not commit has not happened."""
    config = config_of("federation.rounds=3")
    stopped = rounds_of(tmp_path / "run", config, lambda p, r, c: None if r == 2 or (p, r) == (1, 1) else c)
    with pytest.raises(FederationError, match="All 3 clients of round 2"):
        stopped.run_rounds()
    with pytest.raises(FederationError, match="Client 1 failed in the same way in rounds 1 and 3"):
        rounds_of(tmp_path / "run", config, failing(3)).run_rounds()
    rounds_of(
        tmp_path / "run", config, failing(3, partition=0)
    ).run_rounds()  # of its failure in round 2 nothing was committed


@pytest.mark.parametrize("kind", ["nan", "broadcasting shape", "another round", "nan loss", "huge"])
def test_replies_that_are_rejected_alike_end_the_run_too(tmp_path: Path, kind: str) -> None:
    run = rounds_of(tmp_path / "run", config_of("federation.rounds=3"), HOSTILE[kind][0])
    with pytest.raises(
        FederationError, match="Client 1 failed in the same way in rounds 1 and 2: .*" + HOSTILE[kind][1]
    ):
        run.run_rounds()
    assert run.done == 1


def test_different_failures_do_not(tmp_path: Path) -> None:
    """Client 1 raises, then sends NaN; client 0 raises as client 1 did before."""
    nan = HOSTILE["nan"][0]

    def tamper(p: int, r: int, content):  # type: ignore[no-untyped-def]
        if (p, r) in ((1, 1), (0, 2)):
            return None
        return nan(p, r, content) if r == 3 else content

    run = rounds_of(tmp_path / "run", config_of("federation.rounds=3"), tamper)
    run.run_rounds()
    assert run.done == 3


@pytest.mark.parametrize("number", [1, 2])
def test_min_success_allows_it_and_survives_config_and_resume(tmp_path: Path, number: int) -> None:
    """Client 1 is left out of all rounds: each adds (1·1 + 3·3) / 4 = 2.5."""
    config = config_of("federation.rounds=3", f"federation.min_success={number}")
    read = FedTuneConfig.model_validate_json(config.model_dump_json(), strict=True)
    assert read.federation.min_success == number
    run = rounds_of(tmp_path / "run", read, failing(1, 2, 3))
    run.run_rounds()
    assert value(run) == pytest.approx(3 * 2.5)


def test_without_a_number_one_reply_is_enough_and_the_config_says_that_none_was_set(tmp_path: Path) -> None:
    config = config_of()
    assert (config.federation.min_success, config.federation.required_replies) == (None, 1)
    read = FedTuneConfig.model_validate_json(config.model_dump_json(), strict=True)
    assert read.federation.min_success is None
    rounds_of(tmp_path / "run", config_of("federation.rounds=1"), lambda p, r, c: c if p == 0 else None).run_rounds()
    with pytest.raises(ConfigError, match=r"min_success \(4\) is above"):
        config_of("federation.min_success=4")
    assert fit(load_config(challenge="tiny").config, "clients", 1000.0).value > 1


class GoneGrid(InProcessGrid):
    """Client 1 is gone: it gives no reply, or Flower replies in its place."""

    def __init__(self, code: int | None) -> None:
        super().__init__(client_app(), 3, {})
        self.code = code

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        for message in messages:
            if message.metadata.dst_node_id != 3 or message.metadata.message_type != "train":
                yield from super().send_and_receive([message])
            elif self.code is not None:
                list(super().send_and_receive([message]))
                reply = Message(Error(self.code, "the node is gone"), reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 3
                yield reply


GONE = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)


@pytest.mark.parametrize("code", [None, *GONE, ErrorCode.CLIENT_APP_CRASHED])
def test_an_absent_client_has_not_failed(tmp_path: Path, code: int | None) -> None:
    config = config_of("federation.rounds=3")
    run = rounds_of(tmp_path / "run", config, grid=GoneGrid(code))
    run.run_rounds()
    assert value(run) == pytest.approx(3 * 2.5)
    lines = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if line["partition"] == 1]
    assert [(line["status"], line.get("absent")) for line in lines] == [("error", True)] * 3
    assert not FailureHistory(lines)._rounds
    again = rounds_of(tmp_path / "run", config, grid=GoneGrid(code))
    assert not again.failures._rounds


def test_the_same_error_code_from_the_client_itself_is_a_failure(tmp_path: Path) -> None:
    run = rounds_of(
        tmp_path / "run", config_of("federation.rounds=3"), grid=GoneGrid(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
    )
    with pytest.raises(FederationError, match="Client 1 failed in the same way in rounds 1 and 2: the node is gone"):
        run.run_rounds()


def test_a_second_reply_is_no_failure(tmp_path: Path) -> None:
    run = rounds_of(tmp_path / "run", config_of("federation.rounds=3"), grid=DoublingGrid(client_app(), 3, {}))
    run.run_rounds()
    assert value(run) == pytest.approx(3 * 14 / 6)


def test_numbers_do_not_make_failures_different() -> None:
    assert kind_of("the reply is 1234 bytes; at most 99 were expected") == kind_of(
        "the reply is 7 bytes; at most 8 were expected"
    )
    assert kind_of("KeyError") != kind_of("IndexError")


def test_all_clients_failing_alike_is_said_with_a_number_set_too(tmp_path: Path) -> None:
    config = config_of("federation.min_success=1", "federation.rounds=1")
    with pytest.raises(FederationError, match="All 3 clients of round 1 failed in the same way: RuntimeError"):
        rounds_of(tmp_path / "run", config, lambda p, r, c: None).run_rounds()


def test_all_clients_absent_is_not_called_a_failure(tmp_path: Path) -> None:
    class NobodyGrid(InProcessGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
            for message in messages:
                if message.metadata.message_type != "train":
                    yield from super().send_and_receive([message])

    run = rounds_of(tmp_path / "run", config_of(), grid=NobodyGrid(client_app(), 3, {}))
    with pytest.raises(FederationError, match=r"Round 1 has 0 usable replies of 3.*no reply within"):
        run.run_rounds()


def test_the_warning_names_the_file_with_the_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run")
    run.log_file.write_text("a traceback\n")
    rounds_of(run.path, config_of("federation.rounds=1"), failing(1)).run_rounds()
    said = [record.getMessage() for record in caplog.records if record.name == "fedtune.federation.rounds"]
    assert said == [f"Round 1: client 1 failed: RuntimeError; the traceback is in {run.log_file}."]
