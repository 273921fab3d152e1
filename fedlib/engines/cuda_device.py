"""A GPU as runs want it: one that answers, with float32 as IEEE has it; and how it says that it is full."""

from __future__ import annotations

from typing import Any

import torch

from fedlib.errors import FedlibError, RunError

FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def prepare(where: torch.device) -> None:
    """Before the first engine. RunError where the GPU takes no work: full, held by another process, or at fault."""
    set_precision()
    try:
        if where.index is not None:
            torch.cuda.set_device(where)  # streams and captures are of the present one
        torch.ones(1, device=where).add_(1).cpu()
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"device: {where} takes no work ({said}); end what holds it, name another one, or use --device cpu"
        ) from error


def out_of_memory(error: RuntimeError) -> bool:
    """Not only torch's allocator runs out of memory: libraries do too, and say so in their own words."""
    said = any(words in str(error) for words in FULL)
    return isinstance(error, torch.OutOfMemoryError) or (said and not isinstance(error, FedlibError))


def set_precision() -> None:
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
