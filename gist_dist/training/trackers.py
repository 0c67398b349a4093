"""Copies of metrics.jsonl where people look: TensorBoard, Weights & Biases, MLflow. The names are those of
metrics.jsonl, with a slash before a phase or a source (seconds/encode).

They are copies: one that can't be opened for a new run is a UserError, before anything is trained; one that fails
later ends with a warning and costs no step. A run that goes on is the same run there too: which, is in tracking.json.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from gist_dist.common.errors import UserError
from gist_dist.common.files import write_text
from gist_dist.common.redact import redact, redact_text
from gist_dist.common.text import one_line
from gist_dist.config import RunConfig, flat

logger = logging.getLogger(__name__)

IDS = "tracking.json"
"""In the run folder: tracker -> the id of its run."""
PARAMETER_LENGTH = 500
"""What every MLflow server takes as a parameter's value."""


class Tracker(Protocol):
    """Where a run is followed. Each method may raise whatever its library raises."""

    def log(self, values: dict[str, float], step: int | None) -> None:
        """step None: of the run as a whole, such as a score of the finished model."""

    def log_evaluation(self, values: dict[str, float], step: int) -> None:
        """Scores of a step that others may have followed since."""

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, config: RunConfig, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a resumed run does again would be drawn twice.
        self.writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=done + 1 if done else None)

    def log(self, values: dict[str, float], step: int | None) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step or 0)

    log_evaluation = log

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """The key is WANDB_API_KEY, or that of `wandb login`; without network: tracking.wandb.mode = offline."""

    def __init__(self, config: RunConfig, done: int) -> None:
        import wandb

        options, run_dir = config.tracking.wandb, config.run_dir
        assert options is not None
        self.run = wandb.init(
            project=options.project,
            entity=options.entity,
            name=config.name,
            id=_id_of(run_dir, "wandb", lambda: token_hex(4)),
            resume="allow",
            mode=options.mode,
            dir=str(run_dir),
            config=redact(config.model_dump(mode="json")),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, values: dict[str, float], step: int | None) -> None:
        if step is None:
            self.run.summary.update(values)
        else:
            self.run.log(values, step=step)  # a step that is there already is left as it is

    def log_evaluation(self, values: dict[str, float], step: int) -> None:
        self.run.define_metric("evaluation/*", step_metric="evaluation/step")
        self.run.log(values | {"evaluation/step": step})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """The server is tracking.mlflow.uri or MLFLOW_TRACKING_URI; its credentials are MLflow's own variables."""

    def __init__(self, config: RunConfig, done: int) -> None:
        from mlflow import MlflowClient

        options = config.tracking.mlflow
        assert options is not None
        self.client = MlflowClient(tracking_uri=options.uri)
        self.run_id = _id_of(config.run_dir, "mlflow", lambda: self._create(config, options.experiment))
        self.client.update_run(self.run_id, status="RUNNING")

    def _create(self, config: RunConfig, name: str) -> str:
        from mlflow.entities import Param

        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else None
        experiment_id = experiment_id or self.client.create_experiment(name)
        run_id = self.client.create_run(experiment_id, run_name=config.name).info.run_id
        recipe = dict(flat(redact(config.model_dump(mode="json"))))
        parameters = [Param(k.replace("/", "."), str(v)[:PARAMETER_LENGTH]) for k, v in recipe.items() if v != {}]
        for first in range(0, len(parameters), 100):  # so many a request
            self.client.log_batch(run_id, params=parameters[first : first + 100])
        return run_id

    def log(self, values: dict[str, float], step: int | None) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run_id, metrics=[Metric(name, v, now, step or 0) for name, v in values.items()])

    log_evaluation = log

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


TRACKERS: dict[str, Callable[[RunConfig, int], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow,
}  # fmt: skip
"""Field of the section tracking, which is also the name of the package that it needs -> what opens it."""


def check_trackers(config: RunConfig) -> None:
    """UserError for a tracker whose package is missing."""
    for name in _wanted(config):
        if find_spec(name) is None:
            install = f"install it with `pip install 'gist-dist[{name}]'`"
            raise UserError(f"tracking.{name}: the package {name} is missing; {install}, or leave it out")


class Trackers:
    """All that the recipe names, opened; one that fails is warned about and left."""

    def __init__(self, config: RunConfig, done: int = 0, must_open: bool = True) -> None:
        """done: steps that the run goes on after. UserError for a tracker that can't be opened, where it must."""
        self.open: dict[str, Tracker] = {}
        for name in _wanted(config):
            try:
                self.open[name] = TRACKERS[name](config, done)
            except Exception as error:  # whatever the library raises
                told = f"tracking.{name} can't be opened: {_sentence(error)}"
                if must_open:
                    raise UserError(f"{told}; fix that, or leave it out") from error
                logger.warning("%s; the run goes on without it", told)

    def log(self, line: dict[str, Any], step: int | None) -> None:
        """line: of metrics.jsonl, or scores. What is no finite number is left out."""
        values = _numbers(line)
        self._each(lambda tracker: tracker.log(values, step))

    def log_evaluation(self, line: dict[str, Any]) -> None:
        """Scores of an earlier step, as evaluation/scores/STSBenchmark over evaluation/step: Weights & Biases takes no
        values of a step that is past, so that the step is a value too."""
        values, step = _numbers(line), line["step"]
        self._each(lambda tracker: tracker.log_evaluation(values, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self.open = {}

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                act(tracker)
            except Exception as error:  # a copy of metrics.jsonl is no reason to lose a run
                logger.warning("tracking.%s ends here: %s; metrics.jsonl has all steps", name, _sentence(error))
                del self.open[name]


def track_scores(config: RunConfig, scores: dict[str, dict[str, float]]) -> None:
    """MTEB's main scores, label (trained, baseline, guide) -> task -> score, as mteb/trained/STSBenchmark."""
    if any(scores.values()):
        trackers = Trackers(config, must_open=False)
        trackers.log({"mteb": scores}, None)
        trackers.close()


def track_evaluations(config: RunConfig, lines: list[dict[str, Any]]) -> None:
    """Scores of steps of which the workers have not told."""
    if lines:
        trackers = Trackers(config, must_open=False)
        for line in lines:
            trackers.log_evaluation(line)
        trackers.close()


def _wanted(config: RunConfig) -> list[str]:
    return [name for name in TRACKERS if getattr(config.tracking, name)]


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in flat(line, "/") if name != "step" and _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _id_of(run_dir: Path, name: str, create: Callable[[], str]) -> str:
    """The id that this run has there, so that a run which goes on is not a second one."""
    file = run_dir / IDS
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ids = None
    ids = ids if isinstance(ids, dict) else {}
    if not isinstance(ids.get(name), str):
        ids[name] = create()
        write_text(file, json.dumps(ids, indent=1))
    return ids[name]


def _sentence(error: Exception) -> str:
    return one_line(redact_text(str(error))) or type(error).__name__
