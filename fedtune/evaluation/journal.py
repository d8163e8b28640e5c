"""The journal of one subject on one benchmark: every answer on disk, so that a killed evaluation continues where it stopped.

The first line describes prompts, model, adapter and arithmetic. Its hash is part of the file's name, so that other settings get
another journal. The second line names the path on which the answers are computed. One line per question follows, and after each
batch a line with its seconds and tokens.
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

from fedtune.evaluation.backends.generation import Reply
from fedtune.evaluation.results import cannot_write
from fedtune.runs.atomic import read_json_lines, write_text

FORMAT = 2
"""Format 1 had no path; its journals are not used any more."""

_FORMS: tuple[dict[str, tuple[type, ...]], ...] = (
    {"place": (int,), "output": (str,), "gap": (int, float, type(None))},
    {"answer_path": (str,), "reason": (str,), "findings": (list,)},
    {"seconds": (int, float), "prompt_tokens": (int,)},
)
"""The keys of each kind of line, with their types; `place` is the question's index."""

_log = logging.getLogger(__name__)


@dataclass
class Journal:
    """The answers on disk; `open_journal` opens them."""

    path: Path
    head: Mapping[str, Any]
    """Prompts, model, adapter and arithmetic."""
    answer_path: str | None = None
    """Name of the path on which the answers are computed; None before it is chosen."""
    reason: str = ""
    """Why that path."""
    findings: tuple[str, ...] = ()
    """Warnings about these answers."""
    outputs: dict[int, str] = field(default_factory=dict)
    """From the question's index to the model's output."""
    gaps: dict[int, float | None] = field(default_factory=dict)
    """From the question's index to the gap between its first token's logit and the runner-up's."""
    seconds: float = 0.0
    """Time spent on the answers, over all processes that wrote them."""
    prompt_tokens: int = 0
    """Tokens of the answered prompts."""

    def choose(self, answer_path: str, reason: str, findings: Sequence[str] = ()) -> None:
        """Record the path on which answers are computed from now on.

        Earlier answers from another path are moved to another file, so that no result mixes two paths.
        """
        if self.answer_path == answer_path:
            return
        if self.answer_path is not None or self.outputs:
            path, count = self.answer_path, len(self.outputs)
            _log.warning(
                "The %d answers in %s were computed on another path (%s, now: %s). They are kept in %s, and all questions "
                "are answered again.",
                *(count, self.path, path, answer_path, self._start_again("other-path").name),
            )
        self._write([{"answer_path": answer_path, "reason": reason, "findings": list(findings)}])

    def add(self, replies: Sequence[Reply], seconds: float, prompt_tokens: int) -> None:
        """Append one batch of replies, with the indices of their questions.

        Raises:
            MissingError: the folder cannot be written.
        """
        lines: list[Mapping[str, Any]] = []
        for reply in replies:
            gap = reply.gap if math.isfinite(reply.gap) else None  # JSON has finite numbers only
            lines.append({"place": reply.index, "output": reply.text, "gap": gap})
        self._write([*lines, {"seconds": seconds, "prompt_tokens": prompt_tokens}])

    def read(self) -> None:
        """Read the file, or create it."""
        if not self.path.exists():
            write_text(self.path, _line(self.head))
            return
        try:
            lines = read_json_lines(self.path)
            if not lines:
                raise ValueError(f"{self.path} has no first line")
            if lines[0] != self.head:
                raise ValueError(f"line 1 of {self.path} describes another evaluation")
            for number, line in enumerate(lines[1:], start=2):
                self._apply(line, f"line {number} of {self.path}")
        except ValueError as damage:
            aside = self._start_again("damaged")
            _log.warning("%s. The file is kept as %s, and all its questions are answered again.", damage, aside.name)
            return
        if not self.path.read_bytes().endswith(b"\n"):
            _log.warning(
                "The last line of %s is cut off. It is dropped, and its question is answered again.", self.path
            )
            # Without the incomplete line, which would run into the next one.
            write_text(self.path, "".join(map(_line, lines)))

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            self._apply(line, "a new line")
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, lines)))
        except OSError as error:
            raise cannot_write(self.path.parent, error) from error

    def _apply(self, line: Mapping[str, Any], where: str) -> None:
        """Take over the content of one line; raise ValueError for a line of another form."""
        forms = [form for form in _FORMS if next(iter(form)) in line] or [_FORMS[-1]]
        for key, types in forms[0].items():
            if key not in line or isinstance(line[key], bool) or not isinstance(line[key], types):
                raise ValueError(f"{where} is damaged ({key})")
        if "place" in line:
            self.outputs[line["place"]], self.gaps[line["place"]] = line["output"], line["gap"]
        elif "answer_path" in line:
            self.answer_path, self.reason = line["answer_path"], line["reason"]
            self.findings = tuple(line["findings"])
        else:
            self.seconds += line["seconds"]
            self.prompt_tokens += line["prompt_tokens"]

    def _start_again(self, why: str) -> Path:
        """Rename the file, so that its answers are kept, and begin a new one; return the old one's new name."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.stem}.{why}-{number}{self.path.suffix}")).exists():
            number += 1
        self.path.rename(aside)
        self.answer_path, self.reason, self.findings = None, "", ()
        self.outputs, self.gaps, self.seconds, self.prompt_tokens = {}, {}, 0.0, 0
        write_text(self.path, _line(self.head))
        return aside


def open_journal(folder: Path, name: str, subject: Mapping[str, Any]) -> Journal:
    """Open the journal about `subject` in `folder`, or create it; `name` makes its file name readable.

    An incomplete last line is dropped, so that its question is answered again. A journal with other damage is renamed and kept.
    The log tells the user about both.

    Raises:
        MissingError: the folder cannot be written.
    """
    head = json.loads(json.dumps({"format": FORMAT, **subject}))
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:8]
    journal = Journal(folder / f"{name}-{digest}.jsonl", head)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal.read()
    except OSError as error:
        raise cannot_write(folder, error) from error
    return journal


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
