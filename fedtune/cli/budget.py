"""`fedtune budget`: what a run will send, what it did send, and what would fit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedtune.cli import options
from fedtune.cli.console import guarded, note, print_json, stdout, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fedtune.budget.audit import Audit, Use
    from fedtune.budget.comm_cost import CommCost, FigureCheck
    from fedtune.budget.fit import Fit, GridRow
    from fedtune.budget.plan import Plan, TransferTime
    from fedtune.config.load import ResolvedConfig
    from fedtune.config.schema import FedTuneConfig


@guarded
def budget(
    run: Annotated[
        str | None,
        typer.Argument(
            parser=options.path_or_name,
            metavar="[RUN]",
            help="What was sent: a run (a path, a name, or latest), or a comm_cost.txt. Without it: what would be sent.",
        ),
    ] = None,
    challenge: options.Challenge = None,
    recipe: options.Recipe = None,
    config: options.Config = None,
    set_: options.Set = None,
    data: options.Data = None,
    out: options.Out = Path("runs"),
    fit: Annotated[
        str | None,
        typer.Option("--fit", metavar="WHAT", help="The largest rank, rounds or clients that stay under the cap."),
    ] = None,
    cap: Annotated[
        str | None,
        typer.Option(
            "--cap", metavar="SIZE", help="The cap, such as 5GB or 4000MiB; communication.cap_mib unless given."
        ),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="A table of ranks, targets and wire dtypes.")] = False,
    uplink: Annotated[
        str | None,
        typer.Option("--uplink", metavar="RATE", help="A client's uplink, such as 20Mbit/s: adds transfer times."),
    ] = None,
    downlink: Annotated[
        str | None, typer.Option("--downlink", metavar="RATE", help="A client's downlink, such as 100Mbit/s.")
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(
            "--readme", parser=options.path, metavar="FILE", help="Whether the figure that a README gives matches."
        ),
    ] = None,
    figure: Annotated[
        str | None,
        typer.Option("--figure", metavar="MB", help="Whether this figure, in the leaderboard's MB, matches."),
    ] = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Count a run's bytes: before it, from shapes alone; afterwards, from its ledger.

    Example: fedtune budget --recipe aloe-8b-medical
    """
    from fedtune.errors import UsageError
    from fedtune.units import parse_bytes, to_mib

    cap_mib = None if cap is None else to_mib(int(_parsed("--cap", parse_bytes, cap)))
    if run is not None:
        if fit or grid or uplink or downlink or cap:
            raise UsageError(
                "--fit, --grid, --cap, --uplink and --downlink are about a run to come.", hint="Leave RUN out."
            )
        given = bool(challenge or recipe or config or set_ or data)
        if Path(run).is_file():
            forecast = _plan_of(_resolve(challenge, recipe, config, set_, data).config) if given else None
            _audit_file(Path(run), forecast, readme, figure, json)
        elif given:
            raise UsageError(f"{run} has a config of its own.", hint=f"Leave the others out: fedtune budget {run}")
        else:
            _audit_run(run, out, readme, figure, json)
        return
    if not (challenge or recipe or config or set_ or data):
        raise UsageError(
            "Neither a run nor a config is named.",
            hint="Example: fedtune budget --challenge medical, or fedtune budget latest",
        )
    if sum((fit is not None, grid, bool(uplink or downlink or readme or figure))) > 1:
        raise UsageError("--fit, --grid, and transfer times or published figures are separate questions.")
    resolved = _resolve(challenge, recipe, config, set_, data)
    if cap_mib is None:
        cap_mib = resolved.config.communication.cap_mib
    rates = _rates(uplink, downlink)
    if fit is not None:
        _fit(resolved.config, fit, cap_mib, json)
    elif grid:
        _grid(resolved.config, cap_mib, json)
    else:
        _forecast(resolved.config, cap_mib, rates, _checks(readme, figure), json)


def _resolve(
    challenge: str | None, recipe: str | None, config: list[Path] | None, settings: list[str] | None, data: Path | None
) -> ResolvedConfig:
    return options.resolve(challenge=challenge, recipe=recipe, config=config, settings=settings, data=data)


def _parsed(flag: str, parse: Callable[[str], float], text: str) -> float:
    from fedtune.errors import UsageError

    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}.") from None


def _rates(uplink: str | None, downlink: str | None) -> tuple[float, float] | None:
    """Return a client's uplink and downlink in bytes per second."""
    from fedtune.errors import UsageError
    from fedtune.units import parse_rate

    if uplink is None and downlink is None:
        return None
    if uplink is None or downlink is None:
        raise UsageError("A round goes both ways: --uplink and --downlink belong together.")
    return _parsed("--uplink", parse_rate, uplink), _parsed("--downlink", parse_rate, downlink)


def _plan_of(config: FedTuneConfig) -> Plan:
    from fedtune.budget.plan import plan

    return plan(config)


# --- what would be sent -----------------------------------------------------------------------------------------------


def _forecast(
    config: FedTuneConfig,
    cap_mib: float,
    rates: tuple[float, float] | None,
    check: Callable[[float, float, bool], list[FigureCheck]],
    as_json: bool,
) -> None:
    from fedtune.budget.plan import transfer_time
    from fedtune.config.facts import published_results
    from fedtune.errors import CapError
    from fedtune.units import to_mib

    planned = _plan_of(config)
    time = transfer_time(planned, uplink=rates[0], downlink=rates[1]) if rates else None
    used_mib = to_mib(planned.total_bytes)
    checks = check(used_mib, cap_mib, False)
    published = published_results(config).get("budget_mib")
    if as_json:
        print_json(
            {
                "plan": planned,
                "used_mib": used_mib,
                "cap_mib": cap_mib,
                "published_mib": published,
                "transfer": time,
                "figures": checks,
            }
        )
    else:
        _show_forecast(config, planned, cap_mib, time)
        if published is not None:
            same = f"{used_mib:.2f}" == f"{published:.2f}"
            _say(f"published for {config.recipe}: {published:.2f} MiB, {'the same' if same else 'not the same'}")
        _show_checks(checks)
    if used_mib > cap_mib:
        raise CapError(
            f"The run would send {used_mib:,.2f} MiB, over the cap of {cap_mib:,.2f} MiB.",
            hint="See what fits: add --fit rank, --fit rounds or --fit clients",
        )


def _show_forecast(config: FedTuneConfig, planned: Plan, cap_mib: float, time: TransferTime | None) -> None:
    from rich.table import Table

    from fedtune.units import format_seconds, to_mib

    _say(
        f"{config.model.base} · {planned.strategy} · {_formats(planned)} · {planned.arrays} arrays, "
        f"{planned.parameters:,} parameters"
    )
    for sentence in planned.notes:
        _say(sentence)
    _say(f"{planned.rounds} rounds, {planned.clients_per_round} of {planned.clients} clients a round")
    table = Table()
    table.add_column("")
    for heading in ("bytes", "MiB", "all serialised, MiB"):
        table.add_column(heading, justify="right")
    message, reply = planned.serialised_message, planned.serialised_reply
    of_largest = ", the largest" if planned.varies else ""
    rows: list[tuple[str, float, float]] = [
        (f"one message down{of_largest}", planned.message_bytes, message.high),
        (f"one message up{of_largest}", planned.reply_bytes, reply.high),
        (f"one client in a round{of_largest}", planned.client_round_bytes, (message + reply).high),
        (
            "one client in the run, on average",
            planned.client_bytes,
            planned.serialised_total.high / planned.clients,
        ),
        (f"one round{of_largest}", planned.round_bytes, planned.serialised_round.high),
        ("the run, down", planned.down_bytes, planned.serialised_down.high),
        ("the run, up", planned.up_bytes, planned.serialised_up.high),
        ("the run", planned.total_bytes, planned.serialised_total.high),
    ]
    for name, counted, serialised in rows:
        table.add_row(name, f"{counted:,.0f}", f"{counted / 2**20:,.2f}", f"{serialised / 2**20:,.2f}")
    stdout.print(table)
    used = to_mib(planned.total_bytes)
    _say(f"{used:.2f} MiB of {cap_mib:,.2f} MiB, {used / cap_mib:.2%} of the cap (the leaderboard prints MiB as MB)")
    slack = planned.serialised_total.high - planned.serialised_total.low
    _say(f"all serialised bytes are an upper bound, at most {slack:,} bytes too high: a reply's numbers vary in length")
    if time is not None:
        _say(
            f"transfer: {format_seconds(time.down_s)} down and {format_seconds(time.up_s)} up, "
            f"{time.round_s / 3600:.4f} h a round, {time.total_s / 3600:.3f} h in total ({format_seconds(time.total_s)}), "
            "every client on a link of its own"
        )


def _formats(planned: Plan) -> str:
    """Return how messages are written, both ways: `float32`, or `int8 down, float32 up`."""
    down, up = (
        form.removeprefix("packed-").removeprefix("joined-") for form in (planned.down_format, planned.up_format)
    )
    return down if down == up else f"{down} down, {up} up"


def _fit(config: FedTuneConfig, what: str, cap_mib: float, as_json: bool) -> None:
    from fedtune.budget.fit import PATHS, fit
    from fedtune.config.facts import ineligible_because
    from fedtune.errors import UsageError

    if what not in PATHS:
        raise UsageError(f"--fit {what} is not one of {', '.join(PATHS)}.")
    found: Fit = fit(config, what, cap_mib)
    reasons = ineligible_because(found.config)
    path = PATHS[found.what]
    if as_json:
        print_json(
            {
                "fit": {
                    "key": path,
                    "value": found.value,
                    "used_mib": found.plan.total_bytes / 2**20,
                    "next_mib": found.next_bytes / 2**20,
                    "cap_mib": cap_mib,
                    "plan": found.plan,
                    "ineligible_because": reasons,
                }
            }
        )
        return
    of = f" ({found.plan.clients_per_round} a round)" if found.what == "clients" else ""
    _say(
        f"{path} = {found.value:,}{of}: {found.plan.total_bytes / 2**20:,.2f} MiB of {cap_mib:,.2f} MiB; "
        f"{found.value + 1:,} would send {found.next_bytes / 2**20:,.2f} MiB"
    )
    for reason in reasons or ():
        note(f"not eligible for the leaderboard: {reason}")


def _grid(config: FedTuneConfig, cap_mib: float, as_json: bool) -> None:
    from rich.table import Table

    from fedtune.budget.fit import WIRE_DTYPES, grid, targets_name

    rows: list[GridRow] = grid(config)
    if as_json:
        print_json({"grid": rows, "cap_mib": cap_mib})
        return
    table = Table(title="MiB in the run, both ways; ! is over the cap", title_justify="left")
    table.add_column("targets")
    for heading in ("rank", *WIRE_DTYPES):
        table.add_column(heading, justify="right")
    own = (config.adapter.rank, targets_name(config.adapter.targets))
    for row in rows:
        cells = ["–" if row.total_bytes is None else _capped(row.total_bytes[dtype], cap_mib) for dtype in WIRE_DTYPES]
        mark = " (this config)" if (row.rank, row.targets) == own else ""
        table.add_row(row.targets + mark, str(row.rank), *cells)
    stdout.print(table)
    for targets, why in {row.targets: row.unknown_because for row in rows if row.unknown_because}.items():
        warn(f"{targets} is unknown: {why}")


def _capped(count_bytes: int, cap_mib: float) -> str:
    mib = count_bytes / 2**20
    return f"{'! ' if mib > cap_mib else ''}{mib:,.2f}"


# --- what was sent ----------------------------------------------------------------------------------------------------


def _audit_run(name: str, out: Path, readme: Path | None, figure: str | None, as_json: bool) -> None:
    from fedtune.budget.audit import audit
    from fedtune.errors import MissingError
    from fedtune.runs.directory import find_run

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise MissingError(f"{name} is no run directory: it has no config.json.")
    run = find_run(None if name == "latest" else name, out)
    found = audit(run)
    used_mib = found.total.bytes / 2**20
    checks = _checks(readme, figure)(used_mib, found.cap_mib, False)
    if as_json:
        difference = None if found.forecast is None else found.total.bytes - found.forecast.total_bytes
        record = {**asdict(found), "used_mib": used_mib, "difference_bytes": difference}
        print_json({"audit": record, "figures": checks})
        return
    _show_audit(found)
    _show_checks(checks)


def _show_audit(found: Audit) -> None:
    from rich.table import Table

    forecast, total = found.forecast, found.total
    state = {"finished": "finished", "running": "running", "stopped": "stopped before its last round"}[found.state]
    rounds = f"{found.rounds_done} of {forecast.rounds}" if forecast else str(found.rounds_done)
    _say(f"{found.run} · {state}, {rounds} rounds committed")
    table = Table()
    for heading in ("MiB", "sent", "forecast", "difference, bytes"):
        table.add_column(heading, justify="left" if heading == "MiB" else "right")
    planned = (forecast.down_bytes, forecast.up_bytes, forecast.total_bytes) if forecast else (None, None, None)
    sent = (total.down_bytes, total.up_bytes, total.bytes)
    for name, counted, expected in zip(("down", "up", "both"), sent, planned, strict=True):
        difference = "" if expected is None else f"{counted - expected:+,}"
        table.add_row(name, f"{counted / 2**20:,.2f}", _mib(expected), difference)
    span = "" if forecast is None else f"at most {forecast.serialised_total.high / 2**20:,.2f}"
    table.add_row("all serialised", f"{total.serialised_bytes / 2**20:,.2f}", span, "")
    stdout.print(table)
    _say(
        f"{total.bytes / 2**20:.2f} MiB of {found.cap_mib:,.2f} MiB, {total.bytes / 2**20 / found.cap_mib:.2%} of the cap"
    )
    for cause in found.causes:
        _say(f"{cause.bytes:+,} bytes: {cause.messages:,} messages {cause.text}")
    if forecast and not found.causes:
        _say("sent as forecast, to the byte")
    if found.queries:
        _say(
            f"beside these {found.queries} answers on rows, {found.query_bytes:,} bytes, which the leaderboard does not count"
        )
    _uses("round", _ranges(found.rounds))
    _uses("client", [(str(use.number) if use.number >= 0 else "not asked", use) for use in found.clients])
    if found.torn_line:
        warn(
            "the ledger ends in the middle of a line, which is left out: it is being written, or its writer was killed"
        )
    if forecast is None:
        warn(f"there is no forecast beside it: {found.forecast_unknown_because}")


def _uses(what: Literal["round", "client"], rows: Sequence[tuple[str, Use]]) -> None:
    """Print one table of rounds or clients; of several equal rounds each."""
    from rich.table import Table

    table = Table(title=f"By {what}", title_justify="left")
    table.add_column(what)
    for heading in ("down MiB", "up MiB", "forecast MiB", "asked", "accepted", "refused", "errors", "lost MiB"):
        table.add_column(heading, justify="right")
    for name, use in rows:
        table.add_row(
            name,
            f"{use.down_bytes / 2**20:,.2f}",
            f"{use.up_bytes / 2**20:,.2f}",
            _mib(use.forecast_bytes),
            *(str(count) for count in (use.asked, use.accepted, use.refused, use.errors)),
            f"{use.lost_bytes / 2**20:,.2f}",
        )
    stdout.print(table)


def _ranges(rounds: Sequence[Use]) -> list[tuple[str, Use]]:
    """Merge neighbouring rounds that sent the same into one line, "1-9 each"."""
    from itertools import groupby

    def same(use: Use) -> tuple[object, ...]:
        return (
            *(use.down_bytes, use.up_bytes, use.forecast_bytes, use.lost_bytes),
            *(use.asked, use.accepted, use.refused, use.errors),
        )

    lines = []
    for _, group in groupby(rounds, same):
        uses = list(group)
        first, last = uses[0].number, uses[-1].number
        lines.append((str(first) if first == last else f"{first}-{last}, each", uses[0]))
    return lines


def _audit_file(path: Path, forecast: Plan | None, readme: Path | None, figure: str | None, as_json: bool) -> None:
    """Sum up a comm_cost.txt."""
    from fedtune.budget.comm_cost import read_comm_cost

    cost: CommCost = read_comm_cost(path)
    checks = _checks(readme, figure)(cost.used_mib, cost.cap_mib, True)
    if as_json:
        print_json({"comm_cost": cost, "plan": forecast, "figures": checks})
        return
    from rich.table import Table

    _say(f"{path} · {len(cost.rounds)} rounds")
    table = Table()
    table.add_column("MiB")
    table.add_column("sent", justify="right")
    table.add_column("forecast", justify="right")
    planned = (forecast.down_bytes, forecast.up_bytes, forecast.total_bytes) if forecast else (None, None, None)
    sent = (cost.down_mib, cost.up_mib, cost.used_mib)
    for name, used, expected in zip(("down", "up", "both"), sent, planned, strict=True):
        table.add_row(name, f"{used:,.2f}", _mib(expected))
    stdout.print(table)
    _say(f"{cost.used_mib:.2f} MiB of {cost.cap_mib:,.2f} MiB, {cost.used_mib / cost.cap_mib:.2%} of the cap")
    if cost.rounds[-1][1] is None:
        warn("the last round has a line down and none up")
    for finding in cost.findings:
        warn(f"the file contradicts itself: {finding}")
    _show_checks(checks)


# --- both -------------------------------------------------------------------------------------------------------------


def _checks(readme: Path | None, figure: str | None) -> Callable[[float, float, bool], list[FigureCheck]]:
    """Return what holds the given figures against a number of MiB used, under a cap, that may be rounded."""
    from fedtune.budget.comm_cost import check_figure, figures_of

    def check(used_mib: float, cap_mib: float, rounded: bool) -> list[FigureCheck]:
        figures = [figure] if figure is not None else []
        if readme is not None:
            figures += figures_of(readme, cap_mib)
        return [check_figure(each, used_mib, rounded=rounded) for each in figures]

    return check


def _show_checks(checks: Sequence[FigureCheck]) -> None:
    for check in checks:
        _say(
            f"published figure {check.figure}: {'matches' if check.matches else 'does NOT match'}; {check.explanation}"
        )


def _mib(count_bytes: int | None) -> str:
    return "–" if count_bytes is None else f"{count_bytes / 2**20:,.2f}"


def _say(text: str) -> None:
    """Print a line of data on stdout."""
    stdout.print(text, highlight=False, markup=False, soft_wrap=True)
