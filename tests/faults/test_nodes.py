"""Nodes of a Ray cluster go and come; each is a raylet of its own on this machine."""

import time

import pytest

from faults.conftest import STEPS
from faults.nodes import Cluster, Node
from faults.product import Run, inside, kill, marked_processes, name_of
from faults.test_processes import reach

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

PACE = 0.5


@pytest.fixture
def cluster():
    """Steps take longer on it: nodes need a while to go and to come."""
    cluster = Cluster(inside(pace=PACE))
    yield cluster
    cluster.end()


def test_lost_node_with_a_spare_and_without(cluster, started, record, ends_as_undisturbed, random_moments):
    """A fixed number of workers: a spare node takes the work over; without one the run waits for a new node."""
    nodes = [cluster.add() for _ in range(3)]
    run = started("lost-node", cluster.environment, cluster={"address": cluster.address})
    run.start()
    moment = reach(run, random_moments.randint(2, STEPS // 2), random_moments)
    fault = run.position()
    node_of(run, random_moments.randint(0, 1), nodes).lose()
    recovery = run.goes_on(fault)
    record(fault="SIGKILL of a raylet, a spare node there", moment=moment, recomputed=recovery.recomputed,
           seconds=recovery.seconds)  # fmt: skip
    moment = reach(run, random_moments.randint(STEPS // 2, STEPS // 2 + 50), random_moments)
    fault = run.position()
    node_of(run, random_moments.randint(0, 1), nodes).lose()
    run.wait_for(lambda: run.said("waiting .* for nodes"), "it said that it waits")
    time.sleep(random_moments.uniform(0, 5))
    cluster.add()
    recovery = run.goes_on(fault)
    record(fault="SIGKILL of a raylet, a new node later", moment=moment, recomputed=recovery.recomputed,
           seconds=recovery.seconds, notes=run.said(".*waiting .* for nodes"))  # fmt: skip
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def test_elastic_2_1_3(cluster, started, record, ends_as_undisturbed, random_moments):
    """It shrinks when a node is lost and grows when two come: the same curve."""
    nodes = [cluster.add() for _ in range(2)]
    run = started("elastic", cluster.environment, cluster={"address": cluster.address, "num_workers": [1, 3]})
    run.start()
    moment = reach(run, random_moments.randint(2, STEPS // 3), random_moments)
    fault = run.position()
    node_of(run, random_moments.randint(0, 1), nodes).lose()
    recovery = run.goes_on(fault)
    record(fault="SIGKILL of a raylet, elastic: 2 → 1 workers", moment=moment, recomputed=recovery.recomputed,
           seconds=recovery.seconds)  # fmt: skip
    cluster.add(), cluster.add()
    fault = run.position()
    recovery = run.goes_on(fault)
    assert recovery.recomputed == 0
    record(fault="two nodes come, elastic: 1 → 3 workers", moment=f"step {fault.step}", seconds=None,
           recomputed=recovery.recomputed)  # fmt: skip
    assert run.finish() == 0, run.tail()
    sizes = [line["world_size"] for line in run.lines()]
    assert list(dict.fromkeys(sizes)) == [2, 1, 3], sizes
    ends_as_undisturbed(run, tolerance=1e-6)


def test_announced_preemption(cluster, started, record, ends_as_undisturbed, random_moments):
    """A spot node's notice: a checkpoint is written before the node goes, between two regular ones."""
    nodes = [cluster.add() for _ in range(3)]
    run = started(
        "preempted", cluster.environment, cluster={"address": cluster.address}, checkpoint={"every_steps": STEPS}
    )  # fmt: skip
    run.start()
    moment = reach(run, random_moments.randint(2, STEPS // 2), random_moments)
    node = node_of(run, random_moments.randint(0, 1), nodes)
    announced = time.monotonic()
    node.announce_preemption(60)
    run.wait_for(lambda: list(run.folder.glob("checkpoints/*/COMMIT.json")), "a checkpoint")
    noticed = time.monotonic() - announced
    fault = run.position()
    node.lose()
    recovery = run.goes_on(fault)
    record(fault="preemption notice, then SIGKILL of the raylet", moment=moment, recomputed=recovery.recomputed,
           seconds=recovery.seconds, notes=f"checkpoint {noticed:.1f} s after the notice")  # fmt: skip
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)


def test_lost_head(cluster, started, record, ends_as_undisturbed, random_moments):
    """The head's machine goes, with the driver on it; a new head at its address, and the same command."""
    nodes = [cluster.add() for _ in range(2)]
    run = started("lost-head", cluster.environment, cluster={"address": cluster.address})
    run.start()
    moment = reach(run, random_moments.randint(2, STEPS // 2), random_moments)
    fault = run.position()
    cluster.head.end()
    kill(run.command.pid, 9)
    run.command.wait()
    cluster.start_head()
    cluster.add(), cluster.add()
    run.start()
    recovery = run.goes_on(fault)
    record(fault="SIGKILL of the head and the driver", moment=moment, resubmitted=True,
           recomputed=recovery.recomputed, seconds=recovery.seconds)  # fmt: skip
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)
    left = [name_of(pid) for node in nodes for pid in marked_processes(node.mark)]
    assert not any("RayTrainWorker" in name for name in left), "workers of the lost head live on"


def test_head_lost_alone(cluster, started, record, ends_as_undisturbed, random_moments):
    """The driver lives on: it ends by itself and says why."""
    [cluster.add() for _ in range(2)]
    run = started("head-alone", cluster.environment, cluster={"address": cluster.address})
    run.start()
    moment = reach(run, random_moments.randint(2, STEPS // 4), random_moments)
    fault = run.position()
    cluster.head.end()
    assert run.finish(180) == 1, run.tail()
    said = run.said("the head of the Ray cluster at .* does not answer.*")
    ended = time.monotonic() - fault.time
    cluster.start_head()
    cluster.add(), cluster.add()
    run.start()
    recovery = run.goes_on(fault)
    record(fault="SIGKILL of the head's processes alone", moment=moment, resubmitted=True,
           notes=f"{said} ({ended:.0f} s)", recomputed=recovery.recomputed, seconds=recovery.seconds)  # fmt: skip
    assert run.finish() == 0, run.tail()
    ends_as_undisturbed(run)
    assert said


def node_of(run: Run, rank: int, nodes: list[Node]) -> Node:
    worker = run.worker(rank)
    return next(node for node in nodes if worker in marked_processes(node.mark))
