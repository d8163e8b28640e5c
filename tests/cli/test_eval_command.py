"""`fedtune eval` from the command line: tables and JSON, mistakes, kill -9, existing generations, lm-eval."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.families import build
from typer.testing import CliRunner

from fedtune.cli.app import app
from fedtune.config.schema import AdapterConfig, FedTuneConfig, ModelConfig
from fedtune.models.adapter import attach, write_adapter
from fedtune.models.base import load_base
from fedtune.runs.atomic import read_json_lines

SHIPPED = Path(sys.modules["fedtune"].__file__ or "").parent / "data" / "builtin" / "tiny" / "test.jsonl"
ROWS = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]


def fedtune(*words: str | Path) -> Result:
    """Run the command in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors; more threads only wait for each other
    try:
        return CliRunner().invoke(app, ["eval", *map(str, words)])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with two adapters and a ledger, as `fedtune train` leaves it."""
    folder = tmp_path_factory.mktemp("work") / "runs" / "tiny-1"
    folder.mkdir(parents=True)
    model = ModelConfig(base="builtin:tiny", quantization="none")
    (folder / "config.json").write_text(FedTuneConfig(model=model).model_dump_json())
    (folder / "run.json").write_text("{}")
    base = load_base(model)
    config = AdapterConfig(rank=2, alpha=8, targets="all-linear")
    adapted = attach(base, config)
    for number in (1, 2):
        tensors = {name: torch.full(shape, 0.01 * number) for name, shape in adapted.shapes.items()}
        write_adapter(
            folder / f"peft_{number}",
            tensors,
            config,
            base_name="builtin:tiny",
            revision=None,
            target_modules=adapted.target_modules,
        )
    message = {"node": 0, "direction": "down", "kind": "train", "serialised_bytes": 2**20 + 9}
    lines(folder / "ledger.jsonl", [{"round": number, **message, "bytes": 2**20} for number in (1, 2)])
    return folder


def test_a_run_and_its_base(run: Path) -> None:
    """The base comes from the run, results go to its folder, and the table shows each checkpoint's MiB."""
    words = ["--bench", "tiny", "--limit", "12", "--runs", run.parent, "--base", "--peft", "peft_1", "--peft", "peft_2"]
    done = fedtune(*words)
    assert done.exit_code == 0, done.stderr
    assert "tiny · flowertune · fast" in done.stdout
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in map(_cells, done.stdout.splitlines())}
    assert rows["peft_1"][-2] == "1.00"  # MiB up to its round
    assert rows["peft_2"][-2] == "2.00"
    assert "(p = " in rows["peft_1"][4]
    assert "(partial)" in rows["base"][0]
    assert done.stderr.count("CPU") == (0 if torch.cuda.is_available() else 1)
    assert "partial: --limit 12" in done.stderr
    assert str(run / "benchmarks" / "results.json") in done.stderr
    again = fedtune(*words, "--json")
    assert again.exit_code == 0, again.stderr
    said = json.loads(again.stdout)
    assert [each["subject"] for each in said["results"]] == ["base", "peft_1", "peft_2"]
    assert said["results"] == json.loads(Path(said["file"]).read_text())
    assert {each["model"]["quantization"] for each in said["results"]} == {"fp4"}
    assert [each["used_mib"] for each in said["results"]] == [None, 1.0, 2.0]


def _cells(line: str) -> list[str]:
    cells = re.split("[│┃]", line)
    return cells if len(cells) > 3 else ["", "", "", ""]


def test_verify_and_official(run: Path) -> None:
    done = fedtune("--bench", "tiny", "--limit", "9", "--base", "--model", "builtin:tiny", "--verify", "4")
    assert "base on tiny: 4 of 4 answers equal one-by-one generation" in done.stderr
    done = fedtune("--bench", "tiny", "--limit", "9", "--base", "--model", "builtin:tiny", "--mode", "official")
    assert "tiny · flowertune · official" in done.stdout
    assert Path("runs/evaluations/builtin-tiny/acc_tiny_base_first9.txt").is_file()


def test_unparsed_outputs_are_a_warning(tmp_path: Path) -> None:
    """A model that answers with something other than a letter."""
    base = load_base(ModelConfig(base="builtin:tiny", quantization="none"))
    base.model.save_pretrained("same")
    base.tokenizer.save_pretrained("same")
    weights = load_file("same/model.safetensors")
    # Every logit is 0, so that the greedy token is the first of the vocabulary, a special token.
    weights["model.norm.weight"] = torch.zeros_like(weights["model.norm.weight"])
    save_file(weights, "same/model.safetensors", metadata={"format": "pt"})
    done = fedtune("--bench", "tiny", "--limit", "8", "--base", "--model", "./same", "--quantization", "none")
    assert done.exit_code == 0, done.stderr
    assert "100.0% of the outputs are unparsed answers, most often '" in done.stderr
    assert "(8)" in done.stderr


def test_the_path_of_a_model_with_windows_is_named(tmp_path: Path) -> None:
    """Windows of 16 tokens: the answers equal one-by-one generation, and the output names the path."""
    build("mistral", tmp_path)
    words = ["--bench", "tiny", "--limit", "12", "--base", "--model", "./mistral", "--quantization", "none"]
    done = fedtune(*words, "--verify", "12")
    assert done.exit_code == 0, done.stderr
    assert "base on tiny: 12 of 12 answers equal one-by-one generation" in done.stderr
    assert "base on tiny: answered with shared prefixes (equal to one-by-one generation on 3 prompts" in done.stderr


@pytest.mark.parametrize("content", ['[{"subject": "ba', '{"runs": []}', '[{"name": "else"}]', '{"format": 99}', ""])
def test_results_that_cannot_be_read_are_refused(tmp_path: Path, content: str) -> None:
    Path("out").mkdir()
    Path("out/results.json").write_text(content)
    words = ["--bench", "tiny", "--limit", "4", "--base", "--model", "builtin:tiny", "--out", "out"]
    for more in ([], ["--protocol", "lm-eval", "--bench", "medqa", "--data-dir", "data"]):
        if more:
            lines(Path("data", "medqa.jsonl"), LM_EVAL_ROWS["medqa"])
            words = words[2:]
        done = fedtune(*words, *more)
        assert done.exit_code == 3, done.stderr
        assert "out/results.json" in done.stderr
        assert "→ " in done.stderr
        assert Path("out/results.json").read_text() == content
    assert [path.name for path in Path("out").iterdir() if path.name != "answers"] == ["results.json"]
    assert not any(Path("out").glob("answers/*"))


def test_a_results_folder_that_is_a_file(tmp_path: Path) -> None:
    Path("out").write_text("")
    done = fedtune("--bench", "tiny", "--base", "--model", "builtin:tiny", "--out", "out")
    assert done.exit_code == 3
    assert "Results cannot be written to out" in done.stderr


@pytest.mark.parametrize("family", ["gemma3_text", "opt", "bloom", "mamba"])
def test_lm_eval_on_other_families(tmp_path: Path, family: str) -> None:
    build(family, tmp_path)
    lines(Path("data", "medqa.jsonl"), LM_EVAL_ROWS["medqa"])
    words = ["--bench", "medqa", "--data-dir", "data", "--base", "--model", f"./{family}", "--quantization", "none"]
    done = fedtune(*words, "--protocol", "lm-eval", "--out", "out")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--bench", "tiny"], 2, "There is nothing to score"),
        (["--base", "--model", "builtin:tiny"], 2, "No benchmark is named"),
        (["--bench", "medmqca", "--base", "--model", "builtin:tiny"], 2, "Did you mean --bench medmcqa"),
        (["--bench", "code", "--base", "--model", "builtin:tiny"], 2, "run generated code"),
        (["--bench", "tiny", "--base"], 2, "--model MODEL"),
        (["--bench", "tiny", "--base", "--model", "./nothing"], 3, "There is no folder ./nothing"),
        (["--bench", "tiny", "--base", "--model", "owner/name"], 3, "cannot be reached"),
        (["--bench", "tiny", "--peft", "owner/name"], 3, "cannot be reached"),
        (["--bench", "medmcqa", "--base", "--model", "builtin:tiny"], 3, "--data-dir DIR"),
        (["--bench", "medmcqa", "--base", "--model", "builtin:tiny", "--data-dir", "no"], 3, "no folder no"),
        (["--bench", "tiny", "--peft", "peft_9"], 3, "There is no adapter 'peft_9'"),
        (["--bench", "tiny", "--peft", "pickled"], 3, "a pickle, which fedtune never loads"),
        (["--bench", "tiny", "--peft", "damaged"], 3, "is damaged"),
        (["--bench", "tiny", "--peft", "other"], 3, "does not fit the model"),
        (["--bench", "tiny", "--base", "--model", "builtin:tiny", "--limit", "0"], 2, "--limit 0"),
        (
            ["--bench", "tiny", "--base", "--model", "builtin:tiny", "--mode", "slow"],
            2,
            "'slow' is not one of",
        ),
        (
            ["--bench", "tiny", "--base", "--model", "builtin:tiny", "--protocol", "x"],
            2,
            "'x' is not one of",
        ),
        (
            ["--bench", "tiny", "--base", "--model", "builtin:tiny", "--quantization", "nf4", "--mode", "official"],
            2,
            "Omit --quantization",
        ),
        (["--bench", "tiny", "--base", "--model", "builtin:tiny", "--protocol", "lm-eval"], 2, "no task for tiny"),
        (
            ["--bench", "medqa", "--base", "--model", "builtin:tiny", "--protocol", "lm-eval", "--verify", "3"],
            2,
            "Omit --protocol",
        ),
        (["--bench", "tiny", "--peft", "peft_1", "stray.json"], 2, "stray.json does not belong to an option"),
        (["--rescore", "missing.json"], 3, "no file missing.json"),
        (["--rescore", "garbage.json"], 2, "garbage.json is not a generation file"),
    ],
)
def test_mistakes_get_one_paragraph(
    run: Path, tmp_path: Path, words: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name, file in (("pickled", "adapter_model.bin"), ("damaged", "adapter_model.safetensors")):
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_bytes((run / "peft_1" / "adapter_config.json").read_bytes())
        Path(name, file).write_bytes(b"\x80\x04.")
    config = AdapterConfig(rank=2, targets=("q_proj",))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.zeros(2, 48), key.format("B"): torch.zeros(48, 2)}
    write_adapter(Path("other"), tensors, config, base_name="builtin:tiny", revision=None, target_modules=["q_proj"])
    Path("garbage.json").write_text('[{"prompt": ')
    done = fedtune(*words)
    assert done.exit_code == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert len(done.stderr) < 700
    assert done.stdout == ""


def test_kill_9_and_continue(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every question is in the journal once, and the result equals that of an uninterrupted call."""
    shared = Path(__file__).parents[2].parent / "shared" / "data" / "benchmarks" / "medmcqa.jsonl"
    if shared.is_file():
        bench, rows = "medmcqa", [json.loads(line) for line in shared.read_text(encoding="utf-8").splitlines()[:400]]
    else:
        bench, rows = "tiny", [row | {"question": f"{n}: {row['question']}"} for n in range(3) for row in ROWS]
    lines(Path("data", f"{bench}.jsonl"), rows)
    words = ["--bench", bench, "--data-dir", "data", "--base", "--model", "builtin:tiny", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedtune.cli.app", "eval", *words, "--out", "killed"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def journal() -> list[int]:
        return [
            line["place"]
            for path in Path("killed").glob("answers/*")
            for line in read_json_lines(path)
            if "place" in line
        ]

    deadline = time.monotonic() + 120
    while not journal():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(journal()) < len(rows)

    on, whole = fedtune(*words, "--out", "killed"), fedtune(*words, "--out", "whole")
    assert on.exit_code == whole.exit_code == 0, on.stderr
    assert sorted(journal()) == list(range(len(rows)))
    first, second = (json.loads(done.stdout)["results"][0] for done in (on, whole))
    times = {"seconds", "questions_per_second", "tokens_per_second"}
    assert {key: first[key] for key in first.keys() - times} == {key: second[key] for key in second.keys() - times}
    name = f"generation_{bench}_base_fast.jsonl"
    assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()


def test_rescore(tmp_path: Path) -> None:
    """Files of fedtune, as a table and as JSON."""
    fedtune("--bench", "tiny", "--limit", "12", "--base", "--model", "builtin:tiny", "--out", "out")
    ours = Path("out/generation_tiny_base_fast_first12.jsonl")
    accuracy = json.loads(Path("out/results.json").read_text())[0]["accuracy"]
    done = fedtune("--rescore", ours, ours)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count(f" {accuracy!r} ") == 2
    done = fedtune("--rescore", ours, "--rescore", ours, "--json")
    assert [each["accuracy"] for each in json.loads(done.stdout)] == [accuracy, accuracy]


def test_rescore_the_published(shared_data: Path) -> None:
    """All five in one call, to the last digit."""
    files = sorted((shared_data / "generations").glob("*.json"))
    assert len(files) == 5
    done = fedtune("--rescore", *files)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("the same") == 5
    for path in files:
        assert f" {json.loads(path.read_text())['published_accuracy']!r} " in done.stdout


CHOICES = {"opa": "one", "opb": "two", "opc": "three", "opd": "four"}
LM_EVAL_ROWS: dict[str, list[dict[str, Any]]] = {
    "medmcqa": [{"question": f"Which, {n}?", **CHOICES, "cop": n % 4} for n in range(5)],
    "medqa": [
        {
            "question": f"A patient comes {n} times. What is next?",
            "options": [{"key": key, "value": f"{key}{n}"} for key in "ABCD"],
            "answer": f"C{n}",
        }
        for n in range(5)
    ],
    "pubmedqa": [
        {"CONTEXTS": ["They ran.", "They slept."], "QUESTION": f"Is {n} enough?", "final_decision": decision}
        for n, decision in enumerate(("yes", "no", "maybe"))
    ],
    "mmlu/anatomy": [{"input": f"Where is {n}?", **dict.fromkeys("ABCD", "here"), "target": "D"} for n in range(4)],
}


def test_lm_eval_on_local_data(run: Path) -> None:
    """lm-eval's tasks on local files; every output has the label; the leaderboard's results stay."""
    for name, rows in LM_EVAL_ROWS.items():
        lines(Path("data", f"{name}.jsonl"), rows)
    words = ["--bench", "medmcqa,medqa,pubmedqa,mmlu:anatomy", "--data-dir", "data", "--base", "--peft", run / "peft_2"]
    done = fedtune(*words, "--protocol", "lm-eval", "--out", "out")
    assert done.exit_code == 0, done.stderr
    label = "log-likelihood, not comparable with the leaderboard"
    assert done.stdout.count(f"lm-eval · {label}") == 4
    assert "medmcqa has 5 rows, the official data 4183" in done.stderr
    records = json.loads(Path("out/results.json").read_text())
    assert [(each["subject"], each["bench"], each["n"]) for each in records] == [
        (subject, bench, n)
        for subject in ("base", "peft_2")
        for bench, n in (("medmcqa", 5), ("medqa", 5), ("pubmedqa", 3), ("mmlu:anatomy", 4))
    ]
    for each in records:
        assert each["protocol"] == "lm-eval"
        assert each["comparability"] == label
        assert each["comparable"] is False
        assert each["unparsed"] is None
        assert each["accuracy"] == each["k"] / each["n"]
        assert (each["against_base"] is None) == (each["subject"] == "base")
    assert not list(Path("out").glob("acc_*"))
    # Results by the leaderboard's protocol go to the same file.
    done = fedtune(
        "--bench", "medqa", "--data-dir", "data", "--base", "--model", "builtin:tiny", "--out", "out", "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert len(json.loads(Path("out/results.json").read_text())) == 9
    # Rows are checked before lm-eval sees them.
    lines(Path("data/medqa.jsonl"), [{"question": "What?"}])
    done = fedtune(
        "--bench", "medqa", "--data-dir", "data", "--base", "--model", "builtin:tiny", "--protocol", "lm-eval"
    )
    assert done.exit_code == 2
    assert "1 of 1 rows cannot be used" in done.stderr


@pytest.mark.filterwarnings("ignore")  # PEFT's warnings
def test_adapters_of_plain_peft(tmp_path: Path) -> None:
    """On an embedding; with a fully trained head; with an initialization that changes the base."""
    for name, settings in {
        "head": {"modules_to_save": ["lm_head"]},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "pissa": {"init_lora_weights": "pissa"},
    }.items():
        model = load_base(ModelConfig(base="builtin:tiny", quantization="none", compute_dtype="fp32")).model
        adapted = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings}))
        adapted.save_pretrained(str(tmp_path / name))
    words = ["--bench", "tiny", "--limit", "3", "--model", "builtin:tiny", "--quantization", "none", "--json"]
    done = fedtune(*words, "--peft", "head", "--peft", "embedding", "--base")
    assert done.exit_code == 0, done.stderr
    assert [each["subject"] for each in json.loads(done.stdout)["results"]] == ["base", "head", "embedding"]
    refused = fedtune(*words, "--peft", "pissa")
    assert refused.exit_code == 3
    assert "init_lora_weights = pissa" in refused.stderr
    assert "path_initial_model_for_weight_conversion" in refused.stderr
