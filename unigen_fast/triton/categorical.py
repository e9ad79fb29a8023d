"""Triton kernels of categorical distributions and of the discretized logistic mixture.

Rows are sites, columns the classes (or components) of each: whole rows in a tile, or several passes over a long one.
The sites' values are then summed over the event by a second, small kernel.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unigen_fast.triton import _rows
from unigen_fast.triton._rows import (
    close_rows,
    columns_at,
    divide,
    exp_minus_1_minus,
    expm1,
    load,
    load_rows,
    log1p_unit,
    program,
    sigmoid,
    store,
    store_rows,
    value_of,
    weighted,
)

__all__ = [
    "balanced_categorical_kl",
    "balanced_categorical_kl_backward",
    "categorical_kl",
    "categorical_kl_backward",
    "categorical_log_prob",
    "categorical_log_prob_backward",
    "discretized_logistic_mixture_log_prob",
    "discretized_logistic_mixture_log_prob_backward",
]

# ---- sums over the event ---------------------------------------------------------------------------------------------


@triton.jit
def _sum_kernel(
    inputs, parameters, close, shape, counts,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, split, first, last = program(counts, BLOCK_R, INDEX)
    total = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    for start in range(first, last, BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        total += load(inputs[0], row, col, shape, mask, DTYPE)
    close_rows(tl.sum(total, 1), row, split, close, shape, counts, STAGE, DTYPE)


def _sum_sites(sites: Tensor, event_ndims: int, **options: Any) -> tuple[Tensor, Tensor]:
    columns = _rows.event_dims(sites, event_ndims)
    row_shape = sites.shape[: sites.dim() - event_ndims]
    return _rows.sum_rows(_sum_kernel, columns, (sites,), row_shape=row_shape, **options)


def _site_shape(x: Tensor, class_dim: int) -> tuple[int, ...]:
    return tuple(size for d, size in enumerate(x.shape) if d != class_dim)


def _whole(g: _rows.Geometry, dtype: Any, budget: int = 1024) -> _rows.Plan:
    """Whole rows in one tile, or as many columns of one row at a time as a tile has."""
    plan = g.whole_rows(budget, dtype)
    if plan is None:
        block_c = 2 * budget if dtype != tl.float64 else budget
        plan = _rows.Plan(g.rows, (g.rows, g.cols, 1, g.cols), 1, block_c, 8)
    return plan


# ---- KL --------------------------------------------------------------------------------------------------------------


# sums and maxima over the loops are kept by tile: Triton's thread-locality pass fails on a reduction in each turn


@triton.jit
def _maximum_of(x, row, shape, counts, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    highest = tl.full([BLOCK_R, BLOCK_C], float("-inf"), DTYPE)
    for start in range(0, counts[1], BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        highest = tl.maximum(highest, load(x, row, col, shape, mask, DTYPE, float("-inf")))
    return tl.max(highest, 1)


@triton.jit
def _softmax_of(x, row, shape, counts, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(maximum, sum of exponentials) of each row."""
    total = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    highest = _maximum_of(x, row, shape, counts, DTYPE, BLOCK_R, BLOCK_C)
    for start in range(0, counts[1], BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        value = load(x, row, col, shape, mask, DTYPE, float("-inf"))
        total += tl.where(mask, tl.exp(value - highest[:, None]), 0.0)
    return highest, tl.sum(total, 1)


@triton.jit
def _kl_classes(logits_q, logits_p, of_q, of_p, unimix, row, col, mask, shape, counts, DTYPE: tl.constexpr):
    """Of each class: softmax of q and of p, q / p (with unimix), log(q / p), q log(q / p) - q + p."""
    a = load(logits_q, row, col, shape, mask, DTYPE)
    sigma_q = divide(tl.exp(a - of_q[0][:, None]), tl.broadcast_to(of_q[1][:, None], a.shape))
    count = tl.full((), counts[1], DTYPE)
    if logits_p is not None:
        b = load(logits_p, row, col, shape, mask, DTYPE)
        sigma_p = divide(tl.exp(b - of_p[0][:, None]), tl.broadcast_to(of_p[1][:, None], b.shape))
    else:
        sigma_p = tl.zeros(a.shape, DTYPE) + 1 / count
    q = sigma_q
    p = sigma_p
    ratio = sigma_q
    if unimix is not None:
        keep, floor = value_of(unimix[0], DTYPE), value_of(unimix[1], DTYPE)
        q = sigma_q * keep + floor
        if logits_p is not None:
            p = sigma_p * keep + floor
        ratio = divide(q, p)
        d = tl.log(ratio)
    else:
        if logits_p is not None:
            # csrc/formulas/categorical.h, LogitBases
            together = tl.abs(of_q[0] - of_p[0]) < 8
            base_q, base_p = tl.where(together, 0.0, of_q[0]), tl.where(together, 0.0, of_p[0])
            shift = ((of_q[0] - base_q) - (of_p[0] - base_p)) + (tl.log(of_q[1]) - tl.log(of_p[1]))
            d = ((a - base_q[:, None]) - (b - base_p[:, None])) - shift[:, None]
        else:
            d = (a - of_q[0][:, None]) - (tl.log(of_q[1]) - tl.log(count))[:, None]
    near = q * exp_minus_1_minus(-d)
    term = tl.where(q == 0, p, tl.where(tl.abs(d) < 0.5, near, q * d - (q - p)))
    return sigma_q, sigma_p, ratio, d, tl.where(mask, term, 0.0)


@triton.jit
def _kl_of_rows(
    logits_q, logits_p, of_q, of_p, unimix, row, shape, counts,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(KL, mean of log(q / p) under q's softmax, mean of q / p under p's)."""
    kl = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    mean_d = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    mean_ratio = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    for start in range(0, counts[1], BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        q, p, ratio, d, term = _kl_classes(
            logits_q, logits_p, of_q, of_p, unimix, row, col, mask, shape, counts, DTYPE
        )  # fmt: skip
        kl += term
        mean_d += tl.where(mask & (q != 0), q * d, 0.0)
        mean_ratio += tl.where(mask, p * ratio, 0.0)
    return tl.sum(kl, 1), tl.sum(mean_d, 1), tl.sum(mean_ratio, 1)


@triton.jit
def _kl_sites_kernel(
    logits_q, logits_p, out, unimix, floor, shape, counts,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    of_q = _softmax_of(logits_q, row, shape, counts, DTYPE, BLOCK_R, BLOCK_C)
    of_p = of_q
    if logits_p is not None:
        of_p = _softmax_of(logits_p, row, shape, counts, DTYPE, BLOCK_R, BLOCK_C)
    kl, _, _ = _kl_of_rows(logits_q, logits_p, of_q, of_p, unimix, row, shape, counts, DTYPE, BLOCK_R, BLOCK_C)
    if floor is not None:
        least = value_of(floor, DTYPE)
        kl = tl.where(kl < least, least, kl)  # keeps a NaN
    store_rows(out, row, shape, counts, kl)


@triton.jit
def _kl_backward_kernel(
    logits_q, logits_p, grads, row_inputs, unimix, floors, factors, shape, counts,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`factors`: of the common gradient on q's side and on p's, and of all."""
    grad_q, grad_p = grads
    grad, own_q, own_p, weights, rows = row_inputs
    row = tl.program_id(0).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    of_q = _softmax_of(logits_q, row, shape, counts, DTYPE, BLOCK_R, BLOCK_C)
    of_p = of_q
    if logits_p is not None:
        of_p = _softmax_of(logits_p, row, shape, counts, DTYPE, BLOCK_R, BLOCK_C)
    kl, mean_d, mean_ratio = _kl_of_rows(
        logits_q, logits_p, of_q, of_p, unimix, row, shape, counts, DTYPE, BLOCK_R, BLOCK_C
    )  # fmt: skip
    share = tl.zeros([BLOCK_R], DTYPE) + value_of(factors[2], DTYPE)
    if weights is not None:
        share *= load_rows(weights, row, shape, counts, DTYPE)
    if floors[0] is not None:
        share = tl.where(kl < value_of(floors[0], DTYPE), 0.0, share)
    if floors[1] is not None:
        share = tl.where(load_rows(rows, row, shape, counts, DTYPE) < value_of(floors[1], DTYPE), 0.0, share)
    common = load_rows(grad, row, shape, counts, DTYPE)
    by_q = common * value_of(factors[0], DTYPE)
    by_p = common * value_of(factors[1], DTYPE)
    if own_q is not None:
        by_q += load_rows(own_q, row, shape, counts, DTYPE)
    if own_p is not None:
        by_p += load_rows(own_p, row, shape, counts, DTYPE)
    by_q = weighted(by_q, share)[:, None]
    by_p = weighted(by_p, share)[:, None]
    for start in range(0, counts[1], BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        q, p, ratio, d, _ = _kl_classes(
            logits_q, logits_p, of_q, of_p, unimix, row, col, mask, shape, counts, DTYPE
        )  # fmt: skip
        if grad_q is not None:
            store(grad_q, row, col, shape, mask, weighted(weighted(d - mean_d[:, None], q), by_q))
        if grad_p is not None:
            if unimix is not None:
                store(grad_p, row, col, shape, mask, weighted(p * (mean_ratio[:, None] - ratio), by_p))
            else:
                store(grad_p, row, col, shape, mask, weighted(p - q, by_p))


def _unimix(unimix: float, classes: int) -> Any:
    return None if unimix == 0 or classes == 0 else (_rows.scalar(1 - unimix), _rows.scalar(unimix / classes))


def _kl_sites(q: Tensor, p: Tensor | None, class_dim: int, unimix: float, floor: float | None) -> Tensor:
    out = q.new_empty(_site_shape(q, class_dim), dtype=_rows.result_dtype(q))
    g, full, rows = _rows.operands((class_dim,), (q, p), (out,))
    dtype = _rows.arithmetic(q)
    plan = _whole(g, dtype)
    _rows.launch(
        _kl_sites_kernel, (_rows.ceil_div(g.rows, plan.block_r),), q.device, *full, rows[0],
        _unimix(unimix, q.size(class_dim)), None if floor is None else _rows.scalar(floor), g.shape, plan.counts,
        DTYPE=dtype, INDEX=g.index, **plan.constants,
    )  # fmt: skip
    return out


def _of_sites(row_tensor: Tensor | None, sites: tuple[int, ...], event_ndims: int) -> Tensor | None:
    """A tensor of the rows, for each of their sites."""
    if row_tensor is None or row_tensor.dim() == 0:
        return row_tensor
    return row_tensor.reshape(*row_tensor.shape, *(1,) * event_ndims).expand(sites)


def _kl_gradients(
    q: Tensor, p: Tensor | None, class_dim: int, event_ndims: int, unimix: float, needed: int,
    row_tensors: tuple[Tensor | None, ...], floors: tuple[float | None, float | None],
    factors: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`row_tensors`: grad, those of each side alone, weights, rows."""
    grads = [torch.empty_like(t) if t is not None and needed >> i & 1 else None for i, t in enumerate((q, p))]
    sites = _site_shape(q, class_dim)
    given = [_of_sites(t, sites, event_ndims) for t in row_tensors]
    g, full, rows = _rows.operands((class_dim,), (q, p, *grads), given)
    dtype = _rows.arithmetic(q)
    plan = _whole(g, dtype)
    least = tuple(None if floor is None else _rows.scalar(floor) for floor in floors)
    if q.size(class_dim):
        _rows.launch(
            _kl_backward_kernel, (_rows.ceil_div(g.rows, plan.block_r),), q.device, *full[:2], full[2:], rows,
            _unimix(unimix, q.size(class_dim)), least, tuple(map(_rows.scalar, factors)), g.shape, plan.counts,
            DTYPE=dtype, INDEX=g.index, **plan.constants,
        )  # fmt: skip
    return _rows.present(grads, q)


def categorical_kl(
    logits_q: Tensor, logits_p: Tensor | None, weights: Tensor | None, class_dim: int, event_ndims: int,
    unimix: float, scale: float, reduction: str,
) -> Tensor:  # fmt: skip
    sites = _kl_sites(logits_q, logits_p, class_dim, unimix, None)
    return _sum_sites(sites, event_ndims, reduction=reduction, factor=scale, weights=weights)[0]


def categorical_kl_backward(
    grad: Tensor, logits_q: Tensor, logits_p: Tensor | None, weights: Tensor | None, class_dim: int, event_ndims: int,
    unimix: float, scale: float, reduction: str, needed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = math.prod(_site_shape(logits_q, class_dim)[: logits_q.dim() - 1 - event_ndims])
    factor = _rows.reduction_factor(scale, rows, reduction) * (1 - unimix)
    return _kl_gradients(
        logits_q, logits_p, class_dim, event_ndims, unimix, needed, (grad, None, None, weights, None), (None, None),
        (1.0, 1.0, factor),
    )  # fmt: skip


def balanced_categorical_kl(
    posterior_logits: Tensor, prior_logits: Tensor, event_ndims: int, free_nats: float, free_nats_mode: str,
    unimix: float, dynamics_scale: float, representation_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_site = free_nats > 0 and free_nats_mode == "per_variable"
    of_row = free_nats > 0 and free_nats_mode == "sum"
    class_dim = posterior_logits.dim() - 1
    sites = _kl_sites(posterior_logits, prior_logits, class_dim, unimix, free_nats if of_site else None)
    floor = free_nats if of_row else None
    dynamics, rows = _sum_sites(sites, event_ndims, reduction="mean", keep=of_row, floor=floor)
    # the two are one number: only their gradients differ
    return dynamics * (dynamics_scale + representation_scale), dynamics, dynamics.clone(), rows


def balanced_categorical_kl_backward(
    grad_loss: Tensor, grad_dynamics: Tensor, grad_representation: Tensor, posterior_logits: Tensor,
    prior_logits: Tensor, rows: Tensor, event_ndims: int, free_nats: float, free_nats_mode: str, unimix: float,
    dynamics_scale: float, representation_scale: float, needed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    of_site = free_nats > 0 and free_nats_mode == "per_variable"
    of_row = free_nats > 0 and free_nats_mode == "sum"
    count = math.prod(posterior_logits.shape[: posterior_logits.dim() - 1 - event_ndims])
    return _kl_gradients(
        posterior_logits, prior_logits, posterior_logits.dim() - 1, event_ndims, unimix, needed,
        (grad_loss, grad_representation, grad_dynamics, None, rows if of_row else None),
        (free_nats if of_site else None, free_nats if of_row else None),
        (representation_scale, dynamics_scale, _rows.reduction_factor(1.0, count, "mean") * (1 - unimix)),
    )  # fmt: skip


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@triton.jit
def _load_classes(x, ignore_index, row, shape, counts):
    """int64 classes of the rows, -1 for those that do not exist; and which rows' are not ignored."""
    address = x[0] + _rows.offsets(row, shape[0], x[1])
    chosen = tl.load(address, mask=row < counts[0], other=0)
    return tl.where((chosen >= 0) & (chosen < counts[1]), chosen, -1), chosen != ignore_index


@triton.jit
def _chosen(
    logits, x, ignore_index, row, shape, counts, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """(class, whether it counts, maximum, its logit above that, sum of the others' exponentials): nothing cancels where
    p is near 1."""
    chosen, counted = _load_classes(x, ignore_index, row, shape, counts)
    above = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    others = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    highest = _maximum_of(logits, row, shape, counts, DTYPE, BLOCK_R, BLOCK_C)
    for start in range(0, counts[1], BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        value = load(logits, row, col, shape, mask, DTYPE) - highest[:, None]
        others += tl.where(mask & (col[None, :] != chosen[:, None]), tl.exp(value), 0.0)
        above += tl.where(mask & (col[None, :] == chosen[:, None]), value, 0.0)
    return chosen, counted, highest, tl.where(chosen < 0, float("nan"), tl.sum(above, 1)), tl.sum(others, 1)


@triton.jit
def _log1p(x):
    """For x >= 0, of any size."""
    u = 1 + x
    return tl.where(x < 1, log1p_unit(tl.where(x < 1, x, 0.0)), tl.log(u))


@triton.jit
def _log_prob_kernel(
    logits, x, out, ignore_index, shape, counts,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    _, counted, _, above, others = _chosen(logits, x, ignore_index, row, shape, counts, DTYPE, BLOCK_R, BLOCK_C)
    store_rows(out, row, shape, counts, tl.where(counted, above - _log1p(others + (tl.exp(above) - 1)), 0.0))


@triton.jit
def _log_prob_backward_kernel(
    logits, grad_logits, x, grad, ignore_index, shape, counts,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    chosen, counted, highest, above, others = _chosen(
        logits, x, ignore_index, row, shape, counts, DTYPE, BLOCK_R, BLOCK_C
    )  # fmt: skip
    g = tl.where(counted, load_rows(grad, row, shape, counts, DTYPE), 0.0)
    share = tl.where(g == 0, 0.0, divide(g, others + tl.exp(above)))
    for start in range(0, counts[1], BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        e = tl.exp(load(logits, row, col, shape, mask, DTYPE) - highest[:, None])
        slope = tl.where(col[None, :] == chosen[:, None], others[:, None], -e)
        store(grad_logits, row, col, shape, mask, weighted(slope, share[:, None]))


def categorical_log_prob(logits: Tensor, x: Tensor, class_dim: int, event_ndims: int, ignore_index: int) -> Tensor:
    out = logits.new_empty(x.shape, dtype=_rows.result_dtype(logits))
    g, full, rows = _rows.operands((class_dim,), (logits,), (x, out))
    dtype = _rows.arithmetic(logits)
    plan = _whole(g, dtype)
    _rows.launch(
        _log_prob_kernel, (_rows.ceil_div(g.rows, plan.block_r),), x.device, *full, *rows, ignore_index, g.shape,
        plan.counts, DTYPE=dtype, INDEX=g.index, **plan.constants,
    )  # fmt: skip
    return _sum_sites(out, event_ndims)[0]


def categorical_log_prob_backward(
    grad: Tensor, logits: Tensor, x: Tensor, class_dim: int, event_ndims: int, ignore_index: int
) -> Tensor:
    result = torch.empty_like(logits)
    g, full, rows = _rows.operands((class_dim,), (logits, result), (x, _of_sites(grad, tuple(x.shape), event_ndims)))
    dtype = _rows.arithmetic(logits)
    plan = _whole(g, dtype)
    plan = plan._replace(num_warps=min(2 * plan.num_warps, 16))  # else 16-bit logits spill
    if logits.size(class_dim):
        _rows.launch(
            _log_prob_backward_kernel, (_rows.ceil_div(g.rows, plan.block_r),), x.device, *full, *rows, ignore_index,
            g.shape, plan.counts, DTYPE=dtype, INDEX=g.index, **plan.constants,
        )  # fmt: skip
    return result


# ---- the discretized logistic mixture --------------------------------------------------------------------------------

_HALF_BIN = tl.constexpr(1 / 255)
_LOG_BIN = tl.constexpr(math.log(2 / 255))


@triton.jit
def _tanh(x):
    """(tanh x, its slope)."""
    tail = tl.exp(-2 * tl.abs(x))
    minus = -expm1(-2 * tl.abs(x))
    return divide(tl.where(x < 0, -minus, minus), 1 + tail), divide(4 * tail, (1 + tail) * (1 + tail))


@triton.jit
def _logistic(x, centered, log_scale):
    """(log mass of the bin of x, its derivatives in `centered` and the log-scale), as csrc/formulas/categorical.h."""
    below, above, clamped = x < -0.999, x > 0.999, log_scale < -7.0
    log_scale = tl.where(clamped, -7.0, log_scale)
    inverse = tl.exp(-log_scale)
    half = tl.full((), _HALF_BIN, x.dtype)
    upper, lower = inverse * (centered + half), inverse * (centered - half)
    log_upper = -(tl.where(-upper > 0, -upper, tl.where(upper >= 0, 0.0, upper)) + log1p_unit(tl.exp(-tl.abs(upper))))
    log_lower = -(tl.where(lower > 0, lower, tl.where(lower <= 0, 0.0, lower)) + log1p_unit(tl.exp(-tl.abs(lower))))
    width = 2 * half * inverse
    mass = -expm1(-width)
    narrow = width < 1e-4
    of_narrow = tl.full((), _LOG_BIN, x.dtype) - log_scale - 0.5 * width
    inside = tl.where(narrow, of_narrow, tl.log(tl.where(narrow, 1.0, mass)))
    value = tl.where(above, 0.0, log_upper) + tl.where(below, 0.0, log_lower) + tl.where(above | below, 0.0, inside)
    of_up = tl.where(above, 0.0, sigmoid(-upper))
    of_low = tl.where(below, 0.0, sigmoid(lower))
    by_width = tl.where(narrow, 1 - 0.5 * width, divide(width * (1 - mass), tl.where(narrow, 1.0, mass)))
    of_width = tl.where(above | below, 0.0, by_width)
    return value, inverse * (of_up - of_low), tl.where(clamped, 0.0, lower * of_low - upper * of_up - of_width)


@triton.jit
def _number(numbers, row, m, k, shape, mask, mixtures, DTYPE: tl.constexpr):
    return tl.load(_number_at(numbers, row, m, k, shape, mixtures), mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _number_at(numbers, row, m, k, shape, mixtures):
    """Addresses of number k of components m: `k` -1 is the logit."""
    step = ((k + 1) * mixtures + m).to(tl.int64) * numbers[2]
    return numbers[0] + _rows.offsets(row, shape[0], numbers[1])[:, None] + step[None, :]


@triton.jit
def _channel(x, c, row, shape, counts, DTYPE: tl.constexpr):
    address = x[0] + _rows.offsets(row, shape[0], x[1]) + tl.full((), c, tl.int64) * x[2]
    return tl.load(address, mask=row < counts[0], other=0.0).to(DTYPE)[:, None]


@triton.jit
def _component_value(numbers, x, row, m, mask, shape, counts, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    """log of the component's mass, without its weight."""
    n = counts[1]
    x0 = _channel(x, 0, row, shape, counts, DTYPE)
    value, _, _ = _logistic(
        x0, x0 - _number(numbers, row, m, 0, shape, mask, n, DTYPE), _number(numbers, row, m, 1, shape, mask, n, DTYPE)
    )
    if CHANNELS == 3:
        x1 = _channel(x, 1, row, shape, counts, DTYPE)
        x2 = _channel(x, 2, row, shape, counts, DTYPE)
        t0, _ = _tanh(_number(numbers, row, m, 2, shape, mask, n, DTYPE))
        t1, _ = _tanh(_number(numbers, row, m, 5, shape, mask, n, DTYPE))
        t2, _ = _tanh(_number(numbers, row, m, 8, shape, mask, n, DTYPE))
        mean1 = _number(numbers, row, m, 3, shape, mask, n, DTYPE) + t0 * x0
        mean2 = _number(numbers, row, m, 6, shape, mask, n, DTYPE) + (t1 * x0 + t2 * x1)
        green, _, _ = _logistic(x1, x1 - mean1, _number(numbers, row, m, 4, shape, mask, n, DTYPE))
        blue, _, _ = _logistic(x2, x2 - mean2, _number(numbers, row, m, 7, shape, mask, n, DTYPE))
        value += green + blue
    return value


@triton.jit
def _mixture(numbers, x, row, shape, counts, CHANNELS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(components, which exist, logits, joint log-weights, maximum and sum of exponentials of either)."""
    m = tl.arange(0, BLOCK_M)
    mask = (row < counts[0])[:, None] & (m < counts[1])[None, :]
    logits = _number(numbers, row, m, -1, shape, mask, counts[1], DTYPE)
    joint = logits + _component_value(numbers, x, row, m, mask, shape, counts, CHANNELS, DTYPE)
    logits = tl.where(mask, logits, float("-inf"))
    joint = tl.where(mask, joint, float("-inf"))
    max_logit, max_joint = tl.max(logits, 1), _rows.finite_base(tl.max(joint, 1))
    prior = tl.sum(tl.where(mask, tl.exp(logits - max_logit[:, None]), 0.0), 1)
    total = tl.sum(tl.where(mask, tl.exp(joint - max_joint[:, None]), 0.0), 1)
    return m, mask, logits, joint, max_logit, max_joint, prior, total


@triton.jit
def _mixture_kernel(
    numbers, x, out, shape, counts, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    _, _, _, _, max_logit, max_joint, prior, total = _mixture(numbers, x, row, shape, counts, CHANNELS, DTYPE, BLOCK_M)
    store_rows(out, row, shape, counts, (max_joint - max_logit) + (tl.log(total) - tl.log(prior)))


@triton.jit
def _mixture_backward_kernel(
    numbers, x, grad_params, grad_x, grad, shape, counts, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    m, mask, logits, joint, max_logit, max_joint, prior, total = _mixture(
        numbers, x, row, shape, counts, CHANNELS, DTYPE, BLOCK_M
    )  # fmt: skip
    n = counts[1]
    g = tl.where(total == 0, 0.0, load_rows(grad, row, shape, counts, DTYPE))[:, None]  # impossible: no gradient
    share = divide(g * tl.exp(joint - max_joint[:, None]), tl.broadcast_to(total[:, None], joint.shape))
    share = tl.where(mask & (g != 0), share, 0.0)
    if grad_params is not None:
        of_prior = divide(g * tl.exp(logits - max_logit[:, None]), tl.broadcast_to(prior[:, None], logits.shape))
        _store_number(grad_params, row, m, -1, shape, mask, n, tl.where(g == 0, 0.0, share - of_prior))
    x0 = _channel(x, 0, row, shape, counts, DTYPE)
    _, slope, by_scale = _logistic(
        x0, x0 - _number(numbers, row, m, 0, shape, mask, n, DTYPE), _number(numbers, row, m, 1, shape, mask, n, DTYPE)
    )
    by_mean = -weighted(slope, share)
    by_x0 = -by_mean
    if grad_params is not None:
        _store_number(grad_params, row, m, 0, shape, mask, n, by_mean)
        _store_number(grad_params, row, m, 1, shape, mask, n, weighted(by_scale, share))
    if CHANNELS == 3:
        x1 = _channel(x, 1, row, shape, counts, DTYPE)
        x2 = _channel(x, 2, row, shape, counts, DTYPE)
        t0, slope0 = _tanh(_number(numbers, row, m, 2, shape, mask, n, DTYPE))
        t1, slope1 = _tanh(_number(numbers, row, m, 5, shape, mask, n, DTYPE))
        t2, slope2 = _tanh(_number(numbers, row, m, 8, shape, mask, n, DTYPE))
        mean1 = _number(numbers, row, m, 3, shape, mask, n, DTYPE) + t0 * x0
        mean2 = _number(numbers, row, m, 6, shape, mask, n, DTYPE) + (t1 * x0 + t2 * x1)
        _, slope, by_scale = _logistic(x1, x1 - mean1, _number(numbers, row, m, 4, shape, mask, n, DTYPE))
        by_mean = -weighted(slope, share)
        by_x0 += weighted(t0, by_mean)
        by_x1 = -by_mean
        if grad_params is not None:
            _store_number(grad_params, row, m, 2, shape, mask, n, weighted(x0 * slope0, by_mean))
            _store_number(grad_params, row, m, 3, shape, mask, n, by_mean)
            _store_number(grad_params, row, m, 4, shape, mask, n, weighted(by_scale, share))
        _, slope, by_scale = _logistic(x2, x2 - mean2, _number(numbers, row, m, 7, shape, mask, n, DTYPE))
        by_mean = -weighted(slope, share)
        by_x0 += weighted(t1, by_mean)
        by_x1 += weighted(t2, by_mean)
        if grad_params is not None:
            _store_number(grad_params, row, m, 5, shape, mask, n, weighted(x0 * slope1, by_mean))
            _store_number(grad_params, row, m, 6, shape, mask, n, by_mean)
            _store_number(grad_params, row, m, 7, shape, mask, n, weighted(by_scale, share))
            _store_number(grad_params, row, m, 8, shape, mask, n, weighted(x1 * slope2, by_mean))
        if grad_x is not None:
            _store_channel(grad_x, 1, row, shape, counts, tl.sum(by_x1, 1))
            _store_channel(grad_x, 2, row, shape, counts, tl.sum(-by_mean, 1))
    if grad_x is not None:
        _store_channel(grad_x, 0, row, shape, counts, tl.sum(by_x0, 1))


@triton.jit
def _store_number(numbers, row, m, k, shape, mask, mixtures, value):
    tl.store(_number_at(numbers, row, m, k, shape, mixtures), value.to(numbers[0].dtype.element_ty), mask=mask)


@triton.jit
def _store_channel(x, c, row, shape, counts, value):
    address = x[0] + _rows.offsets(row, shape[0], x[1]) + tl.full((), c, tl.int64) * x[2]
    tl.store(address, value.to(x[0].dtype.element_ty), mask=row < counts[0])


def _mixture_launch(kernel: Any, like: Tensor, channels: int, full: tuple[Any, ...], per_row: tuple[Any, ...]) -> None:
    """`full`: tensors with a dimension more than the sites, the last; `per_row`: tensors of the sites."""
    sites = like.shape[:-1]
    mixtures = like.size(-1) // (10 if channels == 3 else 3)
    strides = [None if t is None else (t, t.stride()[:-1]) for t in full]
    dense = torch.empty(0, device=like.device).new_empty(()).expand(sites)
    g, packed, rows = _rows.operands((), (dense, *strides), per_row)
    operands = [None if t is None else (*p[:2], t.stride(-1)) for t, p in zip(full, packed[1:], strict=True)]
    dtype = _rows.arithmetic(like)
    block_m = _rows.power_of_2(mixtures)
    block_r = max(min(_rows.power_of_2(g.rows), (256 if dtype == tl.float64 else 512) // block_m), 1)
    _rows.launch(
        kernel, (_rows.ceil_div(g.rows, block_r),), like.device, *operands, *rows, g.shape, (g.rows, mixtures),
        CHANNELS=channels, BLOCK_M=block_m, DTYPE=dtype, INDEX=g.index, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip


def discretized_logistic_mixture_log_prob(params: Tensor, x: Tensor, event_ndims: int) -> Tensor:
    out = params.new_empty(params.shape[:-1], dtype=_rows.result_dtype(params))
    _mixture_launch(_mixture_kernel, params, x.size(-1), (params, x), (out,))
    return _sum_sites(out, event_ndims)[0]


def discretized_logistic_mixture_log_prob_backward(
    grad: Tensor, params: Tensor, x: Tensor, event_ndims: int, needed: int
) -> tuple[Tensor, Tensor]:
    grads = [torch.empty_like(t) if needed >> i & 1 else None for i, t in enumerate((params, x))]
    of_sites = _of_sites(grad, tuple(params.shape[:-1]), event_ndims)
    _mixture_launch(_mixture_backward_kernel, params, x.size(-1), (params, x, *grads), (of_sites,))
    return _rows.present(grads, params)
