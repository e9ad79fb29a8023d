"""Triton kernels of the importance weights: softmax rows, read once where a row fits a tile or is being reduced."""

import math
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
    finite_base,
    load,
    load_rows,
    load_splits,
    program,
    sigmoid,
    softmax_weights,
    softplus,
    store,
    store_rows,
    tile_of,
    value_of,
)

__all__ = [
    "effective_sample_size",
    "importance_weighted_generator_loss",
    "importance_weighted_generator_loss_backward",
    "importance_weights",
    "importance_weights_backward",
    "iwae_loss",
    "iwae_loss_backward",
    "log_mean_exp",
    "log_mean_exp_backward",
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
        value = tl.where(empty, 0.0, divide(extra, tl.where(empty, 1.0, total)))
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
        weights = tl.where((total == 0)[:, None], 0.0, g[:, None] * weights)
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
def _dot(g, w):
    return tl.where(w == 0, 0.0, g * w)


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
        total += _dot(g, load(weights, row, col, shape, mask, DTYPE))
    close_rows(tl.sum(total, 1), row, split, close, shape, counts, STAGE, DTYPE)


@triton.jit
def _weights_backward_kernel(
    grad, weights, mean, out, inverse_temperature, shape, counts,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """w (g - mean) / temperature, `mean` being sum w·g. Without it the tile holds whole rows."""
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    g = load(grad, row, col, shape, mask, DTYPE)
    w = load(weights, row, col, shape, mask, DTYPE)
    if mean is None:
        center = tl.sum(_dot(g, w), 1)
    else:
        center = load_rows(mean, row, shape, counts, DTYPE)
    value = tl.where(w == 0, 0.0, w * (g - center[:, None])) * value_of(inverse_temperature, DTYPE)
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
    store(out, row, col, shape, mask, tl.where(w == 0, 0.0, g[:, None] * w * slope))


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
