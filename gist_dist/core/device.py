"""What a process does before its first work on a GPU."""

import os

import torch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; a GPU takes it from pinned memory in its own time, and the host doesn't wait."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def has_bf16(device: torch.device) -> bool:
    """Whether it multiplies matrices in bf16 several times as fast as in fp32: GPUs since Ampere, CPUs with AMX or
    AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def prepare_cuda(deterministic: bool = True) -> None:
    """deterministic: every operation gives the same bits again, and one that can't raises."""
    # Its plans are made anew for every shape: 0.13 s each on an H200, where FlashAttention needs none.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # It would launch a kernel for every new tensor; we read none before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
