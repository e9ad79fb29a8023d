"""Log-likelihoods in plain PyTorch."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unigen_fast.reference._common import finite_exp, log1p_minus, softplus, sum_event, upcast
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
    """log Gamma(n) - [(n - 1/2) log n - n + log(2 pi) / 2], which is about 1 / (12 n), for n > 0."""
    shift = 10 if n.dtype == torch.float64 else 3
    short = n < shift  # there from that of n + shift: n + 1 has (n + 1/2) log(1 + 1 / n) - 1 less
    small = torch.where(short, n, torch.ones_like(n))
    far = torch.where(short, n + shift, n)
    square = far.square().reciprocal()
    series = torch.zeros_like(n)
    for coefficient in (-3617 / 122400, 1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12):
        series = series * square + coefficient
    least = small < 1  # which may have no reciprocal
    first = torch.where(least, small.log1p() - small.log(), torch.where(least, 1.0, small).reciprocal().log1p())
    between = (small + 0.5) * first - 1
    for i in range(1, shift):
        between = between + ((small + (i + 0.5)) * (small + i).reciprocal().log1p() - 1)
    return series / far + torch.where(short, between, torch.zeros_like(n))


def _log(n: Tensor) -> Tensor:
    """log n, whose derivative times n is a number where 1 / n is not."""
    small = n < 1
    return torch.where(small, n * 2.0**40, n).log() - small.to(n.dtype) * (40 * math.log(2))


def _over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, as `_log`."""
    small = b < 1
    return torch.where(small, a * 2.0**40, a) / torch.where(small, b * 2.0**40, b)


def _share(part: Tensor, rest: Tensor) -> Tensor:
    """part / (part + rest), whose derivative in a large part is no difference."""
    large = part > rest
    ratio = torch.where(large, rest, torch.zeros_like(rest)) / torch.where(large, part, torch.ones_like(part))
    return torch.where(large, 1 / (1 + ratio), part / torch.where(large, torch.ones_like(rest), part + rest))


def _log1p_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(1 + a / b) for a >= 0 and b > 0."""
    large = a > b
    ratio = torch.where(large, torch.zeros_like(a), a) / torch.where(large, torch.ones_like(b), b)
    return torch.where(large, _log(a + b) - _log(b), ratio.log1p())


def _negative_binomial(x: Tensor, mu: Tensor, theta: Tensor, eps: float) -> Tensor:
    """lgamma(x + theta) - lgamma(theta) by Stirling's formula, what is large in it having been cancelled by hand; and
    the deviances of x and theta from what is expected of them of their sum T, mu / S and theta / S being their shares:
    a log(a / b) - (a - b) >= 0 each, and close to b a series in (a - b) / b (Loader, "Fast and accurate computation of
    binomial probabilities", 2000).

    With `eps`: that of the mean mu + eps, plus theta log(1 + eps / theta), which the deviance of theta takes in where
    the two would cancel: a zero has -theta log(1 + mu / (theta + eps)).
    """
    own_mu, mu, zero = mu, mu + eps, x == 0
    total, sum_ = x + theta, mu + theta
    difference = x - mu
    t = _over(difference, sum_)
    near = t.abs() < 0.5
    log_ratio = torch.where(near, torch.where(near, t, torch.zeros_like(t)).log1p(), _log(total) - _log(sum_))
    # theta log(S / T) + excess
    expected, excess, log_share = mu, difference * _share(theta, mu), log_ratio
    if eps:  # theta log(S / T theta / (theta + eps)) + excess
        of_eps = _log1p_ratio(torch.full_like(theta, eps), theta)
        expected = torch.where(zero, own_mu * _share(theta, torch.full_like(theta, eps)), mu)
        excess = torch.where(zero, (x - expected) * _share(theta + eps, own_mu), excess)
        log_share = torch.where(zero, log_ratio + of_eps, log_ratio)
    t = _over(expected - x, total)
    near = t.abs() < 0.5
    close = torch.where(near, t, torch.zeros_like(t))
    of_theta = torch.where(near, theta * log1p_minus(close) - excess * close, excess - theta * log_share)
    if eps:
        small = theta > eps
        ratio = torch.where(small, eps / torch.where(small, theta, torch.ones_like(theta)), torch.zeros_like(theta))
        of_eps = torch.where(small, theta * log1p_minus(ratio) + eps, theta * of_eps)
        of_theta = of_theta - torch.where(zero, torch.zeros_like(theta), of_eps)
    # x log((x + 1) S / (T mu)) - excess
    some = torch.where(zero & (mu == 0), torch.ones_like(mu), mu)
    counts = (x >= 1) & (mu > 1e-30)
    t = difference / torch.where(counts, mu, torch.ones_like(mu)) * _share(theta, x)
    near = counts & (t.abs() < 0.5)
    close = torch.where(near, t, torch.zeros_like(t))
    count = torch.where(near, x, torch.ones_like(x))
    of_close = count * log1p_minus(close) + excess * close + count * (1 / count).log1p()
    # log((x + 1) / T) + log(S / mu) for small theta, for which the logarithms of T / S and of mu may cancel
    small = theta < 1
    rise = _log1p_ratio(torch.where(small, 1 - theta, torch.zeros_like(theta)), total) + _log1p_ratio(theta, some)
    of_far = torch.where(small, x * rise, x * (x.log1p() - log_ratio) - torch.xlogy(x, some))
    of_x = torch.where(near, of_close, of_far - excess)
    # log Gamma(T) / Gamma(theta) / Gamma(x + 1), less what is above: nothing for x = 0
    none = zero & (theta < torch.finfo(theta.dtype).tiny)  # infinite slopes would cancel
    theta, total = torch.where(none, torch.ones_like(theta), theta), torch.where(none, torch.ones_like(total), total)
    rest = _stirling_remainder(total) - _stirling_remainder(theta) - 0.5 * _log1p_ratio(x, theta)
    of_factorial = _stirling_remainder(x + 1) - _stirling_remainder(torch.ones_like(x)) + 0.5 * torch.log1p(x)
    return rest - of_factorial - of_theta - of_x


def negative_binomial_log_prob(x: Tensor, mu: Tensor, theta: Tensor, event_ndims: int, eps: float = 0.0) -> Tensor:
    return sum_event(_negative_binomial(upcast(x), upcast(mu), upcast(theta), eps), event_ndims)


def zero_inflated_negative_binomial_log_prob(
    x: Tensor, mu: Tensor, theta: Tensor, gate_logits: Tensor, event_ndims: int, eps: float = 0.0
) -> Tensor:
    x = upcast(torch.where(x == 0, torch.zeros_like(x), x))  # a zero is one event, whatever is near: no gradient
    count = _negative_binomial(x, upcast(mu), upcast(theta), eps)
    gate = upcast(gate_logits)
    # log(sigma(g) + sigma(-g) p) = log1p(-sigma(-g) (1 - p)), but for p and sigma(g) both small
    rest = (-gate).sigmoid() * torch.expm1(count)
    usual = rest > -0.5
    safe = torch.where(usual, rest, torch.zeros_like(rest))
    zeros = torch.where(usual, safe.log1p(), torch.logaddexp(gate, count) - softplus(gate))
    terms = torch.where(x == 0, zeros, count - softplus(gate))
    return sum_event(terms, event_ndims)
