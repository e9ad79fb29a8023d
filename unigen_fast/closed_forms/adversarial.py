"""Closed forms of losses of logits."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from unigen_fast.closed_forms._rows import Forward, Gradients, Tensors, finite
from unigen_fast.closed_forms.importance import density_ratios
from unigen_fast.reference import adversarial
from unigen_fast.reference._common import lowered, upcast


def _share(logits: Tensor, reduction: str) -> float:
    """What a logit counts in its tensor's mean, or sum. The mean of nothing is NaN."""
    return (1 / logits.numel() if logits.numel() else math.nan) if reduction == "mean" else 1.0


def logit_term(logits: Tensor, term: int, scale: float) -> Forward:
    return adversarial.logit_term(logits, term, scale), ()


def logit_term_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], logits: Tensor, term: int, scale: float
) -> Gradients:
    of_term, one = adversarial.term_of(0, 0, term, term), grads[0].new_full((), scale)
    return [lowered(of_term.slope(upcast(logits), one.mul_(of_term.slope_factor)) * grads[0], logits)]


def _slopes(
    grad: Tensor, needed: Sequence[bool], items: Iterable[Tensor], reals: int, real_term: int, fake_term: int,
    reduction: str, scale: float,
) -> list[Tensor | None]:  # fmt: skip
    found: list[Tensor | None] = []
    of_factor: dict[float, Tensor] = {}  # lists of logits have few sizes
    for i, x in enumerate(items):
        term = adversarial.term_of(i, reals, real_term, fake_term)
        factor = scale * term.slope_factor * _share(x, reduction)
        if factor not in of_factor:
            of_factor[factor] = grad * factor
        found.append(term.slope(x, of_factor[factor]) if needed[i] else None)
    return found


def logit_loss(
    logits: Sequence[Tensor], reals: int, real_term: int, fake_term: int, reduction: str, scale: float,
    return_stats: bool,
) -> Forward:  # fmt: skip
    if return_stats:
        return None
    items = [upcast(item) for item in logits]
    return adversarial.sum_of_terms(items, reals, real_term, fake_term, reduction, scale), ()


def logit_loss_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], logits: Sequence[Tensor], reals: int, real_term: int,
    fake_term: int, reduction: str, scale: float, return_stats: bool,
) -> Gradients:  # fmt: skip
    items = [upcast(item) for item in logits]
    found = _slopes(grads[0], needed, items, reals, real_term, fake_term, reduction, scale)
    return [None if s is None else lowered(s, item) for s, item in zip(found, logits, strict=True)]


def linked(items: list[Tensor], reals: int, coupling: str) -> list[Tensor]:
    """For each tensor what its logits are coupled with: the mean of the other side ("averages"), or the density ratios
    of fake ones ("ratios")."""
    if coupling == "averages":
        means = [item.sum() / item.numel() for item in items]
        return means[reals:] + means[:reals]
    return [density_ratios(item.detach()) for item in items[reals:]]


def coupled(items: list[Tensor], reals: int, coupling: str, links: Sequence[Tensor]) -> Iterator[Tensor]:
    """What the terms see."""
    if coupling == "averages":
        return (item - mean for item, mean in zip(items, links, strict=True))
    return (x if i < reals else x * links[i - reals] for i, x in enumerate(items))


def coupled_logit_loss(
    logits: Sequence[Tensor], reals: int, coupling: str, real_term: int, fake_term: int, reduction: str, scale: float,
    return_stats: bool,
) -> Forward:  # fmt: skip
    if return_stats or not all(item.numel() for item in logits):
        return None
    items = [upcast(item) for item in logits]
    links = linked(items, reals, coupling)
    seen = coupled(items, reals, coupling, links)
    loss = adversarial.sum_of_terms(seen, reals, real_term, fake_term, reduction, scale)
    return (loss, links) if finite(loss) else None


def coupled_logit_loss_recorded(
    logits: Sequence[Tensor], reals: int, coupling: str, real_term: int, fake_term: int, reduction: str, scale: float,
    return_stats: bool,
) -> Tensor | None:  # fmt: skip
    if not all(item.numel() <= 2**14 for item in logits):
        return None
    made = coupled_logit_loss(logits, reals, coupling, real_term, fake_term, reduction, scale, return_stats)
    return None if made is None else made[0]


def coupled_logit_loss_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], logits: Sequence[Tensor], reals: int, coupling: str,
    real_term: int, fake_term: int, reduction: str, scale: float, return_stats: bool,
) -> Gradients:  # fmt: skip
    seen = coupled([upcast(item) for item in logits], reals, coupling, kept)
    every = (True,) * len(logits)
    slopes: list[Any] = _slopes(grads[0], every, seen, reals, real_term, fake_term, reduction, scale)
    for i, slope in enumerate(slopes):
        if not slope.is_contiguous():  # one number
            slopes[i] = slope.contiguous()
    if coupling == "averages":  # each tensor's mean is in what the term sees of the other's logits
        means = [s.sum().div_(s.numel()) for s in slopes]
        for slope, mean in zip(slopes, means[reals:] + means[:reals], strict=True):
            slope.sub_(mean)
    else:
        for slope, ratio in zip(slopes[reals:], kept, strict=True):
            slope.mul_(ratio)
    return [lowered(s, item) if n else None for s, item, n in zip(slopes, logits, needed, strict=True)]
