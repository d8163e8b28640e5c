"""The journal of one adapter on one benchmark: every answer as it comes, so that a killed evaluation goes on where it stopped.

The first line says what is being answered, with what: prompts, model, adapter, arithmetic. Its hash is in the file's name, so
that other settings have another journal and this one stays. Then one line per question, and after each batch one with its
seconds and tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.evaluation.answer import Reply
from fedtune.runs.atomic import read_json_lines, write_text


@dataclass
class Journal:
    """Answers that are on disk; `open_journal` makes one."""

    path: Path
    outputs: dict[int, str] = field(default_factory=dict)
    """Place of the question to the model's output."""
    gaps: dict[int, float | None] = field(default_factory=dict)
    """Place of the question to the gap between its first token's logit and the runner-up's."""
    seconds: float = 0.0
    """Time spent on the answers, over all processes that wrote here."""
    prompt_tokens: int = 0
    """Tokens of the answered prompts."""

    def add(self, replies: Sequence[Reply], seconds: float, prompt_tokens: int) -> None:
        """Append one batch of replies; their places are those of the questions."""
        lines = []
        for reply in replies:
            gap = reply.gap if reply.gap == reply.gap else None  # NaN is no JSON
            self.outputs[reply.place], self.gaps[reply.place] = reply.text, gap
            lines.append({"place": reply.place, "output": reply.text, "gap": gap})
        self.seconds += seconds
        self.prompt_tokens += prompt_tokens
        lines.append({"seconds": seconds, "prompt_tokens": prompt_tokens})
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def open_journal(folder: Path, name: str, subject: Mapping[str, Any]) -> Journal:
    """Open the journal about `subject` in `folder`, or begin it; `name` makes its file name readable.

    A line that a kill cut short is dropped, so its question is asked again; a journal damaged elsewhere is begun anew.
    """
    head = json.loads(json.dumps(subject))
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"{name}-{digest}.jsonl"
    journal = Journal(path)
    try:
        lines = read_json_lines(path)
    except ValueError:
        lines = []
    if not lines or lines[0] != head:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(head, ensure_ascii=False) + "\n")
        return journal
    for line in lines[1:]:
        if "place" in line:
            journal.outputs[line["place"]], journal.gaps[line["place"]] = line["output"], line["gap"]
        else:
            journal.seconds += line["seconds"]
            journal.prompt_tokens += line["prompt_tokens"]
    # Whole lines only: what was torn off must not run into the next one.
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return journal
