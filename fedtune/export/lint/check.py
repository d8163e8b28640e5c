"""Checks a leaderboard submission: `check(path)`, which `fedtune export --check` calls.

The check compares published numbers with what they were computed from: scores with the generations and with k/n, averages
with scores, the budget with comm_cost.txt, the adapter with pyproject.toml. It also checks the rules of the challenge.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedtune.export.lint.folder import Finding, SubmissionFolder, open_folder
from fedtune.export.lint.published import published, ranked
from fedtune.export.lint.rules import (
    challenge_by,
    check_adapters,
    check_bytes,
    check_checkpoints,
    check_declared,
    declared_by,
    is_pickle,
)
from fedtune.export.lint.scores import artefacts_of, check_scores, missing_scores
from fedtune.export.package import MANIFEST, secret_in

__all__ = ["CheckResult", "Finding", "check"]

_TEXTS = (".md", ".txt", ".toml", ".json", ".jsonl", ".py", ".yaml", ".yml", ".cfg", ".ini", ".env", ".sh", "")
"""Suffixes of the files that are searched for secrets."""


@dataclass(frozen=True)
class CheckResult:
    """The result of checking a submission."""

    path: Path
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    """What was checked, one line each."""


def check(path: Path) -> CheckResult:
    """Check the submission in a folder without changing it; nothing is loaded as code or as a pickle.

    Raises:
        MissingError: the folder does not exist.
        UsageError: it holds far more files than a submission.
    """
    folder = open_folder(path)
    readme = next((name for name in folder.files if PurePosixPath(name).name.lower() == "readme.md"), None)
    text = folder.text(readme) if readme else None
    lines = published(text or "")
    findings: list[Finding] = []
    if text is None:
        findings.append(Finding(readme or "README.md", "is not UTF-8 text" if readme else "is missing"))

    declared, wrong = declared_by(folder)
    findings += wrong
    artefacts, wrong = artefacts_of(folder)
    findings += wrong
    cost, wrong = check_bytes(folder, readme if text is not None else None, declared)
    findings += wrong
    benches = [bench for line in lines for bench in line.scores] or [artefact.bench for artefact in artefacts]
    challenge = challenge_by(declared, benches)
    rounds = {declared.rounds} if declared and declared.rounds else set()
    rounds |= {len(cost.rounds)} if cost else set()
    if declared is not None:
        findings += check_declared(declared, challenge)
    if readme is not None and text is not None:
        findings += check_scores(readme, lines, artefacts, max(rounds, default=None))
        findings += missing_scores(readme, lines, artefacts, ranked(challenge) if challenge else ())
    findings += check_checkpoints(folder, artefacts, rounds)
    findings += check_adapters(folder, readme if text is not None else None, declared)
    findings += _check_files(folder)
    findings += _check_manifest(folder)

    checked = [f"challenge: {challenge or 'not known'}", f"files: {len(folder.files)}"]
    checked += [f"{artefact.file}: {artefact.bench}, {artefact.right}" for artefact in artefacts]
    checked += [f"{readme}: {', '.join(f'{b} {f.text}' for b, f in line.scores.items())}" for line in lines]
    if cost is not None:
        checked.append(f"{cost.path.name}: {len(cost.rounds)} rounds, {cost.used_mib:,.2f} MB")
    return CheckResult(path, tuple(dict.fromkeys(findings)), tuple(checked))


def _check_files(folder: SubmissionFolder) -> Iterator[Finding]:
    """Yield files that a submission must not hold."""
    for name in folder.links:
        yield Finding(name, "is a link; a submission must hold the file itself")
    for name in folder.files:
        if is_pickle(name):
            yield Finding(name, "is a pickle, which runs code when it is loaded; save the weights as safetensors")
        elif PurePosixPath(name).suffix.lower() in _TEXTS and (found := secret_in(folder.text(name) or "")):
            yield Finding(name, f"contains what looks like a secret ({found}…); revoke it")


def _check_manifest(folder: SubmissionFolder) -> Iterator[Finding]:
    """Yield files that are missing or do not have the sha256 in the manifest."""
    if MANIFEST not in folder.files:
        return
    try:
        digests = json.loads(folder.text(MANIFEST) or "")
    except (ValueError, RecursionError):
        digests = None
    if not isinstance(digests, dict):
        yield Finding(MANIFEST, "is not a JSON object with a sha256 for each file name")
        return
    for name, digest in digests.items():
        if name not in folder.files:
            yield Finding(name, f"is missing; {MANIFEST} lists it")
        elif folder.sha256(name) != digest:
            yield Finding(name, f"does not have the sha256 that {MANIFEST} lists")
