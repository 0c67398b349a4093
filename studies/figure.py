"""A figure of a study's scores: one panel for each value of the last swept key but one, a line for each arm.

python studies/figure.py studies/batch-size/results.json      writes scores.svg beside it
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from gist_dist.report.plots import LINES, STYLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="report.json of a sweep over two keys")
    results = parser.parse_args().results
    with matplotlib.rc_context(STYLE):
        draw(json.loads(results.read_text())["settings"]).savefig(results.with_name("scores.svg"))


def draw(settings: list[dict[str, Any]]) -> Figure:
    panel_key, x_key = settings[0]["values"]
    panels = list(dict.fromkeys(setting["values"][panel_key] for setting in settings))
    arms = list(dict.fromkeys(setting["arm"] for setting in settings))
    figure = Figure(figsize=(2.4 * len(panels), 2.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for arm, color in zip(arms, LINES.values(), strict=False):
            own = [s for s in settings if s["arm"] == arm and s["values"][panel_key] == panel]
            axes.errorbar(
                [setting["values"][x_key] for setting in own], [setting["mean"] for setting in own],
                yerr=[setting["sd"] or 0 for setting in own], color=color, marker="o", markersize=4, label=arm,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks([setting["values"][x_key] for setting in own], [f"{s['values'][x_key]:g}" for s in own])
        axes.minorticks_off()
        axes.set_title(f"{panel_key.split('.')[-1].replace('_', ' ')} {panel:,}", fontsize=8)
        axes.set_xlabel(x_key.split(".")[-1].replace("_", " "))
    figure.axes[0].set_ylabel("mean of the tasks, points")
    figure.axes[0].legend(loc="lower left")
    return figure


if __name__ == "__main__":
    main()
