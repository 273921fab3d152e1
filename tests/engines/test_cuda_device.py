"""What is done to a GPU before it computes; no card is needed for that."""

import subprocess
import sys

PROGRAM = """
import warnings
import torch

warnings.simplefilter("error")
torch.cuda.is_available = lambda: True
from fedlib.engines import cuda_device
from fedlib.engines.select import open_engine

for name in ("process", "graphed"):
    torch.backends.cudnn.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = True
    open_engine(name, "cpu")
    assert cuda_device.precision() == {"matmul": "tf32", "cudnn": "tf32", "benchmark": True}
    open_engine(name, "cuda")
    assert cuda_device.precision() == {"matmul": "ieee", "cudnn": "ieee", "benchmark": False}
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cudnn.rnn.fp32_precision == "ieee"
    # The older names say the same; where they contradict, torch raises.
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # nothing of the CPU's
"""


def test_an_engine_on_a_gpu_opens_with_float32_as_ieee_has_it() -> None:
    """In a process of its own: the flags are the process's."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
