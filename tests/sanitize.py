"""Builds the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and runs Python on them:

    python tests/sanitize.py -m pytest -q tests/test_likelihood.py

Without optimisation and forced inlining a unit compiles in seconds. What is run imports the package from a folder of
links to it, in which the module is the one built here, for one instruction set: UNIGEN_FAST_ISA, or avx2. The first
report ends it.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from setup import CXX_FLAGS, ISA_FLAGS, STABLE_ABI, BuildKernels, Ninja  # noqa: E402

FLAGS = "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def build(folder: Path, isa: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ninja, source = Ninja(folder), ROOT / "csrc" / "cpu"
    bindings = source / "bindings.cpp"
    objects = [ninja.compile(bindings, "", BuildKernels.binding(f"{STABLE_ABI} {FLAGS}"))]
    command = f"{BuildKernels.cxx()} {CXX_FLAGS} -DUNIGEN_ISA={isa} {ISA_FLAGS[isa]} {FLAGS}"
    objects += [ninja.compile(unit, f".{isa}", command) for unit in sorted({*source.glob("*.cpp")} - {bindings})]
    package = folder / "unigen_fast"
    package.mkdir(exist_ok=True)
    target = package / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    # the tables of the others are this one's
    others = " ".join(f"-Wl,--defsym={table(other)}={table(isa)}" for other in ISA_FLAGS if other != isa)
    ninja.link(objects, target, f"{BuildKernels.cxx()} -shared {FLAGS} {others}", BuildKernels.torch_libraries())
    ninja.run(target)
    for path in (ROOT / "unigen_fast").iterdir():
        link = package / path.name
        if not path.name.startswith("_cpu.") and not link.is_symlink():
            link.symlink_to(path)


def table(isa: str) -> str:
    """The symbol of its kernels, csrc/cpu/kernels.h."""
    return f"_ZN6unigen3cpu{len('kernels_' + isa)}kernels_{isa}Ev"


def main() -> int:
    isa = os.environ.get("UNIGEN_FAST_ISA", "avx2")
    folder = ROOT / "build" / "sanitized" / isa
    build(folder, isa)
    runtime = subprocess.run(
        [BuildKernels.cxx(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    chosen = {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
    }
    arguments = [str(Path(word).resolve()) if Path(word).exists() else word for word in sys.argv[1:]]
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **chosen}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
