"""Log-likelihoods in plain PyTorch."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unigen_fast.reference._common import finite_exp, precise, softplus, sum_event, upcast
from unigen_fast.reference.divergence import standardized_square, to_logvar


def bernoulli_log_prob(logits: Tensor, x: Tensor, event_ndims: int) -> Tensor:
    """sum of x·log sigma(l) + (1 - x)·log sigma(-l): nothing cancels for x in {0, 1}."""
    logits, x = upcast(logits), upcast(x)
    infinite = logits.isinf()
    ones = torch.where(infinite & (x == 0), torch.zeros_like(logits), x * logsigmoid(logits))
    zeros = torch.where(infinite & (x == 1), torch.zeros_like(logits), (1 - x) * logsigmoid(-logits))
    return sum_event(ones + zeros, event_ndims)


def gaussian_log_prob(
    x: Tensor, mean: Tensor, logvar: Tensor, event_ndims: int, spread: str, clamp_min: float, clamp_max: float
) -> Tensor:
    logvar = to_logvar(upcast(logvar), spread, clamp_min, clamp_max)
    square = standardized_square(upcast(x) - upcast(mean), logvar)
    return sum_event(-0.5 * (square + logvar + math.log(2 * math.pi)), event_ndims)


def _root_of_rate(log_scale: Tensor) -> Tensor:
    """1 / b, as the square of what stays finite: products with it are taken one factor at a time."""
    return finite_exp(-0.5 * log_scale)


def laplace_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor, event_ndims: int) -> Tensor:
    log_scale = upcast(log_scale)
    difference, root = upcast(x) - upcast(mean), _root_of_rate(log_scale)
    return sum_event(-((difference * root * root).abs() + log_scale + math.log(2)), event_ndims)


def _log_tail(distance: Tensor, root: Tensor, outermost: Tensor) -> Tensor:
    """softplus(distance / b), beyond an edge that outermost bins do not have. Where it is 0, so are its gradients."""
    none = outermost | (distance * root * root < -1e3)  # e^-1000 is below every number
    return torch.where(none, 0.0, softplus(torch.where(none, 0.0, distance) * root * root))


def discretized_logistic_log_prob(
    x: Tensor, mean: Tensor, log_scale: Tensor, event_ndims: int, half_bin: float, low: float, high: float
) -> Tensor:
    """log(sigma(a) - sigma(b)) = log(1 - e^{b - a}) + log sigma(a) + log sigma(-b): three terms of one sign."""
    x, mean, log_scale = upcast(x), upcast(mean), upcast(log_scale)
    distance, root = x - mean, _root_of_rate(log_scale)
    width = 2 * half_bin * root * root
    wide, tiny = width > math.log(2), width < 1e-4
    narrow = torch.where(wide | tiny, torch.ones_like(width), width)
    far = torch.where(wide, width, torch.ones_like(width))
    few = torch.where(tiny, width, torch.zeros_like(width))  # for which the width may be too small for a number
    series = math.log(2 * half_bin) - log_scale - few / 2 + few.square() / 24
    of_width = torch.where(wide, torch.log1p(-(-far).exp()), torch.log(-torch.expm1(-narrow)))
    of_width = torch.where(tiny, series, of_width)
    lowest, highest = x < low + half_bin, x > high - half_bin
    below = _log_tail(distance - half_bin, root, lowest)
    above = _log_tail(-distance - half_bin, root, highest)
    return sum_event(torch.where(lowest | highest, 0.0, of_width) - above - below, event_ndims)


def _stirling_remainder(n: Tensor) -> Tensor:
    """log Gamma(n) - [(n - 1/2) log n - n + log(2 pi) / 2], which is about 1 / (12 n), for n > 0 in float64."""
    shift = 10
    short = n < shift  # there from log Gamma(n + shift) and the product of what is between
    small = torch.where(short, n, torch.ones_like(n))
    far = torch.where(short, n + shift, n)
    square = far.square().reciprocal()
    series = torch.zeros_like(n)
    for coefficient in (-3617 / 122400, 1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12):
        series = series * square + coefficient
    between = (small + 0.5) * ((small + shift) / small).log() - shift
    for i in range(1, shift):
        between = between + ((small + shift) / (small + i)).log()
    return series / far + torch.where(short, between, torch.zeros_like(n))


def _negative_binomial(x: Tensor, mu: Tensor, theta: Tensor, eps: float) -> Tensor:
    """In float64. lgamma(x + theta) - lgamma(theta) by Stirling's formula: what is large in it has been cancelled by
    hand against theta log(theta / (theta + mu)) and x log(mu / (theta + mu)). With `eps`: that of the mean mu + eps,
    plus theta log(1 + eps / theta)."""
    mu = mu + eps
    total, sum_ = x + theta, mu + theta
    t = (x - mu) / sum_
    near = t.abs() < 0.5
    log_ratio = torch.where(near, torch.where(near, t, torch.zeros_like(t)).log1p(), (total / sum_).log())
    rest = _stirling_remainder(total) - _stirling_remainder(theta) - 0.5 * torch.log1p(x / theta)
    # lgamma(x + 1) + x, exactly 0 for x = 0
    of_x = (x + 0.5) * torch.log1p(x) + _stirling_remainder(x + 1) - _stirling_remainder(torch.ones_like(x))
    certain = (x == 0) & (mu == 0)
    value = rest + total * log_ratio + torch.xlogy(x, torch.where(certain, torch.ones_like(mu), mu)) - of_x
    return value + theta * torch.log1p(eps / theta) if eps else value


def negative_binomial_log_prob(x: Tensor, mu: Tensor, theta: Tensor, event_ndims: int, eps: float = 0.0) -> Tensor:
    # differences of lgamma, and their derivatives, need it
    terms = _negative_binomial(precise(x), precise(mu), precise(theta), eps)
    return sum_event(terms, event_ndims).to(upcast(mu).dtype)


def zero_inflated_negative_binomial_log_prob(
    x: Tensor, mu: Tensor, theta: Tensor, gate_logits: Tensor, event_ndims: int, eps: float = 0.0
) -> Tensor:
    x = torch.where(x == 0, torch.zeros_like(x), x)  # a zero is one event, whatever its neighbourhood: no gradient
    count = _negative_binomial(precise(x), precise(mu), precise(theta), eps)
    gate = precise(gate_logits)
    # log(sigma(g) + sigma(-g) p) = log1p(-sigma(-g) (1 - p)), but for p and sigma(g) both small
    rest = (-gate).sigmoid() * torch.expm1(count)
    usual = rest > -0.5
    safe = torch.where(usual, rest, torch.zeros_like(rest))
    zeros = torch.where(usual, safe.log1p(), torch.logaddexp(gate, count) - softplus(gate))
    terms = torch.where(x == 0, zeros, count - softplus(gate))
    return sum_event(terms, event_ndims).to(upcast(mu).dtype)
