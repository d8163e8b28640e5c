"""`fedtune train`: run a federation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli import options
from fedtune.cli.console import guarded, note, print_data, print_json, resumable, stderr
from fedtune.errors import UsageError

if TYPE_CHECKING:
    from fedtune.config.load import ResolvedConfig
    from fedtune.config.schema import FedTuneConfig
    from fedtune.federation.train import TrainResult


@guarded
def train(
    challenge: options.Challenge = None,
    recipe: options.Recipe = None,
    config: options.Config = None,
    set_: options.Set = None,
    data: options.Data = None,
    out: options.Out = Path("runs"),
    engine: Annotated[
        str | None,
        typer.Option("--engine", metavar="NAME", help="Where the clients run: in-process, ray or superlink."),
    ] = None,
    superlink: Annotated[
        str | None,
        typer.Option(
            "--superlink",
            metavar="ADDRESS",
            help="The SuperLink to submit to: HOST:PORT, or a name in your Flower config.",
        ),
    ] = None,
    superlink_ca: Annotated[
        Path | None,
        typer.Option(
            "--superlink-ca", parser=options.path, metavar="FILE", help="The certificate that signed the SuperLink's."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            parser=options.path_or_name,
            metavar="[RUN]",
            help="Go on with a run: a path, a name, or (without a value) the latest.",
        ),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also train each client alone and all data in one place, and compare.")
    ] = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Fine-tune an adapter on data that stays with its owners.

    Example: fedtune train --challenge tiny
    """
    from fedtune.runs.directory import find_run

    run = None if resume is None else find_run(None if resume == "latest" else resume, out)
    resolved = options.resolve(
        challenge=challenge,
        recipe=recipe,
        config=config,
        settings=set_,
        data=data,
        first_files=[run.config_file] if run else None,
        flags=_engine_flags(engine, superlink, superlink_ca),
    )
    if data is not None and resolved.config.federation.engine == "superlink":
        raise UsageError(
            "--data names rows on this machine; with a SuperLink they lie with the nodes.",
            hint="Leave it out; each node names its own: fedtune node --data FILE",
        )
    if dry_run:
        _show_plan(resolved, json)
        return
    if baselines:
        _check_baselines(resolved)

    from fedtune.cli.progress import TrainProgress
    from fedtune.federation.train import train as run_federation

    progress = TrainProgress(resolved.config, quiet=json)

    def how_to_go_on() -> str:
        where = progress.run or (run.path if run else None)
        saved = f"Round {progress.done} is saved. " if progress.done else ""
        return f"{saved}Fix that, then go on: fedtune train --resume {where}" if where else ""

    try:
        with resumable(how_to_go_on), progress.shown():
            result = run_federation(
                resolved.config,
                out=out,
                resume=run,
                origins=resolved.origins if run is None else None,
                listener=progress,
            )
    except KeyboardInterrupt:
        where = progress.run or (run.path if run else None)
        raise KeyboardInterrupt(
            f"Round {progress.done} is saved. Go on: fedtune train --resume {where}" if where else "Nothing was begun."
        ) from None
    if not json:
        _show_result(resolved, result)
    comparison = _compare(resolved, result, quiet=json) if baselines else None
    if json:
        print_json({"result": result, **({"baselines": comparison} if comparison else {})})


def _engine_flags(engine: str | None, superlink: str | None, ca: Path | None) -> dict[str, tuple[str, str]]:
    """Return the options that say where clients run; a SuperLink's address alone means its engine."""
    flags = {}
    if engine or superlink:
        flags["federation.engine"] = ("--engine", engine) if engine else ("--superlink", "superlink")
    if superlink is not None:
        flags["federation.superlink"] = ("--superlink", superlink)
    if ca is not None:
        flags["federation.superlink_ca"] = ("--superlink-ca", str(ca.resolve()))
    return flags


def _show_plan(resolved: ResolvedConfig, as_json: bool) -> None:
    """Print the resolved config with the origin of every value, and the plan; as TOML that `--config` reads back."""
    from fedtune.budget.plan import plan
    from fedtune.config.facts import ineligible_because, published_results
    from fedtune.config.load import to_toml
    from fedtune.errors import MissingError
    from fedtune.units import to_mib

    config = resolved.config
    reasons, published = ineligible_because(config), published_results(config)
    try:
        planned, unknown = plan(config), ""
    except MissingError as error:
        planned, unknown = None, str(error)
    if as_json:
        print_json(
            {
                "config": config.model_dump(mode="json"),
                "origins": resolved.origins,
                "plan": planned,
                "plan_unknown_because": unknown or None,
                "eligible": None if reasons is None else not reasons,
                "ineligible_because": reasons or [],
                "published": published,
            }
        )
        return
    training, federation = config.training, config.federation
    lines = [
        f"{federation.clients_per_round} of {federation.clients} clients a round, {federation.rounds} rounds",
        f"{training.max_steps} steps of {training.batch_size} x {training.accumulation} rows a client and round, "
        f"or {training.epochs} epochs, whichever ends first",
    ]
    if planned:
        lines += [
            f"{planned.parameters:,} parameters in the adapter, {to_mib(planned.message_bytes):,.2f} MiB a message",
            f"{to_mib(planned.round_bytes):,.2f} MiB a round, {to_mib(planned.total_bytes):,.2f} MiB in total, "
            f"{to_mib(planned.total_bytes) / config.communication.cap_mib:.2%} of the cap",
            *planned.notes,
        ]
    else:
        lines.append(f"bytes unknown: {unknown}")
    if published:
        scores = ", ".join(f"{name} {value}" for name, value in published["scores"].items())
        lines.append(f"published for {config.recipe}: {scores}; communication {published['budget_mib']} MiB")
    lines += [*_privacy_lines(config), *eligibility_lines(reasons)]
    print_data(to_toml(resolved) + "\n" + "".join(f"# {line}\n" for line in lines))


def _privacy_lines(config: FedTuneConfig) -> list[str]:
    """Return what the plan costs in privacy; nothing where none is asked for."""
    privacy = config.privacy
    if privacy.mode == "none":
        return []
    from fedtune.federation.privacy import Accountant

    accountant, rounds = Accountant(config), config.federation.rounds
    spent = accountant.epsilon_after(accountant.participations(rounds))
    lines = [f"{privacy.mode} privacy: epsilon {spent:.2f} at delta {privacy.delta:g} after {rounds} rounds"]
    if spent > privacy.epsilon:
        lines.append(
            f"the budget, privacy.epsilon = {privacy.epsilon:g}, ends the run after {accountant.rounds_within()} rounds; "
            f"privacy.noise_multiplier = {accountant.noise_needed():g} would last for all"
        )
    return lines


def eligibility_lines(reasons: tuple[str, ...] | None) -> list[str]:
    """Return what is to be said of a run's eligibility; nothing for runs of no leaderboard challenge."""
    if reasons is None:
        return []
    return [f"not eligible for the leaderboard: {reason}" for reason in reasons] or ["eligible for the leaderboard"]


def _show_result(resolved: ResolvedConfig, result: TrainResult) -> None:
    from rich.table import Table

    from fedtune.units import format_seconds, to_mib

    cap = resolved.config.communication.cap_mib
    table = Table(show_header=False, title="Run", title_justify="left")
    rows: list[tuple[str, Any]] = [
        ("rounds", result.rounds),
        ("training loss", _losses(result)),
        ("communication", f"{to_mib(result.used_bytes):,.2f} of {cap:,.0f} MiB"),
        ("rows seen", f"{result.share_seen:.1%} of all clients' rows"),
        ("replies left out", result.refused),
        ("time", format_seconds(result.seconds)),
    ]
    for name, value in rows:
        table.add_row(name, str(value))
    stderr.print(table)
    for line in eligibility_lines(result.ineligible):
        note(line)
    note(f"report {result.run / 'report.html'}")
    print_data(f"{result.adapter}\n")


def _losses(result: TrainResult) -> str:
    if result.first_loss is None or result.last_loss is None:
        return "not told: privacy.mode is local"
    return f"{result.first_loss:.4f} → {result.last_loss:.4f}"


def _check_baselines(resolved: ResolvedConfig) -> None:
    """Refuse --baselines before an hour of training when nothing could be scored afterwards."""
    from fedtune.config.facts import load_preset

    challenge = resolved.config.challenge
    if resolved.config.federation.engine == "superlink":
        raise UsageError("--baselines trains on the clients' data, which is not here.", hint="Leave it out.")
    if challenge is None or load_preset("challenge", challenge).leaderboard:
        raise UsageError(
            "--baselines scores on the challenge's own test set, which only tiny ships.",
            hint="Try it: fedtune train --challenge tiny --baselines",
        )


def _compare(resolved: ResolvedConfig, result: TrainResult, *, quiet: bool) -> dict[str, Any]:
    """Train the baselines, score them and the federation's adapter on the challenge's benchmark, and show the table."""
    from rich.table import Table

    from fedtune.cli.console import stdout
    from fedtune.evaluation.driver import compare
    from fedtune.federation.baselines import train_baselines

    config = resolved.config

    def on_round(name: str, server_round: int) -> None:
        if not quiet and server_round == 1:
            note(f"training {name} alone")

    baselines = train_baselines(config, result.run, on_round)
    folders = {"federation": result.adapter, **{baseline.name: baseline.folder for baseline in baselines}}
    scores = compare(config, folders, result.run / "baselines")
    rows = {baseline.name: baseline.rows for baseline in baselines}
    if not quiet:
        for bench in dict.fromkeys(score.bench for score in scores):
            table = Table("adapter", "rows", "accuracy", "95 % interval", "unparsed", title=bench, title_justify="left")
            for score in (score for score in scores if score.bench == bench):
                table.add_row(
                    score.subject,
                    f"{rows[score.subject]:,}" if score.subject in rows else "",
                    f"{score.score.accuracy:.2%}",
                    f"{score.interval.low:.1%} – {score.interval.high:.1%}",
                    f"{score.score.unparsed_share or 0:.1%}",
                )
            stdout.print(table)
    return {
        "adapters": [
            {
                "name": score.subject,
                "bench": score.bench,
                "rows": rows.get(score.subject),
                "accuracy": score.score.accuracy,
            }
            for score in scores
        ]
    }
