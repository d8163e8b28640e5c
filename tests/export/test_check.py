"""The linter finds each planted fault in a submission, nothing in a clean one, and does not stumble over garbage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.budget.ledger import Entry, comm_cost_lines
from fedtune.errors import MissingError
from fedtune.evaluation.artefacts import accuracy_text
from fedtune.export.card import title
from fedtune.export.lint.check import CheckResult, Finding, check
from fedtune.export.lint.published import Figure, bench_of, challenge_of, published, row_count, selections
from fedtune.export.package import MANIFEST
from fedtune.runs.directory import file_sha256

# --- planted faults -----------------------------------------------------------------------------------------------------


def swap(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def swap_match(file: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, file.read_text(encoding="utf-8"), count=1)
    assert count == 1
    file.write_text(text, encoding="utf-8")


def readme_score_no_k_gives(folder: Path) -> None:
    swap_match(folder / "README.md", r"(\| Tiny \| 216 \| \d+ \| )[\d.]+%", r"\g<1>50.10%")


def readme_score_of_another_k(folder: Path) -> None:
    swap_match(folder / "README.md", r"(\| Tiny \| 216 \| \d+ \| )[\d.]+%", r"\g<1>12.50%")


def average_that_is_none(folder: Path) -> None:
    swap_match(folder / "README.md", r"(\| average \|  \|  \| )[\d.]+%", r"\g<1>99.00%")


def accuracy_that_generations_do_not_give(folder: Path) -> None:
    (folder / "benchmarks" / "acc_tiny_peft_2.txt").write_text(accuracy_text(27 / 216))


def a_row_less(folder: Path) -> None:
    file = folder / "benchmarks" / "generation_tiny_peft_2.jsonl"
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))


def budget_of_another_run(folder: Path) -> None:
    swap_match(folder / "README.md", r"[\d.]+ MB of the", "12.34 MB of the")


def a_round_more_declared(folder: Path) -> None:
    swap(folder / "pyproject.toml", "num-server-rounds = 2", "num-server-rounds = 3")


def another_federation_size(folder: Path) -> None:
    swap(folder / "pyproject.toml", "options.num-supernodes = 8", "options.num-supernodes = 4")


def an_earlier_checkpoint(folder: Path) -> None:
    (folder / "peft_2").rename(folder / "peft_1")


def sums_that_contradict(folder: Path) -> None:
    file = folder / "comm_cost.txt"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([first.replace("used ", "used 9"), *rest]))


def another_rank(folder: Path) -> None:
    swap(folder / "pyproject.toml", "peft-lora-r = 8", "peft-lora-r = 4")


def another_base(folder: Path) -> None:
    swap(folder / "peft_2" / "adapter_config.json", "builtin:tiny", "mistralai/Mistral-7B-v0.3")


def pickled_weights(folder: Path) -> None:
    (folder / "peft_2" / "adapter_model.bin").write_bytes(b"\x80\x04.")


def a_damaged_adapter(folder: Path) -> None:
    file = folder / "peft_2" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def a_token(folder: Path) -> None:
    (folder / ".env").write_text("HF_TOKEN=hf_" + "a" * 34)


def a_link_outside(folder: Path) -> None:
    (folder / "notes.md").symlink_to("/etc/hostname")


def no_score(folder: Path) -> None:
    swap(folder / "README.md", "| Tiny |", "| Large |")


def a_misspelt_key(folder: Path) -> None:
    swap(folder / "pyproject.toml", "strategy.name", "strategy.nmae")


FAULTS: list[tuple[Callable[[Path], None], str, str]] = [
    (readme_score_no_k_gives, "README.md", "tiny 50.10%: no number of right answers among 216 gives it"),
    (readme_score_of_another_k, "README.md", "gives 12.50% for tiny; benchmarks/generation_tiny_peft_2.jsonl gives"),
    (average_that_is_none, "README.md", "gives 99.00% as average of tiny; it is"),
    (accuracy_that_generations_do_not_give, "benchmarks/acc_tiny_peft_2.txt", "says 0.125; benchmarks/generation_tiny"),
    (a_row_less, "benchmarks/generation_tiny_peft_2.jsonl", "holds 215 rows; tiny has 216"),
    (budget_of_another_run, "README.md", "gives 12.34 MB as communication budget; comm_cost.txt:"),
    (a_round_more_declared, "comm_cost.txt", "has 2 rounds; pyproject.toml declares num-server-rounds = 3"),
    (another_federation_size, "pyproject.toml", "gives several numbers of clients: 8, 4"),
    (an_earlier_checkpoint, "peft_1", "is the adapter of another checkpoint; that of the last one, peft_2, is missing"),
    (sums_that_contradict, "comm_cost.txt", "contradicts itself: entry 1 says 9"),
    (another_rank, "peft_2/adapter_config.json", "r is 8; pyproject.toml says model.lora.peft-lora-r = 4"),
    (
        another_base,
        "peft_2/adapter_config.json",
        "the base model is mistralai/Mistral-7B-v0.3; pyproject.toml says builtin",
    ),
    (pickled_weights, "peft_2/adapter_model.bin", "is a pickle"),
    (a_damaged_adapter, "peft_2/adapter_model.safetensors", "damaged"),
    (a_token, ".env", "contains what looks like a secret (hf_aaa…)"),
    (a_link_outside, "notes.md", "is a link"),
    (no_score, "README.md", "gives no score for tiny, by which the challenge is ranked"),
    (a_misspelt_key, "pyproject.toml", "strategy.nmae: there is no such key; did you mean strategy.name?"),
]


def sign(folder: Path) -> None:
    """Write the manifest anew, as whoever plants a fault in good faith would."""
    names = [
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    digests = {name: file_sha256(folder / name) for name in names if name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(digests))


@pytest.fixture
def planted(clean_submission: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean_submission, tmp_path / "submission"))


def test_a_clean_submission_has_no_findings(clean_submission: Path) -> None:
    result = check(clean_submission)
    assert result.findings == ()
    assert "challenge: tiny" in result.checked
    assert any(line.startswith("comm_cost.txt: 2 rounds") for line in result.checked)


@pytest.mark.parametrize(("plant", "file", "text"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_each_planted_fault_is_the_one_finding(
    planted: Path, plant: Callable[[Path], None], file: str, text: str
) -> None:
    plant(planted)
    sign(planted)
    (finding,) = check(planted).findings
    assert finding.file == file
    assert text in finding.text


def test_the_manifest_tells_a_changed_and_a_missing_file(planted: Path) -> None:
    swap(planted / "fedtune.json", '"seed": 42', '"seed": 43')
    (planted / "fedtune_tiny" / "__init__.py").unlink()
    assert check(planted).findings == (
        Finding("fedtune.json", "does not have the sha256 that manifest.json lists"),
        Finding("fedtune_tiny/__init__.py", "is missing; manifest.json lists it"),
    )


def test_an_unfinished_file_is_named(planted: Path) -> None:
    for name in ("pyproject.toml", "README.md", "comm_cost.txt", MANIFEST):
        (planted / name).unlink()
    found = {finding.file: finding.text for finding in check(planted).findings}
    assert found["pyproject.toml"] == "is missing: a submission is a Flower app"
    assert found["README.md"] == "is missing"
    assert found["comm_cost.txt"].startswith("is missing")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="There is no folder"):
        check(tmp_path / "nothing")


# --- anyone's -----------------------------------------------------------------------------------------------------------

PYPROJECT = """
[tool.flwr.app.config]
model.name = "HPAI-BSC/Llama3.1-Aloe-Beta-8B"
model.lora.peft-lora-r = 32
num-server-rounds = 10
[tool.flwr.app.config.static]
dataset.name = "{data}"
[tool.flwr.federations.local-simulation]
options.num-supernodes = {clients}
"""

ALOE = "| PubMedQA | MedMCQA | MedQA | CareQA | Average |\n|---|:---:|---|---|---|\n| 74.80 | 55.39 | 59.31 | 64.79 | 63.57 |\n"
PART_BYTES = 109_100_720
"""Two clients' adapters of that recipe."""


@pytest.fixture
def anyones(tmp_path: Path) -> Callable[..., CheckResult]:
    """A submission as the template makes it, with the published figures of the medical recipe (protocol, section 2)."""

    def build(
        table: str = ALOE, *, data: str = "flwrlabs/medical-meadow-medical-flashcards", clients: int = 20
    ) -> CheckResult:
        (tmp_path / "pyproject.toml").write_text(PYPROJECT.format(data=data, clients=clients))
        (tmp_path / "README.md").write_text(f"# Medical\n\n{table}\n### Communication Budget\n\n2080.93 Megabytes\n")
        entries = [Entry(n, 0, way, "train", PART_BYTES, 0) for n in range(1, 11) for way in ("down", "up")]  # type: ignore[arg-type]
        (tmp_path / "comm_cost.txt").write_text("".join(comm_cost_lines(entries)))
        return check(tmp_path)

    return build


def test_published_figures_that_are_right(anyones: Callable[..., CheckResult]) -> None:
    """374 of 500, 2317 of 4183, 755 of 1273, 3642 of 5621: all four scores and their mean are possible."""
    result = anyones()
    assert result.findings == ()
    assert "challenge: medical" in result.checked


@pytest.mark.parametrize(
    ("table", "findings"),
    [
        (
            ALOE.replace("74.80", "74.83"),
            ["pubmedqa 74.83: no number of right answers among 500 gives it; the nearest are "],
        ),
        (ALOE.replace("63.57", "63.75"), ["gives 63.75 as average of pubmedqa, medmcqa, medqa, careqa; it is 63.57%"]),
        (ALOE.replace("CareQA", "Other").replace("63.57", "63.17"), ["gives no score for careqa"]),
        (
            "| Benchmark | Acc |\n|---|---|\n| **PubMedQA** | 0.748 |\n| MedMCQA | `0.5539` |\n"
            "| MedQA | 0.5931 |\n| CareQA | .6479 |\n| *Avg.* | 0.6357 |\n",
            [],
        ),
        ("- PubMedQA: 74.8%\n- **MedMCQA**: 55.39 %\n- MedQA: 59.31%\n- CareQA: 64.79%\n- Average: 63.57%\n", []),
        ("- PubMedQA: 74.85%\n- MedMCQA: 55.39 %\n- MedQA: 59.31%\n- CareQA: 64.79%\n", ["pubmedqa 74.85%: no number"]),
    ],
)
def test_forms_of_readmes(anyones: Callable[..., CheckResult], table: str, findings: list[str]) -> None:
    found = anyones(table).findings
    assert len(found) == len(findings)
    for finding, text in zip(found, findings, strict=True):
        assert finding.file == "README.md"
        assert finding.text.startswith(text)


def test_the_rules_of_the_challenge(anyones: Callable[..., CheckResult]) -> None:
    (finding,) = anyones(clients=10).findings
    assert finding == Finding("pyproject.toml", "has 10 clients; the rules of medical fix 20")
    (finding,) = anyones(data="somebody/medical-meadow-medical-flashcards").findings
    assert finding.text.startswith(
        "the data set is somebody/medical-meadow-medical-flashcards; the rules of medical fix"
    )


def test_a_budget_over_the_cap(tmp_path: Path) -> None:
    entries = [Entry(1, 0, way, "train", 150_000 * 2**20, 0) for way in ("down", "up")]  # type: ignore[arg-type]
    (tmp_path / "comm_cost.txt").write_text("\n".join(comm_cost_lines(entries)))
    texts = [finding.text for finding in check(tmp_path).findings if finding.file == "comm_cost.txt"]
    assert texts == ["300,000.00 of 200,000 MB were used; the rules allow 200,000"]


def test_real_published_generations(tmp_path: Path, shared_data: Path) -> None:
    """Published runs rescore to what they claim."""
    names = {"pubmedqa_a": "pubmedqa", "medqa_b": "medqa", "mmlu_stem_c": "mmlu:stem", "fpb_d": "fpb"}
    for stem in names:
        shutil.copy(shared_data / "generations" / f"{stem}.json", tmp_path / f"generation_{stem}.json")
    seen = check(tmp_path)
    assert {finding.file for finding in seen.findings} == {"README.md", "pyproject.toml", "comm_cost.txt"}
    assert sum(any(f": {bench}, " in line for line in seen.checked) for bench in names.values()) == len(names)


def test_one_question_more_than_its_generations_give(tmp_path: Path, shared_data: Path) -> None:
    shutil.copy(shared_data / "generations" / "medqa_b.json", tmp_path / "generation_medqa_b.json")
    claim = json.loads((tmp_path / "generation_medqa_b.json").read_text())["published_accuracy"]
    for accuracy, wrong in ((claim, 0), (claim + 1 / 1273, 1)):
        (tmp_path / "acc_medqa_b.txt").write_text(accuracy_text(accuracy))
        found = [finding for finding in check(tmp_path).findings if finding.file.startswith("acc")]
        assert len(found) == wrong
    assert f"gives {claim!r}" in found[0].text


# --- parts --------------------------------------------------------------------------------------------------------------


def test_counts_that_round_to_a_figure() -> None:
    """37.5 % of 216 is 81; 37.6 % lies between 81 (37.500) and 82 (37.963)."""
    assert list(Figure("37.50", Fraction(375, 1000), Fraction(1, 20000)).counts(216)) == [81]
    assert list(Figure("37.60", Fraction(376, 1000), Fraction(1, 20000)).counts(216)) == []
    assert list(Figure("38", Fraction(38, 100), Fraction(1, 200)).counts(216)) == [81, 82, 83]


@given(st.sampled_from([216, 500, 1273, 4183, 5621]), st.data(), st.integers(1, 4), st.booleans())
def test_a_rounded_k_of_n_is_always_possible(n: int, data: st.DataObject, decimals: int, percent: bool) -> None:
    k = data.draw(st.integers(0, n))
    shown = f"{100 * k / n:.{decimals}f}%" if percent else f"{k / n:.{decimals}f}"
    name = {216: "tiny", 500: "PubMedQA", 1273: "MedQA", 4183: "MedMCQA", 5621: "CareQA"}[n]
    (line,) = published(f"|x|{name}|\n|-|-|\n|run|{shown}|\n")
    (figure,) = line.scores.values()
    assert k in figure.counts(n)


@pytest.mark.parametrize(
    ("heading", "bench"),
    [
        ("MMLU-STEM", "mmlu:stem"),
        ("SS", "mmlu:social_sciences"),
        ("**Humanities**", "mmlu:humanities"),
        ("PubMedQA (%)", "pubmedqa"),
        ("FiQA", "fiqa"),
        ("HumanEval", "humaneval"),
        ("Avg.", "average"),
        ("Model", None),
        ("MMLU", None),
    ],
)
def test_names_of_benchmarks(heading: str, bench: str | None) -> None:
    assert bench_of(heading) == bench


@pytest.mark.parametrize("bench", sorted(selections()))
def test_our_own_headings_are_read_back(bench: str) -> None:
    assert bench_of(title({"bench": bench})) == bench


def test_the_best_fitting_system_is_held_against_the_files(planted: Path) -> None:
    """Beside the row that fits stand a base, another checkpoint and another model, on which nothing is known."""
    score = (
        next(line for line in published((planted / "README.md").read_text()) if not line.is_base).scores["tiny"].text
    )
    rows = f"| base model | 25.00 |\n| peft_1 | 12.50 |\n| ours | {score} |\n| another | 37.50 |\n"
    text = (planted / "README.md").read_text().split("## Results")
    end = text[1][text[1].index("## Method") :]
    (planted / "README.md").write_text(f"{text[0]}## Results\n\n| model | Tiny |\n|--|--|\n{rows}\n{end}")
    sign(planted)
    assert check(planted).findings == ()
    swap(planted / "README.md", f"| ours | {score} |\n| another | 37.50 |", "| ours | 62.50 |")
    sign(planted)
    (finding,) = check(planted).findings
    assert finding.text.startswith("gives 62.50 for tiny")


def test_challenges_and_row_counts() -> None:
    assert challenge_of(["fpb", "tfns"]) == "finance"
    assert challenge_of([]) is None
    assert (row_count("mmlu:stem"), row_count("tiny"), row_count("mbpp")) == (3153, 216, None)


GARBAGE = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(str.encode),
    st.lists(
        st.sampled_from(["|", "-", "MedQA", "59.31", "\n", ":", "%", " ", "- ", "Average", "rank", "8", "used", "MB"])
    ).map(lambda parts: "".join(parts).encode()),
)
FILES = (
    "README.md",
    "pyproject.toml",
    "comm_cost.txt",
    MANIFEST,
    "benchmarks/acc_medqa_peft_2.txt",
    "benchmarks/generation_medqa_peft_2.jsonl",
    "peft_2/adapter_config.json",
    "peft_2/adapter_model.safetensors",
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(contents=st.fixed_dictionaries({}, optional=dict.fromkeys(FILES, GARBAGE)))
def test_garbage_gives_findings(tmp_path: Path, contents: dict[str, bytes]) -> None:
    shutil.rmtree(tmp_path)
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    tmp_path.mkdir(exist_ok=True)
    assert check(tmp_path).findings


TOML_VALUES = st.recursive(
    st.one_of(st.integers(-5, 5), st.text(max_size=5), st.booleans(), st.floats(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(
    key=st.sampled_from(
        ["num-server-rounds", "model.name", "model.lora.peft-lora-r", "static", "dataset", "fedtune.challenge"]
    ),
    value=TOML_VALUES,
    adapter=st.fixed_dictionaries(
        {"peft_type": st.just("LORA")},
        optional=dict.fromkeys(["r", "target_modules", "base_model_name_or_path"], TOML_VALUES),
    ),
    manifest=TOML_VALUES,
)
def test_wrong_types_give_findings(
    tmp_path: Path, clean_submission: Path, key: str, value: object, adapter: dict[str, object], manifest: object
) -> None:
    """Well-formed files with values of any type."""
    (tmp_path / "peft_2").mkdir(exist_ok=True)
    (tmp_path / "pyproject.toml").write_text(
        f"[tool.flwr.app.config]\nx = 1\n{key} = {json.dumps(value)}\n", encoding="utf-8", errors="replace"
    )
    (tmp_path / "peft_2" / "adapter_config.json").write_text(json.dumps(adapter))
    shutil.copy(clean_submission / "peft_2" / "adapter_model.safetensors", tmp_path / "peft_2")
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert check(tmp_path).findings
