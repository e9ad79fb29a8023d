"""Losses of discriminator logits in plain PyTorch.

Every loss here is a sum over tensors of logits, each of them averaged (or summed) after one elementwise function, its
term. The terms are numbered by their place in `TERMS`; the kernels use the same numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unigen_fast.reference._common import reduce_rows, softplus, upcast
from unigen_fast.reference.importance import row_statistics


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1; autograd's own derivative of `expm1` is the value + 1, which loses all digits far below 0."""
    return torch.where(x > -0.5, torch.expm1(x), torch.exp(x.clamp(max=0)) - 1)


class Term(NamedTuple):
    """A function of the logit, and the side of `boundary` that the logits are meant to be on: what accuracy counts."""

    function: Callable[[Tensor], Tensor]
    positive: bool
    boundary: float = 0.0


_LOG2 = math.log(2)
TERMS: dict[str, Term] = {
    "logistic_real": Term(lambda logits: softplus(-logits), True),  # -log D
    "logistic_fake": Term(lambda logits: softplus(logits), False),  # -log (1 - D)
    "saturating": Term(lambda logits: -softplus(logits), True),  # log (1 - D)
    "hinge_real": Term(lambda logits: (1 - logits).relu(), True),
    "hinge_fake": Term(lambda logits: (1 + logits).relu(), False),
    "linear": Term(lambda logits: -logits, True),
    "identity": Term(lambda logits: logits, False),
    "least_squares_real": Term(lambda logits: 0.5 * (logits - 1).square(), True, 0.5),
    "least_squares_fake": Term(lambda logits: 0.5 * logits.square(), False, 0.5),
    "least_squares_minus": Term(lambda logits: 0.5 * (logits + 1).square(), False),  # of a relativistic fake: target -1
    # f-GAN: -T of the real logits, f*(T) of the fake ones
    "kl_real": Term(lambda logits: -logits, True, 1.0),
    "kl_fake": Term(lambda logits: (logits - 1).exp(), False, 1.0),
    "reverse_kl_real": Term(lambda logits: logits.exp(), False),
    "reverse_kl_fake": Term(lambda logits: -1 - logits, True),
    "pearson_fake": Term(lambda logits: logits * (0.25 * logits + 1), False),
    "expm1_real": Term(_expm1, False),  # Neyman's and Hellinger's
    "neyman_fake": Term(lambda logits: -2 * _expm1(0.5 * logits), True),
    "hellinger_fake": Term(lambda logits: _expm1(-logits), True),
    "js_real": Term(lambda logits: softplus(-logits) - _LOG2, True),
    "js_fake": Term(lambda logits: softplus(logits) - _LOG2, False),
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
# derivatives, for those terms whose mean slope is a statistic
_SLOPES: dict[int, Callable[[Tensor], Tensor]] = {
    TERM_NUMBER["logistic_real"]: lambda logits: -torch.sigmoid(-logits),
    TERM_NUMBER["logistic_fake"]: torch.sigmoid,
    TERM_NUMBER["hinge_real"]: lambda logits: torch.where(1 - logits <= 0, 0.0, -1.0).to(logits.dtype),
    TERM_NUMBER["hinge_fake"]: lambda logits: torch.where(1 + logits <= 0, 0.0, 1.0).to(logits.dtype),
    TERM_NUMBER["least_squares_real"]: lambda logits: logits - 1,
    TERM_NUMBER["least_squares_minus"]: lambda logits: logits + 1,
}


def logit_term(logits: Tensor, term: int, scale: float) -> Tensor:
    return _TERM[term].function(upcast(logits)) * scale


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
    total = upcast(logits[0]).new_zeros(())
    statistics = []
    for i, item in enumerate(logits):
        item = upcast(item)
        term = _TERM[real_term if i < reals else fake_term]
        values = term.function(item)
        total = total + reduce_rows(values, reduction)
        if return_stats:
            statistics.append(_statistics(values, item, item, term))
    return total * scale, torch.stack(statistics) if return_stats else total.new_empty((0, 4))


@torch.no_grad()
def _statistics(values: Tensor, judged: Tensor, logits: Tensor, term: Term) -> Tensor:
    """Mean term, share of `judged` on the right side, mean logit, mean probability of `judged`."""
    right = (judged > term.boundary if term.positive else judged < term.boundary).to(judged.dtype)
    return torch.stack([values.mean(), right.mean(), logits.mean(), judged.sigmoid().mean()])


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
        term = _TERM[real_term if real else fake_term]
        coupled, kept = item, item.detach().new_zeros(2)
        if coupling == "averages":
            other = items[i + reals if real else i - reals]
            coupled = item - other.mean()
            slopes = _SLOPES[real_term if real else fake_term](coupled.detach())
            kept = torch.stack([item.detach().mean(), slopes.mean()])
        elif not real:
            coupled, kept = ratio_weighted(item)
        values = term.function(coupled)
        total = total + reduce_rows(values, reduction)
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
    ratio = ((flat - maximum).exp() * inverse).reshape(logits.shape)
    return ratio * torch.where(ratio == 0, torch.zeros_like(logits), logits), torch.cat([maximum, inverse])
