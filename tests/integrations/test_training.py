"""The unmodified models of the libraries, trained 20 steps on real digits with and without ours, from one seed.

In float64: Adam divides a gradient by its own size, so that where it is nothing but rounding the parameter goes a whole
step one way or the other, and what two runs in float32 are apart says how many such gradients there are, whatever the
losses. A model that makes float32 tensors of its own is trained in float32.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from training import TRAININGS, batches

import unigen_fast as uf
from unigen_fast.integrations import _patching

STEPS = 20


FLOAT32 = {"torchrl"}


def trained(label: str) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters before and after."""
    torch.manual_seed(0)
    made = TRAININGS[label][1]()
    before = [p.detach().clone() for p in made.parameters]
    for x in batches(STEPS):
        made.step(x)
    return before, [p.detach().clone() for p in made.parameters]


def length(vectors: list[Tensor]) -> Tensor:
    return sum((v.double() ** 2).sum() for v in vectors).sqrt()


@pytest.fixture
def bound(label: str) -> Iterator[float]:
    """Of the distance, as a share of the movement."""
    double = label not in FLOAT32
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    yield 1e-7 if double else 1e-4
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("label", TRAININGS)
def test_the_same_parameters_with_ours(label: str, bound: float) -> None:
    library = TRAININGS[label][0]
    for module in {r.module.split(".")[0] for r in _patching.Library.every[library].replacements}:
        pytest.importorskip(module)
    pytest.importorskip("mlxtend")
    if library == "torch_distributions":
        pytest.importorskip("scvi")
    before, theirs = trained(label)
    with uf.integrations.patched(library):
        start, ours = trained(label)
    assert sum(uf.integrations.calls(library).values()) >= STEPS
    assert all(map(torch.equal, before, start))
    moved = length([a - b for a, b in zip(theirs, before, strict=True)])
    apart = length([a - b for a, b in zip(theirs, ours, strict=True)])
    assert moved > 1e-2
    assert apart < bound * moved, f"{apart / moved:.1e} of the movement"
