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
    changes: dict[str, StudentConfig | GuideConfig] = {}
    for section in ("student", "guide"):
        encoder: StudentConfig | GuideConfig | None = getattr(config, section)
        if encoder is not None and encoder.precision == "auto":
            began: StudentConfig | GuideConfig | None = getattr(before, section, None)
            changes[section] = _with(encoder, began.precision) if began else for_device(encoder, device)
            logger.info("%s.precision: auto is %s", section, changes[section].precision)
    return config.model_copy(update=changes)


def for_device(config: EncoderConfig, device: torch.device) -> EncoderConfig:
    """With the precision that suits a device, where it is left open."""
    if config.precision != "auto":
        return config
    return _with(config, "bf16" if has_bf16(device) else "fp32")


def _with(config: EncoderConfig, precision: Precision) -> EncoderConfig:
    return config.model_copy(update={"precision": precision})
