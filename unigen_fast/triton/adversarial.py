"""Triton kernels of the losses of discriminator logits. One launch serves a list of tensors."""

import functools
import operator
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from unigen_fast.triton import _rows
from unigen_fast.triton._rows import (
    absorb,
    columns_at,
    divide,
    expm1,
    finite_base,
    load,
    log1p_unit,
    product,
    program,
    sigmoid,
    softmax_weights,
    softplus,
    store,
    tile_of,
    value_of,
    weighted,
)

__all__ = [
    "coupled_logit_loss",
    "coupled_logit_loss_backward",
    "grouped_importance_weighted_generator_loss",
    "grouped_importance_weighted_generator_loss_backward",
    "logit_loss",
    "logit_loss_backward",
    "logit_term",
    "logit_term_backward",
]

# as in the reference
_TERMS = (
    "logistic_real",
    "logistic_fake",
    "saturating",
    "hinge_real",
    "hinge_fake",
    "linear",
    "identity",
    "least_squares_real",
    "least_squares_fake",
    "least_squares_minus",
    "kl_real",
    "kl_fake",
    "reverse_kl_real",
    "reverse_kl_fake",
    "pearson_fake",
    "expm1_real",
    "neyman_fake",
    "hellinger_fake",
    "js_real",
    "js_fake",
)
_ITEMS = 16  # tensors in one launch: the kernel's body is repeated for each
_TILE = 1024
_COLUMNS = 5  # loss, mean term, share of right signs, mean logit, mean probability


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)  # keeps a NaN


@triton.jit
def _term(logit, TERM: tl.constexpr):
    if TERM == "logistic_real":
        return softplus(-logit)
    elif TERM == "logistic_fake":
        return softplus(logit)
    elif TERM == "saturating":
        return -softplus(logit)
    elif TERM == "hinge_real":
        return _relu(1 - logit)
    elif TERM == "hinge_fake":
        return _relu(1 + logit)
    elif TERM == "identity":
        return logit
    elif TERM == "least_squares_real":
        return 0.5 * (logit - 1) * (logit - 1)
    elif TERM == "least_squares_fake":
        return 0.5 * logit * logit
    elif TERM == "least_squares_minus":
        return 0.5 * (logit + 1) * (logit + 1)
    elif TERM == "kl_fake":
        return tl.exp(logit - 1)
    elif TERM == "reverse_kl_real":
        return tl.exp(logit)
    elif TERM == "reverse_kl_fake":
        return -1 - logit
    elif TERM == "pearson_fake":
        return logit * (0.25 * logit + 1)
    elif TERM == "expm1_real":
        return expm1(logit)
    elif TERM == "neyman_fake":
        return -2 * expm1(0.5 * logit)
    elif TERM == "hellinger_fake":
        return expm1(-logit)
    elif TERM == "js_real":
        return _softplus_minus_log_2(-logit)
    elif TERM == "js_fake":
        return _softplus_minus_log_2(logit)
    else:  # linear, kl_real
        return -logit


@triton.jit
def _softplus_minus_log_2(x):
    return _relu(x) + log1p_unit(0.5 * expm1(-tl.abs(x)))  # the difference would cancel near 0


@triton.jit
def _boundary(TERM: tl.constexpr):
    if TERM == "least_squares_real" or TERM == "least_squares_fake":
        return 0.5
    elif TERM == "kl_real" or TERM == "kl_fake":
        return 1.0
    else:
        return 0.0


@triton.jit
def _right(logit, mask, boundary, TERM: tl.constexpr):
    """1 on the side of the boundary that the term wants."""
    if (
        TERM == "logistic_fake"
        or TERM == "hinge_fake"
        or TERM == "identity"
        or TERM == "least_squares_fake"
        or TERM == "least_squares_minus"
        or TERM == "kl_fake"
        or TERM == "reverse_kl_real"
        or TERM == "pearson_fake"
        or TERM == "expm1_real"
        or TERM == "js_fake"
    ):
        return tl.where(mask & (logit < boundary), 1.0, 0.0)
    else:
        return tl.where(mask & (logit > boundary), 1.0, 0.0)


@triton.jit
def _slope(logit, TERM: tl.constexpr):
    if TERM == "logistic_real" or TERM == "js_real":
        return -sigmoid(-logit)
    elif TERM == "logistic_fake" or TERM == "js_fake":
        return sigmoid(logit)
    elif TERM == "saturating":
        return -sigmoid(logit)
    elif TERM == "hinge_real":
        return tl.where(1 - logit <= 0, 0.0, -1.0).to(logit.dtype)
    elif TERM == "hinge_fake":
        return tl.where(1 + logit <= 0, 0.0, 1.0).to(logit.dtype)
    elif TERM == "identity":
        return tl.full(logit.shape, 1.0, logit.dtype)
    elif TERM == "least_squares_real":
        return logit - 1
    elif TERM == "least_squares_fake":
        return logit
    elif TERM == "least_squares_minus":
        return logit + 1
    elif TERM == "kl_fake":
        return tl.exp(logit - 1)
    elif TERM == "reverse_kl_real" or TERM == "expm1_real":
        return tl.exp(logit)
    elif TERM == "pearson_fake":
        return 0.5 * logit + 1
    elif TERM == "neyman_fake":
        return -tl.exp(0.5 * logit)
    elif TERM == "hellinger_fake":
        return -tl.exp(-logit)
    else:  # linear, kl_real, reverse_kl_fake
        return tl.full(logit.shape, -1.0, logit.dtype)


# ---- elementwise -----------------------------------------------------------------------------------------------------


@triton.jit
def _term_kernel(
    x, out, factor, shape, counts, TERM: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    value = _term(load(x, row, col, shape, mask, DTYPE), TERM)
    store(out, row, col, shape, mask, value * value_of(factor, DTYPE))


@triton.jit
def _term_backward_kernel(
    items, factors, shapes, counts, TERMS: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`items`: (grad, logits, gradient to write) of every tensor; each program takes its span of each of them."""
    for i in tl.static_range(len(items)):
        grad, x, out = items[i]
        row, _, first, last = program(counts[i], BLOCK_R, INDEX)
        for start in range(first, last, BLOCK_C):
            col, mask = columns_at(start, row, counts[i], BLOCK_C)
            g = load(grad, row, col, shapes[i], mask, DTYPE) * value_of(factors[i], DTYPE)
            logit = load(x, row, col, shapes[i], mask, DTYPE)
            slope = _slope(logit, tl.constexpr(TERMS[i]))
            store(out, row, col, shapes[i], mask, product(g, slope))


def logit_term(logits: Tensor, term: int, scale: float) -> Tensor:
    out = logits.new_empty(logits.shape, dtype=_rows.result_dtype(logits))
    g, full, _ = _rows.operands(_rows.all_dims(logits), (logits, out))
    dtype = _rows.arithmetic(logits)
    plan = g.map(1024, dtype)
    _rows.launch(
        _term_kernel, (plan.programs,), logits.device, *full, _rows.scalar(scale), g.shape, plan.counts,
        TERM=_TERMS[term], DTYPE=dtype, INDEX=g.index, **plan.constants,
    )  # fmt: skip
    return out


def logit_term_backward(grad: Tensor, logits: Tensor, term: int, scale: float) -> Tensor:
    return _backward([grad], [logits], [term], [scale])[0]


def _backward(
    grads: Sequence[Tensor], logits: Sequence[Tensor], terms: Sequence[int], factors: Sequence[float]
) -> list[Tensor]:
    dtype = _rows.arithmetic(logits[0])
    outs = [torch.empty_like(x) for x in logits]
    packed = [
        _rows.operands(_rows.all_dims(x), (grad.expand(x.shape), x, out))
        for grad, x, out in zip(grads, logits, outs, strict=True)
    ]
    for start in range(0, len(packed), _ITEMS):
        chunk = slice(start, start + _ITEMS)
        geometries = [p.geometry for p in packed[chunk]]
        spans = _rows.spans(geometries, _TILE, dtype, 2**20)
        _rows.launch(
            _term_backward_kernel, (spans.programs,), logits[0].device, tuple(p.full for p in packed[chunk]),
            tuple(map(_rows.scalar, factors[chunk])), tuple(g.shape for g in geometries), spans.counts,
            TERMS=tuple(_TERMS[t] for t in terms[chunk]), DTYPE=dtype, **spans.constants,
        )  # fmt: skip
    return outs


# ---- sums ------------------------------------------------------------------------------------------------------------


@triton.jit
def _logit_sums_kernel(
    items, factors, inverse_sizes, partial, loss, statistics, offset, shapes, counts, TERMS: tl.constexpr,
    STATS: tl.constexpr, DIRECT: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`partial` is [tensors, 5, programs], in fp64; this launch's first tensor is number `offset`. `DIRECT`: a sole
    program writes the results."""
    programs = tl.num_programs(0)
    everything = tl.full((), 0.0, tl.float64)
    for i in tl.static_range(len(items)):
        row, _, first, last = program(counts[i], BLOCK_R, INDEX)
        terms = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
        if STATS:
            right = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
            sums = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
            probabilities = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
        for start in range(first, last, BLOCK_C):
            col, mask = columns_at(start, row, counts[i], BLOCK_C)
            logit = load(items[i], row, col, shapes[i], mask, DTYPE)
            terms += tl.where(mask, _term(logit, tl.constexpr(TERMS[i])), 0.0)
            if STATS:
                right += _right(logit, mask, _boundary(tl.constexpr(TERMS[i])), tl.constexpr(TERMS[i]))
                sums += logit
                probabilities += tl.where(mask, sigmoid(logit), 0.0)
        total = tl.sum(terms.to(tl.float64))
        share = total * value_of(factors[i], tl.float64)
        everything += share
        inverse = value_of(inverse_sizes[i], tl.float64)
        if DIRECT:
            if STATS:
                address = statistics + i * 4
                tl.store(address, (total * inverse).to(DTYPE))
                tl.store(address + 1, (tl.sum(right) * inverse).to(DTYPE))
                tl.store(address + 2, (tl.sum(sums) * inverse).to(DTYPE))
                tl.store(address + 3, (tl.sum(probabilities) * inverse).to(DTYPE))
        else:
            address = partial + (offset + i) * 5 * programs + tl.program_id(0)
            tl.store(address, share)
            if STATS:
                tl.store(address + programs, total * inverse)
                tl.store(address + 2 * programs, tl.sum(right) * inverse)
                tl.store(address + 3 * programs, tl.sum(sums) * inverse)
                tl.store(address + 4 * programs, tl.sum(probabilities) * inverse)
    if DIRECT:
        tl.store(loss, everything.to(DTYPE))


@triton.jit
def _finish_logits_kernel(
    partial, loss, statistics, tensors, programs, STATS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program adds `partial` [tensors, 5, programs] over the programs, and the losses over the tensors."""
    total = tl.full((), 0.0, tl.float64)
    for i in range(tensors):
        total += _sum_of(partial + i * 5 * programs, programs, BLOCK)
        if STATS:
            for j in tl.static_range(4):
                value = _sum_of(partial + (i * 5 + 1 + j) * programs, programs, BLOCK)
                tl.store(statistics + i * 4 + j, value.to(DTYPE))
    tl.store(loss, total.to(DTYPE))


@triton.jit
def _sum_of(values, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < count, other=0.0)
    return tl.sum(total)


def _terms(logits: Sequence[Tensor], reals: int, real_term: int, fake_term: int) -> list[int]:
    return [real_term if i < reals else fake_term for i in range(len(logits))]


def logit_loss(
    logits: Sequence[Tensor],
    reals: int,
    real_term: int,
    fake_term: int,
    reduction: str,
    scale: float,
    return_stats: bool,
) -> tuple[Tensor, Tensor]:
    terms = _terms(logits, reals, real_term, fake_term)
    like = logits[0]
    dtype = _rows.result_dtype(like)
    loss = like.new_empty((), dtype=dtype)
    statistics = like.new_empty((len(logits) if return_stats else 0, 4), dtype=dtype)
    if reduction != "none" or return_stats:
        _sum_logits(logits, terms, reduction, scale, loss, statistics if return_stats else None)
    if reduction == "none":
        values = [logit_term(x, term, scale) for x, term in zip(logits, terms, strict=True)]
        loss = functools.reduce(operator.add, values)
    return loss, statistics


def _sum_logits(
    logits: Sequence[Tensor],
    terms: Sequence[int],
    reduction: str,
    scale: float,
    loss: Tensor,
    statistics: Tensor | None,
) -> None:
    packed = [_rows.operands(_rows.all_dims(x), (x,)) for x in logits]
    geometries = [p.geometry for p in packed]
    number = _rows.arithmetic(logits[0])
    direct = len(packed) <= _ITEMS and max(g.cols for g in geometries) <= 8 * _TILE
    spans = _rows.spans(geometries, _TILE, number, 1 if direct else _rows.PROGRAMS)
    programs = spans.programs
    partial = None
    if not direct:
        partial = loss.new_empty((len(packed) * _COLUMNS * programs,), dtype=torch.float64)
    common = {"STATS": statistics is not None, "DTYPE": number}
    for start in range(0, len(packed), _ITEMS):
        chunk = slice(start, start + _ITEMS)
        sizes = [x.numel() for x in logits[chunk]]
        _rows.launch(
            _logit_sums_kernel, (programs,), loss.device, tuple(p.full[0] for p in packed[chunk]),
            tuple(_rows.scalar(_rows.reduction_factor(scale, n, reduction)) for n in sizes),
            tuple(_rows.scalar(_rows.reduction_factor(1.0, n, "mean")) for n in sizes),
            partial, loss, statistics, start, tuple(p.geometry.shape for p in packed[chunk]), spans.counts[chunk],
            TERMS=tuple(_TERMS[t] for t in terms[chunk]), DIRECT=direct, **common, **spans.constants,
        )  # fmt: skip
    if not direct:
        _rows.launch(
            _finish_logits_kernel, (1,), loss.device, partial, loss, statistics, len(packed), programs,
            BLOCK=min(_rows.power_of_2(programs), 512), num_warps=1, **common,
        )  # fmt: skip


def logit_loss_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    reals: int,
    real_term: int,
    fake_term: int,
    reduction: str,
    scale: float,
    return_stats: bool,
) -> list[Tensor]:
    factors = [_rows.reduction_factor(scale, x.numel(), reduction) for x in logits]
    grads = [grad if grad.dim() == 0 else grad.sum_to_size(x.shape) for x in logits]
    return _backward(grads, logits, _terms(logits, reals, real_term, fake_term), factors)


# ---- coupled logits --------------------------------------------------------------------------------------------------

_COUPLED = 6  # columns of the statistics, as in the reference


@triton.jit
def _couple(logit, summary, inverse, COUPLING: tl.constexpr):
    """(logit as its term sees it, d of that / d logit with the summary held constant)."""
    if COUPLING == "averages":
        return logit - summary, tl.full(logit.shape, 1.0, logit.dtype)
    elif COUPLING == "ratios":
        ratio = tl.exp(logit - summary) * inverse
        return tl.where(ratio == 0, 0.0, ratio * logit), ratio
    else:
        return logit, tl.full(logit.shape, 1.0, logit.dtype)


@triton.jit
def _summaries_kernel(
    items, inverse_sizes, partial, statistics, offset, shapes, counts, COUPLINGS: tl.constexpr, DIRECT: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`partial` is [tensors, 2, programs]: (sum, 0), or (maximum, sum of exponentials)."""
    programs = tl.num_programs(0)
    for i in tl.static_range(len(items)):
        row, _, first, last = program(counts[i], BLOCK_R, INDEX)
        maximum = tl.full([BLOCK_R], float("-inf"), DTYPE)
        total = tl.zeros([BLOCK_R], DTYPE)
        for start in range(first, last, BLOCK_C):
            col, mask = columns_at(start, row, counts[i], BLOCK_C)
            if COUPLINGS[i] == "averages":
                total += tl.sum(load(items[i], row, col, shapes[i], mask, DTYPE), 1)
            elif COUPLINGS[i] == "ratios":
                logit = load(items[i], row, col, shapes[i], mask, DTYPE, float("-inf"))
                maximum, total, _unused = absorb(maximum, total, total, logit, logit, "none")
        if DIRECT:
            _keep_summary(
                statistics + (offset + i) * 6 + 4, tl.max(maximum).to(tl.float64), tl.sum(total.to(tl.float64)),
                inverse_sizes[i], tl.constexpr(COUPLINGS[i]), DTYPE,
            )  # fmt: skip
        else:
            address = partial + (offset + i) * 2 * programs + tl.program_id(0)
            tl.store(address, tl.max(maximum).to(tl.float64))
            tl.store(address + programs, tl.sum(total.to(tl.float64)))


@triton.jit
def _keep_summary(address, maximum, total, inverse_size, COUPLING: tl.constexpr, DTYPE: tl.constexpr):
    if COUPLING == "averages":
        tl.store(address, (total * value_of(inverse_size, tl.float64)).to(DTYPE))
    elif COUPLING == "ratios":
        empty = total == 0
        mean = tl.where(empty, 1.0, total * value_of(inverse_size, tl.float64))
        tl.store(address, finite_base(maximum).to(DTYPE))
        tl.store(address + 1, tl.where(empty, 0.0, 1 / mean).to(DTYPE))


@triton.jit
def _finish_summaries_kernel(
    partial,
    statistics,
    inverse_sizes,
    offset,
    programs,
    COUPLINGS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for i in tl.static_range(len(inverse_sizes)):
        address = partial + (offset + i) * 2 * programs
        maximum = tl.full((), float("-inf"), tl.float64)
        if COUPLINGS[i] == "ratios":
            for start in range(0, programs, BLOCK):
                at = start + tl.arange(0, BLOCK)
                found = tl.load(address + at, mask=at < programs, other=float("-inf"))
                maximum = tl.maximum(maximum, tl.max(found))
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, programs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            part = tl.load(address + programs + at, mask=at < programs, other=0.0)
            if COUPLINGS[i] == "ratios":
                own = tl.load(address + at, mask=at < programs, other=float("-inf"))
                # a share of -inf adds nothing, but may hold a NaN
                part *= tl.where(own == float("-inf"), 1.0, tl.exp(own - finite_base(maximum)))
            total += part
        _keep_summary(
            statistics + (offset + i) * 6 + 4,
            maximum,
            tl.sum(total),
            inverse_sizes[i],
            tl.constexpr(COUPLINGS[i]),
            DTYPE,
        )


@triton.jit
def _coupled_sums_kernel(
    items, factors, inverse_sizes, partial, loss, statistics, offset, shapes, counts,
    TERMS: tl.constexpr, COUPLINGS: tl.constexpr, WITH: tl.constexpr, STATS: tl.constexpr, DIRECT: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`partial` is [tensors, 6, programs]. `WITH`: whose summary each tensor is coupled by."""
    programs = tl.num_programs(0)
    everything = tl.full((), 0.0, tl.float64)
    for i in tl.static_range(len(items)):
        row, _, first, last = program(counts[i], BLOCK_R, INDEX)
        terms = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
        slopes = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
        if STATS:
            right = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
            sums = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
            probabilities = tl.zeros([BLOCK_R, BLOCK_C], DTYPE)
        summary = tl.load(statistics + WITH[i] * 6 + 4)
        inverse_mean = summary
        if COUPLINGS[i] == "ratios":
            inverse_mean = tl.load(statistics + WITH[i] * 6 + 5)
        for start in range(first, last, BLOCK_C):
            col, mask = columns_at(start, row, counts[i], BLOCK_C)
            logit = load(items[i], row, col, shapes[i], mask, DTYPE)
            coupled, _unused = _couple(logit, summary, inverse_mean, tl.constexpr(COUPLINGS[i]))
            terms += tl.where(mask, _term(coupled, tl.constexpr(TERMS[i])), 0.0)
            if COUPLINGS[i] == "averages":
                slopes += tl.where(mask, _slope(coupled, tl.constexpr(TERMS[i])), 0.0)
            if STATS:
                judged = logit
                if COUPLINGS[i] == "averages":
                    judged = coupled
                right += _right(judged, mask, 0.0, tl.constexpr(TERMS[i]))
                sums += logit
                probabilities += tl.where(mask, sigmoid(judged), 0.0)
        total = tl.sum(terms.to(tl.float64))
        share = total * value_of(factors[i], tl.float64)
        everything += share
        inverse = value_of(inverse_sizes[i], tl.float64)
        slope = tl.sum(slopes.to(tl.float64)) * inverse
        if DIRECT:
            address = statistics + i * 6
            tl.store(address, (total * inverse).to(DTYPE))
            if COUPLINGS[i] == "averages":
                tl.store(address + 5, slope.to(DTYPE))
            if STATS:
                tl.store(address + 1, (tl.sum(right) * inverse).to(DTYPE))
                tl.store(address + 2, (tl.sum(sums) * inverse).to(DTYPE))
                tl.store(address + 3, (tl.sum(probabilities) * inverse).to(DTYPE))
        else:
            address = partial + (offset + i) * 6 * programs + tl.program_id(0)
            tl.store(address, share)
            tl.store(address + programs, total * inverse)
            tl.store(address + 5 * programs, slope)
            if STATS:
                tl.store(address + 2 * programs, tl.sum(right) * inverse)
                tl.store(address + 3 * programs, tl.sum(sums) * inverse)
                tl.store(address + 4 * programs, tl.sum(probabilities) * inverse)
    if DIRECT:
        tl.store(loss, everything.to(DTYPE))


@triton.jit
def _finish_coupled_kernel(
    partial, loss, statistics, tensors, programs,
    STATS: tl.constexpr, SLOPES: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.full((), 0.0, tl.float64)
    for i in range(tensors):
        address = partial + i * 6 * programs
        total += _sum_of(address, programs, BLOCK)
        tl.store(statistics + i * 6, _sum_of(address + programs, programs, BLOCK).to(DTYPE))
        if SLOPES:
            tl.store(statistics + i * 6 + 5, _sum_of(address + 5 * programs, programs, BLOCK).to(DTYPE))
        if STATS:
            for j in tl.static_range(1, 4):
                value = _sum_of(address + (1 + j) * programs, programs, BLOCK)
                tl.store(statistics + i * 6 + j, value.to(DTYPE))
    tl.store(loss, total.to(DTYPE))


@triton.jit
def _coupled_backward_kernel(
    items, grad, factors, shares, statistics, shapes, counts,
    TERMS: tl.constexpr, COUPLINGS: tl.constexpr, WITH: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`items`: (logits, gradient to write) of every tensor."""
    given = tl.load(grad)
    for i in tl.static_range(len(items)):
        x, out = items[i]
        row, _, first, last = program(counts[i], BLOCK_R, INDEX)
        summary = tl.load(statistics + WITH[i] * 6 + 4)
        inverse_mean = summary
        if COUPLINGS[i] == "ratios":
            inverse_mean = tl.load(statistics + WITH[i] * 6 + 5)
        factor = given * value_of(factors[i], DTYPE)
        if COUPLINGS[i] == "averages":
            through_mean = weighted(tl.load(statistics + WITH[i] * 6 + 5), given * value_of(shares[i], DTYPE))
        for start in range(first, last, BLOCK_C):
            col, mask = columns_at(start, row, counts[i], BLOCK_C)
            logit = load(x, row, col, shapes[i], mask, DTYPE)
            coupled, inner = _couple(logit, summary, inverse_mean, tl.constexpr(COUPLINGS[i]))
            slope = weighted(_slope(coupled, tl.constexpr(TERMS[i])), factor)
            if COUPLINGS[i] == "averages":
                slope -= through_mean
            store(out, row, col, shapes[i], mask, product(slope, inner))


def _links(count: int, reals: int, coupling: str) -> tuple[list[str], list[int]]:
    """(how each tensor is coupled, with which one)."""
    if coupling == "averages":
        return [coupling] * count, [i + reals if i < reals else i - reals for i in range(count)]
    return ["none" if i < reals else coupling for i in range(count)], list(range(count))


def coupled_logit_loss(
    logits: Sequence[Tensor],
    reals: int,
    coupling: str,
    real_term: int,
    fake_term: int,
    reduction: str,
    scale: float,
    return_stats: bool,
) -> tuple[Tensor, Tensor]:
    terms = _terms(logits, reals, real_term, fake_term)
    couplings, links = _links(len(logits), reals, coupling)
    like = logits[0]
    dtype = _rows.result_dtype(like)
    loss = like.new_empty((), dtype=dtype)
    statistics = like.new_zeros((len(logits), _COUPLED), dtype=dtype)
    packed = [_rows.operands(_rows.all_dims(x), (x,)) for x in logits]
    geometries = [p.geometry for p in packed]
    number = _rows.arithmetic(like)
    direct = len(packed) <= _ITEMS and max(g.cols for g in geometries) <= 8 * _TILE
    # half a tile: six quantities of many tensors would spill
    spans = _rows.spans(geometries, _TILE // 2, number, 1 if direct else _rows.PROGRAMS)
    programs = spans.programs
    partial = None if direct else loss.new_empty((len(packed) * _COUPLED * programs,), dtype=torch.float64)
    sizes = [x.numel() for x in logits]
    inverse_sizes = [_rows.scalar(_rows.reduction_factor(1.0, n, "mean")) for n in sizes]
    factors = [_rows.scalar(_rows.reduction_factor(scale, n, reduction)) for n in sizes]
    chunks = [slice(start, start + _ITEMS) for start in range(0, len(packed), _ITEMS)]
    finish = {"BLOCK": min(_rows.power_of_2(programs), 512), "num_warps": 1, "DTYPE": number}
    for chunk in chunks:
        _rows.launch(
            _summaries_kernel, (programs,), loss.device, tuple(p.full[0] for p in packed[chunk]),
            tuple(inverse_sizes[chunk]), partial, statistics, chunk.start,
            tuple(p.geometry.shape for p in packed[chunk]), spans.counts[chunk],
            COUPLINGS=tuple(couplings[chunk]), DIRECT=direct, DTYPE=number, **spans.constants,
        )  # fmt: skip
        if not direct:
            _rows.launch(
                _finish_summaries_kernel, (1,), loss.device, partial, statistics, tuple(inverse_sizes[chunk]),
                chunk.start, programs, COUPLINGS=tuple(couplings[chunk]), **finish,
            )  # fmt: skip
    for chunk in chunks:
        _rows.launch(
            _coupled_sums_kernel, (programs,), loss.device, tuple(p.full[0] for p in packed[chunk]),
            tuple(factors[chunk]), tuple(inverse_sizes[chunk]), partial, loss, statistics, chunk.start,
            tuple(p.geometry.shape for p in packed[chunk]), spans.counts[chunk],
            TERMS=tuple(_TERMS[t] for t in terms[chunk]), COUPLINGS=tuple(couplings[chunk]),
            WITH=tuple(links[chunk]), STATS=return_stats, DIRECT=direct, DTYPE=number, **spans.constants,
        )  # fmt: skip
    if not direct:
        _rows.launch(
            _finish_coupled_kernel, (1,), loss.device, partial, loss, statistics, len(packed), programs,
            STATS=return_stats, SLOPES=coupling == "averages", **finish,
        )  # fmt: skip
    return loss, statistics


def coupled_logit_loss_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    statistics: Tensor,
    reals: int,
    coupling: str,
    real_term: int,
    fake_term: int,
    reduction: str,
    scale: float,
    return_stats: bool,
) -> list[Tensor]:
    terms = _terms(logits, reals, real_term, fake_term)
    couplings, links = _links(len(logits), reals, coupling)
    dtype = _rows.arithmetic(logits[0])
    outs = [torch.empty_like(x) for x in logits]
    packed = [_rows.operands(_rows.all_dims(x), (x, out)) for x, out in zip(logits, outs, strict=True)]
    sizes = [x.numel() for x in logits]
    factors = [_rows.reduction_factor(scale, n, reduction) for n in sizes]
    # what the gradient through a tensor's mean is multiplied by, but for the counterpart's mean slope
    shares = [factors[link] * sizes[link] / n if n else 0.0 for link, n in zip(links, sizes, strict=True)]
    for start in range(0, len(packed), _ITEMS):
        chunk = slice(start, start + _ITEMS)
        geometries = [p.geometry for p in packed[chunk]]
        spans = _rows.spans(geometries, _TILE, dtype, 2**20)
        _rows.launch(
            _coupled_backward_kernel, (spans.programs,), logits[0].device, tuple(p.full for p in packed[chunk]), grad,
            tuple(map(_rows.scalar, factors[chunk])), tuple(map(_rows.scalar, shares[chunk])), statistics,
            tuple(g.shape for g in geometries), spans.counts, TERMS=tuple(_TERMS[t] for t in terms[chunk]),
            COUPLINGS=tuple(couplings[chunk]), WITH=tuple(links[chunk]), DTYPE=dtype, **spans.constants,
        )  # fmt: skip
    return outs


# ---- groups ----------------------------------------------------------------------------------------------------------


@triton.jit
def _grouped_kernel(
    x, x_step, labels, label_step, statistics, partial, n, temperature,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each sample of a program is compared with each; `partial` is [programs, 2]: share of the loss, of the groups."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < n
    heat = value_of(temperature, DTYPE)
    own = tl.load(labels + row.to(tl.int64) * label_step, mask=live, other=0)
    logit = tl.load(x + row.to(tl.int64) * x_step, mask=live, other=0.0).to(DTYPE)
    maximum = tl.full([BLOCK_R], float("-inf"), DTYPE)
    total = tl.zeros([BLOCK_R], DTYPE)
    loss = tl.zeros([BLOCK_R], DTYPE)
    earlier = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, n, BLOCK_C):
        col = start + tl.arange(0, BLOCK_C)
        label = tl.load(labels + col.to(tl.int64) * label_step, mask=col < n, other=0)
        other = tl.load(x + col.to(tl.int64) * x_step, mask=col < n, other=0.0).to(DTYPE)
        same = (own[:, None] == label[None, :]) & (col < n)[None, :]
        log_w = tl.where(same, divide(other, tl.full(other.shape, 1.0, DTYPE) * heat)[None, :], float("-inf"))
        payload = tl.broadcast_to(softplus(-other)[None, :], log_w.shape)
        maximum, total, loss = absorb(maximum, total, loss, log_w, payload, "softplus")
        earlier += tl.sum((same & (col[None, :] < row[:, None])).to(tl.int32), 1)
    log_w = divide(logit, tl.full(logit.shape, 1.0, DTYPE) * heat)
    weight = tl.sum(softmax_weights(log_w[:, None], maximum, total), 1)
    group_loss = tl.where(total == 0, 0.0, loss / tl.where(total == 0, 1.0, total))
    tl.store(statistics + row, weight, mask=live)
    tl.store(statistics + n + row, group_loss, mask=live)
    share = tl.where(live & (weight != 0), weight * softplus(-logit), 0.0)
    tl.store(partial + tl.program_id(0) * 2, tl.sum(share.to(tl.float64)))
    tl.store(partial + tl.program_id(0) * 2 + 1, tl.sum(tl.where(live & (earlier == 0), 1.0, 0.0).to(tl.float64)))


@triton.jit
def _finish_groups_kernel(
    partial, value, factor, programs, MEAN: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    total = tl.zeros([BLOCK], tl.float64)
    groups = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + at * 2, mask=at < programs, other=0.0)
        groups += tl.load(partial + at * 2 + 1, mask=at < programs, other=0.0)
    loss = tl.sum(total)
    scale = tl.full((), 1.0, tl.float64)
    if MEAN:
        scale /= tl.sum(groups)
        loss /= tl.sum(groups)
    tl.store(value, loss.to(DTYPE))
    tl.store(factor, scale.to(DTYPE))


@triton.jit
def _grouped_backward_kernel(
    x, weights, losses, out, grad, factor, temperature, shape, counts, DETACH: tl.constexpr,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, mask = tile_of(counts, BLOCK_R, BLOCK_C, INDEX)
    logit = load(x, row, col, shape, mask, DTYPE)
    weight = load(weights, row, col, shape, mask, DTYPE)
    slope = -sigmoid(-logit)
    if not DETACH:
        loss = load(losses, row, col, shape, mask, DTYPE)
        slope += (softplus(-logit) - loss) / value_of(temperature, DTYPE)
    given = tl.load(grad) * tl.load(factor)
    store(out, row, col, shape, mask, weighted(weighted(slope, weight), given))


def grouped_importance_weighted_generator_loss(
    fake: Tensor, groups: Tensor, temperature: float, detach: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    n = fake.numel()
    dtype = _rows.arithmetic(fake)
    value = fake.new_empty((), dtype=_rows.result_dtype(fake))
    statistics = value.new_empty((2 * n + 1,))
    block_r = 16 if dtype == tl.float64 else 32
    programs = max(_rows.ceil_div(n, block_r), 1)
    partial = value.new_empty((programs, 2), dtype=torch.float64)
    _rows.launch(
        _grouped_kernel, (programs,), fake.device, fake, fake.stride(0), groups, groups.stride(0), statistics, partial,
        n, _rows.scalar(temperature), DTYPE=dtype, BLOCK_R=block_r, BLOCK_C=64, num_warps=4,
    )  # fmt: skip
    _rows.launch(
        _finish_groups_kernel, (1,), fake.device, partial, value, statistics[2 * n :], programs,
        MEAN=reduction == "mean", DTYPE=dtype, BLOCK=min(_rows.power_of_2(programs), 512), num_warps=1,
    )  # fmt: skip
    return value, statistics


def grouped_importance_weighted_generator_loss_backward(
    grad: Tensor, fake: Tensor, groups: Tensor, statistics: Tensor, temperature: float, detach: bool, reduction: str
) -> Tensor:
    n = fake.numel()
    out = torch.empty_like(fake)
    g, full, _ = _rows.operands((0,), (fake, statistics[:n], statistics[n : 2 * n], out))
    dtype = _rows.arithmetic(fake)
    plan = g.map(1024, dtype)
    _rows.launch(
        _grouped_backward_kernel, (plan.programs,), fake.device, *full, grad, statistics[2 * n :],
        _rows.scalar(temperature), g.shape, plan.counts,
        DETACH=detach, DTYPE=dtype, INDEX=g.index, **plan.constants,
    )  # fmt: skip
    return out
