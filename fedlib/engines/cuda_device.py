"""A GPU as runs want it: float32 as IEEE has it, and said so."""

from __future__ import annotations

from typing import Any

import torch


def prepare() -> None:
    """One precision for all engines: they agree within rounding, which TensorFloat-32 makes ten bits wide.

    cuDNN chooses kernels by rule, not by timing them, so that two runs take the same.
    """
    # torch refuses to read the older flags once they and the newer ones disagree.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = False


def precision() -> dict[str, Any]:
    """What a record says of it."""
    return {
        "matmul": torch.backends.cuda.matmul.fp32_precision,
        "cudnn": torch.backends.cudnn.fp32_precision,
        "benchmark": torch.backends.cudnn.benchmark,
    }
