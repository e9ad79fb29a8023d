"""README's lines install the package, with its kernels, into an environment that has torch."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from helpers import NATIVE
from test_readme import install_lines

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not NATIVE["cpu"], reason="what was compiled here is compiled again elsewhere")
def test_readmes_lines(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib"))  # this environment's
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("UNIGEN_FAST", "PYTHONPATH"))}
    clean |= {"PATH": f"{environment / 'bin'}{os.pathsep}{clean['PATH']}", "UNIGEN_FAST_BUILD_CUDA": "0"}
    said = ""
    for line in install_lines():
        folder = ROOT if line.startswith("pip ") else tmp_path  # where no checkout lies
        finished = subprocess.run(line, shell=True, cwd=folder, env=clean, capture_output=True, text=True)
        said = finished.stdout + finished.stderr
        assert finished.returncode == 0, said
    assert "\ncpu      yes C++" in said
    checks = [str(environment / "bin" / "python"), str(ROOT / "tests" / "numeric_checks.py")]
    finished = subprocess.run(checks, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
    where = [checks[0], "-c", "import unigen_fast; print(unigen_fast.__file__)"]
    assert subprocess.run(where, cwd=tmp_path, env=clean, capture_output=True, text=True).stdout.startswith(
        str(packages)
    )
