"""Rows of an elementwise formula, summed over the event: a large tensor a block at a time.

PyTorch streams each intermediate of a formula through memory, and the system hands out that memory anew each time. A
block stays in the processor's cache from the inputs to the sum.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unigen_fast.reference._common import accumulate_dtype, lowered, sum_event, upcast

Tensors = Sequence[Any]
Forward = tuple[Any, Sequence[Tensor]] | None
Gradients = Sequence[Tensor | None]
Slopes = list[Tensor | None]  # of a formula, by tensor
Outs = Sequence[Tensor | None]  # what they may be written to

_BLOCK = 2**16  # elements for each thread: with the intermediates of a formula, about what a core's cache holds


def finite(*results: Tensor) -> bool:
    """Whether all of them are numbers."""
    return all(math.isfinite((x.sum() if x.dim() else x).item()) for x in results)


def _block_size() -> int:
    return _BLOCK * torch.get_num_threads()


def blocks(shape: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Indices that cut a tensor into blocks: numbers, then one slice. None of a tensor that is one block."""
    size = _block_size()
    if math.prod(shape) > size:
        yield from _cut(shape, (), size)


def _cut(shape: Sequence[int], outer: tuple[int, ...], size: int) -> Iterator[tuple[Any, ...]]:
    each = math.prod(shape[1:])
    if each > size:
        for i in range(shape[0]):
            yield from _cut(shape[1:], (*outer, i), size)
    else:
        step = math.ceil(shape[0] / math.ceil(shape[0] * each / size))  # blocks of nearly one size
        for i in range(0, shape[0], step):
            yield *outer, slice(i, i + step)


def rows_of(terms: Callable[..., Tensor], tensors: Tensors, event_ndims: int) -> Tensor:
    """`terms(*tensors)`, element by element, summed over the event.

    The tensors broadcast to the shape of the first and have as many dimensions; they may be None.
    """
    first = tensors[0]
    if first.numel() <= _block_size():
        return sum_event(terms(*[None if t is None else upcast(t) for t in tensors]), event_ndims)
    row_ndims = first.dim() - event_ndims
    rows = first.new_zeros(first.shape[:row_ndims], dtype=accumulate_dtype(first.dtype))
    wide = _expanded(tensors, first.shape)
    for at in blocks(first.shape):
        found = terms(*[None if t is None else upcast(t[at]) for t in wide])
        if len(at) > row_ndims:
            rows[at[:row_ndims]] += found.sum()
        else:
            rows[at] = sum_event(found, event_ndims)
    return rows


def gradients_of(
    slopes: Callable[..., Sequence[Tensor | None]],
    grad: Tensor,
    needed: Sequence[bool],
    tensors: Tensors,
    event_ndims: int,
) -> list[Tensor | None]:
    """`slopes(grad, needed, *tensors, out=out)`: the gradients of the tensors; of those not needed any or None.

    `grad`, the rows' or one for all of them, comes to it as one that broadcasts with the tensors, which are those of
    `rows_of`. In `out` is what it may write the gradients to, or None.
    """
    first = tensors[0]
    if event_ndims and grad.dim():
        grad = grad.reshape(*grad.shape, *(1,) * event_ndims)
    found: list[Tensor | None] = [None] * len(tensors)
    if first.numel() <= _block_size():
        found = list(slopes(grad, needed, *[None if t is None else upcast(t) for t in tensors], out=found))
    else:
        if grad.dim():
            grad = grad.expand(first.shape)
        wide = _expanded(tensors, first.shape)
        found = [torch.empty_like(t) if n and t is not None else None for t, n in zip(wide, needed, strict=True)]
        for at in blocks(first.shape):
            out = [None if f is None else f[at] for f in found]
            part = [None if t is None else upcast(t[at]) for t in wide]
            for to, slope in zip(out, slopes(grad[at] if grad.dim() else grad, needed, *part, out=out), strict=True):
                if to is not None and slope is not None and slope is not to:
                    to.copy_(slope)
    for i, slope in enumerate(found):
        if not needed[i]:
            found[i] = None
        elif slope is not None:
            t = tensors[i]
            if slope.shape != t.shape:
                slope = slope.expand(first.shape).sum_to_size(t.shape)
            found[i] = lowered(slope, t)
    return found


def _expanded(tensors: Tensors, shape: Sequence[int]) -> list[Tensor | None]:
    return [t if t is None or t.shape == shape else t.expand(shape) for t in tensors]


def reduced(rows: Tensor, weights: Tensor | None, scale: float, reduction: str) -> Tensor:
    """The rows, which are numbers, weighted and reduced. `sum` costs a small tensor a quarter of `mean`."""
    if weights is not None:
        rows = rows * weights
    if reduction != "none":
        if reduction == "mean":
            scale = scale / rows.numel() if rows.numel() else math.nan
        rows = rows.sum() if rows.dim() else rows
    return rows if scale == 1 else rows * scale


def gradient_of_rows(grad: Tensor, count: int, weights: Tensor | None, scale: float, reduction: str) -> Tensor:
    """The gradient of `count` rows from that of `reduced`: one number where it is the same for all of them."""
    factor = scale / max(count, 1) if reduction == "mean" else scale
    if factor != 1:
        grad = grad * factor
    return grad if weights is None else grad * weights


def filled(grads: Sequence[Tensor | None], *shapes: Sequence[int]) -> list[Tensor]:
    """The gradients of outputs of these shapes: zeros, which take no memory, for those without one."""
    like = next(g for g in grads if g is not None)
    return [like.new_zeros(()).expand(shape) if g is None else g for g, shape in zip(grads, shapes, strict=True)]
