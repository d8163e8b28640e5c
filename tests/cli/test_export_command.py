"""`fedtune export` as a user types it: every target, dry runs, JSON, mistakes; what goes to stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from small_runs import assert_clean, make_run, plant_canaries, small_llama
from typer.testing import CliRunner

from fedtune.cli.app import app
from fedtune.export.checkpoint import open_run
from fedtune.export.targets.submission import Submission


def fedtune(*words: str | Path) -> Result:
    torch.set_num_threads(1)  # small tensors; more threads only wait for each other
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_run(Path("runs", "tiny-1"))


def test_evaluated_and_exported(run: Path) -> None:
    """The latest run's last adapter: scored by `fedtune eval`, exported with that score; the folder is all of stdout."""
    done = fedtune("export")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "exports/tiny-1-peft_2\n"
    assert (
        "peft_2 has no complete evaluation; run one: fedtune eval --bench tiny --peft runs/tiny-1/peft_2 --base"
        in done.stderr
    )
    assert fedtune("eval", "--bench", "tiny", "--peft", run / "peft_2", "--base").exit_code == 0
    done = fedtune("export", "latest", "--license", "mit", "--tokenizer", "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["to"], said["adapter"], said["folder"], said["notes"]) == (
        "folder",
        "peft_2",
        "exports/tiny-1-peft_2",
        [],
    )
    folder = Path(said["folder"])
    assert said["files"] == {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    results = json.loads((folder / "results.json").read_text())
    assert [each["subject"] for each in results] == ["base", "peft_2"]
    assert f"| Tiny | {results[1]['accuracy']:.2%} |" in (folder / "README.md").read_text()


def test_merged(run: Path, tmp_path: Path) -> None:
    done = fedtune("export", "--to", "merged", "--out", "model")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "model\n"
    assert "Checked against base and adapter on 3 prompts" in done.stderr
    scored = fedtune("eval", "--bench", "tiny", "--limit", "9", "--base", "--model", "./model", "--json")
    assert json.loads(scored.stdout)["results"][0]["n"] == 9


def test_dry_runs_write_nothing(run: Path) -> None:
    for words in (["--to", "folder"], ["--to", "merged"], ["--to", "submission", "--draft"]):
        done = fedtune("export", *words, "--dry-run")
        assert done.exit_code == 0, done.stderr
        sizes, _, card = done.stdout.partition("\n\n")
        assert "README.md" in sizes
        assert all(line.endswith(" bytes") for line in sizes.splitlines())
        assert "adapter" in card
        said = json.loads(fedtune("export", *words, "--dry-run", "--json").stdout)
        assert (said["dry_run"], len(said["files"])) == (True, len(sizes.splitlines()))
        assert said["card"] == card
    assert not Path("exports").exists()


def test_which_adapter(run: Path) -> None:
    for words in (
        ["--peft", "peft_1"],
        ["peft_1"],
        [run / "peft_1"],
        ["tiny-1", "--peft", "1"],
        [run, "--peft", "peft_1"],
    ):
        done = fedtune("export", *words, "--json")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["adapter"] == "peft_1"


def test_submission_gets_a_name_that_flower_takes(run: Path) -> None:
    done = fedtune("export", "--to", "submission", "--draft")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "exports/tiny-1-r2\n"
    assert Path("exports/tiny-1-r2/pyproject.toml").is_file()
    for name, wanted in (
        ("general-nlp-20261121-231500", "general-nlp-20261121-231500-r2"),
        ("2026_my run", "run-2026-my-run-r2"),
        ("a" * 50, "a" * 29 + "-r2"),
    ):
        assert Submission.default_folder(open_run(str(run.rename(run.parent / name)))) == Path("exports", wanted)
        run = run.parent / name


def test_a_submission_without_evaluation_is_refused(run: Path) -> None:
    done = fedtune("export", "--to", "submission")
    assert (done.exit_code, done.stdout) == (3, "")
    assert "fedtune eval" in done.stderr


def test_check(run: Path) -> None:
    """A draft has findings, one a line; exit code 2."""
    fedtune("export", "--to", "submission", "--draft")
    done = fedtune("export", "--check", "exports/tiny-1-r2")
    assert done.exit_code == 2
    said = json.loads(fedtune("export", "--check", "exports/tiny-1-r2", "--json").stdout)
    lines = [f"{each['file']}: {each['text']}" for each in said["findings"]]
    assert lines == done.stdout.splitlines()
    assert lines


def test_hub_dry_run_offline(run: Path) -> None:
    """Nothing is sent; what keeps it from being sent is said."""
    done = fedtune("export", "--to", "hf-hub", "--repo", "someone/adapter", "--dry-run", "--license", "mit")
    assert done.exit_code == 0, done.stderr
    assert "adapter_model.safetensors" in done.stdout
    assert "\nlicense: mit\n" in done.stdout
    assert "token" in done.stderr


def test_canaries_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("runs", "tiny-1"), base=str(small_llama(tmp_path / "home" / "someone" / "base")))
    plant_canaries(run, tmp_path / "outside")
    for to in ("folder", "merged"):
        done = fedtune("export", "--to", to, "--out", f"out-{to}")
        assert done.exit_code == 0, done.stderr
        assert_clean(tmp_path / f"out-{to}")
        assert str(tmp_path).encode() not in b"".join(p.read_bytes() for p in (tmp_path / f"out-{to}").iterdir())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--runs", "none"], 3, "There is no run in none. → Start one: fedtune train --challenge tiny"),
        (["nothing"], 3, "There is no run 'nothing'. → The latest in runs: tiny-1."),
        (["peft_7"], 3, "There is no adapter 'peft_7'"),
        (["--peft", "peft_7"], 3, "has no peft_7. → It has peft_1, peft_2."),
        (["--to", "zip"], 2, "'zip' is not one of 'folder', 'hf-hub', 'merged', 'submission'"),
        (["--to", "hf-hub"], 2, "--to hf-hub needs --repo. → Add --repo USER/NAME"),
        (["--to", "hf-hub", "--repo", "a/b", "--out", "x"], 2, "--out does not go with --to hf-hub"),
        (["--repo", "a/b"], 2, "--repo does not go with --to folder. → It goes with --to hf-hub."),
        (["--to", "merged", "--tokenizer"], 2, "--tokenizer does not go with --to merged"),
        (["--draft"], 2, "--draft does not go with --to folder"),
        (["--license", "My Own"], 2, "is not the id of a licence"),
        (["--out", "runs"], 2, "runs already holds other files. → Choose another --out."),
        (["tiny-1", "--check", "x"], 2, "Use it without other options: fedtune export --check x"),
        (["--check", "x", "--to", "merged"], 2, "Use it without other options: fedtune export --check x"),
    ],
)
def test_mistakes_get_one_paragraph(run: Path, words: list[str], code: int, said: str) -> None:
    done = fedtune("export", *words)
    assert done.exit_code == code, done.stderr
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from fedtune.cli.app import app\n"
        "app(['export', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'peft', 'flwr', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout
