"""Sixteen losses in fp32, value and gradients, against their formulas in float64: does an installation compute?

    python tests/numeric_checks.py

Needs torch and the package alone. Exits with 1 if a number is wrong, or if no kernels are loaded for the CPU and
`--reference` does not say that this is meant.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import softplus

import unigen_fast as uf

B, D, K = 37, 53, 11


def normal_kl(m: Tensor, v: Tensor) -> Tensor:
    return 0.5 * (m.square() + v.exp() - 1 - v).sum(-1)


def normal(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    return -0.5 * ((x - m).square() / v.exp() + v + math.log(2 * math.pi)).sum(-1)


def bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def counts(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    binomial = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return (binomial + theta * (theta / (theta + mu)).log() + x * (mu / (theta + mu)).log()).sum(-1)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)


def rbf_mmd(x: Tensor, y: Tensor) -> Tensor:
    def mean(a: Tensor, b: Tensor, pairs: float) -> Tensor:
        off_diagonal = 1 - torch.eye(len(a), dtype=a.dtype) if a is b else 1.0
        return ((-squared_distances(a, b) / (2 * x.size(1))).exp() * off_diagonal).sum() / pairs

    n, m = len(x), len(y)
    return mean(x, x, n * (n - 1)) + mean(y, y, m * (m - 1)) - 2 * mean(x, y, n * m)


def iwae(decoder: Tensor, x: Tensor, z: Tensor, m: Tensor, v: Tensor) -> Tensor:
    one = torch.zeros_like(m)
    log_w = bernoulli(decoder, x.unsqueeze(1)) + normal(z, one.unsqueeze(1), one.unsqueeze(1))
    return log_w - normal(z, m.unsqueeze(1), v.unsqueeze(1))


# name: (what the package computes, the same by hand, shapes of the tensors; those with * are data between 0 and 1)
CHECKS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], str]] = {
    "log_mean_exp": (
        lambda w: uf.log_mean_exp(w, dim=1),
        lambda w: w.logsumexp(1) - math.log(K),
        "BK",
    ),
    "importance_weights": (
        lambda w: uf.importance_weights(w, dim=0, detach=False),
        lambda w: w.softmax(0),
        "BK",
    ),
    "iwae_loss": (
        lambda w: uf.iwae_loss(w, dim=1),
        lambda w: (math.log(K) - w.logsumexp(1)).mean(),
        "BK",
    ),
    "discriminator_loss": (
        lambda r, f: uf.discriminator_loss(real=r, fake=f),
        lambda r, f: softplus(-r).mean() + softplus(f).mean(),
        "B B",
    ),
    "generator_loss": (
        lambda f: uf.generator_loss(fake=f, kind="hinge"),
        lambda f: -f.mean(),
        "B",
    ),
    "importance_weighted_generator_loss": (
        lambda f: uf.importance_weighted_generator_loss(fake=f),
        lambda f: (f.detach().softmax(0) * softplus(-f)).sum(),
        "B",
    ),
    "gaussian_kl": (
        lambda m, v: uf.gaussian_kl(m, v),
        lambda m, v: normal_kl(m, v).mean(),
        "BD BD",
    ),
    "gaussian_kl with a prior": (
        lambda m, v, p, u: uf.gaussian_kl(m, v, p, u, reduction="none"),
        lambda m, v, p, u: 0.5 * (u - v + ((m - p).square() + v.exp()) / u.exp() - 1).sum(-1),
        "BD BD BD BD",
    ),
    "bernoulli_kl": (
        lambda q: uf.bernoulli_kl(q, reduction="sum"),
        lambda q: (q * q.sigmoid() - softplus(q) + math.log(2)).sum(),
        "BD",
    ),
    "categorical_kl": (
        lambda q, p: uf.categorical_kl(q, p, reduction="none"),
        lambda q, p: (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1),
        "BD BD",
    ),
    "mmd": (
        lambda x, y: uf.mmd(x, y + 1, kernel="rbf", scales=(1.0,)),
        lambda x, y: rbf_mmd(x, y + 1),
        "BD BD",
    ),
    "bernoulli_log_prob": (
        lambda d, x: uf.bernoulli_log_prob(d, x.unsqueeze(1)),
        lambda d, x: bernoulli(d, x.unsqueeze(1)),
        "BKD *BD",
    ),
    "gaussian_log_prob": (uf.gaussian_log_prob, normal, "BD BD BD"),
    "negative_binomial_log_prob": (
        lambda m, t, x: uf.negative_binomial_log_prob((9 * x).round(), m.exp(), t.exp()),
        lambda m, t, x: counts((9 * x).round(), m.exp(), t.exp()),
        "BD BD *BD",
    ),
    "elbo_loss": (
        lambda d, m, v, x: uf.elbo_loss(d, x, m, v, kl_weight=0.5).loss,
        lambda d, m, v, x: (0.5 * normal_kl(m, v) - bernoulli(d, x)).mean(),
        "BD BK BK *BD",
    ),
    "iwae_objective": (
        lambda d, z, m, v, x: uf.iwae_objective(d, x, z, m, v, dim=1).loss,
        lambda d, z, m, v, x: (math.log(K) - iwae(d, x, z, m, v).logsumexp(1)).mean(),
        "BKD BKK BK BK *BD",
    ),
}


def draw(shapes: str) -> list[Tensor]:
    sizes = {"B": B, "D": D, "K": K}
    torch.manual_seed(0)
    tensors = []
    for word in shapes.split():
        shape = [sizes[letter] for letter in word.lstrip("*")]
        tensors.append(torch.rand(shape) if "*" in word else (0.5 * torch.randn(shape)).requires_grad_())
    return tensors


def error(name: str) -> float:
    """The largest, relative to the root mean square of what it is to be."""
    fused, formula, shapes = CHECKS[name]
    tensors = draw(shapes)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    worst = 0.0
    outputs = fused(*tensors), formula(*wide)
    leaves = [[t for t in inputs if t.requires_grad] for inputs in (tensors, wide)]
    weights = torch.rand_like(outputs[1])
    gradients = [torch.autograd.grad(o, inputs, weights.to(o.dtype)) for o, inputs in zip(outputs, leaves, strict=True)]
    for got, expected in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        scale = expected.detach().square().mean().sqrt()
        worst = max(worst, float((got.detach().double() - expected.detach()).abs().max() / scale))
    return worst


def main() -> int:
    print(uf.info())
    wrong = 0
    for name in CHECKS:
        found = error(name)
        wrong += not found < 2e-5
        print(f"{name:<36} {found:.1e}{'' if found < 2e-5 else '   WRONG'}")
    print(f"{len(CHECKS) - wrong} of {len(CHECKS)} right")
    cpu = uf.info().backends[0].loaded or "--reference" in sys.argv
    return 0 if cpu and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
