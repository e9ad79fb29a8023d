"""Compiles every CUDA kernel as a build does, for sm_80 and sm_90, without a GPU, and reports what each needs.

    python benches/compile_cuda.py [--all]

A table of registers, stack, spills and shared memory: of the heaviest kernels, or of all with `--all`. Fails where a
file does not compile, or a kernel spills registers or keeps anything in local memory.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from unigen_fast._build import NVCC_FLAGS, architectures  # noqa: E402

CAPABILITIES = ("8.0", "9.0")
LONGEST = ("likelihood", "objectives", "elbo")  # to compile: they go first


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int


def compile_file(source: pathlib.Path, folder: pathlib.Path) -> tuple[list[Kernel], str]:
    """The kernels of a file, and what nvcc said if it failed."""
    flags = [*NVCC_FLAGS.split(), *architectures(source, CAPABILITIES).split(), "-Xptxas", "-v", "-fatbin"]
    start = time.perf_counter()
    run = subprocess.run(
        ["nvcc", *flags, str(source), "-o", str(folder / f"{source.stem}.fatbin")],
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{source.name}: {time.perf_counter() - start:.0f} s", flush=True)
    text = run.stdout + run.stderr
    if run.returncode != 0:
        return [], text
    kernels = []
    for part in text.split("Compiling entry function ")[1:]:
        entry = re.match(r"'(\w+)' for '(\w+)'", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        assert entry and stack and used, part
        shared = re.search(r"(\d+) bytes smem", used[2])
        spills = int(stack[2]) + int(stack[3])
        kernels.append(
            Kernel(short_name(entry[1]), entry[2], int(used[1]), int(stack[1]), spills, int(shared[1]) if shared else 0)
        )
    return kernels, ""


def short_name(mangled: str) -> str:
    if shutil.which("c++filt") is None:
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|unigen::|cuda::|^void ", "", name)
    return name.partition("(")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="list every kernel")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH")
        return 1
    sources = sorted(
        (ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: (path.stem not in LONGEST, -path.stat().st_size)
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda source: compile_file(source, pathlib.Path(folder)), sources))
    for source, (_, error) in zip(sources, results, strict=True):
        if error:
            print(f"\n{source.name} does not compile:\n{error}")
    kernels = sorted(
        (kernel for found, _ in results for kernel in found), key=lambda k: (-k.stack, -k.registers, k.name)
    )
    bad = [kernel for kernel in kernels if kernel.stack or kernel.spills]
    print(f"\n{'registers':>9} {'stack':>5} {'spills':>6} {'shared':>6}  architecture  kernel")
    for kernel in kernels if options.all else kernels[: max(10, len(bad))]:
        print(
            f"{kernel.registers:>9} {kernel.stack:>5} {kernel.spills:>6} {kernel.shared:>6}  "
            f"{kernel.architecture:<12}  {kernel.name}"
        )
    failed = sum(1 for _, error in results if error)
    seconds = time.perf_counter() - start
    print(f"\n{len(kernels)} kernels in {seconds:.0f} s: {failed} files failed, {len(bad)} kernels use local memory")
    return 1 if failed or bad else 0


if __name__ == "__main__":
    sys.exit(main())
