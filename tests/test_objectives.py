"""Whole bounds: what is particular to them. Sizes, layouts, derivatives and the rest are in test_fused.py."""

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from cases.base import Spec, draw
from cases.likelihood import negative_binomial, zero_inflated
from cases.objectives import bernoulli, bins, bound, divergence, gaussian, laplace, log_weights, unit
from helpers import LAYOUTS, NATIVE, assert_close, assert_refused, assert_same_bits, recorded_ops
from torch import Tensor

import unigen_fast as uf

B, K, D, L = 5, 4, 9, 3


def tensors(
    *, examples: int = B, samples: int = K, pixels: int = D, dtype: torch.dtype = torch.float64, device: Any = "cpu"
) -> list[Tensor]:
    """logits, x, z, mean, logvar."""
    torch.manual_seed(0)
    shapes = [(examples, samples, pixels), (examples, pixels), (examples, samples, L), (examples, L), (examples, L)]
    logits, x, z, mean, logvar = (torch.randn(shape, dtype=dtype) for shape in shapes)
    found = [logits, (x > 0).to(dtype), z, mean, 0.3 * logvar]
    return [t.to(device).requires_grad_(i != 1) for i, t in enumerate(found)]


def leaves(given: list[Tensor]) -> list[Tensor]:
    return [t for t in given if t.requires_grad]


def by_hand(given: list[Tensor]) -> Tensor:
    logits, x, z, mean, logvar = given
    return log_weights(bernoulli, (logits,), x, z, (mean, logvar))


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
@pytest.mark.parametrize("spread", [-90.0, -170.0, -300.0])
@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_certain_decoders_and_latents(bound: str, spread: float, likelihood: str, device: torch.device) -> None:
    """fp32, in which e^-spread is infinite, against float64: at the means nothing comes of that."""
    x = torch.tensor([[0.5, -3.0, 1e-3]])
    found = []
    for dtype in (torch.float32, torch.float64):
        at = {"device": device, "dtype": dtype}
        data, scales = x.to(**at), torch.full_like(x, spread, **at)
        lead = (2, 1, 1) if bound == "iwae" else (1, 1)
        given = [data.repeat(lead), scales.repeat(lead), data, scales, data, scales + 0.5]
        given = [t.clone().requires_grad_() for t in given]
        decoder, (mean, logvar, prior_mean, prior_logvar) = tuple(given[:2]), given[2:]
        options = {"prior_mean": prior_mean, "prior_logvar": prior_logvar, "likelihood": likelihood}
        if bound == "elbo":
            loss = uf.elbo_loss(decoder, data, mean, logvar, **options).loss
        else:
            z = data.repeat(2, 1, 1).requires_grad_()
            given.append(z)
            loss = uf.iwae_objective(decoder, data, z, mean, logvar, dim=0, **options).loss
        found.append([loss, *torch.autograd.grad(loss, given)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


# ---- the gradient that is made with the loss -------------------------------------------------------------------------


def test_nothing_is_computed_in_backward(device: torch.device) -> None:
    given = tensors(device=device)
    with recorded_ops() as calls:
        uf.iwae_objective(*given, dim=1).loss.backward()
    assert [name for name, _, _ in calls] == ["multi_sample_bound"]


def test_no_gradient_is_made_that_nobody_wants(device: torch.device) -> None:
    given = tensors(device=device)
    masks = []
    for wanted in ((), (0,), (0, 2, 3, 4)):
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(given)]
        with recorded_ops() as calls:
            uf.iwae_objective(*some, dim=1)
            with torch.no_grad():
                uf.iwae_objective(*some, dim=1)
            uf.iwae_objective(*some, dim=1, reduction="none")
        masks.append([arguments[-1] for _, _, arguments in calls])
    # the bits of decoder, its two further outputs, z, mean, logvar, and the prior's
    assert masks == [[0, 0, 0], [0b1, 0, 0], [0b111001, 0, 0]]


def test_16_bit_gradients_are_rounded_once_behind_the_loss_scale(device: torch.device) -> None:
    """In fp16 this gradient is below the smallest number, and a loss scale is there to keep it."""
    given = tensors(examples=200, samples=50, dtype=torch.float16, device=device)
    loss = uf.iwae_objective(*given, dim=1).loss * 2.0**14
    (gradient,) = torch.autograd.grad(loss, given[0])
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    (expected,) = torch.autograd.grad(-bound(by_hand(wide), 1).mean() * 2.0**14, wide[0])
    assert (gradient != 0).double().mean() > 0.9
    assert_close(gradient, expected, 2**-10, 2**-24)


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_any_gradient_of_the_loss(factor: float, device: torch.device) -> None:
    given = tensors(device=device)
    expected = torch.autograd.grad(factor * -bound(by_hand(given), 1).mean(), leaves(given))
    for _ in range(2):
        got = torch.autograd.grad(factor * uf.iwae_objective(*given, dim=1).loss, leaves(given))
        for g, e in zip(got, expected, strict=True):
            assert_close(g, e, 1e-12, 1e-15)


@pytest.mark.parametrize("factors", [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0)], ids=str)
def test_retain_graph(factors: tuple[float, float], device: torch.device) -> None:
    """The second backward pass finds the gradients as they were made, whatever became of the first one's."""
    given = tensors(device=device)
    loss = uf.iwae_objective(*given, dim=1).loss
    expected = torch.autograd.grad(-bound(by_hand(given), 1).mean(), leaves(given))
    for i, factor in enumerate(factors):
        got = torch.autograd.grad(loss, leaves(given), loss.new_tensor(factor), retain_graph=i == 0)
        for g, e in zip(got, expected, strict=True):
            assert_close(g, factor * e, 1e-12, 1e-15)
            g.fill_(math.nan)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_accumulate(device: torch.device) -> None:
    given = tensors(device=device)
    expected = torch.autograd.grad(-bound(by_hand(given), 1).mean(), leaves(given))
    uf.iwae_objective(*given, dim=1).loss.backward()
    (0.5 * uf.iwae_objective(*given, dim=1).loss).backward()
    for t, e in zip(leaves(given), expected, strict=True):
        assert_close(t.grad, 1.5 * e, 1e-12, 1e-15)


def test_loss_and_log_weights_together(device: torch.device) -> None:
    """A loss of log_w as well: gradients of both, although those of one were made before."""
    given = tensors(device=device)
    found = uf.iwae_objective(*given, dim=1)
    got = torch.autograd.grad(found.loss + 0.1 * found.log_w.square().mean(), leaves(given))
    log_w = by_hand(given)
    expected = torch.autograd.grad(-bound(log_w, 1).mean() + 0.1 * log_w.square().mean(), leaves(given))
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, 1e-12, 1e-15)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _peak(step: Any) -> int:
    from unigen_fast.bench.harness import peak_bytes

    return peak_bytes(step, torch.device("cpu"))


@pytest.mark.skipif(not NATIVE["cpu"], reason="the C++ kernels are not in use")
def test_memory_of_a_step_is_the_gradients() -> None:
    """Under 2 MB beyond them, of 15.7 MB of logits."""
    given = tensors(examples=100, samples=50, pixels=784, dtype=torch.float32)
    gradients = sum(t.nbytes for t in leaves(given))
    for scale in (1.0, 0.5):
        peak = _peak(
            lambda scale=scale: torch.autograd.grad(scale * uf.iwae_objective(*given, dim=1).loss, leaves(given))
        )
        assert peak <= gradients + 2e6
    with torch.no_grad():
        assert _peak(lambda: uf.iwae_objective(*given, dim=1)) <= 2e6


@pytest.mark.skipif(not NATIVE["cpu"], reason="the C++ kernels are not in use")
def test_a_learned_variance_costs_no_memory_of_its_own() -> None:
    given = tensors(examples=100, samples=20, pixels=784, dtype=torch.float32)
    logvar = torch.zeros(784, requires_grad=True)
    wanted = [*leaves(given), logvar]
    gradients = sum(t.nbytes for t in wanted)

    def step() -> Any:
        found = uf.iwae_objective((given[0], logvar), *given[1:], dim=1, likelihood="gaussian")
        return torch.autograd.grad(found.loss, wanted)

    assert _peak(step) <= gradients + 2e6


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_one_sample_is_the_single_sample_bound(device: torch.device) -> None:
    given = tensors(samples=1, device=device)
    found = uf.iwae_objective(*given, dim=1, reduction="none")
    assert_same_bits(found.loss, -found.log_w.squeeze(1))
    assert_same_bits(found.bound, found.log_w.detach().squeeze(1))
    assert_same_bits(found.ess, torch.ones_like(found.ess))


def test_log_weights_differ_to_more_digits_than_they_have(device: torch.device) -> None:
    """Of thousands of nats in fp32, whose last digit is 1e-3: weights need 1e-6."""
    given = tensors(examples=3, samples=50, pixels=20000, dtype=torch.float32, device=device)
    given[0] = (0.01 * given[0].detach()).requires_grad_()  # weights that are not all but one 0
    found = uf.iwae_objective(*given, dim=1)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    expected = uf.iwae_objective(*wide, dim=1)
    assert float(expected.ess.min()) > 1.5
    assert_close(found.ess, expected.ess, 2e-5)
    got = torch.autograd.grad(found.loss, given[0])[0]
    assert_close(got, torch.autograd.grad(expected.loss, wide[0])[0], 1e-5)


def test_impossible_samples(device: torch.device) -> None:
    """A sample of probability 0 has weight and gradient 0; an example of nothing else a bound of -inf."""
    given = tensors(device=device)
    with torch.no_grad():
        given[1].fill_(1.0)
        given[0][0, 1, 2] = -math.inf
        given[0][1, :, 0] = -math.inf
    found = uf.iwae_objective(*given, dim=1, reduction="sum")
    assert found.log_w[0, 1] == -math.inf and found.bound[1] == -math.inf and found.ess[1] == 0
    gradients = torch.autograd.grad(found.loss, leaves(given))
    for gradient in gradients[:2]:
        assert (gradient[0, 1] == 0).all() and (gradient[1] == 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()


def test_a_nan_stays_with_its_example(device: torch.device) -> None:
    given = tensors(device=device)
    with torch.no_grad():
        given[0][2, 1, 3] = math.nan
    found = uf.iwae_objective(*given, dim=1, reduction="none")
    assert found.loss.isnan().tolist() == [False, False, True, False, False]
    gradients = torch.autograd.grad(found.loss.nansum() + found.loss[2], leaves(given))
    for gradient in gradients:
        assert gradient[2].isnan().any() and gradient[[0, 1, 3, 4]].isfinite().all()


# ---- likelihoods -----------------------------------------------------------------------------------------------------

# options, density, kinds of x and of what the decoder gives
LIKELIHOODS: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    "bernoulli": ({}, bernoulli, ["binary", "logits"]),
    "gaussian of variance 1": ({"likelihood": "gaussian"}, unit, ["normal"] * 2),
    "gaussian": ({"likelihood": "gaussian"}, gaussian, ["normal"] * 3),
    "laplace": ({"likelihood": "laplace"}, laplace, ["normal"] * 3),
    "discretized_logistic": (
        {"likelihood": "discretized_logistic", "likelihood_options": {"bin_width": 0.2, "low": 0.0, "high": 1.0}},
        bins,
        ["unit", "normal", "normal"],
    ),
    "negative_binomial": ({"likelihood": "negative_binomial"}, negative_binomial, ["counts", "std", "std"]),
    "zero_inflated_negative_binomial": (
        {"likelihood": "zero_inflated_negative_binomial"},
        zero_inflated,
        ["counts", "std", "std", "logits"],
    ),
}


def specs_of_event(kinds: Sequence[str], layout: str, rows: tuple[int, ...], pixels: int) -> list[Spec]:
    """x of every example, and what the decoder gave for every row; "shared": the last output the same for all."""
    if layout == "shared" and len(kinds) == 2:
        pytest.skip("has one output")
    specs = [Spec((rows[0], pixels), kinds[0]), *(Spec((*rows, pixels), kind) for kind in kinds[1:])]
    return [*specs[:-1], Spec((pixels,), kinds[-1])] if layout == "shared" else specs


def drawn(specs: list[Spec], layout: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, and what is differentiated, in a layout; "mixed": the second one in another."""
    lay_out = LAYOUTS[{"mixed": "stepped", "shared": "contiguous"}.get(layout, layout)]
    given = [lay_out(draw(spec, dtype)) for spec in specs]
    if layout == "mixed":
        given[1] = LAYOUTS["transposed"](given[1])
    return [t.detach().to(device).requires_grad_(i > 0) for i, t in enumerate(given)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "mixed", "shared"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_likelihoods(likelihood: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Made with the loss, and with a loss of log_w beside it; in groups; the last output each sample's, or shared."""
    options, density, kinds = LIKELIHOODS[likelihood]
    examples, samples, pixels = (3, 4, 41) if dtype == torch.float64 else (17, 6, 9)
    specs = specs_of_event(kinds, layout, (examples, samples), pixels)
    specs += [Spec((examples, samples, L)), Spec((examples, L)), Spec((examples, L), "unit")]
    given = drawn(specs, layout, dtype, device)

    def ours(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        found = uf.iwae_objective(rest[:-3], x, *rest[-3:], dim=1, estimator="miwae", num_groups=2, **options)
        return found.loss, found.log_w

    def by_definition(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        log_w = log_weights(density, rest[:-3], x, rest[-3], rest[-2:])
        return -bound(log_w.unflatten(1, (2, -1)), 2).mean(), log_w

    wide = [t.detach().double().requires_grad_(i > 0) for i, t in enumerate(given)]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for beside in (0.0, 0.3):
        (loss, log_w), (expected, wide_log_w) = ours(*given), by_definition(*wide)
        assert_close(loss, expected, min(tolerance, 1e-5))
        assert_close(log_w, wide_log_w, min(tolerance, 1e-5))
        got = torch.autograd.grad(loss + beside * log_w.mean() if beside else loss, leaves(given))
        wanted = torch.autograd.grad(expected + beside * wide_log_w.mean() if beside else expected, leaves(wide))
        for g, w in zip(got, wanted, strict=True):
            assert_close(g, w, tolerance, 1e-30)


# ---- estimators ------------------------------------------------------------------------------------------------------


def test_sticking_the_landing(device: torch.device) -> None:
    """q's parameters are reached through z alone."""
    given = tensors(device=device)
    got = torch.autograd.grad(uf.iwae_objective(*given, dim=1, estimator="stl").loss, leaves(given), allow_unused=True)
    logits, x, z, mean, logvar = given
    log_w = log_weights(bernoulli, (logits,), x, z, (mean.detach(), logvar.detach()))
    expected = torch.autograd.grad(-bound(log_w, 1).mean(), [logits, z])
    assert got[2] is None and got[3] is None
    for g, e in zip(got[:2], expected, strict=True):
        assert_close(g, e, 1e-12, 1e-15)


def test_counts_with_eps(device: torch.device) -> None:
    """scvi-tools' counts within the whole bound: not in one pass, but by the same name and option."""
    mu, theta = (torch.rand(4, 9, device=device) + 0.1 for _ in range(2))
    x, mean = torch.poisson(mu), torch.zeros(4, 3, device=device)
    got = uf.elbo_loss((mu, theta), x, mean, mean, likelihood="negative_binomial", likelihood_options={"eps": 0.5})
    assert_close(got.log_likelihood, uf.negative_binomial_log_prob(x, mu, theta, eps=0.5), 1e-6)


@pytest.mark.parametrize("likelihood_options", [{}, {"spread": "logvar"}], ids=["one pass", "composed"])
def test_doubly_reparameterised(likelihood_options: dict[str, Any], device: torch.device) -> None:
    """As `dreg_loss` on log-weights built by hand, the decoder's way to z included."""
    torch.manual_seed(0)
    x = torch.randn(B, D, dtype=torch.float64, device=device)
    mean, logvar = (torch.randn(B, L, dtype=torch.float64, device=device).requires_grad_() for _ in range(2))
    noise = torch.randn(B, K, L, dtype=torch.float64, device=device)
    weight = torch.randn(L, D, dtype=torch.float64, device=device, requires_grad=True)

    def gradients(ours: bool) -> tuple[Tensor, ...]:
        z = mean.unsqueeze(1) + (logvar / 2).exp().unsqueeze(1) * noise
        decoded = z @ weight
        if ours:
            loss = uf.iwae_objective(
                decoded, x, z, mean, logvar, dim=1, likelihood="gaussian", estimator="dreg",
                likelihood_options=likelihood_options,
            ).loss  # fmt: skip
        else:
            log_px = uf.gaussian_log_prob(x.unsqueeze(1), decoded, decoded.new_zeros(()))
            q = torch.distributions.Normal(mean.detach().unsqueeze(1), (logvar.detach() / 2).exp().unsqueeze(1))
            log_w = log_px + (torch.distributions.Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(-1)
            loss = uf.dreg_loss(log_w, z, dim=1)
        return torch.autograd.grad(loss, [mean, logvar, weight])

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        assert_close(got, expected, 1e-11)


def test_limits_of_estimators(device: torch.device) -> None:
    given = tensors(device=device)

    def loss(estimator: str, **options: Any) -> Tensor:
        return uf.iwae_objective(*given, dim=1, estimator=estimator, **options).loss

    iwae, elbo = loss("iwae"), loss("elbo")
    for got, expected in (
        (loss("miwae", num_groups=1), iwae),
        (loss("miwae", num_groups=K), elbo),
        (loss("ciwae", beta=0.0), iwae),
        (loss("ciwae", beta=1.0), elbo),
        (loss("renyi", alpha=0.0), iwae),
        (loss("renyi", alpha=1.0), elbo),
        (loss("renyi", alpha=-math.inf), -by_hand(given).amax(1).mean()),
        (loss("cubo"), loss("cubo", order=2.0)),
        (loss("tvo", partition=[0.0, 1.0]), elbo),
    ):
        assert_close(got, expected, 1e-12)
    assert elbo > iwae


def test_results_beside_the_loss_are_those_of_the_family(device: torch.device) -> None:
    given = tensors(device=device)
    found = uf.iwae_objective(*given, dim=1)
    assert_close(found.log_w, by_hand(given), 1e-12)
    assert_close(found.bound, uf.log_mean_exp(found.log_w, dim=1), 1e-12)
    assert_close(found.ess, uf.effective_sample_size(found.log_w, dim=1), 1e-12)
    assert not found.bound.requires_grad and not found.ess.requires_grad
    by_groups = uf.iwae_objective(*given, dim=1, estimator="miwae", num_groups=2)
    grouped = found.log_w.unflatten(1, (2, 2))
    assert_close(by_groups.ess, uf.effective_sample_size(grouped, dim=2).mean(1), 1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_samples_in_any_dimension(dim: int, device: torch.device) -> None:
    """Rows of two dimensions beside the samples'."""
    torch.manual_seed(0)
    shape = [2, 3]
    shape.insert(dim, K)
    kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
    logits, z = (torch.randn(*shape, n, **kind).requires_grad_() for n in (D, L))
    x = torch.rand(2, 3, D, **kind).round()
    mean, logvar = (torch.randn(2, 3, L, **kind).requires_grad_() for _ in range(2))
    found = uf.iwae_objective(logits, x, z, mean, logvar, dim=dim, event_ndims=1, reduction="none")
    log_w = log_weights(bernoulli, (logits,), x, z, (mean, logvar), dim=dim)
    assert_close(found.log_w, log_w, 1e-12)
    assert_close(found.loss, -bound(log_w, dim), 1e-12)
    got = torch.autograd.grad(found.loss.sum(), [logits, z, mean, logvar])
    expected = torch.autograd.grad(-bound(log_w, dim).sum(), [logits, z, mean, logvar])
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, 1e-12, 1e-15)


@pytest.mark.parametrize("spread", ["logstd", "std"])
def test_spread_and_clamp_of_the_posterior(spread: str, device: torch.device) -> None:
    given = tensors(device=device)
    with torch.no_grad():
        given[4].abs_().add_(0.2)
    logvar = (2 * given[4] if spread == "logstd" else 2 * given[4].log()).clamp(-1.0, 0.5)
    got = uf.iwae_objective(*given, dim=1, spread=spread, clamp_logvar=(-1.0, 0.5)).loss
    assert_close(got, -bound(by_hand([*given[:4], logvar]), 1).mean(), 1e-12)


def test_latents_of_another_dtype(device: torch.device) -> None:
    """A decoder under autocast gives bf16, the samples are fp32."""
    given = tensors(dtype=torch.float32, device=device)
    logits, x = given[0].detach().bfloat16().requires_grad_(), given[1].bfloat16()
    found = uf.iwae_objective(logits, x, *given[2:], dim=1)
    got = torch.autograd.grad(found.loss, [logits, *leaves(given[2:])])
    wide = [logits.detach().double().requires_grad_(), *(t.detach().double() for t in given[1:])]
    wide[2:] = [t.requires_grad_() for t in wide[2:]]
    expected = torch.autograd.grad(-bound(by_hand(wide), 1).mean(), leaves(wide))
    assert [g.dtype for g in got] == [torch.bfloat16] + 3 * [torch.float32]
    for g, e, tolerance in zip(got, expected, (2**-7, 1e-5, 1e-5, 1e-5), strict=True):
        assert_close(g, e, tolerance)


def test_integers_beside_a_16_bit_decoder(device: torch.device) -> None:
    """Data of more digits than bf16 has are not rounded, no more than in the log-likelihood by itself."""
    given = tensors(dtype=torch.bfloat16, device=device)
    x = torch.arange(B * D, device=device).reshape(B, D) + 1001
    found = uf.iwae_objective(given[0], x, *given[2:], dim=1, likelihood="gaussian")
    log_px = uf.gaussian_log_prob(x.unsqueeze(1), given[0], given[0].new_zeros(()))
    assert_close(found.log_w, log_px, 1e-5)  # beside which the latent is nothing


# ---- the evidence lower bound ----------------------------------------------------------------------------------------


def of_one_sample(
    *, examples: int = B, pixels: int = D, dtype: torch.dtype = torch.float64, device: Any = "cpu"
) -> list[Tensor]:
    """logits, x, mean, logvar."""
    logits, x, _, mean, logvar = tensors(examples=examples, samples=1, pixels=pixels, dtype=dtype, device=device)
    return [logits.detach().squeeze(1).requires_grad_(), x, mean, logvar]


def elbo_by_hand(given: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The rows of log-likelihood and KL."""
    logits, x, mean, logvar = given
    return bernoulli(x, logits), divergence((mean, logvar))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "mixed", "shared"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_elbo_of_each_likelihood(likelihood: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Made with the loss, and with a loss of the rows beside it; weighted; the last output each row's, or shared."""
    options, density, kinds = LIKELIHOODS[likelihood]
    # few long rows, whose columns threads share, and many
    examples, pixels = {torch.float64: (3, 41), torch.float32: (2, 70000), torch.bfloat16: (300, 9)}[dtype]
    specs = specs_of_event(kinds, layout, (examples,), pixels) + [Spec((examples, L)), Spec((examples, L), "unit")] * 2
    given = drawn(specs, layout, dtype, device)
    weights = torch.rand(examples, dtype=torch.float64, device=device)
    weights[0] = 0

    def ours(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        m, v, prior_mean, prior_logvar = rest[-4:]
        return uf.elbo_loss(
            rest[:-4], x, m, v, prior_mean=prior_mean, prior_logvar=prior_logvar, weights=weights, kl_weight=0.6,
            scale=-1.5, **options,
        )  # fmt: skip

    def by_definition(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        of_x, kl = density(x, *(t.expand(x.shape) for t in rest[:-4])), divergence(rest[-4:-2], rest[-2:])
        return -1.5 * (weights * (0.6 * kl - of_x)).mean(), of_x, kl

    wide = [t.detach().double().requires_grad_(i > 0) for i, t in enumerate(given)]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for beside in (0.0, 0.3):
        found, expected = ours(*given), by_definition(*wide)
        for f, e in zip(found, expected, strict=True):
            assert_close(f, e, min(tolerance, 1e-5))
        got, wanted = (
            torch.autograd.grad(loss + beside * (of_x - 2 * kl).mean() if beside else loss, leaves(of))
            for (loss, of_x, kl), of in ((found, given), (expected, wide))
        )
        for g, w in zip(got, wanted, strict=True):
            assert_close(g, w, tolerance, 1e-30)


def test_elbo_computes_nothing_in_backward_and_nothing_unwanted(device: torch.device) -> None:
    given = of_one_sample(device=device)
    masks = []
    for wanted in ((), (0,), (0, 2, 3)):
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(given)]
        for reduction in ("mean", "none"):
            with recorded_ops() as calls:
                loss = uf.elbo_loss(*some, reduction=reduction).loss.sum()
                if wanted:
                    loss.backward()
            masks.append([arguments[-1] for _, _, arguments in calls])
            assert [name for name, _, _ in calls][1:] == ["elbo_loss_backward"] * (reduction == "none" and wanted != ())
    # the bits of decoder, its two further outputs, mean, logvar, and the prior's: made forward, or needed backward
    assert masks == [[0], [0], [0b1], [0, 0b1], [0b11001], [0, 0b11001]]


def test_16_bit_gradients_of_the_elbo_are_rounded_once_behind_the_loss_scale(device: torch.device) -> None:
    given = of_one_sample(examples=10000, dtype=torch.float16, device=device)
    loss = uf.elbo_loss(*given).loss * 2.0**14
    got = torch.autograd.grad(loss, leaves(given))
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    of_x, kl = elbo_by_hand(wide)
    expected = torch.autograd.grad((kl - of_x).mean() * 2.0**14, leaves(wide))
    for g, e in zip(got, expected, strict=True):
        assert (g != 0).double().mean() > 0.9
        assert_close(g, e, 2**-10, 2**-24)


@pytest.mark.parametrize("factors", [(1.0, -2.5), (0.0, 1.0), (3.0, 1.0)], ids=str)
def test_any_gradient_of_the_elbo_and_twice(factors: tuple[float, float], device: torch.device) -> None:
    given = of_one_sample(device=device)
    loss = uf.elbo_loss(*given, kl_weight=0.5).loss
    of_x, kl = elbo_by_hand(given)
    expected = torch.autograd.grad((0.5 * kl - of_x).mean(), leaves(given))
    for i, factor in enumerate(factors):
        got = torch.autograd.grad(loss, leaves(given), loss.new_tensor(factor), retain_graph=i == 0)
        for g, e in zip(got, expected, strict=True):
            assert_close(g, factor * e, 1e-12, 1e-15)
            g.fill_(math.nan)


@pytest.mark.skipif(not NATIVE["cpu"], reason="the C++ kernels are not in use")
def test_a_learned_dispersion_of_the_elbo_costs_no_memory_of_its_own() -> None:
    torch.manual_seed(0)
    x = torch.poisson(torch.full((500, 2000), 2.0))
    mu, theta, gate = torch.rand(500, 2000) + 0.5, torch.rand(2000) + 0.5, torch.randn(500, 2000)
    wanted = [t.requires_grad_() for t in (mu, theta, gate, torch.randn(500, L), torch.randn(500, L))]

    def step() -> Any:
        loss = uf.elbo_loss(wanted[:3], x, *wanted[3:], likelihood="zero_inflated_negative_binomial").loss
        return torch.autograd.grad(loss, wanted)

    assert _peak(step) <= sum(t.nbytes for t in wanted) + 1e6  # and each whole tensor has 4e6


def test_elbo_of_no_rows_and_of_one_without_dimensions(device: torch.device) -> None:
    mean, logvar = torch.zeros(L, device=device), torch.zeros(L, device=device)
    logits, x = torch.zeros(D, device=device, requires_grad=True), torch.ones(D, device=device)
    found = uf.elbo_loss(logits, x, mean, logvar)
    assert found.log_likelihood.shape == found.kl.shape == ()
    assert_close(found.loss, torch.tensor(D * math.log(2), device=device), 1e-6)
    assert_close(torch.autograd.grad(found.loss, logits)[0], torch.full_like(logits, -0.5), 1e-6)
    m, spread = (torch.zeros(size, device=device, requires_grad=True) for size in ((0, D), (D,)))
    empty = uf.elbo_loss((m, spread), m.detach(), mean.expand(0, L), logvar.expand(0, L), likelihood="gaussian")
    assert empty.loss.isnan() and empty.kl.shape == (0,)
    assert torch.autograd.grad(empty.loss, spread)[0].eq(0).all()


def test_elbo_differentiates_the_data_and_the_weights(device: torch.device) -> None:
    """Which the kernel has no gradients of."""
    logits, x, mean, logvar = of_one_sample(device=device)
    weights = torch.rand(B, dtype=torch.float64, device=device)
    wanted = [t.detach().requires_grad_() for t in (x, weights)]
    of_x, kl = bernoulli(wanted[0], logits), divergence((mean, logvar))
    expected = torch.autograd.grad((wanted[1] * (kl - of_x)).mean(), wanted)
    found = uf.elbo_loss(logits, wanted[0], mean, logvar, weights=wanted[1])
    for g, e in zip(torch.autograd.grad(found.loss, wanted), expected, strict=True):
        assert_close(g, e, 1e-12, 1e-15)


def test_elbo_broadcasts(device: torch.device) -> None:
    """A prior for all; booleans as data; a latent of another dtype."""
    logits, x, mean, logvar = of_one_sample(device=device)
    prior = torch.randn(L, dtype=torch.float64, device=device, requires_grad=True)
    found = uf.elbo_loss(logits, x.bool(), mean.float(), logvar.float(), prior_mean=prior)
    of_x, kl = bernoulli(x, logits), divergence((mean, logvar), (prior, torch.zeros_like(prior)))
    got, expected = (torch.autograd.grad(loss, [logits, prior]) for loss in (found.loss, (kl - of_x).mean()))
    assert_close(found.log_likelihood, of_x, 1e-12)
    assert found.loss.dtype == torch.float64
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, 1e-6)  # of a posterior in fp32


@pytest.mark.parametrize("composed", [False, True], ids=["one pass", "composed"])
def test_elbo_refuses_one_row_for_all(composed: bool) -> None:
    """Of the decoder, the data or the mean; the decoder has the shape of x."""
    logits, x, mean, logvar = of_one_sample()
    x.requires_grad_(composed)
    for changed, match in (
        ((logits[:1], x, mean, logvar), r"x: got shape \(5, 9\) beside decoder's logits \(1, 9\)"),
        ((logits[:, :1], x, mean, logvar), r"x: got shape \(5, 9\) beside decoder's logits \(5, 1\)"),
        ((logits, x[:1], mean, logvar), r"x: got shape \(1, 9\)"),
        ((logits, x, mean[:1], logvar), r"mean: got shape \(1, 3\), expected the decoder's rows \(5,\)"),
        ((logits, x, mean[0], logvar), r"(x|mean): got shape"),
    ):
        assert_refused(lambda changed=changed: uf.elbo_loss(*changed), ValueError, match)


@pytest.mark.parametrize("composed", [False, True], ids=["one pass", "composed"])
@pytest.mark.parametrize(("latent", "image"), [((3,), (1, 4, 4)), ((2, 3, 3), (1, 4, 4)), ((3,), (2, 9))], ids=str)
def test_the_event_is_what_is_no_row_of_the_latent(latent: tuple, image: tuple, composed: bool) -> None:
    x, logits = torch.rand(B, *image), torch.randn(B, *image)
    mean, logvar = torch.randn(B, *latent), torch.randn(B, *latent)
    of_x = uf.bernoulli_log_prob(logits, x, event_ndims=len(image))
    kl = uf.gaussian_kl(mean, logvar, event_ndims=len(latent), reduction="none")
    found = uf.elbo_loss(logits, x.requires_grad_(composed), mean, logvar)
    assert_close(found.log_likelihood, of_x, 1e-5)
    assert_close(found.kl, kl, 1e-5)
    z, of_samples = torch.randn(B, K, *latent), torch.randn(B, K, *image)
    several = uf.iwae_objective(of_samples, x, z, mean, logvar, dim=1)
    told = uf.iwae_objective(of_samples, x, z, mean, logvar, dim=1, event_ndims=len(image))
    assert several.log_w.shape == (B, K)
    assert_close(several.loss, told.loss, 1e-6)


def test_an_event_of_two_readings() -> None:
    """Channels of the latent and of the image that happen to be as many: nothing is guessed."""
    x, latent = torch.rand(B, 3, 4, 4), torch.randn(B, 3, 2, 2)
    assert_refused(
        lambda: uf.elbo_loss(x, x, latent, latent),
        ValueError,
        r"event_ndims=3: rows \[5\]; event_ndims=2: rows \[5, 3\]",
    )
    assert uf.elbo_loss(x, x, latent, latent, event_ndims=3).kl.shape == (B,)


def test_a_dimension_of_the_samples_from_the_end() -> None:
    given = tensors()
    found, expected = (uf.iwae_objective(*given, dim=dim).loss for dim in (-2, 1))
    assert torch.equal(found, expected)
    decoder, x, z, mean, logvar = given
    images = (decoder.unflatten(-1, (1, 3, 3)), x.unflatten(-1, (1, 3, 3)), z, mean, logvar)
    assert_refused(lambda: uf.iwae_objective(*images, dim=-2), ValueError, "dim: got -2, .* counted from the front")


def test_elbo_options(device: torch.device) -> None:
    given = tensors(device=device)
    logits, x, _, mean, logvar = given
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64, device=device)
    found = uf.elbo_loss(
        logits[:, 0], x, mean, logvar, weights=weights, normalize_weights=True, kl_weight=3.0, prior_mean=0.5 * mean
    )
    kl = uf.gaussian_kl(mean, logvar, 0.5 * mean, reduction="none")
    rows = 3 * kl - bernoulli(x, logits[:, 0])
    assert_close(found.loss, (rows * weights).sum() / 4, 1e-12)
    assert_close(found.kl, kl, 1e-12)
    assert_close(found.log_likelihood, bernoulli(x, logits[:, 0]), 1e-12)


def test_elbo_of_several_decoder_outputs(device: torch.device) -> None:
    torch.manual_seed(0)
    kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
    m, x = torch.randn(B, 2, 3, **kind), torch.randn(B, 2, 3, **kind)
    mean, logvar = torch.randn(B, L, **kind), torch.randn(B, L, **kind)
    spread = torch.randn((), **kind)
    found = uf.elbo_loss((m, spread), x, mean, logvar, likelihood="gaussian", event_ndims=2)
    expected = torch.distributions.Normal(m, (spread / 2).exp()).log_prob(x).sum((1, 2))
    assert_close(found.log_likelihood, expected, 1e-12)


# ---- the others ------------------------------------------------------------------------------------------------------


def test_adversary_activated_vae_is_the_vae_under_the_perfect_discriminator() -> None:
    """Lemma 2 of Hu et al.: weights of 1 on data and 0 on fakes leave half the VAE's loss."""
    real, fake = (
        torch.rand(6, dtype=torch.float64).requires_grad_(),
        torch.rand(6, dtype=torch.float64).requires_grad_(),
    )
    sure = torch.full((6,), 100.0, dtype=torch.float64)
    loss = uf.adversary_activated_loss(real, fake, real_logits=sure, fake_logits=-sure)
    assert_close(loss, real.mean() / 2, 1e-12)
    assert_close(torch.autograd.grad(loss, real)[0], torch.full_like(real, 1 / 12), 1e-12)


def test_no_gradient_through_the_adversary_weights() -> None:
    losses, logits = torch.rand(4).requires_grad_(), torch.randn(4, 1).requires_grad_()
    loss = uf.adversary_activated_loss(losses, losses, real_logits=logits, fake_logits=logits)
    assert torch.autograd.grad(loss, logits, allow_unused=True) == (None,)


def chunks_of(log_w: Tensor, *sizes: int) -> Iterator[Tensor]:
    yield from log_w.split(list(sizes), dim=1)


def test_streamed_log_likelihood_is_that_of_all_samples(device: torch.device) -> None:
    log_w = 30 * torch.randn(7, 5000, dtype=torch.float64, device=device) - 500
    expected = torch.logsumexp(log_w, 1) - math.log(5000)
    for sizes in ((5000,), (1, 4999), (2500, 2000, 500)):
        assert_close(uf.streaming_log_likelihood(chunks_of(log_w, *sizes), dim=1), expected, 1e-14)
    narrow = uf.streaming_log_likelihood(chunks_of(log_w.float(), *[100] * 50), dim=1)
    assert narrow.dtype == torch.float32
    assert_close(narrow, torch.logsumexp(log_w.float().double(), 1) - math.log(5000), 6e-8)


def test_streamed_rows_without_weight(device: torch.device) -> None:
    log_w = torch.zeros(4, 6, device=device)
    log_w[0] = -math.inf
    log_w[1, :4] = -math.inf
    log_w[2, 3] = math.nan
    log_w[3, 2:] = -math.inf
    got = uf.streaming_log_likelihood(chunks_of(log_w, 2, 2, 2), dim=1)
    expected = torch.tensor([-math.inf, math.log(1 / 3), math.nan, math.log(1 / 3)], device=device)
    assert_close(got, expected, 1e-6)


def test_chunks_are_computed_as_needed_and_without_gradients() -> None:
    parameter = torch.randn(3, 4, requires_grad=True)
    alive: list[weakref.ref[Tensor]] = []

    def chunks() -> Iterator[Tensor]:
        for _ in range(5):
            assert sum(r() is not None for r in alive) <= 1  # the one that the loop still holds
            chunk = 2 * parameter
            assert not chunk.requires_grad
            alive.append(weakref.ref(chunk))
            yield chunk

    assert not uf.streaming_log_likelihood(chunks(), dim=1).requires_grad


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"likelihood": "poisson"}, ValueError, "likelihood: got 'poisson', expected one of 'bernoulli'"),
        ({"estimator": "iwea"}, ValueError, "estimator: got 'iwea', expected one of 'iwae'"),
        ({"reduction": "avg"}, ValueError, "reduction: got 'avg'"),
        ({"dim": 3}, ValueError, "dim: got 3, expected one of the leading dimensions"),
        ({"dim": -4}, ValueError, "dim: got -4"),
        ({"dim": 1.0}, TypeError, "dim: expected an int, got float"),
        ({"beta": 0.5}, ValueError, "beta: got 0.5 with estimator 'iwae'"),
        ({"estimator": "ciwae"}, ValueError, "beta: got none, expected one for estimator 'ciwae'"),
        ({"estimator": "ciwae", "beta": 1.5}, ValueError, r"beta: got 1.5, expected a number in \[0, 1\]"),
        ({"estimator": "miwae", "num_groups": 3}, ValueError, "num_groups: got 3, expected a divisor of the 4 samples"),
        ({"estimator": "miwae", "num_groups": 2.0}, TypeError, "num_groups: expected an int"),
        ({"estimator": "cubo", "order": 0.5}, ValueError, "order: got 0.5"),
        ({"estimator": "tvo", "partition": [0.0, 0.5]}, ValueError, "partition: got"),
        (
            {"decoder": [torch.zeros(B, K, D)] * 2},
            ValueError,
            "decoder: got 2 tensors, expected logits for 'bernoulli'",
        ),
        ({"decoder": 3}, TypeError, "decoder: expected a torch.Tensor or a sequence"),
        ({"decoder": torch.zeros(B, K, D).int()}, TypeError, "decoder's logits: expected a floating-point tensor"),
        ({"x": torch.zeros(B + 1, D)}, ValueError, r"x: got shape \(6, 9\) beside decoder's logits \(5, 4, 9\)"),
        ({"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
        (
            {"z": torch.zeros(B, K + 1, L)},
            ValueError,
            r"z: got shape \(5, 5, 3\), expected the decoder's rows \(5, 4\)",
        ),
        ({"mean": torch.zeros(B, K, L)}, ValueError, r"mean: got shape \(5, 4, 3\) beside z \(5, 4, 3\) without dim"),
        ({"prior_mean": torch.zeros(2, L)}, ValueError, r"prior_mean: got shape \(2, 3\)"),
        ({"logvar": torch.zeros(B, L).int()}, TypeError, "logvar: expected a floating-point tensor"),
        ({"mean": torch.zeros(B, L, device="meta")}, ValueError, "mean: got device meta, expected cpu as z"),
        ({"event_ndims": 4}, ValueError, "event_ndims: got 4"),
        ({"spread": "variance"}, ValueError, "spread: got 'variance'"),
        ({"likelihood_options": {"bin_width": 0.1}}, ValueError, "likelihood_options: got 'bin_width'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, Any], error: type[Exception], match: str) -> None:
    given = dict(zip(("decoder", "x", "z", "mean", "logvar"), tensors(dtype=torch.float32), strict=True))
    assert_refused(lambda: uf.iwae_objective(**{**given, "dim": 1, **change}), error, match)


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="expected at least one sample along dim 1"):
        uf.iwae_objective(*tensors(samples=0), dim=1)


def test_errors_of_the_others() -> None:
    row, logits = torch.zeros(3), torch.zeros(4)
    logits_of, x, _, mean, logvar = tensors()
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            lambda: uf.elbo_loss(logits_of, x.unsqueeze(1), mean, logvar),
            ValueError,
            r"x: got shape \(5, 1, 9\) beside decoder's logits",
        ),
        (lambda: uf.elbo_loss(logits_of[:, 0], x[:, :-1], mean, logvar), ValueError, r"x: got shape \(5, 8\)"),
        (
            lambda: uf.elbo_loss(logits_of[:, 0], x, mean[:3], logvar),
            ValueError,
            r"mean: got shape \(3, 3\), .* rows \(5,\)",
        ),
        (lambda: uf.elbo_loss(logits_of[:, 0], x, mean, logvar, weights=mean), ValueError, r"weights: got shape"),
        (lambda: uf.elbo_loss(logits_of[:, 0], x, mean, logvar.int()), TypeError, "logvar: expected a floating-point"),
        (lambda: uf.elbo_loss(logits_of[:, 0], None, mean, logvar), TypeError, "x: expected a torch.Tensor"),
        (
            lambda: uf.elbo_loss(logits_of[:, 0], x, *(t.to("meta") for t in (mean, logvar))),
            ValueError,
            "mean: got device meta, expected cpu as the decoder's outputs",
        ),
        (lambda: uf.elbo_loss(logits_of[:, 0], x, mean, logvar, likelihood="x"), ValueError, "likelihood: got 'x'"),
        (
            lambda: uf.adversary_activated_loss(row, row, real_logits=logits, fake_logits=row),
            ValueError,
            r"real_logits: got shape \(4,\)",
        ),
        (
            lambda: uf.adversary_activated_loss(row, row, real_logits=row, fake_logits=row, reduction="none"),
            ValueError,
            "reduction: got 'none'",
        ),
        (lambda: uf.streaming_log_likelihood([], dim=0), ValueError, "got no chunks"),
        (lambda: uf.streaming_log_likelihood([torch.zeros(2, 0)], dim=1), ValueError, "at least one sample"),
        (
            lambda: uf.streaming_log_likelihood([torch.zeros(2, 1), torch.zeros(3, 1)], dim=1),
            ValueError,
            "chunk of rows",
        ),
        (lambda: uf.streaming_log_likelihood([torch.zeros(2, 1).int()], dim=1), TypeError, "floating-point"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()
