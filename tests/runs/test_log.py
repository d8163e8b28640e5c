"""A run's debug.log: what is written there, what stays off the terminal, and that nothing is left changed."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fedtune.runs import log as module
from fedtune.runs.log import FORWARDED, LIBRARIES, RunLog, current_log, run_log, silence_libraries

ours = logging.getLogger("fedtune.somewhere")


def state_of_logging() -> list[object]:
    loggers = [logging.getLogger(name) for name in ("", "fedtune", "py.warnings", *LIBRARIES)]
    handlers = [(logger.level, logger.propagate, set(logger.handlers)) for logger in loggers]
    filters = [list(handler.filters) for logger in loggers for handler in logger.handlers]
    return [handlers, filters, warnings.showwarning, list(warnings.filters)]


def test_everything_of_fedtune_and_warnings_of_libraries(tmp_path: Path) -> None:
    """Each record is one line with time, level, process and logger; a traceback follows its line."""
    path = tmp_path / "debug.log"
    before = state_of_logging()
    with run_log(path):
        assert current_log() == path
        ours.debug("a detail, %d", 7)
        for name in ("urllib3.util", "transformers.models.x", "flwr", "datasets"):
            logging.getLogger(name).info("chatter of %s", name)
            logging.getLogger(name).warning("advice of %s", name)
        try:
            {}["needle"]
        except KeyError:
            ours.debug("failed", exc_info=True)
    assert current_log() is None
    assert state_of_logging() == before
    text = path.read_text()
    first = text.splitlines()[0]
    assert f"DEBUG [{os.getpid()}] fedtune.somewhere: a detail, 7" in first
    assert first[:2] == "20"
    for name in ("urllib3.util", "transformers.models.x", "flwr", "datasets"):
        assert text.count(f"WARNING [{os.getpid()}] {name}: advice of {name}\n") == 1
    assert "chatter" not in text
    assert "Traceback (most recent call last)" in text
    assert "KeyError: 'needle'" in text


def test_a_later_block_appends(tmp_path: Path) -> None:
    for number in (1, 2):
        with run_log(tmp_path / "debug.log"):
            ours.warning("time %d", number)
    assert [line[-6:] for line in (tmp_path / "debug.log").read_text().splitlines()] == ["time 1", "time 2"]


def test_records_before_the_file_is_named_are_written_when_it_is(tmp_path: Path) -> None:
    with run_log() as log:
        ours.warning("early")
        assert not list(tmp_path.iterdir())
        log.write_to(tmp_path / "debug.log")
        ours.warning("late")
        with run_log(tmp_path / "debug.log") as same:  # a client of the same process
            assert same is log
            ours.warning("later")
    assert [line.split(": ")[1] for line in (tmp_path / "debug.log").read_text().splitlines()] == [
        "early",
        "late",
        "later",
    ]


def test_python_warnings_are_logged_and_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_log(tmp_path / "debug.log"), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = module._log_warning  # catch_warnings put pytest's back
        warnings.warn("an odd thing", UserWarning, stacklevel=1)
    text = (tmp_path / "debug.log").read_text()
    assert "py.warnings: " in text
    assert f"{Path(__file__).name}:" in text
    assert "UserWarning: an odd thing" in text
    assert capsys.readouterr().err == ""


def test_a_librarys_message_is_written_once_and_fedtunes_every_time(tmp_path: Path) -> None:
    """bitsandbytes warns of a cast in every pass of every layer."""
    with run_log(tmp_path / "debug.log"):
        for _ in range(100):
            logging.getLogger("bitsandbytes.autograd").warning("inputs will be cast from %s", "float32")
            ours.warning("again")
    lines = (tmp_path / "debug.log").read_text().splitlines()
    assert sum("will be cast" in line for line in lines) == 1
    assert sum("again" in line for line in lines) == 100


def test_a_message_with_wrong_arguments_ends_nothing(tmp_path: Path) -> None:
    log = RunLog()
    log.write_to(tmp_path / "debug.log")
    log.handle(logging.makeLogRecord({"name": "flwr", "levelno": 30, "msg": "%d and %d", "args": ("one",)}))
    assert "'%d and %d' could not be formatted" in (tmp_path / "debug.log").read_text()


@pytest.mark.parametrize("kind", ["a folder", "in no folder", "a full disk"])
def test_a_log_that_cannot_be_written_ends_nothing_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = {"a folder": tmp_path, "in no folder": tmp_path / "no" / "debug.log", "a full disk": Path("/dev/full")}[kind]
    if not path.parent.exists() and kind == "a full disk":
        pytest.skip("this system has no /dev/full")
    with run_log(path):
        for _ in range(3):
            ours.warning("something")
    said = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(said) == 1
    assert str(path) in said[0]


def test_what_another_process_has_written_is_not_written_again(tmp_path: Path) -> None:
    with run_log(tmp_path / "debug.log"):
        ours.warning("theirs", extra={FORWARDED: True})
    assert not (tmp_path / "debug.log").exists()


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "debug.log"
    code = (
        "import logging, pathlib, sys\n"
        "from fedtune.runs.log import run_log\n"
        "with run_log(pathlib.Path(sys.argv[1])):\n"
        "    for number in range(200):\n"
        "        logging.getLogger('fedtune.x').debug('%s %d', 'y' * 300, number)\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 600
    assert all("fedtune.x: " + "y" * 300 + " " in line for line in lines)


def run_script(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script outside of pytest, whose own handlers change what Python's logging does."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
    )


def test_a_user_of_the_library_sees_fedtunes_warnings_and_no_more(tmp_path: Path) -> None:
    """Without handlers of their own, as Python's logging does by default; details go to the file alone."""
    done = run_script(
        "import logging, pathlib, sys, warnings\n"
        "from fedtune.runs.log import run_log\n"
        "logger = logging.getLogger('fedtune.x')\n"
        "with run_log(pathlib.Path(sys.argv[1])):\n"
        "    logger.warning('to know'); logger.debug('a detail')\n"
        "    logging.getLogger('urllib3').warning('advice'); warnings.warn('odd')\n"
        "logger.debug('afterwards'); warnings.warn('printed')\n",
        str(tmp_path / "debug.log"),
    )
    assert done.stderr.splitlines()[0] == "to know"
    assert "printed" in done.stderr
    assert not [word for word in ("detail", "advice", "odd", "afterwards") if word in done.stderr]
    text = (tmp_path / "debug.log").read_text()
    assert [word in text for word in ("to know", "a detail", "advice", "odd", "printed")] == [True] * 4 + [False]


def test_a_users_own_handlers_get_no_details_that_they_did_not_ask_for(tmp_path: Path) -> None:
    code = (
        "import logging, pathlib, sys\n"
        "from fedtune.runs.log import run_log\n"
        "logging.basicConfig(format='seen %(message)s', level=getattr(logging, sys.argv[2]))\n"
        "with run_log(pathlib.Path(sys.argv[1])):\n"
        "    logging.getLogger('fedtune.x').debug('a detail'); logging.getLogger('fedtune.x').warning('to know')\n"
        "    logging.getLogger('flwr').info('chatter')\n"
    )
    for level, expected in (("WARNING", ["seen to know"]), ("DEBUG", ["seen a detail", "seen to know"])):
        done = run_script(code, str(tmp_path / level), level)
        assert done.stderr.splitlines() == expected
        assert "a detail" in (tmp_path / level).read_text()


def test_silence_libraries_routes_warnings_to_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Log lines and Python warnings, also where warnings are errors; bars are off; all of it is put back."""
    import datasets
    from transformers.utils import logging as transformers_logging

    before = state_of_logging()
    bars = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    with run_log(tmp_path / "debug.log"), silence_libraries():
        transformers_logging.get_logger("transformers.x").warning("loaded oddly")
        warnings.warn("an old argument", FutureWarning, stacklevel=1)
        assert not transformers_logging.is_progress_bar_enabled()
        assert datasets.are_progress_bars_disabled()
    assert (transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()) == bars
    assert state_of_logging() == before
    text = (tmp_path / "debug.log").read_text()
    assert "transformers.x: loaded oddly" in text
    assert "FutureWarning: an old argument" in text
    assert capsys.readouterr().err == ""


def test_silence_without_a_log_prints_nothing_and_errors_still_raise(capfd: pytest.CaptureFixture[str]) -> None:
    before = state_of_logging()
    with pytest.raises(RuntimeError, match="real"), silence_libraries():  # noqa: PT012
        warnings.warn("odd", stacklevel=1)
        logging.getLogger("huggingface_hub.x").warning("odd")
        raise RuntimeError("real")
    assert state_of_logging() == before
    assert capfd.readouterr().err == ""


def test_the_log_of_a_node_is_for_its_owner_alone(tmp_path: Path) -> None:
    with run_log(tmp_path / "debug.log", mode=0o600):
        ours.warning("private")
    assert (tmp_path / "debug.log").stat().st_mode & 0o777 == 0o600
    assert RunLog().path is None
