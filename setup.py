"""Builds the extension modules with ninja, each only where it can be built.

`unigen_fast._cpu` needs torch, pybind11, ninja and a C++ compiler at hand, and so does `unigen_fast._autograd`, which
serves only the torch it is built with; `unigen_fast._cuda` needs nvcc as well, and is left out where torch is a CPU
build (`UNIGEN_FAST_BUILD_CUDA=1` builds it all the same, to check that it compiles and links; `=0` never). What is not
built is written, with the reason, to `unigen_fast/_build_report.json`, which `unigen_fast.info()` reads: an install
does not fail for want of a kernel.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # one binary for torch 2.10 and later
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -g0"
# NaN and infinity keep their meaning: no -ffast-math. The default unit carries no ISA flag; few processors need it, and
# it is compiled the faster.
ISA_FLAGS = {
    "default": "-O2",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --threads 2"


def importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def missing_for_cpu() -> str | None:
    if not importable("torch"):
        return "torch was not importable at build time (build with --no-build-isolation)"
    for module in ("pybind11", "ninja"):
        if not importable(module):
            return f"{module} was not installed at build time"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"no C++ compiler ({compiler}) at build time"


def cuda_home() -> Path | None:
    """The toolkit that has both nvcc and the runtime's headers."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for home in candidates:
        if home and (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime_api.h").exists():
            return Path(home)
    return None


def missing_for_cuda() -> str | None:
    wanted = os.environ.get("UNIGEN_FAST_BUILD_CUDA")
    if wanted == "0":
        return "left out by UNIGEN_FAST_BUILD_CUDA=0"
    reason = missing_for_cpu()
    if reason:
        return reason
    if cuda_home() is None:
        return "no nvcc at build time"
    import torch

    return None if torch.version.cuda or wanted == "1" else "torch is a CPU build"


def architectures(source: Path) -> str:
    """nvcc's flags: one PTX for all, so that the sources are compiled once, but where sm_90's clusters are used."""
    if "cluster" in source.read_text():
        return "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90]"
    return "-gencode arch=compute_80,code=[sm_80,sm_90,compute_80]"


class Ninja:
    """A ninja file of compile and link steps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines = [
            f"builddir = {directory}",
            "rule compile",
            "  command = $compiler -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $linker -o $out $in $libraries",
        ]

    def compile(self, source: Path, suffix: str, command: str) -> Path:
        out = self.directory / f"{source.stem}{suffix}.o"
        self.lines += [f"build {out}: compile {source}", f"  compiler = {command}"]
        return out

    def link(self, objects: list[Path], target: Path, command: str, libraries: str) -> None:
        inputs = " ".join(map(str, objects))
        self.lines += [f"build {target}: link {inputs}", f"  linker = {command}", f"  libraries = {libraries}"]

    def run(self, target: Path) -> None:
        import ninja

        file = self.directory / f"{target.stem}.ninja"
        file.write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(file), "-j", jobs, str(target)])


class BuildKernels(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True  # a module of one long compilation beside one of many short ones

    def run(self) -> None:
        self.report: dict[str, str] = {}
        if importable("torch"):
            import torch

            self.report["torch"] = torch.__version__
        super().run()
        package = Path(self.get_ext_fullpath("unigen_fast._cpu")).parent
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_report.json").write_text(json.dumps(self.report, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition("._")[2]
        reason = missing_for_cuda() if name == "cuda" else missing_for_cpu()
        if reason is None:
            try:
                getattr(self, f"build_{name}")(Path(self.get_ext_fullpath(ext.name)).resolve())
            except subprocess.CalledProcessError as error:
                reason = f"the build failed (exit status {error.returncode}): see the output of the installation"
                if os.environ.get("UNIGEN_FAST_REQUIRE_BUILD") == "1":
                    raise
        if reason is not None:
            self.report[name] = reason
            print(f"unigen_fast: module _{name} is not built: {reason}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def _ninja(self, name: str) -> Ninja:
        directory = Path(self.build_temp).resolve() / name
        directory.mkdir(parents=True, exist_ok=True)
        return Ninja(directory)

    @classmethod
    def binding(cls, flags: str) -> str:
        import pybind11
        import torch

        # pybind11 first: torch brings a copy of its own, which some versions bar from the stable ABI
        includes = [pybind11.get_include(), str(Path(torch.__file__).parent / "include"), sysconfig.get_path("include")]
        return f"{cls.cxx()} {CXX_FLAGS} {flags} " + " ".join(f"-isystem {path}" for path in includes)

    @staticmethod
    def cxx() -> str:
        return os.environ.get("CXX", "g++")

    @staticmethod
    def torch_libraries() -> str:
        import torch

        library = Path(torch.__file__).parent / "lib"
        # libtorch.so holds nothing itself, but where torch has CUDA it brings in libtorch_cuda.so
        return f"-L{library} -Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu -lc10"

    def build_cpu(self, target: Path) -> None:
        source = ROOT.resolve() / "csrc" / "cpu"
        ninja = self._ninja("cpu")
        x86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
        bindings = source / "bindings.cpp"
        objects = [ninja.compile(bindings, "", self.binding(STABLE_ABI))]
        for isa, flags in ISA_FLAGS.items() if x86 else [("default", "")]:
            command = f"{self.cxx()} {CXX_FLAGS} -DUNIGEN_ISA={isa} {flags}"
            units = sorted(set(source.glob("*.cpp")) - {bindings})
            objects += [ninja.compile(unit, f".{isa}", command) for unit in units]
        target.parent.mkdir(parents=True, exist_ok=True)
        ninja.link(objects, target, f"{self.cxx()} -shared", self.torch_libraries())
        ninja.run(target)

    def build_autograd(self, target: Path) -> None:
        import torch

        ninja = self._ninja("autograd")
        api = Path(torch.__file__).parent / "include/torch/csrc/api/include"
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        command = self.binding(f"-std=c++20 -O2 {abi} -isystem {api}")
        source = ROOT.resolve() / "csrc" / "bindings" / "autograd.cpp"
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = f"{self.torch_libraries()} -ltorch_python"
        ninja.link([ninja.compile(source, "", command)], target, f"{self.cxx()} -shared", libraries)
        ninja.run(target)

    def build_cuda(self, target: Path) -> None:
        home = cuda_home()
        source = ROOT.resolve() / "csrc" / "cuda"
        nvcc = f"{home}/bin/nvcc {NVCC_FLAGS}"
        ninja = self._ninja("cuda")
        objects = [ninja.compile(source / "bindings.cpp", "", self.binding(f"{STABLE_ABI} -isystem {home}/include"))]
        units = sorted(source.glob("*.cu"))
        objects += [ninja.compile(unit, "", f"{nvcc} {architectures(unit)}") for unit in units]
        target.parent.mkdir(parents=True, exist_ok=True)
        cudart = f"-L{home}/lib64 -L{home}/lib -lcudart_static -ldl -lrt -lpthread"
        ninja.link(objects, target, f"{self.cxx()} -shared", f"{self.torch_libraries()} {cudart}")
        ninja.run(target)


if __name__ == "__main__":  # benches/compile_cuda.py asks for the flags alone
    setup(
        # optional: setuptools copies what there is
        ext_modules=[Extension(f"unigen_fast._{name}", [], optional=True) for name in ("cpu", "autograd", "cuda")],
        cmdclass={"build_ext": BuildKernels},
    )
