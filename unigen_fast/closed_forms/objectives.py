"""Closed forms of whole objectives."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unigen_fast.closed_forms._rows import (
    Forward,
    Gradients,
    Outs,
    Slopes,
    Tensors,
    finite,
    gradient_of_rows,
    gradients_of,
    reduced,
    rows_of,
)
from unigen_fast.closed_forms.divergence import (
    PLAIN,
    kl_slopes,
    kl_terms,
    monte_carlo_slopes,
    monte_carlo_terms,
)
from unigen_fast.closed_forms.likelihood import LIKELIHOODS, refused


def _unit_gaussian_terms(x: Tensor, mean: Tensor) -> Tensor:
    return (x - mean).square_().add_(math.log(2 * math.pi)).mul_(-0.5)


def _unit_gaussian_slopes(grad: Tensor, needed: Sequence[bool], x: Tensor, mean: Tensor, *, out: Outs) -> Slopes:
    return [None, torch.mul(x - mean, grad, out=out[1])]


class _Likelihood:
    """log p(x | decoder): its formula, and its tensors in the order that this takes."""

    def __init__(self, name: str, bins: Sequence[float], x: Tensor, parameters: Sequence[Tensor | None]) -> None:
        present = [p for p in parameters if p is not None]
        terms: Callable[..., Tensor]
        slopes: Callable[..., Slopes]
        terms, slopes = LIKELIHOODS[name]
        options: dict[str, Any] = {}
        if name == "gaussian" and len(present) == 1:
            terms, slopes = _unit_gaussian_terms, _unit_gaussian_slopes
        elif name == "discretized_logistic":
            options = dict(zip(("half_bin", "low", "high"), bins, strict=True))
        self.terms = partial(terms, **options) if options else terms
        self.slopes = partial(slopes, **options) if options else slopes
        self.parameters = parameters
        shape = present[0].shape
        self.place = 1 if name == "bernoulli" else 0  # that of x
        self.tensors = [p if p.dim() == len(shape) else p.expand(shape) for p in present]
        self.tensors.insert(self.place, x if self.place else x.expand(shape))

    def gradients(self, grad: Tensor, needed: Sequence[bool], event_ndims: int) -> list[Tensor | None]:
        """Of the parameters. One that is the same for all rows has theirs summed."""
        wanted = [n for n, p in zip(needed, self.parameters, strict=True) if p is not None]
        wanted.insert(self.place, False)
        found = gradients_of(self.slopes, grad, wanted, self.tensors, event_ndims)
        found.pop(self.place)
        result: list[Tensor | None] = []
        for p in self.parameters:
            g = found.pop(0) if p is not None else None
            result.append(g if g is None or p is None or g.shape == p.shape else g.sum_to_size(p.shape))
        return result


def elbo_loss(
    decoder: Tensor, decoder_2: Tensor | None, decoder_3: Tensor | None, x: Tensor, mean: Tensor, logvar: Tensor,
    prior_mean: Tensor | None, prior_logvar: Tensor | None, weights: Tensor | None, event_ndims: int, likelihood: str,
    bins: Sequence[float], kl_weight: float, scale: float, reduction: str, gradients: int,
) -> Forward:  # fmt: skip
    if "negative_binomial" in likelihood and refused(decoder):
        return None
    of_x = _Likelihood(likelihood, bins, x, (decoder, decoder_2, decoder_3))
    log_p = rows_of(of_x.terms, of_x.tensors, event_ndims)
    kl = rows_of(_kl_terms, (mean, logvar, prior_mean, prior_logvar), mean.dim() - log_p.dim()).mul_(0.5)
    rows = (kl if kl_weight == 1 else kl * kl_weight) - log_p
    return ((reduced(rows, weights, scale, reduction), log_p, kl), ()) if finite(rows) else None


_kl_terms, _kl_slopes = partial(kl_terms, PLAIN), partial(kl_slopes, PLAIN)


def _total(of_loss: Tensor | None, own: Tensor | None, factor: float) -> Tensor:
    """The gradient of rows of which the loss has a factor, and which are an output themselves."""
    if of_loss is None or own is None:
        return own if of_loss is None else of_loss * factor  # type: ignore[return-value]
    return torch.add(own, of_loss, alpha=factor)


def elbo_loss_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], decoder: Tensor, decoder_2: Tensor | None,
    decoder_3: Tensor | None, x: Tensor, mean: Tensor, logvar: Tensor, prior_mean: Tensor | None,
    prior_logvar: Tensor | None, weights: Tensor | None, event_ndims: int, likelihood: str, bins: Sequence[float],
    kl_weight: float, scale: float, reduction: str, gradients: int,
) -> Gradients:  # fmt: skip
    row_ndims = x.dim() - event_ndims
    of_loss, of_log_p, of_kl = grads
    if of_loss is not None:
        of_loss = gradient_of_rows(of_loss, math.prod(x.shape[:row_ndims]), weights, scale, reduction)
    found: list[Tensor | None] = [None] * 9
    if any(needed[:3]) and (of_loss is not None or of_log_p is not None):
        of_x = _Likelihood(likelihood, bins, x, (decoder, decoder_2, decoder_3))
        found[:3] = of_x.gradients(_total(of_loss, of_log_p, -1.0), needed[:3], event_ndims)
    if any(needed[4:8]) and (of_loss is not None or of_kl is not None):
        tensors = (mean, logvar, prior_mean, prior_logvar)
        grad = _total(of_loss, of_kl, kl_weight)
        found[4:8] = gradients_of(_kl_slopes, grad, needed[4:8], tensors, mean.dim() - row_ndims)
    return found


# ---- several samples -------------------------------------------------------------------------------------------------


def _center(mean: float) -> float:
    """About the mean, in 8 bits: what is subtracted of each term leaves no rounding behind."""
    if not math.isfinite(mean):
        return 0.0
    fraction, exponent = math.frexp(mean)
    return math.ldexp(round(fraction * 256), exponent - 8)


def _centered_rows(of_x: _Likelihood, event_ndims: int) -> tuple[Tensor, float]:
    """Rows of the terms less a number, and that number."""
    center: float | None = None

    def terms(*tensors: Tensor) -> Tensor:
        nonlocal center
        found = of_x.terms(*tensors)
        if center is None:
            center = _center(found.sum().item() / max(found.numel(), 1))
        return found.sub_(center)

    rows = rows_of(terms, of_x.tensors, event_ndims)
    return rows, center or 0.0


_sample_terms, _sample_slopes = partial(monte_carlo_terms, PLAIN), partial(monte_carlo_slopes, PLAIN)


def _beside(dim: int, z: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """z, and what each example has, for each of its samples."""
    return [z, *(None if t is None else t.unsqueeze(dim) for t in tensors)]


def multi_sample_bound(
    decoder: Tensor, decoder_2: Tensor | None, decoder_3: Tensor | None, x: Tensor, z: Tensor, mean: Tensor,
    logvar: Tensor, prior_mean: Tensor | None, prior_logvar: Tensor | None, dim: int, event_ndims: int, likelihood: str,
    bins: Sequence[float], groups: int, power: float, elbo_weight: float, scale: float, reduction: str, gradients: int,
) -> Forward:  # fmt: skip
    """Kept: each sample's share of its example's bound.

    Log-weights are taken relative to a number of the size of all: what is rounded has the size of their differences.
    """
    if "negative_binomial" in likelihood and refused(decoder):
        return None
    if not (power == 0 or 0.2 < abs(power) < math.inf):
        return None
    of_x = _Likelihood(likelihood, bins, x.unsqueeze(dim), (decoder, decoder_2, decoder_3))
    relative, center = _centered_rows(of_x, event_ndims)
    tensors = _beside(dim, z, mean, logvar, prior_mean, prior_logvar)
    relative.sub_(rows_of(_sample_terms, tensors, z.dim() - relative.dim()), alpha=0.5)
    if not finite(relative):
        return None
    offset = center * math.prod(decoder.shape[decoder.dim() - event_ndims :])
    size, at, grouped = relative.size(dim) // groups, dim, relative
    if groups > 1:
        at, grouped = dim + 1, relative.unflatten(dim, (groups, size))
    exponents = grouped if power == 1 else grouped * power
    shares = torch.softmax(exponents, at)
    ess = shares.square().sum(at).reciprocal_()
    if power == 0:
        bound = grouped.sum(at).mul_(1 / size).add_(offset)
    else:
        bound = torch.logsumexp(exponents, at)
        if power != 1:
            bound.mul_(1 / power)
        if elbo_weight:
            bound.mul_(1 - elbo_weight).add_(grouped.sum(at), alpha=elbo_weight / size)
            shares.mul_(1 - elbo_weight).add_(elbo_weight / size)
            offset_of_mean = (1 - elbo_weight) * math.log(size) / power
        else:
            offset_of_mean = math.log(size) / power
        bound.add_(offset - offset_of_mean)
    if groups > 1:
        bound, ess, shares = bound.mean(dim), ess.mean(dim), shares.mul_(1 / groups).flatten(dim, at)
    return (reduced(bound, None, scale, reduction), relative.add_(offset), bound, ess), (shares,)


def multi_sample_bound_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], decoder: Tensor, decoder_2: Tensor | None,
    decoder_3: Tensor | None, x: Tensor, z: Tensor, mean: Tensor, logvar: Tensor, prior_mean: Tensor | None,
    prior_logvar: Tensor | None, dim: int, event_ndims: int, likelihood: str, bins: Sequence[float], groups: int,
    power: float, elbo_weight: float, scale: float, reduction: str, gradients: int,
) -> Gradients:  # fmt: skip
    shares = kept[0]
    of_loss, grad = grads
    if of_loss is not None:
        of_bound = gradient_of_rows(of_loss, shares.numel() // shares.size(dim), None, scale, reduction)
        of_bound = shares * (of_bound.unsqueeze(dim) if of_bound.dim() else of_bound)
        grad = of_bound if grad is None else of_bound.add_(grad)
    found: list[Tensor | None] = [None] * 9
    if any(needed[:3]):
        of_x = _Likelihood(likelihood, bins, x.unsqueeze(dim), (decoder, decoder_2, decoder_3))
        found[:3] = of_x.gradients(grad, needed[:3], event_ndims)
    if any(needed[4:]):
        tensors = _beside(dim, z, mean, logvar, prior_mean, prior_logvar)
        found[4:] = gradients_of(_sample_slopes, -grad, needed[4:], tensors, z.dim() - grad.dim())
        for i in range(5, 9):
            of_example = found[i]
            if of_example is not None:
                found[i] = of_example.squeeze(dim)
    return found
