"""Which precision `auto` stands for: settled once, where a run starts, so that all its workers compute alike."""

import logging
from typing import TypeVar

import torch

from gist_dist.config import GuideConfig, Precision, RunConfig, StudentConfig
from gist_dist.core.device import has_bf16

logger = logging.getLogger(__name__)

EncoderConfig = TypeVar("EncoderConfig", StudentConfig, GuideConfig)


def settled(config: RunConfig, before: RunConfig | None = None) -> RunConfig:
    """A recipe without auto: what the run began with, else what suits this machine. before: the run's recipe as it was
    recorded."""
    device = torch.device("cuda" if torch.cuda.is_available() and config.cluster.gpus_per_worker != 0 else "cpu")
    student = _settled("student", config.student, before and before.student, device)
    guide = config.guide and _settled("guide", config.guide, before and before.guide, device)
    return config.model_copy(update={"student": student, "guide": guide})


def _settled(name: str, section: EncoderConfig, before: EncoderConfig | None, device: torch.device) -> EncoderConfig:
    if section.precision != "auto":
        return section
    found = _with(section, before.precision) if before else for_device(section, device)
    logger.info("%s.precision: auto is %s", name, found.precision)
    return found


def for_device(config: EncoderConfig, device: torch.device) -> EncoderConfig:
    """With the precision that suits a device, where it is left open."""
    if config.precision != "auto":
        return config
    return _with(config, "bf16" if has_bf16(device) else "fp32")


def _with(config: EncoderConfig, precision: Precision) -> EncoderConfig:
    return config.model_copy(update={"precision": precision})
