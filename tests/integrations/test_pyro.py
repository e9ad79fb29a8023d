"""pyro's RenyiELBO: loss, and gradients of model and guide, from the same random numbers, in float64 to 1e-10."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import unigen_fast as uf

pyro = pytest.importorskip("pyro")
dist = pytest.importorskip("pyro.distributions")

B, D = 5, 3
ALPHAS = (0, 0.5, -1.0, 2.0)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def model(x: Tensor, pathwise: bool) -> None:
    weight = pyro.param("weight", torch.linspace(-1, 1, D).diag() + 0.3)
    prior = pyro.param("prior", torch.full((D,), 0.4))
    with pyro.plate("data", B):
        if pathwise:
            z = pyro.sample("z", dist.Normal(prior, 1.0).to_event(1))
        else:
            z = pyro.sample("z", dist.Bernoulli(logits=prior).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight, 0.7).to_event(1), obs=x)


def guide(x: Tensor, pathwise: bool) -> None:
    mean = pyro.param("mean", torch.full((B, D), 0.2))
    with pyro.plate("data", B):
        if pathwise:
            spread = pyro.param("spread", torch.full((D,), 0.8))
            pyro.sample("z", dist.Normal(mean + 0.1 * x, spread.exp()).to_event(1))
        else:
            pyro.sample("z", dist.Bernoulli(logits=mean + x).to_event(1))


def outcome(method: str, alpha: float, **options: Any) -> tuple[float, dict[str, Tensor]]:
    pyro.clear_param_store()
    x = torch.linspace(-1.5, 2, B * D).view(B, D)
    pathwise = options.pop("pathwise", True)
    elbo = pyro.infer.RenyiELBO(alpha=alpha, max_plate_nesting=2, **options)
    pyro.set_rng_seed(0)
    loss = getattr(elbo, method)(model, guide, x, pathwise)
    parameters = dict(pyro.get_param_store().named_parameters())
    return loss, {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("pathwise", [True, False])
@pytest.mark.parametrize(
    "options", [{"num_particles": 7}, {"num_particles": 7, "vectorize_particles": True}, {"num_particles": 1}]
)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_loss_and_gradients(alpha: float, options: dict[str, Any], pathwise: bool) -> None:
    expected, gradients = outcome("loss_and_grads", alpha, pathwise=pathwise, **options)
    expected_loss, _ = outcome("loss", alpha, pathwise=pathwise, **options)
    with uf.integrations.patched("pyro"):
        found, ours = outcome("loss_and_grads", alpha, pathwise=pathwise, **options)
        found_loss, none = outcome("loss", alpha, pathwise=pathwise, **options)
    assert set(uf.integrations.calls("pyro").values()) == {1}
    assert isinstance(found, float) and found == pytest.approx(expected, rel=1e-10)
    assert isinstance(found_loss, float) and found_loss == pytest.approx(expected_loss, rel=1e-10)
    assert none == {}
    assert set(ours) == set(gradients) >= {"weight", "prior", "mean"}
    for name, gradient in gradients.items():
        # alpha / (1 - alpha) times the score: of alpha 0 pyro's guide without a pathwise gradient has none at all
        assert (gradient.abs().max() > 1e-6) == (pathwise or alpha != 0 or name != "mean"), name
        assert (ours[name] - gradient).abs().max() <= 1e-10 * max(1, gradient.abs().max()), name


def test_nothing_sampled_and_nothing_to_train() -> None:
    def empty() -> None:
        pass

    def fixed() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    elbo = pyro.infer.RenyiELBO(num_particles=3)
    for function, method in ((empty, "loss_and_grads"), (fixed, "loss"), (fixed, "loss_and_grads")):
        pyro.set_rng_seed(0)
        expected = getattr(elbo, method)(function, function)
        pyro.set_rng_seed(0)
        with uf.integrations.patched("pyro"):
            assert getattr(elbo, method)(function, function) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("when", ["imported before", "imported while patched"])
def test_the_divergence_of_independent_normals(when: str) -> None:
    """pyro registers an entry of its own for Independent when it is imported."""
    entries = importlib.import_module("pyro.distributions.kl")
    p, q = (dist.Normal(torch.full((B, D), mean), 0.7).to_event(1) for mean in (0.1, 0.5))
    plain = [torch.distributions.Independent(torch.distributions.Normal(x.mean, x.stddev), 1) for x in (p, q)]
    expected = torch.distributions.kl_divergence(p, q)
    path = "pyro.distributions.kl._kl_independent_independent"
    with uf.integrations.patched("torch_distributions"):
        if when == "imported while patched":
            importlib.reload(entries)
        assert (torch.distributions.kl_divergence(p, q) - expected).abs().max() < 1e-12
        assert (torch.distributions.kl_divergence(*plain) - expected).abs().max() < 1e-12
        assert uf.integrations.calls("torch_distributions")[path] == 2
    torch.distributions.kl_divergence(p, q)
    assert uf.integrations.calls("torch_distributions")[path] == 2
