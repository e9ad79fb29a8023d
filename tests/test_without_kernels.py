"""The path without kernels: right, and in the dtype of its inputs, since Apple's GPUs have no float64."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case
from helpers import (
    as_tuple,
    assert_close,
    cotangents_like,
    leaves,
    make,
    pull_back,
    reference_path,
    tolerance,
    upcast,
    value_and_gradients,
    without_kernels,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unigen_fast.closed_forms import _rows
from unigen_fast.closed_forms import pairwise as of_pairs

every_case = pytest.mark.parametrize("case", CASES, ids=repr)


@pytest.fixture(autouse=True)
def _without_kernels() -> Iterator[None]:
    with without_kernels():
        yield


class Doubles(TorchDispatchMode):
    """Which operations make a tensor of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tree_leaves(found)):
            self.makers.append(str(func))
        return found


def test_a_double_is_seen() -> None:
    with Doubles() as doubles:
        torch.ones(2).double().sum()
    assert doubles.makers == ["aten._to_copy.default", "aten.sum.default"]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_made_in_double_precision(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """A GPU without float64, and without kernels: value, gradient and, in float32, its gradient."""
    tensors = make(case, 3, 5, dtype=dtype, device=device)
    with Doubles() as doubles:
        outputs = as_tuple(case(*tensors))
    assert doubles.makers == []
    assert all(o.dtype in (torch.float32, dtype) for o in outputs)
    cotangents = cotangents_like(outputs)
    with Doubles() as doubles:
        pull_back(outputs, leaves(tensors), cotangents, retain_graph=True)
        if dtype == torch.float32:
            firsts = pull_back(outputs, leaves(tensors), cotangents, create_graph=True)
            again = [g for g in firsts if g.requires_grad]
            if again:
                ones = [torch.ones_like(g) for g in again]
                torch.autograd.grad(again, leaves(tensors), ones, allow_unused=True)
    assert doubles.makers == []


@every_case
@pytest.mark.parametrize("size", [(5, 3), (40, 17), (2, 1500)], ids=str)
@pytest.mark.parametrize("block", [None, 64])
def test_value_and_gradients(
    case: Case, size: tuple[int, int], block: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the reference in float64, of tensors that are one block and of such that are many."""
    if block is not None:
        monkeypatch.setattr(_rows, "_BLOCK", block)
        monkeypatch.setattr(of_pairs, "_BLOCK", block)
    tensors = make(case, *size, device=device)
    outputs, gradients, cotangents = value_and_gradients(case, tensors)
    with reference_path():
        expected, expected_gradients, _ = value_and_gradients(
            case, upcast(tensors), [None if c is None else c.double() for c in cotangents]
        )
    for got, want in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        assert_close(got, want, *tolerance(got.dtype))


@every_case
def test_what_is_no_number_is_left_to_the_reference(case: Case, device: torch.device) -> None:
    """The reference's value and gradients, for a NaN in the first tensor."""
    tensors = make(case, 4, 6, device=device)
    with torch.no_grad():
        tensors[0].flatten()[0] = math.nan
    outputs, gradients, cotangents = value_and_gradients(case, tensors)
    with reference_path():
        expected, expected_gradients, _ = value_and_gradients(case, tensors, cotangents)
    for got, want in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        assert_close(got, want, *tolerance(got.dtype))
