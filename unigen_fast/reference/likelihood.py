"""Log-likelihoods in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unigen_fast.reference._common import sum_event, upcast


def bernoulli_log_prob(logits: Tensor, x: Tensor, event_ndims: int) -> Tensor:
    """sum of x·log sigma(l) + (1 - x)·log sigma(-l): nothing cancels for x in {0, 1}."""
    logits, x = upcast(logits), upcast(x)
    infinite = logits.isinf()
    ones = torch.where(infinite & (x == 0), torch.zeros_like(logits), x * logsigmoid(logits))
    zeros = torch.where(infinite & (x == 1), torch.zeros_like(logits), (1 - x) * logsigmoid(-logits))
    return sum_event(ones + zeros, event_ndims)
