"""Divergences over all pairs of a minibatch, in plain PyTorch, a block of rows at a time.

A block's intermediate tensors are `[rows of the block, B, D]`, of at most `BLOCK_ELEMENTS` elements. Where autograd
records, each block is checkpointed: its tensors are computed again in backward (a second forward pass in time) instead
of being kept. `torch.func` has no checkpoints: there the blocks' tensors stay, `[B, B, D]` of them altogether.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unigen_fast._private import transforms_active
from unigen_fast.reference._common import finite_exp, finite_maximum, upcast
from unigen_fast.reference.importance import log_sum_exp

BLOCK_ELEMENTS = 2**20


def _over_blocks(block: Callable[..., tuple[Tensor, ...]], rows: int, row_elements: int, *tensors: Tensor) -> list:
    """`block(first, last, *tensors)` for blocks of rows; a list of its results."""
    if not isinstance(rows, int):  # the symbolic size of a fake tensor, which has no memory
        return [block(0, rows, *tensors)]
    step = max(1, BLOCK_ELEMENTS // max(row_elements, 1))
    bounds = [(first, min(first + step, rows)) for first in range(0, max(rows, 1), step)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if len(bounds) == 1 or not recorded or transforms_active(*tensors) or torch.compiler.is_compiling():
        return [block(*b, *tensors) for b in bounds]
    return [checkpoint(block, *b, *tensors, use_reentrant=False, preserve_rng_state=False) for b in bounds]


# ---- total correlation -----------------------------------------------------------------------------------------------


def pair_weights(rows: int, dataset_size: int, estimator: str) -> tuple[float, float, float]:
    """(weight of most pairs, that of (i, i), that of (i, (i + 1) mod B)) over a minibatch of `rows`.

    "mss_columns" has the latter two at (i, 0) and (i, 1).
    """
    n, m = torch.sym_max(dataset_size, rows), rows - 1
    if estimator == "mws" or rows < 2:
        weight = 1 / (max(rows, 1) * n) if estimator == "mws" else 1.0
        return weight, weight, weight
    return 1 / m, 1 / n, (n - m) / (n * m)


def _log(weight: float, like: Tensor) -> float | Tensor:
    if isinstance(weight, float):
        return math.log(weight)
    return torch.full((), weight, dtype=like.dtype, device=like.device).log()  # of a symbolic number of rows


def _log_weights(first: int, last: int, like: Tensor, dataset_size: int, estimator: str) -> Tensor:
    """Rows `first` to `last` of log W, `[last - first, B]`."""
    rows = like.size(0)
    most, diagonal, following = pair_weights(rows, dataset_size, estimator)
    i = torch.arange(first, last, device=like.device)[:, None]
    j = torch.arange(rows, device=like.device)
    if estimator == "mss_columns":
        of_diagonal, of_following = (j == 0) & (i != rows - 2), j <= 1
    else:
        of_diagonal, of_following = j == i, (j == (i + 1) % rows if rows else j == i)
    log_weights = torch.zeros((), dtype=like.dtype, device=like.device) + _log(most, like)
    log_weights = torch.where(of_following, _log(following, like), log_weights)
    return torch.where(of_diagonal, _log(diagonal, like), log_weights)


def _constant(logvar: Tensor) -> Tensor:
    """log N(mean; mean, e^logvar)."""
    return -0.5 * (logvar + math.log(2 * math.pi))


def _rate(logvar: Tensor) -> Tensor:
    """e^{-logvar / 2} / sqrt(2), for a posterior that has become certain so small that 0 times t is 0."""
    return finite_exp(-0.5 * logvar).clamp(max=1e300 if logvar.dtype == torch.float64 else 1e30) * math.sqrt(0.5)


def total_correlation(
    z: Tensor, mean: Tensor, logvar: Tensor, dataset_size: int, estimator: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the six rows of `TotalCorrelation` and statistics `[D + 4, B]`.

    Statistics: log sum_j W_ij q(z_id | x_j) for each d; the maximum over j of log q(z_i | x_j), in three numbers
    that are added (a kernel's may be a logarithm to base 2); and the sum over j of W_ij q(z_i | x_j) / e^maximum, W
    relative to the weight of most pairs.
    """
    z, mean, logvar = upcast(z), upcast(mean), upcast(logvar)
    rows = z.size(0)
    log_most = _log(pair_weights(rows, dataset_size, estimator)[0], z)
    rate, constant = _rate(logvar), _constant(logvar)

    def block(first: int, last: int, z: Tensor, mean: Tensor, rate: Tensor, constant: Tensor) -> tuple[Tensor, ...]:
        t = (z[first:last, None, :] - mean) * rate
        pairs = torch.addcmul(constant, t, t, value=-1)
        weights = (_log_weights(first, last, z, dataset_size, estimator) - log_most).exp()
        joint = pairs.sum(-1)
        maximum = finite_maximum(joint, 1)
        total = (weights * (joint - maximum).exp_()).sum(1, keepdim=True)
        maxima = finite_maximum(pairs, 1)
        sums = torch.bmm(weights.unsqueeze(1), (pairs - maxima).exp_())
        return (
            (log_sum_exp(maximum, total) + log_most).squeeze(1),
            (log_sum_exp(maxima, sums) + log_most).squeeze(1),
            maximum.squeeze(1),
            total.squeeze(1),
        )

    found = _over_blocks(block, rows, rows * z.size(1), z, mean, rate, constant) if rows else []
    if found:
        log_qz, marginals, maximum, total = (torch.cat(parts) for parts in zip(*found, strict=True))
    else:
        log_qz = maximum = total = z.sum(1)
        marginals = z
    log_prod = marginals.sum(1)
    log_qzx = (constant - ((z - mean) * rate).square()).sum(1)
    log_pz = (-0.5 * (z.square() + math.log(2 * math.pi))).sum(1)
    nothing = torch.zeros_like(maximum)[None]
    statistics = torch.cat([marginals.t(), maximum[None], nothing, nothing, total[None]]).detach()
    return log_qz, log_prod, log_qzx, log_qzx - log_qz, log_qz - log_prod, log_prod - log_pz, statistics


# ---- maximum mean discrepancy ----------------------------------------------------------------------------------------


def _widths(dims: int, scales: list[float], like: Tensor) -> list[Tensor]:
    return [torch.full((), 2.0 * dims * scale, dtype=like.dtype, device=like.device) for scale in scales]


def kernel_sum(square_distance: Tensor, kernel: str, dims: int, scales: list[float]) -> Tensor:
    """sum over the scales s of C/(C + d²) ("imq") or e^{-d²/C} ("rbf"), C = 2 D s."""
    total = torch.zeros_like(square_distance)
    for width in _widths(dims, scales, total):
        total = total + (width / (width + square_distance) if kernel == "imq" else (-square_distance / width).exp())
    return total


def kernel_slope(square_distance: Tensor, kernel: str, dims: int, scales: list[float]) -> Tensor:
    """d kernel_sum / d d²."""
    total = torch.zeros_like(square_distance)
    for width in _widths(dims, scales, total):
        if kernel == "imq":
            total = total - width / (width + square_distance).square()
        else:
            total = total - (-square_distance / width).exp() / width
    return total


def mmd(
    x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: bool, gradients: int
) -> tuple[Tensor, Tensor]:
    """Returns the value, and its gradients for x (bit 0 of `gradients`) and y (bit 1), one below the other."""
    x, y = upcast(x), upcast(y)
    dims = x.size(1)

    def total(a: Tensor, b: Tensor, without_diagonal: bool) -> Tensor:
        def block(first: int, last: int, a: Tensor, b: Tensor) -> tuple[Tensor]:
            square_distance = (a[first:last, None, :] - b).square().sum(-1)
            values = kernel_sum(square_distance, kernel, dims, scales)
            if without_diagonal:
                i = torch.arange(first, last, device=a.device)[:, None]
                values = torch.where(i == torch.arange(b.size(0), device=a.device), 0.0, values)
            return (values.sum(),)

        parts = _over_blocks(block, a.size(0), b.size(0) * dims, a, b)
        return torch.stack([part for (part,) in parts]).sum()

    def mean(a: Tensor, b: Tensor, without_diagonal: bool = False) -> Tensor:
        count = a.size(0) * (b.size(0) - 1 if without_diagonal else b.size(0))
        return total(a, b, without_diagonal) / count

    def gradient(of: Tensor, others: Tensor) -> Tensor:
        def block(first: int, last: int, of: Tensor, others: Tensor) -> tuple[Tensor]:
            found = torch.zeros_like(of[first:last])
            for b, factor in ((of, 4 / (n * (n - 1 if unbiased else n))), (others, -4 / (n * others.size(0)))):
                difference = of[first:last, None, :] - b
                slope = kernel_slope(difference.square().sum(-1), kernel, dims, scales)
                found = found + factor * (slope[..., None] * difference).sum(1)
            return (found,)

        n = of.size(0)
        return torch.cat([part for (part,) in _over_blocks(block, n, (n + others.size(0)) * dims, of, others)])

    value = mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y)
    sides = [(a.detach(), b.detach()) for bit, (a, b) in enumerate(((x, y), (y, x))) if gradients >> bit & 1]
    # no rows, no mean
    found = [gradient(a, b) if a.numel() and b.numel() else torch.zeros_like(a) for a, b in sides]
    return value, torch.cat(found) if found else x.new_empty(0)
