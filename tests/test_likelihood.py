"""Log-densities: what is particular to them."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_PRECISION, assert_close, assert_refused, assert_same_bits, reference_path
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


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_data_of_any_dtype(logits_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    """Binarised images come as bool and uint8: no cast is asked of the user. The gradient keeps the logits' dtype."""
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
def test_logits_of_zero(n: int, dtype: torch.dtype, device: torch.device) -> None:
    """-n log 2, with gradient x - 1/2: a derivative written with sign(l) gives 0 or a jump here."""
    logits = torch.zeros(2, n, dtype=dtype, device=device, requires_grad=True)
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
    assert_same_bits(got[[0, 1, 3]], expected[[0, 1, 3]])
    (g,), (e,) = gradient(got, logits), gradient(expected, clean)
    assert g[2, n - 1].isnan()
    assert_same_bits(g[[0, 1, 3]], e[[0, 1, 3]])
    data = x.clone()
    data[1, 0] = math.nan
    got = log_prob(clean, data)
    assert got[1].isnan() and got[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize(
    ("logits_shape", "x_shape"),
    [((3, 5, 20), (3, 1, 20)), ((5, 3, 20), (3, 20)), ((3, 5, 20), (20,)), ((3, 5, 20), (3, 5, 1)), ((1, 20), (4, 20))],
    ids=str,
)
def test_data_broadcasts(logits_shape: tuple, x_shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    """`x.unsqueeze(1)` against K samples, K first, one image for all: as if repeated, gradients summed back."""
    logits = torch.randn(logits_shape, device=device).to(dtype).requires_grad_()
    x = torch.rand(x_shape, device=device).to(dtype).requires_grad_()
    got = log_prob(logits, x)
    wide_logits, wide_x = (t.detach().double().requires_grad_() for t in (logits, x))
    with reference_path():
        expected = log_prob(*torch.broadcast_tensors(wide_logits, wide_x))
    assert got.shape == expected.shape
    assert_close(got, expected, 1e-10 if dtype == torch.float64 else 1e-5)
    eps = 4 * torch.finfo(dtype).eps if dtype in LOW_PRECISION else 1e-5
    for a, b in zip(gradient(got, logits, x), gradient(expected, wide_logits, wide_x), strict=True):
        assert a.shape == b.shape
        assert_close(a, b, eps)


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
        lambda: log_prob(logits, x[:, :3]), ValueError, r"broadcast together, got logits \(3, 4\), x \(3, 3\)"
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
