"""The interface of a benchmark (`Task`): from rows to questions, from outputs to predictions, and the names of its files."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fedtune.errors import UsageError

Row = Mapping[str, Any]

LETTERS = "ABCD"


class RowError(ValueError):
    """A row cannot become a question; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question in the leaderboard's words."""

    id: str
    """Unique in its benchmark: `medmcqa/17`, `mmlu/anatomy/3`; rows count from 0."""
    prompt: str
    """The prompt without turn markers, to the byte."""
    gold: str
    """The right answer as the leaderboard writes it: `A`, `yes`, `neutral`."""
    subset: str | None = None
    """MMLU's subject, the tiny benchmark's topic."""


class Answer(NamedTuple):
    """A question with the output of a model."""

    question: Question
    output: str
    """The scored text, as `Task.output` returns it."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer that an output is read as."""

    value: str
    """In lower case; the whole output in lower case where it could not be parsed."""
    parsed: bool
    """Whether the output has the form of an answer."""
    correct: bool


@dataclass(frozen=True)
class Source:
    """A data set on the hub with a benchmark's rows."""

    hub_id: str
    split: str
    """Split, or splits joined by `+`."""
    config: str | None = None
    """Configuration; None is the part's own name (MMLU's subject) or the data set's only one."""
    revision: str | None = None
    """The commit to load; None is the newest, where no commit is known to be right."""
    original: bool = False
    """Whether the leaderboard uses this source; any other must prove that its rows are the same."""
    script: bool = False
    """Whether the data set needs its own Python code, which `datasets` refuses since 4.0 and fedtune never runs."""
    parquet_export: bool = False
    """Whether to read the hub's conversion of a script data set (branch `refs/convert/parquet`) instead."""
    rows: Callable[[Any], Iterable[Row]] = iter
    """From the loaded `datasets.Dataset` to rows in the original's fields and order."""


@dataclass(frozen=True)
class Part:
    """The official content of one of a benchmark's files."""

    rows: int | None
    """Number of rows; None where fedtune's own file defines it."""
    sha256: str | None = None
    """`content_hash` of its questions, where it is known."""


@dataclass(frozen=True)
class LmEvalTask:
    """The task of lm-eval with a benchmark's questions."""

    name: str
    """With `{part}` for MMLU's subject."""
    file: str
    """Its YAML file below lm-eval's folder of tasks."""
    convert: Callable[[Row], Row] = dict
    """From a row in the leaderboard's fields to one in lm-eval's."""


@dataclass(frozen=True)
class PaddedBatches:
    """Settings of the official mode for a benchmark that the leaderboard generates in padded batches."""

    size: int
    max_length: int
    """Most tokens of a prompt and its answer together; longer prompts are cut."""
    output: Callable[[str], str]
    """From the decoded text, prompt included, to the scored output."""


@dataclass(frozen=True)
class TokenCounts:
    """The questions of a benchmark, with the numbers of tokens on which the length of their answers may depend."""

    questions: Sequence[Question]
    prompts: Sequence[int]
    """Length of each question's wrapped prompt."""
    golds: Sequence[int]
    """Length of each question's right answer, without special tokens."""
    batch_size: int
    """The protocol's, in questions."""


@dataclass(frozen=True)
class Task(ABC):
    """One benchmark: its data, prompts, generation limits, scoring and file names."""

    answer_type: ClassVar[str]
    """`choice`, `yes-no`, `sentiment`: tasks of one type score alike."""
    golds: ClassVar[frozenset[str]]
    """The right answers that a generation file of this type may contain."""
    columns: ClassVar[tuple[str, str, str]] = ("prompt", "gold", "output")
    """Keys of prompt, right answer and output in the leaderboard's generation file."""
    keeps_outputs: ClassVar[bool] = True
    """Whether that file contains the outputs themselves; otherwise it contains the predictions."""
    padded_batches: ClassVar[PaddedBatches | None] = None
    """How the official mode generates; None for one prompt at a time."""

    name: str
    title: str
    instruction: str
    """First line of every prompt; for sentiment the part after `Instruction: `."""
    fields: tuple[str, ...]
    """Fields that a row must have (protocol, sections 4 and 5)."""
    ask: Callable[[Row], tuple[str, str]]
    """From a row to (prompt, gold); raises RowError."""
    parts: Mapping[str, Part]
    """The official files by name; a benchmark with one file calls it by an empty name."""
    sources: tuple[Source, ...] = ()
    """In order of preference."""
    more_fields: tuple[str, ...] = ()
    """Fields of the data set that no prompt shows."""
    subset_field: str | None = None
    """The field that contains a row's subset, where the file's name does not."""
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Named groups of parts."""
    ranked: tuple[str, ...] = ()
    """The categories that the leaderboard ranks."""
    shipped: Path | None = None
    """A file with the rows that is part of fedtune."""
    lm_eval: LmEvalTask | None = None

    def questions(self, part: str, rows: Iterable[tuple[str, Row]], where: str) -> list[Question]:
        """Turn rows into questions, and count the rows that cannot become one.

        Args:
            part: The file that the rows belong to.
            rows: Pairs of a row's position (`line 3`) and the row.
            where: File or source, for the message.

        Raises:
            UsageError: rows have missing or unknown fields, or values that make no question.
        """
        allowed = {*self.fields, *self.more_fields}
        questions: list[Question] = []
        problems: dict[str, tuple[str, int]] = {}
        for index, (position, row) in enumerate(rows):
            missing = [name for name in self.fields if name not in row]
            unknown = sorted(str(name) for name in row if name not in allowed)
            try:
                if missing:
                    raise RowError(f"no field {missing[0]}")
                if unknown:
                    raise RowError(f"an unknown field {unknown[0]}")
                prompt, gold = self.ask(row)
            except RowError as error:
                kind = str(error).split(" is ")[0]
                first, count = problems.get(kind, (f"{position}: {error}", 0))
                problems[kind] = (first, count + 1)
                continue
            subset = str(row[self.subset_field]) if self.subset_field else part or None
            questions.append(Question("/".join(filter(None, (self.name, part, str(index)))), prompt, gold, subset))
        if problems:
            bad = sum(count for _, count in problems.values())
            raise UsageError(
                f"{where}: {bad} of {bad + len(questions)} rows cannot be used; "
                + "; ".join(f"{first} ({count} such)" for first, count in list(problems.values())[:3])
                + ".",
                hint=f"A {self.name} row has the fields {', '.join(self.fields)}.",
            )
        return questions

    @abstractmethod
    def wrap(self, prompt: str) -> str:
        """Return the text that the model reads for a prompt."""

    @abstractmethod
    def new_tokens(self, counted: TokenCounts) -> list[int]:
        """Return the most new tokens of each question's answer."""

    def output(self, generated: str) -> str:
        """Return the part of the new text that is scored."""
        return generated

    @abstractmethod
    def score(self, question: Question, output: str) -> Prediction:
        """Read an output as an answer, and compare it with the right one (protocol, sections 4 and 5)."""

    def artefact_names(self, category: str | None, run: str) -> tuple[str, str]:
        """Return the leaderboard's names for the files of accuracy and generations (protocol, section 4)."""
        name = "_".join(filter(None, (self.name, category, run)))
        return f"acc_{name}.txt", f"generation_{name}.jsonl"

    def generations_text(self, answers: Sequence[Answer]) -> str:
        """Return the content of the generation file: one JSON array, as pandas writes records."""
        records = []
        for question, output in answers:
            subset = {} if question.subset is None else {"subset": question.subset}
            records.append(pandas_json({"prompt": question.prompt, "gold": question.gold, **subset, "output": output}))
        return f"[{','.join(records)}]"

    @property
    def first_lines(self) -> frozenset[str]:
        """The first lines that prompts of this benchmark have."""
        return frozenset((self.instruction,))


@dataclass(frozen=True)
class Selection:
    """A benchmark, one of its categories, or one of its parts."""

    task: Task
    parts: tuple[str, ...] = ("",)
    """The parts in the leaderboard's order."""
    category: str | None = None
    """Category or single part, as users and the leaderboard's file names write it."""

    @property
    def name(self) -> str:
        """`medmcqa`, `mmlu:stem`, `mmlu:anatomy`: a text that `parse_bench` reads."""
        return f"{self.task.name}:{self.category}" if self.category else self.task.name

    @property
    def expected(self) -> int | None:
        """Rows of the official data; None where fedtune's own file defines them."""
        counts = [self.task.parts[part].rows for part in self.parts]
        return None if None in counts else sum(count or 0 for count in counts)


def pandas_json(record: Mapping[str, str]) -> str:
    """Return a record as `pandas.DataFrame.to_json` writes it: no blanks, ASCII only, and `/` escaped."""
    text = json.dumps(record, separators=(",", ":")).replace("/", r"\/")
    # The one other character that the two write differently.
    return text.replace(r"\u007f", "\x7f")


def content_hash(pairs: Iterable[tuple[str, str]]) -> str:
    """Return the sha256 (hex) over (prompt, gold) pairs: one JSON array of two strings a line, UTF-8."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def text_of(row: Row, name: str) -> str:
    """Return the string in a field; raise RowError for any other type."""
    value = row[name]
    if not isinstance(value, str):
        raise RowError(f"{name} is {_shown(value)}, not a text")
    return value


def index_of(row: Row, name: str, first: int, last: int) -> int:
    """Return the integer in a field, first <= value <= last; raise RowError for any other value."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int) or not first <= value <= last:
        raise RowError(f"{name} is {_shown(value)}, not {first} to {last}")
    return value


def one_of(row: Row, name: str, allowed: Sequence[str]) -> str:
    """Return the string in a field if it is one of `allowed`; raise RowError otherwise."""
    value = row[name]
    if value not in allowed:
        raise RowError(f"{name} is {_shown(value)}, not one of {', '.join(allowed)}")
    return str(value)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
