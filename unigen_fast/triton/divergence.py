"""Triton kernels of the Gaussian divergences and of reparameterised samples."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unigen_fast.triton import _formulas, _rows
from unigen_fast.triton._formulas import chain, clamp_of, logvar_of
from unigen_fast.triton._rows import (
    close_rows,
    columns_at,
    exp_minus_1_minus,
    expm1,
    finite_exp,
    load,
    load_rows,
    program,
    store,
    tile_of,
    tile_offsets,
    value_of,
    weighted,
)
from unigen_fast.triton.philox import normal_at, normal_of_blocks

__all__ = [
    "bernoulli_kl",
    "bernoulli_kl_backward",
    "gaussian_kl",
    "gaussian_kl_backward",
    "gaussian_kl_monte_carlo",
    "gaussian_kl_monte_carlo_backward",
    "sample_gaussian",
    "sample_gaussian_backward",
    "sample_gaussian_with_kl",
    "sample_gaussian_with_kl_backward",
]


# ---- gaussian_kl -----------------------------------------------------------------------------------------------------


@triton.jit
def gaussian_kl_value(d, v, pv):
    """Of the difference of the means and of the log-variances; the prior's None: 0."""
    t = d
    if pv is not None:
        v -= pv
        t = d * finite_exp(-0.5 * pv)
    return 0.5 * (exp_minus_1_minus(v) + t * t)


@triton.jit
def gaussian_kl_slopes(d, v, pv):
    """In the mean (in the prior's, minus that), in the log-variance, and in the prior's."""
    t, scaled = d, d  # (m - m_p) / s_p, (m - m_p) / s_p²
    if pv is not None:
        v -= pv
        rate = finite_exp(-0.5 * pv)
        t = d * rate
        scaled = t * rate
    by_logvar = expm1(v)
    return scaled, 0.5 * by_logvar, -0.5 * (by_logvar + t * t)


@triton.jit
def _kl_kernel(
    inputs, parameters, close, shape, counts, SPREAD: tl.constexpr,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    mean, spread, prior_mean, prior_spread = inputs
    clamp, free_bits = parameters
    row, split, first, last = program(counts, BLOCK_R, INDEX)
    total = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    for start in range(first, last, BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        d = load(mean, row, col, shape, mask, DTYPE)
        v, _ = logvar_of(load(spread, row, col, shape, mask, DTYPE), clamp, SPREAD)
        if prior_mean is not None:
            d -= load(prior_mean, row, col, shape, mask, DTYPE)
        pv = None
        if prior_spread is not None:
            pv, _ = logvar_of(load(prior_spread, row, col, shape, mask, DTYPE), clamp, SPREAD)
        term = gaussian_kl_value(d, v, pv)
        if free_bits is not None:
            least = value_of(free_bits, DTYPE)
            term = tl.where(term < least, least, term)
        total += tl.where(mask, term, 0.0)
    close_rows(tl.sum(total, 1), row, split, close, shape, counts, STAGE, DTYPE)


@triton.jit
def _kl_backward_kernel(
    row_inputs, inputs, grads, factor, clamp, free_bits, free_rows, shape, counts, SPREAD: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    grad, weights, rows = row_inputs
    mean, spread, prior_mean, prior_spread = inputs
    grad_mean, grad_spread, grad_prior_mean, grad_prior_spread = grads
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    g = load_rows(grad, row, shape, counts, DTYPE) * value_of(factor, DTYPE)
    if weights is not None:
        g *= load_rows(weights, row, shape, counts, DTYPE)
    if free_rows is not None:
        g = tl.where(load_rows(rows, row, shape, counts, DTYPE) >= value_of(free_rows, DTYPE), g, 0.0)
    g = tl.broadcast_to(g[:, None], [BLOCK_R, BLOCK_C])

    d = load(mean, row, col, shape, mask, DTYPE)
    v, slope = logvar_of(load(spread, row, col, shape, mask, DTYPE), clamp, SPREAD)
    if prior_mean is not None:
        d -= load(prior_mean, row, col, shape, mask, DTYPE)
    pv = None
    if prior_spread is not None:
        pv, prior_slope = logvar_of(load(prior_spread, row, col, shape, mask, DTYPE), clamp, SPREAD)
    if free_bits is not None:
        g = tl.where(gaussian_kl_value(d, v, pv) < value_of(free_bits, DTYPE), 0.0, g)  # that of NaN stays

    of_mean, of_logvar, of_prior_logvar = gaussian_kl_slopes(d, v, pv)
    if grad_mean is not None:
        store(grad_mean, row, col, shape, mask, weighted(of_mean, g))
    if grad_prior_mean is not None:
        store(grad_prior_mean, row, col, shape, mask, weighted(-of_mean, g))
    if grad_spread is not None:
        store(grad_spread, row, col, shape, mask, tl.where(g == 0, 0.0, chain(g * of_logvar, slope)))
    if grad_prior_spread is not None:
        store(grad_prior_spread, row, col, shape, mask, tl.where(g == 0, 0.0, chain(g * of_prior_logvar, prior_slope)))


def gaussian_kl(
    mean: Tensor, logvar: Tensor, prior_mean: Tensor | None, prior_logvar: Tensor | None, weights: Tensor | None,
    event_ndims: int, spread: str, free_bits: float, free_bits_mode: str, clamp_min: float, clamp_max: float,
    scale: float, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    free_rows = free_bits > 0 and free_bits_mode == "sum"
    free_dims = free_bits > 0 and free_bits_mode == "per_dim"
    by_rows = free_rows or weights is not None
    whole = reduction != "none" and not by_rows  # the rows' own sums do not matter
    return _rows.sum_rows(
        _kl_kernel,
        _rows.all_dims(mean) if whole else _rows.event_dims(mean, event_ndims),
        (mean, logvar, prior_mean, prior_logvar),
        (clamp_of(clamp_min, clamp_max), _rows.scalar(free_bits) if free_dims else None),
        row_shape=mean.shape[: mean.dim() - event_ndims],
        reduction=reduction,
        factor=scale,
        weights=weights,
        keep=by_rows,
        floor=free_bits if free_rows else None,
        SPREAD=spread,
    )


def gaussian_kl_backward(
    grad: Tensor, mean: Tensor, logvar: Tensor, prior_mean: Tensor | None, prior_logvar: Tensor | None,
    weights: Tensor | None, rows: Tensor, event_ndims: int, spread: str, free_bits: float, free_bits_mode: str,
    clamp_min: float, clamp_max: float, scale: float, reduction: str, needed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (mean, logvar, prior_mean, prior_logvar)
    grads = [torch.empty_like(t) if t is not None and needed >> i & 1 else None for i, t in enumerate(inputs)]
    free_rows = free_bits > 0 and free_bits_mode == "sum"
    free_dims = free_bits > 0 and free_bits_mode == "per_dim"
    whole = grad.dim() == 0 and weights is None and not free_rows
    g, full, per_row = _rows.operands(
        _rows.all_dims(mean) if whole else _rows.event_dims(mean, event_ndims),
        (*inputs, *grads),
        (grad, weights, rows if free_rows else None),
    )
    dtype = _rows.arithmetic(mean)
    plan = g.map(1024, dtype)
    row_count = math.prod(mean.shape[: mean.dim() - event_ndims])
    bits = _rows.scalar(free_bits)
    _rows.launch(
        _kl_backward_kernel, (plan.programs,), mean.device, per_row, full[:4], full[4:],
        _rows.scalar(_rows.reduction_factor(scale, row_count, reduction)), clamp_of(clamp_min, clamp_max),
        bits if free_dims else None, bits if free_rows else None, g.shape, plan.counts,
        SPREAD=spread, DTYPE=dtype, INDEX=g.index, **plan.constants,
    )  # fmt: skip
    return _rows.present(grads, mean)


# ---- formulas --------------------------------------------------------------------------------------------------------


def gaussian_kl_monte_carlo(
    z: Tensor, mean: Tensor | None, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor, weights: Tensor | None,
    event_ndims: int, spread: str, clamp_min: float, clamp_max: float, scale: float, reduction: str,
) -> Tensor:  # fmt: skip
    formula = "gaussian_kl_entropy" if mean is None else "gaussian_kl_monte_carlo"
    tensors = [t for t in (z, mean, logvar, prior_mean, prior_logvar) if t is not None]
    clamp = clamp_of(clamp_min, clamp_max)
    return _formulas.forward(formula, tensors, event_ndims, clamp, spread, weights, scale, reduction)


def gaussian_kl_monte_carlo_backward(
    grad: Tensor, z: Tensor, mean: Tensor | None, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor,
    weights: Tensor | None, event_ndims: int, spread: str, clamp_min: float, clamp_max: float, scale: float,
    reduction: str, needed: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    formula = "gaussian_kl_entropy" if mean is None else "gaussian_kl_monte_carlo"
    tensors = [t for t in (z, mean, logvar, prior_mean, prior_logvar) if t is not None]
    if mean is None:
        needed = needed & 1 | needed >> 2 << 1
    clamp = clamp_of(clamp_min, clamp_max)
    grads = _formulas.backward(formula, grad, tensors, event_ndims, needed, clamp, spread, weights, scale, reduction)
    if mean is None:
        grads.insert(1, z.new_empty((0,)))
    return tuple(grads)


def bernoulli_kl(
    logits_q: Tensor, logits_p: Tensor | None, weights: Tensor | None, event_ndims: int, scale: float, reduction: str
) -> Tensor:
    tensors = [logits_q] if logits_p is None else [logits_q, logits_p]
    return _formulas.forward("bernoulli_kl", tensors, event_ndims, None, "", weights, scale, reduction)


def bernoulli_kl_backward(
    grad: Tensor, logits_q: Tensor, logits_p: Tensor | None, weights: Tensor | None, event_ndims: int, scale: float,
    reduction: str, needed: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    tensors = [logits_q] if logits_p is None else [logits_q, logits_p]
    options = (event_ndims, needed, None, "", weights, scale, reduction)
    grads = _formulas.backward("bernoulli_kl", grad, tensors, *options)
    return (*grads, *(logits_q.new_empty((0,)) for _ in range(2 - len(grads))))


# ---- samples ---------------------------------------------------------------------------------------------------------


@triton.jit
def _std(value, logvar, slope, clamp, SPREAD: tl.constexpr):
    """(standard deviation, its slope in what the network gave)."""
    if SPREAD == "std" and clamp is None:
        return value, tl.full(value.shape, 1.0, value.dtype)
    else:
        std = tl.exp(0.5 * logvar)
        return std, chain(0.5 * std, slope)


@triton.jit
def _noise(
    z, shift, row, start, shape, rng_state, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Noise of the tile from column `start` on: z is contiguous, so an element's offset in it is its number. `ALIGNED`:
    four neighbouring columns are one Philox block."""
    if ALIGNED:
        col = start + 4 * tl.arange(0, BLOCK_C // 4)
        return normal_of_blocks((tile_offsets(z, row, col, shape) + shift) >> 2, rng_state, DTYPE)
    else:
        col = start + tl.arange(0, BLOCK_C)
        return normal_at(tile_offsets(z, row, col, shape) + shift, rng_state, DTYPE)


@triton.jit
def _sample_kernel(
    inputs, parameters, close, shape, counts, SPREAD: tl.constexpr, ALIGNED: tl.constexpr, KL: tl.constexpr,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The second grid axis shares the samples; `parameters`: rng_state, clamp, (samples, their stride in z)."""
    mean, spread, z = inputs
    rng_state, clamp, samples = parameters
    row, split, first, last = program(counts, BLOCK_R, INDEX)
    total = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    for start in range(first, last, BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        m = load(mean, row, col, shape, mask, DTYPE)
        value = load(spread, row, col, shape, mask, DTYPE)
        v, slope = logvar_of(value, clamp, SPREAD)
        std, _ = _std(value, v, slope, clamp, SPREAD)
        if KL:
            total += tl.where(mask, 0.5 * (exp_minus_1_minus(v) + m * m), 0.0)
        for sample in range(tl.program_id(1), samples[0], tl.num_programs(1)):
            shift = tl.full((), sample, tl.int64) * samples[1]
            noise = _noise(z, shift, row, start, shape, rng_state, ALIGNED, DTYPE, BLOCK_C)
            address = z[0] + (tile_offsets(z, row, col, shape) + shift)
            tl.store(address, (m + std * noise).to(z[0].dtype.element_ty), mask=mask)
    if KL:
        if tl.program_id(1) == 0:
            close_rows(tl.sum(total, 1), row, split, close, shape, counts, STAGE, DTYPE)


@triton.jit
def _sample_backward_kernel(
    grad_z, grad_kl, z, mean, spread, grad_mean, grad_spread, rng_state, clamp, samples, shape, counts,
    SPREAD: tl.constexpr, ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`samples`: how many, their stride in z, their stride in grad_z. `z` gives strides only."""
    row, _, first, _ = program(counts, BLOCK_R, INDEX)
    col, mask = columns_at(first, row, counts, BLOCK_C)
    by_mean = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    by_std = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    address = grad_z[0] + tile_offsets(grad_z, row, col, shape)
    for sample in range(0, samples[0]):
        number = tl.full((), sample, tl.int64)
        g = tl.load(address + number * samples[2], mask=mask, other=0.0).to(DTYPE)
        by_mean += g
        if grad_spread is not None:
            by_std += g * _noise(z, number * samples[1], row, first, shape, rng_state, ALIGNED, DTYPE, BLOCK_C)
    if grad_kl is not None:
        k = load_rows(grad_kl, row, shape, counts, DTYPE)[:, None]
    if grad_mean is not None:
        if grad_kl is not None:
            by_mean += weighted(load(mean, row, col, shape, mask, DTYPE), k)
        store(grad_mean, row, col, shape, mask, by_mean)
    if grad_spread is not None:
        value = load(spread, row, col, shape, mask, DTYPE)
        v, slope = logvar_of(value, clamp, SPREAD)
        _, std_slope = _std(value, v, slope, clamp, SPREAD)
        result = tl.where(by_std == 0, 0.0, chain(by_std, std_slope))
        if grad_kl is not None:
            result += tl.where(k == 0, 0.0, chain(0.5 * k * expm1(v), slope))
        store(grad_spread, row, col, shape, mask, result)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps))


def _z_shape(mean: Tensor, num_samples: int, sample_dim: int) -> tuple[int, ...]:
    if num_samples < 0:
        return tuple(mean.shape)
    sample_dim %= mean.dim() + 1
    return (*mean.shape[:sample_dim], num_samples, *mean.shape[sample_dim:])


def _without(strides: tuple[int, ...], num_samples: int, sample_dim: int) -> tuple[tuple[int, ...], int]:
    """(strides of one sample, stride of the samples)."""
    if num_samples < 0:
        return strides, 0
    sample_dim %= len(strides)
    return strides[:sample_dim] + strides[sample_dim + 1 :], strides[sample_dim]


def _is_aligned(g: _rows.Geometry, z: Any, samples: int, stride: int) -> bool:
    """Whether every four neighbouring columns, counted from 0, are one Philox block of z."""
    _, row_strides, col_strides = z
    if g.cols < 4 or col_strides[-1] != 1:
        return False
    others = [*(row_strides if g.rows > 1 else ()), *col_strides[:-1], *((stride,) if samples > 1 else ())]
    return not others or (g.col_sizes[-1] % 4 == 0 and all(s % 4 == 0 for s in others))


def _one_block_a_thread(plan: _rows.Plan) -> _rows.Plan:
    """Philox is long: 4 elements a thread, and fewer registers."""
    return plan._replace(num_warps=min(2 * plan.num_warps, 16))


def _sample(
    mean: Tensor, logvar: Tensor, rng_state: Tensor, num_samples: int, sample_dim: int, spread: str,
    clamp_min: float, clamp_max: float, event_ndims: int | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`event_ndims` None: no KL."""
    z = mean.new_empty(_z_shape(mean, num_samples, sample_dim))
    kl = None
    if event_ndims is not None:
        kl = mean.new_empty(mean.shape[: mean.dim() - event_ndims], dtype=_rows.result_dtype(mean))
    if z.numel() == 0:  # nothing to draw, but perhaps rows
        if kl is not None:
            kl = gaussian_kl(
                mean, logvar, None, None, None, event_ndims, spread, 0.0, "sum", clamp_min, clamp_max, 1.0, "none"
            )[0]
        return z, kl
    strides, stride = _without(z.stride(), num_samples, sample_dim)
    samples = abs(num_samples)
    columns = _rows.all_dims(mean) if kl is None else _rows.event_dims(mean, event_ndims)
    g, full, rows = _rows.operands(columns, (mean, logvar, (z, strides)), (kl,))
    dtype = _rows.arithmetic(mean)
    plan = _one_block_a_thread(g.map(1024, dtype) if kl is None else g.reduction(1024, dtype))
    stage, last = _rows.stages(plan, "none") if kl is not None else ("rows", "rows")
    partial = _rows.partials(mean, stage, g.rows, plan)
    close = (None, None, rows[0], _rows.scalar(1.0), None)
    common = {"DTYPE": dtype, "INDEX": g.index}
    sharing = max(min(samples, _rows.PROGRAMS // plan.programs), 1)
    parameters = (rng_state.contiguous(), clamp_of(clamp_min, clamp_max), (samples, stride))
    _rows.launch(
        _sample_kernel, (plan.programs, sharing), mean.device, full, parameters, (partial, *close), g.shape,
        plan.counts,
        SPREAD=spread, ALIGNED=_is_aligned(g, full[2], samples, stride), KL=kl is not None, STAGE=stage,
        **common, **plan.constants,
    )  # fmt: skip
    if partial is not None:
        _rows.finish_rows(partial, close, g.shape, (g.rows, plan.splits), last, common)
    return z, kl


def _sample_backward(
    grad_z: Tensor, grad_kl: Tensor | None, mean: Tensor, logvar: Tensor, rng_state: Tensor, num_samples: int,
    sample_dim: int, spread: str, clamp_min: float, clamp_max: float, event_ndims: int, needed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grads = [torch.empty_like(t) if needed >> i & 1 else None for i, t in enumerate((mean, logvar))]
    samples = abs(num_samples)
    one_of_grad, grad_stride = _without(grad_z.stride(), num_samples, sample_dim)
    one_of_z, stride = _without(_contiguous_strides(grad_z.shape), num_samples, sample_dim)
    columns = _rows.all_dims(mean) if grad_kl is None else _rows.event_dims(mean, event_ndims)
    full = ((grad_z, one_of_grad), (grad_z, one_of_z), mean, logvar, *grads)
    g, full, rows = _rows.operands(columns, full, (grad_kl,))
    dtype = _rows.arithmetic(mean)
    plan = _one_block_a_thread(g.map(1024, dtype))
    _rows.launch(
        _sample_backward_kernel, (plan.programs,), mean.device, full[0], rows[0], *full[1:], rng_state.contiguous(),
        clamp_of(clamp_min, clamp_max), (samples, stride, grad_stride), g.shape, plan.counts,
        SPREAD=spread, ALIGNED=_is_aligned(g, full[1], samples, stride), DTYPE=dtype, INDEX=g.index,
        **plan.constants,
    )  # fmt: skip
    return _rows.present(grads, mean)


def sample_gaussian(
    mean: Tensor, logvar: Tensor, rng_state: Tensor, num_samples: int, sample_dim: int, spread: str,
    clamp_min: float, clamp_max: float,
) -> Tensor:  # fmt: skip
    return _sample(mean, logvar, rng_state, num_samples, sample_dim, spread, clamp_min, clamp_max, None)[0]


def sample_gaussian_backward(
    grad: Tensor, mean: Tensor, logvar: Tensor, rng_state: Tensor, num_samples: int, sample_dim: int, spread: str,
    clamp_min: float, clamp_max: float, needed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = (num_samples, sample_dim, spread, clamp_min, clamp_max, 0)
    return _sample_backward(grad, None, mean, logvar, rng_state, *options, needed)


def sample_gaussian_with_kl(
    mean: Tensor, logvar: Tensor, rng_state: Tensor, num_samples: int, sample_dim: int, event_ndims: int, spread: str,
    clamp_min: float, clamp_max: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return _sample(mean, logvar, rng_state, num_samples, sample_dim, spread, clamp_min, clamp_max, event_ndims)


def sample_gaussian_with_kl_backward(
    grad_z: Tensor, grad_kl: Tensor, mean: Tensor, logvar: Tensor, rng_state: Tensor, num_samples: int,
    sample_dim: int, event_ndims: int, spread: str, clamp_min: float, clamp_max: float, needed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = (num_samples, sample_dim, spread, clamp_min, clamp_max, event_ndims)
    return _sample_backward(grad_z, grad_kl, mean, logvar, rng_state, *options, needed)
