"""What ends a run, what starts its workers again, and what the user is told."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import tiny
import torch
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from gist_dist.common.errors import UserError, phase_of
from gist_dist.common.signals import StopRequests
from gist_dist.config import BatchConfig, RunConfig
from gist_dist.core.step import Clock
from gist_dist.on_ray.train import fit, worker
from gist_dist.on_ray.train.controller import RetryPolicy
from gist_dist.on_ray.train.failures import OutOfMemory, classify, memory_sentence, out_of_memory
from gist_dist.on_ray.train.messages import CONTROLLER_EVENTS, RESIZE, STOP, post, withdraw
from gist_dist.on_ray.train.worker import Requests, RunInputs
from gist_dist.recipe import parse_config
from gist_dist.runs.metrics_file import last_step

BATCH = BatchConfig(chunk_tokens=512, activation_gb=3, loss_gb=0.5)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def reach(run_dir: Path, step: int) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(f'{{"step": {s}}}\n' for s in range(1, step + 1)) + '{"ste')


def group_error(**failures: BaseException) -> WorkerGroupError:
    return WorkerGroupError("of the group", {int(rank[1:]): error for rank, error in failures.items()})


def killed() -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("A worker health check failed.", RayActorError(error_msg="died: SIGKILL"))


def retries(policy: RetryPolicy, error: Exception) -> bool:
    return policy.make_decision(error).value == "RETRY"


def test_steps_done_are_read_from_a_torn_file(run_dir):
    assert last_step(run_dir) == 0
    reach(run_dir, 12)
    assert last_step(run_dir) == 12


def test_a_run_that_gets_on_may_lose_any_number_of_workers(run_dir):
    policy = RetryPolicy(2, run_dir)
    for step in range(5, 50, 5):
        reach(run_dir, step)
        assert retries(policy, group_error(r1=killed()))
    assert retries(policy, group_error(r0=killed()))
    assert not retries(policy, group_error(r0=killed()))  # three in a row at one step
    assert "after step 45" in (run_dir / "logs" / CONTROLLER_EVENTS).read_text()


def test_user_error_of_any_rank_is_not_tried_again(run_dir):
    peer = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2112")
    assert not retries(RetryPolicy(3, run_dir), group_error(r0=peer, r2=UserError("guide.model: not on this node")))


def test_the_same_exception_at_the_same_step_is_tried_once_more_only(run_dir):
    policy = RetryPolicy(9, run_dir)
    reach(run_dir, 7)
    assert retries(policy, group_error(r0=ValueError("shape")))
    assert not retries(policy, group_error(r0=ValueError("shape")))
    reach(run_dir, 8)
    assert retries(policy, group_error(r0=ValueError("shape")))


def test_memory_that_runs_out_again_and_again_ends_the_run(run_dir):
    policy = RetryPolicy(2, run_dir)
    for step, expected in ((5, True), (9, True), (14, False)):
        reach(run_dir, step)
        assert retries(policy, group_error(r0=OutOfMemory("lower it"))) == expected
    policy = RetryPolicy(9, run_dir)
    assert retries(policy, group_error(r1=OutOfMemory("1"))) and not retries(policy, group_error(r1=OutOfMemory("2")))


def test_workers_without_room_are_waited_for(run_dir):
    policy = RetryPolicy(1, run_dir)
    for _ in range(20):
        assert retries(policy, ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert retries(policy, ControllerError(OSError("no such image")))
    assert not retries(policy, ControllerError(OSError("no such image")))


def test_causes_come_before_consequences():
    peer = RuntimeError("Connection closed by peer")
    low = WorkerHealthCheckFailedError(
        "failed", RayActorError(error_msg="killed due to the node running low on memory")
    )
    hung = WorkerHealthCheckTimeoutError("hanging")
    for cause, kind in (
        (UserError("x"), "user"), (OutOfMemory("x"), "memory"), (low, "memory"), (hung, "hung"), (killed(), "killed"),
        (ValueError("x"), "error"),
    ):  # fmt: skip
        assert [failure.kind for failure in classify({0: peer, 1: cause})] == [kind, "peer"]


def test_memory_errors_are_recognised_and_their_phase_too():
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**46)
    with pytest.raises(MemoryError) as host:
        np.empty((2**24, 2**22))
    others = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("could not create a primitive")
    for error in (cpu.value, host.value, *others):
        assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("size mismatch"))

    assert phase_of(ValueError()) is None


def test_phase_is_the_innermost_that_the_clock_of_a_step_was_in():
    clock = Clock(torch.device("cpu"))
    with pytest.raises(MemoryError) as caught, clock("encode"), clock("loss"):
        raise MemoryError
    assert phase_of(caught.value) == "loss"
    with pytest.raises(MemoryError) as outside:
        raise MemoryError
    assert phase_of(outside.value) is None


@pytest.mark.parametrize(
    ("phase", "first"),
    [
        ("loss", r"lower batch\.loss_gb \(now 0\.5\)"),
        ("encode", r"lower batch\.activation_gb \(now 3\), then batch\.chunk_tokens \(now 512\)"),
        ("guide", r"lower batch\.chunk_tokens \(now 512\), or set guide\.mode=cache"),
        (None, r"lower batch\.activation_gb \(now 3\)"),
    ],
)
def test_memory_sentence_names_the_budget_of_the_phase(phase, first):
    with pytest.raises(OutOfMemory, match=first):
        raise OutOfMemory(memory_sentence(BATCH, phase))


def test_workers_that_were_killed_too_often_are_told_of_in_one_sentence(tmp_path):
    from gist_dist.on_ray.train.fit import _explain

    config = parse_config(tiny.recipe(tmp_path, tmp_path, None, tmp_path / "rows.jsonl", batch=BATCH.model_dump()))
    assert _explain(group_error(r1=killed()), config, tmp_path / "train.log") == (
        "training stopped: worker 1 was ended from outside or ended itself, too often to go on; if its node ran out of "
        "memory, lower batch.activation_gb (now 3), then batch.chunk_tokens (now 512) and batch.loss_gb (now 0.5): "
        f"results stay the same, and the same command resumes (all of it in {tmp_path / 'train.log'})"
    )


def test_rank_0_sees_messages_and_the_others_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(worker, "preemption_notice", lambda: None)
    first, other = Requests(tmp_path, 0), Requests(tmp_path, 1)
    assert first() is None
    post(tmp_path, RESIZE)
    assert (first(), first.is_resized, other()) == ("stop", True, None)
    post(tmp_path, STOP)
    assert (first(), first.is_resized) == ("stop", False)
    withdraw(tmp_path, STOP, RESIZE)
    assert first() is None


def test_run_folder_is_looked_at_once_a_second(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(worker, "posted", lambda folder: looks.append(folder) or set())
    monkeypatch.setattr(worker, "preemption_notice", lambda: None)
    requests = Requests(tmp_path, 0)
    for _ in range(1000):
        requests()
    assert len(looks) == 1


def test_notice_gives_a_checkpoint_at_once_and_one_just_before(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "LOOK_SECONDS", 0.0)
    now = [1000.0]
    monkeypatch.setattr(worker.time, "time", lambda: now[0])
    notice = PreemptionInfo(deadline_ms=1_120_000, preempted_node_to_ranks={"a": [1]})
    monkeypatch.setattr(worker, "preemption_notice", lambda: notice)
    requests = Requests(tmp_path, 3)
    assert [requests(), requests()] == ["checkpoint", None]
    now[0] = 1110.0
    assert [requests(), requests()] == ["checkpoint", None]
    notice = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1], "b": [2]})  # another node
    assert [requests(), requests()] == ["checkpoint", None]


# ---- on real workers


def one_rank_gives_up(payload):
    import torch.distributed as dist

    from gist_dist.common.errors import UserError

    Path(payload["task"].inputs.corpus).open("a").write(f"{dist.get_rank()}\n")
    if dist.get_rank() == 1:
        raise UserError("guide.model: 'g' can't be read on this node; copy it there")
    dist.barrier()


def has_a_bug(payload):
    import torch.distributed as dist

    if dist.get_rank() == 0:
        Path(payload["task"].inputs.corpus).open("a").write("x\n")
        raise ValueError("a shape that can't be")
    dist.barrier()


def dies_and_gets_on(payload):
    """Rank 1 is killed at every third step; each time one gets further."""
    import signal

    import torch.distributed as dist

    metrics = Path(payload["task"].recipe["output_dir"]) / payload["task"].recipe["name"] / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    for step in range(done + 1, 10):
        dist.barrier()
        if dist.get_rank() == 0:
            with metrics.open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")
        dist.barrier()
        if step % 3 == 0 and step < 9 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return "finished"


@pytest.fixture
def fitted(ray_session, tmp_path, monkeypatch):
    """fit() with a train function of a test on two real workers, without models."""
    import sys

    from gist_dist.on_ray.train import fit as module

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    def run(function, **cluster) -> tuple[str, RunConfig]:
        tree = tiny.recipe(
            tmp_path / "runs", tmp_path, None, tmp_path / "rows.jsonl",
            cluster={"num_workers": 2, "cpus_per_worker": 0.5, **cluster},
        )  # fmt: skip
        config = parse_config(tree)
        config.run_dir.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(module, "train_worker", function)
        inputs = RunInputs(corpus=str(tmp_path / "attempts"))  # where these train functions count
        return module.fit(config, inputs, ray_session, StopRequests()), config

    yield run
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
def test_user_error_of_one_rank_ends_all_at_once(fitted, tmp_path):
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^guide\.model: 'g' can't be read on this node; copy it there$"):
        fitted(one_rank_gives_up)
    assert time.monotonic() - started < 60  # not the 30 minutes that the other rank would wait for
    assert sorted((tmp_path / "attempts").read_text().split()) == ["0", "1"]


@pytest.mark.ray
@pytest.mark.slow
def test_bug_is_tried_twice_and_told(fitted, tmp_path):
    with pytest.raises(UserError, match=r"^training stopped: ValueError: a shape that can't be \(all of it in "):
        fitted(has_a_bug, max_failures=5)
    assert (tmp_path / "attempts").read_text().split() == ["x", "x"]


@pytest.mark.ray
@pytest.mark.slow
def test_killed_workers_are_started_again_as_long_as_the_run_gets_on(fitted):
    outcome, config = fitted(dies_and_gets_on, max_failures=1)
    assert outcome == "finished" and last_step(config.run_dir) == 9
    assert (config.run_dir / "logs" / CONTROLLER_EVENTS).read_text().count("starting the workers again") == 2


def test_local_ray_lets_nobody_in_without_its_token(ray_session):
    """Its servers listen on every interface: each one must refuse who does not know the token."""
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    address = ray.get_runtime_context().gcs_address
    script = (
        "import sys\nfrom ray._raylet import GcsClient\n"
        "client = GcsClient(address=sys.argv[1])\n"
        "print(client.internal_kv_keys(b'', namespace=None, timeout=10))"
    )
    outcomes = [_ask(script, address, token) for token in (os.environ["RAY_AUTH_TOKEN"], "0" * 64, None)]
    assert [outcome.returncode == 0 for outcome in outcomes] == [True, False, False], outcomes
    assert ray._private.worker._global_node.webui_url in (None, "")  # no dashboard


def _ask(script: str, address: str, token: str | None) -> SimpleNamespace:
    import subprocess
    import sys

    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", script, address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return SimpleNamespace(returncode=done.returncode, said=done.stderr[-300:])


@pytest.mark.parametrize("missing", ["_initialize_and_run_controller", "_create_default_callbacks", None])
def test_a_ray_without_the_parts_that_we_build_on_is_a_warning(missing, monkeypatch, tmp_path, caplog):
    from ray.train.torch import TorchTrainer

    tree = tiny.recipe(tmp_path, "student", "guide", "data", cluster={"max_failures": 7})
    if missing:
        owner = next(kind for kind in TorchTrainer.__mro__ if missing in vars(kind))
        monkeypatch.delattr(owner, missing)
    trainer, callbacks = fit._with_our_policies(parse_config(tree), is_local=True)
    assert (trainer is TorchTrainer) == (not callbacks) == bool(missing)
    said = caplog.text
    if missing:
        assert all(part in said for part in (ray.__version__, missing, "max_failures = 7", "no checkpoint", "ray 2.60"))
    else:
        assert not said
