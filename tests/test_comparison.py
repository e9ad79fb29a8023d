"""The comparison of kernel, reference and float64 with a fixed seed, and that it sees what is wrong."""

import math
from collections.abc import Callable

import comparison
import pytest
import torch
from cases.base import Case, last
from helpers import seed_generators
from torch import Tensor

import unigen_fast as uf


def test_nothing_disagrees_but_what_is_known() -> None:
    report = comparison.run(seed=0, draws=6)
    assert report.cases.total() > 1000
    left = report.unexplained()
    assert not left, "\n".join(comparison.show(kind) for kind in left)


def broken(error: Callable[[Tensor, Tensor], Tensor]) -> Case:
    """A log-mean-exp that is wrong in float32: the kernel and its reference are, the truth is not."""

    def call(x: Tensor) -> Tensor:
        value = uf.log_mean_exp(x, dim=-1)
        return error(x, value) if x.dtype == torch.float32 else value

    return Case("broken", call, last("log_w"), call)


def unless_nan(x: Tensor, value: Tensor, otherwise: float) -> Tensor:
    return torch.where(x.isnan().any(-1), value, otherwise)


BROKEN = {
    "value": ("ordinary", lambda x, value: value * (1 + 1e-4), ("value", "inexact")),
    "NaN": ("ordinary", lambda x, value: unless_nan(x, value, math.nan), ("value", "NaN for a number")),
    "gradient": ("ordinary", lambda x, value: value + (x - x.detach()).sum(-1), ("gradient", "inexact")),
    "overflow": ("offset", lambda x, value: x.exp().mean(-1).log(), ("value", "inf for a number")),
    "-inf": ("impossible", lambda x, value: value.nan_to_num(neginf=math.nan), ("value", "NaN for -inf")),
    "incoming 0": (
        "zero gradient",
        lambda x, value: value + 0 * (x - x.detach()).sqrt().sum(-1),
        ("gradient", "not 0 of an incoming 0"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_function_is_found(name: str) -> None:
    pattern, error, found = BROKEN[name]
    seen: dict[comparison.Found, comparison.Place] = {}
    for seed in range(8):
        seed_generators(seed)
        draw = comparison.make_draw(broken(error), pattern, torch.float32, (3, 7), "contiguous")
        assert draw is not None
        seen.update(comparison.compare(draw))
    assert ("kernel" if name == "incoming 0" else "both", *found) in seen


def test_excluded_numbers_are_hidden_from_the_truth() -> None:
    """A weighted mean that multiplies by its weights of 0."""
    case = next(c for c in comparison.every_case(r"^gaussian_kl\[weights\]$"))
    weighted = Case(
        "broken[weights]",
        lambda m, v, w: (uf.gaussian_kl(m, v, reduction="none") * w).mean(),
        case.specs,
        case.oracle,
    )
    seed_generators(1)
    draw = comparison.make_draw(weighted, "excluded", torch.float32, (5, 2), "contiguous")
    assert draw is not None and draw.finite and not all(bool(x.isfinite().all()) for x in draw.tensors)
    assert ("both", "value", "NaN for a number") in comparison.compare(draw)


def test_a_sound_function_is_not_accused() -> None:
    for seed in range(40):
        seed_generators(seed)
        pattern = comparison.PATTERNS[seed % 10]
        case = Case("sound", lambda x: uf.log_mean_exp(x, dim=-1), last("log_w"), lambda x: x)
        draw = comparison.make_draw(case, pattern, torch.float32, (3, 7), "sliced")
        assert draw is not None and not comparison.compare(draw), pattern


def test_a_draw_is_the_same_again() -> None:
    first, second = (comparison.run(seed=3, draws=2, only="^(gaussian_kl|mmd)$") for _ in range(2))
    assert first.cases == second.cases and set(first.kinds) == set(second.kinds)
