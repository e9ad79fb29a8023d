"""Loads the kernels there are, each at most once, at import; says why for those there are not.

`UNIGEN_FAST_DISABLE` (comma-separated: `cpu`, `cuda`, `triton`, `autograd`) leaves modules out; `UNIGEN_FAST_ISA`
(`default`, `avx2`, `avx512`) picks a CPU unit other than the best one. With `TRITON_INTERPRET=1` the Triton kernels
serve CPU tensors in Triton's interpreter, in place of the C++ ones: for tests.
"""

import functools
import importlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from unigen_fast._fused import LIBRARY, FusedOp


@dataclass(frozen=True)
class Backend:
    """A set of kernels, or the autograd node: whether it is in use, and what it is or why it is not."""

    name: str
    loaded: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name:<8} {'yes' if self.loaded else 'no '} {self.detail}"


@functools.cache
def _build_report() -> dict[str, str]:
    """Why the installation did not build what it did not, and the version of torch that it was built with."""
    path = Path(__file__).with_name("_build_report.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _extension(name: str, disabled: set[str]) -> Backend:
    """Importing an extension module registers its kernels."""
    if name in disabled:
        return Backend(name, False, "left out by UNIGEN_FAST_DISABLE")
    reason = _build_report().get(name)  # with one, a module that is there is an older build's
    if reason is not None or importlib.util.find_spec(f"unigen_fast._{name}") is None:
        return Backend(name, False, f"not built: {reason or 'no record of a build'}")
    try:
        module = importlib.import_module(f"unigen_fast._{name}")
    except (ImportError, OSError) as error:
        return Backend(name, False, f"does not load: {str(error).splitlines()[0]}")
    return Backend(name, True, module.build_info())


def _triton(disabled: set[str], interpret: bool, native_cuda: bool) -> Backend:
    if "triton" in disabled:
        return Backend("triton", False, "left out by UNIGEN_FAST_DISABLE")
    if native_cuda:
        return Backend("triton", False, "not needed: the CUDA kernels are loaded")
    if not interpret and not torch.cuda.is_available():
        return Backend("triton", False, "no GPU")
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", False, "Triton is not installed")
    try:
        triton = importlib.import_module("triton")
        kernels = importlib.import_module("unigen_fast.triton")
    except ImportError as error:
        return Backend("triton", False, f"does not load: {str(error).splitlines()[0]}")
    kernels.register(LIBRARY, "CPU" if interpret else "CUDA")
    return Backend("triton", True, f"Triton {triton.__version__}" + (", interpreted on the CPU" if interpret else ""))


def _autograd(disabled: set[str], cpu: Backend) -> Backend:
    """The autograd node in C++, which calls CPU kernels past the dispatcher where nobody else listens there.

    It uses more than the stable ABI has: only the torch it was built with will do.
    """
    if not cpu.loaded and "autograd" not in disabled:
        return Backend("autograd", False, "not needed: no CPU kernels")
    built_with = _build_report().get("torch")
    there = importlib.util.find_spec("unigen_fast._autograd") is not None
    if there and "autograd" not in disabled and built_with != torch.__version__:
        return Backend("autograd", False, f"Python's node: the one in C++ was built for torch {built_with}")
    backend = _extension("autograd", disabled)
    if backend.loaded:
        module = importlib.import_module("unigen_fast._autograd")
        module.call_directly(importlib.import_module("unigen_fast._cpu").kernels())
        for op in FusedOp.every:
            op.native = module.bind(op)
    return backend


def load() -> tuple[Backend, ...]:
    disabled = {word.strip() for word in os.environ.get("UNIGEN_FAST_DISABLE", "").split(",")}
    interpret = os.environ.get("TRITON_INTERPRET") == "1" and "triton" not in disabled
    if interpret:
        cpu = Backend("cpu", False, "TRITON_INTERPRET=1: Triton's interpreter serves CPU tensors")
    else:
        cpu = _extension("cpu", disabled)
    if torch.cuda.is_available() or "cuda" in disabled:
        cuda = _extension("cuda", disabled)
    else:
        cuda = Backend("cuda", False, "no GPU")
    triton = _triton(disabled, interpret, cuda.loaded)
    if cpu.loaded or (interpret and triton.loaded):
        FusedOp.devices.add("cpu")
    if cuda.loaded or (not interpret and triton.loaded):
        FusedOp.devices.add("cuda")
    return cpu, cuda, triton, _autograd(disabled, cpu)
