"""Cases of the losses of logits."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import unigen_fast as uf
from cases.base import Case, Spec, bce, block, first, last, reduced, softplus


def iwgan(x: Tensor, dim: int | None, temperature: float = 1.0, detach: bool = True, reduction: str = "mean") -> Tensor:
    if dim is None:
        x, dim = x.reshape(-1), 0
    weights = torch.softmax(x / temperature, dim)
    return reduced(((weights.detach() if detach else weights) * softplus(-x)).sum(dim), reduction)


def iwgan_grouped(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    losses = [iwgan(x.reshape(-1)[labels == label], None, **options) for label in labels.unique()]
    return torch.stack(losses).mean()


def statistics_by_hand(reals: Sequence[Tensor], fakes: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    def of_each(logits: Sequence[Tensor], f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([f(x.detach()).to(x.dtype).mean() for x in logits])

    losses = [softplus(-r).mean() + softplus(f).mean() for r, f in zip(reals, fakes, strict=True)]
    return sum(losses[1:], losses[0]), (
        torch.stack(losses).detach(),
        of_each(reals, lambda x: x > 0),
        of_each(fakes, lambda x: x < 0),
        of_each(reals, lambda x: x),
        of_each(fakes, lambda x: x),
        of_each(reals, torch.sigmoid),
        of_each(fakes, torch.sigmoid),
    )


CASES = [
    Case(
        "importance_weighted_generator_loss",
        lambda x: uf.importance_weighted_generator_loss(fake=x),
        last("logits"),
        lambda x: iwgan(x, None),
        derivative=False,
    ),
    Case(
        "importance_weighted_generator_loss[dim]",
        lambda x: uf.importance_weighted_generator_loss(fake=x, dim=-1),
        last("logits"),
        lambda x: iwgan(x, -1),
        derivative=False,
        empty_event=False,
    ),
    Case(
        "importance_weighted_generator_loss[dim=0,temperature,sum]",
        lambda x: uf.importance_weighted_generator_loss(fake=x, dim=0, temperature=1.7, reduction="sum"),
        first("logits"),
        lambda x: iwgan(x, 0, 1.7, reduction="sum"),
        derivative=False,
        empty_event=False,
        every_size=False,
    ),
    Case(
        "importance_weighted_generator_loss[attached]",
        lambda x: uf.importance_weighted_generator_loss(
            fake=x, dim=-1, detach=False, temperature=0.8, reduction="none"
        ),
        last("logits"),
        lambda x: iwgan(x, -1, 0.8, detach=False, reduction="none"),
        empty_event=False,
    ),
    Case(
        "importance_weighted_generator_loss[attached,whole]",
        lambda x: uf.importance_weighted_generator_loss(fake=x, detach=False, reduction="sum"),
        last("logits"),
        lambda x: iwgan(x, None, detach=False, reduction="sum"),
        every_size=False,
    ),
    Case(
        "importance_weighted_generator_loss[groups]",
        lambda x, labels: uf.importance_weighted_generator_loss(fake=x, groups=labels, detach=False),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows * n,), "labels")],
        lambda x, labels: iwgan_grouped(x, labels, detach=False),
        every_size=False,
        composed=True,
    ),
    Case(
        "discriminator_loss",
        lambda real, fake: uf.discriminator_loss(real=real, fake=fake),
        last("logits", count=2),
        lambda real, fake: softplus(-real).mean() + softplus(fake).mean(),
    ),
    Case(
        "discriminator_loss[hinge,sum,scale]",
        lambda real, fake: uf.discriminator_loss(real=real, fake=fake, kind="hinge", reduction="sum", scale=0.5),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((n, rows, 1), "logits")],
        lambda real, fake: 0.5 * ((1 - real).clamp(min=0).sum() + (1 + fake).clamp(min=0).sum()),
    ),
    Case(
        "discriminator_loss[none]",
        lambda real, fake: uf.discriminator_loss(real=real, fake=fake, reduction="none", scale=2.0),
        last("logits", count=2),
        lambda real, fake: 2 * (softplus(-real) + softplus(fake)),
        every_size=False,
        composed=True,
    ),
    Case(
        "discriminator_loss[lists,statistics]",
        lambda r1, r2, f1, f2: uf.discriminator_loss(real=[r1, r2], fake=[f1, f2], return_stats=True),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, 1, n // 2 + 1), "logits")] * 2,
        lambda r1, r2, f1, f2: statistics_by_hand([r1, r2], [f1, f2]),
        every_size=False,
    ),
    Case(
        "generator_loss",
        lambda fake: uf.generator_loss(fake=fake),
        last("logits"),
        lambda fake: F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake)),
    ),
    Case(
        "generator_loss[saturating,sum]",
        lambda fake: uf.generator_loss(fake=fake, kind="saturating", reduction="sum"),
        last("logits"),
        lambda fake: -F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction="sum"),
    ),
    Case(
        "generator_loss[hinge,4-D]",
        lambda fake: uf.generator_loss(fake=fake, kind="hinge", scale=3.0),
        lambda rows, n: [Spec(block(rows, n), "logits")],
        lambda fake: -3 * fake.mean(),
        every_size=False,
    ),
    Case(
        "generator_loss[saturating,none]",
        lambda fake: uf.generator_loss(fake=fake, kind="saturating", reduction="none", scale=0.3),
        last("logits"),
        lambda fake: -0.3 * softplus(fake),
        every_size=False,
    ),
    Case(
        "log_ratio",
        lambda x: uf.log_ratio(x, y=0),
        last("logits"),
        lambda x: torch.sigmoid(-x).log() - torch.sigmoid(x).log(),
        every_size=False,
    ),
    Case(
        "log_ratio[labels]",
        lambda x, y: uf.log_ratio(x, y=y, reversed=True),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((n,), "binary", differentiable=False)],
        lambda x, y: (1 - 2 * y) * x,
        every_size=False,
        composed=True,
    ),
    Case(
        "log_discriminator",
        lambda x: uf.log_discriminator(x, 1),
        last("logits"),
        lambda x: torch.log_softmax(torch.stack([torch.zeros_like(x), x]), 0)[1],
    ),
    Case(
        "log_discriminator[labels,reversed]",
        lambda x, y: uf.log_discriminator(x, y, reversed=True),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, 1), "binary", differentiable=False)],
        lambda x, y: bce(x, 1 - y, 0),
        every_size=False,
    ),
]
