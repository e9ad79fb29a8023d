"""Options that are numbers: annealed in a compiled step without a graph for each value; NumPy numbers and tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from helpers import assert_close
from torch import Tensor, nn

import unigen_fast as uf

VALUES = [i / 20 for i in range(20)]
POSITIVE = [(i + 1) / 20 for i in range(20)]
SIZES = {"small": (4, 8), "large": (4200, 8)}  # on both sides of where a graph holds the op itself


def tensors_of(size: str) -> dict[str, Tensor]:
    n, d = SIZES[size]
    torch.manual_seed(0)
    normal = torch.randn
    found = {
        "a": normal(n, d), "b": 0.1 * normal(n, d), "x": torch.rand(n, d).round(), "classes": normal(n, 2, 4),
        "decoder": normal(n, 2, d), "z": normal(n, 2, 3), "mean": normal(n, 3), "logvar": 0.1 * normal(n, 3),
        "counts": torch.randint(0, 9, (n, d)).float(), "positive": torch.rand(n, d) + 0.5,
    }  # fmt: skip
    return {k: t.requires_grad_(k not in ("x", "counts")) for k, t in found.items()}


def few(x: Tensor) -> Tensor:
    return x[:40]


# option -> (call of the tensors and a value, values)
Option = tuple[Callable[[Any, Any], Any], list[Any]]
OPTIONS: dict[str, Option] = {
    "gaussian_kl.scale": (lambda t, w: uf.gaussian_kl(t.a, t.b, scale=w), VALUES),
    "gaussian_kl.free_bits": (lambda t, w: uf.gaussian_kl(t.a, t.b, free_bits=w), VALUES),
    "gaussian_kl.free_bits per_dim": (
        lambda t, w: uf.gaussian_kl(t.a, t.b, free_bits=w, free_bits_mode="per_dim"),
        VALUES,
    ),
    "gaussian_kl_monte_carlo.scale": (
        lambda t, w: uf.gaussian_kl_monte_carlo(t.b, t.a, t.b, t.a, t.b, scale=w),
        VALUES,
    ),
    "bernoulli_kl.scale": (lambda t, w: uf.bernoulli_kl(t.a, t.b, scale=w), VALUES),
    "categorical_kl.scale": (lambda t, w: uf.categorical_kl(t.classes, 2 * t.classes, scale=w), VALUES),
    "categorical_kl.unimix": (lambda t, w: uf.categorical_kl(t.classes, 2 * t.classes, unimix=w), VALUES),
    **{
        f"balanced_categorical_kl.{name}": (
            lambda t, w, name=name: uf.balanced_categorical_kl(t.classes, 2 * t.classes, **{name: w}).loss,
            VALUES,
        )
        for name in ("free_nats", "unimix", "dynamics_scale", "representation_scale")
    },
    "mmd.scales": (lambda t, w: uf.mmd(few(t.a), few(t.b), scales=[w, 1.0]), POSITIVE),
    "total_correlation.dataset_size": (
        lambda t, n: uf.total_correlation(few(t.a), few(t.a), few(t.b), dataset_size=n).total_correlation,
        list(range(100, 120)),
    ),
    "sample_gaussian.num_samples": (
        lambda t, n: uf.sample_gaussian(t.a, t.b, num_samples=n).mean(0),
        list(range(2, 22)),
    ),
    "sample_gaussian_with_kl.num_samples": (
        lambda t, n: uf.sample_gaussian_with_kl(t.a, t.b, num_samples=n)[0].mean(0),
        list(range(2, 22)),
    ),
    "importance_weights.temperature": (
        lambda t, w: uf.importance_weights(t.a, dim=1, temperature=w, detach=False),
        POSITIVE,
    ),
    "importance_weighted_sum.temperature": (
        lambda t, w: uf.importance_weighted_sum(t.a, t.b, dim=1, temperature=w, detach=False),
        POSITIVE,
    ),
    "importance_weighted_generator_loss.temperature": (
        lambda t, w: uf.importance_weighted_generator_loss(fake=t.a, temperature=w, detach=False),
        POSITIVE,
    ),
    "importance_weighted_generator_loss.temperature groups": (
        lambda t, w: uf.importance_weighted_generator_loss(
            fake=few(t.a)[:, 0], groups=torch.arange(len(few(t.a))) % 3, temperature=w, detach=False
        ),
        POSITIVE,
    ),
    "ciwae_loss.beta": (lambda t, w: uf.ciwae_loss(t.a, dim=1, beta=w), VALUES),
    "renyi_loss.alpha": (lambda t, w: uf.renyi_loss(t.a, dim=1, alpha=w), VALUES),
    "cubo_loss.order": (lambda t, w: uf.cubo_loss(t.a, dim=1, order=w + 1), VALUES),
    "tvo_loss.partition": (lambda t, w: uf.tvo_loss(t.a, dim=1, partition=[0.0, w, 1.0]), POSITIVE[:-1]),
    **{
        f"discriminator_loss.scale {kind}": (
            lambda t, w, kind=kind: uf.discriminator_loss(real=t.a, fake=t.b, kind=kind, scale=w),
            VALUES,
        )
        for kind in ("logistic", "hinge", "relativistic", "relativistic_average", "kl_wgan")
    },
    "discriminator_loss.scale none": (
        lambda t, w: uf.discriminator_loss(real=t.a, fake=t.b, reduction="none", scale=w),
        VALUES,
    ),
    "generator_loss.scale": (lambda t, w: uf.generator_loss(fake=t.a, scale=w), VALUES),
    "negative_binomial_log_prob.eps": (
        lambda t, w: uf.negative_binomial_log_prob(t.counts, t.positive, t.positive, eps=w),
        VALUES,
    ),
    "zero_inflated_negative_binomial_log_prob.eps": (
        lambda t, w: uf.zero_inflated_negative_binomial_log_prob(t.counts, t.positive, t.positive, t.a, eps=w),
        VALUES,
    ),
    "discretized_logistic_log_prob.bin_width": (
        lambda t, w: uf.discretized_logistic_log_prob(t.x, t.a, t.b, bin_width=w),
        POSITIVE,
    ),
    "discretized_logistic_log_prob.low": (lambda t, w: uf.discretized_logistic_log_prob(t.x, t.a, t.b, low=-w), VALUES),
    "elbo_loss.kl_weight": (lambda t, w: uf.elbo_loss(t.a, t.x, t.mean, t.logvar, kl_weight=w).loss, VALUES),
    "elbo_loss.scale": (lambda t, w: uf.elbo_loss(t.a, t.x, t.mean, t.logvar, scale=w).loss, VALUES),
    "elbo_loss.kl_weight categorical": (
        lambda t, w: (
            uf.elbo_loss(t.classes, t.x[:, :2].long(), t.mean, t.logvar, likelihood="categorical", kl_weight=w).loss
        ),
        VALUES,
    ),
    **{
        f"iwae_objective.{name}": (
            lambda t, w, name=name, estimator=estimator, of=of: (
                uf.iwae_objective(
                    t.decoder, t.x, t.z, t.mean, t.logvar, dim=1, estimator=estimator, **{name: of(w)}
                ).loss
            ),
            values,
        )
        for name, estimator, of, values in (
            ("scale", "iwae", lambda w: w, VALUES),
            ("beta", "ciwae", lambda w: w, VALUES),
            ("alpha", "renyi", lambda w: w, VALUES),
            ("order", "cubo", lambda w: w + 1, VALUES),
            ("partition", "tvo", lambda w: [0.0, w, 1.0], POSITIVE[:-1]),
        )
    },
}
every_option = pytest.mark.parametrize("name", OPTIONS)


class Bag:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        vars(self).update(tensors)


def result_and_gradients(call: Callable[[], Any], leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    result = call()
    weights = torch.randn(result.shape, dtype=result.dtype)  # a plain sum of weights that sum to 1 has no gradient
    return [result, *torch.autograd.grad((result * weights).sum(), leaves, materialize_grads=True)]


def check_graphs(
    name: str, size: str, backend: str, dynamic: bool | None, given: Callable[[Any], Any] = lambda value: value
) -> None:
    call, values = OPTIONS[name]
    tensors = tensors_of(size)
    bag, leaves = Bag(tensors), [t for t in tensors.values() if t.requires_grad]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda w: call(bag, w), backend=counter, fullgraph=True, dynamic=dynamic)
    for value in values:
        got = result_and_gradients(lambda value=value: compiled(given(value)), leaves)
        expected = result_and_gradients(lambda value=value: call(bag, value), leaves)
        for g, e in zip(got, expected, strict=True):
            assert_close(g, e, 1e-5, absolute=1e-6)
    assert counter.frame_count <= 3, f"{counter.frame_count} graphs for {len(values)} values"


@every_option
@pytest.mark.parametrize("size", SIZES)
def test_a_schedule_takes_few_graphs(name: str, size: str) -> None:
    check_graphs(name, size, "eager", None)


@every_option
def test_a_schedule_takes_few_graphs_where_all_is_dynamic(name: str) -> None:
    check_graphs(name, "large", "aot_eager", True)


@pytest.mark.parametrize("given", [torch.tensor, np.float32, np.float64])
@pytest.mark.parametrize(
    "name",
    ["gaussian_kl.scale", "gaussian_kl.free_bits", "elbo_loss.kl_weight", "renyi_loss.alpha", "tvo_loss.partition",
     "importance_weights.temperature", "iwae_objective.beta", "mmd.scales"],
)  # fmt: skip
def test_tensors_and_numpy_numbers_in_a_graph(name: str, given: Callable[[float], Any]) -> None:
    check_graphs(name, "large", "aot_eager", None, given)


@pytest.mark.parametrize("name", ["elbo_loss.kl_weight", "gaussian_kl.scale"])
def test_a_schedule_with_inductor(name: str) -> None:
    check_graphs(name, "large", "inductor", None)


@every_option
@pytest.mark.parametrize("given", [torch.tensor, np.float32, np.asarray], ids=["tensor", "np.float32", "np.ndarray"])
def test_tensors_and_numpy_numbers_are_numbers(name: str, given: Callable[[Any], Any]) -> None:
    call, values = OPTIONS[name]
    if isinstance(values[0], int):
        return  # a count
    tensors = tensors_of("small")
    bag, leaves = Bag(tensors), [t for t in tensors.values() if t.requires_grad]
    got = result_and_gradients(lambda: call(bag, given(np.float32(values[5]))), leaves)
    expected = result_and_gradients(lambda: call(bag, float(np.float32(values[5]))), leaves)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


# those that carry a gradient, and what it is with
LEARNED = [
    "gaussian_kl.scale", "gaussian_kl_monte_carlo.scale", "bernoulli_kl.scale", "categorical_kl.scale",
    "balanced_categorical_kl.dynamics_scale", "balanced_categorical_kl.representation_scale",
    "importance_weights.temperature", "importance_weighted_sum.temperature",
    "importance_weighted_generator_loss.temperature", "importance_weighted_generator_loss.temperature groups",
    "ciwae_loss.beta", "discriminator_loss.scale logistic", "discriminator_loss.scale relativistic",
    "discriminator_loss.scale relativistic_average", "discriminator_loss.scale none", "generator_loss.scale",
    "elbo_loss.kl_weight", "elbo_loss.scale", "elbo_loss.kl_weight categorical", "iwae_objective.scale",
    "iwae_objective.beta",
]  # fmt: skip


@every_option
def test_a_number_that_requires_grad_has_its_gradient_or_is_refused(name: str) -> None:
    call, values = OPTIONS[name]
    if isinstance(values[0], int):
        return
    if name not in LEARNED and not any(name.startswith(f"{other.split(' ')[0]} ") for other in LEARNED):
        option = name.split(".")[1].split(" ")[0]
        with pytest.raises(TypeError, match=rf"{option}.*requires grad"):
            call(Bag(tensors_of("small")), torch.tensor(0.5, requires_grad=True))
        return
    tensors = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in tensors_of("small").items()}
    if name.endswith("categorical"):
        tensors["x"] = tensors["x"].float()
    bag, leaves = Bag(tensors), [t for t in tensors.values() if t.requires_grad]
    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    got = result_and_gradients(lambda: call(bag, weight), [*leaves, weight])
    for g, e in zip(got, result_and_gradients(lambda: call(bag, 0.4), leaves), strict=False):
        assert_close(g, e, 1e-10, absolute=1e-12)
    step = 1e-6
    torch.manual_seed(1)
    weights = torch.randn(got[0].shape, dtype=got[0].dtype)
    difference = ((call(bag, 0.4 + step) - call(bag, 0.4 - step)) * weights).sum() / (2 * step)
    assert_close(got[-1], difference, 1e-6, absolute=1e-8)


def test_a_temperature_of_detached_weights_has_no_gradient() -> None:
    with pytest.raises(TypeError, match="detach=False"):
        uf.importance_weights(torch.randn(3, 4), dim=1, temperature=torch.tensor(1.0, requires_grad=True))


@pytest.mark.parametrize(
    ("value", "error"),
    [("1", TypeError), (True, TypeError), (None, TypeError), (torch.tensor(True), TypeError), (1j, TypeError),
     (torch.ones(2), ValueError), (np.ones(1), ValueError), (float("nan"), ValueError), (-1.0, ValueError),
     (np.float32(-1), ValueError), (torch.tensor(-1.0), ValueError)],
    ids=str,
)  # fmt: skip
def test_what_is_no_number_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"free_bits: (got|expected)"):
        uf.gaussian_kl(torch.randn(2, 3), torch.randn(2, 3), free_bits=value)


def test_a_scale_is_not_written_to() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    uf.discriminator_loss(real=torch.randn(3), fake=torch.randn(3), kind="least_squares", scale=scale).backward()
    assert scale == 2 and scale.grad is not None


class Encoder(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x).chunk(2, -1)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_vae_with_an_annealed_weight(dynamic: bool | None) -> None:
    """`model.kl_weight = …` between the steps of a compiled training step."""
    torch.manual_seed(0)
    model = uf.models.VAE(Encoder(12, 8), nn.Linear(4, 12), latent=4)
    x = torch.rand(16, 12).round()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda x: model.losses("autoencoder", x)["loss"], backend=counter, dynamic=dynamic)
    for value in VALUES:
        model.kl_weight = value
        torch.manual_seed(1)
        got = step(x)
        torch.manual_seed(1)
        assert_close(got, model.losses("autoencoder", x)["loss"], 1e-5)
    assert counter.frame_count <= 3
