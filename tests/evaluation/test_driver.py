"""evaluate() on the tiny base: several adapters in one call, files, interruption, both modes, finance."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import FedTuneError, MissingError, UsageError
from fedtune.evaluation import driver, model_slot, provenance, results
from fedtune.evaluation.backends import fast, official, probe
from fedtune.evaluation.backends.fast import Budget
from fedtune.evaluation.backends.generation import Reply, Request
from fedtune.evaluation.backends.official import answer_one_by_one, answer_padded
from fedtune.evaluation.driver import evaluate
from fedtune.evaluation.model_slot import ModelSlot
from fedtune.evaluation.progress import EvalProgress
from fedtune.evaluation.prompts import build_prompts
from fedtune.evaluation.results import EvalResult
from fedtune.evaluation.settings import EvalSettings
from fedtune.evaluation.statistics import mcnemar
from fedtune.evaluation.subjects import BASE, Subject, find_subjects
from fedtune.evaluation.tasks.load import load_questions
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.evaluation.tasks.sentiment import SentimentTask
from fedtune.models import integrity
from fedtune.models.adapter import attach, read_adapter, write_adapter
from fedtune.models.base import Base, load_base
from fedtune.runs.atomic import read_json_lines
from fedtune.runs.directory import file_sha256

MODEL = ModelConfig(base="builtin:tiny", quantization="fp4", compute_dtype="fp32")
SHIPPED = Path(driver.__file__).parents[1] / "data" / "builtin" / "tiny" / "test.jsonl"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors; more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one form, and one of another rank and alpha; each changes some answers."""
    folder = tmp_path_factory.mktemp("adapters")
    base = load_base(MODEL)
    paths = []
    for number, (rank, alpha) in enumerate([(2, 32), (2, 32), (4, 64)]):
        config = AdapterConfig(rank=rank, alpha=alpha, targets="all-linear")
        adapted = attach(base, config)
        generator = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in adapted.shapes.items()}
        paths.append(folder / f"peft_{number}")
        write_adapter(
            paths[-1],
            tensors,
            config,
            base_name="builtin:tiny",
            revision=None,
            target_modules=adapted.target_modules,
        )
        adapted.detach()
    return paths


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[ModelConfig]:
    """The configs of all base models that are loaded."""
    noted: list[ModelConfig] = []

    def load(config: ModelConfig) -> Base:
        noted.append(config)
        return load_base(config)

    monkeypatch.setattr(model_slot, "load_base", load)
    return noted


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def settings_of(out: Path, *subjects: Path | None, bench: str = "tiny", **changes: Any) -> EvalSettings:
    return EvalSettings(
        model=MODEL,
        subjects=tuple(Subject(BASE) if path is None else Subject(path.name, path) for path in subjects),
        selections=parse_bench(bench),
        out=out,
        **{"limit": 24, **changes},
    )


def outputs(result: EvalResult, place: int = 0) -> list[str]:
    """The outputs in the leaderboard's file."""
    each = result.results[place]
    name = "_".join(filter(None, (each.bench.replace(":", "_"), each.label)))
    text = (result.file.parent / f"generation_{name}.jsonl").read_text()
    return [row["output"] for row in json.loads(text)]


def plainly(adapter: Path | None, limit: int = 24) -> list[str]:
    """The outputs of another base model, one prompt at a time."""
    base = load_base(MODEL)
    if adapter is not None:
        saved = read_adapter(adapter)
        config = AdapterConfig(rank=saved.config["r"], alpha=saved.config["lora_alpha"], targets="all-linear")
        attach(base, config).load(saved.tensors)
    (selection,) = parse_bench("tiny")
    settings = settings_of(Path(), None, limit=limit)
    requests = [prompt.request for prompt in build_prompts(base, load_questions(selection, None, limit), settings)]
    return [reply.text for replies in answer_one_by_one(base, requests) for reply in replies]


def test_one_base_for_all_and_the_order_does_not_matter(
    adapters: list[Path], loads: list[ModelConfig], tmp_path: Path
) -> None:
    """Adapters are exchanged in place: one of the same form, one of another form, and none."""
    a, b, c = adapters
    expected = {None: plainly(None), a: plainly(a), b: plainly(b), c: plainly(c)}
    assert len({tuple(each) for each in expected.values()}) > 1  # adapters this loud say something else
    for number, order in enumerate([(None, a, b, c), (c, a, None, b)]):
        loads.clear()
        result = evaluate(settings_of(tmp_path / str(number), *order))
        assert len(loads) == 1
        for place, subject in enumerate(order):
            assert outputs(result, place) == expected[subject]


def test_files_and_records(adapters: list[Path], tmp_path: Path) -> None:
    settings = replace(settings_of(tmp_path, None, adapters[0], bench="tiny"), limit=None)
    result = evaluate(settings)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("acc_tiny_base_fast.txt", "generation_tiny_base_fast.jsonl"),
        *("acc_tiny_peft_0_fast.txt", "generation_tiny_peft_0_fast.jsonl"),
        *("results.json", "answers"),
    }
    base, adapter = json.loads(result.file.read_text())
    count = len(SHIPPED.read_text().splitlines())
    for record in (base, adapter):
        assert record["n"] == count
        assert record["accuracy"] == record["k"] / count
        low, high = record["interval_95"]
        assert low <= record["accuracy"] <= high
        assert record["partial"] is None
        assert (record["protocol"], record["mode"], record["batch_size"]) == ("flowertune", "fast", 16)
        assert record["compute_dtype"] == "float32"
        assert set(record["versions"]) == {"fedtune", "torch", "transformers", "peft", "bitsandbytes"}
        assert record["model"]["base"] == "builtin:tiny"
        assert record["model"]["quantization"] == "fp4"
        assert len(record["model_sha256"]) == len(record["prompts_sha256"]) == 64
        assert record["seconds"] > 0
        assert record["tokens_per_second"] == pytest.approx(record["prompt_tokens"] / record["seconds"])
        assert record["questions_per_second"] == pytest.approx(count / record["seconds"])
        assert sum(subset["n"] for subset in record["subsets"]) == count
        assert sum(subset["k"] for subset in record["subsets"]) == record["k"]
        assert 0 <= record["unparsed"] <= count
        assert sum(times for _, times in record["unparsed_outputs"]) <= record["unparsed"]
    assert base["adapter_sha256"] is None
    assert adapter["adapter_sha256"] == file_sha256(adapters[0] / "adapter_model.safetensors")
    assert adapter["adapter_config_sha256"] == file_sha256(adapters[0] / "adapter_config.json")
    assert base["against_base"] is None
    test = mcnemar(result.results[1].score.correct, result.results[0].score.correct)
    assert adapter["against_base"]["p_value"] == test.p_value
    assert adapter["against_base"]["difference"] == pytest.approx(adapter["accuracy"] - base["accuracy"])
    assert (tmp_path / "acc_tiny_base_fast.txt").read_text() == f"Accuracy: {base['accuracy']!r}. "


def test_no_module_calls_back_into_the_driver(adapters: list[Path], tmp_path: Path) -> None:
    callers: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_globals.get("__name__") != driver.__name__:
            return
        above = frame.f_back
        while above is not None and not above.f_globals.get("__name__", "").startswith("fedtune."):
            above = above.f_back
        callers.add(above.f_globals["__name__"] if above is not None else "a user")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        evaluate(settings_of(tmp_path, None, adapters[0], limit=4, verify=2))
    finally:
        sys.setprofile(before)
    assert callers == {"a user", driver.__name__}


def test_other_settings_have_their_own_files(adapters: list[Path], tmp_path: Path) -> None:
    """Official mode, fast mode, some of the questions and other weights have their own files, records and journals."""
    few = tmp_path / "data"
    lines(few / "tiny.jsonl", [json.loads(line) for line in SHIPPED.read_text().splitlines()[:8]])
    out = tmp_path / "out"
    base = settings_of(out, None, limit=None, data_dir=few)
    for changes in ({"mode": "official"}, {}, {"limit": 4}, {"batch_size": 3}):
        evaluate(replace(base, **changes))
    evaluate(replace(base, model=MODEL.model_copy(update={"quantization": "none"})))
    names = ("base", "base_fast", "base_fast_first4", "base_fast_batch3", "base_fast_none")
    assert {path.name for path in out.glob("acc_*")} == {f"acc_tiny_{name}.txt" for name in names}
    records = json.loads((out / "results.json").read_text())
    assert {record["label"] for record in records} == set(names)
    assert len(list((out / "answers").iterdir())) == len(names)


def test_two_calls_that_end_together_keep_all_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path, None)
    (result,) = evaluate(settings).results
    write = results.write_text
    monkeypatch.setattr(results, "write_text", lambda path, text: (time.sleep(0.2), write(path, text)))
    others = [[replace(result, label=f"other-{number}").to_record()] for number in range(3)]
    with ThreadPoolExecutor() as threads:
        list(threads.map(partial(results.add_results, tmp_path / "results.json"), others))
    records = json.loads((tmp_path / "results.json").read_text())
    assert sorted(record["label"] for record in records) == [result.label, "other-0", "other-1", "other-2"]


def test_a_second_call_loads_no_model(adapters: list[Path], loads: list[ModelConfig], tmp_path: Path) -> None:
    settings = settings_of(tmp_path, None, adapters[0])
    first = evaluate(settings)
    heard: list[EvalProgress] = []
    loads.clear()
    second = evaluate(settings, heard.append)
    assert loads == []
    assert heard == []
    assert second == first
    evaluate(replace(settings, limit=5))  # something else in between
    loads.clear()
    assert evaluate(settings) == first
    assert loads == []


def journal_of(out: Path, name: str) -> Path:
    (path,) = (out / "answers").glob(f"{name}-????????.jsonl")
    return path


def places_in(path: Path) -> list[int]:
    return [line["place"] for line in read_json_lines(path) if "place" in line]


@pytest.mark.parametrize("mode", ["fast", "official"])
def test_a_cut_line_and_all_after_it_are_answered_again(
    tmp_path: Path, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, None, mode=mode)
    whole = evaluate(settings)
    path = journal_of(tmp_path, "tiny_base_fast_first24" if mode == "fast" else "tiny_base_first24")
    text = path.read_text()
    answered = [number for number, line in enumerate(text.splitlines(keepends=True)) if '"place"' in line]
    torn = "".join(text.splitlines(keepends=True)[: answered[9]]) + text.splitlines()[answered[9]][:15]
    path.write_text(torn)
    heard: list[EvalProgress] = []
    again = evaluate(settings, heard.append)
    assert sorted(places_in(path)) == list(range(24))
    assert heard[-1].answered == 24 - 9
    assert heard[-1].done == heard[-1].total == 24
    assert heard[-1].right == again.results[0].score.k  # the running count is the final one
    assert again.results[0].score == whole.results[0].score


@pytest.mark.parametrize("damage", ["garbage", "a line that is no answer", "another head", "nothing"])
def test_a_damaged_journal_is_renamed_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    settings = settings_of(tmp_path, None, limit=8)
    whole = evaluate(settings)
    path = journal_of(tmp_path, "tiny_base_fast_first8")
    text = path.read_text()
    head, rest = text.split("\n", 1)
    damaged = {
        "garbage": f"{head}\ngarbage\n{rest}",
        "a line that is no answer": text + '{"place": 3}\n' + '{"place": 4, "output": "A", "gap": 0.5}\n',
        "another head": f'{{"bench": "other"}}\n{rest}',
        "nothing": "",
    }[damage]
    path.write_text(damaged)
    assert evaluate(settings).results[0].score == whole.results[0].score
    assert sorted(places_in(path)) == list(range(8))
    (aside,) = (tmp_path / "answers").glob("*.damaged-1.jsonl")
    assert aside.read_text() == damaged
    assert any(str(path) in text and aside.name in text for text in caplog.messages)


def test_a_cut_last_line_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_of(tmp_path, None, limit=8)
    evaluate(settings)
    path = journal_of(tmp_path, "tiny_base_fast_first8")
    path.write_bytes(path.read_bytes()[:-9])
    caplog.clear()
    evaluate(settings)
    assert [text for text in caplog.messages if "cut off" in text and str(path) in text]
    caplog.clear()
    evaluate(settings)
    assert caplog.messages == []


def test_answers_of_two_paths_are_not_mixed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An incomplete journal of another path is renamed; a complete one keeps its path."""
    settings = settings_of(tmp_path, None, limit=8)
    first = evaluate(settings).results[0]
    assert first.answer_path == "shared prefixes"
    path = journal_of(tmp_path, "tiny_base_fast_first8")
    monkeypatch.setattr(probe, "PATHS", probe.PATHS[3:])
    complete = evaluate(settings).results[0]
    assert complete.answer_path == "shared prefixes"
    started = "".join(line for line in path.read_text().splitlines(keepends=True) if '"place": 5' not in line)
    path.write_text(started)
    again = evaluate(settings).results[0]
    assert again.answer_path == "batches padded on the left"
    assert again.score == first.score
    assert sorted(places_in(path)) == list(range(8))
    (aside,) = (tmp_path / "answers").glob("*.other-path-1.jsonl")
    assert aside.read_text() == started
    assert any("computed on another path" in text and aside.name in text for text in caplog.messages)
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["answer_path"] == "batches padded on the left"
    assert "equal to one-by-one generation" in record["answer_path_reason"]


@pytest.mark.parametrize("content", ['[{"bench": "ti', "{}", '[{"format": 99}]'])
def test_results_are_refused_before_the_first_answer(tmp_path: Path, loads: list[ModelConfig], content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(MissingError, match=r"results\.json"):
        evaluate(settings_of(tmp_path, None))
    assert loads == []
    assert (tmp_path / "results.json").read_text() == content


def test_a_full_disk_is_an_error_and_the_next_call_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path, None, limit=8)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(driver, "write_artefacts", full)
        with pytest.raises(MissingError, match="No space left on device"):
            evaluate(settings)
    heard: list[EvalProgress] = []
    assert evaluate(settings, heard.append).results[0].score.n == 8
    assert heard == []  # the answers were there


def test_other_settings_start_a_new_journal(adapters: list[Path], loads: list[ModelConfig], tmp_path: Path) -> None:
    adapter = tmp_path / "peft_0"
    data = tmp_path / "data"
    rows = [json.loads(line) for line in SHIPPED.read_text().splitlines()[:10]]

    def copy(source: Path, **changes: Any) -> None:
        adapter.mkdir(exist_ok=True)
        for path in source.iterdir():
            (adapter / path.name).write_bytes(path.read_bytes())
        if changes:
            table = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps(table | changes))

    def answered(**changes: Any) -> int:
        heard: list[EvalProgress] = []
        evaluate(settings_of(tmp_path / "out", adapter, **{"limit": 6, "data_dir": data, **changes}), heard.append)
        return heard[-1].answered if heard else 0

    lines(data / "tiny.jsonl", rows)
    copy(adapters[0])
    assert answered() == 6
    assert answered() == 0
    assert answered(limit=7) == 7
    copy(adapters[1])  # other weights under the same name
    assert answered() == 6
    copy(adapters[1], lora_alpha=8)  # the same weights, scaled otherwise
    assert answered() == 6
    lines(data / "tiny.jsonl", [rows[0] | {"question": "Other words?"}, *rows[1:]])
    assert answered() == 6
    copy(adapters[0])
    lines(data / "tiny.jsonl", rows)
    assert answered() == 0  # as in the beginning


def test_official_equals_fast(adapters: list[Path], tmp_path: Path) -> None:
    quick = evaluate(settings_of(tmp_path, None, adapters[0], limit=60))
    plain = evaluate(settings_of(tmp_path, None, adapters[0], limit=60, mode="official"))
    for place in (0, 1):
        assert outputs(quick, place) == outputs(plain, place)
    assert [each.prompt_tokens for each in quick.results] == [each.prompt_tokens for each in plain.results]


def test_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path, None, verify=10)
    found = evaluate(settings).results[0].agreement
    assert found is not None
    assert (found.asked, found.equal) == (10, 10)
    assert list(found.smallest_gaps) == sorted(found.smallest_gaps)
    assert len(found.smallest_gaps) == 5
    # With changed outputs in the journal.
    path = journal_of(tmp_path, "tiny_base_fast_first24")
    path.write_text(path.read_text().replace('"output": "', '"output": "~'))
    again = evaluate(settings).results[0].agreement
    assert again is not None
    assert (again.asked, again.equal) == (10, 0)
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["verified"]["equal"] == 0
    assert record["comparable"] is False
    assert any("10 of 10 verified answers differ" in text for text in record["findings"])


def test_limit_marks_partial(tmp_path: Path) -> None:
    one = evaluate(settings_of(tmp_path, None, limit=5)).results[0]
    assert "--limit 5" in one.partial
    assert not one.comparable
    with pytest.raises(UsageError, match="--limit 0"):
        evaluate(settings_of(tmp_path, None, limit=0))


def test_equal_prompts_share_one_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 0}
    rows = [{"question": text, **row} for text in ("One?", "Two?", "One?", "Three?", "One?")]
    lines(tmp_path / "medmcqa.jsonl", rows)
    counted: list[int] = []
    real = driver.answer

    def counting(base: Base, requests: list[Request], *rest: Any) -> Iterator[list[Reply]]:
        counted.append(len(requests))
        return real(base, requests, *rest)

    monkeypatch.setattr(driver, "answer", counting)
    result = evaluate(settings_of(tmp_path / "out", None, bench="medmcqa", data_dir=tmp_path, limit=None))
    assert counted == [3]
    one, two, _, three, _ = outputs(result)
    assert outputs(result) == [one, two, one, three, one]
    (only,) = result.results
    assert any("2 of 5 rows repeat an earlier prompt" in text for text in only.findings)
    assert any("5 rows, the official data 4183" in text for text in only.findings)
    # Cut between the rows of one prompt: only the missing row is written again.
    path = journal_of(tmp_path / "out", "medmcqa_base_fast")
    kept = [line for line in path.read_text().splitlines() if '"place": 4' not in line]
    path.write_text("\n".join(kept) + "\n")
    assert (
        outputs(evaluate(settings_of(tmp_path / "out", None, bench="medmcqa", data_dir=tmp_path, limit=None)))[4] == one
    )
    assert sorted(places_in(path)) == [0, 1, 2, 3, 4]


def test_mmlu_has_a_row_for_every_subject(tmp_path: Path) -> None:
    for subject in parse_bench("mmlu:stem")[0].parts:
        row = {"A": "one", "B": "two", "C": "three", "D": "four", "target": "B"}
        lines(tmp_path / "mmlu" / f"{subject}.jsonl", [{"input": f"{subject}, {n}?", **row} for n in range(2)])
    one = evaluate(settings_of(tmp_path / "out", None, bench="mmlu:stem", data_dir=tmp_path, limit=None)).results[0]
    assert [(subset.name, subset.n) for subset in one.score.subsets] == [
        (subject, 2) for subject in parse_bench("mmlu:stem")[0].parts
    ]
    assert (tmp_path / "out" / "acc_mmlu_stem_base_fast.txt").is_file()


def test_a_complete_answer_takes_no_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end at different steps, by a stop token (5) or their number of new tokens; the tokens after it are dropped."""
    base = load_base(MODEL)
    # One list per pass: the shared prefix, then each step.
    script = [[0], [5, 20, 20, 20], [20, 20, 20, 20], [20, 5, 20, 20], [20, 20, 20, 5], [5, 5, 5, 5]]
    calls: list[int] = []

    class Scripted(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # (rows, 1, width) -> (rows, 1, tokens)
            calls.append(len(hidden))
            tokens = torch.tensor(script[len(calls) - 1])[:, None]
            return torch.nn.functional.one_hot(tokens, base.model.config.vocab_size).float()

    monkeypatch.setattr(fast, "stop_tokens", lambda base: frozenset([5]))
    monkeypatch.setattr(base.model, "lm_head", Scripted())
    requests = [Request((1, 30, 31, 32 + row), limit) for row, limit in enumerate([40, 40, 2, 40])]
    (replies,) = fast.answer(base, requests, Budget(4096))
    assert calls == [1, 4, 4, 4, 4]
    one = base.tokenizer.decode([20])
    end = base.tokenizer.decode([5])  # no special token: `generate` leaves it in the text
    assert [reply.text for reply in replies] == [end, one + one + end, one * 2, one * 3 + end]


FPB = [{"sentence": f"Profit rose {'and rose ' * (n % 5)}by {n} %.", "label": n % 3} for n in range(35)]


def limit_finance(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Limit finance prompts with their answers, because a model that never stops writes 512 tokens an answer."""
    monkeypatch.setattr(SentimentTask, "padded_batches", replace(SentimentTask.padded_batches, max_length=length))


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_the_official_finance_mode_restores_the_base(pad_is_end: bool) -> None:
    """A tokenizer without its own pad token gets one, and the embeddings a row, only during the batches."""
    base = load_base(ModelConfig(base="builtin:tiny", quantization="none"))
    tokenizer, weight = base.tokenizer, base.model.get_input_embeddings().weight
    tokenizer.pad_token = tokenizer.eos_token if pad_is_end else None
    before, rows = weight.detach().clone(), len(weight)
    integrity.watch(base.model)
    replies = [
        reply
        for batch in answer_padded(
            base, ["Profit rose. Answer: ", "Sales fell. Answer: "], SentimentTask.padded_batches
        )
        for reply in batch
    ]
    assert len(replies) == 2
    integrity.check(base.model, "after finance")
    assert base.model.get_input_embeddings().weight is weight
    assert len(weight) == rows == base.model.get_input_embeddings().num_embeddings
    assert bool((weight == before).all())
    assert tokenizer.pad_token == (tokenizer.eos_token if pad_is_end else None)


@pytest.mark.parametrize(
    "changed",
    [
        {"targets": ("embed_tokens", "q_proj")},
        {"targets": ("lm_head",)},
        {"modules_to_save": ("embed_tokens", "lm_head")},
    ],
    ids=["embedding", "head", "whole"],
)
def test_the_official_finance_mode_refuses_adapted_embeddings_before_the_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    """Only where the base has no pad token; the fast mode still works, and so does the base afterwards."""

    def load(config: ModelConfig) -> Base:
        base = load_base(config)
        base.tokenizer.pad_token = None
        return base

    config = AdapterConfig(rank=2, **{"targets": ("q_proj",), **changed})
    adapted = attach(load(MODEL), config)
    write_adapter(
        tmp_path / "peft_1",
        adapted.tensors(),
        config,
        base_name="builtin:tiny",
        revision=None,
        resolved=adapted.resolved,
    )
    monkeypatch.setattr(model_slot, "load_base", load)
    limit_finance(monkeypatch, 230)
    lines(tmp_path / "fpb.jsonl", FPB[:3])
    settings = settings_of(tmp_path / "out", tmp_path / "peft_1", bench="fpb", data_dir=tmp_path, mode="official")
    with pytest.raises(UsageError, match="cannot resize the embeddings, because the adapter changes them") as caught:
        evaluate(settings)
    assert "--mode fast" in caught.value.hint
    assert not (tmp_path / "out" / "results.json").exists()
    assert evaluate(replace(settings, mode="fast")).results[0].score.n == 3
    slot = ModelSlot(MODEL)
    slot.attach(settings.subjects[0])
    with pytest.raises(UsageError):
        next(answer_padded(slot.base, ["Profit rose. Answer: "], SentimentTask.padded_batches))
    slot.check_base(settings.subjects[0])
    assert (
        len(list(answer_padded(slot.attach(Subject(BASE)), ["Profit rose. Answer: "], SentimentTask.padded_batches)))
        == 1
    )
    slot.check_base(Subject(BASE))
    monkeypatch.setattr(model_slot, "load_base", load_base)  # with a pad token of its own
    assert evaluate(settings).results[0].score.n == 3


def test_finance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both modes; the official one has padded batches of 32, of which only the unfinished ones are repeated."""
    limit_finance(monkeypatch, 230)
    lines(tmp_path / "fpb.jsonl", FPB)
    settings = settings_of(tmp_path / "out", None, bench="fpb", data_dir=tmp_path, limit=None, verify=2)
    quick = evaluate(settings).results[0]
    assert quick.agreement is not None
    assert (quick.agreement.asked, quick.agreement.equal) == (2, 2)
    assert any("35 rows, the official data 1212" in text for text in quick.findings)
    assert not quick.comparable

    batches: list[int] = []
    real = official._generate_padded

    def noting(base: Base, prompts: list[str], max_length: int) -> list[str]:
        batches.append(len(prompts))
        return real(base, prompts, max_length)

    monkeypatch.setattr(official, "_generate_padded", noting)
    settings = replace(settings, mode="official", verify=0)
    plain = evaluate(settings).results[0]
    assert batches == [32, 3]
    assert plain.score.n == quick.score.n == 35
    text = (tmp_path / "out" / "generation_fpb_base.jsonl").read_text()
    assert set(json.loads(text.splitlines()[0])) == {"context", "new_target", "new_out"}
    path = journal_of(tmp_path / "out", "fpb_base")
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"place": 34' not in line))
    assert evaluate(settings).results[0].score == plain.score
    assert batches == [32, 3, 3]
    assert sorted(places_in(path)) == list(range(35))


def test_an_adapter_that_does_not_fit(adapters: list[Path], loads: list[ModelConfig], tmp_path: Path) -> None:
    """The error comes before the first answer where the files show it, and otherwise before results are written."""
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_bytes((adapters[0] / "adapter_config.json").read_bytes())
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(MissingError, match="pickle"):
        evaluate(settings_of(tmp_path / "out", None, adapters[0], pickled))
    assert loads == []
    other = tmp_path / "other"
    config = AdapterConfig(rank=2, targets=("q_proj",))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.zeros(2, 48), f"{name}.lora_B.weight": torch.zeros(48, 2)}
    write_adapter(other, tensors, config, base_name="builtin:tiny", revision=None, target_modules=["q_proj"])
    with pytest.raises(MissingError, match="does not fit the model"):
        evaluate(settings_of(tmp_path / "out", other))
    assert not (tmp_path / "out" / "results.json").exists()


def test_names_of_adapters_are_unique(adapters: list[Path], tmp_path: Path) -> None:
    def folder(path: str) -> str:
        (tmp_path / path).mkdir(parents=True)
        for file in adapters[0].iterdir():
            (tmp_path / path / file.name).write_bytes(file.read_bytes())
        return str(tmp_path / path)

    def names(*paths: str, with_base: bool = False) -> list[str]:
        found = find_subjects(paths, with_base=with_base, model=None, quantization="fp4", runs=tmp_path / "runs")
        return [subject.name for subject in found.subjects]

    one, two, three = folder("a/x/peft_5"), folder("b/x/peft_5"), folder("a/x/peft_6")
    assert names(one, three) == ["peft_5", "peft_6"]
    assert names(one, two, three) == ["a-x-peft_5", "b-x-peft_5", "peft_6"]
    assert names(one, one) == ["peft_5"]
    assert names(folder("c/base"), with_base=True) == ["base", "c-base"]
    cached = folder("hub/models--owner--lora/snapshots/0123456789abcdef0123456789abcdef01234567")
    assert names(cached) == ["lora"]


def test_bases_of_adapters(adapters: list[Path], tmp_path: Path) -> None:
    def folder(name: str, **changes: Any) -> str:
        (tmp_path / name).mkdir()
        for file in adapters[0].iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        table = json.loads((tmp_path / name / "adapter_config.json").read_text())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(table | changes))
        return str(tmp_path / name)

    def find(*names: str, model: str | None = None) -> ModelConfig:
        return find_subjects(names, with_base=False, model=model, quantization="fp4", runs=tmp_path / "runs").model

    plain = folder("plain")
    assert find(plain).base == "builtin:tiny"
    other = folder("other", base_model_name_or_path="owner/other")
    with pytest.raises(MissingError, match="different base models: builtin:tiny, owner/other"):
        find(plain, other)
    assert find(plain, other, model="builtin:tiny").base == "builtin:tiny"
    pinned = folder("pinned", base_model_name_or_path="owner/other", revision="a" * 40)
    assert find(other, pinned).revision == "a" * 40
    with pytest.raises(MissingError, match="different base models"):
        find(pinned, folder("moved", base_model_name_or_path="owner/other", revision="b" * 40))
    with pytest.raises(MissingError, match="does not name its base model"):
        find(folder("silent", base_model_name_or_path=None))
    (tmp_path / "config.json").write_text("{}")  # a base model's folder with an adapter in it is no run
    assert find(plain).base == "builtin:tiny"


def test_a_hub_base_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and journals contain the commit of a branch."""
    commit = "c" * 40
    resolved: Callable[..., Any] = lambda config, only_config: type("Resolved", (), {"revision": commit})  # noqa: E731
    monkeypatch.setattr(provenance, "resolve_base", resolved)
    slot = ModelSlot(ModelConfig(base="owner/name", quantization="fp4"))
    assert provenance.describe(slot.config, slot.sha256, None)["model"]["revision"] == commit
    assert slot.sha256 is None


def test_a_base_that_a_subject_has_changed_ends_the_evaluation(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detach = ModelSlot._detach

    def careless(slot: ModelSlot) -> None:
        detach(slot)
        slot.base.model.model.norm.weight.data[1] += 2**-20

    monkeypatch.setattr(ModelSlot, "_detach", careless)
    with pytest.raises(FedTuneError, match=r"model\.norm\.weight is not what was loaded, after peft_0 was evaluated"):
        evaluate(settings_of(tmp_path, adapters[0], adapters[2], limit=2))
    assert not list((tmp_path / "answers").iterdir())
    assert not (tmp_path / "results.json").exists()
