"""Losses of discriminator logits, and IWGAN's generator loss: what is particular to them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases.adversarial import ACTIVATIONS, CONJUGATES, iwgan, relativistic_average
from cases.base import softplus
from helpers import LOW_PRECISION, assert_close, assert_refused, assert_rounded_alike, assert_same_bits
from torch import Tensor, nn

import unigen_fast as uf
from unigen_fast.adversarial import _DISCRIMINATOR, _GENERATOR

INF = math.inf
iw_loss = uf.importance_weighted_generator_loss


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


@pytest.fixture
def logits(device: torch.device) -> Tensor:
    return (2 * torch.randn(16, dtype=torch.float64, device=device)).requires_grad_()


# ---- IWGAN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("k", [1, 2, 64, 256, 1000])
def test_iwgan_gradient_in_closed_form(k: int, scale: float, device: torch.device) -> None:
    """-sigma(l_i) / sum_j exp(l_j), whole minibatch and groups."""
    x = (scale * torch.randn(k, 3, dtype=torch.float64, device=device)).requires_grad_()

    def closed_form(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
        x = x.detach()
        peak = x.amax(dim, keepdim=True)
        return -x.sigmoid() * (-peak).exp() / (x - peak).exp().sum(dim, keepdim=True)

    assert_close(gradient(iw_loss(fake=x), x), closed_form(x, (0, 1)), 1e-12)
    assert_close(gradient(iw_loss(fake=x, dim=0, reduction="sum"), x), closed_form(x, 0), 1e-12)
    assert_close(gradient(iw_loss(fake=x, dim=0), x), closed_form(x, 0) / 3, 1e-12)
    assert_close(gradient(iw_loss(fake=x, dim=1, reduction="sum"), x), closed_form(x, 1), 1e-12)


def test_iwgan_of_the_whole_minibatch_is_saturating_over_mean_odds(logits: Tensor) -> None:
    """The saturating gradient, divided by the mean of D / (1 - D)."""
    saturating = gradient(uf.generator_loss(fake=logits, kind="saturating"), logits)
    assert_close(gradient(iw_loss(fake=logits), logits), saturating / logits.detach().exp().mean(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("size", [1, 8, 17, 64, 1000])
def test_iwgan_with_one_sample_is_exactly_non_saturating(
    size: int, detach: bool, reduction: str, dtype: torch.dtype, device: torch.device
) -> None:
    """A `dim` of size 1: the same bits, value and gradient."""
    flat = (5 * torch.randn(size, device=device)).to(dtype)
    flat[0] = 100
    expected_input = flat.clone().requires_grad_()
    expected = uf.generator_loss(fake=expected_input, reduction=reduction)
    expected_gradient = gradient(expected.sum(), expected_input)
    for dim in (0, 1):
        x = flat.unsqueeze(dim).clone().requires_grad_()
        loss = iw_loss(fake=x, dim=dim, reduction=reduction, detach=detach)
        assert_rounded_alike(loss, expected)
        assert_rounded_alike(gradient(loss.sum(), x).squeeze(dim), expected_gradient)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
def test_iwgan_with_logits_of_ten_thousand(dtype: torch.dtype, detach: bool, device: torch.device) -> None:
    rows = [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [-1e4, -9e3, -8e3]]
    x = torch.tensor(rows, dtype=dtype, device=device, requires_grad=True)
    wide = x.detach().double()
    for options in (
        {},
        {"dim": 1},
        {"dim": 1, "reduction": "none"},
        {"dim": 0},
        {"temperature": 0.01},
        {"temperature": 50.0},
    ):
        loss = iw_loss(fake=x, detach=detach, **options)
        g = gradient(loss.sum(), x)
        assert loss.isfinite().all() and g.isfinite().all()
        oracle = wide.clone().requires_grad_()
        expected = iwgan(
            oracle, options.get("dim"), options.get("temperature", 1.0), detach, options.get("reduction", "mean")
        )
        assert_close(loss, expected, 1e-5, 1e-30)
        eps = torch.finfo(dtype).eps if dtype in LOW_PRECISION else 1e-5
        assert_close(g, gradient(expected.sum(), oracle), eps, torch.finfo(torch.float32).tiny)


def test_iwgan_weights_are_detached(logits: Tensor) -> None:
    """Attached, most gradients have another sign: the default must be the one of Eq. 16."""
    detached = gradient(iw_loss(fake=logits), logits)
    attached = gradient(iw_loss(fake=logits, detach=False), logits)
    assert (detached < 0).all(), "every generated sample is pushed up"
    weights = torch.softmax(logits.detach(), 0)
    per_sample = softplus(-logits.detach())
    mean = (weights * per_sample).sum()
    assert_close(attached, detached + weights * (per_sample - mean), 1e-12)
    assert (attached > 0).any()
    assert_same_bits(iw_loss(fake=logits), iw_loss(fake=logits, detach=False))


def test_iwgan_weights_are_those_of_importance_weights(logits: Tensor) -> None:
    """w = q^r(0|x) / q(0|x) = exp(log_ratio(l, y=0, reversed=True)) = exp(l)."""
    log_w = uf.log_ratio(logits, y=0, reversed=True)
    assert_close(log_w, logits, 1e-15)
    expected = (uf.importance_weights(log_w, dim=0) * -uf.log_discriminator(logits, 0, reversed=True)).sum()
    assert_close(iw_loss(fake=logits), expected, 1e-13)


@pytest.mark.parametrize("detach", [True, False])
def test_iwgan_second_derivative_of_detached_weights(detach: bool, logits: Tensor) -> None:
    for call in (
        lambda f: f(logits, None, 0.7, detach),
        lambda f: f(logits.reshape(4, 4), 0, 1.0, detach),
        lambda f: f(logits.reshape(2, 8).t(), -2, 1.3, detach, "sum"),
    ):
        results = []
        for function in (
            lambda x, dim, t, d, r="mean": iw_loss(fake=x, dim=dim, temperature=t, detach=d, reduction=r),
            iwgan,
        ):
            (first,) = torch.autograd.grad(call(function), logits, create_graph=True)
            (second,) = torch.autograd.grad((first * torch.arange(16, device=logits.device)).sum(), logits)
            results.append((first, second))
        for got, expected in zip(*results, strict=True):
            assert_close(got, expected, 1e-11)


def test_iwgan_rows_of_minus_infinity(device: torch.device) -> None:
    """Weights 0: no loss and no gradient from that row."""
    x = torch.tensor([[-INF, -INF], [0.5, -1.0]], dtype=torch.float64, device=device, requires_grad=True)
    for detach in (True, False):
        loss = iw_loss(fake=x, dim=1, reduction="none", detach=detach)
        assert loss[0] == 0
        assert_close(loss[1], iwgan(x[1].detach(), 0), 1e-13)
        g = gradient(loss.sum(), x)
        assert (g[0] == 0).all() and (g[1] != 0).all()
    mixed = torch.tensor([[-INF, 1.0, 2.0]], dtype=torch.float64, device=device, requires_grad=True)
    loss = iw_loss(fake=mixed, dim=1)
    assert_close(loss, iwgan(mixed.detach()[:, 1:], 1), 1e-13)
    assert gradient(loss, mixed)[0, 0] == 0


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("k", [4, 100])
def test_iwgan_nan_stays_in_its_row(bad: float, k: int, device: torch.device) -> None:
    clean = torch.randn(3, k, device=device)
    x = clean.clone()
    x[1, 2] = bad
    x.requires_grad_(), clean.requires_grad_()
    got, expected = (iw_loss(fake=t, dim=1, reduction="none") for t in (x, clean))
    got_gradient, expected_gradient = gradient(got.sum(), x), gradient(expected.sum(), clean)
    assert got[1].isnan() and got_gradient[1].isnan().any()
    for a, b in ((got, expected), (got_gradient, expected_gradient)):
        assert_rounded_alike(a[[0, 2]], b[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize(
    "labels", [[0] * 7, [0, 1, 0, 2, 1, 0, 5], [9, -3, 4, 2, 1, 0, 7], [3, 3, 3, -1, -1, -1, -1]], ids=str
)
def test_iwgan_groups(
    labels: list[int], detach: bool, reduction: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Weights normalised among the samples of one label, against a loop over the labels."""
    x = torch.randn(7, device=device).mul(3).to(dtype).requires_grad_()
    groups = torch.tensor(labels, device=device)
    wide = x.detach().double().requires_grad_()
    each = torch.stack([iwgan(wide[groups == g], 0, 1.5, detach) for g in groups.unique()])
    expected = each.mean() if reduction == "mean" else each.sum()
    got = iw_loss(fake=x, groups=groups, temperature=1.5, detach=detach, reduction=reduction)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(got, expected, 1e-10 if dtype == torch.float64 else 1e-5)
    eps = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3}[dtype]
    assert_close(gradient(got, x), gradient(expected, wide), eps, 1e-7 if dtype == torch.float16 else 0.0)


def test_iwgan_one_group_is_the_whole_minibatch(logits: Tensor) -> None:
    groups = torch.full((16,), 4, dtype=torch.int32, device=logits.device)
    got, expected = iw_loss(fake=logits.reshape(4, 4), groups=groups), iw_loss(fake=logits)
    assert_close(got, expected, 1e-14)
    assert_close(gradient(got, logits), gradient(expected, logits), 1e-12)


def test_iwgan_groups_do_not_see_each_other(device: torch.device) -> None:
    """Groups 1e4 apart: each is normalised by its own maximum."""
    x = torch.tensor([1e4, -1e4, 9999.0, -9999.0], dtype=torch.float64, device=device, requires_grad=True)
    groups = torch.tensor([0, 1, 0, 1], device=device)
    expected = torch.stack([iwgan(x[groups == g], 0) for g in (0, 1)]).mean()
    assert_close(iw_loss(fake=x, groups=groups), expected, 1e-13)
    assert_close(gradient(iw_loss(fake=x, groups=groups), x), gradient(expected, x), 1e-12, 1e-300)


def test_iwgan_of_a_column_is_that_of_a_vector(device: torch.device) -> None:
    """[N, 1], as discriminators return it, and any shape for dim=None."""
    x = torch.randn(12, device=device)
    for shape in ((12, 1), (1, 12), (3, 4), (2, 3, 2)):
        assert_close(iw_loss(fake=x.reshape(shape)), iwgan(x.double(), 0), 1e-6)
        assert_close(iw_loss(fake=x.reshape(shape).transpose(0, 1)), iwgan(x.double(), 0), 1e-6)


# ---- discriminator and generator losses ------------------------------------------------------------------------------

FORMULAS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "logistic": (
        lambda r: F.binary_cross_entropy_with_logits(r, torch.ones_like(r), reduction="none"),
        lambda f: F.binary_cross_entropy_with_logits(f, torch.zeros_like(f), reduction="none"),
    ),
    "hinge": (lambda r: torch.clamp(1 - r, min=0), lambda f: torch.clamp(1 + f, min=0)),
    # as TF-GAN writes them
    "least_squares": (lambda r: 0.5 * torch.square(r - 1.0), lambda f: 0.5 * torch.square(f)),
    "wasserstein": (lambda r: -r, lambda f: f),
    **{
        f"fgan_{name}": (
            lambda r, activation=ACTIVATIONS[name]: -activation(r),
            lambda f, activation=ACTIVATIONS[name], conjugate=CONJUGATES[name]: conjugate(activation(f)),
        )
        for name in CONJUGATES
    },
}
# accuracy: where the boundary is, if not at 0; whose real logits are the negative ones
BOUNDARIES = {"least_squares": 0.5, "fgan_kl": 1.0}
NEGATIVE = {"fgan_reverse_kl", "fgan_neyman", "fgan_hellinger"}
GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "non_saturating": lambda f: -torch.sigmoid(f).log(),
    "saturating": lambda f: torch.sigmoid(-f).log(),
    "hinge": lambda f: -f,
    "least_squares": lambda f: 0.5 * torch.square(f - 1.0),
    "wasserstein": lambda f: -f,
    **{kind: lambda f, term=FORMULAS[kind][1]: -term(f) for kind in FORMULAS if kind.startswith("fgan")},
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [1.0, 0.5, -2, 0.0])
def test_discriminator_loss(kind: str, reduction: str, scale: float, device: torch.device) -> None:
    real, fake = (torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction]
    expected = scale * (reduce(FORMULAS[kind][0](real)) + reduce(FORMULAS[kind][1](fake)))
    got = uf.discriminator_loss(real=real, fake=fake, kind=kind, reduction=reduction, scale=scale)
    assert_close(got, expected, 1e-13, 1e-300)
    for x in (real, fake):
        (a,) = torch.autograd.grad(got.sum(), x, retain_graph=True)
        (b,) = torch.autograd.grad(expected.sum(), x, retain_graph=True)
        assert_close(a, b, 1e-12, 1e-300)


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_generator_loss(kind: str, reduction: str, device: torch.device) -> None:
    fake = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction]
    expected = 1.5 * reduce(GENERATORS[kind](fake))
    got = uf.generator_loss(fake=fake, kind=kind, reduction=reduction, scale=1.5)
    assert_close(got, expected, 1e-12)
    assert_close(gradient(got.sum(), fake), gradient(expected.sum(), fake), 1e-12)


def test_each_side_is_averaged_over_its_own_batch(device: torch.device) -> None:
    """wiseodd/generative-models #13: one mean over another number of elements changes the balance of the terms."""
    real, fake = (
        torch.randn(3, 2, dtype=torch.float64, device=device),
        torch.randn(50, dtype=torch.float64, device=device),
    )
    expected = softplus(-real).mean() + softplus(fake).mean()
    assert_close(uf.discriminator_loss(real=real, fake=fake), expected, 1e-13)
    lists = uf.discriminator_loss(real=[real, fake], fake=[fake, real])
    assert_close(lists, expected + softplus(-fake).mean() + softplus(real).mean(), 1e-13)


def test_real_and_fake_are_not_interchangeable(logits: Tensor) -> None:
    other = torch.randn_like(logits)
    assert uf.discriminator_loss(real=logits, fake=other) != uf.discriminator_loss(real=other, fake=logits)
    with pytest.raises(TypeError, match="positional"):
        uf.discriminator_loss(logits, other)
    with pytest.raises(TypeError, match="positional"):
        uf.generator_loss(logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
def test_logits_of_ten_thousand(dtype: torch.dtype, device: torch.device) -> None:
    values = [1e4, -1e4, 0.0, 88.0, -88.0, 104.0, -104.0, 20.5, -20.5]
    x = torch.tensor(values, dtype=dtype, device=device, requires_grad=True)
    eps = torch.finfo(dtype).eps if dtype in LOW_PRECISION else 1e-5
    for reduction in ("mean", "sum", "none"):
        calls = [
            lambda y, r=reduction: uf.discriminator_loss(real=y, fake=y, reduction=r),
            lambda y, r=reduction: uf.discriminator_loss(real=y, fake=y, reduction=r, kind="hinge"),
            lambda y, r=reduction: uf.generator_loss(fake=y, reduction=r),
            lambda y, r=reduction: uf.generator_loss(fake=y, reduction=r, kind="saturating"),
        ]
        for call in calls:
            loss = call(x)
            g = gradient(loss.sum(), x)
            wide = x.detach().double().requires_grad_()
            expected = call(wide)
            assert loss.isfinite().all() and g.isfinite().all()
            assert_close(loss, expected, 1e-5)
            assert_close(g, gradient(expected.sum(), wide), eps, torch.finfo(dtype).smallest_normal)


def test_tails_of_softplus_are_exact(device: torch.device) -> None:
    """softplus(-l) at l = 30 is 9.4e-14, not 0; and at -30 it is 30 + 9.4e-14, with F.softplus 30."""
    x = torch.tensor([30.0, 15.0, 60.0, -30.0], dtype=torch.float64, device=device)
    expected = torch.tensor(
        [*(math.log1p(math.exp(-v)) for v in (30, 15, 60)), 30 + math.exp(-30)], dtype=torch.float64
    )
    for got in (uf.generator_loss(fake=x, reduction="none"), -uf.log_discriminator(x, 1)):
        assert (got.cpu() / expected - 1).abs().max() < 1e-14
    low = uf.generator_loss(fake=x.float(), reduction="none")
    assert (low.cpu().double() / expected - 1).abs().max() < 1e-6


def test_infinite_and_nan_logits(device: torch.device) -> None:
    """On its side an infinite logit costs 0; on the other +inf, with a gradient of 1; NaN stays NaN."""
    x = torch.tensor([INF, -INF, math.nan, 1.0], dtype=torch.float64, device=device, requires_grad=True)
    loss = uf.generator_loss(fake=x, reduction="none")
    assert loss[0] == 0 and loss[1] == INF and loss[2].isnan()
    assert_close(loss[3], softplus(-x[3]), 1e-13)
    g = gradient(loss.sum(), x)
    assert g[0] == 0 and g[1] == -1 and g[2].isnan()
    saturating = uf.generator_loss(fake=x, reduction="none", kind="saturating")
    assert saturating[0] == -INF and saturating[1] == 0 and saturating[2].isnan()
    for kind in ("logistic", "hinge"):
        total = uf.discriminator_loss(real=x, fake=x.detach(), kind=kind)
        assert total.isnan()
    hinge = uf.discriminator_loss(real=x[3:], fake=x[1:2], kind="hinge", reduction="none")
    assert hinge == 0


def test_hinge_has_no_gradient_beyond_the_margin(device: torch.device) -> None:
    real = torch.tensor([2.0, 0.0, 1.0001], device=device, requires_grad=True)
    fake = torch.tensor([-2.0, 0.0, -1.0001], device=device, requires_grad=True)
    uf.discriminator_loss(real=real, fake=fake, kind="hinge", reduction="sum").backward()
    assert torch.equal(real.grad.cpu(), torch.tensor([0.0, -1.0, 0.0]))
    assert torch.equal(fake.grad.cpu(), torch.tensor([0.0, 1.0, 0.0]))


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_statistics(kind: str, reduction: str, device: torch.device) -> None:
    """Of the same pass, detached, of means whatever the reduction; a logit of 0 is right on neither side."""
    shapes = [(4, 1), (3, 5), (700,)]
    reals = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    fakes = [torch.randn(2, *s, device=device, requires_grad=True) for s in shapes]
    with torch.no_grad():
        reals[1][0, 0] = fakes[1][0, 0, 0] = 0
    loss, stats = uf.discriminator_loss(
        real=reals, fake=fakes, kind=kind, reduction=reduction, scale=3.0, return_stats=True
    )
    assert isinstance(stats, uf.DiscriminatorStats)
    plain = uf.discriminator_loss(real=reals, fake=fakes, kind=kind, reduction=reduction, scale=3.0)
    assert_close(loss, plain, 1e-6)
    for i, (r, f) in enumerate(zip(reals, fakes, strict=True)):
        r, f = r.detach().double(), f.detach().double()
        boundary, sign = BOUNDARIES.get(kind, 0.0), -1 if kind in NEGATIVE else 1
        expected = uf.DiscriminatorStats(
            losses=FORMULAS[kind][0](r).mean() + FORMULAS[kind][1](f).mean(),
            real_accuracy=(sign * r > boundary).double().mean(),
            fake_accuracy=(sign * f < boundary).double().mean(),
            real_mean_logit=r.mean(),
            fake_mean_logit=f.mean(),
            real_mean_probability=r.sigmoid().mean(),
            fake_mean_probability=f.sigmoid().mean(),
        )
        for name, got, e in zip(stats._fields, stats, expected, strict=True):
            assert got.shape == (3,) and not got.requires_grad
            assert_close(got[i], e, 1e-5, 1e-7, what=name)
        _, single = uf.discriminator_loss(real=reals[i], fake=fakes[i], kind=kind, return_stats=True)
        for got, e in zip(single, expected, strict=True):
            assert got.shape == ()
            assert_close(got, e, 1e-5, 1e-7)
    assert_close(
        torch.stack(torch.autograd.grad(loss, reals)[:1]), torch.stack(torch.autograd.grad(plain, reals)[:1]), 1e-6
    )


def test_lists_add_up(device: torch.device) -> None:
    """Multi-scale discriminators: each tensor averaged by itself, then summed; gradients go to each."""
    reals = [torch.randn(3, n, dtype=torch.float64, device=device, requires_grad=True) for n in (1, 7, 130)]
    fakes = [torch.randn(3, n, dtype=torch.float64, device=device, requires_grad=True) for n in (1, 7, 130)]
    for kind in FORMULAS:
        got = uf.discriminator_loss(real=reals, fake=tuple(fakes), kind=kind)
        singles = [uf.discriminator_loss(real=r, fake=f, kind=kind) for r, f in zip(reals, fakes, strict=True)]
        assert_close(got, sum(singles), 1e-13)
        for a, b in zip(
            torch.autograd.grad(got, reals + fakes), torch.autograd.grad(sum(singles), reals + fakes), strict=True
        ):
            assert_close(a, b, 1e-13)
    for kind in GENERATORS:
        got = uf.generator_loss(fake=fakes, kind=kind, scale=2.0)
        assert_close(got, 2 * sum(GENERATORS[kind](f).mean() for f in fakes), 1e-12)
    rows = uf.generator_loss(fake=fakes, reduction="none")
    assert isinstance(rows, list) and [r.shape for r in rows] == [f.shape for f in fakes]
    both = uf.discriminator_loss(real=reals, fake=fakes, reduction="none")
    assert isinstance(both, list)
    for r, f, b in zip(reals, fakes, both, strict=True):
        assert_close(b, softplus(-r) + softplus(f), 1e-13)


def test_lists_of_many(device: torch.device) -> None:
    """More tensors than a launch may hold by value, each of another size and strides."""
    fakes = [torch.randn(2, n + 3, dtype=torch.float64, device=device)[:, :n].requires_grad_() for n in range(1, 41)]
    got = uf.generator_loss(fake=fakes)
    assert_close(got, sum(softplus(-f).mean() for f in fakes), 1e-12)
    for f, g in zip(fakes, torch.autograd.grad(got, fakes), strict=True):
        assert_close(g, -torch.sigmoid(-f) / f.numel(), 1e-12)


def test_partly_detached_lists(device: torch.device) -> None:
    """The discriminator step: the fake side may be detached, whole or in part."""
    reals = [torch.randn(4, device=device, requires_grad=True), torch.randn(5, device=device)]
    fakes = [torch.randn(4, device=device), torch.randn(5, device=device, requires_grad=True)]
    uf.discriminator_loss(real=reals, fake=fakes).backward()
    assert_close(reals[0].grad, -torch.sigmoid(-reals[0]) / 4, 1e-6)
    assert_close(fakes[1].grad, torch.sigmoid(fakes[1]) / 5, 1e-6)
    assert reals[1].grad is None and fakes[0].grad is None


def test_mixed_dtypes_in_lists(device: torch.device) -> None:
    half = torch.randn(6, device=device).half().requires_grad_()
    full = torch.randn(6, device=device).requires_grad_()
    loss = uf.discriminator_loss(real=half, fake=full)
    assert loss.dtype == torch.float32
    loss.backward()
    assert half.grad.dtype == torch.float16 and full.grad.dtype == torch.float32
    assert_close(half.grad, -torch.sigmoid(-half.detach().double()) / 6, 1e-3)


# ---- further kinds ---------------------------------------------------------------------------------------------------

RELATIVISTIC = ["relativistic_average", "relativistic_average_least_squares", "relativistic_average_hinge"]
COUPLED = ["relativistic", *RELATIVISTIC, "kl_wgan"]


def by_kind(kind: str, real: Tensor, fake: Tensor, *, generator: bool = False, **options: Any) -> Tensor:
    """Discriminator's or generator's loss, with `real` where the kind takes it."""
    if not generator:
        return uf.discriminator_loss(real=real, fake=fake, kind=kind, **options)
    return uf.generator_loss(real=None if kind == "kl_wgan" else real, fake=fake, kind=kind, **options)


def test_every_kind_has_its_two_losses() -> None:
    kinds = {*FORMULAS, *COUPLED}
    assert kinds == set(_DISCRIMINATOR)
    assert {k for k in _GENERATOR if k not in ("non_saturating", "saturating")} == kinds - {"logistic"}


@pytest.mark.parametrize("divergence", CONJUGATES)
def test_fgan_attains_its_divergence(divergence: str, device: torch.device) -> None:
    """At the best discriminator, T = f'(p/q), minus the loss is the f-divergence itself; elsewhere it is less."""
    p, q = (torch.tensor(x, dtype=torch.float64, device=device) for x in ([1.0, 2, 3, 10], [4.0, 4, 4, 4]))
    u = p / q
    f, best = {
        "kl": (u * u.log(), 1 + u.log()),
        "reverse_kl": (-u.log(), -u.log()),
        "pearson": ((u - 1).square(), 2 * (u - 1)),
        "neyman": ((1 - u).square() / u, -2 * u.log()),
        "hellinger": ((u.sqrt() - 1).square(), -0.5 * u.log()),
        "js": (u * u.log() - (u + 1) * ((u + 1) / 2).log(), u.log()),
    }[divergence]
    expected = (q / 16 * f).sum()

    def bound(logits: Tensor) -> Tensor:
        real, fake = (logits.repeat_interleave(n.long()) for n in (p, q))
        return -uf.discriminator_loss(real=real, fake=fake, kind=f"fgan_{divergence}")

    assert_close(bound(best), expected, 1e-12)
    for offset in (0.1, -0.1):
        assert bound(best + offset) < expected and bound(best * (1 + offset)) < expected
    assert_close(
        uf.generator_loss(fake=best.repeat_interleave(q.long()), kind=f"fgan_{divergence}"),
        bound(best) - (p / 16 * ACTIVATIONS[divergence](best)).sum(),
        1e-12,
    )


def test_density_ratios_at_the_best_discriminator(device: torch.device) -> None:
    p, q = (torch.tensor(x, dtype=torch.float64, device=device) for x in ([1.0, 2, 3, 10], [4.0, 4, 4, 4]))
    best, middle = (p / q).log(), (p + q) / 2
    of_p, of_q = (best.repeat_interleave(n.long()) for n in (p, q))
    assert_close(uf.density_ratio_kl(of_p), (p / 16 * (p / q).log()).sum(), 1e-13)
    assert_close(uf.density_ratio_kl(-of_q, reduction="sum"), (q * (q / p).log()).sum(), 1e-13)
    assert_close(uf.density_ratio_kl(of_p, reduction="none"), of_p, 1e-15)
    jsd = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 32
    assert_close(uf.density_ratio_js(real=of_p, fake=of_q), jsd, 1e-13)
    assert_close(uf.density_ratio_js(real=[of_p, of_p], fake=[of_q, of_q]), 2 * jsd, 1e-13)
    assert uf.density_ratio_js(real=of_p.half(), fake=of_q.half()).dtype == torch.float32
    apart = torch.full((4,), 1e4, device=device)
    assert_close(uf.density_ratio_js(real=apart, fake=-apart), torch.tensor(math.log(2)), 1e-6)
    assert (uf.density_ratio_js(real=apart * 0, fake=apart * 0) == 0).all()


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("kind", COUPLED)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_coupled_rows_add_up(kind: str, generator: bool, reduction: str, device: torch.device) -> None:
    """ "none" is a composition of its own: value and gradients of its sum are those of the kernel."""
    reals, fakes = ([torch.randn(n, 3, dtype=torch.float64, device=device) for n in (4, 7)] for _ in range(2))
    tensors = [x.requires_grad_() for x in (reals if not generator or kind != "kl_wgan" else []) + fakes]
    got = by_kind(kind, reals, fakes, generator=generator, reduction=reduction, scale=0.7)
    rows = by_kind(kind, reals, fakes, generator=generator, reduction="none", scale=0.7)
    assert [r.shape for r in rows] == [f.shape for f in fakes]
    expected = sum(getattr(r, reduction)() for r in rows)
    assert_close(got, expected, 1e-12)
    for a, b in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(expected, tensors), strict=True):
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("kind", ["relativistic", *RELATIVISTIC])
def test_relativistic_losses_know_differences_only(kind: str, generator: bool, device: torch.device) -> None:
    """A shift of both sides changes nothing, so gradients cancel: they flow through the means as well."""
    real, fake = (torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    loss = by_kind(kind, real, fake, generator=generator)
    assert_close(by_kind(kind, real + 3, fake + 3, generator=generator), loss, 1e-12)
    gradients = torch.autograd.grad(loss, (real, fake))
    assert gradients[0].abs().max() > 1e-3
    assert abs(gradients[0].sum() + gradients[1].sum()) < 1e-12
    exchanged = by_kind(kind, fake, real, generator=not generator)
    assert_close(loss, exchanged, 1e-12)


def test_relativistic_average_against_tf_gan(device: torch.device) -> None:
    """TF-GAN adds the sides, without 1/2: `scale=2`."""
    real, fake = torch.randn(7, dtype=torch.float64, device=device), torch.randn(3, dtype=torch.float64, device=device)

    def cross_entropy(x: Tensor, label: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, torch.full_like(x, label))

    def contrast(a: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(a - b.mean(), 1.0) + cross_entropy(b - a.mean(), 0.0)

    options = {"real": real, "fake": fake, "kind": "relativistic_average", "scale": 2.0}
    assert_close(uf.discriminator_loss(**options), contrast(real, fake), 1e-13)
    assert_close(uf.generator_loss(**options), contrast(fake, real), 1e-13)


@pytest.mark.parametrize("kind", COUPLED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_statistics_of_coupled_kinds(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    reals, fakes = ([torch.randn(n, 40, device=device).to(dtype) + 0.3 for n in (2, 300)] for _ in range(2))
    loss, stats = uf.discriminator_loss(real=reals, fake=fakes, kind=kind, return_stats=True, scale=2.0)
    assert_close(loss, uf.discriminator_loss(real=reals, fake=fakes, kind=kind, scale=2.0), 1e-6)
    for i, (r, f) in enumerate(zip(reals, fakes, strict=True)):
        r, f = r.double(), f.double()
        x, y = (
            (r, f) if kind == "kl_wgan" else (r - f, f - r) if kind == "relativistic" else (r - f.mean(), f - r.mean())
        )
        expected = uf.DiscriminatorStats(
            losses=uf.discriminator_loss(real=r, fake=f, kind=kind),
            real_accuracy=(x > 0).double().mean(),
            fake_accuracy=(y < 0).double().mean(),
            real_mean_logit=r.mean(),
            fake_mean_logit=f.mean(),
            real_mean_probability=x.sigmoid().mean(),
            fake_mean_probability=y.sigmoid().mean(),
        )
        for name, got, e in zip(stats._fields, stats, expected, strict=True):
            assert_close(got[i], e, 1e-12 if dtype == torch.float64 else 1e-5, 1e-6, what=name)


def test_kl_wgan_ratios_are_detached(device: torch.device) -> None:
    """f-wgan's code lets gradients through its ratios; here r is a constant of mean 1."""
    fake = torch.randn(50, dtype=torch.float64, device=device, requires_grad=True)
    ratio = torch.softmax(fake.detach(), 0) * 50
    assert_close(gradient(uf.generator_loss(fake=fake, kind="kl_wgan"), fake), -ratio / 50, 1e-12)
    expected = torch.where(1 + ratio * fake.detach() > 0, ratio / 50, 0.0)
    loss = uf.discriminator_loss(real=fake.detach(), fake=fake, kind="kl_wgan")
    assert_close(gradient(loss, fake), expected, 1e-12)
    (first,) = torch.autograd.grad(uf.generator_loss(fake=fake, kind="kl_wgan") * fake.sum(), fake, create_graph=True)
    assert torch.autograd.grad(first.sum(), fake)[0].isfinite().all()
    far = torch.tensor([-INF, 1.0, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    loss = uf.generator_loss(fake=far, kind="kl_wgan", reduction="sum")
    # r has mean 1 over all three logits
    assert_close(loss, 1.5 * uf.generator_loss(fake=far[1:], kind="kl_wgan", reduction="sum"), 1e-12)
    assert gradient(loss, far)[0] == 0
    nothing = torch.full((3,), -INF, device=device, requires_grad=True)
    loss = uf.generator_loss(fake=nothing, kind="kl_wgan")
    assert loss == 0 and (gradient(loss, nothing) == 0).all()


@pytest.mark.parametrize("kind", [k for k in (*FORMULAS, *COUPLED) if not k.startswith("fgan") or k == "fgan_js"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_kind_with_logits_of_ten_thousand(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    real, fake = (
        torch.tensor(v, dtype=dtype, device=device, requires_grad=True) for v in ([1e4, -1e4, 0], [-1e4, 9e3, 1])
    )
    for generator in (False, True):
        if generator and kind in ("logistic", *FORMULAS):
            continue
        loss = by_kind(kind, real, fake, generator=generator)
        wide = [x.detach().double().requires_grad_() for x in (real, fake)]
        expected = by_kind(kind, *wide, generator=generator)
        assert_close(loss, expected, 1e-6)
        found, wanted = (
            torch.autograd.grad(x, t, allow_unused=True) for x, t in ((loss, (real, fake)), (expected, wide))
        )
        for got, e in zip(found, wanted, strict=True):
            assert (got is None) == (e is None)
            if got is not None:
                assert got.isfinite().all()
                assert_close(got, e, 1e-5, 1e-7)


@pytest.mark.parametrize("kind", [k for k in FORMULAS if k.startswith("fgan")])
def test_fgan_overflows_where_its_result_does_and_no_sooner(kind: str, device: torch.device) -> None:
    """Composed, T and f*(T) meet: sqrt(1 - (1 - e^v)) overflows at half the logit where e^(v/2) does."""
    x = torch.tensor([-1e4, -200.0, -80.0, -1e-4, 0.0, 1e-4, 80.0, 170.0, 1e4], dtype=torch.float32, device=device)
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    for call in (
        lambda y: uf.generator_loss(fake=y, kind=kind, reduction="none"),
        lambda y: uf.discriminator_loss(real=y, fake=y.detach() * 0 + 1, kind=kind, reduction="none"),
    ):
        got, expected = call(x), call(wide)
        pairs = ((got, expected), (gradient(got.sum(), x), gradient(expected.sum(), wide)))
        for a, b in pairs:
            assert not a.isnan().any()
            fits = (b.abs() < torch.finfo(torch.float32).max) & (b.abs() > 1e-30)
            torch.testing.assert_close(a[fits].double(), b[fits], rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("kind", [*RELATIVISTIC, "kl_wgan"])
def test_a_nan_stays_in_its_scale(kind: str, device: torch.device) -> None:
    """Of a list of discriminators only the one that returned a NaN gets NaN gradients, on both its sides."""
    reals, fakes = ([torch.randn(5, device=device) for _ in range(2)] for _ in range(2))
    fakes[0][2] = math.nan
    tensors = [x.requires_grad_() for x in (*reals, *fakes)]
    loss, stats = uf.discriminator_loss(real=reals, fake=fakes, kind=kind, return_stats=True)
    assert loss.isnan() and stats.losses[0].isnan() and stats.losses[1].isfinite()
    found = torch.autograd.grad(loss, tensors)
    assert found[2].isnan().any() or kind == "relativistic_average_hinge"  # relu's slope at a NaN is 1 in PyTorch
    assert found[1].isfinite().all() and found[3].isfinite().all()
    alone = uf.discriminator_loss(real=reals[1], fake=fakes[1], kind=kind)
    for got, expected in zip(found[1::2], torch.autograd.grad(alone, (reals[1], fakes[1])), strict=True):
        assert_close(got, expected, 1e-6)


def test_coupled_lists_of_many(device: torch.device) -> None:
    """More tensors than a launch may hold by value: each finds its counterpart."""
    reals, fakes = (
        [torch.randn(2, n + 3, dtype=torch.float64, device=device)[:, :n].requires_grad_() for n in range(1, 41)]
        for _ in range(2)
    )
    for kind in ("relativistic_average", "kl_wgan"):
        got = uf.discriminator_loss(real=reals, fake=fakes, kind=kind)
        expected = sum(uf.discriminator_loss(real=r, fake=f, kind=kind) for r, f in zip(reals, fakes, strict=True))
        assert_close(got, expected, 1e-12)
        found, wanted = (torch.autograd.grad(x, [*reals, *fakes]) for x in (got, expected))
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b, 1e-11)
    assert_close(
        uf.discriminator_loss(real=reals[:5], fake=fakes[:5], kind="relativistic_average"),
        sum(relativistic_average(r, f) for r, f in zip(reals[:5], fakes[:5], strict=True)),
        1e-12,
    )


# ---- groups of IWGAN -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
def test_labels_of_any_integer_type(dtype: torch.dtype, logits: Tensor) -> None:
    groups = (torch.arange(16, device=logits.device) % 2).to(dtype)
    expected = (iwgan(logits[::2], 0) + iwgan(logits[1::2], 0)) / 2
    got = iw_loss(fake=logits, groups=groups)
    assert_close(got, expected, 1e-12)
    assert_close(gradient(got, logits), gradient(expected, logits), 1e-12)


@pytest.mark.parametrize("n,classes", [(3000, 7), (3000, 2999), (20000, 50)])
def test_groups_of_many_samples(n: int, classes: int, device: torch.device) -> None:
    """Labels far apart, which collide in any table of their low bits."""
    labels = (torch.arange(n, device=device) * 7919 % classes - classes // 2) * 2**48
    wide = (3 * torch.randn(n, dtype=torch.float64, device=device)).requires_grad_()
    x = wide.detach().float().requires_grad_()
    with torch.no_grad():
        wide.copy_(x)
    number = labels.unique(return_inverse=True)[1]
    total = torch.zeros(classes, dtype=torch.float64, device=device).scatter_add(0, number, wide.detach().exp())
    expected = (wide.detach().exp() / total[number] * softplus(-wide)).sum() / classes
    got = iw_loss(fake=x, groups=labels)
    assert_close(got, expected, 1e-6)
    assert_close(gradient(got, x), gradient(expected, wide), 1e-5, 1e-12)


def test_groups_that_are_not_finite(device: torch.device) -> None:
    """A group of -inf has weights 0 and no gradient; a NaN stays in its group."""
    x = torch.tensor([-INF, 0.5, -INF, math.nan, 1.0, -2.0], dtype=torch.float64, device=device, requires_grad=True)
    groups = torch.tensor([1, 2, 1, 3, 2, 3], device=device)
    for detach in (True, False):
        fine = iw_loss(fake=x[:3], groups=groups[:3], detach=detach, reduction="sum")
        assert_close(fine, softplus(-x[1]), 1e-12)
        loss = iw_loss(fake=x, groups=groups, detach=detach)
        assert loss.isnan()
        g = gradient(loss, x)
        clean = gradient(iwgan(x[[1, 4]], 0, 1.0, detach) / 3, x)
        assert (g[[0, 2]] == 0).all() and g[[3, 5]].isnan().any()
        assert_close(g[[1, 4]], clean[[1, 4]], 1e-12)
    assert iw_loss(fake=x[:0], groups=groups[:0]).isnan()
    assert iw_loss(fake=x[:0], groups=groups[:0], reduction="sum") == 0


# ---- penalties -------------------------------------------------------------------------------------------------------


def network(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Softplus(), nn.Linear(8, 2)).to(device, torch.float64)


def test_r1_of_a_linear_discriminator(device: torch.device) -> None:
    w = torch.randn(6, dtype=torch.float64, device=device, requires_grad=True)
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    logits = x.flatten(1) @ w
    penalty = uf.r1_penalty(logits=logits, inputs=x, gamma=3.0)
    assert_close(penalty, 1.5 * w.square().sum(), 1e-13)
    assert_close(gradient(penalty, w), 3.0 * w, 1e-13)
    rows = uf.r1_penalty(logits=x.flatten(1) @ w, inputs=x, gamma=3.0, reduction="none")
    assert_close(rows, penalty.expand(5), 1e-13)
    assert_close(uf.r1_penalty(logits=x.flatten(1) @ w, inputs=x, gamma=3.0, reduction="sum"), 5 * penalty, 1e-13)


def test_r1_is_stylegan_s(device: torch.device) -> None:
    net = network(device)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(outputs=[net(x).sum()], inputs=[x], create_graph=True)
    expected = (g.square().sum([1, 2, 3]) * (10 / 2)).mean()
    got = uf.r1_penalty(logits=net(x), inputs=x)
    assert_close(got, expected, 1e-13)
    for a, b in zip(
        torch.autograd.grad(got, net.parameters(), allow_unused=True),
        torch.autograd.grad(expected, net.parameters(), allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, 1e-12)


def by_hand(net: Any, real: Tensor, fake: Tensor, share: Tensor, target: float = 1.0) -> Tensor:
    penalties = []
    for r, f, a in zip(real, fake, share, strict=True):
        x = (a * r + (1 - a) * f).unsqueeze(0).requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        penalties.append((torch.sqrt((g * g).sum() + 1e-10) - target) ** 2)
    return torch.stack(penalties)


@pytest.mark.parametrize("target", [1.0, 0.0])
def test_gradient_penalty(target: float, device: torch.device) -> None:
    net = network(device)
    real, fake = (torch.randn(5, 3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    share = torch.rand(5, 1, 1, dtype=torch.float64, device=device, generator=torch.Generator(device).manual_seed(3))
    expected = by_hand(net, real.detach(), fake.detach(), share[:, 0, 0], target)
    for reduction, of in (("mean", 7 * expected.mean()), ("sum", 7 * expected.sum()), ("none", 7 * expected)):
        generator = torch.Generator(device).manual_seed(3)
        got = uf.gradient_penalty(
            discriminator=net, real=real, fake=fake, weight=7.0, target=target, reduction=reduction, generator=generator
        )
        assert_close(got, of, 1e-11)
    weights = [p for n, p in net.named_parameters() if "3.bias" not in n]
    found, wanted = (torch.autograd.grad(x.sum(), weights) for x in (got, 7 * expected))
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, 1e-10)
    assert real.grad is None and fake.grad is None


def test_gradient_norm_is_per_sample(device: torch.device) -> None:
    """torchgan takes one norm over the whole batch: sqrt(N) times too large, and blind to single samples."""
    x = torch.randn(16, 4, dtype=torch.float64, device=device)
    unit = torch.full((4,), 0.5, dtype=torch.float64, device=device)  # a critic of norm 1
    penalty = uf.gradient_penalty(discriminator=lambda v: v @ unit, real=x, fake=x + 1)
    whole = 10 * (unit.expand(16, 4).norm(2) - 1) ** 2
    assert penalty.abs() < 1e-15 and whole > 80
    mixed = uf.gradient_penalty(discriminator=lambda v: (v @ unit) * torch.arange(16, device=device), real=x, fake=x)
    assert_close(mixed, 10 * (torch.arange(16.0, dtype=torch.float64) - 1).square().mean(), 1e-6)


def test_gradient_penalty_has_a_derivative_at_zero(device: torch.device) -> None:
    """sqrt has none: a critic that is flat somewhere turned every weight into NaN."""
    w = torch.zeros(4, dtype=torch.float64, device=device, requires_grad=True)
    penalty = uf.gradient_penalty(
        discriminator=lambda v: v @ w,
        real=torch.ones(3, 4, device=device).double(),
        fake=torch.zeros(3, 4, device=device).double(),
    )
    assert_close(penalty, torch.tensor(10 * (1 - 1e-5) ** 2, dtype=torch.float64), 1e-12)
    assert (gradient(penalty, w) == 0).all()
    half = uf.gradient_penalty(
        discriminator=lambda v: (300 * v).sum(1),
        real=torch.ones(2, 4, device=device).half(),
        fake=torch.zeros(2, 4, device=device).half(),
        target=0.0,
        weight=1.0,
    )
    assert half.dtype == torch.float32
    assert_close(half, torch.tensor(360000.0), 1e-3)  # the squares are beyond fp16


def test_errors_of_penalties(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    leaf = x.clone().requires_grad_()
    r1, gp = uf.r1_penalty, uf.gradient_penalty
    assert_refused(lambda: r1(logits=x.sum(1), inputs=x), ValueError, "inputs: expected logits .* got no graph")
    assert_refused(lambda: r1(logits=leaf.sum(1), inputs=leaf.clone()), ValueError, "inputs: .* got others")
    assert_refused(lambda: r1(logits=leaf.sum(1), inputs=1.0), TypeError, "inputs: expected a torch.Tensor, got float")
    assert_refused(lambda: r1(logits=x.long(), inputs=leaf), TypeError, "logits: expected a floating-point tensor")
    assert_refused(lambda: r1(logits=leaf.sum(1), inputs=leaf, gamma=-1.0), ValueError, "gamma: got -1.0")
    assert_refused(lambda: r1(logits=leaf.sum(1), inputs=leaf, reduction="avg"), ValueError, "reduction: got 'avg'")
    scalar = torch.ones((), device=device, requires_grad=True)
    assert_refused(lambda: r1(logits=scalar * 2, inputs=scalar), ValueError, "inputs: got a tensor without dimensions")
    assert_refused(
        lambda: gp(discriminator=torch.sin, real=x, fake=x[:2]), ValueError, r"got real \(3, 4\), fake \(2, 4\)"
    )
    assert_refused(
        lambda: gp(discriminator=torch.sin, real=x, fake=x.int()), TypeError, "fake: expected a floating-point"
    )
    assert_refused(
        lambda: gp(discriminator=lambda v: 1.0, real=x, fake=x), TypeError, r"discriminator\(x\): expected a"
    )
    assert_refused(lambda: gp(discriminator=lambda v: x, real=x, fake=x), ValueError, "got no graph")
    assert_refused(lambda: gp(discriminator=torch.sin, real=x, fake=x, weight=-1), ValueError, "weight: got -1")
    elsewhere = torch.randn(3, 4, device="meta")
    assert_refused(lambda: gp(discriminator=torch.sin, real=x, fake=elsewhere), ValueError, "fake: got device meta")


# ---- log-ratios ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reversed", [False, True])
def test_log_discriminator_and_log_ratio(reversed: bool, logits: Tensor) -> None:
    labels = torch.arange(16, device=logits.device) % 2
    for y in (0, 1, False, True):
        probability = torch.sigmoid(logits)
        of_one = (y == 1) != reversed
        expected = probability.log() if of_one else (1 - probability).log()
        got = uf.log_discriminator(logits, y, reversed=reversed)
        assert_close(got, expected, 1e-12)
        assert (got <= 0).all()
        assert_close(gradient(got.sum(), logits), gradient(expected.sum(), logits), 1e-12)
        ratio = uf.log_ratio(logits, y=y, reversed=reversed)
        assert_close(ratio, logits if of_one else -logits, 1e-15)
    for kind in (torch.int64, torch.bool, torch.float32, torch.uint8):
        both = uf.log_discriminator(logits, labels.to(kind), reversed=reversed)
        ones = uf.log_discriminator(logits, 1, reversed=reversed)
        zeros = uf.log_discriminator(logits, 0, reversed=reversed)
        assert_close(both, torch.where(labels == 1, ones, zeros), 1e-14)
        ratios = uf.log_ratio(logits, y=labels.to(kind), reversed=reversed)
        assert_close(ratios, torch.where((labels == 1) != reversed, logits, -logits), 1e-15)
    soft = uf.log_discriminator(logits, torch.full_like(logits, 0.25), reversed=reversed)
    p = 0.75 if reversed else 0.25
    assert_close(soft, p * probability.log() + (1 - p) * (1 - probability).log(), 1e-12)


def test_soft_labels_of_16_bits_reversed(device: torch.device) -> None:
    """A label near 0, beside which 1 - y is 1 in 16 bits."""
    y = torch.tensor([1e-4, 1e-3], dtype=torch.bfloat16, device=device)
    x = torch.tensor([30.0, 20.0], dtype=torch.bfloat16, device=device)
    expected = uf.log_discriminator(x.double(), 1 - y.double())
    assert_close(uf.log_discriminator(x, y, reversed=True), expected, 1e-2)


def test_labels_broadcast(device: torch.device) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    y = torch.tensor([0, 1, 1, 0], device=device).unsqueeze(1)
    sign = (2 * y - 1).double()
    assert_close(uf.log_ratio(x, y=y), sign * x, 1e-15)
    assert_close(uf.log_discriminator(x, y), -softplus(-sign * x), 1e-13)
    assert uf.log_discriminator(x[:1], y).shape == (4, 3)


def test_log_ratio_of_classes(device: torch.device) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    log_q = torch.log_softmax(x, -1)
    for a, b in ((0, 3), (-1, 0), (2, 2), (-2, -5)):
        got = uf.log_ratio(x, y=(a, b))
        assert_close(got, log_q[:, a] - log_q[:, b], 1e-12, 1e-15)
        assert_close(uf.log_ratio(x, y=(a, b), reversed=True), -got, 1e-15)
        slope = torch.zeros(5, dtype=torch.float64, device=device)
        slope[a] += 1
        slope[b] -= 1
        assert_close(gradient(got.sum(), x), slope.expand(4, 5), 1e-15)
    assert uf.log_ratio(x.half(), y=(0, 1)).dtype == torch.float32


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_elementwise_results_are_fp32(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(5, device=device).to(dtype)
    labels = torch.ones(5, device=device)
    for result in (
        uf.log_ratio(x),
        uf.log_ratio(x, y=labels),
        uf.log_discriminator(x, 0),
        uf.log_discriminator(x, labels),
        uf.generator_loss(fake=x, reduction="none"),
        uf.discriminator_loss(real=x, fake=x, reduction="none"),
    ):
        assert result.dtype == torch.float32


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_errors_of_discriminator_and_generator_loss(device: torch.device) -> None:
    x, other = torch.randn(3, device=device), torch.randn(4, device=device)
    d, g = uf.discriminator_loss, uf.generator_loss
    assert_refused(
        lambda: d(real=x, fake=x, kind="gan"), ValueError, "kind: got 'gan', expected one of 'logistic', 'hinge'"
    )
    assert_refused(
        lambda: g(fake=x, kind="gan"), ValueError, "kind: got 'gan', expected one of 'non_saturating', 'saturating'"
    )
    assert_refused(
        lambda: d(real=x, fake=x, reduction="avg"), ValueError, "reduction: got 'avg', expected one of 'mean'"
    )
    assert_refused(lambda: g(fake=x, reduction=None), ValueError, "reduction: got None")
    assert_refused(lambda: d(real=x, fake=x, scale="1"), TypeError, "scale: expected a number, got str")
    assert_refused(lambda: g(fake=x, scale=math.nan), ValueError, "scale: got nan")
    assert_refused(lambda: g(fake=x, scale=True), TypeError, "scale: expected a number, got bool")
    assert_refused(lambda: d(real=[], fake=[]), ValueError, "real: got an empty list, expected at least one")
    assert_refused(lambda: g(fake=[]), ValueError, "fake: got an empty list")
    assert_refused(
        lambda: d(real=[x], fake=[x, x]), ValueError, "got lists of 1 and 2 tensors, expected as many of each"
    )
    assert_refused(lambda: d(real=x, fake=[x, x]), ValueError, "got lists of 1 and 2 tensors")
    assert_refused(
        lambda: d(real=x.int(), fake=x), TypeError, "real: expected a floating-point tensor, got torch.int32"
    )
    assert_refused(lambda: d(real=[x, 1.0], fake=[x, x]), TypeError, r"real\[1\]: expected a torch.Tensor, got float")
    assert_refused(
        lambda: d(real=x, fake=[x.bool()]), TypeError, r"fake\[0\]: expected a floating-point tensor, got torch.bool"
    )
    assert_refused(lambda: g(fake=x, real=x), ValueError, "real: got logits, expected None for kind 'non_saturating'")
    assert_refused(lambda: g(fake=x, real=x, kind="kl_wgan"), ValueError, "real: got logits, expected None")
    for kind in ("relativistic", "relativistic_average_hinge"):
        assert_refused(
            lambda kind=kind: g(fake=x, kind=kind), ValueError, f"real: got None, expected logits for kind '{kind}'"
        )
    assert_refused(
        lambda: d(real=x, fake=other, kind="relativistic"),
        ValueError,
        r'kind "relativistic": expected equal shapes, got real \(3,\), fake \(4,\)',
    )
    assert_refused(
        lambda: g(real=x, fake=other, kind="relativistic_average", reduction="none"),
        ValueError,
        r'reduction "none": expected equal shapes, got real \(3,\), fake \(4,\)',
    )
    assert_refused(lambda: uf.density_ratio_kl(x.int()), TypeError, "logits: expected a floating-point tensor")
    assert_refused(lambda: uf.density_ratio_kl(x, reduction="batch"), ValueError, "reduction: got 'batch'")
    assert_refused(lambda: uf.density_ratio_js(real=[x], fake=x[None, 0].int()), TypeError, "fake: expected a floating")
    assert_refused(
        lambda: d(real=x, fake=other, reduction="none"),
        ValueError,
        r"expected equal shapes, got real \(3,\), fake \(4,\)",
    )
    assert_refused(
        lambda: d(real=x, fake=x, reduction="none", return_stats=True),
        ValueError,
        'return_stats: expected reduction "mean"',
    )


def test_tensors_on_two_devices_are_refused(device: torch.device) -> None:
    x, elsewhere = torch.randn(3, device=device), torch.randn(3, device="meta")
    assert_refused(
        lambda: uf.discriminator_loss(real=[x, elsewhere], fake=[x, x]),
        ValueError,
        r"real\[1\]: got device meta, expected",
    )
    assert_refused(lambda: uf.log_discriminator(x, elsewhere), ValueError, "y: got device meta, expected .* as logits")
    assert_refused(lambda: uf.log_ratio(x, y=elsewhere), ValueError, "y: got device meta, expected .* as logits")
    assert_refused(
        lambda: iw_loss(fake=x, groups=torch.zeros(3, dtype=torch.int64, device="meta")),
        ValueError,
        "groups: got device meta, expected",
    )
    assert_refused(
        lambda: uf.discriminator_loss(real=x, fake=elsewhere), ValueError, "fake: got device meta, expected .* as real"
    )


def test_errors_of_iwgan(device: torch.device) -> None:
    x, groups = torch.randn(3, 4, device=device), torch.zeros(12, dtype=torch.int64, device=device)
    assert_refused(lambda: iw_loss(fake=1.0), TypeError, "fake: expected a torch.Tensor, got float")
    assert_refused(lambda: iw_loss(fake=x.long()), TypeError, "fake: expected a floating-point tensor, got torch.int64")
    assert_refused(lambda: iw_loss(fake=x, dim=2), ValueError, r"dim: got 2, expected a dimension of .* \(3, 4\)")
    assert_refused(lambda: iw_loss(fake=x, dim="1"), TypeError, "dim: expected an int, got str")
    assert_refused(
        lambda: iw_loss(fake=x[:, :0], dim=1), ValueError, r"fake: got shape \(3, 0\), expected at least one"
    )
    assert_refused(lambda: iw_loss(fake=x, temperature=0.0), ValueError, "temperature: got 0.0, expected a number > 0")
    assert_refused(lambda: iw_loss(fake=x, temperature=x), ValueError, r"temperature: got a tensor of shape \(3, 4\)")
    assert_refused(lambda: iw_loss(fake=x, reduction="batch"), ValueError, "reduction: got 'batch'")
    assert_refused(
        lambda: iw_loss(fake=x, groups=groups, dim=1), ValueError, "groups: got dim as well, expected one of the two"
    )
    assert_refused(
        lambda: iw_loss(fake=x, groups=groups[:3]), ValueError, r"groups: got shape \(3,\), expected \(12,\)"
    )
    assert_refused(
        lambda: iw_loss(fake=x, groups=groups.float()), TypeError, "groups: expected an integer .* got torch.float32"
    )
    assert_refused(lambda: iw_loss(fake=x, groups=[0] * 12), TypeError, "groups: expected an integer .* got list")
    assert_refused(lambda: iw_loss(fake=x, groups=groups, reduction="none"), ValueError, 'reduction: got "none"')


def test_errors_of_labels(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    for f in (uf.log_discriminator, lambda x, y: uf.log_ratio(x, y=y)):
        assert_refused(lambda f=f: f(x, 2), ValueError, "y: got 2, expected 0, 1 or a tensor of labels")
        assert_refused(lambda f=f: f(x, -1), ValueError, "y: got -1")
        assert_refused(lambda f=f: f(x.long(), 1), TypeError, "logits: expected a floating-point tensor")
        assert_refused(
            lambda f=f: f(x, torch.ones(5, device=device)),
            ValueError,
            r"y: got shape \(5,\) beside logits \(3, 4\), expected as many dimensions",
        )
    assert_refused(
        lambda: uf.log_ratio(x, y=(0, 4)), ValueError, r"y: got class 4, expected one of the 4 of logits \(3, 4\)"
    )
    assert_refused(lambda: uf.log_ratio(x, y=(0, 1, 2)), ValueError, r"y: got \(0, 1, 2\) .* expected two classes")
    assert_refused(lambda: uf.log_ratio(x, y=(0, 1.0)), ValueError, "y: got class 1.0")
    assert_refused(lambda: uf.log_ratio(x[0, 0], y=(0, 1)), ValueError, r"expected two classes of the last dim")
