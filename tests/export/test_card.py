"""The model card: every number in it from the run, every id in it one that the hub knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from small_runs import TOKEN, make_run, result, write_results

from fedtune.errors import MissingError, UsageError
from fedtune.export.card import card
from fedtune.export.checkpoint import RunCheckpoint, open_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "tiny-1")


def with_config(run: Path, **values: Any) -> RunCheckpoint:
    """Open the run with other values at dotted paths, written with two underscores."""
    config = open_run(str(run)).config.model_dump(mode="json")
    for path, value in values.items():
        section, _, key = path.rpartition("__")
        (config[section] if section else config)[key] = value
    (run / "config.json").write_text(json.dumps(config))
    return open_run(str(run))


def communication(finished: RunCheckpoint) -> str:
    """Return the card's section on communication."""
    return card(finished).partition("## Communication\n\n")[2].partition("\n##")[0]


def metadata(finished: RunCheckpoint, **more: Any) -> Any:
    return ModelCard(card(finished, **more)).data


def test_scores_stand_beside_the_base(run: Path) -> None:
    adapter = run / "peft_2"
    base = result(None, "tiny", 30, 100)
    write_results(run, [base, result(adapter, "tiny", 45, 100, interval_95=[0.3556, 0.5476], unparsed=7)])
    finished = open_run(str(run))
    row = "| Tiny | 45.00% | 35.6% – 54.8% | 30.00% (25.0% – 50.0%) | 7.0% | 100 | official |"
    assert row in card(finished).splitlines()
    data = metadata(finished)
    assert [(each.metric_type, each.metric_value) for each in data.eval_results] == [
        ("accuracy", 0.45),
        ("unparsed", 0.07),
    ]
    assert data.model_name == "tiny-1-peft_2"
    assert data.eval_results[0].dataset_type == "fedtune-tiny"
    # The base on other questions is no base to compare with.
    write_results(run, [{**base, "prompts_sha256": "1" * 64}, result(adapter, "tiny", 45, 100)])
    assert "| not evaluated | 10.0% | 100 |" in card(open_run(str(run)))


@pytest.mark.parametrize(
    "more",
    [
        {"partial": "--limit 10 of 216 rows"},
        {"comparable": False},
        {"batch_size": 8},
        {"model": {"quantization": "nf4"}},
        {"protocol": "lm-eval"},
        {"adapter_sha256": "0" * 64},
    ],
    ids=str,
)
def test_only_whole_official_results_are_published(run: Path, more: dict[str, Any]) -> None:
    write_results(run, [result(run / "peft_2", "tiny", 45, 100, **more)])
    finished = open_run(str(run))
    assert metadata(finished).eval_results is None
    text = card(finished)
    assert "has not been evaluated on a whole benchmark" in text
    assert "- The challenge's benchmarks tiny." in text
    assert ("Only a part of the questions, therefore not in the table: tiny." in text) == ("partial" in more)
    assert finished.evaluation_command == f"fedtune eval --bench tiny --peft {run / 'peft_2'} --base"


def test_official_stands_before_fast(run: Path) -> None:
    adapter = run / "peft_2"
    for records in (
        [result(adapter, "tiny", 1, 4, mode="fast"), result(adapter, "tiny", 2, 4)],
        [result(adapter, "tiny", 2, 4), result(adapter, "tiny", 1, 4, mode="fast")],
    ):
        write_results(run, records)
        assert [record["k"] for record in open_run(str(run)).complete_results] == [2]


def test_averages_are_averages_of_the_challenges_benchmarks(run: Path) -> None:
    """The published scores of a recipe: (74.80 + 55.39 + 59.31 + 64.79) / 4 = 63.57."""
    counts = {"pubmedqa": (374, 500), "medmcqa": (2317, 4183), "medqa": (755, 1273), "careqa": (3642, 5621)}
    adapter = run / "peft_2"
    records = [result(adapter, bench, k, n) for bench, (k, n) in counts.items()]
    write_results(run, records[:3])
    finished = with_config(run, challenge="medical")
    assert finished.missing_benches == ["careqa"]
    assert finished.average_accuracy is None
    assert "Average accuracy" not in card(finished)
    write_results(run, records)
    finished = open_run(str(run))
    assert finished.average_accuracy == sum(k / n for k, n in counts.values()) / 4
    assert "Average accuracy: 63.57%." in card(finished)
    sources = {each.dataset_name: (each.dataset_type, each.dataset_split) for each in metadata(finished).eval_results}
    assert sources["MedQA"] == ("bigbio/med_qa", "test")
    assert sources["MedMCQA"][1] == "validation"


def test_categories_and_what_fedtune_does_not_score(run: Path) -> None:
    write_results(run, [result(run / "peft_2", "mmlu:social_sciences", 2000, 3077)])
    finished = with_config(run, challenge="general-nlp")
    assert finished.challenge_benches == ["mmlu:stem", "mmlu:social_sciences", "mmlu:humanities"]
    assert finished.missing_benches == ["mmlu:stem", "mmlu:humanities"]
    assert "| MMLU social sciences | 65.00% |" in card(finished)
    assert metadata(finished).eval_results[0].dataset_config == "social_sciences"
    assert "mbpp" in with_config(run, challenge="code").missing_benches
    assert with_config(run, challenge=None).challenge_benches == []


def test_communication_is_the_ledgers(run: Path) -> None:
    """Four messages of 1 MiB, then four of 2 MiB."""
    finished = open_run(str(run))
    assert finished.used_mib == 12
    assert open_run(str(run), "peft_1").used_mib == 4
    text = communication(finished)
    assert text.startswith("12.00 MiB of training messages in 2 rounds: 6.00 MiB to the clients, 6.00 MiB from them.")
    assert "refused" not in text
    lines = (run / "ledger.jsonl").read_text()
    (run / "ledger.jsonl").write_text(lines.replace('"ok"', '"lost"', 2))
    assert "1 of the messages belong to rounds that a crash undid" in communication(open_run(str(run)))
    (run / "ledger.jsonl").unlink()
    assert "not known" in communication(open_run(str(run)))


def test_only_what_came_from_the_hub_is_named_as_its(run: Path, tmp_path: Path) -> None:
    finished = with_config(
        run, model__base="owner/base", model__revision=COMMIT, data__source="owner/data", data__revision=COMMIT
    )
    data = metadata(finished, licence="apache-2.0")
    assert (data.base_model, data.datasets, data.license) == ("owner/base", ["owner/data"], "apache-2.0")
    assert (data.library_name, data.tags[:3]) == ("peft", ["fedtune", "lora", "federated-learning"])
    assert data.fedtune == {"rounds": 2, "clients": 2, "communication_mib": 12.0}
    assert f'from_pretrained(base, revision="{COMMIT}")' in card(finished)
    # A folder may look like an id, where the command is run or elsewhere.
    data = metadata(with_config(run, model__revision=None, data__revision=None))
    assert (data.base_model, data.datasets, data.license) == (None, None, None)
    text = card(
        with_config(run, model__base=str(tmp_path / "secret" / "llama"), data__source="/srv/ward 7/notes.jsonl")
    )
    assert str(tmp_path) not in text
    assert "secret" not in text
    assert "ward" not in text
    assert "| `model.base` | `llama` |" in text
    assert "| `data.source` | `notes.jsonl` |" in text


@pytest.mark.parametrize("licence", ["Apache 2.0", "", "mit\ntags: x", "a" * 50])
def test_a_licence_is_an_id(run: Path, licence: str) -> None:
    with pytest.raises(UsageError, match="is not the id of a licence on the hub"):
        card(open_run(str(run)), licence=licence)


def test_method_says_what_was_done(run: Path) -> None:
    text = card(open_run(str(run)))
    assert "In each of 2 rounds 2 of 2 clients train a LoRA adapter of rank 2" in text
    assert "Strategy `fedavg`: Federated averaging (https://arxiv.org/abs/1602.05629). Average of" in text
    assert "### Instruction:\n{instruction}\n### Response: {output}\n" in text
    assert "no differential privacy was used" in text
    finished = with_config(
        run,
        strategy={"name": "fedprox", "proximal_mu": 0.25},
        adapter__dora=True,
        adapter__rslora=True,
        data__reshuffle=False,
    )
    text = card(finished)
    assert "Strategy `fedprox` (proximal_mu = 0.25)" in text
    assert "a rank-stabilised weight-decomposed (DoRA) LoRA adapter" in text
    assert "in the same order each round" in text
    text = card(with_config(run, strategy={"name": "fedavg"}, privacy__mode="central", privacy__epsilon=3.0))
    assert "differential privacy, central: updates clipped at 1, noise multiplier 1, a budget of epsilon = 3" in text
    assert "no differential privacy" not in text


def test_options_that_are_lists_of_numbers(run: Path) -> None:
    finished = with_config(run, strategy={"name": "flexlora", "ranks": [1, 2]})
    assert "Strategy `flexlora` (ranks = 1, 2)" in card(finished)


def test_an_early_adapter_says_so(run: Path) -> None:
    assert "This is the adapter after round 1 of a run of 2." in card(open_run(str(run), "peft_1"))
    stopped = with_config(run, federation__rounds=5)
    assert "after round 2 of a run of 5, which has done 2 rounds so far." in card(stopped)


def test_what_breaks_the_leaderboards_rules_is_said(run: Path) -> None:
    text = card(with_config(run, challenge="medical"))
    assert "does not follow the leaderboard's rules (data.source, federation.clients)" in text


def test_a_secret_is_struck_out(run: Path) -> None:
    text = card(with_config(run, data__instruction=f"{{instruction}} {TOKEN}", model__base=f"/home/{TOKEN}"))
    assert TOKEN not in text
    assert "{instruction} [removed]" in text


def test_damaged_results_are_named(run: Path) -> None:
    for content in ("{", "{}", '[{"bench": "tiny"}]'):
        (run / "benchmarks").mkdir(exist_ok=True)
        (run / "benchmarks" / "results.json").write_text(content)
        with pytest.raises(MissingError, match=r"results\.json"):
            card(open_run(str(run)))


def test_a_result_on_an_unknown_benchmark_is_refused_with_its_file(run: Path) -> None:
    write_results(run, [result(run / "peft_2", "no-such-bench", 45, 100)])
    with pytest.raises(MissingError, match=r"results\.json holds a result on 'no-such-bench'") as caught:
        card(open_run(str(run)))
    assert caught.value.hint
