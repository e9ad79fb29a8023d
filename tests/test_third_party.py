"""Value and all gradients against the public functions that ours stand in for, in float64.

Skipped where a package is not installed; `make test-integrations` installs them all. Where a package is known to be
wrong (see the tests' names), ours is compared with its code set right, and shown to differ from it as it is.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import as_tuple, assert_close, cotangents_like
from torch import Tensor

import unigen_fast as uf


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()


def gradients(outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(outputs, tensors, cotangents_like(outputs), allow_unused=True)


def assert_same(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    tensors: Sequence[Tensor],
    *,
    values: bool = True,
    relative: float = 1e-8,
) -> None:
    """Theirs must have a gradient, and one that is not zero, for what is compared to mean anything."""
    got, expected = as_tuple(ours(*tensors)), as_tuple(theirs(*tensors))
    if values:
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, relative)
    for a, b in zip(gradients(got, tensors), gradients(expected, tensors), strict=True):
        assert a is not None and b is not None and b.abs().max() > 1e-6
        assert_close(a, b, relative)


# ---- torchrl ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free_nats", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_torchrl_categorical_kl_terms(free_nats: float, unimix: float) -> None:
    theirs = pytest.importorskip("torchrl.objectives.dreamer_v3").categorical_kl_terms
    posterior, prior = draw(7, 5, 4, 6), draw(7, 5, 4, 6, seed=1)

    def ours(posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        result = uf.balanced_categorical_kl(posterior, prior, free_nats=free_nats, unimix=unimix)
        return result.dynamics, result.representation

    assert_same(ours, lambda q, p: theirs(q, p, free_nats, unimix), (posterior, prior))
    # the side whose gradient is stopped gets None
    for result, stopped in zip(ours(posterior, prior), (posterior, prior), strict=True):
        assert torch.autograd.grad(result, stopped, allow_unused=True, retain_graph=True) == (None,)


# ---- pythae ----------------------------------------------------------------------------------------------------------

B, K, M, D, PIXELS = 6, 5, 3, 4, 9


def pythae_model(name: str, **attributes: Any) -> Any:
    """(class, an object with what its loss reads)"""
    models = pytest.importorskip("pythae.models")
    config = SimpleNamespace(reconstruction_loss="bce", latent_dim=D, kernel_bandwidth=1.3)
    return getattr(models, name), SimpleNamespace(model_config=config, n_samples=K, **attributes)


def log_weights(logits: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    standard = torch.zeros_like(z)
    log_p = uf.bernoulli_log_prob(logits, x, event_ndims=1) + uf.gaussian_log_prob(z, standard, standard, event_ndims=1)
    return log_p - uf.gaussian_log_prob(z, mean, logvar, event_ndims=1)


def samples(*middle: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x, and what depends on the networks: logits, mean and log-variance expanded over the samples, z."""
    x = torch.rand(B, PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).round()
    shape = (B, *middle, D)
    return x, (draw(B, *middle, PIXELS), draw(*shape, seed=1), draw(*shape, seed=2, scale=0.5), draw(*shape, seed=3))


def test_pythae_iwae() -> None:
    model, self = pythae_model("IWAE")
    x, tensors = samples(K)

    def ours(logits: Tensor, mean: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        log_w = log_weights(logits, x.unsqueeze(1), mean, logvar, z)
        return uf.iwae_loss(log_w, dim=1, value="surrogate")

    def theirs(logits: Tensor, mean: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        return model.loss_function(self, logits.sigmoid(), x, mean, logvar, z)[0]

    assert_same(ours, theirs, tensors)


def test_pythae_ciwae() -> None:
    model, self = pythae_model("CIWAE", beta=0.3)
    x, tensors = samples(K)

    def ours(logits: Tensor, mean: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        return uf.ciwae_loss(log_weights(logits, x.unsqueeze(1), mean, logvar, z), dim=1, beta=0.3)

    def theirs(logits: Tensor, mean: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        return model.loss_function(self, logits.sigmoid(), x, mean, logvar, z)[0]

    assert_same(ours, theirs, tensors, values=False)  # theirs reports the surrogate, with the same gradient


def test_pythae_miwae_normalises_over_the_groups() -> None:
    """Its [B, M, K] log-weights go through a softmax over M; ours over K, which is theirs with the axes exchanged."""
    model, self = pythae_model("MIWAE", gradient_n_estimates=M)
    x, tensors = samples(M, K)

    def ours(sample_dim: int, group_dim: int) -> Callable[..., Tensor]:
        def loss(logits: Tensor, mean: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
            log_w = log_weights(logits, x[:, None, None], mean, logvar, z)
            return uf.miwae_loss(log_w, sample_dim=sample_dim, group_dim=group_dim)

        return loss

    def theirs(logits: Tensor, mean: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        return model.loss_function(self, logits.sigmoid(), x, mean, logvar, z)[0]

    assert_same(ours(1, 2), theirs, tensors, values=False)
    with pytest.raises(AssertionError):
        assert_same(ours(2, 1), theirs, tensors, values=False)


def test_pythae_piwae() -> None:
    """As its MIWAE; its model loss, over all M·K samples, is right."""
    model, self = pythae_model("PIWAE", gradient_n_estimates=M)
    x, tensors = samples(M, K)

    def ours(logits: Tensor, mean: Tensor, logvar: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        log_w = log_weights(logits, x[:, None, None], mean, logvar, z)
        of_model, of_inference = uf.piwae_losses(log_w, sample_dim=1, group_dim=2)
        return of_inference, of_model

    def theirs(logits: Tensor, mean: Tensor, logvar: Tensor, z: Tensor) -> Any:
        return model.loss_function(self, logits.sigmoid(), x, mean, logvar, z)[:2]

    assert_same(ours, theirs, tensors, values=False)


def right_weights(batch: int, size: int) -> Tensor:
    """MSS's matrix, Chen et al. (2018), App. C.2: 1/N on the diagonal, which the public code writes down a column."""
    weights = torch.full((batch, batch), 1 / (batch - 1), dtype=torch.float64)
    for i in range(batch):
        weights[i, i] = 1 / size
        weights[i, (i + 1) % batch] = (size - batch + 1) / (size * (batch - 1))
    return weights.log()


@pytest.mark.parametrize("estimator", ["mss", "mws", "mss_columns"])
def test_pythae_beta_tc_vae(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, self = pythae_model("BetaTCVAE", use_mss=estimator != "mws", alpha=1.3, beta=2.1, gamma=0.7)
    self._compute_log_gauss_density = lambda *args: model._compute_log_gauss_density(self, *args)

    def public(batch: int, size: int) -> Tensor:
        torch.set_default_dtype(torch.float64)  # that of its matrix
        found = model._log_importance_weight_matrix(self, batch, size)
        torch.set_default_dtype(torch.float32)
        return found

    self._log_importance_weight_matrix = public if estimator == "mss_columns" else right_weights
    tensors = (draw(B, D, seed=1), draw(B, D, seed=2, scale=0.5), draw(B, D, seed=3))
    pixels = torch.full((B, PIXELS), 0.5, dtype=torch.float64)

    def ours(mean: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        found = uf.total_correlation(z, mean, logvar, dataset_size=100, estimator=estimator)
        return (1.3 * found.mutual_information + 2.1 * found.total_correlation + 0.7 * found.dimension_wise_kl).mean()

    def theirs(mean: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        return model.loss_function(self, pixels, pixels, mean, logvar, z, 100)[2]

    monkeypatch.setattr(torch, "tensor", lambda x: torch.as_tensor(x, dtype=torch.float64))  # it takes log(B·N) in fp32
    assert_same(ours, theirs, tensors)
    if estimator == "mss":  # the public matrix has a row that does not sum to 1
        self._log_importance_weight_matrix = public
        assert (public(B, 100).exp().sum(1) - 1).abs().max() > 0.1
        with pytest.raises(AssertionError):
            assert_same(ours, theirs, tensors)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_pythae_info_vae_mmd(kernel: str) -> None:
    scales = [0.1, 0.5, 2.0, 10.0]
    model, self = pythae_model("INFOVAE_MMD", kernel_choice=kernel, scales=scales, alpha=0.0, lbd=1.0)
    self.imq_kernel = lambda a, b: model.imq_kernel(self, a, b)
    self.rbf_kernel = lambda a, b: model.rbf_kernel(self, a, b)
    pixels = torch.full((B, PIXELS), 0.5, dtype=torch.float64)
    moments = torch.zeros(B, D, dtype=torch.float64)

    def ours(z: Tensor, prior: Tensor) -> Tensor:
        bandwidths = [s * 1.3**2 for s in (scales if kernel == "imq" else [1.0])]
        return uf.mmd(z, prior, kernel=kernel, scales=bandwidths)

    def theirs(z: Tensor, prior: Tensor) -> Tensor:
        return model.loss_function(self, pixels, pixels, z, prior, moments, moments)[3]

    assert_same(ours, theirs, (draw(B, D), draw(B, D, seed=1)))


# ---- scvi-tools ------------------------------------------------------------------------------------------------------


def counts() -> tuple[Tensor, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(4)
    x = torch.poisson(torch.full((B, 8), 3.0, dtype=torch.float64), generator=generator)
    x[:, 0] = 0
    mu, theta = draw(B, 8, seed=1).detach().exp(), draw(8, seed=2).detach().exp()
    return x, (mu.requires_grad_(), theta.requires_grad_(), draw(B, 8, seed=3))


def test_scvi_log_nb_positive() -> None:
    theirs = pytest.importorskip("scvi.distributions._negative_binomial").log_nb_positive
    x, (mu, theta, _) = counts()
    assert_same(
        lambda mu, theta: uf.negative_binomial_log_prob(x, mu, theta, eps=1e-8),
        lambda mu, theta: theirs(x, mu, theta).sum(-1),
        (mu, theta),
        relative=1e-10,
    )


def test_scvi_log_zinb_positive() -> None:
    theirs = pytest.importorskip("scvi.distributions._negative_binomial").log_zinb_positive
    x, tensors = counts()
    assert (x == 0).any() and (x > 0).any()
    assert_same(
        lambda mu, theta, gate: uf.zero_inflated_negative_binomial_log_prob(x, mu, theta, gate, eps=1e-8),
        lambda mu, theta, gate: theirs(x, mu, theta, gate).sum(-1),
        tensors,
        relative=1e-10,
    )


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("name", ["nb", "zinb"])
def test_scvi_counts_of_any_size(name: str, eps: float) -> None:
    """Each element on its own, to 1e-10 of itself or of 1: means far below eps, thetas near it, counts that are not
    whole. The gates stop short of where PyTorch's softplus turns linear."""
    theirs = getattr(pytest.importorskip("scvi.distributions._negative_binomial"), f"log_{name}_positive")
    ours = {"nb": uf.negative_binomial_log_prob, "zinb": uf.zero_inflated_negative_binomial_log_prob}[name]
    grid = [
        torch.tensor(axis, dtype=torch.float64)
        for axis in (
            (0, 0.3, 1, 2.5, 7, 300, 1e4),
            (0, 1e-12, 1e-8, 1e-4, 0.1, 3, 500, 1e5),
            (1e-4, 1e-3, 0.1, 1, 10, 1e3),
            (-19, -2, 0, 3, 30),
        )
    ]
    # columns: it takes a vector for one theta of each gene
    tensors = [t.reshape(-1, 1).requires_grad_() for t in torch.meshgrid(grid[: 3 + (name == "zinb")], indexing="ij")]
    got, expected = ours(*tensors, event_ndims=0, eps=eps), theirs(*tensors, eps=eps)
    for a, b in zip((got, *gradients([got], tensors)), (expected, *gradients([expected], tensors)), strict=True):
        assert a is not None and b is not None and b.abs().max() > 1e-6
        assert ((a - b).abs() <= 1e-10 * b.abs().clamp(min=1)).all()


def test_scvi_2965_loses_every_digit_in_fp32() -> None:
    """x = 5, mu = 3: for theta = 1e6 it gives -1.787, and the truth is -2.294."""
    theirs = pytest.importorskip("scvi.distributions._negative_binomial").log_nb_positive
    x, mu, theta = torch.tensor([5.0]), torch.tensor([3.0]), torch.tensor([1e6])
    truth = float(theirs(x.double(), mu.double(), theta.double(), eps=0.0))
    assert abs(float(theirs(x, mu, theta)) - truth) > 0.1
    assert float(uf.negative_binomial_log_prob(x, mu, theta)) == pytest.approx(truth, rel=1e-5)
