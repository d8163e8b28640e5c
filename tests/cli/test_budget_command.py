"""`fedtune budget` as a user types it: forecasts, fits, audits, mistakes on purpose."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedtune.budget.ledger import read_ledger
from fedtune.budget.plan import plan
from fedtune.cli.app import app
from fedtune.config.facts import load_preset, preset_names
from fedtune.runs.directory import RunDirectory

TINY = ["--challenge", "tiny"]
SMALL = ["federation.rounds=2", "federation.fraction=0.25", "training.max_steps=1", "training.batch_size=2"]


def budget(*words: str) -> Result:
    return CliRunner().invoke(app, ["budget", *words])


def document(*words: str) -> dict:  # type: ignore[type-arg]
    done = budget(*words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A real run of the tiny challenge, cut short."""
    from fedtune.config.load import load_config
    from fedtune.federation.train import train

    config = load_config(challenge="tiny", settings=SMALL).config
    return RunDirectory(train(config, out=tmp_path_factory.mktemp("runs")).run)


@pytest.mark.parametrize("recipe", preset_names("recipe"))
def test_published_figures_at_once_and_offline(recipe: str, tmp_path: Path) -> None:
    """In a process of its own, start-up included: under two seconds of CPU, nothing heavy loaded, no socket opened."""
    code = (
        "import socket, sys\n"
        "def refuse(*words, **more): raise AssertionError('a socket')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from fedtune.cli.app import app\n"
        "app(['budget', *sys.argv[1:]], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'peft', 'flwr', 'datasets', 'huggingface_hub'} & set(sys.modules)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "--recipe", recipe], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    published = f"{load_preset('recipe', recipe).published['budget_mib']:.2f}"
    assert f"{published} MiB of 200,000.00 MiB" in done.stdout
    assert f"published for {recipe}: {published} MiB, the same" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_forecast_as_json_is_the_plan() -> None:
    from fedtune.config.load import load_config

    config = load_config(recipe="aloe-8b-medical", settings=["communication.wire_dtype=bf16"]).config
    words = ["--recipe", "aloe-8b-medical", "--set", "communication.wire_dtype=bf16"]
    found = document(*words, "--uplink", "20Mbit/s", "--downlink", "100Mbit/s")
    planned = plan(config)
    assert found["plan"]["total_bytes"] == planned.total_bytes
    assert found["plan"]["wire_dtype"] == "bf16"
    assert found["used_mib"] == planned.total_bytes / 2**20
    assert found["cap_mib"] == 200_000
    seconds = planned.serialised_message.high / 12.5e6 + planned.serialised_reply.high / 2.5e6
    assert found["transfer"]["round_s"] == pytest.approx(seconds)
    assert found["transfer"]["total_s"] == pytest.approx(10 * seconds)


def test_transfer_time_in_words() -> None:
    done = budget("--recipe", "aloe-8b-medical", "--uplink", "20Mbit/s", "--downlink", "100Mbit/s")
    assert "4 s down and 22 s up, 0.0073 h a round, 0.073 h in total" in done.stdout


def test_fit_prints_the_largest_value() -> None:
    done = budget("--recipe", "aloe-8b-medical", "--fit", "rounds", "--cap", "5GB")
    assert done.stdout.startswith("federation.rounds = 22: 4,578.05 MiB of 4,768.37 MiB; 23 would send")
    fitted = document("--recipe", "aloe-8b-medical", "--fit", "clients", "--cap", "5GB")["fit"]
    assert (fitted["key"], fitted["value"]) == ("federation.clients", 49)
    assert "federation.clients is 49" in fitted["ineligible_because"][0]


def test_grid_prints_every_rank() -> None:
    done = budget(*TINY, "--grid", "--cap", "500kB")
    assert done.exit_code == 0, done.stderr
    assert "all-linear (this config)" in done.stdout
    assert "! " in done.stdout
    rows = document(*TINY, "--grid")["grid"]
    assert {row["rank"] for row in rows} >= {4, 8, 16, 32, 64}


def test_a_forecast_over_the_cap_ends_with_5() -> None:
    done = budget("--recipe", "aloe-8b-medical", "--cap", "1GB")
    assert done.exit_code == 5
    assert "2,080.93" in done.stdout
    assert "over the cap of 953.67 MiB" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "Neither a run nor a config"),
        (["--challenge", "medicine"], 2, "did you mean medical"),
        ([*TINY, "--cap", "5"], 2, "--cap: '5' is not a number with one of B, kB"),
        ([*TINY, "--cap", "0GB"], 2, "--cap: '0GB' is not above zero"),
        ([*TINY, "--uplink", "20Mbit/s"], 2, "--uplink and --downlink belong together"),
        ([*TINY, "--uplink", "fast", "--downlink", "1MB/s"], 2, "--uplink: 'fast' is not a number"),
        ([*TINY, "--fit", "layers"], 2, "--fit layers is not one of rank, rounds, clients"),
        ([*TINY, "--fit", "rank", "--grid"], 2, "separate questions"),
        ([*TINY, "--fit", "rank", "--cap", "1kB"], 5, "Not even adapter.rank = 1"),
        ([*TINY, "--figure", "much"], 2, "'much' is no communication figure"),
        ([*TINY, "--readme", "none.md"], 3, "none.md cannot be read"),
        ([*TINY, "--set", "model.base=./nowhere"], 3, "nowhere"),
        (["medical-20261121-231500"], 3, "There is no run 'medical-20261121-231500'"),
        (["latest"], 3, "There is no run in runs"),
        (["latest", "--fit", "rank"], 2, "are about a run to come"),
        (["latest", *TINY], 2, "has a config of its own"),
    ],
)
def test_mistakes(words: list[str], code: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = budget(*words)
    assert (done.exit_code, done.stdout) == (code, "")
    assert text in " ".join(done.stderr.split())


def test_an_unknown_base_says_why() -> None:
    """The hub refuses the connection: exit 3 with the reason, nothing guessed."""
    done = subprocess.run(
        [sys.executable, "-m", "fedtune.cli.app", "budget", *TINY, "--set", "model.base=nobody/nothing"],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "nobody/nothing is not cached, and http://127.0.0.1:9 cannot be reached" in done.stderr


def test_audit_of_a_finished_run(finished: RunDirectory) -> None:
    total = sum(entry.bytes for entry in read_ledger(finished.ledger_file))
    by_name = budget(finished.path.name, "--out", str(finished.path.parent))
    by_path = budget(str(finished.path))
    latest = budget("latest", "--out", str(finished.path.parent))
    assert by_name.stdout == by_path.stdout == latest.stdout
    assert "finished, 2 of 2 rounds committed" in by_path.stdout
    assert "sent as forecast, to the byte" in by_path.stdout
    assert f"{total / 2**20:.2f} MiB of 200,000.00 MiB" in by_path.stdout
    assert "1-2, each" in by_path.stdout
    found = document(str(finished.path))["audit"]
    assert found["difference_bytes"] == 0
    assert found["used_mib"] == total / 2**20
    assert found["forecast"]["total_bytes"] == total
    assert sum(use["down_bytes"] + use["up_bytes"] for use in found["rounds"]) == total
    assert sum(use["down_bytes"] + use["up_bytes"] for use in found["clients"]) == total


def test_published_figures_are_held_against_a_run(finished: RunDirectory, tmp_path: Path) -> None:
    used = sum(entry.bytes for entry in read_ledger(finished.ledger_file)) / 2**20
    readme = tmp_path / "README.md"
    readme.write_text(f"### Communication Budget\n\n{used:.2f} Megabytes\n")
    found = document(str(finished.path), "--readme", str(readme), "--figure", "12345.67")
    assert [(check["figure"], check["matches"]) for check in found["figures"]] == [
        ("12345.67", False),
        (f"{used:.2f} Megabytes", True),
    ]
    done = budget(str(finished.path), "--figure", "12345.67")
    assert "published figure 12345.67: does NOT match" in done.stdout


def test_audit_of_a_comm_cost_file(finished: RunDirectory, tmp_path: Path) -> None:
    """Both forms, and a recipe's forecast beside one."""
    used = sum(entry.bytes for entry in read_ledger(finished.ledger_file)) / 2**20
    joined = tmp_path / "comm_cost.txt"
    joined.write_text(finished.comm_cost_file.read_text().replace("\n", ""))
    for path in (finished.comm_cost_file, joined):
        found = document(str(path), "--figure", f"{used:.2f}")
        assert found["comm_cost"]["used_mib"] == float(f"{used:.2f}")
        assert len(found["comm_cost"]["rounds"]) == 2
        assert found["figures"][0]["matches"]
    done = budget(str(joined), "--recipe", "aloe-8b-medical")
    assert re.search(rf"both\W+{used:.2f}\W+2,080\.93", done.stdout)


def test_damage_is_named(finished: RunDirectory, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    assert budget(str(copy)).exit_code == 3  # no config.json
    (copy / "config.json").write_text(finished.config_file.read_text())
    lines = finished.ledger_file.read_text().splitlines()
    (copy / "ledger.jsonl").write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")
    done = budget(str(copy))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "The ledger is damaged: line 2 of" in " ".join(done.stderr.split())
    (copy / "config.json").write_text("{}x")
    done = budget(str(copy))
    assert done.exit_code == 2
    assert "config.json cannot be parsed" in " ".join(done.stderr.split())
