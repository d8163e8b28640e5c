"""Writes report.html: the curves and tables of a run in one file, which a browser opens without a network."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedtune.runs.atomic import read_json_lines, write_text
from fedtune.runs.directory import RunDirectory
from fedtune.units import to_mib

_WIDTH, _HEIGHT, _MARGIN = 640, 240, 56


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 2.0
    dash: str = ""


def write_report(run: RunDirectory) -> None:
    """Write `report.html` from the run's config, metrics and ledger; the run may be in progress."""
    config = json.loads(run.config_file.read_text(encoding="utf-8"))
    lines = read_json_lines(run.metrics_file)
    about = run.read_about()
    accepted = [line for line in lines if line["status"] == "ok"]
    with_loss = [line for line in accepted if "train_loss" in line]  # under local privacy clients do not send losses
    rates = {(float(line["round"]), float(line["learning_rate"])) for line in accepted}
    mean_losses = Curve("mean of the round", _mean_losses(with_loss), "#2563eb", 2.5)
    cap_mib = float(config["communication"]["cap_mib"])
    sent = _sent_mib(read_json_lines(run.ledger_file))
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=run.path.name,
            summary=_summary(config, max((line["round"] for line in accepted), default=0)),
            ineligible=about.get("ineligible_because", ()) if about.get("eligible") is False else None,
            loss_chart=_chart([*_client_curves(with_loss), mean_losses], "round", "loss"),
            rate_chart=_chart([Curve("learning rate", sorted(rates), "#0f766e")], "round", "learning rate"),
            used_mib=sent[-1][1] if sent else 0.0,
            cap_mib=cap_mib,
            bytes_chart=_bytes_chart(sent, cap_mib),
            clients=list(_client_rows(lines)),
            config=json.dumps(config, indent=2, ensure_ascii=False),
        )
    )
    write_text(run.report_file, page)


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("fedtune.runs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Quotation marks become `&quot;`, where Jinja writes `&#34;`.
        finalize=lambda value: value if isinstance(value, Markup) else Markup(html.escape(str(value))),
    )


def _summary(config: Mapping[str, Any], rounds_done: int) -> str:
    federation = config["federation"]
    return (
        f"{config['challenge'] or 'own config'} · {config['model']['base']} · {config['strategy']['name']} · "
        f"{rounds_done} of {federation['rounds']} rounds · {federation['clients']} clients"
    )


def _mean_losses(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return the mean training loss of each round, weighted by the numbers of examples."""
    means = []
    for number in sorted({line["round"] for line in lines}):
        of_round = [line for line in lines if line["round"] == number]
        weights = sum(line["num_examples"] for line in of_round)
        means.append((float(number), sum(line["train_loss"] * line["num_examples"] for line in of_round) / weights))
    return means


def _client_curves(lines: Sequence[Mapping[str, Any]]) -> list[Curve]:
    return [
        Curve(
            f"client {partition}",
            [(float(line["round"]), float(line["train_loss"])) for line in lines if line["partition"] == partition],
            f"hsl({partition * 137 % 360} 45% 62%)",
            1.0,
        )
        for partition in sorted({line["partition"] for line in lines})
    ]


def _sent_mib(entries: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return the MiB sent up to and including each round."""
    sent: dict[int, int] = {}
    for entry in entries:
        sent[entry["round"]] = sent.get(entry["round"], 0) + entry["bytes"]
    rounds = sorted(sent)
    totals = accumulate(sent[number] for number in rounds)
    return [(float(number), to_mib(total)) for number, total in zip(rounds, totals, strict=True)]


def _bytes_chart(sent: Sequence[tuple[float, float]], cap_mib: float) -> Markup:
    curves = [Curve("sent so far, MiB", sent, "#7c3aed", 2.5)]
    if sent:
        curves.append(Curve("cap", [(sent[0][0], cap_mib), (sent[-1][0], cap_mib)], "#b91c1c", 1.5, "6 4"))
    # A logarithmic axis, where a linear one would show the curve as a flat line far below the cap.
    far_below = bool(sent) and sent[-1][1] / cap_mib < 0.1 and all(value > 0 for _, value in sent)
    return _chart(curves, "round", "MiB", powers=far_below)


def _client_rows(lines: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """Yield the row of each client: number, rounds, examples, first and last loss, rejected replies."""
    for partition in sorted({line["partition"] for line in lines}):
        own = [line for line in lines if line["partition"] == partition]
        good = [line for line in own if line["status"] == "ok"]
        cells = ["–", "–", "–"]
        if good and "train_loss" in good[0] and "train_loss" in good[-1]:
            losses = (f"{line['train_loss']:.4f}" for line in (good[0], good[-1]))
            cells = [str(good[-1]["num_examples"]), *losses]
        yield [str(partition), str(len(own)), *cells, str(len(own) - len(good))]


def _chart(curves: Sequence[Curve], x_name: str, y_name: str, *, powers: bool = False) -> Markup:
    """Draw curves as inline SVG with labels on both axes; the title of a curve appears when the mouse is over it.

    With `powers` the y axis is logarithmic, from one power of ten to another; all y must then be above 0.
    """
    points = [point for curve in curves for point in curve.points]
    if not points:
        return Markup("<p class=quiet>Nothing to draw yet.</p>")
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(0.0, min(y for _, y in points)), max(y for _, y in points)
    ticks = [y_low + ((y_high - y_low) or 1.0) * step / 4 for step in range(5)]
    if powers:
        lowest, highest = (math.log10(choose(y for _, y in points)) for choose in (min, max))
        ticks = [10.0**power for power in range(math.floor(lowest), math.ceil(highest) + 1)]
    x_span = (x_high - x_low) or 1.0

    def height(y: float) -> float:
        return math.log10(y) if powers else y

    def position(x: float, y: float) -> tuple[float, float]:
        across = _MARGIN + (x - x_low) / x_span * (_WIDTH - 2 * _MARGIN)
        up = (height(y) - height(ticks[0])) / (height(ticks[-1]) - height(ticks[0]))
        return across, _HEIGHT - _MARGIN / 2 - up * (_HEIGHT - _MARGIN)

    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{html.escape(y_name)} by {x_name}'>"]
    for value in ticks:
        _, y = position(x_low, value)
        parts.append(f"<line x1={_MARGIN} x2={_WIDTH - _MARGIN} y1={y:.1f} y2={y:.1f} stroke='#8884' />")
        parts.append(f"<text x={_MARGIN - 6} y={y + 4:.1f} text-anchor=end>{value:.4g}</text>")
    for value in sorted({x_low, round((x_low + x_high) / 2), x_high}):
        x, _ = position(value, ticks[0])
        parts.append(f"<text x={x:.1f} y={_HEIGHT - 10} text-anchor=middle>{x_name} {value:g}</text>")
    for curve in curves:
        path = " ".join("{:.1f},{:.1f}".format(*position(x, y)) for x, y in curve.points)
        parts.append(
            f"<g><title>{html.escape(curve.name)}</title><polyline points='{path}' fill=none stroke='{curve.colour}' "
            f"stroke-width={curve.width} stroke-dasharray='{curve.dash}' />"
        )
        if len(curve.points) == 1:
            x, y = position(*curve.points[0])
            parts.append(f"<circle cx={x:.1f} cy={y:.1f} r=3 fill='{curve.colour}' />")
        parts.append("</g>")
    return Markup("".join(parts) + "</svg>")
