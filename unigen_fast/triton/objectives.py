"""Triton kernels of whole bounds: of what the decoder gave, the loss and its gradients.

The kernel of the evidence lower bound, of one sample, goes over memory once: the coefficient of every row in the
gradient is known before the row is read. A program has a tile of rows, all of their columns or a share of them.

The kernel of several samples has three phases: it weighs (log_w of every sample, in fp64: its digits are those of the
weights), estimates (the bound, its effective sample size, and the coefficient of every sample in the gradient), and
descends (coefficient times slope for every tensor). Where examples are many, or small, a program has a whole example
and goes through all phases in one launch: what the decoder gave comes from memory once, the second time out of the
cache. Few large examples would leave most of the GPU idle: there a phase is a launch, for which the samples and the
columns of an example are shared among programs, but not for its estimator.

An operand is (pointer, strides of the examples' dimensions, of the columns' and of the samples'); the last are left out
where the samples all share one row. Columns are those of the event or of the latent. To the evidence lower bound all
rows are samples of a single example. Triton 3.6 cannot ask whether a tuple with a None in it is None, or how long it
is: a kernel is told in flags which gradients are wanted.
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
from unigen_fast.triton._rows import close_total, divide, load_splits, offsets, value_of, weighted
from unigen_fast.triton.divergence import gaussian_kl_slopes, gaussian_kl_value
from unigen_fast.triton.importance import (
    add_largest,
    add_powers,
    counts_of,
    power_base,
    power_parameters,
    power_slope,
    power_value,
)
from unigen_fast.triton.likelihood import bernoulli_slope, bernoulli_value

__all__ = ["elbo_loss", "elbo_loss_backward", "multi_sample_bound", "multi_sample_bound_backward"]

# ---- device: tiles of an example [samples, columns] ------------------------------------------------------------------


@triton.jit
def _address(operand, at):
    example, sample, col, sizes, col_sizes, _, _ = at
    address = operand[0] + offsets(example, sizes[0], operand[1]) + offsets(col, col_sizes, operand[2])[None, :]
    if len(operand) == 4:
        address += offsets(sample, sizes[1], operand[3])[:, None]
    return address


@triton.jit
def _inside(operand, at):
    """Which elements exist."""
    if len(operand) == 3:
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
    if len(operand) == 3:
        total += value
    else:
        _store(operand, at, value)
    return total


@triton.jit
def _store_sum(operand, at, total, slot):
    """What the samples share gets the sum over them, in a copy of its own, `slot` numbers from the first one."""
    if operand is not None:
        if len(operand) == 3:
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
    """In x, which nothing takes, and in what the decoder gave."""
    if FORMULA == "bernoulli":
        return x[1], bernoulli_slope(x[1], x[0])
    elif FORMULA == "unit_gaussian":
        return x[1] - x[0], x[0] - x[1]
    else:
        return formula_slopes(x, bins, FORMULA, "logvar", False, DTYPE)


@triton.jit
def _latents(tensors, at, DTYPE: tl.constexpr):
    """z and the Gaussians' parameters, as the formula of -(log p(z) - log q(z)) takes them."""
    z, mean, logvar = _load(tensors[0], at, DTYPE), _load(tensors[1], at, DTYPE), _load(tensors[2], at, DTYPE)
    return z, mean, logvar, _load(tensors[3], at, DTYPE), _load(tensors[4], at, DTYPE)


@triton.jit
def _store_slopes(grads, at, slopes, w, second_sum, third_sum):
    """The gradients of what the decoder gave, or what their sums over the samples have with this tile."""
    first_grad, second_grad, third_grad = grads
    if first_grad is not None:
        _store(first_grad, at, weighted(slopes[1], w))
    if second_grad is not None:
        second_sum = _store_or_add(second_grad, at, second_sum, weighted(slopes[2], w))
    if third_grad is not None:
        third_sum = _store_or_add(third_grad, at, third_sum, weighted(slopes[3], w))
    return second_sum, third_sum


# ---- device: the evidence lower bound --------------------------------------------------------------------------------


@triton.jit
def _each_row(row, sizes, counts):
    """Where operands that have one number a row have it: a column."""
    first, whole = tl.zeros([1], row.dtype), tl.full([1], True, tl.int1)
    return tl.zeros([], row.dtype), row, first, sizes[0], sizes[3], row < counts[0], whole


@triton.jit
def _elbo_coefficients(given, weights, numbers, at, DTYPE: tl.constexpr):
    """Of the log-likelihoods and of the KL in the gradient; 0 beyond the last row."""
    c = tl.zeros([1, 1], DTYPE) + value_of(numbers[1], DTYPE)
    if weights is not None:
        c = weighted(c, _load(weights, at, DTYPE))
    if given is not None:
        c = weighted(_load(given[0], at, DTYPE), c)
    of_x, of_kl = -c, c * value_of(numbers[0], DTYPE)
    if given is not None:
        of_x, of_kl = of_x + _load(given[1], at, DTYPE), of_kl + _load(given[2], at, DTYPE)
    exists = at[5][:, None]
    return tl.where(exists, of_x, 0.0), tl.where(exists, of_kl, 0.0)


@triton.jit
def _elbo_rows(of_x, of_kl, rows, weights, numbers, at, STAGE: tl.constexpr, DTYPE: tl.constexpr):
    """Stores the log-likelihoods; returns the losses before their factor, 0 beyond the last row."""
    _store(rows[0], at, of_x)
    value = value_of(numbers[0], DTYPE) * of_kl - of_x
    if weights is not None:
        value = weighted(value, _load(weights, at, DTYPE))
    if STAGE == "rows":
        _store(rows[2], at, value * value_of(numbers[1], DTYPE))
    return tl.where(at[5][:, None], value, 0.0)


@triton.jit
def _elbo_kernel(
    event, latent, rows, given, weights, event_grads, latent_grads, partial, bins, numbers, spans, sizes, counts,
    FORMULA: tl.constexpr, STAGE: tl.constexpr, EVENT_GRADS: tl.constexpr, LATENT_GRADS: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """`rows`: log-likelihood, KL, loss; None in the backward pass, which is `given` the gradients of loss,
    log-likelihood and KL. `numbers`: kl_weight, the factor of the loss. `sizes`: of the dimensions of examples and
    rows, of the event, of the latent, of one number a row; `counts`: rows, columns of the event, of the latent;
    `spans`: shares of the columns, and how many a share has. The latent belongs to the first share."""
    pid = tl.program_id(0).to(INDEX)
    share, block = pid % spans[0], pid // spans[0]
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    each = _each_row(row, sizes, counts)
    example, exists = each[0], each[5]
    if EVENT_GRADS or LATENT_GRADS:
        of_x, of_kl = _elbo_coefficients(given, weights, numbers, each, DTYPE)
    density = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    if rows is not None or EVENT_GRADS:
        last = tl.minimum((share + 1) * spans[1], counts[1])
        for first in range(share * spans[1], last, BLOCK_C):
            col = first + tl.arange(0, BLOCK_C)
            at = (example, row, col, sizes[0], sizes[1], exists, col < counts[1])
            x = _numbers(event, at, DTYPE)
            if rows is not None:
                density += tl.where(at[6][None, :], _density(x, bins, FORMULA, DTYPE), 0.0)
            if EVENT_GRADS:
                none = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
                slopes = _density_slopes(x, bins, FORMULA, DTYPE)
                second_sum, third_sum = _store_slopes(event_grads, at, slopes, of_x, none, none)
                _store_sum(event_grads[1], at, second_sum, block.to(tl.int64) * counts[1])
                _store_sum(event_grads[2], at, third_sum, block.to(tl.int64) * counts[1])
    divergence = tl.zeros([BLOCK_R, BLOCK_L], DTYPE)
    if rows is not None or LATENT_GRADS:
        for first in range(0, tl.where(share == 0, counts[2], 0), BLOCK_L):
            col = first + tl.arange(0, BLOCK_L)
            at = (example, row, col, sizes[0], sizes[2], exists, col < counts[2])
            d, v = _load(latent[0], at, DTYPE) - _load(latent[2], at, DTYPE), _load(latent[1], at, DTYPE)
            pv = None
            if latent[3] is not None:
                pv = _load(latent[3], at, DTYPE)
            if rows is not None:
                divergence += tl.where(at[6][None, :], gaussian_kl_value(d, v, pv), 0.0)
            if LATENT_GRADS:
                mean_grad, logvar_grad, prior_mean_grad, prior_logvar_grad = latent_grads
                of_mean, of_logvar, of_prior_logvar = gaussian_kl_slopes(d, v, pv)
                if mean_grad is not None:
                    _store(mean_grad, at, weighted(of_mean, of_kl))
                if logvar_grad is not None:
                    _store(logvar_grad, at, weighted(of_logvar, of_kl))
                if prior_mean_grad is not None:
                    _store(prior_mean_grad, at, weighted(-of_mean, of_kl))
                if prior_logvar_grad is not None:
                    _store(prior_logvar_grad, at, weighted(of_prior_logvar, of_kl))
    if rows is not None:
        of_x, of_kl = tl.sum(density, 1), tl.sum(divergence, 1)[:, None]
        if STAGE == "splits":
            tl.store(partial + (share.to(tl.int64) * counts[0] + row), of_x, mask=exists)
            if share == 0:
                _store(rows[1], each, of_kl)
        else:
            _store(rows[1], each, of_kl)
            value = _elbo_rows(of_x[:, None], of_kl, rows, weights, numbers, each, STAGE, DTYPE)
            if STAGE != "rows":
                close_total(value, partial, rows[2], numbers[1], STAGE, DTYPE)


@triton.jit
def _elbo_closing_kernel(
    partial, rows, weights, numbers, splits, sizes, counts,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program adds the shares of the log-likelihoods, in order, in fp64; then closes the rows."""
    total = tl.zeros([BLOCK_R, 1], tl.float64)
    for start in range(0, counts[0], BLOCK_R):
        at = _each_row(start + tl.arange(0, BLOCK_R).to(INDEX), sizes, counts)
        sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
        for first in range(0, splits, BLOCK_C):
            sums += load_splits(partial, at[1], first, (counts[0], splits), 0.0, BLOCK_C).to(tl.float64)
        of_x = tl.sum(sums, 1).to(DTYPE)[:, None]
        total += _elbo_rows(of_x, _load(rows[1], at, DTYPE), rows, weights, numbers, at, STAGE, DTYPE).to(tl.float64)
    if STAGE == "total":
        close_total(total, partial, rows[2], numbers[1], STAGE, DTYPE)


# ---- device: the phases of a bound of several samples ----------------------------------------------------------------


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
def _exact(partial, log_w, residual, sample, mask, example, sizes, counts, splits):
    """log_w in fp64: out of the shares of the columns or, in the backward pass, out of its two parts."""
    total = tl.zeros(sample.shape, tl.float64)
    if partial is None:
        total += tl.load(log_w[0] + offsets(sample, sizes[1], log_w[1]), mask=mask, other=0.0).to(tl.float64)
        total += tl.load(residual[0] + offsets(sample, sizes[1], residual[1]), mask=mask, other=0.0).to(tl.float64)
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
    log_w = (log_w[0] + offsets(example, sizes[0][0], log_w[1]), log_w[3])
    residual = (residual[0] + offsets(example, sizes[0][0], residual[1]), residual[3])
    shifts = tl.zeros([BLOCK_G], tl.float64)
    for start in range(0, groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        largest = tl.full([BLOCK_G], float("-inf"), tl.float64)
        for first in range(0, length, BLOCK_S):
            _, mask, sample = _grouped(relative, group, first, length, groups, BLOCK_S)
            x = _exact(partial, log_w, residual, sample, mask, example, sizes[0], counts, splits)
            largest, _ = add_largest(largest, largest, (x, x, mask), parameters, KIND)
        _, shift = power_base(largest, parameters, KIND)
        for first in range(0, length, BLOCK_S):
            places, mask, sample = _grouped(relative, group, first, length, groups, BLOCK_S)
            x = _exact(partial, log_w, residual, sample, mask, example, sizes[0], counts, splits)
            tl.store(places, (x - shift[:, None]).to(DTYPE), mask=mask)
            if partial is not None:
                rounded = x.to(DTYPE)
                lost = tl.where(tl.abs(x) < float("inf"), x - rounded.to(tl.float64), 0.0).to(DTYPE)
                tl.store(log_w[0] + offsets(sample, sizes[0][1], log_w[1]), rounded, mask=mask)
                tl.store(residual[0] + offsets(sample, sizes[0][1], residual[1]), lost, mask=mask)
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
        grad *= tl.load(given[0][0] + offsets(example, sizes[0][0], given[0][1])).to(DTYPE)
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
            total, mean, excess, weight = add_powers(total, mean, excess, x, mask, base, parameters, KIND)
            squares += tl.sum(tl.where(mask, weight * weight, 0.0), 1)
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
                    own = given[1][0] + offsets(example, sizes[0][0], given[1][1])
                    slope += tl.load(own + offsets(sample, sizes[0][1], given[1][3]), mask=mask, other=0.0)
                tl.store(coefficients + (example.to(tl.int64) * counts[1] + sample), slope, mask=mask)
    if rows is not None:
        value = ((tl.sum(bound, 0).to(tl.float64) + shift) * value_of(numbers[0], tl.float64)).to(DTYPE)
        tl.store(rows[0][0] + offsets(example, sizes[0][0], rows[0][1]), value)
        effective = tl.sum(ess, 0) * value_of(numbers[0], DTYPE)
        tl.store(rows[1][0] + offsets(example, sizes[0][0], rows[1][1]), effective)
        if STAGE == "rows":
            loss = value * value_of(numbers[1], DTYPE)
            tl.store(rows[2][0] + offsets(example, sizes[0][0], rows[2][1]), loss)
        else:
            close_total(tl.full([1], 0.0, DTYPE) + value, partial, rows[2], numbers[1], STAGE, DTYPE)


@triton.jit
def _descend(
    event, latent, event_grads, latent_grads, slots, coefficients, bins, share, sizes, counts, FORMULA: tl.constexpr,
    EVENT_GRADS: tl.constexpr, LATENT_GRADS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """`slots`: of the program's sums over its samples, in the event and in the latent."""
    example, samples, columns, latents = share
    weights = coefficients + example.to(tl.int64) * counts[1]
    if EVENT_GRADS:
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
                second_sum, third_sum = _store_slopes(event_grads, at, slopes, w, second_sum, third_sum)
            at = (example, None, col, sizes[0], sizes[1], None, exists)
            _store_sum(event_grads[1], at, second_sum, slots[0])
            _store_sum(event_grads[2], at, third_sum, slots[0])
    if LATENT_GRADS:
        z_grad, mean_grad, logvar_grad, prior_mean_grad, prior_logvar_grad = latent_grads
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
    event, latent, log_weights, rows, given, event_grads, latent_grads, partials, coefficients, bins, parameters,
    numbers, grouping, spans, splits, sizes, counts, FORMULA: tl.constexpr, KIND: tl.constexpr, STAGE: tl.constexpr,
    WEIGH: tl.constexpr, ESTIMATE: tl.constexpr, EVENT_GRADS: tl.constexpr, LATENT_GRADS: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """`sizes`: of the dimensions of examples and samples, of the event, of the latent; `counts`: examples, samples,
    columns of the event, of the latent; `spans`: shares of the samples, shares of the columns, and how many of the
    three a share has; `splits`: shares of the columns that log_w is the sum of."""
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
    if ESTIMATE and (EVENT_GRADS or LATENT_GRADS):
        tl.debug_barrier()
    if EVENT_GRADS or LATENT_GRADS:
        slots = (
            (example.to(tl.int64) * spans[0] + sample_share) * counts[2],
            sample_share.to(tl.int64) * counts[0] * counts[3],
        )
        _descend(
            event, latent, event_grads, latent_grads, slots, coefficients, bins, share, sizes, counts, FORMULA,
            EVENT_GRADS, LATENT_GRADS, DTYPE, BLOCK_K, BLOCK_C, BLOCK_L,
        )  # fmt: skip


# ---- host ------------------------------------------------------------------------------------------------------------

# an upper limit that is none: without one ptxas spills around the calls of its division
_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


def _formula(likelihood: str, second: Tensor | None) -> str:
    if likelihood == "gaussian" and second is None:
        return "unit_gaussian"
    return likelihood if likelihood == "bernoulli" else f"{likelihood}_log_prob"


def _elements(formula: str, dtype: Any) -> int:
    """A thread's: more would spill."""
    return 2 if formula in LARGE or formula == "discretized_logistic_log_prob" else 4 if dtype == tl.float64 else 8


def _bins(bins: Sequence[float]) -> Any:
    return tuple(map(_rows.scalar, bins)) or None


def _empty_gradients(tensors: Sequence[Tensor | None], wanted: int) -> list[Tensor | None]:
    return [None if t is None or not wanted >> i & 1 else torch.empty_like(t) for i, t in enumerate(tensors)]


def _any(operands: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return operands if any(operand is not None for operand in operands) else None


def _strides(
    item: Any, columns: int, rows: int, samples: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]]:
    """(of the examples, of the samples, of the columns); the rows may lack the samples, or all be one."""
    strides = item.stride() if isinstance(item, Tensor) else item[1]
    lead, own = strides[: len(strides) - columns], strides[len(strides) - columns :]
    if len(lead) == rows:
        return tuple(lead[d] for d in range(rows) if d not in samples), tuple(lead[d] for d in samples), own
    return lead or (0,) * (rows - len(samples)), None, own


def _operands(
    sides: Sequence[tuple[Sequence[Any], tuple[int, ...]]], rows: tuple[int, ...], samples: tuple[int, ...]
) -> Any:
    """(operands of each side, sizes of the dimensions of examples and samples and of the columns' of each side, index
    dtype). A side: tensors, or (tensor, strides) pairs, or None, and the shape of their columns; `samples`: which
    dimensions of the rows they are."""
    found = [
        [None if t is None else _strides(t, len(shape), len(rows), samples) for t in items] for items, shape in sides
    ]
    given = [f for side in found for f in side if f]
    others = tuple(n for d, n in enumerate(rows) if d not in samples)
    of_examples = _rows.geometry(others, (), tuple(f[0] for f in given))
    of_samples = _rows.geometry(tuple(rows[d] for d in samples), (), tuple(f[1] for f in given if f[1] is not None))
    leads, steps = iter(of_examples.strides), iter(of_samples.strides)
    geometries = [of_examples, of_samples]
    packed = []
    for (items, shape), side in zip(sides, found, strict=True):
        g = _rows.geometry(shape, tuple(range(len(shape))), tuple(f[2] for f in side if f))
        own = iter(g.strides)
        geometries.append(g)
        packed.append(
            tuple(
                f
                and (
                    t if isinstance(t, Tensor) else t[0],
                    next(leads)[0],
                    next(own)[1],
                    *(() if f[1] is None else (next(steps)[0],)),
                )
                for t, f in zip(items, side, strict=True)
            )
        )
    sizes = ((of_examples.row_sizes, of_samples.row_sizes), *(g.col_sizes for g in geometries[2:]))
    return packed, sizes, max((g.index for g in geometries), key=lambda index: index.primitive_bitwidth)


# ---- host: the evidence lower bound ----------------------------------------------------------------------------------

DEEP = 16  # rows of a tile at least, where they share a tensor: of its gradient, a program leaves a sum over them


class _ElboPlan(NamedTuple):
    blocks: int
    spans: tuple[int, int]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _elbo_plan(rows: int, cols: int, latents: int, formula: str, dtype: Any, shared: bool) -> _ElboPlan:
    elements = 1 if formula in LARGE and dtype == tl.float64 else _elements(formula, dtype)  # value and slopes at once
    tile = 256 * elements
    wide, deep = _rows.power_of_2(cols), _rows.power_of_2(latents)
    block_r = min(_rows.power_of_2(rows), max(tile // max(wide, deep), DEEP if shared else 1))
    block_c, block_l = min(wide, tile // block_r), min(deep, tile // block_r)
    if not shared:  # programs enough for a GPU
        while (
            block_r > 1
            and block_r * max(block_c, block_l) > 512
            and _rows.ceil_div(rows, block_r) < _rows.PROGRAMS // 4
        ):
            block_r //= 2
    blocks, steps = max(_rows.ceil_div(rows, block_r), 1), max(_rows.ceil_div(cols, block_c), 1)
    shares = min(max(_rows.PROGRAMS // blocks, 1), steps) if steps > _rows.CHUNK else 1
    of_columns = _rows.ceil_div(steps, shares)
    warps = max(block_r * max(block_c, block_l) // (32 * elements), 1)
    constants = {"BLOCK_R": block_r, "BLOCK_C": block_c, "BLOCK_L": block_l, "num_warps": warps, **_REGISTERS}
    return _ElboPlan(blocks, (_rows.ceil_div(steps, of_columns), of_columns * block_c), constants)


def _run_elbo(
    tensors: Sequence[Tensor | None], results: Sequence[Tensor], given: Sequence[Tensor], wanted: int,
    event_ndims: int, likelihood: str, bins: Sequence[float], kl_weight: float, scale: float, reduction: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Fills the `results` log-likelihood, KL and loss; or, `given` gradients of loss, log-likelihood and KL, none.
    Returns gradients of the differentiable tensors, empty where they are not wanted."""
    decoder, *others, x, mean, logvar, prior_mean, prior_logvar, weights = tensors
    event, latent = (decoder, *others), (mean, logvar, prior_mean, prior_logvar)
    lead = decoder.dim() - event_ndims
    shape, event_shape, latent_shape = decoder.shape[:lead], decoder.shape[lead:], mean.shape[lead:]
    rows, cols, latents = math.prod(shape), math.prod(event_shape), math.prod(latent_shape)
    formula, dtype = _formula(likelihood, others[0]), _rows.arithmetic(decoder)
    grads = _empty_gradients((*event, *latent), wanted)
    shared = [i for i, t in enumerate(event) if t is not None and t.dim() < decoder.dim()]
    plan = _elbo_plan(rows, cols, latents, formula, dtype, bool(shared))
    splits = plan.spans[0]

    targets: list[Any] = list(grads)
    sums: list[tuple[Tensor, Tensor]] = []
    for i in shared:
        grad = grads[i]
        if grad is not None and plan.blocks > 1:
            partial = decoder.new_empty((plan.blocks, *event_shape), dtype=_rows.result_dtype(decoder))
            targets[i] = (partial, partial.stride()[1:])
            sums.append((grad, partial))
    sides = (
        ((x, *event, *targets[:3]), tuple(event_shape)),
        ((*latent, *targets[3:]), tuple(latent_shape)),
        ((weights, *results, *given), ()),
    )
    (of_event, of_latent, (of_weights, *of_rows)), sizes, index = _operands(sides, tuple(shape), tuple(range(lead)))
    of_grads = _any(of_event[4:]), _any(of_latent[4:])
    event_grads, latent_grads = (operands is not None for operands in of_grads)
    kept, incoming = (tuple(of_rows) if part else None for part in (results, given))
    last = "rows" if reduction == "none" else "total"
    stage = "splits" if splits > 1 else "programs" if last == "total" and plan.blocks > 1 else last
    partials = None
    if results and stage in ("splits", "programs"):
        wide = torch.float64 if stage == "programs" else _rows.result_dtype(decoder)
        partials = decoder.new_empty((splits * rows if stage == "splits" else plan.blocks,), dtype=wide)
    factor = _rows.scalar(_rows.reduction_factor(scale, rows, reduction))
    numbers, counts = (_rows.scalar(kl_weight), factor), (rows, cols, latents)
    common: dict[str, Any] = {"DTYPE": dtype, "INDEX": index}
    if results or event_grads or latent_grads:
        _rows.launch(
            _elbo_kernel, (plan.blocks * splits,), decoder.device, of_event[:4] if results or event_grads else None,
            of_latent[:4] if results or latent_grads else None, kept, incoming, of_weights, *of_grads, partials,
            _bins(bins), numbers, plan.spans, sizes, counts, FORMULA=formula, STAGE=stage, EVENT_GRADS=event_grads,
            LATENT_GRADS=latent_grads, **common, **plan.constants,
        )  # fmt: skip
    if results and stage == "splits":
        _rows.launch(
            _elbo_closing_kernel, (1,), decoder.device, partials, kept, of_weights, numbers, splits, sizes, counts,
            STAGE=last, **common, **_rows.finishing_tile(rows, splits),
        )  # fmt: skip
    elif results and stage == "programs":
        _rows.finish_total(partials, results[2], factor, common)
    for grad, partial in sums:
        grad.copy_(partial.sum(0))
    return _rows.present(grads, decoder)


def elbo_loss(*args: Any) -> tuple[Tensor, ...]:
    tensors, options, wanted = args[:9], args[9:-1], args[-1]
    decoder, event_ndims, reduction = tensors[0], options[0], options[-1]
    shape, dtype = decoder.shape[: decoder.dim() - event_ndims], _rows.result_dtype(decoder)
    shapes = (shape, shape, shape if reduction == "none" else ())
    log_likelihood, kl, loss = (decoder.new_empty(shape, dtype=dtype) for shape in shapes)
    grads = _run_elbo(tensors, (log_likelihood, kl, loss), (), wanted, *options)
    return loss, log_likelihood, kl, *grads


def elbo_loss_backward(*args: Any) -> tuple[Tensor, ...]:
    given, tensors, options, needed = args[:3], args[3:12], args[12:-2], args[-1]
    return _run_elbo(tensors, (), given, needed, *options)


# ---- host: the bound of several samples ------------------------------------------------------------------------------

WHOLE = 32  # tiles that one program takes before its example is shared


class _Plan(NamedTuple):
    """`spans` of the kernel, of one share each where an example is one program's."""

    spans: tuple[int, int, int, int, int]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def _plan(examples: int, samples: int, groups: int, cols: int, latents: int, formula: str, dtype: Any) -> _Plan:
    elements = _elements(formula, dtype)
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
    return _Plan(spans, {**blocks_of, "num_warps": warps, **_REGISTERS})


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
    formula, dtype = _formula(likelihood, others[0]), _rows.arithmetic(decoder)
    plan = _plan(examples, samples, groups, cols, latents, formula, dtype)
    sample_shares, column_shares = plan.spans[:2]

    grads = _empty_gradients((*event, *latent), wanted)
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
    (of_event, of_latent, of_rows), sizes, index = _operands(sides, rows, (dim,))
    of_grads = _any(of_event[4:]), _any(of_latent[5:])
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
        data = (of_event[:4], of_latent[:5], _bins(bins), formula)
        event, latent, options, name = data if weigh or descend else (None, None, None, "")
        kept, incoming = (of_rows[2:] if tensors else None for tensors in (results, given))
        estimator = (log_weights, kept, incoming, parameters, kind)
        weights, kept, incoming, powers, power_kind = estimator if estimate else (None, None, None, None, "")
        targets = of_grads if descend else (None, None)
        _rows.launch(
            _bound_kernel, (programs,), decoder.device, event, latent, weights, kept, incoming,
            *targets, (splits, shares), coefficients, options, powers,
            (_rows.scalar(1 / groups), factor, counts_of(samples // groups)), (groups, samples // groups), spans,
            column_shares, sizes, (examples, samples, cols, latents), FORMULA=name, KIND=power_kind, STAGE=stage,
            WEIGH=weigh, ESTIMATE=estimate, EVENT_GRADS=targets[0] is not None, LATENT_GRADS=targets[1] is not None,
            **common, **plan.constants,
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
