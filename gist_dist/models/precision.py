"""Which precision `auto` stands for: settled once, where a run starts, so that all its workers compute alike."""

import logging

import torch

from gist_dist.config import ClusterConfig, Precision, RunConfig
from gist_dist.core.device import has_bf16

logger = logging.getLogger(__name__)


def settled(config: RunConfig, before: RunConfig | None = None) -> RunConfig:
    """A recipe without auto: what the run began with, else what suits this machine. before: the run's recipe as it was
    recorded."""
    device = this_device(config.cluster)
    began = (
        before and before.student.precision,
        before and before.guide and before.guide.precision,
        before and before.evaluate.precision,
    )
    changes = {}
    sections = {"student": config.student, "guide": config.guide, "evaluate": config.evaluate}
    for (name, section), recorded in zip(sections.items(), began, strict=True):
        if section is not None and section.precision == "auto":
            precision = recorded or suited(section.precision, device)
            changes[name] = section.model_copy(update={"precision": precision})
            logger.info("%s.precision: auto is %s", name, precision)
    return config.model_copy(update=changes)


def this_device(cluster: ClusterConfig) -> torch.device:
    """What workers of this machine would compute on."""
    return torch.device("cuda" if torch.cuda.is_available() and cluster.gpus_per_worker != 0 else "cpu")


def suited(wanted: Precision, device: torch.device) -> Precision:
    """What auto stands for on a device; anything else is itself."""
    if wanted != "auto":
        return wanted
    return "bf16" if has_bf16(device) else "fp32"
