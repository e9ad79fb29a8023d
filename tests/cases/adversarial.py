"""Cases of the losses of logits."""

import math
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


# ---- f-GAN from its table: f*(T(v)), with the conjugates f* and activations T of Nowozin et al., Table 2

LOG2 = math.log(2)
CONJUGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda t: (t - 1).exp(),
    "reverse_kl": lambda t: -1 - (-t).log(),
    "pearson": lambda t: t.square() / 4 + t,
    "neyman": lambda t: 2 - 2 * (1 - t).sqrt(),
    "hellinger": lambda t: t / (1 - t),
    "js": lambda t: -(2 - t.exp()).log(),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda v: v,
    "reverse_kl": lambda v: -v.exp(),
    "pearson": lambda v: v,
    "neyman": lambda v: 1 - v.exp(),
    "hellinger": lambda v: 1 - v.exp(),
    "js": lambda v: LOG2 - softplus(-v),
}


def fgan_discriminator(real: Tensor, fake: Tensor, name: str) -> Tensor:
    t = ACTIVATIONS[name]
    return CONJUGATES[name](t(fake)).mean() - t(real).mean()


def fgan_generator(fake: Tensor, name: str) -> Tensor:
    return -CONJUGATES[name](ACTIVATIONS[name](fake)).mean()


# ---- logits that hang on each other


def relativistic_average(real: Tensor, fake: Tensor, kind: str = "", *, generator: bool = False) -> Tensor:
    """Jolicoeur-Martineau (2018): the generator's loss is the discriminator's with the sides exchanged."""
    if generator:
        real, fake = fake, real
    of_real, of_fake = real - fake.mean(), fake - real.mean()
    if kind == "_least_squares":
        return ((of_real - 1) ** 2).mean() / 2 + ((of_fake + 1) ** 2).mean() / 2
    if kind == "_hinge":
        return ((1 - of_real).clamp(min=0).mean() + (1 + of_fake).clamp(min=0).mean()) / 2
    return (softplus(-of_real).mean() + softplus(of_fake).mean()) / 2


def kl_ratio(fake: Tensor) -> Tensor:
    """exp(l) over its mean, a constant."""
    return (torch.softmax(fake.detach().reshape(-1), 0) * fake.numel()).reshape(fake.shape)


def kl_wgan(real: Tensor, fake: Tensor) -> Tensor:
    return (1 - real).clamp(min=0).mean() + (1 + kl_ratio(fake) * fake).clamp(min=0).mean()


def pairs_of_lists(rows: int, n: int) -> list[Spec]:
    """Two real tensors, then two fake ones of other batch sizes."""
    return [
        Spec((rows, n), "logits"),
        Spec((rows, 1, n // 2 + 1), "logits"),
        Spec((rows + 1, n), "logits"),
        Spec((rows, 2), "logits"),
    ]


def coupled_cases() -> list[Case]:
    cases = []
    for kind, generators in (("", (False, True)), ("_least_squares", (True,)), ("_hinge", (False,))):
        for generator in generators:
            loss = uf.generator_loss if generator else uf.discriminator_loss
            cases.append(
                Case(
                    f"{loss.__name__}[relativistic_average{kind}]",
                    lambda real, fake, loss=loss, kind=kind: loss(
                        real=real, fake=fake, kind=f"relativistic_average{kind}"
                    ),
                    lambda rows, n: [Spec((rows, n), "logits"), Spec((n, rows, 2), "logits")],
                    lambda real, fake, kind=kind, generator=generator: relativistic_average(
                        real, fake, kind, generator=generator
                    ),
                    every_size=False,
                )
            )
    return [
        *cases,
        Case(
            "discriminator_loss[relativistic_average,lists,sum]",
            lambda r1, r2, f1, f2: uf.discriminator_loss(
                real=[r1, r2], fake=[f1, f2], kind="relativistic_average", reduction="sum", scale=2.0
            ),
            pairs_of_lists,
            lambda r1, r2, f1, f2: sum(
                softplus(f.mean() - r).sum() + softplus(f - r.mean()).sum() for r, f in ((r1, f1), (r2, f2))
            ),
            every_size=False,
        ),
        Case(
            "discriminator_loss[kl_wgan]",
            lambda real, fake: uf.discriminator_loss(real=real, fake=fake, kind="kl_wgan"),
            last("logits", count=2),
            kl_wgan,
            derivative=False,
            every_size=False,
        ),
        Case(
            "discriminator_loss[kl_wgan,lists,sum]",
            lambda r1, r2, f1, f2: uf.discriminator_loss(
                real=[r1, r2], fake=[f1, f2], kind="kl_wgan", reduction="sum", scale=0.5
            ),
            pairs_of_lists,
            lambda r1, r2, f1, f2: sum(
                ((1 - r).clamp(min=0).sum() + (1 + kl_ratio(f) * f).clamp(min=0).sum()) / 2
                for r, f in ((r1, f1), (r2, f2))
            ),
            derivative=False,
            every_size=False,
        ),
        Case(
            "generator_loss[kl_wgan]",
            lambda fake: uf.generator_loss(fake=fake, kind="kl_wgan", scale=2.0),
            last("logits"),
            lambda fake: -2 * (kl_ratio(fake) * fake).mean(),
            derivative=False,
            every_size=False,
        ),
        Case(
            "generator_loss[relativistic]",
            lambda real, fake: uf.generator_loss(real=real, fake=fake, kind="relativistic"),
            last("logits", count=2),
            lambda real, fake: softplus(real - fake).mean(),
            every_size=False,
            composed=True,
        ),
    ]


def fgan_cases() -> list[Case]:
    cases = []
    for name in ("reverse_kl", "neyman", "js"):  # all of them: test_adversarial.py
        cases.append(
            Case(
                f"discriminator_loss[fgan_{name}]",
                lambda real, fake, name=name: uf.discriminator_loss(real=real, fake=fake, kind=f"fgan_{name}"),
                lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, 3), "logits")],
                lambda real, fake, name=name: fgan_discriminator(real, fake, name),
                every_size=False,
            )
        )
    return cases


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
        lambda rows, n: [Spec((rows * n,), "logits"), Spec((rows * n,), "labels")],
        lambda x, labels: iwgan_grouped(x, labels, detach=False),
        every_size=False,
    ),
    Case(
        "importance_weighted_generator_loss[groups,temperature,detached]",
        lambda x, labels: uf.importance_weighted_generator_loss(fake=x, groups=labels, temperature=1.7),
        lambda rows, n: [Spec((rows * n,), "logits"), Spec((rows * n,), "labels")],
        lambda x, labels: iwgan_grouped(x, labels, temperature=1.7),
        derivative=False,
        every_size=False,
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
        lambda rows, n: [Spec((rows, n), "logits"), Spec((1, n), "binary", differentiable=False)],
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
        composed=True,
    ),
    Case(
        "discriminator_loss[least_squares]",
        lambda real, fake: uf.discriminator_loss(real=real, fake=fake, kind="least_squares"),
        last("logits", count=2),
        lambda real, fake: (F.mse_loss(real, torch.ones_like(real)) + fake.square().mean()) / 2,
        every_size=False,
    ),
    Case(
        "generator_loss[fgan_neyman,none]",
        lambda fake: uf.generator_loss(fake=fake, kind="fgan_neyman", reduction="none", scale=0.3),
        last("logits"),
        lambda fake: -0.3 * (2 - 2 * (fake / 2).exp()),
        every_size=False,
    ),
    Case(
        "density_ratio_kl",
        lambda x: uf.density_ratio_kl(x),
        last("logits"),
        lambda x: (torch.sigmoid(x).log() - torch.sigmoid(-x).log()).mean(),
        every_size=False,
    ),
    Case(
        "density_ratio_js",
        lambda real, fake: uf.density_ratio_js(real=real, fake=fake),
        last("logits", count=2),
        lambda real, fake: LOG2 + (F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean()) / 2,
        every_size=False,
    ),
    *fgan_cases(),
    *coupled_cases(),
]
