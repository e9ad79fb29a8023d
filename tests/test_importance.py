"""Bounds and self-normalised weights: what is particular to them; `test_fused.py` holds them to the reference."""

import itertools
import math

import pytest
import torch
from helpers import LOW_PRECISION, assert_close, assert_refused, assert_same_bits
from torch import Tensor

import unigen_fast as uf

INF = math.inf


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
        assert_same_bits(got[others], expected[others])
    for f in (uf.log_mean_exp, uf.iwae_loss):
        options = {"reduction": "sum"} if f is uf.iwae_loss else {}
        a, b = x.clone().requires_grad_(), clean.clone().requires_grad_()
        got, expected = (rows(gradient(f(t, dim=dim, **options).sum(), t)) for t in (a, b))
        assert got[2].isnan().all()
        assert_same_bits(got[others], expected[others])


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


def test_surrogate_silences_zero_weights(device: torch.device) -> None:
    """A sample of weight 0 at -inf takes no part: 0 · inf is 0 here."""
    x = torch.tensor([[1.0, -INF, 2.0]], dtype=torch.float64, device=device, requires_grad=True)
    loss = uf.iwae_loss(x, dim=1, value="surrogate")
    weights = torch.softmax(torch.tensor([1.0, 2.0], dtype=torch.float64), 0)
    assert_close(loss, -(weights[0] + 2 * weights[1]), 1e-13)
    expected = -torch.tensor([[weights[0], 0, weights[1]]], dtype=torch.float64)
    assert_close(gradient(loss, x), expected, 1e-13)


# ---- what is refused -------------------------------------------------------------------------------------------------

FUNCTIONS = [uf.log_mean_exp, uf.importance_weights, uf.effective_sample_size, uf.iwae_loss]


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
