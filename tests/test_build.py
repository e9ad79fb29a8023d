"""An installation succeeds, in pure Python, wherever the kernels cannot be built, and says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")


def build(tmp_path, prelude="", **environment):
    """Runs setup.py as an installation does, into `tmp_path`; returns its report of what was not built."""
    arguments = ["setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    code = f"import runpy, sys\n{prelude}\nsys.argv = {arguments!r}\nrunpy.run_path('setup.py', run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert not list((tmp_path / "lib").rglob("*.so"))
    return json.loads((tmp_path / "lib" / "unigen_fast" / "_build_report.json").read_text())


def test_no_compiler(tmp_path):
    report = build(tmp_path, CXX="no-such-compiler", UNIGEN_FAST_BUILD_CUDA="0")
    assert report["cpu"] == "no C++ compiler (no-such-compiler) at build time"
    assert report["autograd"] == report["cpu"]
    assert report["cuda"] == "left out by UNIGEN_FAST_BUILD_CUDA=0"


def test_build_isolation_without_torch(tmp_path):
    report = build(tmp_path, prelude="sys.modules['torch'] = None")
    assert "torch was not importable" in report["cpu"]
    assert "--no-build-isolation" in report["cpu"]
    assert "torch was not importable" in report["cuda"]


def test_a_failing_build_fails_only_where_it_must(tmp_path):
    compiler = tmp_path / "failing"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    report = build(tmp_path, CXX=str(compiler), UNIGEN_FAST_BUILD_CUDA="0", UNIGEN_FAST_REQUIRE_BUILD="0")
    assert "the build failed" in report["cpu"]
