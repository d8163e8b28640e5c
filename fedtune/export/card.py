"""The model card of an adapter: what it is, what it scores and what it cost to communicate, computed from its run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fedtune.config.base import facts_of, keys_of
from fedtune.config.facts import ineligible_because, value_at
from fedtune.config.schema import BUILTIN_TINY, FedTuneConfig
from fedtune.data.prompt import render_text
from fedtune.errors import UsageError
from fedtune.evaluation.results import Record
from fedtune.evaluation.tasks.registry import parse_bench
from fedtune.export.checkpoint import RunCheckpoint
from fedtune.export.package import hub_base, hub_data, public_name, redact
from fedtune.export.render import mib_of, render, shown

TAGS = ("fedtune", "lora", "federated-learning", "flower")

_SECTIONS = ("model", "adapter", "data", "federation", "strategy", "training", "communication", "seed")
"""The order of the card's table; fedtune.json holds all keys."""


def card(checkpoint: RunCheckpoint, *, licence: str | None = None, merged: bool = False) -> str:
    """Return the model card of an adapter, or of the model that it was merged into.

    Args:
        checkpoint: The adapter and its run.
        licence: The id of the licence on the hub, such as `apache-2.0`; the card names no licence without it.
        merged: Whether the card is for the merged model.

    Raises:
        UsageError: `licence` does not have the form of an id, or the run's results or ledger are damaged.
    """
    config, entries = checkpoint.config, checkpoint.training_entries
    average = checkpoint.average_accuracy if len(checkpoint.challenge_benches) > 1 else None
    versions = checkpoint.run.read_about().get("versions")
    pairs = versions.items() if isinstance(versions, Mapping) else ()
    text = render(
        "model_card.md",
        checkpoint=checkpoint,
        config=config,
        merged=merged,
        metadata=metadata(checkpoint, licence=licence, merged=merged).to_yaml(),
        base=public_name(config.model.base),
        data=public_name(config.data.source) if config.data.source else None,
        hub_base=hub_base(config),
        is_builtin=config.model.base == BUILTIN_TINY,
        results=[_result_row(checkpoint, record) for record in checkpoint.complete_results],
        average=average,
        configuration=_configuration(checkpoint),
        down_mib=mib_of(entry for entry in entries if entry.direction == "down"),
        up_mib=mib_of(entry for entry in entries if entry.direction == "up"),
        refused=sum(entry.status == "refused" for entry in entries),
        lost=sum(entry.status == "lost" for entry in entries),
        partial=sorted({record["bench"] for record in checkpoint.results if record.get("partial")}),
        broken_rules=sorted({reason.split(" is ")[0] for reason in ineligible_because(config) or ()}),
        versions=", ".join(f"{name} {number}" for name, number in pairs if re.fullmatch(r"[\w.+-]{1,40}", str(number))),
        **method_values(checkpoint),
    )
    return redact(text)


def metadata(checkpoint: RunCheckpoint, *, licence: str | None = None, merged: bool = False) -> ModelCardData:
    """Return the YAML part of the card, with ids that exist on the hub and results on complete benchmarks only.

    Raises:
        UsageError: `licence` does not have the form of an id.
    """
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,39}", licence):
        raise UsageError(
            f"--license {licence!r} is not the id of a licence on the hub.", hint="Example: --license apache-2.0"
        )
    # The adapter was scored on the base model in FP4; quantizing merged weights to FP4 gives other weights.
    results = [] if merged else [each for record in checkpoint.complete_results for each in _eval_results(record)]
    config = checkpoint.config
    run_name = public_name(str(checkpoint.run.path.resolve()))
    return ModelCardData(
        base_model=hub_base(config),
        datasets=[source] if (source := hub_data(config)) else None,
        library_name="transformers" if merged else "peft",
        license=licence,
        pipeline_tag="text-generation",
        tags=[*TAGS, *([config.challenge] if config.challenge else [])],
        model_name=f"{run_name}-{checkpoint.name}" if results else None,
        eval_results=results or None,
        # Values that the hub has no key for.
        fedtune={
            "rounds": checkpoint.round,
            "clients": config.federation.clients,
            "communication_mib": round(checkpoint.used_mib, 2),
        },
    )


def method_values(checkpoint: RunCheckpoint) -> dict[str, Any]:
    """Return the values for the template of the method: how the server combines adapters, and the text trained on."""
    config, fields = checkpoint.config, type(checkpoint.config.strategy).model_fields
    options = (f"{name} = {shown(getattr(config.strategy, name))}" for name in fields if name != "name")
    described = f"{inspect.getdoc(config.strategy)} {fields['name'].description or ''}"
    return {
        "strategy_options": ", ".join(options),
        "strategy_text": " ".join(described.split()),
        "training_text": render_text(config.data.instruction, config.data.response),
    }


def title(record: Record) -> str:
    """Return the benchmark of a result as the card writes it: `MedMCQA`, `MMLU stem`."""
    selection = parse_bench(record["bench"])[0]
    return " ".join(filter(None, (selection.task.title, (selection.category or "").replace("_", " "))))


def _result_row(checkpoint: RunCheckpoint, record: Record) -> tuple[str, ...]:
    base = checkpoint.base_result(record)
    return (
        title(record),
        f"{record['accuracy']:.2%}",
        _interval(record),
        f"{base['accuracy']:.2%} ({_interval(base)})" if base else "not evaluated",
        "unknown" if record["unparsed"] is None else f"{record['unparsed'] / record['n']:.1%}",
        f"{record['n']:,}",
        record["mode"],
    )


def _interval(record: Record) -> str:
    low, high = record["interval_95"]
    return f"{low:.1%} – {high:.1%}"


def _configuration(checkpoint: RunCheckpoint) -> list[tuple[str, str]]:
    """Return the rows of the table of config keys."""
    config = checkpoint.config
    values = {path: value_at(config, path) for path in _configuration_keys()}
    values["model.base"] = public_name(config.model.base)
    if config.data.source is not None:
        values["data.source"] = public_name(config.data.source)
    else:  # each node of a SuperLink has its own rows, so nothing was partitioned
        del values["data.partitioner"]
    return [
        (f"`{path}`", f"`{shown(value)}`")
        for path, value in values.items()
        if value not in (None, ()) and value is not False
    ]


def _configuration_keys() -> list[str]:
    """Return the keys that the card shows, and the number of clients that follows from two of them."""
    keys = [path for path, info in keys_of(FedTuneConfig) if facts_of(info).in_card] + ["strategy.name"]
    keys.sort(key=lambda path: _SECTIONS.index(path.partition(".")[0]))
    keys.insert(keys.index("federation.clients") + 1, "federation.clients_per_round")
    return keys


def _eval_results(record: Record) -> list[EvalResult]:
    """Return a complete result in the form of the hub: the accuracy, and the share of unparsed outputs if it is known."""
    selection = parse_bench(record["bench"])[0]
    benchmark = selection.task
    sources = sorted(benchmark.sources, key=lambda source: not source.original)
    where: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_name": title(record),
        # A benchmark that ships with fedtune is not on the hub.
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
