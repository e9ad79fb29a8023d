import os
from pathlib import Path

import pytest

# Several test processes share the cores: a thread that waits by spinning takes them from the others, which made the
# suite take twice as long. Read when OpenMP is loaded, so before torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import framework
import torch
from helpers import NATIVE, OPS, seed_generators


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--framework-table", metavar="PATH", help="write the table of what test_framework.py shows")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "feature(name): the column of the framework's table that a test fills")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if (feature := item.get_closest_marker("feature")) is not None:
        report.framework = [item.callspec.params["case"].function, feature.args[0]]  # xdist sends it along
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    framework.OUTCOMES.note(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--framework-table")
    if path is not None and not hasattr(session.config, "workerinput"):  # of xdist's processes, the one that has all
        framework.OUTCOMES.write(Path(path))


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU if there is one. Every test that can run on a GPU takes it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed_generators(0)


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled by an earlier test counts; nothing compiled here stays."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["C++", "Python"])
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two autograd nodes, which are to do the same."""
    if request.param == "Python":
        for op in OPS.values():
            monkeypatch.setattr(op, "native", None)
    elif not NATIVE["autograd"]:
        pytest.skip("the autograd node in C++ is not loaded")
    return request.param
