"""`fedtune train` as a user types it: real runs on the tiny base, mistakes on purpose, kill -9, Ctrl-C."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.budget.ledger import read_ledger
from fedtune.cli.app import app, with_optional_values
from fedtune.runs.atomic import read_json_lines
from fedtune.runs.directory import RunDirectory

SMALL = [
    "--challenge",
    "tiny",
    *("--set", "federation.rounds=3", "--set", "federation.fraction=0.25", "--set", "training.max_steps=2"),
    *("--set", "training.batch_size=16", "--set", "checkpoint.save_every=2"),
]
"""A run of the tiny challenge that takes a second or two after imports."""


def typed(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has paid for the imports: as a user's shell would, in folder `cwd`."""
    with contextlib.chdir(cwd):
        done = CliRunner().invoke(app, with_optional_values(list(words)))
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def fedtune(*words: str, cwd: Path, timeout_s: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fedtune.cli.app", *words],
        cwd=cwd,
        env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def the_run(folder: Path) -> RunDirectory:
    (path,) = (folder / "runs").iterdir()
    return RunDirectory(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One uninterrupted run, and what the command said."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, fedtune("train", *SMALL, cwd=folder)


def test_a_run_leaves_everything_that_design_asks_for(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr
    run = the_run(folder)
    assert {path.name for path in run.path.iterdir()} == {
        *("config.json", "inputs.json", "run.json", "metrics.jsonl", "ledger.jsonl", "comm_cost.txt", "report.html"),
        "debug.log",
        *("state", "peft_2", "peft_3"),
    }
    assert done.stdout.strip() == str(run.path.relative_to(folder) / "peft_3")  # data on stdout, the rest on stderr
    assert "round 3/3" in done.stderr
    assert "Partitions" in done.stderr
    assert run.read_config().federation.rounds == 3
    about = run.read_about()
    assert about["origins"]["training.max_steps"] == "--set training.max_steps=2"
    assert about["versions"]["flwr"].startswith("1.41")
    lines = read_json_lines(run.metrics_file)
    assert len(lines) == 3 * 2
    assert all(line["status"] == "ok" and len(line["losses"]) == 2 for line in lines)


def test_comm_cost_agrees_with_the_ledger(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run = the_run(finished[0])
    entries = read_ledger(run.ledger_file)
    used = sum(entry.bytes for entry in entries if entry.kind == "train")
    last = run.comm_cost_file.read_text().splitlines()[-1]
    assert last.startswith(f"Communication budget: used {used / 2**20:.2f} MB")
    from fedtune.budget.plan import plan

    assert plan(run.read_config()).total_bytes == used  # the forecast, to the byte


def test_the_adapter_loads_with_peft(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    import warnings

    from peft import PeftModel

    from fedtune.config.schema import ModelConfig
    from fedtune.models.base import load_base

    run = the_run(finished[0])
    base = load_base(ModelConfig(base="builtin:tiny", quantization="none"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
        model = PeftModel.from_pretrained(base.model, run.adapter_folder(3))
    assert any("lora_B" in name and parameter.abs().max() > 0 for name, parameter in model.named_parameters())


def test_the_report_stands_alone(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    text = the_run(finished[0]).report_file.read_text()
    assert "<svg" in text
    assert "Training loss per round" in text
    assert "MiB used" in text
    assert not re.search(r"(src|href)=", text)
    assert "http" not in re.sub(r"<pre>.*</pre>", "", text, flags=re.DOTALL)


def test_the_same_config_gives_the_same_bits(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    config = the_run(finished[0]).config_file
    done = fedtune("train", "--config", str(config), "--json", cwd=tmp_path, PYTHONHASHSEED="7")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["result"]
    again = tmp_path / result["adapter"] / "adapter_model.safetensors"
    assert again.read_bytes() == (the_run(finished[0]).adapter_folder(3) / "adapter_model.safetensors").read_bytes()


def wait_for(condition: object, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("moment", ["before the first commit", "after round 1", "inside a save"])
def test_kill_9_and_resume_give_the_same_bits(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, moment: str
) -> None:
    environment = {**os.environ}
    if moment == "inside a save":
        # The second adapter file that is written beside its target is never finished: the process kills itself there.
        environment["PYTHONSTARTUP"] = ""
        words = [sys.executable, "-c", _KILLS_ITSELF_IN_A_SAVE, "train", *SMALL]
    else:
        words = [sys.executable, "-m", "fedtune.cli.app", "train", *SMALL]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if moment == "inside a save":
        assert process.wait(120) == -signal.SIGKILL
    else:
        metrics = (
            "runs/*/metrics.jsonl" if moment == "before the first commit" else "runs/*/state/round-0001/manifest.json"
        )
        wait_for(lambda: list(tmp_path.glob(metrics)), process)
        process.kill()
        process.wait()
    done = typed("train", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run, whole = the_run(tmp_path), the_run(finished[0])
    for name in ("peft_2", "peft_3"):
        ours, theirs = (path / name / "adapter_model.safetensors" for path in (run.path, whole.path))
        assert ours.read_bytes() == theirs.read_bytes()

    def numbers(of: RunDirectory) -> list[object]:
        return [(line["round"], line["partition"], line["losses"]) for line in read_json_lines(of.metrics_file)]

    assert numbers(run) == numbers(whole)
    sent = [entry for entry in read_ledger(run.ledger_file) if entry.status != "lost" and entry.kind == "train"]
    assert [(e.round, e.node, e.direction, e.bytes) for e in sent] == [
        (e.round, e.node, e.direction, e.bytes) for e in read_ledger(whole.ledger_file) if e.kind == "train"
    ]


_KILLS_ITSELF_IN_A_SAVE = """
import os, signal
import fedtune.runs.directory as directory
import fedtune.federation.rounds as rounds
real, calls = rounds.save_file, []
def save_half(tensors, path):
    real(tensors, path)
    calls.append(path)
    if len(calls) == 2:
        with open(path, "r+b") as file:
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)
rounds.save_file = save_half
from fedtune.cli.app import main
main()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, how: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedtune.cli.app", "train", *SMALL],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and so would this run be if the tests are one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    wait_for(lambda: list(tmp_path.glob("runs/*/state/round-0001/manifest.json")), process)  # type: ignore[arg-type]
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "fedtune train --resume" in said
    assert "Traceback" not in said
    done = typed("train", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = the_run(tmp_path).adapter_folder(3) / "adapter_model.safetensors"
    assert ours.read_bytes() == (the_run(finished[0]).adapter_folder(3) / "adapter_model.safetensors").read_bytes()


def test_resume_refuses_another_config_and_takes_a_higher_cap(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    done = typed("train", "--resume", "--set", "adapter.rank=3", "--set", "training.max_steps=9", cwd=folder)
    assert done.returncode == 2
    assert "adapter.rank" in done.stderr
    assert "training.max_steps: 2 in the run, 9 now" in done.stderr
    done = fedtune(
        "train", "--resume", "--set", "communication.cap_mib=99.0", cwd=folder
    )  # a finished run ends at once
    assert done.returncode == 0, done.stderr


def test_the_cap_ends_with_exit_5(tmp_path: Path) -> None:
    done = typed("train", *SMALL, "--set", "communication.cap_mib=0.001", cwd=tmp_path)
    assert done.returncode == 5
    assert "communication.cap_mib" in done.stderr


def test_the_hub_unreachable_ends_with_exit_3_in_time(tmp_path: Path) -> None:
    """Done when 3: exit 3 with what to do, within 15 s of wall time that is not this machine's noise."""
    began = time.monotonic()
    done = fedtune(
        "train",
        *("--challenge", "medical", "--set", "model.base=builtin:tiny"),
        cwd=tmp_path,
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "hub"),
    )
    assert done.returncode == 3
    assert "--data FILE" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 1000
    assert not (tmp_path / "runs").exists()
    assert time.monotonic() - began < 120  # imports on a busy machine included; retries would take minutes


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--challenge", "medcal"], 2, "did you mean medical"),
        (["--set", "adaptr.rank=3", "--set", "seed=-1"], 2, "2 problems"),
        (["--challenge", "tiny", "--data", "missing.jsonl"], 3, "missing.jsonl"),
        (["--resume", "nowhere"], 3, "no run 'nowhere'"),
        (["--resume"], 3, "no run in runs"),
        (["--config", "none.toml"], 2, "none.toml"),
        ([], 2, "data.source is not set"),
        (["--challenge", "medical", "--baselines"], 2, "only tiny ships"),
        (["--challenge", "tiny", "--set", "model.base=./nothing"], 3, "nothing"),
        (["--challenge", "tiny", "--set", 'adapter.targets=["nose"]'], 2, "nose"),
    ],
)
def test_mistakes_get_one_paragraph(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    done = typed("train", *words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_superlink_is_named_by_its_flags(tmp_path: Path) -> None:
    """`--superlink` alone means the engine; every value's origin is the flag that it came by."""
    done = typed("train", "--superlink", "host:8000", "--superlink-ca", "ca.crt", "--dry-run", cwd=tmp_path)
    assert 'superlink = "host:8000"  # --superlink\n' in done.stdout
    assert f'superlink_ca = "{tmp_path / "ca.crt"}"  # --superlink-ca\n' in done.stdout
    assert 'engine = "superlink"  # --superlink\n' in done.stdout


def test_dry_run_prints_a_config_that_can_be_used(tmp_path: Path) -> None:
    done = typed("train", "--recipe", "aloe-8b-medical", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2,080.93 MiB in total" in done.stdout
    assert "published for aloe-8b-medical: pubmedqa 74.8" in done.stdout
    assert "alpha = 128  # recipe aloe-8b-medical" in done.stdout
    (tmp_path / "run.toml").write_text(done.stdout)
    again = typed("train", "--config", "run.toml", "--dry-run", "--json", cwd=tmp_path)
    plan = json.loads(again.stdout)
    assert plan["config"]["training"]["accumulation"] == 2
    assert plan["plan"]["total_bytes"] / 2**20 == pytest.approx(2080.9311, abs=5e-5)
    assert plan["eligible"] is True
    other = typed("train", "--recipe", "internlm3-8b-general-nlp", "--dry-run", cwd=tmp_path)
    assert "2,942.79 MiB in total" in other.stdout
    assert not (tmp_path / "runs").exists()


def test_overriding_a_rule_is_marked(tmp_path: Path) -> None:
    done = typed("train", "--challenge", "medical", "--set", "federation.clients=7", "--dry-run", cwd=tmp_path)
    assert "# not eligible for the leaderboard: federation.clients is 7" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "--help"], ["--version"]])
def test_help_is_instant(words: list[str]) -> None:
    """Done when 4, by what is imported instead of by a clock: nothing heavier than typer and rich."""
    code = (
        "import sys; from fedtune.cli.app import app\n"
        f"try: app({words!r})\n"
        "except SystemExit as end: assert end.code in (0, None), end.code\n"
        "heavy = {'torch', 'transformers', 'flwr', 'peft', 'lm_eval', 'datasets', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
