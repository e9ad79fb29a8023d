"""Triton kernels of whole bounds: the log-weights of an example's samples, their estimator, and its gradients.

The kernel has three phases: it weighs (log_w of every sample, in fp64: its digits are those of the weights), estimates
(the bound, its effective sample size, and the coefficient of every sample in the gradient), and descends (coefficient
times slope for every tensor). Where examples
are many, or small, a program has a whole example and goes through all phases in one launch: what the decoder gave comes
from memory once, the second time out of the cache. Few large examples would leave most of the GPU idle: there a phase
is a launch, for which the samples and the columns of an example are shared among programs, but not for its estimator.

An operand is (pointer, strides of the examples' dimensions, stride of the samples, strides of the columns' dimensions);
the stride of the samples is None where they all share one row. Columns are those of the event or of the latent.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unigen_fast.triton import _rows
from unigen_fast.triton._formulas import LARGE, formula_slopes, formula_value
from unigen_fast.triton._rows import close_total, divide, offsets, value_of
from unigen_fast.triton.importance import (
    add_largest,
    add_powers,
    counts_of,
    power_base,
    power_parameters,
    power_slope,
    power_value,
    weighted,
)
from unigen_fast.triton.likelihood import bernoulli_slope, bernoulli_value

__all__ = ["multi_sample_bound", "multi_sample_bound_backward"]

# ---- device: tiles of an example [samples, columns] ------------------------------------------------------------------


@triton.jit
def _address(operand, at):
    example, sample, col, sizes, col_sizes, _, _ = at
    address = operand[0] + offsets(example, sizes, operand[1]) + offsets(col, col_sizes, operand[3])[None, :]
    if operand[2] is not None:
        address += sample.to(tl.int64)[:, None] * operand[2]
    return address


@triton.jit
def _inside(operand, at):
    """Which elements exist."""
    if operand[2] is None:
        return at[6][None, :]
    else:
        return at[5][:, None] & at[6][None, :]


@triton.jit
def _load(operand, at, DTYPE: tl.constexpr):
    """0 where there is no operand: a standard normal prior."""
    if operand is None:
        return tl.zeros([1, at[2].shape[0]], DTYPE)
    else:
        return tl.load(_address(operand, at), mask=_inside(operand, at), other=0.0).to(DTYPE)


@triton.jit
def _store(operand, at, value):
    tl.store(_address(operand, at), value.to(operand[0].dtype.element_ty), mask=_inside(operand, at))


@triton.jit
def _store_or_add(operand, at, total, value):
    """Stores a tile or, of what the samples share, adds it to their total."""
    if operand[2] is None:
        total += value
    else:
        _store(operand, at, value)
    return total


@triton.jit
def _store_sum(operand, at, total, slot):
    """What the samples share gets the sum over them, in a copy of its own, `slot` numbers from the first one."""
    if operand is not None:
        if operand[2] is None:
            value = tl.sum(total, 0)[None, :].to(operand[0].dtype.element_ty)
            tl.store(_address(operand, at) + slot, value, mask=_inside(operand, at))


@triton.jit
def _numbers(tensors, at, DTYPE: tl.constexpr):
    """x and what the decoder gave for it, as the formulas take them."""
    x, first = _load(tensors[0], at, DTYPE), _load(tensors[1], at, DTYPE)
    if tensors[2] is None:
        return x, first
    else:
        second = _load(tensors[2], at, DTYPE)
        if tensors[3] is None:
            return x, first, second
        else:
            return x, first, second, _load(tensors[3], at, DTYPE)


_LOG_2_PI = tl.constexpr(math.log(2 * math.pi))


@triton.jit
def _density(x, bins, FORMULA: tl.constexpr, DTYPE: tl.constexpr):
    if FORMULA == "bernoulli":
        return bernoulli_value(x[1], x[0])
    elif FORMULA == "unit_gaussian":
        difference = x[0] - x[1]
        return -0.5 * (difference * difference + _LOG_2_PI)
    else:
        return formula_value(x, bins, FORMULA, "logvar", DTYPE)


@triton.jit
def _density_slopes(x, bins, FORMULA: tl.constexpr, DTYPE: tl.constexpr):
    """In what the decoder gave; the first one, in x, is not computed."""
    if FORMULA == "bernoulli":
        return None, bernoulli_slope(x[1], x[0])
    elif FORMULA == "unit_gaussian":
        return None, x[0] - x[1]
    else:
        return formula_slopes(x, bins, FORMULA, "logvar", False, DTYPE)


@triton.jit
def _latents(tensors, at, DTYPE: tl.constexpr):
    """z and the Gaussians' parameters, as the formula of -(log p(z) - log q(z)) takes them."""
    z, mean, logvar = _load(tensors[0], at, DTYPE), _load(tensors[1], at, DTYPE), _load(tensors[2], at, DTYPE)
    return z, mean, logvar, _load(tensors[3], at, DTYPE), _load(tensors[4], at, DTYPE)


# ---- device: the phases ----------------------------------------------------------------------------------------------


@triton.jit
def _weigh(
    event, latent, row, bins, share, sizes, counts,
    FORMULA: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """What the program's columns add to log_w of its samples."""
    example, samples, columns, latents = share
    for start in range(samples[0], samples[1], BLOCK_K):
        sample = start + tl.arange(0, BLOCK_K)
        exists = sample < counts[1]
        density = tl.zeros([BLOCK_K, BLOCK_C], DTYPE)
        for first in range(columns[0], columns[1], BLOCK_C):
            col = first + tl.arange(0, BLOCK_C)
            at = (example, sample, col, sizes[0], sizes[1], exists, col < counts[2])
            value = _density(_numbers(event, at, DTYPE), bins, FORMULA, DTYPE)
            density += tl.where(at[6][None, :], value, 0.0)
        divergence = tl.zeros([BLOCK_K, BLOCK_L], DTYPE)
        for first in range(latents[0], latents[1], BLOCK_L):
            col = first + tl.arange(0, BLOCK_L)
            at = (example, sample, col, sizes[0], sizes[2], exists, col < counts[3])
            value = formula_value(_latents(latent, at, DTYPE), None, "gaussian_kl_monte_carlo", "logvar", DTYPE)
            divergence += tl.where(at[6][None, :], value, 0.0)
        value = tl.sum(density.to(tl.float64), 1) - tl.sum(divergence.to(tl.float64), 1)
        tl.store(row + sample, value, mask=exists)


@triton.jit
def _grouped(row, group, first, length, groups, BLOCK_S: tl.constexpr):
    """(addresses, which exist, numbers of the samples) of a tile [groups, samples of each]."""
    place = first + tl.arange(0, BLOCK_S)
    mask = (group < groups)[:, None] & (place < length)[None, :]
    sample = group.to(tl.int64)[:, None] * length + place[None, :]
    return row + sample, mask, sample


@triton.jit
def _exact(partial, log_w, residual, sample, mask, example, counts, splits):
    """log_w in fp64: out of the shares of the columns or, in the backward pass, out of its two parts."""
    total = tl.zeros(sample.shape, tl.float64)
    if partial is None:
        total += tl.load(log_w[0] + sample * log_w[2], mask=mask, other=0.0).to(tl.float64)
        total += tl.load(residual[0] + sample * residual[2], mask=mask, other=0.0).to(tl.float64)
    else:
        for split in range(0, splits):
            place = (tl.full((), split, tl.int64) * counts[0] + example) * counts[1] + sample
            total += tl.load(partial + place, mask=mask, other=0.0)
    return total


@triton.jit
def _relate(
    partial, log_w, residual, relative, example, parameters, grouping, sizes, counts, splits,
    KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores log_w relative to the one of the largest weight in each group; returns the sum of these over the groups.
    Given the shares of the columns, stores log_w itself too, and what rounding takes from it."""
    groups, length = grouping
    of_rows = offsets(example, sizes[0], log_w[1]), offsets(example, sizes[0], residual[1])
    log_w = (log_w[0] + of_rows[0], None, log_w[2])
    residual = (residual[0] + of_rows[1], None, residual[2])
    shifts = tl.zeros([BLOCK_G], tl.float64)
    for start in range(0, groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        largest = tl.full([BLOCK_G], float("-inf"), tl.float64)
        for first in range(0, length, BLOCK_S):
            _, mask, sample = _grouped(relative, group, first, length, groups, BLOCK_S)
            x = _exact(partial, log_w, residual, sample, mask, example, counts, splits)
            largest, _ = add_largest(largest, largest, (x, x, mask), parameters, KIND)
        _, shift = power_base(largest, parameters, KIND)
        for first in range(0, length, BLOCK_S):
            places, mask, sample = _grouped(relative, group, first, length, groups, BLOCK_S)
            x = _exact(partial, log_w, residual, sample, mask, example, counts, splits)
            tl.store(places, (x - shift[:, None]).to(DTYPE), mask=mask)
            if partial is not None:
                rounded = x.to(DTYPE)
                lost = tl.where(tl.abs(x) < float("inf"), x - rounded.to(tl.float64), 0.0).to(DTYPE)
                tl.store(log_w[0] + sample * log_w[2], rounded, mask=mask)
                tl.store(residual[0] + sample * residual[2], lost, mask=mask)
        shifts += tl.where(group < groups, shift, 0.0)
    return tl.sum(shifts, 0)


@triton.jit
def _estimate(
    relative, rows, given, shift, coefficients, partial, example, parameters, numbers, grouping, sizes, counts,
    KIND: tl.constexpr, STAGE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """`rows`: bound, ess, loss; None in the backward pass, which is `given` the gradients of loss and log_w.
    `shift`: of `_relate`. `numbers`: 1 / groups, the factor of the loss, and those of the count of samples in a group.
    """
    groups, length = grouping
    grad = value_of(numbers[1], DTYPE) * value_of(numbers[0], DTYPE)
    if given is not None:
        grad *= tl.load(given[0][0] + offsets(example, sizes[0], given[0][1])).to(DTYPE)
    bound = tl.zeros([BLOCK_G], DTYPE)
    ess = tl.zeros([BLOCK_G], DTYPE)
    for start in range(0, groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        largest = tl.full([BLOCK_G], float("-inf"), DTYPE)
        for first in range(0, length, BLOCK_S):
            places, mask, _ = _grouped(relative, group, first, length, groups, BLOCK_S)
            x = tl.load(places, mask=mask, other=0.0)
            largest, _ = add_largest(largest, largest, (x, x, mask), parameters, KIND)
        extreme, base = power_base(largest, parameters, KIND)
        total = tl.zeros([BLOCK_G], DTYPE)
        mean = tl.zeros([BLOCK_G], DTYPE)
        excess = tl.zeros([BLOCK_G], DTYPE)
        squares = tl.zeros([BLOCK_G], DTYPE)
        for first in range(0, length, BLOCK_S):
            places, mask, _ = _grouped(relative, group, first, length, groups, BLOCK_S)
            x = tl.load(places, mask=mask, other=0.0)
            total, mean, excess, squares = add_powers(total, mean, excess, squares, x, mask, base, parameters, KIND)
        value, total = power_value(extreme, base, total, mean, excess, parameters, numbers[2], KIND)
        empty = total == 0
        effective = tl.where(empty, 0.0, divide(total * total, tl.where(empty, 1.0, squares)))
        bound += tl.where(group < groups, value, 0.0)
        ess += tl.where(group < groups, effective, 0.0)
        if coefficients is not None:
            g = tl.zeros([BLOCK_G], DTYPE) + grad
            for first in range(0, length, BLOCK_S):
                places, mask, sample = _grouped(relative, group, first, length, groups, BLOCK_S)
                x = tl.load(places, mask=mask, other=0.0)
                slope = power_slope(x, g, base, total, parameters, numbers[2], KIND)
                if given is not None:
                    own = given[1][0] + offsets(example, sizes[0], given[1][1]) + sample * given[1][2]
                    slope += tl.load(own, mask=mask, other=0.0)
                tl.store(coefficients + (example.to(tl.int64) * counts[1] + sample), slope, mask=mask)
    if rows is not None:
        value = ((tl.sum(bound, 0).to(tl.float64) + shift) * value_of(numbers[0], tl.float64)).to(DTYPE)
        tl.store(rows[0][0] + offsets(example, sizes[0], rows[0][1]), value)
        effective = tl.sum(ess, 0) * value_of(numbers[0], DTYPE)
        tl.store(rows[1][0] + offsets(example, sizes[0], rows[1][1]), effective)
        if STAGE == "rows":
            loss = value * value_of(numbers[1], DTYPE)
            tl.store(rows[2][0] + offsets(example, sizes[0], rows[2][1]), loss)
        else:
            close_total(tl.full([1], 0.0, DTYPE) + value, partial, rows[2], numbers[1], STAGE, DTYPE)


@triton.jit
def _descend(
    event, latent, grads, slots, coefficients, bins, share, sizes, counts,
    FORMULA: tl.constexpr, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """`slots`: of the program's sums over its samples, in the event and in the latent."""
    example, samples, columns, latents = share
    weights = coefficients + example.to(tl.int64) * counts[1]
    if grads[0] is not None:
        first_grad, second_grad, third_grad = grads[0]
        for first in range(columns[0], columns[1], BLOCK_C):
            col = first + tl.arange(0, BLOCK_C)
            exists = col < counts[2]
            second_sum = tl.zeros([BLOCK_K, BLOCK_C], DTYPE)
            third_sum = tl.zeros([BLOCK_K, BLOCK_C], DTYPE)
            for start in range(samples[0], samples[1], BLOCK_K):
                sample = start + tl.arange(0, BLOCK_K)
                at = (example, sample, col, sizes[0], sizes[1], sample < counts[1], exists)
                w = tl.load(weights + sample, mask=sample < counts[1], other=0.0)[:, None]
                slopes = _density_slopes(_numbers(event, at, DTYPE), bins, FORMULA, DTYPE)
                if first_grad is not None:
                    _store(first_grad, at, weighted(slopes[1], w))
                if second_grad is not None:
                    second_sum = _store_or_add(second_grad, at, second_sum, weighted(slopes[2], w))
                if third_grad is not None:
                    third_sum = _store_or_add(third_grad, at, third_sum, weighted(slopes[3], w))
            at = (example, None, col, sizes[0], sizes[1], None, exists)
            _store_sum(second_grad, at, second_sum, slots[0])
            _store_sum(third_grad, at, third_sum, slots[0])
    if grads[1] is not None:
        z_grad, mean_grad, logvar_grad, prior_mean_grad, prior_logvar_grad = grads[1]
        for first in range(latents[0], latents[1], BLOCK_L):
            col = first + tl.arange(0, BLOCK_L)
            exists = col < counts[3]
            of_mean = tl.zeros([BLOCK_K, BLOCK_L], DTYPE)
            of_logvar = tl.zeros([BLOCK_K, BLOCK_L], DTYPE)
            of_prior_mean = tl.zeros([BLOCK_K, BLOCK_L], DTYPE)
            of_prior_logvar = tl.zeros([BLOCK_K, BLOCK_L], DTYPE)
            for start in range(samples[0], samples[1], BLOCK_K):
                sample = start + tl.arange(0, BLOCK_K)
                at = (example, sample, col, sizes[0], sizes[2], sample < counts[1], exists)
                w = -tl.load(weights + sample, mask=sample < counts[1], other=0.0)[:, None]
                numbers = _latents(latent, at, DTYPE)
                slopes = formula_slopes(numbers, None, "gaussian_kl_monte_carlo", "logvar", True, DTYPE)
                if z_grad is not None:
                    _store(z_grad, at, weighted(slopes[0], w))
                of_mean += weighted(slopes[1], w)
                of_logvar += weighted(slopes[2], w)
                of_prior_mean += weighted(slopes[3], w)
                of_prior_logvar += weighted(slopes[4], w)
            at = (example, None, col, sizes[0], sizes[2], None, exists)
            _store_sum(mean_grad, at, of_mean, slots[1])
            _store_sum(logvar_grad, at, of_logvar, slots[1])
            _store_sum(prior_mean_grad, at, of_prior_mean, slots[1])
            _store_sum(prior_logvar_grad, at, of_prior_logvar, slots[1])


@triton.jit
def _bound_kernel(
    event, latent, log_weights, rows, given, grads, partials, coefficients, bins, parameters, numbers, grouping, spans,
    splits, sizes, counts, FORMULA: tl.constexpr, KIND: tl.constexpr, STAGE: tl.constexpr,
    WEIGH: tl.constexpr, ESTIMATE: tl.constexpr, DESCEND: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """`sizes`: of the examples', the event's and the latent's dimensions; `counts`: examples, samples, columns of the
    event, of the latent; `spans`: shares of the samples, shares of the columns, and how many of the three a share has;
    `splits`: shares of the columns that log_w is the sum of."""
    pid = tl.program_id(0).to(INDEX)
    column_share = pid % spans[1]
    sample_share = pid // spans[1] % spans[0]
    example = pid // spans[1] // spans[0]
    samples = (sample_share * spans[2], tl.minimum((sample_share + 1) * spans[2], counts[1]))
    columns = (column_share * spans[3], tl.minimum((column_share + 1) * spans[3], counts[2]))
    latents = (column_share * spans[4], tl.minimum((column_share + 1) * spans[4], counts[3]))
    share = (example, samples, columns, latents)
    if WEIGH:
        row = partials[0] + (column_share.to(tl.int64) * counts[0] + example) * counts[1]
        _weigh(event, latent, row, bins, share, sizes, counts, FORMULA, DTYPE, BLOCK_K, BLOCK_C, BLOCK_L)
    if WEIGH and ESTIMATE:
        tl.debug_barrier()  # a number may be read by another thread than the one that wrote it
    if ESTIMATE:
        log_w, residual, relative = log_weights
        relative += example.to(tl.int64) * counts[1]
        shift = _relate(
            partials[0], log_w, residual, relative, example, parameters, grouping, sizes, counts, splits,
            KIND, DTYPE, BLOCK_G, BLOCK_S,
        )  # fmt: skip
        tl.debug_barrier()
        _estimate(
            relative, rows, given, shift, coefficients, partials[1], example, parameters, numbers, grouping, sizes,
            counts, KIND, STAGE, DTYPE, BLOCK_G, BLOCK_S,
        )  # fmt: skip
    if ESTIMATE and DESCEND:
        tl.debug_barrier()
    if DESCEND:
        slots = (
            (example.to(tl.int64) * spans[0] + sample_share) * counts[2],
            sample_share.to(tl.int64) * counts[0] * counts[3],
        )
        _descend(
            event, latent, grads, slots, coefficients, bins, share, sizes, counts,
            FORMULA, DTYPE, BLOCK_K, BLOCK_C, BLOCK_L,
        )  # fmt: skip


# ---- host ------------------------------------------------------------------------------------------------------------

WHOLE = 32  # tiles that one program takes before its example is shared


class _Plan(NamedTuple):
    """`spans` of the kernel, of one share each where an example is one program's."""

    spans: tuple[int, int, int, int, int]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _plan(examples: int, samples: int, groups: int, cols: int, latents: int, formula: str, dtype: Any) -> _Plan:
    many_registers = formula in LARGE or formula == "discretized_logistic_log_prob"
    elements = 2 if many_registers else 4 if dtype == tl.float64 else 8  # a thread's: more would spill
    tile = 256 * elements
    wide, deep = _rows.power_of_2(cols), _rows.power_of_2(latents)
    block_k = min(_rows.power_of_2(samples), tile // min(max(wide, deep), 128))
    block_c, block_l = min(wide, tile // block_k), min(deep, max(tile // block_k // 2, 1))
    log_weights = 256 if dtype == tl.float64 else 512  # of which sums are taken in fp64
    block_s = min(_rows.power_of_2(samples // groups), log_weights)
    block_g = min(_rows.power_of_2(groups), log_weights // block_s)
    blocks = max(_rows.ceil_div(samples, block_k), 1)
    steps = max(_rows.ceil_div(cols, block_c), _rows.ceil_div(latents, block_l), 1)
    shared = examples < _rows.PROGRAMS // 8 and blocks * steps > WHOLE
    shares = _rows.PROGRAMS // max(examples, 1) if shared else 1
    of_samples = _rows.ceil_div(blocks, min(blocks, shares))
    sample_shares = _rows.ceil_div(blocks, of_samples)
    of_columns = _rows.ceil_div(steps, min(steps, shares // sample_shares))
    column_shares = _rows.ceil_div(steps, of_columns)
    spans = (sample_shares, column_shares, of_samples * block_k, of_columns * block_c, of_columns * block_l)
    warps = max(block_k * max(block_c, block_l) // (32 * elements), block_g * block_s // 256, 1)
    blocks_of = {"BLOCK_K": block_k, "BLOCK_C": block_c, "BLOCK_L": block_l, "BLOCK_G": block_g, "BLOCK_S": block_s}
    # an upper limit that is none: without one ptxas spills around the calls of its division
    registers = {} if torch.version.hip else {"maxnreg": 255}
    return _Plan(spans, {**blocks_of, "num_warps": warps, **registers})


def _strides(item: Any, columns: int, rows: int, dim: int) -> tuple[tuple[int, ...], int | None, tuple[int, ...]]:
    """(of the examples, of the samples, of the columns); the rows may lack the samples, or all be one."""
    strides = item.stride() if isinstance(item, Tensor) else item[1]
    lead, own = strides[: len(strides) - columns], strides[len(strides) - columns :]
    if len(lead) == rows:
        return lead[:dim] + lead[dim + 1 :], lead[dim], own
    return lead or (0,) * (rows - 1), None, own


def _operands(sides: Sequence[tuple[Sequence[Any], tuple[int, ...]]], rows: tuple[int, ...], dim: int) -> Any:
    """(operands of each side, sizes of the examples' dimensions and of the columns' of each side, index dtype). A side:
    tensors, or (tensor, strides) pairs, or None, and the shape of their columns."""
    found = [[None if t is None else _strides(t, len(shape), len(rows), dim) for t in items] for items, shape in sides]
    of_examples = _rows.geometry(rows[:dim] + rows[dim + 1 :], (), tuple(f[0] for side in found for f in side if f))
    leads = iter(of_examples.strides)
    geometries = [of_examples]
    packed = []
    for (items, shape), side in zip(sides, found, strict=True):
        g = _rows.geometry(shape, tuple(range(len(shape))), tuple(f[2] for f in side if f))
        own = iter(g.strides)
        geometries.append(g)
        packed.append(
            tuple(
                f and (t if isinstance(t, Tensor) else t[0], next(leads)[0], f[1], next(own)[1])
                for t, f in zip(items, side, strict=True)
            )
        )
    sizes = (of_examples.row_sizes, *(g.col_sizes for g in geometries[1:]))
    return packed, sizes, max((g.index for g in geometries), key=lambda index: index.primitive_bitwidth)


def _run(
    tensors: Sequence[Tensor | None], log_w: Tensor, residual: Tensor, results: Sequence[Tensor],
    given: Sequence[Tensor], wanted: int, dim: int, event_ndims: int, likelihood: str, bins: Sequence[float],
    groups: int, power: float, elbo_weight: float, scale: float, reduction: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Fills log_w, its residual and the `results` bound, ess and loss; or, `given` gradients of loss and log_w, reads
    these two. Returns gradients of the differentiable tensors, empty where they are not wanted."""
    decoder, *others, x, z, mean, logvar, prior_mean, prior_logvar = tensors
    rows = tuple(log_w.shape)
    event, latent = (decoder, *others), (z, mean, logvar, prior_mean, prior_logvar)
    event_shape, latent_shape = tuple(decoder.shape[len(rows) :]), tuple(z.shape[len(rows) :])
    examples = math.prod(rows[:dim] + rows[dim + 1 :])
    samples, cols, latents = rows[dim], math.prod(event_shape), math.prod(latent_shape)
    formula = likelihood if likelihood == "bernoulli" else f"{likelihood}_log_prob"
    if likelihood == "gaussian" and others[0] is None:
        formula = "unit_gaussian"
    dtype = _rows.arithmetic(decoder)
    plan = _plan(examples, samples, groups, cols, latents, formula, dtype)
    sample_shares, column_shares = plan.spans[:2]

    grads = [None if t is None or not wanted >> i & 1 else torch.empty_like(t) for i, t in enumerate((*event, *latent))]
    targets: list[Any] = list(grads)
    sums: list[tuple[Tensor, Tensor]] = []
    for i, grad in enumerate(grads):
        of_all_rows = 0 < i < 3 and grad is not None and grad.dim() == event_ndims
        if of_all_rows or (i > 3 and grad is not None and sample_shares > 1):
            partial = log_w.new_empty((examples * sample_shares if of_all_rows else sample_shares, *grad.shape))
            targets[i] = (partial, partial.stride()[1:])
            sums.append((grad, partial))
    sides = (
        ((x, *event, *targets[:3]), event_shape),
        ((*latent, *targets[3:]), latent_shape),
        ((log_w, residual, *results, *given), ()),
    )
    (of_event, of_latent, of_rows), sizes, index = _operands(sides, rows, dim)
    of_grads = (
        of_event[4:] if any(t is not None for t in of_event[4:]) else None,
        of_latent[5:] if any(t is not None for t in of_latent[5:]) else None,
    )
    descends = of_grads != (None, None)
    kind, parameters = power_parameters(power, elbo_weight)
    factor = _rows.scalar(_rows.reduction_factor(scale, examples, reduction))
    stage = "rows" if reduction == "none" else "total" if examples == 1 else "programs"
    shares = log_w.new_empty((examples,), dtype=torch.float64) if results and stage == "programs" else None
    splits = log_w.new_empty((column_shares, examples, samples), dtype=torch.float64) if results else None
    coefficients = log_w.new_empty((examples, samples)) if descends else None
    log_weights = (*of_rows[:2], log_w.new_empty((examples, samples)))
    common: dict[str, Any] = {"DTYPE": dtype, "INDEX": index}

    def launch(programs: int, spans: Any, weigh: bool, estimate: bool, descend: bool) -> None:
        """Arguments that none of the phases takes are None: less to compile."""
        data = (of_event[:4], of_latent[:5], tuple(map(_rows.scalar, bins)) or None, formula)
        event, latent, options, name = data if weigh or descend else (None, None, None, "")
        kept, incoming = (of_rows[2:] if tensors else None for tensors in (results, given))
        estimator = (log_weights, kept, incoming, parameters, kind)
        weights, kept, incoming, powers, power_kind = estimator if estimate else (None, None, None, None, "")
        _rows.launch(
            _bound_kernel, (programs,), decoder.device, event, latent, weights, kept, incoming,
            of_grads if descend else (None, None), (splits, shares), coefficients, options, powers,
            (_rows.scalar(1 / groups), factor, counts_of(samples // groups)), (groups, samples // groups), spans,
            column_shares, sizes, (examples, samples, cols, latents), FORMULA=name, KIND=power_kind, STAGE=stage,
            WEIGH=weigh, ESTIMATE=estimate, DESCEND=descend, **common, **plan.constants,
        )  # fmt: skip

    if sample_shares * column_shares == 1:
        launch(examples, plan.spans, bool(results), True, descends)
    else:
        programs = examples * sample_shares * column_shares
        if results:
            launch(programs, plan.spans, True, False, False)
        launch(examples, (1, 1, *plan.spans[2:]), False, True, False)
        if descends:
            launch(programs, plan.spans, False, False, True)
    if shares is not None:
        _rows.finish_total(shares, results[2], factor, common)
    for grad, partial in sums:
        grad.copy_(partial.sum(0))
    return _rows.present(grads, decoder)


def multi_sample_bound(*args: Any) -> tuple[Tensor, ...]:
    tensors, options, wanted = args[:9], args[9:-1], args[-1]
    decoder, (dim, event_ndims, *_), reduction = tensors[0], options, options[-1]
    rows = decoder.shape[: decoder.dim() - event_ndims]
    examples = rows[:dim] + rows[dim + 1 :]
    dtype = _rows.result_dtype(decoder)
    log_w, residual = (decoder.new_empty(rows, dtype=dtype) for _ in range(2))
    shapes = (examples, examples, examples if reduction == "none" else ())
    bound, ess, loss = (decoder.new_empty(shape, dtype=dtype) for shape in shapes)
    grads = _run(tensors, log_w, residual, (bound, ess, loss), (), wanted, *options)
    return loss, log_w, bound, ess, residual, *grads


def multi_sample_bound_backward(*args: Any) -> tuple[Tensor, ...]:
    given, tensors, parts, options, needed = args[:2], args[2:11], args[11:13], args[13:-2], args[-1]
    return _run(tensors, *parts, (), given, needed, *options)
