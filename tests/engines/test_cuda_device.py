"""What is done to a GPU before it computes; no card is needed for that."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from fedlib.engines import cuda_device
from fedlib.errors import RunError

PROGRAM = """
import warnings
import torch

warnings.simplefilter("error")
torch.cuda.is_available = lambda: True
from fedlib.engines import cuda_device
from fedlib.engines.select import open_engine
from fedlib.errors import RunError

for name in ("process", "graphed"):
    torch.backends.cudnn.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = True
    open_engine(name, "cpu")
    assert cuda_device.precision() == {"matmul": "tf32", "cudnn": "tf32", "benchmark": True}
    try:
        open_engine(name, "cuda")
    except RunError as error:  # there is none
        said = str(error)
        assert said.startswith("device: cuda takes no work (") and said.endswith("or use --device cpu"), said
    else:
        raise AssertionError("a kernel ran on a GPU that is not there")
    assert cuda_device.precision() == {"matmul": "ieee", "cudnn": "ieee", "benchmark": False}
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cudnn.rnn.fp32_precision == "ieee"
    # The older names say the same; where they contradict, torch raises.
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # nothing of the CPU's
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_an_engine_on_a_gpu_opens_with_float32_as_ieee_has_it() -> None:
    """In a process of its own: the flags are the process's."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


@pytest.mark.parametrize("reason", ["CUDA error: all CUDA-capable devices are busy or unavailable", "out of memory"])
def test_a_busy_card_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    chosen = list[torch.device]()

    def busy(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError(f"{reason}\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "ones", busy)
    with pytest.raises(RunError) as told:
        cuda_device.prepare(torch.device("cuda", 1))
    assert str(told.value) == (
        f"device: cuda:1 takes no work ({reason}); end what holds it, name another one, or use --device cpu"
    )
    assert chosen == [torch.device("cuda", 1)]
