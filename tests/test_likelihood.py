"""Log-densities: what is particular to them."""

import math
from collections.abc import Iterator

import mpmath
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from helpers import (
    LOW_PRECISION,
    NATIVE,
    assert_close,
    assert_refused,
    assert_rounded_alike,
    assert_same_bits,
    reference_path,
)
from torch import Tensor
from torch.distributions import Bernoulli

import unigen_fast as uf

INF = math.inf
log_prob = uf.bernoulli_log_prob


def gradient(rows: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(rows.sum(), inputs)


@pytest.mark.parametrize("event_ndims", [0, 1, 2, 3])
def test_equals_torch_distributions(event_ndims: int, device: torch.device) -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, device=device)
    x = torch.rand_like(logits).round()
    expected = Bernoulli(logits=logits).log_prob(x)
    if event_ndims:
        expected = expected.flatten(-event_ndims).sum(-1)
    got = log_prob(logits, x, event_ndims=event_ndims)
    assert got.shape == expected.shape
    assert_close(got, expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_data_of_any_dtype(logits_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    """Binarised images come as bool: no cast is asked of the user. The gradient keeps the logits' dtype."""
    logits = torch.randn(4, 784, device=device).to(logits_dtype).requires_grad_()
    x = torch.rand(4, 784, device=device).round().to(dtype)
    got = log_prob(logits, x)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = logits.detach().double()
    assert_close(got, Bernoulli(logits=wide).log_prob(x.double()).sum(-1), 1e-5)
    (g,) = gradient(got, logits)
    assert g.dtype == logits_dtype
    assert_close(
        g, x.double() - wide.sigmoid(), torch.finfo(logits_dtype).eps if logits_dtype in LOW_PRECISION else 1e-5
    )


def test_soft_data(device: torch.device) -> None:
    """x in [0, 1] is binary cross-entropy, as most VAEs take grey values; its gradient for x is the logit."""
    logits = torch.randn(3, 50, dtype=torch.float64, device=device, requires_grad=True)
    x = torch.rand(3, 50, dtype=torch.float64, device=device, requires_grad=True)
    got = log_prob(logits, x)
    assert_close(got, -F.binary_cross_entropy(logits.sigmoid(), x, reduction="none").sum(1), 1e-12)
    to_logits, to_x = gradient(got, logits, x)
    assert_close(to_logits, x - logits.sigmoid(), 1e-12)
    assert_close(to_x, logits, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("n", [1, 7, 16, 100, 784])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_logits_of_zero(zero: float, n: int, dtype: torch.dtype, device: torch.device) -> None:
    """-n log 2, with gradient x - 1/2: a derivative written with sign(l) gives 0 or a jump here."""
    logits = torch.full((2, n), zero, dtype=dtype, device=device, requires_grad=True)
    x = torch.stack([torch.zeros(n), torch.ones(n)]).to(device, dtype)
    got = log_prob(logits, x)
    assert_close(got, torch.full((2,), -n * math.log(2)), 1e-6)
    assert_same_bits(gradient(got, logits)[0], x - 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("n", [2, 17, 200, 1000])
def test_large_logits(n: int, dtype: torch.dtype, device: torch.device) -> None:
    """±1e4: the value is -|l| on the wrong side and 0 on the right one; a product of factors must not overflow."""
    size = torch.tensor([1e4, 100.0, 700.0, 60.0], dtype=dtype, device=device).unsqueeze(1).expand(4, n)
    for sign in (1, -1):
        for x in (0.0, 1.0):
            logits = (sign * size).clone().requires_grad_()
            got = log_prob(logits, torch.full_like(logits, x))
            right = (sign > 0) == (x == 1)
            expected = torch.zeros(4) if right else -n * size[:, 0].double()
            assert_close(got, expected, 1e-6, 1.01 * n * math.exp(-60))
            (g,) = gradient(got, logits)
            assert_close(g, torch.zeros(4, n) if right else torch.full((4, n), x - (sign > 0)), 1e-6, math.exp(-59))


def test_small_probabilities_keep_their_digits(device: torch.device) -> None:
    """log sigma(30) = -9.36e-14, alone in its row."""
    logits = torch.tensor([[30.0], [-30.0]], dtype=torch.float64, device=device)
    got = log_prob(logits, torch.tensor([[1.0], [0.0]], device=device, dtype=torch.float64))
    assert ((got + math.log1p(math.exp(-30))).abs() < 1e-27).all()
    got = log_prob(logits.float(), torch.tensor([[1.0], [0.0]], device=device))
    assert ((got / -math.log1p(math.exp(-30)) - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("n", [1, 5, 33, 300])
def test_infinite_logits(n: int, dtype: torch.dtype, device: torch.device) -> None:
    """A pixel known for certain: on its right side it costs 0 and has no gradient; on the wrong one -inf."""
    logits = torch.randn(4, n, device=device).to(dtype)
    x = torch.rand(4, n, device=device).round().to(dtype)
    logits[0], x[0] = INF, 1
    logits[1], x[1] = -INF, 0
    logits[2, n // 2], x[2, n // 2] = INF, 0
    logits.requires_grad_()
    got = log_prob(logits, x)
    assert (got[:2] == 0).all() and got[2] == -INF and got[3].isfinite()
    (g,) = gradient(got, logits)
    assert (g[:2] == 0).all() and g[2, n // 2] == -1 and g.isfinite().all()


@pytest.mark.parametrize("n", [5, 300])
def test_nan_stays_in_its_row(n: int, device: torch.device) -> None:
    clean = torch.randn(4, n, device=device)
    x = torch.rand(4, n, device=device).round()
    logits = clean.clone()
    logits[2, n - 1] = math.nan
    logits.requires_grad_(), clean.requires_grad_()
    got, expected = log_prob(logits, x), log_prob(clean, x)
    assert got[2].isnan()
    assert_rounded_alike(got[[0, 1, 3]], expected[[0, 1, 3]])
    (g,), (e,) = gradient(got, logits), gradient(expected, clean)
    assert g[2, n - 1].isnan()
    assert_rounded_alike(g[[0, 1, 3]], e[[0, 1, 3]])
    data = x.clone()
    data[1, 0] = math.nan
    got = log_prob(clean, data)
    assert got[1].isnan() and got[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize(
    ("logits_shape", "x_shape"),
    [
        ((3, 5, 20), (3, 1, 20)),
        ((5, 3, 20), (1, 3, 20)),
        ((3, 5, 20), (1, 1, 20)),
        ((20,), (4, 20)),
        ((1, 20), (4, 20)),
    ],
    ids=str,
)
def test_data_broadcasts(logits_shape: tuple, x_shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    """`x.unsqueeze(1)` against K samples, K first, one image for all: as if repeated, gradients summed back."""
    logits = torch.randn(logits_shape, device=device).to(dtype).requires_grad_()
    x = torch.rand(x_shape, device=device).to(dtype).requires_grad_()
    got = log_prob(logits, x, event_ndims=1)
    wide_logits, wide_x = (t.detach().double().requires_grad_() for t in (logits, x))
    with reference_path():
        expected = log_prob(*torch.broadcast_tensors(wide_logits, wide_x), event_ndims=1)
    assert got.shape == expected.shape
    assert_close(got, expected, 1e-10 if dtype == torch.float64 else 1e-5)
    eps = 4 * torch.finfo(dtype).eps if dtype in LOW_PRECISION else 1e-5
    for a, b in zip(gradient(got, logits, x), gradient(expected, wide_logits, wide_x), strict=True):
        assert a.shape == b.shape
        assert_close(a, b, eps)


@pytest.mark.skipif(not any(NATIVE.values()), reason="PyTorch keeps what its derivative takes")
def test_broadcast_data_is_not_repeated_in_memory(device: torch.device) -> None:
    """What is saved for backward shares the storage of `x`, and none of it is as large as the logits."""
    logits = torch.randn(4, 50, 100, device=device, requires_grad=True)
    x = torch.rand(4, 100, device=device)
    own = {logits.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        log_prob(logits, x.unsqueeze(1))
    assert {t.untyped_storage().data_ptr() for t in saved} <= own


def test_no_gradient_for_constant_data(device: torch.device) -> None:
    logits = torch.randn(2, 3, device=device, requires_grad=True)
    x = torch.rand(2, 3, device=device)
    log_prob(logits, x).sum().backward()
    assert x.grad is None
    only_x = x.clone().requires_grad_()
    frozen = logits.detach()
    log_prob(frozen, only_x).sum().backward()
    assert frozen.grad is None
    assert_close(only_x.grad, frozen, 1e-6)


def test_accuracy_of_long_events(device: torch.device) -> None:
    """20000 pixels, fp32: the sum does not drift with the length."""
    logits = torch.randn(2, 20000, device=device) * 4
    x = torch.rand(2, 20000, device=device).round()
    expected = Bernoulli(logits=logits.double()).log_prob(x.double()).sum(-1)
    assert_close(log_prob(logits, x), expected, 2e-6)


def test_errors(device: torch.device) -> None:
    logits, x = torch.randn(3, 4, device=device), torch.rand(3, 4, device=device)
    assert_refused(lambda: log_prob([0.0], x), TypeError, "logits: expected a torch.Tensor, got list")
    assert_refused(
        lambda: log_prob(logits.long(), x), TypeError, "logits: expected a floating-point tensor, got torch.int64"
    )
    assert_refused(lambda: log_prob(logits, None), TypeError, "x: expected a torch.Tensor, got NoneType")
    assert_refused(lambda: log_prob(logits, 1.0), TypeError, "x: expected a torch.Tensor, got float")
    assert_refused(
        lambda: log_prob(logits, x[:, :3]), ValueError, r"x: got shape \(3, 3\) beside logits \(3, 4\), expected size 4"
    )
    assert_refused(
        lambda: log_prob(logits, x, event_ndims=3), ValueError, r"event_ndims: got 3, expected 0 to 2 .* \(3, 4\)"
    )
    assert_refused(lambda: log_prob(logits, x, event_ndims=-1), ValueError, "event_ndims: got -1, expected 0 to 2")
    assert_refused(lambda: log_prob(logits, x, event_ndims=1.0), TypeError, "event_ndims: expected an int, got float")
    assert_refused(lambda: log_prob(logits, x, event_ndims=True), TypeError, "event_ndims: expected an int, got bool")
    assert_refused(lambda: log_prob(logits, x.to("meta")), ValueError, "x: got device meta, expected .* as logits")
    with pytest.raises(TypeError, match="positional"):
        log_prob(logits, x, 1)


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["kernel", "reference"])
def path(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Each of the two: under create_graph and in torch.func the reference is what users get. Without kernels the closed
    form is in their place."""
    if request.param == "reference":
        with reference_path():
            yield "reference"
    elif NATIVE["cpu"] or NATIVE["cuda"] or NATIVE["triton"]:
        yield "kernel"
    elif device.type == "cpu":
        yield "closed form"
    else:
        pytest.skip("no kernels: it would be the reference again")


both_paths = pytest.mark.usefixtures("path")


def counts_exactly(x: float, mu: float, theta: float, eps: float = 0.0) -> tuple[mpmath.mpf, ...]:
    """(log NB, its slope in mu, its slope in theta, the sum of the two opposite parts of that) with 60 digits."""
    with mpmath.workdps(60):
        x, mu, theta, eps = map(mpmath.mpf, (x, mu, theta, eps))
        choose = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        total, sum_, share = x + theta, theta + mu + eps, theta + eps
        value = choose + theta * mpmath.log(share / sum_) + (x * mpmath.log((mu + eps) / sum_) if x else 0)
        gained = mpmath.digamma(total) - mpmath.digamma(theta) - mpmath.log(total / theta)
        lost = mpmath.log(total / theta * share / sum_) + theta / share - total / sum_
        return value, x / (mu + eps) - total / sum_, gained + lost, abs(gained) + abs(lost)


def counts_with_gradients(
    points: list[tuple[float, float, float]], dtype: torch.dtype, device: torch.device, eps: float = 0.0
) -> Tensor:
    """[3, points]: values, and slopes in mu and theta."""
    x, mu, theta = torch.tensor(points, dtype=dtype, device=device).unbind(1)
    mu, theta = (t.clone().requires_grad_() for t in (mu, theta))
    rows = uf.negative_binomial_log_prob(x, mu, theta, event_ndims=0, eps=eps)
    return torch.stack([rows.detach(), *gradient(rows, mu, theta)]).double().cpu()


# of the larger of its two opposite parts: how much of theta's slope is rounding
OF_THETA = {"kernel": 2e-6, "closed form": 8e-6, "reference": 2e-5}


def left_by_pytorch(points: list[tuple[float, float, float]], path: str, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """What PyTorch's derivatives of the reference leave of float32, in mu and theta: they are sums of what autograd
    finds for each of the reference's terms."""
    x, mu, theta = torch.tensor(points, dtype=torch.float64).T
    if path != "reference":
        return torch.zeros_like(mu), torch.zeros_like(theta)
    return 1e-6 * (x / (mu + eps) + (x + theta) / (mu + eps + theta)), 1e-7 / theta


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_negative_binomial_keeps_its_digits_for_large_theta(dtype: torch.dtype, device: torch.device) -> None:
    """scverse/scvi-tools#2965: x = 5, mu = 3, theta = 1e6 gave -1.787 in fp32; it is -2.294."""
    points = [(5.0, 3.0, 10.0**exponent) for exponent in range(-3, 8)]
    points = [tuple(torch.tensor(p, dtype=dtype).tolist()) for p in points]  # 1e-3 is no float
    got = counts_with_gradients(points, dtype, device)
    assert abs(got[0, 9] + 2.294) < 1e-3
    expected = torch.tensor([[float(n) for n in counts_exactly(*p)[:3]] for p in points], dtype=torch.float64).T
    # what is left of float64 for theta's slope of 1e-14, after differences of numbers of 1e-7
    assert ((got / expected - 1).abs() < (1e-5 if dtype == torch.float32 else 1e-7)).all()


def test_negative_binomial_over_all_magnitudes(path: str, device: torch.device) -> None:
    """fp32 against 60 digits. The slope in theta is a difference: it is held to the larger of its parts."""
    xs, mus = (0, 0.3, 1, 2, 17, 300, 1e4, 1e5), (1e-8, 1e-3, 0.5, 3, 40, 5e3, 1e6)
    thetas = (1e-4, 1e-3, 0.03, 0.3, 0.9, 1, 1.1, 2.5, 7.9, 8, 30, 1e3, 1e5, 1e6, 1e7)
    points = torch.tensor([(x, mu, theta) for x in xs for mu in mus for theta in thetas]).tolist()
    got = counts_with_gradients(points, torch.float32, device)
    value, of_mu, of_theta, scale = torch.tensor(
        [[float(n) for n in counts_exactly(*p)] for p in points], dtype=torch.float64
    ).T
    assert ((got[0] / value - 1).abs() < (1e-5 if path == "reference" else 1e-6)).all()
    of_mu_rounding, of_theta_rounding = left_by_pytorch(points, path)
    assert ((got[1] - of_mu).abs() <= 1e-6 * of_mu.abs() + of_mu_rounding).all()  # 0 where x = mu
    assert ((got[2] - of_theta).abs() <= OF_THETA[path] * scale + of_theta_rounding).all()


@pytest.mark.parametrize("eps", [0.0, 1e-8, 3.0])
def test_negative_binomial_in_float64_over_all_magnitudes(eps: float, device: torch.device) -> None:
    """That it is an oracle for float32: it has all digits but those of float64."""
    xs, mus, thetas = (0, 0.3, 1, 17, 1e5), (1e-8, 1e-3, 3, 5e3, 1e6), (1e-4, 0.03, 1, 7.9, 30, 1e5, 1e7)
    points = [(x, mu, theta) for x in xs for mu in mus for theta in thetas]
    got = counts_with_gradients(points, torch.float64, device, eps)
    exact = torch.tensor([[float(n) for n in counts_exactly(*p, eps)] for p in points], dtype=torch.float64)
    value, of_mu, of_theta, scale = exact.T
    of_mu_rounding, of_theta_rounding = (1e-7 * n for n in left_by_pytorch(points, "reference", eps))
    assert ((got[0] - value).abs() <= 1e-13 * value.abs() + 1e-15).all()
    assert ((got[1] - of_mu).abs() <= 1e-14 * of_mu.abs() + of_mu_rounding).all()
    assert ((got[2] - of_theta).abs() <= 1e-12 * scale + of_theta_rounding).all()


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3])
def test_negative_binomial_of_tiny_parameters(eps: float, path: str, device: torch.device) -> None:
    """fp32, as softplus(-100) gives them: what has no reciprocal has a logarithm, and a slope if that is a number."""
    eps = torch.tensor(eps).item()
    tiny = (1.4e-45, 1e-42, 3e-39, 1e-35, 1e-30, 1e-20, 1e-6, 1.0, 40.0)
    points = torch.tensor([(x, mu, theta) for x in (0, 1, 5, 1000) for mu in tiny for theta in tiny]).tolist()
    got = counts_with_gradients(points, torch.float32, device, eps)
    exact = torch.tensor([[float(n) for n in counts_exactly(*p, eps)] for p in points], dtype=torch.float64).T
    value, of_mu, of_theta, scale = (n.float().double() for n in exact)  # infinite where fp32 has no such number
    assert ((got[0] - value).abs() <= 2e-6 * value.abs() + 1e-20).all()
    if path != "kernel":  # loses the slopes in the difference of infinities
        return
    assert ((got[1] == of_mu) | ((got[1] - of_mu).abs() <= 1e-5 * of_mu.abs() + 1e-7)).all()
    assert ((got[2] == of_theta) | ((got[2] - of_theta).abs() <= 1e-5 * scale.clamp(max=3e38))).all()


def test_negative_binomial_of_a_count_below_the_normal_range(path: str, device: torch.device) -> None:
    """A count that is a real number, as good as 0."""
    points = [
        (x, mu, theta) for x in (1.4e-45, 1e-42, 0) for mu in (1e-10, 1e-3, 3.0, 1e7) for theta in (1e-3, 1.0, 1e4)
    ]
    values = counts_with_gradients(points, torch.float32, device)[0].reshape(3, -1)
    assert_close(values[:2], values[2].expand(2, -1), 1e-6, 1e-15)


@both_paths
def test_slope_in_a_count_whose_mean_is_next_to_nothing(device: torch.device) -> None:
    """mu / theta leaves fp32's range, its logarithm does not."""
    x, mu, theta = torch.cartesian_prod(
        torch.tensor([0.0, 0.5, 1.0, 5.0]), torch.tensor([1e-42, 1e-38, 1e-30, 0.5]), torch.tensor([1e3, 1e7, 1e30])
    ).unbind(1)
    x, mu, theta = (t.clone().to(device) for t in (x, mu, theta))
    x.requires_grad_()
    (got,) = gradient(uf.negative_binomial_log_prob(x, mu, theta, event_ndims=0), x)
    count, mean, inverse_dispersion = x.detach().double(), mu.double(), theta.double()
    total = count + inverse_dispersion
    expected = torch.digamma(total) - torch.digamma(count + 1) + mean.log() - (mean + inverse_dispersion).log()
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("eps", [1e-8, 1e-3, 3.0])
def test_eps_over_all_magnitudes(eps: float, path: str, device: torch.device) -> None:
    """As without: it is not lost in mu or theta, nor they in it. A zero keeps its digits where its two parts cancel."""
    eps = torch.tensor(eps).item()
    xs, mus, thetas = (0, 0.3, 1, 17, 1e4), (0, 1e-12, 1e-8, 1e-3, 3, 5e3), (1e-4, 1e-3, 0.3, 1, 7.9, 30, 1e3, 1e6)
    points = torch.tensor([(x, mu, theta) for x in xs for mu in mus for theta in thetas]).tolist()
    got = counts_with_gradients(points, torch.float32, device, eps)
    exact = [counts_exactly(*p, eps) for p in points]
    value, of_mu, of_theta, scale = torch.tensor([[float(n) for n in e] for e in exact], dtype=torch.float64).T
    x, _, theta = torch.tensor(points, dtype=torch.float64).T
    of_eps = torch.where(x == 0, 0.0, theta * torch.log1p(eps / theta))  # a part of the value
    of_mu_rounding, of_theta_rounding = left_by_pytorch(points, path, eps)
    assert ((got[0] - value).abs() <= (1e-5 if path == "reference" else 1e-6) * (value.abs() + of_eps)).all()
    assert ((got[1] - of_mu).abs() <= 1e-6 * of_mu.abs() + of_mu_rounding).all()
    assert ((got[2] - of_theta).abs() <= OF_THETA[path] * scale + of_theta_rounding).all()


def test_negative_binomial_equals_scipy_and_sums_to_one(device: torch.device) -> None:
    mu, theta = 4.0, 1.7
    x = torch.arange(400, dtype=torch.float64, device=device)
    got = uf.negative_binomial_log_prob(x, x.new_tensor(mu), x.new_tensor(theta), event_ndims=0)
    expected = scipy.stats.nbinom.logpmf(x.cpu().numpy(), theta, theta / (theta + mu))
    assert_close(got.cpu(), torch.from_numpy(expected), 1e-12)
    assert abs(got.exp().sum() - 1) < 1e-12
    gate = x.new_tensor(0.4)
    inflated = uf.zero_inflated_negative_binomial_log_prob(
        x, x.new_tensor(mu), x.new_tensor(theta), gate, event_ndims=0
    )
    assert abs(inflated.exp().sum() - 1) < 1e-12
    assert_close(inflated[1:] - got[1:], torch.full_like(got[1:], math.log(1 / (1 + math.exp(0.4)))), 1e-12)


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gene_that_is_not_expressed(dtype: torch.dtype, device: torch.device) -> None:
    """mu = 0: no counts for certain, at no cost; some are impossible. Slopes are their limits."""
    mu, theta, gate = (torch.tensor([[v]], dtype=dtype, device=device, requires_grad=True) for v in (0.0, 2.0, -1.0))
    none = uf.negative_binomial_log_prob(torch.zeros_like(mu), mu, theta)
    assert none.item() == 0
    assert [g.item() for g in gradient(none, mu, theta)] == [-1, 0]
    assert uf.negative_binomial_log_prob(torch.ones_like(mu), mu, theta).item() == -INF
    inflated = uf.zero_inflated_negative_binomial_log_prob(torch.zeros_like(mu), mu, theta, gate)
    assert inflated.item() == 0
    of_mu, of_theta, of_gate = gradient(inflated, mu, theta, gate)
    assert abs(of_mu.item() + 1 / (1 + math.exp(-1))) < 1e-6 and of_theta.item() == of_gate.item() == 0


@pytest.mark.parametrize("gate", [-90.0, -30.0, -3.0, 0.0, 3.0, 30.0, 90.0])
def test_zero_inflation_of_any_size(gate: float, path: str, device: torch.device) -> None:
    """Zeros of counts that are likely, rare and next to impossible, under every gate; value and slopes to fp32."""
    points = torch.tensor(
        [(x, mu, theta) for x in (0.0, 3.0) for mu in (1e-6, 0.3, 50.0, 1e4) for theta in (0.1, 5.0, 1e6)]
    )
    x, mu, theta = points.to(device).unbind(1)
    mu, theta = (t.clone().requires_grad_() for t in (mu, theta))
    g = torch.full_like(x, gate).requires_grad_()
    rows = uf.zero_inflated_negative_binomial_log_prob(x, mu, theta, g, event_ndims=0)
    of_mu, of_theta, of_gate = gradient(rows, mu, theta, g)
    # what PyTorch's functions and derivatives, that of expm1 for one, leave of float32
    least = mpmath.mpf(10) ** -37 if path == "kernel" else mpmath.mpf(3e-7)
    with mpmath.workdps(120):
        closed = 1 / (1 + mpmath.exp(mpmath.mpf(gate)))
        for i, point in enumerate(points.tolist()):
            count, d_mu, d_theta, scale = counts_exactly(*point)
            p = mpmath.exp(count)
            zero = point[0] == 0
            mass = (1 - closed) * zero + closed * p
            share = closed * p / mass
            slope = (closed * (1 - closed) * (1 - p) / mass) if zero else -(1 - closed)
            for got, expected, size, part in (
                (rows[i], mpmath.log(mass), None, 1),
                (of_mu[i], share * d_mu, None, 1 + point[0] / point[1]),
                (of_theta[i], share * d_theta, share * scale, 1 / point[2]),
                (of_gate[i], slope, None, 1),
            ):
                size = abs(expected) if size is None else size
                error = abs(mpmath.mpf(got.item()) - expected)
                assert error <= 1e-5 * size + part * least, (point, got.item(), expected)


def test_zero_inflated_equals_scvi_tools_formula(device: torch.device) -> None:
    """Its log_zinb_positive without eps, in float64: the logits are those of a dropout."""
    x = torch.poisson(torch.full((6, 40), 1.5, dtype=torch.float64)).to(device)
    mu, theta, pi = (torch.randn(6, 40, dtype=torch.float64, device=device) for _ in range(3))
    mu, theta = mu.exp(), theta.exp()
    ratio = torch.log(theta) - torch.log(theta + mu)
    zero = F.softplus(-pi + theta * ratio) - F.softplus(-pi)
    some = -F.softplus(-pi) - pi + theta * ratio + x * (torch.log(mu) - torch.log(theta + mu))
    some = some + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    expected = torch.where(x < 1e-8, zero, some).sum(-1)
    assert_close(uf.zero_inflated_negative_binomial_log_prob(x, mu, theta, pi), expected, 1e-12)


def test_integer_counts_are_not_rounded(device: torch.device) -> None:
    """bf16 has no 257: integers are taken in fp32 whatever the means are in, and these keep their dtype's gradient."""
    x = torch.tensor([[257, 1001]], device=device)
    mu = torch.full((1, 2), 256.0, device=device, dtype=torch.bfloat16, requires_grad=True)
    theta = torch.full((2,), 8.0, device=device)
    got = uf.negative_binomial_log_prob(x, mu, theta)
    expected = sum(counts_exactly(n, 256.0, 8.0)[0] for n in (257, 1001))
    assert got.dtype == torch.float32 and abs(got.item() / float(expected) - 1) < 1e-6
    (g,) = gradient(got, mu)
    assert g.dtype == torch.bfloat16 and g[0, 0] > 0


def test_theta_of_each_gene_gets_one_gradient(device: torch.device) -> None:
    x = torch.poisson(torch.full((7, 33), 2.0)).to(device)
    mu, theta = torch.rand(7, 33, device=device) + 0.5, (torch.rand(33, device=device) + 0.5).requires_grad_()
    (got,) = gradient(uf.negative_binomial_log_prob(x, mu, theta), theta)
    repeated = theta.detach().expand(7, 33).clone().requires_grad_()
    (expected,) = gradient(uf.negative_binomial_log_prob(x, mu, repeated), repeated)
    assert got.shape == (33,)
    assert_close(got, expected.double().sum(0), 1e-5)


# ---- Gaussian, Laplace, discretized logistic -------------------------------------------------------------------------


def test_densities_equal_scipy(device: torch.device) -> None:
    x, m, s = (torch.randn(4, 9, dtype=torch.float64, device=device) for _ in range(3))
    plain = [t.cpu().numpy() for t in (x, m)]
    scale = s.exp().cpu().numpy()
    normal = torch.from_numpy(scipy.stats.norm.logpdf(*plain, scale).sum(-1)).to(device)
    laplace = torch.from_numpy(scipy.stats.laplace.logpdf(*plain, scale).sum(-1)).to(device)
    assert_close(uf.gaussian_log_prob(x, m, s, spread="logstd"), normal, 1e-12)
    assert_close(uf.gaussian_log_prob(x, m, 2 * s), normal, 1e-12)
    assert_close(uf.gaussian_log_prob(x, m, s.exp(), spread="std"), normal, 1e-12)
    assert_close(uf.laplace_log_prob(x, m, s), laplace, 1e-12)


def test_one_variance_for_everything(device: torch.device) -> None:
    """A decoder with one learned log-variance: a 0-dim tensor, with a 0-dim gradient."""
    x, m = torch.randn(2, 4, 9, device=device)
    v = torch.tensor(0.3, device=device, requires_grad=True)
    got = uf.gaussian_log_prob(x, m, v)
    expected = torch.distributions.Normal(m, (0.5 * v).exp()).log_prob(x).sum(-1)
    assert_close(got, expected, 1e-5)
    assert_close(gradient(got, v)[0], gradient(expected, v)[0], 1e-5)


def test_laplace_at_its_mean_has_no_slope(device: torch.device) -> None:
    x = torch.tensor([[0.3, 0.5]], device=device, requires_grad=True)
    m, s = (t.clone().requires_grad_() for t in (x.detach(), torch.zeros_like(x)))
    assert [g.tolist() for g in gradient(uf.laplace_log_prob(x, m, s), x, m, s)] == [[[0, 0]], [[0, 0]], [[-1, -1]]]


@both_paths
@pytest.mark.parametrize("log_scale", [-30.0, -7.0, -5.0, -2.0, 0.0, 5.0, 30.0])
def test_masses_of_256_levels_sum_to_one(log_scale: float, device: torch.device) -> None:
    levels = torch.arange(256, device=device) / 127.5 - 1
    for mean in (-1.3, -0.5, 0.00123, 1.0):
        m, s = levels.new_full((256,), mean), levels.new_full((256,), log_scale)
        total = uf.discretized_logistic_log_prob(levels, m, s, event_ndims=0).double().exp().sum()
        assert abs(total - 1) < 1e-4  # the bins' edges are rounded to fp32


@both_paths
@pytest.mark.parametrize("log_scale", [-300.0, -100.0, 100.0])
def test_discretized_logistic_of_scales_without_reciprocal(log_scale: float, device: torch.device) -> None:
    """In the bin of the mean, on its edge, and beyond: fp32 need not have 1 / scale, nor the bin's width."""
    x, m, half = torch.tensor([0.5, 0.625, -1.0, 1.0, 0.5], device=device), 0.5, 0.125
    m, s = torch.full_like(x, m).requires_grad_(), torch.full_like(x, log_scale).requires_grad_()
    rows = uf.discretized_logistic_log_prob(x, m, s, event_ndims=0, bin_width=2 * half)
    of_mean, of_scale = gradient(rows, m, s)
    if log_scale < 0:
        assert_close(rows, x.new_tensor([0, -math.log(2), -INF, -INF, 0]), 1e-6)
        assert of_mean[0] == 0 and abs(of_scale[0]) < 1e-30 and not (of_mean.isnan() | of_scale.isnan()).any()
    else:
        inside = math.log(2 * half / 4) - log_scale  # the density of a logistic at its middle, times the width
        assert_close(rows, x.new_tensor([inside, inside, -math.log(2), -math.log(2), inside]), 1e-6)
        assert_close(of_scale, x.new_tensor([-1, -1, 0, 0, -1]), 1e-6)
        assert of_mean.abs().max() < 1e-40


@both_paths
@pytest.mark.parametrize("log_scale", [-300.0, -177.0, -90.0])
def test_discretized_logistic_of_an_extreme_bin_that_has_all_mass(log_scale: float, device: torch.device) -> None:
    """The nearest edge is an infinite number of scales away."""
    x = torch.tensor([-1.0, 1.0], device=device, requires_grad=True)
    m, s = (89 * x).detach().requires_grad_(), torch.full_like(x, log_scale).requires_grad_()
    rows = uf.discretized_logistic_log_prob(x, m, s, event_ndims=0)
    assert all((found == 0).all() for found in (rows, *gradient(rows, x, m, s)))


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [-80.0, -90.0, -170.0, -300.0])
@pytest.mark.parametrize("density", ["gaussian", "laplace"])
def test_certain_densities_at_their_mean(density: str, spread: float, dtype: torch.dtype, device: torch.device) -> None:
    """e^-logvar, or e^-log_scale, is infinite in fp32: at the mean nothing comes of that."""
    x, m = (torch.tensor([1.5, 1e-3, 0.0], dtype=dtype, device=device).requires_grad_() for _ in range(2))
    s = torch.full_like(x, spread).requires_grad_()
    rows = getattr(uf, f"{density}_log_prob")(x, m, s, event_ndims=0)
    found = gradient(rows, x, m, s)
    scale = s.detach().float()
    log_peak = -scale - math.log(2) if density == "laplace" else -0.5 * (scale + math.log(2 * math.pi))
    assert_close(rows, log_peak, 1e-6)
    assert (found[0] == 0).all() and (found[1] == 0).all()
    assert (found[2] == (-1 if density == "laplace" else -0.5)).all()


def test_laplace_far_from_its_mean_in_scales_without_reciprocal(path: str, device: torch.device) -> None:
    """1 / b is infinite; |x - m| / b is not."""
    x, m, s = (torch.tensor([t], device=device, requires_grad=True) for t in (1e-10, 0.0, -90.0))
    rows = uf.laplace_log_prob(x, m, s, event_ndims=0)
    expected = 1e-10 * math.exp(90)
    assert_close(torch.stack([-rows.detach()[0], gradient(rows, s)[0][0]]), x.new_tensor([expected, expected]), 1e-5)


@both_paths
@pytest.mark.parametrize("log_scale", [-20.0, -7.0, -4.0, 0.0, 6.0, 20.0])
def test_discretized_logistic_for_scales_of_any_size(log_scale: float, device: torch.device) -> None:
    """fp32 against 60 digits, in extreme bins and in those between, near the mean and in the far tails."""
    half = 0.125
    points = [(x, m) for x in (-1.0, -0.5, 0.25, 0.75, 1.0) for m in (-2.0, -0.5, 0.25, 0.1875, 0.8125)]
    x, m = torch.tensor(points, device=device).unbind(1)
    m, s = m.clone().requires_grad_(), torch.full_like(m, log_scale).requires_grad_()
    rows = uf.discretized_logistic_log_prob(x, m, s, event_ndims=0, bin_width=2 * half)
    of_mean, of_scale = gradient(rows, m, s)

    def mass(x: float, m: mpmath.mpf, s: mpmath.mpf) -> mpmath.mpf:
        def below(edge: float, away: bool) -> mpmath.mpf:
            t = (edge - m) / mpmath.exp(s)
            return 1 / (1 + mpmath.exp(t if away else -t))

        if x == -1.0:
            return mpmath.log(below(x + half, False))
        if x == 1.0:
            return mpmath.log(below(x - half, True))
        upper = x - m > 0  # the difference of what lies beyond, on the side where that is small
        return mpmath.log(abs(below(x + half, upper) - below(x - half, upper)))

    with mpmath.workdps(60):
        for i, (a, b) in enumerate(points):
            expected = mass(a, mpmath.mpf(b), mpmath.mpf(log_scale))
            by_mean = mpmath.diff(
                lambda t, a=a: mass(a, t, mpmath.mpf(log_scale)), mpmath.mpf(b), h=mpmath.mpf(10) ** -20
            )
            by_scale = mpmath.diff(lambda t, a=a, b=b: mass(a, mpmath.mpf(b), t), log_scale, h=mpmath.mpf(10) ** -20)
            scale = mpmath.exp(-log_scale)
            for got, e, least in ((rows[i], expected, 0), (of_mean[i], by_mean, scale), (of_scale[i], by_scale, 1)):
                error = abs(mpmath.mpf(got.item()) - e)
                assert error <= 1e-5 * abs(e) + 1e-6 * least + mpmath.mpf(10) ** -37, (a, b, got.item(), e)


def test_discretized_logistic_equals_pixelcnn(device: torch.device) -> None:
    """As Salimans et al. write it, where its floor of 1e-12 under the probability is not reached."""
    x = torch.randint(0, 256, (5, 64), device=device).double() / 127.5 - 1
    x[:, 0], x[:, 1] = -1, 1
    m, s = (0.3 * torch.randn(5, 64, device=device).double() - shift for shift in (0, 1))
    plus, minus = (x - m + 1 / 255) / s.exp(), (x - m - 1 / 255) / s.exp()
    inner = (plus.sigmoid() - minus.sigmoid()).clamp(min=1e-12).log()
    expected = torch.where(x < -0.999, plus - F.softplus(plus), torch.where(x > 0.999, -F.softplus(minus), inner))
    assert_close(uf.discretized_logistic_log_prob(x, m, s), expected.sum(-1), 1e-9)


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "laplace", "discretized_logistic", "negative_binomial"])
def test_nan_stays_in_the_row_of_any_density(name: str, device: torch.device) -> None:
    log_density = getattr(uf, f"{name}_log_prob")
    clean = [torch.rand(4, 37, device=device) + 0.3 for _ in range(3)]
    clean[0] = clean[0].round()
    for k in range(3):
        dirty = [t.clone() for t in clean]
        dirty[k][2, 36] = math.nan
        dirty[1].requires_grad_()
        got = log_density(*dirty)
        assert got[2].isnan()
        assert_rounded_alike(got[[0, 1, 3]], log_density(*clean)[[0, 1, 3]])
        assert gradient(got, dirty[1])[0][[0, 1, 3]].isfinite().all()


def test_errors_of_the_other_densities(device: torch.device) -> None:
    x, a, b = torch.rand(3, 3, 4, device=device)
    assert_refused(
        lambda: uf.gaussian_log_prob(x, a, b, spread="var"), ValueError, "spread: got 'var', expected one of"
    )
    assert_refused(
        lambda: uf.gaussian_log_prob(x, a, b[:, :3]), ValueError, r"logvar: got shape \(3, 3\) beside x \(3, 4\)"
    )
    assert_refused(lambda: uf.gaussian_log_prob(x, a.long(), b), TypeError, "mean: expected a floating-point tensor")
    assert_refused(lambda: uf.gaussian_log_prob(x, a, b, clamp_logvar=(1.0, 0.0)), ValueError, "low <= high")
    assert_refused(lambda: uf.laplace_log_prob(x, a, 1.0), TypeError, "log_scale: expected a torch.Tensor, got float")
    assert_refused(
        lambda: uf.laplace_log_prob(x, a, b, event_ndims=3), ValueError, "event_ndims: got 3, expected 0 to 2"
    )
    logistic = uf.discretized_logistic_log_prob
    assert_refused(lambda: logistic(x, a, b, bin_width=0.0), ValueError, "bin_width: got 0.0, expected a number > 0")
    assert_refused(
        lambda: logistic(x, a, b, low=1.0, high=-1.0), ValueError, "low: got 1.0, expected at most high = -1.0"
    )
    counts = uf.negative_binomial_log_prob
    assert_refused(
        lambda: counts(x, a, b.long()), TypeError, "theta: expected a floating-point tensor, got torch.int64"
    )
    assert_refused(lambda: counts(None, a, b), TypeError, "x: expected a torch.Tensor, got NoneType")
    assert_refused(lambda: counts(x, a, b, eps=-1e-8), ValueError, "eps: got -1e-08, expected a number >= 0")
    inflated = uf.zero_inflated_negative_binomial_log_prob
    assert_refused(lambda: inflated(x, a, b, None), TypeError, "gate_logits: expected a torch.Tensor, got NoneType")
    assert_refused(lambda: inflated(x, a, b.to("meta"), a), ValueError, "theta: got device meta, expected .* as x")
    assert_refused(lambda: inflated(x, a, b, a, eps=None), TypeError, "eps: expected a number, got NoneType")
    assert_refused(lambda: inflated(x, a, b, a, eps=-1.0), ValueError, "eps: got -1.0, expected a number >= 0")
