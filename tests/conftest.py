import os

import pytest

# Several test processes share the cores: a thread that waits by spinning takes them from the others, which made the
# suite take twice as long. Read when OpenMP is loaded, so before torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from helpers import seed_generators


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
