"""Whole bounds in plain PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unigen_fast.reference import likelihood as of_likelihood
from unigen_fast.reference._common import accumulate_dtype, precise, read, reduce_rows, reduce_weighted
from unigen_fast.reference.divergence import gaussian_kl, gaussian_kl_monte_carlo
from unigen_fast.reference.importance import effective_sample_size, power_bound_loss

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
    dtype = torch.promote_types(accumulate_dtype(decoder.dtype), accumulate_dtype(mean.dtype))
    latent_ndims = mean.dim() - (x.dim() - event_ndims)

    def rows(counts: Tensor | None) -> tuple[Tensor, Tensor]:
        data, *parameters = read(counts, event_ndims, x, *(p for p in (decoder, decoder_2, decoder_3) if p is not None))
        of_x = log_likelihood(likelihood, precise(data), [precise(p) for p in parameters], bins, event_ndims)
        given = read(counts, latent_ndims, mean, logvar, prior_mean, prior_logvar)
        gaussians = (None if g is None else precise(g) for g in given)
        kl, _ = gaussian_kl(
            *gaussians, None, latent_ndims, "logvar", 0.0, "sum", *_NO_CLAMP, 1.0, "none"  # type: ignore[call-arg, arg-type]
        )  # fmt: skip
        return of_x, kl

    of_x, kl = clean = rows(None)
    if weights is not None:  # an example that it excludes keeps its rows, and their gradients if they are numbers
        lost = (weights == 0) & ~(of_x.isfinite() & kl.isfinite())
        clean = rows(~lost)
        of_x, kl = (torch.where(lost, a.detach(), b) for a, b in zip((of_x, kl), clean, strict=True))
    loss = reduce_weighted(kl_weight * clean[1] - clean[0], weights, scale, reduction)
    return loss.to(dtype), of_x.to(dtype), kl.to(dtype)


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
    dtype = torch.promote_types(accumulate_dtype(decoder.dtype), accumulate_dtype(z.dtype))
    parameters = [precise(p) for p in (decoder, decoder_2, decoder_3) if p is not None]
    rows = decoder.dim() - event_ndims
    z, zero = precise(z), precise(torch.zeros_like(mean))
    of_x = log_likelihood(likelihood, precise(x).unsqueeze(dim), parameters, bins, event_ndims)
    priors = (zero if prior is None else precise(prior) for prior in (prior_mean, prior_logvar))
    of_example = (precise(mean), precise(logvar), *priors)
    q_mean, q_logvar, p_mean, p_logvar = (g.unsqueeze(dim).expand(z.shape) for g in of_example)
    kl = gaussian_kl_monte_carlo(
        z, q_mean, q_logvar, p_mean, p_logvar, None, z.dim() - rows, "logvar", *_NO_CLAMP, 1.0, "none"
    )
    log_w = of_x - kl
    grouped = log_w.unflatten(dim, (groups, log_w.size(dim) // groups))
    bound, _ = power_bound_loss(grouped, dim + 1, power, elbo_weight, 1.0, "none")
    bound = bound.mean(dim)
    ess = effective_sample_size(power_weights(grouped.detach(), dim + 1, power), dim + 1).mean(dim)
    rounded = log_w.to(dtype)
    lost = (log_w - rounded).detach()
    residual = torch.where(lost.isfinite(), lost, torch.zeros_like(lost))
    loss = reduce_rows(bound, reduction, scale)
    return loss.to(dtype), rounded, bound.detach().to(dtype), ess.to(dtype), residual.to(dtype)


def power_weights(log_w: Tensor, dim: int, power: float) -> Tensor:
    """Log-weights whose softmax the estimator weighs with; -inf where a row's bound has no gradient."""
    log_w = torch.where(log_w == math.inf, torch.full_like(log_w, math.nan), log_w)
    base = log_w.amin(dim, keepdim=True) if power < 0 else log_w.amax(dim, keepdim=True)
    if power == 0:
        exponents = torch.zeros_like(log_w)
    elif math.isinf(power):
        exponents = torch.where(log_w == base, torch.zeros_like(log_w), torch.full_like(log_w, -math.inf)) + (
            base - base
        )
    else:
        exponents = power * (log_w - base)
    return torch.where(base == -math.inf, torch.full_like(log_w, -math.inf), exponents)
