"""Categorical divergences and likelihoods, and the discretized logistic mixture, in plain PyTorch."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unigen_fast.reference._common import read, reduce_weighted, sum_event, upcast
from unigen_fast.reference.divergence import clamp


def _mixed(logits: Tensor, unimix: float) -> Tensor:
    """Probabilities over the last dimension, none of which is 0."""
    return (1 - unimix) * torch.softmax(logits, -1) + unimix / logits.size(-1) if logits.size(-1) else logits


def _kl(logits_q: Tensor, logits_p: Tensor | None, unimix: float) -> Tensor:
    """KL(q || p) over the last dimension: the sum of q log(q / p) + p - q, of which no class is negative. Nothing
    cancels where p is close to q: a last bit of p / q or of its logarithm counts for little in what lies between them.
    A class that q rules out counts p."""
    classes = logits_q.size(-1)
    if unimix == 0:
        log_q = torch.log_softmax(logits_q, -1)
        log_p = torch.full_like(log_q, -math.log(max(classes, 1)))
        if logits_p is not None:
            log_p = torch.log_softmax(logits_p, -1)
        log_ratio = log_p - log_q
        # p much larger than q may be infinite times q, and q may be 0
        larger, ruled_out = log_ratio > 1, log_q == -math.inf
        near = torch.where(larger | ruled_out, 0.0, log_ratio)
        far = torch.where(larger & ~ruled_out, log_ratio, 0.0)
        q = log_q.exp()
        of_far = log_p.exp() - q - torch.where(ruled_out, 0.0, q) * far
        return torch.where(larger | ruled_out, of_far, q * (torch.expm1(near) - near)).sum(-1)
    q = _mixed(logits_q, unimix)
    ratio = (1 / max(classes, 1) if logits_p is None else _mixed(logits_p, unimix)) / q
    return (q * (ratio - 1 - ratio.log())).sum(-1)


def categorical_kl(
    logits_q: Tensor,
    logits_p: Tensor | None,
    weights: Tensor | None,
    class_dim: int,
    event_ndims: int,
    unimix: float,
    scale: float,
    reduction: str,
) -> Tensor:
    """`event_ndims` counts dimensions without that of the classes."""
    q = upcast(logits_q).movedim(class_dim, -1)
    p = None if logits_p is None else upcast(logits_p).movedim(class_dim, -1)
    q, p = read(weights, event_ndims + 1, q, p)
    rows = sum_event(_kl(q, p, unimix), event_ndims)
    return reduce_weighted(rows, weights, scale, reduction)


def balanced_categorical_kl(
    posterior_logits: Tensor,
    prior_logits: Tensor,
    event_ndims: int,
    free_nats: float,
    free_nats_mode: str,
    unimix: float,
    dynamics_scale: float,
    representation_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss, dynamics, representation, rows before free nats: `[0]` where backward has no use for them)."""
    posterior, prior = upcast(posterior_logits), upcast(prior_logits)
    means = []
    for q, p in ((posterior.detach(), prior), (posterior, prior.detach())):
        sites = _kl(q, p, unimix)
        if free_nats > 0 and free_nats_mode == "per_variable":
            sites = clamp(sites, free_nats)
        rows = sum_event(sites, event_ndims)
        free_rows = free_nats > 0 and free_nats_mode == "sum"
        kept = rows.detach().contiguous().clone() if free_rows else rows.new_empty((0,))
        means.append((clamp(rows, free_nats) if free_rows else rows).mean())
    dynamics, representation = means
    return dynamics_scale * dynamics + representation_scale * representation, dynamics, representation, kept


def categorical_log_prob(logits: Tensor, x: Tensor, class_dim: int, event_ndims: int, ignore_index: int) -> Tensor:
    """`x`: int64 classes. `ignore_index` gives 0, without gradient; any other that does not exist NaN, and so do its
    gradients."""
    counts = x != ignore_index
    (own,) = read(counts, 1, upcast(logits).movedim(class_dim, -1))
    log_p = torch.log_softmax(own, -1)
    exists = (x >= 0) & (x < log_p.size(-1))
    if log_p.size(-1) == 0:
        chosen = log_p.sum(-1)
    else:
        chosen = log_p.gather(-1, torch.where(exists, x, 0).unsqueeze(-1)).squeeze(-1)
    sites = chosen * torch.where(exists | ~counts, 1.0, math.nan).to(chosen.dtype)
    return sum_event(torch.where(counts, sites, 0.0), event_ndims)


# ---- the discretized logistic mixture --------------------------------------------------------------------------------

MIN_LOG_SCALE = -7.0
HALF_BIN = 1 / 255
EDGE = 0.999


def discretized_logistic(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass that a logistic gives to the bin of x: all below at -1, all above at 1."""
    log_scale = clamp(log_scale, MIN_LOG_SCALE)
    inverse = (-log_scale).exp()
    upper = inverse * (x - mean + HALF_BIN)
    lower = inverse * (x - mean - HALF_BIN)
    # log(sigma(b) - sigma(a)) = log(1 - e^{a - b}) + log sigma(b) + log sigma(-a): nothing cancels
    width = 2 * HALF_BIN * inverse
    small = width < 1e-4  # 1 - e^{-w} = w e^{-w/2} (1 + w²/24 …)
    series = math.log(2 * HALF_BIN) - log_scale - width / 2 + width.square() / 24
    inside = torch.where(small, series, (-torch.expm1(-torch.where(small, 1.0, width))).log())
    below, above = x < -EDGE, x > EDGE
    value = torch.where(above, 0.0, logsigmoid(upper)) + torch.where(below, 0.0, logsigmoid(-lower))
    return torch.where(below | above, value, value + inside)


def discretized_logistic_mixture_log_prob(params: Tensor, x: Tensor, event_ndims: int) -> Tensor:
    """`params` [sites…, M (1 + 2C + C(C-1)/2)], `x` [sites…, C] with C 1 or 3; `event_ndims` counts sites alone."""
    params, x = upcast(params), upcast(x)
    channels = x.size(-1)
    mixtures = params.size(-1) // (10 if channels == 3 else 3)
    logits, rest = params.split([mixtures, params.size(-1) - mixtures], -1)
    blocks = rest.unflatten(-1, (channels, -1)).split(mixtures, -1)  # each [sites…, C, M]
    means, log_scales = blocks[0], blocks[1]
    if channels == 3:
        c = torch.tanh(blocks[2])
        red, green = x[..., 0:1], x[..., 1:2]
        means = torch.stack(
            [
                means[..., 0, :],
                means[..., 1, :] + c[..., 0, :] * red,
                means[..., 2, :] + c[..., 1, :] * red + c[..., 2, :] * green,
            ],
            -2,
        )
    terms = discretized_logistic(x.unsqueeze(-1), means, log_scales).sum(-2)
    sites = torch.logsumexp(logits + terms, -1) - torch.logsumexp(logits, -1)
    return sum_event(sites, event_ndims)
