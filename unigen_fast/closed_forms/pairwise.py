"""Closed forms of divergences over all pairs of a minibatch."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unigen_fast.closed_forms._rows import (
    Forward,
    Gradients,
    Tensors,
    filled,
    finite,
)
from unigen_fast.reference import pairwise
from unigen_fast.reference._common import lowered, upcast

_BLOCK = 2**17  # elements of a block for each thread: with half as many, the calls take longer than the caches save

# ---- total correlation -----------------------------------------------------------------------------------------------


class _Posteriors:
    """The minibatch with its dimensions first: PyTorch's loops are along the last, over the posteriors j."""

    def __init__(self, z: Tensor, mean: Tensor, logvar: Tensor, dataset_size: int, estimator: str) -> None:
        self.z, self.mean, logvar = (upcast(t).t().contiguous() for t in (z, mean, logvar))
        self.constant = (logvar + math.log(2 * math.pi)).mul_(-0.5)
        self.rate = (logvar * -0.5).exp_().mul_(math.sqrt(0.5))
        self.rows, self.estimator = z.size(0), estimator
        most, diagonal, following = pairwise.pair_weights(self.rows, dataset_size, estimator)
        self.log_most, self.diagonal, self.following = math.log(most), diagonal / most, following / most

    def blocks(self) -> Iterator[tuple[int, int]]:
        step = max(1, _BLOCK * torch.get_num_threads() // max(self.z.numel(), 1))
        for first in range(0, self.rows, step):
            yield first, min(first + step, self.rows)

    def pairs(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The distances in scales, over the root of 2, and the logarithms of the densities."""
        t = (self.z[:, first:last, None] - self.mean[:, None]).mul_(self.rate[:, None])
        return t, torch.addcmul(self.constant[:, None], t, t, value=-1)

    def weigh(self, densities: Tensor, first: int, last: int) -> Tensor:
        """Times the weights of the pairs over that of most, in place."""
        if self.estimator == "mws" or self.rows < 2:
            return densities
        if self.estimator == "mss_columns":
            following = densities[..., :2]
            following.mul_(self.following)
            exception, of_first = self.rows - 2, densities[..., 0]
            of_first.mul_(self.diagonal / self.following)
            if first <= exception < last:
                of_first[..., exception - first].mul_(self.following / self.diagonal)
            return densities
        densities.diagonal(first, -2, -1).mul_(self.diagonal)
        densities.diagonal(first + 1, -2, -1).mul_(self.following)
        if last == self.rows:
            densities[..., -1, 0].mul_(self.following)
        return densities


def _joint(pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The joint densities' logarithms, the largest of each row, and the differences from it.

    A sum over many dimensions has its last bit where the difference counts: there parts of the sums are subtracted.
    """
    parts = [part.sum(0) for part in pairs.split(8 if pairs.size(0) > 32 else 32)]
    if len(parts) == 1:
        joint = parts[0]
        maximum = joint.amax(1, keepdim=True)
        return joint, maximum, joint - maximum
    stacked = torch.stack(parts)
    joint = stacked.sum(0)
    maximum, where = joint.max(1, keepdim=True)
    return joint, maximum, (stacked - stacked.gather(-1, where.expand(len(parts), -1, -1))).sum(0)


def total_correlation(z: Tensor, mean: Tensor, logvar: Tensor, dataset_size: int, estimator: str) -> Forward:
    if not z.numel():
        return None
    all_of = _Posteriors(z, mean, logvar, dataset_size, estimator)
    marginals = torch.empty_like(all_of.z)
    maxima, sums, log_qzx = (marginals.new_empty(all_of.rows) for _ in range(3))
    total = marginals.new_zeros(())
    for first, last in all_of.blocks():
        _, pairs = all_of.pairs(first, last)
        joint, maximum, differences = _joint(pairs)
        total += joint.sum()  # no pair is infinitely far apart
        log_qzx[first:last] = joint.diagonal(first)
        torch.sum(all_of.weigh(pairs.exp_(), first, last), -1, out=marginals[:, first:last])
        maxima[first:last] = maximum.squeeze(1)
        torch.sum(all_of.weigh(differences.exp_(), first, last), 1, out=sums[first:last])
    # densities that are no number, or so small that they have lost digits, are for the maxima of the reference
    small, large = (bound.item() for bound in marginals.aminmax())
    if not (finite(total) and _LEAST < small and large < math.inf):
        return None
    marginals.log_()
    log_qz = sums.log().add_(maxima).add_(all_of.log_most)
    log_prod = marginals.sum(0).add_(all_of.log_most * all_of.z.size(0))
    log_pz = all_of.z.square().sum(0).add_(math.log(2 * math.pi) * all_of.z.size(0)).mul_(-0.5)
    rows = log_qz, log_prod, log_qzx, log_qzx - log_qz, log_qz - log_prod, log_prod - log_pz
    return (*rows, marginals), (marginals, sums)


_LEAST = 1e-30


def total_correlation_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], z: Tensor, mean: Tensor, logvar: Tensor, dataset_size: int,
    estimator: str,
) -> Gradients:  # fmt: skip
    marginals, totals = kept
    of_qz, of_prod, of_qzx, of_mutual, of_total, of_kl = filled(grads, *[z.shape[:1]] * 6)
    all_of = _Posteriors(z, mean, logvar, dataset_size, estimator)
    of_qz, of_prod, of_qzx = of_qz - of_mutual + of_total, of_prod - of_total + of_kl, of_qzx + of_mutual
    rates = all_of.rate.unsqueeze(-1)
    # of a pair's log-density the gradient is: what the row's is, times the pair's share in the sum
    of_joint = (of_qz / totals).unsqueeze(1)
    of_marginals = (-marginals).exp_().mul_(of_prod)
    own = (all_of.z - all_of.mean).mul_(all_of.rate)
    of_z = torch.zeros_like(own)
    # sums over the rows of the gradient, of it times t and of it times t²
    sums = of_qzx.expand_as(own).clone()
    firsts = own * of_qzx
    seconds = firsts * own
    of_z -= firsts * all_of.rate
    for first, last in all_of.blocks():
        t, pairs = all_of.pairs(first, last)
        shares = all_of.weigh(_joint(pairs)[2].exp_(), first, last).mul_(of_joint[first:last])
        slopes = all_of.weigh(pairs.exp_(), first, last).mul_(of_marginals[:, first:last, None]).add_(shares)
        sums += slopes.sum(1)
        slopes.mul_(t)
        of_z[:, first:last] -= torch.bmm(slopes, rates).squeeze(-1)
        firsts += slopes.sum(1)
        seconds += slopes.mul_(t).sum(1)
    # constant - t², t = (z - mean) e^{-logvar / 2} / sqrt(2)
    of_z = of_z.mul_(2).addcmul_(all_of.z, of_kl)
    of_mean = firsts.mul_(all_of.rate).mul_(2)
    of_logvar = seconds.sub_(sums, alpha=0.5)
    found = zip((of_z, of_mean, of_logvar), (z, mean, logvar), needed, strict=True)
    return [lowered(g.t().contiguous(), t) if n else None for g, t, n in found]


# ---- maximum mean discrepancy ----------------------------------------------------------------------------------------


# relative to the narrowest kernel's width, how far a squared distance may be off that a matrix product gives
_OFF = 2**-18


def mmd(x: Tensor, y: Tensor, kernel: str, scales: Sequence[float], unbiased: bool, gradients: int) -> Forward:
    """The gradients are made with the value, as the kernels do it."""
    if not (x.numel() and y.numel()):
        return None
    a, b = upcast(x), upcast(y)
    n, m = a.size(0), b.size(0)
    widths = [2.0 * a.size(1) * scale for scale in scales]
    of_a, of_b = (torch.zeros_like(t) if gradients >> bit & 1 else None for bit, t in enumerate((a, b)))
    value = _add_pairs(a, b, kernel, widths, -2 / (n * m), of_a, of_b)
    for points, slopes in ((a, of_a), (b, of_b)):
        count = points.size(0)
        factor = 1 / (count * (count - 1 if unbiased else count))
        value = value + _add_pairs(points, None, kernel, widths, factor, slopes, slopes)
        if not unbiased:
            value += factor * count * (len(widths))
    return (value, [g for g in (of_a, of_b) if g is not None]) if finite(value) else None


def _add_pairs(
    a: Tensor, b: Tensor | None, kernel: str, widths: Sequence[float], factor: float, of_a: Tensor | None,
    of_b: Tensor | None,
) -> Tensor:  # fmt: skip
    """`factor` times the kernels' sum over all pairs of a and b, a block at a time, its derivatives being added to
    `of_a` and `of_b`. Without b, over the pairs of two of a, each of which is computed once."""
    # a difference of products loses few digits where the points lie around 0
    within, others = b is None, a if b is None else b
    center = others.mean(0)
    a_around, b_around = a - center, others - center
    a_squares, b_squares = (t.square().sum(1) for t in (a_around, b_around))
    spread = (a_squares.amax() + b_squares.amax()).item()
    by_product = spread * torch.finfo(a.dtype).eps <= _OFF * min(widths)
    total = a.new_zeros(())
    first = 0
    while first < a.size(0):
        start = first if within else 0  # of the columns
        last = first + max(1, _BLOCK * torch.get_num_threads() // (others.size(0) - start))
        rows, columns = a_around[first:last], b_around[start:]
        if by_product:
            sums = a_squares[first:last, None] + b_squares[start:]
            square = torch.addmm(sums, rows, columns.t(), alpha=-2, out=sums).clamp_(min=0)
        else:
            square = torch.cdist(a[first:last], others[start:], compute_mode="donot_use_mm_for_euclid_dist").square_()
        values, slope = _kernels(square, kernel, widths, of_a is not None or of_b is not None)
        if within:  # what lies below the diagonal comes with what lies above it
            values.triu_(1)
            if slope is not None:
                slope.triu_(1)
        total += values.sum()
        if slope is not None:
            if of_a is not None:
                of_rows = torch.addmm(rows * slope.sum(1, keepdim=True), slope, columns, alpha=-1)
                of_a[first:last].add_(of_rows, alpha=_OF_SQUARE * factor * (1 + within))
            if of_b is not None:
                of_columns = torch.addmm(columns * slope.sum(0).unsqueeze(1), slope.t(), rows, alpha=-1)
                of_b[start:].add_(of_columns, alpha=_OF_SQUARE * factor * (1 + within))
        first = last
    return total * (factor * (1 + within))


_OF_SQUARE = 2  # the derivative of d² is twice the difference


def _kernels(square: Tensor, kernel: str, widths: Sequence[float], slopes: bool) -> tuple[Tensor, Tensor | None]:
    """`pairwise.kernel_sum`, and `pairwise.kernel_slope` where wanted."""
    values, term = torch.zeros_like(square), torch.empty_like(square)
    slope = torch.zeros_like(square) if slopes else None
    for width in widths:
        if kernel == "imq":
            torch.add(square, width, out=term).reciprocal_()
            values.add_(term, alpha=width)
            if slope is not None:
                slope.addcmul_(term, term, value=-width)
        else:
            torch.mul(square, -1 / width, out=term).exp_()
            values += term
            if slope is not None:
                slope.add_(term, alpha=-1 / width)
    return values, slope


def mmd_backward(
    grads: Tensors, kept: Tensors, needed: Sequence[bool], x: Tensor, y: Tensor, kernel: str, scales: Sequence[float],
    unbiased: bool, gradients: int,
) -> Gradients:  # fmt: skip
    made = iter(kept)
    found = [next(made) if gradients >> i & 1 else None for i in (0, 1)]
    return [None if g is None else lowered(g * grads[0], t) for g, t in zip(found, (x, y), strict=True)]
