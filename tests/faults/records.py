"""What every injected fault cost, kept as a line of JSON each, and the table of docs/reliability.md made of them.

python tests/faults/records.py      rewrite the table between its markers
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "reliability.md"
FILE = Path(os.environ.get("GIST_CHAOS_RECORDS", ROOT / "docs" / "reliability.jsonl"))
BEGIN, END = "<!-- table: made by tests/faults/records.py -->", "<!-- end of table -->"


@dataclass
class Record:
    """One injected fault, and how its run ended."""

    scenario: str
    """The test."""
    fault: str
    """As the table names it."""
    seed: int
    moment: str
    """When it was injected: 'step 31 + 12 ms'."""
    recomputed: int | None
    """Steps that were done, and were done once more."""
    seconds: float | None
    """From the fault until training went on; None: it never stopped, or was not meant to go on by itself."""
    plain_start: float
    """Seconds of the same session's undisturbed run from the command to its first step."""
    resubmitted: bool = False
    """Whether the command was given once more."""
    notes: str = ""
    """What the user was told."""
    steps_complete: bool | None = None
    loss_difference: float | None = None
    weight_difference: float | None = None
    """Largest, of the final model and the undisturbed run's."""
    commit: str = ""
    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M", time.gmtime()))

    @property
    def starts(self) -> float | None:
        """Seconds until training went on, in plain starts."""
        return None if self.seconds is None else self.seconds / self.plain_start


def append(records: Iterable[Record]) -> None:
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with open(FILE, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def forget(scenarios: set[str]) -> None:
    """Drop the records of scenarios that are about to be run again."""
    kept = [record for record in read() if record.scenario not in scenarios]
    FILE.unlink(missing_ok=True)
    if kept:
        append(kept)


def read() -> list[Record]:
    return [Record(**json.loads(line)) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def table(records: list[Record]) -> str:
    lines = [
        "| fault | injected | steps done again | until training goes on, in plain starts | final weights |",
        "|---|---:|---:|---:|---|",
    ]
    groups = {fault: [r for r in records if r.fault == fault] for fault in sorted({r.fault for r in records})}
    for fault, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        again = _spread([r.recomputed for r in group if r.recomputed is not None], 0)
        starts = _spread([r.starts for r in group if r.starts is not None], 2)
        submitted = " (command given again)" if any(r.resubmitted for r in group) else ""
        lines.append(f"| {fault} | {len(group)} | {again} | {starts}{submitted} | {_weights(group)} |")
    starts = sorted({round(record.plain_start) for record in records})
    commits = sorted({record.commit[:7] + "+" * record.commit.endswith("-changed") for record in records})
    lines += [
        "",
        f"Median (range). A plain start, from the command to its first step, took {_range(starts)} s. Commit",
        f"{', '.join(commits)}; {min(r.when for r in records)} to {max(r.when for r in records)} UTC, "
        f"{os.cpu_count()} cores.",
    ]
    return "\n".join(lines)


def _weights(group: list[Record]) -> str:
    compared = [r for r in group if r.weight_difference is not None]
    if not compared:
        return "–"
    if not all(r.steps_complete for r in compared):
        return "**steps missing or twice**"
    largest = max(r.weight_difference for r in compared)
    return "identical" if largest == 0 else f"differ by ≤ {largest:.1g}"


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def _range(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"


def main() -> None:
    records = read()
    text = PAGE.read_text(encoding="utf-8")
    if not records or BEGIN not in text or END not in text:
        sys.exit(f"no records in {FILE}, or no markers in {PAGE}")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(records)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
