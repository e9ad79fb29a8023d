"""Cases of whole bounds."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Laplace, Normal, kl_divergence

import unigen_fast as uf
from cases.base import Case, Spec, bce, reduced
from cases.likelihood import logistic_mass, summed, zero_inflated


def unit(x: Tensor, m: Tensor) -> Tensor:
    return summed(Normal(m, 1.0), x)


def gaussian(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
    return summed(Normal(m, (v / 2).exp()), x)


def laplace(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    return summed(Laplace(m, s.exp()), x)


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return bce(logits, x)


def bins(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    return logistic_mass(x, m, s, 0.1, 0.0, 1.0)


def log_weights(
    density: Callable[..., Tensor],
    decoder: Sequence[Tensor],
    x: Tensor,
    z: Tensor,
    q: Sequence[Tensor],
    p: Sequence[Tensor] = (),
    *,
    dim: int = 1,
) -> Tensor:
    """log p(x | z) + log p(z) - log q(z | x) of torch.distributions; of q and p mean and log-variance."""
    own = Normal(q[0].unsqueeze(dim), (q[1] / 2).exp().unsqueeze(dim))
    prior = Normal(p[0].unsqueeze(dim), (p[1] / 2).exp().unsqueeze(dim)) if p else Normal(0.0, 1.0)
    latent = (prior.log_prob(z) - own.log_prob(z)).sum(-1)
    return density(x.unsqueeze(dim), *decoder) + latent


def bound(log_w: Tensor, dim: int, power: float = 1.0, elbo: float = 0.0) -> Tensor:
    count = log_w.size(dim)
    if power == 0:
        found = log_w.mean(dim)
    else:
        found = (torch.logsumexp(power * log_w, dim) - math.log(count)) / power
    return (1 - elbo) * found + elbo * log_w.mean(dim)


def effective(log_w: Tensor, dim: int, power: float = 1.0) -> Tensor:
    return 1 / torch.softmax(power * log_w.detach(), dim).square().sum(dim)


def samples(kind: str = "logits", x: str = "binary", *others: str, count: int = 3, priors: int = 0) -> Any:
    """decoder [rows, count, n] and its further outputs, x [rows, n], z [rows, count, 2], mean and logvar [rows, 2]."""
    return lambda rows, n: [
        Spec((rows, count, n), kind),
        *(Spec((rows, count, n), other) for other in others),
        Spec((rows, n), x, differentiable=False),
        Spec((rows, count, 2)),
        *[Spec((rows, 2)), Spec((rows, 2), "unit")] * (1 + priors),
    ]


def _case(
    name: str,
    density: Callable[..., Tensor],
    specs: Any,
    call: dict[str, Any],
    estimate: Callable[[Tensor], Tensor],
    *,
    outputs: int = 1,
    reduction: str = "mean",
    **options: Any,
) -> Case:
    """`outputs`: the first of a decoder's tensors. The loss of a few samples, by the kernel and by definition."""

    def fused(*tensors: Tensor) -> Tensor:
        decoder, (x, z, m, v, *p) = tensors[:outputs], tensors[outputs:]
        priors = dict(zip(("prior_mean", "prior_logvar"), p, strict=False))
        given = decoder if outputs > 1 else decoder[0]
        return uf.iwae_objective(given, x, z, m, v, dim=1, reduction=reduction, **priors, **call).loss

    def oracle(*tensors: Tensor) -> Tensor:
        decoder, (x, z, m, v, *p) = tensors[:outputs], tensors[outputs:]
        return reduced(estimate(log_weights(density, decoder, x, z, (m, v), p)), reduction)

    return Case(
        f"iwae_objective[{name}]" if name else "iwae_objective",
        fused,
        specs,
        oracle,
        **{"every_size": False, "made": reduction != "none", **options},
    )


def divergence(q: Sequence[Tensor], p: Sequence[Tensor] = ()) -> Tensor:
    """KL(q || p) of torch.distributions; of each mean and log-variance."""
    own = Normal(q[0], (q[1] / 2).exp())
    prior = Normal(p[0], (p[1] / 2).exp()) if p else Normal(torch.zeros_like(q[0]), torch.ones_like(q[0]))
    return kl_divergence(own, prior).sum(-1)


def _elbo_case(
    name: str,
    density: Callable[..., Tensor],
    kinds: Sequence[str],
    x_kind: str,
    *,
    shared: int | None = None,
    priors: int = 0,
    rows: bool = False,
    every_size: bool = False,
    **call: Any,
) -> Case:
    """`kinds`: of what the decoder gives, of which one may be `shared`; `rows`: those of both terms beside the loss."""
    outputs = len(kinds)

    def fused(*tensors: Tensor) -> Any:
        decoder, (x, m, v, *p) = tensors[:outputs], tensors[outputs:]
        found = uf.elbo_loss(decoder, x, m, v, **dict(zip(("prior_mean", "prior_logvar"), p, strict=False)), **call)
        return found if rows else found.loss

    def oracle(*tensors: Tensor) -> Any:
        decoder, (x, m, v, *p) = tensors[:outputs], tensors[outputs:]
        of_x, kl = density(x, *(d.expand(x.shape) for d in decoder)), divergence((m, v), p)
        each = call.get("scale", 1.0) * (call.get("kl_weight", 1.0) * kl - of_x)
        loss = reduced(each, call.get("reduction", "mean"))
        return (loss, of_x, kl) if rows else loss

    def specs(rows: int, n: int) -> list[Spec]:
        return [
            *(Spec((n,) if i == shared else (rows, n), kind) for i, kind in enumerate(kinds)),
            Spec((rows, n), x_kind, differentiable=False),
            *[Spec((rows, 2)), Spec((rows, 2), "unit")] * (1 + priors),
        ]

    made = call.get("reduction") != "none"
    title = f"elbo_loss[{name}]" if name else "elbo_loss"
    return Case(title, fused, specs, oracle, every_size=every_size, made=made)


def _all_of(decoder: Tensor, x: Tensor, z: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    found = uf.iwae_objective(decoder, x, z, m, v, dim=1, reduction="sum", scale=0.3)
    return found.loss, found.log_w, found.bound, found.ess


def _all_of_oracle(decoder: Tensor, x: Tensor, z: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    log_w = log_weights(bernoulli, (decoder,), x, z, (m, v))
    rows = bound(log_w, 1)
    return -0.3 * rows.sum(), log_w, rows.detach(), effective(log_w, 1)


def _shared(rows: int, n: int) -> list[Spec]:
    """Samples first, and a spread that is the event's alone."""
    return [
        Spec((3, rows, n)),
        Spec((n,)),
        Spec((rows, n), differentiable=False),
        Spec((3, rows, 2)),
        Spec((rows, 2)),
        Spec((rows, 2), "unit"),
    ]


CASES = [
    _case("", bernoulli, samples(), {}, lambda w: -bound(w, 1), every_size=True),
    Case("iwae_objective[all results]", _all_of, samples(), _all_of_oracle, every_size=False, made=True),
    _case("none", bernoulli, samples(), {"scale": 2.0}, lambda w: -2 * bound(w, 1), reduction="none"),
    _case(
        "gaussian,unit variance,elbo,prior",
        unit,
        samples("normal", "normal", priors=1),
        {"likelihood": "gaussian", "estimator": "elbo"},
        lambda w: -bound(w, 1, 0.0),
    ),
    _case(
        "gaussian,ciwae",
        gaussian,
        samples("normal", "normal", "normal"),
        {"likelihood": "gaussian", "estimator": "ciwae", "beta": 0.3},
        lambda w: -bound(w, 1, 1.0, 0.3),
        outputs=2,
    ),
    Case(
        "iwae_objective[samples first,shared log-variance]",
        lambda d, s, x, z, m, v: uf.iwae_objective((d, s), x, z, m, v, dim=0, likelihood="gaussian").loss,
        _shared,
        lambda d, s, x, z, m, v: -bound(log_weights(gaussian, (d, s), x, z, (m, v), dim=0), 0).mean(),
        every_size=False,
        made=True,
    ),
    _case(
        "tvo",
        bernoulli,
        samples(),
        {"estimator": "tvo", "partition": [0.0, 1.0]},
        lambda w: -w.mean(1),
        composed=True,
    ),
    Case(
        "iwae_objective[categorical]",
        lambda d, x, z, m, v: uf.iwae_objective(d, x, z, m, v, dim=1, likelihood="categorical", event_ndims=1).loss,
        lambda rows, n: [
            # few sites: the composition has its log-weights in fp32, and a weight, their exponential, fewer digits
            Spec((rows, 3, -(-n // 16), 3), "logits"),
            Spec((rows, -(-n // 16)), "labels"),
            Spec((rows, 3, 2)),
            Spec((rows, 2)),
            Spec((rows, 2), "unit"),
        ],
        lambda d, x, z, m, v: (
            -bound(log_weights(lambda x, d: summed(Categorical(logits=d), x), (d,), x, z, (m, v)), 1).mean()
        ),
        every_size=False,
        composed=True,
    ),
    _elbo_case("", bernoulli, ["logits"], "binary", every_size=True),
    _elbo_case("all results", bernoulli, ["logits"], "binary", rows=True, kl_weight=0.7, scale=2.0, reduction="sum"),
    _elbo_case("none", bernoulli, ["logits"], "binary", kl_weight=0.7, scale=2.0, reduction="none"),
    _elbo_case("gaussian,unit variance,prior", unit, ["normal"], "normal", priors=1, likelihood="gaussian"),
    _elbo_case("gaussian,shared log-variance", gaussian, ["normal"] * 2, "normal", shared=1, likelihood="gaussian"),
    _elbo_case(
        "zero_inflated_negative_binomial,shared theta",
        zero_inflated,
        ["std", "std", "logits"],
        "counts",
        shared=1,
        likelihood="zero_inflated_negative_binomial",
    ),
    Case(
        "elbo_loss[categorical]",
        lambda d, x, m, v: uf.elbo_loss(d, x, m, v, likelihood="categorical").loss,
        lambda rows, n: [
            Spec((rows, n, 3), "logits"),
            Spec((rows, n), "labels"),
            Spec((rows, 2)),
            Spec((rows, 2), "unit"),
        ],
        lambda d, x, m, v: (divergence((m, v)) - summed(Categorical(logits=d), x)).mean(),
        every_size=False,
        composed=True,
    ),
    Case(
        "adversary_activated_loss",
        lambda a, b, c, d: uf.adversary_activated_loss(a, b, real_logits=c, fake_logits=d),
        lambda rows, n: [
            Spec((rows,), "weights"),
            Spec((rows,), "weights"),
            Spec((rows,), "logits", differentiable=False),
            Spec((rows,), "logits", differentiable=False),
        ],
        lambda a, b, c, d: 0.5 * ((c.sigmoid() * a).mean() + (d.sigmoid() * b).mean()),
        every_size=False,
        composed=True,
    ),
]
