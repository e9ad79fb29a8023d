"""Cases of categorical divergences and likelihoods, and of the discretized logistic mixture."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import unigen_fast as uf
from cases.base import Case, Spec, last

# ---- oracles ---------------------------------------------------------------------------------------------------------


def mixed(logits: Tensor, unimix: float = 0.0) -> Categorical:
    """Over the last dimension."""
    if unimix == 0:
        return Categorical(logits=logits)
    return Categorical(probs=(1 - unimix) * logits.softmax(-1) + unimix / logits.size(-1))


def kl(
    logits_q: Tensor, logits_p: Tensor | None = None, *, class_dim: int = -1, event_ndims: int = 0, unimix: float = 0.0
) -> Tensor:
    """Rows, by torch.distributions."""
    q = logits_q.movedim(class_dim, -1)
    p = torch.zeros_like(q) if logits_p is None else logits_p.movedim(class_dim, -1)
    sites = kl_divergence(mixed(q, unimix), mixed(p, unimix))
    return sites.sum(dim=tuple(range(-event_ndims, 0))) if event_ndims else sites


def dreamer(
    posterior: Tensor,
    prior: Tensor,
    *,
    free_nats: float = 1.0,
    per_variable: bool = False,
    unimix: float = 0.0,
    scales: tuple[float, float] = (1.0, 0.1),
    event_ndims: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dynamics, representation) as DreamerV3's code has it."""
    terms = []
    for q, p in ((posterior.detach(), prior), (posterior, prior.detach())):
        if per_variable:
            sites = kl(q, p, unimix=unimix).clamp(min=free_nats)
            terms.append(sites.flatten(sites.dim() - event_ndims).sum(-1).mean())
        else:
            terms.append(kl(q, p, unimix=unimix, event_ndims=event_ndims).clamp(min=free_nats).mean())
    return scales[0] * terms[0] + scales[1] * terms[1], terms[0], terms[1]


def pixelcnn(params: Tensor, x: Tensor, event_ndims: int) -> Tensor:
    """PixelCNN++'s formula, a pixel's numbers taken one by one, and masses as differences of sigmoids (in float64)."""
    channels = x.size(-1)
    count = params.size(-1) // (10 if channels == 3 else 3)
    numbers = iter(params.unbind(-1))
    logits = torch.stack([next(numbers) for _ in range(count)], -1)
    means, log_scales, coefficients = [], [], []
    for _ in range(channels):
        means.append([next(numbers) for _ in range(count)])
        log_scales.append([next(numbers).clamp(min=-7.0) for _ in range(count)])
        if channels == 3:
            coefficients.append([next(numbers).tanh() for _ in range(count)])
    terms = []
    for m in range(count):
        total = torch.zeros_like(x[..., 0])
        for c in range(channels):
            mean = means[c][m]
            if c == 1:
                mean = mean + coefficients[0][m] * x[..., 0]
            if c == 2:
                mean = mean + coefficients[1][m] * x[..., 0] + coefficients[2][m] * x[..., 1]
            upper = (x[..., c] - mean + 1 / 255) / log_scales[c][m].exp()
            lower = (x[..., c] - mean - 1 / 255) / log_scales[c][m].exp()
            # the difference of the tails that are small
            inside = torch.where(lower > 0, (-lower).sigmoid() - (-upper).sigmoid(), upper.sigmoid() - lower.sigmoid())
            edge = torch.where(x[..., c] < 0, upper, -lower).sigmoid()
            mass = torch.where(x[..., c].abs() > 0.999, edge, inside)
            total = total + mass.log()
        terms.append(total)
    pixels = (logits.log_softmax(-1) + torch.stack(terms, -1)).logsumexp(-1)
    return pixels.sum(dim=tuple(range(-(event_ndims - 1), 0))) if event_ndims > 1 else pixels


def existing(x: Tensor, logits: Tensor, class_dim: int = -1) -> Tensor:
    return x.clamp(max=logits.size(class_dim) - 1)


def image(count: int, channels: int) -> Callable[[int, int], list[Spec]]:
    """params [rows, n, P], x [rows, n, C]."""
    each = 10 if channels == 3 else 3
    return lambda rows, n: [Spec((rows, n, count * each)), Spec((rows, n, channels), "pixels")]


# ---- the table -------------------------------------------------------------------------------------------------------

two = last("logits", count=2)


def sites(rows: int, n: int) -> list[Spec]:
    return [Spec((rows, n, 4), "logits")] * 2


CASES = [
    Case(
        "categorical_kl",
        lambda q, p: uf.categorical_kl(q, p),
        two,
        lambda q, p: kl(q, p).mean(),
        degenerate="expanded_last",
    ),
    Case(
        "categorical_kl[unimix]",
        lambda q, p: uf.categorical_kl(q, p, unimix=0.01, reduction="sum", scale=0.3),
        two,
        lambda q, p: 0.3 * kl(q, p, unimix=0.01).sum(),
        every_size=False,
        degenerate="expanded_last",
    ),
    Case(
        "categorical_kl[uniform]",
        lambda q: uf.categorical_kl(q, reduction="none"),
        lambda rows, n: [Spec((rows, n), "logits")],
        lambda q: kl(q),
        every_size=False,
        degenerate="expanded_last",
    ),
    Case(
        "categorical_kl[uniform,unimix]",
        lambda q: uf.categorical_kl(q, event_ndims=1, unimix=0.1),
        lambda rows, n: [Spec((rows, n, 5), "logits")],
        lambda q: kl(q, event_ndims=1, unimix=0.1).mean(),
        every_size=False,
        degenerate="expanded_last",
    ),
    Case(
        "categorical_kl[event]",
        lambda q, p: uf.categorical_kl(q, p, event_ndims=1),
        sites,
        lambda q, p: kl(q, p, event_ndims=1).mean(),
        degenerate="expanded_last",
    ),
    Case(
        "categorical_kl[classes first,none]",
        lambda q, p: uf.categorical_kl(q, p, class_dim=0, event_ndims=1, reduction="none"),
        lambda rows, n: [Spec((3, rows, n), "logits")] * 2,
        lambda q, p: kl(q, p, class_dim=0, event_ndims=1),
        every_size=False,
        degenerate="expanded_rows",
    ),
    Case(
        "categorical_kl[classes in the middle]",
        lambda q, p: uf.categorical_kl(q, p, class_dim=1, event_ndims=2),
        lambda rows, n: [Spec((rows, 3, 2, n), "logits")] * 2,
        lambda q, p: kl(q, p, class_dim=1, event_ndims=2).mean(),
        every_size=False,
    ),
    Case(
        "categorical_kl[broadcast prior]",
        lambda q, p: uf.categorical_kl(q, p, event_ndims=1),
        lambda rows, n: [Spec((rows, n, 4), "logits"), Spec((n, 4), "logits")],
        lambda q, p: kl(q, p.expand_as(q), event_ndims=1).mean(),
        every_size=False,
        broadcast=True,
        degenerate="expanded_last",
    ),
    Case(
        "categorical_kl[weights]",
        lambda q, p, w: uf.categorical_kl(q, p, weights=w, event_ndims=1, scale=2.0),
        lambda rows, n: [*sites(rows, n), Spec((rows,), "weights", differentiable=False)],
        lambda q, p, w: 2 * (kl(q, p, event_ndims=1) * w).mean(),
        every_size=False,
        degenerate="expanded_last",
    ),
    Case(
        "categorical_kl[weights with gradient]",
        lambda q, p, w: uf.categorical_kl(q, p, weights=w, event_ndims=1, reduction="sum"),
        lambda rows, n: [*sites(rows, n), Spec((rows,), "weights")],
        lambda q, p, w: (kl(q, p, event_ndims=1) * w).sum(),
        every_size=False,
        composed=True,
        degenerate="expanded_last",
    ),
    Case(
        "categorical_kl[normalised weights]",
        lambda q, p, w: uf.categorical_kl(q, p, weights=w, normalize_weights=True),
        lambda rows, n: [*sites(rows, n), Spec((rows, 1), "weights", differentiable=False)],
        lambda q, p, w: (kl(q, p) * w).sum() / w.expand(q.shape[:2]).sum(),
        every_size=False,
        composed=True,
        degenerate="expanded_last",
    ),
    Case(
        "balanced_categorical_kl",
        lambda q, p: uf.balanced_categorical_kl(q, p, unimix=0.01),
        sites,
        lambda q, p: dreamer(q, p, unimix=0.01),
        derivative=False,
        degenerate="expanded_last",
    ),
    Case(
        "balanced_categorical_kl[free nats of the row]",
        lambda q, p, f: uf.balanced_categorical_kl(q * f, p * f, free_nats=0.5),
        # rows scaled down by f lie on both sides of the bound, whatever the size of the event
        lambda rows, n: [*sites(rows, n), Spec((rows, 1, 1), "mask", differentiable=False)],
        lambda q, p, f: dreamer(q * f, p * f, free_nats=0.5),
        derivative=False,
        every_size=False,
        composed=True,
        degenerate="expanded_last",
    ),
    Case(
        "balanced_categorical_kl[free nats of each variable]",
        lambda q, p: uf.balanced_categorical_kl(
            q, p, free_nats=0.9, free_nats_mode="per_variable", dynamics_scale=0.8, representation_scale=0.2
        ),
        sites,
        lambda q, p: dreamer(q, p, free_nats=0.9, per_variable=True, scales=(0.8, 0.2)),
        derivative=False,
        every_size=False,
        degenerate="expanded_last",
    ),
    Case(
        "balanced_categorical_kl[no free nats,event of 2]",
        lambda q, p: uf.balanced_categorical_kl(q, p, event_ndims=2, free_nats=0.0),
        lambda rows, n: [Spec((rows, n, 2, 3), "logits")] * 2,
        lambda q, p: dreamer(q, p, event_ndims=2, free_nats=0.0),
        derivative=False,
        every_size=False,
        degenerate="expanded_last",
    ),
    Case(
        "categorical_log_prob",
        lambda y, x: uf.categorical_log_prob(y, existing(x, y)),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows,), "labels")],
        lambda y, x: -F.cross_entropy(y, existing(x, y), reduction="none"),
    ),
    Case(
        "categorical_log_prob[event]",
        lambda y, x: uf.categorical_log_prob(y, x, event_ndims=1),
        lambda rows, n: [Spec((rows, n, 5), "logits"), Spec((rows, n), "labels")],
        lambda y, x: Categorical(logits=y).log_prob(x).sum(-1),
        every_size=False,
    ),
    Case(
        "categorical_log_prob[classes in the middle,broadcast x]",
        lambda y, x: uf.categorical_log_prob(y, x, class_dim=1, event_ndims=1),
        lambda rows, n: [Spec((rows, 3, 2, n), "logits"), Spec((1, 2, n), "labels")],
        lambda y, x: Categorical(logits=y.movedim(1, -1)).log_prob(x).sum(-1),
        every_size=False,
    ),
    Case(
        "discretized_logistic_mixture_log_prob",
        lambda p, x: uf.discretized_logistic_mixture_log_prob(p, x, event_ndims=2),
        image(2, 3),
        lambda p, x: pixelcnn(p, x, 2),
        every_size=False,
    ),
    Case(
        "discretized_logistic_mixture_log_prob[grey]",
        lambda p, x: uf.discretized_logistic_mixture_log_prob(p, x, event_ndims=2),
        image(5, 1),
        lambda p, x: pixelcnn(p, x, 2),
        every_size=False,
    ),
    Case(
        "discretized_logistic_mixture_log_prob[pixels,data broadcast]",
        lambda p, x: uf.discretized_logistic_mixture_log_prob(p, x, event_ndims=1),
        lambda rows, n: [Spec((rows, 2, n, 10)), Spec((rows, 1, n, 3), "pixels", differentiable=False)],
        lambda p, x: pixelcnn(p, x.expand(x.size(0), 2, x.size(2), -1), 1),
        every_size=False,
    ),
]
