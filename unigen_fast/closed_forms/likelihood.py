"""Closed forms of likelihoods.

Of each one the terms, element by element, and their slopes, which whole objectives take too: `LIKELIHOODS`. What is
infinite or no number in a term shows in its row, and the reference serves.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus, softshrink

from unigen_fast.closed_forms._rows import Forward, Gradients, Outs, Slopes, Tensors, finite, gradients_of, rows_of

_mask = torch.ops.aten.threshold_backward  # (payload, x, t): the payload where x > t, else 0


def _below(bound: float, dtype: torch.dtype) -> float:
    """The number below a bound: what is above it is not less than the bound."""
    return torch.nextafter(torch.tensor(bound, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)).item()


def _rows(terms: Callable[..., Tensor], tensors: Sequence[Tensor], event_ndims: int) -> Forward:
    rows = rows_of(terms, tensors, event_ndims)
    return (rows, ()) if finite(rows) else None


def _compact(x: Tensor) -> Tensor:
    """Of a tensor that was broadcast, what it was broadcast from."""
    if x.is_contiguous():
        return x
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]


# ---- Bernoulli -------------------------------------------------------------------------------------------------------


def bernoulli_terms(logits: Tensor, x: Tensor) -> Tensor:
    """(x - 1/2) l - |l| / 2 - log(1 + e^-|l|): nothing cancels for x in {0, 1}."""
    size = logits.abs()
    linear = torch.mul(logits, _compact(x) - 0.5).sub_(size, alpha=0.5)
    return linear.add_(softplus(size, beta=-1.0))


def bernoulli_slopes(
    grad: Tensor, needed: Sequence[bool], logits: Tensor, x: Tensor, *, out: Outs = (None, None)
) -> Slopes:
    return [
        torch.mul(torch.sigmoid(logits).sub_(x), -grad, out=out[0]) if needed[0] else None,
        torch.mul(logits, grad, out=out[1]) if needed[1] else None,
    ]


def bernoulli_log_prob(logits: Tensor, x: Tensor, event_ndims: int) -> Forward:
    return _rows(bernoulli_terms, (logits, x), event_ndims)


def bernoulli_log_prob_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], logits: Tensor, x: Tensor, event_ndims: int
) -> Gradients:
    return gradients_of(bernoulli_slopes, grads[0], needed, (logits, x), event_ndims)


# ---- Gaussian and Laplace --------------------------------------------------------------------------------------------


def _logvar(given: Tensor, spread: str, low: float, high: float) -> Tensor:
    if spread == "std":
        given = given.log().mul_(2)
    elif spread == "logstd":
        given = given * 2
    return given if low == -math.inf and high == math.inf else given.clamp(low, high)


def gaussian_terms(
    x: Tensor, mean: Tensor, logvar: Tensor, spread: str = "logvar", low: float = -math.inf, high: float = math.inf
) -> Tensor:
    """-1/2 ((x - m)² e^-v + v + log 2 pi)"""
    peak = torch.rsub(_logvar(logvar, spread, low, high), -0.5 * math.log(2 * math.pi), alpha=0.5)  # log density
    difference = (x - mean).mul_(peak.exp())
    return peak.addcmul_(difference, difference, value=-math.pi)


def gaussian_slopes(
    grad: Tensor, needed: Sequence[bool], x: Tensor, mean: Tensor, logvar: Tensor, spread: str = "logvar",
    low: float = -math.inf, high: float = math.inf, *, out: Outs = (None, None, None),
) -> Slopes:  # fmt: skip
    given, logvar = logvar, _logvar(logvar, spread, low, high)
    rate = (logvar * -0.5).exp_()
    difference = (x - mean).mul_(rate)
    times_grad = difference * grad
    found: Slopes = [None, None, None]
    if needed[1]:
        found[1] = torch.mul(rate, times_grad, out=out[1])
    if needed[0]:
        found[0] = torch.mul(rate.neg_(), times_grad, out=out[0])
    if needed[2]:
        slope = torch.addcmul(grad * -0.5, difference, times_grad, value=0.5, out=out[2])
        if low > -math.inf or high < math.inf:
            unbounded = _logvar(given, spread, -math.inf, math.inf)
            slope = _mask(slope, unbounded, _below(low, slope.dtype))
            slope = _mask(slope, -unbounded, _below(-high, slope.dtype))
        if spread != "logvar":
            slope.mul_(2)
        if spread == "std":
            slope.div_(given)
        found[2] = slope
    return found


def gaussian_log_prob(
    x: Tensor, mean: Tensor, logvar: Tensor, event_ndims: int, spread: str, clamp_min: float, clamp_max: float
) -> Forward:
    terms = partial(gaussian_terms, spread=spread, low=clamp_min, high=clamp_max)
    return _rows(terms, (x, mean, logvar), event_ndims)


def gaussian_log_prob_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], x: Tensor, mean: Tensor, logvar: Tensor, event_ndims: int,
    spread: str, clamp_min: float, clamp_max: float,
) -> Gradients:  # fmt: skip
    slopes = partial(gaussian_slopes, spread=spread, low=clamp_min, high=clamp_max)
    return gradients_of(slopes, grads[0], needed, (x, mean, logvar), event_ndims)


def laplace_terms(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-(|x - m| / b + log b + log 2)"""
    peak = torch.rsub(log_scale, -math.log(2))  # log density
    return peak.addcmul_((x - mean).abs_(), peak.exp(), value=-2)


def laplace_slopes(
    grad: Tensor, needed: Sequence[bool], x: Tensor, mean: Tensor, log_scale: Tensor, *, out: Outs = (None, None, None)
) -> Slopes:
    difference = x - mean
    of_mean = torch.mul(torch.neg(log_scale).exp_().mul_(grad), difference.sign(), out=out[1])
    return [
        torch.neg(of_mean, out=out[0]) if needed[0] else None,
        of_mean,
        torch.addcmul(-grad, difference, of_mean, out=out[2]) if needed[2] else None,
    ]


def laplace_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor, event_ndims: int) -> Forward:
    return _rows(laplace_terms, (x, mean, log_scale), event_ndims)


def laplace_log_prob_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], x: Tensor, mean: Tensor, log_scale: Tensor, event_ndims: int
) -> Gradients:
    return gradients_of(laplace_slopes, grads[0], needed, (x, mean, log_scale), event_ndims)


# ---- discretized logistic --------------------------------------------------------------------------------------------


def _bin_edges(
    x: Tensor, mean: Tensor, log_scale: Tensor, half_bin: float, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1 / s, -2 h / s, (m - x + h) / s and (x - m + h) / s: an edge that an outermost bin does not have is as far away
    as a number can be, and so is the other edge of the width then."""
    far = torch.tensor(0.25 * torch.finfo(x.dtype).max, dtype=x.dtype).expand(x.shape)
    rate = torch.neg(log_scale).exp_()
    distance, half = (x - mean).mul_(rate), rate * half_bin
    below = half - distance
    above = distance.add_(half)
    width = half.mul_(-2)
    beyond = _mask(far, x, high - half_bin)
    above.add_(beyond)
    width.sub_(beyond)
    beyond = _mask(far, -x, -(low + half_bin))
    below.add_(beyond)
    width.sub_(beyond)
    return rate, width, below, above


def discretized_logistic_terms(
    x: Tensor, mean: Tensor, log_scale: Tensor, half_bin: float, low: float, high: float
) -> Tensor:
    """log(1 - e^-w) + log sigma(a) + log sigma(b) of the width and the distances of the edges: all of one sign."""
    _, width, below, above = _bin_edges(x, mean, log_scale, half_bin, low, high)
    value = width.expm1_().neg_().log_()
    value.add_(below.clamp(max=0)).add_(above.clamp(max=0))
    tail, other = below.abs_().neg_().exp_(), above.abs_().neg_().exp_()
    value.sub_(torch.addcmul(tail, tail, other).add_(other).log1p_())
    # no number for scales whose width is next to no number, or that bring an edge to where `far` is
    return value.add_(log_scale * (torch.finfo(value.dtype).max / 64), alpha=0)


def discretized_logistic_slopes(
    grad: Tensor, needed: Sequence[bool], x: Tensor, mean: Tensor, log_scale: Tensor, half_bin: float, low: float,
    high: float, *, out: Outs = (None, None, None),
) -> Slopes:  # fmt: skip
    rate, width, below, above = _bin_edges(x, mean, log_scale, half_bin, low, high)
    of_below, of_above = torch.neg(below).sigmoid_(), torch.neg(above).sigmoid_()
    found: Slopes = [None, None, None]
    if needed[2]:
        width.neg_()
        slope = width.div_(torch.expm1(width)).addcmul_(above, of_above).addcmul_(below, of_below)
        found[2] = torch.mul(slope, -grad, out=out[2])
    if needed[0] or needed[1]:
        of_below.sub_(of_above).mul_(rate)
    if needed[1]:
        found[1] = torch.mul(of_below, grad, out=out[1])
    if needed[0]:
        found[0] = torch.mul(of_below, -grad, out=out[0])
    return found


def discretized_logistic_log_prob(
    x: Tensor, mean: Tensor, log_scale: Tensor, event_ndims: int, half_bin: float, low: float, high: float
) -> Forward:
    terms = partial(discretized_logistic_terms, half_bin=half_bin, low=low, high=high)
    return _rows(terms, (x, mean, log_scale), event_ndims)


def discretized_logistic_log_prob_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], x: Tensor, mean: Tensor, log_scale: Tensor,
    event_ndims: int, half_bin: float, low: float, high: float,
) -> Gradients:  # fmt: skip
    slopes = partial(discretized_logistic_slopes, half_bin=half_bin, low=low, high=high)
    return gradients_of(slopes, grads[0], needed, (x, mean, log_scale), event_ndims)


# ---- counts ----------------------------------------------------------------------------------------------------------
#
# With T = x + theta, S = mu + theta and Gamma(n) = Gamma(n + 1) / n, by Stirling's formula of n + 1 >= 1,
#
#   log NB = R(T + 1) - R(theta + 1) - R(x + 1) + log(theta / T) + log((T + 1) / ((theta + 1) (x + 1))) / 2 + R(1) - A
#   A = x log((x + 1) S / ((T + 1) mu)) + theta log((theta + 1) S / ((T + 1) theta))
#
# where R is the remainder of the formula and R(1) = 1 - log(2 pi) / 2. Each logarithm of A is log1p of a difference
# without cancellation (Loader, "Fast and accurate computation of binomial probabilities", 2000). Of x = 0 there is the
# last logarithm alone. `eps` adds to the mean, and to the theta in that quotient.


def _coefficients(*numbers: float) -> tuple[float, list[Tensor]]:
    return numbers[0], [torch.tensor(n, dtype=torch.float32, device="cpu") for n in numbers[1:]]


# of 1 / n, n >= 1, in float32: R(n) n, to 2e-8 of R, and n² (log n - 1 / (2 n) - digamma(n)), to 7e-7 of 1 / (2 n)
_REMAINDER = _coefficients(
    -0.000158718481, 0.000412557598, 0.000366435093, -0.00291223283, 2.1157951e-05, 0.0833322502
)  # fmt: skip
_SLOPE = _coefficients(-0.000595250737, 0.00420861247, -0.0100112133, 0.000298002114, 0.0833158354)
# of z in log(1 - z) + z = -z² (1 / 2 + z / 3 + ...)
_LOG = _coefficients(1 / 5, 1 / 4, 1 / 3, 1 / 2)
# the bounds between which that is the series; its value at both
_NEAR, _AT_BOUNDS = (-1 / 32, 0.030612218335136954), 0.00047834133324631163
_FAR = torch.tensor(1e30, dtype=torch.float32, device="cpu")


def _polynomial(x: Tensor, coefficients: tuple[float, list[Tensor]]) -> Tensor:
    leading, (first, *others) = coefficients
    found = torch.add(first, x, alpha=leading)
    for c in others:
        torch.addcmul(c, found, x, out=found)
    return found


def _remainder(n: Tensor) -> Tensor:
    inverse = n.reciprocal()
    return _polynomial(inverse, _REMAINDER).mul_(inverse)


def _slope(inverse: Tensor) -> Tensor:
    """log n - 1 / (2 n) - digamma(n)"""
    return _polynomial(inverse, _SLOPE).mul_(inverse).mul_(inverse)


def _excess(x: Tensor, mu: Tensor, theta: Tensor, eps: float) -> Tensor:
    """(T + 1) ((theta + 1) S / ((T + 1) theta) - 1)"""
    if not eps:
        return (mu - x).addcmul_(mu, theta.reciprocal())
    inverse = (theta + eps).reciprocal_()
    return (mu - x).mul_(theta * inverse).addcmul_(torch.sub(mu, x, alpha=eps), inverse)


def _log_of_count(x: Tensor, mu: Tensor, theta: Tensor, above: Tensor) -> Tensor:
    """log((x + 1) S / ((T + 1) mu))"""
    return (x - mu).add_(1).div_(mu).mul_(theta).div_(above).log1p_()


def negative_binomial_terms(x: Tensor, mu: Tensor, theta: Tensor, eps: float = 0.0) -> Tensor:
    theta = _compact(theta)
    next_theta, above, next_x = theta + 1, x + (theta + 1), x + 1
    inner = _excess(x, mu, theta, eps).div_(above).log1p_().mul_(theta)
    inner.addcmul_(x, _log_of_count(x, mu + eps if eps else mu, theta, above))
    rest = torch.div(above, next_theta).div_(next_x).sqrt_().mul_(theta).div_(x + theta).log_()
    rest.add_(_remainder(above)).sub_(_remainder(next_x))
    rest.sub_(_remainder(next_theta).sub_(1 - 0.5 * math.log(2 * math.pi)))
    return _mask(rest, x, 0).sub_(inner)


def _log_of_zero(x: Tensor, mu: Tensor, theta: Tensor, eps: float) -> Tensor:
    """Of x = 0; of others 0."""
    found = _excess(x, mu, theta, eps).div_(x + (theta + 1)).log1p_().mul_(theta)
    return _mask(found, x, 0).sub_(found)


def negative_binomial_slopes(
    grad: Tensor, needed: Sequence[bool], x: Tensor, mu: Tensor, theta: Tensor, eps: float = 0.0, *,
    out: Outs = (None, None, None),
) -> Slopes:  # fmt: skip
    theta = _compact(theta)
    next_theta, above = theta + 1, x + (theta + 1)
    mean = mu + eps if eps else mu
    sum_ = mean + theta
    found: Slopes = [None, None, None]
    if needed[1]:
        found[1] = torch.mul((x - mean).div_(mean).mul_(theta).div_(sum_), grad, out=out[1])
    if not (needed[0] or needed[2]):
        return found
    inverse, total = above.reciprocal(), x + theta
    of_total = _slope(inverse)
    if needed[0]:
        of_count = _log_of_count(x, mean, theta, above)
        of_x = (x + 1).reciprocal_()
        ratio = torch.div(sum_, mean).mul_(inverse).div_(of_x)
        of_count = torch.where(ratio < 0.5, ratio.log(), of_count)
        slope = _slope(of_x).sub_(of_total).add_(of_x, alpha=0.5).sub_(inverse, alpha=0.5)
        found[0] = torch.mul(slope.sub_(total.reciprocal()).sub_(of_count), grad, out=out[0])
    if needed[2]:
        # digamma(T) - log T, less the same of theta, and log(T / S) - T / S + 1: of either, differences that are small
        next_inverse = next_theta.reciprocal()
        rise = of_total.sub_(_slope(next_inverse)).neg_().addcmul_(inverse.mul_(x), next_inverse, value=0.5)
        rise.addcmul_(torch.div(x, total, out=total), theta.reciprocal())
        rise.addcmul_(x / sum_, next_inverse, value=eps - 1)
        slope = _mask(rise, x, 0)
        excess = _excess(x, mu, theta, eps)
        z = (excess / sum_).mul_((theta + eps) * next_inverse)
        slope.add_(softshrink(z - excess.div_(above).log1p_(), _AT_BOUNDS))
        z.clamp_(*_NEAR)
        slope.addcmul_(_polynomial(z, _LOG).mul_(z), z, value=-1)
        if eps:
            slope.addcmul_(mu / sum_, eps / (theta + eps), value=-1)
        found[2] = torch.mul(slope, grad, out=out[2])
    return found


def refused(x: Tensor) -> bool:
    """The polynomials have float32's digits."""
    return x.dtype == torch.float64


def negative_binomial_log_prob(x: Tensor, mu: Tensor, theta: Tensor, event_ndims: int, eps: float) -> Forward:
    if refused(mu):
        return None
    return _rows(partial(negative_binomial_terms, eps=eps), (x, mu, theta), event_ndims)


def negative_binomial_log_prob_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], x: Tensor, mu: Tensor, theta: Tensor, event_ndims: int,
    eps: float,
) -> Gradients:  # fmt: skip
    slopes = partial(negative_binomial_slopes, eps=eps)
    return gradients_of(slopes, grads[0], needed, (x, mu, theta), event_ndims)


def zero_inflated_negative_binomial_terms(
    x: Tensor, mu: Tensor, theta: Tensor, gate: Tensor, eps: float = 0.0
) -> Tensor:
    """log(sigma(g) [x = 0] + sigma(-g) p), which is log1p of a difference where it is not below log 1/2."""
    count = negative_binomial_terms(x, mu, theta, eps)
    some = _mask(count, x, 0)
    count.sub_(some)  # of a zero; else 0
    open_, closed = torch.sigmoid(gate), torch.neg(gate).sigmoid_()
    lost = _mask(open_, x, 0)
    mass = open_.sub_(lost).addcmul_(closed, torch.exp(count))
    rest = count.expm1_().mul_(closed).sub_(lost)
    some.add_(rest.clamp_(min=-0.5).log1p_())
    return some.add_(mass.log_().add_(math.log(2)).clamp_(max=0))


def zero_inflated_negative_binomial_slopes(
    grad: Tensor, needed: Sequence[bool], x: Tensor, mu: Tensor, theta: Tensor, gate: Tensor, eps: float = 0.0, *,
    out: Outs = (None, None, None, None),
) -> Slopes:  # fmt: skip
    count = _log_of_zero(x, mu, _compact(theta), eps)
    # how much of a zero is the count's; all of what is none
    odds = (count - gate).add_(_mask(_FAR.expand(x.shape), x, 0))
    found: Slopes = [None, None, None, None]
    if needed[3]:
        slope = torch.neg(odds).sigmoid_().mul_(torch.neg(gate).sigmoid_()).mul_(count.expm1_())
        found[3] = torch.mul(slope.add_(_mask(torch.sigmoid(gate), x, 0)), -grad, out=out[3])
    if any(needed[:3]):
        weight = odds.sigmoid_().mul_(grad)
        found[:3] = negative_binomial_slopes(weight, needed, x, mu, theta, eps, out=out[:3])
    if found[0] is not None:
        found[0] = _mask(found[0], x, 0)  # a zero is one event, whatever its neighbourhood
    return found


def zero_inflated_negative_binomial_log_prob(
    x: Tensor, mu: Tensor, theta: Tensor, gate_logits: Tensor, event_ndims: int, eps: float
) -> Forward:
    if refused(mu):
        return None
    terms = partial(zero_inflated_negative_binomial_terms, eps=eps)
    return _rows(terms, (x, mu, theta, gate_logits), event_ndims)


def zero_inflated_negative_binomial_log_prob_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], x: Tensor, mu: Tensor, theta: Tensor, gate_logits: Tensor,
    event_ndims: int, eps: float,
) -> Gradients:  # fmt: skip
    slopes = partial(zero_inflated_negative_binomial_slopes, eps=eps)
    return gradients_of(slopes, grads[0], needed, (x, mu, theta, gate_logits), event_ndims)


LIKELIHOODS: dict[str, tuple[Callable[..., Tensor], Callable[..., Slopes]]] = {
    "bernoulli": (bernoulli_terms, bernoulli_slopes),
    "gaussian": (gaussian_terms, gaussian_slopes),
    "laplace": (laplace_terms, laplace_slopes),
    "discretized_logistic": (discretized_logistic_terms, discretized_logistic_slopes),
    "negative_binomial": (negative_binomial_terms, negative_binomial_slopes),
    "zero_inflated_negative_binomial": (
        zero_inflated_negative_binomial_terms,
        zero_inflated_negative_binomial_slopes,
    ),
}
