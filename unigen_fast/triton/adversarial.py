"""Triton kernels of the losses of discriminator logits. One launch serves a list of tensors."""

import functools
import operator
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from unigen_fast.triton import _rows
from unigen_fast.triton._rows import columns_at, load, program, sigmoid, softplus, store, tile_of, value_of

__all__ = ["logit_loss", "logit_loss_backward", "logit_term", "logit_term_backward"]

_TERMS = ("logistic_real", "logistic_fake", "saturating", "hinge_real", "hinge_fake", "linear")  # as in the reference
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
    else:
        return -logit


@triton.jit
def _slope(logit, TERM: tl.constexpr):
    if TERM == "logistic_real":
        return -sigmoid(-logit)
    elif TERM == "logistic_fake":
        return sigmoid(logit)
    elif TERM == "saturating":
        return -sigmoid(logit)
    elif TERM == "hinge_real":
        return tl.where(1 - logit <= 0, 0.0, -1.0).to(logit.dtype)
    elif TERM == "hinge_fake":
        return tl.where(1 + logit <= 0, 0.0, 1.0).to(logit.dtype)
    else:
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
            store(out, row, col, shapes[i], mask, tl.where(slope == 0, 0.0, g * slope))


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
                if TERMS[i] == "logistic_fake" or TERMS[i] == "hinge_fake":
                    right += tl.where(logit < 0, 1.0, 0.0)
                else:
                    right += tl.where(logit > 0, 1.0, 0.0)
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
