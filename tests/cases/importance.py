"""Cases of importance weights."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import unigen_fast as uf
from cases.base import Case, Spec, first, last, reduced


def lme(x: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(x, dim) - math.log(x.size(dim))


def several(shape: Callable[[int, int], tuple[int, ...]] = lambda rows, n: (rows, n), count: int = 1) -> Any:
    """`count` tensors of log-weights with one sample more, as a single one is refused; none stays none."""
    return lambda rows, n: [Spec(shape(rows, n + (n > 0)), "log_w")] * count


def naive_vimco(log_w: Tensor, log_q: Tensor, dim: int, reduction: str) -> Tensor:
    """[.., K, K]: row k has log_w_k replaced by the mean of the others."""
    log_w, log_q = log_w.movedim(dim, -1), log_q.movedim(dim, -1)
    k = log_w.size(-1)
    w = log_w.detach()
    mean_of_others = (w.sum(-1, keepdim=True) - w) / (k - 1)
    own = torch.eye(k, dtype=torch.bool, device=w.device)
    left_out = torch.where(own, mean_of_others.unsqueeze(-1), w.unsqueeze(-2))
    signal = lme(w, -1).unsqueeze(-1) - lme(left_out, -1)
    return reduced(-lme(log_w, -1) - (signal * log_q).sum(-1), reduction)


def naive_rws(log_p: Tensor, log_q: Tensor, dim: int, reduction: str) -> tuple[Tensor, Tensor]:
    theta = -lme(log_p - log_q.detach(), dim)
    phi = -(torch.softmax((log_p - log_q).detach(), dim) * log_q).sum(dim)
    return reduced(theta, reduction), reduced(phi, reduction)


def naive_tvo(log_w: Tensor, dim: int, partition: list[float], reduction: str) -> Tensor:
    rows = torch.zeros_like(log_w.sum(dim))
    for low, high in itertools.pairwise(partition):
        rows = rows - (high - low) * (torch.softmax(low * log_w, dim) * log_w).sum(dim)
    return reduced(rows, reduction)


def diagnostics(log_w: Tensor, dim: int) -> tuple[Tensor, ...]:
    weights = torch.softmax(log_w.detach(), dim)
    entropy = torch.distributions.Categorical(probs=weights.movedim(dim, -1)).entropy()
    return lme(log_w.detach(), dim), 1 / weights.square().sum(dim), weights.amax(dim), entropy


def naive_pareto_k(log_w: Tensor) -> Tensor:
    """Zhang and Stephens' fit to the largest weights, row by row, with the loops of their paper's appendix."""
    k = log_w.size(-1)
    largest = math.ceil(min(k / 5, 3 * math.sqrt(k)))
    shapes = []
    for row in log_w.detach().reshape(-1, k):
        w = (row - row.max()).exp().sort().values
        x = w[w > w[-largest - 1]] - w[-largest - 1]
        if len(x) < 5:
            shapes.append(math.inf)
            continue
        n, points = len(x), 30 + int(math.sqrt(len(x)))
        quartile = float(x[int(n / 4 + 0.5) - 1])
        b = [(1 - math.sqrt(points / (i - 0.5))) / (3 * quartile) + 1 / float(x[-1]) for i in range(1, points + 1)]
        means = [float(torch.log1p(-b_i * x).mean()) for b_i in b]
        likelihoods = [n * (math.log(-b_i / m) - m - 1) for b_i, m in zip(b, means, strict=True)]
        weights = torch.softmax(torch.tensor(likelihoods, dtype=torch.float64), 0)
        best = float((weights * torch.tensor(b, dtype=torch.float64)).sum())
        shapes.append((n * float(torch.log1p(-best * x).mean()) + 5) / (n + 10))
    return torch.tensor(shapes, dtype=log_w.dtype).reshape(log_w.shape[:-1])


TEMPERATURE = 2.5

CASES = [
    Case(
        "log_mean_exp",
        lambda x: uf.log_mean_exp(x, dim=-1),
        last("log_w"),
        lambda x: lme(x, -1),
        empty_event=False,
    ),
    Case(
        "log_mean_exp[K,B]",
        lambda x: uf.log_mean_exp(x, dim=0),
        first("log_w"),
        lambda x: lme(x, 0),
        empty_event=False,
    ),
    Case(
        "log_mean_exp[5-D]",
        lambda x: uf.log_mean_exp(x, dim=2),
        lambda rows, n: [Spec((2, rows, n, 3, 2), "log_w")],
        lambda x: lme(x, 2),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "importance_weights",
        lambda x: uf.importance_weights(x, dim=-1, detach=False),
        last("log_w"),
        lambda x: torch.softmax(x, -1),
        empty_event=False,
    ),
    Case(
        "importance_weights[K,B,temperature]",
        lambda x: uf.importance_weights(x, dim=0, temperature=2.5, detach=False),
        first("log_w"),
        lambda x: torch.softmax(x / 2.5, 0),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "effective_sample_size",
        lambda x: uf.effective_sample_size(x, dim=-1),
        last("log_w"),
        lambda x: 1 / torch.softmax(x.detach(), -1).square().sum(-1),
        differentiable=False,
        empty_event=False,
    ),
    Case(
        "effective_sample_size[K,B]",
        lambda x: uf.effective_sample_size(x, dim=0),
        first("log_w"),
        lambda x: 1 / torch.softmax(x.detach(), 0).square().sum(0),
        differentiable=False,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "iwae_loss",
        lambda x: uf.iwae_loss(x, dim=-1),
        last("log_w"),
        lambda x: -lme(x, -1).mean(),
        empty_event=False,
    ),
    Case(
        "iwae_loss[K,B,sum]",
        lambda x: uf.iwae_loss(x, dim=0, reduction="sum"),
        first("log_w"),
        lambda x: -lme(x, 0).sum(),
        empty_event=False,
    ),
    Case(
        "iwae_loss[none]",
        lambda x: uf.iwae_loss(x, dim=1, reduction="none"),
        last("log_w"),
        lambda x: -lme(x, 1),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "iwae_loss[surrogate]",
        lambda x: uf.iwae_loss(x, dim=-1, value="surrogate"),
        last("log_w"),
        lambda x: -(torch.softmax(x.detach(), -1) * x).sum(-1).mean(),
        derivative=False,
        empty_event=False,
    ),
    Case(
        "iwae_loss[surrogate,none,K,B]",
        lambda x: uf.iwae_loss(x, dim=0, value="surrogate", reduction="none"),
        first("log_w"),
        lambda x: -(torch.softmax(x.detach(), 0) * x).sum(0),
        derivative=False,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "renyi_loss",
        lambda x: uf.renyi_loss(x, dim=-1, alpha=0.3),
        last("log_w"),
        lambda x: -(torch.logsumexp(0.7 * x, -1) - math.log(x.size(-1))).mean() / 0.7,
        empty_event=False,
    ),
    Case(
        "renyi_loss[alpha 3,K,B,sum]",
        lambda x: uf.renyi_loss(x, dim=0, alpha=3.0, reduction="sum"),
        first("log_w"),
        lambda x: (torch.logsumexp(-2 * x, 0) - math.log(x.size(0))).sum() / 2,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "renyi_loss[alpha 1,none]",
        lambda x: uf.renyi_loss(x, dim=1, alpha=1, reduction="none"),
        last("log_w"),
        lambda x: -x.mean(1),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "renyi_loss[VR-max,5-D]",
        lambda x: uf.renyi_loss(x, dim=2, alpha=-math.inf, reduction="none"),
        lambda rows, n: [Spec((2, rows, n, 3, 2), "log_w")],
        lambda x: -x.amax(2),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "cubo_loss",
        lambda x: uf.cubo_loss(x, dim=-1, reduction="none"),
        last("log_w"),
        lambda x: (torch.logsumexp(2 * x, -1) - math.log(x.size(-1))) / 2,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "ciwae_loss",
        lambda x: uf.ciwae_loss(x, dim=-1, beta=0.3),
        last("log_w"),
        lambda x: -(0.3 * x.mean(-1) + 0.7 * lme(x, -1)).mean(),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "ciwae_loss[K,B,none]",
        lambda x: uf.ciwae_loss(x, dim=0, beta=0.9, reduction="none"),
        first("log_w"),
        lambda x: -(0.9 * x.mean(0) + 0.1 * lme(x, 0)),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "miwae_loss",
        lambda x: uf.miwae_loss(x, sample_dim=2, group_dim=1),
        lambda rows, n: [Spec((rows, 3, n), "log_w")],
        lambda x: -lme(x, 2).mean(),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "miwae_loss[K,M,B,none]",
        lambda x: uf.miwae_loss(x, sample_dim=0, group_dim=1, reduction="none"),
        lambda rows, n: [Spec((n, 3, rows), "log_w")],
        lambda x: -lme(x, 0).mean(0),
        empty_event=False,
        every_size=False,
        composed=True,
    ),
    Case(
        "piwae_losses",
        lambda x: uf.piwae_losses(x, sample_dim=2, group_dim=1, reduction="sum"),
        lambda rows, n: [Spec((rows, 3, n), "log_w")],
        lambda x: (-lme(x.flatten(1), 1).sum(), -lme(x, 2).mean(1).sum()),
        empty_event=False,
        every_size=False,
        composed=True,
    ),
    Case(
        "tvo_loss",
        lambda x: uf.tvo_loss(x, dim=-1, partition=[0, 0.1, 0.35, 1]),
        last("log_w"),
        lambda x: naive_tvo(x, -1, [0, 0.1, 0.35, 1], "mean"),
        empty_event=False,
    ),
    Case(
        "tvo_loss[K,B,10 points,none]",
        lambda x: uf.tvo_loss(x, dim=0, partition=[i / 10 for i in range(11)], reduction="none"),
        first("log_w"),
        lambda x: naive_tvo(x, 0, [i / 10 for i in range(11)], "none"),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "vimco_loss",
        lambda x, q: uf.vimco_loss(x, q, dim=-1, reduction="none"),
        several(count=2),
        lambda x, q: naive_vimco(x, q, -1, "none"),
        derivative=False,
        empty_event=False,
    ),
    Case(
        "vimco_loss[K,B,mean]",
        lambda x, q: uf.vimco_loss(x, q, dim=0),
        several(lambda rows, n: (n, rows), 2),
        lambda x, q: naive_vimco(x, q, 0, "mean"),
        derivative=False,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "rws_losses",
        lambda p, q: uf.rws_losses(p, q, dim=-1),
        last("log_w", count=2),
        lambda p, q: naive_rws(p, q, -1, "mean"),
        derivative=False,
        empty_event=False,
    ),
    Case(
        "rws_losses[K,B,none]",
        lambda p, q: uf.rws_losses(p, q, dim=0, reduction="none"),
        lambda rows, n: [Spec((n, rows), "log_w")] * 2,
        lambda p, q: naive_rws(p, q, 0, "none"),
        derivative=False,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "log_variance_loss",
        lambda x: uf.log_variance_loss(x, dim=-1),
        several(),
        lambda x: x.var(-1).mean() / 2,
        empty_event=False,
    ),
    Case(
        "log_variance_loss[K,B,none]",
        lambda x: uf.log_variance_loss(x, dim=0, reduction="none"),
        several(lambda rows, n: (n, rows)),
        lambda x: x.var(0) / 2,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "trajectory_balance_loss",
        lambda x, z: uf.trajectory_balance_loss(x, z),
        lambda rows, n: [Spec((rows, n), "log_w"), Spec((1, n), "logits")],
        lambda x, z: (z - x).square().mean(),
        every_size=False,
        composed=True,
        broadcast=True,
    ),
    Case(
        "memorization_score",
        lambda x, y: uf.memorization_score(x, y, dim=0),
        lambda rows, n: [Spec((n, rows), "log_w"), Spec((2 * n, rows), "log_w")],
        lambda x, y: lme(x, 0) - torch.stack([lme(y.roll(-i, 0)[: len(x)], 0) for i in range(len(y))]).mean(0),
        empty_event=False,
        every_size=False,
        composed=True,
    ),
    Case(
        "weight_diagnostics",
        lambda x: uf.weight_diagnostics(x, dim=-1)[:4],
        last("log_w"),
        lambda x: diagnostics(x, -1),
        differentiable=False,
        empty_event=False,
    ),
    Case(
        "weight_diagnostics[tail]",
        lambda x: uf.weight_diagnostics(x, dim=-1).pareto_k,
        lambda rows, n: [Spec((rows, n + 25), "log_w")],
        naive_pareto_k,
        differentiable=False,
        every_size=False,
        composed=True,
    ),
    Case(
        "weight_diagnostics[K,B]",
        lambda x: uf.weight_diagnostics(x, dim=0)[:4],
        first("log_w"),
        lambda x: diagnostics(x, 0),
        differentiable=False,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "importance_weighted_sum",
        lambda x, p: uf.importance_weighted_sum(x, p, dim=-1),
        lambda rows, n: [Spec((rows, n), "log_w", differentiable=False), Spec((rows, n), "logits")],
        lambda x, p: (torch.softmax(x, -1) * p).sum(-1),
        empty_event=False,
    ),
    Case(
        "importance_weighted_sum[K,B,temperature]",
        lambda x, p: uf.importance_weighted_sum(x, p, dim=0, temperature=TEMPERATURE),
        lambda rows, n: [Spec((n, rows), "log_w", differentiable=False), Spec((n, rows), "logits")],
        lambda x, p: (torch.softmax(x / TEMPERATURE, 0) * p).sum(0),
        empty_event=False,
        every_size=False,
    ),
    # the samples are neither first nor last: no layout makes the payload constant and this gradient 0
    Case(
        "importance_weighted_sum[live weights]",
        lambda x, p: uf.importance_weighted_sum(x, p, dim=1, temperature=TEMPERATURE, detach=False),
        lambda rows, n: [Spec((rows, n, 2), "log_w"), Spec((rows, n, 2), "logits")],
        lambda x, p: (torch.softmax(x / TEMPERATURE, 1) * p).sum(1),
        empty_event=False,
        every_size=False,
    ),
    Case(
        "importance_weighted_sum[B,K,D]",
        lambda x, p: uf.importance_weighted_sum(x, p, dim=1, temperature=TEMPERATURE, detach=False),
        lambda rows, n: [Spec((rows, n), "log_w"), Spec((rows, n, 3, 2), "logits")],
        lambda x, p: torch.einsum("bk,bkde->bde", torch.softmax(x / TEMPERATURE, 1), p),
        empty_event=False,
        every_size=False,
        broadcast=True,
    ),
]
