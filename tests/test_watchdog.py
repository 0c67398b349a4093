"""A step that makes no progress is found; one that is only slow is not."""

import threading
import time

import pytest

from gist_dist.training import watchdog
from gist_dist.training.watchdog import Watchdog


@pytest.fixture
def ended():
    return threading.Event()


def test_hung_step_ends_the_process_with_its_stacks_written(tmp_path, ended):
    dog = Watchdog(0.1, tmp_path / "logs" / "hang.txt", ended.set)
    for step in range(1, 5):
        with dog.watching(step):
            pass
    with dog.watching(5):
        assert ended.wait(5)
    stacks = (tmp_path / "logs" / "hang.txt").read_text()
    assert "step 5 made no progress" in stacks and "test_watchdog.py" in stacks


def test_first_steps_may_take_longer(tmp_path, ended):
    dog = Watchdog(0.2, tmp_path / "hang.txt", ended.set)
    with dog.watching(1):
        assert not ended.wait(0.6)  # torch.compile
    assert dog.longest > 0.5


def test_limit_grows_with_what_steps_take(tmp_path, ended):
    dog = Watchdog(0.2, tmp_path / "hang.txt", ended.set)
    for step in range(1, 5):
        with dog.watching(step):
            time.sleep(0.1)
    assert dog.allowed_s == pytest.approx(watchdog.SLOW_FACTOR * dog.longest)
    with dog.watching(5):
        assert not ended.wait(0.4)
        assert ended.wait(5)


def test_time_between_steps_does_not_count(tmp_path, ended):
    dog = Watchdog(0.1, tmp_path / "hang.txt", ended.set)
    for step in range(1, 5):
        with dog.watching(step):
            pass
    assert not ended.wait(0.5)  # a checkpoint, or a guide that is renewed
    with dog.watching(5):
        assert ended.wait(5)  # and the thread is there again
