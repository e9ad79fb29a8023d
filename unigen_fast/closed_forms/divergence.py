"""Closed forms of divergences between Gaussians and Bernoullis, and of samples."""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from unigen_fast.closed_forms._rows import (
    Forward,
    Gradients,
    Outs,
    Slopes,
    Tensors,
    filled,
    finite,
    gradient_of_rows,
    gradients_of,
    reduced,
    rows_of,
)
from unigen_fast.reference._common import accumulate_dtype, lowered, upcast

# Differences that cancel near 0 are a series there, at x = c, which stays at its last value beyond; to that comes what
# the difference has above the value. Both take a few passes; choosing between two numbers takes PyTorch longer.
# (high, low, value, terms): the difference has the value at both bounds, between which it is a series of so many terms.
_EXP = {
    torch.float64: (1 / 8, -0.13043426886198349, 0.0081484530668263168, 10),
    torch.float32: (1 / 32, -0.031578945545983899, 0.00049340749910267094, 4),
}


def exp_minus_1_minus(x: Tensor) -> Tensor:
    """e^x - 1 - x >= 0, to a relative 1e-14 in float64 and 4e-6 in float32."""
    high, low, value, terms = _EXP[x.dtype]
    above = softshrink(torch.expm1(x).sub_(x), value)
    c = x.clamp(low, high)
    series = torch.addcmul(c, c, c, value=1 / terms)
    for n in range(terms - 1, 2, -1):
        torch.addcmul(c, c, series, value=1 / n, out=series)
    return above.addcmul_(c, series, value=0.5)


# ---- spreads ---------------------------------------------------------------------------------------------------------


class _Spread:
    """How a network's output gives the log-variance: times a factor, then clamped."""

    def __init__(self, spread: str, clamp_min: float, clamp_max: float) -> None:
        self.factor = 2.0 if spread == "logstd" else 1.0
        self.clamps = clamp_min != -math.inf or clamp_max != math.inf
        self.low, self.high = clamp_min, clamp_max

    def logvar(self, x: Tensor) -> Tensor:
        if self.factor != 1:
            x = x * self.factor
        return x.clamp(self.low, self.high) if self.clamps else x

    def half_rate(self, x: Tensor) -> Tensor:
        """e^{-v / 2}"""
        if self.clamps:
            return _half_rate(self.logvar(x))
        return x.neg().exp_() if self.factor == 2 else _half_rate(x)

    def pull_back(self, slope: Tensor, x: Tensor) -> Tensor:
        """The gradient of the output from that of the log-variance, with the factor in it. It passes at a bound."""
        if not self.clamps:
            return slope
        below, above = _around(self.low, self.high, self.factor, x.dtype)
        return torch.ops.aten.hardtanh_backward(slope.expand(x.shape), x, below, above)


_spread = functools.lru_cache(_Spread)


@functools.cache
def _around(low: float, high: float, factor: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers next to the bounds, outside."""
    bounds = torch.tensor([low, high], dtype=dtype) / factor
    low, high = torch.nextafter(bounds, torch.tensor([-math.inf, math.inf], dtype=dtype)).tolist()
    return low, high


PLAIN = _spread("logvar", -math.inf, math.inf)


def _half_rate(logvar: Tensor) -> Tensor:
    """e^{-v / 2}"""
    return (logvar * -0.5).exp_()


# ---- KL of Gaussians -------------------------------------------------------------------------------------------------


def kl_terms(
    spread: _Spread, mean: Tensor, logvar: Tensor, prior_mean: Tensor | None, prior_logvar: Tensor | None
) -> Tensor:
    """Twice the KL of each dimension."""
    logvar = spread.logvar(logvar)
    difference = mean if prior_mean is None else mean - prior_mean
    if prior_logvar is not None:
        difference = spread.half_rate(prior_logvar).mul_(difference)
        logvar = logvar - spread.logvar(prior_logvar)
    return exp_minus_1_minus(logvar).addcmul_(difference, difference)


def kl_slopes(
    spread: _Spread,
    grad: Tensor,
    needed: Sequence[bool],
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    out: Outs,
) -> Slopes:
    """The derivatives of half the terms, times grad."""
    difference = mean if prior_mean is None else mean - prior_mean
    exponent, rated = spread.logvar(logvar), difference
    if prior_logvar is not None:
        rate = spread.half_rate(prior_logvar)
        rated = difference * rate
        difference = rate.mul_(rated)
        exponent = exponent - spread.logvar(prior_logvar)
    found: Slopes = [None] * 4
    if needed[0] or needed[2]:
        of_mean = torch.mul(difference, grad, out=out[0])
        found[0], found[2] = of_mean, torch.neg(of_mean, out=out[2]) if needed[2] else None
    if needed[1] or needed[3]:
        half = grad * (0.5 * spread.factor)
        if exponent is logvar:
            of_logvar = torch.mul(torch.expm1(exponent), half, out=out[1])
        else:
            of_logvar = exponent.expm1_().mul_(half)
        if needed[3] and prior_logvar is not None:
            found[3] = spread.pull_back(torch.addcmul(of_logvar, rated.square_(), half).neg_(), prior_logvar)
        found[1] = spread.pull_back(of_logvar, logvar)
    return found


def gaussian_kl(
    mean: Tensor, logvar: Tensor, prior_mean: Tensor | None, prior_logvar: Tensor | None, weights: Tensor | None,
    event_ndims: int, spread: str, free_bits: float, free_bits_mode: str, clamp_min: float, clamp_max: float,
    scale: float, reduction: str,
) -> Forward:  # fmt: skip
    if spread == "std" or free_bits > 0:
        return None
    terms = partial(kl_terms, _spread(spread, clamp_min, clamp_max))
    return _sum(terms, (mean, logvar, prior_mean, prior_logvar), event_ndims, weights, 0.5 * scale, reduction)


def gaussian_kl_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], mean: Tensor, logvar: Tensor, prior_mean: Tensor | None,
    prior_logvar: Tensor | None, weights: Tensor | None, event_ndims: int, spread: str, free_bits: float,
    free_bits_mode: str, clamp_min: float, clamp_max: float, scale: float, reduction: str,
) -> Gradients:  # fmt: skip
    slopes = partial(kl_slopes, _spread(spread, clamp_min, clamp_max))
    grad = gradient_of_rows(grads[0], _rows(mean, event_ndims), weights, scale, reduction)
    tensors = (mean, logvar, prior_mean, prior_logvar)
    return [*gradients_of(slopes, grad, needed[:4], tensors, event_ndims), None]


def _rows(x: Tensor, event_ndims: int) -> int:
    return math.prod(x.shape[: x.dim() - event_ndims])


def _sum(
    terms: Callable[..., Tensor],
    tensors: Tensors,
    event_ndims: int,
    weights: Tensor | None,
    scale: float,
    reduction: str,
) -> Forward:
    """The terms summed over the event, weighted and reduced; at once, where no row counts for itself."""
    if weights is None and reduction != "none":
        if reduction == "mean":
            count = _rows(tensors[0], event_ndims)
            scale = scale / count if count else math.nan
        event_ndims, reduction = tensors[0].dim(), "sum"
    rows = rows_of(terms, tensors, event_ndims)
    return (reduced(rows, weights, scale, reduction), ()) if finite(rows) else None


# ---- KL by a sample --------------------------------------------------------------------------------------------------


def monte_carlo_terms(
    spread: _Spread,
    z: Tensor,
    mean: Tensor | None,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
) -> Tensor:
    """Twice log q(z) - log p(z) of each dimension; without a mean of q, less what is the same for all: + 1."""
    of_prior = z if prior_mean is None else z - prior_mean
    if prior_logvar is not None:
        of_prior = of_prior * spread.half_rate(prior_logvar)
    terms = of_prior.square()
    if mean is not None:
        own = (z - mean).mul_(spread.half_rate(logvar))
        terms.addcmul_(own, own, value=-1)
    if prior_logvar is None:
        return terms.sub_(spread.logvar(logvar))
    if spread.clamps:
        return terms.add_(spread.logvar(prior_logvar) - spread.logvar(logvar))
    return terms.add_(prior_logvar - logvar, alpha=spread.factor)


def monte_carlo_slopes(
    spread: _Spread,
    grad: Tensor,
    needed: Sequence[bool],
    z: Tensor,
    mean: Tensor | None,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    *,
    out: Outs,
) -> Slopes:
    """The derivatives of half the terms, times grad; that of a log-variance without a mean is the same everywhere."""
    found: Slopes = [None] * 5
    half = grad * (0.5 * spread.factor)
    if needed[0] or needed[3] or needed[4]:
        slope = of_prior = z if prior_mean is None else z - prior_mean
        if prior_logvar is not None:
            rate = spread.half_rate(prior_logvar)
            of_prior = of_prior * rate
            slope = of_prior * rate
        of_z = torch.mul(slope, grad, out=None if needed[1] else out[0])
        found[0], found[3] = of_z, torch.neg(of_z, out=out[3]) if needed[3] else None
        if needed[4] and prior_logvar is not None:
            slope = torch.addcmul(half, of_prior.square(), half, value=-1, out=None if spread.clamps else out[4])
            found[4] = spread.pull_back(slope, prior_logvar)
    if mean is None:
        if needed[2]:
            found[2] = spread.pull_back(-half, logvar)
    elif needed[0] or needed[1] or needed[2]:
        rate = spread.half_rate(logvar)
        own = (z - mean).mul_(rate)
        of_mean = torch.mul(own * rate, grad, out=out[1])
        found[1] = of_mean
        if needed[0] and found[0] is not None:
            found[0] = torch.sub(found[0], of_mean, out=out[0])
        if needed[2]:
            slope = torch.addcmul(-half, own.square_(), half, out=None if spread.clamps else out[2])
            found[2] = spread.pull_back(slope, logvar)
    return found


def gaussian_kl_monte_carlo(
    z: Tensor, mean: Tensor | None, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor, weights: Tensor | None,
    event_ndims: int, spread: str, clamp_min: float, clamp_max: float, scale: float, reduction: str,
) -> Forward:  # fmt: skip
    if spread == "std":
        return None
    terms = partial(monte_carlo_terms, _spread(spread, clamp_min, clamp_max))
    rows = rows_of(terms, (z, mean, logvar, prior_mean, prior_logvar), event_ndims)
    if mean is None:
        rows -= math.prod(z.shape[z.dim() - event_ndims :])
    return (reduced(rows, weights, 0.5 * scale, reduction), ()) if finite(rows) else None


def gaussian_kl_monte_carlo_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], z: Tensor, mean: Tensor | None, logvar: Tensor,
    prior_mean: Tensor, prior_logvar: Tensor, weights: Tensor | None, event_ndims: int, spread: str, clamp_min: float,
    clamp_max: float, scale: float, reduction: str,
) -> Gradients:  # fmt: skip
    scales = _spread(spread, clamp_min, clamp_max)
    grad = gradient_of_rows(grads[0], _rows(z, event_ndims), weights, scale, reduction)
    tensors, wanted = (z, mean, logvar, prior_mean, prior_logvar), list(needed[:5])
    constant = mean is None and not scales.clamps
    if constant:
        wanted[2] = False
    found = gradients_of(partial(monte_carlo_slopes, scales), grad, wanted, tensors, event_ndims)
    if constant and needed[2]:
        of_row = (grad * (-0.5 * scales.factor)).to(logvar.dtype)
        found[2] = of_row.reshape((*of_row.shape, *(1,) * event_ndims) if grad.dim() else ()).expand(logvar.shape)
    return [*found, None]


# ---- samples ---------------------------------------------------------------------------------------------------------


def sample_gaussian(
    mean: Tensor, logvar: Tensor, rng_state: Tensor, num_samples: int, sample_dim: int, spread: str, clamp_min: float,
    clamp_max: float,
) -> Forward:  # fmt: skip
    """`rng_state`: the noise."""
    if spread == "std" or not rng_state.is_floating_point():
        return None
    std = _spread(spread, clamp_min, clamp_max).logvar(upcast(logvar)).mul(0.5).exp_()
    center = upcast(mean)
    if num_samples >= 0:
        center, std = center.unsqueeze(sample_dim), std.unsqueeze(sample_dim)
    z = torch.addcmul(center, std, upcast(rng_state))
    return (lowered(z, mean), ()) if finite(z) else None


def sample_gaussian_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], mean: Tensor, logvar: Tensor, rng_state: Tensor,
    num_samples: int, sample_dim: int, spread: str, clamp_min: float, clamp_max: float,
) -> Gradients:  # fmt: skip
    grad = upcast(grads[0])
    of_mean = of_logvar = None
    if needed[1]:
        of_noise = grad * upcast(rng_state)
        if num_samples >= 0:
            of_noise = of_noise.sum(sample_dim)
        scale = _spread(spread, clamp_min, clamp_max)
        slope = scale.logvar(upcast(logvar)).mul(0.5).exp_().mul_(of_noise).mul_(0.5 * scale.factor)
        of_logvar = lowered(scale.pull_back(slope, upcast(logvar)), logvar)
    if needed[0]:
        of_mean = lowered(grad.sum(sample_dim) if num_samples >= 0 else grad, mean)
    return [of_mean, of_logvar, None]


def sample_gaussian_with_kl(
    mean: Tensor, logvar: Tensor, rng_state: Tensor, num_samples: int, sample_dim: int, event_ndims: int, spread: str,
    clamp_min: float, clamp_max: float,
) -> Forward:  # fmt: skip
    if spread == "std" or num_samples >= 0 or not rng_state.is_floating_point() or mean.dtype != rng_state.dtype:
        return None
    scale = _spread(spread, clamp_min, clamp_max)

    def terms(mean: Tensor, logvar: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        logvar = scale.logvar(logvar)
        torch.addcmul(mean, logvar.mul(0.5).exp_(), noise, out=z)
        return kl_terms(PLAIN, mean, logvar, None, None)

    z = torch.empty_like(mean, memory_format=torch.contiguous_format)
    kl = rows_of(terms, (mean, logvar, rng_state, z), event_ndims)
    return ((z, kl.mul_(0.5)), ()) if finite(kl) else None


def sample_gaussian_with_kl_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], mean: Tensor, logvar: Tensor, rng_state: Tensor,
    num_samples: int, sample_dim: int, event_ndims: int, spread: str, clamp_min: float, clamp_max: float,
) -> Gradients:  # fmt: skip
    scale = _spread(spread, clamp_min, clamp_max)

    def slopes(
        grad_kl: Tensor, needed: Sequence[bool], mean: Tensor, given: Tensor, noise: Tensor, of_z: Tensor, *, out: Outs
    ) -> Slopes:
        found: Slopes = [torch.addcmul(of_z, mean, grad_kl, out=out[0]) if needed[0] else None, None, None, None]
        if needed[1]:
            logvar = scale.logvar(given)
            slope = logvar.mul(0.5).exp_().mul_(noise).mul_(of_z)
            slope.addcmul_(torch.expm1(logvar), grad_kl).mul_(0.5 * scale.factor)
            found[1] = scale.pull_back(slope, given)
        return found

    grad_z, grad_kl = filled(grads, mean.shape, mean.shape[: mean.dim() - event_ndims])
    found = gradients_of(slopes, grad_kl, (*needed, False), (mean, logvar, rng_state, grad_z), event_ndims)
    return found[:3]


# ---- KL of Bernoullis ------------------------------------------------------------------------------------------------

_NEAR = 0.125


def _oriented(logits_q: Tensor, logits_p: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With the signs of both logits changed where q's is positive: p = sigma(a) <= 1/2, b - a, the sign, p (1 - p)."""
    sign = logits_q.sign().sub_(0.5).sign_().neg_()
    a = logits_q * sign
    p = a.sigmoid()
    u = a.neg_() if logits_p is None else (logits_p * sign).sub_(a)
    return p, u, sign, torch.addcmul(p, p, p, value=-1)


def bernoulli_terms(logits_q: Tensor, logits_p: Tensor | None) -> Tensor:
    """log(1 + p (e^u - 1)) - p u: log of the mean of e^{u y} under q, less u times q's mean, u = b - a.

    Near u = 0 the series of q's cumulants, m = p (1 - p) times 1, 1 - 2 p, 1 - 6 m and (1 - 2 p) (1 - 12 m).
    """
    p, u, constant, m = _oriented(logits_q, logits_p)
    c = u.clamp(-_NEAR, _NEAR)
    square, skew = c.square(), torch.addcmul(c, c, p, value=-2)
    half, sixth, of_4, of_5 = torch.tensor((1 / 2, 1 / 6, 1 / 24, 1 / 120), dtype=p.dtype).unbind()
    odd = torch.addcmul(sixth, torch.add(of_5, m, alpha=-1 / 10, out=constant), square)
    near = torch.addcmul(half, torch.add(of_4, m, alpha=-1 / 4, out=constant), square)
    near.addcmul_(odd, skew).mul_(square).mul_(m)
    far = torch.expm1(u).mul_(p).log1p_().addcmul_(p, u, value=-1)
    return near.add_(torch.ops.aten.threshold_backward(far.sub_(near), u.abs_(), _NEAR))


def bernoulli_slopes(
    grad: Tensor, needed: Sequence[bool], logits_q: Tensor, logits_p: Tensor | None, *, out: Outs
) -> Slopes:
    """-m u, and sigma(b) - p = m (e^u - 1) / (1 + p (e^u - 1))."""
    p, u, sign, m = _oriented(logits_q, logits_p)
    m.mul_(sign).mul_(grad)
    of_p = None
    if needed[1]:
        rise = torch.expm1(u)
        p.mul_(rise).add_(1)
        of_p = torch.div(rise.mul_(m), p, out=out[1])
    return [torch.mul(u, m.neg_(), out=out[0]), of_p]


def bernoulli_kl(
    logits_q: Tensor, logits_p: Tensor | None, weights: Tensor | None, event_ndims: int, scale: float, reduction: str
) -> Forward:
    if accumulate_dtype(logits_q.dtype) == torch.float64:
        return None
    return _sum(bernoulli_terms, (logits_q, logits_p), event_ndims, weights, scale, reduction)


def bernoulli_kl_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], logits_q: Tensor, logits_p: Tensor | None,
    weights: Tensor | None, event_ndims: int, scale: float, reduction: str,
) -> Gradients:  # fmt: skip
    grad = gradient_of_rows(grads[0], _rows(logits_q, event_ndims), weights, scale, reduction)
    return [*gradients_of(bernoulli_slopes, grad, needed[:2], (logits_q, logits_p), event_ndims), None]
