"""Cases of log-likelihoods."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Laplace, Normal

import unigen_fast as uf
from cases.base import Case, Spec, bce, block


def summed(distribution: Distribution, x: Tensor, event_ndims: int = 1) -> Tensor:
    """Rows of log-densities, by torch.distributions."""
    terms = distribution.log_prob(x)
    return terms.sum(dim=tuple(range(-event_ndims, 0))) if event_ndims else terms


def data(kind: str = "normal", *parameters: str, real: bool = False) -> Callable[[int, int], list[Spec]]:
    """x, a constant unless `real`, and its parameters."""
    return lambda rows, n: [
        Spec((rows, n), kind, differentiable=real),
        *(Spec((rows, n), parameter) for parameter in parameters),
    ]


def logistic_mass(x: Tensor, m: Tensor, s: Tensor, half: float, low: float, high: float) -> Tensor:
    """Differences of the distribution function: tanh(a/2) - tanh(b/2) by hyperbolic sines and cosines."""
    c, w = (x - m) / s.exp(), half / s.exp()
    inner = w.sinh().log() - (c.cosh() + w.cosh()).log()
    upper, lower = torch.sigmoid(w - c).log(), torch.sigmoid(c + w).log()
    return torch.where(x > high - half, upper, torch.where(x < low + half, lower, inner)).sum(-1)


def log_gamma(n: Tensor) -> Tensor:
    """Where PyTorch's own has accurate derivatives."""
    return torch.lgamma(n + 20) - sum((n + i).log() for i in range(20))


def negative_binomial(x: Tensor, mu: Tensor, theta: Tensor, event_ndims: int = 1, eps: float = 0.0) -> Tensor:
    choose = log_gamma(x + theta) - log_gamma(theta) - log_gamma(x + 1)
    sum_ = theta + mu + eps
    terms = choose + theta * ((theta + eps) / sum_).log() + x * ((mu + eps) / sum_).log()
    return terms.sum(-1) if event_ndims else terms


def zero_inflated(x: Tensor, mu: Tensor, theta: Tensor, gate: Tensor, eps: float = 0.0) -> Tensor:
    """As a mixture of a point mass and the counts."""
    counts = negative_binomial(x, mu, theta, 0, eps).exp()
    return (gate.sigmoid() * (x == 0) + (1 - gate.sigmoid()) * counts).log().sum(-1)


def clamped(logvar: Tensor, low: float, high: float) -> Tensor:
    return (0.5 * logvar.clamp(low, high)).exp()


def logistic_call(**options: Any) -> Callable[..., Tensor]:
    return lambda x, m, s: uf.discretized_logistic_log_prob(x, m, s, **options)


CASES = [
    Case(
        "bernoulli_log_prob",
        lambda x, y: uf.bernoulli_log_prob(x, y),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, n), "binary", differentiable=False)],
        bce,
    ),
    Case(
        "bernoulli_log_prob[soft]",
        lambda x, y: uf.bernoulli_log_prob(x, y),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, n), "unit")],
        bce,
        every_size=False,
    ),
    Case(
        "bernoulli_log_prob[x.unsqueeze(1)]",
        lambda x, y: uf.bernoulli_log_prob(x, y.unsqueeze(1)),
        lambda rows, n: [Spec((rows, 3, n), "logits"), Spec((rows, n), "unit", differentiable=False)],
        lambda x, y: bce(x, y.unsqueeze(1)),
    ),
    Case(
        "bernoulli_log_prob[broadcast x with gradient]",
        lambda x, y: uf.bernoulli_log_prob(x, y, event_ndims=1),
        lambda rows, n: [Spec((2, rows, n), "logits"), Spec((2, 1, n), "unit")],
        bce,
        every_size=False,
        broadcast=True,
    ),
    Case(
        "bernoulli_log_prob[4-D]",
        lambda x, y: uf.bernoulli_log_prob(x, y, event_ndims=3),
        lambda rows, n: [Spec(block(rows, n), "logits"), Spec(block(rows, n), "binary", differentiable=False)],
        lambda x, y: bce(x, y, 3),
        every_size=False,
    ),
    Case(
        "bernoulli_log_prob[elementwise]",
        lambda x, y: uf.bernoulli_log_prob(x, y, event_ndims=0),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, n), "unit")],
        lambda x, y: bce(x, y, 0),
        every_size=False,
    ),
    Case(
        "gaussian_log_prob",
        lambda x, m, v: uf.gaussian_log_prob(x, m, v),
        data("normal", "normal", "normal"),
        lambda x, m, v: summed(Normal(m, (v / 2).exp()), x),
    ),
    Case(
        "gaussian_log_prob[std,x.unsqueeze(1)]",
        lambda x, m, s: uf.gaussian_log_prob(x.unsqueeze(1), m, s, spread="std"),
        lambda rows, n: [Spec((rows, n), differentiable=False), Spec((rows, 3, n)), Spec((rows, 3, n), "std")],
        lambda x, m, s: summed(Normal(m, s), x.unsqueeze(1)),
        every_size=False,
    ),
    Case(
        "gaussian_log_prob[logstd,clamp,4-D,x with gradient]",
        lambda x, m, s: uf.gaussian_log_prob(x, m, s, spread="logstd", clamp_logvar=(-1.03, 1.57), event_ndims=3),
        lambda rows, n: [Spec(block(rows, n))] * 3,
        lambda x, m, s: summed(Normal(m, clamped(2 * s, -1.03, 1.57)), x, 3),
        every_size=False,
    ),
    Case(
        "gaussian_log_prob[one log-variance for all]",
        lambda x, m, v: uf.gaussian_log_prob(x, m, v),
        lambda rows, n: [Spec((rows, n), differentiable=False), Spec((rows, n)), Spec((1,))],
        lambda x, m, v: summed(Normal(m, (v / 2).exp()), x),
        every_size=False,
        broadcast=True,
    ),
    Case(
        "laplace_log_prob",
        lambda x, m, s: uf.laplace_log_prob(x, m, s),
        data("normal", "normal", "normal"),
        lambda x, m, s: summed(Laplace(m, s.exp()), x),
    ),
    Case(
        "laplace_log_prob[elementwise,x with gradient]",
        lambda x, m, s: uf.laplace_log_prob(x, m, s, event_ndims=0),
        data("normal", "normal", "normal", real=True),
        lambda x, m, s: summed(Laplace(m, s.exp()), x, 0),
        every_size=False,
    ),
    Case(
        "discretized_logistic_log_prob",
        logistic_call(),
        data("unit", "normal", "normal"),
        lambda x, m, s: logistic_mass(x, m, s, 1 / 255, -1.0, 1.0),
    ),
    Case(
        "discretized_logistic_log_prob[extreme bins,x with gradient]",
        logistic_call(bin_width=0.43, low=0.0, high=1.0),
        data("unit", "normal", "normal", real=True),
        lambda x, m, s: logistic_mass(x, m, s, 0.215, 0.0, 1.0),
        every_size=False,
    ),
    Case(
        "negative_binomial_log_prob",
        lambda x, mu, theta: uf.negative_binomial_log_prob(x, mu, theta),
        data("counts", "std", "std"),
        negative_binomial,
    ),
    Case(
        "negative_binomial_log_prob[theta of each gene]",
        lambda x, mu, theta: uf.negative_binomial_log_prob(x, mu, theta),
        lambda rows, n: [Spec((rows, n), "counts", differentiable=False), Spec((rows, n), "std"), Spec((n,), "std")],
        negative_binomial,
        every_size=False,
        broadcast=True,
    ),
    Case(
        "negative_binomial_log_prob[x with gradient]",
        lambda x, mu, theta: uf.negative_binomial_log_prob(x, mu, theta),
        data("weights", "std", "std", real=True),
        negative_binomial,
        every_size=False,
    ),
    Case(
        "negative_binomial_log_prob[eps,x with gradient]",
        lambda x, mu, theta: uf.negative_binomial_log_prob(x, mu, theta, eps=0.7),
        data("weights", "std", "std", real=True),
        lambda x, mu, theta: negative_binomial(x, mu, theta, eps=0.7),
        every_size=False,
    ),
    Case(
        "zero_inflated_negative_binomial_log_prob",
        lambda x, mu, theta, gate: uf.zero_inflated_negative_binomial_log_prob(x, mu, theta, gate),
        data("counts", "std", "std", "logits"),
        zero_inflated,
    ),
    Case(
        "zero_inflated_negative_binomial_log_prob[x with gradient]",
        lambda x, mu, theta, gate: uf.zero_inflated_negative_binomial_log_prob(x, mu, theta, gate),
        data("weights", "std", "std", "logits", real=True),
        zero_inflated,
        every_size=False,
    ),
    Case(
        "zero_inflated_negative_binomial_log_prob[eps]",
        lambda x, mu, theta, gate: uf.zero_inflated_negative_binomial_log_prob(x, mu, theta, gate, eps=0.7),
        data("counts", "std", "std", "logits"),
        lambda x, mu, theta, gate: zero_inflated(x, mu, theta, gate, eps=0.7),
        every_size=False,
    ),
]
