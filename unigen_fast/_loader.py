"""Loads the kernels there are; says why for those there are not.

At import those of the CPU; those of a GPU when the first tensor on one comes, or `info()` is asked: until then nobody
asks the driver. Kernels of ops other than those the package declares are not loaded.

`UNIGEN_FAST_DISABLE` (comma-separated: `cpu`, `cuda`, `triton`, `autograd`) leaves sets of kernels out;
`UNIGEN_FAST_ISA` (`default`, `avx2`, `avx512`) picks a CPU unit other than the best one. With `TRITON_INTERPRET=1` the
Triton kernels serve CPU tensors in Triton's interpreter, in place of the C++ ones: for tests.
"""

import ctypes
import functools
import importlib
import importlib.util
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unigen_fast import _build
from unigen_fast._fused import LIBRARY, FusedOp

NAMES = ("cpu", "cuda", "triton", "autograd")
REBUILD = "python -m unigen_fast build"
_OLDEST_TRITON = (3, 6)
_LEFT_OUT = "left out by UNIGEN_FAST_DISABLE"


@dataclass(frozen=True)
class Backend:
    """A set of kernels, or the autograd node: whether it is in use, and what it is or why it is not."""

    name: str
    loaded: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name:<8} {'yes' if self.loaded else 'no '} " + self.detail.replace("\n", "\n" + 13 * " ")


class _Refused(Exception):
    """Why a set of kernels is not loaded."""


def _named(variable: str, expected: tuple[str, ...]) -> set[str]:
    """The words of an environment variable, comma-separated."""
    words = {word.strip().lower() for word in os.environ.get(variable, "").split(",")} - {""}
    for word in sorted(words.difference(expected)):
        raise ValueError(f"{variable}: got {word!r}, expected {', '.join(expected)}")
    return words


@functools.cache
def _disabled() -> set[str]:
    return _named("UNIGEN_FAST_DISABLE", NAMES)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and "triton" not in _disabled()


@functools.cache
def _report() -> dict[str, Any]:
    """Of the build: of which declarations, for which torch, and the reasons why modules were not built."""
    path = Path(__file__).with_name(_build.REPORT)
    return json.loads(path.read_text()) if path.exists() else {}


def _check_built(name: str, file: Path) -> None:
    if not file.exists():
        raise _Refused(f"not built: {_report().get('reasons', {}).get(name, f'no record of a build ({REBUILD})')}")
    if _report().get("ops") != _build.declarations():
        raise _Refused(f"built from another version of the package: {REBUILD}")


# ---- libraries -------------------------------------------------------------------------------------------------------


def _signature(schema: str) -> str:
    """A schema less the names: `op(Tensor, int) -> (Tensor, Tensor)`."""
    name, _, rest = schema.partition("(")
    arguments, _, results = rest.partition(") -> ")

    def types(declared: str) -> str:
        return ", ".join(item.split()[0].replace("SymInt", "int") for item in declared.split(", ") if item)

    of_results = f"({types(results[1:-1])})" if results.startswith("(") else types(results)
    return f"{name}({types(arguments)}) -> {of_results}"


def _text(library: ctypes.CDLL, function: str) -> str | None:
    call = getattr(library, function)
    call.restype = ctypes.c_char_p
    answer = call()
    return None if answer is None else answer.decode()


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    """Opened, its ops compared with those that the package declares."""
    file = Path(__file__).with_name(_build.LIBRARIES[name])
    _check_built(name, file)
    try:
        library = ctypes.CDLL(str(file))
        signatures = (_text(library, "unigen_ops") or "").splitlines()
    except (OSError, AttributeError) as error:
        raise _Refused(f"does not load: {str(error).splitlines()[0]}") from None
    declared = {_signature(schema) for schema in FusedOp.schemas}
    for signature in signatures:
        if signature not in declared:
            raise _Refused(f"built for {signature}, which is not as the package declares it: {REBUILD}")
    return library


def ops(name: str) -> set[str]:
    """The ops that a library has kernels of; none where it cannot be opened."""
    try:
        return {line.partition("(")[0] for line in (_text(_library(name), "unigen_ops") or "").splitlines()}
    except _Refused:
        return set()


def _load(name: str) -> Backend:
    """Registers a library's kernels."""
    if name in _disabled():
        return Backend(name, False, _LEFT_OUT)
    try:
        library = _library(name)
        error = _text(library, "unigen_register")
    except _Refused as refused:
        return Backend(name, False, str(refused))
    if error is not None:
        return Backend(name, False, f"does not load: {error}")
    FusedOp.devices.add(name)
    return Backend(name, True, _text(library, "unigen_build_info") or "")


# ---- the CPU ---------------------------------------------------------------------------------------------------------


@functools.cache
def _cpu() -> Backend:
    if _interpreted():
        return Backend("cpu", False, "TRITON_INTERPRET=1: Triton's interpreter serves CPU tensors")
    _named("UNIGEN_FAST_ISA", tuple(_build.ISA_FLAGS))
    return _load("cpu")


def _serves(built_for: str | None, running: str) -> bool:
    """Whether a module built with one torch serves another. Builds of one release differ in their local suffix alone
    (+cpu, +cu130), and have the same headers; of what is no release, each is a torch of its own."""
    if built_for is None or not re.fullmatch(r"[\d.]+", running.partition("+")[0]):
        return built_for == running
    return built_for.partition("+")[0] == running.partition("+")[0]


@functools.cache
def _autograd() -> Backend:
    """The autograd node in C++, which calls CPU kernels past the dispatcher where nobody else listens there.

    It uses more than torch's stable interface has: only the release of torch that it was built with will do.
    """
    if "autograd" in _disabled():
        return Backend("autograd", False, _LEFT_OUT)
    if not _cpu().loaded:
        return Backend("autograd", False, "not needed: no CPU kernels")
    try:
        _check_built("autograd", _build.targets(Path(__file__).parent)["autograd"])
        built_for = _report().get("torch")
        if not _serves(built_for, torch.__version__):
            raise _Refused(f"Python's node: the one in C++ was built for torch {built_for} ({REBUILD})")
        module = importlib.import_module("unigen_fast._autograd")
        library = _library("cpu")
        if module.sources() != _text(library, "unigen_sources"):
            raise _Refused(f"built for other kernels than the CPU's: {REBUILD}")
    except _Refused as refused:
        return Backend("autograd", False, str(refused))
    except (ImportError, OSError) as error:
        return Backend("autograd", False, f"does not load: {str(error).splitlines()[0]}")
    library.unigen_kernels.restype = ctypes.c_void_p
    module.call_directly(library.unigen_kernels())
    with_kernels = ops("cpu")
    for op in FusedOp.every:
        if op.name in with_kernels:  # a new one has none yet: Python's node runs its reference
            op.native = module.bind(op)
    return Backend("autograd", True, module.build_info())


def load() -> None:
    """What serves the CPU."""
    FusedOp.load_gpu = staticmethod(load_gpu)
    if _interpreted():
        load_gpu()  # its kernels serve the CPU
    _autograd()
    gpu_is_likely = any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
    if not FusedOp.devices and "cpu" not in _disabled() and not gpu_is_likely:
        warnings.warn(
            f"unigen_fast has no kernels here ({_cpu().detail.splitlines()[0]}): every function runs as plain PyTorch. "
            f"To build them: {REBUILD}",
            stacklevel=3,
        )


# ---- GPUs ------------------------------------------------------------------------------------------------------------


@functools.cache
def _cuda() -> Backend:
    if "cuda" in _disabled():
        return Backend("cuda", False, _LEFT_OUT)
    if torch.version.cuda is None:
        return Backend("cuda", False, "torch is not a CUDA build")
    if not torch.cuda.is_available():
        return Backend("cuda", False, "no GPU")
    try:
        built_for = re.findall(r"sm_(\d+)", _text(_library("cuda"), "unigen_build_info") or "")
    except _Refused as refused:
        return Backend("cuda", False, str(refused))
    lowest = min(int(number) for number in built_for)
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < lowest:
            return Backend("cuda", False, f"built for sm_{lowest} and later, and the GPU is sm_{major}{minor}")
    return _load("cuda")


@functools.cache
def _triton() -> Backend:
    if "triton" in _disabled():
        return Backend("triton", False, _LEFT_OUT)
    if not _interpreted():
        if _cuda().loaded:
            return Backend("triton", False, "not needed: the CUDA kernels are loaded")
        if not torch.cuda.is_available():
            return Backend("triton", False, "no GPU")
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", False, "Triton is not installed")
    try:
        version = importlib.import_module("triton").__version__
        if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < _OLDEST_TRITON:
            oldest = ".".join(map(str, _OLDEST_TRITON))
            return Backend("triton", False, f"got Triton {version}, expected {oldest} or later")
        kernels = importlib.import_module("unigen_fast.triton")
    except ImportError as error:
        return Backend("triton", False, f"does not load: {str(error).splitlines()[0]}")
    device = "cpu" if _interpreted() else "cuda"
    kernels.register(LIBRARY, device.upper())
    FusedOp.devices.add(device)
    return Backend("triton", True, f"Triton {version}" + (", interpreted on the CPU" if _interpreted() else ""))


@torch.compiler.assume_constant_result
def load_gpu() -> None:
    """CUDA kernels if there are some for this GPU, else Triton's."""
    _cuda()
    _triton()
    if "cuda" in FusedOp.devices and _autograd().loaded:
        importlib.import_module("unigen_fast._autograd").serve_cuda()


def backends() -> tuple[Backend, ...]:
    load_gpu()
    return _cpu(), _cuda(), _triton(), _autograd()
