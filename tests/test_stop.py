"""What is wanted of a running training: a checkpoint at once, or to stop after the step."""

import threading
from collections.abc import Iterable
from typing import Any

import pytest
from tiny_runs import STEPS, Runs, assert_same_run, checkpoints, curve, run, run_dir

from gist_dist.common.errors import UserError
from gist_dist.core.collectives import World


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("stop"))


@pytest.fixture(scope="module")
def undisturbed(runs) -> dict[str, Any]:
    tree = runs.tree("undisturbed")
    assert runs.train(tree) == "finished"
    return tree


class Asked:
    """Requests something at some steps; counts how often it was asked."""

    def __init__(self, requests: str, steps: Iterable[int]) -> None:
        self.requests, self.steps, self.count = requests, set(steps), 0

    def __call__(self) -> str | None:
        self.count += 1
        return self.requests if self.count in self.steps else None


def stop_on_one_rank(world: World, tree: dict[str, Any]) -> tuple[str, int]:
    asked = Asked("stop", {3} if world.rank == 1 else set())
    return run(world, tree, asked), asked.count


def test_stopped_run_goes_on_as_if_nothing_had_been(runs, undisturbed):
    tree = runs.tree("stopped")
    assert runs.train_on(2, "stopped", stop_on_one_rank, tree) == [("stopped", 3)] * 2
    assert checkpoints(tree) == [2, 3] and len(curve(tree)) == 3 and not (run_dir(tree) / "model").exists()
    assert runs.train(tree) == "finished"
    assert_same_run(tree, undisturbed, 1e-5)  # two workers round otherwise than one


def test_resumed_after_a_stop_at_every_step_is_bit_equal(runs, undisturbed):
    tree = runs.tree("stopped-often", checkpoint={"every_steps": None})
    outcomes = [runs.train(tree, Asked("stop", {1})) for _ in range(STEPS)]
    assert outcomes == ["stopped"] * (STEPS - 1) + ["finished"]
    assert_same_run(tree, undisturbed)


def test_a_standing_notice_is_answered_with_one_checkpoint(runs):
    """Noticed at steps 2 to 4, and again at step 6 of 8."""
    tree = runs.tree("notice", checkpoint={"every_steps": None, "keep": 9}, optim={"steps": 8})
    assert runs.train(tree, Asked("checkpoint", {2, 3, 4, 6})) == "finished"
    assert checkpoints(tree) == [2, 6, 8]


def test_stop_outranks_a_checkpoint_and_the_end_outranks_a_stop(runs):
    def requests() -> str | None:
        return "stop" if asked() else "checkpoint"

    asked = Asked("stop", {2, STEPS})
    tree = runs.tree("outranked", checkpoint={"every_steps": None, "keep": 9})
    assert runs.train(tree, requests) == "stopped" and checkpoints(tree) == [1, 2]
    assert runs.train(tree, Asked("stop", {STEPS - 2})) == "finished"


def test_no_thread_is_left(runs):
    def ours() -> set[str]:
        names = ("plan", "checkpoint", "rank-0")
        return {thread.name for thread in threading.enumerate() if thread.name.startswith(names)}

    tree = runs.tree("threads")
    assert runs.train(tree, Asked("stop", {3})) == "stopped" and not ours()
    with pytest.raises(ZeroDivisionError):
        runs.train(tree, lambda: str(1 / 0))
    assert not ours()


def test_a_stop_that_can_not_be_kept_is_told(runs):
    place = runs.folder / "a-file"
    place.mkdir()
    tree = runs.tree("lost", checkpoint={"every_steps": None, "dir": str(place)})

    def requests() -> str:
        (place / "lost").write_text("in the way")
        return "stop"

    told = r"training was stopped after step 1, but the checkpoint of step 1 can't be written to .*/a-file/lost: "
    with pytest.raises(UserError, match=told):
        runs.train(tree, requests)
