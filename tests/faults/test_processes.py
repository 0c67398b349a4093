"""Processes of a run are killed, stopped or interrupted at random moments."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.conftest import CHECKPOINT_EVERY, REPEATS, STEPS
from faults.product import Run, inside, kill, name_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

INTERRUPTED = 130


@pytest.mark.parametrize("part", [1, 2])
def test_killed_workers(started, record, ends_as_undisturbed, random_moments, part):
    """Of either rank, within a step, a checkpoint or whatever else goes on; some while the group starts again."""
    kills = REPEATS or 12
    run = started(f"killed-workers-{part}", cluster={"max_failures": 3})
    run.start()
    for step in sorted(random_moments.sample(range(2, STEPS - 10), kills)):
        rank, again = random_moments.randint(0, 1), random_moments.random() < 0.2
        name = "SIGKILL of the worker of rank 0" if rank == 0 else "SIGKILL of the worker of rank 1"
        moment = reach(run, step, random_moments)
        fault = run.position()
        killed = run.worker(rank)
        kill(killed, signal.SIGKILL)
        if again:
            record(fault=name, moment=moment)
            run.wait_for(lambda r=rank, k=killed: run.worker(r) not in (None, k), "the worker was started again")
            moment, fault = f"while starting again after {moment}", run.position()
            kill(run.worker(rank), signal.SIGKILL)
        recovery = run.goes_on(fault)
        record(fault=name, moment=moment, recomputed=recovery.recomputed, seconds=recovery.seconds)
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def test_killed_driver(started, record, ends_as_undisturbed, random_moments):
    """Then the same command at once, while what the killed one started may still be ending."""
    run = started("killed-driver")
    run.start()
    for step in sorted(random_moments.sample(range(2, STEPS - 10), REPEATS or 3)):
        moment = reach(run, step, random_moments)
        fault = run.position()
        kill(run.command.pid, signal.SIGKILL)
        run.command.wait()
        run.start()
        recovery = run.goes_on(fault)
        record(fault="SIGKILL of the driver", moment=moment, resubmitted=True, recomputed=recovery.recomputed,
               seconds=recovery.seconds)  # fmt: skip
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)
    assert not left_after(run, 60)


def test_stopped_worker(started, record, ends_as_undisturbed, random_moments):
    """SIGSTOP: it answers nobody, and is taken for lost."""
    run = started("stopped-worker")
    run.start()
    for rank in (0, 1):
        moment = reach(run, random_moments.randint(2, STEPS // 2) + rank * STEPS // 2 - 10, random_moments)
        fault = run.position()
        stopped = run.worker(rank)
        kill(stopped, signal.SIGSTOP)
        recovery = run.goes_on(fault, timeout=900)
        assert not name_of(stopped), "the stopped worker still lives"
        record(fault="SIGSTOP of a worker", moment=moment, recomputed=recovery.recomputed, seconds=recovery.seconds)
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def test_hung_step(started, record, ends_as_undisturbed, random_moments, tmp_path):
    """A thread that never returns, in a process that answers Ray's health checks."""
    step = random_moments.randint(5, STEPS - 10)
    fault = {"fault": "hang", "rank": random_moments.randint(0, 1), "step": step, "once": str(tmp_path / "hung")}
    run = started("hung", inside(**fault), cluster={"hang_timeout_s": 60})
    run.start()
    run.wait_for((tmp_path / "hung").exists, "the hang")
    recovery = run.goes_on(run.position(), timeout=900)
    said = run.said(r"step \d+ made no progress for \d+ s")
    assert said, run.tail()
    record(fault="a step that hangs (hang_timeout_s = 60)", moment=f"in step {step}", notes=said,
           recomputed=recovery.recomputed, seconds=recovery.seconds)  # fmt: skip
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def test_refused_memory(started, record, ends_as_undisturbed, random_moments, tmp_path):
    """A worker's next allocation fails, once: it is started again, and the sentence names what to lower."""
    step = random_moments.randint(5, STEPS - 10)
    fault = {"fault": "memory", "rank": random_moments.randint(0, 1), "step": step, "once": str(tmp_path / "limited")}
    run = started("refused-memory", inside(**fault))
    run.start()
    run.wait_for((tmp_path / "limited").exists, "the limit")
    recovery = run.goes_on(run.position())
    said = run.said(r"a worker ran out of memory.*")
    assert "batch.activation_gb (now 1)" in said or "batch.loss_gb" in said, run.tail()
    record(fault="a worker's allocation fails", moment=f"from step {step}", notes=said,
           recomputed=recovery.recomputed, seconds=recovery.seconds)  # fmt: skip
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def test_killed_for_memory(started, record, ends_as_undisturbed, random_moments):
    """By the kernel, again and again: the command ends with what to lower, and given again goes on from there."""
    run = started("killed-for-memory", cluster={"max_failures": 1})
    run.start()
    moment = reach(run, random_moments.randint(CHECKPOINT_EVERY + 1, STEPS // 2), random_moments)
    fault = run.position()
    with little_memory() as give_little:
        confined = None
        for _ in range(2):
            confined = run.wait_for(lambda k=confined: run.worker(0) not in (None, k) and run.worker(0), "a worker")
            give_little(confined)
        assert run.finish() == 1, run.tail()
    said = run.said(r"gist-dist: training stopped: .*")
    assert "batch.activation_gb (now 1)" in said and "batch.chunk_tokens (now 256)" in said, said
    run.start("batch.activation_gb=0.5")
    recovery = run.goes_on(fault)
    record(fault="out of memory: the kernel kills a worker, twice", moment=moment, resubmitted=True, notes=said,
           recomputed=recovery.recomputed, seconds=recovery.seconds)  # fmt: skip
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def test_interrupted_once(started, record, ends_as_undisturbed, random_moments):
    """ctrl-C: the step is finished and kept, so that the same command loses nothing."""
    run = started("interrupted-once")
    run.start()
    for step in sorted(random_moments.sample(range(2, STEPS - 60), 2)):
        moment = reach(run, step, random_moments)
        run.interrupt()
        assert run.finish(60) == INTERRUPTED, run.tail()
        assert not left_after(run, 60)
        fault = run.position()
        run.start()
        recovery = run.goes_on(fault)
        assert recovery.recomputed == 0
        record(fault="ctrl-C once", moment=moment, resubmitted=True, recomputed=0, seconds=recovery.seconds)
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def test_interrupted_twice(started, record, ends_as_undisturbed, random_moments):
    """The second ctrl-C ends the command without waiting for anything."""
    run = started("interrupted-twice")
    run.start()
    moment = reach(run, random_moments.randint(2, STEPS - 60), random_moments)
    fault = run.position()
    run.interrupt()
    time.sleep(random_moments.uniform(0.05, 0.3))
    run.interrupt()
    assert run.finish(30) == INTERRUPTED, run.tail()
    assert not left_after(run, 60)
    run.start()
    recovery = run.goes_on(fault)
    record(fault="ctrl-C twice", moment=moment, resubmitted=True, recomputed=recovery.recomputed,
           seconds=recovery.seconds)  # fmt: skip
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def test_second_command_of_one_name_is_refused(started, ends_as_undisturbed):
    """And the first goes on undisturbed."""
    run, second = started("one-name"), started("one-name")
    run.start()
    run.wait_for_step(1)
    second.start()
    assert second.finish(120) == 1
    assert f"process {run.command.pid}" in second.output.read_text()
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def reach(run: Run, step: int, draw: random.Random) -> str:
    """Wait for the step and a random part of the next ones; says when that is."""
    run.wait_for_step(step)
    milliseconds = draw.randint(0, 60)
    time.sleep(milliseconds / 1000)
    return f"step {step} + {milliseconds} ms"


@contextmanager
def little_memory() -> Iterator[Callable[[int], None]]:
    """Move a process to a control group in which the kernel kills it at its next few allocations."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (old if old.is_dir() else new) / f"gist-chaos-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(2**20))
    except OSError:
        pytest.skip("no control group can be made here: takes root and a writable /sys/fs/cgroup")
    try:
        yield lambda pid: (group / "cgroup.procs").write_text(str(pid))
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            kill(int(pid), signal.SIGKILL)
        time.sleep(1)
        group.rmdir()


def left_after(run: Run, seconds: float) -> list[str]:
    """Command lines of its processes that live on for so long."""
    deadline = time.monotonic() + seconds
    while (left := run.processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [f"{pid} {name_of(pid)}" for pid in left]
