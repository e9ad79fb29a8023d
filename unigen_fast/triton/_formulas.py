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
    load,
    load_rows,
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


def clamp_of(low: float, high: float) -> Any:
    return None if low == -math.inf and high == math.inf else (_rows.scalar(low), _rows.scalar(high))


# ---- log-likelihoods -------------------------------------------------------------------------------------------------


@triton.jit
def _logistic_edges(x, mean, log_scale, bins, DTYPE: tl.constexpr):
    half, low, high = value_of(bins[0], DTYPE), value_of(bins[1], DTYPE), value_of(bins[2], DTYPE)
    inverse = tl.exp(-log_scale)
    distance = x - mean
    a, b = (distance + half) * inverse, (distance - half) * inverse
    return inverse, 2 * half * inverse, a, b, x < low + half, x > high - half


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
def _scaled_log1p(theta, r, product):
    """theta log(1 + r) for r >= 0, given the product theta r too."""
    near = r < 1
    return tl.where(near, theta * log1p_minus(tl.where(near, r, 0.0)) + product, theta * tl.log(1 + r))


@triton.jit
def _log_of_zero(mu, theta, eps):
    """theta log((theta + eps) / (theta + mu + eps)): the logarithm of a count's zero."""
    if eps is None:
        return -_scaled_log1p(theta, mu / theta, mu)
    else:
        theta_eps = theta + value_of(eps, theta.dtype)
        return -_scaled_log1p(theta, mu / theta_eps, mu * (theta / theta_eps))


@triton.jit
def _negative_binomial(x, given_mu, theta, eps):
    mu = given_mu
    if eps is not None:
        mu += value_of(eps, mu.dtype)
    none = x == 0
    total = x + theta
    inverse = 1 / total
    difference = x - mu
    share = theta * inverse
    ratio = (theta + mu) * inverse
    excess = difference * (theta / (theta + mu))
    of_theta = _deviance(theta, ratio, -excess, -difference * inverse)
    of_x = _deviance(x, x / mu * ratio, excess, difference / mu * share)
    some = tl.where(none, 1.0, x)
    rest = _remainder(total) - _remainder(theta) - _remainder(some) - 0.5 * tl.log(some * _2_PI / share)
    value = tl.where(none, 0.0, rest) - (of_theta + tl.where(none, -excess, of_x))
    if eps is not None:
        added = value_of(eps, theta.dtype)
        value = tl.where(none, _log_of_zero(given_mu, theta, eps), value + _scaled_log1p(theta, added / theta, added))
    return value


@triton.jit
def _negative_binomial_slopes(x, given_mu, theta, eps, DATA: tl.constexpr):
    mu, theta_eps = given_mu, theta
    if eps is not None:
        mu += value_of(eps, mu.dtype)
        theta_eps += value_of(eps, mu.dtype)
    none = x == 0
    inverse = 1 / (theta + mu)
    difference = x - mu
    total = x + theta
    of_mu = theta * inverse * tl.where(none, -1.0, difference / mu)
    relative = tl.where(none, -given_mu, difference) * inverse
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
        share = value_of(eps, theta.dtype) / theta_eps
        few = share < 0.5
        of_eps = tl.where(few, -log1p_minus(tl.where(few, -share, 0.0)), tl.log(theta_eps / theta) - share)
        of_theta += tl.where(none, share * relative, of_eps)
    of_x = tl.zeros(x.shape, x.dtype)
    if DATA:
        next = x + 1
        _, far_next, slope_next, below_next = _digamma_parts(next)
        of_x = slope_total - 0.5 * far_total + below_total - (slope_next - 0.5 * far_next + below_next)
        of_x += tl.log(total * inverse * (mu / next))
    return of_x, of_mu, of_theta


# ---- every formula ---------------------------------------------------------------------------------------------------


@triton.jit
def formula_value(x, parameters, FORMULA: tl.constexpr, SPREAD: tl.constexpr, DTYPE: tl.constexpr):
    """One element's share of the row; `x`: its numbers."""
    if FORMULA == "gaussian_log_prob":
        v, _ = logvar_of(x[2], parameters, SPREAD)
        d = x[0] - x[1]
        return -0.5 * (d * d * tl.exp(-v) + v + _LOG_2_PI)
    elif FORMULA == "laplace_log_prob":
        return -(tl.abs(x[0] - x[1]) * tl.exp(-x[2]) + x[2] + _LOG_2)
    elif FORMULA == "discretized_logistic_log_prob":
        _, width, above, below, lowest, highest = _logistic_edges(x[0], x[1], x[2], parameters, DTYPE)
        far = tl.exp(-tl.maximum(width, 0.5))
        far_log = log1p_minus(-tl.minimum(far, 0.5)) - far
        of_width = tl.where(width > _LOG_2, far_log, tl.log(-expm1(-tl.minimum(width, 1.0))))
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
        d, own = x[0] - x[3], x[0] - x[1]
        return 0.5 * (pv - v + d * d * tl.exp(-pv) - own * own * tl.exp(-v))
    elif FORMULA == "gaussian_kl_entropy":
        v, _ = logvar_of(x[1], parameters, SPREAD)
        pv, _ = logvar_of(x[3], parameters, SPREAD)
        d = x[0] - x[2]
        return 0.5 * (pv - v + d * d * tl.exp(-pv) - 1)
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
        far = softplus(b) - log1p_unit(tail) - tl.where(p == 0, 0.0, p * u)
        return tl.where(tl.abs(u) < 1, near, far)


@triton.jit
def formula_slopes(x, parameters, FORMULA: tl.constexpr, SPREAD: tl.constexpr, DATA: tl.constexpr, DTYPE: tl.constexpr):
    """Derivatives of the value in each of its numbers; DATA: whether that in the first one is wanted."""
    if FORMULA == "gaussian_log_prob":
        v, slope = logvar_of(x[2], parameters, SPREAD)
        d = x[0] - x[1]
        scaled = d * tl.exp(-v)
        return -scaled, scaled, 0.5 * (d * scaled - 1) * slope
    elif FORMULA == "laplace_log_prob":
        inverse = tl.exp(-x[2])
        d = x[0] - x[1]
        side = tl.where(d < 0, -inverse, tl.where(d == 0, 0.0, inverse))
        return -side, side, tl.abs(d) * inverse - 1
    elif FORMULA == "discretized_logistic_log_prob":
        inverse, width, a, b, lowest, highest = _logistic_edges(x[0], x[1], x[2], parameters, DTYPE)
        above = tl.where(highest, 0.0, sigmoid(-a))
        below = tl.where(lowest, 0.0, sigmoid(b))
        bound = tl.minimum(width, 80.0, propagate_nan=tl.PropagateNan.ALL)
        of_width = tl.where(lowest | highest, 0.0, bound / expm1(bound))
        return (above - below) * inverse, (below - above) * inverse, b * below - a * above - of_width
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
        d, own = x[0] - x[3], x[0] - x[1]
        scaled, own_scaled = d * tl.exp(-pv), own * tl.exp(-v)
        of_spread = 0.5 * (own * own_scaled - 1) * slope
        return scaled - own_scaled, own_scaled, of_spread, -scaled, 0.5 * (1 - d * scaled) * prior_slope
    elif FORMULA == "gaussian_kl_entropy":
        v, slope = logvar_of(x[1], parameters, SPREAD)
        pv, prior_slope = logvar_of(x[3], parameters, SPREAD)
        d = x[0] - x[2]
        scaled = d * tl.exp(-pv)
        return scaled, -0.5 * slope, -scaled, 0.5 * (1 - d * scaled) * prior_slope
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
    """The formula's numbers: all inputs but the weights, which are the last."""
    a = load(inputs[0], row, col, shape, mask, DTYPE)
    if len(inputs) == 2:
        return (a,)
    else:
        b = load(inputs[1], row, col, shape, mask, DTYPE)
        if len(inputs) == 3:
            return a, b
        else:
            c = load(inputs[2], row, col, shape, mask, DTYPE)
            if len(inputs) == 4:
                return a, b, c
            else:
                d = load(inputs[3], row, col, shape, mask, DTYPE)
                if len(inputs) == 5:
                    return a, b, c, d
                else:
                    return a, b, c, d, load(inputs[4], row, col, shape, mask, DTYPE)


@triton.jit
def _formula_kernel(
    inputs, parameters, close, shape, counts, FORMULA: tl.constexpr, SPREAD: tl.constexpr,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    weights = inputs[len(inputs) - 1]
    row, split, first, last = program(counts, BLOCK_R, INDEX)
    total = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    for start in range(first, last, BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        numbers = _load_all(inputs, row, col, shape, mask, DTYPE)
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
    weights = inputs[len(inputs) - 1]
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    g = load_rows(grad, row, shape, counts, DTYPE) * value_of(factor, DTYPE)
    g = tl.broadcast_to(g[:, None], [BLOCK_R, BLOCK_C])
    if weights is not None:
        g *= load(weights, row, col, shape, mask, DTYPE)
    numbers = _load_all(inputs, row, col, shape, mask, DTYPE)
    slopes = formula_slopes(numbers, parameters, FORMULA, SPREAD, DATA, DTYPE)
    for k in tl.static_range(len(grads)):
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
    wide = formula in LARGE and first.dtype == torch.float64
    value, _ = _rows.sum_rows(
        _formula_kernel,
        columns,
        (*tensors, _weights_over(weights, first)),  # type: ignore[arg-type]
        parameters,
        row_shape=first.shape[: first.dim() - event_ndims],
        reduction=reduction,
        factor=scale,
        budget=64 if wide else 1024,
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
