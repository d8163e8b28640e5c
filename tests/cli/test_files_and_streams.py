"""Files and streams as users have them: changed data, torn lines, full disks, closed streams, `~` in paths."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_train_command import the_run, typed

from fedtune.budget.ledger import read_ledger
from fedtune.config.schema import FedTuneConfig
from fedtune.data.source import BUILTIN_FOLDER
from fedtune.federation.train import train
from fedtune.models import hub
from fedtune.runs.atomic import read_json_lines
from fedtune.runs.directory import RunDirectory

SMALL = [
    *("--set", "model.quantization=none", "--set", "adapter.rank=4", "--set", "federation.clients=4"),
    *("--set", "federation.rounds=3", "--set", "federation.fraction=0.5", "--set", "training.max_steps=2"),
    *("--set", "training.batch_size=4", "--set", "training.sequence_length=64", "--set", "checkpoint.save_every=2"),
]
TINY = ["--set", "model.base=builtin:tiny"]
CAP = ["--set", "communication.cap_mib=0.13"]
"""Enough for the first round of two clients."""


def rows(folder: Path, name: str = "rows.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    shutil.copy(BUILTIN_FOLDER / "train.jsonl", path)
    return path


def weights(run: RunDirectory) -> bytes:
    return (run.adapter_folder(3) / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    rows(folder)
    done = typed("train", "--data", "rows.jsonl", *SMALL, *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    return weights(the_run(folder))


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a base of its own, and a run that stopped at its cap after the first round."""
    folder = tmp_path_factory.mktemp("stopped")
    rows(folder)
    shutil.copytree(Path(hub.__file__).parent / "builtin" / "tiny", folder / "base")
    words = ["--data", "rows.jsonl", *SMALL, "--set", "model.base=base", *CAP]
    done = typed("train", *words, cwd=folder)
    assert done.returncode == 5, done.stderr
    assert the_run(folder).committed_rounds() == 1
    return folder


@pytest.fixture
def stopped(stopped_once: Path) -> Iterator[Path]:
    """The same, as it was, for a test that changes it."""
    copy = stopped_once.with_name(f"{stopped_once.name}-copy")
    shutil.copytree(stopped_once, copy)
    yield stopped_once
    shutil.rmtree(stopped_once)
    copy.rename(stopped_once)


GO_ON = ["--set", "communication.cap_mib=100.0"]


def test_a_relative_path_means_the_same_file_from_every_folder(
    stopped: Path, uninterrupted: bytes, tmp_path: Path
) -> None:
    run = the_run(stopped)
    config = run.read_config()
    assert (config.data.source, config.model.base) == (str(stopped / "rows.jsonl"), str(stopped / "base"))
    # Data of the same name in another folder is not what the run means.
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 40)
    done = typed("train", "--resume", str(run.path), *GO_ON, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert weights(run) == uninterrupted
    assert typed("budget", str(run.path), cwd=tmp_path).returncode == 0
    assert typed("export", str(run.path), "--dry-run", "--tokenizer", cwd=tmp_path).returncode == 0
    done = typed("export", str(run.path), "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in (path for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"):
        assert str(stopped) not in path.read_text(), path.name


def test_other_data_under_a_resumed_run_is_refused(stopped: Path) -> None:
    run = the_run(stopped)
    data = stopped / "rows.jsonl"
    data.write_bytes(data.read_bytes().replace(b"a", b"e", 1))  # the same size
    done = typed("train", "--resume", *GO_ON, cwd=stopped)
    assert done.returncode == 2
    assert re.search(r"data file rows\.jsonl: [\d,]+ bytes, sha256 \w{12}… when the run was started", done.stderr)
    assert run.committed_rounds() == 1
    data.unlink()
    done = typed("train", "--resume", *GO_ON, cwd=stopped)
    assert done.returncode == 3
    assert "rows.jsonl" in done.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_another_base_under_a_resumed_run_is_refused(stopped: Path, name: str) -> None:
    file = stopped / "base" / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1 if name == "model.safetensors" else 0
    file.write_bytes(bytes(data) if name == "model.safetensors" else bytes(data) + b"\n")
    done = typed("train", "--resume", *GO_ON, cwd=stopped)
    assert done.returncode == 2
    assert f"base model's {name}: " in done.stderr


def test_moved_data_goes_on_where_it_is_named(stopped: Path, uninterrupted: bytes, tmp_path: Path) -> None:
    shutil.move(stopped / "rows.jsonl", tmp_path / "moved.jsonl")
    done = typed("train", "--resume", "--data", str(tmp_path / "moved.jsonl"), *GO_ON, cwd=stopped)
    assert done.returncode == 0, done.stderr
    run = the_run(stopped)
    assert weights(run) == uninterrupted
    assert run.read_config().data.source == str(tmp_path / "moved.jsonl")
    done = typed("train", "--resume", "--data", str(rows(tmp_path, "x.csv")), *GO_ON, cwd=stopped)
    assert done.returncode == 2


def test_a_run_without_fingerprints_goes_on_with_a_warning(stopped: Path) -> None:
    the_run(stopped).inputs_file.unlink()
    done = typed("train", "--resume", *GO_ON, cwd=stopped)
    assert done.returncode == 0
    assert "inputs.json is not there" in done.stderr


def test_a_folders_files_are_fingerprinted_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "clients").mkdir(exist_ok=True)
        rows(tmp_path / "clients", f"{name}.jsonl")
    words = ["--data", "clients", *SMALL, *TINY, *CAP, "--set", "federation.fraction=1.0"]
    done = typed("train", *words, cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert json.loads(the_run(tmp_path).inputs_file.read_text())["data"].keys() == {"a.jsonl", "b.jsonl"}
    (tmp_path / "clients" / "b.jsonl").rename(tmp_path / "clients" / "c.jsonl")
    done = typed("train", "--resume", *GO_ON, cwd=tmp_path)
    assert done.returncode == 3
    assert "data file b.jsonl: there when the run was started, missing now" in done.stderr
    assert "data file c.jsonl: not there when the run was started" in done.stderr


def test_a_file_changed_between_two_runs_of_one_process_is_read_again(tmp_path: Path) -> None:
    """What a process holds of a file must not outlive the file."""
    data = rows(tmp_path)
    config = FedTuneConfig.model_validate(
        {
            "data": {"source": str(data)},
            "model": {"base": "builtin:tiny", "quantization": "none"},
            "federation": {"clients": 2, "rounds": 1, "fraction": 0.5},
            "training": {"max_steps": 1, "batch_size": 2, "sequence_length": 64},
        }
    )
    first = train(config, out=tmp_path / "runs")
    lines = data.read_text().splitlines()
    data.write_text("\n".join(lines[: len(lines) // 2]))
    second = train(config, out=tmp_path / "runs")
    counts = [read_json_lines(result.run / "metrics.jsonl")[0]["num_examples"] for result in (first, second)]
    assert counts[0] != counts[1]


@pytest.mark.parametrize("name", ["ledger.jsonl", "metrics.jsonl"])
def test_a_torn_last_line_is_dropped_and_said(stopped: Path, uninterrupted: bytes, name: str) -> None:
    run = the_run(stopped)
    path = run.path / name
    os.truncate(path, path.stat().st_size - 30)
    whole = path.read_bytes().count(b"\n")
    done = typed("train", "--resume", *GO_ON, cwd=stopped)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"warning: The last line of \S*{name} \(line {whole + 1}\) is incomplete", done.stderr)
    assert weights(run) == uninterrupted
    read_ledger(run.ledger_file)
    read_json_lines(run.metrics_file)


@pytest.mark.parametrize(
    ("name", "damage", "code", "said"),
    [
        ("ledger.jsonl", b"nonsense", 2, "line 2 of"),
        ("ledger.jsonl", b'{"round": 1}', 2, "line 2 of"),
        ("metrics.jsonl", b"nonsense", 2, "line 2 of"),
        ("metrics.jsonl", b'{"round": "one", "status": "ok"}', 2, "line 2 of"),
        ("run.json", None, 2, "run.json"),
        ("config.json", None, 2, "config.json"),
        ("inputs.json", None, 3, "inputs.json"),
    ],
)
def test_damage_is_refused_before_training(
    stopped: Path, name: str, damage: bytes | None, code: int, said: str
) -> None:
    run = the_run(stopped)
    path = run.path / name
    if damage is None:
        path.write_bytes(path.read_bytes()[:40])
    else:
        lines = path.read_bytes().split(b"\n")
        lines[1] = damage
        path.write_bytes(b"\n".join([*lines[:2], *lines[1:]]))  # more follows
    before = path.read_bytes()
    done = typed("train", "--resume", *GO_ON, cwd=stopped)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert name in done.stderr
    assert "internal error" not in done.stderr
    assert run.committed_rounds() == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["progress.json", "manifest.json", "adapter.safetensors"])
def test_a_damaged_state_is_not_resumed_from(stopped: Path, name: str) -> None:
    """The run's only state: nothing to go on from, and nothing is trained over it."""
    path = the_run(stopped).state_folder / "round-0001" / name
    path.write_bytes(path.read_bytes()[:-5])
    done = typed("train", "--resume", *GO_ON, cwd=stopped)
    assert done.returncode == 3
    assert "round-0001 is damaged" in done.stderr


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a file system of that size."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount")
@pytest.mark.parametrize("size", ["60k", "100k", "140k"])
def test_a_full_disk_stops_a_run_that_goes_on_later(tmp_path: Path, uninterrupted: bytes, size: str) -> None:
    data = rows(tmp_path / "data")
    with small_disk(tmp_path / "runs", size):
        done = typed("train", "--data", str(data), *SMALL, *TINY, cwd=tmp_path)
        assert done.returncode == 3, done.stderr
        assert "no space left on device: runs/" in done.stderr
        assert "fedtune train --resume runs/" in done.stderr
        assert "internal error" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path / "runs"], check=True)
        done = typed("train", "--resume", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert weights(the_run(tmp_path)) == uninterrupted


@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount")
def test_a_disk_that_is_full_for_a_clients_state_is_no_clients_failure(tmp_path: Path) -> None:
    data = rows(tmp_path / "data")
    words = ["--data", str(data), *SMALL, *TINY, "--set", "strategy.name=scaffold"]
    with small_disk(tmp_path / "runs", "64k"):
        done = typed("train", *words, cwd=tmp_path)
        assert done.returncode == 3, done.stderr
        assert re.search(r"no space left on device: runs/\S+/state/clients/\d/", done.stderr)
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path / "runs"], check=True)
        done = typed("train", "--resume", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        resumed = weights(the_run(tmp_path))
    done = typed("train", *words, "--out", "whole", cwd=tmp_path)
    (whole,) = (tmp_path / "whole").iterdir()
    assert weights(RunDirectory(whole)) == resumed


@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    data = rows(tmp_path / "data")
    with small_disk(tmp_path / "runs", "1m"):
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "runs"], check=True)
        done = typed("train", "--data", str(data), *SMALL, *TINY, cwd=tmp_path)
        assert done.returncode == 3
        assert "Read-only file system" in done.stderr


def test_a_limit_on_file_sizes_is_one_sentence(tmp_path: Path) -> None:
    """The portable variant: no file may be larger than 20 kB, and the first state is."""
    data = rows(tmp_path / "data")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        done = typed("train", "--data", str(data), *SMALL, *TINY, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 3, done.stderr
    assert "error: file too large: runs/" in done.stderr
    assert "→ Fix that, then go on: fedtune train --resume runs/" in done.stderr


FULL = "error: no space left on device: standard output.\n"


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which `fedtune` is the command, and `code` prints its exit code on stderr."""
    fedtune_is = f'fedtune() {{ "{sys.executable}" -m fedtune.cli.app "$@"; echo "code $?" >>codes; }}\n'
    done = subprocess.run(
        ["bash", "-c", fedtune_is + command], cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )
    assert "Traceback" not in done.stderr + done.stdout
    assert "Exception ignored" not in done.stderr
    return done


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("fedtune --version >/dev/full", 3, FULL),
        ("fedtune train --help >/dev/full", 3, FULL),
        ("fedtune budget --challenge tiny >/dev/full", 3, FULL),
        (
            "fedtune train --recipe aloe-8b-medical --dry-run --json >/dev/full",
            3,
            "error: no space left on device: standard output.\n",
        ),
        ("fedtune train --recipe aloe-8b-medical --dry-run >&-", 0, ""),
        ("fedtune train --recipe aloe-8b-medical --dry-run 2>&- >/dev/null", 0, ""),
        ("fedtune budget <&- >&- 2>&-", 2, ""),
        ("fedtune budget 2>/dev/full", 2, ""),
        ("fedtune train --recipe aloe-8b-medical --dry-run --json | head -c 1", 0, ""),
        ("fedtune train --recipe aloe-8b-medical --dry-run | true", 1, ""),
    ],
)
def test_closed_full_and_broken_streams_end_cleanly(tmp_path: Path, command: str, code: int, said: str) -> None:
    done = shell(command, tmp_path)
    assert (tmp_path / "codes").read_text() in {f"code {code}\n", *(["code 1\n"] if "head" in command else [])}
    assert done.stderr == said


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">/dev/full 2>/dev/full", ">&- 2>&-", "2>&1 | true"])
def test_a_run_outlives_its_streams(tmp_path: Path, streams: str) -> None:
    """The whole run is there, whatever happens to what it says."""
    rows(tmp_path)
    words = " ".join(["train", "--data", "rows.jsonl", *SMALL, *TINY])
    shell(f"fedtune {words} {streams}", tmp_path)
    run = the_run(tmp_path)
    assert run.committed_rounds() == 3
    assert run.adapters() == [2, 3]
    assert (tmp_path / "codes").read_text() == f"code { {'>/': 3, '>&': 0, '2>': 1}[streams[:2]] }\n"


def test_a_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    rows(tmp_path)
    shutil.copytree(Path(hub.__file__).parent / "builtin" / "tiny", tmp_path / "base")
    (tmp_path / "c.toml").write_text('[model]\nbase = "~/base"\n')
    words = [*SMALL, "--set", "federation.rounds=1"]
    done = typed("train", "--out", "~/x", "--data", "~/rows.jsonl", "--config", "~/c.toml", *words, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "x").iterdir()
    assert RunDirectory(run).read_config().model.base == str(tmp_path / "base")
    assert typed("budget", f"~/x/{run.name}", cwd=elsewhere).returncode == 0
    done = typed("export", f"~/x/{run.name}", "--peft", "1", "--out", "~/out", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    done = typed("train", "--resume", f"~/x/{run.name}", "--set", "data.source=~/rows.jsonl", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    for command in (
        ["eval", "--bench", "tiny", "--peft", "~/none", "--runs", "~/y"],
        ["eval", "--rescore", "~/none"],
        ["export", "--check", "~/none"],
        ["budget", "--challenge", "tiny", "--readme", "~/none"],
        ["train", "--resume", "~/none"],
        ["eval", "--bench", "fpb", "--base", "--model", "builtin:tiny", "--data-dir", "~/none"],
    ):
        done = typed(*command, cwd=elsewhere)
        assert done.returncode in (2, 3)
        assert str(tmp_path / "none") in done.stderr, done.stderr
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--challenge", "tiny", "--out", ""], "Invalid value for '--out': the path is empty"),
        (["train", "--data", ""], "Invalid value for '--data': the path is empty"),
        (["train", "--config", "~nobody-here/x"], "there is no home folder for ~nobody-here"),
        (["export", "--runs", ""], "the path is empty"),
    ],
)
def test_paths_that_mean_nothing_are_refused(tmp_path: Path, words: list[str], said: str) -> None:
    done = typed(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, code in (
        (["train", "--challenge", "tiny", "--out", "file"], 3),
        (["train", "--resume", "--out", "file"], 3),
        (["export", "--runs", "file"], 3),
        (["eval", "--bench", "fpb", "--base", "--model", "builtin:tiny", "--data-dir", "file"], 3),
    ):
        done = typed(*words, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert "internal error" not in done.stderr
        assert "file" in done.stderr


def test_an_unexpected_error_is_called_internal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("fedtune.budget.plan.plan", fail)
    done = typed("budget", "--challenge", "tiny", cwd=tmp_path)
    assert done.returncode == 1
    assert "internal error: KeyError: 'x'" in done.stderr
    assert "--debug" in done.stderr


# --- a resumed run goes on from what was committed, or not at all ------------------------------------------------------


def without_last_lines(count: int) -> Callable[[Path], object]:
    return lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:-count]))


def with_a_line_twice(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[0]]))


def with_other_noise(path: Path) -> None:
    table = json.loads(path.read_text())
    table["training"]["weight_decay"] = 0.5
    path.write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("ledger.jsonl", Path.unlink, "is shorter than when round 1 was committed"),
        ("ledger.jsonl", without_last_lines(3), "is shorter than when round 1 was committed"),
        ("ledger.jsonl", with_a_line_twice, "when round 1 was committed"),
        ("metrics.jsonl", Path.unlink, "is shorter than when round 1 was committed"),
        ("config.json", with_other_noise, "training.weight_decay: 0.0 in the rounds that are committed, 0.5 now"),
    ],
)
def test_what_was_committed_is_compared(stopped: Path, name: str, damage: Callable[[Path], object], said: str) -> None:
    run = the_run(stopped)
    damage(run.path / name)
    done = typed("train", "--resume", *GO_ON, cwd=stopped)
    assert done.returncode in (2, 3), done.stderr
    assert said in " ".join(done.stderr.split())
    assert run.committed_rounds() == 1


def test_a_state_of_a_run_on_other_data_is_refused(stopped: Path, tmp_path: Path) -> None:
    """Both runs have the same config: only what their inputs.json says of the data tells them apart."""
    run = the_run(stopped)
    other = rows(tmp_path, "other.jsonl")
    other.write_text("".join(other.read_text().splitlines(keepends=True)[::-1]))
    words = ["--data", "other.jsonl", *SMALL, "--set", f"model.base={stopped / 'base'}", *CAP]
    assert typed("train", *words, cwd=tmp_path).returncode == 5
    shutil.rmtree(run.state_folder / "round-0001")
    shutil.copytree(the_run(tmp_path).state_folder / "round-0001", run.state_folder / "round-0001")
    refused = typed("train", "--resume", *GO_ON, cwd=stopped)
    assert refused.returncode == 2, refused.stderr
    assert "is not of this run: its data or base differ" in " ".join(refused.stderr.split())


def test_a_copy_of_a_state_beside_it_is_no_state(stopped: Path, uninterrupted: bytes) -> None:
    run = the_run(stopped)
    for name in ("round-0001.bak", "round-0001 (copy)"):
        shutil.copytree(run.state_folder / "round-0001", run.state_folder / name)
    assert typed("train", "--resume", *GO_ON, cwd=stopped).returncode == 0
    assert weights(run) == uninterrupted


def test_what_a_resumed_run_changes_is_in_its_config(stopped: Path) -> None:
    """The audit measures against the cap that the run has, and a card names its privacy budget."""
    run = the_run(stopped)
    assert typed("train", "--resume", *GO_ON, cwd=stopped).returncode == 0
    assert run.read_config().communication.cap_mib == 100.0
    # A finished run whose adapter was deleted writes it again.
    before = weights(run)
    shutil.rmtree(max(run.path.glob("peft_*")))
    assert typed("train", "--resume", cwd=stopped).returncode == 0
    assert weights(run) == before


def test_a_client_state_that_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    """The rounding errors of a codec are part of the result."""
    rows(tmp_path)
    words = [
        "--data",
        "rows.jsonl",
        *SMALL,
        "--set",
        "model.base=builtin:tiny",
        "--set",
        "communication.codec=int8",
        "--set",
        "communication.cap_mib=0.045",
    ]
    done = typed("train", *words, cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    run = the_run(tmp_path)
    file = next(run.state_folder.glob("clients/*/round-0001.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    refused = typed("train", "--resume", *GO_ON, cwd=tmp_path)
    assert refused.returncode == 3
    assert "is damaged, and without it the result would differ" in " ".join(refused.stderr.split())
    file.unlink()
    assert typed("train", "--resume", *GO_ON, cwd=tmp_path).returncode == 3
    file.write_bytes(whole)
    assert typed("train", "--resume", *GO_ON, cwd=tmp_path).returncode == 0
