"""The one pool that hands work to Ray: lost pieces, failures, deadlines, and what is left when its caller goes."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import ray

from gist_dist.common.errors import UserError
from gist_dist.on_ray.tasks.pool import Answer, Failed, Late, Lost, Pool, failure

pytestmark = pytest.mark.ray
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes do not find this module


def work(folder: str, number: int) -> int:
    """1 dies the first time, 2 raises, 3 has a mistake of the user's, all others give their square."""
    marker = Path(folder) / str(number)
    if number == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 2:
        raise ValueError("two")
    if number == 3:
        raise UserError("three")
    return number**2


def stream(folder: str, number: int):
    yield "begun"
    (Path(folder) / f"process-{number}").write_text(str(os.getpid()))
    time.sleep(number)
    yield number


def pool_of(function, folder: Path, pieces, **options) -> Pool:
    remote = ray.remote(num_cpus=0.1, max_retries=0, **options)(function)
    return Pool(lambda number: remote.remote(str(folder), number), pieces, max_running=2)


def test_every_piece_has_an_outcome_and_a_lost_one_may_be_given_out_again(ray_session, tmp_path):
    outcomes = []
    with pool_of(work, tmp_path, range(6)) as pool:
        for piece, outcome in pool.outcomes():
            assert len(pool.running) <= 2
            outcomes.append((piece, outcome))
            if isinstance(outcome, Lost):
                pool.again(piece)
    answers = {piece: outcome.value for piece, outcome in outcomes if isinstance(outcome, Answer)}
    assert answers == {0: 0, 1: 1, 4: 16, 5: 25}
    assert [(piece, o.times) for piece, o in outcomes if isinstance(o, Lost)] == [(1, 1)]
    failed = {piece: failure(o.cause, "squaring") for piece, o in outcomes if isinstance(o, Failed)}
    assert str(failed[2]) == "squaring failed with ValueError: two" and str(failed[3]) == "three"


def test_a_piece_past_its_deadline_is_ended_and_so_is_what_runs_when_the_caller_goes(ray_session, tmp_path):
    # A lambda, as Ray does not see that a function which the tests' type checker has wrapped is a generator.
    task = lambda folder, number: (yield from stream(folder, number))  # noqa: E731
    outcomes = []
    with pool_of(task, tmp_path, [0, 500, 600], num_returns="streaming") as pool:
        for piece, outcome in pool.outcomes():
            outcomes.append((piece, outcome))
            if outcome == Answer("begun") and piece == 500:
                pool.limit(piece, 0.5)
            if {(0, Answer(0)), (500, Late()), (600, Answer("begun"))} <= set(outcomes):  # in any order
                wait_for(tmp_path / "process-600")
                break
    assert (0, Answer(0)) in outcomes and (500, Late()) in outcomes
    deadline = time.monotonic() + 30
    for number in (500, 600):
        while Path(f"/proc/{(tmp_path / f'process-{number}').read_text()}").exists():
            assert time.monotonic() < deadline, f"the process of {number} lives on"
            time.sleep(0.05)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
