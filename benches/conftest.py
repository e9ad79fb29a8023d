"""pytest-benchmark over the rows of `unigen_fast.bench`: one group a row, one entry a contestant."""

from collections.abc import Callable

import pytest
import torch

from unigen_fast.bench import harness
from unigen_fast.bench.cases import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contestant" in metafunc.fixturenames:
        metafunc.parametrize("contestant", harness.contestants(DEVICE, compiled=True))


@pytest.fixture
def time_row(benchmark, contestant: str) -> Callable[[Row], None]:
    """Times one contestant's step of a row, after the fused result has been held against eager's."""

    def time(row: Row) -> None:
        benchmark.group = row.name
        case = harness.Case(row, DEVICE, torch.float32)
        case.check()
        torch._dynamo.reset()
        step = case.step(case.function(contestant))
        for _ in range(3):
            step()
        if DEVICE.type == "cuda":
            benchmark(lambda: (step(), torch.cuda.synchronize()))
        else:
            benchmark(step)

    return time
