"""The pages: templates filled with numbers. Nothing in them is loaded from elsewhere and nothing runs."""

from datetime import datetime
from typing import Any

import yaml

from gist_dist.common.text import FILTERS, duration
from gist_dist.report.plots import BLOCKS, Plot
from gist_dist.report.run import Run

SECTIONS = ("scores", "training", "masking", "speed")
"""Sections of the page that have charts."""
ROLES = {
    "ap": ("Another row’s positive", "anchor"),
    "aa": ("Another row’s anchor", "anchor"),
    "pp": ("Another row’s positive", "positive"),
    "an": ("A hard negative", "anchor"),
}
"""Block -> what its candidates are, and what they are compared with."""


def render_report(run: Run, contents: dict[str, Any], plots: list[Plot]) -> str:
    """report.html of a run."""
    return render(
        "report.html.j2",
        plots,
        **contents,
        examples=run.masked_examples,
        blocks=BLOCKS,
        roles=ROLES,
        widest=max((abs(row.change) for row in run.tasks if row.change), default=1.0),
        config_text=yaml.safe_dump(_set_values(contents["config"]), sort_keys=False, allow_unicode=True, width=100),
        has_model=run.has_model,
        wall_time=_wall_time(run.environment),
    )


def render(template: str, plots: list[Plot], **values: Any) -> str:
    """A page from a template; charts of a section are groups[section], as (title, svg)."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gist_dist"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= FILTERS
    environment.globals["short_name"] = short_name
    charts = {s: [(plot.title, Markup(plot.svg)) for plot in plots if plot.section == s] for s in SECTIONS}
    return environment.get_template(template).render(groups=charts, **values)


def short_name(model: Any) -> str:
    """A Hub id as it is, the last part of a folder."""
    name = str(model)
    return name.rstrip("/").rsplit("/", 1)[-1] or name if name.startswith(("/", ".", "~")) else name


def _set_values(tree: Any) -> Any:
    """Without nulls, empty texts and empty sections; a guide of null stays, which is a choice."""
    if isinstance(tree, dict):
        kept = {key: _set_values(value) for key, value in tree.items()}
        return {key: value for key, value in kept.items() if value not in (None, "", {}, []) or key == "guide"}
    return [_set_values(value) for value in tree] if isinstance(tree, list) else tree


def _wall_time(environment: dict[str, Any]) -> str | None:
    """From the first start to the end, pauses included."""
    try:
        started, finished = (datetime.fromisoformat(str(environment[key])) for key in ("started", "finished"))
        return duration((finished - started).total_seconds())
    except (KeyError, ValueError, TypeError):
        return None
