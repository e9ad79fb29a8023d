"""Builds the kernels: for setup.py, and as `python -m unigen_fast build` for the torch that is installed.

    libunigen_cpu.so   C++ kernels         a C++ compiler and ninja
    libunigen_cuda.so  CUDA kernels        nvcc as well
    _autograd          autograd's node     the headers of torch and Python; it serves that release of torch alone

The libraries use torch's stable C interface, which csrc/bindings/stable.h declares, and none of its headers: one file
serves every Python, and every torch from 2.10 on. Neither torch nor the package is imported here. What is not built is
written, with the reason, to `_build_report.json`, which `unigen_fast.info()` reads.

Environment: CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, CUDA_HOME, TORCH_CUDA_ARCH_LIST; UNIGEN_FAST_BUILD_CUDA (1: also where
nothing tells that there is a use for it, 0: never); UNIGEN_FAST_REQUIRE_BUILD=1 fails where the CPU kernels, or what
was begun, cannot be built.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
IN_CHECKOUT = (ROOT / "csrc" / "kernels.h").exists()
SOURCE = ROOT / "csrc" if IN_CHECKOUT else PACKAGE / "csrc"
REPORT = "_build_report.json"
LIBRARIES = {"cpu": "libunigen_cpu.so", "cuda": "libunigen_cuda.so"}

# NaN and infinity keep their meaning: no -ffast-math
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -g0"
# The default unit carries no ISA flag; few processors need it, and it is compiled the faster.
ISA_FLAGS = {
    "default": "-O1",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --threads 2"
CAPABILITIES = ("8.0", "9.0", "10.0", "12.0")
LAST_LINES = 12  # of the compiler's output that a report keeps


class CannotBuild(Exception):
    """The reason why a module is not built; `failed`: the build was begun."""

    def __init__(self, reason: str, failed: bool = False) -> None:
        super().__init__(reason)
        self.failed = failed


@dataclass(frozen=True)
class Torch:
    """The torch of an environment, as its files tell."""

    folder: Path
    version: str
    cuda: str | None

    @classmethod
    def find(cls) -> "Torch | None":
        """In this interpreter's environment, whose packages an isolated build does not see on its path."""
        for path in (*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
            folder = Path(path) / "torch"
            if (folder / "version.py").is_file():
                values: dict[str, str | None] = {}
                for line in (folder / "version.py").read_text().splitlines():
                    found = re.match(r"(__version__|cuda)\b.*?= *(?:'([^']*)'|None)", line)
                    if found:
                        values[found[1]] = found[2]
                return cls(folder, values.get("__version__") or "unknown", values.get("cuda"))
        return None


# ---- tools -----------------------------------------------------------------------------------------------------------


def words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def cxx() -> list[str]:
    """The C++ compiler, with the arguments that CXX may have."""
    if sys.platform == "win32":
        raise CannotBuild("the C++ kernels are written for GCC and Clang, and are not built on Windows")
    wanted = words("CXX")
    for command in [wanted] if wanted else (["c++"], ["g++"], ["clang++"]):
        if shutil.which(command[0]):
            return command
    raise CannotBuild(f"no C++ compiler ({' '.join(wanted) or 'c++, g++, clang++'}) at build time")


def ninja() -> str:
    """That of the package, if there is one, wherever the build runs: another release would compile everything anew."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja") or shutil.which("ninja-build")
        if found is None:
            raise CannotBuild("no ninja at build time (pip install ninja)") from None
        return found
    return str(Path(BIN_DIR) / "ninja")


def cuda_home() -> Path:
    """The toolkit that has both nvcc and the runtime's headers."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for home in candidates:
        if home and (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime_api.h").exists():
            return Path(home)
    raise CannotBuild("no nvcc at build time")


def check_wants_cuda(torch: Torch | None) -> None:
    wanted = os.environ.get("UNIGEN_FAST_BUILD_CUDA")
    if wanted == "0":
        raise CannotBuild("left out by UNIGEN_FAST_BUILD_CUDA=0")
    cuda_home()
    if wanted == "1":
        return
    if torch is None and not Path("/proc/driver/nvidia").exists():
        raise CannotBuild("neither torch nor a GPU to build for (UNIGEN_FAST_BUILD_CUDA=1 builds it)")
    if torch is not None and torch.cuda is None:
        raise CannotBuild("torch is a CPU build")


def capabilities(home: Path) -> list[str]:
    """Those that nvcc is to compile for: TORCH_CUDA_ARCH_LIST, or all that it knows of ours."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace("+PTX", "").split()
    if named:
        for name in named:
            if not re.fullmatch(r"\d+\.\d", name) or float(name) < 8:
                expected = "compute capabilities of 8.0 or more, such as 8.0;9.0"
                raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: got {name!r}, expected {expected}", failed=True)
        return sorted(named, key=float)
    known = subprocess.run([home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [name for name in CAPABILITIES if f"compute_{name.replace('.', '')}" in known]


def architectures(source: Path, names: Sequence[str]) -> str:
    """nvcc's flags: one PTX for all, so that the sources are compiled once, but where sm_90's clusters are used."""
    numbers = [name.replace(".", "") for name in names]
    clusters = "cluster" in source.read_text()
    parts = [[n for n in numbers if int(n) < 90], [n for n in numbers if int(n) >= 90]] if clusters else [numbers]
    flags = []
    for part in filter(None, parts):
        codes = ",".join(f"sm_{n}" for n in part)
        flags.append(f"-gencode arch=compute_{part[0]},code=[{codes},compute_{part[0]}]")
    return " ".join(flags)


# ---- ninja -----------------------------------------------------------------------------------------------------------


def quoted(command: Sequence[str | Path]) -> str:
    return " ".join(shlex.quote(str(word)) for word in command).replace("$", "$$")


class Ninja:
    """A ninja file of compile and link steps."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.lines = [
            f"builddir = {self._path(directory)}",
            "rule compile",
            "  command = $compiler -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $linker -o $out $in $libraries",
        ]

    @staticmethod
    def _path(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def compile(self, source: Path, suffix: str, command: str) -> Path:
        out = self.directory / f"{source.stem}{suffix}.o"
        self.lines += [f"build {self._path(out)}: compile {self._path(source)}", f"  compiler = {command}"]
        return out

    def link(self, objects: list[Path], target: Path, command: str, libraries: str) -> None:
        inputs = " ".join(map(self._path, objects))
        self.lines += [
            f"build {self._path(target)}: link {inputs}",
            f"  linker = {command}",
            f"  libraries = {libraries}",
        ]

    def run(self, target: Path) -> None:
        """Shows the compiler's output; where it fails, its last lines are the reason."""
        file = self.directory / f"{target.stem}.ninja"
        file.write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        command = [ninja(), "-f", str(file), "-j", jobs, str(target)]
        lines: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip())
        if process.returncode:
            last = "\n".join([line for line in lines if line][-LAST_LINES:])
            raise CannotBuild(f"the build failed:\n{last}", failed=True)


# ---- modules ---------------------------------------------------------------------------------------------------------


def _hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def declarations() -> str:
    """Of the ops as the package declares them. Kernels of other declarations are not loaded."""
    return _hash(PACKAGE / "_ops.py")


def contract() -> str:
    """Of what kernels are given: `_autograd` calls those of the same contract alone."""
    return _hash(SOURCE / "kernels.h", SOURCE / "cpu/kernels.h", *sorted((SOURCE / "kernels").glob("*.h")))


def bindings(flags: str) -> str:
    """The command that compiles a file which sees torch."""
    own = f'-DUNIGEN_SOURCES="{contract()}"'
    return f"{quoted(cxx())} {CXX_FLAGS} -O2 {flags} {quoted([own])} {quoted(words('CXXFLAGS'))}"


def linker(flags: str = "") -> str:
    return f"{quoted(cxx())} -shared {flags} {quoted(words('LDFLAGS'))}"


def loaded_by_torch(directory: Path, names: Sequence[str]) -> str:
    """The linker's flags for symbols of libraries that torch has loaded by then. These need not be here: an empty
    library of the same name stands for each."""
    if sys.platform == "darwin":
        return "-undefined dynamic_lookup"
    stubs = []
    for name in names:
        stub = directory / f"lib{name}.so"
        if not stub.exists():
            empty = [*cxx(), "-shared", "-x", "c++", os.devnull, "-o", str(stub), f"-Wl,-soname,lib{name}.so"]
            run = subprocess.run(empty, capture_output=True, text=True)
            if run.returncode:
                raise CannotBuild(f"the compiler does not work:\n{run.stderr.strip()}", failed=True)
        stubs.append(stub)
    return f"-Wl,--no-as-needed {quoted(stubs)} -Wl,--as-needed"


def build_cpu(target: Path, work: Path) -> None:
    steps, source = Ninja(work), SOURCE / "cpu"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    first = source / "bindings.cpp"
    objects = [steps.compile(first, "", bindings(""))]
    for isa, flags in ISA_FLAGS.items() if x86 else [("default", "")]:
        command = f"{quoted(cxx())} {CXX_FLAGS} -DUNIGEN_ISA={isa} {flags} {quoted(words('CXXFLAGS'))}"
        objects += [steps.compile(unit, f".{isa}", command) for unit in sorted({*source.glob("*.cpp")} - {first})]
    steps.link(objects, target, linker(), loaded_by_torch(work, ["torch_cpu"]))
    steps.run(target)


def build_cuda(target: Path, work: Path, torch: Torch | None) -> None:
    check_wants_cuda(torch)
    home, source = cuda_home(), SOURCE / "cuda"
    names, steps = capabilities(home), Ninja(work)
    listed = " ".join(f"sm_{name.replace('.', '')}" for name in names)
    include = quoted([f'-DUNIGEN_ARCHITECTURES="{listed}"', "-isystem", home / "include"])
    objects = [steps.compile(source / "bindings.cpp", "", bindings(include))]
    host = ["-ccbin", cxx()[-1]] if words("CXX") else []
    nvcc = quoted([home / "bin/nvcc", *host])
    for unit in sorted(source.glob("*.cu")):
        objects.append(steps.compile(unit, "", f"{nvcc} {NVCC_FLAGS} {architectures(unit, names)}"))
    cudart = f"{quoted([f'-L{home}/lib64', f'-L{home}/lib'])} -lcudart_static -ldl -lrt -lpthread"
    steps.link(objects, target, linker(), f"{loaded_by_torch(work, ['torch_cpu', 'torch_cuda'])} {cudart}")
    steps.run(target)


def build_autograd(target: Path, work: Path, torch: Torch | None) -> None:
    if torch is None:
        raise CannotBuild("torch was not there at build time (python -m unigen_fast build, once it is)")
    steps, headers = Ninja(work), torch.folder / "include"
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise CannotBuild(f"no Python.h in {python}: the headers of Python are not installed")
    folders = [headers, headers / "torch/csrc/api/include", python]
    include = quoted([word for folder in folders for word in ("-isystem", folder)])
    compiled = steps.compile(SOURCE / "bindings/autograd.cpp", "", bindings(f"-std=c++20 {include}"))
    libraries = ["torch", "torch_cpu", "c10", "torch_python"]
    steps.link([compiled], target, linker(), loaded_by_torch(work, libraries))
    steps.run(target)


def targets(folder: Path) -> dict[str, Path]:
    """The file of each module in a folder of the package."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return {name: folder / file for name, file in LIBRARIES.items()} | {"autograd": folder / f"_autograd{suffix}"}


def made_of(torch: Torch | None) -> dict[str, str]:
    """For each module, what tells one build of it from another."""
    sources = _hash(*sorted(path for path in SOURCE.rglob("*") if path.suffix in (".h", ".cpp", ".cu")))
    of_libraries = " ".join([sources, *words("CXXFLAGS"), *words("LDFLAGS")])
    return {name: of_libraries for name in LIBRARIES} | {"autograd": f"{of_libraries} {torch and torch.version}"}


def build(folder: Path) -> dict[str, str]:
    """Builds into a folder of the package what can be built; returns the reasons for the rest."""
    torch = Torch.find()
    keys = made_of(torch)
    builders: dict[str, Callable[[Path, Path], None]] = {
        "cpu": build_cpu,
        "autograd": lambda target, work: build_autograd(target, work, torch),
        "cuda": lambda target, work: build_cuda(target, work, torch),
    }
    folder.mkdir(parents=True, exist_ok=True)
    reasons: dict[str, str] = {}
    required = os.environ.get("UNIGEN_FAST_REQUIRE_BUILD") == "1"
    with tempfile.TemporaryDirectory() as temporary:
        # beside the sources the objects are kept: what has not changed is not compiled again
        kept = ROOT / "build" / "kernels" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work = kept if IN_CHECKOUT and os.access(ROOT, os.W_OK) else Path(temporary)
        files = targets(folder)
        before = json.loads((folder / REPORT).read_text()).get("made_of", {}) if (folder / REPORT).exists() else {}
        if not IN_CHECKOUT:  # there are no objects: a library that is there already, as in a wheel, is kept
            builders = {n: b for n, b in builders.items() if not (files[n].exists() and before.get(n) == keys[n])}
        with ThreadPoolExecutor() as pool:  # a module of one long compilation beside one of many short ones
            begun = {name: pool.submit(builder, files[name], work / name) for name, builder in builders.items()}
        for name, future in begun.items():
            try:
                future.result()
            except CannotBuild as error:
                reasons[name] = str(error)
                files[name].unlink(missing_ok=True)  # an older build's
                print(f"unigen_fast: {files[name].name} is not built: {error}", file=sys.stderr, flush=True)
                if required and (error.failed or name == "cpu"):
                    raise
    report = {
        "ops": declarations(),
        "torch": torch.version if torch else None,
        "made_of": {name: key for name, key in keys.items() if name not in reasons},
        "reasons": reasons,
    }
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return reasons


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m unigen_fast build`: returns the exit status."""
    from unigen_fast._command_line import Parser

    parser = Parser("build", "Builds what is missing, or has changed, of the kernels, and the node for this torch.")
    parser.parse_args(argv)
    if not SOURCE.exists():
        parser.fail(f"the sources of the kernels are not in {SOURCE}")
    try:
        reasons = build(PACKAGE)
    except CannotBuild as error:
        parser.fail(str(error))
    for name, target in targets(PACKAGE).items():
        if name not in reasons:
            print(f"{name:<8} {target}")
    return 1 if "cpu" in reasons or "autograd" in reasons else 0
