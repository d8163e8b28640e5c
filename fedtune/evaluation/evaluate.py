"""evaluate(settings) -> EvalResult: every adapter on every benchmark, one base in memory, each answer kept as it comes."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from fedtune.config.schema import BUILTIN_TINY, ModelConfig
from fedtune.errors import FedTuneError
from fedtune.evaluation.answer import Budget, Reply, Request, Work, answer, pad_token_of, tokenize
from fedtune.evaluation.artefacts import write_artefacts
from fedtune.evaluation.benchmarks.base import Benchmark, Selection
from fedtune.evaluation.benchmarks.load import QuestionSet, load_questions
from fedtune.evaluation.journal import Journal, open_journal
from fedtune.evaluation.official import (
    BATCH_SIZE,
    FINANCE_BATCH_SIZE,
    FINANCE_LENGTH,
    answer_finance,
    answer_one_by_one,
    answer_part,
    check_embeddings,
    new_tokens,
)
from fedtune.evaluation.probe import (
    ONE_BY_ONE,
    Choice,
    check_repeatable,
    choose_path,
    is_tie,
    no_numbers,
    warnings_about,
)
from fedtune.evaluation.question_check import check_questions
from fedtune.evaluation.results import FILE, FORMAT, add_results, cannot_write, prepare_folder, without_nan
from fedtune.evaluation.scoring import Answer, Score, score
from fedtune.evaluation.statistics import Interval, PairedTest, mcnemar, wilson
from fedtune.models import integrity
from fedtune.models.adapter import CONFIG_FILE, WEIGHTS_FILE, AdaptedModel, attach_saved, read_adapter, reading_config
from fedtune.models.base import Base, compute_dtype, load_base
from fedtune.models.hub import resolve_base
from fedtune.runs.directory import file_sha256

Mode = Literal["fast", "official"]

_PACKAGES = ("fedtune", "torch", "transformers", "peft", "bitsandbytes")

BASE = "base"
"""Name of the base model without adapter in tables and file names."""


@dataclass(frozen=True)
class Subject:
    """One thing to be scored: the base model, or an adapter on it."""

    name: str
    """In tables and file names."""
    folder: Path | None = None
    """The adapter's folder; None for the base alone."""
    used_mib: float | None = None
    """Training messages up to this adapter's round, where a ledger tells."""


@dataclass(frozen=True)
class Asked:
    """Answers have come in."""

    subject: str
    bench: str
    done: int
    total: int
    right: int
    """Right ones among those that are done."""
    seconds: float
    """Spent on those that this process answered."""
    answered: int
    """Questions that this process answered."""


Listener = Callable[[Asked], None]


@dataclass(frozen=True)
class EvalSettings:
    """What is to be scored, on what, and how."""

    model: ModelConfig
    """The base, quantized as it shall be for evaluation."""
    subjects: tuple[Subject, ...]
    selections: tuple[Selection, ...]
    out: Path
    """Folder of the results."""
    mode: Mode = "fast"
    batch_size: int = BATCH_SIZE
    """Part of the protocol: the first gold answer of a batch sets the number of new tokens."""
    data_dir: Path | None = None
    limit: int | None = None
    verify: int = 0
    """Questions to answer both ways, fast and one by one."""


@dataclass(frozen=True)
class Agreement:
    """Fast answers held against the plain way's."""

    asked: int
    equal: int
    smallest_gaps: tuple[float, ...]
    """The five smallest gaps between the two best logits of a first token."""
    ties: int = 0
    """Answers that differ from a token on at which the two best logits are equal but for rounding."""

    @property
    def holds(self) -> bool:
        """Whether every answer is the same, but for ties."""
        return self.equal + self.ties == self.asked


@dataclass(frozen=True)
class BenchResult:
    """One subject on one benchmark."""

    subject: str
    bench: str
    label: str
    """The subject's name in file names, with whatever differs from the leaderboard's settings."""
    protocol: str
    mode: Mode
    score: Score = field(repr=False)
    interval: Interval
    """95 % interval of the accuracy."""
    partial: str
    """Why this is not the whole benchmark; empty when it is."""
    findings: tuple[str, ...]
    comparable: bool
    """Whether the accuracy may stand beside the leaderboard's; not where verified answers differ."""
    seconds: float
    prompt_tokens: int
    details: Mapping[str, Any] = field(repr=False)
    """Arithmetic, hashes and versions, as in results.json."""
    used_mib: float | None = None
    against_base: PairedTest | None = None
    agreement: Agreement | None = None
    answer_path: str = ""
    """How the answers were computed: a name of `answer.PATHS`, `one by one`, or what another protocol does."""
    answer_path_reason: str = ""
    """Why on that path."""

    @property
    def questions_per_second(self) -> float:
        """Questions a second, over all processes that answered."""
        return self.score.n / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class EvalResult:
    """All subjects on all benchmarks."""

    results: tuple[BenchResult, ...]
    file: Path
    """results.json"""


class Bench:
    """One base in memory, adapters swapped in place; loaded when the first question needs it."""

    def __init__(self, model: ModelConfig) -> None:
        self.config = _pinned(model)
        self.sha256 = _model_hash(self.config)
        self._base: Base | None = None
        self._adapted: AdaptedModel | None = None
        self._settings: str = ""

    @property
    def base(self) -> Base:
        """The base model."""
        if self._base is None:
            self._base = load_base(self.config)
            integrity.watch(self._base.model)
        return self._base

    def put_on(self, subject: Subject) -> Base:
        """Return the base with the subject's adapter on it, or bare."""
        if subject.folder is None:
            self._take_off()
            return self.base
        saved = read_adapter(subject.folder)
        settings = json.dumps(saved.config, sort_keys=True)
        if self._adapted is None or settings != self._settings:
            self._take_off()
            self._adapted, self._settings = attach_saved(self.base, saved), settings
        self._adapted.load(saved.tensors)
        return self.base

    def check_base(self, subject: Subject) -> None:
        """Check that the subject has left the base as it was loaded.

        Raises:
            FedTuneError: it has not.
        """
        if self._adapted is not None:
            self._adapted.check_base(f"after {subject.name} was evaluated")
        elif self._base is not None:
            integrity.check(self._base.model, f"after {subject.name} was evaluated")

    def _take_off(self) -> None:
        if self._adapted is not None:
            self._adapted.detach()
            self._adapted = None


def evaluate(settings: EvalSettings, listener: Listener | None = None) -> EvalResult:
    """Score every subject on every benchmark.

    A result that is on disk is not computed again; a killed call goes on where it stopped.

    Raises:
        MissingError: model, adapter or data cannot be had, an adapter does not fit the base, or the results folder cannot
            be written or holds results that this version cannot read.
        UsageError: the data is not what a benchmark needs, or the model cannot answer it.
    """
    sets = [load_questions(selection, settings.data_dir, settings.limit) for selection in settings.selections]
    check_adapters(settings.subjects)
    prepare_folder(settings.out)
    prepare_folder(settings.out / "answers")
    bench = Bench(settings.model)
    results: list[BenchResult] = []
    for subject in settings.subjects:
        for questions in sets:
            results.append(_score_one(bench, settings, subject, questions, listener))
        bench.check_base(subject)
    return finish(settings, results)


def finish(settings: EvalSettings, results: Sequence[BenchResult]) -> EvalResult:
    """Add the tests against the base, and write results.json."""
    tested = _with_base(results)
    file = settings.out / FILE
    add_results(file, [result_record(result) for result in tested])
    return EvalResult(tuple(tested), file)


def check_adapters(subjects: Sequence[Subject]) -> None:
    """Read every adapter once, so that a damaged last one does not wait for the answers of the first.

    Raises:
        MissingError: an adapter cannot be read.
    """
    for subject in subjects:
        if subject.folder is not None:
            reading_config(read_adapter(subject.folder))


def identity(bench: Bench, subject: Subject) -> dict[str, Any]:
    """Return what says which weights were computed with, in which arithmetic."""
    folder = subject.folder
    return {
        "model": bench.config.model_dump(mode="json"),
        "model_sha256": bench.sha256,
        "adapter_sha256": None if folder is None else file_sha256(folder / WEIGHTS_FILE),
        "adapter_config_sha256": None if folder is None else file_sha256(folder / CONFIG_FILE),
        "device": _device(),
        "compute_dtype": _dtype_name(bench.config),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def label_of(settings: EvalSettings, subject: Subject, protocol: str = "flowertune") -> str:
    """Return the subject's name in file names: alone for the leaderboard's own settings, else with what differs from them."""
    ours = protocol == "flowertune"
    differs = (
        "" if settings.mode == "official" or not ours else settings.mode,
        "" if settings.model.quantization == "fp4" else settings.model.quantization,
        "" if settings.batch_size == BATCH_SIZE or not ours else f"batch{settings.batch_size}",
        "" if settings.limit is None else f"first{settings.limit}",
    )
    return "_".join(filter(None, (subject.name, *differs)))


def _score_one(
    bench: Bench, settings: EvalSettings, subject: Subject, questions: QuestionSet, listener: Listener | None
) -> BenchResult:
    selection = questions.selection
    details = {
        "bench": selection.name,
        "protocol": "flowertune",
        "mode": settings.mode,
        "batch_size": settings.batch_size,
        "prompts_sha256": questions.sha256,
        **identity(bench, subject),
    }
    label = label_of(settings, subject)
    name = "_".join(filter(None, (selection.benchmark.name, selection.category, label)))
    journal = open_journal(settings.out / "answers", name, details)
    waiting = [place for place in range(questions.count) if place not in journal.outputs]
    if waiting:
        _answer(bench.put_on(subject), settings, subject, questions, journal, listener)
        try:
            bench.check_base(subject)
        except FedTuneError:
            journal.path.unlink()  # its answers may be another model's
            raise
    answers = [
        Answer(question.prompt, question.gold, journal.outputs[place], question.subset)
        for place, question in enumerate(questions.questions)
    ]
    result = score(answers, selection.benchmark.answer_type)
    try:
        write_artefacts(settings.out, selection, label, answers, result.accuracy)
    except OSError as error:
        raise cannot_write(settings.out, error) from error
    agreement = _verify(bench, settings, subject, questions, journal) if settings.verify else None
    findings = [*(finding.text for finding in questions.findings), *journal.findings]
    agreed = agreement is None or agreement.holds
    if agreement is not None and not agreed:
        others = agreement.asked - agreement.equal - agreement.ties
        findings.append(
            f"{others} of {agreement.asked} verified answers differ from one-by-one generation on "
            "the same weights, so that the accuracy is not comparable; --mode official answers one by one"
        )
    return BenchResult(
        subject=subject.name,
        bench=selection.name,
        label=label,
        protocol="flowertune",
        mode=settings.mode,
        score=result,
        interval=wilson(result.k, result.n),
        partial=questions.partial_because,
        findings=tuple(findings),
        comparable=questions.comparable and agreed,
        seconds=journal.seconds,
        prompt_tokens=journal.prompt_tokens,
        details={**details, "questions_from": questions.source},
        used_mib=subject.used_mib,
        agreement=agreement,
        answer_path=journal.answer_path or "",
        answer_path_reason=journal.reason,
    )


def _answer(
    base: Base,
    settings: EvalSettings,
    subject: Subject,
    questions: QuestionSet,
    journal: Journal,
    listener: Listener | None,
) -> None:
    """Ask what the journal lacks, and write every batch of replies into it."""
    kind = questions.selection.benchmark.answer_type
    asked = questions.questions

    def right(outputs: Iterable[tuple[int, str]]) -> int:
        answers = [Answer("", asked[place].gold, output) for place, output in outputs]
        return score(answers, kind).k if answers else 0

    began = time.monotonic()
    answered, total_right = 0, 0
    for replies, seconds, tokens in _timed(_replies(base, settings, questions, journal)):
        if not answered:
            total_right = right(journal.outputs.items())  # those of earlier processes
        journal.add(replies, seconds, tokens)
        answered += len(replies)
        total_right += right((reply.place, reply.text) for reply in replies)
        if listener is not None:
            listener(
                Asked(
                    subject=subject.name,
                    bench=questions.selection.name,
                    done=len(journal.outputs),
                    total=questions.count,
                    right=total_right,
                    seconds=time.monotonic() - began,
                    answered=answered,
                )
            )


def _replies(
    base: Base, settings: EvalSettings, questions: QuestionSet, journal: Journal
) -> Iterator[tuple[list[Reply], int]]:
    """Yield replies to the questions that the journal lacks, by their places, with the tokens of their prompts.

    Questions with the same prompt share one reply, as in the leaderboard's scripts.
    """
    benchmark = questions.selection.benchmark
    asked = questions.questions
    places: dict[str, list[int]] = {}
    for place, question in enumerate(asked):
        places.setdefault(question.prompt, []).append(place)
    tokens = tokenize(base, [benchmark.wrap(prompt) for prompt in places])
    everything = _requests(base, settings, questions, dict(zip(places, tokens, strict=True)))
    budget = Budget.of(base.device)
    finance = benchmark.answer_type == "sentiment" and settings.mode == "official"
    choice: Choice | None = None
    findings = warnings_about(base, everything)
    if finance:
        check_embeddings(base)
        check_repeatable(base, everything)
        journal.choose(f"batches of {FINANCE_BATCH_SIZE} padded on the left", "the official mode", findings)
    elif settings.mode == "official":
        check_repeatable(base, everything)
        journal.choose(ONE_BY_ONE, "the official mode", findings)
    else:
        choice = choose_path(base, everything, budget)
        journal.choose(choice.name, choice.reason, findings)
    known = set(journal.outputs)
    if finance:
        yield from _finance_replies(base, [question.prompt for question in asked], known)
        return
    waiting = {
        prompt: request
        for (prompt, owners), request in zip(places.items(), everything, strict=True)
        if not known.issuperset(owners)
    }
    prompts, requests = list(waiting), list(waiting.values())
    if choice is None or choice.path is None:
        stream = answer_one_by_one(base, requests, pad_token_of(base))
    else:
        stream = answer(base, requests, budget, Work(), choice.path)
    for replies in stream:
        if any(math.isnan(reply.gap) for reply in replies):
            raise no_numbers()
        spread = [
            Reply(place, _output(benchmark, reply.text), reply.gap)
            for reply in replies
            for place in places[prompts[reply.place]]
            if place not in known
        ]
        yield spread, sum(len(requests[reply.place].tokens) for reply in replies)


def _finance_replies(base: Base, prompts: Sequence[str], known: set[int]) -> Iterator[tuple[list[Reply], int]]:
    """Ask the batches that hold a question not known yet; each is asked whole, because it is padded to its longest row."""
    for start in range(0, len(prompts), FINANCE_BATCH_SIZE):
        batch = prompts[start : start + FINANCE_BATCH_SIZE]
        if known.issuperset(range(start, start + len(batch))):
            continue
        for replies in answer_finance(base, batch):
            fresh = [Reply(start + r.place, r.text, r.gap) for r in replies if start + r.place not in known]
            yield fresh, sum(map(len, tokenize(base, [prompts[reply.place] for reply in fresh])))


def _requests(
    base: Base, settings: EvalSettings, questions: QuestionSet, tokens: Mapping[str, tuple[int, ...]]
) -> list[Request]:
    """Return a request for each prompt of `tokens`, with as many new tokens as the protocol allows."""
    if questions.selection.benchmark.answer_type == "sentiment":
        official = settings.mode == "official"  # it cuts prompts to the length that it allows
        cut = [ids[:FINANCE_LENGTH] if official else ids for ids in tokens.values()]
        requests = [Request(ids, max(1, FINANCE_LENGTH - len(ids))) for ids in cut]
    else:
        counts = new_tokens(base, questions.questions, settings.batch_size)
        limits = {question.prompt: count for question, count in zip(questions.questions, counts, strict=True)}
        requests = [Request(ids, limits[prompt]) for prompt, ids in tokens.items()]
    places = {question.prompt: place for place, question in enumerate(questions.questions)}
    check_questions(base, questions.selection.name, {prompt: places[prompt] for prompt in tokens}, requests)
    return requests


def _output(benchmark: Benchmark, text: str) -> str:
    """Return what is scored of the new text: all of it, in finance what precedes a second `Answer: `."""
    return answer_part("Answer: " + text) if benchmark.answer_type == "sentiment" else text


def _timed(stream: Iterator[tuple[list[Reply], int]]) -> Iterator[tuple[list[Reply], float, int]]:
    began = time.monotonic()
    for replies, tokens in stream:
        yield replies, time.monotonic() - began, tokens
        began = time.monotonic()


def _verify(
    bench: Bench, settings: EvalSettings, subject: Subject, questions: QuestionSet, journal: Journal
) -> Agreement:
    """Answer evenly spread questions one by one, on the same weights, and compare with the journal's outputs."""
    base = bench.put_on(subject)
    benchmark = questions.selection.benchmark
    last = {question.prompt: place for place, question in enumerate(questions.questions)}  # one place a prompt
    count = min(settings.verify, len(last))
    prompts = [list(last)[round(number * (len(last) - 1) / max(1, count - 1))] for number in range(count)]
    tokens = tokenize(base, [benchmark.wrap(prompt) for prompt in prompts])
    requests = _requests(base, settings, questions, dict(zip(prompts, tokens, strict=True)))
    equal = ties = 0
    for (plain,), prompt in zip(
        answer_one_by_one(base, requests, pad_token_of(base), keep_logits=True), prompts, strict=True
    ):
        output = journal.outputs[last[prompt]]
        if _output(benchmark, plain.text) == output:
            equal += 1
        else:
            ties += is_tie(base, plain, lambda text, output=output: output.startswith(_output(benchmark, text)))  # type: ignore[misc]
    gaps = sorted(gap for gap in journal.gaps.values() if gap is not None)
    return Agreement(count, equal, tuple(gaps[:5]), ties)


def _with_base(results: Sequence[BenchResult]) -> list[BenchResult]:
    """Add to every adapter's result the paired test against the base on the same questions, where the base was asked."""
    bases = {result.bench: result for result in results if result.subject == BASE}
    tested = []
    for result in results:
        base = bases.get(result.bench)
        if base is not None and result.subject != BASE and base.score.n == result.score.n:
            test = mcnemar(result.score.correct, base.score.correct)
            result = replace(result, against_base=test)
        tested.append(result)
    return tested


def result_record(result: BenchResult) -> dict[str, Any]:
    """Return a result as it stands in results.json."""
    score_ = result.score
    record = {
        "format": FORMAT,
        "subject": result.subject,
        "bench": result.bench,
        "label": result.label,
        "protocol": result.protocol,
        "mode": result.mode,
        "accuracy": score_.accuracy,
        "n": score_.n,
        "k": score_.k,
        "interval_95": [result.interval.low, result.interval.high],
        "unparsed": score_.unparsed,
        "unparsed_outputs": [list(pair) for pair in score_.unparsed_outputs],
        "accuracy_parsed": score_.accuracy_parsed,
        "majority": {"prediction": score_.majority, "share": score_.majority_share},
        "subsets": [{"name": s.name, "n": s.n, "k": s.k, "unparsed": s.unparsed} for s in score_.subsets],
        "partial": result.partial or None,
        "findings": list(result.findings),
        "comparable": result.comparable,
        "against_base": result.against_base and asdict(result.against_base),
        "used_mib": result.used_mib,
        "seconds": result.seconds,
        "prompt_tokens": result.prompt_tokens,
        "questions_per_second": result.questions_per_second,
        "tokens_per_second": result.prompt_tokens / result.seconds if result.seconds else None,
        "verified": result.agreement and asdict(result.agreement),
        "answer_path": result.answer_path,
        "answer_path_reason": result.answer_path_reason,
        **{key: value for key, value in result.details.items() if key not in ("bench", "protocol", "mode")},
    }
    return {key: without_nan(value) for key, value in record.items()}


def _on_hub(model: ModelConfig) -> bool:
    return model.base != BUILTIN_TINY and not Path(model.base).expanduser().is_dir()


def _pinned(model: ModelConfig) -> ModelConfig:
    """Return `model` with the commit that its revision means on the hub, so that a result says which weights it is of."""
    if not _on_hub(model):
        return model
    return model.model_copy(update={"revision": resolve_base(model, only_config=True).revision})


def _model_hash(model: ModelConfig) -> str | None:
    """Return a hash of weights, tokenizer and settings of a folder or a built-in model; a hub model has its commit."""
    if _on_hub(model):
        return None
    digest = hashlib.sha256()
    folder = resolve_base(model).folder
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _device() -> str:
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def _dtype_name(model: ModelConfig) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return str(compute_dtype(model, device)).removeprefix("torch.")
