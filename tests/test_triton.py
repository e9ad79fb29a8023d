"""Triton kernels against the references in float64.

The kernels run on the GPU if there is one, else in Triton's interpreter. Both need the environment set before Triton is
imported, so a plain run starts this file anew in a process of its own.
"""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unigen_fast as uf
from unigen_fast import _ops
from unigen_fast._fused import FusedOp
from unigen_fast.reference.adversarial import TERMS
from unigen_fast.reference.importance import vimco_signal
from unigen_fast.reference.random import philox, philox_normal

SERVING = any(backend.name == "triton" and backend.loaded for backend in uf.info().backends)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of lanes that are masked out
INF, NAN = math.inf, math.nan
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

if SERVING:
    import triton
    import triton.language as tl

    from unigen_fast.triton import OPS, _rows, objectives
    from unigen_fast.triton.philox import words


def kernels(test: Any) -> Any:
    """A test of the kernels: collected only where they serve."""
    return test if SERVING else None


@pytest.mark.skipif(SERVING, reason="the kernels run in this process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_in_a_process_of_its_own() -> None:
    chosen = {"UNIGEN_FAST_DISABLE": "cuda"}  # and not what this process goes without: that may be Triton
    if not torch.cuda.is_available():
        chosen["TRITON_INTERPRET"] = "1"
    files = [__file__, str(Path(__file__).with_name("test_excluded.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "2", *files]
    run = subprocess.run(command, env={**os.environ, **chosen}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    assert " passed" in run.stdout


# ---- layouts ---------------------------------------------------------------------------------------------------------


def contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def sliced(x: Tensor) -> Tensor:
    """Out of a larger tensor full of NaN: rows neither adjacent nor aligned."""
    large = torch.full([size + 3 for size in x.shape], NAN, dtype=x.dtype, device=x.device)
    return large[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)


def transposed(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return contiguous(x.permute(order)).permute(order)


def stepped(x: Tensor) -> Tensor:
    large = torch.full((*x.shape[:-1], 2 * x.size(-1)), NAN, dtype=x.dtype, device=x.device) if x.dim() else x.clone()
    return (large[..., ::2] if x.dim() else large).copy_(x)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() else x


LAYOUTS = [contiguous, sliced, transposed, stepped, expanded]


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """An op, its options, and how its tensors are drawn, a letter each: n normal, p positive, u unit, k counts,
    r rng_state, g groups, w row weights, - absent; for the last dimension: c a class, x and y a pixel of 3 channels or
    of 1. `lists`: the shapes of a list of tensors."""

    name: str
    op: FusedOp
    letters: str
    options: tuple[Any, ...]
    shape: tuple[int, ...] = (5, 3, 10)
    rows: int = 1  # dimensions of the weights
    lists: list[tuple[int, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name

    def tensors(self, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] | None = None) -> list[Any]:
        shape = self.shape if shape is None else shape
        if self.lists:
            return [draw("n", item, dtype, device) for item in self.lists]
        return [draw(letter, shape[: self.rows] if letter == "w" else shape, dtype, device) for letter in self.letters]


class BoundCase(Case):
    """A bound: `shape` is that of what the decoder gave, of a capital letter that of the event alone; latents have 4
    elements."""

    def tensors(self, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] | None = None) -> list[Any]:
        shape = self.shape if shape is None else shape
        dim, event_ndims = self.options[:2]
        rows, event = shape[: len(shape) - event_ndims], shape[len(shape) - event_ndims :]
        examples = rows[:dim] + rows[dim + 1 :]
        made = []
        for place, letter in enumerate(self.letters):
            lead = () if letter.isupper() else rows if place in (0, 1, 2, 4) else examples
            made.append(draw(letter.lower(), (*lead, *(event if place < 4 else (4,))), dtype, device))
        return made


@dataclass
class ElboCase(Case):
    """`shape` is that of what the decoder gave, of a capital letter that of the event alone; the last is the weights'
    letter."""

    latents: int = 4

    __str__ = Case.__str__

    def tensors(self, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] | None = None) -> list[Any]:
        shape = self.shape if shape is None else shape
        rows = len(shape) - self.options[0]
        shapes = [shape] * 4 + [(*shape[:rows], self.latents)] * 4 + [shape[:rows]]
        return [
            draw(letter.lower(), size[rows:] if letter.isupper() else size, dtype, device)
            for letter, size in zip(self.letters, shapes, strict=True)
        ]


def draw(letter: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if letter == "-":
        return None
    if letter == "r":
        return torch.tensor([-0x123456789ABCDEF, 0x7EDCBA9876543210], device=device)
    if letter == "g":
        return torch.randint(-2, 3, shape, device=device)
    if letter == "n":
        return (1.5 * torch.randn(shape, dtype=torch.float64)).to(device, dtype)
    if letter == "c":
        return torch.randint(0, max(shape[-1], 1), shape[:-1]).to(device)
    if letter in "xy":
        return (torch.randint(0, 256, (*shape[:-1], 3 if letter == "x" else 1)) / 127.5 - 1).to(device, dtype)
    values = torch.rand(shape, dtype=torch.float64)
    if letter == "k":
        return (values * 6).floor().to(device, dtype)
    if letter == "w":
        return values.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    return (values + 0.3 if letter == "p" else values).to(device, dtype)


def softmax_cases() -> Iterator[Case]:
    for dim in (0, 1, -1):
        yield Case(f"log_mean_exp[{dim}]", _ops.log_mean_exp, "n", (dim,))
        yield Case(f"effective_sample_size[{dim}]", _ops.effective_sample_size, "n", (dim,))
        yield Case(f"importance_weights[{dim}]", _ops.importance_weights, "n", (dim, 1.3))
        for reduction, value in (("mean", "bound"), ("sum", "surrogate"), ("none", "surrogate")):
            yield Case(f"iwae[{dim},{reduction},{value}]", _ops.iwae_loss, "n", (dim, reduction, value))
    generator = _ops.importance_weighted_generator_loss
    for dim, reduction in ((None, "mean"), (0, "none"), (1, "sum"), (2, "mean")):
        for detach in (True, False):
            yield Case(f"iwgan[{dim},{reduction},{detach}]", generator, "n", (dim, 0.7, detach, reduction))


def estimator_cases() -> Iterator[Case]:
    powers = (0.0, INF, -INF, 1.0, -2.0, 0.3, -1e-3)
    for power, dim, elbo_weight, reduction in zip(
        powers, itertools.cycle((0, 1, -1)), itertools.cycle((0.0, 0.4)), itertools.cycle(("mean", "none", "sum"))
    ):
        options = (dim, power, elbo_weight, -1.5, reduction)
        yield Case(f"power_bound[{power},{dim},{elbo_weight},{reduction}]", _ops.power_bound_loss, "n", options)
    partition = [0.0, 0.05, 0.3, 1.0]
    for dim, reduction in ((0, "mean"), (1, "sum"), (-1, "none")):
        yield Case(f"tvo[{dim},{reduction}]", _ops.tvo_loss, "n", (dim, partition, reduction))
        yield Case(f"vimco[{dim},{reduction}]", _ops.vimco_loss, "nn", (dim, reduction))
        yield Case(f"rws[{dim},{reduction}]", _ops.rws_losses, "nn", (dim, reduction))
        yield Case(f"log_variance[{dim},{reduction}]", _ops.log_variance_loss, "n", (dim, reduction))
        yield Case(f"weighted_sum[{dim}]", _ops.importance_weighted_sum, "nn", (dim, 1.3))
        yield Case(f"weight_diagnostics[{dim}]", _ops.weight_diagnostics, "n", (dim,))
    many = [i / 20 for i in range(21)]  # more than one launch takes along
    yield Case("tvo[21 points]", _ops.tvo_loss, "n", (-1, many, "none"))


def logit_cases() -> Iterator[Case]:
    for number, term in enumerate(TERMS):
        yield Case(f"logit_term[{term}]", _ops.logit_term, "n", (number, 0.1))
        for reduction in ("mean", "sum", "none"):
            options = (1, number, 0, reduction, 0.1, reduction != "none")
            yield Case(f"logit_loss[{term},{reduction}]", _ops.logit_loss, "n", options, lists=[(3, 5)])
    some = [(5,), (2, 3, 4), (1,), ()]
    yield Case("logit_loss[list]", _ops.logit_loss, "nnnn", (2, 3, 1, "mean", 0.3, True), lists=some)
    many = [(2, n + 1) for n in range(18)]  # more than one launch takes
    yield Case("logit_loss[18]", _ops.logit_loss, "n" * 18, (9, 2, 5, "sum", 0.3, True), lists=many)
    large = [(9000,), (3,), (70, 100)]  # several programs
    yield Case("logit_loss[large]", _ops.logit_loss, "nnn", (1, 0, 4, "mean", 1.0, True), lists=large)
    yield Case("logit_loss[large,no statistics]", _ops.logit_loss, "nnn", (1, 0, 4, "sum", 1.0, False), lists=large)


def coupled_cases() -> Iterator[Case]:
    number = {name: i for i, name in enumerate(TERMS)}
    pairs = (
        ("logistic_real", "logistic_fake"),
        ("least_squares_minus", "least_squares_real"),
        ("hinge_real", "hinge_fake"),
    )
    few = [(5,), (2, 3, 4), (3, 1), (7,)]
    for real, fake in pairs:
        options = (2, "averages", number[real], number[fake], "mean", 0.3, real == "hinge_real")
        yield Case(f"coupled[{real}]", _ops.coupled_logit_loss, "nnnn", options, lists=few)
    ratios = ("ratios", number["hinge_real"], number["hinge_fake"], "sum", 0.3)
    yield Case("coupled[ratios]", _ops.coupled_logit_loss, "nnnn", (2, *ratios, True), lists=few)
    alone = (0, "ratios", number["linear"], number["linear"], "mean", 2.0, False)
    yield Case("coupled[ratios,fake]", _ops.coupled_logit_loss, "nnnn", alone, lists=few)
    many, large = [(2, n + 1) for n in range(18)], [(9000,), (70, 100)]
    averages = ("averages", number["logistic_fake"], number["logistic_real"], "sum", 0.5)
    for sizes in (many, large):
        half, letters = len(sizes) // 2, "n" * len(sizes)
        for rest in ((*averages, True), (*ratios, False)):
            yield Case(f"coupled[{len(sizes)},{rest[0]}]", _ops.coupled_logit_loss, letters, (half, *rest), lists=sizes)


def grouped_cases() -> Iterator[Case]:
    op = _ops.grouped_importance_weighted_generator_loss
    for shape in ((7,), (150,)):
        for detach, reduction in ((True, "mean"), (False, "sum")):
            yield Case(f"grouped[{shape[0]},{detach}]", op, "ng", (0.7, detach, reduction), shape)


def kl_cases() -> Iterator[Case]:
    plain = (0.0, "sum", -INF, INF, 0.1)
    for event in (0, 1, 2, 3):
        for reduction in ("mean", "none"):
            yield kl(f"gaussian_kl[{event},{reduction}]", "nn---", (event, "logvar", *plain, reduction))
    for letters in ("nnn--", "nn-n-", "nnnn-"):
        yield kl(f"gaussian_kl[{letters}]", letters, (1, "logvar", *plain, "sum"))
    for spread in ("logvar", "logstd", "std"):
        letters = "npnp-" if spread == "std" else "nnnn-"
        for clamp in ((-INF, INF), (-0.7, 0.9), (-INF, 0.5)):
            yield kl(f"gaussian_kl[{spread},{clamp}]", letters, (1, spread, 0.0, "sum", *clamp, 2.0, "mean"))
    for mode, bits in (("sum", 55.0), ("per_dim", 0.6)):  # rows, and dimensions, on both sides
        for reduction in ("mean", "sum", "none"):
            options = (2, "logvar", bits, mode, -INF, INF, 0.5, reduction)
            yield kl(f"gaussian_kl[{mode},{reduction}]", "nn---", options)
            yield kl(f"gaussian_kl[{mode},{reduction},weights]", "nn--w", options)
    yield kl("gaussian_kl[sum,prior]", "nnnn-", (2, "logvar", 260.0, "sum", -INF, INF, 0.5, "sum"))
    yield kl("gaussian_kl[per_dim,prior]", "npnp-", (1, "std", 1.0, "per_dim", -0.7, 0.9, 0.5, "none"))
    yield kl("gaussian_kl[weights]", "nnnnw", (1, "logvar", *plain, "mean"), rows=2)


def kl(name: str, letters: str, options: tuple[Any, ...], shape: tuple[int, ...] = (5, 3, 10), rows: int = 1) -> Case:
    return Case(name, _ops.gaussian_kl, letters, options, shape, rows)


def sample_cases() -> Iterator[Case]:
    # ten columns share Philox blocks between rows; eight do not
    for last in (10, 8):
        for count, dim in ((-1, 0), (3, 0), (2, 1), (2, -1), (1, 1)):
            for spread, clamp in (("logvar", (-INF, INF)), ("logstd", (-0.8, 0.9)), ("std", (-INF, INF))):
                if spread != "logvar" and (count, dim) != (3, 0):
                    continue
                letters, shape = "npr" if spread == "std" else "nnr", (5, 3, last)
                label = f"{last},{count},{dim},{spread}"
                yield Case(f"sample[{label}]", _ops.sample_gaussian, letters, (count, dim, spread, *clamp), shape)
                for event in (1, 2):
                    options = (count, dim, event, spread, *clamp)
                    name = f"sample_with_kl[{label},{event}]"
                    yield Case(name, _ops.sample_gaussian_with_kl, letters, options, shape)
    options = (-1, 0, "std", -0.8, 0.9)
    yield Case("sample[std,clamp]", _ops.sample_gaussian, "npr", options)


def likelihood_cases() -> Iterator[Case]:
    for event in (0, 1, 2, 3):
        yield Case(f"bernoulli[{event}]", _ops.bernoulli_log_prob, "nu", (event,))
    for event in (0, 1, 2):
        yield Case(f"laplace[{event}]", _ops.laplace_log_prob, "nnn", (event,))
        yield Case(f"logistic[{event}]", _ops.discretized_logistic_log_prob, "unn", (event, 0.1, 0.0, 1.0))
        for eps in (0.0, 0.7):
            options = (event, eps)
            yield Case(f"negative_binomial[{event},{eps}]", _ops.negative_binomial_log_prob, "kpp", options)
            yield Case(f"zero_inflated[{event},{eps}]", _ops.zero_inflated_negative_binomial_log_prob, "kppn", options)
    yield Case("logistic[256 levels]", _ops.discretized_logistic_log_prob, "nnn", (1, 1 / 255, -1.0, 1.0))
    yield Case("negative_binomial[real]", _ops.negative_binomial_log_prob, "upp", (1, 0.1))
    for spread, clamp in (("logvar", (-INF, INF)), ("logstd", (-0.7, 0.9)), ("std", (-INF, 0.5))):
        letters = "nnp" if spread == "std" else "nnn"
        yield Case(f"gaussian[{spread}]", _ops.gaussian_log_prob, letters, (1, spread, *clamp))


def categorical_cases() -> Iterator[Case]:
    op = _ops.categorical_kl
    for unimix in (0.0, 0.1):
        for letters in ("nn-", "n--"):
            for dim, event, reduction in ((2, 0, "mean"), (0, 1, "none"), (1, 2, "sum")):
                options = (dim, event, unimix, 0.3, reduction)
                yield Case(f"categorical_kl[{letters},{unimix},{dim}]", op, letters, options)
        yield Case(f"categorical_kl[weights,{unimix}]", op, "nnw", (2, 1, unimix, 0.3, "mean"))
        for nats, mode in ((0.0, "sum"), (8.0, "sum"), (2.5, "per_variable")):
            options = (1, nats, mode, unimix, 0.9, 0.2)
            yield Case(f"balanced_categorical_kl[{mode},{nats},{unimix}]", _ops.balanced_categorical_kl, "nn", options)
    yield Case("balanced_categorical_kl[2]", _ops.balanced_categorical_kl, "nn", (2, 1.0, "sum", 0.0, 1.0, 0.1))
    for event in (0, 1, 2):
        yield Case(f"categorical_log_prob[{event}]", _ops.categorical_log_prob, "nc", (2, event, -100))
        for letters, numbers in (("nx", 20), ("ny", 15)):
            name, op = f"mixture[{letters},{event}]", _ops.discretized_logistic_mixture_log_prob
            yield Case(name, op, letters, (event,), (5, 3, numbers))


def mmd_cases() -> Iterator[Case]:
    for kernel, unbiased, shape in (("imq", True, (40, 3)), ("rbf", False, (70, 2))):
        for gradients in (0, 1, 3):
            options = (kernel, [0.3, 1.0, 5.0], unbiased, gradients)
            yield Case(f"mmd[{kernel},{unbiased},{gradients}]", _ops.mmd, "nu", options, shape)


def formula_kl_cases() -> Iterator[Case]:
    for spread, clamp in (("logvar", (-INF, INF)), ("logstd", (-0.7, 0.9)), ("std", (-INF, 0.5))):
        for weights, reduction in (("-", "none"), ("w", "mean"), ("w", "none")):
            v = "p" if spread == "std" else "n"
            for mean in "n-":
                letters, options = f"n{mean}{v}n{v}{weights}", (1, spread, *clamp, 0.3, reduction)
                name = f"monte_carlo[{spread},{mean},{weights},{reduction}]"
                yield Case(name, _ops.gaussian_kl_monte_carlo, letters, options, rows=2)
    for letters, reduction in (("nn-", "none"), ("n--", "mean"), ("nnw", "sum"), ("n-w", "none")):
        yield Case(f"bernoulli_kl[{letters},{reduction}]", _ops.bernoulli_kl, letters, (2, 0.3, reduction))


def bound(
    likelihood: str, letters: str, shape: tuple[int, ...], dim: int, groups: int = 1, power: float = 1.0,
    elbo_weight: float = 0.0, reduction: str = "mean", event_ndims: int = 1,
) -> Case:  # fmt: skip
    name = f"bound[{likelihood},{letters},{dim},{groups},{power},{elbo_weight},{reduction}]"
    bins = [0.1, 0.0, 1.0] if likelihood == "discretized_logistic" else []
    options = (dim, event_ndims, likelihood, bins, groups, power, elbo_weight, -1.5, reduction)
    return BoundCase(name, _ops.multi_sample_bound, letters, (*options, 0 if reduction == "none" else 255), shape)


def bound_cases() -> Iterator[Case]:
    """Means and log-variances of the prior behind those of the posterior."""
    yield bound("bernoulli", "n--unnn--", (2, 3, 7), 1)
    yield bound("bernoulli", "n--unnnnn", (5, 2, 7), 0, power=0.5, elbo_weight=0.4, reduction="sum")
    yield bound("gaussian", "n--nnnn-n", (2, 6, 7), 1, groups=3, power=0.3, reduction="none")
    yield bound("gaussian", "nn-nnnnn-", (5, 2, 7), 0, power=-INF, elbo_weight=0.2)
    yield bound("gaussian", "nN-nnnn--", (2, 4, 2, 5), 1, power=0.0, reduction="sum", event_ndims=2)
    yield bound("discretized_logistic", "nN-unnn--", (2, 3, 7), 1, reduction="none")
    yield bound("laplace", "nn-nnnnnn", (1, 2, 4, 5), 2, groups=2, power=INF)
    yield bound("negative_binomial", "pp-knnn--", (5, 2, 7), 0, power=-2.0)
    yield bound("zero_inflated_negative_binomial", "pPnknnnnn", (2, 3, 7), 1, power=1.5, elbo_weight=0.4)


def elbo(
    likelihood: str, letters: str, shape: tuple[int, ...], reduction: str = "mean", event_ndims: int = 1,
    kl_weight: float = 0.7, latents: int = 4, name: str = "",
) -> Case:  # fmt: skip
    bins = [0.1, 0.0, 1.0] if likelihood == "discretized_logistic" else []
    options = (event_ndims, likelihood, bins, kl_weight, -1.5, reduction, 0 if reduction == "none" else 127)
    name = name or f"elbo[{likelihood},{letters},{len(shape) - event_ndims},{kl_weight},{reduction}]"
    return ElboCase(name, _ops.elbo_loss, letters, options, shape, latents=latents)


def elbo_cases() -> Iterator[Case]:
    yield elbo("bernoulli", "n--unn---", (5, 7))
    yield elbo("bernoulli", "n--unnnnw", (3, 2, 7), "sum", kl_weight=0.0)
    yield elbo("bernoulli", "n--unnnnw", (7,), "none")
    yield elbo("gaussian", "n--nnn-nw", (2, 3, 7), "none")
    yield elbo("gaussian", "nn-nnnn--", (2, 3, 2, 5), event_ndims=2)
    yield elbo("gaussian", "nN-nnnnnw", (4, 2, 5), event_ndims=2)
    yield elbo("laplace", "nN-nnn---", (3, 2, 2, 7), "none")
    yield elbo("laplace", "nn-nnn--w", (5, 7), "sum")
    yield elbo("discretized_logistic", "nn-unn-nw", (5, 7))
    yield elbo("discretized_logistic", "nN-unnn--", (5, 7), "none")
    yield elbo("negative_binomial", "pP-knnn-w", (5, 7), "sum")
    yield elbo("negative_binomial", "pp-knn---", (3, 2, 7))
    yield elbo("zero_inflated_negative_binomial", "pPnknnnnw", (2, 3, 7), "none")
    yield elbo("zero_inflated_negative_binomial", "ppNknn---", (5, 7))


CASES = [
    *softmax_cases(),
    *estimator_cases(),
    *logit_cases(),
    *coupled_cases(),
    *grouped_cases(),
    *kl_cases(),
    *sample_cases(),
    *likelihood_cases(),
    *formula_kl_cases(),
    *categorical_cases(),
    *mmd_cases(),
    *bound_cases(),
    *elbo_cases(),
]
MAIN_NAMES = (
    "log_mean_exp[1]",
    "importance_weights[0]",
    "iwae[-1,mean,bound]",
    "iwgan[1,sum,False]",
    "iwgan[None,mean,True]",
    "power_bound[0.3,-1,0.4,sum]",
    "tvo[0,mean]",
    "vimco[1,sum]",
    "rws[0,mean]",
    "log_variance[-1,none]",
    "weighted_sum[1]",
    "weight_diagnostics[0]",
    "logit_term[logistic_fake]",
    "logit_loss[list]",
    "gaussian_kl[std,(-0.7, 0.9)]",
    "gaussian_kl[sum,mean,weights]",
    "sample[10,3,0,logvar]",
    "sample_with_kl[8,2,1,logvar,1]",
    "bernoulli[1]",
    "categorical_kl[nn-,0.0,2]",
    "balanced_categorical_kl[sum,8.0,0.1]",
    "categorical_log_prob[1]",
    "mixture[nx,1]",
    "gaussian[logstd]",
    "zero_inflated[1,0.7]",
    "monte_carlo[logstd,-,w,mean]",
    "bernoulli_kl[nnw,sum]",
    "bound[gaussian,nN-nnnn--,1,1,0.0,0.0,sum]",
    "bound[zero_inflated_negative_binomial,pPnknnnnn,1,1,1.5,0.4,mean]",
    "elbo[bernoulli,n--unnnnw,2,0.0,sum]",
    "elbo[gaussian,nN-nnnnnw,1,0.7,mean]",
    "elbo[zero_inflated_negative_binomial,pPnknnnnw,2,0.7,none]",
)
MAIN = [case for case in CASES if case.name in MAIN_NAMES]
assert len(MAIN) == len(MAIN_NAMES)
HALF = [case for i, case in enumerate(CASES) if case in MAIN or (i % 2 == 0 and not isinstance(case, BoundCase))]


# ---- what every case must do -----------------------------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """To the tolerance of the dtype, relative to the largest value (gradients may all cancel: or to 0.01)."""
    assert actual.shape == expected.shape
    expected = expected.to(actual.device)
    tolerance = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    finite = expected[expected.isfinite()].abs()
    scale = max(finite.max().item(), 0.01) if finite.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def differentiated(op: FusedOp, tensors: list[Any]) -> list[Tensor]:
    """The tensors that get a gradient: all floating ones but row weights."""
    given = tensors if op.tensor_list else [tensors[i] for i in op.differentiable]
    return [t for t in given if t is not None and t.is_floating_point()]


def run(
    op: FusedOp, tensors: list[Any], options: tuple[Any, ...], grads: list[Tensor] | None = None, visible: int = 0
) -> Any:
    """(outputs, gradients, incoming gradients)."""
    inputs = [None if t is None else t.detach() for t in tensors]
    wanted = [t.requires_grad_() for t in differentiated(op, inputs)]
    outputs = as_tuple(op(inputs, *options, visible=visible))
    differentiable = outputs[: op.differentiable_outputs]
    if not differentiable:
        return outputs, [], []
    if grads is None:
        grads = [torch.randn_like(o) for o in differentiable]
    return outputs, list(torch.autograd.grad(differentiable[: len(grads)], wanted, grads)), grads


def check(case: Case, tensors: list[Any], grad_layout: Callable[[Tensor], Tensor] = contiguous) -> Any:
    """Compares with the reference; returns what `run` does."""
    op = case.op
    exact = [t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_() for t in tensors]
    oracle = as_tuple(op.reference(*op._pack(exact), *case.options))
    wanted = differentiated(op, exact)
    shapes = [o.shape for o in oracle[: op.differentiable_outputs]]
    low = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    grads = [grad_layout(torch.randn(s, dtype=low, device=exact[0].device)) for s in shapes]
    if op in (_ops.sample_gaussian, _ops.sample_gaussian_with_kl):
        grads[0] = grad_layout(grads[0].to(tensors[0].dtype))
    options = (*case.options[:-1], 0) if op.gradients else case.options
    shown = min(len(oracle), 4) if op.gradients else len(oracle)  # a fifth is what rounding takes from the second
    outputs, found, _ = run(op, tensors, options, grads, shown)
    for actual, expected in zip(outputs, oracle[:shown], strict=True):
        assert actual.is_contiguous()
        close(actual, expected.detach())
    if grads:
        compare_gradients(op, tensors, found, oracle[: len(grads)], wanted, grads)
    if op.gradients and case.options[-1]:  # made along with the first output
        _, made, _ = run(op, tensors, case.options, grads[:1])
        compare_gradients(op, tensors, made, oracle[:1], wanted, grads[:1])
    return outputs, found, grads


def compare_gradients(
    op: FusedOp, tensors: list[Any], found: list[Tensor], oracle: Sequence[Tensor], exact: list[Tensor],
    grads: list[Tensor],
) -> None:  # fmt: skip
    expected_grads = torch.autograd.grad(oracle, exact, [g.double() for g in grads], retain_graph=True)
    for leaf, actual, expected in zip(differentiated(op, tensors), found, expected_grads, strict=True):
        assert actual.dtype == leaf.dtype and actual.stride() == torch.empty_like(leaf).stride()
        close(actual, expected)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched."""
    names: list[str] = []
    launch = _rows.launch

    def counted(kernel: Any, *args: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(_rows, "launch", counted)
    return names


@kernels
def test_every_op_has_kernels() -> None:
    ops = [op for op in vars(_ops).values() if isinstance(op, FusedOp)]
    expected = {op.name for op in ops} | {f"{op.name}_backward" for op in ops if op.differentiable_outputs}
    assert set(OPS) == expected
    key = "CUDA" if torch.cuda.is_available() else "CPU"
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"unigen_fast::{name}", key) for name in expected)


@kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, device: torch.device, launches: list[str]) -> None:
    check(case, case.tensors(torch.float32, device))
    assert len(launches) >= 1 + bool(case.op.differentiable_outputs)


_CERTAIN = [[1.5, -2.0, 0.0], [-90.0, -170.0, -300.0]]  # means, log-variances or log-scales
_TINY = list(itertools.product((1.0, 5.0, 300.0), (1e-44, 1e-30, 0.5), (1e-43, 1e-25, 2.0)))
_COUNTS = [list(column) for column in zip(*_TINY, strict=True)]
_PLAIN = ("logvar", -INF, INF)
# op, columns of numbers (one event), options
EXTREMES: list[tuple[FusedOp, list[list[float] | None], tuple[Any, ...]]] = [
    (_ops.gaussian_log_prob, [_CERTAIN[0], *_CERTAIN], (1, *_PLAIN)),
    (_ops.laplace_log_prob, [_CERTAIN[0], *_CERTAIN], (1,)),
    (_ops.gaussian_kl, [*_CERTAIN, *_CERTAIN, None], (1, "logvar", 0.0, "sum", -INF, INF, 1.0, "none")),
    (_ops.gaussian_kl_monte_carlo, [_CERTAIN[0], *_CERTAIN, *_CERTAIN, None], (1, *_PLAIN, 1.0, "none")),
    (_ops.discretized_logistic_log_prob, [[0.5, -1.0, 0.5], [0.5] * 3, [100.0, 100.0, -100.0]], (1, 0.125, -1.0, 1.0)),
    (_ops.negative_binomial_log_prob, _COUNTS, (1, 0.0)),
    (_ops.negative_binomial_log_prob, _COUNTS, (1, 1e-8)),
    (_ops.zero_inflated_negative_binomial_log_prob, [*_COUNTS, [-1.0] * len(_TINY)], (1, 0.0)),
    (_ops.bernoulli_kl, [[0.0, 3.0, -3.0], [INF, -INF, INF], None], (0, 1.0, "none")),
    (_ops.categorical_kl, [[1e4, 1e4 + 3, 1e4 - 2], [0.5, -1.0, 2.0], None], (1, 0, 0.0, 1.0, "none")),
    (_ops.categorical_kl, [[1e4, 1e4 + 3, 1e4 - 2], None, None], (1, 0, 0.0, 1.0, "none")),
    (_ops.iwae_loss, [[-INF, -INF, -INF]], (1, "none", "surrogate")),
]


@kernels
@pytest.mark.parametrize("op,columns,options", EXTREMES, ids=lambda x: x.name if isinstance(x, FusedOp) else "")
def test_extremes(op: FusedOp, columns: Any, options: tuple[Any, ...], device: torch.device) -> None:
    """What fp32 has no reciprocal, or no exponential, of."""
    tensors = [None if c is None else torch.tensor([c], device=device) for c in columns]
    exact = [t if t is None else t.double().requires_grad_() for t in tensors]
    expected = as_tuple(op.reference(*op._pack(exact), *options))[0]
    outputs, found, _ = run(op, tensors, options, [torch.ones_like(expected, dtype=torch.float32)])
    torch.testing.assert_close(outputs[0].double(), expected.float().double(), rtol=1e-5, atol=1e-6)
    leaves = differentiated(op, exact)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    if op is _ops.negative_binomial_log_prob or op is _ops.zero_inflated_negative_binomial_log_prob:
        assert not any(t.isnan().any() for t in found)  # float64 has lost them, too
        return
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want.float().double(), rtol=1e-5, atol=3e-6)


@kernels
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", HALF, ids=str)
def test_layouts(case: Case, layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """Of the inputs, and of the incoming gradients."""
    tensors = case.tensors(torch.float32, device)
    check(case, [t if t is None or not t.is_floating_point() else layout(t) for t in tensors], layout)


@kernels
@pytest.mark.parametrize("case", [c for c in CASES if "large" not in c.name], ids=str)
def test_float64(case: Case, device: torch.device) -> None:
    check(case, case.tensors(torch.float64, device))


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_low_precision(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Results in fp32, to the accuracy of fp32; gradients and samples in the inputs' dtype."""
    check(case, case.tensors(dtype, device))


@kernels
@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("estimator", "shape", "away"),
    [
        ("mss", (37, 5), 0),
        ("mws", (9, 3), 0),
        ("mss", (70, 2), 0),
        ("mss_columns", (37, 5), 0),
        ("mss_columns", (2, 3), 0),
        ("mss", (20, 3), 1e4),
        ("mss", (20, 3), 1e10),
    ],
    ids=str,
)
def test_total_correlation(
    estimator: str, shape: tuple[int, int], away: float, layout: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    """Not among the cases: of equal rows, nothing is left of its differences but rounding."""
    case = Case("tc", _ops.total_correlation, "nnn", (100, estimator), shape)
    dtype = torch.float64 if layout is contiguous else torch.float32
    z, mean, logvar = case.tensors(dtype, device)
    check(case, [layout(t) for t in (z + away, mean, logvar)], layout)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [2, 7, 40])
def test_shape_of_a_tail(length: int, dtype: torch.dtype, device: torch.device) -> None:
    tail = torch.randn(2, 4, length, dtype=dtype, device=device).sort(-1, descending=True).values
    tail[0, 0], tail[0, 1, 0], tail[0, 2, 1:] = -INF, math.nan, -INF
    tail[1, 0, length // 2 :] = tail[1, 0, length // 2]  # ties with what follows are outside
    found = _ops.pareto_shape((tail,))
    assert found.dtype == dtype
    close(found, _ops.pareto_shape.reference(tail.double()))


@kernels
@pytest.mark.parametrize("points", [(2, 33), (70, 5)], ids=str)
def test_sets_of_different_sizes(points: tuple[int, int], device: torch.device) -> None:
    x, y = (draw(letter, (n, 3), torch.float32, device) for letter, n in zip("nu", points, strict=True))
    check(Case("mmd", _ops.mmd, "nu", ("imq", [0.3, 1.0], True, 2)), [x, y])


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (6, 3)], ids=str)
def test_pairs_of_nothing_and_of_low_precision(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    for case in (
        Case("tc", _ops.total_correlation, "nnn", (100, "mss")),
        Case("mmd", _ops.mmd, "nu", ("imq", [0.3, 1.0], True, 2)),
    ):
        check(case, case.tensors(dtype, device, shape))


@kernels
@pytest.mark.parametrize("case", MAIN, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 10), (5, 0, 10), (5, 3, 0)], ids=str)
def test_empty(case: Case, shape: tuple[int, ...], device: torch.device) -> None:
    """No rows, or rows of nothing: sums are 0, means NaN."""
    if case.lists:
        case = Case(case.name, case.op, "nn", (1, 0, 3, *case.options[3:]), lists=[shape, (2, 0)])
    elif case.op in SOFTMAX and (case.options[0] is None or not shape[case.options[0]]):
        pytest.skip("at least one sample")
    elif case.op is _ops.multi_sample_bound and (not shape[case.options[0]] or case.options[1] > 1):
        pytest.skip("at least one sample; rows of two dimensions")
    elif case.op is _ops.discretized_logistic_mixture_log_prob and not shape[2]:
        pytest.skip("at least one component")
    check(case, case.tensors(torch.float32, device, shape))


# ---- sizes that take another path: long rows, split rows, many rows --------------------------------------------------


SIZES = [
    Case("long rows", _ops.log_mean_exp, "n", (1,), (3, 9000)),
    Case("long columns", _ops.log_mean_exp, "n", (0,), (2100, 5)),
    Case("split rows", _ops.log_mean_exp, "n", (1,), (2, 12000)),
    Case("split rows", _ops.iwae_loss, "n", (1, "mean", "surrogate"), (2, 12000)),
    Case("split rows", _ops.effective_sample_size, "n", (1,), (2, 12000)),
    Case("split rows", _ops.importance_weights, "n", (1, 2.0), (2, 12000)),
    Case("long columns", _ops.importance_weights, "n", (0, 2.0), (1500, 9)),
    Case("one row", _ops.importance_weighted_generator_loss, "n", (None, 1.0, True, "mean"), (3, 4000)),
    Case("split rows", _ops.importance_weighted_generator_loss, "n", (1, 2.0, False, "none"), (2, 12000)),
    Case("many rows", _ops.iwae_loss, "n", (1, "mean", "bound"), (700, 3)),
    Case("long rows", _ops.power_bound_loss, "n", (1, 0.3, 0.2, 1.0, "mean"), (2, 9000)),
    Case("long rows", _ops.power_bound_loss, "n", (1, -INF, 0.2, 1.0, "none"), (2, 9000)),
    Case("long rows", _ops.tvo_loss, "n", (1, [0.0, 0.3, 1.0], "sum"), (2, 9000)),
    Case("long rows", _ops.vimco_loss, "nn", (1, "none"), (2, 9000)),
    Case("long columns", _ops.vimco_loss, "nn", (0, "mean"), (1500, 9)),
    Case("long rows", _ops.rws_losses, "nn", (1, "mean"), (2, 9000)),
    Case("long columns", _ops.log_variance_loss, "n", (0, "mean"), (1500, 9)),
    Case("long rows", _ops.importance_weighted_sum, "nn", (1, 2.0), (2, 9000)),
    Case("long rows", _ops.weight_diagnostics, "n", (1,), (2, 9000)),
    Case("many rows", _ops.rws_losses, "nn", (1, "mean"), (700, 3)),
    kl("split rows", "nn---", (1, "logvar", 0.0, "sum", -INF, INF, 1.0, "none"), (2, 9000)),
    kl("split rows", "nnnnw", (1, "logvar", 0.0, "sum", -INF, INF, 1.0, "mean"), (2, 9000)),
    kl("one row", "nn---", (1, "logvar", 0.0, "sum", -INF, INF, 1.0, "mean"), (3, 4000)),
    kl("many rows", "nn--w", (1, "logvar", 3.0, "sum", -INF, INF, 1.0, "sum"), (700, 3)),
    Case("split rows", _ops.sample_gaussian_with_kl, "nnr", (-1, 0, 1, "logvar", -INF, INF), (2, 5200)),
    Case("many programs", _ops.sample_gaussian, "nnr", (3, 0, "logvar", -INF, INF), (3, 1003)),
    Case("split rows", _ops.bernoulli_log_prob, "nu", (1,), (2, 9000)),
    Case("long rows", _ops.categorical_kl, "nn-", (1, 0, 0.0, 1.0, "mean"), (3, 5000)),
    Case("long rows", _ops.categorical_log_prob, "nc", (1, 0, -100), (3, 5000)),
    Case("many components", _ops.discretized_logistic_mixture_log_prob, "ny", (1,), (3, 3 * 70)),
    Case("many rows", _ops.total_correlation, "nnn", (50_000, "mss"), (100, 2)),
    Case("long rows", _ops.total_correlation, "nnn", (50_000, "mws"), (4, 50)),
    Case("split rows", _ops.zero_inflated_negative_binomial_log_prob, "kppn", (1, 0.0), (2, 9000)),
    Case("one row", _ops.bernoulli_kl, "nnw", (1, 0.5, "mean"), (3, 4000)),
    bound("bernoulli", "n--unnn--", (1100, 2, 3), 0, power=0.5, elbo_weight=0.4),  # more samples than a tile
    bound("bernoulli", "n--unnn--", (1, 2100, 2), 1, groups=1050),
    elbo("bernoulli", "n--unnnnw", (2, 12000), name="split rows"),
    elbo("gaussian", "nn-nnn---", (3, 9000), "none", name="split rows, none reduced"),
    elbo("gaussian", "nN-nnnnnw", (40, 700), name="split rows, shared outputs"),
    elbo("zero_inflated_negative_binomial", "pPNknn--w", (20, 200), "none", name="split rows, two shared outputs"),
    elbo("bernoulli", "n--unn-nw", (1500, 3), "sum", name="many rows"),
    elbo("gaussian", "nN-nnnn--", (1500, 3), name="many rows, shared outputs"),
    elbo("laplace", "nN-nnnn-w", (40, 9), latents=300, name="long latents"),
]


@kernels
@pytest.mark.parametrize("case", SIZES, ids=lambda c: f"{c.op.name}[{c.name}]")
def test_sizes(case: Case, device: torch.device) -> None:
    """Right, and the same bits every time."""
    tensors = case.tensors(torch.float32, device)
    outputs, found, grads = check(case, tensors)
    outputs_again, found_again, _ = run(case.op, tensors, case.options, grads, len(outputs))
    for first, second in zip((*outputs, *found), (*outputs_again, *found_again), strict=True):
        assert torch.equal(first, second)


@kernels
def test_examples_shared_among_programs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    """Samples and columns in two shares each: right, and the same bits every time."""
    monkeypatch.setattr(_rows, "PROGRAMS", 24)
    monkeypatch.setattr(objectives, "WHOLE", 2)
    objectives._plan.cache_clear()
    case = bound("gaussian", "nN-nnnnnn", (2, 20, 140), 1, power=0.5)
    tensors = case.tensors(torch.float32, device)
    outputs, found, grads = check(case, tensors)
    assert launches.count("_bound_kernel") == 2 + 2 + 3
    outputs_again, found_again, _ = run(case.op, tensors, case.options, grads, len(outputs))
    for first, second in zip((*outputs, *found), (*outputs_again, *found_again), strict=True):
        assert torch.equal(first, second)
    objectives._plan.cache_clear()


@kernels
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16")], ids=str)
def test_latents_of_another_dtype(dtypes: tuple[str, str], device: torch.device) -> None:
    case = bound("gaussian", "nN-nnnn-n", (2, 3, 7), 1)
    event, latent = (case.tensors(getattr(torch, dtype), device) for dtype in dtypes)
    check(case, [*event[:4], *latent[4:]])


@kernels
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "float16")], ids=str)
def test_elbo_with_latents_of_another_dtype(dtypes: tuple[str, str], device: torch.device) -> None:
    case = elbo("gaussian", "nN-nnnn-w", (5, 7))
    event, latent = (case.tensors(getattr(torch, dtype), device) for dtype in dtypes)
    check(case, [*event[:4], *latent[4:]])


@kernels
@pytest.mark.parametrize("shape", [(3, 4), (6, 300)], ids=str)
def test_only_the_gradients_of_the_elbo_that_are_wanted(shape: tuple[int, int], device: torch.device) -> None:
    """Each alone, of both ops, as it is among all of them; and the same losses with them or without."""
    case = elbo("zero_inflated_negative_binomial", "pPnknnnnw", shape)
    tensors, options = case.tensors(torch.float32, device), case.options[:-1]
    outputs = case.op.forward(*tensors, *options, 0)
    assert all(grad.shape == (0,) for grad in outputs[3:])
    *values, all_made = [*outputs[:3], case.op.forward(*tensors, *options, 127)[3:]]
    given = [torch.randn_like(value) for value in values]
    all_found = case.op.backward(*given, *tensors, *options, 0, 127)
    for bit in range(7):
        made = case.op.forward(*tensors, *options, 1 << bit)
        found = case.op.backward(*given, *tensors, *options, 0, 1 << bit)
        assert all(torch.equal(a, b) for a, b in zip(made[:3], values, strict=True))
        for grads, every in ((made[3:], all_made), (found, all_found)):
            assert torch.equal(grads[bit], every[bit])
            assert all(grad.shape == (0,) for i, grad in enumerate(grads) if i != bit)


@kernels
@pytest.mark.parametrize("columns", [7, 2600])
def test_elbo_without_weight(columns: int, device: torch.device) -> None:
    """A row of weight 0 is left out of the loss; its gradients are 0 whatever the slope, as is what it shares."""
    case = elbo("gaussian", "nN-nnnnnw", (4, columns), "sum")
    tensors = case.tensors(torch.float32, device)
    decoder, spread, _, _, mean, logvar, _, _, weights = tensors
    decoder[1], mean[1], logvar[1, 1:] = INF, NAN, INF
    weights[1] = 0
    loss, log_likelihood, kl, *made = case.op.forward(*tensors, *case.options)
    assert log_likelihood[1] == -INF and kl[1].isnan()
    zero = torch.zeros(4, device=device)
    ones = torch.ones((), device=device)
    found = case.op.backward(ones, zero, zero, *tensors, *case.options[:-1], 0, 127)
    plain = [t if t is None or t is spread else t[[0, 2, 3]] for t in tensors]
    expected_loss, _, _, *expected = case.op.forward(*plain, *case.options)
    close(loss, expected_loss.double())
    for grads in (made, found):
        for i, grad in enumerate(grads):
            if i == 1:
                close(grad, expected[i].double())
            elif i != 2:
                assert (grad[1] == 0).all()
                close(grad[[0, 2, 3]], expected[i].double())
    # nor has the KL's part any where kl_weight is 0, nor either where nothing comes in
    mean[1] = NAN
    weights[1] = 1
    *_, of_mean, of_logvar, _, _ = case.op.forward(*tensors, *case.options[:3], 0.0, *case.options[4:])
    assert (of_mean == 0).all() and (of_logvar == 0).all()
    none = case.op.backward(torch.zeros_like(ones), zero, zero, *tensors, *case.options[:-1], 0, 127)
    assert all((grad == 0).all() for grad in none)


@kernels
@pytest.mark.parametrize("columns", [7, 1100])
def test_elbo_gradients_of_one_scalar(columns: int, device: torch.device) -> None:
    """Incoming gradients that are a number expanded, over rows of several dimensions in any order."""
    for reduction in ("mean", "none"):
        case = elbo("laplace", "nN-nnn--w", (2, 3, columns), reduction)
        tensors = case.tensors(torch.float32, device)
        tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
        tensors[8] = tensors[8][:1].expand(2, 3)
        check(case, tensors, lambda x: torch.full((), 0.3, dtype=x.dtype, device=x.device).expand(x.shape))


@kernels
def test_only_the_gradients_that_are_wanted(device: torch.device) -> None:
    """Each alone, of both ops, as it is among all of them."""
    op = _ops.multi_sample_bound
    case = bound("zero_inflated_negative_binomial", "pPNknnnnn", (1, 2, 3), 1)
    tensors, options = case.tensors(torch.float32, device), case.options[:-1]
    check(case, tensors)
    loss, log_w, _, _, residual, *all_made = op.forward(*tensors, *options, 255)
    given = (torch.randn_like(loss), torch.randn_like(log_w))
    all_found = op.backward(*given, *tensors, log_w, residual, *options, 0, 255)
    for bit in range(8):
        made = op.forward(*tensors, *options, 1 << bit)[5:]
        found = op.backward(*given, *tensors, log_w, residual, *options, 0, 1 << bit)
        for grads, every in ((made, all_made), (found, all_found)):
            assert torch.equal(grads[bit], every[bit])
            assert all(grad.shape == (0,) for i, grad in enumerate(grads) if i != bit)


@kernels
@pytest.mark.parametrize("event", [3, 5])
def test_more_dimensions_than_kernels_resolve(event: int, device: torch.device) -> None:
    """Strides that nothing collapses: contiguous copies, and gradients in the inputs' own layout all the same."""
    shape = (2, 3, 2, 3, 2)
    tensors = [t[::2, ::2, ::2, ::2, ::2] for t in (torch.randn([2 * n for n in shape], device=device) for _ in "mv")]
    tensors = [t.permute(1, 0, 4, 2, 3) for t in tensors]
    options = (event, "logvar", 0.0, "sum", -INF, INF, 1.0, "none")
    if event == 5:
        with pytest.raises(_rows.Unsupported):
            OPS["gaussian_kl"](*tensors, None, None, None, *options)
    check(kl("5-D", "nn---", options), [*tensors, None, None, None], transposed)
    check(Case("5-D", _ops.logit_loss, "n", (1, 0, 0, "mean", 1.0, True), lists=[shape]), tensors[:1])
    check(Case("5-D", _ops.log_mean_exp, "n", (2,)), tensors[:1])
    check(Case("5-D", _ops.tvo_loss, "n", (2, [0.0, 0.3, 1.0], "mean")), tensors[:1])
    for op, options in (
        (_ops.vimco_loss, ("mean",)),
        (_ops.rws_losses, ("mean",)),
        (_ops.importance_weighted_sum, (2.0,)),
    ):
        check(Case("5-D", op, "nn", (2, *options)), tensors)


@kernels
def test_bounds_of_more_dimensions_than_kernels_resolve(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "MAX_DIMS", 1)
    _rows.geometry.cache_clear()
    case = bound("bernoulli", "n--unnn--", (3, 2, 2, 5), 0)
    tensors = case.tensors(torch.float32, device)
    tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(_rows.Unsupported):
        OPS["multi_sample_bound"](*tensors, *case.options)
    check(case, tensors)
    case = elbo("gaussian", "nN-nnn--w", (3, 2, 5))
    tensors = case.tensors(torch.float32, device)
    tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(_rows.Unsupported):
        OPS["elbo_loss"](*tensors, *case.options)
    check(case, tensors)
    _rows.geometry.cache_clear()


@kernels
def test_tiles_and_offsets() -> None:
    """A row beyond 2³¹ elements is indexed in 64 bits, and split among many programs."""
    g = _rows.Geometry((4, 2**31), (1,), ((2**31, 1),))
    plan = g.reduction(2048, tl.float32)
    rows, cols, splits, span = plan.counts
    assert g.index == tl.int64 and (rows, cols) == (4, 2**31)
    assert splits == 128 and span * splits >= cols > span * (splits - 1) and span % plan.block_c == 0
    assert _rows.Geometry((4, 5, 6), (2,), ((30, 6, 1), (0, 0, 1))).shape == ((20,), (6,))
    assert _rows.Geometry((4, 5, 6), (1,), ((30, 6, 1),)).shape == ((4, 6), (5,))


# ---- infinities and NaN ----------------------------------------------------------------------------------------------

SOFTMAX = (
    _ops.log_mean_exp,
    _ops.importance_weights,
    _ops.effective_sample_size,
    _ops.iwae_loss,
    _ops.importance_weighted_generator_loss,
    _ops.power_bound_loss,
    _ops.tvo_loss,
    _ops.vimco_loss,
    _ops.rws_losses,
    _ops.log_variance_loss,
    _ops.importance_weighted_sum,
    _ops.weight_diagnostics,
)
ROWS = [
    Case("log_mean_exp", _ops.log_mean_exp, "n", (1,)),
    Case("importance_weights", _ops.importance_weights, "n", (1, 0.5)),
    Case("effective_sample_size", _ops.effective_sample_size, "n", (1,)),
    Case("iwae", _ops.iwae_loss, "n", (1, "none", "bound")),
    Case("iwae[surrogate]", _ops.iwae_loss, "n", (1, "none", "surrogate")),
    Case("iwgan", _ops.importance_weighted_generator_loss, "n", (1, 2.0, True, "none")),
    Case("iwgan[attached]", _ops.importance_weighted_generator_loss, "n", (1, 1.0, False, "none")),
    Case("power", _ops.power_bound_loss, "n", (1, 1.5, 0.0, -1.0, "none")),
    Case("small power", _ops.power_bound_loss, "n", (1, 0.3, 0.0, -1.0, "none")),
    Case("largest", _ops.power_bound_loss, "n", (1, INF, 0.0, -1.0, "none")),
    Case("tvo", _ops.tvo_loss, "n", (1, [0.2, 0.5, 1.0], "none")),
    Case("vimco", _ops.vimco_loss, "nn", (1, "none")),
    Case("rws", _ops.rws_losses, "nn", (1, "none")),
    Case("weighted sum", _ops.importance_weighted_sum, "nn", (1, 2.0)),
]


@kernels
@pytest.mark.parametrize("columns", [7, 10500])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows_of_infinities(case: Case, columns: int, device: torch.device) -> None:
    x = torch.randn(6, columns, device=device)
    x[1] = -INF
    x[2, ::2] = -INF
    x[3, 5] = NAN
    x[4, 5] = INF
    x[5] = x[5].sign() * 1e4
    tensors = [x, *(torch.randn_like(x).mul(4).round() / 4 for _ in case.letters[1:])]  # 1e4 - these is exact
    outputs, grads, incoming = run(case.op, tensors, case.options)
    value = outputs[0]
    assert value[0].isfinite().all() and value[2].isfinite().all() and value[5].isfinite().all()
    assert value[3].isnan().all() and value[4].isnan().all()
    infinite = ("iwae", "iwae[surrogate]", "power", "small power", "largest", "tvo", "vimco", "rws")
    lost = -INF if case.name == "log_mean_exp" else INF if case.name in infinite else 0.0
    assert (value[1] == lost).all()
    fine = [0, 2, 5]
    if grads:
        assert all((grad[1] == 0).all() for grad in grads)
        assert grads[0][3].isnan().all() and grads[0][4].isnan().all()
        assert (grads[0][2, ::2] == 0).all()
    exact = [t[fine].double().requires_grad_() for t in tensors]
    oracle = as_tuple(case.op.reference(*exact, *case.options))
    close(value[fine], oracle[0].detach())
    if grads:
        expected = torch.autograd.grad(oracle[: len(incoming)], exact, [g[fine].double() for g in incoming])
        for actual, exact_grad in zip(grads, expected, strict=True):
            close(actual[fine], exact_grad)


@kernels
@pytest.mark.parametrize("power", [1.0, 0.0, -INF])
def test_bounds_of_infinities(power: float, device: torch.device) -> None:
    """All samples impossible, some, one not a number: 0 of what has no weight, and nothing of it in other examples."""
    case = bound("gaussian", "n--nnnn--", (4, 5, 3), 1, power=power, reduction="sum")
    tensors = case.tensors(torch.float32, device)
    tensors[0][1], tensors[0][2, ::2], tensors[0][3, 1] = INF, INF, NAN  # slopes as infinite as the log-weights
    outputs = case.op.forward(*tensors, *case.options)
    _, log_w, value, ess, _, *made = outputs
    made = [grad for grad in made if grad.numel()]
    assert (log_w[1] == -INF).all() and value[1] == -INF and ess[1] == 0
    assert value[3].isnan() and ess[3].isnan() and made[0][3].isnan().all()
    assert all((grad[1] == 0).all() for grad in made)
    fine = [0, 2] if power > 0 else [0]  # the smallest, and the mean, are -inf
    exact = [None if t is None else t[fine].double().requires_grad_() for t in tensors]
    oracle = case.op.reference(*exact, *case.options)
    for actual, expected in zip(outputs[1:4], oracle[1:4], strict=True):
        close(actual[fine], expected.detach())
    wanted = differentiated(case.op, exact)
    for actual, expected in zip(made, torch.autograd.grad(oracle[0], wanted), strict=True):
        close(actual[fine], expected.nan_to_num(0))  # the reference's 0 · inf


@kernels
@pytest.mark.parametrize("columns", [7, 10500])
def test_diagnostics_of_infinities(columns: int, device: torch.device) -> None:
    x = torch.randn(5, columns, device=device)
    x[1], x[2, ::2], x[3, 5], x[4, 5] = -INF, -INF, NAN, INF
    found = _ops.weight_diagnostics((x,), 1)
    assert found[:, 1].tolist() == [-INF, 0, 0, 0] and found[:, 3:].isnan().all()
    close(found[:, :3], _ops.weight_diagnostics.reference(x[:3].double(), 1))


@kernels
@pytest.mark.parametrize("columns", [6, 10500])
def test_impossible_samples_where_every_sample_counts(columns: int, device: torch.device) -> None:
    """The mean, the smallest, and what holds the mean: -inf, with the gradients of the reference."""
    x = torch.randn(3, columns, device=device) + 5
    x[1, 2], x[2] = -INF, -INF
    for power, elbo_weight in ((0.0, 0.0), (-2.0, 0.0), (-INF, 0.0), (1.0, 0.5), (-0.2, 0.0)):
        check(Case("power", _ops.power_bound_loss, "n", (1, power, elbo_weight, 1.0, "none")), [x])
    check(Case("tvo", _ops.tvo_loss, "n", (1, [0.0, 0.3, 1.0], "none")), [x])


@kernels
@pytest.mark.parametrize("columns", [10, 9000])
def test_small_powers_are_accurate(columns: int, device: torch.device) -> None:
    """The logarithm of a number near 1, divided by the power, would lose every digit."""
    x = torch.randn(3, columns, device=device) - 90
    center = x.double().mean(1)
    for power in (0.3, 1e-3, 1e-6, -1e-4):
        value = _ops.power_bound_loss((x,), 1, power, 0.0, 1.0, "none").double() - center
        expected = _ops.power_bound_loss.reference(x.double(), 1, power, 0.0, 1.0, "none")[0] - center
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=3e-5)


@kernels
@pytest.mark.parametrize("columns", [6, 4500])
def test_vimco_signals(columns: int, device: torch.device) -> None:
    """A sole best sample with almost all of the weight, or little more than the others; ties; samples nearly alike."""
    x = torch.randn(7, columns, dtype=torch.float64, device=device).mul(64).round() / 64
    x[0, 4] += 1000
    x[1, 4] += 40
    x[2] = 90 + x[2] / 1024
    x[3, 1] = x[3, columns - 1] = 8
    x[4] = 3
    x[5, 2] = 12
    x[6] = -INF
    x[6, 3] = 1
    signal, _ = vimco_signal(x, 1)
    for dtype, tolerance in ((torch.float32, 4e-5), (torch.float64, 1e-12)):
        tensors = [x.to(dtype), torch.zeros_like(x, dtype=dtype)]
        _, (_, grad), _ = run(_ops.vimco_loss, tensors, (1, "none"), [torch.ones(7, dtype=dtype, device=device)])
        scale = torch.maximum(signal.abs(), signal.abs().mean(1, keepdim=True))
        error = (-grad.double() - signal).abs()[:6]
        assert (error <= tolerance * scale[:6] + 1e-15).all(), (error / scale[:6]).amax(1)
        assert torch.equal(-grad[6].double(), signal[6])


@kernels
def test_one_sample_is_the_single_sample_loss(device: torch.device) -> None:
    x = torch.randn(9, 1, device=device)
    assert torch.equal(_ops.iwae_loss((x,), 1, "none", "bound"), -x[:, 0])
    assert torch.equal(_ops.iwae_loss((x,), 1, "none", "surrogate"), -x[:, 0])
    for power in (-INF, -2.0, -1e-6, 0.0, 1e-6, 0.3, 1.0, INF):
        assert torch.equal(_ops.power_bound_loss((x,), 1, power, 0.0, 1.0, "none"), x[:, 0])
    assert torch.equal(_ops.tvo_loss((x,), 1, [0.0, 1.0], "none"), -x[:, 0])
    loss = _ops.importance_weighted_generator_loss((x,), 1, 1.0, True, "none")
    assert torch.equal(loss, _ops.logit_term((x,), 0, 1.0)[:, 0])


@kernels
@pytest.mark.parametrize("term", range(6))
def test_extreme_logits(term: int, device: torch.device) -> None:
    x = torch.tensor([-INF, -1e4, -80.0, -20.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 80.0, 1e4, INF, NAN], device=device)
    oracle = x.double().requires_grad_()
    expected = _ops.logit_term.reference(oracle, term, 1.0)
    (expected_grad,) = torch.autograd.grad(expected.sum(), oracle)
    (value,), (grad,), _ = run(_ops.logit_term, [x], (term, 1.0), [torch.ones_like(x)])
    # relative to each value: e^-80 is not 0
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-45, equal_nan=True)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-45, equal_nan=True)


@kernels
def test_extreme_likelihoods(device: torch.device) -> None:
    logits = torch.tensor([-INF, -1e4, -50.0, 0.0, 50.0, 1e4, INF, NAN], device=device).repeat_interleave(3)
    x = torch.tensor([0.0, 1.0, 0.25], device=device).repeat(8)
    check(Case("bernoulli", _ops.bernoulli_log_prob, "nu", (0,)), [logits[3:-6], x[3:-6]])
    (value,), (grad, grad_x), _ = run(_ops.bernoulli_log_prob, [logits, x], (0,), [torch.ones_like(x)])
    assert value[:3].tolist() == [0, -INF, -INF] and value[-6:-3].tolist() == [-INF, 0, -INF]
    assert grad[:3].tolist() == [0, 1, 0.25] and grad[-6:-3].tolist() == [-1, 0, -0.75]
    assert grad_x[:3].tolist() == [0, -INF, -INF] and grad_x[-6:-3].tolist() == [INF, 0, INF]
    assert all(t[-3:].isnan().all() for t in (value, grad, grad_x))


@kernels
def test_near_and_far_from_the_prior(device: torch.device) -> None:
    """e^d - 1 - d neither cancels nor overflows early; NaN stays in its row."""
    logvar = torch.tensor([[0.0, 1e-6, -1e-3, 0.99, -1.01, 30.0, -80.0, 88.0]], device=device).t()
    mean = torch.zeros_like(logvar)
    value = _ops.gaussian_kl((mean, logvar, None, None, None), 1, "logvar", 0.0, "sum", -INF, INF, 1.0, "none")
    exact = logvar[:, 0].double()
    expected = 0.5 * (torch.expm1(exact) - exact)
    expected[1:3] = (exact.square() / 4 + exact**3 / 12)[1:3]
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    logvar[4] = NAN
    for free_bits, clamp in ((0.0, (-1.0, 1.0)), (0.5, (-1.0, 1.0)), (0.0, (-INF, INF))):
        mean[3] = 0.0 if free_bits else NAN  # whether what is NaN exceeds its free bits, nobody can say
        case = kl("NaN", "nn---", (1, "logvar", free_bits, "per_dim", *clamp, 1.0, "none"))
        (value, _), _, _ = check(case, [mean, logvar, None, None, None])
        assert value.isnan().nonzero().flatten().tolist() == ([4] if free_bits else [3, 4])


# ---- random numbers --------------------------------------------------------------------------------------------------

if SERVING:

    @triton.jit
    def store_words(out, rng_state, first, BLOCK: tl.constexpr):
        block = tl.full((), first, tl.int64) + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = words(block, rng_state)
        at = out + tl.arange(0, BLOCK) * 4
        tl.store(at, w0.to(tl.int64))
        tl.store(at + 1, w1.to(tl.int64))
        tl.store(at + 2, w2.to(tl.int64))
        tl.store(at + 3, w3.to(tl.int64))


def philox_by_hand(seed: int, offset: int, block: int) -> list[int]:
    mask = 0xFFFFFFFF
    c = [block & mask, block >> 32, offset & mask, offset >> 32 & mask]
    k = [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & mask, a >> 32 ^ c[3] ^ k[1], a & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    return c


@kernels
@pytest.mark.parametrize("first", [0, 2**32 - 4])
@pytest.mark.parametrize("state", [(0, 0), (-1, -1), (0x0123456789ABCDEF, -0x7EDCBA9876543210)])
def test_words(state: tuple[int, int], first: int, device: torch.device) -> None:
    """Bit for bit, across the carry into the counter's second word too."""
    rng_state = torch.tensor(state, device=device)
    out = torch.empty(8, 4, dtype=torch.int64, device=device)
    store_words[(1,)](out, rng_state, first, 8)
    assert out.tolist() == [philox_by_hand(*state, block) for block in range(first, first + 8)]
    if first == 0:
        assert torch.equal(out, philox(rng_state, 8))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(10007,), (37, 12), (37, 11)])
def test_normals(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    rng_state = torch.tensor([1234, -5678], device=device)
    zeros, ones = torch.zeros(shape, dtype=dtype, device=device), torch.ones(shape, dtype=dtype, device=device)
    z = _ops.sample_gaussian((zeros, ones, rng_state), -1, 0, "std", -INF, INF)
    exact = philox_normal(rng_state, shape, torch.float64)
    torch.testing.assert_close(z.double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    with_kl = _ops.sample_gaussian_with_kl((zeros, ones, rng_state), -1, 0, 1, "std", -INF, INF)[0]
    assert torch.equal(z, with_kl)


# ---- the bare backward ops -------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("needed", range(1, 16))
def test_only_needed_gradients(needed: int, device: torch.device) -> None:
    mean, logvar, prior_mean, prior_logvar = torch.randn(4, 3, 5, device=device).unbind()
    grad = torch.randn(3, device=device)
    arguments = (grad, mean, logvar, prior_mean, prior_logvar, None, mean.new_empty((0,)))
    options = (1, "logvar", 0.0, "sum", -INF, INF, 1.0, "none")
    everything = _ops.gaussian_kl.backward(*arguments, *options, 15)
    some = _ops.gaussian_kl.backward(*arguments, *options, needed)
    for i, (one, other) in enumerate(zip(some, everything, strict=True)):
        assert torch.equal(one, other) if needed >> i & 1 else one.shape == (0,)
    if needed < 4:
        statistics = torch.rand(5, 3, device=device)
        for arguments in (
            (_ops.vimco_loss, grad, mean, logvar, statistics, 1, "none"),
            (_ops.rws_losses, grad, grad, mean, logvar, statistics[:2], 1, "none"),
            (_ops.importance_weighted_sum, grad, mean, logvar, grad, statistics[:2], 1, 2.0),
        ):
            everything, some = (arguments[0].backward(*arguments[1:], n) for n in (3, needed))
            for i, (one, other) in enumerate(zip(some, everything, strict=True)):
                assert torch.equal(one, other) if needed >> i & 1 else one.shape == (0,)
        rng_state = torch.tensor([3, 4], device=device)
        sample = (rng_state, -1, 0, "logvar", -INF, INF)
        everything = _ops.sample_gaussian.backward(mean, mean, logvar, *sample, 3)
        some = _ops.sample_gaussian.backward(mean, mean, logvar, *sample, needed)
        for i, (one, other) in enumerate(zip(some, everything, strict=True)):
            assert torch.equal(one, other) if needed >> i & 1 else one.shape == (0,)
