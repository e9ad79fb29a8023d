"""Cases of importance weights."""

import math

import torch
from torch import Tensor

import unigen_fast as uf
from cases.base import Case, Spec, first, last


def lme(x: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(x, dim) - math.log(x.size(dim))


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
]
