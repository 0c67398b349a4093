"""Curves of one run or of several: as PNG files, and as SVG in the colours of the page, light or dark."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from html import escape
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any, TypeGuard

BLOCKS = {"ap": "anchor–positive", "aa": "anchor–anchor", "pp": "positive–positive", "an": "anchor–negative"}
"""Blocks of candidates (see loss.py) in words."""
MAX_POINTS = 400
"""A curve is drawn with at most so many points; longer ones are averaged in equal bins of steps."""
COLORS = {"--ink": "#23211e", "--muted": "#77736b", "--rule": "#dcd8cf", "--down": "#b03a2c"}
LINES = {
    "--c0": "#8b877e", "--c1": "#2c5f8d", "--c2": "#bf6a22", "--c3": "#3f7f5f", "--c4": "#84548f",
    "--c5": "#a8323e", "--c6": "#8a7a1f", "--c7": "#2a8a96", "--c8": "#6b4a34",
}  # fmt: skip
"""CSS variable of the page -> colour of the PNG."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": COLORS["--ink"],
    "text.parse_math": False,
    "axes.edgecolor": COLORS["--rule"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": COLORS["--muted"],
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLORS["--rule"],
    "grid.linewidth": 0.5,
    "xtick.color": COLORS["--rule"],
    "ytick.color": COLORS["--rule"],
    "xtick.labelcolor": COLORS["--muted"],
    "ytick.labelcolor": COLORS["--muted"],
    "legend.frameon": False,
    "legend.fontsize": 7,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    name: str
    title: str
    section: str
    svg: str


@dataclass(frozen=True)
class Curves:
    """One plot of lines over steps."""

    name: str
    title: str
    section: str
    """The section of the page that shows it."""
    lines: dict[str, str]
    """Key of metrics.jsonl -> label. Of several runs the first is drawn, one line a run."""
    scale: float = 1.0
    smooth: bool = False
    """Draw a running mean over a faint curve."""
    from_zero: bool = True
    if_it_changes: bool = False
    """Not drawn where every value is the same."""
    in_steps: bool = False
    """Drawn as what it is until it changes."""
    marks: bool = False
    """Every value has a mark: there are few."""


CURVES = (
    Curves("loss", "Loss", "training", {"loss": "loss"}, smooth=True),
    Curves("grad_norm", "Gradient norm, before clipping", "training", {"grad_norm": "norm"}, smooth=True),
    Curves("learning_rate", "Learning rate", "training", {"learning_rate": "learning rate"}),
    Curves(
        "masked_fraction",
        "Masked candidates, % of each block",
        "masking",
        {"masked_fraction": "all"} | {f"masked_fraction_{block}": f"{block[0]}–{block[1]}" for block in BLOCKS},
        scale=100.0,
        smooth=True,
    ),
    Curves(
        "masked_weight",
        "Weight in the softmax, % of all negatives'",
        "masking",
        {"masked_weight": "masked", "identical_weight": "identical", "known_weight": "known positives"},
        scale=100.0,
        smooth=True,
    ),
    Curves(
        "rows_without_negatives",
        "Rows of a batch without a negative",
        "masking",
        {"rows_without_negatives": "rows"},
        if_it_changes=True,
    ),
    Curves(
        "positive_similarity",
        "Cosine of anchor and positive, mean",
        "masking",
        {"positive_similarity": "student", "guide_positive_similarity": "guide"},
        smooth=True,
        from_zero=False,
    ),
    Curves(
        "guide_candidate_similarity",
        "Cosine of anchor and other positives, mean",
        "masking",
        {"guide_candidate_similarity": "guide"},
        smooth=True,
        from_zero=False,
    ),
    Curves("pairs_per_second", "Pairs per second", "speed", {"pairs_per_second": "pairs/s"}, smooth=True),
    Curves("peak_memory", "Peak memory of a worker, GB", "speed", {"peak_memory_bytes": "GB"}, scale=1e-9),
    Curves("workers", "Workers", "speed", {"world_size": "workers"}, if_it_changes=True, in_steps=True),
)
SCORES = Curves("scores", "Scores while it trained, points", "scores", {}, from_zero=False, marks=True)
HELD_OUT_LOSS = Curves("held_out_loss", "Loss of the held-out rows", "scores", {"loss": "loss"}, marks=True)
OVERLAID = {"masked_fraction": "Masked candidates, %", "positive_similarity": "Cosine of anchor and positive (student)"}
"""Titles for several runs, where they are other than for one."""


@dataclass(frozen=True)
class Line:
    label: str
    color: str
    xs: list[float]
    ys: list[float]


def write_plots(
    folder: Path,
    metrics: list[dict[str, Any]],
    seconds: dict[str, float],
    tasks: list[tuple[str, float, float]],
    max_grad_norm: float | None,
    scores: tuple[list[dict[str, Any]], dict[str, str]] = ([], {}),
) -> list[Plot]:
    """Write folder/NAME.png of what there is to draw; a plot that has nothing to show any more is removed.

    seconds: by phase, "other" included, and their whole under "step"; tasks: (name, before, after) in points; scores:
    while it trained, a dict a step, and the labels of its keys.
    """
    import matplotlib

    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        drawn = [(spec.name, spec.title, spec.section, _curves_of_run(spec, metrics, max_grad_norm)) for spec in CURVES]
        for spec in (replace(SCORES, lines=scores[1]), HELD_OUT_LOSS):
            drawn.append((spec.name, spec.title, spec.section, _curves_of_run(spec, scores[0], None)))
        drawn.append(("phases", "Share of the step, %", "speed", _draw_phases(seconds)))
        drawn.append(("tasks", "MTEB main score: before (open), after (filled)", "tasks", _draw_tasks(tasks)))
        plots = []
        for name, title, section, figure in drawn:
            if figure is None:
                (folder / f"{name}.png").unlink(missing_ok=True)
                continue
            plots.append(Plot(name, title, section, _svg(figure, name, title)))
            if section != "tasks":
                figure.subplots_adjust(top=0.81)
            figure.suptitle(title, fontsize=9, x=0.02, ha="left")
            figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
    return plots


def overlay_plots(runs: list[list[dict[str, Any]]], over_rows: bool) -> list[Plot]:
    """Every curve with a line a run, in the colours c1, c2, … of the page, which has the legend.

    runs: the metrics of each; over_rows: against the rows seen so far instead of the steps, for unequal batches.
    """
    import matplotlib

    plots = []
    with matplotlib.rc_context(STYLE):
        for spec in CURVES:
            key = next(iter(spec.lines))
            places = [_rows_seen(metrics) if over_rows else None for metrics in runs]
            points = [_points(m, key, spec.scale, at) for m, at in zip(runs, places, strict=True)]
            lines = [Line("", color, *p) for color, p in zip(list(LINES.values())[1:], points, strict=False) if p[0]]
            figure = _draw_lines(spec, lines, "rows seen" if over_rows else "step")
            if figure is not None:
                title = OVERLAID.get(spec.name, spec.title)
                plots.append(Plot(spec.name, title, spec.section, _svg(figure, f"overlaid-{spec.name}", title)))
    return plots


def contrast_plot(contrasts: list[dict[str, Any]]) -> list[Plot]:
    """The mean of every contrast with its 95 % interval; none without contrasts. In the page's section "scores"."""
    import matplotlib
    from matplotlib.figure import Figure

    if not contrasts:
        return []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.24 * len(contrasts)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color=COLORS["--muted"], linewidth=0.8)
        for place, contrast in enumerate(contrasts):
            color = LINES["--c2"] if contrast["mean"] < 0 else LINES["--c1"]
            if contrast["low"] is not None:
                axes.plot([contrast["low"], contrast["high"]], [place, place], color=color, linewidth=1.4)
            every = contrast["differences"]
            axes.plot(every, [place] * len(every), "|", color=color, markersize=6, alpha=0.6)
            axes.plot(contrast["mean"], place, "o", color=color, markersize=5)
        axes.set_yticks(range(len(contrasts)), [contrast["label"] for contrast in contrasts])
        axes.set_ylim(len(contrasts) - 0.5, -0.5)
        axes.set_xlabel("points")
        axes.grid(axis="x")
        title = "Difference of means, with its 95 % interval; a mark a seed"
        return [Plot("contrasts", title, "scores", _svg(figure, "contrasts", title))]


def _curves_of_run(spec: Curves, metrics: list[dict[str, Any]], max_grad_norm: float | None) -> Any:
    """A matplotlib Figure; None when no line has a value."""
    # The colour of a line stays its own when others have nothing to draw.
    colors = list(LINES.values())[0 if len(spec.lines) > 2 else 1 :]
    lines = [
        Line(label, color, *_points(metrics, key, spec.scale))
        for (key, label), color in zip(spec.lines.items(), colors, strict=False)
    ]
    figure = _draw_lines(spec, [line for line in lines if line.xs], "step")
    if figure is None:
        return None
    axes = figure.axes[0]
    if spec.name == "grad_norm" and max_grad_norm:
        axes.axhline(max_grad_norm, color=COLORS["--muted"], linewidth=0.8, linestyle=(0, (4, 3)))
    if spec.section == "training":
        lost = [row["step"] for row in metrics if spec.name in row and not is_finite(row[spec.name])]
        transform = axes.get_xaxis_transform()
        axes.plot(lost, [0.03] * len(lost), "x", color=COLORS["--down"], markersize=4, transform=transform)
    return figure


def _draw_lines(spec: Curves, lines: list[Line], xlabel: str) -> Any:
    if not lines or (spec.if_it_changes and len({y for line in lines for y in line.ys}) == 1):
        return None
    figure, axes = _figure()
    for line in lines:
        smoothed = _running_mean(line.ys) if spec.smooth else line.ys
        if smoothed is not line.ys:
            axes.plot(line.xs, line.ys, color=line.color, linewidth=0.6, alpha=0.35 if len(lines) == 1 else 0.2)
        marker, drawn = "o" if len(line.xs) < 3 or spec.marks else None, "steps-post" if spec.in_steps else "default"
        axes.plot(
            line.xs, smoothed, color=line.color, linewidth=1.4, label=line.label, marker=marker, markersize=3,
            drawstyle=drawn,
        )  # fmt: skip
    if spec.from_zero and min(min(line.ys) for line in lines) >= 0:
        axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_color(COLORS["--muted"])
    if max(line.xs[-1] for line in lines) >= 10_000:
        axes.xaxis.set_major_formatter(lambda value, _: _short_count(value))
    axes.set_xlabel(xlabel)
    if len(lines) > 1 and lines[0].label:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(lines), handlelength=1.2, borderaxespad=0)
    return figure


def _short_count(value: float) -> str:
    """Such as 250k or 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _draw_phases(seconds: dict[str, float]) -> Any:
    parts = {phase: part for phase, part in seconds.items() if phase != "step" and part > 0}
    shares = {phase: 100 * part / sum(parts.values()) for phase, part in parts.items()}
    if not shares:
        return None
    figure, axes = _figure(left=0.19, bottom=0.06)
    bars = axes.barh(list(shares), list(shares.values()), color=LINES["--c1"], height=0.62)
    labels = [f"{share:.1f}" for share in shares.values()]
    axes.bar_label(bars, labels, padding=3, fontsize=7, color=COLORS["--muted"])
    axes.set_xlim(0, max(shares.values()) * 1.15)
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    return figure


def _draw_tasks(tasks: list[tuple[str, float, float]]) -> Any:
    """Before and after as two dots on a line a task."""
    from matplotlib.figure import Figure

    if not tasks:
        return None
    figure = Figure(figsize=(6.4, 0.9 + 0.22 * len(tasks)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, before, after) in enumerate(tasks):
        color = LINES["--c2"] if after < before else LINES["--c1"]
        axes.plot([before, after], [place, place], color=color, linewidth=1.4)
        axes.plot(before, place, "o", color=color, markerfacecolor="white", markersize=5)
        axes.plot(after, place, "o", color=color, markersize=5)
    axes.set_yticks(range(len(tasks)), [task for task, _, _ in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.grid(axis="x")
    return figure


def _figure(left: float = 0.1, bottom: float = 0.165) -> tuple[Any, Any]:
    """Fixed margins, so that the axes of neighbouring plots line up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.7, 2.4))
    axes = figure.add_subplot()
    figure.subplots_adjust(left=left, right=0.96, bottom=bottom, top=0.91)
    return figure, axes


def is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and -math.inf < value < math.inf  # math.isfinite fails at endless integers


def _points(
    metrics: list[dict[str, Any]], key: str, scale: float, places: Iterable[float] | None = None
) -> tuple[list[float], list[float]]:
    """(places, values) in at most MAX_POINTS means of neighbouring steps; what is not finite is left out.

    places: of every step on the x axis; by default its number.
    """
    steps = [row["step"] for row in metrics] if places is None else places
    known = [(x, scale * row[key]) for x, row in zip(steps, metrics, strict=True) if is_finite(row.get(key))]
    size = math.ceil(len(known) / MAX_POINTS) or 1
    bins = [known[i : i + size] for i in range(0, len(known), size)]
    return [fmean(x for x, _ in part) for part in bins], [fmean(value for _, value in part) for part in bins]


def _rows_seen(metrics: list[dict[str, Any]]) -> list[float]:
    """After every step, by its number and its rows: lines of a run that are missing leave no gap."""
    return [float(row["step"] * (row.get("rows") or 0)) for row in metrics]


def _running_mean(values: list[float]) -> list[float]:
    """Over a twentieth of the curve, centred; the curve itself when it is short."""
    reach = len(values) // 40
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))] if reach else values


def _svg(figure: Any, name: str, title: str) -> str:
    """The figure as an inline SVG element; the salt makes its ids stable, and unlike other figures'."""
    import matplotlib

    buffer = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    svg = buffer.getvalue()
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg[svg.index("<svg") :])
    for variable, color in (COLORS | LINES).items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
