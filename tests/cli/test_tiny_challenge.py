"""The tiny challenge keeps what it promises: a base that guesses, clinics that know their share, a federation that knows all."""

import json
import runpy
from pathlib import Path

import pytest
from test_train_command import fedtune

import fedtune.data as data_room
import fedtune.models as models_room

MODEL = Path(models_room.__file__).parent / "builtin" / "tiny"
DATA = Path(data_room.__file__).parent / "builtin" / "tiny"
PROJECT = Path(__file__).parents[2]


def test_a_federation_beats_every_client_alone(tmp_path: Path) -> None:
    """Issue: base at most 40 %, federation at least 85 % and 15 points above the best client alone, same steps."""
    done = fedtune("train", "--challenge", "tiny", "--baselines", "--json", cwd=tmp_path, timeout_s=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    accuracy = {row["name"]: row["accuracy"] for row in found["baselines"]["adapters"]}
    alone = [value for name, value in accuracy.items() if name.startswith("client_")]
    assert len(alone) == 8
    assert accuracy["base"] <= 0.40
    assert accuracy["federation"] >= 0.85
    assert accuracy["federation"] - max(alone) >= 0.15
    assert accuracy["pooled"] > max(alone)
    assert found["result"]["last_loss"] < 0.2 * found["result"]["first_loss"]


def test_it_ships_in_the_wheel_and_is_small() -> None:
    files = [path for folder in (MODEL, DATA) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) < 4e6
    assert {path.name for path in files} >= {"model.safetensors", "tokenizer.json", "train.jsonl", "test.jsonl"}


def test_the_script_in_the_repository_made_the_questions(tmp_path: Path) -> None:
    script = runpy.run_path(str(PROJECT / "scripts" / "make_tiny.py"))
    world = script["make_world"]()
    script["write_data"](world, tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_knowledge_is_uneven_and_no_test_question_is_in_training() -> None:
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
    tests = [json.loads(line) for line in (DATA / "test.jsonl").read_text().splitlines()]
    sizes = sorted(sum(row["clinic"] == clinic for row in rows) for clinic in {row["clinic"] for row in rows})
    assert len(sizes) == 8
    assert sizes[-1] >= 2 * sizes[0]
    asked = {row["input"].split("\n")[0].removeprefix("Question: ") for row in rows}
    assert not asked & {row["question"] for row in tests}
    assert len({row["cop"] for row in tests}) == 4


def test_any_text_survives_the_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for text in ("α-thalassaemia; 5 mg/kg\tq.d.\n", "naïve café 🙂", "<|im_start|>question\nA. x<|im_end|>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 7])
def test_other_seeds_learn_too(tmp_path: Path, seed: int) -> None:
    done = fedtune("train", "--challenge", "tiny", "--set", f"seed={seed}", cwd=tmp_path, timeout_s=600)
    assert done.returncode == 0, done.stderr
    scored = fedtune("eval", "--bench", "tiny", "--peft", "peft_16", "--json", cwd=tmp_path, timeout_s=600)
    assert json.loads(scored.stdout)["results"][0]["accuracy"] >= 0.85
