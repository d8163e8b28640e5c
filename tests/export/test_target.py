"""Export targets: found, complete, light to import, and each in one module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from small_runs import make_run
from typer.testing import CliRunner

import fedtune.export.targets as package
from fedtune.cli.export import make_command
from fedtune.export.target import targets

LIST = '''
"""`fedtune export --to list`: the names of the adapter's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fedtune.export.checkpoint import RunCheckpoint
from fedtune.export.target import Exported, Listener, Option, Out, Plan, Target


@dataclass(frozen=True, kw_only=True)
class List(Target):
    """A text file."""

    name = "list"

    out: Out = None
    first: Annotated[int, Option("--first", "The number of names.", "N")]

    def _text(self, checkpoint: RunCheckpoint) -> str:
        return "".join(f"{name}\\n" for name in sorted(checkpoint.saved.tensors)[: self.first])

    def plan(self, checkpoint: RunCheckpoint) -> Plan:
        text = self._text(checkpoint)
        return Plan({"names.txt": len(text)}, text)

    def write(self, checkpoint: RunCheckpoint, listener: Listener | None = None) -> Exported:
        folder = self.out or Path("exports", "list")
        folder.mkdir(parents=True)
        (folder / "names.txt").write_text(self._text(checkpoint))
        return Exported(folder, self.plan(checkpoint).sizes, checkpoint.notes)


TARGET = List
'''


def export(*words: str) -> typer.testing.Result:
    """Run the command with the targets that are there now."""
    app = typer.Typer()
    app.command()(make_command())
    return CliRunner().invoke(app, [*words])


def test_a_target_is_added_and_removed_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs", "tiny-1"))
    before = targets()
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "list.py").write_text(LIST)
    with monkeypatch.context() as patch:
        patch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "added")])
        assert targets().keys() == {*before, "list"}
        help_text = " ".join(export("--help").stdout.split())
        assert "--first N The number of names." in help_text
        planned = json.loads(export("--to", "list", "--first", "1", "--dry-run", "--json").stdout)
        assert not Path("exports").exists()
        done = export("--to", "list", "--first", "1")
        assert (done.exit_code, done.stdout) == (0, "exports/list\n")
        text = Path("exports", "list", "names.txt").read_text()
        assert text == planned["card"]
        assert planned["files"] == {"names.txt": len(text)}
        assert text.count("\n") == 1
        assert "--to list needs --first. → Add --first N" in " ".join(export("--to", "list").stderr.split())
        said = " ".join(export("--to", "merged", "--first", "1").stderr.split())
        assert "--first does not go with --to merged. → It goes with --to list." in said
    del sys.modules[f"{package.__name__}.list"]
    assert targets() == before
    assert export("--to", "list", "--first", "1").exit_code == 2


@pytest.mark.parametrize("name", sorted(targets()))
def test_an_option_of_the_same_name_is_the_same_option(name: str) -> None:
    """The command line has one flag for each field name, so targets that share a name must mean the same."""
    options = {field: option for target in targets().values() for field, option in target.options().items()}
    for field, option in targets()[name].options().items():
        assert option == options[field]


def test_targets_load_no_heavy_library() -> None:
    """The command line imports them for `--help`."""
    code = (
        "import sys\n"
        "from fedtune.export.target import targets\n"
        "assert len(targets()) >= 4\n"
        "print({'torch', 'transformers', 'peft', 'flwr', 'huggingface_hub', 'lm_eval', 'pydantic'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
