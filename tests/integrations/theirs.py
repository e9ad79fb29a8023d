"""A pytest plugin: a library's own tests, from its source, with our functions in the place of its own.

    python -m pytest -p theirs --patch scvi <source of scvi-tools>/tests/distributions

with this folder on PYTHONPATH; without `--patch` they run as they are. Packages that only some other part of a library
needs are stubs. Says at the end what ran, and fails if nothing of ours did.
"""

import contextlib

import conftest
import pytest

import unigen_fast as uf

_stubs = contextlib.ExitStack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--patch", help="the library, as in `unigen_fast.integrations.patched`")


def pytest_sessionstart(session: pytest.Session) -> None:
    _stubs.enter_context(conftest.stubs())
    if library := session.config.getoption("--patch"):
        getattr(uf.integrations, f"apply_to_{library}")()


def pytest_sessionfinish(session: pytest.Session) -> None:
    library = session.config.getoption("--patch")
    if library and not any(uf.integrations.calls(library).values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    _stubs.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if library := config.getoption("--patch"):
        for path, count in uf.integrations.calls(library).items():
            terminalreporter.write_line(f"calls of {path}: {count}")
