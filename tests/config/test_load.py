"""The config: merging, origins, and what is said of wrong values."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.facts import (
    ineligible_because,
    known_architecture,
    load_preset,
    preset_names,
    published_results,
    table_value,
    value_at,
)
from fedtune.config.load import known_paths, leaves, load_config, parse_setting, to_toml
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import ConfigError, UsageError

PRESETS = [(kind, name) for kind in ("challenge", "recipe") for name in preset_names(kind)]


def test_later_sources_win(tmp_path: Path) -> None:
    """defaults < challenge < recipe < --config < --set < named flags, each with its origin."""
    first, second = tmp_path / "first.toml", tmp_path / "second.json"
    first.write_text("[adapter]\nalpha = 7\ndropout = 0.5\n[federation]\nrounds = 3\n")
    second.write_text(json.dumps({"adapter": {"dropout": 0.25}, "federation": {"rounds": 4}}))
    resolved = load_config(
        recipe="aloe-8b-medical",
        files=[first, second],
        settings=["federation.rounds=5", "data.source=set.jsonl"],
        flags={"data.source": ("--data", "mine.jsonl")},
    )
    config = resolved.config
    assert config.adapter.rank == 32  # default
    assert config.data.instruction == "{input}"  # challenge
    assert config.training.accumulation == 2  # recipe
    assert config.adapter.alpha == 7  # first file over the recipe's 128
    assert config.adapter.dropout == 0.25  # second file over the first
    assert config.federation.rounds == 5  # --set over both files
    assert config.data.source == "mine.jsonl"  # flag over --set
    assert resolved.origins["data.source"] == "--data"
    assert resolved.origins["adapter.dropout"] == str(second)
    assert resolved.origins["training.accumulation"] == "recipe aloe-8b-medical"
    assert resolved.origins["model.quantization"] == "challenge medical"
    assert "adapter.rank" not in resolved.origins  # the recipe sets it to what it is anyway


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_every_preset_is_valid_and_survives_toml(kind: str, name: str, tmp_path: Path) -> None:
    """Whatever ships loads, and the TOML that --dry-run prints gives the same config back."""
    resolved = load_config(**{kind: name})
    file = tmp_path / "again.toml"
    file.write_text(to_toml(resolved))
    assert load_config(files=[file]).config == resolved.config
    file.with_suffix(".json").write_text(resolved.config.model_dump_json())
    assert load_config(files=[file.with_suffix(".json")]).config == resolved.config


@pytest.mark.parametrize(
    ("challenge", "source", "clients", "a_round", "instruction"),
    [
        ("general-nlp", "flwrlabs/alpaca-gpt4", 20, 2, "{instruction}"),
        ("finance", "flwrlabs/fingpt-sentiment-train", 50, 5, "{instruction} {input}"),
        ("medical", "flwrlabs/medical-meadow-medical-flashcards", 20, 2, "{input}"),
        ("code", "flwrlabs/code-alpaca-20k", 10, 2, "{instruction} {input}"),
    ],
)
def test_challenges_are_the_protocols(
    challenge: str, source: str, clients: int, a_round: int, instruction: str
) -> None:
    """Protocol, section 1: the table and the template's defaults."""
    config = load_config(challenge=challenge).config
    assert (config.data.source, config.federation.clients) == (source, clients)
    assert config.federation.clients_per_round == a_round
    assert (config.data.instruction, config.data.response) == (instruction, "{output}")
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (32, 64, 0.075)
    assert (config.training.max_steps, config.training.epochs, config.training.batch_size) == (10, 3, 16)
    assert (config.training.learning_rate_max, config.training.learning_rate_min) == (5e-5, 1e-6)
    assert (config.federation.rounds, config.checkpoint.save_every) == (200, 5)
    assert (config.training.sequence_length, config.data.partitioner) == (512, "iid")
    assert config.model.base == "mistralai/Mistral-7B-v0.3"


def test_recipes_hold_their_published_facts() -> None:
    """Protocol, section 2."""
    aloe = load_config(recipe="aloe-8b-medical").config
    assert (aloe.challenge, aloe.adapter.rank, aloe.adapter.alpha) == ("medical", 32, 128)
    assert aloe.training.rows_per_step == 32
    assert published_results(aloe)["scores"]["medmcqa"] == 55.39
    assert published_results(aloe)["budget_mib"] == 2080.93
    architecture = known_architecture(aloe)
    assert architecture is not None
    assert architecture.kv_heads == 8
    other_base = load_config(recipe="aloe-8b-medical", settings=["model.base=other/model"]).config
    assert known_architecture(other_base) is None
    assert published_results(load_config(recipe="internlm3-8b-general-nlp").config)["budget_mib"] == 2942.79


def test_all_problems_come_at_once_with_path_nearest_key_and_origin() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            challenge="tiny",
            settings=[
                "adaptr.rank=3",
                "training.batch_size=many",
                "adapter.rank=0",
                "model.compute_dtype=fp64",
                "rounds=4",
            ],
        )
    problems = {problem.path: problem for problem in caught.value.problems}
    assert set(problems) == {"adaptr.rank", "training.batch_size", "adapter.rank", "model.compute_dtype", "rounds"}
    assert problems["adaptr.rank"].nearest == "adapter.rank"
    assert problems["rounds"].nearest == "federation.rounds"
    assert problems["adapter.rank"].origin == "--set adapter.rank=0"
    assert "'auto', 'bf16' or 'fp32'" in problems["model.compute_dtype"].message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "path", "words"),
    [
        (["model.trust_remote_code=true"], "model", "40 hex digits"),
        (["model.quantization=int8", "model.dequantize=on"], "model", "int8"),
        (["training.learning_rate_min=1.0"], "training", "above learning_rate_max"),
        (["data.partitioner=dirichlet", 'data.partition_by=""'], "data", "partition_by"),
        (["federation.min_success=9"], "federation", "min_success"),
        (["strategy.proximal_mu=1.0"], "strategy.proximal_mu", "another strategy"),
        (["strategy.name=fedporx"], "strategy", "fedprox"),
        (["adapter.targets=[]"], "adapter", "at least one"),
        (["adapter.targets=3"], "adapter.targets", "all-linear"),
        (["training.batch_size=true"], "training.batch_size", "integer"),
        (["training.epochs=1.5"], "training.epochs", "integer"),
        (["federation=3"], "federation", "section"),
        (["federation.fraction=nan"], "federation.fraction", ""),
    ],
)
def test_refused_values(settings: list[str], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(challenge="tiny", settings=settings)
    assert [problem.path for problem in caught.value.problems] == [path]
    assert words in caught.value.problems[0].message


def test_another_strategy_starts_without_the_former_ones_options(tmp_path: Path) -> None:
    file = tmp_path / "prox.toml"
    file.write_text('[strategy]\nname = "fedprox"\nproximal_mu = 0.5\n')
    assert load_config(files=[file]).config.strategy.proximal_mu == 0.5  # type: ignore[union-attr]
    assert load_config(files=[file], settings=["strategy.name=fedavg"]).config.strategy.name == "fedavg"


def test_unknown_challenge_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean medical"):
        load_config(challenge="medcal")
    with pytest.raises(ConfigError, match="belongs to the challenge medical"):
        load_config(challenge="finance", recipe="aloe-8b-medical")


def test_eligibility() -> None:
    assert ineligible_because(load_config(challenge="medical").config) == ()
    assert ineligible_because(load_config(challenge="tiny").config) is None
    assert ineligible_because(load_config().config) is None
    settings = ["federation.clients=21", "communication.cap_mib=200001", "data.source=mine.jsonl", "adapter.rank=8"]
    reasons = ineligible_because(load_config(challenge="medical", settings=settings).config)
    assert reasons is not None
    assert [reason.split()[0] for reason in reasons] == ["data.source", "federation.clients", "communication.cap_mib"]
    # A lower cap keeps the rules.
    assert ineligible_because(load_config(challenge="medical", settings=["communication.cap_mib=100.0"]).config) == ()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("a=1", 1), ("a=1.5", 1.5), ("a=true", True), ("a=word", "word"), ("a = x=y", "x=y"), ("a=[1, 2]", [1, 2])],
)
def test_setting_values(setting: str, value: object) -> None:
    assert parse_setting(setting) == {"a": value}


@pytest.mark.parametrize("setting", ["", "x", "=1", "a..b=1", "a=[q_proj, v_proj]", ".=1", 'a="x'])
def test_bad_settings(setting: str) -> None:
    with pytest.raises(UsageError):
        parse_setting(setting)


@given(st.text(), st.text())
def test_parsing_settings_never_crashes(path: str, value: str) -> None:
    try:
        table = parse_setting(f"{path}={value}")
    except UsageError:
        return
    assert isinstance(table, dict)


@given(st.dictionaries(st.sampled_from(known_paths()), st.one_of(st.integers(), st.text(), st.booleans(), st.floats())))
def test_any_values_are_accepted_or_refused_with_their_paths(values: dict[str, object]) -> None:
    """Property: a refused config names only sections of what was given."""
    given = {path: ("test", value) for path, value in values.items() if path not in ("challenge", "recipe")}
    named: set[str] = set()
    try:
        load_config(flags=given)
    except ConfigError as error:
        named = {problem.path.split(".")[0] for problem in error.problems}
    assert named <= {path.split(".")[0] for path in given}


def test_unreadable_config_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_config(files=[tmp_path / "missing.toml"])
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(UsageError, match=r"bad\.toml cannot be parsed"):
        load_config(files=[tmp_path / "bad.toml"])
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UsageError, match="no table"):
        load_config(files=[tmp_path / "list.json"])


def test_fixed_paths_of_the_rules_exist() -> None:
    for kind, name in PRESETS:
        preset = load_preset(kind, name)  # type: ignore[arg-type]
        for path in preset.fixed:
            value_at(FedTuneConfig(), path)
        assert set(leaves(preset.config)) <= set(known_paths())
        assert table_value({"a": {"b": 1}}, "a.c") is None


def test_a_refused_config_needs_no_torch() -> None:
    """config, runs, errors, units and protocol import no torch, transformers, flwr, peft, datasets or lm_eval."""
    code = (
        "import sys; from fedtune.cli.app import app\n"
        "import fedtune.runs.directory, fedtune.units\n"
        "import fedtune.protocol.messages, fedtune.protocol.message_size, fedtune.protocol.sampling\n"
        "try: app(['train', '--set', 'adapter.rank=0'])\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "heavy = {'torch', 'transformers', 'flwr', 'peft', 'lm_eval', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "adapter.rank" in done.stderr
