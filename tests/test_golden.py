"""The golden comparison of scripts/golden.py: what it finds, what it lets pass, and that a recording is repeatable."""

import importlib.util
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "golden.py"

RECORDED = {
    "about": {"versions": {"torch": "2.13.0"}},
    "cases": {
        "strategy krum": {
            "commands": {
                "budget latest --json": {"exit": 0, "output": {"forecast": {"total_bytes": 4363136, "share": 1.0}}}
            },
            "files": {
                "runs/run/peft_3/adapter_model.safetensors": {"sha256": "aa", "header": "bb", "values": "cc"},
                "runs/run/ledger.jsonl": [{"round": 1, "bytes": 10}, {"round": 2, "bytes": 10}],
                "runs/run/metrics.jsonl": [{"round": 1, "loss": float("nan")}],
            },
        }
    },
    "mistakes": {"mistakes": {"train": {"exit": 2, "text": "error: data.source is not set."}}},
    "texts": {"strategy krum": {"README.md": "as it was"}},
}
ADAPTER = ("cases", "strategy krum", "files", "runs/run/peft_3/adapter_model.safetensors")
FORECAST = ("cases", "strategy krum", "commands", "budget latest --json", "output", "forecast")


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("golden", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def compared(folder: Path, before: Any, after: Any, *words: str) -> tuple[int, str]:
    """Run `golden.py compare` on two recordings; return its exit code and what it prints."""
    files = []
    for name, record in (("before.json", before), ("after.json", after)):
        (folder / name).write_text(json.dumps(record))
        files.append(name)
    command = [sys.executable, str(SCRIPT), "compare", *files, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout


def changed(path: tuple[Any, ...], value: Any) -> Any:
    """Return the recording with another value at a path."""
    record = deepcopy(RECORDED)
    place: Any = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return record


def test_equal_recordings_are_counted(tmp_path: Path) -> None:
    code, said = compared(tmp_path, RECORDED, RECORDED)
    # Two forecast numbers and an exit code; three hashes, four numbers of the ledger, two of the metrics; one mistake's two.
    assert (code, said) == (0, "the same: 14 values in 2 cases\n")


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (
            (*ADAPTER, "values"),
            "cd",
            'strategy krum: runs/run/peft_3/adapter_model.safetensors: values: "cc" → "cd"',
        ),
        (
            ("cases", "strategy krum", "files", "runs/run/ledger.jsonl", 1, "bytes"),
            11,
            "strategy krum: runs/run/ledger.jsonl: [1].bytes: 10 → 11",
        ),
        (
            (*FORECAST, "total_bytes"),
            4363137,
            "strategy krum: fedtune budget latest --json: output.forecast.total_bytes: 4363136 → 4363137",
        ),
        # 1 is not written as 1.0 is.
        ((*FORECAST, "share"), 1, "strategy krum: fedtune budget latest --json: output.forecast.share: 1.0 → 1"),
        (("mistakes", "mistakes", "train", "exit"), 1, "mistakes: train: exit: 2 → 1"),
    ],
)
def test_a_planted_change_is_found(tmp_path: Path, path: tuple[Any, ...], value: Any, line: str) -> None:
    code, said = compared(tmp_path, RECORDED, changed(path, value))
    assert code == 1
    assert said.splitlines() == [line, "1 differences in 2 cases"]


def test_what_is_missing_or_new_is_found(tmp_path: Path) -> None:
    without_file, without_case = deepcopy(RECORDED), deepcopy(RECORDED)
    del without_file["cases"]["strategy krum"]["files"]["runs/run/ledger.jsonl"]  # type: ignore[attr-defined]
    code, said = compared(tmp_path, RECORDED, without_file)
    assert code == 1
    assert "strategy krum: runs/run/ledger.jsonl: [0].bytes: 10 → nothing" in said
    del without_case["cases"]["strategy krum"]  # type: ignore[attr-defined]
    assert compared(tmp_path, RECORDED, without_case)[0] == 1
    code, said = compared(tmp_path, without_case, RECORDED)
    assert (code, said.splitlines()[0]) == (1, "strategy krum: only in after.json")
    # Held against a part of the cases, only that part counts.
    assert compared(tmp_path, RECORDED, without_case, "--common") == (0, "the same: 2 values in 1 cases\n")


def test_texts_and_versions_are_told_but_do_not_fail(tmp_path: Path) -> None:
    other = changed(("mistakes", "mistakes", "train", "text"), "error: Name your data.")
    other["texts"]["strategy krum"]["README.md"] = "in other words"
    other["about"]["versions"]["torch"] = "2.14.0"
    code, said = compared(tmp_path, RECORDED, other, "--texts")
    assert code == 0
    assert 'text of a mistake in mistakes: train: text: "error: data.source is not set." → "error: Name' in said
    assert 'text in strategy krum: README.md: "as it was" → "in other words"' in said
    assert 'note: recorded with another versions torch: "2.13.0" and "2.14.0"' in said


def test_wanted_differences_are_excepted_by_name(tmp_path: Path) -> None:
    other = changed((*ADAPTER, "values"), "cd")
    code, said = compared(tmp_path, RECORDED, other, "--except", "strategy krum: *safetensors*")
    assert code == 0
    assert "strategy krum: 1 differences are excepted" in said
    assert compared(tmp_path, RECORDED, other, "--except", "strategy krum: *ledger*")[0] == 1


def test_files_are_recorded_without_what_differs_each_time(golden: ModuleType, tmp_path: Path) -> None:
    """Times, places and fedtune's version go; bytes of tensors, counts and the numbers in prose stay."""
    folder = tmp_path / "case"
    run = folder / "runs" / "tiny-20260102-030405"
    (run / "peft_1").mkdir(parents=True)
    recorder = golden.Recorder(folder)
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    weights = len(header).to_bytes(8, "little") + header + b"\x00\x00\x80?"
    (run / "peft_1" / "adapter_model.safetensors").write_bytes(weights)
    (run / "metrics.jsonl").write_text('{"round": 1, "train_loss": 0.5, "seconds": 0.25}\n')
    (run / "config.json").write_text(json.dumps({"source": str(folder / "rows.jsonl")}))
    (run / "same.json").write_text('{"n": 1}')
    (run / "about.json").write_text('{"versions": {"fedtune": "0.1.0", "torch": "2"}, "started": "2026-01-02"}')
    (run / "README.md").write_text("# tiny-20260102-030405\n\nRank 8 on peft_16, 1,024 bytes, 0.1.0 of fedtune.\n")
    recorder.rename_runs()
    files = recorder.files()
    at = "runs/run"
    assert files[f"{at}/metrics.jsonl"] == [{"round": 1, "train_loss": 0.5}]
    assert files[f"{at}/config.json"] == {"json": {"source": "<work>/case/rows.jsonl"}}
    assert files[f"{at}/same.json"] == {"json": {"n": 1}, "sha256": golden.sha256(b'{"n": 1}')}
    assert files[f"{at}/about.json"] == {"json": {"versions": {"torch": "2"}}}
    assert files[f"{at}/README.md"] == {"numbers": ["8", "1,024"]}
    assert recorder.texts[f"{at}/README.md"].startswith("# run\n")
    tensors = files[f"{at}/peft_1/adapter_model.safetensors"]
    assert tensors == {
        "sha256": golden.sha256(weights),
        "header": golden.sha256(header),
        "values": golden.sha256(b"\x00\x00\x80?"),
    }
    # One bit of one value.
    other = golden.tensors_record(weights[:-1] + b"\xbf")
    assert {key for key in tensors if tensors[key] != other[key]} == {"sha256", "values"}
    # The secret of a private client is another in every recording.
    secret = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"noise_key":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
    kept = [golden.tensors_record(len(secret).to_bytes(8, "little") + secret + each) for each in (b"ax", b"ay", b"bx")]
    assert kept[0] == kept[1] != kept[2]
    # Where noise is in the adapter, what follows from it is left out.
    noisy = golden.Recorder(folder, noisy=True)
    assert noisy.file(folder / at / "peft_1" / "adapter_model.safetensors", "") is None
    assert noisy.plain({"round": 2, "train_loss": 0.5, "rows": 3}, "") == {"round": 2, "rows": 3}
    assert noisy.plain({"round": 1, "train_loss": 0.5}, "") == {"round": 1, "train_loss": 0.5}


def test_choices_are_found_in_the_schema(golden: ModuleType) -> None:
    import fedtune

    choices = golden.choices_in(fedtune.FedTuneConfig.model_json_schema())
    assert len(choices["strategy.name"]) >= 17
    assert choices["communication.codec"] == choices["communication.uplink_codec"]
    names = [case.name for case in golden.cases_of(choices, {"challenge": ["tiny"], "recipe": ["one"]})]
    assert len(names) == len(set(names))
    assert {f"strategy {name}" for name in choices["strategy.name"]} < set(names)


def test_cases_with_one_promise_are_held_against_each_other(golden: ModuleType) -> None:
    """A resumed run, another engine, another process: the same adapters, and not just as few."""

    def case(**adapters: str) -> Any:
        return {
            "files": {f"runs/run/{name}/adapter_model.safetensors": {"sha256": adapters[name]} for name in adapters}
        }

    cases = {"engine in-process": case(peft_1="aa"), "engine ray": case(peft_1="aa")}
    assert golden.broken_promises(cases) == []
    assert golden.broken_promises({**cases, "engine ray": case(peft_1="ab")}) != []
    assert golden.broken_promises({"engine in-process": case(), "engine ray": case()}) != []


@pytest.mark.slow
def test_two_recordings_are_the_same(tmp_path: Path) -> None:
    """The product is deterministic, and commands that run in one process do not change each other's results."""
    for name in ("one.json", "two.json"):
        command = [sys.executable, str(SCRIPT), "record", name, "--quick"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    command = [sys.executable, str(SCRIPT), "compare", "one.json", "two.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "the same: " in done.stdout
