"""Kernel, reference and float64 compared on extreme inputs, for every function and option of `tests/cases/`.

    python tests/comparison.py --seconds 3600 --seed 7 [--only gaussian_kl] [--isa avx2] [--explained]

A *draw* is a case of the table, a dtype, small shapes with odd tails, and a pattern of inputs: huge, subnormal, equal,
far from 0 with small differences, certain, impossible, with a NaN or an infinity in one place, or excluded. The kernel
and the reference compute it in the draw's dtype, and the reference in float64 on the same (rounded) numbers, which
counts as the truth. A *disagreement* is one of these:

* The truth is finite and in the dtype's range, and the result is NaN or infinite, or the other way round.
* Both are finite, and the error exceeds `ULPS` units in the last place, one of the largest number beside it, and
  `CONDITION` times what the truth changes by when every input changes by one in the last place of the arithmetic.
* The truth is NaN though every input is finite.
* The incoming gradient is 0, and a kernel's gradient is not. (Autograd multiplies it by whatever there is.)

In a row whose value is NaN, infinite or beyond the range, gradients are not judged (docs/numerics.md, rule 7).

Disagreements of one *kind* have the same function, culprit, output and symptom; each kind is shown with its count and
the smallest draw found, its numbers replaced by 1 as far as it stays of its kind. `EXPLAINED` has the kinds that are
right as they are, each with its reason.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

if __name__ == "__main__":  # read when the kernels are loaded
    _parser = argparse.ArgumentParser(description="Compare kernel, reference and float64 on extreme inputs.")
    _parser.add_argument("--seconds", type=float, default=60.0, help="how long to draw")
    _parser.add_argument("--seed", type=int, default=0)
    _parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    _parser.add_argument("--isa", choices=["default", "avx2", "avx512"], help="the CPU unit, the best one if not given")
    _parser.add_argument("--explained", action="store_true", help="show explained kinds too")
    _arguments = _parser.parse_args()
    if _arguments.isa:
        os.environ["UNIGEN_FAST_ISA"] = _arguments.isa

import torch
from cases import CASES, Case
from cases.base import Spec, draw, gaussian, last
from cases.objectives import samples
from helpers import LAYOUTS, as_tuple, cotangents_like, leaves, pull_back, reference_path, seed_generators, upcast
from torch import Tensor

import unigen_fast as uf
from unigen_fast.adversarial import _DISCRIMINATOR, _GENERATOR

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = ((1, 1), (1, 2), (2, 1), (2, 3), (2, 3), (3, 7), (1, 17), (2, 33), (5, 2), (17, 1), (4, 16))
LAYOUT_NAMES = ("contiguous", "contiguous", "transposed", "sliced")
# in units in the last place; float64's kernels keep 1e-10, and the truth beside them is no better than they are
ULPS = {torch.float64: 2.0**19}
CONDITION = {torch.float64: 2.0**19}

# ---- cases beyond the table: options that change the arithmetic, of which the table has but some ---------------------


def _no_oracle(*tensors: Tensor) -> Any:
    raise NotImplementedError("the truth is the reference in float64")


def _more_cases() -> Iterator[Case]:
    def case(name: str, call: Callable[..., Any], specs: Any, **options: Any) -> Case:
        return Case(name, call, specs, _no_oracle, **options)

    for kind in _DISCRIMINATOR:
        yield case(
            f"discriminator_loss[{kind}]",
            lambda r, f, kind=kind: uf.discriminator_loss(real=r, fake=f, kind=kind),
            last("logits", count=2),
        )
    for kind in _GENERATOR:
        relative = kind.startswith("relativistic")
        yield case(
            f"generator_loss[{kind}]",
            lambda f, r=None, kind=kind: uf.generator_loss(fake=f, real=r, kind=kind),
            last("logits", count=2 if relative else 1),
        )
    yield case("log_discriminator[soft]", uf.log_discriminator, lambda rows, n: [
        Spec((rows, n), "logits"), Spec((rows, n), "unit")
    ])  # fmt: skip
    yield case(
        "log_discriminator[soft,reversed]",
        lambda x, y: uf.log_discriminator(x, y, reversed=True),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, n), "unit", differentiable=False)],
    )
    for name, order in (("order 3", 3.0), ("order 1.5", 1.5)):
        yield case(f"cubo_loss[{name}]", lambda x, o=order: uf.cubo_loss(x, dim=-1, order=o), last("log_w"))
    for alpha in (-math.inf, -3.0, 0.0, 0.99, 1.01, math.inf):
        yield case(
            f"renyi_loss[alpha {alpha}]",
            lambda x, a=alpha: uf.renyi_loss(x, dim=-1, alpha=a, reduction="none"),
            last("log_w"),
        )
    yield case(
        "gaussian_kl[free bits of the row,none]",
        lambda m, v: uf.gaussian_kl(m, v, free_bits=1.0, reduction="none"),
        gaussian(),
    )
    yield case(
        "gaussian_kl[none]",
        lambda m, v, pm, pv: uf.gaussian_kl(m, v, pm, pv, reduction="none"),
        gaussian(prior=True),
    )
    kinds = {
        "bernoulli": (["logits"], "binary"),
        "gaussian": (["normal", "unit"], "normal"),
        "laplace": (["normal", "unit"], "normal"),
        "discretized_logistic": (["normal", "unit"], "data"),
        "negative_binomial": (["std", "std"], "counts"),
        "zero_inflated_negative_binomial": (["std", "std", "logits"], "counts"),
    }
    for likelihood, (decoder, x) in kinds.items():
        count = len(decoder)
        for reduction in ("mean", "none"):

            def elbo(*t: Tensor, count: int = count, likelihood: str = likelihood, reduction: str = reduction) -> Any:
                options = {"likelihood": likelihood, "reduction": reduction}
                return tuple(uf.elbo_loss(t[:count], *t[count : count + 3], weights=t[count + 3], **options))

            yield case(
                f"elbo_loss[{likelihood},weights,{reduction}]",
                elbo,
                lambda rows, n, decoder=decoder, x=x: [
                    *(Spec((rows, n), kind) for kind in decoder),
                    Spec((rows, n), x, differentiable=False),
                    *gaussian("unit")(rows, n),
                    Spec((rows,), "weights", differentiable=False),
                ],
                made=reduction != "none",
            )

        def objective(*t: Tensor, count: int = count, likelihood: str = likelihood) -> Any:
            found = uf.iwae_objective(t[:count], *t[count : count + 4], dim=1, likelihood=likelihood)
            return found.loss, found.log_w

        yield case(f"iwae_objective[{likelihood}]", objective, samples(decoder[0], x, *decoder[1:], count=3), made=True)


def every_case(pattern: str = "") -> list[Case]:
    found = {c.name: c for c in (*CASES, *_more_cases())}
    return [c for c in found.values() if re.search(pattern, c.name)]


# ---- inputs ----------------------------------------------------------------------------------------------------------

SPECIALS = (0.0, 1e-42, 1e-30, 1e-10, 1e-3, 1.0, 16.0, 20.0, 30.0, 88.0, 89.0, 100.0, 104.0, 200.0, 300.0, 1e4)
HUGE = 1e30  # whose square is beyond fp32
SPREADS = (0.0, 1e-42, 1e-3, 1.0, 20.0, 88.0, 89.0, 100.0, 104.0, 177.0, 178.0, 200.0)  # logarithms
POSITIVE = (1e-42, 1e-38, 1e-30, 1e-10, 1e-3, 1.0, 1e3, 1e4, 1e7, 1e30)
COUNTS = (0.0, 1.0, 5.0, 1e4, 1e7, 1e9, 1e-42, 0.5)
FRACTIONS = (0.0, 1.0, 0.5, 1e-42, 1e-8, 0.999)
OFFSETS = (1e2, 1e3, 1e4, 1e5)
PATTERNS = (
    "ordinary", "specials", "scales", "constants", "equal", "equal", "offset", "offset", "one-hot", "impossible",
    "strange", "excluded", "zero gradient", "huge",
)  # fmt: skip


def role(case: Case, spec: Spec, name: str) -> str:
    """What a tensor's numbers may be: "real", "spread" (a log-variance or log-scale), "positive", "count", "fraction",
    "weight", or "fixed" as drawn."""
    if spec.kind == "weights":
        if "weights" in case.name:
            return "weight"
        return "count" if "negative_binomial" in case.name else "real"
    if spec.kind == "unit" and case.function in ("elbo_loss", "iwae_objective", "total_correlation"):
        return "spread"
    if spec.kind in ("normal", "logits") and name in ("v", "pv", "s", "ps"):
        return "spread"
    roles = {"std": "positive", "counts": "count", "unit": "fraction", "data": "fraction"}
    fixed = ("labels", "binary", "pixels", "mask")
    return roles.get(spec.kind, "fixed" if spec.kind in fixed else "real")


def roles_of(case: Case, specs: Sequence[Spec]) -> list[str]:
    code = case.call.__code__
    names = code.co_varnames[: code.co_argcount] if not code.co_flags & inspect.CO_VARARGS else ()
    return [role(case, s, names[i] if i < len(names) else "") for i, s in enumerate(specs)]


@dataclass(frozen=True)
class Draw:
    """One comparison. `plain`: the tensors of the truth, which differ from `tensors` in excluded numbers alone;
    `noise`: by what each may be off, relative to the arithmetic's epsilon, or None."""

    case: Case
    pattern: str
    dtype: torch.dtype
    tensors: list[Tensor]
    plain: list[Tensor]
    noise: list[Tensor | None]
    silent: bool = False  # the incoming gradients are 0
    correlated: bool = False  # equal numbers stay equal when they are perturbed

    @property
    def size(self) -> int:
        return sum(x.numel() for x in self.tensors)

    @property
    def finite(self) -> bool:
        return all(bool(x.isfinite().all()) for x in self.plain)


def pick(choices: Sequence[Any]) -> Any:
    return choices[int(torch.randint(len(choices), ()))]


def chance(p: float) -> bool:
    return bool(torch.rand(()) < p)


def signs(shape: Sequence[int]) -> Tensor:
    return torch.randint(0, 2, tuple(shape)).double() * 2 - 1


def among(choices: Sequence[float], shape: Sequence[int]) -> Tensor:
    return torch.tensor(choices, dtype=torch.float64)[torch.randint(len(choices), tuple(shape))]


def specials(role: str, x: Tensor, share: float) -> Tensor:
    """Some of the numbers of `x` replaced by special ones of its role."""
    if role in ("fixed", "weight"):
        return x
    choices = {
        "real": SPECIALS, "spread": SPREADS, "positive": POSITIVE, "count": COUNTS, "fraction": FRACTIONS
    }[role]  # fmt: skip
    found = among(choices, x.shape) * (signs(x.shape) if role in ("real", "spread") else 1.0)
    return torch.where(torch.rand(x.shape) < share, found, x)


def strange(role: str, x: Tensor) -> Tensor:
    """One NaN or, of real numbers, infinity."""
    if x.numel() == 0:
        return x
    x = x.clone()
    choices = (math.nan, math.inf, -math.inf) if role == "real" else (math.nan,)
    x.reshape(-1)[int(torch.randint(x.numel(), ()))] = pick(choices)
    return x


def values(case: Case, pattern: str, specs: Sequence[Spec], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The numbers of a pattern in float64, and by what each may be off, relative to an epsilon."""
    roles = roles_of(case, specs)
    tensors = [draw(replace(s, kind="unit") if s.kind == "data" else s, torch.float64) for s in specs]
    if pattern == "specials":
        share = pick((0.1, 0.5, 1.0))
        tensors = [specials(r, x, share) for r, x in zip(roles, tensors, strict=True)]
    elif pattern == "huge":
        tensors = [
            torch.where(torch.rand(x.shape) < 0.2, HUGE * signs(x.shape), specials(r, x, 0.2)) if r == "real" else x
            for r, x in zip(roles, tensors, strict=True)
        ]
    elif pattern == "scales":
        scales = {"real": SPECIALS, "spread": SPREADS}
        tensors = [
            x * pick(scales[r]) if r in scales and chance(0.7) else x for r, x in zip(roles, tensors, strict=True)
        ]
    elif pattern == "constants":
        tensors = [
            specials(r, x, 1.0).reshape(-1)[:1].expand(x.shape).clone() if chance(0.7) and r != "fixed" else x
            for r, x in zip(roles, tensors, strict=True)
        ]
    elif pattern == "equal":
        # two sets of numbers between the tensors: what is of one set and of one shape, or constant, is equal
        constant, kept = chance(0.5), {}
        for i, (r, x) in enumerate(zip(roles, tensors, strict=True)):
            if r in ("real", "spread"):
                which = int(torch.randint(2, ()))
                key = which if constant else (which, x.shape)
                if key not in kept:
                    width = pick((1.0, 1.0, 30.0, 200.0))
                    kept[key] = width * (2 * torch.rand(() if constant else x.shape, dtype=torch.float64) - 1)
                tensors[i] = kept[key].expand(x.shape).clone()
            elif r in ("positive", "count") and chance(0.3):
                tensors[i] = specials(r, x, 0.5)
    elif pattern == "one-hot":
        for i, (r, x) in enumerate(zip(roles, tensors, strict=True)):
            if r in ("real", "spread") and x.numel() and x.dim():
                hot = torch.zeros_like(x).scatter_(-1, torch.randint(x.size(-1), (*x.shape[:-1], 1)), 1.0)
                heights = (20.0, 100.0, 200.0, -20.0, -200.0) if r == "spread" else (20.0, 100.0, 300.0, 1e4, -300.0)
                tensors[i] = hot * pick((*heights, math.inf) if r == "real" else heights) if chance(0.9) else x
                tensors[i] = torch.where(hot == 0, 0.0, tensors[i]) if chance(0.9) else x
    elif pattern == "impossible":
        for i, (r, x) in enumerate(zip(roles, tensors, strict=True)):
            if r == "real" and chance(0.7):
                mask = torch.rand(x.shape) < 0.3
                if chance(0.5) and x.dim():
                    along = pick(range(x.dim()))
                    mask = mask | (torch.rand([n if d != along else 1 for d, n in enumerate(x.shape)]) < 0.4)
                tensors[i] = torch.where(mask, -math.inf, x)
    elif pattern == "strange":
        eligible = [i for i, r in enumerate(roles) if r != "fixed"]
        if eligible:
            i = pick(eligible)
            tensors[i] = strange(roles[i], tensors[i])
    rounded = [x.to(dtype).double() if x.is_floating_point() else x for x in tensors]
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for i, r in enumerate(roles):  # rounded out of their domain
        if r in ("positive", "count"):
            rounded[i] = rounded[i].clamp(smallest if r == "positive" and dtype == torch.float16 else 0.0, largest)
    noise = [x.abs() if x.is_floating_point() else x for x in rounded]
    if pattern == "offset":  # as far as the sum has no rounding: a number keeps the digits that it had
        offset, grid = pick(OFFSETS), 2.0**-6
        if dtype == torch.float32:
            for i, r in enumerate(roles):
                if r == "real":
                    x = (rounded[i] / grid).round() * grid
                    noise[i], rounded[i] = x.abs(), x + offset
    return rounded, noise


def excluded(case: Case, specs: Sequence[Spec], tensors: list[Tensor]) -> list[Tensor] | None:
    """`tensors` in float64 with NaN and infinities where their weights are 0; None where no weight is."""
    roles = roles_of(case, specs)
    place = [i for i, r in enumerate(roles) if r == "weight"]
    if len(place) != 1 or specs[place[0]].differentiable:
        return None
    at = place[0]
    tensors[at] = torch.where(torch.rand(tensors[at].shape) < 0.5, 0.0, tensors[at])

    def gradients(weights: Tensor) -> list[Tensor]:
        given = [
            (weights if i == at else x).detach().requires_grad_(i != at and x.is_floating_point())
            for i, x in enumerate(tensors)
        ]
        with reference_path():
            outputs = as_tuple(case(*given))[:1]
            return pull_back(outputs, leaves(given), cotangents_like(outputs), materialize_grads=True)

    silent, heard = gradients(tensors[at]), gradients(torch.ones_like(tensors[at]))
    found, pairs = list(tensors), iter(zip(silent, heard, strict=True))
    for i, x in enumerate(tensors):
        if i != at and x.is_floating_point():
            s, h = next(pairs)
            hidden = (s == 0) & (h != 0) & (torch.rand(x.shape) < 0.7)
            if roles[i] != "fixed":
                found[i] = torch.where(hidden, among((math.nan, math.inf, -math.inf), x.shape), x)
    return found


def representable(x: Tensor, dtype: torch.dtype, positive: bool) -> Tensor:
    """Finite numbers within the range of `dtype`, and those that are to be positive not rounded to 0."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps if positive else -info.max
    return torch.where(x.isfinite(), x.clamp(least, info.max), x)


def make_draw(case: Case, pattern: str, dtype: torch.dtype, size: tuple[int, int], layout: str) -> Draw | None:
    """From PyTorch's generator as it stands; None where the pattern has no meaning for the case."""
    specs = case.specs(*size)
    # a function of pairs has no rows: a NaN in one point reaches all of them
    silent = pattern == "zero gradient"
    if silent and (not case.differentiable or case.function in ("mmd", "total_correlation")):
        return None
    inner = pick(("specials", "constants", "strange", "impossible")) if silent else pattern
    numbers, noise = values(case, "ordinary" if inner == "excluded" else inner, specs, dtype)
    plain = numbers
    if inner == "excluded":
        if (hidden := excluded(case, specs, numbers)) is None:
            return None
        numbers, plain = hidden, numbers

    roles = roles_of(case, specs)
    if silent:  # a weight that is no number is a factor of the incoming gradient
        ordinary, _ = values(case, "ordinary", specs, dtype)
        plain = numbers = [o if r == "weight" else x for r, x, o in zip(roles, numbers, ordinary, strict=True)]

    def tensors(given: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for spec, kind, x in zip(specs, roles, given, strict=True):
            if x.is_floating_point():
                x = representable(x, dtype, kind == "positive").to(dtype)
                x = LAYOUTS[layout](x) if x.dim() else x
            found.append(x.detach().requires_grad_(spec.differentiable and x.is_floating_point()))
        return found

    # a real number is a logarithm or a place of scale 1: near 0 its absolute error counts
    floors = {"real": 1.0, "spread": 1.0, "positive": 0.0}
    perturbed = [n.clamp(min=floors[r]) if r in floors else None for r, n in zip(roles, noise, strict=True)]
    return Draw(case, pattern, dtype, tensors(numbers), tensors(plain), perturbed, silent, pattern == "equal")


# ---- results ---------------------------------------------------------------------------------------------------------

Result = list[Tensor]  # values, then gradients


def evaluate(draw: Draw, tensors: Sequence[Tensor], cotangents: list[Tensor | None] | None = None) -> Any:
    """(values and gradients, the cotangents): gradients follow the values."""
    given = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
    outputs = as_tuple(draw.case(*given))
    if cotangents is None:
        cotangents = cotangents_like(outputs)
        if draw.pattern == "excluded":  # only the first output leaves anything out
            cotangents = [*cotangents[:1], *[None] * len(cotangents[1:])]
        if draw.silent:
            cotangents = [None if c is None else torch.zeros_like(c) for c in cotangents]
    cotangents = [None if c is None else c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    found = pull_back(outputs, leaves(given), cotangents, materialize_grads=True) if draw.case.differentiable else []
    judged = outputs[:1] if draw.pattern == "excluded" else outputs
    return [o.detach() for o in judged], list(found), cotangents


def sensitivity(draw: Draw, cotangents: list[Tensor | None], truth: Result) -> Result:
    """The most that the truth changes by, over a few perturbations of the inputs by one unit in the last place."""
    wide, arithmetic = draw.dtype, draw.dtype if draw.case.composed or draw.case.broadcast else None
    if arithmetic is None:
        arithmetic = torch.float64 if wide == torch.float64 else torch.float32
    eps = torch.finfo(arithmetic).eps
    most = [torch.zeros_like(t) for t in truth]
    for trial in range(5):
        generator = torch.Generator().manual_seed(trial)
        given = []
        for x, noise in zip(upcast(draw.plain), draw.noise, strict=True):
            if noise is not None:
                if draw.correlated:
                    generator.manual_seed(trial)
                delta = torch.rand(x.shape, generator=generator, dtype=torch.float64).round() * 2 - 1
                step = torch.where(noise.isfinite(), noise, 0.0) * eps * (delta if trial else 1.0)
                x = (x.detach() + step).requires_grad_(x.requires_grad)
            given.append(x)
        with reference_path():
            outputs, gradients, _ = evaluate(draw, given, cotangents)
        for m, t, p in zip(most, truth, [*outputs, *gradients], strict=True):
            m.copy_(torch.maximum(m, (p - t).abs().nan_to_num(nan=math.inf, posinf=math.inf)))
    return most


CLASSES = ("a number", "inf", "-inf", "NaN")


def class_of(x: Tensor) -> Tensor:
    found = torch.zeros(x.shape, dtype=torch.int64)
    found[x == math.inf], found[x == -math.inf], found[x.isnan()] = 1, 2, 3
    return found


def symptoms(
    got: Tensor, truth: Tensor, finite_inputs: bool, gradient: bool, lost: Tensor, change: Callable[[], Tensor]
) -> dict[str, int]:
    """What is wrong with `got`, and with which element; `change` is called for the sensitivity where it matters. Of a
    `gradient`, what is `lost` is not judged, nor where the truth is not finite or beyond the range."""
    info = torch.finfo(got.dtype)
    if got.shape != truth.shape:
        return {"another shape": 0}
    ulps, condition = ULPS.get(got.dtype, 64.0), CONDITION.get(got.dtype, 32.0)
    got, truth = got.double().reshape(-1), truth.reshape(-1)
    beyond = truth.abs() > info.max
    close = (truth.abs() > info.max / 4) & truth.isfinite()  # the last rounding, or a sum's, decides
    expected = torch.where(beyond & truth.isfinite(), truth.sign() * math.inf, truth)
    judged = ~close | beyond
    if finite_inputs:  # the truth has failed, which is said of it alone
        judged = judged & ~truth.isnan()
    wanted, found = class_of(expected), class_of(got)
    if gradient:
        judged = judged & (wanted == 0) & ~lost.reshape(-1)
    result: dict[str, int] = {}
    for i in ((wanted != found) & judged).nonzero().flatten().tolist():
        of = "overflow" if beyond[i] and truth[i].isfinite() else CLASSES[wanted[i]]
        result.setdefault(f"{CLASSES[found[i]]} for {of}", i)
    both = (wanted == 0) & (found == 0) & ~lost.reshape(-1)
    error = torch.where(both, (got - truth).abs(), 0.0)
    # below the normal range kernels may flush to 0, except for results of 16 bits, which are rounded from fp32
    allowed = ulps * (info.eps * truth.abs() + info.smallest_normal * (1 if info.bits > 16 else info.eps))
    if bool((error > allowed).any()):
        # a number that is tiny beside its neighbours needs no digits of its own
        largest = truth.abs()[truth.isfinite() & ~beyond].amax()
        allowed = allowed + condition * change().reshape(-1) + info.eps * largest
        if bool((error > allowed).any()):
            result["inexact"] = int((error / allowed).argmax())
    return result


def lost_rows(kernel: Tensor, plain: Tensor, truth: Tensor) -> Tensor:
    """Where a value is NaN or infinite, or beyond the range of its dtype."""
    beyond = truth.abs() > torch.finfo(kernel.dtype).max
    return ~(kernel.isfinite() & plain.isfinite() & truth.isfinite()) | beyond


def of_lost_rows(rows: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The elements of a tensor of `shape` that belong to lost rows: all of them where it has not the rows' shape."""
    result = torch.zeros(shape, dtype=torch.bool)
    for lost in rows:
        if lost.shape == shape[: lost.dim()]:
            result |= lost.reshape(*lost.shape, *[1] * (len(shape) - lost.dim()))
        elif bool(lost.any()):
            result.fill_(True)
    return result


Found = tuple[str, str, str]  # culprit, "value" or "gradient", symptom


@dataclass(frozen=True)
class Place:
    """Where a draw disagrees: what the three have in one element of one result."""

    result: str
    element: tuple[int, ...]
    kernel: float
    reference: float
    truth: float

    @staticmethod
    def of(result: str, at: int, *three: Tensor) -> Place:
        """Element `at` of kernel's, reference's and true result."""
        shape = three[2].shape
        element = tuple(int(n) for n in torch.unravel_index(torch.tensor(at), shape)) if shape else ()
        return Place(result, element, *(float(t.reshape(-1)[at]) if t.numel() > at else math.nan for t in three))

    def __str__(self) -> str:
        at = f"{self.result}{list(self.element)}"
        return f"{at}: kernel {self.kernel:.9g}, reference {self.reference:.9g}, float64 {self.truth:.9g}"


def compare(draw: Draw) -> dict[Found, Place]:
    """Every disagreement, and an element that shows it."""
    outputs, gradients, cotangents = evaluate(draw, draw.tensors)
    with reference_path():
        reference = evaluate(draw, draw.tensors, cotangents)
        truth = evaluate(draw, upcast(draw.plain), cotangents)
    whole: Result = [*truth[0], *truth[1]]
    rows = [lost_rows(*three) for three in zip(outputs, reference[0], truth[0], strict=True)]
    cache: list[Result] = []
    result: dict[Found, Place] = {}

    def change(i: int) -> Tensor:
        if not cache:
            cache.append(sensitivity(draw, cotangents, whole))
        return cache[0][i]

    inputs = [i for i, x in enumerate(draw.tensors) if x.requires_grad]
    parts = zip([*outputs, *gradients], [*reference[0], *reference[1]], whole, strict=True)
    for i, (kernel, plain, true) in enumerate(parts):
        of_value = i < len(outputs)
        part, name = ("value", f"value {i}") if of_value else ("gradient", f"gradient of {inputs[i - len(outputs)]}")

        three = (kernel, plain, true)
        lost = torch.zeros_like(true, dtype=torch.bool) if of_value else of_lost_rows(rows, true.shape)
        wrong: dict[str, dict[str, int]] = {}
        for who, x in (("kernel", kernel), ("reference", plain)):
            if not draw.silent:
                wrong[who] = symptoms(x, true, draw.finite, not of_value, lost, lambda i=i: change(i))
            elif not of_value and who == "kernel" and not draw.case.composed and bool((x != 0).any()):
                wrong[who] = {"not 0 of an incoming 0": int((x.reshape(-1) != 0).nonzero()[0])}
            else:
                wrong[who] = {}
        for symptom in {*wrong["kernel"], *wrong["reference"]}:
            culprits = [who for who in wrong if symptom in wrong[who]]
            who = "both" if len(culprits) == 2 else culprits[0]
            result.setdefault((who, part, symptom), Place.of(name, wrong[culprits[0]][symptom], *three))
        if draw.finite and not draw.silent and bool(true.isnan().any()):
            at = int(true.reshape(-1).isnan().nonzero()[0])
            result.setdefault(("float64", part, "NaN of finite inputs"), Place.of(name, at, *three))
            unlike = (true.isnan() & (class_of(kernel) != class_of(plain))).reshape(-1)
            if bool(unlike.any()):
                at = int(unlike.nonzero()[0])
                k, r = (CLASSES[class_of(x).reshape(-1)[at]] for x in (kernel, plain))
                result.setdefault(("each other", part, f"kernel {k}, reference {r}"), Place.of(name, at, *three))
    return result


# ---- kinds -----------------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """Disagreements alike: how many, by which patterns, dtypes and cases, and the smallest draw."""

    name: str
    count: int = 0
    patterns: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    cases: Counter[str] = field(default_factory=Counter)
    smallest: Draw | None = None

    def add(self, draw: Draw) -> None:
        self.count += 1
        self.patterns[draw.pattern] += 1
        self.dtypes[str(draw.dtype).removeprefix("torch.")] += 1
        self.cases[draw.case.name] += 1
        # fp32 before the others: what is wrong there is the most serious
        if self.smallest is None or rank(draw) < rank(self.smallest):
            self.smallest = draw


def rank(draw: Draw) -> tuple[int, int]:
    return 0 if draw.dtype == torch.float32 else 1, draw.size


def kind_of(draw: Draw, found: Found) -> str:
    return f"{draw.case.function} | " + " | ".join(found) + f" | {draw.pattern}"


def shrink(draw: Draw, found: Found) -> Draw:
    """The draw with as many numbers as possible replaced by 1."""
    if draw.pattern == "excluded":
        return draw
    tensors = [x.detach().clone(memory_format=torch.contiguous_format) for x in draw.tensors]

    def rebuilt() -> Draw:
        new = [x.clone().requires_grad_(o.requires_grad) for x, o in zip(tensors, draw.tensors, strict=True)]
        noise = [n if n is None else n.clamp(min=1.0) for n in draw.noise]
        return replace(draw, tensors=new, plain=new, noise=noise)

    if draw.pattern != "offset" and draw.size <= 64:
        for x in tensors:
            if not x.is_floating_point():
                continue
            flat = x.view(-1)
            for i in range(flat.numel()):
                old = flat[i].clone()
                if old == 1:
                    continue
                flat[i] = 1
                if found not in compare(rebuilt()):
                    flat[i] = old
    return rebuilt()


@dataclass(frozen=True)
class Known:
    """Kinds that match `kinds`, a regular expression, and why they are as they are."""

    kinds: str
    reason: str

    def matches(self, kind: str) -> bool:
        return re.fullmatch(self.kinds, kind) is not None


_ANY = r"(kernel|reference|both)"
_SQUARES = (
    r"(gaussian_\w+|laplace_log_prob|sample_gaussian\w*|elbo_loss|iwae_objective|total_correlation|mmd"
    r"|discretized_logistic\w*|\w*iwae_loss\w*|renyi_loss|cubo_loss|vimco_loss|log_variance_loss"
    r"|trajectory_balance_loss|discriminator_loss|generator_loss|importance_weight\w*|\w*negative_binomial\w*"
    r"|\w*categorical\w*|rws_losses|tvo_loss|memorization_score|adversary_activated_loss)"
)

# right as they are; docs/numerics.md has the rules
EXPLAINED: tuple[Known, ...] = (
    Known(
        rf"{_SQUARES} \| .* \| huge",
        "squares and sums of ±1e30 leave fp32's range on the way: there the results overflow before the exact ones do",
    ),
    Known(
        rf"(discriminator_loss|generator_loss|memorization_score|piwae_losses|importance_weight\w*|sample_gaussian\w*"
        rf"|iwae_objective|iwae_loss|miwae_loss|\w*mixture\w*) \| {_ANY} \| \w+ \| inexact \| offset",
        "differences of means, or of log-mean-exps, that are themselves rounded to fp32, far from 0",
    ),
    Known(
        rf"(\w*categorical\w*|discretized_logistic\w*|importance_weight\w*|iwae_objective|bernoulli_kl) \| {_ANY} \| "
        r"gradient \| inexact \| (?!excluded).*",
        "terms of one row that cancel, p (log-ratio - KL) and the like, have the resolution of the largest of them",
    ),
    Known(
        rf"(\w*negative_binomial\w*|elbo_loss|iwae_objective) \| {_ANY} \| \w+ \| inexact \| "
        r"(specials|constants|equal|scales|one-hot)",
        "counts below the normal range, and slopes in which numbers near 1 cancel",
    ),
    Known(
        r"\w*negative_binomial\w* \| reference \| gradient \| NaN for a number \| "
        r"(specials|constants|equal|scales|one-hot)",
        "numbers below the normal range, whose reciprocals are beyond it",
    ),
    Known(
        rf"(elbo_loss|iwae_objective|gaussian_\w+|laplace_log_prob|sample_gaussian\w*|total_correlation) \| {_ANY} \| "
        r"\w+ \| inexact \| (strange|impossible|one-hot|specials|scales|constants|equal)",
        "a spread of e^100 or e^-100 in one element, beside which the sensitivity of the others is not seen",
    ),
    Known(
        r"(gaussian_\w+|sample_gaussian\w*|elbo_loss|iwae_objective|discriminator_loss|generator_loss|total_correlation)"
        rf" \| {_ANY} \| \w+ \| -?inf for a number \| (?!excluded|strange).*",
        "within a factor of the number of rows, or of a square, of the largest number: the scale is applied last",
    ),
    Known(
        rf"(gaussian_kl_monte_carlo|iwae_objective|total_correlation|discriminator_loss|sample_gaussian\w*) \| {_ANY} "
        r"\| value \| NaN for (overflow|-?inf) \| .*",
        "the difference of two terms that are both beyond the range",
    ),
    Known(
        rf"(elbo_loss|iwae_objective) \| {_ANY} \| value \| (NaN for -?inf|-?inf for NaN) \| "
        r"(impossible|one-hot|strange)",
        "two infinities of a row, of which the kernel and autograd meet another one first",
    ),
    Known(
        rf"(bernoulli_\w+|adversary_activated_loss) \| {_ANY} \| (value|gradient) \| (inexact|a number for -?inf) \| "
        r"(?!excluded|strange|offset).*",
        "a probability below the normal range, which is 0",
    ),
    Known(
        rf"\w*mixture\w* \| {_ANY} \| value \| inexact \| (one-hot|specials|scales|constants)",
        "a logit of 1e4 has 4 digits behind the point, and so have the weights",
    ),
    Known(
        rf"\w*categorical\w* \| {_ANY} \| value \| inexact \| (?!excluded|strange).*",
        "a log-sum-exp of logits of 100 is rounded to 1e-5, and what is below that is lost",
    ),
    Known(
        rf"(gaussian_kl_monte_carlo|iwae_objective|elbo_loss|laplace_log_prob) \| {_ANY} \| value \| "
        r"(a number|-?inf) for overflow \| (scales|specials|constants|equal|one-hot)",
        "a standard deviation below e^-88: its reciprocal is kept at the largest number",
    ),
    Known(
        r"discriminator_loss \| float64 \| value \| NaN of finite inputs \| .*",
        "the same in float64: fgan_neyman of logits of 1e4",
    ),
    Known(
        rf"iwae_objective \| {_ANY} \| \w+ \| NaN for a number \| (equal|one-hot|specials|constants)",
        "a log-weight beyond the range is +inf, and so NaN for every statistic of its row",
    ),
    Known(
        r"mmd \| kernel \| \w+ \| a number for NaN \| (strange|impossible|one-hot|scales)",
        "a point at infinity is infinitely far from the others: the limit, where the reference has inf - inf",
    ),
    Known(
        r"(rws_losses|piwae_losses|mmd|gaussian_kl_monte_carlo|discriminator_loss|categorical_kl|gaussian_kl)"
        rf" \| {_ANY} \| value \| inexact \| (equal|constants)",
        "equal terms that cancel: what is left is the rounding of one of them",
    ),
    Known(rf"mmd \| {_ANY} \| value \| inexact \| .*", "three means that cancel"),
    Known(
        rf"gaussian_kl_monte_carlo \| {_ANY} \| value \| NaN for a number \| (equal|one-hot)",
        "the densities of one distribution twice, both beyond the range: inf - inf where the exact difference is 0",
    ),
    Known(
        r"(importance_weighted_sum|vimco_loss) \| (kernel|both) \| value \| (a number for inf|-inf for NaN) \| "
        r"(one-hot|scales)",
        "a weight of e^-300 is 0, and what is behind it is not read; in float64 the weight is a number",
    ),
    Known(
        rf"(rws_losses|vimco_loss) \| {_ANY} \| \w+ \| inexact \| (one-hot|specials)",
        "a log-weight of 1e4, the difference of two given numbers, is rounded to 1e-3",
    ),
    Known(
        r"iwae_objective \| (each other|float64) \| gradient \| (kernel a number, reference NaN|NaN of finite inputs)"
        r" \| (constants|scales|specials)",
        "ciwae of a sample whose density is 0 in float64 too: its mean of log-weights, and the loss, is infinite",
    ),
    Known(
        r"elbo_loss \| reference \| gradient \| NaN for a number \| excluded",
        "an excluded row of infinities whose value is a number: autograd multiplies its infinite slopes by 0",
    ),
    Known(
        r"log_discriminator \| kernel \| gradient \| inexact \| constants",
        "a soft label and a probability that differ by less than 1e-10",
    ),
    Known(
        rf"sample_gaussian\w* \| {_ANY} \| value \| a number for overflow \| .*",
        "above the largest number of float16 by less than half a rounding, it becomes that number",
    ),
    Known(
        r"weight_diagnostics \| float64 \| value \| NaN of finite inputs \| scales",
        "the shape of a tail whose weights are equal to the last bit",
    ),
    Known(rf"weight_diagnostics \| {_ANY} \| value \| inexact \| .*", "the entropy of nearly one sample"),
)


@dataclass
class Report:
    cases: Counter[str] = field(default_factory=Counter)
    disagreements: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Kind] = field(default_factory=dict)

    def add(self, draw: Draw) -> None:
        function = draw.case.function
        self.cases[function] += 1
        found = compare(draw)
        self.disagreements[function] += bool(found)
        for what in found:
            name = kind_of(draw, what)
            self.kinds.setdefault(name, Kind(name)).add(draw)

    def unexplained(self) -> list[Kind]:
        return [k for name, k in sorted(self.kinds.items()) if not any(e.matches(name) for e in EXPLAINED)]

    def __str__(self) -> str:
        lines = [f"{'function':44}{'cases':>8}{'disagreements':>15}"]
        for function in sorted(self.cases):
            lines.append(f"{function:44}{self.cases[function]:8}{self.disagreements[function]:15}")
        lines.append(f"{'all':44}{self.cases.total():8}{self.disagreements.total():15}")
        return "\n".join(lines)


def run(seed: int, *, only: str = "", draws: int | None = None, seconds: float = math.inf) -> Report:
    """`draws` of each case, or as many as `seconds` allow: each pattern in turn, everything else at random."""
    report, until, cases, turn = Report(), time.monotonic() + seconds, every_case(only), 0
    while draws is None or turn < draws:
        for number, case in enumerate(cases):
            if time.monotonic() > until:
                return report
            seed_generators(seed * 1_000_003 + turn * 1009 + number)
            pattern = PATTERNS[(turn + number) % len(PATTERNS)]
            made = make_draw(case, pattern, pick(DTYPES), pick(SIZES), pick(LAYOUT_NAMES))
            if made is not None:
                report.add(made)
        turn += 1
    return report


def show(kind: Kind) -> str:
    """A kind, and its smallest draw."""
    lines = [f"{kind.name}: {kind.count} ({dict(kind.dtypes)}; {dict(kind.cases.most_common(4))})"]
    if kind.smallest is not None:
        culprit, part, symptom = kind.name.split(" | ")[1:4]
        what = culprit, part, symptom
        small = shrink(kind.smallest, what)
        lines.append(f"    {small.case.name}, {small.dtype}")
        lines += [f"    input {i}: {brief(x)}" for i, x in enumerate(small.tensors)]
        lines.append(f"    {compare(small).get(what, 'gone when its numbers are replaced')}")
    return "\n".join(lines)


def brief(x: Tensor) -> str:
    """Shape and numbers, of a large one those that are not 1."""
    flat = [f"{v:.7g}" for v in x.detach().double().reshape(-1).tolist()]
    if len(flat) > 16:
        flat = [f"[{i}] {v}" for i, v in enumerate(flat) if v != "1"]
    return f"{list(x.shape)} " + " ".join(flat[:16]) + (" …" if len(flat) > 16 else "")


def main(arguments: argparse.Namespace) -> int:
    print(uf.info(), flush=True)
    report = run(arguments.seed, only=arguments.only, seconds=arguments.seconds)
    print(report, flush=True)
    left = report.unexplained()
    for kind in sorted(report.kinds.values(), key=lambda k: k.name) if arguments.explained else left:
        print(show(kind), flush=True)
    print(f"{len(report.kinds)} kinds, {len(left)} of them not explained")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main(_arguments))
