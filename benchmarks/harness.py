"""Measuring two or more sides against each other in one run, and publishing what came out.

What a benchmark says is a ratio of sides measured in turns (a, b, b, a, …) in the same processes, so that a noisy or
throttled machine hits all alike. Every number is a median with its range. Results are JSON with the question, the
control, versions, commit and machine, beside a Markdown table and a plot; results/README.md has one line a claim.
"""

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gist_dist.core.collectives import World, barrier, broadcast_object
from gist_dist.runs.folder import describe_environment

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
"""The developers' data pack: training rows and offline MTEB tasks."""
RESULTS = Path(__file__).parent / "results"
BENCHMARKS = (
    "loss_stage", "step_short", "step_mixed", "step_long", "guide", "guide_larger", "ceiling", "workers", "uneven",
    "gather_precision", "batch_scaling", "batch_quality", "gpu",
)  # fmt: skip
"""In the order of results/README.md; results of other names come after them."""


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Samples:
    """Of one side: every timed call."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """Most memory that a call held at once, in all: resident on a CPU, allocated on a GPU."""
    added_bytes: int = 0
    """The most that a call held above what was there before it."""

    @property
    def median(self) -> float:
        return median(self.seconds)

    def told(self) -> dict[str, Any]:
        """For the results file."""
        seconds = {"median": self.median, "min": min(self.seconds), "max": max(self.seconds), "all": self.seconds}
        return {"seconds": seconds, "peak_bytes": self.peak_bytes, "added_bytes": self.added_bytes}


def interleave(
    sides: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    budget_s: float = math.inf,
    cold: Sequence[str] = (),
    world: World | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Samples]:
    """Call every side once for its memory, then all sides in turns for their time, every other round in reverse.

    On a CPU a side is called twice in its turn and the second call is timed: as in a training, where a step follows a
    step and finds the memory of the last one still the process's, and not what the other side has left.

    budget_s: no further round begins when it would end after so many seconds; one round always runs. cold: sides that
    take too long to be called once more; their memory is that of the first turn. world: every worker calls this with
    the same sides; a call then ends when it has ended on all.
    """
    world, device = world or World(), torch.device(device)
    samples = {name: Samples() for name in sides}
    for name, call in sides.items():
        if name not in cold:
            with measured_memory(samples[name], device):
                call()
    started = time.perf_counter()
    for number in range(repeats):
        took = time.perf_counter() - started
        if number and broadcast_object(took * (number + 1) / number > budget_s, world):
            break
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            with measured_memory(samples[name], device) if number == 0 and name in cold else nullcontext():
                if device.type == "cpu":
                    sides[name]()
                samples[name].seconds.append(timed(sides[name], world, device))
    return samples


def timed(call: Callable[[], Any], world: World, device: torch.device) -> float:
    """Seconds until it has ended on every worker."""
    gc.collect()
    barrier(world)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    barrier(world)
    return time.perf_counter() - started


@contextmanager
def measured_memory(into: Samples, device: torch.device) -> Iterator[None]:
    before = _reset_peak(device)
    yield
    into.peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    into.added_bytes = into.peak_bytes - before


def ratio(slow: Samples, fast: Samples) -> dict[str, float]:
    """How many times faster; its range is over the rounds, each side compared with the other of the same round."""
    rounds = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return {"median": median(rounds), "min": min(rounds), "max": max(rounds), "rounds": len(rounds)}


def _reset_peak(device: torch.device) -> int:
    """Bytes in use now, from which on the peak is counted."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but is still the process's would hide new use
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the resident set's high-water mark
    return _status("VmRSS")


def _status(name: str) -> int:
    """A size in bytes from /proc; 0 where there is none (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


# ---- processes -----------------------------------------------------------------------------------


def run_group(function: Callable[..., Any], world_size: int, threads: int, *arguments: Any) -> list[Any]:
    """function(world, *arguments) in so many processes of one gloo group, as torchrun would start them.

    Returns what each returned, by rank; RuntimeError with the traceback if one failed.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        common = (function, world_size, threads, folder, arguments)
        processes = [context.Process(target=_rank, args=(rank, *common)) for rank in range(world_size)]
        for process in processes:
            process.start()
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            processes[0].join(0.2)
        for process in processes:  # others may wait for a failed one in a collective
            if any(p.exitcode for p in processes):
                process.kill()
            process.join()
        outcomes = [pickle.loads(path.read_bytes()) for path in sorted(Path(folder).glob("result-*"))]
    failures = [outcome["error"] for outcome in outcomes if "error" in outcome]
    if failures or len(outcomes) < world_size:
        raise RuntimeError("\n".join(failures) or "a process of the group was killed")
    return [outcome["value"] for outcome in outcomes]


def _rank(rank: int, function: Callable[..., Any], world_size: int, threads: int, folder: str, arguments: Any) -> None:
    import torch.distributed as dist

    warnings.simplefilter("ignore", FutureWarning)  # of torch.distributed, at what both sides call
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        outcome = {"value": function(World.current(), *arguments)}
    except BaseException:
        outcome = {"error": f"rank {rank}:\n{traceback.format_exc()}"}
    (Path(folder) / f"result-{rank:04d}").write_bytes(pickle.dumps(outcome))
    if "error" in outcome:
        os._exit(1)
    dist.destroy_process_group()


# ---- publishing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One line of results/README.md."""

    what: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "×"

    @property
    def holds(self) -> bool | None:
        """None where nothing was promised."""
        if self.at_least is None and self.at_most is None:
            return None
        low = -math.inf if self.at_least is None else self.at_least
        return low <= self.value <= (math.inf if self.at_most is None else self.at_most)

    @property
    def goal(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return "" if self.at_most is None else f"≤ {self.at_most:g}"


Columns = Mapping[str, Callable[[Any], str] | str]
"""Heading → what to show of a result: a function, or the name of one of its keys."""
Draw = Callable[[Any], None]
"""Draws on matplotlib Axes."""


def publish(
    name: str,
    document: dict[str, Any],
    columns: Columns,
    claims: Sequence[Claim] = (),
    draw: Draw | None = None,
    folder: Path = RESULTS,
    quiet: bool = False,
) -> None:
    """Write name.json, name.md and name.svg, and print the table (not if quiet).

    document: "question", "control", "settings" and "results" (one flat dict a case).
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = [asdict(claim) | {"holds": claim.holds, "goal": claim.goal} for claim in claims]
    document = {"benchmark": name, "command": _command(), "environment": environment(), "claims": told, **document}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1, default=str) + "\n")
    if draw:
        plot(folder / f"{name}.svg", draw)
    page = [f"# {name}", "", document["question"], "", f"Control: {document['control']}", ""]
    page += [table(document["results"], columns), ""]
    page += [f"- {line_of(claim)}" for claim in told] + [""] * bool(told)
    page += [f"![{name}]({name}.svg)", ""] if draw else []
    page += [f"`{document['command']}`", "", described(document["environment"]), ""]
    (folder / f"{name}.md").write_text("\n".join(page))
    write_overview(folder)
    if not quiet:
        print(table(document["results"], columns), *(f"- {line_of(claim)}" for claim in told), sep="\n", flush=True)


def _command() -> str:
    """Without the folders of this machine."""
    given = re.sub(r" --(results|work|[a-z]+-folder)[ =]\S+", "", " ".join(["", *map(shlex.quote, sys.argv[1:])]))
    return f"python {os.path.relpath(sys.argv[0], ROOT)}{given}"


def line_of(claim: Mapping[str, Any]) -> str:
    goal = f" (goal {claim['goal']}: {'reached' if claim['holds'] else 'NOT reached'})" if claim["goal"] else ""
    return f"{claim['what']}: **{number(claim['value'])}{claim['unit']}**{goal}"


def write_overview(folder: Path = RESULTS) -> None:
    """README.md: one line for each claim of every result in the folder."""
    documents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    documents = [document for document in documents if document.get("claims")]
    if not documents:
        return
    order = {name: place for place, name in enumerate(BENCHMARKS)}
    documents.sort(key=lambda d: (order.get(d["benchmark"], len(order)), d["benchmark"]))
    rows = [
        claim | {"from": f"[{name}]({name}.md)", "environment": document["environment"]}
        for name, document in ((document["benchmark"], document) for document in documents)
        for claim in document["claims"]
    ]
    columns: Columns = {
        "benchmark": "from",
        "what": "what",
        "measured": lambda row: f"{number(row['value'])}{row['unit']}",
        "goal": "goal",
        "": lambda row: {True: "reached", False: "**not reached**", None: ""}[row["holds"]],
        "commit": lambda row: short(row["environment"]["git_commit"]),
        "machine": lambda row: row["environment"]["gpu"] or f"{row['environment']['cores']} CPU cores",
    }
    intro = (
        "# Benchmarks\n\nWritten by the scripts in `benchmarks/`; `make bench` runs a short version of all. Each name "
        "leads to the whole table with question, control, command, versions and plot. Ratios are of sides measured in "
        "turns in one run; absolute times hold for the machine only.\n"
    )
    (folder / "README.md").write_text(f"{intro}\n{table(rows, columns)}\n")


def table(results: Iterable[Mapping[str, Any]], columns: Columns) -> str:
    """Markdown. A value that a result lacks is shown as a dash."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        cells = []
        for show in columns.values():
            try:
                cells.append(str(result[show] if isinstance(show, str) else show(result)))
            except (KeyError, TypeError):
                cells.append("–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, draw: Draw) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same numbers give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    draw(axes)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def number(value: float) -> str:
    """Three significant digits, thousands with commas."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def spread(values: Mapping[str, Any], unit: str = "") -> str:
    """Median and range."""
    if len(values.get("all", [])) == 1 or values.get("rounds") == 1:
        return f"{number(values['median'])}{unit}"
    return f"{number(values['median'])}{unit} ({number(values['min'])}–{number(values['max'])})"


def seconds_of(result: Mapping[str, Any]) -> dict[str, str]:
    """Side → its time, for every side that a result has."""
    timed = {name: value for name, value in result.items() if isinstance(value, dict) and "seconds" in value}
    return {name: spread(value["seconds"], " s") for name, value in timed.items()}


def say(line: str) -> None:
    """What has been measured so far; the tables go to standard output."""
    print(line, file=sys.stderr, flush=True)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def short(commit: str | None) -> str:
    return "" if commit is None else commit[:7] + ("+" if commit.endswith("-changed") else "")


def environment() -> dict[str, Any]:
    """Versions, commit and machine; a commit ending in -changed had edits in gist_dist."""
    import importlib.metadata

    told = describe_environment()
    try:
        told["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        told["triton"] = None
    # A copy of the tree without its history can be told what it is a copy of.
    told["git_commit"] = told.get("git_commit") or os.environ.get("GIST_DIST_COMMIT")
    cuda = torch.cuda.is_available()
    return told | {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if cuda else None,
        "load_average": os.getloadavg()[0],
        "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def described(environment: Mapping[str, Any]) -> str:
    machine = environment["gpu"] or f"{environment['cpu']}, {environment['cores']} cores"
    packages = ("torch", "transformers", "sentence_transformers", "triton")
    versions = ", ".join(f"{name} {environment[name]}" for name in packages if environment.get(name))
    return (
        f"{machine}, {environment['threads']} threads; commit {short(environment['git_commit'])}; {versions}; "
        f"{environment['when']}, load {environment['load_average']:.1f} at the end."
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


# ---- command line --------------------------------------------------------------------------------


def parser(doc: str) -> argparse.ArgumentParser:
    """With the flags that all benchmarks share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=5, help="timed rounds")
    made.add_argument("--budget", type=float, default=600, help="seconds for the rounds of one case; one always runs")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="of a single process")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder for what comes out")
    made.add_argument("--work", type=Path, default=ROOT / "runs" / "bench", help="folder for models and prepared data")
    return made


def model_flags(made: argparse.ArgumentParser) -> None:
    """For scripts that take real models."""
    made.add_argument("--student", default="minilm", help="minilm, minilm-l2, a folder, or random:SHAPE (see sides.py)")
    made.add_argument("--guide", default="minilm", help="likewise")
    made.add_argument("--max-tokens", type=int, default=256, help="longer texts are cut, on both sides")
    made.add_argument(
        "--data-folder", type=Path, default=ROOT.parent / "shared/data/train", help="made-up rows without it"
    )


def start(arguments: argparse.Namespace) -> None:
    """What every script does first."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(arguments.threads)
    arguments.work = arguments.work.absolute()
