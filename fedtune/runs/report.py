"""report.html: a run's curves and tables for people who would rather look; one file that opens from disk."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.runs.atomic import read_json_lines, write_text
from fedtune.runs.directory import RunDirectory
from fedtune.units import MiB

_WIDTH, _HEIGHT, _MARGIN = 640, 240, 56

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 46rem; padding: 0 1rem }
body { color: #1d2430; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin-top: 2.2rem }
svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #5a6472 }
table { border-collapse: collapse; width: 100%; font-size: 14px }
td, th { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e3e7ed }
td:first-child, th:first-child { text-align: left }
.quiet { color: #5a6472 } .warn { border-left: 4px solid #b45309; padding-left: .8rem }
pre { background: #f5f7fa; padding: 1rem; overflow-x: auto; font-size: 13px }
@media (prefers-color-scheme: dark) {
  body { color: #e4e8ee; background: #14181f } pre { background: #1d232d } td, th { border-color: #2b333f }
  svg text { fill: #9aa5b4 } .quiet { color: #9aa5b4 }
}
"""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 2.0
    dash: str = ""


def write_report(run: RunDirectory) -> None:
    """Write `report.html` from the run's config, metrics and ledger, as far as they have come."""
    config = json.loads(run.config_file.read_text(encoding="utf-8"))
    lines = read_json_lines(run.metrics_file)
    entries = read_json_lines(run.ledger_file)
    about = run.read_about()
    accepted = [line for line in lines if line["status"] == "ok"]
    told = [line for line in accepted if "train_loss" in line]  # under local privacy clients keep their losses
    rounds = sorted({line["round"] for line in accepted})
    losses = [
        (float(number), _mean_loss(of_round))
        for number in rounds
        if (of_round := [line for line in told if line["round"] == number])
    ]
    rates = [(float(line["round"]), float(line["learning_rate"])) for line in accepted]
    name = html.escape(run.path.name)
    sections = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>",
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>",
        f"<h1>{name}</h1><p class=quiet>{html.escape(_summary(config, rounds))}</p>",
        _eligibility(about),
        "<h2>Training loss per round</h2>",
        _chart([*_client_curves(told), Curve("mean of the round", losses, "#2563eb", 2.5)], "round", "loss"),
        "<h2>Learning rate per round</h2>",
        _chart([Curve("learning rate", sorted(set(rates)), "#0f766e")], "round", "learning rate"),
        "<h2>Communication</h2>",
        _communication(entries, float(config["communication"]["cap_mib"])),
        "<h2>Clients</h2>",
        _clients(lines),
        "<h2>Config</h2>",
        f"<pre>{html.escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre></html>",
    ]
    write_text(run.report_file, "\n".join(section for section in sections if section) + "\n")


def _summary(config: Mapping[str, Any], rounds: Sequence[int]) -> str:
    done = rounds[-1] if rounds else 0
    federation = config["federation"]
    return (
        f"{config['challenge'] or 'own config'} · {config['model']['base']} · {config['strategy']['name']} · "
        f"{done} of {federation['rounds']} rounds · {federation['clients']} clients"
    )


def _eligibility(about: Mapping[str, Any]) -> str:
    if about.get("eligible") is not False:
        return ""
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in about.get("ineligible_because", ()))
    return f"<div class=warn><b>Not eligible for the leaderboard</b><ul>{reasons}</ul></div>"


def _mean_loss(lines: Sequence[Mapping[str, Any]]) -> float:
    weights = sum(line["num_examples"] for line in lines)
    return float(sum(line["train_loss"] * line["num_examples"] for line in lines) / weights)


def _client_curves(lines: Sequence[Mapping[str, Any]]) -> list[Curve]:
    partitions = sorted({line["partition"] for line in lines})
    return [
        Curve(
            f"client {partition}",
            [(float(line["round"]), float(line["train_loss"])) for line in lines if line["partition"] == partition],
            f"hsl({partition * 137 % 360} 45% 62%)",
            1.0,
        )
        for partition in partitions
    ]


def _communication(entries: Sequence[Mapping[str, Any]], cap_mib: float) -> str:
    sent: dict[int, int] = {}
    for entry in entries:
        sent[entry["round"]] = sent.get(entry["round"], 0) + entry["bytes"]
    points, used = [], 0
    for number in sorted(sent):
        used += sent[number]
        points.append((float(number), used / MiB))
    share = used / MiB / cap_mib
    text = f"<p>{used / MiB:,.2f} MiB of {cap_mib:,.0f} MiB used ({share:.2%}).</p>"
    curves = [Curve("sent so far, MiB", points, "#7c3aed", 2.5)]
    if points:
        curves.append(Curve("cap", [(points[0][0], cap_mib), (points[-1][0], cap_mib)], "#b91c1c", 1.5, "6 4"))
    # Far below the cap its line would press the curve to the ground; powers of ten keep both in sight.
    far = 0 < share < 0.1 and all(value > 0 for _, value in points)
    return text + _chart(curves, "round", "MiB", powers=far)


def _clients(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = ["<table><tr><th>client<th>rounds<th>examples<th>first loss<th>last loss<th>left out"]
    for partition in sorted({line["partition"] for line in lines}):
        own = [line for line in lines if line["partition"] == partition]
        good = [line for line in own if line["status"] == "ok"]
        cells = (
            [str(good[-1]["num_examples"]), f"{good[0]['train_loss']:.4f}", f"{good[-1]['train_loss']:.4f}"]
            if good and "train_loss" in good[0] and "train_loss" in good[-1]
            else ["–", "–", "–"]
        )
        values = [str(partition), str(len(own)), *cells, str(len(own) - len(good))]
        rows.append("<tr>" + "".join(f"<td>{value}" for value in values))
    return "\n".join(rows) + "</table>"


def _chart(curves: Sequence[Curve], x_name: str, y_name: str, *, powers: bool = False) -> str:
    """Draw curves as inline SVG with both axes labelled; every curve has a title to hover over.

    With `powers` the y axis is logarithmic, from one power of ten to another; all y are then above 0.
    """
    points = [point for curve in curves for point in curve.points]
    if not points:
        return "<p class=quiet>Nothing to draw yet.</p>"
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(0.0, min(y for _, y in points)), max(y for _, y in points)
    ticks = [y_low + ((y_high - y_low) or 1.0) * step / 4 for step in range(5)]
    if powers:
        lowest, highest = (math.log10(choose(y for _, y in points)) for choose in (min, max))
        ticks = [10.0**power for power in range(math.floor(lowest), math.ceil(highest) + 1)]
    x_span = (x_high - x_low) or 1.0

    def height(y: float) -> float:
        return math.log10(y) if powers else y

    def place(x: float, y: float) -> tuple[float, float]:
        across = _MARGIN + (x - x_low) / x_span * (_WIDTH - 2 * _MARGIN)
        up = (height(y) - height(ticks[0])) / (height(ticks[-1]) - height(ticks[0]))
        return across, _HEIGHT - _MARGIN / 2 - up * (_HEIGHT - _MARGIN)

    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='{html.escape(y_name)} by {x_name}'>"]
    for value in ticks:
        _, y = place(x_low, value)
        parts.append(f"<line x1={_MARGIN} x2={_WIDTH - _MARGIN} y1={y:.1f} y2={y:.1f} stroke='#8884' />")
        parts.append(f"<text x={_MARGIN - 6} y={y + 4:.1f} text-anchor=end>{value:.4g}</text>")
    for value in sorted({x_low, round((x_low + x_high) / 2), x_high}):
        x, _ = place(value, ticks[0])
        parts.append(f"<text x={x:.1f} y={_HEIGHT - 10} text-anchor=middle>{x_name} {value:g}</text>")
    for curve in curves:
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve.points)
        parts.append(
            f"<g><title>{html.escape(curve.name)}</title><polyline points='{path}' fill=none stroke='{curve.colour}' "
            f"stroke-width={curve.width} stroke-dasharray='{curve.dash}' />"
        )
        if len(curve.points) == 1:
            x, y = place(*curve.points[0])
            parts.append(f"<circle cx={x:.1f} cy={y:.1f} r=3 fill='{curve.colour}' />")
        parts.append("</g>")
    return "".join(parts) + "</svg>"
