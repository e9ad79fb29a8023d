"""Losses of discriminator logits in plain PyTorch.

Every loss here is a sum over tensors of logits, each of them averaged (or summed) after one elementwise function, its
term. The terms are numbered by their place in `TERMS`; the kernels use the same numbers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unigen_fast._private import known_true
from unigen_fast.reference._common import reduce_rows, silenced, softplus, upcast
from unigen_fast.reference.importance import row_statistics


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1; autograd's own derivative of `expm1` is the value + 1, which loses all digits far below 0."""
    return torch.where(x > -0.5, torch.expm1(x), torch.exp(x.clamp(max=0)) - 1)


class Term(NamedTuple):
    """A function of the logit times a factor, and the side of `boundary` that the logits are meant to be on: what
    accuracy counts.

    `slope(logits, g)` is the function's derivative times `slope_factor` times g, one number; it may be expanded. At its
    kink a hinge has slope 0, and at a NaN that of its line.
    """

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    positive: bool
    boundary: float = 0.0
    factor: float = 1.0
    slope_factor: float = 1.0


def _of_line(x: Tensor, g: Tensor) -> Tensor:
    return g.expand_as(x)


def _of_logistic(x: Tensor, g: Tensor) -> Tensor:
    return x.sigmoid().mul_(g)


def _of_minus_logistic(x: Tensor, g: Tensor) -> Tensor:
    return torch.neg(x).sigmoid_().mul_(g)


def _of_exp(x: Tensor, g: Tensor) -> Tensor:
    return x.exp().mul_(g)


def _softplus_less_log2(x: Tensor) -> Tensor:
    """log((1 + e^x) / 2), whose difference cancels near 0."""
    near = torch.log1p(0.5 * torch.expm1(x.clamp(-1, 1)))
    return torch.where(x.abs() < 1, near, softplus(x) - math.log(2))


TERMS: dict[str, Term] = {
    "logistic_real": Term(logsigmoid, _of_minus_logistic, True, factor=-1.0, slope_factor=-1.0),  # -log D
    "logistic_fake": Term(softplus, _of_logistic, False),  # -log (1 - D)
    "saturating": Term(softplus, _of_logistic, True, factor=-1.0, slope_factor=-1.0),  # log (1 - D)
    "hinge_real": Term(lambda x: (1 - x).relu_(), lambda x, g: silenced(g, 1 - x), True, slope_factor=-1.0),
    "hinge_fake": Term(lambda x: (1 + x).relu_(), lambda x, g: silenced(g, 1 + x), False),
    "linear": Term(torch.clone, _of_line, True, factor=-1.0, slope_factor=-1.0),
    "identity": Term(torch.clone, _of_line, False),
    "least_squares_real": Term(lambda x: (x - 1).square(), lambda x, g: (x - 1).mul_(g), True, 0.5, factor=0.5),
    "least_squares_fake": Term(torch.square, torch.mul, False, 0.5, factor=0.5),
    "least_squares_minus": Term(  # target -1
        lambda x: (x + 1).square(), lambda x, g: (x + 1).mul_(g), False, factor=0.5
    ),
    # f-GAN: -T of the real logits, f*(T) of the fake ones
    "kl_real": Term(torch.clone, _of_line, True, 1.0, factor=-1.0, slope_factor=-1.0),
    "kl_fake": Term(lambda x: (x - 1).exp_(), lambda x, g: (x - 1).exp_().mul_(g), False, 1.0),
    "reverse_kl_real": Term(torch.exp, _of_exp, False),
    "reverse_kl_fake": Term(lambda x: -1 - x, _of_line, True, slope_factor=-1.0),
    "pearson_fake": Term(lambda x: x * (0.25 * x + 1), lambda x, g: (0.5 * x + 1).mul_(g), False),
    "expm1_real": Term(_expm1, _of_exp, False),  # Neyman's and Hellinger's
    "neyman_fake": Term(
        lambda x: _expm1(0.5 * x), lambda x, g: (0.5 * x).exp_().mul_(g), True, factor=-2.0, slope_factor=-1.0
    ),
    "hellinger_fake": Term(lambda x: _expm1(-x), lambda x, g: torch.neg(x).exp_().mul_(g), True, slope_factor=-1.0),
    "js_real": Term(lambda x: _softplus_less_log2(-x), _of_minus_logistic, True, slope_factor=-1.0),
    "js_fake": Term(_softplus_less_log2, _of_logistic, False),
}
TERM_NUMBER = {name: number for number, name in enumerate(TERMS)}
# those without an exponential or a logarithm
ARITHMETIC = frozenset(
    TERM_NUMBER[name]
    for name in (
        "hinge_real", "hinge_fake", "linear", "identity", "least_squares_real", "least_squares_fake",
        "least_squares_minus", "kl_real", "reverse_kl_fake", "pearson_fake",
    )
)  # fmt: skip
_TERM = tuple(TERMS.values())


def logit_term(logits: Tensor, term: int, scale: float) -> Tensor:
    scale = scale * _TERM[term].factor
    values = _TERM[term].function(upcast(logits))
    return values if not isinstance(scale, Tensor) and known_true(scale == 1.0) else values * scale


def term_of(i: int, reals: int, real_term: int, fake_term: int) -> Term:
    """Of the i-th tensor: the first `reals` are real."""
    return _TERM[real_term if i < reals else fake_term]


def logit_loss(
    logits: Sequence[Tensor],
    reals: int,
    real_term: int,
    fake_term: int,
    reduction: str,
    scale: float,
    return_stats: bool,
) -> tuple[Tensor, Tensor]:
    """The first `reals` tensors have `real_term`, the others `fake_term`.

    Returns (scale · sum over the tensors of their reduced terms, statistics `[n, 4]`, or `[0, 4]` if not wanted).
    Statistics of a tensor: mean of its term, share of logits on the right side of 0, mean logit, mean probability.
    """
    items = [upcast(item) for item in logits]
    total = sum_of_terms(items, reals, real_term, fake_term, reduction, scale)
    if not return_stats:
        return total, total.new_empty((0, 4))
    statistics = []
    for i, item in enumerate(items):
        term = term_of(i, reals, real_term, fake_term)
        statistics.append(_statistics(term.function(item), item, item, term))
    return total, torch.stack(statistics)


def sum_of_terms(
    items: Iterable[Tensor], reals: int, real_term: int, fake_term: int, reduction: str, scale: float
) -> Tensor:
    """scale · sum over the tensors of their reduced terms. One `sum` costs a small tensor a quarter of a `mean`."""
    total = None
    for i, item in enumerate(items):
        term = _TERM[real_term if i < reals else fake_term]
        values = term.function(item)
        if reduction != "none":
            values = values.sum()
        factor = term.factor * scale
        if reduction == "mean":  # that of nothing is NaN
            factor = factor / item.numel() if item.numel() else math.nan
        if total is None:
            total = values if known_true(factor == 1.0) else values * factor
        else:
            total = torch.add(total, values, alpha=factor)
    assert total is not None
    return total


@torch.no_grad()
def _statistics(values: Tensor, judged: Tensor, logits: Tensor, term: Term) -> Tensor:
    """Mean term, share of `judged` on the right side, mean logit, mean probability of `judged`."""
    right = (judged > term.boundary if term.positive else judged < term.boundary).to(judged.dtype)
    return torch.stack([values.mean() * term.factor, right.mean(), logits.mean(), judged.sigmoid().mean()])


def coupled_logit_loss(
    logits: Sequence[Tensor],
    reals: int,
    coupling: str,
    real_term: int,
    fake_term: int,
    reduction: str,
    scale: float,
    return_stats: bool,
) -> tuple[Tensor, Tensor]:
    """`logit_loss` of logits that depend on all of their tensor, or of another one.

    "averages": real and fake tensors in pairs; the logits of each less the mean of the other's. Gradients flow through
    the means. "ratios": fake logits times their density ratio r = exp(l) / mean of exp(l), a constant.

    Returns (loss, statistics `[n, 6]`): those of `logit_loss` (0 but for the mean term if not wanted; side and
    probability are those of the coupled logits with "averages"), then what backward needs: the tensor's mean logit and
    mean slope, or (of fake ones) its maximum m and 1 / mean of exp(l - m).
    """
    items = [upcast(item) for item in logits]
    total = items[0].new_zeros(())
    statistics = []
    for i, item in enumerate(items):
        real = i < reals
        term = term_of(i, reals, real_term, fake_term)
        coupled, kept = item, item.detach().new_zeros(2)
        if coupling == "averages":
            other = items[i + reals if real else i - reals]
            coupled = item - other.mean()
            slopes = term.slope(coupled.detach(), item.new_full((), term.slope_factor))
            kept = torch.stack([item.detach().mean(), slopes.mean()])
        elif not real:
            coupled, kept = ratio_weighted(item)
        values = term.function(coupled)
        total = total + reduce_rows(values, reduction, term.factor)
        judged = coupled if coupling == "averages" else item
        shown = _statistics(values, judged, item, term._replace(boundary=0.0))
        if not return_stats:
            shown = torch.cat([shown[:1], shown.new_zeros(3)])
        statistics.append(torch.cat([shown, kept]))
    return total * scale, torch.stack(statistics).detach()


def ratio_weighted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(r·l, [m, 1 / mean of exp(l - m)]), m the maximum; r is a constant of mean 1, or 0 where all is `-inf`.

    Where r is 0, it silences an infinite logit.
    """
    flat = logits.detach().reshape(-1)
    if flat.numel() == 0:
        return logits, flat.new_zeros(2)
    maximum, total = row_statistics(flat, 0)
    empty = total == 0
    inverse = torch.where(empty, 0.0, flat.numel() / torch.where(empty, 1.0, total))
    ratio = ((flat - maximum).exp_() * inverse).reshape(logits.shape)
    return ratio * silenced(logits, ratio), torch.cat([maximum, inverse])
