"""Whole bounds in plain PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unigen_fast._private import known_true
from unigen_fast.reference import likelihood as of_likelihood
from unigen_fast.reference._common import finite_maximum, read, reduce_rows, reduce_weighted
from unigen_fast.reference.divergence import gaussian_kl, gaussian_kl_monte_carlo
from unigen_fast.reference.importance import effective_sample_size, power_rows

_NO_CLAMP = (-math.inf, math.inf)


def log_likelihood(
    likelihood: str, x: Tensor, parameters: Sequence[Tensor], bins: Sequence[float], event_ndims: int
) -> Tensor:
    """Rows of log p(x | parameters), which broadcast with x. A Gaussian of one parameter has variance 1."""
    shape = torch.broadcast_shapes(x.shape, *(p.shape for p in parameters))
    tensors = [t.expand(shape) for t in (x, *parameters)]
    if likelihood == "bernoulli":
        return of_likelihood.bernoulli_log_prob(tensors[1], tensors[0], event_ndims)
    if likelihood == "gaussian":
        logvar = tensors[2] if len(parameters) == 2 else torch.zeros_like(tensors[1])
        return of_likelihood.gaussian_log_prob(tensors[0], tensors[1], logvar, event_ndims, "logvar", *_NO_CLAMP)
    options = tuple(bins) if likelihood == "discretized_logistic" else ()
    return getattr(of_likelihood, f"{likelihood}_log_prob")(*tensors, event_ndims, *options)


def elbo_loss(
    decoder: Tensor,
    decoder_2: Tensor | None,
    decoder_3: Tensor | None,
    x: Tensor,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    weights: Tensor | None,
    event_ndims: int,
    likelihood: str,
    bins: Sequence[float],
    kl_weight: float,
    scale: float,
    reduction: str,
    gradients: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """scale · the reduced weights · (kl_weight KL(q || p) - log p(x | decoder)); the rows of the log-likelihood; and
    those of the KL.

    x is shaped as `decoder`; decoder_2 and decoder_3 as `decoder`, or as the event alone; the weights as the rows,
    which lead in the Gaussians' parameters too.
    """
    latent_ndims = mean.dim() - (x.dim() - event_ndims)

    def rows(counts: Tensor | None) -> tuple[Tensor, Tensor]:
        data, *parameters = read(counts, event_ndims, x, *(p for p in (decoder, decoder_2, decoder_3) if p is not None))
        of_x = log_likelihood(likelihood, data, parameters, bins, event_ndims)
        given = read(counts, latent_ndims, mean, logvar, prior_mean, prior_logvar)
        kl, _ = gaussian_kl(
            *given, None, latent_ndims, "logvar", 0.0, "sum", *_NO_CLAMP, 1.0, "none"  # type: ignore[call-arg, arg-type]
        )  # fmt: skip
        return of_x, kl

    of_x, kl = clean = rows(None)
    if weights is not None:  # an example that it excludes keeps its rows, and their gradients if they are numbers
        lost = (weights == 0) & ~(of_x.isfinite() & kl.isfinite())
        clean = rows(~lost)
        of_x, kl = (torch.where(lost, a.detach(), b) for a, b in zip((of_x, kl), clean, strict=True))
    return reduce_weighted(reduce_rows(clean[1], "none", kl_weight) - clean[0], weights, scale, reduction), of_x, kl


def multi_sample_bound(
    decoder: Tensor,
    decoder_2: Tensor | None,
    decoder_3: Tensor | None,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    logvar: Tensor,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    dim: int,
    event_ndims: int,
    likelihood: str,
    bins: Sequence[float],
    groups: int,
    power: float,
    elbo_weight: float,
    scale: float,
    reduction: str,
    gradients: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scale · the reduced bound; log_w; the bound and the effective sample size of its weights; and what rounding has
    taken from log_w: weights hang on its differences, and need more digits of it than float32 has.

        log_w = log p(x | decoder) + log p(z) - log q(z; mean, logvar).

    `decoder` and z have the samples at `dim`, x and the Gaussians' parameters not; decoder_2 and decoder_3 are shaped
    as `decoder`, or as the event alone. The samples are `groups` stretches of equal length; the bound and the effective
    sample size are means over these, the former of `power_bound_loss`.
    """
    rows = decoder.dim() - event_ndims
    tensors = [x.unsqueeze(dim), *(p for p in (decoder, decoder_2, decoder_3) if p is not None)]
    of_x, rest = _sum_and_rest(likelihood, tensors, bins, event_ndims)
    zero = mean.new_zeros(()).expand(mean.shape)
    of_example = mean, logvar, *(zero if prior is None else prior for prior in (prior_mean, prior_logvar))
    q_mean, q_logvar, p_mean, p_logvar = (g.unsqueeze(dim).expand(z.shape) for g in of_example)
    kl = gaussian_kl_monte_carlo(
        z, q_mean, q_logvar, p_mean, p_logvar, None, z.dim() - rows, "logvar", *_NO_CLAMP, 1.0, "none"
    )
    # relative to a number of the size of all: what is rounded has the size of their differences
    center = finite_maximum(torch.nan_to_num(of_x.detach(), -math.inf, -math.inf, -math.inf), dim)
    relative = (of_x - center) + (rest - kl)
    grouped = relative.unflatten(dim, (groups, relative.size(dim) // groups))
    bound = power_rows(grouped, dim + 1, power, elbo_weight)[0].squeeze(dim + 1).mean(dim) + center.squeeze(dim)
    ess = effective_sample_size(power_weights(grouped.detach(), dim + 1, power), dim + 1).mean(dim)
    log_w = relative + center
    residual = torch.nan_to_num((relative - (log_w - center)).detach(), 0.0, 0.0, 0.0)
    return reduce_rows(bound, reduction, scale), log_w, bound.detach(), ess, residual


def _sum_and_rest(
    likelihood: str, tensors: Sequence[Tensor], bins: Sequence[float], event_ndims: int
) -> tuple[Tensor, Tensor]:
    """Rows of log p(x | parameters), x and the parameters being `tensors`, and what rounding has taken from them, found
    from the sums of up to 16 parts of the event."""
    first = tensors[1].dim() - event_ndims
    size = tensors[1].shape[first] if event_ndims else 1
    count = next((n for n in (16, 8, 4, 2) if known_true(size % n == 0 and size > 0)), 1)
    if count == 1:
        of_x = log_likelihood(likelihood, tensors[0], tensors[1:], bins, event_ndims)
        return of_x, torch.zeros((), dtype=of_x.dtype, device=of_x.device)
    part = (count, size // count)
    divided = [t if t.dim() < event_ndims else t.unflatten(t.dim() - event_ndims, part) for t in tensors]
    parts = log_likelihood(likelihood, divided[0], divided[1:], bins, event_ndims)
    of_x = parts.sum(-1)
    rest = (parts.detach() - of_x.detach().unsqueeze(-1) / count).sum(-1)
    return of_x, torch.nan_to_num(rest, 0.0, 0.0, 0.0)


def power_weights(log_w: Tensor, dim: int, power: float) -> Tensor:
    """Log-weights whose softmax the estimator weighs with; -inf where a row's bound has no gradient."""
    extreme = log_w.amax(dim, keepdim=True)
    if power < 0:
        extreme = log_w.amin(dim, keepdim=True) + torch.nan_to_num(extreme, math.nan, math.nan, 0.0) * 0
    base = torch.nan_to_num(extreme, nan=math.nan, posinf=math.nan, neginf=0.0)
    if power == 1:
        return log_w - base
    empty = extreme == -math.inf
    if power == 0:
        exponents = base * 0
    elif math.isinf(power):
        exponents = torch.where(log_w == base, 0.0, -math.inf) + (base - base)
    else:
        exponents = power * (log_w - base)
    return torch.where(empty, -math.inf, exponents).expand(log_w.shape)
