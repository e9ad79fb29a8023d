"""What `correct=True` sets right, against the right formula; and that the default does not."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_numbers import CASES, B, D, K, M, assert_equal, draw, find, flat, gradients, posterior, pythae_beta_tc_vae
from torch import Tensor

import unigen_fast as uf


def outcome(label: str, correct: bool) -> tuple[list[Tensor], list[Any]]:
    """Values and gradients of a case of test_numbers, the same numbers each time."""
    torch.manual_seed(1)
    library, name, setup = CASES[label]
    holder, last, _ = find(library, name)
    call, tensors, _ = setup()
    with uf.integrations.patched(library, correct=correct):
        found = flat(call(vars(holder)[last], *tensors))
    return [f.detach() for f in found], gradients(found[:1], tensors)


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "label",
    ["pythae-IWAE.loss_function-reconstruction=mse", "pythae-CIWAE.loss_function-reconstruction=bce",
     "multivae-MMVAE.dreg_looser"],
)  # fmt: skip
def test_the_bound_has_the_gradient_of_its_surrogate(label: str) -> None:
    (surrogate, *rest), of_surrogate = outcome(label, False)
    (bound, *same), of_bound = outcome(label, True)
    assert abs(bound - surrogate) > 1e-3
    if "multivae" not in label:  # there the second is the first again
        for a, b in zip(rest, same, strict=True):
            assert_equal(a, b)
    for a, b in zip(of_surrogate, of_bound, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("name", ["MIWAE", "PIWAE"])
def test_pythae_weighs_the_samples_of_a_group(name: str) -> None:
    """Right: -(1/M) sum_m log (1/K) sum_k e^{log w_mk}; theirs normalises over m."""
    label = f"pythae-{name}.loss_function-reconstruction=mse"
    (found, *_), of_found = outcome(label, True)
    _, of_theirs = outcome(label, False)
    torch.manual_seed(1)
    tensors = CASES[label][2]().tensors
    torch.manual_seed(1)
    recon = torch.rand(B, M, K, 9)
    x = torch.rand(B, 1, 3, 3).round_().reshape(B, 1, 1, 9)
    torch.testing.assert_close(recon * 0.8 + 0.1, tensors[0].detach())
    recon_x, mean, logvar, z = tensors
    log_q = torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(z).sum(-1)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_w = -0.5 * ((recon_x - x) ** 2).sum(-1) + log_p - log_q
    expected = -(log_w.logsumexp(2) - torch.tensor(float(K)).log()).mean()
    assert_equal(found, expected.detach())
    of_expected = gradients([expected], tensors)
    for a, b, c in zip(of_found, of_expected, of_theirs, strict=True):
        assert_equal(a, b)
        assert (b - c).abs().max() > 1e-4


def test_pythae_stratified_weights_are_those_of_the_paper() -> None:
    model = pytest.importorskip("pythae.models").BetaTCVAE
    setup = pythae_beta_tc_vae(stratified=True, size=100)
    theirs = setup.call(model.loss_function, *setup.tensors)
    with uf.integrations.patched("pythae", correct=True):
        found = setup.call(model.loss_function, *setup.tensors)
    _, mean, logvar, z = setup.tensors
    parts = uf.total_correlation(z, mean, logvar, dataset_size=100)
    right = 1.3 * parts.mutual_information + 2.1 * parts.total_correlation + 0.7 * parts.dimension_wise_kl
    assert_equal(found[2], right.mean())
    assert abs(found[2] - theirs[2]) > 1e-3


def test_diffusers_sums_every_dimension() -> None:
    pytest.importorskip("diffusers")
    parameters = draw(3, 8, 2, 4, 5)
    mean, logvar = parameters.chunk(2, dim=1)
    with uf.integrations.patched("diffusers", correct=True):
        found = posterior(parameters).kl()
    assert_equal(found, 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1))
    with uf.integrations.patched("diffusers"):
        assert posterior(parameters).kl().shape == (3, 5)


def test_diffusers_in_half_precision() -> None:
    pytest.importorskip("diffusers")
    parameters = torch.full((2, 4, 8, 8), 12.0, dtype=torch.float16)  # e^12 is beyond fp16
    for correct in (False, True):
        with uf.integrations.patched("diffusers", correct=correct):
            found = posterior(parameters).kl()
        assert found.isfinite().all() == correct
        assert found.dtype == (torch.float32 if correct else torch.float16)


@pytest.mark.parametrize("name", ["log_nb_positive", "log_zinb_positive"])
def test_scvi_adds_nothing(name: str) -> None:
    module = pytest.importorskip("scvi.distributions._negative_binomial")
    x, mu, theta, gate = torch.ones(3), torch.full((3,), 1e-10), torch.ones(3), torch.zeros(3)
    arguments = (x, mu, theta) if name == "log_nb_positive" else (x, mu, theta, gate)
    right = mu.log() - 2 * mu.log1p()  # NB(1; mu, 1) = mu / (1 + mu)²
    right = right if name == "log_nb_positive" else right - torch.tensor(2.0).log()
    with uf.integrations.patched("scvi", correct=True):
        assert_equal(getattr(module, name)(*arguments), right)
    with uf.integrations.patched("scvi"):
        assert (getattr(module, name)(*arguments) - right).abs().min() > 1


def test_torch_distributions_of_probabilities_that_round_to_one() -> None:
    p, q = (torch.distributions.Bernoulli(logits=torch.tensor([x], dtype=torch.float32)) for x in (2.0, 25.0))
    c, d = (torch.distributions.Categorical(logits=torch.tensor([x, 0.0], dtype=torch.float32)) for x in (2.0, 120.0))
    theirs = [torch.distributions.kl_divergence(*pair) for pair in ((p, q), (c, d))]
    assert all(t.isinf().all() for t in theirs)
    with uf.integrations.patched("torch_distributions", correct=True):
        found = [torch.distributions.kl_divergence(*pair) for pair in ((p, q), (c, d))]
        hot = [torch.distributions.OneHotCategorical(logits=x.logits) for x in (c, d)]
        assert torch.distributions.kl_divergence(*hot) == found[1]
    wide = [torch.distributions.Bernoulli(logits=x.logits.double()) for x in (p, q)]
    assert float(found[0]) == pytest.approx(float(torch.distributions.kl_divergence(*wide)), rel=1e-4)
    wide = [torch.distributions.Categorical(logits=x.logits.double()) for x in (c, d)]
    assert float(found[1]) == pytest.approx(float(torch.distributions.kl_divergence(*wide)), rel=1e-5)
    with uf.integrations.patched("torch_distributions"):
        assert torch.distributions.kl_divergence(p, q).isinf()
        assert uf.integrations.calls("torch_distributions")["torch.distributions.kl._kl_bernoulli_bernoulli"] == 0


@pytest.mark.parametrize("kind", ["Bernoulli", "Categorical"])
def test_torch_distributions_of_logits_elsewhere(kind: str) -> None:
    family = getattr(torch.distributions, kind)
    tensors = [draw(B, D), draw(B, D)]
    expected = torch.distributions.kl_divergence(*(family(logits=t) for t in tensors))
    with uf.integrations.patched("torch_distributions", correct=True):
        found = torch.distributions.kl_divergence(*(family(logits=t) for t in tensors))
        assert sum(uf.integrations.calls("torch_distributions").values()) == 1
        given = [family(probs=t.detach().sigmoid()) for t in tensors]
        torch.distributions.kl_divergence(*given)  # of probabilities: theirs
        assert sum(uf.integrations.calls("torch_distributions").values()) == 1
    assert_equal(found, expected)
    for a, b in zip(gradients([found], tensors), gradients([expected], tensors), strict=True):
        assert b.abs().max() > 1e-6
        assert_equal(a, b)


def test_torchrl_balanced_kl_without_a_floor() -> None:
    pytest.importorskip("torchrl")
    module = importlib.import_module("torchrl.objectives.dreamer_v3")
    tensors = [draw(7, 4, 6), draw(7, 4, 6)]
    options = {"alpha": 0.7, "free_bits": 0.3}
    expected = module.categorical_kl_balanced(*tensors, **options)
    wrong = torch.tensor([[[0.0, -40.0]]], requires_grad=True), torch.tensor([[[-40.0, 0.0]]], requires_grad=True)
    bounded = module.categorical_kl_balanced(*wrong)
    with uf.integrations.patched("torchrl", correct=True):
        found = module.categorical_kl_balanced(*tensors, **options)
        assert_equal(module.categorical_kl_balanced(*wrong).detach(), torch.tensor(40.0))
    assert bounded < 20
    assert_equal(found, expected)
    for a, b in zip(gradients([found], tensors), gradients([expected], tensors), strict=True):
        assert b.abs().max() > 1e-6
        assert_equal(a, b)


def test_mimicry_without_its_saturation() -> None:
    pytest.importorskip("torch_mimicry")
    module = importlib.import_module("torch_mimicry.modules.losses")
    logits = torch.tensor([[-40.0], [1.0]], requires_grad=True)
    (saturated,) = torch.autograd.grad(module.ns_loss_gen(logits), logits)
    with uf.integrations.patched("mimicry", correct=True):
        loss = module.ns_loss_gen(logits)
        (gradient,) = torch.autograd.grad(loss, logits)
    assert_equal(loss.detach(), F.softplus(-logits).mean().detach())
    assert saturated[0].abs() < 1e-8 and gradient[0] == pytest.approx(-0.5)
    theirs = module.ns_loss_gen(logits)
    with uf.integrations.patched("mimicry"):
        assert module.ns_loss_gen(logits) == theirs
        assert uf.integrations.calls("mimicry")["torch_mimicry.modules.losses.ns_loss_gen"] == 0
