"""What a weight, a label or a gradient of 0 excludes is not read: NaN there reaches neither value nor gradient."""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import unigen_fast as uf
from unigen_fast import _ops

NAN, INF = math.nan, math.inf
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # at a thousandth of the speed
POISONS = (NAN,) if INTERPRETED else (NAN, INF, -INF)
# rows, numbers of each: lanes along columns, across and along rows, several stretches of a row
SHAPES = ((5, 12),) if INTERPRETED else ((6, 5), (40, 3), (5, 70), (3, 3000))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def positive(*shape: int) -> Tensor:
    return normal(*shape).exp()


def at_rows(t: Tensor, value: float, rows: Sequence[int]) -> Tensor:
    t = t.clone()
    t[list(rows)] = value
    return t


# name: (loss of the inputs and its options, inputs of so many rows and numbers)
Weighted = Callable[..., Tensor]
Inputs = Callable[[int, int], list[Tensor]]


def gaussians(count: int) -> Inputs:
    return lambda rows, n: [normal(rows, n) * (1 + 0.1 * k) for k in range(count)]


def classes(rows: int, n: int) -> list[Tensor]:
    return [normal(rows, 2, n), normal(rows, 2, n) / 2]


def elbo(likelihood: str) -> Weighted:
    def loss(decoder: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, **given: Any) -> Tensor:
        data = x.detach().sigmoid()
        return uf.elbo_loss(decoder, data, mean, logvar, likelihood=likelihood, **given).loss

    return loss


def shared_elbo(decoder: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, **given: Any) -> Tensor:
    """One log-variance for all rows, whose gradient is summed in the kernel."""
    spread = (decoder.nan_to_num(0, 0, 0).sum() * 0).expand(decoder.size(1))
    return uf.elbo_loss((decoder, spread), x.detach(), mean, logvar, likelihood="gaussian", **given).loss


WEIGHTED: dict[str, tuple[Weighted, Inputs]] = {
    "gaussian_kl": (uf.gaussian_kl, gaussians(2)),
    "gaussian_kl[prior]": (uf.gaussian_kl, gaussians(4)),
    "gaussian_kl[unit]": (lambda m, p, **g: uf.gaussian_kl(m, m.new_zeros(()), p, **g), gaussians(2)),
    "gaussian_kl[free bits]": (lambda m, v, **g: uf.gaussian_kl(m, v, free_bits=0.5, **g), gaussians(2)),
    "gaussian_kl[std]": (
        lambda m, s, **g: uf.gaussian_kl(m, s, spread="std", clamp_logvar=(-9, 9), **g),
        lambda rows, n: [normal(rows, n), positive(rows, n)],
    ),
    "gaussian_kl_monte_carlo": (uf.gaussian_kl_monte_carlo, gaussians(5)),
    "gaussian_kl_monte_carlo[no mean]": (
        lambda z, *rest, **g: uf.gaussian_kl_monte_carlo(z, None, *rest, **g),
        gaussians(4),
    ),
    "bernoulli_kl": (uf.bernoulli_kl, gaussians(2)),
    "bernoulli_kl[half]": (uf.bernoulli_kl, gaussians(1)),
    "categorical_kl": (lambda *x, **g: uf.categorical_kl(*x, event_ndims=1, **g), classes),
    "categorical_kl[unimix]": (lambda q, p, **g: uf.categorical_kl(q, p, event_ndims=1, unimix=0.01, **g), classes),
    "categorical_kl[uniform]": (
        lambda q, **g: uf.categorical_kl(q, event_ndims=1, **g),
        lambda rows, n: classes(rows, n)[:1],
    ),
    "elbo_loss": (elbo("bernoulli"), gaussians(4)),
    "elbo_loss[laplace]": (
        lambda d, x, m, v, **g: uf.elbo_loss((d, d * 0.5), x.detach(), m, v, likelihood="laplace", **g).loss,
        gaussians(4),
    ),
    "elbo_loss[shared]": (shared_elbo, gaussians(4)),
    "elbo_loss[composed]": (
        lambda d, x, m, v, **g: uf.elbo_loss(
            torch.stack([d, -d], -1), (x.detach() > 0).long(), m, v, likelihood="categorical", **g
        ).loss,
        gaussians(4),
    ),
}  # fmt: skip


def found(loss: Weighted, inputs: Sequence[Tensor], **given: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = loss(*leaves, **given)
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return value.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weight_of_0_excludes_its_row(name: str) -> None:
    loss, make = WEIGHTED[name]
    options = (("mean", False), ("none", False), ("sum", True))[: 2 if INTERPRETED else 3]
    for (rows, n), (reduction, learned) in itertools.product(SHAPES[:3], options):
        inputs, out = make(rows, n), (0, rows - 2)
        weights = at_rows(normal(rows).abs() + 0.5, 0.0, out).requires_grad_(learned)
        given = {"weights": weights, "reduction": reduction, "normalize_weights": reduction == "mean"}
        expected = found(loss, inputs, **given)
        for poison in POISONS:
            value, grads = found(loss, [at_rows(t, poison, out) for t in inputs], **given)
            torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=1e-6)
            for got, clean in zip(grads, expected[1], strict=True):
                torch.testing.assert_close(got, clean, rtol=1e-5, atol=1e-6)
                assert (got[list(out)] == 0).all()


@pytest.mark.parametrize("name", WEIGHTED)
def test_the_references_exclude_it_twice_differentiably(name: str) -> None:
    """Under `torch.func` transforms, and for second derivatives, the references are what runs."""
    loss, make = WEIGHTED[name]
    if name == "elbo_loss[composed]":  # of rows without weights
        return
    inputs, out = make(4, 3), (1,)
    weights = at_rows(torch.ones(4), 0.0, out)
    poisoned = [at_rows(t, NAN, out).requires_grad_() for t in inputs]
    value, _ = torch.func.vjp(lambda *x: loss(*x, weights=weights), *poisoned)
    assert value.isfinite()
    grads = torch.autograd.grad(loss(*poisoned, weights=weights), poisoned, create_graph=True, allow_unused=True)
    there = [g for g in grads if g is not None]
    second = torch.autograd.grad(sum(g.square().sum() for g in there), poisoned, allow_unused=True)
    for g in (*there, *(g for g in second if g is not None)):
        assert g.isfinite().all() and (g[1] == 0).all()


def test_weights_that_are_learned_have_a_gradient_at_0() -> None:
    mean, weights = normal(4, 3), torch.tensor([1.0, 0.0, 0.0, 2.0], requires_grad=True)
    mean[2] = NAN
    uf.gaussian_kl(mean, normal(4, 3), weights=weights, reduction="sum").backward()
    rows = uf.gaussian_kl(mean, normal(4, 3), reduction="none")
    torch.testing.assert_close(weights.grad, torch.where(rows.isnan(), 0.0, rows))


def test_a_gaussian_elbo_of_nothing_but_excluded_rows() -> None:
    x = torch.full((2, 3), NAN, requires_grad=True)
    bound = uf.elbo_loss(x, torch.zeros(2, 3), x, x, likelihood="gaussian", weights=torch.zeros(2))
    assert bound.loss == 0 and bound.kl.isnan().all()
    bound.loss.backward()
    assert (x.grad == 0).all()


# ---- gradients of 0 --------------------------------------------------------------------------------------------------


def rws(log_p: Tensor, log_q: Tensor) -> Tensor:
    theta, phi = uf.rws_losses(log_p, log_q, dim=1, reduction="none")
    return torch.stack([theta, phi], -1)


def labels(logits: Tensor) -> Tensor:
    return torch.arange(len(logits)).remainder(logits.size(-1))[:, None].expand(logits.shape[:-1])


def counts(rows: int, n: int) -> list[Tensor]:
    return [positive(rows, n), positive(rows, n) * 2, normal(rows, n)]


def bound(decoder: Tensor, z: Tensor, mean: Tensor, logvar: Tensor, **given: Any) -> Tensor:
    data = torch.full_like(mean, 0.5)
    found = uf.iwae_objective(decoder, data, z, mean, logvar, dim=1, likelihood="gaussian", **given)
    return found.loss if given else found.log_w


def samples(rows: int, n: int) -> list[Tensor]:
    return [normal(rows, 4, n), normal(rows, 4, n) * 0.5, normal(rows, n), normal(rows, n) * 0.2]


def correlation(z: Tensor) -> Tensor:
    others = normal(*z.shape) * 0.5
    return torch.stack(uf.total_correlation(z, others, others * 0.1, dataset_size=1000), -1)


# of rows, each from its own row of every input
ROWS: dict[str, tuple[Callable[..., Tensor], Inputs]] = {
    "gaussian_kl": (lambda *x: uf.gaussian_kl(*x, reduction="none"), gaussians(4)),
    "gaussian_kl[standard]": (lambda *x: uf.gaussian_kl(*x, reduction="none"), gaussians(2)),
    "gaussian_kl_monte_carlo": (lambda *x: uf.gaussian_kl_monte_carlo(*x, reduction="none"), gaussians(5)),
    "bernoulli_kl": (lambda *x: uf.bernoulli_kl(*x, reduction="none"), gaussians(2)),
    "categorical_kl": (lambda *x: uf.categorical_kl(*x, event_ndims=1, reduction="none"), classes),
    "categorical_kl[unimix]": (
        lambda *x: uf.categorical_kl(*x, event_ndims=1, unimix=0.01, reduction="none"),
        classes,
    ),
    "sample_gaussian": (lambda m, v: uf.sample_gaussian(m, v, num_samples=3).sum((0, 2)), gaussians(2)),
    "sample_gaussian_with_kl": (
        lambda m, v: sum(t.reshape(len(m), -1).sum(1) for t in uf.sample_gaussian_with_kl(m, v)),
        gaussians(2),
    ),
    "bernoulli_log_prob": (lambda a, x: uf.bernoulli_log_prob(a, x), gaussians(2)),
    "gaussian_log_prob": (uf.gaussian_log_prob, gaussians(3)),
    "laplace_log_prob": (uf.laplace_log_prob, gaussians(3)),
    "discretized_logistic_log_prob": (
        lambda x, m, s: uf.discretized_logistic_log_prob(x.detach(), m, s, bin_width=0.1), gaussians(3)),
    "negative_binomial_log_prob": (
        lambda mu, theta: uf.negative_binomial_log_prob(torch.ones_like(mu), mu, theta),
        lambda rows, n: counts(rows, n)[:2],
    ),
    "zero_inflated_negative_binomial_log_prob": (
        lambda mu, theta, gate: uf.zero_inflated_negative_binomial_log_prob(torch.zeros_like(mu), mu, theta, gate),
        counts,
    ),
    "categorical_log_prob": (
        lambda a: uf.categorical_log_prob(a, labels(a), event_ndims=1),
        lambda rows, n: classes(rows, n)[:1],
    ),
    "discretized_logistic_mixture_log_prob": (
        lambda p: uf.discretized_logistic_mixture_log_prob(p, torch.zeros(len(p), 2, 3), event_ndims=1),
        lambda rows, n: [normal(rows, 2, 20)],
    ),
    "discretized_logistic_mixture_log_prob[x]": (
        lambda p, x: uf.discretized_logistic_mixture_log_prob(p, x, event_ndims=1),
        lambda rows, n: [normal(rows, 2, 20), normal(rows, 2, 3).tanh()],
    ),
    "elbo_loss": (
        lambda d, x, m, v: uf.elbo_loss(d, x.detach().sigmoid(), m, v, reduction="none").loss, gaussians(4)),
    "elbo_loss[rows]": (
        lambda d, x, m, v: sum(uf.elbo_loss(d, x.detach().sigmoid(), m, v, reduction="none")[1:]), gaussians(4)),
    "iwae_objective": (lambda *x: bound(*x, reduction="none"), samples),
    "iwae_objective[cubo]": (lambda *x: bound(*x, estimator="cubo", reduction="none"), samples),
    "iwae_objective[tvo]": (lambda *x: bound(*x, estimator="tvo", partition=[0, 0.3, 1], reduction="none"), samples),
    "iwae_objective[log_w]": (bound, samples),
    "log_mean_exp": (lambda x: uf.log_mean_exp(x, dim=1), gaussians(1)),
    "importance_weights": (lambda x: uf.importance_weights(x, dim=1, detach=False), gaussians(1)),
    "importance_weighted_sum": (lambda x, y: uf.importance_weighted_sum(x, y, dim=1, detach=False), gaussians(2)),
    "iwae_loss": (lambda x: uf.iwae_loss(x, dim=1, reduction="none"), gaussians(1)),
    "renyi_loss": (lambda x: uf.renyi_loss(x, dim=1, alpha=0.5, reduction="none"), gaussians(1)),
    "ciwae_loss": (lambda x: uf.ciwae_loss(x, dim=1, beta=0.5, reduction="none"), gaussians(1)),
    "tvo_loss": (lambda x: uf.tvo_loss(x, dim=1, partition=[0, 0.2, 1], reduction="none"), gaussians(1)),
    "tvo_loss[log_q]": (
        lambda x, q: uf.tvo_loss(x, dim=1, partition=[0, 0.2, 1], log_q=q, reduction="none"), gaussians(2)),
    "vimco_loss": (lambda x, q: uf.vimco_loss(x, q, dim=1, reduction="none"), gaussians(2)),
    "rws_losses": (rws, gaussians(2)),
    "log_variance_loss": (lambda x: uf.log_variance_loss(x, dim=1, reduction="none"), gaussians(1)),
    "importance_weighted_generator_loss": (
        lambda x: uf.importance_weighted_generator_loss(fake=x, dim=1, reduction="none"), gaussians(1)),
    "importance_weighted_generator_loss[live]": (
        lambda x: uf.importance_weighted_generator_loss(fake=x, dim=1, detach=False, reduction="none"), gaussians(1)),
    "log_discriminator": (lambda x: uf.log_discriminator(x, 1), gaussians(1)),
    "discriminator_loss": (lambda x, y: uf.discriminator_loss(real=x, fake=y, reduction="none"), gaussians(2)),
    "generator_loss": (lambda x: uf.generator_loss(fake=x, reduction="none"), gaussians(1)),
    "generator_loss[fgan_pearson]": (
        lambda x: uf.generator_loss(fake=x, kind="fgan_pearson", reduction="none"), gaussians(1)),
    "total_correlation": (correlation, gaussians(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_gradient_of_0_gives_0(name: str) -> None:
    """Rows of NaN that `torch.where` leaves out. A row of the result is not the row of other inputs."""
    function, make = ROWS[name]
    shapes = SHAPES[:2] if "mixture" in name or name == "total_correlation" else SHAPES
    for (rows, n), poison in itertools.product(shapes, POISONS):
        out = [0, rows // 2]
        left_out = torch.zeros(rows, dtype=torch.bool)
        left_out[out] = True

        def loss(*x: Tensor, left_out: Tensor = left_out) -> Tensor:
            torch.manual_seed(0)
            value = function(*x)
            return torch.where(left_out.reshape(-1, *(1,) * (value.dim() - 1)), 0.0, value).sum()

        _, expected = found(loss, make(rows, n))
        value, grads = found(loss, [at_rows(t, poison, out) for t in make(rows, n)])
        assert value.isfinite()
        for got, clean in zip(grads, expected, strict=True):
            assert (got[out] == 0).all()
            torch.testing.assert_close(got, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["logistic", "hinge", "relativistic_average", "kl_wgan", "fgan_pearson"])
def test_a_reduced_loss_that_is_left_out(kind: str) -> None:
    real, fake = (normal(3, 50).fill_(NAN).requires_grad_() for _ in range(2))
    loss = uf.discriminator_loss(real=real, fake=fake, kind=kind)
    grads = torch.autograd.grad(torch.where(torch.tensor(True), 0.0, loss), (real, fake))
    assert all((g == 0).all() for g in grads)


def test_groups_that_are_left_out() -> None:
    fake = torch.full((6,), NAN, requires_grad=True)
    loss = uf.importance_weighted_generator_loss(fake=fake, groups=torch.tensor([0, 1, 1, 2, 0, 1]))
    torch.where(torch.tensor(True), 0.0, loss).backward()
    assert (fake.grad == 0).all()


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes_dim", [-1, 1])
@pytest.mark.parametrize("classes", [3, 50])
def test_ignored_labels_are_not_read(classes: int, classes_dim: int) -> None:
    logits = normal(5, 7, classes)
    x = torch.arange(35).reshape(5, 7) % classes
    x[1], x[2, 3] = -100, -100
    logits[1] = NAN
    leaf = logits.movedim(-1, classes_dim).clone().requires_grad_()
    got = uf.categorical_log_prob(leaf, x, class_dim=classes_dim, event_ndims=1)
    expected = -torch.nn.functional.cross_entropy(logits.movedim(-1, 1), x, reduction="none").sum(1)
    torch.testing.assert_close(got, expected)
    assert got[1] == 0
    got.sum().backward()
    grad = leaf.grad.movedim(classes_dim, -1)
    assert (grad[1] == 0).all() and (grad[2, 3] == 0).all() and grad.isfinite().all()
    assert (grad[0] != 0).all()


def test_which_label_is_ignored() -> None:
    logits = normal(3, 4)
    x = torch.tensor([0, 255, -100])
    got = uf.categorical_log_prob(logits, x, ignore_index=255)
    assert got[1] == 0 and got[2].isnan()
    assert uf.categorical_log_prob(logits, x, ignore_index=0)[0] == 0
    with pytest.raises(TypeError, match="ignore_index: expected an int, got float"):
        uf.categorical_log_prob(logits, x, ignore_index=1.0)  # type: ignore[arg-type]
    data = torch.tensor([[0, 1], [-100, 1], [2, 3]])
    bound = uf.elbo_loss(normal(3, 2, 4), data, normal(3, 2), normal(3, 2), likelihood="categorical", reduction="none")
    assert bound.loss.isfinite().all()


def test_the_reference_ignores_them_too() -> None:
    logits = at_rows(normal(4, 5), NAN, (2,)).requires_grad_()
    x = torch.tensor([0, 1, -100, 4])
    value = _ops.categorical_log_prob.reference(logits, x, 1, 0, -100)
    assert value[2] == 0
    (grad,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    assert grad.isfinite().all() and second.isfinite().all()
