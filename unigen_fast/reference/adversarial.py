"""Losses of discriminator logits in plain PyTorch.

Every loss here is a sum over tensors of logits, each of them averaged (or summed) after one elementwise function, its
term. The terms are numbered by their place in `TERMS`; the kernels use the same numbers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unigen_fast.reference._common import reduce_rows, softplus, upcast

# name -> (function of the logit, whether the logits are meant to be positive: what accuracy counts)
TERMS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "logistic_real": (lambda logits: softplus(-logits), True),  # -log D
    "logistic_fake": (lambda logits: softplus(logits), False),  # -log (1 - D)
    "saturating": (lambda logits: -softplus(logits), True),  # log (1 - D)
    "hinge_real": (lambda logits: (1 - logits).relu(), True),
    "hinge_fake": (lambda logits: (1 + logits).relu(), False),
    "linear": (lambda logits: -logits, True),
}
TERM_NUMBER = {name: number for number, name in enumerate(TERMS)}
_TERM = tuple(TERMS.values())


def logit_term(logits: Tensor, term: int, scale: float) -> Tensor:
    return _TERM[term][0](upcast(logits)) * scale


def logit_loss(
    logits: Sequence[Tensor],
    reals: int,
    real_term: int,
    fake_term: int,
    reduction: str,
    scale: float,
    return_stats: bool,
) -> tuple[Tensor, Tensor]:
    """The first `reals` tensors have `real_term`, the others `fake_term`.

    Returns (scale · sum over the tensors of their reduced terms, statistics `[n, 4]`, or `[0, 4]` if not wanted).
    Statistics of a tensor: mean of its term, share of logits on the right side of 0, mean logit, mean probability.
    """
    total = upcast(logits[0]).new_zeros(())
    statistics = []
    for i, item in enumerate(logits):
        item = upcast(item)
        function, positive = _TERM[real_term if i < reals else fake_term]
        values = function(item)
        total = total + reduce_rows(values, reduction)
        if return_stats:
            with torch.no_grad():
                right = (item > 0 if positive else item < 0).to(item.dtype)
                statistics.append(torch.stack([values.mean(), right.mean(), item.mean(), item.sigmoid().mean()]))
    return total * scale, torch.stack(statistics) if return_stats else total.new_empty((0, 4))
