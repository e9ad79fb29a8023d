"""KL divergences of Gaussians and reparameterised samples: what is particular to them."""

import math
from contextlib import nullcontext

import mpmath
import pytest
import torch
import torch.nn.functional as F
from cases.divergence import kl
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
from torch.distributions import Normal, kl_divergence

import unigen_fast as uf
from unigen_fast.reference import divergence as reference

INF = math.inf


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), inputs)


@pytest.fixture
def pair(device: torch.device) -> tuple[Tensor, Tensor]:
    """mean and logvar, [8, 5] in float64."""
    m, v = (torch.randn(8, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    return m, v


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n", [1, 7, 64, 300])
def test_near_the_prior_nothing_cancels(
    n: int, sign: int, size: float, dtype: torch.dtype, device: torch.device
) -> None:
    """exp(v) - 1 - v of v = 1e-4 is 5e-9: in fp32 the naive formula has no digit of it, in fp64 expm1 loses its own."""
    mean = torch.zeros(2, n, dtype=dtype, device=device, requires_grad=True)
    logvar = torch.full((2, n), sign * size, dtype=dtype, device=device, requires_grad=True)
    v = logvar.detach().double()
    exact = 0.5 * sum(v**k / math.factorial(k) for k in range(2, 9)).sum(1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    got = uf.gaussian_kl(mean, logvar, reduction="none")
    assert_close(got, exact, tolerance)
    _, g = gradients(got, mean, logvar)
    assert_close(g, 0.5 * torch.expm1(v), tolerance)
    assert (uf.gaussian_kl(mean, torch.zeros_like(logvar), reduction="none") == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_accurate_over_the_whole_range_of_log_variances(dtype: torch.dtype, device: torch.device) -> None:
    """Each element alone: log-variances where the exponential changes its branch, and up to where it overflows."""
    largest = 709.7 if dtype == torch.float64 else 88.7
    edges = [1e-30, 1e-9, 0.01, math.log(2) / 2, 0.5, math.log(2), 1.0, 3.0, 17.0, 60.0, largest]
    values = [sign * x * (1 + nudge) for x in edges for sign in (1, -1) for nudge in (-1e-4, 0.0, 1e-4)]
    v = torch.tensor([x for x in values if x < largest], dtype=dtype, device=device).requires_grad_()
    kl = uf.gaussian_kl(torch.zeros_like(v), v, event_ndims=0, reduction="none")
    (slope,) = torch.autograd.grad(kl.sum(), v)
    exact = [mpmath.mpf(x) for x in v.tolist()]
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    for got, got_slope, x in zip(kl.tolist(), slope.tolist(), exact, strict=True):
        with mpmath.workdps(80):
            assert got == pytest.approx(float((mpmath.expm1(x) - x) / 2), rel=tolerance)
            assert got_slope == pytest.approx(float(mpmath.expm1(x) / 2), rel=tolerance)


def test_near_any_prior_nothing_cancels(device: torch.device) -> None:
    """The same against a prior of its own: only the difference of the log-variances counts."""
    prior = torch.randn(4, 20, device=device)
    step = 2.0**-13
    logvar = prior.mul(2**10).round().div(2**10).requires_grad_()
    prior_logvar = (logvar.detach() + step).requires_grad_()
    assert torch.equal(prior_logvar.detach() - logvar.detach(), torch.full_like(prior, step))
    mean = torch.randn(4, 20, device=device)
    got = uf.gaussian_kl(mean, logvar, mean.clone(), prior_logvar, reduction="none")
    d = torch.tensor(-step, dtype=torch.float64)
    assert_close(got, torch.full((4,), float(0.5 * 20 * (torch.expm1(d) - d))), 1e-4)
    to_posterior, to_prior = gradients(got, logvar, prior_logvar)
    assert_close(to_posterior, (0.5 * torch.expm1(d)).expand(4, 20), 1e-5)
    assert_close(to_prior, (-0.5 * torch.expm1(d)).expand(4, 20), 1e-5)


def test_across_the_switch_of_series(device: torch.device) -> None:
    """Both sides of |v| = 1, where the reference turns from its series to the closed form, and far out."""
    v = torch.tensor(
        [-40, -5, -1.0000001, -1, -0.9999999, -0.5, 0.5, 0.9999999, 1, 1.0000001, 3, 20], dtype=torch.float64
    )
    v = v.to(device).unsqueeze(1).requires_grad_()
    zero = torch.zeros_like(v)
    got = uf.gaussian_kl(zero, v, reduction="none")
    assert_close(got, kl(zero, (v / 2).exp()), 1e-13)
    (first,) = torch.autograd.grad(got.sum(), v, create_graph=True)
    assert_close(first, 0.5 * torch.expm1(v), 1e-13)
    (second,) = torch.autograd.grad(first.sum(), v)
    assert_close(second, 0.5 * v.exp(), 1e-12)
    low = uf.gaussian_kl(zero.float(), v.detach().float(), reduction="none")
    assert ((low.double() / got - 1).abs() < 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("logvar", [12.0, 40.0, -40.0])
def test_huge_logvar_is_finite(logvar: float, dtype: torch.dtype, device: torch.device) -> None:
    """exp(12) overflows fp16 (diffusers gives inf); rows are fp32, and only a gradient beyond fp16's range is inf."""
    mean = torch.zeros(2, 9, dtype=dtype, device=device, requires_grad=True)
    v = torch.full((2, 9), logvar, dtype=dtype, device=device, requires_grad=True)
    got = uf.gaussian_kl(mean, v, reduction="none")
    wide = v.detach().double()
    assert got.isfinite().all()
    assert_close(got, kl(torch.zeros_like(wide), (wide / 2).exp()), 1e-5)
    (g,) = gradients(got * 1e-18, v)
    assert g.isfinite().all()
    assert_close(g, 0.5e-18 * torch.expm1(wide), torch.finfo(dtype).eps, 1e-7)


def test_unbounded_logvar_and_the_clamp_against_it(device: torch.device) -> None:
    """synthcity #331, espnet #4236: exp of an unbounded logvar gives inf, then NaN. Clamped, all is finite."""
    v = torch.tensor([[200.0, -500.0, INF, -INF, 1.0]], device=device, requires_grad=True)
    m = torch.ones_like(v, requires_grad=True)
    assert uf.gaussian_kl(m[:, :2], v[:, :2]) == INF
    loss = uf.gaussian_kl(m, v, clamp_logvar=(-30.0, 20.0))
    to_mean, to_logvar = gradients(loss, m, v)
    assert loss.isfinite() and to_mean.isfinite().all()
    assert_close(to_logvar, torch.tensor([[0, 0, 0, 0, 0.5 * math.expm1(1.0)]]), 1e-6)
    z, rows = uf.sample_gaussian_with_kl(m, v, clamp_logvar=(-30.0, 20.0))
    assert z.isfinite().all() and rows.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(z.sum() + rows.sum(), m, v))


def test_nan_stays_in_its_row(pair: tuple[Tensor, Tensor]) -> None:
    m, v = pair
    clean = uf.gaussian_kl(m, v, reduction="none")
    clean_gradients = gradients(clean, m, v)
    with torch.no_grad():
        m[3, 2] = math.nan
    got = uf.gaussian_kl(m, v, reduction="none")
    others = [i for i in range(8) if i != 3]
    assert got[3].isnan()
    assert_rounded_alike(got[others], clean[others])
    for a, b in zip(gradients(got, m, v), clean_gradients, strict=True):
        assert_rounded_alike(a[others], b[others])
    assert uf.gaussian_kl(m, v, free_bits=0.5, reduction="none")[3].isnan()


# ---- spreads and clamps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [False, True])
def test_spreads_agree(prior: bool, pair: tuple[Tensor, Tensor]) -> None:
    """The same distribution by logvar, logstd and std; gradients by the chain rule."""
    m, v = pair
    pm, pv = (torch.randn_like(m) for _ in range(2)) if prior else (None, None)
    expected = uf.gaussian_kl(m, v, pm, pv, reduction="none")
    _, to_logvar = gradients(expected, m, v)
    s = (v / 2).detach().requires_grad_()
    got = uf.gaussian_kl(m, s, pm, None if pv is None else pv / 2, spread="logstd", reduction="none")
    assert_close(got, expected, 1e-13)
    assert_close(gradients(got, s)[0], 2 * to_logvar, 1e-12)
    std = (v / 2).exp().detach().requires_grad_()
    got = uf.gaussian_kl(m, std, pm, None if pv is None else (pv / 2).exp(), spread="std", reduction="none")
    assert_close(got, expected, 1e-12)
    assert_close(gradients(got, std)[0], 2 * to_logvar / std, 1e-12)


@pytest.mark.parametrize("spread", ["logvar", "logstd", "std"])
def test_clamp(spread: str, device: torch.device) -> None:
    """The clamp is on the log-variance whatever the spread; no gradient outside, all of it inside."""
    v = torch.tensor([[-3.0, -0.5, 0.3, 0.9, 4.0]], dtype=torch.float64, device=device)
    low, high = -0.7, 0.8
    raw = {"logvar": v, "logstd": v / 2, "std": (v / 2).exp()}[spread].requires_grad_()
    prior = torch.full_like(v, 3.0).requires_grad_()
    prior_raw = {"logvar": prior, "logstd": prior / 2, "std": (prior / 2).exp()}[spread]
    m, pm = torch.ones_like(v), torch.zeros_like(v)
    options = {"spread": spread, "clamp_logvar": (low, high)}
    inside = torch.tensor([[False, True, True, False, False]], device=device)
    std, prior_std = (v.clamp(low, high) / 2).exp(), (prior.clamp(low, high) / 2).exp()
    for got, expected in (
        (uf.gaussian_kl(m, raw, **options), kl(m, std).mean()),
        (uf.gaussian_kl(m, raw, pm, prior_raw, **options), kl(m, std, pm, prior_std).mean()),
    ):
        assert_close(got, expected, 1e-12)
        (g,) = gradients(got, raw)
        assert (g[~inside] == 0).all() and (g[inside] != 0).all()
    (g,) = gradients(uf.gaussian_kl(m, raw, pm, prior_raw, **options), prior)
    assert (g == 0).all(), "the prior's log-variance is clamped too, and lies outside"
    torch.manual_seed(0)
    z = uf.sample_gaussian(m, raw, **options)
    torch.manual_seed(0)
    assert_close(z, uf.sample_gaussian(m, std, spread="std"), 1e-12)
    (g,) = gradients(z, raw)
    assert (g[~inside] == 0).all() and (g[inside] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
def test_clamp_on_its_bounds(dtype: torch.dtype, device: torch.device) -> None:
    """At the bound itself the gradient passes, whatever torch.clamp does there (it did before torch 2.15); (low, low)
    fixes the variance."""
    v = torch.tensor([[-1.0, 1.0, 0.0]], dtype=dtype, device=device, requires_grad=True)
    m = torch.zeros_like(v)
    wide = v.detach().double().requires_grad_()
    expected = gradients(kl(m.double(), (wide / 2).exp()), wide)[0]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2.0**-8)
    assert_close(gradients(uf.gaussian_kl(m, v, clamp_logvar=(-1, 1)), v)[0].double(), expected, tolerance, 1e-300)
    terms = reference.to_logvar(v, "logvar", -1.0, 1.0)
    assert (gradients(terms, v)[0] == 1).all()
    fixed = uf.gaussian_kl(m, v, clamp_logvar=(0.0, 0.0))
    assert fixed == 0


# ---- free bits -------------------------------------------------------------------------------------------------------


def test_free_bits_of_the_row(pair: tuple[Tensor, Tensor]) -> None:
    m, v = pair
    rows = kl(m, (v / 2).exp())
    bound = float(rows.median()) + 1e-3
    got = uf.gaussian_kl(m, v, free_bits=bound, reduction="none")
    assert_close(got, rows.clamp(min=bound), 1e-13)
    below = rows < bound
    assert below.any() and (~below).any()
    plain = gradients(uf.gaussian_kl(m, v, reduction="none"), m, v)
    for g, p in zip(gradients(got, m, v), plain, strict=True):
        assert (g[below] == 0).all()
        assert_close(g[~below], p[~below], 1e-13)


def test_free_bits_of_each_dimension(pair: tuple[Tensor, Tensor]) -> None:
    m, v = pair
    terms = kl(m, (v / 2).exp(), event_ndims=0)
    bound = float(terms.median()) + 1e-3
    got = uf.gaussian_kl(m, v, free_bits=bound, free_bits_mode="per_dim", reduction="none")
    assert_close(got, terms.clamp(min=bound).sum(1), 1e-13)
    below = terms < bound
    plain = gradients(uf.gaussian_kl(m, v, reduction="none"), m, v)
    for g, p in zip(gradients(got, m, v), plain, strict=True):
        assert (g[below] == 0).all()
        assert_close(g[~below], p[~below], 1e-13)


def test_free_bits_come_before_scale_weights_and_reduction(pair: tuple[Tensor, Tensor]) -> None:
    m, v = pair
    rows = kl(m, (v / 2).exp()).clamp(min=2.5)
    w = torch.rand(8, dtype=torch.float64, device=m.device)
    got = uf.gaussian_kl(m, v, free_bits=2.5, weights=w, scale=0.1)
    assert_close(got, 0.1 * (w * rows).mean(), 1e-13)
    got = uf.gaussian_kl(m, v, free_bits=2.5, weights=w, scale=0.1, normalize_weights=True)
    assert_close(got, 0.1 * (w * rows).sum() / w.sum(), 1e-13)


def test_free_bits_at_the_prior(device: torch.device) -> None:
    """A collapsed posterior: the loss is the free bits, the gradient 0, not NaN."""
    m, v = (torch.zeros(3, 4, device=device, requires_grad=True) for _ in range(2))
    for mode, expected in (("sum", 0.5), ("per_dim", 2.0)):
        loss = uf.gaussian_kl(m, v, free_bits=0.5, free_bits_mode=mode)
        assert loss.item() == expected
        assert all((g == 0).all() for g in gradients(loss, m, v))


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 8), (1, 1), (), (3, 8), (3, 1)], ids=str)
def test_weights(shape: tuple[int, ...], reduction: str, device: torch.device) -> None:
    m, v = (torch.randn(3, 8, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    w = torch.rand(shape, dtype=torch.float64, device=device)
    rows = kl(m, (v / 2).exp()) * w
    expected = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    got = uf.gaussian_kl(m, v, weights=w, event_ndims=1, reduction=reduction)
    assert_close(got, expected, 1e-13)
    for a, b in zip(gradients(got, m, v), gradients(expected, m, v), strict=True):
        assert_close(a, b, 1e-12)
    normalised = kl(m, (v / 2).exp()) * (w / w.expand(3, 8).sum())
    expected = normalised if reduction == "none" else normalised.sum()
    options = {"event_ndims": 1, "normalize_weights": True, "reduction": reduction}
    assert_close(uf.gaussian_kl(m, v, weights=w, **options), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float16], ids=str)
def test_mask(dtype: torch.dtype, pair: tuple[Tensor, Tensor]) -> None:
    """Sequences padded to one length: the mean over what is there."""
    m, v = pair
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], device=m.device)
    got = uf.gaussian_kl(m, v, weights=mask.to(dtype), normalize_weights=True)
    assert got.dtype == torch.float64
    assert_close(got, kl(m, (v / 2).exp())[mask.bool()].mean(), 1e-12)
    for g in gradients(got, m, v):
        assert (g[~mask.bool()] == 0).all() and (g[mask.bool()] != 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mask_that_sums_to_zero(reduction: str, pair: tuple[Tensor, Tensor]) -> None:
    """Loss and gradient 0, not NaN."""
    m, v = pair
    for mask in (torch.zeros(8, device=m.device), torch.zeros(8, dtype=torch.bool, device=m.device)):
        for normalize in (False, True):
            got = uf.gaussian_kl(m, v, weights=mask, normalize_weights=normalize, reduction=reduction)
            assert (got == 0).all()
            assert all((g == 0).all() for g in gradients(got, m, v))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_that_require_grad(reduction: str, normalize: bool, pair: tuple[Tensor, Tensor]) -> None:
    """The derivative with respect to a weight is its row's KL; second derivatives too."""
    m, v = pair
    w = torch.rand(8, dtype=torch.float64, device=m.device).add(0.1).requires_grad_()

    def call(m: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return uf.gaussian_kl(
            m, v, weights=w, normalize_weights=normalize, reduction=reduction, scale=0.7, free_bits=1.0
        )

    rows = 0.7 * kl(m, (v / 2).exp(), free_bits=1.0) * (w / w.sum() if normalize else w)
    mean = reduction == "mean" and not normalize
    expected = rows.mean() if mean else rows if reduction == "none" else rows.sum()
    got = call(m, v, w)
    assert_close(got, expected, 1e-12)
    for a, b in zip(gradients(got, m, v, w), gradients(expected, m, v, w), strict=True):
        assert_close(a, b, 1e-11, 1e-15)
    assert torch.autograd.gradcheck(call, (m, v, w))
    assert torch.autograd.gradgradcheck(call, (m, v, w))


# ---- shapes, priors, reductions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior_mean", "prior_logvar"),
    [((5,), (5,)), ((8, 5), (1,)), ((), ()), ((1, 5), None), (None, (1, 5)), ((1,), (1, 5))],
    ids=str,
)
def test_prior_broadcasts(prior_mean, prior_logvar, pair: tuple[Tensor, Tensor]) -> None:
    m, v = pair
    pm, pv = (
        None if s is None else torch.randn(s, dtype=torch.float64, device=m.device, requires_grad=True)
        for s in (prior_mean, prior_logvar)
    )
    mean, prior_m = torch.broadcast_tensors(m, m.new_zeros(()) if pm is None else pm)
    std = (v / 2).exp()
    prior_std = m.new_ones(()) if pv is None else (pv / 2).exp()
    expected = kl_divergence(Normal(mean, std), Normal(prior_m, prior_std)).sum(-1)
    got = uf.gaussian_kl(m, v, pm, pv, reduction="none")
    assert got.shape == expected.shape
    assert_close(got, expected, 1e-12)
    inputs = [x for x in (m, v, pm, pv) if x is not None]
    for x, a, b in zip(inputs, gradients(got, *inputs), gradients(expected, *inputs), strict=True):
        assert a.shape == x.shape
        assert_close(a, b, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("options", [{}, {"free_bits": 0.4, "free_bits_mode": "per_dim"}], ids=["", "free bits"])
def test_variances_of_one_are_half_the_squared_error(options, dtype: torch.dtype, device: torch.device) -> None:
    """A single 0 for the log-variance, which kernels may take a shorter way for: the bits of as many zeros."""
    mean, target = (torch.randn(33, 17, dtype=dtype, device=device) for _ in range(2))
    mean[0, 1], target[2, 3] = INF, math.nan
    results = []
    for logvar in (torch.zeros((), dtype=dtype, device=device), torch.zeros_like(mean)):
        tensors = [x.clone().requires_grad_() for x in (mean, logvar, target)]
        rows = uf.gaussian_kl(*tensors, reduction="none", **options)
        found = gradients(rows, *tensors)
        results.append((rows.detach(), found[0], found[2], found[1].sum()))
    for single, whole in zip(*results, strict=True):
        assert_same_bits(single, whole)


@pytest.mark.parametrize("one", [0.0, 0.3])
def test_one_log_variance_for_all(one: float, pair: tuple[Tensor, Tensor]) -> None:
    m, v = pair
    logvar = torch.tensor(one, dtype=m.dtype, device=m.device, requires_grad=True)
    got, std = uf.gaussian_kl(m, logvar, v), (logvar / 2).exp()
    expected = kl_divergence(Normal(m, std), Normal(v, torch.ones_like(v))).sum(-1).mean()
    assert_close(got, expected, 1e-12)
    for a, b in zip(gradients(got, m, logvar, v), gradients(expected, m, logvar, v), strict=True):
        assert_close(a, b, 1e-11, absolute=1e-14)


def test_zero_prior_is_the_standard_normal(pair: tuple[Tensor, Tensor]) -> None:
    m, v = pair
    zero = torch.zeros((), dtype=torch.float64, device=m.device)
    assert_close(uf.gaussian_kl(m, v, zero, zero), uf.gaussian_kl(m, v), 1e-14)


def test_only_the_prior_is_trained(pair: tuple[Tensor, Tensor]) -> None:
    """The stop-gradient side gets None, not zeros."""
    m, v = (x.detach() for x in pair)
    pm, pv = (torch.randn(5, dtype=torch.float64, device=m.device, requires_grad=True) for _ in range(2))
    uf.gaussian_kl(m, v, pm, pv).backward()
    expected = gradients(kl(m, (v / 2).exp(), pm, (pv / 2).exp()).mean(), pm, pv)
    assert m.grad is None and v.grad is None
    assert_close(pm.grad, expected[0], 1e-12)
    assert_close(pv.grad, expected[1], 1e-12)


@pytest.mark.parametrize("event_ndims", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_event_dimensions_of_5d_latents(event_ndims: int, reduction: str, device: torch.device) -> None:
    """Video latents [B, C, T, H, W]: diffusers sums three dimensions and returns [B, W]; here rows are what is left."""
    m, v = (torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, device=device) for _ in range(2))
    rows = kl(m, (v / 2).exp(), event_ndims=event_ndims)
    assert rows.shape == m.shape[: 5 - event_ndims]
    expected = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    assert_close(uf.gaussian_kl(m, v, event_ndims=event_ndims, reduction=reduction), expected, 1e-12)
    weighted = uf.gaussian_kl(m, v, event_ndims=event_ndims, reduction=reduction, weights=torch.ones((), device=device))
    assert_close(weighted, expected, 1e-12)


def test_whole_tensor_as_one_event(pair: tuple[Tensor, Tensor]) -> None:
    m, v = pair
    for reduction in ("mean", "sum", "none"):
        got = uf.gaussian_kl(m, v, event_ndims=2, reduction=reduction)
        assert got.shape == ()
        assert_close(got, kl(m, (v / 2).exp()).sum(), 1e-12)


def test_mean_divides_by_rows_not_by_elements(pair: tuple[Tensor, Tensor]) -> None:
    """wiseodd/generative-models #13: a KL averaged over the latent dimensions as well is D times too small."""
    m, v = pair
    assert_close(uf.gaussian_kl(m, v), kl(m, (v / 2).exp(), event_ndims=0).mean() * 5, 1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1, -2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_scale(scale: float, reduction: str, pair: tuple[Tensor, Tensor]) -> None:
    m, v = pair
    plain, scaled = (uf.gaussian_kl(m, v, reduction=reduction, scale=s) for s in (1.0, scale))
    assert_close(scaled, plain * scale, 1e-14, 1e-300)
    for a, b in zip(gradients(scaled, m, v), gradients(plain, m, v), strict=True):
        assert_close(a, b * scale, 1e-13, 1e-300)


def test_empty(device: torch.device) -> None:
    """Nothing to average is NaN, nothing to add 0, and an event of nothing costs 0 or its free bits."""
    no_rows, no_event = torch.zeros(0, 5, device=device), torch.zeros(3, 0, device=device)
    assert uf.gaussian_kl(no_rows, no_rows).isnan()
    assert uf.gaussian_kl(no_rows, no_rows, reduction="sum") == 0
    assert uf.gaussian_kl(no_rows, no_rows, reduction="none").shape == (0,)
    assert torch.equal(uf.gaussian_kl(no_event, no_event, reduction="none"), torch.zeros(3, device=device))
    assert uf.gaussian_kl(no_event, no_event, free_bits=0.5) == 0.5
    assert uf.gaussian_kl(no_rows, no_rows, weights=torch.ones(0, device=device), normalize_weights=True) == 0


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", ["logvar", "logstd", "std"])
@pytest.mark.parametrize(("num_samples", "sample_dim"), [(None, 0), (1, 0), (3, 0), (3, 1), (3, 2), (3, -1), (0, 0)])
def test_reparameterisation(spread: str, num_samples: int | None, sample_dim: int, pair: tuple[Tensor, Tensor]) -> None:
    """z - mean is s · eps: dz/dmean is 1, dz/ds is eps, so both gradients follow from z itself."""
    m, v = pair
    raw = {"logvar": v, "logstd": v / 2, "std": (v / 2).exp()}[spread].detach().requires_grad_()
    z = uf.sample_gaussian(m, raw, num_samples=num_samples, sample_dim=sample_dim, spread=spread)
    shape = list(m.shape)
    if num_samples is not None:
        shape.insert(sample_dim % 3, num_samples)
    assert list(z.shape) == shape and z.is_contiguous() and z.dtype == m.dtype

    def over_samples(x: Tensor) -> Tensor:
        return x if num_samples is None else x.sum(sample_dim)

    def unsqueezed(x: Tensor) -> Tensor:
        return x if num_samples is None else x.unsqueeze(sample_dim)

    c = torch.randn_like(z)
    to_mean, to_spread = torch.autograd.grad(z, (m, raw), c)
    assert_close(to_mean, over_samples(c), 1e-12)
    deviation = (z - unsqueezed(m)).detach()
    factor = {"logvar": 0.5, "logstd": 1.0, "std": 1 / unsqueezed(raw.detach())}[spread]
    assert_close(to_spread, over_samples(c * deviation * factor), 1e-10, 1e-13)


def test_samples_of_one_tensor_for_both(pair: tuple[Tensor, Tensor]) -> None:
    """sample_gaussian_with_kl is sample_gaussian and gaussian_kl: same noise, same rows, gradients added."""
    m, v = pair
    for options in ({}, {"num_samples": 3, "sample_dim": 1}, {"clamp_logvar": (-0.5, 0.5)}):
        torch.manual_seed(4)
        z, rows = uf.sample_gaussian_with_kl(m, v, event_ndims=2, **options)
        torch.manual_seed(4)
        alone = uf.sample_gaussian(m, v, **options)
        kl_options = {k: x for k, x in options.items() if k == "clamp_logvar"}
        separate = uf.gaussian_kl(m, v, event_ndims=2, reduction="none", **kl_options)
        assert_same_bits(z, alone)
        assert_close(rows, separate, 1e-13)
        c = torch.randn_like(z)
        got = torch.autograd.grad((z * c).sum() + 0.3 * rows.sum(), (m, v))
        expected = torch.autograd.grad((alone * c).sum() + 0.3 * separate.sum(), (m, v))
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, 1e-12)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_samples(dtype: torch.dtype, device: torch.device) -> None:
    """z in the input's dtype, the KL in fp32, gradients in the input's dtype."""
    m, v = (torch.randn(4, 33, device=device).to(dtype).requires_grad_() for _ in range(2))
    z, rows = uf.sample_gaussian_with_kl(m, v)
    assert z.dtype == dtype and rows.dtype == torch.float32
    assert all(g.dtype == dtype for g in gradients(z.float().sum() + rows.sum(), m, v))


def test_broadcast_samples(device: torch.device) -> None:
    """One mean or one spread for all: every element of the result has its own noise."""
    m = torch.zeros(1, device=device, requires_grad=True)
    s = torch.ones(50, 3, device=device)
    z = uf.sample_gaussian(m, s, spread="std")
    assert z.shape == (50, 3) and z.unique().numel() == 150
    assert_close(torch.autograd.grad(z.sum(), m)[0], torch.tensor([150.0]), 1e-6)
    z = uf.sample_gaussian(m.expand(50, 3), s, spread="std", num_samples=4)
    assert z.unique().numel() == 600


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_errors_of_gaussian_kl(device: torch.device) -> None:
    m, v = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)

    def refused(error: type[Exception], match: str, *args: object, **options: object) -> None:
        assert_refused(lambda: uf.gaussian_kl(*(args or (m, v)), **options), error, match)

    refused(TypeError, "mean: expected a torch.Tensor, got int", 1, v)
    refused(TypeError, "logvar: expected a torch.Tensor, got NoneType", m, None)
    refused(TypeError, "logvar: expected a floating-point tensor, got torch.int64", m, v.long())
    refused(TypeError, "prior_mean: expected a torch.Tensor, got float", m, v, 0.0)
    refused(TypeError, "prior_logvar: expected a floating-point tensor, got torch.bool", m, v, None, v > 0)
    refused(ValueError, r"logvar: got shape \(3, 3\) beside mean \(3, 4\), expected size 4", m, v[:, :3])
    refused(ValueError, r"prior_mean: got shape \(2, 4\) beside mean \(3, 4\), expected size 3 or 1", m, v, m[:2])
    refused(ValueError, "logvar: got device meta, expected .* as mean", m, v.to("meta"))
    refused(ValueError, "prior_mean: got device meta", m, v, m.to("meta"))
    refused(ValueError, r"event_ndims: got 3, expected 0 to 2 for mean of shape \(3, 4\)", event_ndims=3)
    refused(ValueError, "event_ndims: got -1", event_ndims=-1)
    refused(TypeError, "event_ndims: expected an int, got str", event_ndims="1")
    refused(ValueError, "spread: got 'var', expected one of 'logvar', 'logstd', 'std'", spread="var")
    refused(ValueError, "reduction: got 'batchmean'", reduction="batchmean")
    refused(ValueError, "free_bits_mode: got 'batch', expected one of 'sum', 'per_dim'", free_bits_mode="batch")
    refused(ValueError, "free_bits: got -1, expected a number >= 0", free_bits=-1)
    refused(ValueError, r"free_bits: got a tensor of shape \(2,\), expected a number", free_bits=torch.ones(2))
    refused(TypeError, "scale: expected a number, got NoneType", scale=None)
    refused(ValueError, r"clamp_logvar: got \(1.0, -1.0\), expected \(low, high\)", clamp_logvar=(1.0, -1.0))
    refused(ValueError, "clamp_logvar: got", clamp_logvar=(math.nan, 1.0))
    refused(ValueError, "normalize_weights: got True without weights", normalize_weights=True)
    refused(TypeError, "weights: expected a torch.Tensor, got list", weights=[1.0, 1.0, 1.0])
    refused(ValueError, r"weights: got shape \(4,\), expected that of the rows, \(3,\)", weights=m[0])
    refused(ValueError, r"weights: got shape \(3, 3\)", weights=torch.ones(3, 3, device=device))
    refused(ValueError, "weights: got device meta, expected", weights=torch.ones(3, device="meta"))
    with pytest.raises(TypeError, match="positional"):
        uf.gaussian_kl(m, v, m, v, 1)


@pytest.mark.parametrize("function", [uf.sample_gaussian, uf.sample_gaussian_with_kl], ids=lambda f: f.__name__)
def test_errors_of_samples(function, device: torch.device) -> None:
    m, v = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    assert_refused(lambda: function(m, None), TypeError, "logvar: expected a torch.Tensor, got NoneType")
    assert_refused(lambda: function(m, v.int()), TypeError, "logvar: expected a floating-point tensor")
    assert_refused(lambda: function(m, v[:2]), ValueError, r"logvar: got shape \(2, 4\) beside mean \(3, 4\)")
    assert_refused(lambda: function(m, v, spread="sigma"), ValueError, "spread: got 'sigma'")
    assert_refused(
        lambda: function(m, v, num_samples=-1), ValueError, "num_samples: got -1, expected None or an int >= 0"
    )
    assert_refused(lambda: function(m, v, num_samples=2.0), ValueError, "num_samples: got 2.0")
    assert_refused(lambda: function(m, v, num_samples=True), ValueError, "num_samples: got True")
    assert_refused(lambda: function(m, v, num_samples=2, sample_dim=3), ValueError, "sample_dim: got 3")
    assert_refused(lambda: function(m, v, num_samples=2, sample_dim=-4), ValueError, "sample_dim: got -4")
    assert_refused(lambda: function(m, v, num_samples=2, sample_dim=None), TypeError, "sample_dim: expected an int")
    assert_refused(lambda: function(m, v, clamp_logvar=(2, 1)), ValueError, "clamp_logvar: got")
    assert_refused(lambda: function(m, v.to("meta")), ValueError, "logvar: got device meta")
    if function is uf.sample_gaussian_with_kl:
        assert_refused(lambda: function(m, v, event_ndims=3), ValueError, "event_ndims: got 3, expected 0 to 2")


# ---- by one sample ---------------------------------------------------------------------------------------------------


def vits_kl_loss(z_p: Tensor, logs_q: Tensor, m_p: Tensor, logs_p: Tensor, mask: Tensor) -> Tensor:
    """As VITS writes it."""
    kl = logs_p - logs_q - 0.5
    kl = kl + 0.5 * (z_p - m_p) ** 2 * torch.exp(-2.0 * logs_p)
    return torch.sum(kl * mask) / torch.sum(mask)


def of_vits(z_p: Tensor, logs_q: Tensor, m_p: Tensor, logs_p: Tensor, mask: Tensor) -> Tensor:
    z_p, logs_q, m_p, logs_p = (t.transpose(1, 2) for t in (z_p, logs_q, m_p, logs_p))
    options = {"spread": "logstd", "weights": mask.squeeze(1), "normalize_weights": True}
    return uf.gaussian_kl_monte_carlo(z_p, None, logs_q, m_p, logs_p, event_ndims=1, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("shape", [(2, 192, 50), (3, 5, 7), (1, 192, 1)], ids=str)
def test_vits_kl_loss(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Its number and its gradients: `[B, C, T]` transposed, a mask for weights."""
    inputs = [(torch.randn(shape, device=device) * 0.7 - 0.4).to(dtype).requires_grad_() for _ in range(4)]
    lengths = torch.arange(1, shape[0] + 1, device=device) * shape[2] // shape[0]
    mask = (torch.arange(shape[2], device=device) < lengths.clamp(min=1)[:, None]).to(dtype).unsqueeze(1)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    got, expected = of_vits(*inputs, mask), vits_kl_loss(*wide, mask.double())
    assert_close(got, expected, 1e-12 if dtype == torch.float64 else 1e-5)
    low = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    for a, b in zip(gradients(got, *inputs), gradients(expected, *wide), strict=True):
        assert_close(a, b, low)


def test_vits_in_half_precision_does_not_overflow(device: torch.device) -> None:
    """espnet/espnet#4236: e^{-2 logs_p} leaves the range of fp16 below logs_p = -5.5."""
    shape = (2, 4, 3)
    z, logs_q, m = (torch.randn(shape, device=device).half().requires_grad_() for _ in range(3))
    logs_p = torch.full(shape, -6.0, device=device, dtype=torch.float16, requires_grad=True)
    mask = torch.ones(2, 1, 3, device=device, dtype=torch.float16)
    assert not vits_kl_loss(z, logs_q, m, logs_p, mask).isfinite()
    got = of_vits(z, logs_q, m, logs_p, mask)
    assert_close(got, vits_kl_loss(*(t.double() for t in (z, logs_q, m, logs_p, mask))), 1e-5)


def test_monte_carlo_estimates_the_closed_form(device: torch.device) -> None:
    """Both estimators, over many samples; their difference is what the entropy's estimate has of noise."""
    torch.manual_seed(0)
    m, v, pm, pv = (torch.randn(6, dtype=torch.float64, device=device) * 0.5 for _ in range(4))
    z = m + (v / 2).exp() * torch.randn(200_000, 6, dtype=torch.float64, device=device)
    closed = uf.gaussian_kl(m, v, pm, pv)
    for mean in (m, None):
        rows = uf.gaussian_kl_monte_carlo(z, mean, v, pm, pv, reduction="none")
        assert abs(rows.mean() - closed) < 4 * rows.std() / len(z) ** 0.5
    same = uf.gaussian_kl_monte_carlo(z, m, v, m, v, reduction="none")
    assert same.abs().max() < 1e-12


def test_monte_carlo_gradient_of_the_sample(device: torch.device) -> None:
    """d/dz = (z - m_p) / s_p² - (z - m) / s²; without a mean, its first half."""
    z, m, v, pm, pv = (torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(5))
    prior, own = (z - pm) * (-pv).exp(), (z - m) * (-v).exp()
    for mean, expected in ((m, prior - own), (None, prior)):
        (got,) = gradients(uf.gaussian_kl_monte_carlo(z, mean, v, pm, pv, reduction="sum"), z)
        assert_close(got, expected, 1e-12)


# ---- Bernoulli -------------------------------------------------------------------------------------------------------


def bernoulli_exactly(a: float, b: float) -> tuple[mpmath.mpf, ...]:
    """(KL, its slopes in a and b) with 60 digits."""
    with mpmath.workdps(60):
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        p, q = 1 / (1 + mpmath.exp(-a)), 1 / (1 + mpmath.exp(-b))
        value = p * (a - b) + mpmath.log1p(mpmath.exp(b)) - mpmath.log1p(mpmath.exp(a))
        return value, p * (1 - p) * (a - b), q - p


@pytest.mark.parametrize("on_reference", [False, True])
@pytest.mark.parametrize("logvar", [-80.0, -90.0, -170.0, -300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", ["kl", "monte_carlo", "entropy"])
def test_certain_gaussians(
    function: str, dtype: torch.dtype, logvar: float, on_reference: bool, device: torch.device
) -> None:  # fmt: skip
    """e^-logvar is infinite in fp32: at the mean nothing comes of that, neither in the value nor in a gradient."""
    mean, far = torch.tensor([[1.5, -2.0], [1e-3, 0.0]], dtype=dtype, device=device), torch.full((2, 2), logvar)
    leaves = [t.clone().to(device, dtype).requires_grad_() for t in (mean, mean, far, mean, far + 0.5)]
    z, m, v, pm, pv = leaves
    with reference_path() if on_reference else nullcontext():
        if function == "kl":
            rows = uf.gaussian_kl(m, v, pm, pv, reduction="none")
        else:
            rows = uf.gaussian_kl_monte_carlo(z, m if function == "monte_carlo" else None, v, pm, pv, reduction="none")
        found = [rows.detach(), *torch.autograd.grad(rows.sum(), leaves, materialize_grads=True)]
    d = (v - pv).detach().double()
    value, of_v, of_pv = {
        "kl": (d.expm1() - d, d.expm1() / 2, -d.expm1() / 2),
        "monte_carlo": (-d, torch.full_like(d, -0.5), torch.full_like(d, 0.5)),
        "entropy": (-d - 1, torch.full_like(d, -0.5), torch.full_like(d, 0.5)),
    }[function]
    none = torch.zeros_like(d)
    for got, expected in zip(found, (value.sum(1) / 2, none, none, of_v, none, of_pv), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("on_reference", [False, True])
@pytest.mark.parametrize("function", ["kl", "monte_carlo", "log_prob", "sample"])
def test_nan_outside_the_clamp(function: str, on_reference: bool, device: torch.device) -> None:
    """A NaN stays one; as of torch.clamp there is no gradient in what the network gave."""
    m, v = torch.ones(1, 1, device=device), torch.full((1, 1), math.nan, device=device, requires_grad=True)
    options = {"clamp_logvar": (-30.0, 20.0)}
    with reference_path() if on_reference else nullcontext():
        value = {
            "kl": lambda: uf.gaussian_kl(m, v, **options),
            "monte_carlo": lambda: uf.gaussian_kl_monte_carlo(m, m, v, m, m, **options),
            "log_prob": lambda: uf.gaussian_log_prob(m, m, v, **options),
            "sample": lambda: uf.sample_gaussian(m, v, **options),
        }[function]()
        assert value.isnan().all() and gradients(value, v)[0] == 0


@pytest.mark.parametrize("on_reference", [False, True])
def test_bernoulli_kl_to_certainty(on_reference: bool, device: torch.device) -> None:
    points = [(0.0, INF), (0.0, -INF), (3.0, -INF), (-3.0, INF), (-INF, INF), (INF, INF), (-INF, -INF), (INF, 1.0)]
    points += [(1e4, -INF), (-1e4, INF)]  # certain though finite
    a, b = (t.clone().requires_grad_() for t in torch.tensor(points, device=device).unbind(1))
    with reference_path() if on_reference else nullcontext():
        rows = uf.bernoulli_kl(a, b, event_ndims=0, reduction="none")
        expected = [INF, INF, INF, INF, INF, 0, 0, F.softplus(torch.tensor(-1.0)), INF, INF]
        assert_close(rows, a.new_tensor(expected), 1e-6)
        by_q, by_p = gradients(rows, a, b)
    assert_close(by_p, b.sigmoid() - a.sigmoid(), 1e-6)
    assert not by_q[a.abs() > 100].any()


@pytest.mark.parametrize("on_reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bernoulli_kl_near_and_far(dtype: torch.dtype, on_reference: bool, device: torch.device) -> None:
    """Relative to each number, however small: near a = b, in the tails, on both sides."""
    logits = (-60.0, -8.0, -0.3, 0.0, 0.7, 3.0, 25.0)
    points = [(a, a + d) for a in logits for d in (0.0, 1e-6, -1e-3, 0.1, -0.9, 0.99, 1.01, -5.0, 40.0)]
    points = torch.tensor(points, dtype=dtype).tolist()
    a, b = (t.clone().requires_grad_() for t in torch.tensor(points, dtype=dtype, device=device).unbind(1))
    if on_reference:
        rows = reference.bernoulli_kl(a, b, None, 0, 1.0, "none")
    else:
        rows = uf.bernoulli_kl(a, b, event_ndims=0, reduction="none")
    found = torch.stack([rows.detach(), *gradients(rows, a, b)]).double().cpu()
    expected = torch.tensor([[float(n) for n in bernoulli_exactly(*p)] for p in points], dtype=torch.float64).T
    # PyTorch's operations round one by one
    limit = (1e-5 if on_reference or not any(NATIVE.values()) else 2e-6) if dtype == torch.float32 else 1e-12
    assert ((found - expected).abs() <= limit * expected.abs() + 1e-37).all()


def test_bernoulli_kl_to_one_half(device: torch.device) -> None:
    """log 2 minus the entropy: as with logits of 0; certainty costs log 2."""
    q = torch.tensor([[0.3, -2.0], [0.0, 1e-3]], dtype=torch.float64, device=device)
    assert_close(uf.bernoulli_kl(q, reduction="none"), uf.bernoulli_kl(q, torch.zeros_like(q), reduction="none"), 1e-15)
    certain = torch.tensor([[INF], [-INF], [200.0]], device=device)
    assert_close(uf.bernoulli_kl(certain, reduction="none"), torch.full((3,), math.log(2), device=device), 1e-6)


def test_errors_of_the_estimates(device: torch.device) -> None:
    z = torch.randn(3, 4, device=device)
    estimate = uf.gaussian_kl_monte_carlo
    assert_refused(lambda: estimate(z, z, z, None, z), TypeError, "prior_mean: expected a torch.Tensor, got NoneType")
    assert_refused(lambda: estimate(None, z, z, z, z), TypeError, "z: expected a torch.Tensor, got NoneType")
    assert_refused(lambda: estimate(z, None, z, z, z, spread="var"), ValueError, "spread: got 'var'")
    assert_refused(lambda: estimate(z, z, z, z, z, normalize_weights=True), ValueError, "got True without weights")
    assert_refused(
        lambda: estimate(z, z, z, z, z, weights=torch.ones(4, device=device)), ValueError, r"weights: got shape \(4,\)"
    )
    assert_refused(lambda: uf.bernoulli_kl(z, z, reduction="avg"), ValueError, "reduction: got 'avg'")
    assert_refused(lambda: uf.bernoulli_kl(z, z[:2]), ValueError, r"logits_p: got shape \(2, 4\) beside logits_q")
    assert_refused(lambda: uf.bernoulli_kl(z.long()), TypeError, "logits_q: expected a floating-point tensor")
