"""Builds the kernels (unigen_fast/_build.py) into the package, each only where it can be built.

An install does not fail for want of a kernel: `unigen_fast.info()` says what was not built, and why.
"""

import gzip
import importlib.util
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(f"unigen_fast: got setuptools {setuptools.__version__}, expected 77 or later (pip install -U setuptools)")

from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
# by its path: the package imports torch, which a build need not have
_spec = importlib.util.spec_from_file_location("_build", ROOT / "unigen_fast" / "_build.py")
_build = importlib.util.module_from_spec(_spec)
sys.modules["_build"] = _build
_spec.loader.exec_module(_build)


class BuildKernels(build_ext):
    def run(self) -> None:
        root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        try:
            _build.build((root / "unigen_fast").resolve())
        except _build.CannotBuild as error:
            sys.exit(f"unigen_fast: {error}")

    def get_outputs(self) -> list[str]:
        files = [*_build.targets(Path(self.build_lib) / "unigen_fast").values()]
        return [str(path) for path in [*files, files[0].with_name(_build.REPORT)] if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in has them


class Package(build_py):
    """With the sources of the kernels, so that an installed package can build what it lacks."""

    def run(self) -> None:
        package = Path(self.build_lib) / "unigen_fast"
        if self.editable_mode:
            return super().run()
        shutil.rmtree(package, ignore_errors=True)  # what an earlier build left there would go into the wheel
        super().run()
        shutil.copytree(ROOT / "csrc", package / "csrc", ignore=shutil.ignore_patterns("*.md"))


class SourceDistribution(sdist):
    def make_archive(self, base_name: str, *arguments: Any, base_dir: str, **options: Any) -> str:
        """The same files make the same bytes under SOURCE_DATE_EPOCH, whoever packs them, and when."""
        date = os.environ.get("SOURCE_DATE_EPOCH")
        if date is None:
            return super().make_archive(base_name, *arguments, base_dir=base_dir, **options)

        def undated(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.mtime, member.uid, member.gid, member.uname, member.gname = int(date), 0, 0, "", ""
            return member

        archive = f"{base_name}.tar.gz"
        Path(archive).parent.mkdir(parents=True, exist_ok=True)
        with gzip.GzipFile(archive, "wb", mtime=int(date)) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(base_dir, filter=undated)
        return archive


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """One wheel for every Python: the libraries know nothing of Python. Without any, for every platform too."""
        platform = super().get_tag()[2]
        kernels = any(path.exists() for path in _build.targets(Path(self.bdist_dir) / "unigen_fast").values())
        return "py3", "none", platform if kernels else "any"


def description() -> str:
    """README with links that work on a package index."""
    (address,) = re.findall(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

    def absolute(link: re.Match[str]) -> str:
        return f"{link[1]}({address}/{'raw' if link[1].startswith('!') else 'blob'}/main/{link[2]})"

    return re.sub(r"(!?\[[^\]]*\])\((?!https?:|#)([^)]+)\)", absolute, (ROOT / "README.md").read_text())


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("unigen_fast._kernels", [])],  # for setuptools: there is something to build
    cmdclass={"build_ext": BuildKernels, "build_py": Package, "sdist": SourceDistribution, "bdist_wheel": Wheel},
)
