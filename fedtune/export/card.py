"""The model card: what an adapter is, what it scores, what it cost to communicate, all computed from its run."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fedtune.budget.ledger import Entry
from fedtune.config.facts import ineligible_because, load_preset, value_at
from fedtune.config.schema import BUILTIN_TINY
from fedtune.data.prompt import render_text
from fedtune.errors import UsageError
from fedtune.evaluation.results import Record
from fedtune.evaluation.tasks.base import Selection
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.export.finished import FinishedRun
from fedtune.export.package import hub_base, hub_data, public_name, strike
from fedtune.units import to_mib

TAGS = ("fedtune", "lora", "federated-learning", "flower")

_CONFIGURATION = (
    "model.base",
    "model.revision",
    "model.quantization",
    "adapter.rank",
    "adapter.alpha",
    "adapter.dropout",
    "adapter.targets",
    "adapter.rslora",
    "adapter.dora",
    "adapter.modules_to_save",
    "data.source",
    "data.revision",
    "data.partitioner",
    "data.reshuffle",
    "federation.clients",
    "federation.clients_per_round",
    "federation.rounds",
    "strategy.name",
    "training.batch_size",
    "training.accumulation",
    "training.max_steps",
    "training.epochs",
    "training.learning_rate_max",
    "training.learning_rate_min",
    "training.sequence_length",
    "training.optimizer",
    "communication.wire_dtype",
    "communication.codec",
    "communication.uplink_codec",
    "communication.downlink_codec",
    "seed",
)
"""What the card's table shows; fedtune.json beside it holds everything."""


def card(finished: FinishedRun, *, licence: str | None = None, merged: bool = False) -> str:
    """Return the model card of an adapter, or of the model that it was `merged` into.

    Args:
        finished: The adapter and its run.
        licence: The licence's id on the hub, such as `apache-2.0`; none is claimed without it.
        merged: Whether the card is for the merged model.

    Raises:
        UsageError: `licence` is no such id, or the run's results or ledger are damaged.
    """
    base = public_name(finished.config.model.base)
    kind = (
        f"{base} with the adapter `{finished.name}` merged in" if merged else f"`{finished.name}`, an adapter of {base}"
    )
    parts = [
        f"---\n{metadata(finished, licence=licence, merged=merged).to_yaml()}\n---",
        f"# {kind}",
        summary(finished),
        f"## Use\n\n{_use(finished, merged)}",
        f"## Scores\n\n{scores_text(finished)}",
        f"## Method\n\n{method_text(finished)}",
        f"### Configuration\n\n{configuration_table(finished)}",
        f"## Communication\n\n{communication_text(finished)}",
        f"## Not evaluated\n\n{not_evaluated_text(finished, merged=merged)}",
        f"## Made with\n\n{_made_with(finished)}",
    ]
    return strike("\n\n".join(parts) + "\n")


def metadata(finished: FinishedRun, *, licence: str | None = None, merged: bool = False) -> ModelCardData:
    """Return the card's YAML part: only ids that the hub knows, and only results on whole benchmarks.

    Raises:
        UsageError: `licence` is no licence's id.
    """
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,39}", licence):
        raise UsageError(
            f"--license {licence!r} is no licence id as the hub writes them.", hint="Example: --license apache-2.0"
        )
    # The adapter was scored on the base's weights in FP4; merged weights in FP4 are others.
    results = [] if merged else [each for record in finished.complete_results for each in _eval_results(record)]
    config = finished.config
    return ModelCardData(
        base_model=hub_base(config),
        datasets=[source] if (source := hub_data(config)) else None,
        library_name="transformers" if merged else "peft",
        license=licence,
        pipeline_tag="text-generation",
        tags=[*TAGS, *([config.challenge] if config.challenge else [])],
        model_name=model_name(finished) if results else None,
        eval_results=results or None,
        # No key of the hub's own: what no metric of a model index can say.
        fedtune={
            "rounds": finished.round,
            "clients": config.federation.clients,
            "communication_mib": round(used_mib(finished), 2),
        },
    )


def model_name(finished: FinishedRun) -> str:
    """Return a name for the adapter outside its run: `tiny-20261121-231500-peft_16`."""
    return f"{public_name(str(finished.run.path.resolve()))}-{finished.name}"


def summary(finished: FinishedRun) -> str:
    """Return what the adapter is, in two sentences."""
    config = finished.config
    data = f" on {public_name(config.data.source)}" if config.data.source else ""
    challenge = f" ({config.challenge} challenge)" if config.challenge else ""
    text = (
        f"A LoRA adapter trained{data}{challenge} by federated learning: {config.federation.clients} clients, "
        f"each with its own part of the data, sent adapters and never rows."
    )
    if not finished.is_last:
        stopped = "" if finished.is_finished else f", which has come to round {finished.rounds_done}"
        text += f" This is the adapter after round {finished.round} of a run of {config.federation.rounds}{stopped}."
    return text


def result_table(finished: FinishedRun) -> str:
    """Return the results on whole benchmarks as a Markdown table, the base beside the adapter; empty without any."""
    rows = []
    for record in finished.complete_results:
        base = finished.base_result(record)
        rows.append(
            (
                title(record),
                f"{record['accuracy']:.2%}",
                _interval(record),
                f"{base['accuracy']:.2%} ({_interval(base)})" if base else "not evaluated",
                "unknown" if record["unparsed"] is None else f"{record['unparsed'] / record['n']:.1%}",
                f"{record['n']:,}",
                record["mode"],
            )
        )
    if not rows:
        return ""
    headings = ("benchmark", "accuracy", "95 % interval", "base model (95 % interval)", "unparsed", "n", "mode")
    return _table(headings, rows)


def average_accuracy(finished: FinishedRun) -> float | None:
    """Return the mean of the accuracies on the challenge's benchmarks, as the leaderboard ranks by; None if one is missing."""
    benches = challenge_benches(finished)
    accuracies = {record["bench"]: record["accuracy"] for record in finished.complete_results}
    if not benches or any(bench not in accuracies for bench in benches):
        return None
    return float(sum(accuracies[bench] for bench in benches) / len(benches))


def challenge_benches(finished: FinishedRun) -> list[str]:
    """Return the benchmarks that the run's challenge is ranked on (`medmcqa`, `mmlu:stem`); empty without a challenge.

    Those that fedtune cannot score (the code challenge's) are among them.
    """
    if finished.config.challenge is None:
        return []
    names = []
    for bench in load_preset("challenge", finished.config.challenge).benchmarks:
        try:
            names += [selection.name for selection in parse_bench(bench)]
        except UsageError:
            names.append(bench)
    return names


def missing_benches(finished: FinishedRun) -> list[str]:
    """Return those of the challenge's benchmarks that this adapter has no whole result on."""
    there = {record["bench"] for record in finished.complete_results}
    return [bench for bench in challenge_benches(finished) if bench not in there]


def evaluation_command(finished: FinishedRun) -> str:
    """Return the command that scores this adapter and its base on what is missing."""
    benches = ",".join(missing_benches(finished)) or "NAME"
    return f"fedtune eval --bench {benches} --peft {finished.adapter} --base"


def scores_text(finished: FinishedRun) -> str:
    """Return the table of results with what its columns mean, or that there are none."""
    table = result_table(finished)
    if not table:
        return "This adapter has not been evaluated on a whole benchmark."
    average = average_accuracy(finished)
    mean = "" if average is None or len(challenge_benches(finished)) < 2 else f"\n\nAverage accuracy: {average:.2%}."
    return (
        f"{table}{mean}\n\n"
        "Accuracy is k right answers of n questions by the FlowerTune leaderboard's protocol, on FP4 weights; the interval is "
        "Wilson's. `unparsed` is the share of outputs that are no answer in form and count as wrong. `official` asks one "
        "question at a time in float32; `fast` asks many at a time. results.json has every digit."
    )


def method_text(finished: FinishedRun) -> str:
    """Return how the adapter was trained."""
    config = finished.config
    federation, training, adapter = config.federation, config.training, config.adapter
    kind = " ".join(
        filter(None, ["rank-stabilised" * adapter.rslora, "weight-decomposed (DoRA)" * adapter.dora, "LoRA"])
    )
    order = "in a fresh order each round" if config.data.reshuffle else "in the same order each round"
    text = (
        f"In each of {finished.round} rounds {federation.clients_per_round} of {federation.clients} clients train a {kind} "
        f"adapter of rank {adapter.rank} on their own rows, {order}, for at most {training.max_steps} optimiser steps of "
        f"{training.rows_per_step} rows ({training.optimizer}); the loss is on the response alone. The learning rate falls by a "
        f"cosine from {training.learning_rate_max:g} to {training.learning_rate_min:g} over {federation.rounds} rounds.\n\n"
        f"{_strategy_text(finished)}"
    )
    shown = render_text(config.data.instruction, config.data.response)
    return f"{text}\n\nThe text that it was trained on, names of columns in braces:\n\n```\n{shown}\n```"


def _strategy_text(finished: FinishedRun) -> str:
    """Return what the server does with the clients' adapters, in the words of the config's reference."""
    strategy, privacy = finished.config.strategy, finished.config.privacy
    fields = type(strategy).model_fields
    options = ", ".join(f"{name} = {_value(getattr(strategy, name))}" for name in fields if name != "name")
    what = f"{inspect.getdoc(strategy)} {fields['name'].description or ''}"
    text = f"Strategy `{strategy.name}`{f' ({options})' if options else ''}: {' '.join(what.split())}"
    if privacy.mode != "none":
        text += (
            f" Client-level differential privacy, {privacy.mode}: updates clipped at {privacy.clip:g}, noise multiplier "
            f"{privacy.noise_multiplier:g}, a budget of epsilon = {privacy.epsilon:g} at delta = {privacy.delta:g}."
        )
    return text


def configuration_table(finished: FinishedRun) -> str:
    """Return the values that decided the run as a Markdown table of config keys."""
    config = finished.config
    shown = {path: value_at(config, path) for path in _CONFIGURATION}
    shown["model.base"] = public_name(config.model.base)
    if config.data.source is not None:
        shown["data.source"] = public_name(config.data.source)
    else:  # the rows lay with a SuperLink's nodes, each its own
        del shown["data.partitioner"]
    rows = [
        (f"`{path}`", f"`{_value(value)}`")
        for path, value in shown.items()
        if value not in (None, ()) and value is not False
    ]
    return _table(("key", "value"), rows)


def communication_text(finished: FinishedRun) -> str:
    """Return what the adapter cost to communicate."""
    entries = finished.training_entries
    if not entries:
        return "The run has no ledger: what was sent is not known."
    down, up = (to_mib(sum(e.bytes for e in entries if e.direction == way)) for way in ("down", "up"))
    text = (
        f"{used_mib(finished):,.2f} MiB of training messages in {finished.round} rounds: {down:,.2f} MiB to the clients, "
        f'{up:,.2f} MiB from them. A MiB is 2^20 bytes, which the FlowerTune leaderboard prints as "MB"; counted are the '
        "adapters' arrays and their names, as the leaderboard counts them. ledger.json has it by round, direction and client."
    )
    for status, what in (("refused", "were refused by the server"), ("lost", "belong to rounds that a crash undid")):
        if count := sum(entry.status == status for entry in entries):
            text += f" {count} of the messages {what}; they are in the total."
    return text


def not_evaluated_text(finished: FinishedRun, *, merged: bool = False) -> str:
    """Return what is not known of the adapter, or of the model that it was `merged` into."""
    lines = []
    if merged and finished.complete_results:
        lines.append("- The merged model: the scores above are of the adapter on the base's FP4 weights.")
    if missing := missing_benches(finished):
        lines.append(f"- The challenge's benchmarks {', '.join(missing)}.")
    if partial := sorted({record["bench"] for record in finished.results if record.get("partial")}):
        lines.append(f"- Only a part of the questions, therefore not in the table: {', '.join(partial)}.")
    private = finished.config.privacy.mode != "none"
    lines += [
        "- Safety, bias, calibration, and every use other than the benchmarks above.",
        "- How much of the training data can be drawn out of the adapter: rows stayed with their owners, and "
        + ("differential privacy bounds it as said above." if private else "no differential privacy was used."),
    ]
    if reasons := ineligible_because(finished.config):
        fixed = sorted({reason.split(" is ")[0] for reason in reasons})
        lines.append(f"- The run does not follow the leaderboard's rules ({', '.join(fixed)}); it is no entry of it.")
    return "\n".join(lines)


def used_mib(finished: FinishedRun) -> float:
    """Return the training messages, both ways, up to the adapter's round, in MiB (the leaderboard's "MB")."""
    return to_mib(_bytes(finished.training_entries))


def title(record: Record) -> str:
    """Return a result's benchmark for people: `MedMCQA`, `MMLU stem`."""
    selection = selection_of(record)
    return " ".join(filter(None, (selection.task.title, (selection.category or "").replace("_", " "))))


def selection_of(record: Record) -> Selection:
    """Return what a result was scored on; raises UsageError for a benchmark that fedtune does not know."""
    return parse_bench(record["bench"])[0]


def _eval_results(record: Record) -> list[EvalResult]:
    """Return a complete result in the hub's form: the accuracy, and the share of unparsed outputs where it is known."""
    selection = selection_of(record)
    benchmark = selection.task
    sources = sorted(benchmark.sources, key=lambda source: not source.original)
    where: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_name": title(record),
        # What ships with fedtune is on no hub.
        "dataset_type": sources[0].hub_id if sources else f"fedtune-{benchmark.name}",
        "dataset_config": selection.category or (sources[0].config if sources else None),
        "dataset_split": sources[0].split if sources else None,
        "dataset_args": {"protocol": "FlowerTune leaderboard", "mode": record["mode"], "n": record["n"]},
    }
    found = [EvalResult(**where, metric_type="accuracy", metric_name="accuracy", metric_value=record["accuracy"])]
    if record["unparsed"] is not None:
        share = record["unparsed"] / record["n"]
        found.append(
            EvalResult(**where, metric_type="unparsed", metric_name="share of unparsed outputs", metric_value=share)
        )
    return found


def _use(finished: FinishedRun, merged: bool) -> str:
    config = finished.config
    revision = f', revision="{config.model.revision}"' if hub_base(config) else ""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if merged:
        lines += [
            'name = "."  # this folder, or its id on the hub',
            "model = AutoModelForCausalLM.from_pretrained(name)",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
        ]
        return _python(lines)
    base = hub_base(config) or public_name(config.model.base)
    note = "" if hub_base(config) else "  # a folder of whoever trained it; name yours"
    lines = ["from peft import PeftModel", *lines, f'base = "{base}"{note}']
    if config.model.base == BUILTIN_TINY:
        lines[-1:] = [
            "from fedtune.config.schema import ModelConfig",
            "from fedtune.models.hub import resolve_base",
            "",
            f'base = resolve_base(ModelConfig(base="{BUILTIN_TINY}")).folder  # ships with fedtune',
        ]
    return _python(
        [
            *lines,
            f"model = AutoModelForCausalLM.from_pretrained(base{revision})",
            'model = PeftModel.from_pretrained(model, ".")  # this folder, or its id on the hub',
            f"tokenizer = AutoTokenizer.from_pretrained(base{revision})",
        ]
    )


def _made_with(finished: FinishedRun) -> str:
    about = finished.run.read_about()
    versions = about.get("versions")
    pairs = versions.items() if isinstance(versions, Mapping) else ()
    shown = ", ".join(f"{name} {number}" for name, number in pairs if re.fullmatch(r"[\w.+-]{1,40}", str(number)))
    return f"{shown or 'fedtune'}. manifest.json has the sha256 of every file."


def _python(lines: Iterable[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _interval(record: Record) -> str:
    low, high = record["interval_95"]
    return f"{low:.1%} – {high:.1%}"


def _value(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else value if isinstance(value, str) else json.dumps(value)


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.bytes for entry in entries)
