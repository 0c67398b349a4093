"""A run of the real product, started as a user starts it: its processes, how far it is, and what it ends with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import load_file

from gist_dist.common.events import EVENTS, read_events

MARK = "GIST_CHAOS_MARK"
"""A variable that every process of a run inherits, so that it is found though its parent was killed."""


class Outcome(NamedTuple):
    """How a run compares with the undisturbed one."""

    steps_complete: bool
    """Every step has exactly one whole line in metrics.jsonl, in order."""
    loss_difference: float
    """Largest difference of a step's loss."""
    weight_difference: float
    """Largest difference of a weight of the final model; 0: identical bits."""


@dataclass(frozen=True)
class Position:
    """How far a run was at some time."""

    time: float
    step: int
    """The last that metrics.jsonl has a line of; 0: none."""
    metrics: int
    """Which file metrics.jsonl is: a run that starts again writes a new one."""
    log: int
    """Bytes of the events that the run has logged."""


class Recovery(NamedTuple):
    seconds: float
    """From the fault to the first step after it."""
    recomputed: int
    """Steps that were done, and were done once more."""


class Run:
    """One run folder, and the command that makes it."""

    def __init__(self, folder: Path, recipe: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = Path(recipe["output_dir"]) / recipe["name"]
        self.recipe = folder / f"{recipe['name']}.yaml"
        self.recipe.write_text(json.dumps(recipe))
        self.num_steps = recipe["optim"]["steps"]
        self.output = folder / f"{recipe['name']}.out"
        self.mark = f"{os.getpid()}-{recipe['name']}"
        self.environment = clean_environment(self.mark) | (environment or {})
        self.command: subprocess.Popen[bytes] | None = None
        self.started = 0.0

    # ---- the command

    def start(self, *overrides: str) -> None:
        """`gist-dist train`, leading a process group as a command in a terminal does."""
        assert self.command is None or self.command.poll() is not None, "the command before still runs"
        command = [sys.executable, "-m", "gist_dist.cli", "train", str(self.recipe), *overrides]
        with open(self.output, "ab") as output:
            self.started = time.monotonic()
            self.command = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def finish(self, timeout: float = 400) -> int:
        """Wait for the command; its exit status."""
        try:
            return self.command.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the command did not end within {timeout} s\n{self.tail()}") from None

    def interrupt(self) -> None:
        """ctrl-C: the terminal sends it to the whole process group."""
        os.killpg(self.command.pid, signal.SIGINT)

    def tail(self) -> str:
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-40:])

    def said(self, pattern: str) -> str:
        """What the command or a worker wrote that fits the pattern; '' if none did."""
        logs = [self.output, *sorted((self.folder / "logs").glob("*.log"))]
        for log in logs:
            if found := re.search(pattern, log.read_text(errors="replace")):
                return found.group(0)
        return ""

    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl; JSONDecodeError for a torn one."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    # ---- how far it is

    def position(self) -> Position:
        step, file = last_step(self.folder / "metrics.jsonl")
        log = self.folder / "logs" / EVENTS
        return Position(time.monotonic(), step, file, log.stat().st_size if log.exists() else 0)

    def wait_for(self, reached: Callable[[], Any], what: str, timeout: float = 300) -> Any:
        """What ``reached`` gives, once that is true; fails when the command ends before."""
        deadline = time.monotonic() + timeout
        while not (value := reached()):
            ended = self.command.poll() is not None
            assert not ended, f"the command ended ({self.command.returncode}) before {what}\n{self.tail()}"
            assert time.monotonic() < deadline, f"{timeout} s passed before {what}\n{self.tail()}"
            time.sleep(0.02)
        return value

    def wait_for_step(self, step: int, timeout: float = 300) -> Position:
        def reached() -> Position | None:
            position = self.position()
            return position if position.step >= step else None

        return self.wait_for(reached, f"step {step}", timeout)

    def goes_on(self, fault: Position, timeout: float = 400) -> Recovery:
        """Wait until a restarted group has done a step."""
        last_before, kept = fault.step, 0

        def again() -> Position | None:
            nonlocal last_before, kept
            position = self.position()
            if position.metrics == fault.metrics:
                last_before = max(last_before, position.step)
                return None
            kept = self._resumed_after(fault)
            return position if position.step > kept else None

        position = self.wait_for(again, "training went on", timeout)
        return Recovery(position.time - fault.time, last_before - kept)

    def _resumed_after(self, fault: Position) -> int:
        """The step of the last checkpoint that was taken up after the fault; 0 if the run began anew."""
        with open(self.folder / "logs" / EVENTS, "rb") as log:
            log.seek(fault.log)
            events = read_events(log.read().decode(errors="replace").splitlines())
        return next((event["resumed"] for event in reversed(list(events)) if "resumed" in event), 0)

    # ---- its processes

    def processes(self) -> list[int]:
        """All that the command started, and those started."""
        return marked_processes(self.mark)

    def worker(self, rank: int) -> int | None:
        """The process of that rank: the one that has its log open."""
        log = self.folder / "logs" / ("train.log" if rank == 0 else f"worker-{rank}.log")
        others = {self.command.pid, os.getpid()}  # the command reads rank 0's log
        return next((pid for pid in holding(log) if pid not in others), None)

    def end(self) -> list[int]:
        """Kill what is left of it; which processes that were."""
        left = self.processes()
        for pid in left:
            kill(pid, signal.SIGKILL)
        if self.command:
            self.command.wait()
        return left


def compare(run: Run, undisturbed: Run) -> Outcome:
    """Of two runs that ended."""
    lines, expected = run.lines(), undisturbed.lines()
    losses = {line["step"]: line["loss"] for line in lines}
    weights, wanted = (load_file(r.folder / "model" / "model.safetensors") for r in (run, undisturbed))
    assert weights.keys() == wanted.keys()
    return Outcome(
        [line["step"] for line in lines] == list(range(1, run.num_steps + 1)),
        max(abs(losses.get(line["step"], float("inf")) - line["loss"]) for line in expected),
        max(float(abs(weights[name] - tensor).max()) for name, tensor in wanted.items()),
    )


def clean_environment(mark: str) -> dict[str, str]:
    """A user's, without what tests set, and no Ray of somebody else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GIST_"))}
    return environment | {MARK: mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def inside(**plan: Any) -> dict[str, str]:
    """Environment of a run with something done inside of its workers; see inside/sitecustomize.py."""
    folder = Path(__file__).parent / "inside"
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "GIST_CHAOS_INSIDE": json.dumps(plan)}


def marked_processes(mark: str) -> list[int]:
    wanted = f"{MARK}={mark}".encode()
    return [pid for pid, folder in _processes() if wanted in _read(folder / "environ").split(b"\0")]


def name_of(pid: int) -> str:
    """The command line; '' if the process is gone."""
    return _read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode(errors="replace").strip()


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def holding(path: Path) -> Iterator[int]:
    for pid, folder in _processes():
        try:
            if any(os.readlink(link) == str(path) for link in (folder / "fd").iterdir()):
                yield pid
        except OSError:  # ended meanwhile
            continue


def _processes() -> Iterator[tuple[int, Path]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            yield int(folder.name), folder


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def last_step(metrics: Path) -> tuple[int, int]:
    """The last step with a whole line, and which file it is."""
    try:
        with open(metrics, "rb") as file:
            status = os.fstat(file.fileno())
            file.seek(max(0, status.st_size - 8192))
            whole, _, _ = file.read().rpartition(b"\n")
    except OSError:
        return 0, 0
    line = whole.rpartition(b"\n")[2]
    return (json.loads(line)["step"] if line else 0), status.st_ino
