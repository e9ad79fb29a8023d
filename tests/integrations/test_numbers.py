"""Each function of ours against the one that it stands in for, in float64: value and every gradient, to 1e-10.

`make test-integrations` installs the libraries; a case whose library is missing is skipped.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import cotangents_like
from torch import Tensor

import unigen_fast as uf
from unigen_fast.integrations import _fingerprint, _patching

BOUND = 1e-10
B, K, M, D, PIXELS = 6, 5, 3, 4, 9


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """Constants that a library makes on its own (pythae's weights, mimicry's labels) are in float64 too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- the cases -------------------------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """What a function is called with: `call(function, *tensors)`, the tensors wanting gradients."""

    call: Callable[..., Any]
    tensors: list[Tensor]
    none: tuple[tuple[int, int], ...] = ()  # (output, tensor): the gradient that is None


CASES: dict[str, tuple[str, str, Callable[[], Setup]]] = {}


def case(library: str, name: str, **options: Any) -> Callable[[Callable[..., Setup]], Callable[..., Setup]]:
    """The setup for one of the library's functions; more than one of it with different options."""

    def mark(setup: Callable[..., Setup]) -> Callable[..., Setup]:
        label = "-".join([library, name, *(f"{key}={value}" for key, value in options.items())])
        assert label not in CASES
        CASES[label] = (library, name, lambda: setup(**options))
        return setup

    return mark


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape).mul_(scale).requires_grad_()


def positive(*shape: int) -> Tensor:
    return torch.randn(shape).exp_().requires_grad_()


# torchrl


@case("torchrl", "categorical_kl_terms")
@case("torchrl", "categorical_kl_terms", free_nats=0.0)
@case("torchrl", "categorical_kl_terms", free_nats=4.0, unimix=0.0)
def dreamer(**options: float) -> Setup:
    tensors = [draw(7, 5, 4, 6), draw(7, 5, 4, 6)]
    return Setup(lambda f, q, p: f(q, p, **options), tensors, none=((0, 0), (1, 1)))


# pythae


def pythae(reconstruction: str, **attributes: Any) -> Any:
    config = SimpleNamespace(reconstruction_loss=reconstruction)
    return SimpleNamespace(model_config=config, n_samples=K, gradient_n_estimates=M, **attributes)


def pythae_setup(model: Any, *middle: int, more: tuple[Any, ...] = (), pixels: tuple[int, ...] = (PIXELS,)) -> Setup:
    """recon, mu, log_var and z; the data, of the same size, as the reconstruction's losses want it."""
    flat = (*middle, math.prod(pixels)) if middle else pixels
    recon = torch.rand(B, *flat).mul_(0.8).add_(0.1).requires_grad_()
    x = torch.rand(B, *pixels).round_()
    tensors = [recon, draw(B, *middle, D), draw(B, *middle, D, scale=0.5), draw(B, *middle, D)]
    return Setup(lambda f, r, m, v, z: f(model, r, x, m, v, z, *more), tensors)


@case("pythae", "VAE.loss_function", reconstruction="mse")
@case("pythae", "VAE.loss_function", reconstruction="bce")
def pythae_vae(reconstruction: str) -> Setup:
    setup = pythae_setup(pythae(reconstruction), pixels=(1, 3, 3))
    setup.tensors.pop()  # its loss takes z, and has no use for it
    return setup._replace(call=lambda f, r, m, v: setup.call(f, r, m, v, None))


@case("pythae", "IWAE.loss_function", reconstruction="mse")
@case("pythae", "IWAE.loss_function", reconstruction="bce")
@case("pythae", "CIWAE.loss_function", reconstruction="mse")
@case("pythae", "CIWAE.loss_function", reconstruction="bce")
def pythae_iwae(reconstruction: str) -> Setup:
    return pythae_setup(pythae(reconstruction, beta=0.3), K, pixels=(1, 3, 3))


@case("pythae", "MIWAE.loss_function", reconstruction="mse")
@case("pythae", "MIWAE.loss_function", reconstruction="bce")
@case("pythae", "PIWAE.loss_function", reconstruction="mse")
@case("pythae", "PIWAE.loss_function", reconstruction="bce")
def pythae_miwae(reconstruction: str) -> Setup:
    return pythae_setup(pythae(reconstruction), M, K, pixels=(1, 3, 3))


@case("pythae", "BetaTCVAE.loss_function", stratified=True, size=100)
@case("pythae", "BetaTCVAE.loss_function", stratified=False, size=100)
def pythae_beta_tc_vae(stratified: bool, size: int) -> Setup:
    found = importlib.import_module("pythae.models").BetaTCVAE
    model = pythae("mse", use_mss=stratified, alpha=1.3, beta=2.1, gamma=0.7)
    for name in ("_compute_log_gauss_density", "_log_importance_weight_matrix"):
        setattr(model, name, getattr(found, name).__get__(model))
    return pythae_setup(model, more=(size,))


# diffusers


def posterior(parameters: Tensor, **options: Any) -> Any:
    return importlib.import_module("diffusers.models.autoencoders.vae").DiagonalGaussianDistribution(
        parameters, **options
    )


@case("diffusers", "DiagonalGaussianDistribution.kl", shape=(3, 8, 4, 5))
@case("diffusers", "DiagonalGaussianDistribution.kl", shape=(3, 8, 2, 4, 5))
@case("diffusers", "DiagonalGaussianDistribution.kl", shape=(3, 8, 4, 5), scale=40.0)  # past both ends of the clamp
def diffusers_kl(shape: tuple[int, ...], scale: float = 1.0) -> Setup:
    return Setup(lambda f, parameters: f(posterior(parameters)), [draw(*shape, scale=scale)])


@case("diffusers", "DiagonalGaussianDistribution.kl", other=(3, 8, 4, 5))
@case("diffusers", "DiagonalGaussianDistribution.kl", other=(3, 8, 2, 4, 5))
def diffusers_kl_of_two(other: tuple[int, ...]) -> Setup:
    return Setup(lambda f, p, q: f(posterior(p), posterior(q)), [draw(*other), draw(*other)])


@case("diffusers", "DiagonalGaussianDistribution.sample", shape=(3, 8, 4, 5))
@case("diffusers", "DiagonalGaussianDistribution.sample", shape=(3, 8, 2, 4, 5))
def diffusers_sample(shape: tuple[int, ...]) -> Setup:
    def call(function: Callable[..., Any], parameters: Tensor) -> Tensor:
        return function(posterior(parameters), torch.Generator().manual_seed(3))

    return Setup(call, [draw(*shape)])


# scvi-tools


def counts(shape: tuple[int, ...]) -> Tensor:
    x = torch.poisson(torch.full(shape, 3.0))
    x[:, 0] = 0
    return x


def rare(mu: Tensor) -> Tensor:
    """With means far below the 1e-8 that is added to them."""
    with torch.no_grad():
        mu[:, 1] = 1e-12
        mu[:, 2] = 1e-9
    return mu


@case("scvi", "log_nb_positive", theta=(8,))
@case("scvi", "log_nb_positive", theta=(B, 8))
@case("scvi", "log_nb_positive", theta=(8,), eps=1e-4)
def scvi_nb(theta: tuple[int, ...], **options: float) -> Setup:
    x = counts((B, 8))
    return Setup(lambda f, mu, theta: f(x, mu, theta, **options), [rare(positive(B, 8)), positive(*theta)])


@case("scvi", "log_zinb_positive", theta=(8,))
@case("scvi", "log_zinb_positive", theta=(B, 8))
@case("scvi", "log_zinb_positive", theta=(8,), eps=1e-4)
def scvi_zinb(theta: tuple[int, ...], **options: float) -> Setup:
    x = counts((B, 8))
    tensors = [rare(positive(B, 8)), positive(*theta), draw(B, 8, scale=3.0)]
    return Setup(lambda f, mu, theta, pi: f(x, mu, theta, pi, **options), tensors)


# torch.distributions


@case("torch_distributions", "_kl_normal_normal")
def normals() -> Setup:
    def call(function: Callable[..., Any], loc: Tensor, scale: Tensor, other: Tensor, width: Tensor) -> Tensor:
        return function(torch.distributions.Normal(loc, scale), torch.distributions.Normal(other, width))

    return Setup(call, [draw(B, D), positive(B, D), draw(D), positive(1, D)])


@case("torch_distributions", "_kl_independent_independent", n=1)
@case("torch_distributions", "_kl_independent_independent", n=2)
def independent_normals(n: int) -> Setup:
    def call(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
        p, q = (torch.distributions.Normal(*tensors[i : i + 2]) for i in (0, 2))
        return function(torch.distributions.Independent(p, n), torch.distributions.Independent(q, n))

    return Setup(call, [draw(B, D, 2), positive(B, D, 2), draw(B, D, 2), positive(B, D, 2)])


# multivae


def modalities(**attributes: Any) -> Setup:
    """MMVAE with the log-weights given: those of two modalities, [K, B], and samples that they depend on."""

    def call(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
        weights, samples = tensors[:2], [z * 1.0 for z in tensors[2:]]
        log_w = {f"m{i}": w + (z**2).sum(-1) for i, (w, z) in enumerate(zip(weights, samples, strict=True))}
        how_many = torch.tensor([2.0] * (B - 1) + [1.0])
        model = SimpleNamespace(compute_k_lws=lambda *args: (log_w, how_many))
        embeddings = {f"m{i}": z for i, z in enumerate(samples)}
        found = function(model, None, embeddings, None, None)
        return found.loss, found.loss_sum

    return Setup(call, [draw(K, B), draw(K, B), draw(K, B, D), draw(K, B, D)])


case("multivae", "MMVAE.dreg_looser")(modalities)
case("multivae", "MMVAE.iwae_looser")(modalities)


@case("multivae", "kl_divergence")
def multivae_kl() -> Setup:
    return Setup(lambda f, *tensors: f(*tensors), [draw(B, D), draw(B, D), draw(B, D), draw(D)])


# taming-transformers


@case("taming", "hinge_d_loss")
@case("taming", "vanilla_d_loss")
def taming() -> Setup:
    return Setup(lambda f, real, fake: f(real, fake), [draw(4, 1, 5, 5), draw(3, 1, 5, 5)])


# torchgan


@case("torchgan", "minimax_generator_loss", nonsaturating=True)
@case("torchgan", "minimax_generator_loss", nonsaturating=False, reduction="none")
@case("torchgan", "least_squares_generator_loss")
@case("torchgan", "least_squares_generator_loss", c=0.7, reduction="sum")
@case("torchgan", "wasserstein_generator_loss", reduction="none")
@case("torchgan", "wasserstein_generator_loss", reduction="sum")
def torchgan_generator(**options: Any) -> Setup:
    return Setup(lambda f, fake: f(fake, **options), [draw(B, 3)])


@case("torchgan", "minimax_discriminator_loss")
@case("torchgan", "minimax_discriminator_loss", label_smoothing=0.2, reduction="sum")
@case("torchgan", "minimax_discriminator_loss", label_smoothing=0.2, reduction="none")
@case("torchgan", "least_squares_discriminator_loss")
@case("torchgan", "least_squares_discriminator_loss", a=-1.0, b=0.9, reduction="none")
@case("torchgan", "wasserstein_discriminator_loss", reduction="sum")
@case("torchgan", "wasserstein_discriminator_loss", reduction="none")
def torchgan_discriminator(**options: Any) -> Setup:
    return Setup(lambda f, real, fake: f(real, fake, **options), [draw(B, 3), draw(B, 3)])


# mimicry


@case("mimicry", "minimax_loss_gen")
@case("mimicry", "minimax_loss_gen", real_label_val=0.9)
@case("mimicry", "wasserstein_loss_gen")
@case("mimicry", "hinge_loss_gen")
def mimicry_generator(**options: float) -> Setup:
    return Setup(lambda f, fake: f(fake, **options), [draw(B, 1)])


@case("mimicry", "minimax_loss_dis")
@case("mimicry", "minimax_loss_dis", real_label_val=0.9, fake_label_val=0.1)
@case("mimicry", "wasserstein_loss_dis")
@case("mimicry", "hinge_loss_dis")
def mimicry_discriminator(**options: float) -> Setup:
    return Setup(lambda f, first, second: f(first, second, **options), [draw(B, 1), draw(B + 1, 1)])


# ---- the tests -------------------------------------------------------------------------------------------------------


def find(library: str, name: str) -> tuple[Any, str, _patching.Replacement]:
    """What holds the function, its name there, and our replacement."""
    known = _patching.Library.every[library]
    replacement = next(r for r in known.replacements if r.name == name)
    return *where(replacement), replacement


def where(replacement: _patching.Replacement) -> tuple[Any, str]:
    """What holds the function, and its name there."""
    pytest.importorskip(replacement.module.split(".")[0])
    holder = importlib.import_module(replacement.module)
    *classes, last = replacement.name.split(".")
    for part in classes:
        holder = getattr(holder, part)
    return holder, last


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def gradients(outputs: list[Tensor], tensors: list[Tensor]) -> list[Tensor | None]:
    wanted = [o for o in outputs if o.requires_grad]
    return list(torch.autograd.grad(wanted, tensors, cotangents_like(wanted), retain_graph=True, allow_unused=True))


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= BOUND * theirs.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("label", CASES)
def test_value_and_gradients(label: str) -> None:
    library, name, setup = CASES[label]
    holder, last, replacement = find(library, name)
    theirs = vars(holder)[last]
    call, tensors, none = setup()
    expected = flat(call(theirs, *tensors))
    expected_gradients = gradients(expected, tensors)
    with uf.integrations.patched(library):
        ours = vars(holder)[last]
        assert ours is not theirs
        found = flat(call(ours, *tensors))
        found_gradients = gradients(found, tensors)
    assert vars(holder)[last] is theirs
    assert uf.integrations.calls()[replacement.path] == 1
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert_equal(a, b)
    for a, b in zip(found_gradients, expected_gradients, strict=True):
        assert a is not None and b is not None and b.abs().max() > 1e-6
        assert_equal(a, b)
    for output, tensor in none:  # the side whose gradient is stopped
        assert gradients([found[output]], [tensors[tensor]]) == [None]


@pytest.mark.parametrize("library", [x for x in _patching.Library.every if x not in ("vits", "studiogan")])
def test_every_function_has_its_case(library: str) -> None:
    elsewhere = {"categorical_kl_balanced", "ns_loss_gen", "_kl_bernoulli_bernoulli", "_kl_categorical_categorical"}
    elsewhere |= {"RenyiELBO.loss", "RenyiELBO.loss_and_grads"}  # those of correct=True alone, and pyro's
    compared = {name for known, name, _ in CASES.values() if known == library}
    assert compared | elsewhere >= {r.name for r in _patching.Library.every[library].replacements}


REPLACEMENTS = {
    r.path: r for library in _patching.Library.every.values() if library.distribution for r in library.replacements
}


@pytest.mark.parametrize("path", REPLACEMENTS)
def test_arguments_and_code_are_theirs(path: str) -> None:
    replacement = REPLACEMENTS[path]
    holder, last = where(replacement)
    theirs = vars(holder)[last]
    assert _fingerprint.of_function(theirs) in replacement.accepted
    parameters = inspect.signature(replacement.ours).parameters.values()
    ours = [(p.name, p.kind, p.default) for p in parameters if p.name != "correct"]
    assert ours == [(p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()]
