"""What a benchmark is: how a row becomes a question, where the rows come from, and what the official data holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

AnswerType = Literal["choice", "yes-no", "sentiment"]
Row = Mapping[str, Any]

LETTERS = "ABCD"


class RowError(ValueError):
    """A row cannot become a question; the text says why."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question as the leaderboard puts it."""

    id: str
    """Unique in its benchmark: `medmcqa/17`, `mmlu/anatomy/3`; rows count from 0."""
    prompt: str
    """The unwrapped prompt, to the byte."""
    gold: str
    """The right answer as the leaderboard writes it: `A`, `yes`, `neutral`."""
    subset: str | None = None
    """MMLU's subject, the tiny benchmark's topic."""


@dataclass(frozen=True)
class Source:
    """One place on the hub where a benchmark's rows can be had."""

    hub_id: str
    split: str
    """Split, or splits joined by `+`."""
    config: str | None = None
    """Configuration; None is the part's own name (MMLU's subject) or the data set's only one."""
    revision: str | None = None
    """Commit that is loaded; None is the newest, where no commit is known to be right."""
    original: bool = False
    """The leaderboard's own source; anything else must prove that its rows are the same."""
    script: bool = False
    """Made by Python code of its own, which `datasets` refuses since 4.0 and fedtune never runs."""
    parquet_export: bool = False
    """Read the hub's own conversion of a script data set instead (branch `refs/convert/parquet`)."""
    rows: Callable[[Any], Iterable[Row]] = iter
    """From the loaded `datasets.Dataset` to rows in the original's fields and order."""


@dataclass(frozen=True)
class Part:
    """What one file of the official data holds."""

    rows: int | None
    """Number of rows; None where whatever ships is right."""
    sha256: str | None = None
    """`content_hash` of its questions, where it could be computed."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of the leaderboard, or our own tiny one."""

    name: str
    title: str
    answer_type: AnswerType
    instruction: str
    """First line of every prompt; in finance the part after `Instruction: `, for news."""
    chance: float
    """Accuracy of a uniform guess among the answers."""
    fields: tuple[str, ...]
    """Fields that a row must have (protocol, sections 4 and 5)."""
    ask: Callable[[Row], tuple[str, str]]
    """From a row to (prompt, gold); raises RowError."""
    parts: Mapping[str, Part]
    """The official data's files by name; a benchmark of one file calls it by an empty name."""
    sources: tuple[Source, ...] = ()
    """In order of preference."""
    more_fields: tuple[str, ...] = ()
    """Fields that the data set also has and no prompt shows."""
    subset_field: str | None = None
    """The field that names a row's subset, where the file does not."""
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Named groups of parts."""
    ranked: tuple[str, ...] = ()
    """The categories that the leaderboard ranks."""
    shipped: Path | None = None
    """A file of fedtune's own that holds the rows."""

    def wrap(self, prompt: str) -> str:
        """Return what the model is given: finance prompts as they are, all others wrapped."""
        return prompt if self.answer_type == "sentiment" else wrap_prompt(prompt)


@dataclass(frozen=True)
class Selection:
    """A benchmark, one of its categories, or one of its parts."""

    benchmark: Benchmark
    parts: tuple[str, ...] = ("",)
    """The parts in the leaderboard's order."""
    category: str | None = None
    """Category or single part, as the user and the leaderboard's file names write it."""

    @property
    def name(self) -> str:
        """`medmcqa`, `mmlu:stem`, `mmlu:anatomy`: what `parse_bench` reads."""
        return f"{self.benchmark.name}:{self.category}" if self.category else self.benchmark.name

    @property
    def expected(self) -> int | None:
        """Rows that the official data holds; None where whatever ships is right."""
        counts = [self.benchmark.parts[part].rows for part in self.parts]
        return None if None in counts else sum(count or 0 for count in counts)


def wrap_prompt(prompt: str) -> str:
    """Return `prompt` with the turn markers that every model gets, chat template or not (protocol, section 4)."""
    return f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"


def plain_prompt(instruction: str, body: str) -> str:
    """Return the unwrapped prompt of general-nlp and medical benchmarks (protocol, section 4)."""
    return f"{instruction}\n{body}\nThe answer is:\n"


def choice_prompt(instruction: str, question: str, options: Sequence[str]) -> str:
    """Return the unwrapped prompt of a multiple-choice question.

    A `?` is appended when the question ends in neither `?` nor `.`.

    >>> choice_prompt("Answer.", "Is it", ["yes", "no"])
    'Answer.\\nQuestion: Is it?\\n\\nOptions:\\nA. yes\\nB. no\\nThe answer is:\\n'
    """
    mark = "" if question.endswith(("?", ".")) else "?"
    lines = "\n".join(f"{chr(ord('A') + place)}. {option}" for place, option in enumerate(options))
    return plain_prompt(instruction, f"Question: {question}{mark}\n\nOptions:\n{lines}")


def finance_instruction(kind: Literal["news", "tweet"]) -> str:
    """Return the instruction of the finance benchmarks (protocol, section 5)."""
    return f"What is the sentiment of this {kind}? Please choose an answer from {{negative/neutral/positive}}."


def finance_prompt(text: str, kind: Literal["news", "tweet"] = "news") -> str:
    """Return the prompt of a finance benchmark, which is never wrapped (protocol, section 5)."""
    return f"Instruction: {finance_instruction(kind)}\nInput: {text}\nAnswer: "


def content_hash(pairs: Iterable[tuple[str, str]]) -> str:
    """Return the sha256 (hex) over (prompt, gold) pairs: one JSON array of two strings a line, UTF-8."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def text_of(row: Row, name: str) -> str:
    """Return the string in a field; raises RowError for anything else."""
    value = row[name]
    if not isinstance(value, str):
        raise RowError(f"{name} is {_shown(value)}, not a text")
    return value


def index_of(row: Row, name: str, first: int, last: int) -> int:
    """Return the integer in a field, first <= value <= last; raises RowError for anything else."""
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int) or not first <= value <= last:
        raise RowError(f"{name} is {_shown(value)}, not {first} to {last}")
    return value


def one_of(row: Row, name: str, allowed: Sequence[str]) -> str:
    """Return the string in a field if it is one of `allowed`; raises RowError otherwise."""
    value = row[name]
    if value not in allowed:
        raise RowError(f"{name} is {_shown(value)}, not one of {', '.join(allowed)}")
    return str(value)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
