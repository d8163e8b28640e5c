"""Checks the rules of a challenge, and that rounds, clients, bytes, checkpoint and adapter of a submission agree."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.budget.comm_cost import CommCost, check_figure, figures_of, read_comm_cost
from fedtune.config.facts import LEADERBOARD_CAP_MIB, ineligible_because, load_preset, preset_names, table_value
from fedtune.errors import ConfigError, FedTuneError
from fedtune.export.lint.folder import Finding, SubmissionFolder, flat_table
from fedtune.export.lint.published import challenge_of
from fedtune.export.lint.scores import Artefact
from fedtune.export.submission_config import from_flat
from fedtune.models.adapter import CONFIG_FILE, WEIGHTS_FILE, read_adapter

_COMMENTED_SIZE = re.compile(r"^#\s*(?:options\.)?num-supernodes\s*=\s*(\d{1,6})\s*$", re.MULTILINE)
"""The comment that `flwr run` leaves when it moves the number of clients to its own configuration."""
_LORA_LINE = re.compile(r"lora|peft|adapter|^\s*[-*+|]", re.IGNORECASE)


@dataclass(frozen=True)
class Declared:
    """The Flower app config in a pyproject.toml."""

    file: str
    flat: Mapping[str, Any]
    """`[tool.flwr.app.config]` by dotted name."""
    sizes: tuple[int, ...]
    """Every number of clients in the file."""

    @property
    def rounds(self) -> int | None:
        """The number of rounds."""
        rounds = self.flat.get("num-server-rounds")
        return rounds if type(rounds) is int else None

    @property
    def data(self) -> str | None:
        """The data set."""
        name = self.flat.get("static.dataset.name", self.flat.get("dataset.name"))
        return name if isinstance(name, str) and name else None


def declared_by(folder: SubmissionFolder) -> tuple[Declared | None, list[Finding]]:
    """Read the pyproject.toml of a submission."""
    file = folder.first("pyproject.toml")
    if file is None:
        return None, [Finding("pyproject.toml", "is missing: a submission is a Flower app")]
    text = folder.text(file)
    try:
        app = tomllib.loads(text or "")["tool"]["flwr"]["app"]["config"]
        flat = flat_table(app)
    except (tomllib.TOMLDecodeError, RecursionError):
        return None, [Finding(file, "is not valid TOML")]
    except (KeyError, TypeError, AttributeError):
        return None, [Finding(file, "has no [tool.flwr.app.config]")]
    federations = table_value(tomllib.loads(text or ""), "tool.flwr.federations")
    sizes = [flat.get("static.num-supernodes")]
    sizes += [value for key, value in flat_table(federations or {}).items() if key.endswith("num-supernodes")]
    sizes += [int(size) for size in _COMMENTED_SIZE.findall(text or "")]
    return Declared(file, flat, tuple(dict.fromkeys(size for size in sizes if type(size) is int))), []


def challenge_by(declared: Declared | None, benches: Sequence[str]) -> str | None:
    """Return the challenge of a submission: the one it names, or the one with its data set or its benchmarks."""
    names = preset_names("challenge")
    if declared is not None:
        if (own := declared.flat.get("fedtune.challenge")) in names:
            return str(own)
        for name in names:
            source = table_value(load_preset("challenge", name).config, "data.source")
            if declared.data and _last_name(declared.data) == _last_name(str(source)):
                return name
    return challenge_of(benches)


def check_declared(declared: Declared, challenge: str | None) -> Iterator[Finding]:
    """Yield where a pyproject.toml breaks the rules of the challenge (protocol, section 1) or contradicts itself."""
    if any(key.startswith("fedtune.") for key in declared.flat):
        try:
            config = from_flat(declared.flat)
        except ConfigError as error:
            yield Finding(declared.file, "; ".join(str(problem) for problem in error.problems))
        else:
            for reason in ineligible_because(config) or ():
                yield Finding(declared.file, reason)
            if any(size != config.federation.clients for size in declared.sizes):
                yield Finding(declared.file, f"gives several numbers of clients: {_listed(declared.sizes)}")
        return
    preset = load_preset("challenge", challenge) if challenge else None
    if preset is None:
        if declared.data:
            yield Finding(declared.file, f"no challenge has the data set {declared.data}")
        return
    if not preset.leaderboard:
        return
    ruled = {path: table_value(preset.config, path) for path in preset.fixed}
    if "data.source" in ruled and declared.data and declared.data != ruled["data.source"]:
        yield Finding(
            declared.file, f"the data set is {declared.data}; the rules of {challenge} fix {ruled['data.source']}"
        )
    if "federation.clients" in ruled and any(size != ruled["federation.clients"] for size in declared.sizes):
        yield Finding(
            declared.file,
            f"has {_listed(declared.sizes)} clients; the rules of {challenge} fix {ruled['federation.clients']}",
        )


def check_bytes(
    folder: SubmissionFolder, readme: str | None, declared: Declared | None
) -> tuple[CommCost | None, list[Finding]]:
    """Return the content of comm_cost.txt, and where it, the budget in the README and the rounds disagree."""
    file = folder.first("comm_cost.txt")
    if file is None:
        return None, [Finding("comm_cost.txt", "is missing: it lists the communicated bytes")]
    try:
        cost = read_comm_cost(folder.path / file)
    except FedTuneError as error:
        return None, [Finding(file, error.message.removeprefix(f"{folder.path / file} "))]
    findings = []
    if cost.findings:
        more = f" (and {len(cost.findings) - 1} more)" if len(cost.findings) > 1 else ""
        findings.append(Finding(file, f"contradicts itself: {cost.findings[0]}{more}"))
    if cost.used_mib > LEADERBOARD_CAP_MIB or cost.cap_mib > LEADERBOARD_CAP_MIB:
        text = f"{cost.used_mib:,.2f} of {cost.cap_mib:,.0f} MB were used; the rules allow {LEADERBOARD_CAP_MIB:,}"
        findings.append(Finding(file, text))
    if cost.rounds[-1][1] is None:
        findings.append(Finding(file, "has a line down but no line up for its last round"))
    if declared is not None and declared.rounds not in (None, len(cost.rounds)):
        text = f"has {len(cost.rounds)} rounds; {declared.file} declares num-server-rounds = {declared.rounds}"
        findings.append(Finding(file, text))
    if readme is not None:
        findings += _budget(folder, readme, cost)
    return cost, findings


def check_checkpoints(folder: SubmissionFolder, artefacts: Sequence[Artefact], rounds: set[int]) -> Iterator[Finding]:
    """Yield adapters and results of other checkpoints than the last one, which the leaderboard scores.

    Args:
        folder: The submission.
        artefacts: Its result files.
        rounds: The numbers of rounds that its files give; empty if no file gives one.
    """
    if not rounds:
        return
    last = " or ".join(f"peft_{number}" for number in sorted(rounds))
    adapters = [name for name in _adapter_folders(folder) if re.search(r"peft_\d{1,9}$", name)]
    scored = {
        match[0]: artefact.file for artefact in artefacts if (match := re.search(r"peft_\d{1,9}", artefact.label))
    }
    for kind, found in (("adapter", {name: name for name in adapters}), ("score", scored)):
        numbers = {int(name.rpartition("_")[2]): file for name, file in found.items()}
        if numbers and not rounds & numbers.keys():
            yield Finding(
                numbers[max(numbers)], f"is the {kind} of another checkpoint; that of the last one, {last}, is missing"
            )


def check_adapters(folder: SubmissionFolder, readme: str | None, declared: Declared | None) -> Iterator[Finding]:
    """Yield adapters that cannot be read, or that differ from what pyproject.toml and README say."""
    flat = declared.flat if declared else {}
    for name in _adapter_folders(folder):
        file = f"{name}/{CONFIG_FILE}" if name else CONFIG_FILE
        weights = file.replace(CONFIG_FILE, WEIGHTS_FILE)
        if weights not in folder.files:
            if not any(other.rpartition("/")[0] == name and is_pickle(other) for other in folder.files):
                yield Finding(file, f"has no {WEIGHTS_FILE} beside it")
            continue
        try:
            saved = read_adapter(folder.path / name)
        except FedTuneError as error:
            yield Finding(weights, error.message)
            continue
        rank = saved.config.get("r")
        ranks = sorted({tensor.shape[0] for key, tensor in saved.tensors.items() if ".lora_A." in key and tensor.ndim})
        # Stacked experts share one tensor, whose rows are those of all their adapters.
        plain = not saved.config.get("rank_pattern") and not saved.config.get("target_parameters")
        if plain and any(each != rank for each in ranks):
            yield Finding(weights, f"has rank {_listed(ranks)}; {CONFIG_FILE} says {rank}")
        for key, declared_key, word in (
            ("r", "model.lora.peft-lora-r", "rank"),
            ("lora_alpha", "model.lora.peft-lora-alpha", "alpha"),
        ):
            used, said = saved.config.get(key), flat.get(declared_key)
            if said is not None and said != used:
                yield Finding(file, f"{key} is {used}; pyproject.toml says {declared_key} = {said}")
            elif readme is not None and (given := _given(folder.text(readme) or "", word)) and used not in given:
                yield Finding(readme, f"says {word} {_listed(given)}; {file} says {used}")
        yield from _targets_and_base(file, saved.config, flat)


def is_pickle(name: str) -> bool:
    """Whether the name of a file is one of pickled weights."""
    return name.lower().endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))


def _budget(folder: SubmissionFolder, readme: str, cost: CommCost) -> list[Finding]:
    try:
        figures = figures_of(folder.path / readme, cost.cap_mib)
    except FedTuneError:
        return [Finding(readme, "gives no communication budget (a number with MB)")]
    checks = [check_figure(figure, cost.used_mib, rounded=True) for figure in figures]
    if any(check.matches for check in checks):
        return []  # the others may be for one round or one direction
    return [
        Finding(readme, f"gives {_listed(figures)} as communication budget; comm_cost.txt: {checks[0].explanation}")
    ]


def _targets_and_base(file: str, config: Mapping[str, Any], flat: Mapping[str, Any]) -> Iterator[Finding]:
    said, used = flat.get("model.lora.peft-target-modules"), config.get("target_modules")
    if isinstance(said, str) and said not in ("", "default", "all-linear") and isinstance(used, list):
        wanted = {part.strip() for part in said.split(",")}
        if wanted != {str(module) for module in used}:
            yield Finding(
                file,
                f"target_modules are {_listed(sorted(map(str, used)))}; pyproject.toml says {_listed(sorted(wanted))}",
            )
    base, named = config.get("base_model_name_or_path"), flat.get("model.name")
    if isinstance(base, str) and isinstance(named, str) and _last_name(base) != _last_name(named):
        yield Finding(file, f"the base model is {base}; pyproject.toml says {named}")


def _given(readme: str, word: str) -> list[int]:
    """Return the values that a README gives for the rank or alpha of an adapter."""
    name = r"(?:rank|lora[_-]r|peft-lora-r)" if word == "rank" else r"(?<!data\.)alpha"
    found = [
        int(number)
        for line in readme.splitlines()
        if len(line) < 500 and _LORA_LINE.search(line)
        for number in re.findall(rf"\b{name}\b[^\d\n.]{{0,12}}(\d{{1,4}})\b(?![.\d])", line, re.IGNORECASE)
    ]
    return list(dict.fromkeys(found))


def _adapter_folders(folder: SubmissionFolder) -> list[str]:
    return [name.rpartition("/")[0] for name in folder.named(CONFIG_FILE)]


def _last_name(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().replace("_", "-")


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
