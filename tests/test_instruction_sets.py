"""The CPU units that would not serve this processor: every op at every size, each unit in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import NATIVE

CAPABILITIES = {"default": ("AVX2", "AVX512"), "avx2": ("AVX512",)}  # of processors that have more


@pytest.mark.skipif(not NATIVE["cpu"], reason="the CPU kernels are not loaded")
@pytest.mark.skipif("UNIGEN_FAST_ISA" in os.environ, reason="the whole suite runs on a unit that was asked for")
@pytest.mark.parametrize("isa", CAPABILITIES)
def test_lesser_units(isa: str) -> None:
    if torch.backends.cpu.get_cpu_capability() not in CAPABILITIES[isa]:
        pytest.skip(f"{isa} is the best unit here, if there is one")
    file = Path(__file__).with_name("test_fused.py")
    tests = ["-k", "test_sizes or denormal", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(file), *tests],
        env={**os.environ, "UNIGEN_FAST_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    assert " passed" in run.stdout
