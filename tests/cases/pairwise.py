"""Cases of the divergences over pairs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import unigen_fast as uf
from cases.base import Case, Spec


def weight_matrix(rows: int, dataset_size: int, estimator: str) -> Tensor:
    """W of Chen et al. (2018), App. C, entry by entry."""
    n, m = max(dataset_size, rows), rows - 1
    if estimator == "mss_columns" and rows > 1:  # what filling the flat matrix in steps of M + 1 gives
        w = torch.full((rows, rows), 1 / m, dtype=torch.float64)
        w[:, 0], w[:, 1], w[rows - 2, 0] = 1 / n, (n - m) / (n * m), (n - m) / (n * m)
        return w
    w = torch.empty(rows, rows, dtype=torch.float64)
    for i in range(rows):
        for j in range(rows):
            if estimator == "mws":
                w[i, j] = 1 / (rows * n)
            elif j == i:
                w[i, j] = 1 / n if rows > 1 else 1.0
            elif j == (i + 1) % rows:
                w[i, j] = (n - m) / (n * m)
            else:
                w[i, j] = 1 / m
    return w


def total_correlation(
    z: Tensor, mean: Tensor, logvar: Tensor, dataset_size: int, estimator: str = "mss"
) -> uf.TotalCorrelation:
    """The definition, with tensors [B, B, D], from the densities of torch.distributions."""
    normal = torch.distributions.Normal(mean, (logvar / 2).exp(), validate_args=False)
    pairs = normal.log_prob(z.unsqueeze(1))  # [i, j, d]
    log_w = weight_matrix(z.size(0), dataset_size, estimator).log()
    log_qz = torch.logsumexp(pairs.sum(2) + log_w, 1)
    log_prod = torch.logsumexp(pairs + log_w.unsqueeze(2), 1).sum(1)
    log_qzx = normal.log_prob(z).sum(1)
    log_pz = torch.distributions.Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(1)
    return uf.TotalCorrelation(log_qz, log_prod, log_qzx, log_qzx - log_qz, log_qz - log_prod, log_prod - log_pz)


def densities(r: uf.TotalCorrelation) -> tuple[Tensor, ...]:
    return r.log_qz, r.log_prod_qzi, r.log_qzx


def differences(r: uf.TotalCorrelation) -> tuple[Tensor, ...]:
    """Each on top of a density: alone, a difference that is 0 (one row, one dimension) has no relative accuracy."""
    return (
        r.log_qzx + 0.5 * r.mutual_information,
        r.log_prod_qzi + 0.4 * r.total_correlation,
        r.log_qzx - 0.3 * r.dimension_wise_kl,
    )


def mmd(x: Tensor, y: Tensor, kernel: str, scales: Any, unbiased: bool) -> Tensor:
    """The definition, with loops over the scales and tensors [N, M, D]."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        square = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(2)
        total = torch.zeros_like(square)
        for s in scales:
            c = torch.full_like(square, 2 * x.size(1) * s)
            total = total + (c * (c + square).reciprocal() if kernel == "imq" else torch.exp(-square / c))
        return total

    def within(a: Tensor) -> Tensor:
        n = a.size(0)
        if not unbiased:
            return k(a, a).mean()
        return (k(a, a) * (1 - torch.eye(n, dtype=a.dtype))).sum() / (n * (n - 1))

    return within(x) + within(y) - 2 * k(x, y).mean()


SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def posterior(rows: int, n: int) -> list[Spec]:
    """z, mean and logvar. One column more than n: without any, the result is 0 but for rounding. No sharp posteriors:
    a density far from its mean has an exponent of hundreds, of which float32 rounds the last digits that count."""
    return [Spec((rows, n + 1)), Spec((rows, n + 1)), Spec((rows, n + 1), "unit")]


def _tc(name: str, rows_of: Callable[..., Any], dataset_size: int, estimator: str, **options: Any) -> Case:
    return Case(
        f"total_correlation[{name}]" if name else "total_correlation",
        lambda z, m, v: rows_of(uf.total_correlation(z, m, v, dataset_size=dataset_size, estimator=estimator)),
        posterior,
        lambda z, m, v: rows_of(total_correlation(z, m, v, dataset_size, estimator)),
        **options,
    )


def _mmd(name: str, kernel: str, scales: Any, unbiased: bool, **options: Any) -> Case:
    return Case(
        f"mmd[{name}]" if name else "mmd",
        lambda x, y: uf.mmd(x, y, kernel=kernel, scales=scales, unbiased=unbiased),
        # two distributions that differ: an estimate near 0 has no relative accuracy
        lambda rows, n: [Spec((2 * rows, n)), Spec((3 * rows, n), "logits")],
        lambda x, y: mmd(x, y, kernel, scales, unbiased),
        made=True,
        **options,
    )


CASES = [
    _tc("", densities, 5000, "mss"),
    _tc("mws", densities, 1000, "mws", every_size=False),
    _tc("columns", densities, 5000, "mss_columns", every_size=False),
    _tc("N < B", densities, 2, "mss", every_size=False),
    _tc("differences", differences, 60000, "mss", every_size=False, composed=True),
    Case(
        "total_correlation[broadcast]",
        lambda z, m, v: densities(uf.total_correlation(z, m, v, dataset_size=100)),
        lambda rows, n: [*posterior(rows, n)[:2], Spec((n + 1,), "unit")],
        lambda z, m, v: densities(total_correlation(z, m, v.expand(z.shape), 100)),
        every_size=False,
        broadcast=True,
    ),
    _mmd("", "imq", SCALES, True, every_size=False),
    _mmd("rbf", "rbf", SCALES, True, every_size=False),
    _mmd("biased", "imq", (0.5, 1.5), False, every_size=False),
    _mmd("rbf,biased", "rbf", (math.pi,), False, every_size=False),
]
