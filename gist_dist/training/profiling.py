"""Traces of chosen steps, for Perfetto or chrome://tracing: tracking.profile_steps."""

import gzip
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

from gist_dist.common.files import write_atomically
from gist_dist.config import RunConfig

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records this worker's operations in the steps that the recipe names, and nothing in all others."""

    def __init__(self, config: RunConfig, rank: int, device: torch.device) -> None:
        is_chosen = rank == 0 or config.tracking.profile_ranks == "all"
        self.steps = frozenset(config.tracking.profile_steps if is_chosen else ())
        self.folder, self.rank = config.run_dir / "profile", rank
        self.activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")

    @contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """A trace that can't be written costs the file, not the run."""
        if step not in self.steps:
            yield
            return
        with profile(activities=self.activities) as recorded:
            yield
        file = self.folder / f"step-{step:08d}-rank-{self.rank}.json.gz"
        try:
            write_atomically(file, lambda aside: _export(recorded, aside))
        except (OSError, RuntimeError) as error:
            logger.warning("%s can't be written (%s); the run goes without it", file, error)


def _export(recorded: profile, file: Path) -> None:
    """gzip: torch does so itself only by the file's name."""
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(plain))
        with plain.open("rb") as trace, gzip.open(file, "wb") as packed:
            shutil.copyfileobj(trace, packed)
