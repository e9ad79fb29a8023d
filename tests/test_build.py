"""A build succeeds with what a machine has, says what it lacks, and compiles no more than it must."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unigen_fast import _build

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools", minversion="77")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a build reads, in a folder with a space in its name."""
    root = tmp_path / "a check out"
    (root / "unigen_fast").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    for name in ("__init__.py", "_build.py", "_ops.py", "_version.py"):
        shutil.copy(ROOT / "unigen_fast" / name, root / "unigen_fast")
    shutil.copytree(ROOT / "csrc", root / "csrc")
    return root


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """Writes what it is asked for, with the right dependencies and nothing in it, and a line for each file."""
    script = tmp_path / "compiler"
    script.write_text(
        f"""#!{sys.executable}
import os, subprocess, sys
words = sys.argv[1:]
out = words[words.index("-o") + 1]
if "-c" in words:
    source = words[words.index("-c") + 1]
    print("compiled", os.path.basename(out), " ".join(words), flush=True)
    if os.environ.get("BROKEN") and os.environ["BROKEN"] in source:
        sys.exit("an error in " + os.path.basename(source))
    found = subprocess.run(["g++", "-MM", "-DUNIGEN_ISA=default", source], capture_output=True, text=True).stdout
    open(out + ".d", "w").write("'" + out + "'" + found[found.index(":"):] if found else "")
open(out, "w").close()
"""
    )
    script.chmod(0o755)
    return str(script)


def run(root: Path, prelude: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py as an editable installation does."""
    arguments = ["setup.py", "build_ext", "--inplace"]
    code = f"import runpy, sys\n{prelude}\nsys.argv = {arguments!r}\nrunpy.run_path('setup.py', run_name='__main__')"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("UNIGEN_FAST")}
    wanted = {"UNIGEN_FAST_BUILD_CUDA": "0", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={**clean, **wanted}, capture_output=True, text=True
    )


def reasons(root: Path) -> dict[str, str]:
    return json.loads((root / "unigen_fast" / _build.REPORT).read_text())["reasons"]


def compiled(finished: subprocess.CompletedProcess[str]) -> set[str]:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return {line.split()[1] for line in finished.stdout.splitlines() if line.startswith("compiled ")}


def test_no_compiler(checkout: Path) -> None:
    finished = run(checkout, CXX="no-such-compiler -O1")
    assert finished.returncode == 0, finished.stderr
    reason = "no C++ compiler (no-such-compiler -O1) at build time"
    assert reasons(checkout) == {
        "cpu": reason,
        "autograd": reason,
        "cuda": "left out by UNIGEN_FAST_BUILD_CUDA=0",
    }
    required = run(checkout, CXX="no-such-compiler", UNIGEN_FAST_REQUIRE_BUILD="1")
    assert required.returncode == 1
    assert "no C++ compiler (no-such-compiler)" in required.stderr


def test_no_ninja(checkout: Path, compiler: str, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "g++").symlink_to(shutil.which("g++") or "")
    finished = run(checkout, "sys.modules['ninja'] = None", CXX=compiler, PATH=str(tools))
    assert finished.returncode == 0, finished.stderr
    assert reasons(checkout)["cpu"] == "no ninja at build time (pip install ninja)"


def test_neither_torch_nor_pybind11_is_imported(checkout: Path, compiler: str) -> None:
    finished = run(checkout, "sys.modules['torch'] = sys.modules['pybind11'] = None", CXX=compiler)
    assert "bindings.o" in compiled(finished)
    assert "cpu" not in reasons(checkout)


def test_the_compilers_last_lines_are_the_reason(checkout: Path, compiler: str) -> None:
    (checkout / "unigen_fast" / _build.LIBRARIES["cpu"]).touch()  # an older build's
    finished = run(checkout, CXX=compiler, BROKEN="importance.cpp")
    assert finished.returncode == 0, finished.stderr
    assert "an error in importance.cpp" in finished.stdout
    assert reasons(checkout)["cpu"].startswith("the build failed:\n")
    assert "an error in importance.cpp" in reasons(checkout)["cpu"]
    assert not (checkout / "unigen_fast" / _build.LIBRARIES["cpu"]).exists()
    assert run(checkout, CXX=compiler, BROKEN="importance.cpp", UNIGEN_FAST_REQUIRE_BUILD="1").returncode == 1


def test_what_a_changed_file_compiles(checkout: Path, compiler: str) -> None:
    everything = compiled(run(checkout, CXX=compiler))
    units = {path.stem for path in (checkout / "csrc" / "cpu").glob("*.cpp")} - {"bindings"}
    isas = {name.split(".")[1] for name in everything if name.count(".") == 2}
    assert {name.split(".")[0] for name in everything} == {*units, "bindings", "autograd"}
    assert compiled(run(checkout, CXX=compiler)) == set(), "nothing has changed"

    (checkout / "csrc" / "formulas" / "pairwise.h").touch()
    assert compiled(run(checkout, CXX=compiler)) == {f"pairwise.{isa}.o" for isa in isas}
    (checkout / "csrc" / "formulas" / "adversarial.h").touch()
    assert compiled(run(checkout, CXX=compiler)) == {f"adversarial.{isa}.o" for isa in isas}


def test_an_installed_package_builds_what_is_missing_alone(checkout: Path, compiler: str) -> None:
    """From a wheel comes the library; the node for the torch that is there is added to it."""
    shutil.move(checkout / "csrc", checkout / "unigen_fast" / "csrc")
    package = checkout / "unigen_fast"

    def build(**environment: str) -> set[str]:
        code = "import sys; sys.path[0] = 'unigen_fast'; import _build; _build.build(_build.PACKAGE)"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("UNIGEN_FAST")}
        wanted = {"UNIGEN_FAST_BUILD_CUDA": "0", "CXX": compiler, **environment}
        command = [sys.executable, "-c", code]
        return compiled(subprocess.run(command, cwd=checkout, env={**clean, **wanted}, capture_output=True, text=True))

    assert {"bindings.o", "autograd.o"} < build()
    assert build() == set()
    next(package.glob("_autograd*.so")).unlink()
    assert build() == {"autograd.o"}
    assert "bindings.o" in build(CXXFLAGS="-DOTHER")


def test_flags_of_the_environment(checkout: Path, compiler: str) -> None:
    finished = run(checkout, CXX=f"env {compiler}", CXXFLAGS="-DFIRST='a b' -DSECOND")
    lines = [line for line in finished.stdout.splitlines() if line.startswith("compiled ")]
    assert lines and all("-DFIRST=a b -DSECOND" in line for line in lines)


def test_architectures() -> None:
    plain, clusters = (ROOT / "csrc" / "cuda" / name for name in ("divergence.cu", "objectives.cu"))
    assert "cluster" in clusters.read_text() and "cluster" not in plain.read_text()
    names = ("8.0", "9.0", "12.0")
    assert _build.architectures(plain, names) == ("-gencode arch=compute_80,code=[sm_80,sm_90,sm_120,compute_80]")
    assert _build.architectures(clusters, names) == (
        "-gencode arch=compute_80,code=[sm_80,compute_80] -gencode arch=compute_90,code=[sm_90,sm_120,compute_90]"
    )


def test_architectures_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX;8.6")
    assert _build.capabilities(Path("/nowhere")) == ["8.6", "9.0"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Turing 9.0")
    with pytest.raises(_build.CannotBuild, match="TORCH_CUDA_ARCH_LIST: got 'Turing'"):
        _build.capabilities(Path("/nowhere"))


def test_torch_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.10.1+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    torch = _build.Torch.find()
    assert torch is not None and (torch.version, torch.cuda) == ("2.10.1+cu130", "13.0")
