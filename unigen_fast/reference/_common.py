"""What the reference functions share: the arithmetic dtype and the reductions of the public contract."""

import math
from typing import Any

import torch
from torch import Tensor

from unigen_fast._private import known_true

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 and bf16 are computed, and reduced results returned, in fp32; everything else in itself."""
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _LOW_PRECISION else x


def lowered(x: Tensor, like: Tensor) -> Tensor:
    """A gradient in the dtype of its tensor."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact in the tails: linear only where e^-x is below float64's rounding of x."""
    return torch.nn.functional.softplus(x, threshold=40.0)


def finite_maximum(log_w: Tensor, dim: int) -> Tensor:
    """The largest log-weight of each row as a constant, `dim` kept: what keeps exponentials finite.

    0 for a row of -inf, so that its exponentials sum to 0; NaN where there is a +inf or NaN, so that all of its row is.
    """
    return torch.nan_to_num(log_w.detach().amax(dim, keepdim=True), nan=math.nan, posinf=math.nan, neginf=0.0)


def silenced(payload: Tensor, weights: Tensor) -> Tensor:
    """`payload`, and 0 where its weight, which is never negative, is 0: in one pass, gradient included."""
    return torch.ops.aten.threshold_backward(payload, weights, 0)


def finite_exp(x: Tensor) -> Tensor:
    """e^x as it is, and where it would be infinite the largest power of e that is not: 0 times it is 0."""
    high = 709.7 if x.dtype == torch.float64 else 88.7
    return torch.where(x > high, high, x).exp()


def log1p_minus(x: Tensor) -> Tensor:
    """log(1 + x) - x for x > -1, to full relative accuracy."""
    # the difference cancels near 0: log(1 + x) = 2 artanh(s), s = x / (2 + x)
    near = (x > -0.5) & (x < 1)
    small = torch.where(near, x, torch.zeros_like(x))
    s = small / (2 + small)
    square = s.square()
    series = torch.zeros_like(x)
    for n in range(17, -1, -1):
        series = series * square + 1 / (2 * n + 3)
    large = torch.where(near, torch.ones_like(x), x)
    return torch.where(near, s * (2 * square * series - small), large.log1p() - large)


def reduce_rows(rows: Tensor, reduction: str, scale: float = 1.0) -> Tensor:
    """`"mean"`, `"sum"` or `"none"` over all row dimensions, times `scale`."""
    if reduction == "mean":
        rows = rows.mean()
    elif reduction == "sum":
        rows = rows.sum()
    unchanged = not isinstance(scale, Tensor) and known_true(scale == 1.0)
    return rows if unchanged else rows * scale


def sum_event(x: Tensor, event_ndims: int) -> Tensor:
    """Sum over the trailing `event_ndims` dimensions; 0 leaves `x` as it is."""
    if event_ndims <= 1:
        return x.sum(-1) if event_ndims else x
    return x.sum(dim=tuple(range(x.dim() - event_ndims, x.dim())))


def weigh(rows: Tensor, weights: Tensor | None) -> Tensor:
    """rows · weights. A weight of 0 excludes its row: NaN and infinity there reach neither value nor gradient."""
    if weights is None:
        return rows
    return torch.where((weights == 0) & ~rows.isfinite(), 0.0, rows) * weights


def read(weights: Tensor | None, event_ndims: int, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors `[rows…, event…]`, with 1, which every formula takes, for what a weight of 0 excludes. So nothing of
    it reaches a gradient of any order."""
    if weights is None:
        return tensors
    counts = (weights != 0).reshape(*weights.shape, *(1,) * event_ndims)
    return tuple(None if t is None else torch.where(counts, t, 1.0) for t in tensors)


def reduce_weighted(rows: Tensor, weights: Tensor | None, scale: float, reduction: str) -> Tensor:
    return reduce_rows(weigh(rows, weights), reduction, scale)
