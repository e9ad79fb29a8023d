"""Bounds and self-normalised weights: what is particular to them; `test_fused.py` holds them to the reference."""

import itertools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import LOW_PRECISION, assert_close, assert_refused, assert_rounded_alike, assert_same_bits, reference_path
from torch import Tensor

import unigen_fast as uf

INF, NAN = math.inf, math.nan


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


@pytest.fixture
def log_w(device: torch.device) -> Tensor:
    return (3 * torch.randn(6, 10, dtype=torch.float64, device=device)).requires_grad_()


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("value", ["bound", "surrogate"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_sample_is_exactly_the_elbo(reduction: str, value: str, dtype: torch.dtype, device: torch.device) -> None:
    """K = 1: -log_w to the bit, gradient included, wherever the sample dimension stands."""
    elbo = (100 * torch.randn(8, dtype=torch.float64, device=device)).to(dtype)
    wide = elbo if dtype == torch.float64 else elbo.float()
    expected = {"mean": -wide.mean(), "sum": -wide.sum(), "none": -wide}[reduction]
    expected_gradient = torch.full_like(elbo, -1 / 8 if reduction == "mean" else -1)
    for dim in (0, 1):
        x = elbo.unsqueeze(dim).requires_grad_()
        loss = uf.iwae_loss(x, dim=dim, reduction=reduction, value=value)
        if reduction == "none":
            assert_same_bits(loss, expected)
        else:
            # the order of a sum is free: exactly representable numbers make it exact
            assert_close(loss, expected, 1e-6 if dtype != torch.float64 else 1e-15)
        assert_same_bits(gradient(loss.sum(), x).squeeze(dim), expected_gradient)
        integers = torch.arange(-3, 5, dtype=dtype, device=device).unsqueeze(dim)
        exact = {"mean": -0.5, "sum": -4.0}
        if reduction in exact:
            assert uf.iwae_loss(integers, dim=dim, reduction=reduction, value=value).item() == exact[reduction]
        assert_same_bits(uf.log_mean_exp(x, dim=dim), wide)
        assert_same_bits(uf.importance_weights(x, dim=dim), torch.ones_like(wide).unsqueeze(dim))
        assert_same_bits(uf.effective_sample_size(x, dim=dim), torch.ones_like(wide))


def test_bound_tightens_with_samples(log_w: Tensor) -> None:
    """mean log w <= log mean w <= max log w (Burda et al., Theorem 1)."""
    bound = uf.log_mean_exp(log_w, dim=1)
    assert (bound >= log_w.mean(1)).all() and (bound <= log_w.amax(1)).all()


def test_iwae_gradient_is_minus_the_normalised_weights(log_w: Tensor) -> None:
    expected = -torch.softmax(log_w.detach(), 1)
    for value in ("bound", "surrogate"):
        loss = uf.iwae_loss(log_w, dim=1, reduction="sum", value=value)
        assert_close(gradient(loss, log_w), expected, 1e-14)


def test_iwae_weights_are_detached_and_of_the_right_sign(device: torch.device) -> None:
    """AntixK/PyTorch-VAE (#34, #53) weights by softmax(+loss) and differentiates the weights."""
    log_p = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    log_q = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    loss = uf.iwae_loss(log_p - log_q, dim=1, value="surrogate")
    d_p, d_q = torch.autograd.grad(loss, (log_p, log_q))
    weights = torch.softmax((log_p - log_q).detach(), 1)
    assert_close(d_p, -weights / 5, 1e-13)
    assert_close(d_q, weights / 5, 1e-13)
    best = (log_p - log_q).argmax(1, keepdim=True)
    assert (d_p.gather(1, best) == d_p.amin(1, keepdim=True)).all(), "the best sample gets the largest step up"
    undetached = -(torch.softmax(log_p - log_q, 1) * (log_p - log_q)).sum(1).mean()
    assert not torch.allclose(d_p, torch.autograd.grad(undetached, log_p)[0], rtol=0.1)
    wrong_sign = (torch.softmax(-(log_p - log_q), 1).detach() * -(log_p - log_q)).sum(1).mean()
    assert not torch.allclose(d_p, torch.autograd.grad(wrong_sign, log_p)[0], rtol=0.1)


def test_samples_are_reduced_over_the_dimension_named(device: torch.device) -> None:
    """pythae's MIWAE takes softmax over M of [B, M, K]: the bound must be that of K, at any place and negative too."""
    x = torch.randn(3, 4, 5, dtype=torch.float64, device=device)
    for dim in (-3, -2, -1, 0, 1, 2):
        expected = torch.logsumexp(x, dim) - math.log(x.size(dim))
        assert_close(uf.log_mean_exp(x, dim=dim), expected, 1e-14)
        assert_close(uf.importance_weights(x, dim=dim), torch.softmax(x, dim), 1e-14)
    assert_same_bits(uf.log_mean_exp(x, dim=-2), uf.log_mean_exp(x, dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_samples_first_or_last(dtype: torch.dtype, device: torch.device) -> None:
    """[B, K] and [K, B] of the same numbers, and the same memory seen both ways."""
    x = torch.randn(37, 50, dtype=dtype, device=device)
    for a, b in ((x, x.t()), (x, x.t().contiguous())):
        for f in (uf.log_mean_exp, uf.effective_sample_size):
            assert_close(f(b, dim=0), f(a, dim=1), 2e-6 if dtype == torch.float32 else 1e-14)
        assert_close(uf.importance_weights(b, dim=0).t(), uf.importance_weights(a, dim=1), 2e-6)


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_weights_of_large_magnitude(offset: float, device: torch.device) -> None:
    """log w of -1000 ± 3, as 784 pixels give: the weights depend on the differences alone, which fp32 holds exactly."""
    difference = torch.randn(20, 64, device=device).mul(3 * 2**13).round() / 2**13  # exact after adding the offset
    x = (offset + difference).requires_grad_()
    assert torch.equal(x.detach() - offset, difference)
    expected = torch.softmax(difference.double(), 1)
    assert_close(gradient(uf.iwae_loss(x, dim=1, reduction="sum"), x), -expected, 1e-5)
    assert_close(uf.importance_weights(x, dim=1), expected, 1e-5)
    assert_close(uf.log_mean_exp(x, dim=1), torch.logsumexp(x.detach().double(), 1) - math.log(64), 1e-6)
    assert_close(uf.effective_sample_size(x, dim=1), 1 / expected.square().sum(1), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
def test_extreme_magnitudes_are_finite(dtype: torch.dtype, device: torch.device) -> None:
    big = min(1e30, 0.9 * torch.finfo(dtype).max)
    x = torch.tensor(
        [[big, -big, 0.0], [-big, -big, -big], [1e4, -1e4, 9e3]], dtype=dtype, device=device
    ).requires_grad_()
    loss = uf.iwae_loss(x, dim=1, reduction="none")
    assert loss.isfinite().all()
    weights = torch.tensor([[1.0, 0, 0], [1 / 3] * 3, [1.0, 0, 0]], device=device)
    assert_close(-gradient(loss.sum(), x), weights, torch.finfo(dtype).eps if dtype in LOW_PRECISION else 1e-6)


# ---- rows of -inf, NaN, +inf -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("k", [1, 3, 8, 100, 5000])
def test_rows_of_minus_infinity(k: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Bound -inf, weights 0, gradient 0: not NaN, as torch.logsumexp has it (pytorch/pytorch#31829)."""
    x = torch.randn(5, k, device=device).to(dtype)
    x[1] = x[3] = -INF
    x = (x if dim == 1 else x.t()).requires_grad_()

    def rows(y: Tensor) -> Tensor:
        return y if dim == 1 else y.t()

    empty = torch.tensor([False, True, False, True, False], device=device)
    bound = uf.log_mean_exp(x, dim=dim)
    weights = uf.importance_weights(x, dim=dim, detach=False)
    for value, at_empty in ((bound, -INF), (uf.effective_sample_size(x, dim=dim), 0.0)):
        assert (value[empty] == at_empty).all() and value[~empty].isfinite().all()
    assert (rows(weights)[empty] == 0).all()
    assert_close(rows(weights)[~empty].sum(1), torch.ones(3), 1e-5)
    for result in (bound, weights, uf.iwae_loss(x, dim=dim, reduction="none")):
        g = rows(
            gradient(result, x) if result.dim() == 0 else torch.autograd.grad(result, x, torch.ones_like(result))[0]
        )
        assert (g[empty] == 0).all() and g.isfinite().all()
    for reduction in ("mean", "sum"):
        for value in ("bound", "surrogate"):
            loss = uf.iwae_loss(x, dim=dim, reduction=reduction, value=value)
            g = rows(gradient(loss, x))
            assert (g[empty] == 0).all()
            scale = 5 if reduction == "mean" else 1
            expected = -torch.softmax(rows(x.detach())[~empty].double(), 1) / scale
            assert_close(g[~empty], expected, torch.finfo(dtype).eps if dtype in LOW_PRECISION else 1e-5, 1e-7)
            if value == "bound":
                assert loss.item() == INF


def test_second_derivative_of_rows_of_minus_infinity(device: torch.device) -> None:
    x = torch.tensor([[-INF, -INF], [0.3, -INF]], dtype=torch.float64, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(uf.iwae_loss(x, dim=1, reduction="sum"), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(first.detach(), torch.tensor([[0, 0], [-1, 0]], dtype=torch.float64, device=device))
    assert (second == 0).all()


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize(("dim", "k"), [(1, 4), (0, 4), (1, 37), (0, 37), (1, 1000)])
def test_nan_and_infinity_stay_in_their_row(
    bad: float, dim: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(4, k, device=device).to(dtype)
    clean = x.clone()
    x[2, k // 2] = bad
    if dim == 0:
        x, clean = x.t(), clean.t()
    others = [0, 1, 3]

    def rows(y: Tensor) -> Tensor:
        return y if dim == 1 or y.dim() == 1 else y.t()

    for f in (
        lambda t: uf.log_mean_exp(t, dim=dim),
        lambda t: uf.importance_weights(t, dim=dim, detach=False),
        lambda t: uf.effective_sample_size(t, dim=dim),
        lambda t: uf.iwae_loss(t, dim=dim, reduction="none"),
        lambda t: uf.iwae_loss(t, dim=dim, reduction="none", value="surrogate"),
    ):
        got, expected = rows(f(x)), rows(f(clean))
        assert got[2].isnan().all(), "nobody loses sight of it"
        assert_rounded_alike(got[others], expected[others])
    for f in (uf.log_mean_exp, uf.iwae_loss):
        options = {"reduction": "sum"} if f is uf.iwae_loss else {}
        a, b = x.clone().requires_grad_(), clean.clone().requires_grad_()
        got, expected = (rows(gradient(f(t, dim=dim, **options).sum(), t)) for t in (a, b))
        assert got[2].isnan().all()
        assert_rounded_alike(got[others], expected[others])


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("k", [1, 2, 31, 1000, 20000])
def test_weights_sum_to_one(k: int, dtype: torch.dtype, device: torch.device) -> None:
    weights = uf.importance_weights(torch.randn(3, k, device=device).mul(5).to(dtype), dim=1)
    assert (weights >= 0).all()
    assert_close(weights.sum(1), torch.ones(3), 1e-5)


def test_weights_are_detached_unless_asked_otherwise(log_w: Tensor) -> None:
    assert not uf.importance_weights(log_w, dim=1).requires_grad
    assert not uf.effective_sample_size(log_w, dim=1).requires_grad
    assert uf.importance_weights(log_w, dim=1, detach=False).requires_grad


@pytest.mark.parametrize("temperature", [0.25, 1, 4.0])
def test_temperature(temperature: float, log_w: Tensor) -> None:
    got = uf.importance_weights(log_w, dim=1, temperature=temperature, detach=False)
    assert_close(got, torch.softmax(log_w / temperature, 1), 1e-14)
    cotangent = torch.randn_like(got)
    expected = torch.autograd.grad(torch.softmax(log_w / temperature, 1), log_w, cotangent)[0]
    assert_close(torch.autograd.grad(got, log_w, cotangent)[0], expected, 1e-12)


def test_temperature_flattens(log_w: Tensor) -> None:
    entropies = [
        -(w * w.log()).sum(1)
        for t in (0.5, 1.0, 2.0, 8.0)
        for w in [uf.importance_weights(log_w, dim=1, temperature=t)]
    ]
    assert all((a < b).all() for a, b in itertools.pairwise(entropies))


def test_effective_sample_size_between_one_and_k(device: torch.device) -> None:
    k = 16
    equal = torch.full((2, k), -700.0, device=device)
    assert_close(uf.effective_sample_size(equal, dim=1), torch.full((2,), float(k)), 1e-6)
    equal[:, 3] = 0
    assert_close(uf.effective_sample_size(equal, dim=1), torch.ones(2), 1e-6)
    spread = uf.effective_sample_size(torch.randn(50, k, device=device) * 2, dim=1)
    assert (spread >= 1 - 1e-6).all() and (spread <= k + 1e-4).all()
    two = torch.tensor([[0.0, 0.0, -INF]], device=device)
    assert_close(uf.effective_sample_size(two, dim=1), torch.tensor([2.0]), 1e-6)


def test_shift_invariance(log_w: Tensor) -> None:
    """log p(x) + c moves the bound by c and leaves weights and gradient where they are."""
    shifted = (log_w.detach() + 64.0).requires_grad_()
    assert_close(uf.log_mean_exp(shifted, dim=1), uf.log_mean_exp(log_w, dim=1) + 64, 1e-14)
    assert_close(uf.importance_weights(shifted, dim=1), uf.importance_weights(log_w, dim=1), 1e-12)


def test_surrogate_value(log_w: Tensor) -> None:
    """The value that pythae logs: -sum w log w-tilde, below the bound's loss in no case."""
    surrogate = uf.iwae_loss(log_w, dim=1, reduction="none", value="surrogate")
    assert_close(surrogate, -(torch.softmax(log_w, 1) * log_w).sum(1), 1e-13)
    bound = uf.iwae_loss(log_w, dim=1, reduction="none")
    assert not torch.allclose(surrogate, bound)


@pytest.mark.parametrize("on_reference", [False, True])
def test_surrogate_of_impossible_samples_is_their_bound(on_reference: bool, device: torch.device) -> None:
    """A row of -inf: a loss of +inf, without gradient."""
    x = torch.tensor([[-INF] * 3, [0.0, -INF, 0.0]], device=device, requires_grad=True)
    with reference_path() if on_reference else nullcontext():
        loss = uf.iwae_loss(x, dim=1, reduction="none", value="surrogate")
        assert loss.tolist() == [INF, 0.0]
        assert gradient(loss.sum(), x).tolist() == [[0.0] * 3, [-0.5, 0.0, -0.5]]


def test_surrogate_silences_zero_weights(device: torch.device) -> None:
    """A sample of weight 0 at -inf takes no part: 0 · inf is 0 here."""
    x = torch.tensor([[1.0, -INF, 2.0]], dtype=torch.float64, device=device, requires_grad=True)
    loss = uf.iwae_loss(x, dim=1, value="surrogate")
    weights = torch.softmax(torch.tensor([1.0, 2.0], dtype=torch.float64), 0)
    assert_close(loss, -(weights[0] + 2 * weights[1]), 1e-13)
    expected = -torch.tensor([[weights[0], 0, weights[1]]], dtype=torch.float64)
    assert_close(gradient(loss, x), expected, 1e-13)


# ---- what is refused -------------------------------------------------------------------------------------------------

FUNCTIONS = [
    uf.log_mean_exp,
    uf.importance_weights,
    uf.effective_sample_size,
    uf.iwae_loss,
    uf.weight_diagnostics,
    uf.cubo_loss,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_errors(function, device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    assert_refused(lambda: function([1.0], dim=0), TypeError, r"log_w: expected a torch.Tensor, got list")
    assert_refused(
        lambda: function(x.long(), dim=0),
        TypeError,
        r"log_w: expected a floating-point tensor, got torch.int64 of shape",
    )
    assert_refused(
        lambda: function(torch.complex(x, x), dim=0), TypeError, "expected a floating-point tensor, got torch.complex64"
    )
    assert_refused(lambda: function(x, dim=2), ValueError, r"dim: got 2, expected a dimension of .* \(3, 4\)")
    assert_refused(lambda: function(x, dim=-3), ValueError, r"dim: got -3, expected a dimension of .* \(3, 4\)")
    assert_refused(lambda: function(x[0, 0], dim=0), ValueError, r"dim: got 0, expected a dimension of .* \(\)")
    assert_refused(lambda: function(x, dim=1.0), TypeError, "dim: expected an int, got float")
    assert_refused(lambda: function(x, dim=True), TypeError, "dim: expected an int, got bool")
    assert_refused(lambda: function(x, dim=None), TypeError, "dim: expected an int, got NoneType")
    assert_refused(
        lambda: function(x[:, :0], dim=1),
        ValueError,
        r"log_w: got shape \(3, 0\), expected at least one sample along dim 1",
    )
    with pytest.raises(TypeError, match="dim"):
        function(x)
    with pytest.raises(TypeError, match="positional"):
        function(x, 1)


def test_errors_of_options(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    for value, message in ((0, "got 0, expected a number > 0"), (-1.0, "> 0"), (math.nan, "got nan")):
        assert_refused(
            lambda v=value: uf.importance_weights(x, dim=1, temperature=v), ValueError, "temperature: .*" + message
        )
    for value in ("1", True, None):
        assert_refused(
            lambda v=value: uf.importance_weights(x, dim=1, temperature=v), TypeError, "temperature: expected a number"
        )
    assert_refused(
        lambda: uf.iwae_loss(x, dim=1, reduction="avg"),
        ValueError,
        "reduction: got 'avg', expected one of 'mean', 'sum', 'none'",
    )
    assert_refused(
        lambda: uf.iwae_loss(x, dim=1, value="elbo"),
        ValueError,
        "value: got 'elbo', expected one of 'bound', 'surrogate'",
    )


# ---- bounds that are powers of the weights ---------------------------------------------------------------------------

BOUNDS = {
    "renyi": lambda x, alpha: -uf.renyi_loss(x, dim=1, alpha=alpha, reduction="none"),
    "cubo": lambda x, order: uf.cubo_loss(x, dim=1, order=order, reduction="none"),
    "ciwae": lambda x, beta: -uf.ciwae_loss(x, dim=1, beta=beta, reduction="none"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
def test_one_sample_is_the_elbo_under_every_power(dtype: torch.dtype, device: torch.device) -> None:
    x = (100 * torch.randn(8, 1, dtype=torch.float64, device=device)).to(dtype)
    wide = x[:, 0] if dtype == torch.float64 else x[:, 0].float()
    for alpha in (-INF, -2, 0, 0.5, 1 - 1e-6, 1, 1 + 1e-6, 3, INF):
        assert_rounded_alike(BOUNDS["renyi"](x, alpha), wide)
    for beta in (0.0, 0.3, 1.0):
        assert_rounded_alike(BOUNDS["ciwae"](x, beta), wide)
    assert_rounded_alike(BOUNDS["cubo"](x, 2.0), wide)
    assert_rounded_alike(uf.tvo_loss(x, dim=1, partition=[0.0, 1.0], reduction="none"), -wide)
    assert_rounded_alike(uf.miwae_loss(x[:, None], sample_dim=2, group_dim=1, reduction="none"), -wide)


def test_powers_join_the_bounds(log_w: Tensor) -> None:
    assert_close(BOUNDS["renyi"](log_w, 0), uf.log_mean_exp(log_w, dim=1), 1e-13)
    assert_close(BOUNDS["renyi"](log_w, 1), log_w.mean(1), 1e-13)
    assert_close(BOUNDS["renyi"](log_w, -INF), log_w.amax(1), 1e-13)
    assert_close(BOUNDS["renyi"](log_w, INF), log_w.amin(1), 1e-13)
    assert_close(BOUNDS["cubo"](log_w, 3.0), BOUNDS["renyi"](log_w, -2), 1e-13)
    assert_close(BOUNDS["ciwae"](log_w, 0), uf.log_mean_exp(log_w, dim=1), 1e-13)
    assert_close(BOUNDS["ciwae"](log_w, 1), log_w.mean(1), 1e-13)
    bounds = [BOUNDS["renyi"](log_w, alpha) for alpha in (-INF, -5, 0, 0.5, 1, 2, INF)]
    assert all((a > b).all() for a, b in itertools.pairwise(bounds)), "the bound falls as alpha rises"


@pytest.mark.parametrize("power", [0.3, 1e-2, 1e-4, 1e-6, -1e-2, -1e-5])
def test_renyi_is_accurate_near_the_elbo(power: float, device: torch.device) -> None:
    """(1/s) log mean exp(s l): the logarithm of a number near 1, divided by s, would lose every digit of fp32."""
    x = torch.randn(6, 50, device=device) * 5 - 90
    for y in (x, x.t().contiguous().t()):
        y = y.clone(memory_format=torch.preserve_format).requires_grad_()
        alpha = 1 - power
        bound = BOUNDS["renyi"](y, alpha)
        exact = torch.logsumexp((1 - alpha) * y.detach().double(), 1) - math.log(50)
        assert_close(bound, exact / (1 - alpha), 1e-6)
        center = y.detach().double().mean(1)
        assert_close(bound - center, exact / (1 - alpha) - center, 1e-3, 3e-5)
        assert_close(gradient(bound.sum(), y), torch.softmax((1 - alpha) * y.detach().double(), 1), 1e-5)


def test_ties_at_an_infinite_power_share_the_gradient(device: torch.device) -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, -INF], [2.0, -1.0, -1.0, 0.0]], device=device, requires_grad=True)
    high = gradient(-uf.renyi_loss(x, dim=1, alpha=-INF, reduction="sum"), x)
    assert torch.equal(high.cpu(), torch.tensor([[0, 0.5, 0.5, 0], [1.0, 0, 0, 0]]))
    low = gradient(-uf.renyi_loss(x, dim=1, alpha=INF, reduction="sum"), x)
    assert torch.equal(low.cpu(), torch.tensor([[0, 0, 0, 0], [0, 0.5, 0.5, 0]])), "at -inf there is no way up"


def test_cubo_is_an_upper_bound(device: torch.device) -> None:
    """q N(0, 1.5²), p N(0, 1) · 1/2: log Z is log 1/2, below CUBO and above the ELBO."""
    torch.manual_seed(0)
    q, p = torch.distributions.Normal(0.0, 1.5), torch.distributions.Normal(0.0, 1.0)
    z = q.sample((1, 20000))
    log_w = (p.log_prob(z) - q.log_prob(z) + math.log(0.5)).to(device)
    assert uf.cubo_loss(log_w, dim=1) > math.log(0.5) + 0.05 > math.log(0.5) - 0.05 > log_w.mean()
    assert_close(uf.cubo_loss(log_w, dim=1), -uf.renyi_loss(log_w, dim=1, alpha=-1.0), 1e-6)


# ---- rows of -inf, NaN and +inf, in every estimator ------------------------------------------------------------------

ROW_LOSSES = {
    "renyi": lambda x, q: uf.renyi_loss(x, dim=1, alpha=0.4, reduction="none"),
    "renyi above 1": lambda x, q: uf.renyi_loss(x, dim=1, alpha=2.5, reduction="none"),
    "renyi near 1": lambda x, q: uf.renyi_loss(x, dim=1, alpha=0.9, reduction="none"),
    "ELBO": lambda x, q: uf.renyi_loss(x, dim=1, alpha=1, reduction="none"),
    "VR-max": lambda x, q: uf.renyi_loss(x, dim=1, alpha=-INF, reduction="none"),
    "cubo": lambda x, q: -uf.cubo_loss(x, dim=1, reduction="none"),
    "ciwae": lambda x, q: uf.ciwae_loss(x, dim=1, beta=0.5, reduction="none"),
    "tvo": lambda x, q: uf.tvo_loss(x, dim=1, partition=[0, 0.2, 1], reduction="none"),
    "vimco": lambda x, q: uf.vimco_loss(x, q, dim=1, reduction="none"),
    "rws": lambda x, q: uf.rws_losses(x, q, dim=1, reduction="none")[0],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("k", [2, 40, 700])
@pytest.mark.parametrize("name", ROW_LOSSES)
def test_estimators_of_rows_of_minus_infinity(
    name: str, k: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Loss +inf and gradient 0, not the NaN of torch.logsumexp (pytorch/pytorch#31829); NaN and +inf stay in a row."""
    x = torch.randn(20, k, device=device).to(dtype)
    q = torch.randn(20, k, device=device).to(dtype)
    x[1] = -INF
    x[3, k // 2] = math.nan
    x[5, k // 2] = INF
    x[7] = math.nan
    if dim == 0:
        x, q = x.t().contiguous().t(), q.t().contiguous().t()
    x.requires_grad_()
    q.requires_grad_()
    loss = ROW_LOSSES[name](x, q)
    fine = [0, 2, 4, 6, *range(8, 20)]
    assert loss[1] == INF and loss[[3, 5, 7]].isnan().all() and loss[fine].isfinite().all()
    dx, dq = torch.autograd.grad(loss, (x, q), torch.ones_like(loss), allow_unused=True)
    assert (dx[1] == 0).all() and dx[fine].isfinite().all() and (dx[fine] != 0).any(1).all()
    assert dq is None or ((dq[1] == 0).all() and dq[fine].isfinite().all())


def test_one_impossible_sample(device: torch.device) -> None:
    """A weight of 0 takes no part where weights are powers above 0; the ELBO, and what holds it, is -inf."""
    x = torch.tensor([[0.3, -INF, 1.0]], dtype=torch.float64, device=device, requires_grad=True)
    loss = uf.renyi_loss(x, dim=1, alpha=0.5, reduction="none")
    rest = torch.tensor([0.15, 0.5], dtype=torch.float64)
    assert_close(loss, -2 * (torch.logsumexp(rest, 0, keepdim=True) - math.log(3)), 1e-13)
    assert_close(gradient(loss.sum(), x)[0, [0, 2]], -rest.softmax(0), 1e-13)
    assert gradient(uf.renyi_loss(x, dim=1, alpha=0.5), x)[0, 1] == 0
    assert uf.renyi_loss(x, dim=1, alpha=2.0) == INF and uf.ciwae_loss(x, dim=1, beta=0.1) == INF
    tvo = uf.tvo_loss(x, dim=1, partition=[0, 0.5, 1])
    assert tvo == INF and gradient(tvo, x).isfinite().all()
    assert_close(gradient(uf.tvo_loss(x, dim=1, partition=[0, 1]), x), torch.full((1, 3), -1 / 3), 1e-7)


# ---- MIWAE, PIWAE ----------------------------------------------------------------------------------------------------


def test_miwae_normalises_over_samples_not_groups(device: torch.device) -> None:
    """pythae's MIWAE and PIWAE take maximum and softmax over M of [B, M, K]."""
    x = torch.randn(5, 3, 7, dtype=torch.float64, device=device, requires_grad=True)
    loss = uf.miwae_loss(x, sample_dim=2, group_dim=1)
    assert_close(gradient(loss, x), -torch.softmax(x, 2) / 15, 1e-12)
    model, inference = uf.piwae_losses(x, sample_dim=2, group_dim=1)
    assert_close(
        torch.autograd.grad(model, x, retain_graph=True)[0], -torch.softmax(x.flatten(1), 1).view_as(x) / 5, 1e-12
    )
    assert_close(gradient(inference, x), -torch.softmax(x, 2) / 15, 1e-12)
    assert not torch.allclose(gradient(uf.miwae_loss(x, sample_dim=2, group_dim=1), x), -torch.softmax(x, 1) / 15)


def test_miwae_of_one_group_or_one_sample(device: torch.device) -> None:
    x = torch.randn(5, 6, dtype=torch.float64, device=device)
    for reduction in ("mean", "sum", "none"):
        one_group = uf.miwae_loss(x[:, None], sample_dim=-1, group_dim=1, reduction=reduction)
        assert_close(one_group, uf.iwae_loss(x, dim=1, reduction=reduction), 1e-13)
        one_sample = uf.miwae_loss(x[..., None], sample_dim=-1, group_dim=1, reduction=reduction)
        elbo = -x.mean(1)
        assert_close(one_sample, {"mean": elbo.mean(), "sum": elbo.sum(), "none": elbo}[reduction], 1e-13)


def test_errors_of_groups(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, device=device)
    for f in (uf.miwae_loss, uf.piwae_losses):
        assert_refused(
            lambda f=f: f(x, sample_dim=2, group_dim=-1), ValueError, "group_dim: got -1, the dimension of the"
        )
        assert_refused(
            lambda f=f: f(x, sample_dim=3, group_dim=1), ValueError, "sample_dim: got 3, expected a dimension"
        )
        assert_refused(
            lambda f=f: f(x[:, :0], sample_dim=2, group_dim=1), ValueError, "expected at least one group along dim 1"
        )
        assert_refused(lambda f=f: f(x, sample_dim=2, group_dim=1, reduction="avg"), ValueError, "reduction: got 'avg'")


# ---- TVO -------------------------------------------------------------------------------------------------------------


def test_tvo_of_two_points_is_the_elbo(log_w: Tensor) -> None:
    loss = uf.tvo_loss(log_w, dim=1, partition=(0, 1), reduction="none")
    assert_close(loss, -log_w.mean(1), 1e-13)
    assert_close(gradient(loss.sum(), log_w), torch.full_like(log_w, -0.1), 1e-13)


def test_tvo_tightens_with_its_partition(log_w: Tensor) -> None:
    losses = [
        uf.tvo_loss(log_w, dim=1, partition=[i / n for i in range(n + 1)], reduction="none") for n in (1, 2, 4, 64)
    ]
    assert all((a > b).all() for a, b in itertools.pairwise(losses))
    assert (losses[-1] > -uf.log_mean_exp(log_w, dim=1)).all()
    fine = uf.tvo_loss(log_w, dim=1, partition=[i / 4000 for i in range(4001)], reduction="none")
    assert_close(fine, -uf.log_mean_exp(log_w, dim=1), 5e-3)


@pytest.mark.parametrize("count", [2, 3])
def test_tvo_of_discrete_samples_has_the_gradient_of_its_expectation(count: int, device: torch.device) -> None:
    """Four states, of which every tuple of samples is enumerated: the exact gradients of theta and phi."""
    generator = torch.Generator().manual_seed(0)
    theta, phi = (
        torch.randn(4, dtype=torch.float64, generator=generator).to(device).requires_grad_() for _ in range(2)
    )
    states = torch.cartesian_prod(*[torch.arange(4, device=device)] * count)  # [tuples, K]
    partition = [0.0, 0.1, 0.4, 1.0]

    log_p, log_q = theta - 1, phi.log_softmax(0)

    def of_tuples(**given: Any) -> Tensor:
        return uf.tvo_loss((log_p - log_q)[states], dim=1, partition=partition, reduction="none", **given)

    probability = log_q[states].sum(1).exp()
    exact = torch.autograd.grad((probability * of_tuples()).sum(), (theta, phi), retain_graph=True)
    # what a training step sees: the samples are constants
    weight = probability.detach()
    losses = of_tuples(log_q=log_q[states])
    assert torch.equal(losses, of_tuples())
    found = torch.autograd.grad((weight * losses).sum(), (theta, phi), retain_graph=True)
    for got, want in zip(found, exact, strict=True):
        assert_close(got, want, 1e-12)
    alone = torch.autograd.grad((weight * of_tuples()).sum(), phi)[0]
    assert (alone * exact[1]).sum() < 0  # uphill


def test_tvo_of_many_discrete_samples_has_the_gradient_of_the_tvo(device: torch.device) -> None:
    """Each of four states as often as q has it: the weighted sums are the expectations, up to 1 / K."""
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, device=device)
    phi = q.log().requires_grad_()
    log_p = torch.tensor([-1.0, -3.0, -2.0, -0.5], dtype=torch.float64, device=device)
    partition = [0.0, 0.2, 0.6, 1.0]
    states = torch.repeat_interleave(torch.arange(4, device=device), (q * 20_000).round().long())
    log_q = phi.log_softmax(0)
    log_w = log_p - log_q
    uf.tvo_loss(log_w[states], dim=0, partition=partition, log_q=log_q[states]).backward(retain_graph=True)
    expected = sum(
        (b - a) * ((log_q + a * log_w).softmax(0) * log_w).sum() for a, b in itertools.pairwise(partition)
    )  # fmt: skip
    assert phi.grad is not None
    assert_close(phi.grad, -torch.autograd.grad(expected, phi)[0], 1e-3)


def test_tvo_signals_are_accurate(device: torch.device) -> None:
    """Of a sample with nearly all the weight; of samples that are -inf; of rows that are nothing."""
    x = torch.randn(5, 6, dtype=torch.float64, device=device) * 2
    x[1, 3], x[2, 0], x[3], x[4, 1] = 300, -INF, -INF, NAN
    log_q = torch.zeros_like(x, requires_grad=True)
    uf.tvo_loss(x, dim=1, partition=[0, 0.5, 1], log_q=log_q, reduction="none").sum().backward()
    got = -log_q.grad  # type: ignore[operator]
    for row in (0, 1, 2):
        samples = [k for k in range(6) if x[row, k] > -INF]
        own = x[row, samples]
        for k in range(len(samples)):
            others = torch.cat((own[:k], own[k + 1 :]))
            mean = [((b * t).softmax(0) * t).sum() for b in (0, 0.5) for t in (own, others)]
            want = 0.5 * (mean[0] - mean[1]) + 0.5 * (mean[2] - mean[3])
            assert_close(got[row, samples[k]], want, 1e-9)
    assert got[2, 0] == 0 and (got[3:] == 0).all()


def test_tvo_of_detached_latents(device: torch.device) -> None:
    """The whole bound gives log q to the loss where z does not depend on q's parameters."""
    decoder, z = torch.randn(3, 4, 5, device=device), torch.randn(3, 4, 2, device=device)
    data = torch.rand(3, 5, device=device)
    for likelihood_options in (None, {"clamp_logvar": (-1.0, 1.0)}):  # the second is not the kernel's
        mean, logvar = (torch.randn(3, 2, device=device, requires_grad=True) for _ in range(2))
        given = {"dim": 1, "likelihood": "gaussian", "event_ndims": 1}
        decoders = (decoder, decoder * 0.1)
        found = uf.iwae_objective(
            decoders, data, z, mean, logvar, estimator="tvo", partition=[0, 0.3, 1],
            likelihood_options=likelihood_options, **given,
        ).loss  # fmt: skip
        log_w = uf.iwae_objective(decoders, data, z, mean, logvar, likelihood_options=likelihood_options, **given).log_w
        log_q = uf.gaussian_log_prob(z, mean.unsqueeze(1), logvar.unsqueeze(1))
        expected = uf.tvo_loss(log_w, dim=1, partition=[0, 0.3, 1], log_q=log_q)
        for got, want in zip(
            torch.autograd.grad(found, (mean, logvar)), torch.autograd.grad(expected, (mean, logvar)), strict=True
        ):
            assert_close(got, want, 1e-5)


def test_tvo_gradient_is_the_covariance_estimator(device: torch.device) -> None:
    """d/dθ E_p[l] = E_p[dl] + b Cov_p(l, dl): Masrani, Le and Wood's estimator, computed here sample by sample."""
    x = torch.randn(1, 6, dtype=torch.float64, device=device, requires_grad=True)
    direction = torch.randn(6, dtype=torch.float64, device=device)
    partition = [0.0, 0.3, 1.0]
    expected = torch.zeros((), dtype=torch.float64, device=device)
    for b, following in itertools.pairwise(partition):
        w, log_w = torch.softmax(b * x.detach(), 1)[0], x.detach()[0]
        covariance = (w * (log_w - (w * log_w).sum()) * (direction - (w * direction).sum())).sum()
        expected = expected + (following - b) * ((w * direction).sum() + b * covariance)
    assert_close((gradient(uf.tvo_loss(x, dim=1, partition=partition), x)[0] * direction).sum(), -expected, 1e-12)


def test_errors_of_a_partition(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    for partition in ([0.0], [0, 0.5], [0.1, 1.0], [0, 0.5, 0.5, 1], [0, 0.7, 0.3, 1], []):
        assert_refused(
            lambda p=partition: uf.tvo_loss(x, dim=1, partition=p), ValueError, "partition: got .*, expected increasing"
        )
    assert_refused(lambda: uf.tvo_loss(x, dim=1, partition=0.5), TypeError, "partition: expected a sequence of numbers")
    assert_refused(lambda: uf.tvo_loss(x, dim=1, partition=[0, "1"]), TypeError, r"partition\[1\]: expected a number")


# ---- VIMCO -----------------------------------------------------------------------------------------------------------


def mpmath_signal(row: list[float]) -> list[float]:
    """Straight from the definition, with 60 digits."""
    mp = pytest.importorskip("mpmath")
    with mp.workdps(60):
        values = [mp.mpf(v) for v in row]
        k = len(values)

        def lme(v: list) -> object:
            return mp.log(mp.fsum(mp.exp(u) for u in v) / k)

        found = []
        for i in range(k):
            others = values[:i] + values[i + 1 :]
            found.append(float(lme(values) - lme([*others, mp.fsum(others) / (k - 1)])))
        return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_vimco_signal_where_it_cancels(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """One sample with all the weight, samples nearly alike, ties: the O(K) signal keeps its digits."""
    rows = torch.randn(24, 9, dtype=torch.float64).mul(64).round() / 64
    rows[0, 4] += 1000
    rows[1, 4] += 40
    rows[2, 0] -= 1000
    rows[3] = 90 + rows[3] / 1024
    rows[4, 1] = rows[4, 6] = 5
    rows[5] = 3.0
    rows[6, 2] = 12
    rows[7] -= 1000
    expected = torch.tensor([mpmath_signal(row) for row in rows.tolist()], dtype=torch.float64)
    x = rows.to(dtype).to(device)
    q = torch.zeros_like(x).requires_grad_()
    (a, b) = (x, q) if dim == 1 else (x.t().contiguous(), q.t())
    loss = uf.vimco_loss(a, b, dim=dim, reduction="sum")
    got = -gradient(loss, q).cpu().double()
    error = (got - expected).abs()
    scale = torch.maximum(expected.abs(), expected.abs().mean(1, keepdim=True))
    assert (error <= (4e-5 if dtype == torch.float32 else 1e-12) * scale + 1e-15).all(), error / scale


def test_vimco_of_an_impossible_sample(device: torch.device) -> None:
    x = torch.tensor([[0.5, -INF, 0.2, -0.4], [-INF, -INF, 1.0, -INF]], dtype=torch.float64, device=device)
    q = torch.zeros_like(x).requires_grad_()
    signal = -gradient(uf.vimco_loss(x, q, dim=1, reduction="sum"), q).cpu()
    finite = torch.tensor([0.5, 0.2, -0.4], dtype=torch.float64)
    total = torch.logsumexp(finite, 0)
    assert_close(signal[0, 1], total - torch.logsumexp(torch.cat([finite, finite.mean()[None]]), 0), 1e-12)
    for k, left in ((0, [1, 2]), (2, [0, 2]), (3, [0, 1])):
        assert_close(signal[0, k], total - torch.logsumexp(finite[left], 0), 1e-12)
    assert signal[1, 2] == INF and (signal[1, [0, 1, 3]] == 0).all()


def test_vimco_gradients(device: torch.device) -> None:
    """log_w: minus the weights, not through the signal; log_q: minus the signal, which is positive for good samples."""
    x = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    q = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    dx, dq = torch.autograd.grad(uf.vimco_loss(x, q, dim=1, reduction="sum"), (x, q))
    assert_close(dx, -torch.softmax(x, 1), 1e-12)
    assert (dq.gather(1, x.argmax(1, keepdim=True)) < 0).all() and (dq.gather(1, x.argmin(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("f", [lambda x: uf.vimco_loss(x, x, dim=1), lambda x: uf.log_variance_loss(x, dim=1)])
def test_one_sample_has_no_others(f, device: torch.device) -> None:
    assert_refused(
        lambda: f(torch.randn(3, 1, device=device)), ValueError, r"log_w: got 1 sample .* expected at least 2"
    )


# ---- reweighted wake-sleep -------------------------------------------------------------------------------------------


def test_rws_gradients_stay_apart(device: torch.device) -> None:
    p = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    q = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    theta, phi = uf.rws_losses(p, q, dim=1, reduction="sum")
    weights = torch.softmax((p - q).detach(), 1)
    dp, dq = torch.autograd.grad(theta + 2 * phi, (p, q), retain_graph=True)
    assert_close(dp, -weights, 1e-12)
    assert_close(dq, -2 * weights, 1e-12)
    assert_close(theta, uf.iwae_loss(p - q, dim=1, reduction="sum"), 1e-13)
    assert_close(phi, -(weights * q).sum(), 1e-13)
    for loss, other in ((theta, q), (phi, p)):  # which a caller can tell from zeros
        assert torch.autograd.grad(loss, other, retain_graph=True, allow_unused=True) == (None,)


# ---- DReG ------------------------------------------------------------------------------------------------------------


def gaussian_log_w(encoder: Tensor, model: Tensor, noise: Tensor, *, detach: bool) -> tuple[Tensor, Tensor]:
    """p(z) = N(model, 1), p(x | z) = N(z, 1) at x = 1.3; q(z | x) = N(encoder, e^-0.2). Returns (log_w, z)."""
    scale = math.exp(-0.2)
    z = encoder + scale * noise
    center = encoder.detach() if detach else encoder
    log_w = -0.5 * (z - model) ** 2 - 0.5 * (1.3 - z) ** 2 + 0.5 * ((z - center) / scale) ** 2
    return log_w, z


def test_dreg_gradient_has_the_mean_of_iwae_and_less_variance(device: torch.device) -> None:
    """K = 64. Sticking the landing (Roeder et al. 2017) on the IWAE bound is biased: it weights by w~, not w~²."""
    torch.manual_seed(0)
    noise = torch.randn(20000, 64, dtype=torch.float64, device=device)
    samples: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("iwae", "stl", "dreg"):
        encoder = torch.full((20000, 1), 0.2, dtype=torch.float64, device=device, requires_grad=True)
        model = torch.full((20000, 1), -0.4, dtype=torch.float64, device=device, requires_grad=True)
        log_w, z = gaussian_log_w(encoder, model, noise, detach=name != "iwae")
        loss = (
            uf.dreg_loss(log_w, z, dim=1, reduction="sum")
            if name == "dreg"
            else uf.iwae_loss(log_w, dim=1, reduction="sum")
        )
        assert_close(loss, -uf.log_mean_exp(log_w, dim=1).sum(), 1e-12)
        samples[name] = torch.autograd.grad(loss, (encoder, model))
    iwae, stl, dreg = (samples[name][0][:, 0] for name in ("iwae", "stl", "dreg"))
    error = math.sqrt((iwae.var() + dreg.var()) / 20000)
    assert abs(iwae.mean() - dreg.mean()) < 4 * error
    assert dreg.var() < iwae.var() / 4
    assert abs(stl.mean() - iwae.mean()) > 20 * error, "biased"
    assert_close(samples["dreg"][1], samples["iwae"][1], 1e-12)  # the model's parameters see the IWAE gradient


def test_dreg_reweights_by_squares(device: torch.device) -> None:
    """TFP squares the weights of the model's gradient as well; event dimensions, and z in another dtype."""
    z = torch.randn(3, 5, 2, device=device, requires_grad=True)
    theta = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    loss = uf.dreg_loss(log_w := (z.double().square() * theta).sum(-1), z, dim=1, reduction="sum")
    w = torch.softmax(log_w.detach(), 1)
    dz, dtheta = torch.autograd.grad(loss, (z, theta))
    assert_close(dz, -(w.square().unsqueeze(-1) * 2 * z * theta), 1e-5)
    assert_close(dtheta, -(w * z.detach().double().square().sum(-1)).sum(), 1e-6)


def test_dreg_leaves_an_alias_alone(device: torch.device) -> None:
    z = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    own = z.view_as(z)
    loss = uf.dreg_loss(own.sin(), own, dim=1, reduction="sum")
    (dz,) = torch.autograd.grad(loss + z.sum(), z)
    assert_close(dz, 1 - torch.softmax(z.detach().sin(), 1).square() * z.cos(), 1e-12)


@pytest.mark.usefixtures("fresh_dynamo")
def test_dreg_compiles(device: torch.device) -> None:
    def step(mean: Tensor, noise: Tensor) -> Tensor:
        z = mean + noise
        return uf.dreg_loss(-0.5 * z.square(), z, dim=1)

    noise = torch.randn(3, 5, dtype=torch.float64, device=device)
    mean = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    expected = gradient(step(mean, noise), mean)
    assert_close(gradient(torch.compile(step, fullgraph=True, backend="aot_eager")(mean, noise), mean), expected, 1e-12)


def test_dreg_needs_no_gradient_to_evaluate(device: torch.device) -> None:
    z = torch.randn(3, 5, device=device)
    assert_close(uf.dreg_loss(z.sin(), z, dim=1), uf.iwae_loss(z.sin(), dim=1), 1e-6)
    assert_refused(
        lambda: uf.dreg_loss(z, z[:2], dim=1), ValueError, r"z: got shape \(2, 5\), expected that of log_w, \(3, 5\)"
    )


# ---- variance, trajectory balance, memorization ----------------------------------------------------------------------


def test_log_variance_does_not_cancel(device: torch.device) -> None:
    """E[x²] - E[x]² of fp32 log-weights around -1000 would be noise."""
    difference = torch.randn(20, 64, device=device).mul(2**10).round() / 2**13
    x = (difference - 1000).requires_grad_()
    assert torch.equal(x.detach() + 1000, difference)
    loss = uf.log_variance_loss(x, dim=1, reduction="none")
    assert_close(loss, difference.double().var(1) / 2, 1e-5)
    centered = difference.double() - difference.double().mean(1, keepdim=True)
    assert_close(gradient(loss.sum(), x), centered / 63, 1e-5)


def test_log_variance_is_trajectory_balance_with_the_best_log_z(log_w: Tensor) -> None:
    log_z = log_w.detach().mean(1, keepdim=True)
    balance = uf.trajectory_balance_loss(log_w, log_z)
    variance = uf.log_variance_loss(log_w, dim=1)
    assert_close(balance * 10 / 9 / 2, variance, 1e-13)
    assert_close(gradient(balance, log_w) * 10 / 9 / 2, gradient(uf.log_variance_loss(log_w, dim=1), log_w), 1e-12)


def test_trajectory_balance_of_one_log_z(device: torch.device) -> None:
    x = torch.randn(7, device=device, requires_grad=True)
    log_z = torch.tensor(0.4, device=device, requires_grad=True)
    dx, dz = torch.autograd.grad(uf.trajectory_balance_loss(x, log_z, reduction="sum"), (x, log_z))
    assert_close(dx, -2 * (log_z - x), 1e-6)
    assert_close(dz, 2 * (log_z - x).sum(), 1e-5)


def log_mean(x: Tensor, dim: int) -> Tensor:
    return torch.logsumexp(x.double(), dim) - math.log(x.size(dim))


def test_memorization_score(device: torch.device) -> None:
    """Of as many runs on both sides the difference of log-mean-exps; of more on one, their mean over its stretches."""
    inside, outside = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device) - 3
    expected = log_mean(inside, 0) - log_mean(outside, 0)
    assert_close(uf.memorization_score(inside, outside, dim=0), expected, 1e-6)
    more = torch.randn(7, 6, device=device)
    stretches = [log_mean(more[[(i + j) % 7 for j in range(4)]], 0) for i in range(7)]
    expected = torch.stack(stretches).mean(0) - log_mean(outside, 0)
    assert_close(uf.memorization_score(more, outside, dim=0), expected, 1e-6)
    assert_close(uf.memorization_score(outside.t(), more.t(), dim=1), -expected, 1e-6)
    single = uf.memorization_score(more, outside[:1], dim=0)
    assert_close(single, more.double().mean(0) - outside[0].double(), 1e-6)


def test_memorization_score_of_subsets(device: torch.device) -> None:
    """Each example has its own runs on either side: those of the other form, in their order."""
    log_px = torch.randn(9, 5, device=device, dtype=torch.float64) * 3 - 90
    included = torch.rand(9, 5, device=device) < 0.4
    included[:, 0], included[:, 1], included[0, 1] = False, True, False
    included[:2, 2:] = torch.tensor([[True], [False]])
    log_px[3, 4] = -INF
    leaf = log_px.clone().requires_grad_()
    got = uf.memorization_score(leaf, dim=0, included=included)
    assert got[0].isnan()
    for i in range(1, 5):
        own = log_px[:, i : i + 1]
        expected = uf.memorization_score(own[included[:, i]], own[~included[:, i]], dim=0)
        assert_close(got[i : i + 1], expected, 1e-12)
    got[1:4].sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and (leaf.grad[:, 1:4] != 0).all()
    # a gradient: what all runs rise by, the score of none of the sides sees
    assert (leaf.grad.sum(0)[1:4].abs() < 1e-12).all()
    assert_close(uf.memorization_score(log_px.t(), dim=1, included=included.t())[1:], got[1:].detach(), 1e-12)


@pytest.mark.parametrize("form", ["two tensors", "included"])
def test_without_memorization_the_score_is_0(form: str, device: torch.device) -> None:
    """36 runs against 4, as ten folds of four seeds leave: the same distribution on both sides."""
    generator = torch.Generator().manual_seed(0)
    log_px = (torch.randn(40, 20_000, generator=generator) * 3 - 90).to(device)
    if form == "included":
        order = torch.rand(40, 20_000, generator=generator).argsort(0).to(device)
        scores = uf.memorization_score(log_px, dim=0, included=order >= 4)
    else:
        scores = uf.memorization_score(log_px[:36], log_px[36:], dim=0)
        plain = log_mean(log_px[:36], 0) - log_mean(log_px[36:], 0)
        assert plain.mean() > 1  # of all runs at once
    assert scores.mean().abs() < 4 * scores.std() / math.sqrt(len(scores))


def test_bad_runs(device: torch.device) -> None:
    x = torch.randn(4, 6, device=device)
    refused = [
        (lambda: uf.memorization_score(x, x[:, :5], dim=0), ValueError, r"log_px_out: got shape \(4, 5\)"),
        (lambda: uf.memorization_score(x, dim=0), TypeError, "expected either log_px_out or included"),
        (lambda: uf.memorization_score(x, x, dim=0, included=x > 0), TypeError, "expected either log_px_out or"),
        (
            lambda: uf.memorization_score(x, dim=0, included=x),
            TypeError,
            "included: expected a bool tensor, got torch.f",
        ),
        (lambda: uf.memorization_score(x, dim=0, included=x[:3] > 0), ValueError, r"included: got shape \(3, 6\)"),
    ]
    for call, error, message in refused:
        assert_refused(call, error, message)


# ---- diagnostics and weighted sums -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [21, 30, 100, 333, 2000])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_pareto_k_is_that_of_arviz(k: int, spread: float, device: torch.device) -> None:
    arviz = pytest.importorskip("arviz")
    generator = torch.Generator().manual_seed(k)
    x = spread * torch.randn(5, k, dtype=torch.float64, generator=generator) - 90
    x[4, : k // 2] = x[4, k // 2 : k // 2 * 2]  # ties
    got = uf.weight_diagnostics(x.to(device), dim=1).pareto_k.cpu()
    expected = torch.tensor([float(arviz.psislw(row.numpy().copy())[1]) for row in x], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
    assert_close(uf.weight_diagnostics(x.t().to(device), dim=0).pareto_k, got.to(device), 1e-12)


def test_pareto_k_without_a_tail(device: torch.device) -> None:
    assert (uf.weight_diagnostics(torch.randn(3, 20, device=device), dim=1).pareto_k == INF).all()
    x = torch.randn(4, 100, device=device)
    x[0], x[1, 3], x[2] = -INF, math.nan, 1.0
    k = uf.weight_diagnostics(x, dim=1).pareto_k
    assert k[0] == INF and k[1].isnan() and k[2] == INF and k[3].isfinite()


def test_diagnostics_of_known_weights(device: torch.device) -> None:
    x = torch.tensor([[0.0, 0.0, -INF, -INF], [3.0, 3.0, 3.0, 3.0], [-INF] * 4, [800.0, 0, 0, 0]], device=device)
    found = uf.weight_diagnostics(x, dim=1)
    assert isinstance(found, uf.WeightDiagnostics) and not any(f.requires_grad for f in found)
    log2 = math.log(2)
    for name, expected in {
        "log_mean_exp": [-log2, 3.0, -INF, 800 - 2 * log2],
        "ess": [2.0, 4.0, 0.0, 1.0],
        "max_weight": [0.5, 0.25, 0.0, 1.0],
        "entropy": [log2, 2 * log2, 0.0, 0.0],
    }.items():
        assert_close(getattr(found, name), torch.tensor(expected), 1e-6, what=name)


def test_a_weight_of_zero_silences_its_payload(device: torch.device) -> None:
    x = torch.tensor([[0.0, -INF, 1.0]], dtype=torch.float64, device=device)
    payload = torch.tensor([[2.0, INF, 3.0]], dtype=torch.float64, device=device, requires_grad=True)
    for live in (False, True):
        log_w = x.clone().requires_grad_()
        value = uf.importance_weighted_sum(log_w, payload, dim=1, detach=not live)
        w = torch.softmax(x, 1)
        assert_close(value, w[:, 0] * 2 + w[:, 2] * 3, 1e-13)
        assert_close(gradient(value.sum(), payload), w, 1e-13)
    assert gradient(uf.importance_weighted_sum(log_w, payload, dim=1, detach=False).sum(), log_w)[0, 1] == 0
    empty = torch.full((2, 3), -INF, device=device)
    assert (uf.importance_weighted_sum(empty, torch.randn(2, 3, 4, device=device), dim=1) == 0).all()


def test_errors_of_a_payload(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    assert_refused(
        lambda: uf.importance_weighted_sum(x, x[:, :3], dim=1),
        ValueError,
        r"payload: got shape \(3, 3\), expected that of",
    )
    assert_refused(
        lambda: uf.importance_weighted_sum(x, x.long(), dim=1), TypeError, "payload: expected a floating-point"
    )
    assert_refused(lambda: uf.importance_weighted_sum(x, x, dim=1, temperature=0), ValueError, "temperature: got 0")


def test_errors_of_the_orders(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device)
    assert_refused(lambda: uf.renyi_loss(x, dim=1, alpha=math.nan), ValueError, "alpha: got nan")
    assert_refused(lambda: uf.cubo_loss(x, dim=1, order=0.5), ValueError, "order: got 0.5, expected a number >= 1")
    for beta in (-0.1, 1.1):
        assert_refused(
            lambda b=beta: uf.ciwae_loss(x, dim=1, beta=b), ValueError, f"beta: got {beta}, expected a number"
        )
    for f in (uf.vimco_loss, uf.rws_losses):
        assert_refused(lambda f=f: f(x, x[:, :3], dim=1), ValueError, r"got shape \(3, 3\) beside log_[wp] \(3, 4\)")
