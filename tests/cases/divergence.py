"""Cases of Gaussian divergences and of the sample drawn with them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

import unigen_fast as uf
from cases.base import Case, Spec, block, draw_rng_state, gaussian, last, noise, video
from unigen_fast._fused import FusedOp


def kl(
    mean: Tensor,
    std: Tensor,
    prior_mean: Tensor | float = 0.0,
    prior_std: Tensor | float = 1.0,
    *,
    event_ndims: int = 1,
    free_bits: float = 0.0,
    per_dim: bool = False,
) -> Tensor:
    """Rows, by torch.distributions."""
    prior = Normal(torch.as_tensor(prior_mean, dtype=mean.dtype), torch.as_tensor(prior_std, dtype=mean.dtype))
    terms = kl_divergence(Normal(mean, std), prior)
    if per_dim:
        terms = terms.clamp(min=free_bits)
    rows = terms.sum(dim=tuple(range(-event_ndims, 0))) if event_ndims else terms
    return rows if per_dim else rows.clamp(min=free_bits)


def monte_carlo(
    z: Tensor, mean: Tensor | None, std: Tensor, prior_mean: Tensor, prior_std: Tensor, event_ndims: int = 1
) -> Tensor:
    """Rows of log q(z) - log p(z), by torch.distributions; without a mean, minus q's entropy in place of log q(z)."""
    q = Normal(z, std) if mean is None else Normal(mean, std)
    terms = (-q.entropy() if mean is None else q.log_prob(z)) - Normal(prior_mean, prior_std).log_prob(z)
    return terms.sum(dim=tuple(range(-event_ndims, 0)))


def bernoulli(q: Tensor, p: Tensor, event_ndims: int = 1) -> Tensor:
    """Rows, by torch.distributions."""
    q, p = torch.broadcast_tensors(q, p)
    terms = kl_divergence(Bernoulli(logits=q), Bernoulli(logits=p))
    return terms.sum(dim=tuple(range(-event_ndims, 0))) if event_ndims else terms


def reparameterised(
    mean: Tensor, std: Tensor, shape: Sequence[int] | None = None, sample_dim: int | None = None
) -> Tensor:
    if sample_dim is not None:
        mean, std = mean.unsqueeze(sample_dim), std.unsqueeze(sample_dim)
    shape = mean.shape if shape is None else shape
    if mean.device.type in FusedOp.devices:
        eps = noise(draw_rng_state(mean.device), shape)
    else:
        eps = torch.randn(list(shape)).double()
    return mean + std * eps.to(mean.device)


def clamped_std(logvar: Tensor, low: float, high: float) -> Tensor:
    """With bounds that no 16-bit number equals: there versions of PyTorch differ in the gradient."""
    return (0.5 * logvar.clamp(low, high)).exp()


CASES = [
    Case(
        "gaussian_kl",
        lambda m, v: uf.gaussian_kl(m, v),
        gaussian(),
        lambda m, v: kl(m, (v / 2).exp()).mean(),
    ),
    Case(
        "gaussian_kl[prior,none,scale]",
        lambda m, v, pm, pv: uf.gaussian_kl(m, v, pm, pv, reduction="none", scale=0.25),
        gaussian(prior=True),
        lambda m, v, pm, pv: 0.25 * kl(m, (v / 2).exp(), pm, (pv / 2).exp()),
    ),
    Case(
        "gaussian_kl[prior mean alone]",
        lambda m, v, pm: uf.gaussian_kl(m, v, pm, reduction="sum"),
        last(count=3),
        lambda m, v, pm: kl(m, (v / 2).exp(), pm).sum(),
        every_size=False,
    ),
    Case(
        "gaussian_kl[prior logvar alone]",
        lambda m, v, pv: uf.gaussian_kl(m, v, None, pv),
        last(count=3),
        lambda m, v, pv: kl(m, (v / 2).exp(), 0.0, (pv / 2).exp()).mean(),
        every_size=False,
    ),
    Case(
        "gaussian_kl[broadcast prior]",
        lambda m, v, pm, pv: uf.gaussian_kl(m, v, pm, pv),
        lambda rows, n: [Spec((2, rows, n)), Spec((1, rows, n)), Spec((2, 1, n)), Spec((n,))],
        lambda m, v, pm, pv: kl(m, (v / 2).exp(), pm, (pv / 2).exp()).mean(),
        every_size=False,
        broadcast=True,
    ),
    Case(
        "gaussian_kl[std,prior]",
        lambda m, s, pm, ps: uf.gaussian_kl(m, s, pm, ps, spread="std", reduction="sum"),
        gaussian("std", prior=True),
        lambda m, s, pm, ps: kl(m, s, pm, ps).sum(),
    ),
    Case(
        "gaussian_kl[logstd,clamp]",
        lambda m, s: uf.gaussian_kl(m, s, spread="logstd", clamp_logvar=(-1.03, 1.57)),
        gaussian(),
        lambda m, s: kl(m, clamped_std(2 * s, -1.03, 1.57)).mean(),
    ),
    Case(
        "gaussian_kl[clamp,prior]",
        lambda m, v, pm, pv: uf.gaussian_kl(m, v, pm, pv, clamp_logvar=(-0.53, 0.7)),
        gaussian(prior=True),
        lambda m, v, pm, pv: kl(m, clamped_std(v, -0.53, 0.7), pm, clamped_std(pv, -0.53, 0.7)).mean(),
        every_size=False,
    ),
    Case(
        "gaussian_kl[free bits of the row]",
        lambda m, v, f: uf.gaussian_kl(m * f, v * f, free_bits=1.0, reduction="none"),
        # rows scaled down by f lie on both sides of the bound, whatever the size of the event
        lambda rows, n: [Spec((rows, n)), Spec((rows, n)), Spec((rows, 1), "mask", differentiable=False)],
        lambda m, v, f: kl(m * f, (v * f / 2).exp(), free_bits=1.0),
        every_size=False,
        composed=True,
    ),
    Case(
        "gaussian_kl[free bits of each dimension]",
        lambda m, v, pm, pv: uf.gaussian_kl(m, v, pm, pv, free_bits=0.4, free_bits_mode="per_dim"),
        gaussian(prior=True),
        lambda m, v, pm, pv: kl(m, (v / 2).exp(), pm, (pv / 2).exp(), free_bits=0.4, per_dim=True).mean(),
    ),
    Case(
        "gaussian_kl[weights]",
        lambda m, v, w: uf.gaussian_kl(m, v, weights=w, scale=2.0),
        lambda rows, n: [Spec((rows, n)), Spec((rows, n)), Spec((rows,), "weights", differentiable=False)],
        lambda m, v, w: 2 * (kl(m, (v / 2).exp()) * w).mean(),
    ),
    Case(
        "gaussian_kl[weights,free bits,sum]",
        lambda m, v, w: uf.gaussian_kl(m, v, weights=w, event_ndims=1, free_bits=1.5, reduction="sum"),
        lambda rows, n: [Spec((2, rows, n)), Spec((2, rows, n)), Spec((1, rows), "weights", differentiable=False)],
        lambda m, v, w: (kl(m, (v / 2).exp(), free_bits=1.5) * w).sum(),
        every_size=False,
    ),
    Case(
        "gaussian_kl[weights with gradient]",
        lambda m, v, w: uf.gaussian_kl(m, v, weights=w),
        lambda rows, n: [Spec((rows, n)), Spec((rows, n)), Spec((rows,), "weights")],
        lambda m, v, w: (kl(m, (v / 2).exp()) * w).mean(),
        every_size=False,
        composed=True,
    ),
    Case(
        "gaussian_kl[normalised weights]",
        lambda m, v, w: uf.gaussian_kl(m, v, weights=w, event_ndims=1, normalize_weights=True, scale=0.5),
        lambda rows, n: [Spec((2, rows, n)), Spec((2, rows, n)), Spec((2, 1), "weights", differentiable=False)],
        lambda m, v, w: 0.5 * (kl(m, (v / 2).exp()) * w).sum() / w.expand(m.shape[:2]).sum(),
        every_size=False,
        composed=True,
    ),
    Case(
        "gaussian_kl[elementwise]",
        lambda m, v: uf.gaussian_kl(m, v, event_ndims=0, reduction="none"),
        gaussian(),
        lambda m, v: kl(m, (v / 2).exp(), event_ndims=0),
        every_size=False,
    ),
    Case(
        "gaussian_kl[4-D]",
        lambda m, v: uf.gaussian_kl(m, v, event_ndims=3),
        gaussian(shape=block),
        lambda m, v: kl(m, (v / 2).exp(), event_ndims=3).mean(),
        every_size=False,
    ),
    Case(
        "gaussian_kl[5-D,none]",
        lambda m, v: uf.gaussian_kl(m, v, event_ndims=4, reduction="none"),
        gaussian(shape=video),
        lambda m, v: kl(m, (v / 2).exp(), event_ndims=4),
        every_size=False,
    ),
    Case(
        "gaussian_kl_monte_carlo",
        lambda z, m, v, pm, pv: uf.gaussian_kl_monte_carlo(z, m, v, pm, pv, reduction="none", scale=0.5),
        last(count=5),
        lambda z, m, v, pm, pv: 0.5 * monte_carlo(z, m, (v / 2).exp(), pm, (pv / 2).exp()),
    ),
    Case(
        "gaussian_kl_monte_carlo[entropy,logstd,weights]",
        lambda z, s, pm, ps, w: uf.gaussian_kl_monte_carlo(z, None, s, pm, ps, spread="logstd", weights=w, scale=2.0),
        lambda rows, n: [Spec((rows, n))] * 4 + [Spec((rows,), "weights", differentiable=False)],
        lambda z, s, pm, ps, w: 2 * (monte_carlo(z, None, s.exp(), pm, ps.exp()) * w).mean(),
    ),
    Case(
        "gaussian_kl_monte_carlo[std,clamp,none,4-D]",
        lambda z, m, s, pm, ps: uf.gaussian_kl_monte_carlo(
            z, m, s, pm, ps, spread="std", clamp_logvar=(-1.31, 0.21), reduction="none", event_ndims=3
        ),
        lambda rows, n: [Spec(block(rows, n), kind) for kind in ("normal", "normal", "std", "normal", "std")],
        lambda z, m, s, pm, ps: monte_carlo(
            z, m, clamped_std(2 * s.log(), -1.31, 0.21), pm, clamped_std(2 * ps.log(), -1.31, 0.21), 3
        ),
        every_size=False,
    ),
    Case(
        "gaussian_kl_monte_carlo[weights in the middle,normalised]",
        lambda z, s, pm, ps, w: uf.gaussian_kl_monte_carlo(
            *(t.transpose(1, 2) if t is not None else None for t in (z, None, s, pm, ps)),
            event_ndims=1,
            spread="logstd",
            weights=w.squeeze(1),
            normalize_weights=True,
        ),
        lambda rows, n: [Spec((rows, n, 3))] * 4 + [Spec((rows, 1, 3), "weights", differentiable=False)],
        lambda z, s, pm, ps, w: (
            (ps - s - 0.5 + 0.5 * (z - pm) ** 2 * (-2 * ps).exp()).sum(1, keepdim=True).mul(w).sum() / w.sum()
        ),
        every_size=False,
        composed=True,
    ),
    Case(
        "gaussian_kl_monte_carlo[weights,none]",
        lambda z, m, v, pm, pv, w: uf.gaussian_kl_monte_carlo(
            z, m, v, pm, pv, event_ndims=1, weights=w, reduction="none"
        ),
        lambda rows, n: [Spec((2, rows, n))] * 5 + [Spec((1, rows), "weights", differentiable=False)],
        lambda z, m, v, pm, pv, w: monte_carlo(z, m, (v / 2).exp(), pm, (pv / 2).exp()) * w,
        every_size=False,
    ),
    Case(
        "bernoulli_kl",
        lambda q, p: uf.bernoulli_kl(q, p, scale=0.5),
        last("logits", count=2),
        lambda q, p: 0.5 * bernoulli(q, p).mean(),
    ),
    Case(
        "bernoulli_kl[one half,none]",
        lambda q: uf.bernoulli_kl(q, reduction="none"),
        last("logits"),
        lambda q: bernoulli(q, torch.zeros_like(q)),
    ),
    Case(
        "bernoulli_kl[weights,sum,broadcast]",
        lambda q, p, w: uf.bernoulli_kl(q, p, weights=w, reduction="sum"),
        lambda rows, n: [
            Spec((2, rows, n), "logits"),
            Spec((n,), "logits"),
            Spec((1, rows), "weights", differentiable=False),
        ],
        lambda q, p, w: (bernoulli(q, p) * w).sum(),
        every_size=False,
        broadcast=True,
    ),
    Case(
        "bernoulli_kl[elementwise]",
        lambda q, p: uf.bernoulli_kl(q, p, event_ndims=0, reduction="none"),
        last("logits", count=2),
        lambda q, p: bernoulli(q, p, 0),
        every_size=False,
    ),
    Case(
        "sample_gaussian",
        lambda m, v: uf.sample_gaussian(m, v),
        gaussian(),
        lambda m, v: reparameterised(m, (v / 2).exp()),
        random=True,
    ),
    Case(
        "sample_gaussian[std,K first]",
        lambda m, s: uf.sample_gaussian(m, s, spread="std", num_samples=3),
        gaussian("std"),
        lambda m, s: reparameterised(m, s, (3, *m.shape), 0),
        random=True,
        every_size=False,
    ),
    Case(
        "sample_gaussian[logstd,clamp,K last]",
        lambda m, s: uf.sample_gaussian(
            m, s, spread="logstd", num_samples=2, sample_dim=-1, clamp_logvar=(-1.03, 1.07)
        ),
        gaussian(),
        lambda m, s: reparameterised(m, clamped_std(2 * s, -1.03, 1.07), (*m.shape, 2), -1),
        random=True,
        every_size=False,
    ),
    Case(
        "sample_gaussian_with_kl",
        lambda m, v: uf.sample_gaussian_with_kl(m, v),
        gaussian(),
        lambda m, v: (reparameterised(m, (v / 2).exp()), kl(m, (v / 2).exp())),
        random=True,
    ),
    Case(
        "sample_gaussian_with_kl[std,K in the middle]",
        lambda m, s: uf.sample_gaussian_with_kl(m, s, spread="std", num_samples=4, sample_dim=1),
        gaussian("std"),
        lambda m, s: (reparameterised(m, s, (m.size(0), 4, m.size(1)), 1), kl(m, s)),
        random=True,
        every_size=False,
    ),
    Case(
        "sample_gaussian_with_kl[4-D,clamp]",
        lambda m, v: uf.sample_gaussian_with_kl(m, v, event_ndims=3, clamp_logvar=(-0.8, 1.07)),
        gaussian(shape=block),
        lambda m, v: (reparameterised(m, clamped_std(v, -0.8, 1.07)), kl(m, clamped_std(v, -0.8, 1.07), event_ndims=3)),
        random=True,
        every_size=False,
    ),
]
