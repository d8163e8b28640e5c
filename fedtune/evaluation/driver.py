"""Scores every subject on every benchmark: prompts, replies, scores, files (`evaluate`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from fedtune.config.facts import load_preset
from fedtune.config.schema import FedTuneConfig
from fedtune.errors import FedTuneError
from fedtune.evaluation.artefacts import write_artefacts
from fedtune.evaluation.backends.fast import Budget, Work, answer
from fedtune.evaluation.backends.generation import Reply, tokenize
from fedtune.evaluation.backends.official import answer_one_by_one, answer_padded, check_embeddings
from fedtune.evaluation.backends.probe import (
    ONE_BY_ONE,
    check_repeatable,
    choose_path,
    is_tie,
    nan_error,
    warnings_about,
)
from fedtune.evaluation.journal import Journal, open_journal
from fedtune.evaluation.model_slot import ModelSlot
from fedtune.evaluation.progress import EvalProgress, Listener
from fedtune.evaluation.prompts import build_prompts
from fedtune.evaluation.provenance import describe
from fedtune.evaluation.results import (
    FILE,
    Agreement,
    BenchmarkResult,
    EvalResult,
    add_results,
    cannot_write,
    prepare_folder,
)
from fedtune.evaluation.scoring import score_answers
from fedtune.evaluation.settings import EvalSettings
from fedtune.evaluation.statistics import mcnemar, wilson
from fedtune.evaluation.subjects import BASE, Subject
from fedtune.evaluation.tasks.base import Answer, Selection
from fedtune.evaluation.tasks.load import QuestionSet, load_questions
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.models.adapter import read_adapter, reading_config
from fedtune.models.base import Base

Scorer = Callable[[ModelSlot, Subject, Selection], BenchmarkResult]


def evaluate(settings: EvalSettings, listener: Listener | None = None) -> EvalResult:
    """Score every subject on every benchmark.

    Answers that are on disk are not computed again, so an interrupted evaluation continues where it stopped.

    Raises:
        MissingError: the model, an adapter or data cannot be found, an adapter does not fit the base, or the results folder
            cannot be written or contains results that this version cannot read.
        UsageError: the data is not what a benchmark needs, or the model cannot answer it.
    """
    # Before the first answer, so that a damaged last adapter does not cost the answers of the others.
    for subject in settings.subjects:
        if subject.folder is not None:
            reading_config(read_adapter(subject.folder))
    results: list[BenchmarkResult] = []
    with _open_scorer(settings, listener) as score:
        slot = ModelSlot(settings.model)
        for subject in settings.subjects:
            results += [score(slot, subject, selection) for selection in settings.selections]
            slot.check_base(subject)
    tested = _compare_with_base(results)
    file = settings.out / FILE
    add_results(file, [result.to_record() for result in tested])
    return EvalResult(tuple(tested), file)


def compare(config: FedTuneConfig, adapters: Mapping[str, Path], out: Path) -> list[BenchmarkResult]:
    """Score the base and `adapters` (names to folders) on every benchmark of the config's challenge.

    Args:
        config: Its base model, quantized as in training, and its challenge.
        adapters: The adapters' folders by their names in the table.
        out: Folder of the results.
    """
    benches = load_preset("challenge", config.challenge).benchmarks if config.challenge else ()
    settings = EvalSettings(
        model=config.model,
        subjects=(Subject(BASE), *(Subject(name, folder) for name, folder in adapters.items())),
        selections=tuple(selection for bench in benches for selection in parse_bench(bench)),
        out=out,
    )
    return list(evaluate(settings).results)


def _open_scorer(settings: EvalSettings, listener: Listener | None) -> AbstractContextManager[Scorer]:
    """Load the questions, prepare the folder of results, and return the function that scores one benchmark."""
    if settings.protocol == "lm-eval":
        from fedtune.evaluation.backends.lm_eval import lm_eval_scorer  # lm-eval takes seconds to import

        return lm_eval_scorer(settings, listener)
    sets = {each.name: load_questions(each, settings.data_dir, settings.limit) for each in settings.selections}
    prepare_folder(settings.out)
    prepare_folder(settings.out / "answers")

    def score(slot: ModelSlot, subject: Subject, selection: Selection) -> BenchmarkResult:
        return _score_one(slot, settings, subject, sets[selection.name], listener)

    return nullcontext(score)


def _score_one(
    slot: ModelSlot, settings: EvalSettings, subject: Subject, questions: QuestionSet, listener: Listener | None
) -> BenchmarkResult:
    """Score one subject on one benchmark by the leaderboard's protocol."""
    selection, task = questions.selection, questions.selection.task
    details = {
        "bench": selection.name,
        "protocol": "flowertune",
        "mode": settings.mode,
        "batch_size": settings.batch_size,
        "prompts_sha256": questions.sha256,
        **describe(slot.config, slot.sha256, subject.folder),
    }
    label = settings.label(subject)
    name = "_".join(filter(None, (task.name, selection.category, label)))
    journal = open_journal(settings.out / "answers", name, details)
    if set(range(questions.count)) - journal.outputs.keys():
        _answer(slot.attach(subject), settings, subject, questions, journal, listener)
        try:
            slot.check_base(subject)
        except FedTuneError:
            journal.path.unlink()  # its answers may come from a changed model
            raise
    answers = [Answer(question, journal.outputs[index]) for index, question in enumerate(questions.questions)]
    score = score_answers(task, answers)
    try:
        write_artefacts(settings.out, selection, label, answers, score.accuracy)
    except OSError as error:
        raise cannot_write(settings.out, error) from error
    agreement = _verify(slot.attach(subject), settings, questions, journal) if settings.verify else None
    findings = [*(finding.text for finding in questions.findings), *journal.findings]
    agreed = agreement is None or agreement.holds
    if agreement is not None and not agreed:
        others = agreement.asked - agreement.equal - agreement.ties
        findings.append(
            f"{others} of {agreement.asked} verified answers differ from one-by-one generation on "
            "the same weights, so that the accuracy is not comparable; --mode official answers one by one"
        )
    return BenchmarkResult(
        subject=subject.name,
        bench=selection.name,
        label=label,
        protocol="flowertune",
        mode=settings.mode,
        score=score,
        interval=wilson(score.k, score.n),
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
    """Answer the questions that the journal lacks, and write every batch of replies into it."""

    def count_right(outputs: Iterable[tuple[int, str]]) -> int:
        task = questions.selection.task
        return sum(task.score(questions.questions[index], output).correct for index, output in outputs)

    began = last = time.monotonic()
    answered, right = 0, count_right(journal.outputs.items())
    for replies, tokens in _replies(base, settings, questions, journal):
        if not answered:
            right = count_right(journal.outputs.items())  # the journal may have dropped answers of another path
        journal.add(replies, time.monotonic() - last, tokens)
        answered += len(replies)
        right += count_right((reply.index, reply.text) for reply in replies)
        if listener is not None:
            listener(
                EvalProgress(
                    subject=subject.name,
                    bench=questions.selection.name,
                    done=len(journal.outputs),
                    total=questions.count,
                    right=right,
                    seconds=time.monotonic() - began,
                    answered=answered,
                )
            )
        last = time.monotonic()


def _replies(
    base: Base, settings: EvalSettings, questions: QuestionSet, journal: Journal
) -> Iterator[tuple[list[Reply], int]]:
    """Yield replies to the questions that the journal lacks, by question index, with the number of prompt tokens."""
    task = questions.selection.task
    prompts = build_prompts(base, questions, settings)
    requests = [prompt.request for prompt in prompts]
    findings = warnings_about(base, requests)
    path, budget, padded = None, Budget.of(base.device), None
    if settings.mode == "official":
        padded = task.padded_batches
        if padded is not None:
            check_embeddings(base)
        check_repeatable(base, requests)
        name = f"batches of {padded.size} padded on the left" if padded is not None else ONE_BY_ONE
        journal.choose(name, "the official mode", findings)
    else:
        choice = choose_path(base, requests, budget)
        path = choice.path
        journal.choose(choice.name, choice.reason, findings)
    known = set(journal.outputs)
    if padded is not None:
        texts = [task.wrap(question.prompt) for question in questions.questions]
        for replies in answer_padded(base, texts, padded, known):
            yield replies, sum(map(len, tokenize(base, [texts[reply.index] for reply in replies])))
        return
    waiting = [prompt for prompt in prompts if not known.issuperset(prompt.indices)]
    requests = [prompt.request for prompt in waiting]
    stream = answer_one_by_one(base, requests) if path is None else answer(base, requests, budget, Work(), path)
    for replies in stream:
        if any(math.isnan(reply.gap) for reply in replies):
            raise nan_error()
        spread = [
            Reply(index, task.output(reply.text), reply.gap)
            for reply in replies
            for index in waiting[reply.index].indices
            if index not in known
        ]
        yield spread, sum(len(requests[reply.index].tokens) for reply in replies)


def _verify(base: Base, settings: EvalSettings, questions: QuestionSet, journal: Journal) -> Agreement:
    """Answer evenly spaced prompts one by one, on the same weights, and compare with the journal's outputs."""
    task = questions.selection.task
    prompts = build_prompts(base, questions, settings)
    count = min(settings.verify, len(prompts))
    chosen = [prompts[round(number * (len(prompts) - 1) / max(1, count - 1))] for number in range(count)]
    equal = ties = 0
    plain_replies = answer_one_by_one(base, [prompt.request for prompt in chosen], keep_logits=True)
    for (plain,), prompt in zip(plain_replies, chosen, strict=True):
        output = journal.outputs[prompt.indices[-1]]
        if task.output(plain.text) == output:
            equal += 1
        else:
            ties += is_tie(base, plain, output, task.output)
    gaps = sorted(gap for gap in journal.gaps.values() if gap is not None)
    return Agreement(count, equal, tuple(gaps[:5]), ties)


def _compare_with_base(results: Sequence[BenchmarkResult]) -> list[BenchmarkResult]:
    """Add the paired test against the base on the same questions to every adapter's result, where the base was scored."""
    bases = {result.bench: result for result in results if result.subject == BASE}
    tested = []
    for result in results:
        base = bases.get(result.bench)
        if base is not None and result.subject != BASE and base.score.n == result.score.n:
            result = replace(result, against_base=mcnemar(result.score.correct, base.score.correct))
        tested.append(result)
    return tested
