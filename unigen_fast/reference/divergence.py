"""Divergences between Gaussians, and reparameterised samples with them, in plain PyTorch."""

import math

import torch
from torch import Tensor

from unigen_fast.reference._common import (
    accumulate_dtype,
    finite_exp,
    log1p_minus,
    read,
    reduce_weighted,
    softplus,
    sum_event,
    upcast,
)
from unigen_fast.reference.random import philox_normal


def clamp(x: Tensor, low: float, high: float = math.inf) -> Tensor:
    """`torch.clamp` as before torch 2.15: at a bound itself the gradient passes. A NaN stays, without gradient."""
    within = torch.where(x.isnan(), math.nan, x)
    return torch.where(x < low, low, torch.where(x > high, high, within))


def to_logvar(spread_value: Tensor, spread: str, clamp_min: float, clamp_max: float) -> Tensor:
    """Log-variance of a network's "logvar", "logstd" or "std" output, clamped (gradient 0 outside)."""
    if spread == "std":
        logvar = 2 * spread_value.log()
    elif spread == "logstd":
        logvar = 2 * spread_value
    else:
        logvar = spread_value
    return logvar if clamp_min == -math.inf and clamp_max == math.inf else clamp(logvar, clamp_min, clamp_max)


def to_std(spread_value: Tensor, spread: str, clamp_min: float, clamp_max: float) -> Tensor:
    if spread == "std" and clamp_min == -math.inf and clamp_max == math.inf:
        return spread_value
    return (0.5 * to_logvar(spread_value, spread, clamp_min, clamp_max)).exp()


def standardized_square(difference: Tensor, logvar: Tensor) -> Tensor:
    """d² e^{-v}. Of a Gaussian that has become certain e^{-v} is infinite; (d e^{-v/2})² is a number at d = 0."""
    return (difference * finite_exp(-0.5 * logvar)).square()


def exp_minus_1_minus(x: Tensor) -> Tensor:
    """e^x - 1 - x >= 0, to a relative 1e-14 in float64 and 1e-6 in float32."""
    # the difference cancels near 0: Taylor's series for |x| < 0.1
    near = x.abs() < 0.1
    small = torch.where(near, x, torch.zeros_like(x))
    series = torch.zeros_like(x)
    for n in range(10, 1, -1):
        series = series * small + 1 / math.factorial(n)
    large = torch.where(near, torch.ones_like(x), x)
    return torch.where(near, series * small.square(), torch.expm1(large) - large)


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    weights: Tensor | None,
    event_ndims: int,
    spread: str,
    free_bits: float,
    free_bits_mode: str,
    clamp_min: float,
    clamp_max: float,
    scale: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Returns (KL, rows before free bits over a row and weights: `[0]` where backward has no use for them)."""
    mean, logvar, prior_mean, prior_logvar = read(weights, event_ndims, mean, logvar, prior_mean, prior_logvar)
    mean, logvar = upcast(mean), to_logvar(upcast(logvar), spread, clamp_min, clamp_max)
    difference = mean if prior_mean is None else mean - upcast(prior_mean)
    if prior_logvar is None:
        terms = 0.5 * (exp_minus_1_minus(logvar) + difference.square())
    else:
        prior_logvar = to_logvar(upcast(prior_logvar), spread, clamp_min, clamp_max)
        terms = 0.5 * (exp_minus_1_minus(logvar - prior_logvar) + standardized_square(difference, prior_logvar))
    if free_bits > 0 and free_bits_mode == "per_dim":
        terms = clamp(terms, free_bits)
    rows = sum_event(terms, event_ndims)
    free_rows = free_bits > 0 and free_bits_mode == "sum"
    kept = rows.detach().contiguous().clone() if free_rows or weights is not None else rows.new_empty((0,))
    if free_rows:
        rows = clamp(rows, free_bits)
    return reduce_weighted(rows, weights, scale, reduction), kept


def sample_gaussian(
    mean: Tensor,
    logvar: Tensor,
    rng_state: Tensor,
    num_samples: int,
    sample_dim: int,
    spread: str,
    clamp_min: float,
    clamp_max: float,
) -> Tensor:
    """`num_samples` = -1: one draw, without a sample dimension. Returns z in the dtype of `mean`.

    `rng_state`: (seed, offset), or the noise itself.
    """
    dtype = mean.dtype
    center, std = upcast(mean), to_std(upcast(logvar), spread, clamp_min, clamp_max)
    if num_samples >= 0:
        center, std = center.unsqueeze(sample_dim), std.unsqueeze(sample_dim)
    if rng_state.is_floating_point():
        noise = rng_state.to(center.dtype)
    else:
        shape = list(torch.broadcast_shapes(center.shape, std.shape))
        if num_samples >= 0:
            shape[sample_dim] = num_samples
        noise = philox_normal(rng_state, tuple(shape), accumulate_dtype(dtype))
    return torch.addcmul(center, std, noise).to(dtype)


def sample_gaussian_with_kl(
    mean: Tensor,
    logvar: Tensor,
    rng_state: Tensor,
    num_samples: int,
    sample_dim: int,
    event_ndims: int,
    spread: str,
    clamp_min: float,
    clamp_max: float,
) -> tuple[Tensor, Tensor]:
    """Returns (z, KL to the standard normal as rows)."""
    dtype = mean.dtype
    mean, logvar = upcast(mean), upcast(logvar)  # once, so that the two gradients add up before they are rounded
    z = sample_gaussian(mean, logvar, rng_state, num_samples, sample_dim, spread, clamp_min, clamp_max).to(dtype)
    kl, _ = gaussian_kl(
        mean, logvar, None, None, None, event_ndims, spread, 0.0, "sum", clamp_min, clamp_max, 1.0, "none"
    )
    return z, kl


def gaussian_kl_monte_carlo(
    z: Tensor,
    mean: Tensor | None,
    logvar: Tensor,
    prior_mean: Tensor,
    prior_logvar: Tensor,
    weights: Tensor | None,
    event_ndims: int,
    spread: str,
    clamp_min: float,
    clamp_max: float,
    scale: float,
    reduction: str,
) -> Tensor:
    """log q(z) - log p(z); without a mean of q, the expectation of log q(z) in place of the first."""
    z, mean, logvar, prior_mean, prior_logvar = read(weights, event_ndims, z, mean, logvar, prior_mean, prior_logvar)
    z, logvar = upcast(z), to_logvar(upcast(logvar), spread, clamp_min, clamp_max)
    prior_logvar = to_logvar(upcast(prior_logvar), spread, clamp_min, clamp_max)
    own = torch.ones_like(z) if mean is None else standardized_square(z - upcast(mean), logvar)
    terms = 0.5 * (prior_logvar - logvar + standardized_square(z - upcast(prior_mean), prior_logvar) - own)
    return reduce_weighted(sum_event(terms, event_ndims), weights, scale, reduction)


def bernoulli_kl(
    logits_q: Tensor,
    logits_p: Tensor | None,
    weights: Tensor | None,
    event_ndims: int,
    scale: float,
    reduction: str,
) -> Tensor:
    """sigma(a) (a - b) + softplus(b) - softplus(a), which does not change where both logits change their signs."""
    logits_q, logits_p = read(weights, event_ndims, logits_q, logits_p)
    a = upcast(logits_q)
    b = torch.zeros_like(a) if logits_p is None else upcast(logits_p)
    sign = torch.where(a > 0, -torch.ones_like(a), torch.ones_like(a))
    a, b = a * sign, b * sign
    p, u = a.sigmoid(), b - a
    near = u.abs() < 1
    small = torch.where(near, u, torch.zeros_like(u))
    of_near = p * exp_minus_1_minus(small) + log1p_minus(p * torch.expm1(small))
    # softplus(b) - p u, without infinity times 0 or less infinity; a finite logit can be certain too
    certain, infinite = p == 0, b == math.inf
    of_far = softplus(torch.where(infinite, 0.0, b)) - softplus(a) - p * torch.where(certain | infinite, 0.0, u)
    of_infinite = torch.where(infinite, b, 1.0) * (1 - torch.where(certain, 0.0, p))
    of_far = torch.where(infinite, of_infinite, of_far)
    rows = sum_event(torch.where(near, of_near, of_far), event_ndims)
    return reduce_weighted(rows, weights, scale, reduction)
