"""Importance weights in plain PyTorch. `dim=None` reduces over every dimension."""

import math

import torch
from torch import Tensor

from unigen_fast.reference._common import reduce_rows, softplus, upcast


def _over_dim(x: Tensor, dim: int | None) -> tuple[Tensor, int]:
    return (x.reshape(-1), 0) if dim is None else (x, dim)


def row_statistics(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum and sum of `exp(log_w - maximum)` over `dim`, both with `dim` kept.

    The maximum is a constant (it cancels from every result), and 0 for a row of `-inf`, so that such a row sums to 0
    instead of turning into NaN. A `+inf` or NaN makes its row's sum NaN.
    """
    maximum = log_w.detach().amax(dim, keepdim=True)
    maximum = torch.where(maximum == -math.inf, torch.zeros_like(maximum), maximum)
    return maximum, (log_w - maximum).exp().sum(dim, keepdim=True)


def normalized_weights(log_w: Tensor, dim: int) -> Tensor:
    """softmax, but 0 (with gradient 0) throughout a row of `-inf`."""
    maximum, total = row_statistics(log_w, dim)
    empty = total == 0
    weights = (log_w - maximum).exp() / torch.where(empty, torch.ones_like(total), total)
    return torch.where(empty, torch.zeros_like(weights), weights)


def log_sum_exp(maximum: Tensor, total: Tensor) -> Tensor:
    """`maximum + log(total)`, `-inf` with gradient 0 where `total` is 0."""
    empty = total == 0
    value = maximum + torch.where(empty, torch.ones_like(total), total).log()
    return torch.where(empty, torch.full_like(value, -math.inf), value)


def _weighted_sum(weights: Tensor, payload: Tensor, dim: int) -> Tensor:
    """sum w·p, in which a weight of 0 silences an infinite payload."""
    return (weights * torch.where(weights == 0, torch.zeros_like(payload), payload)).sum(dim)


def log_mean_exp(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Returns (value `[rows]`, statistics `[2, rows]`: maximum and sum of exponentials)."""
    log_w = upcast(log_w)
    maximum, total = row_statistics(log_w, dim)
    value = log_sum_exp(maximum, total).squeeze(dim) - math.log(max(log_w.size(dim), 1))
    return value, torch.stack([maximum.squeeze(dim), total.squeeze(dim)])


def importance_weights(log_w: Tensor, dim: int, temperature: float) -> Tensor:
    return normalized_weights(upcast(log_w) / temperature, dim)


def effective_sample_size(log_w: Tensor, dim: int) -> Tensor:
    """(sum w)² / sum w²; 0 for a row of `-inf`."""
    weights = normalized_weights(upcast(log_w.detach()), dim)
    squares = weights.square().sum(dim)
    empty = squares == 0
    return torch.where(empty, torch.zeros_like(squares), 1 / torch.where(empty, torch.ones_like(squares), squares))


def iwae_loss(log_w: Tensor, dim: int, reduction: str, value: str) -> tuple[Tensor, Tensor]:
    """Returns (loss, statistics as in `log_mean_exp`)."""
    bound, statistics = log_mean_exp(log_w, dim)
    if value == "surrogate":
        log_w = upcast(log_w)
        bound = _weighted_sum(normalized_weights(log_w.detach(), dim), log_w, dim)
    return reduce_rows(-bound, reduction), statistics


def importance_weighted_generator_loss(
    fake: Tensor, dim: int | None, temperature: float, detach: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """Returns (loss, statistics `[3, rows]`: maximum and sum of exponentials of `fake / temperature`, row loss)."""
    logits, dim = _over_dim(upcast(fake), dim)
    log_w = logits / temperature
    maximum, total = row_statistics(log_w, dim)
    weights = normalized_weights(log_w, dim)
    rows = _weighted_sum(weights.detach() if detach else weights, softplus(-logits), dim)
    statistics = torch.stack([maximum.squeeze(dim), total.squeeze(dim), rows])
    return reduce_rows(rows, reduction), statistics.detach()


def grouped_importance_weighted_generator_loss(
    fake: Tensor, groups: Tensor, temperature: float, detach: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """IWGAN with the weights normalised among the samples of one label; no synchronisation with the host.

    The samples are sorted by label, and each label's run scattered into one of N segments, of which those beyond the
    number of labels present stay empty.

    Returns (loss, statistics `[2N + 1]`: each sample's weight, the loss of its group, what the sum over the groups is
    multiplied by).
    """
    labels, order = torch.sort(groups, stable=True)
    logits = upcast(fake)[order]
    starts = torch.ones_like(labels, dtype=torch.bool)
    starts[1:] = labels[1:] != labels[:-1]
    segment = starts.cumsum(0) - 1
    log_w = logits / temperature
    nothing = torch.zeros_like(log_w.detach())
    maximum = (nothing - math.inf).scatter_reduce(0, segment, log_w.detach(), "amax")
    maximum = torch.where(maximum == -math.inf, nothing, maximum)
    exponentials = (log_w - maximum[segment]).exp()
    total = nothing.scatter_add(0, segment, exponentials)[segment]
    empty = total == 0
    weights = torch.where(empty, nothing, exponentials / torch.where(empty, torch.ones_like(total), total))
    if detach:
        weights = weights.detach()
    terms = weights * torch.where(weights == 0, nothing, softplus(-logits))
    factor = 1 / starts.sum().to(log_w.dtype) if reduction == "mean" else log_w.new_ones(())
    loss = terms.sum() * (math.nan if reduction == "mean" and logits.numel() == 0 else factor)
    of_group = nothing.scatter_add(0, segment, terms.detach())[segment]
    back = torch.argsort(order)
    return loss, torch.cat([weights.detach()[back], of_group[back], factor.reshape(1)])
