"""Triton kernels over all pairs of a minibatch: tiles of BLOCK_I points i × BLOCK_J points j.

A matrix, in a kernel, is (pointer, stride of the points, stride of the columns). Nothing is kept for a pair beyond its
tile. A program owns its points and adds up their gradients tile after tile, in memory of its own: the same sums in
every run.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unigen_fast.triton import _rows
from unigen_fast.triton._rows import finite_base, finite_exp

__all__ = ["mmd", "mmd_backward", "total_correlation", "total_correlation_backward"]

LN_2PI = tl.constexpr(1.8378770664093453)
FAR = tl.constexpr(128 * math.log(2))  # kFarMarginal of csrc/formulas/pairwise.h, which counts in powers of 2


@triton.jit
def _column(matrix, point, d, points, DTYPE: tl.constexpr):
    """Column d of some points; 0 beyond the last."""
    return tl.load(matrix[0] + point * matrix[1] + d * matrix[2], mask=point < points, other=0.0).to(DTYPE)


@triton.jit
def _set_column(matrix, point, d, points, value):
    tl.store(matrix[0] + point * matrix[1] + d * matrix[2], value.to(matrix[0].dtype.element_ty), mask=point < points)


@triton.jit
def _points(block, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    return block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)


# ---- total correlation -----------------------------------------------------------------------------------------------


@triton.jit
def _weights(i, j, points, size, ESTIMATOR: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK_I, BLOCK_J] relative to the weight of most pairs: 0 for pairs that are not there."""
    w = (i[:, None] < points).to(DTYPE) * (j[None, :] < points).to(DTYPE)
    if ESTIMATOR != "mws":
        n = tl.full([], 0, DTYPE) + size
        m = tl.full([], 0, DTYPE) + (points - 1)
        if ESTIMATOR == "mss":
            of_diagonal = j[None, :] == i[:, None]
            of_following = j[None, :] == tl.where(i + 1 < points, i + 1, 0)[:, None]
        else:
            of_diagonal = (j[None, :] == 0) & (i[:, None] + 2 != points)
            of_following = (j[None, :] <= 1) & (i[:, None] < points)
        w *= tl.where(of_diagonal, m / n, tl.where(of_following, (n - m) / n, 1.0)).to(DTYPE)
    return w


@triton.jit
def _log_most(points, size, ESTIMATOR: tl.constexpr, DTYPE: tl.constexpr):
    """Logarithm of the weight of most pairs."""
    if ESTIMATOR != "mws":
        return -tl.log(tl.full([], 0, DTYPE) + (points - 1))
    return -tl.log(tl.full([], 0, DTYPE) + points) - tl.log(tl.full([], 0, DTYPE) + size)


@triton.jit
def _log_density(z, mean, logvar):
    """[BLOCK_I, BLOCK_J]: log N(z_i; mean_j, e^logvar_j), the standardised z, and 1 / std_j."""
    most: tl.constexpr = 1e300 if logvar.dtype == tl.float64 else 1e30  # as in csrc/formulas/pairwise.h
    rate = tl.minimum(finite_exp(-0.5 * logvar), tl.full([], most, logvar.dtype))[None, :]
    t = (z[:, None] - mean[None, :]) * rate
    return -0.5 * (t * t + (logvar[None, :] + LN_2PI)), t, rate


@triton.jit
def _joint(
    z, mean, logvar, i, j, counts,
    DTYPE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Log-densities of a tile's pairs, summed over the columns: in float64, as many make large sums."""
    points, cols = counts
    total = tl.zeros([BLOCK_I, BLOCK_J], tl.float64)
    for first in range(0, cols, CHUNK):
        part = tl.zeros([BLOCK_I, BLOCK_J], DTYPE)
        for d in range(first, tl.minimum(first + CHUNK, cols)):
            density, _, _ = _log_density(
                _column(z, i, d, points, DTYPE),
                _column(mean, j, d, points, DTYPE),
                _column(logvar, j, d, points, DTYPE),
            )
            part += density
        total += part.to(tl.float64)
    return total


@triton.jit
def _column_sum(
    zi, mean, logvar, i, d, points, size,
    ESTIMATOR: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """[BLOCK_I]: the highest log-density of column d, and the sum of the densities divided by it."""
    top = tl.full([BLOCK_I], -float("inf"), DTYPE)
    total = tl.zeros([BLOCK_I], DTYPE)
    for first in range(0, points, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J).to(INDEX)
        density, _, _ = _log_density(zi, _column(mean, j, d, points, DTYPE), _column(logvar, j, d, points, DTYPE))
        w = _weights(i, j, points, size, ESTIMATOR, DTYPE)
        highest = tl.maximum(top, tl.max(tl.where((j < points)[None, :], density, -float("inf")), 1))
        shift = finite_base(highest)
        terms = tl.where(w == 0, 0.0, w * tl.exp(density - shift[:, None]))
        total = tl.where(total == 0, 0.0, total * tl.exp(top - shift)) + tl.sum(terms, 1)
        top = highest
    return finite_base(top), total


@triton.jit
def _marginals_kernel(
    z, mean, logvar, statistics, counts, size,
    ESTIMATOR: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    points = counts[0]
    d = tl.program_id(1)
    i = _points(tl.program_id(0), BLOCK_I, INDEX)
    zi = _column(z, i, d, points, DTYPE)
    top, total = _column_sum(zi, mean, logvar, i, d, points, size, ESTIMATOR, DTYPE, INDEX, BLOCK_I, BLOCK_J)
    total = tl.where(i < points, total, 1.0)
    value = top + tl.log(total) + _log_most(points, size, ESTIMATOR, DTYPE)
    tl.store(statistics + d * points + i, value, mask=i < points)


@triton.jit
def _joint_kernel(
    z, mean, logvar, statistics, outputs, counts, size,
    ESTIMATOR: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    points, cols = counts
    i = _points(tl.program_id(0), BLOCK_I, INDEX)
    top = tl.full([BLOCK_I], -float("inf"), tl.float64)
    total = tl.zeros([BLOCK_I], tl.float64)
    own = tl.zeros([BLOCK_I], tl.float64)
    for first in range(0, points, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J).to(INDEX)
        density = _joint(z, mean, logvar, i, j, counts, DTYPE, BLOCK_I, BLOCK_J, CHUNK)
        own += tl.sum(tl.where(i[:, None] == j[None, :], density, 0.0), 1)
        w = _weights(i, j, points, size, ESTIMATOR, DTYPE)
        highest = tl.maximum(top, tl.max(tl.where((j < points)[None, :], density, -float("inf")), 1))
        shift = finite_base(highest)
        terms = tl.where(w == 0, 0.0, w * tl.exp((density - shift[:, None]).to(DTYPE)))
        total = tl.where(total == 0, 0.0, total * tl.exp(top - shift)) + tl.sum(terms, 1).to(tl.float64)
        top = highest
    # kept to its last bit, in three numbers: far away that is more than an exponential can hold
    shift = finite_base(top)
    high = shift.to(DTYPE)
    middle = (shift - high.to(tl.float64)).to(DTYPE)
    low = (shift - high.to(tl.float64) - middle.to(tl.float64)).to(DTYPE)
    total = tl.where(i < points, total, 1.0)
    log_qz = shift + tl.log(total) + _log_most(points, size, ESTIMATOR, tl.float64)
    log_prod = tl.zeros([BLOCK_I], tl.float64)
    log_pz = tl.zeros([BLOCK_I], tl.float64)
    for d in range(0, cols):
        zi = _column(z, i, d, points, DTYPE).to(tl.float64)
        log_prod += tl.load(statistics + d * points + i, mask=i < points, other=0.0).to(tl.float64)
        log_pz -= 0.5 * (zi * zi + LN_2PI)
    inside = i < points
    tl.store(statistics + cols * points + i, high, mask=inside)
    tl.store(statistics + (cols + 1) * points + i, middle, mask=inside)
    tl.store(statistics + (cols + 2) * points + i, low, mask=inside)
    tl.store(statistics + (cols + 3) * points + i, total.to(DTYPE), mask=inside)
    tl.store(outputs[0] + i, log_qz.to(DTYPE), mask=inside)
    tl.store(outputs[1] + i, log_prod.to(DTYPE), mask=inside)
    tl.store(outputs[2] + i, own.to(DTYPE), mask=inside)
    tl.store(outputs[3] + i, (own - log_qz).to(DTYPE), mask=inside)
    tl.store(outputs[4] + i, (log_qz - log_prod).to(DTYPE), mask=inside)
    tl.store(outputs[5] + i, (log_prod - log_pz).to(DTYPE), mask=inside)


@triton.jit
def _gradient(grad, i, points):
    """(pointer, stride)."""
    return tl.load(grad[0] + i * grad[1], mask=i < points, other=0.0)


@triton.jit
def _pair_slopes_kernel(
    z, mean, logvar, statistics, grads, sums, counts, size,
    OWN_I: tl.constexpr, ESTIMATOR: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds to `sums` [columns, points], of which the program owns its points: d / d z (`OWN_I`), or d / d mean and
    d / d logvar."""
    points, cols = counts
    OWN: tl.constexpr = BLOCK_I if OWN_I else BLOCK_J
    OTHER: tl.constexpr = BLOCK_J if OWN_I else BLOCK_I
    own = _points(tl.program_id(0), OWN, INDEX)
    for first in range(0, points, OTHER):
        other = first + tl.arange(0, OTHER).to(INDEX)
        if OWN_I:
            i, j = own, other
        else:
            i, j = other, own
        g0, g1, g2 = _gradient(grads[0], i, points), _gradient(grads[1], i, points), _gradient(grads[2], i, points)
        g3, g4, g5 = _gradient(grads[3], i, points), _gradient(grads[4], i, points), _gradient(grads[5], i, points)
        marginal_slope = g1 - g4 + g5
        none = (g0 - g3 + g4 == 0) & (marginal_slope == 0) & (g2 + g3 == 0) & (g5 == 0)  # no gradient, whatever z is
        shift = tl.load(statistics + (cols + 2) * points + i, mask=i < points, other=0.0).to(tl.float64)
        shift += tl.load(statistics + (cols + 1) * points + i, mask=i < points, other=0.0).to(tl.float64)
        shift += tl.load(statistics + cols * points + i, mask=i < points, other=0.0).to(tl.float64)
        total = tl.load(statistics + (cols + 3) * points + i, mask=i < points, other=1.0)
        joint_slope = tl.where(none | (total == 0), 0.0, (g0 - g3 + g4) / tl.where(total == 0, 1.0, total))
        w = _weights(i, j, points, size, ESTIMATOR, DTYPE)
        joint = _joint(z, mean, logvar, i, j, counts, DTYPE, BLOCK_I, BLOCK_J, CHUNK)
        slope = tl.where((w == 0) | none[:, None], 0.0, w * tl.exp((joint - shift[:, None]).to(DTYPE)))
        slope = slope * joint_slope[:, None] + tl.where(i[:, None] == j[None, :], (g2 + g3)[:, None], 0.0)
        log_most = _log_most(points, size, ESTIMATOR, DTYPE)
        for d in range(0, cols):
            zi = tl.where(none, 0.0, _column(z, i, d, points, DTYPE))
            marginal = tl.load(statistics + d * points + i, mask=i < points, other=float("inf"))
            nothing = none | (marginal == -float("inf"))  # no density at all: no weight
            marginal = tl.where(nothing, float("inf"), marginal - log_most)
            # where the logarithm's rounding is seen in the quotient, the sum is taken again, of the very densities
            far = (tl.abs(marginal) > FAR) & (tl.abs(marginal) < float("inf"))
            of_marginal = marginal_slope
            if tl.max(far.to(tl.int32)) > 0:
                top, sum_of_top = _column_sum(
                    zi, mean, logvar, i, d, points, size, ESTIMATOR, DTYPE, INDEX, BLOCK_I, BLOCK_J
                )
                marginal = tl.where(far, top, marginal)
                of_marginal = tl.where(far, marginal_slope / tl.where(far, sum_of_top, 1.0), of_marginal)
            density, t, rate = _log_density(
                zi, _column(mean, j, d, points, DTYPE), _column(logvar, j, d, points, DTYPE)
            )
            g = slope + tl.where(w == 0, 0.0, w * tl.exp(density - marginal[:, None])) * of_marginal[:, None]
            inside = own < points
            place = d * points + own
            if OWN_I:
                found = -tl.sum(g * t * rate, 1)
                found += tl.load(sums[0] + place, mask=inside, other=0.0)
                found += tl.where(first == 0, zi * g5, 0.0)
                tl.store(sums[0] + place, found, mask=inside)
            else:
                found = tl.sum(g * t * rate, 0) + tl.load(sums[0] + place, mask=inside, other=0.0)
                tl.store(sums[0] + place, found, mask=inside)
                found = 0.5 * tl.sum(g * (t * t - 1), 0) + tl.load(sums[1] + place, mask=inside, other=0.0)
                tl.store(sums[1] + place, found, mask=inside)
        tl.debug_barrier()  # a number may be read by another thread than the one that wrote it


def _matrix(x: Tensor) -> tuple[Any, ...]:
    return (x, x.stride(0), x.stride(1))


def _launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **constants: Any) -> None:
    dtype = _rows.arithmetic(like)
    points = like.size(0)
    index = tl.int64 if points * max(like.size(1) + 2, *map(abs, like.stride())) >= 2**31 - 2**20 else tl.int32
    _rows.launch(kernel, grid, like.device, *args, DTYPE=dtype, INDEX=index, **constants)


def _tile(like: Tensor, *points: int) -> tuple[int, int]:
    """(BLOCK_I, BLOCK_J): 8 pairs a thread, 4 in fp64: more would spill."""
    j = min(32 if like.dtype == torch.float64 else 64, _rows.power_of_2(max(points)))
    return min(16, _rows.power_of_2(min(points))), j


def _sampling(rows: int, dataset_size: int, estimator: str) -> tuple[int, str]:
    """Size of the data set and estimator, for the kernels: a single row has the stratified weight 1."""
    return (1, "mws") if estimator != "mws" and rows < 2 else (max(dataset_size, rows), estimator)


def total_correlation(
    z: Tensor, mean: Tensor, logvar: Tensor, dataset_size: int, estimator: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, cols = z.shape
    dtype = _rows.result_dtype(z)
    outputs = tuple(torch.empty(rows, dtype=dtype, device=z.device) for _ in range(6))
    statistics = torch.empty((cols + 4, rows), dtype=dtype, device=z.device)
    size, estimator = _sampling(rows, dataset_size, estimator)
    block_i, block_j = _tile(z, rows)
    tensors = tuple(_matrix(x) for x in (z, mean, logvar))
    constants = {"ESTIMATOR": estimator, "BLOCK_I": block_i, "BLOCK_J": block_j, "num_warps": 4}
    blocks = _rows.ceil_div(rows, block_i)
    _launch(_marginals_kernel, (blocks, cols), z, *tensors, statistics, (rows, cols), size, **constants)
    _launch(_joint_kernel, (blocks,), z, *tensors, statistics, outputs, (rows, cols), size, CHUNK=32, **constants)
    return *outputs, statistics  # type: ignore[return-value]


def total_correlation_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grads = args[:6]
    z, mean, logvar, statistics, dataset_size, estimator, needed = args[6:]
    rows, cols = z.shape
    size, estimator = _sampling(rows, dataset_size, estimator)
    block_i, block_j = _tile(z, rows)
    block_j = min(block_j, 32)  # 4 pairs a thread: a column's sum, taken again in the middle, has a tile of its own
    tensors = tuple(_matrix(x) for x in (z, mean, logvar))
    slopes = tuple((g, g.stride(0)) for g in grads)
    found: list[Tensor | None] = [None, None, None]
    for own_i, places in ((True, (0,)), (False, (1, 2))):
        if not any(needed >> place & 1 for place in places):
            continue
        sums = tuple(torch.zeros((cols, rows), dtype=statistics.dtype, device=z.device) for _ in places)
        blocks = _rows.ceil_div(rows, block_i if own_i else block_j)
        _launch(
            _pair_slopes_kernel, (blocks,), z, *tensors, statistics, slopes, sums, (rows, cols), size,
            OWN_I=own_i, ESTIMATOR=estimator, BLOCK_I=block_i, BLOCK_J=block_j, CHUNK=32, num_warps=4,
        )  # fmt: skip
        for place, total in zip(places, sums, strict=True):
            if needed >> place & 1:
                found[place] = torch.empty_like((z, mean, logvar)[place]).copy_(total.t())
    return _rows.present(found, z)


# ---- maximum mean discrepancy ----------------------------------------------------------------------------------------


@triton.jit
def _kernel_term(square, width, RBF: tl.constexpr, SLOPE: tl.constexpr):
    """C/(C + d²) or e^{-d²/C}, or its derivative with respect to d²."""
    if RBF:
        value = tl.exp(-square / width)
        return -value / width if SLOPE else value
    value = width / (width + square)
    return -value * value / width if SLOPE else value


@triton.jit
def _pair_kernel(
    x, y, i, j, x_points, y_points, cols, SAME: tl.constexpr, WIDTHS: tl.constexpr, RBF: tl.constexpr,
    SLOPE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The kernel, or its slope, of a tile's pairs; 0 for a point and itself, and for pairs that are not there."""
    square = tl.zeros([BLOCK_I, BLOCK_J], DTYPE)
    for d in range(0, cols):
        t = _column(x, i, d, x_points, DTYPE)[:, None] - _column(y, j, d, y_points, DTYPE)[None, :]
        square += t * t
    total = tl.zeros([BLOCK_I, BLOCK_J], DTYPE)
    for s in tl.static_range(len(WIDTHS)):
        total += _kernel_term(square, tl.full([], WIDTHS[s], DTYPE), RBF, SLOPE)
    counted = (i < x_points)[:, None] & (j < y_points)[None, :]
    if SAME:
        counted &= i[:, None] != j[None, :]
    return tl.where(counted, total, 0.0)


@triton.jit
def _mmd_kernel(
    x, y, partial, place, x_points, y_points, cols, SAME: tl.constexpr, WIDTHS: tl.constexpr, RBF: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """partial[place + program] = sum over the program's points x and all y."""
    i = _points(tl.program_id(0), BLOCK_I, INDEX)
    total = tl.zeros([BLOCK_I], tl.float64)
    for first in range(0, y_points, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J).to(INDEX)
        values = _pair_kernel(x, y, i, j, x_points, y_points, cols, SAME, WIDTHS, RBF, False, DTYPE, BLOCK_I, BLOCK_J)
        total += tl.sum(values, 1).to(tl.float64)
    tl.store(partial + place + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _mmd_slopes_kernel(
    x, y, factor, sums, x_points, y_points, cols, SAME: tl.constexpr, WIDTHS: tl.constexpr, RBF: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Adds d / d x to `sums` [columns, points], of which the program owns its points."""
    i = _points(tl.program_id(0), BLOCK_I, INDEX)
    scale = _rows.value_of(factor, DTYPE)
    for first in range(0, y_points, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J).to(INDEX)
        slope = _pair_kernel(x, y, i, j, x_points, y_points, cols, SAME, WIDTHS, RBF, True, DTYPE, BLOCK_I, BLOCK_J)
        for d in range(0, cols):
            t = _column(x, i, d, x_points, DTYPE)[:, None] - _column(y, j, d, y_points, DTYPE)[None, :]
            place = sums + d * x_points + i
            found = tl.load(place, mask=i < x_points, other=0.0) + scale * tl.sum(slope * t, 1)
            tl.store(place, found, mask=i < x_points)
        tl.debug_barrier()  # a number may be read by another thread than the one that wrote it


def _widths(cols: int, scales: list[float]) -> tuple[float, ...]:
    return tuple(2.0 * cols * scale for scale in scales)


def _mean_factor(n: int, m: int, same: bool, unbiased: bool) -> float:
    """What one ordered pair of a set with itself, or of the two sets, counts."""
    count = (n * (n - 1 if unbiased else n)) if same else n * m
    return (1.0 if same else -2.0) / count if count else 0.0


def mmd(
    x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: bool, gradients: int
) -> tuple[Tensor, Tensor]:
    n, m, cols = x.size(0), y.size(0), x.size(1)
    dtype = _rows.result_dtype(x)
    sides = [_mmd_gradient(a, b, kernel, scales, unbiased, dtype) for a, b in _wanted(x, y, gradients)]
    found = torch.cat(sides) if sides else torch.empty(0, dtype=dtype, device=x.device)
    if n == 0 or m == 0 or cols == 0:  # no points, no mean; no columns, no distance
        return torch.full((), float("nan"), dtype=dtype, device=x.device), found
    block_i, block_j = _tile(x, n, m)
    pairs = ((x, x, True), (y, y, True), (x, y, False))
    blocks = [_rows.ceil_div(a.size(0), block_i) for a, _, _ in pairs]
    partial = torch.empty(sum(blocks), dtype=torch.float64, device=x.device)
    value = torch.zeros((), dtype=torch.float64, device=x.device)
    place = 0
    for (a, b, same), count in zip(pairs, blocks, strict=True):
        _launch(
            _mmd_kernel, (count,), a, _matrix(a), _matrix(b), partial, place, a.size(0), b.size(0), cols,
            SAME=same, WIDTHS=_widths(cols, scales), RBF=kernel == "rbf", BLOCK_I=block_i, BLOCK_J=block_j, num_warps=4,
        )  # fmt: skip
        factor = _mean_factor(a.size(0), b.size(0), same, unbiased)
        value += partial[place : place + count].sum() * factor
        if same and not unbiased:
            value += len(scales) / a.size(0)
        place += count
    return value.to(dtype), found


def _wanted(x: Tensor, y: Tensor, mask: int) -> list[tuple[Tensor, Tensor]]:
    """For each side that the mask names: its points and the other's."""
    return [pair for bit, pair in enumerate(((x, y), (y, x))) if mask >> bit & 1]


def _mmd_gradient(x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: bool, dtype: torch.dtype) -> Tensor:
    """d mmd / d x"""
    cols = x.size(1)
    total = torch.zeros((cols, x.size(0)), dtype=dtype, device=x.device)
    if total.numel():
        for other, same in ((x, True), (y, False)):
            block_i, block_j = _tile(x, x.size(0), max(other.size(0), 1))
            factor = _rows.scalar((4.0 if same else 2.0) * _mean_factor(x.size(0), y.size(0), same, unbiased))
            blocks = _rows.ceil_div(x.size(0), block_i)
            _launch(
                _mmd_slopes_kernel, (blocks,), x, _matrix(x), _matrix(other), factor, total, x.size(0),
                other.size(0), cols, SAME=same, WIDTHS=_widths(cols, scales), RBF=kernel == "rbf",
                BLOCK_I=block_i, BLOCK_J=block_j, num_warps=4,
            )  # fmt: skip
    return total.t().contiguous()


def mmd_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    saved: Tensor,
    kernel: str,
    scales: list[float],
    unbiased: bool,
    gradients: int,
    needed: int,
) -> tuple[Tensor, Tensor]:
    if needed & ~gradients:
        saved, gradients = mmd(x, y, kernel, scales, unbiased, needed)[1], needed
    found: list[Tensor | None] = [None, None]
    place = 0
    for bit, a in enumerate((x, y)):
        if needed >> bit & 1:
            found[bit] = torch.empty_like(a).copy_(grad * saved[place : place + a.size(0)])
        if gradients >> bit & 1:
            place += a.size(0)
    return _rows.present(found, x)
