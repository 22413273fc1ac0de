"""One self-contained HTML page about a sweep: its trials, curves, what settings led to, last images."""

import math
from collections.abc import Mapping
from typing import Any

import jinja2

from gmdist import storage
from gmdist.report.page import HEAD, axes_of, uri_of
from gmdist.sweep.config import SweepConfig
from gmdist.sweep.load import RUNS
from gmdist.train.metrics import read_lines

_LOG_FROM = 20  # times the least: values that far apart are drawn on a logarithmic axis
_TEMPLATE = (
    HEAD
    + """<p>{{ summary }}</p>
<table>
<tr><th>trial</th>{% for key in keys %}<th>{{ key }}</th>{% endfor %}<th>step</th><th>{{ metric }}</th><th></th></tr>
{% for trial in trials %}
<tr><td>{{ trial.trial }}</td>{% for key in keys %}<td>{{ trial.shown[key] }}</td>{% endfor %}<td>{{ trial.step }}</td>
<td>{{ trial.value }}</td><td>{{ trial.remark }}</td></tr>
{% endfor %}
</table>
<h2>{{ metric }} through training</h2>
<figure>{{ curves|safe }}</figure>
<h2>Settings and what they led to</h2>
<figure>{{ coordinates|safe }}</figure>
{% if lineage %}
<h2>Who went on from whom</h2>
<table>
<tr><th>trial</th><th>step</th><th>from</th>{% for key in keys %}<th>{{ key }}</th>{% endfor %}</tr>
{% for line in lineage %}
<tr><td>{{ line.trial }}</td><td>{{ line.step }}</td><td>{{ line.donor }}</td>
{% for key in keys %}<td>{{ line.shown[key] }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
<h2>Last images</h2>
{% for trial in trials if trial.grid %}
<figure><img src="{{ trial.grid }}" alt="trial {{ trial.trial }}">
<figcaption>trial {{ trial.trial }}: {{ trial.value }} at step {{ trial.step }}</figcaption></figure>
{% endfor %}
</body>
</html>
"""
)


def write_page(title: str, folder: str, sweep: SweepConfig, found: Mapping[str, Any]) -> str:
    """Write report.html into a sweep's folder; gives its location.

    Args:
        title: of the page.
        folder: of the sweep.
        sweep: what was searched.
        found: the content of its sweep.json.
    """
    keys = list(sweep.domains)
    trials = [_row(folder, trial, found["best"]) for trial in found["trials"]]
    trials.sort(key=lambda trial: (-trial["step"], trial["order"] if sweep.mode == "min" else -trial["order"]))
    lineage = [
        {"trial": trial["trial"], "step": part["step"], "donor": part["donor"], "shown": shown(part["settings"])}
        for trial in found["trials"]
        for part in trial["lineage"]
        if part["donor"] is not None
    ]
    failed = [trial["state"] for trial in found["trials"]].count("failed")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(_TEMPLATE).render(
        title=title,
        summary=f"{len(trials)} trials{f' ({failed} failed)' if failed else ''}; {found['steps']:,} steps; "
        f"all to their end take {found['steps_of_all']:,}.",
        keys=keys,
        metric=sweep.metric,
        trials=trials,
        lineage=lineage,
        curves=_curves(folder, sweep.metric, found["trials"]),
        coordinates=_coordinates(keys, sweep.metric, found["trials"]),
    )
    location = storage.join(folder, "report.html")
    storage.write(location, page.encode())
    return location


def shown(settings: Mapping[str, Any]) -> dict[str, str]:
    """Values as people read them."""
    return {key: _text(value) for key, value in settings.items()}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(folder: str, trial: Mapping[str, Any], best: int | None) -> dict[str, Any]:
    """A trial as the page has it."""
    samples = storage.join(folder, RUNS, trial["run"], "samples")
    grids = sorted(storage.list_names(samples))
    metric = trial["metric"]
    return {
        "trial": trial["trial"],
        "shown": shown(trial["settings"]),
        "step": trial["step"],
        "order": 0.0 if metric is None else metric,
        "value": "" if metric is None else f"{metric:.5g}",
        "remark": "best" if trial["trial"] == best else trial["error"] or trial["state"],
        "grid": uri_of(storage.read(storage.join(samples, grids[-1]))) if grids else None,
    }


def _curves(folder: str, metric: str, trials: list[dict[str, Any]]) -> str:
    """The metric of every trial by step."""
    from matplotlib import colormaps

    with axes_of(metric, "step", (8, 4)) as (axes, drawn):
        axes.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])  # twice as many as usual
        for trial in trials:
            lines = read_lines(storage.join(folder, RUNS, trial["run"]))
            points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=f"{trial['trial']}")
        if axes.lines:
            values = [value for line in axes.lines for value in line.get_ydata()]
            if min(values) > 0 and max(values) > _LOG_FROM * min(values):
                axes.set_yscale("log")
            axes.legend(fontsize=7, ncols=2, title="trial", title_fontsize=7)
    return drawn[0]


def _coordinates(keys: list[str], metric: str, trials: list[dict[str, Any]]) -> str:
    """Parallel coordinates: an axis a key, the metric's last, a line for each trial that has one."""
    from matplotlib import colormaps

    measured = [trial for trial in trials if trial["metric"] is not None]
    columns = [[trial["settings"][key] for trial in measured] for key in keys] + [[t["metric"] for t in measured]]
    with axes_of("", "", (max(6.0, 1.8 * len(columns)), 4)) as (axes, drawn):
        heights = [_heights(column) for column in columns]
        for i, trial in enumerate(measured):
            own = [height[i] for height in heights]
            axes.plot(own, color=colormaps["viridis"](own[-1]), linewidth=1.2, label=str(trial["trial"]))
        for place, (column, height) in enumerate(zip(columns, heights, strict=True)):
            axes.axvline(place, color="#999", linewidth=0.8)
            for text, at in dict(zip(map(_text, column), height, strict=True)).items():
                axes.text(place, at, f" {text}", fontsize=6, va="center", parse_math=False)
        axes.set_xticks(range(len(columns)), [*(key.replace(".", ".\n", 1) for key in keys), metric], fontsize=7)
        axes.set_yticks([])
    return drawn[0]


def _heights(column: list[Any]) -> list[float]:
    """Where values are on an axis from 0 to 1: by their size, on a logarithmic scale if they are far apart."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
        names = sorted({str(value) for value in column})
        return [names.index(str(value)) / max(len(names) - 1, 1) for value in column]
    scaled = [float(value) for value in column]
    if scaled and min(scaled) > 0 and max(scaled) > _LOG_FROM * min(scaled):
        scaled = [math.log(value) for value in scaled]
    low, high = min(scaled, default=0.0), max(scaled, default=0.0)
    return [(value - low) / (high - low) if high > low else 0.5 for value in scaled]
