"""The GPU's draws are numpy's, bit for bit: in Triton's interpreter, which needs no GPU, and on a GPU that is there."""

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fedlib import rng
from fedlib.rng import Rng

pytest.importorskip("triton", reason="comes with torch's builds for CUDA alone")
GPU = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def interpreted(program: str) -> str:
    """What a program prints that runs Triton's kernels on the CPU, which must be said before Triton is imported."""
    head = "import torch\nfrom fedlib import philox_kernel, rng\nCPU = torch.device('cpu')\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(program)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernel_gives_numpy_s_draws() -> None:
    found = interpreted("""
        for seed in (0, 1, 20240806, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1):
            for stream, count in ((0, 1024), (1, 1), (16, 2), (2**40, 4095), (2**64 - 1, 2055)):
                drawn = philox_kernel.uniform(seed, stream, (count,), CPU)
                expected = (rng.words(seed, stream, count) >> 8) * 2.0**-24  # exact in float64
                assert drawn.dtype == torch.float32 and drawn.tolist() == expected.tolist(), (seed, stream, count)
        assert philox_kernel.uniform(7, 0, (3, 5), CPU).shape == (3, 5)
        assert philox_kernel.uniform(7, 0, (0, 5), CPU).shape == (0, 5)
        assert philox_kernel.uniform(7, 0, (), CPU).tolist() == rng.Stream(7, CPU).uniform().tolist()
        print("equal")
    """)
    assert found == "equal\n"


def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """For an H100 or H200, by the assembler that Triton brings; no GPU runs it. No sum and product are fused."""
    program = """
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile
        from fedlib import philox_kernel
        for seed in ("i32", "i64"):
            types = dict(out="*fp32", count="i32", seed=seed, stream="i32", BLOCK="constexpr")
            source = ASTSource(philox_kernel._kernel, types, {"BLOCK": philox_kernel.BLOCK})
            made = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
            print(len(made.asm["cubin"]) > 0, "mul.hi.u64" in made.asm["ptx"], "fma.rn.f32" in made.asm["ptx"])
    """
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True True False\n" * 2


def test_the_check_passes_and_can_fail() -> None:
    found = interpreted("""
        philox_kernel.check(CPU, rng._on_cpu)
        def other(seed, stream, shape, device):  # one draw by one unit, under the last seed alone
            drawn = rng._on_cpu(seed, stream, shape, device)
            drawn[-1] += 2**-24 if seed == 2**64 - 1 and shape == (1024,) else 0
            return drawn
        try:
            philox_kernel.check(CPU, other)
        except RuntimeError as error:
            print(error)
    """)
    assert found == "its draws of seed 0xffffffffffffffff, stream 2, differ from numpy's\n"


def test_where_triton_is_absent_one_warning_and_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "fedlib.philox_kernel", raising=False)
    monkeypatch.delattr("fedlib.philox_kernel", raising=False)
    rng._on_gpu.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "fedlib"):
            assert rng._on_gpu(GPU) is rng._on_gpu(GPU) is rng._on_cpu
    finally:
        rng._on_gpu.cache_clear()
    (warning,) = caplog.messages
    assert warning.startswith("cuda: draws are made on the CPU: ModuleNotFoundError")


def test_draws_on_a_cpu_do_without_triton() -> None:
    program = "import sys; from fedlib.rng import Rng; Rng(0).stream().uniform(9); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@needs_cuda
def test_draws_on_a_gpu_are_those_of_the_cpu() -> None:
    assert rng._on_gpu(GPU) is not rng._on_cpu
    here, there = Rng(7).child("x").stream(), Rng(7).child("x").stream(GPU)
    for shape in ((3, 5), (389_920,), (1,)):
        assert torch.equal(there.uniform(*shape).cpu(), here.uniform(*shape))
