"""What a person sees on a terminal while a command runs: a few lines at the bottom that are drawn again and again,
with everything else scrolling above. Where there is no terminal, the plain lines of the log are all there is.

It only looks: at the fields of log records (gist_dist.common.events), of which those of progress are shown in place
instead of scrolling by, and at metrics.jsonl.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_dist.common.events import TRAINING, fields_of
from gist_dist.common.redact import printable
from gist_dist.common.text import clock, plural
from gist_dist.runs.metrics_file import METRICS, Tail

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SHOWN_STEPS = 20
"""Loss, speed and time left are means over this many steps."""


@contextmanager
def live_view(name: str, run_dir: Path | None = None) -> Iterator[None]:
    """Show the log as said above while the block runs; run_dir: of a training, whose metrics.jsonl is followed."""
    root, plain = logging.getLogger(), list(logging.getLogger().handlers)
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.is_dumb_terminal:
        yield
        return
    view = View(name, run_dir)
    handler = LiveHandler(view, console)
    handler.setFormatter(plain[0].formatter if plain else None)
    root.handlers = [handler]
    try:
        with Live(get_renderable=view.render, console=console, refresh_per_second=4, transient=True):
            yield
    finally:
        root.handlers = plain


class LiveHandler(logging.Handler):
    """Lines of progress go into the view, all others above it."""

    def __init__(self, view: "View", console: "Console") -> None:
        super().__init__()
        self.view, self.console = view, console

    def emit(self, record: logging.LogRecord) -> None:
        line, fields = self.format(record), fields_of(record)
        self.view.hear(line, fields)
        if not fields.get("progress"):
            self.console.print(line, markup=False)


class View:
    """What is drawn: phase, the last line of progress, and of a training its newest metrics."""

    def __init__(self, name: str, run_dir: Path | None = None) -> None:
        self.name, self.run_dir = name, run_dir
        self.phase, self.line = "starting", ""
        self.phase_began = time.monotonic()
        self.metrics = Tail(run_dir / METRICS, SHOWN_STEPS) if run_dir else None
        self.num_steps: int | None = None

    def hear(self, line: str, fields: dict[str, Any]) -> None:
        """fields: of its record."""
        phase = fields.get("phase", self.phase)
        if phase != self.phase:
            self.phase, self.line, self.phase_began = phase, "", time.monotonic()
            if phase == TRAINING and self.run_dir:
                self.num_steps = _planned_steps(self.run_dir)
        if fields.get("progress"):
            self.line = line

    def render(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        steps = self.metrics.newest() if self.metrics and self.phase == TRAINING else []
        phase = f"{self.phase} on {plural(steps[-1]['world_size'], 'worker')}" if steps else self.phase
        heading = Text.assemble(("● ", "cyan"), (self.name, "bold"), f"  {phase}", (f"  {self._clock()}", "dim"))
        if steps:
            return Group(heading, *_training(steps, self.num_steps))
        return Group(heading, Text(f"  {self.line}", "dim")) if self.line else heading

    def _clock(self) -> str:
        return clock(time.monotonic() - self.phase_began)


def _training(steps: list[dict[str, Any]], num_steps: int | None) -> list["RenderableType"]:
    """A bar and three lines. Speed and loss are means of the steps given, the rest is of the last one."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    last = steps[-1]
    seconds = _mean(row["seconds"]["step"] for row in steps)
    position = f"step {last['step']:,}" + (f" of {num_steps:,}" if num_steps else "")
    left = f"{clock(seconds * (num_steps - last['step']))} left" if num_steps else ""
    bar = Table.grid(padding=(0, 2, 0, 0))
    bar.add_row(
        f"  {position}", ProgressBar(total=num_steps, completed=last["step"], width=30), f"{seconds:.2f} s a step", left
    )
    blocks = [f"{block} {100 * share:.1f}" for block in ("ap", "aa", "pp", "an") if (share := _masked(last, block))]
    rows = [
        ("loss", f"{_mean(row['loss'] for row in steps):.4f}"), ("gradient norm", _short(last["grad_norm"])),
        ("learning rate", f"{last['learning_rate']:.2e}"),
        ("pairs/s", f"{_mean(row['pairs_per_second'] for row in steps):,.0f}"),
        ("tokens/s", f"{_mean(row['tokens_per_second'] for row in steps):,.0f}"),
        ("padding", f"{last['padding_fraction']:.1%}"),
        ("masked", f"{last['masked_fraction']:.1%}" + (f" ({', '.join(blocks)})" if blocks else "")),
        *[("masked weight", f"{last['masked_weight']:.1%}")] * (last.get("masked_weight") is not None),
        ("rows without negatives", f"{last['rows_without_negatives']:,}"),
        ("memory", f"{last['peak_memory_bytes'] / 1e9:.1f} GB a worker"),
    ]  # fmt: skip
    table = Table.grid(padding=(0, 3, 0, 0))
    for first in range(0, len(rows), 3):
        table.add_row(*(_cell(name, value) for name, value in rows[first : first + 3]))
    return [bar, table]


def _cell(name: str, value: str) -> "RenderableType":
    from rich.text import Text

    return Text.assemble("  ", (f"{name} ", "dim"), printable(value))


def _masked(row: dict[str, Any], block: str) -> float | None:
    return row.get(f"masked_fraction_{block}")


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _mean(values: Iterator[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def _planned_steps(run_dir: Path) -> int | None:
    try:
        steps = json.loads((run_dir / "data.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None
