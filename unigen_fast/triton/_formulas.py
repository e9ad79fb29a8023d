"""Formulas of a few numbers, summed over the event: one pair of kernels for all of them.

`formula_value` and `formula_slopes` choose the formula by its name; a new one is a branch in each, the functions it
calls, and two lines in the module of its family. `parameters` are what the formula takes beside its numbers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unigen_fast.triton import _rows
from unigen_fast.triton._rows import (
    close_rows,
    columns_at,
    exp_minus_1_minus,
    expm1,
    finite_exp,
    load,
    load_rows,
    log1p,
    log1p_minus,
    log1p_unit,
    program,
    sigmoid,
    softplus,
    store,
    tile_of,
    value_of,
    weighted,
)

_LOG_2 = tl.constexpr(math.log(2))
_LOG_2_PI = tl.constexpr(math.log(2 * math.pi))
_2_PI = tl.constexpr(2 * math.pi)


@triton.jit
def logvar_of(value, clamp, SPREAD: tl.constexpr):
    """(log-variance, its slope in what the network gave: 0 outside the clamp)."""
    if SPREAD == "std":
        v = 2 * tl.log(value)
        slope = 2 / value
    elif SPREAD == "logstd":
        v = 2 * value
        slope = tl.full(value.shape, 2.0, value.dtype)
    else:
        v = value
        slope = tl.full(value.shape, 1.0, value.dtype)
    if clamp is not None:
        low, high = value_of(clamp[0], value.dtype), value_of(clamp[1], value.dtype)
        slope = tl.where((v >= low) & (v <= high), slope, 0.0)
        v = tl.where(v < low, low, tl.where(v > high, high, v))  # keeps a NaN
    return v, slope


@triton.jit
def chain(of_value, slope):
    """The gradient of what the network gave; 0 outside the clamp, where NaN is too."""
    return tl.where(slope == 0, 0.0, of_value * slope)


def clamp_of(low: float, high: float) -> Any:
    return None if low == -math.inf and high == math.inf else (_rows.scalar(low), _rows.scalar(high))


# ---- log-likelihoods -------------------------------------------------------------------------------------------------


@triton.jit
def _logistic_edges(x, mean, log_scale, bins, DTYPE: tl.constexpr):
    half, low, high = value_of(bins[0], DTYPE), value_of(bins[1], DTYPE), value_of(bins[2], DTYPE)
    root = finite_exp(-0.5 * log_scale)  # of 1 / scale: products with it are taken one factor at a time
    distance = x - mean
    a, b = (distance + half) * root * root, (distance - half) * root * root
    return root, 2 * half * root * root, a, b, x < low + half, x > high - half


@triton.jit
def _remainder(n):
    """log Gamma(n) - [(n - 1/2) log n - n + log(2 pi) / 2] for n > 0: csrc/formulas/gamma.h says how."""
    if n.dtype == tl.float64:
        small = n < 8
        far = tl.where(small, n + 8, n)
        inverse = 1 / far
        square = inverse * inverse
        series = (((-3617.0 / 122400 * square + 1.0 / 156) * square - 691.0 / 360360) * square + 1.0 / 1188) * square
        series = (((series - 1.0 / 1680) * square + 1.0 / 1260) * square - 1.0 / 360) * square + 1.0 / 12
        product = tl.full(n.shape, 1.0, n.dtype)
        for i in tl.static_range(1, 8):
            product = product * far / (n + i)
        below = (n + 0.5) * tl.log(far / n) + tl.log(product) - 8
    else:
        small = n < 1
        far = tl.where(small, n + 1, n)
        inverse = 1 / far
        series = ((0.000142218940679 * inverse - 0.000645669862866) * inverse + 0.00106353309347) * inverse
        series = ((series - 6.09097331539e-5) * inverse - 0.00277068811334) * inverse - 3.49734539394e-7
        series = series * inverse + 0.083333336717
        below = (n + 0.5) * tl.log(far / n) - 1
    return inverse * series + tl.where(small, below, 0.0)


@triton.jit
def _digamma_parts(n):
    """(whether n is small, 1 / far, d remainder / d far, what digamma(n) - log n has beyond that of far)."""
    if n.dtype == tl.float64:
        small = n < 8
        inverse = 1 / tl.where(small, n + 8, n)
        square = inverse * inverse
        series = (((-3617.0 / 8160 * square + 1.0 / 12) * square - 691.0 / 32760) * square + 1.0 / 132) * square
        series = (((series - 1.0 / 240) * square + 1.0 / 252) * square - 1.0 / 120) * square + 1.0 / 12
        below = tl.log((n + 8) / n)
        for i in tl.static_range(8):
            below -= 1 / (n + i)
    else:
        small = n < 1
        inverse = 1 / tl.where(small, n + 1, n)
        square = inverse * inverse
        series = ((-0.000322592971157 * inverse + 0.00200619824047) * inverse - 0.00510446947153) * inverse
        series = ((series + 0.00605148282846) * inverse - 0.000465427588527) * inverse - 0.00828049515488
        series = (series * inverse - 2.38085171515e-6) * inverse + 0.0833333517254
        below = tl.log((n + 1) / n) - 1 / n
    return small, inverse, -square * series, tl.where(small, below, 0.0)


@triton.jit
def _deviance(a, ratio, difference, relative):
    """a log(a / b) - (a - b) >= 0, given the difference a - b and (a - b) / b."""
    near = tl.abs(relative - 0.25) < 0.75
    safe = tl.where(near, relative, 0.0)
    return tl.where(near, relative * difference + a * log1p_minus(safe), a * tl.log(ratio) - difference)


def eps_of(eps: float) -> Any:
    return _rows.scalar(eps) if eps else None


@triton.jit
def _finite(x):
    """The largest number in place of infinity."""
    LARGEST: tl.constexpr = 1.7976931348623157e308 if x.dtype == tl.float64 else 3.4028234663852886e38
    return tl.where(x > LARGEST, LARGEST, x)


@triton.jit
def _scaled_log1p(theta, r, product):
    """theta log(1 + r) for r >= 0, given the product theta r too."""
    near = r < 1
    return tl.where(near, theta * log1p_minus(tl.where(near, r, 0.0)) + product, theta * tl.log(1 + _finite(r)))


@triton.jit
def _log_of_zero(mu, theta, eps):
    """theta log((theta + eps) / (theta + mu + eps)): the logarithm of a count's zero."""
    if eps is None:
        return -_scaled_log1p(theta, mu / theta, mu)
    else:
        theta_eps = theta + value_of(eps, theta.dtype)
        return -_scaled_log1p(theta, mu / theta_eps, mu * (theta / theta_eps))


@triton.jit
def _negative_binomial(x, given_mu, given_theta, eps):
    """csrc/formulas/likelihood.h says what is done about tiny mu and theta."""
    LEAST: tl.constexpr = 2.0**-500 if x.dtype == tl.float64 else 2.0**-60
    NORMAL: tl.constexpr = 2.0**-1022 if x.dtype == tl.float64 else 2.0**-126
    mean = given_mu
    if eps is not None:
        mean += value_of(eps, mean.dtype)
    none = x == 0
    x = tl.where((x > 0) & (x < NORMAL), NORMAL, x)
    raised_mu, raised_theta = ~none & (mean < LEAST), given_theta < tl.where(none, NORMAL, LEAST)
    raised_theta &= given_theta > 0
    mu = tl.where(raised_mu, LEAST, mean)
    theta = tl.where(raised_theta, tl.where(none, NORMAL, LEAST), given_theta)
    total = x + theta
    inverse = 1 / total
    difference = x - mu
    share = theta * inverse
    ratio = (theta + mu) * inverse
    ratio = _finite(ratio)
    excess = difference * (theta / (theta + mu))
    of_theta = _deviance(theta, ratio, -excess, -difference * inverse)
    of_x = _deviance(x, tl.maximum(x / mu * ratio, NORMAL), excess, difference / mu * share)
    some = tl.where(none, 1.0, x)
    rest = _remainder(total) - _remainder(theta) - _remainder(some) - 0.5 * tl.log(some * _2_PI / share)
    value = tl.where(none, 0.0, rest) - (of_theta + tl.where(none, -excess, of_x))
    if eps is not None:
        added = value_of(eps, theta.dtype)
        value = tl.where(none, _log_of_zero(given_mu, theta, eps), value + _scaled_log1p(theta, added / theta, added))
    if tl.max((raised_mu | raised_theta).to(tl.int32)) > 0:
        part, sum = mean / mu, given_theta + mean
        rise = (part * theta - given_theta) / sum
        near = rise > -0.5
        log_rise = tl.where(near, log1p(tl.where(near, rise, 0.0)), tl.log(part * ((theta + mu) / sum)))
        value += tl.where(none, 0.0, tl.log(given_theta / theta) + x * log_rise)
    return value


@triton.jit
def _negative_binomial_slopes(x, given_mu, given_theta, eps, DATA: tl.constexpr):
    LEAST: tl.constexpr = 2.0**-500 if x.dtype == tl.float64 else 2.0**-60
    NORMAL: tl.constexpr = 2.0**-1022 if x.dtype == tl.float64 else 2.0**-126
    none = x == 0
    # of a zero, and all but the slope in theta of others, only the ratio of mu and theta counts
    mean, of_zero = given_mu, given_theta
    if eps is not None:
        mean += value_of(eps, mean.dtype)
        of_zero += value_of(eps, mean.dtype)
    raise_ = tl.where(given_theta + mean < LEAST, 1 / LEAST, 1.0).to(x.dtype)
    mu, theta, theta_eps = mean * raise_, given_theta * raise_, of_zero * raise_
    inverse = 1 / (theta + mu)
    total = x + tl.where(none, theta, given_theta)
    difference = x - tl.where(none, mu, mean)
    share_of_theta = theta * inverse
    of_mu = tl.where(none, -share_of_theta, share_of_theta * difference / mean)
    relative = tl.where(none, -given_mu * raise_, difference) * inverse
    near = tl.abs(relative - 0.25) < 0.75
    ratio = tl.where(none, theta_eps, total) * inverse
    of_deviance = tl.where(near, -log1p_minus(tl.where(near, relative, 0.0)), relative - tl.log(ratio))
    small, far, slope, below = _digamma_parts(theta)
    small_total, far_total, slope_total, below_total = _digamma_parts(total)
    SHIFT: tl.constexpr = 8.0 if x.dtype == tl.float64 else 1.0
    distance = x + tl.where(small_total, SHIFT, 0.0) - tl.where(small, SHIFT, 0.0)
    rise = 0.5 * distance * far * far_total + (slope_total - slope) + (below_total - below)
    of_theta = tl.where(none, 0.0, rise) - of_deviance
    if eps is not None:
        # log(1 + eps / theta) - s = -(log(1 - s) + s)
        share = value_of(eps, theta.dtype) * raise_ / theta_eps
        few = share < 0.5
        of_eps = tl.where(few, -log1p_minus(tl.where(few, -share, 0.0)), tl.log(theta_eps / theta) - share)
        of_theta += tl.where(none, share * relative, of_eps)
    tiny = (given_theta < LEAST) & (given_theta > 0)
    if tl.max(tiny.to(tl.int32)) > 0:
        if eps is None:
            alone = none & (share_of_theta < 1e-9)
            of_theta = tl.where(tiny & alone, tl.log(given_theta) - tl.log(given_theta + mean) + 1, of_theta)
        left = tl.where(share_of_theta < 0.5, 1 - x * share_of_theta, 1 - x + x * (mu * inverse))
        of_theta = tl.where(tiny & ~none, left / given_theta, of_theta)
    of_x = tl.zeros(x.shape, x.dtype)
    if DATA:
        next = x + 1
        _, far_next, slope_next, below_next = _digamma_parts(next)
        of_x = slope_total - 0.5 * far_total + below_total - (slope_next - 0.5 * far_next + below_next)
        # where the mean is next to nothing, of one that is 1 / LEAST times as large
        of_mean = mu * inverse
        faint = of_mean < NORMAL
        of_x += tl.log(tl.where(faint, total * inverse * (mu * (1 / LEAST) / next), total / next * of_mean))
        LOG_LEAST: tl.constexpr = -0.6931471805599453 * (500 if x.dtype == tl.float64 else 60)
        of_x += tl.where(faint, LOG_LEAST, 0.0)
        of_x = tl.where(tiny & none, -1 / given_theta, of_x)
    return of_x, of_mu, of_theta


# ---- every formula ---------------------------------------------------------------------------------------------------


@triton.jit
def formula_value(x, parameters, FORMULA: tl.constexpr, SPREAD: tl.constexpr, DTYPE: tl.constexpr):
    """One element's share of the row; `x`: its numbers."""
    if FORMULA == "gaussian_log_prob":
        v, _ = logvar_of(x[2], parameters, SPREAD)
        t = (x[0] - x[1]) * finite_exp(-0.5 * v)
        return -0.5 * (t * t + v + _LOG_2_PI)
    elif FORMULA == "laplace_log_prob":
        root = finite_exp(-0.5 * x[2])
        return -(tl.abs(x[0] - x[1]) * root * root + x[2] + _LOG_2)
    elif FORMULA == "discretized_logistic_log_prob":
        _, width, above, below, lowest, highest = _logistic_edges(x[0], x[1], x[2], parameters, DTYPE)
        far = tl.exp(-tl.maximum(width, 0.5))
        far_log = log1p_minus(-tl.minimum(far, 0.5)) - far
        # log(1 - e^{-w}) = log w - w/2 + w²/24 …: the width of a bin may be too small for a number
        few = width < 1e-4
        mass = tl.where(few, 2 * value_of(parameters[0], DTYPE), -expm1(-tl.minimum(width, 1.0)))
        of_few = width * (width / 24 - 0.5) - x[2]
        of_width = tl.where(width > _LOG_2, far_log, tl.log(mass) + tl.where(few, of_few, 0.0))
        of_width = tl.where(lowest | highest, 0.0, of_width)
        return of_width - tl.where(highest, 0.0, softplus(-above)) - tl.where(lowest, 0.0, softplus(below))
    elif FORMULA == "negative_binomial_log_prob":
        return _negative_binomial(x[0], x[1], x[2], parameters)
    elif FORMULA == "zero_inflated_negative_binomial_log_prob":
        gate = x[3]
        count = _negative_binomial(x[0], x[1], x[2], parameters)
        closed = softplus(gate)
        rest = sigmoid(-gate) * expm1(tl.minimum(count, 0.0, propagate_nan=tl.PropagateNan.ALL))
        usual = tl.where(rest < -0.5, 0.0, rest)
        apart = tl.where(gate == count, 0.0, tl.abs(gate - count))
        both = tl.maximum(gate, count) + log1p_unit(tl.exp(-apart)) - closed
        return tl.where(x[0] == 0, tl.where(rest < -0.5, both, usual + log1p_minus(usual)), count - closed)
    elif FORMULA == "gaussian_kl_monte_carlo":
        v, _ = logvar_of(x[2], parameters, SPREAD)
        pv, _ = logvar_of(x[4], parameters, SPREAD)
        t, own = (x[0] - x[3]) * finite_exp(-0.5 * pv), (x[0] - x[1]) * finite_exp(-0.5 * v)
        return 0.5 * (pv - v + t * t - own * own)
    elif FORMULA == "gaussian_kl_entropy":
        v, _ = logvar_of(x[1], parameters, SPREAD)
        pv, _ = logvar_of(x[3], parameters, SPREAD)
        t = (x[0] - x[2]) * finite_exp(-0.5 * pv)
        return 0.5 * (pv - v + t * t - 1)
    else:
        tl.static_assert(FORMULA == "bernoulli_kl")
        a = -tl.abs(x[0])
        b = tl.zeros(a.shape, DTYPE)
        if len(x) == 2:
            b = tl.where(x[0] > 0, -x[1], x[1])
        u = b - a
        tail = tl.exp(a)
        p = tail / (1 + tail)
        small = tl.where(tl.abs(u) < 1, u, 0.0)
        near = p * exp_minus_1_minus(small) + log1p_minus(p * expm1(small))
        # softplus(b) - p u, without the difference of two infinities
        linear = tl.where(p == 0, tl.maximum(b, 0.0), tl.where(b > 0, (1 - p) * b + p * a, -p * u))
        far = linear + log1p_unit(tl.exp(-tl.abs(b))) - log1p_unit(tail)
        return tl.where(tl.abs(u) < 1, near, far)


@triton.jit
def formula_slopes(x, parameters, FORMULA: tl.constexpr, SPREAD: tl.constexpr, DATA: tl.constexpr, DTYPE: tl.constexpr):
    """Derivatives of the value in each of its numbers; DATA: whether that in the first one is wanted."""
    if FORMULA == "gaussian_log_prob":
        v, slope = logvar_of(x[2], parameters, SPREAD)
        rate = finite_exp(-0.5 * v)
        t = (x[0] - x[1]) * rate
        return -(t * rate), t * rate, chain(0.5 * (t * t - 1), slope)
    elif FORMULA == "laplace_log_prob":
        root = finite_exp(-0.5 * x[2])
        inverse = root * root
        d = x[0] - x[1]
        side = tl.where(d < 0, -inverse, tl.where(d == 0, 0.0, inverse))
        return -side, side, tl.abs(d) * root * root - 1
    elif FORMULA == "discretized_logistic_log_prob":
        root, width, a, b, lowest, highest = _logistic_edges(x[0], x[1], x[2], parameters, DTYPE)
        above = tl.where(highest, 0.0, sigmoid(-a))
        below = tl.where(lowest, 0.0, sigmoid(b))
        bound = tl.minimum(width, 80.0, propagate_nan=tl.PropagateNan.ALL)
        bound = tl.where(bound < 1e-30, 1e-30, bound)
        of_width = tl.where(lowest | highest, 0.0, bound / expm1(bound))
        of_x = (above - below) * root * root
        return of_x, -of_x, tl.where(below == 0, 0.0, b * below) - tl.where(above == 0, 0.0, a * above) - of_width
    elif FORMULA == "negative_binomial_log_prob":
        return _negative_binomial_slopes(x[0], x[1], x[2], parameters, DATA)
    elif FORMULA == "zero_inflated_negative_binomial_log_prob":
        mu, theta, gate = x[1], x[2], x[3]
        none = x[0] == 0
        of_x, of_mu, of_theta = _negative_binomial_slopes(x[0], mu, theta, parameters, DATA)
        empty = _log_of_zero(mu, theta, parameters)
        weight = tl.where(none, sigmoid(empty - gate), 1.0)
        of_gate = tl.where(none, -sigmoid(gate - empty) * sigmoid(-gate) * expm1(empty), -sigmoid(gate))
        return tl.where(none, 0.0, of_x), weight * of_mu, weight * of_theta, of_gate
    elif FORMULA == "gaussian_kl_monte_carlo":
        v, slope = logvar_of(x[2], parameters, SPREAD)
        pv, prior_slope = logvar_of(x[4], parameters, SPREAD)
        rate, own_rate = finite_exp(-0.5 * pv), finite_exp(-0.5 * v)
        t, own = (x[0] - x[3]) * rate, (x[0] - x[1]) * own_rate
        scaled, own_scaled = t * rate, own * own_rate
        of_spread, of_prior = chain(0.5 * (own * own - 1), slope), chain(0.5 * (1 - t * t), prior_slope)
        return scaled - own_scaled, own_scaled, of_spread, -scaled, of_prior
    elif FORMULA == "gaussian_kl_entropy":
        v, slope = logvar_of(x[1], parameters, SPREAD)
        pv, prior_slope = logvar_of(x[3], parameters, SPREAD)
        rate = finite_exp(-0.5 * pv)
        t = (x[0] - x[2]) * rate
        return t * rate, -0.5 * slope, -(t * rate), chain(0.5 * (1 - t * t), prior_slope)
    else:
        tl.static_assert(FORMULA == "bernoulli_kl")
        b = tl.zeros(x[0].shape, DTYPE)
        if len(x) == 2:
            b = x[1]
        u = b - x[0]
        variance = sigmoid(x[0]) * sigmoid(-x[0])
        of_q = tl.where(variance == 0, 0.0, -variance * u)
        if len(x) == 2:
            near = -sigmoid(b) * sigmoid(-x[0]) * expm1(tl.where(tl.abs(u) < 1, -u, 0.0))
            far = tl.where(x[0] > 0, sigmoid(-x[0]) - sigmoid(-b), sigmoid(b) - sigmoid(x[0]))
            return of_q, tl.where(tl.abs(u) < 1, near, far)
        else:
            return (of_q,)


@triton.jit
def _load_all(inputs, row, col, shape, mask, DTYPE: tl.constexpr):
    """The formula's numbers."""
    a = load(inputs[0], row, col, shape, mask, DTYPE)
    if len(inputs) == 1:
        return (a,)
    else:
        b = load(inputs[1], row, col, shape, mask, DTYPE)
        if len(inputs) == 2:
            return a, b
        else:
            c = load(inputs[2], row, col, shape, mask, DTYPE)
            if len(inputs) == 3:
                return a, b, c
            else:
                d = load(inputs[3], row, col, shape, mask, DTYPE)
                if len(inputs) == 4:
                    return a, b, c, d
                else:
                    return a, b, c, d, load(inputs[4], row, col, shape, mask, DTYPE)


@triton.jit
def _formula_kernel(
    inputs, parameters, close, shape, counts, FORMULA: tl.constexpr, SPREAD: tl.constexpr,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    weights = inputs[-1]
    row, split, first, last = program(counts, BLOCK_R, INDEX)
    total = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    for start in range(first, last, BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        numbers = _load_all(inputs[:-1], row, col, shape, mask, DTYPE)
        term = formula_value(numbers, parameters, FORMULA, SPREAD, DTYPE)
        if weights is not None:
            term = weighted(term, load(weights, row, col, shape, mask, DTYPE))
        total += tl.where(mask, term, 0.0)
    close_rows(tl.sum(total, 1), row, split, close, shape, counts, STAGE, DTYPE)


@triton.jit
def _formula_backward_kernel(
    grad, inputs, grads, factor, parameters, shape, counts, FORMULA: tl.constexpr, SPREAD: tl.constexpr,
    DATA: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    weights = inputs[-1]
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    g = load_rows(grad, row, shape, counts, DTYPE) * value_of(factor, DTYPE)
    g = tl.broadcast_to(g[:, None], [BLOCK_R, BLOCK_C])
    if weights is not None:
        g *= load(weights, row, col, shape, mask, DTYPE)
    numbers = _load_all(inputs[:-1], row, col, shape, mask, DTYPE)
    slopes = formula_slopes(numbers, parameters, FORMULA, SPREAD, DATA, DTYPE)
    for k in tl.static_range(len(slopes)):
        if grads[k] is not None:
            store(grads[k], row, col, shape, mask, weighted(slopes[k], g))


# in fp64 they have registers for two elements a thread
LARGE = ("negative_binomial_log_prob", "zero_inflated_negative_binomial_log_prob")


# ---- host ------------------------------------------------------------------------------------------------------------


def _weights_over(weights: Tensor | None, like: Tensor) -> Any:
    """Weights of the rows as an operand over all dimensions."""
    return None if weights is None else (weights, (*weights.stride(), *[0] * (like.dim() - weights.dim())))


def forward(
    formula: str, tensors: Sequence[Tensor], event_ndims: int, parameters: Any = None, spread: str = "",
    weights: Tensor | None = None, scale: float = 1.0, reduction: str = "none",
) -> Tensor:  # fmt: skip
    first = tensors[0]
    columns = _rows.event_dims(first, event_ndims) if reduction == "none" else _rows.all_dims(first)
    budget = 1024
    if formula in LARGE and (first.dtype == torch.float64 or parameters is not None):
        budget = 64 if first.dtype == torch.float64 else 128  # with an eps, more than one element a thread spills
    value, _ = _rows.sum_rows(
        _formula_kernel,
        columns,
        (*tensors, _weights_over(weights, first)),  # type: ignore[arg-type]
        parameters,
        row_shape=first.shape[: first.dim() - event_ndims],
        reduction=reduction,
        factor=scale,
        budget=budget,
        FORMULA=formula,
        SPREAD=spread,
    )
    return value


def backward(
    formula: str, grad: Tensor, tensors: Sequence[Tensor], event_ndims: int, needed: int, parameters: Any = None,
    spread: str = "", weights: Tensor | None = None, scale: float = 1.0, reduction: str = "none",
) -> list[Tensor]:  # fmt: skip
    """Gradients of the tensors, empty where their bit of `needed` is not set."""
    first = tensors[0]
    columns = _rows.event_dims(first, event_ndims) if reduction == "none" else _rows.all_dims(first)
    grads = [torch.empty_like(t) if needed >> i & 1 else None for i, t in enumerate(tensors)]
    g, full, rows = _rows.operands(columns, (*tensors, *grads, _weights_over(weights, first)), (grad,))
    count, dtype = len(tensors), _rows.arithmetic(first)
    plan = g.map(1024, dtype)
    if formula in LARGE and parameters is not None:  # with an eps, eight elements a thread spill
        plan = plan._replace(num_warps=2 * plan.num_warps)
    row_count = math.prod(first.shape[: first.dim() - event_ndims])
    _rows.launch(
        _formula_backward_kernel, (plan.programs,), first.device, rows[0], (*full[:count], full[-1]), full[count:-1],
        _rows.scalar(_rows.reduction_factor(scale, row_count, reduction)), parameters, g.shape, plan.counts,
        FORMULA=formula, SPREAD=spread, DATA=needed & 1, DTYPE=dtype, INDEX=g.index, **plan.constants,
    )  # fmt: skip
    return list(_rows.present(grads, first))
