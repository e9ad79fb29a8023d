"""What the reference functions share: the arithmetic dtype and the reductions of the public contract."""

import torch
from torch import Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 and bf16 are computed, and reduced results returned, in fp32; everything else in itself."""
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def upcast(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact in the tails (`torch.nn.functional.softplus` turns linear above 20)."""
    return -torch.nn.functional.logsigmoid(-x)


def reduce_rows(rows: Tensor, reduction: str, scale: float = 1.0) -> Tensor:
    """`"mean"`, `"sum"` or `"none"` over all row dimensions, times `scale`."""
    if reduction == "mean":
        rows = rows.mean()
    elif reduction == "sum":
        rows = rows.sum()
    return rows if scale == 1.0 else rows * scale


def sum_event(x: Tensor, event_ndims: int) -> Tensor:
    """Sum over the trailing `event_ndims` dimensions; 0 leaves `x` as it is."""
    return x.sum(dim=tuple(range(x.dim() - event_ndims, x.dim()))) if event_ndims else x
