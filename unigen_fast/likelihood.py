"""Log-densities that build log-weights and reconstruction terms. Rows: the event dimensions are summed."""

import torch
from torch import Tensor

from unigen_fast import _checks, _ops


def bernoulli_log_prob(logits: Tensor, x: Tensor, *, event_ndims: int = 1) -> Tensor:
    """log Bernoulli(x; sigmoid(logits)) = sum_d x_d log sigma(l_d) + (1 - x_d) log sigma(-l_d).

    Args:
        logits: `[rows…, event…]`, the decoder's raw outputs.
        x: data in [0, 1] (bool and integer tensors are taken as such), broadcastable with `logits`: `x.unsqueeze(1)` of
            `[B, D]` against `[B, K, D]` is not repeated in memory.
        event_ndims: how many trailing dimensions make one example and are summed.

    Returns:
        Nats, one per row; fp32 for fp16 and bf16.

    Raises:
        TypeError: `logits` is not floating-point.
        ValueError: shapes that do not broadcast, tensors on two devices, `event_ndims` out of range.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), App. C.1.
    """
    _checks.floating("logits", logits)
    if isinstance(x, Tensor) and (x.dtype == torch.bool or not x.is_floating_point()):
        x = x.to(logits.dtype)
    logits, x = _checks.same_kind(logits=logits, x=x)  # type: ignore[assignment]
    return _ops.bernoulli_log_prob((logits, x), _checks.event("logits", logits, event_ndims))
