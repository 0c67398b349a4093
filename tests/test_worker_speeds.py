"""Dealing by measured speed: nearly equal times for unequal workers, and the same run."""

from dataclasses import MISSING, dataclass, fields
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs

from gist_dist.config import ClusterConfig
from gist_dist.core import step
from gist_dist.core.collectives import World
from gist_dist.core.plan import BatchPlan, assign_chunks, cut_chunks
from gist_dist.core.step import StepInputs, StepResult
from gist_dist.models.encoder import Student
from gist_dist.training.worker_speeds import GRID, WorkerSpeeds

SPEEDS = (1.0, 0.5, 1.0, 0.05, 0.75)


def lengths(n: int) -> np.ndarray:
    return np.clip(np.random.default_rng(n).lognormal(3, 0.8, n), 3, 256).astype(np.int32)


def test_unequal_workers_are_done_at_nearly_the_same_time():
    chunks = cut_chunks(lengths(6000), 1024)
    chunks_by_rank = assign_chunks(chunks, len(SPEEDS), SPEEDS)
    assert sorted(number for own in chunks_by_rank for number in own) == list(range(len(chunks)))
    times = [
        sum(chunks[c].padded_tokens for c in own) / speed for own, speed in zip(chunks_by_rank, SPEEDS, strict=True)
    ]
    ideal = sum(chunk.padded_tokens for chunk in chunks) / sum(SPEEDS)
    equally = max(sum(chunks[c].padded_tokens for c in own) for own in assign_chunks(chunks, len(SPEEDS))) / min(SPEEDS)
    assert max(times) < 1.05 * ideal < 0.1 * equally


def test_a_worker_too_slow_for_any_chunk_gets_none():
    chunks = cut_chunks(np.full(40, 10, np.int32), 100)  # 4 chunks
    assert assign_chunks(chunks, 2, (1.0, 0.1)) == [[0, 1, 2, 3], []]


def test_equal_speeds_deal_as_none_do():
    chunks = cut_chunks(lengths(1000), 512)
    assert assign_chunks(chunks, 7, [0.3] * 7) == assign_chunks(chunks, 7)


# ------------------------------------------------------------------------------------------------- learning speeds


@dataclass
class Group:
    """Workers that encode so many padded tokens a second, dealt the same chunks at every step."""

    true_speeds: list[float]
    overhead_s: float = 0.0
    num_chunks: int = 40

    def __post_init__(self) -> None:
        count = len(self.true_speeds)
        self.chunks = cut_chunks(np.full(10 * self.num_chunks, 10, np.int32), 100)
        self.speeds_of_workers = [WorkerSpeeds(World(rank, count), is_on=True) for rank in range(count)]

    def step(self) -> list[float]:
        """Seconds that each worker took; then all of them learn."""
        chunks_by_rank = assign_chunks(self.chunks, len(self.speeds_of_workers), self.speeds_of_workers[0].speeds)
        names = [field.name for field in fields(BatchPlan) if field.default is MISSING]
        plan = BatchPlan(
            **dict.fromkeys(names, np.zeros(0)) | {"step": 1, "student_chunks": self.chunks, "guide_chunks": ()}
        )
        inputs, self.told, taken = StepInputs(chunks_by_rank, [[] for _ in chunks_by_rank], {}, {}), [], []
        for worker_speeds, own, speed in zip(self.speeds_of_workers, chunks_by_rank, self.true_speeds, strict=True):
            taken.append(self.overhead_s + sum(self.chunks[c].padded_tokens for c in own) / speed)
            seconds = {"encode": taken[-1] / 3, "backward": taken[-1] * 2 / 3}
            self.told.append(worker_speeds.of_step(plan, inputs, StepResult(0.0, 0.0, {}, False, seconds)))
        for worker_speeds in self.speeds_of_workers:
            worker_speeds.adopt({name: max(each[name] for each in self.told) for name in self.told[0]})
        assert all(worker_speeds.speeds == self.speeds_of_workers[0].speeds for worker_speeds in self.speeds_of_workers)
        return taken


@pytest.mark.parametrize("overhead_s", [0.0, 1.0])
def test_times_even_out_within_a_few_steps(overhead_s):
    """Also where a part of the time does not shrink with the work."""
    group = Group([100.0, 50.0, 100.0, 25.0], overhead_s)
    before = max(group.step())
    times = [max(group.step()) for _ in range(8)][-1]
    assert before == pytest.approx(40.0 + overhead_s)
    assert times < 1.3 * (4000 / 275 + overhead_s)


def test_a_worker_that_recovers_is_given_work_again():
    group = Group([100.0, 2.0], num_chunks=8)
    assert [group.step()[1] for _ in range(3)] == [200.0, 0.0, 0.0]  # then it is dealt nothing
    group.true_speeds = [100.0, 100.0]
    for _ in range(60):
        taken = group.step()
    assert taken[1] == pytest.approx(taken[0], rel=0.2)
    assert group.speeds_of_workers[0].speeds == pytest.approx([1.0, 1.0], abs=2 / GRID)


def test_noise_hardly_moves_equal_workers():
    rng = np.random.default_rng(0)
    group = Group([100.0] * 4)
    for _ in range(30):
        group.true_speeds = (100 * rng.uniform(0.97, 1.03, 4)).tolist()
        slowest = max(group.step())
    assert slowest < 1.15 * 10


@pytest.mark.parametrize("world, is_on", [(World(), True), (World(0, 2), False)])
def test_alone_or_off_nothing_is_exchanged(world, is_on):
    assert not ClusterConfig().deal_by_speed
    group = Group([100.0])
    group.speeds_of_workers = [WorkerSpeeds(world, is_on)]
    assert group.step() == [40.0]
    assert group.told == [{}] and group.speeds_of_workers[0].speeds is None


# ---------------------------------------------------------------------------------------------------- a real group


class Uneven(Student):
    """Rank 1 takes four times as long for a token, by a clock that only encoding moves."""

    encoded: list[int] = []  # noqa: RUF012  padded tokens of every call on this rank
    now = 0.0

    def encode(self, texts, dropout_seed):
        tokens = texts.ids.numel()
        self.encoded.append(tokens)
        Uneven.now += tokens * (1e-4, 4e-4)[World.current().rank]
        return super().encode(texts, dropout_seed)


def run(world: World, tree: dict) -> tuple[str, list[int]]:
    Uneven.encoded = []
    step.time = SimpleNamespace(perf_counter=lambda: Uneven.now)  # in this rank's process
    return tiny_runs.run(world, tree, student=Uneven), Uneven.encoded


def test_a_slow_worker_encodes_less_and_the_run_is_the_same(tmp_path):
    runs = tiny_runs.Runs(tmp_path)
    equal, by_speed = (
        runs.tree(name, optim={"steps": 8}, cluster={"deal_by_speed": name == "by_speed"})
        for name in ("equal", "by_speed")
    )
    shares = {}
    for tree in (equal, by_speed):
        (_, fast), (_, slow) = runs.train_on(2, tree["name"], run, tree)
        shares[tree["name"]] = sum(slow) / (sum(slow) + sum(fast))
    tiny_runs.assert_same_run(equal, by_speed)  # bit for bit
    assert shares["equal"] == pytest.approx(0.5, abs=0.1)
    assert shares["by_speed"] < 0.75 * shares["equal"]
