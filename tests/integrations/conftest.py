"""Some packages import others that what is tested here has no use for: a stub stands in while they are imported."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

UNUSED = ("torchvision", "tensorflow", "torch._six")  # the last was in PyTorch once
IMPORT_THEM = ("multivae.models", "taming.modules.losses.vqperceptual", "torchgan.losses", "torch_mimicry.nets")


class _Anything(type):
    """A class that has every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Stub(ModuleType):
    """A module with every name and every submodule."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(_Anything("stub", (), {}), name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        unused = any(f"{name}.".startswith(f"{package}.") for package in UNUSED)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if unused else None

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stubs() -> Iterator[None]:
    """The packages that are not there can be imported; afterwards nobody finds them."""
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Stub)]:
            del sys.modules[name]


def pytest_configure(config: pytest.Config) -> None:
    with stubs():
        for name in IMPORT_THEM:
            if importlib.util.find_spec(name.split(".")[0]) is not None:
                importlib.import_module(name)
