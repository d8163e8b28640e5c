"""The journal of one adapter on one benchmark: every answer as it comes, so that a killed evaluation goes on where it stopped.

The first line says what is being answered, with what: prompts, model, adapter, arithmetic. Its hash is in the file's name, so
that other settings have another journal and this one stays. The second says on which path the answers are computed. Then one
line per question, and after each batch one with its seconds and tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.evaluation.answer import Reply
from fedtune.evaluation.results import cannot_write
from fedtune.runs.atomic import read_json_lines, write_text

FORMAT = 2
"""1: without the path; those journals stay where they are, unused."""

_log = logging.getLogger(__name__)


@dataclass
class Journal:
    """Answers that are on disk; `open_journal` makes one."""

    path: Path
    head: Mapping[str, Any]
    """What is being answered, with what."""
    answer_path: str | None = None
    """Name of the path on which the answers are computed; None before that is chosen."""
    reason: str = ""
    """Why that path."""
    findings: tuple[str, ...] = ()
    """What the user should know of these answers."""
    outputs: dict[int, str] = field(default_factory=dict)
    """Place of the question to the model's output."""
    gaps: dict[int, float | None] = field(default_factory=dict)
    """Place of the question to the gap between its first token's logit and the runner-up's."""
    seconds: float = 0.0
    """Time spent on the answers, over all processes that wrote here."""
    prompt_tokens: int = 0
    """Tokens of the answered prompts."""

    def choose(self, answer_path: str, reason: str, findings: Sequence[str] = ()) -> None:
        """Record the path on which answers are computed from here on.

        Answers that are here from another path are set aside, file and all, so that no result mixes two.
        """
        if self.answer_path == answer_path:
            return
        if self.answer_path is not None or self.outputs:
            aside = _set_aside(self.path, "other-path")
            _log.warning(
                "The %d answers in %s were computed on another path (%s, now: %s). They are kept in %s and all questions "
                "are answered again.",
                len(self.outputs),
                self.path,
                self.answer_path,
                answer_path,
                aside.name,
            )
            self.outputs, self.gaps, self.seconds, self.prompt_tokens = {}, {}, 0.0, 0
            _begin(self.path, self.head)
        self.answer_path, self.reason, self.findings = answer_path, reason, tuple(findings)
        self._append([{"answer_path": answer_path, "reason": reason, "findings": list(findings)}])

    def add(self, replies: Sequence[Reply], seconds: float, prompt_tokens: int) -> None:
        """Append one batch of replies; their places are those of the questions.

        Raises:
            MissingError: the folder cannot be written.
        """
        lines: list[Mapping[str, Any]] = []
        for reply in replies:
            gap = reply.gap if math.isfinite(reply.gap) else None  # JSON has no other numbers
            self.outputs[reply.place], self.gaps[reply.place] = reply.text, gap
            lines.append({"place": reply.place, "output": reply.text, "gap": gap})
        self.seconds += seconds
        self.prompt_tokens += prompt_tokens
        lines.append({"seconds": seconds, "prompt_tokens": prompt_tokens})
        self._append(lines)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(_line(line) for line in lines)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise cannot_write(self.path.parent, error) from error


def open_journal(folder: Path, name: str, subject: Mapping[str, Any]) -> Journal:
    """Open the journal about `subject` in `folder`, or begin it; `name` makes its file name readable.

    A line that a kill cut short is dropped, so its question is answered again. A journal that is damaged further up is set
    aside, never written over. Both are said in the log.

    Raises:
        MissingError: the folder cannot be written.
    """
    head = json.loads(json.dumps({"format": FORMAT, **subject}))
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:8]
    journal = Journal(folder / f"{name}-{digest}.jsonl", head)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _read(journal)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return journal


def _read(journal: Journal) -> None:
    """Read the journal's file into it, or begin the file."""
    file = journal.path
    if not file.exists():
        _begin(file, journal.head)
        return
    try:
        lines = read_json_lines(file)
        if not lines:
            raise ValueError(f"{file} has no first line")
        if lines[0] != journal.head:
            raise ValueError(f"line 1 of {file} is about something else")
        for number, line in enumerate(lines[1:], start=2):
            _take(journal, line, f"line {number} of {file}")
    except ValueError as damage:
        aside = _set_aside(file, "damaged")
        _log.warning("%s. The file is kept as %s and all its questions are answered again.", damage, aside.name)
        journal.answer_path, journal.reason, journal.findings = None, "", ()
        journal.outputs, journal.gaps, journal.seconds, journal.prompt_tokens = {}, {}, 0.0, 0
        _begin(file, journal.head)
        return
    if not file.read_bytes().endswith(b"\n"):
        _log.warning("The last line of %s is cut off. It is dropped, and its question is answered again.", file)
        # Whole lines only: what was torn off must not run into the next one.
        write_text(file, "".join(_line(line) for line in lines))


def _take(journal: Journal, line: Mapping[str, Any], where: str) -> None:
    """Add one line to the journal; raises ValueError for one that no journal has."""
    kinds: dict[str, tuple[type, ...]]
    if "place" in line:
        kinds = {"place": (int,), "output": (str,), "gap": (int, float, type(None))}
    elif "answer_path" in line:
        kinds = {"answer_path": (str,), "reason": (str,), "findings": (list,)}
    else:
        kinds = {"seconds": (int, float), "prompt_tokens": (int,)}
    for key, types in kinds.items():
        if key not in line or isinstance(line[key], bool) or not isinstance(line[key], types):
            raise ValueError(f"{where} is damaged ({key})")
    if "place" in line:
        journal.outputs[line["place"]], journal.gaps[line["place"]] = line["output"], line["gap"]
    elif "answer_path" in line:
        journal.answer_path, journal.reason = line["answer_path"], line["reason"]
        journal.findings = tuple(line["findings"])
    else:
        journal.seconds += line["seconds"]
        journal.prompt_tokens += line["prompt_tokens"]


def _begin(file: Path, head: Mapping[str, Any]) -> None:
    write_text(file, _line(head))


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _set_aside(file: Path, why: str) -> Path:
    """Rename a journal, so that its answers are kept, and return its new name."""
    number = 1
    while (aside := file.with_name(f"{file.stem}.{why}-{number}{file.suffix}")).exists():
        number += 1
    return file.rename(aside)
