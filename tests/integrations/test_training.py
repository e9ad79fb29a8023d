"""The unmodified models of the libraries, trained 20 steps on real digits with and without ours, from one seed."""

import pytest
import torch
from torch import Tensor
from training import TRAININGS, batches

import unigen_fast as uf
from unigen_fast.integrations import _patching

STEPS = 20


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


@pytest.mark.parametrize("label", TRAININGS)
def test_the_same_parameters_with_ours(label: str) -> None:
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
    assert apart < 1e-4 * moved, f"{apart / moved:.1e} of the movement"
