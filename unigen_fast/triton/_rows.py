"""What every kernel is made of: rows × columns, however the tensors lie in memory.

A kernel sees its operands as a matrix, rows by columns; columns are what it sums over. Either side may be made of
several dimensions, of any strides, which `offsets` resolves. The host part collapses dimensions, picks a tile from a
small table, and drives sums over rows; the device part holds the index arithmetic, the reductions and the functions.

An operand, in a kernel, is (pointer, strides of the row dimensions, strides of the column dimensions), or None. `shape`
is (row sizes, column sizes), `counts` is (rows, columns, splits, span): each row is shared by `splits` programs of
`span` columns each. Sums are deterministic: partial sums in memory, added in a fixed order by one program.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# ---- host: geometry --------------------------------------------------------------------------------------------------

MAX_DIMS = 3  # row dimensions and column dimensions that a kernel resolves; beyond, operands are made contiguous
PROGRAMS = 512  # enough to fill a large GPU; a constant, so that the order of additions is the same on every one
CHUNK = 4  # tiles that one program takes before its row is split


class Unsupported(Exception):
    """Strides that do not collapse to `MAX_DIMS` dimensions."""


class Plan(NamedTuple):
    """A launch: grid, `counts`, and the tile."""

    programs: int
    counts: tuple[int, int, int, int]
    block_r: int
    block_c: int
    num_warps: int

    @property
    def splits(self) -> int:
        return self.counts[2]

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_R": self.block_r, "BLOCK_C": self.block_c, "num_warps": self.num_warps}


def power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _halved(budget: int, dtype: Any) -> int:
    return budget // 2 if dtype == tl.float64 else budget


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _warps(tile: int, dtype: Any) -> int:
    """8 elements a thread, half of them in fp64: more would spill."""
    return min(max(tile // (128 if dtype == tl.float64 else 256), 1), 16)


class Geometry:
    """Collapsed sizes and strides of operands that share one shape; made by `operands`, and cached."""

    def __init__(self, shape: tuple[int, ...], columns: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> None:
        row_dims = [d for d in range(len(shape)) if d not in columns]
        self.rows = math.prod(shape[d] for d in row_dims)
        self.cols = math.prod(shape[d] for d in columns)
        self.row_sizes, row_strides, row_step = self._collapse(shape, row_dims, strides)
        self.col_sizes, col_strides, col_step = self._collapse(shape, list(columns), strides)
        self.strides = tuple(zip(row_strides, col_strides, strict=True))
        self.shape = (self.row_sizes, self.col_sizes)
        self.rows_inner = self.rows > 1 and (self.cols <= 1 or row_step < col_step)
        self.index = tl.int64 if max(self.rows, self.cols) >= 2**31 - 2**20 else tl.int32
        self._plans: dict[Any, Plan] = {}

    def _collapse(
        self, shape: tuple[int, ...], dims: list[int], strides: tuple[tuple[int, ...], ...]
    ) -> tuple[tuple[int, ...], list[tuple[int, ...]], int]:
        """(sizes, strides of each operand, smallest stride), the innermost dimension last."""
        if any(shape[d] == 0 for d in dims):
            return (1,), [(0,)] * len(strides), 0
        dims = [d for d in dims if shape[d] > 1]
        reach = {d: max(s[d] for s in strides) for d in dims}
        dims.sort(key=lambda d: -reach[d])  # sums do not care
        merged: list[tuple[int, tuple[int, ...]]] = []
        for d in dims:
            step = tuple(s[d] for s in strides)
            if merged and all(a == b * shape[d] for a, b in zip(merged[-1][1], step, strict=True)):
                merged[-1] = (merged[-1][0] * shape[d], step)
            else:
                merged.append((shape[d], step))
        if len(merged) > MAX_DIMS:
            raise Unsupported
        merged = merged or [(1, (0,) * len(strides))]
        sizes = tuple(size for size, _ in merged)
        steps = [tuple(step[i] for _, step in merged) for i in range(len(strides))]
        return sizes, steps, min(reach.values(), default=0)

    def _tile(self, budget: int) -> tuple[int, int]:
        """(BLOCK_R, BLOCK_C): long along the dimension that is contiguous in memory, and programs enough for a GPU."""
        rows, cols = power_of_2(self.rows), power_of_2(self.cols)
        if self.rows_inner:
            block_r = min(rows, 128)
            block_c = min(cols, max(budget // block_r, 1))
            if block_c == cols:
                block_r = min(rows, budget // block_c)
            floor = 32
        else:
            block_c = min(cols, budget)
            block_r = min(rows, budget // block_c)
            floor = 1
        while block_r > floor and block_r * block_c > 512 and ceil_div(self.rows, block_r) < PROGRAMS // 4:
            block_r //= 2
        return block_r, block_c

    def _plan(self, key: Any, make: Callable[[], Plan]) -> Plan:
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = make()
        return plan

    # In all of these `budget` is the tile's size, halved for fp64.

    def reduction(self, budget: int, dtype: Any) -> Plan:
        """A row's columns in one program, unless rows are too few for that; one program at least."""

        def make() -> Plan:
            block_r, block_c = self._tile(_halved(budget, dtype))
            blocks = max(ceil_div(self.rows, block_r), 1)
            steps = ceil_div(self.cols, block_c)
            splits = min(PROGRAMS // blocks, ceil_div(steps, 2)) if steps > CHUNK else 1
            span = ceil_div(steps, max(splits, 1)) * block_c or block_c
            splits = max(ceil_div(self.cols, span), 1)
            counts = (self.rows, self.cols, splits, span)
            return Plan(blocks * splits, counts, block_r, block_c, _warps(block_r * block_c, dtype))

        return self._plan(("reduction", budget, dtype), make)

    def map(self, budget: int, dtype: Any) -> Plan:
        """One tile a program."""

        def make() -> Plan:
            block_r, block_c = self._tile(_halved(budget, dtype))
            splits = ceil_div(self.cols, block_c)
            counts = (self.rows, self.cols, max(splits, 1), block_c)
            programs = ceil_div(self.rows, block_r) * splits
            return Plan(programs, counts, block_r, block_c, _warps(block_r * block_c, dtype))

        return self._plan(("map", budget, dtype), make)

    def whole_rows(self, budget: int, dtype: Any) -> Plan | None:
        """Whole rows in one tile, or None where they are too long."""
        budget = _halved(budget, dtype)
        block_c = power_of_2(self.cols)
        if block_c * (min(8, power_of_2(self.rows)) if self.rows_inner else 1) > 2 * budget:
            return None

        def make() -> Plan:
            block_r, _ = self._tile(budget)
            if self.rows_inner:
                block_r = min(block_r, max(budget // block_c, 8))
            counts = (self.rows, self.cols, 1, block_c)
            blocks = max(ceil_div(self.rows, block_r), 1)
            return Plan(blocks, counts, block_r, block_c, _warps(block_r * block_c, dtype))

        return self._plan(("whole", budget, dtype), make)

    def unsplit(self, budget: int, dtype: Any) -> Plan:
        """Whole rows in every program: in one tile or, where they are too long for it, in several."""

        def make() -> Plan:
            block_r, block_c = self._tile(_halved(budget, dtype))
            counts = (self.rows, self.cols, 1, max(ceil_div(self.cols, block_c), 1) * block_c)
            blocks = max(ceil_div(self.rows, block_r), 1)
            return Plan(blocks, counts, block_r, block_c, _warps(2 * block_r * block_c, dtype))

        return self.whole_rows(budget, dtype) or self._plan(("unsplit", budget, dtype), make)


class Spans(NamedTuple):
    """A launch over several tensors, each a single row: its programs take a span of every one of them."""

    programs: int
    counts: tuple[tuple[int, int, int, int], ...]
    constants: dict[str, Any]


def spans(geometries: Sequence[Geometry], budget: int, dtype: Any, most: int) -> Spans:
    """At most `most` programs."""
    longest = max(g.cols for g in geometries)
    block = min(power_of_2(longest), _halved(budget, dtype))
    programs = max(min(ceil_div(longest, block), most), 1)
    counts = [(1, g.cols, programs, max(ceil_div(ceil_div(g.cols, block), programs), 1) * block) for g in geometries]
    index = tl.int64 if any(g.index == tl.int64 for g in geometries) else tl.int32
    # 4 elements a thread: the kernels' bodies are repeated for every tensor
    constants = {"INDEX": index, "BLOCK_R": 1, "BLOCK_C": block, "num_warps": max(block // 128, 1)}
    return Spans(programs, tuple(counts), constants)


geometry = functools.lru_cache(maxsize=4096)(Geometry)


class Operands(NamedTuple):
    """Operands in the order given."""

    geometry: Geometry
    full: tuple[Any, ...]
    per_row: tuple[Any, ...]


def operands(columns: tuple[int, ...], full: Sequence[Any], per_row: Sequence[Tensor | None] = ()) -> Operands:
    """`full` tensors, or (tensor, strides) pairs, share one shape, that of the first plain one; `per_row` tensors have
    it without `columns`, or are 0-dim. None passes."""
    shape = next(t for t in full if isinstance(t, Tensor)).shape
    strides = [t.stride() if isinstance(t, Tensor) else t[1] for t in full if t is not None]
    strides += [_row_strides(t, columns, len(shape)) for t in per_row if t is not None]
    g = geometry(shape, columns, tuple(strides))
    found = iter(g.strides)
    packed = [None if t is None else (t if isinstance(t, Tensor) else t[0], *next(found)) for t in (*full, *per_row)]
    return Operands(g, tuple(packed[: len(full)]), tuple(packed[len(full) :]))


def _row_strides(t: Tensor, columns: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    if t.dim() == 0:
        return (0,) * ndim
    steps = iter(t.stride())
    return tuple(0 if d in columns else next(steps) for d in range(ndim))


def present(grads: Sequence[Tensor | None], like: Tensor) -> Any:
    """Gradients as the schema wants them: empty where not needed."""
    return tuple(like.new_empty((0,)) if t is None else t for t in grads)


def all_dims(t: Tensor) -> tuple[int, ...]:
    return tuple(range(t.dim()))


def event_dims(t: Tensor, event_ndims: int) -> tuple[int, ...]:
    return tuple(range(t.dim() - event_ndims, t.dim()))


# ---- host: launching -------------------------------------------------------------------------------------------------

_DTYPES = {torch.float64: tl.float64}


def arithmetic(t: Tensor) -> Any:
    """The dtype that a kernel computes in."""
    return _DTYPES.get(t.dtype, tl.float32)


def result_dtype(t: Tensor) -> torch.dtype:
    """The dtype of rows, statistics and totals."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def scalar(value: float) -> tuple[float, float]:
    """Triton takes Python floats as fp32: the rest travels beside, for fp64."""
    high = ctypes.c_float(value).value
    return high, (value - high if math.isfinite(high) else 0.0)


def reduction_factor(factor: float, rows: int, reduction: str) -> float:
    """What the sum over the rows is multiplied by. The mean of no rows is NaN."""
    if reduction != "mean":
        return factor
    return factor / rows if rows else math.nan


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
    if 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


def sum_rows(
    kernel: Any,
    columns: tuple[int, ...],
    inputs: Sequence[Tensor | None],
    parameters: tuple[Any, ...] = (),
    *,
    row_shape: torch.Size,
    reduction: str = "none",
    factor: float = 1.0,
    weights: Tensor | None = None,
    keep: bool = False,
    floor: float | None = None,
    budget: int = 2048,
    **constants: Any,
) -> tuple[Tensor, Tensor]:
    """Runs a kernel that ends in `close_rows`. Returns (the rows or their reduction, rows before floor and weights:
    empty unless `keep`).

    `columns` may be every dimension where the rows' own sums are of no interest.
    """
    first = next(t for t in inputs if t is not None)
    dtype = result_dtype(first)
    out = first.new_empty(row_shape if reduction == "none" else (), dtype=dtype)
    kept = first.new_empty(row_shape if keep else (0,), dtype=dtype)
    g, full, rows = operands(columns, inputs, (weights, kept if keep else None, out))
    plan = g.reduction(budget, arithmetic(first))
    stage, last = stages(plan, reduction)
    partial = partials(first, stage, g.rows, plan)
    scale = scalar(reduction_factor(factor, math.prod(row_shape), reduction))
    close = (*rows, scale, None if floor is None else scalar(floor))
    common = {"DTYPE": arithmetic(first), "INDEX": g.index}
    launch(
        kernel, (plan.programs,), first.device, full, parameters, (partial, *close), g.shape, plan.counts,
        STAGE=stage, **constants, **common, **plan.constants,
    )  # fmt: skip
    if stage == "splits":
        finish_rows(partial, close, g.shape, (g.rows, plan.splits), last, common)
    elif stage == "programs":
        finish_total(partial, out, scale, common)
    return out, kept


def stages(plan: Plan, reduction: str) -> tuple[str, str]:
    """What the programs of a reduction leave behind, and what is to be had in the end: "splits" of rows, "programs"'
    shares of the total, complete "rows", or the "total"."""
    last = "rows" if reduction == "none" else "total"
    if plan.splits > 1:
        return "splits", last
    return ("programs" if last == "total" and plan.programs > 1 else last), last


def partials(like: Tensor, stage: str, rows: int, plan: Plan, planes: int = 1) -> Tensor | None:
    """Where a reduction's programs leave what they have: shares of a total in fp64."""
    if stage == "splits":
        return like.new_empty((planes * plan.splits * rows,), dtype=result_dtype(like))
    return like.new_empty((plan.programs,), dtype=torch.float64) if stage == "programs" else None


def finish_total(partial: Tensor, out: Tensor, scale: tuple[float, float], common: dict[str, Any]) -> None:
    """`out` = scale · sum of `partial`."""
    close = (None, None, (out, (0,), (0,)), scale, None)
    finish_rows(partial, close, ((1,), (1,)), (1, partial.numel()), "total", common)


def finish_rows(
    partial: Tensor, close: Any, shape: Any, counts: tuple[int, int], stage: str, common: dict[str, Any]
) -> None:
    launch(
        finish_rows_kernel, (1,), partial.device, partial, close, shape, counts,
        STAGE=stage, **common, **finishing_tile(*counts),
    )  # fmt: skip


def finishing_tile(rows: int, splits: int) -> dict[str, int]:
    block_c = min(power_of_2(splits), 1024)
    block_r = min(power_of_2(rows), max(1024 // block_c, 1))
    return {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": 4}


# ---- device: indices -------------------------------------------------------------------------------------------------


@triton.jit
def offsets(index, sizes, strides):
    """int64 offsets of linear numbers, the last dimension running fastest."""
    result = tl.zeros(index.shape, tl.int64)
    for d in tl.static_range(len(sizes) - 1, 0, -1):
        result += (index % sizes[d]).to(tl.int64) * strides[d]
        index = index // sizes[d]
    return result + index.to(tl.int64) * strides[0]


@triton.jit
def program(counts, BLOCK_R: tl.constexpr, INDEX: tl.constexpr):
    """(rows of this program, its split, its first column, the column it stops at)."""
    pid = tl.program_id(0).to(INDEX)
    split = pid % counts[2]
    row = (pid // counts[2]) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = split * counts[3]
    return row, split, first, tl.minimum(first + counts[3], counts[1])


@triton.jit
def columns_at(start, row, counts, BLOCK_C: tl.constexpr):
    """(columns from `start` on, which of the tile's elements exist). A tile ends within its span, or with the row."""
    col = start + tl.arange(0, BLOCK_C)
    return col, (row < counts[0])[:, None] & (col < counts[1])[None, :]


@triton.jit
def tile_of(counts, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """(rows, columns, which elements exist) where a program has a single tile."""
    row, _, first, _ = program(counts, BLOCK_R, INDEX)
    col, mask = columns_at(first, row, counts, BLOCK_C)
    return row, col, mask


@triton.jit
def tile_offsets(operand, row, col, shape):
    return offsets(row, shape[0], operand[1])[:, None] + offsets(col, shape[1], operand[2])[None, :]


@triton.jit
def load(operand, row, col, shape, mask, DTYPE: tl.constexpr, other=0.0):
    return tl.load(operand[0] + tile_offsets(operand, row, col, shape), mask=mask, other=other).to(DTYPE)


@triton.jit
def store(operand, row, col, shape, mask, value):
    address = operand[0] + tile_offsets(operand, row, col, shape)
    tl.store(address, value.to(operand[0].dtype.element_ty), mask=mask)


@triton.jit
def load_rows(operand, row, shape, counts, DTYPE: tl.constexpr, plane=0):
    """`plane`: as in `store_rows`."""
    address = operand[0] + offsets(row, shape[0], operand[1]) + tl.full((), plane, tl.int64) * counts[0]
    return tl.load(address, mask=row < counts[0], other=0.0).to(DTYPE)


@triton.jit
def store_rows(operand, row, shape, counts, value, plane=0):
    """`plane`: which of several contiguous copies of the rows."""
    address = operand[0] + offsets(row, shape[0], operand[1]) + tl.full((), plane, tl.int64) * counts[0]
    tl.store(address, value, mask=row < counts[0])


@triton.jit
def value_of(scalar, DTYPE: tl.constexpr):
    return tl.full((), scalar[0], DTYPE) + tl.full((), scalar[1], DTYPE)


@triton.jit
def weighted(value, weight):
    """Their product; a weight of 0 excludes the value, NaN and infinity too."""
    return tl.where(weight == 0, 0.0, value * weight)


@triton.jit
def product(a, b):
    """a · b, in which a 0 on either side excludes the other."""
    return tl.where(a == 0, 0.0, weighted(a, b))


# ---- device: closing a sum over rows ---------------------------------------------------------------------------------


@triton.jit
def close_rows(sums, row, split, close, shape, counts, STAGE: tl.constexpr, DTYPE: tl.constexpr):
    """The end of a kernel whose programs have summed their rows, or their span of them."""
    partial, weights, kept, out, factor, floor = close
    if STAGE == "splits":
        address = partial + split.to(tl.int64) * counts[0] + row
        tl.store(address, sums, mask=row < counts[0])
    else:
        value = _finish_values(sums, row, weights, kept, floor, shape, counts, DTYPE)
        if STAGE == "rows":
            store_rows(out, row, shape, counts, value * value_of(factor, DTYPE))
        else:
            close_total(value, partial, out, factor, STAGE, DTYPE)


@triton.jit
def close_total(value, partial, out, factor, STAGE: tl.constexpr, DTYPE: tl.constexpr):
    """The sum over a program's rows, in fp64: for the finishing program, or, by a sole program, the result itself."""
    total = tl.sum(value.to(tl.float64))
    if STAGE == "programs":
        tl.store(partial + tl.program_id(0), total)
    else:
        tl.store(out[0], (total * value_of(factor, tl.float64)).to(DTYPE))


@triton.jit
def _finish_values(sums, row, weights, kept, floor, shape, counts, DTYPE: tl.constexpr):
    """Complete rows, floored and weighted; 0 beyond the last one."""
    if kept is not None:
        store_rows(kept, row, shape, counts, sums)
    value = sums
    if floor is not None:
        least = value_of(floor, DTYPE)
        value = tl.where(value < least, least, value)  # keeps a NaN
    if weights is not None:
        value = weighted(value, load_rows(weights, row, shape, counts, DTYPE))
    return tl.where(row < counts[0], value, 0.0)


@triton.jit
def finish_rows_kernel(
    partial, close, shape, counts,
    STAGE: tl.constexpr, DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program adds `partial` [splits, rows] over the splits, in order, in fp64; then closes the rows."""
    weights, kept, out, factor, floor = close
    total = tl.zeros([BLOCK_R], tl.float64)
    for start in range(0, counts[0], BLOCK_R):
        row = start + tl.arange(0, BLOCK_R).to(INDEX)
        sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
        for first in range(0, counts[1], BLOCK_C):
            sums += load_splits(partial, row, first, counts, 0.0, BLOCK_C).to(tl.float64)
        value = _finish_values(tl.sum(sums, 1).to(DTYPE), row, weights, kept, floor, shape, counts, DTYPE)
        if STAGE == "rows":
            store_rows(out, row, shape, counts, value * value_of(factor, DTYPE))
        else:
            total += value.to(tl.float64)
    if STAGE == "total":
        close_total(total, partial, out, factor, STAGE, DTYPE)


@triton.jit
def load_splits(partial, row, first, counts, other, BLOCK_C: tl.constexpr):
    """Tile [rows, splits from `first` on] of `partial` [splits, rows]; `counts` is (rows, splits)."""
    split = first + tl.arange(0, BLOCK_C)
    mask = (row < counts[0])[:, None] & (split < counts[1])[None, :]
    return tl.load(partial + (split.to(tl.int64)[None, :] * counts[0] + row[:, None]), mask=mask, other=other)


# ---- device: softmax rows --------------------------------------------------------------------------------------------


@triton.jit
def finite_base(maximum):
    """What to subtract: a row of -inf keeps 0, and so sums to 0 instead of NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def absorb(maximum, total, extra, log_w, payload, PAYLOAD: tl.constexpr):
    """One more tile of a row into its running maximum, sum of exponentials e and `extra`: sum of e² ("square") or of
    e·payload, where e = 0 silences an infinite payload. A NaN or +inf lives on in the sums."""
    highest = tl.maximum(maximum, tl.max(log_w, 1))
    base = finite_base(highest)
    fade = tl.exp(maximum - base)
    e = tl.exp(log_w - base[:, None])
    total = total * fade + tl.sum(e, 1)
    if PAYLOAD == "square":
        extra = extra * fade * fade + tl.sum(e * e, 1)
    elif PAYLOAD != "none":
        extra = extra * fade + tl.sum(tl.where(e == 0, 0.0, e * payload), 1)
    return highest, total, extra


@triton.jit
def softmax_weights(log_w, maximum, total):
    """e / total, and 0 throughout a row whose total is 0."""
    empty = total == 0
    inverse = divide(tl.full(total.shape, 1.0, total.dtype), tl.where(empty, 1.0, total))
    e = tl.exp(log_w - finite_base(maximum)[:, None])
    return tl.where(empty[:, None], 0.0, e * inverse[:, None])


# ---- device: functions -----------------------------------------------------------------------------------------------

_TAYLOR = tl.constexpr(tuple(1 / math.factorial(n) for n in range(20)))


@triton.jit
def divide(a, b):
    """Correctly rounded, so that x / 1 is x."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def finite_exp(x):
    """e^x as it is, and where it would be infinite the largest power of e that is not: 0 times it is 0."""
    HIGH: tl.constexpr = 709.7 if x.dtype == tl.float64 else 88.7
    return tl.exp(tl.where(x > HIGH, HIGH, x))


@triton.jit
def log1p_unit(u):
    """log(1 + u) for -1/2 <= u <= 1 to full relative accuracy: 2 artanh(z), z = u / (2 + u), |z| <= 1/3."""
    TERMS: tl.constexpr = 16 if u.dtype == tl.float64 else 8
    z = u / (2 + u)
    square = z * z
    series = tl.full(u.shape, 1.0 / (2 * TERMS - 1), u.dtype)
    for n in tl.static_range(TERMS - 2, -1, -1):
        series = series * square + 1.0 / (2 * n + 1)
    return 2 * z * series


@triton.jit
def log1p(u):
    near = (u >= -0.5) & (u <= 1)
    return tl.where(near, log1p_unit(tl.where(near, u, 0.0)), tl.log(1 + u))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    u = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, u) / (1 + u)


@triton.jit
def exp_minus_1_minus(x):
    """e^x - 1 - x, by its series where the difference cancels."""
    DEGREE: tl.constexpr = 18 if x.dtype == tl.float64 else 11
    near = tl.abs(x) < 1
    small = tl.where(near, x, 0.0)
    series = tl.full(x.shape, _TAYLOR[DEGREE], x.dtype)
    for n in tl.static_range(DEGREE - 1, 1, -1):
        series = series * small + _TAYLOR[n]
    return tl.where(near, series * small * small, (tl.exp(x) - 1) - x)


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 1, x + exp_minus_1_minus(x), tl.exp(x) - 1)


_ODD = tl.constexpr(tuple(1 / (2 * n + 3) for n in range(18)))


@triton.jit
def log1p_minus(x):
    """log(1 + x) - x for -1/2 <= x <= 1: 2 artanh(s) = 2 s + 2 s³ (1/3 + s²/5 + …), s = x / (2 + x)."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    s = x / (2 + x)
    square = s * s
    series = tl.full(x.shape, _ODD[TERMS - 1], x.dtype)
    for n in tl.static_range(TERMS - 2, -1, -1):
        series = series * square + _ODD[n]
    return s * (2 * square * series - x)
