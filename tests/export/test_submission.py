"""A submission is a Flower app with the run's values, its scores and bytes; an incomplete run is refused; nothing else leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import assert_clean, make_run, plant_canaries, result, write_results
from test_flwr_run import flower  # noqa: F401

from fedtune.config.facts import preset_names
from fedtune.config.load import load_config
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import ConfigError, MissingError, UsageError
from fedtune.evaluation.artefacts import write_artefacts
from fedtune.evaluation.tasks.base import Answer, Question
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.export.checkpoint import open_run
from fedtune.export.leaderboard import readiness
from fedtune.export.lint.check import check
from fedtune.export.lint.folder import flat_table
from fedtune.export.lint.published import published
from fedtune.export.submission_config import FOUR_BIT_TYPE, NAMES, from_flat, portable, to_flat
from fedtune.export.targets.submission import Submission, export_submission

# --- the folder ---------------------------------------------------------------------------------------------------------


def test_it_holds_what_the_leaderboard_asks_for_and_nothing_else(clean_submission: Path, real_run: Path) -> None:
    names = {path.relative_to(clean_submission).as_posix() for path in clean_submission.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "pyproject.toml",
        "fedtune_tiny/__init__.py",
        "fedtune_tiny/server_app.py",
        "fedtune_tiny/client_app.py",
        "fedtune.json",
        "comm_cost.txt",
        "benchmarks/acc_tiny_peft_2.txt",
        "benchmarks/generation_tiny_peft_2.jsonl",
        "peft_2/adapter_config.json",
        "peft_2/adapter_model.safetensors",
        "manifest.json",
    }
    for name in ("comm_cost.txt", "benchmarks/acc_tiny_peft_2.txt", "peft_2/adapter_model.safetensors"):
        assert (clean_submission / name).read_bytes() == (real_run / name).read_bytes()


def test_pyproject_has_the_runs_values_in_the_templates_names(clean_submission: Path) -> None:
    table = tomllib.loads((clean_submission / "pyproject.toml").read_text())["tool"]["flwr"]
    config = table["app"]["config"]
    assert config["num-server-rounds"] == 2
    assert config["model"]["lora"]["peft-lora-r"] == 8
    assert config["train"]["training-arguments"]["per-device-train-batch-size"] == 8
    assert config["train"]["learning-rate-max"] == 0.02
    assert config["strategy"]["fraction-train"] == 0.5
    assert config["static"] == {"dataset": {"name": "builtin:tiny"}, "num-supernodes": 8}
    assert table["federations"]["local-simulation"]["options"]["num-supernodes"] == 8


def test_the_readme_tells_what_was_computed(clean_submission: Path, real_run: Path) -> None:
    text = (clean_submission / "README.md").read_text()
    records = {
        record["subject"]: record for record in json.loads((real_run / "benchmarks" / "results.json").read_text())
    }
    ours, base = published(text)
    assert ours.scores["tiny"].text == f"{records['peft_2']['accuracy']:.2%}"
    assert base.scores["tiny"].text == f"{records['base']['accuracy']:.2%}"
    assert ours.average is not None
    assert ours.average.value == ours.scores["tiny"].value
    used = (real_run / "comm_cost.txt").read_text().splitlines()[-1].split("used ")[1].split(" (")[0]
    assert f"{used} of the 200,000 MB" in text
    assert "tiny is not a challenge of the leaderboard" in text
    assert "DRAFT" not in text
    changes = text.split("## Changes from the baseline")[1].split("##")[0]
    assert "| `federation.rounds` | `2` | `16` |" in changes
    assert "| `training.max_steps` | `1` | `3` |" in changes
    assert "adapter.rank" not in changes


def test_exporting_again_gives_the_same_bytes_in_place(clean_submission: Path, real_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "submission"
    shutil.copytree(clean_submission, out)
    export_submission(open_run(str(real_run)), out)

    def files(folder: Path) -> dict[Path, bytes]:
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert files(out) == files(clean_submission)
    assert Path("README.md") in files(out)


def test_a_folder_that_flower_would_refuse(real_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Flower does not accept 'my_submission'"):
        export_submission(open_run(str(real_run)), tmp_path / "my_submission")
    assert not (tmp_path / "my_submission").exists()


# --- what is missing ----------------------------------------------------------------------------------------------------


def copied(real_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(real_run, tmp_path / "runs" / real_run.name))


def test_without_official_evaluation_it_is_refused_unless_draft(real_run: Path, tmp_path: Path) -> None:
    run = copied(real_run, tmp_path)
    file = run / "benchmarks" / "results.json"
    records = json.loads(file.read_text())
    file.write_text(json.dumps([{**record, "mode": "fast"} for record in records]))
    finished = open_run(str(run))
    with pytest.raises(MissingError, match="no result of --mode official on all of tiny") as refused:
        Submission().package(finished)
    assert refused.value.hint.startswith(f"fedtune eval --bench tiny --mode official --peft {run / 'peft_2'} --base")
    made = export_submission(finished, tmp_path / "draft", draft=True)
    text = (tmp_path / "draft" / "README.md").read_text()
    assert "DRAFT, not to be submitted" in text
    assert "no result of --mode official on all of tiny" in text
    assert made.notes[0].startswith("DRAFT: peft_2 has no result")
    assert [finding.text for finding in check(tmp_path / "draft").findings] == [
        "gives no score for tiny, by which the challenge is ranked"
    ]


@pytest.mark.parametrize("change", [{"partial": "the first 8 questions"}, {"comparable": False}, {"batch_size": 8}])
def test_a_result_that_does_not_compare_does_not_count(real_run: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    run = copied(real_run, tmp_path)
    file = run / "benchmarks" / "results.json"
    file.write_text(json.dumps([{**record, **change} for record in json.loads(file.read_text())]))
    with pytest.raises(MissingError, match="no result of --mode official"):
        Submission().package(open_run(str(run)))


def test_generations_that_are_not_those_of_the_result(real_run: Path, tmp_path: Path) -> None:
    run = copied(real_run, tmp_path)
    file = run / "benchmarks" / "generation_tiny_peft_2.jsonl"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([{**row, "output": "Z"} for row in rows]))
    with pytest.raises(UsageError, match=r"do not agree with results\.json: 0 of 216 answers are right"):
        Submission().package(open_run(str(run)))
    file.unlink()
    with pytest.raises(MissingError, match="There is no file") as refused:
        Submission().package(open_run(str(run)))
    assert refused.value.hint.startswith("Score again: fedtune eval")


def test_only_the_last_checkpoint_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found = readiness(open_run(str(run), "peft_1"))
    assert found.missing[0] == "peft_1 is not the last checkpoint, the one that counts"
    assert found.hint.startswith("Omit --peft, or name peft_2")
    (run / "state" / "round-0002").rename(run / "state" / "round-0001")
    found = readiness(open_run(str(run), "peft_1"))
    assert found.missing[0] == "1 of 2 rounds are done"
    assert found.hint == f"Continue the run: fedtune train --resume {run}"


def test_a_run_of_no_challenge(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", challenge=None)
    with pytest.raises(UsageError, match="does not belong to a challenge"):
        Submission(draft=True).package(open_run(str(run)))


def test_code_is_not_scored_here(tmp_path: Path) -> None:
    found = readiness(open_run(str(make_run(tmp_path / "run", challenge="code"))))
    assert "mbpp, humaneval, multipl-e-js, multipl-e-cpp" in found.missing[0]
    assert "--draft" in found.hint


# --- a challenge of the leaderboard ---------------------------------------------------------------------------------------


def questions(bench: str, n: int) -> list[Answer]:
    """As many rows as the benchmark has, two of three of them right, with its instruction above them."""
    benchmark = parse_bench(bench)[0].task
    gold = "yes" if benchmark.answer_type == "yes-no" else "A"
    return [
        Answer(
            Question(str(number), f"{benchmark.instruction}\nQuestion: {number}?\nThe answer is:\n", gold),
            gold if number % 3 else "Z",
        )
        for number in range(n)
    ]


ROWS = {"pubmedqa": 500, "medmcqa": 4183, "medqa": 1273, "careqa": 5621}


@pytest.fixture
def medical(tmp_path: Path) -> Path:
    """A run with all the marks of a medical one, two clients of twenty a round; its base is the tiny one."""
    run = make_run(
        tmp_path / "run",
        challenge="medical",
        data={"source": "flwrlabs/medical-meadow-medical-flashcards", "revision": "0" * 40, "instruction": "{input}"},
        federation={"clients": 20, "fraction": 0.1, "rounds": 2},
    )
    records = []
    for bench, n in ROWS.items():
        answers = questions(bench, n)
        k = sum(answer.output == answer.question.gold for answer in answers)
        write_artefacts(run / "benchmarks", parse_bench(bench)[0], "peft_2", answers, k / n)
        records.append(result(run / "peft_2", bench, k, n))
    write_results(run, records)
    return run


def test_a_complete_medical_run(medical: Path, tmp_path: Path) -> None:
    export_submission(open_run(str(medical)), tmp_path / "medical")
    text = (tmp_path / "medical" / "README.md").read_text()
    (ours,) = [line for line in published(text) if not line.is_base]
    assert list(ours.scores) == ["pubmedqa", "medmcqa", "medqa", "careqa"]
    # 333 of 500, 2788 of 4183, 848 of 1273, 3747 of 5621
    assert [figure.text for figure in ours.scores.values()] == ["66.60%", "66.65%", "66.61%", "66.66%"]
    assert ours.average is not None
    assert ours.average.text == "66.63%"
    assert "| `data.reshuffle` | `true` | `false` |" in text
    assert check(tmp_path / "medical").findings == ()


def test_a_benchmark_less_is_refused(medical: Path) -> None:
    file = medical / "benchmarks" / "results.json"
    file.write_text(json.dumps([record for record in json.loads(file.read_text()) if record["bench"] != "careqa"]))
    with pytest.raises(MissingError, match="on all of careqa") as refused:
        Submission().package(open_run(str(medical)))
    assert refused.value.hint.startswith("fedtune eval --bench careqa --mode official")


def test_a_run_that_breaks_the_rules_says_so(tmp_path: Path) -> None:
    source = {"source": "flwrlabs/medical-meadow-medical-flashcards", "revision": "0" * 40}
    run = make_run(tmp_path / "run", challenge="medical", data=source)  # of two clients
    made = export_submission(open_run(str(run)), tmp_path / "medical", draft=True)
    reason = "federation.clients is 2; the rules of medical fix 20"
    assert f"not eligible: {reason}" in made.notes
    assert f"> - {reason}" in (tmp_path / "medical" / "README.md").read_text()
    assert reason in [finding.text for finding in check(tmp_path / "medical").findings]


# --- nothing else leaves ------------------------------------------------------------------------------------------------


def test_canaries_stay(real_run: Path, tmp_path: Path) -> None:
    run = copied(real_run, tmp_path)
    plant_canaries(run, tmp_path / "outside")
    out = tmp_path / "submission"
    export_submission(open_run(str(run)), out)
    assert_clean(out)


def test_a_linked_artefact_is_refused(real_run: Path, tmp_path: Path) -> None:
    run = copied(real_run, tmp_path)
    file = run / "benchmarks" / "acc_tiny_peft_2.txt"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link"):
        Submission().package(open_run(str(run)))


def test_where_it_ran_and_local_paths_stay(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = str(tmp_path / "rows.jsonl")
    config["federation"]["engine"] = "superlink"
    (run / "config.json").write_text(json.dumps(config))
    files = Submission(draft=True).package(open_run(str(run))).files
    for name, content in files.items():
        data = content.read_bytes() if isinstance(content, Path) else content
        assert str(tmp_path).encode() not in data, name
    text = files["pyproject.toml"]
    assert isinstance(text, bytes)
    assert b"superlink" not in text
    assert b'dataset.name = "rows.jsonl"' in text


# --- the config, there and back -----------------------------------------------------------------------------------------


def there_and_back(config: FedTuneConfig) -> FedTuneConfig:
    return from_flat(to_flat(portable(config)))


@pytest.mark.parametrize("kind", ["challenge", "recipe"])
def test_every_preset_survives(kind: Any) -> None:
    for name in preset_names(kind):
        config = load_config(**{kind: name}).config
        assert there_and_back(config) == config


@given(
    quantization=st.sampled_from(["nf4", "fp4", "int8", "none"]),
    checkpointing=st.sampled_from(["auto", "on", "off"]),
    targets=st.one_of(
        st.sampled_from(["default", "all-linear"]),
        st.lists(st.sampled_from(["q_proj", "v_proj", "mlp.up_proj"]), min_size=1, unique=True),
    ),
    modules=st.lists(st.sampled_from(["lm_head", "embed_tokens"]), unique=True),
    optimizer=st.sampled_from(["adamw", "adamw_8bit", "paged_adamw_8bit"]),
    rate=st.floats(1e-8, 1.0),
    strategy=st.sampled_from([{"name": "fedavg"}, {"name": "fedprox", "proximal_mu": 0.3}]),
    challenge=st.sampled_from([None, "tiny", "medical"]),
    source=st.sampled_from([None, "builtin:tiny"]),
)
@settings(max_examples=50, deadline=None)
def test_any_config_survives(
    quantization: str,
    checkpointing: str,
    targets: str | list[str],
    modules: list[str],
    optimizer: str,
    rate: float,
    strategy: dict[str, Any],
    challenge: str | None,
    source: str | None,
) -> None:
    config = FedTuneConfig.model_validate_json(
        json.dumps(
            {
                "challenge": challenge,
                "model": {"quantization": quantization, "gradient_checkpointing": checkpointing},
                "adapter": {"targets": targets, "modules_to_save": modules},
                "data": {"source": source},
                "training": {"optimizer": optimizer, "learning_rate_max": rate, "learning_rate_min": 0.0},
                "strategy": strategy,
            }
        )
    )
    assert there_and_back(config) == config


def flat() -> dict[str, Any]:
    return dict(to_flat(portable(load_config(challenge="tiny").config)))


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("model.lora.peft-lora-r", 4, "adapter.rank", 4),
        ("model.quantization", 4, "model.quantization", "fp4"),
        ("model.quantization", 8, "model.quantization", "int8"),
        ("model.gradient-checkpointing", True, "model.gradient_checkpointing", "on"),
        ("train.training-arguments.optim", "paged_adamw_8bit", "training.optimizer", "paged_adamw_8bit"),
        ("model.lora.peft-target-modules", "q_proj, v_proj", "adapter.targets", ("q_proj", "v_proj")),
        ("static.num-supernodes", 4, "federation.clients", 4),
        ("static.dataset.name", "flwrlabs/alpaca-gpt4", "data.source", "flwrlabs/alpaca-gpt4"),
        ("fedtune.communication.wire_dtype", "bf16", "communication.wire_dtype", "bf16"),
    ],
)
def test_an_edited_value_takes_effect(name: str, value: Any, path: str, expected: Any) -> None:
    found: Any = from_flat({**flat(), name: value})
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected


def test_wrong_values_are_named_as_they_stand_in_the_file() -> None:
    with pytest.raises(ConfigError) as refused:
        from_flat({**flat(), "model.lora.peft-lora-r": "eight", "num-server-rounds": 0, "model.quantization": 5})
    text = str(refused.value)
    for name in ("model.lora.peft-lora-r", "num-server-rounds", "model.quantization"):
        assert f"(from {name} in pyproject.toml)" in text
    with pytest.raises(ConfigError, match="there is no such key; did you mean num-server-rounds"):
        from_flat({**flat(), "num-server-round": 3})


def test_every_name_is_a_path_of_the_config() -> None:
    known = flat() | {"strategy.proximal-mu": 0.1}
    assert {*NAMES.values(), FOUR_BIT_TYPE} <= set(known)


# --- Flower -------------------------------------------------------------------------------------------------------------


def test_flwr_build_bundles_the_app(clean_submission: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "flwr"), "build", "--app", str(clean_submission)],
        cwd=tmp_path,
        env={**os.environ, "FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
        config = tomllib.loads(archive.read("pyproject.toml").decode())["tool"]["flwr"]["app"]["config"]
    assert names == {
        "pyproject.toml",
        "fedtune_tiny/__init__.py",
        "fedtune_tiny/server_app.py",
        "fedtune_tiny/client_app.py",
        ".info/CONTENT",
    }
    assert from_flat(flat_table(config)).federation.rounds == 2


def flwr_run(app: Path, words: list[str], environment: dict[str, str], cwd: Path) -> str:
    """Run an app and return the end of what was said; Flower gives its SuperLink 15 s, too few for a busy machine."""
    for _ in range(5):
        done = subprocess.run(
            ["flwr", "run", str(app), "--stream", *words],
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        if "Failed to start local SuperLink" not in done.stdout + done.stderr:
            break
    return done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_flwr_run_repeats_the_run(
    flower: dict[str, str],  # noqa: F811
    clean_submission: Path,
    real_run: Path,
    tmp_path: Path,
) -> None:
    """Plain `flwr run`: the nodes that pyproject.toml names, and the same bits as the in-process engine."""
    app = Path(shutil.copytree(clean_submission, tmp_path / "submission"))
    said = flwr_run(app, [], flower, tmp_path)
    weights = list((tmp_path / "runs").glob("*/peft_2/adapter_model.safetensors"))
    assert len(weights) == 1, said
    assert weights[0].read_bytes() == (real_run / "peft_2" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_edited_pyproject_is_what_flwr_runs(
    flower: dict[str, str],  # noqa: F811
    clean_submission: Path,
    tmp_path: Path,
) -> None:
    app = Path(shutil.copytree(clean_submission, tmp_path / "submission"))
    text = (app / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(text.replace("peft-lora-r = 8", "peft-lora-r = 2"))
    said = flwr_run(app, ["--run-config", "num-server-rounds=1"], flower, tmp_path)
    configs = list((tmp_path / "runs").glob("*/peft_*/adapter_config.json"))
    assert [path.parent.name for path in configs] == ["peft_1"], said
    assert json.loads(configs[0].read_text())["r"] == 2
