"""One training on Ray Train, from the driver's side: start it, watch it, give its outcome or the reason for none."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gist_dist.common.errors import UserError
from gist_dist.common.events import EVENTS, TRAINING, log_event, phase, read_events
from gist_dist.common.signals import StopRequests
from gist_dist.common.text import one_line, plural
from gist_dist.config import RunConfig
from gist_dist.on_ray.cluster.address import address_of
from gist_dist.on_ray.cluster.capacity import cpus_per_worker, gpus_per_worker
from gist_dist.on_ray.cluster.watch import ClusterWatch
from gist_dist.on_ray.train.failures import classify, last_line, memory_remedy, memory_sentence
from gist_dist.on_ray.train.messages import CONTROLLER_EVENTS, READY, RESIZE, STOP, post, withdraw
from gist_dist.on_ray.train.worker import LOG_NAME, RunInputs, WorkerTask, train_worker

logger = logging.getLogger(__name__)

GROUP_TIMEOUT_S = 1800
"""How long a collective waits, for workers that load a model or copy a corpus slowly. The watchdog finds hung steps."""
RESIZE_INTERVAL_S = 60.0
"""How often Ray looks whether there is room for more workers."""
LOST = (
    "Ray %s lacks what this gist_dist builds on (%s), so it retries whatever ended a worker, errors of the recipe too, "
    "cluster.max_failures = %d times in all, writes no checkpoint before it adds workers, and beside another Ray of "
    "this machine may lose the placement group of a local one; install ray 2.60, with which it was tested"
)


def fit(
    config: RunConfig,
    inputs: RunInputs,
    resources: dict[str, float],
    requests: StopRequests,
    check: Callable[[], None] = lambda: None,
    waits_for_scores: bool = False,
) -> str:
    """Train on Ray's workers: "finished", or "stopped" with a checkpoint where requests or a STOP file asked for it.

    check() is called several times a second and may raise. waits_for_scores: see WorkerTask.
    Raises UserError; KeyboardInterrupt when the user insists, or has asked to stop and the cluster is gone.
    """
    run_dir, cluster = config.run_dir, config.cluster
    cpus, gpus = cpus_per_worker(cluster, resources), gpus_per_worker(cluster, resources)
    withdraw(run_dir, STOP, RESIZE, READY)
    (run_dir / "logs").mkdir(exist_ok=True)
    logs = run_dir / "logs"
    bounds = f"{cluster.min_workers} to " * (cluster.min_workers < cluster.max_workers)
    told = bounds, plural(cluster.max_workers, "worker")
    logger.info("starting %s%s on Ray", *told, extra=phase(TRAINING))
    watch = ClusterWatch(cluster, cpus, gpus)
    training = _Thread(
        lambda: _trainer(config, inputs, cpus, gpus, waits_for_scores).fit()
    )  # the constructor asks the head as well
    try:
        with _following(logs / EVENTS, logs / CONTROLLER_EVENTS), watch:
            training.start()
            _attend(training, requests, watch, run_dir, check)
        return str(training.result().return_value)
    except UserError:
        raise
    except Exception as error:
        sentence = watch.silence() or _explain(error, config, logs / LOG_NAME)
        if requests.requested:  # SIGTERM to all processes of a command ends a local Ray as well
            logger.warning("stopped without another checkpoint: %s", sentence)
            raise KeyboardInterrupt from error
        raise UserError(sentence) from error
    finally:
        withdraw(run_dir, STOP, RESIZE, READY)
        shutil.rmtree(run_dir / ".ray", ignore_errors=True)


def _attend(
    training: "_Thread", requests: StopRequests, watch: ClusterWatch, run_dir: Path, check: Callable[[], None]
) -> None:
    """Until the training ends. The main thread stays free for signals, which a blocking call of Ray's would delay."""
    is_asked = False
    while not training.ended.wait(0.2):
        check()
        is_lost = watch.problem or watch.is_short  # without workers nothing is to be saved
        if requests.insisted or (requests.requested and is_lost):
            raise KeyboardInterrupt
        if watch.problem:
            raise UserError(watch.problem)
        if requests.requested and not is_asked:
            is_asked = True
            post(run_dir, STOP)
            again = "; Ctrl-C again ends it at once" if requests.requested == "SIGINT" else ""
            logger.info("%s: stopping after this step, with a checkpoint%s", requests.requested, again)


def _trainer(config: RunConfig, inputs: RunInputs, cpus: float, gpus: float, waits_for_scores: bool) -> Any:
    import ray.train

    from gist_dist.on_ray.cluster.network import NodeTorchConfig

    train: Any = ray.train  # annotated as its first version, while the second is what runs
    cluster, run_dir = config.cluster, config.run_dir
    trainer_class, callbacks = _with_our_policies(config, is_local=address_of(cluster) is None)
    is_elastic = cluster.min_workers < cluster.max_workers
    task = WorkerTask(config.model_dump(mode="json"), inputs, gpus > 0, max(1, int(cpus)), waits_for_scores)
    return trainer_class(
        train_worker,
        train_loop_config={"task": task},
        torch_config=NodeTorchConfig(
            backend="nccl" if gpus > 0 else "gloo", timeout_s=int(max(GROUP_TIMEOUT_S, cluster.hang_timeout_s))
        ),
        scaling_config=train.ScalingConfig(
            num_workers=(cluster.min_workers, cluster.max_workers) if is_elastic else cluster.max_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        ),
        run_config=train.RunConfig(
            name=f"fit-{int(time.time())}",
            storage_path=str(run_dir / ".ray"),
            failure_config=train.FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env=cluster.runtime_env or None,
            callbacks=callbacks,
        ),
    )


def _with_our_policies(config: RunConfig, is_local: bool) -> tuple[Any, list[Any]]:
    """TorchTrainer with our RetryPolicy, and the callbacks for its controller.

    On a local Ray without the placement group cleaner: that asks the machine's first dashboard whether the controller
    lives, and if that is another Ray's, it knows nothing of ours and the live placement group is removed (Ray 2.60).
    All of this is private: on a version that has none of it, it is TorchTrainer as it is, and a warning.
    """
    import ray
    from ray.train.torch import TorchTrainer

    try:
        for name in ("_initialize_and_run_controller", "_create_default_callbacks"):
            getattr(TorchTrainer, name)
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

        from gist_dist.on_ray.train.controller import CheckpointBeforeResize, RetryPolicy
    except (ImportError, AttributeError) as error:
        logger.warning(LOST, ray.__version__, one_line(error), config.cluster.max_failures)
        return TorchTrainer, []

    class OurTorchTrainer(TorchTrainer):
        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            arguments["failure_policy"] = RetryPolicy(config.cluster.max_failures, config.run_dir)
            return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]
            unwanted = (PlacementGroupCleanerCallback,) if is_local else ()
            return [callback for callback in callbacks if not isinstance(callback, unwanted)]

    return OurTorchTrainer, [CheckpointBeforeResize(config.run_dir, config.cluster.max_workers)]


class _Thread(threading.Thread):
    """A call that others can wait for. Nobody waits for it when the command is ended at once."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(name="fit", daemon=True)
        self.function, self.ended = function, threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def result(self) -> Any:
        if self.error:
            raise self.error
        return self.value


def _explain(error: Exception, config: RunConfig, log: Path) -> str:
    """A sentence for what ended the training; all of it goes to the log."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{error}\n")
    text = last_line(str(error)) or type(error).__name__
    failures = classify(getattr(error, "worker_failures", {}))
    if failures:
        first = failures[0]
        if first.has_remedy:
            return first.text
        if first.kind == "memory":
            return memory_sentence(config.batch, what="a node ran out of memory")
        if first.kind == "killed":
            remedy = f"if its node ran out of memory, {memory_remedy(config.batch)}"
            return f"training stopped: {first.text}, too often to go on; {remedy} (all of it in {log})"
        text = first.text
    return f"training stopped: {text} (all of it in {log})"


@contextmanager
def _following(*files: Path) -> Iterator[None]:
    """Repeat the events that are added to these files, while the block runs."""
    ended = threading.Event()
    positions = {file: file.stat().st_size if file.exists() else 0 for file in files}
    follower = threading.Thread(target=_follow, args=(positions, ended), daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join(timeout=5)


def _follow(positions: dict[Path, int], ended: threading.Event) -> None:
    while True:
        last_look = ended.wait(0.5)
        for file, position in positions.items():
            if not file.exists():
                continue
            with open(file, encoding="utf-8", errors="replace") as stream:
                stream.seek(position)
                while (line := stream.readline()).endswith("\n"):
                    positions[file] = stream.tell()
                    for event in read_events([line]):
                        log_event(logger, event)
        if last_look:
            return
