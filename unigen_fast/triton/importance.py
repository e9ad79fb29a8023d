"""Triton kernels of the importance weights: softmax rows, read once where a row fits a tile or is being reduced."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unigen_fast.triton import _rows
from unigen_fast.triton._rows import (
    absorb,
    close_rows,
    close_total,
    columns_at,
    divide,
    expm1,
    finite_base,
    load,
    load_rows,
    load_splits,
    log1p,
    log1p_unit,
    product,
    program,
    sigmoid,
    softmax_weights,
    softplus,
    store,
    store_rows,
    tile_of,
    value_of,
    weighted,
)

__all__ = [
    "effective_sample_size",
    "importance_weighted_generator_loss",
    "importance_weighted_generator_loss_backward",
    "importance_weighted_sum",
    "importance_weighted_sum_backward",
    "importance_weights",
    "importance_weights_backward",
    "iwae_loss",
    "iwae_loss_backward",
    "log_mean_exp",
    "log_mean_exp_backward",
    "log_variance_loss",
    "log_variance_loss_backward",
    "pareto_shape",
    "power_bound_loss",
    "power_bound_loss_backward",
    "rws_losses",
    "rws_losses_backward",
    "tvo_loss",
    "tvo_loss_backward",
    "vimco_loss",
    "vimco_loss_backward",
    "weight_diagnostics",
]

# ---- forward: (maximum, sum of exponentials, a weighted sum) of every row --------------------------------------------


@triton.jit
def _close_statistics(maximum, total, extra, row, close, shape, counts, PAYLOAD: tl.constexpr, DTYPE: tl.constexpr):
    """Stores the statistics; returns the rows' values, 0 beyond the last row."""
    statistics, log_count = close
    base = finite_base(maximum)
    if PAYLOAD == "none":
        empty = total == 0
        value = base + tl.log(tl.where(empty, 1.0, total))
        value = tl.where(empty, float("-inf"), value) - value_of(log_count, DTYPE)
    elif PAYLOAD == "square":
        empty = extra == 0
        value = tl.where(empty, 0.0, divide(total * total, tl.where(empty, 1.0, extra)))
    else:
        empty = total == 0
        of_empty = float("-inf") if PAYLOAD == "value" else 0.0  # a surrogate is its bound
        value = tl.where(empty, of_empty, divide(extra, tl.where(empty, 1.0, total)))
    if statistics is not None:
        store_rows(statistics, row, shape, counts, base)
        store_rows(statistics, row, shape, counts, total, 1)
        if PAYLOAD == "softplus":
            store_rows(statistics, row, shape, counts, value, 2)
    return tl.where(row < counts[0], value, 0.0)


@triton.jit
def _statistics_kernel(
    x, inverse_temperature, partial, close, out, factor, shape, counts, PAYLOAD: tl.constexpr,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, split, first, last = program(counts, BLOCK_R, INDEX)
    maximum = tl.full([BLOCK_R], float("-inf"), DTYPE)
    total = tl.zeros([BLOCK_R], DTYPE)
    extra = tl.zeros([BLOCK_R], DTYPE)
    for start in range(first, last, BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        value = load(x, row, col, shape, mask, DTYPE, float("-inf"))
        log_w = value * value_of(inverse_temperature, DTYPE)
        if PAYLOAD == "softplus":
            payload = softplus(-value)
        else:
            payload = log_w
        maximum, total, extra = absorb(maximum, total, extra, log_w, payload, PAYLOAD)
    if STAGE == "splits":
        address = partial + split.to(tl.int64) * counts[0] + row
        plane = tl.full((), counts[0], tl.int64) * counts[2]
        mask = row < counts[0]
        tl.store(address, maximum, mask=mask)
        tl.store(address + plane, total, mask=mask)
        if PAYLOAD != "none":
            tl.store(address + 2 * plane, extra, mask=mask)
    else:
        value = _close_statistics(maximum, total, extra, row, close, shape, counts, PAYLOAD, DTYPE)
        if STAGE == "rows":
            store_rows(out, row, shape, counts, value * value_of(factor, DTYPE))
        else:
            close_total(value, partial, out, factor, STAGE, DTYPE)


@triton.jit
def _finish_statistics_kernel(
    partial, close, out, factor, shape, counts, PAYLOAD: tl.constexpr,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program joins `partial` [3, splits, rows]; all splits of a row fit one tile."""
    loss = tl.zeros([BLOCK_R], tl.float64)
    plane = tl.full((), counts[0], tl.int64) * counts[1]
    for start in range(0, counts[0], BLOCK_R):
        row = start + tl.arange(0, BLOCK_R).to(INDEX)
        maxima = load_splits(partial, row, 0, counts, float("-inf"), BLOCK_C)
        maximum = tl.max(maxima, 1)
        fade = tl.exp(maxima - finite_base(maximum)[:, None])
        total = tl.sum(load_splits(partial + plane, row, 0, counts, 0.0, BLOCK_C) * fade, 1)
        extra = total
        if PAYLOAD != "none":
            extras = load_splits(partial + 2 * plane, row, 0, counts, 0.0, BLOCK_C) * fade
            if PAYLOAD == "square":
                extras *= fade
            extra = tl.sum(extras, 1)
        value = _close_statistics(maximum, total, extra, row, close, shape, counts, PAYLOAD, DTYPE)
        if STAGE == "rows":
            store_rows(out, row, shape, counts, value * value_of(factor, DTYPE))
        else:
            loss += value.to(tl.float64)
    if STAGE == "total":
        close_total(loss, partial, out, factor, STAGE, DTYPE)


def _row_shape(x: Tensor, columns: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for d, size in enumerate(x.shape) if d not in columns)


def _reduce(
    x: Tensor,
    columns: tuple[int, ...],
    payload: str,
    *,
    planes: int,
    reduction: str = "none",
    factor: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(rows or their reduction, statistics `[planes, rows]`)."""
    dtype = _rows.result_dtype(x)
    row_shape = _row_shape(x, columns)
    out = x.new_empty(row_shape if reduction == "none" else (), dtype=dtype)
    statistics = x.new_empty((planes, *row_shape), dtype=dtype)
    plane = statistics[0] if planes else None
    g, (operand,), rows = _rows.operands(columns, (x,), (plane, out))
    number = _rows.arithmetic(x)
    plan = g.whole_rows(4096, number) or g.reduction(2048, number)
    stage, last = _rows.stages(plan, reduction)
    partial = _rows.partials(x, stage, g.rows, plan, planes=3)
    close = (rows[0], _rows.scalar(math.log(max(g.cols, 1))))
    scale = _rows.scalar(_rows.reduction_factor(factor, g.rows, reduction))
    common: dict[str, Any] = {"DTYPE": number, "INDEX": g.index}
    _rows.launch(
        _statistics_kernel, (plan.programs,), x.device, operand, _rows.scalar(1 / temperature), partial, close, rows[1],
        scale, g.shape, plan.counts, PAYLOAD=payload, STAGE=stage, **common, **plan.constants,
    )  # fmt: skip
    if stage == "splits":
        _rows.launch(
            _finish_statistics_kernel, (1,), x.device, partial, close, rows[1], scale, g.shape, (g.rows, plan.splits),
            PAYLOAD=payload, STAGE=last, **common, **_rows.finishing_tile(g.rows, plan.splits),
        )  # fmt: skip
    elif stage == "programs":
        _rows.finish_total(partial, out, scale, common)
    return out, statistics


def log_mean_exp(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _reduce(log_w, (dim % log_w.dim(),), "none", planes=2)


def effective_sample_size(log_w: Tensor, dim: int) -> Tensor:
    return _reduce(log_w, (dim % log_w.dim(),), "square", planes=0)[0]


def iwae_loss(log_w: Tensor, dim: int, reduction: str, value: str) -> tuple[Tensor, Tensor]:
    payload = "value" if value == "surrogate" else "none"
    return _reduce(log_w, (dim % log_w.dim(),), payload, planes=2, reduction=reduction, factor=-1.0)


def importance_weighted_generator_loss(
    fake: Tensor, dim: int | None, temperature: float, detach: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    columns = _rows.all_dims(fake) if dim is None else (dim % fake.dim(),)
    return _reduce(fake, columns, "softplus", planes=3, reduction=reduction, temperature=temperature)


# ---- weights, and gradients that are weights times a row's factor ----------------------------------------------------


@triton.jit
def _weights_kernel(
    x, statistics, grad, out, inverse_temperature, factor, shape, counts,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Without `statistics` the tile holds whole rows."""
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    log_w = load(x, row, col, shape, mask, DTYPE, float("-inf")) * value_of(inverse_temperature, DTYPE)
    if statistics is None:
        maximum = tl.max(log_w, 1)
        total = tl.sum(tl.exp(log_w - finite_base(maximum)[:, None]), 1)
    else:
        maximum = load_rows(statistics[0], row, shape, counts, DTYPE)
        total = load_rows(statistics[1], row, shape, counts, DTYPE)
    weights = softmax_weights(log_w, maximum, total)
    if grad is not None:
        g = load_rows(grad, row, shape, counts, DTYPE) * value_of(factor, DTYPE)
        weights = tl.where((total == 0)[:, None], 0.0, weighted(weights, g[:, None]))
    store(out, row, col, shape, mask, weights)


def _weights(
    x: Tensor, columns: tuple[int, ...], statistics: Tensor | None, grad: Tensor | None, out: Tensor,
    temperature: float = 1.0, factor: float = 1.0,
) -> None:  # fmt: skip
    planes = (None, None) if statistics is None else (statistics[0], statistics[1])
    g, (operand, target), rows = _rows.operands(columns, (x, out), (*planes, grad))
    dtype = _rows.arithmetic(x)
    plan = g.whole_rows(4096, dtype) if statistics is None else g.map(2048, dtype)
    assert plan is not None
    _rows.launch(
        _weights_kernel, (plan.programs,), x.device, operand, None if statistics is None else rows[:2], rows[2], target,
        _rows.scalar(1 / temperature), _rows.scalar(factor), g.shape, plan.counts,
        DTYPE=dtype, INDEX=g.index, **plan.constants,
    )  # fmt: skip


def log_mean_exp_backward(grad: Tensor, log_w: Tensor, statistics: Tensor, dim: int) -> Tensor:
    out = torch.empty_like(log_w)
    _weights(log_w, (dim % log_w.dim(),), statistics, grad, out)
    return out


def iwae_loss_backward(grad: Tensor, log_w: Tensor, statistics: Tensor, dim: int, reduction: str, value: str) -> Tensor:
    out = torch.empty_like(log_w)
    factor = _rows.reduction_factor(-1.0, statistics[0].numel(), reduction)
    _weights(log_w, (dim % log_w.dim(),), statistics, grad, out, factor=factor)
    return out


def importance_weights(log_w: Tensor, dim: int, temperature: float) -> Tensor:
    columns = (dim % log_w.dim(),)
    out = log_w.new_empty(log_w.shape, dtype=_rows.result_dtype(log_w))
    statistics = None
    if _rows.operands(columns, (log_w, out)).geometry.whole_rows(4096, _rows.arithmetic(log_w)) is None:
        statistics = _reduce(log_w, columns, "none", planes=2, temperature=temperature)[1]
    _weights(log_w, columns, statistics, None, out, temperature)
    return out


# ---- backward of the weights -----------------------------------------------------------------------------------------


@triton.jit
def _dot_kernel(
    inputs, parameters, close, shape, counts,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    grad, weights = inputs
    row, split, first, last = program(counts, BLOCK_R, INDEX)
    total = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
    for start in range(first, last, BLOCK_C):
        col, mask = columns_at(start, row, counts, BLOCK_C)
        g = load(grad, row, col, shape, mask, DTYPE)
        total += product(g, load(weights, row, col, shape, mask, DTYPE))
    close_rows(tl.sum(total, 1), row, split, close, shape, counts, STAGE, DTYPE)


@triton.jit
def _weights_backward_kernel(
    grad, weights, mean, out, inverse_temperature, shape, counts,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """w (g - mean) / temperature, `mean` being sum w·g. Without it the tile holds whole rows. A row without gradient
    has none, be its weights NaN."""
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    g = load(grad, row, col, shape, mask, DTYPE)
    w = load(weights, row, col, shape, mask, DTYPE)
    if mean is None:
        center = tl.sum(product(g, w), 1)
    else:
        center = load_rows(mean, row, shape, counts, DTYPE)
    value = product(g - center[:, None], w) * value_of(inverse_temperature, DTYPE)
    store(out, row, col, shape, mask, value)


def importance_weights_backward(grad: Tensor, log_w: Tensor, weights: Tensor, dim: int, temperature: float) -> Tensor:
    columns = (dim % log_w.dim(),)
    out = torch.empty_like(log_w)
    g, full, _ = _rows.operands(columns, (grad, weights, out))
    dtype = _rows.arithmetic(log_w)
    plan, rows = g.whole_rows(4096, dtype), (None,)
    if plan is None:
        row_shape = torch.Size(_row_shape(log_w, columns))
        mean = _rows.sum_rows(_dot_kernel, columns, (grad, weights), row_shape=row_shape)[0]
        g, full, rows = _rows.operands(columns, (grad, weights, out), (mean,))
        plan = g.map(2048, dtype)
    _rows.launch(
        _weights_backward_kernel, (plan.programs,), log_w.device, *full[:2], rows[0], full[2],
        _rows.scalar(1 / temperature), g.shape, plan.counts,
        DTYPE=dtype, INDEX=g.index, **plan.constants,
    )  # fmt: skip
    return out


# ---- backward of the importance-weighted generator loss --------------------------------------------------------------


@triton.jit
def _generator_backward_kernel(
    grad, x, statistics, out, inverse_temperature, factor, shape, counts, DETACH: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """w (-sigma(-logit)), and w (softplus(-logit) - row loss) / temperature for weights that are not constants."""
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    inverse = value_of(inverse_temperature, DTYPE)
    logit = load(x, row, col, shape, mask, DTYPE)
    maximum = load_rows(statistics[0], row, shape, counts, DTYPE)
    total = load_rows(statistics[1], row, shape, counts, DTYPE)
    w = softmax_weights(logit * inverse, maximum, total)
    slope = -sigmoid(-logit)
    if not DETACH:
        slope += (softplus(-logit) - load_rows(statistics[2], row, shape, counts, DTYPE)[:, None]) * inverse
    g = load_rows(grad, row, shape, counts, DTYPE) * value_of(factor, DTYPE)
    store(out, row, col, shape, mask, weighted(weighted(slope, w), g[:, None]))


def importance_weighted_generator_loss_backward(
    grad: Tensor, fake: Tensor, statistics: Tensor, dim: int | None, temperature: float, detach: bool, reduction: str
) -> Tensor:
    columns = _rows.all_dims(fake) if dim is None else (dim % fake.dim(),)
    out = torch.empty_like(fake)
    g, (operand, target), rows = _rows.operands(columns, (fake, out), (*statistics.unbind(0), grad))
    dtype = _rows.arithmetic(fake)
    plan = g.map(2048, dtype)
    factor = _rows.reduction_factor(1.0, statistics[0].numel(), reduction)
    _rows.launch(
        _generator_backward_kernel, (plan.programs,), fake.device, rows[3], operand, rows[:3], target,
        _rows.scalar(1 / temperature), _rows.scalar(factor), g.shape, plan.counts,
        DETACH=detach, DTYPE=dtype, INDEX=g.index, **plan.constants,
    )  # fmt: skip
    return out


# ---- estimators: rows of several sums --------------------------------------------------------------------------------
#
# A program owns whole rows, and sweeps over their columns as often as the estimator needs: for the largest log-weight,
# for sums relative to it, and some for sums relative to those. Rows that fit one tile are read once. KIND names the
# estimator; that of powers is "mean" at power 0, "extreme" at an infinite one, and otherwise "power" or, where 1/power
# would magnify the rounding of a logarithm, "small power". A NaN or +inf lives on in the sums.


@triton.jit
def _inverse(total):
    """1 / total, 0 where it is 0: then every weight is 0."""
    empty = total == 0
    return tl.where(empty, 0.0, divide(tl.full(total.shape, 1.0, total.dtype), tl.where(empty, 1.0, total)))


@triton.jit
def _power_weight(log_w, base, power, KIND: tl.constexpr):
    if KIND == "mean":
        weight = tl.full(log_w.shape, 1.0, log_w.dtype)
    elif KIND == "extreme":
        weight = tl.where(log_w == base[:, None], 1.0, 0.0).to(log_w.dtype)
    else:
        weight = tl.exp((log_w - base[:, None]) * value_of(power, log_w.dtype))
    return tl.where(log_w == log_w, weight, log_w)


@triton.jit
def _tempered(distance, beta):
    """exp(beta · distance); all 1 at 0, that of -inf too."""
    return tl.where(beta == 0, 1.0, tl.exp(beta * distance))


@triton.jit
def _vimco_signal(log_w, base, inverse, drop, missing, best, inverse_others):
    """What a sample adds to the bound, given `vimco_signal`'s statistics in the reference, the sum inverted."""
    impossible = log_w == float("-inf")
    distance = log_w - base[:, None]
    baseline = (drop[:, None] - tl.where(impossible, 0.0, distance)) * inverse_others
    others_missing = missing[:, None] - tl.where(impossible, 1.0, 0.0)
    baseline = tl.where(others_missing > 0, float("-inf"), baseline)
    gap = tl.where(distance == baseline, 0.0, distance - baseline)
    change = tl.exp(tl.where(distance < baseline, baseline, distance)) * expm1(-tl.abs(gap)) * inverse[:, None]
    # from -1/2 to 1 but for a sole best, which has half of the weight and more
    signal = -log1p_unit(tl.where(gap < 0, -change, change))
    sole = tl.where(best == best, base, best)
    return tl.where(log_w == sole[:, None], best[:, None], signal)


@triton.jit
def _log_weights(x, y, parameters, KIND: tl.constexpr):
    if KIND == "rws":
        return x - y
    elif KIND == "weighted sum":
        return x * value_of(parameters, x.dtype)
    else:
        return x


@triton.jit
def _tile_at(start, place, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr):
    """(first operand, second one if there is one, which elements exist)."""
    inputs, row, shape, counts = place
    col, mask = columns_at(start, row, counts, BLOCK_C)
    x = load(inputs[0], row, col, shape, mask, DTYPE)
    y = x
    if inputs[1] is not None:
        y = load(inputs[1], row, col, shape, mask, DTYPE)
    return x, y, mask


@triton.jit
def add_largest(largest, second, tile, parameters, KIND: tl.constexpr):
    x, y, mask = tile
    key = _log_weights(x, y, parameters, KIND)
    if (KIND == "power") | (KIND == "small power") | (KIND == "extreme"):
        key *= value_of(parameters[2], x.dtype)
    key = tl.where(mask, key, float("-inf"))
    top = tl.max(key, 1)
    if KIND == "vimco":
        is_top = key == top[:, None]
        below = tl.max(tl.where(is_top, float("-inf"), key), 1)
        below = tl.where(tl.sum(is_top.to(tl.int32), 1) > 1, top, below)
        second = tl.maximum(tl.maximum(second, below), tl.minimum(largest, top))
    return tl.maximum(largest, top), second


@triton.jit
def _total(term, mask):
    return tl.sum(tl.where(mask, term, 0.0), 1)


@triton.jit
def add_powers(total, mean, excess, x, mask, base, parameters, KIND: tl.constexpr):
    """One more tile into a row's sums of weights, of distances to the base and of what a small power needs; also
    returns the tile's weights."""
    log_w = tl.where(x == float("inf"), float("nan"), x)
    distance = log_w - base[:, None]
    weight = _power_weight(log_w, base, parameters[0], KIND)
    total += _total(weight, mask)
    if (KIND == "mean") | (parameters[3] is not None):
        mean += _total(distance, mask)
    if KIND == "small power":
        excess += _total(expm1(distance * value_of(parameters[0], x.dtype)), mask)
    return total, mean, excess, weight


@triton.jit
def power_base(largest, parameters, KIND: tl.constexpr):
    """(what the largest key stands for: the log-weight at that end, the base of the sums)."""
    if KIND != "mean":
        largest *= value_of(parameters[2], largest.dtype)
    return largest, finite_base(largest)


@triton.jit
def power_value(extreme, base, total, mean, excess, parameters, count, KIND: tl.constexpr):
    """(the bound, the sum of the weights: 0 in a row of -inf), given the sums of `add_powers`."""
    mean *= value_of(count[0], mean.dtype)
    if KIND == "mean":
        value = mean
    elif KIND == "extreme":
        value = total - total
    else:
        value = tl.log(total) - value_of(count[1], mean.dtype)
        if KIND == "small power":
            excess *= value_of(count[0], mean.dtype)
            value = tl.where(excess > -0.5, log1p_unit(excess), value)
        value *= value_of(parameters[1], mean.dtype)
    if parameters[3] is not None:
        value += value_of(parameters[3], mean.dtype) * (mean - value)
    total = tl.where((extreme == float("-inf")) & (total == total), 0.0, total)
    return tl.where(total == 0, extreme, base + value), total


@triton.jit
def power_slope(x, g, base, total, parameters, count, KIND: tl.constexpr):
    """g times the derivative of the bound in a tile's log-weights."""
    bound, each = g, tl.zeros(g.shape, g.dtype)
    if parameters[3] is not None:
        elbo = value_of(parameters[3], g.dtype)
        bound = g * (1 - elbo)
        each = tl.where(total == 0, 0.0, g * elbo * value_of(count[0], g.dtype))
    weight = weighted(_inverse(total), bound)[:, None]
    return weighted(_power_weight(x, base, parameters[0], KIND), weight) + each[:, None]


@triton.jit
def _add_terms(a, b, c, tile, kept, parameters, KIND: tl.constexpr):
    """One more tile into up to three sums of a row."""
    x, y, mask = tile
    if KIND == "vimco":
        base, second_base, sole = kept
        impossible = x == float("-inf")
        a += _total(tl.where(x == sole[:, None], 0.0, tl.exp(x - second_base[:, None])), mask)
        b += _total(tl.where(impossible, 0.0, x - base[:, None]), mask)
        c += _total(tl.where(impossible, 1.0, 0.0).to(x.dtype), mask)
    elif KIND == "signals":
        base, inverse, drop, missing, best, inverse_others = kept
        a += _total(weighted(y, _vimco_signal(x, base, inverse, drop, missing, best, inverse_others)), mask)
    elif KIND == "variance":
        a += _total(x - kept[0][:, None], mask)
    elif KIND == "squares":
        deviation = (x - kept[0][:, None]) - kept[1][:, None]
        a += _total(deviation * deviation, mask)
    elif KIND == "tvo":
        distance = x - kept[0][:, None]
        e = _tempered(distance, kept[1])
        a += _total(e, mask)
        b += _total(weighted(distance, e), mask)
    elif (KIND == "rws") | (KIND == "weighted sum"):
        e = tl.exp(_log_weights(x, y, parameters, KIND) - kept[0][:, None])
        a += _total(e, mask)
        b += _total(weighted(y, e), mask)
    elif KIND == "diagnostics":
        distance = x - kept[0][:, None]
        e = tl.exp(distance)
        a += _total(e, mask)
        b += _total(e * e, mask)
        c += _total(weighted(distance, e), mask)
    else:
        a, b, c, _ = add_powers(a, b, c, x, mask, kept[0], parameters, KIND)
    return a, b, c


@triton.jit
def _largest(
    tile, place, first, last, parameters,
    KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What a row's sums are relative to, and (vimco) the second-largest log-weight."""
    largest = tl.full([BLOCK_R], float("-inf"), DTYPE)
    second = tl.full([BLOCK_R], float("-inf"), DTYPE)
    if tile is None:
        for start in range(first, last, BLOCK_C):
            loaded = _tile_at(start, place, DTYPE, BLOCK_C)
            largest, second = add_largest(largest, second, loaded, parameters, KIND)
    else:
        largest, second = add_largest(largest, second, tile, parameters, KIND)
    return largest, second


@triton.jit
def _sums(
    tile, place, first, last, kept, parameters,
    KIND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over `tile` or, without it, over every tile of the row."""
    a = tl.zeros([BLOCK_R], DTYPE)
    b = tl.zeros([BLOCK_R], DTYPE)
    c = tl.zeros([BLOCK_R], DTYPE)
    if tile is None:
        for start in range(first, last, BLOCK_C):
            a, b, c = _add_terms(a, b, c, _tile_at(start, place, DTYPE, BLOCK_C), kept, parameters, KIND)
    else:
        a, b, c = _add_terms(a, b, c, tile, kept, parameters, KIND)
    return a, b, c


@triton.jit
def _close_value(value, row, out, partial, factor, shape, counts, STAGE: tl.constexpr, DTYPE: tl.constexpr):
    value = tl.where(row < counts[0], value, 0.0)
    if STAGE == "rows":
        store_rows(out, row, shape, counts, value * value_of(factor, DTYPE))
    else:
        close_total(value, partial, out, factor, STAGE, DTYPE)


@triton.jit
def _estimators_kernel(
    inputs, parameters, count, statistics, out, partial, factor, shape, counts,
    KIND: tl.constexpr, WHOLE: tl.constexpr, STAGE: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`count`: 1 / K, log K and 1 / (K - 1). Diagnostics leave nothing but statistics."""
    row, _, first, last = program(counts, BLOCK_R, INDEX)
    place = (inputs, row, shape, counts)
    inverse_count = value_of(count[0], DTYPE)
    log_count = value_of(count[1], DTYPE)
    inverse_others = value_of(count[2], DTYPE)
    if WHOLE:
        tile = _tile_at(first, place, DTYPE, BLOCK_C)
    else:
        tile = None
    largest, second = _largest(tile, place, first, last, parameters, KIND, DTYPE, BLOCK_R, BLOCK_C)
    base = finite_base(largest)
    if KIND == "vimco":
        # the sum over all but a sole best is relative to the second: it does not vanish beside the best
        only = second < largest
        second_base = finite_base(second)
        kept = (base, second_base, tl.where(only, largest, float("nan")))
        others, drop, missing = _sums(tile, place, first, last, kept, parameters, KIND, DTYPE, BLOCK_R, BLOCK_C)
        total = tl.where(only, 1 + others * tl.exp(second - base), others) + (base - base)
        mean = tl.where(missing > 0, float("-inf"), drop * inverse_others)
        change = divide(expm1(mean), total)
        step = base - second_base
        direct = step + tl.log(total) - tl.log(others + tl.exp(mean + step))
        best = tl.where(change < -0.75, direct, -log1p(change))
        best = tl.where(only, best, float("nan"))
        store_rows(statistics, row, shape, counts, total, 1)
        store_rows(statistics, row, shape, counts, drop, 2)
        store_rows(statistics, row, shape, counts, missing, 3)
        store_rows(statistics, row, shape, counts, best, 4)
        kept = (base, _inverse(total), drop, missing, best, inverse_others)
        signals, _, _ = _sums(tile, place, first, last, kept, parameters, "signals", DTYPE, BLOCK_R, BLOCK_C)
        value = (base + tl.log(total) - log_count) + signals
    elif KIND == "tvo":
        empty = largest == float("-inf")
        value = largest
        for sweep in range(parameters[1]):
            at = parameters[0] + sweep
            beta = tl.load(at)
            kept = (base, beta.to(DTYPE))
            sums = _sums(tile, place, first, last, kept, parameters, KIND, DTYPE, BLOCK_R, BLOCK_C)
            total = sums[0]
            nothing = tl.where(sums[1] == sums[1], 0.0, sums[1])  # a NaN stays
            mean = tl.where(empty, nothing, divide(sums[1], total))
            store_rows(statistics, row, shape, counts, tl.where(empty, nothing, total), 2 * sweep + 1)
            store_rows(statistics, row, shape, counts, mean, 2 * sweep + 2)
            value += (tl.load(at + 1) - beta).to(DTYPE) * mean
    elif KIND == "variance":
        total, _, _ = _sums(tile, place, first, last, (base,), parameters, KIND, DTYPE, BLOCK_R, BLOCK_C)
        mean = total * inverse_count
        store_rows(statistics, row, shape, counts, mean, 1)
        value, _, _ = _sums(tile, place, first, last, (base, mean), parameters, "squares", DTYPE, BLOCK_R, BLOCK_C)
    elif KIND == "rws" or KIND == "weighted sum":
        total, extra, _ = _sums(tile, place, first, last, (base,), parameters, KIND, DTYPE, BLOCK_R, BLOCK_C)
        store_rows(statistics, row, shape, counts, total, 1)
        value = extra * _inverse(total)
        if KIND == "rws":
            _close_value(value, row, out[1], partial[1], factor, shape, counts, STAGE, DTYPE)
            value = base + tl.log(total) - log_count
    elif KIND == "diagnostics":
        total, squares, extra = _sums(tile, place, first, last, (base,), parameters, KIND, DTYPE, BLOCK_R, BLOCK_C)
        empty = total == 0
        inverse = _inverse(total)
        ess = tl.where(empty, 0.0, divide(total * total, tl.where(empty, 1.0, squares)))
        store_rows(statistics, row, shape, counts, ess, 1)
        store_rows(statistics, row, shape, counts, inverse, 2)
        log_total = tl.log(total)
        store_rows(statistics, row, shape, counts, tl.where(empty, 0.0, log_total - extra * inverse), 3)
        base = base + log_total - log_count
    else:
        extreme, base = power_base(largest, parameters, KIND)
        total, mean, excess = _sums(tile, place, first, last, (base,), parameters, KIND, DTYPE, BLOCK_R, BLOCK_C)
        value, total = power_value(extreme, base, total, mean, excess, parameters, count, KIND)
        store_rows(statistics, row, shape, counts, total, 1)
    store_rows(statistics, row, shape, counts, base)
    if KIND != "diagnostics":
        _close_value(value, row, out[0], partial[0], factor, shape, counts, STAGE, DTYPE)


def _inverse_others(columns: int) -> float:
    return 1 / (columns - 1) if columns > 1 else math.nan


def counts_of(columns: int) -> tuple[Any, ...]:
    numbers = (1 / max(columns, 1), math.log(max(columns, 1)), _inverse_others(columns))
    return tuple(map(_rows.scalar, numbers))


def _estimate(
    kind: str, x: Tensor, other: Tensor | None, dim: int, parameters: Any = None, *,
    planes: int = 2, values: int = 1, reduction: str = "none", factor: float = 1.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(rows or their reduction, `values` of them, statistics `[planes, rows]`)."""
    columns = (dim % x.dim(),)
    dtype = _rows.result_dtype(x)
    row_shape = _row_shape(x, columns)
    out = [x.new_empty(row_shape if reduction == "none" else (), dtype=dtype) for _ in range(values)]
    statistics = x.new_empty((planes, *row_shape), dtype=dtype)
    g, inputs, rows = _rows.operands(columns, (x, other), (statistics[0], *out))
    number = _rows.arithmetic(x)
    plan = g.unsplit(2048, number)
    stage, _ = _rows.stages(plan, reduction)
    partial = tuple(_rows.partials(x, stage, g.rows, plan) for _ in out)
    scale = _rows.scalar(_rows.reduction_factor(factor, g.rows, reduction))
    common: dict[str, Any] = {"DTYPE": number, "INDEX": g.index}
    _rows.launch(
        _estimators_kernel, (plan.programs,), x.device, inputs, parameters, counts_of(g.cols), rows[0], rows[1:],
        partial, scale, g.shape, plan.counts, KIND=kind, WHOLE=plan.block_c >= g.cols, STAGE=stage,
        **common, **plan.constants,
    )  # fmt: skip
    for share, total in zip(partial, out, strict=True):
        if share is not None:
            _rows.finish_total(share, total, scale, common)
    return *out, statistics


@triton.jit
def _slopes_kernel(
    inputs, out, given, statistics, parameters, count, factor, shape, counts, KIND: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`given`: the gradient, and a second one (rws) or the value (weighted sum)."""
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    x = load(inputs[0], row, col, shape, mask, DTYPE)
    g = load_rows(given[0], row, shape, counts, DTYPE) * value_of(factor, DTYPE)
    base = load_rows(statistics, row, shape, counts, DTYPE)
    if KIND == "vimco":
        inverse = _inverse(load_rows(statistics, row, shape, counts, DTYPE, 1))
        if out[0] is not None:
            store(out[0], row, col, shape, mask, weighted(inverse[:, None] * tl.exp(x - base[:, None]), g[:, None]))
        if out[1] is not None:
            drop = load_rows(statistics, row, shape, counts, DTYPE, 2)
            missing = load_rows(statistics, row, shape, counts, DTYPE, 3)
            best = load_rows(statistics, row, shape, counts, DTYPE, 4)
            inverse_others = value_of(count[2], DTYPE)
            signal = _vimco_signal(x, base, inverse, drop, missing, best, inverse_others)
            store(out[1], row, col, shape, mask, weighted(signal, g[:, None]))
    elif KIND == "tvo":
        distance = x - base[:, None]
        slope = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
        for sweep in range(parameters[1]):
            at = parameters[0] + sweep
            beta = tl.load(at)
            width = (tl.load(at + 1) - beta).to(DTYPE)
            beta = beta.to(DTYPE)
            inverse = _inverse(load_rows(statistics, row, shape, counts, DTYPE, 2 * sweep + 1))
            mean = load_rows(statistics, row, shape, counts, DTYPE, 2 * sweep + 2)
            weight = _tempered(distance, beta) * (width * inverse)[:, None]
            slope += weighted(tl.where(beta == 0, 1.0, 1 + beta * (distance - mean[:, None])), weight)
        store(out[0], row, col, shape, mask, weighted(slope, g[:, None]))
    elif KIND == "variance":
        mean = load_rows(statistics, row, shape, counts, DTYPE, 1)
        store(out[0], row, col, shape, mask, weighted((x - base[:, None]) - mean[:, None], g[:, None]))
    elif KIND == "rws" or KIND == "weighted sum":
        y = load(inputs[1], row, col, shape, mask, DTYPE)
        other = load_rows(given[1], row, shape, counts, DTYPE)
        inverse = _inverse(load_rows(statistics, row, shape, counts, DTYPE, 1))
        weight = tl.exp(_log_weights(x, y, parameters, KIND) - base[:, None]) * inverse[:, None]
        if KIND == "rws":
            first = weighted(weight, g[:, None])
            second = weighted(weight, (other * value_of(factor, DTYPE))[:, None])
        else:
            second = weighted(weight, g[:, None])
            first = weighted((y - other[:, None]) * value_of(parameters, DTYPE), second)
        if out[0] is not None:
            store(out[0], row, col, shape, mask, first)
        if out[1] is not None:
            store(out[1], row, col, shape, mask, second)
    else:
        total = load_rows(statistics, row, shape, counts, DTYPE, 1)
        store(out[0], row, col, shape, mask, power_slope(x, g, base, total, parameters, count, KIND))


def _slopes(
    kind: str, given: Sequence[Tensor], x: Tensor, other: Tensor | None, statistics: Tensor, dim: int,
    parameters: Any = None, *, reduction: str = "none", factor: float = 1.0, needed: int = 1,
) -> Any:  # fmt: skip
    """(gradient of `x`, gradient of `other`), empty where not needed."""
    columns = (dim % x.dim(),)
    inputs = (x,) if other is None else (x, other)
    out = [torch.empty_like(t) if needed >> i & 1 else None for i, t in enumerate(inputs)]
    g, full, rows = _rows.operands(columns, (*inputs, *out), (statistics.contiguous()[0], *given))
    number = _rows.arithmetic(x)
    plan = g.map(1024, number)
    scale = _rows.scalar(_rows.reduction_factor(factor, g.rows, reduction))
    _rows.launch(
        _slopes_kernel, (plan.programs,), x.device, full[: len(inputs)], full[len(inputs) :], rows[1:], rows[0],
        parameters, counts_of(g.cols), scale, g.shape, plan.counts,
        KIND=kind, DTYPE=number, INDEX=g.index, **plan.constants,
    )  # fmt: skip
    return _rows.present(out, x)


def power_parameters(power: float, elbo_weight: float) -> tuple[str, Any]:
    """(kind, (power, its inverse, the sign of the log-weights of which the largest is wanted, elbo_weight if any))."""
    kind = "mean" if power == 0 else "extreme" if math.isinf(power) else "small power" if abs(power) < 0.5 else "power"
    numbers = (power, 1 / power if power else 0.0, math.copysign(1.0, power))
    return kind, (*map(_rows.scalar, numbers), _rows.scalar(elbo_weight) if elbo_weight else None)


def power_bound_loss(
    log_w: Tensor, dim: int, power: float, elbo_weight: float, scale: float, reduction: str
) -> tuple[Tensor, ...]:
    kind, parameters = power_parameters(power, elbo_weight)
    return _estimate(kind, log_w, None, dim, parameters, reduction=reduction, factor=scale)


def power_bound_loss_backward(
    grad: Tensor, log_w: Tensor, statistics: Tensor, dim: int, power: float, elbo_weight: float, scale: float,
    reduction: str,
) -> Tensor:  # fmt: skip
    kind, parameters = power_parameters(power, elbo_weight)
    return _slopes(kind, (grad,), log_w, None, statistics, dim, parameters, reduction=reduction, factor=scale)[0]


POINTS = tl.constexpr(16)  # that a launch takes along


@triton.jit
def _partition_kernel(out, points, count):
    for i in tl.static_range(len(points)):
        tl.store(out + i, value_of(points[i], tl.float64), mask=i < count)


def _partition(partition: Sequence[float], like: Tensor) -> tuple[Tensor, int]:
    """(the points on the device: no copy from the host, which would wait for it; the number of sweeps)."""
    points = like.new_empty((len(partition),), dtype=torch.float64)
    for first in range(0, len(partition), POINTS.value):
        some = [_rows.scalar(point) for point in partition[first : first + POINTS.value]]
        padded = (*some, *[_rows.scalar(0.0)] * (POINTS.value - len(some)))
        _rows.launch(_partition_kernel, (1,), like.device, points[first:], padded, len(some), num_warps=1)
    return points, len(partition) - 1


def tvo_loss(log_w: Tensor, dim: int, partition: Sequence[float], reduction: str) -> tuple[Tensor, ...]:
    planes, points = 2 * len(partition) - 1, _partition(partition, log_w)
    return _estimate("tvo", log_w, None, dim, points, planes=planes, reduction=reduction, factor=-1.0)


def tvo_loss_backward(
    grad: Tensor, log_w: Tensor, statistics: Tensor, dim: int, partition: Sequence[float], reduction: str
) -> Tensor:
    points = _partition(partition, log_w)
    return _slopes("tvo", (grad,), log_w, None, statistics, dim, points, reduction=reduction, factor=-1.0)[0]


def vimco_loss(log_w: Tensor, log_q: Tensor, dim: int, reduction: str) -> tuple[Tensor, ...]:
    return _estimate("vimco", log_w, log_q, dim, planes=5, reduction=reduction, factor=-1.0)


def vimco_loss_backward(
    grad: Tensor, log_w: Tensor, log_q: Tensor, statistics: Tensor, dim: int, reduction: str, needed: int
) -> tuple[Tensor, Tensor]:
    return _slopes("vimco", (grad,), log_w, log_q, statistics, dim, reduction=reduction, factor=-1.0, needed=needed)


def rws_losses(log_p: Tensor, log_q: Tensor, dim: int, reduction: str) -> tuple[Tensor, ...]:
    return _estimate("rws", log_p, log_q, dim, values=2, reduction=reduction, factor=-1.0)


def rws_losses_backward(
    grad_theta: Tensor, grad_phi: Tensor, log_p: Tensor, log_q: Tensor, statistics: Tensor, dim: int, reduction: str,
    needed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = (grad_theta, grad_phi)
    return _slopes("rws", given, log_p, log_q, statistics, dim, reduction=reduction, factor=-1.0, needed=needed)


def log_variance_loss(log_w: Tensor, dim: int, reduction: str) -> tuple[Tensor, ...]:
    factor = 0.5 * _inverse_others(log_w.size(dim))
    return _estimate("variance", log_w, None, dim, reduction=reduction, factor=factor)


def log_variance_loss_backward(grad: Tensor, log_w: Tensor, statistics: Tensor, dim: int, reduction: str) -> Tensor:
    factor = _inverse_others(log_w.size(dim))
    return _slopes("variance", (grad,), log_w, None, statistics, dim, reduction=reduction, factor=factor)[0]


def importance_weighted_sum(log_w: Tensor, payload: Tensor, dim: int, temperature: float) -> tuple[Tensor, ...]:
    return _estimate("weighted sum", log_w, payload, dim, _rows.scalar(1 / temperature))


def importance_weighted_sum_backward(
    grad: Tensor, log_w: Tensor, payload: Tensor, value: Tensor, statistics: Tensor, dim: int, temperature: float,
    needed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inverse = _rows.scalar(1 / temperature)
    return _slopes("weighted sum", (grad, value), log_w, payload, statistics, dim, inverse, needed=needed)


def weight_diagnostics(log_w: Tensor, dim: int) -> Tensor:
    return _estimate("diagnostics", log_w, None, dim, planes=4, values=0)[-1]


# ---- the tail's shape ------------------------------------------------------------------------------------------------


@triton.jit
def _excess(log_w, top, cutoff):
    counted = log_w - top > cutoff
    return tl.where(counted, tl.exp(tl.where(counted, log_w - top, 0.0)) - tl.exp(cutoff), 0.0)


@triton.jit
def _pareto_kernel(tail, shapes, count, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """A program fits a row: tiles are points of the grid, or the whole tail."""
    row = tl.program_id(0).to(INDEX)
    values = tail + row * (count + 1)
    largest = tl.load(values).to(tl.float64)
    top = tl.where(largest == float("-inf"), 0.0, largest)
    cutoff = tl.load(values + count).to(tl.float64) - top
    cutoff = tl.where(cutoff < -708.39641853226408, -708.39641853226408, cutoff)
    i = tl.arange(0, BLOCK_M)
    log_w = tl.load(values + i, mask=i < count, other=float("-inf")).to(tl.float64)
    excess = _excess(log_w, top, cutoff)
    n = tl.sum((log_w - top > cutoff).to(tl.float64), 0)

    points = 30 + tl.floor(tl.sqrt(n))
    quartile = tl.maximum(n - tl.floor(n / 4 + 0.5), 0.0)
    of_quartile = tl.sum(tl.where(i.to(tl.float64) == quartile, excess, 0.0), 0)
    of_largest = tl.sum(tl.where(i == 0, excess, 0.0), 0)
    g = tl.arange(0, BLOCK_G).to(tl.float64)
    b = (1 - tl.sqrt(points / (g + 0.5))) / (3 * of_quartile) + 1 / of_largest
    total = tl.zeros([BLOCK_G], tl.float64)
    for m in range(0, count):
        x = _excess(tl.load(values + m).to(tl.float64), top, cutoff)
        total += log1p(-b * x)
    mean = total / n
    likelihood = tl.where(g < points, n * (tl.log(-b / mean) - mean - 1), float("-inf"))
    weights = tl.exp(likelihood - tl.max(likelihood, 0))
    weights = tl.where(weights >= 10 * 2.220446049250313e-16 * tl.sum(weights, 0), weights, 0.0)
    best = tl.sum(tl.where(weights == 0, 0.0, weights * b), 0) / tl.sum(weights, 0)
    shape = (tl.sum(log1p(-best * excess), 0) + 5) / (n + 10)
    shape = tl.where(n >= 5, shape, float("inf"))
    tl.store(shapes + row, tl.where(top == top, shape, top).to(shapes.dtype.element_ty))


def pareto_shape(tail: Tensor) -> Tensor:
    count = tail.size(-1) - 1
    shapes = torch.empty(tail.shape[:-1], dtype=tail.dtype, device=tail.device)
    if shapes.numel():
        _rows.launch(
            _pareto_kernel, (shapes.numel(),), tail.device, tail, shapes, count,
            INDEX=tl.int64 if tail.numel() >= 2**31 else tl.int32, BLOCK_M=_rows.power_of_2(count),
            BLOCK_G=_rows.power_of_2(30 + math.isqrt(count)), num_warps=1 if count <= 256 else 4,
        )  # fmt: skip
    return shapes
