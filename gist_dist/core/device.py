"""What a process does before its first work on a GPU."""

import os

import torch


def prepare_cuda(deterministic: bool = True) -> None:
    """deterministic: every operation gives the same bits again, and one that can't raises."""
    # Its plans are made anew for every shape: 0.13 s each on an H200, where FlashAttention needs none.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # It would launch a kernel for every new tensor; we read none before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
