"""Builds the CPU kernels for one instruction set, UNIGEN_FAST_ISA or avx2, and runs Python on them:

    UNIGEN_FAST_ISA=avx512 python tests/cpu_unit.py tests/comparison.py
    python tests/cpu_unit.py --sanitize -m pytest -q tests/test_likelihood.py

Without optimisation and forced inlining a unit compiles in seconds. With `--sanitize` AddressSanitizer and
UndefinedBehaviorSanitizer look on, and their first report ends it. AVX-512 is emulated (avx512.h) where the processor
has none. What is run imports the package from a folder of links to it, in which the module is the one built here.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from unigen_fast import _build  # noqa: E402

FLAGS = "-O0 -g1 -fno-omit-frame-pointer"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def build(folder: Path, isa: str, flags: str) -> None:
    steps, source, compiler = _build.Ninja(folder), ROOT / "csrc" / "cpu", _build.quoted(_build.cxx())
    bindings = source / "bindings.cpp"
    objects = [steps.compile(bindings, "", _build.bindings(flags))]
    command = f"{compiler} {_build.CXX_FLAGS} -DUNIGEN_ISA={isa} {isa_flags(isa)} {flags}"
    objects += [steps.compile(unit, f".{isa}", command) for unit in sorted({*source.glob("*.cpp")} - {bindings})]
    package = folder / "unigen_fast"
    package.mkdir(exist_ok=True)
    target = package / _build.LIBRARIES["cpu"]
    # the tables of the others are this one's
    others = " ".join(f"-Wl,--defsym={table(other)}={table(isa)}" for other in _build.ISA_FLAGS if other != isa)
    libraries = _build.loaded_by_torch(folder, ["torch_cpu"])
    steps.link(objects, target, _build.linker(f"{flags} {others}"), libraries)
    steps.run(target)
    for path in (ROOT / "unigen_fast").iterdir():
        link = package / path.name
        if path.name != target.name and not link.is_symlink():
            link.symlink_to(path)


def isa_flags(isa: str) -> str:
    if isa != "avx512" or "avx512f" in Path("/proc/cpuinfo").read_text():
        return _build.ISA_FLAGS[isa]
    return f"{_build.ISA_FLAGS['avx2']} -Wno-psabi -include {ROOT / 'tests' / 'avx512.h'}"


def table(isa: str) -> str:
    """The symbol of its kernels, csrc/cpu/kernels.h."""
    return f"_ZN6unigen3cpu{len('kernels_' + isa)}kernels_{isa}Ev"


def sanitizers() -> dict[str, str]:
    """The environment in which Python runs what is built with them."""
    command = [*_build.cxx(), "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def main() -> int:
    arguments = sys.argv[1:]
    sanitize = arguments[:1] == ["--sanitize"]
    isa = os.environ.get("UNIGEN_FAST_ISA", "avx2")
    folder = ROOT / "build" / ("sanitized" if sanitize else "units") / isa
    build(folder, isa, f"{FLAGS} {SANITIZE}" if sanitize else FLAGS)
    chosen = {"PYTHONPATH": str(folder)} | (sanitizers() if sanitize else {})
    words = [str(Path(word).resolve()) if Path(word).exists() else word for word in arguments[sanitize:]]
    return subprocess.run([sys.executable, *words], cwd=folder, env={**os.environ, **chosen}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
