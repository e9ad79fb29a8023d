"""Categorical divergences and likelihoods, and the discretized logistic mixture: what is particular to them."""

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases.categorical import dreamer, kl, pixelcnn
from helpers import LOW_PRECISION, NATIVE, OPS, assert_close, assert_refused, assert_same_bits, recorded_ops
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import unigen_fast as uf

INF, NAN = math.inf, math.nan
UNIMIX = [0.0, 0.01, 1.0]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def pair(*shape: int, device: Any = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return leaf(2 * torch.randn(shape, dtype=dtype, device=device)), leaf(
        torch.randn(shape, dtype=dtype, device=device)
    )


def assert_same_values(got: Tensor, expected: Tensor) -> None:
    """Bits of kernels; without, a NaN brings the rows beside it another formula."""
    if any(NATIVE.values()):
        assert_same_bits(got, expected)
    else:
        assert_close(got, expected, 1e-6)


# ---- categorical_kl --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("event_ndims", [0, 1, 2])
def test_kl_with_classes_anywhere(class_dim: int, event_ndims: int, device: torch.device) -> None:
    q, p = pair(3, 4, 5, device=device)
    got = uf.categorical_kl(q, p, class_dim=class_dim, event_ndims=event_ndims, reduction="none")
    assert_close(got, kl(q, p, class_dim=class_dim, event_ndims=event_ndims), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_kl_near_the_prior_does_not_cancel(distance: float, dtype: torch.dtype, device: torch.device) -> None:
    """Of the order of distance²: a sum of q log(q/p) in fp32 has no digit left, and may be negative."""
    p = torch.randn(6, 9, dtype=dtype, device=device)
    q = leaf(p + distance * torch.randn(6, 9, dtype=dtype, device=device))
    got = uf.categorical_kl(q, p, reduction="none")
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    mpmath.mp.dps = 40
    for row in range(6):
        a, b = ([mpmath.mpf(float(v)) for v in t[row].detach()] for t in (q, p))
        log_q, log_p = ([x - mpmath.log(sum(mpmath.exp(y) for y in t)) for x in t] for t in (a, b))
        exact = sum(mpmath.exp(x) * (x - y) for x, y in zip(log_q, log_p, strict=True))
        assert abs(float(got[row].detach()) / float(exact) - 1) < tolerance
    assert_same_bits(uf.categorical_kl(p, p, reduction="none"), torch.zeros(6, dtype=dtype, device=device))


@pytest.mark.parametrize("offsets", [(1e4, 0.0), (0.0, -1e4), (1e4, 1e4), (-1e4, 1e5)], ids=str)
@pytest.mark.parametrize("prior", ["none", "other", "balanced"])
def test_offsets_of_the_logits_cost_no_digits(prior: str, offsets: tuple[float, float], device: torch.device) -> None:
    q, p = (torch.randn(50, 1, 8, device=device) * 2 + offset for offset in offsets)
    leaves = [(t.clone().requires_grad_(), t.double().requires_grad_()) for t in (q, p)][: 1 if prior == "none" else 2]
    found = []
    for given in zip(*leaves, strict=True):
        if prior == "balanced":
            loss = uf.balanced_categorical_kl(*given, free_nats=0.0).loss
        else:
            loss = uf.categorical_kl(*given, reduction="none")
        found.append((loss, *torch.autograd.grad(loss.sum(), given)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("unimix", UNIMIX)
def test_kl_of_one_class_is_zero(unimix: float, device: torch.device) -> None:
    q, p = pair(4, 1, device=device, dtype=torch.float32)
    got = uf.categorical_kl(q, p, unimix=unimix)
    assert got == 0
    for g in torch.autograd.grad(got, (q, p)):
        assert (g == 0).all()
    assert uf.categorical_kl(q, unimix=unimix) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_classes_ruled_out(unimix: float, dtype: torch.dtype, device: torch.device) -> None:
    """0 log 0 = 0, with finite gradients; what p rules out and q does not costs inf, unless some of it is mixed in."""
    q = torch.tensor([[0.3, -INF, 1.0, -INF], [0.3, 0.1, 1.0, -INF]], dtype=dtype, device=device).requires_grad_()
    p = torch.tensor([[0.5, 0.2, -0.3, -INF], [0.5, -INF, 0.3, 0.1]], dtype=dtype, device=device).requires_grad_()
    got = uf.categorical_kl(q, p, unimix=unimix, reduction="none")
    if unimix == 0:
        assert_close(got, kl_divergence(Categorical(logits=q), Categorical(logits=p)), 1e-6)
        assert got[1] == INF
    grads = torch.autograd.grad(got[0], (q, p))
    wide = [x.detach().double().softmax(-1) for x in (q, p)]
    mixed = [(1 - unimix) * x + unimix / 4 for x in wide]
    log_ratio = torch.where(mixed[0] == 0, 0.0, mixed[0].log() - mixed[1].log())
    assert_close(got[0], (mixed[0] * log_ratio).sum(-1)[0], 1e-6)
    by_q = (1 - unimix) * wide[0] * (log_ratio - (wide[0] * log_ratio).sum(-1, keepdim=True))
    assert_close(grads[0][0], by_q[0], 1e-5)
    ratio = mixed[0] / torch.where(mixed[1] == 0, 1.0, mixed[1])
    by_p = (1 - unimix) * wide[1] * ((wide[1] * ratio).sum(-1, keepdim=True) - ratio)
    assert_close(grads[1][0], by_p[0], 1e-5)
    uniform = uf.categorical_kl(q, reduction="none", unimix=unimix)
    (g,) = torch.autograd.grad(uniform.sum(), q)
    assert g.isfinite().all() and uniform.isfinite().all()


@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_nan_stays_in_its_row(unimix: float, device: torch.device) -> None:
    for position in (0, 1):
        tensors = list(pair(40, 7, device=device, dtype=torch.float32))
        clean = uf.categorical_kl(*tensors, unimix=unimix, reduction="none")
        expected = torch.autograd.grad(clean.sum(), tensors)
        with torch.no_grad():
            tensors[position][3, 2] = NAN
        got = uf.categorical_kl(*tensors, unimix=unimix, reduction="none")
        assert got.isnan().nonzero().tolist() == [[3]]
        others = torch.arange(40) != 3
        assert_same_values(got[others], clean[others])
        for g, e in zip(torch.autograd.grad(got.sum(), tensors), expected, strict=True):
            assert g[3].isnan().any()
            assert_same_values(g[others], e[others])


def test_large_logits(device: torch.device) -> None:
    """±1e4: exponentials overflow unless the maximum is taken off."""
    q = torch.tensor([[1e4, -1e4, 0.0]], device=device, requires_grad=True)
    p = torch.tensor([[-1e4, 1e4, 0.0]], device=device)
    got = uf.categorical_kl(q, p)
    assert_close(got, torch.tensor(2e4), 1e-6)
    (g,) = torch.autograd.grad(got, q)
    assert g.isfinite().all()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_is_computed_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    q, p = (x.to(dtype) for x in pair(16, 32, 32, device=device))
    got = uf.categorical_kl(q, p, event_ndims=1, reduction="none")
    assert got.dtype == torch.float32
    assert_close(got, kl(q.double(), p.double(), event_ndims=1), 1e-5)


def test_masked_mean(device: torch.device) -> None:
    q, p = pair(4, 6, 5, device=device)
    mask = torch.rand(4, 6, device=device).round()
    got = uf.categorical_kl(q, p, weights=mask, normalize_weights=True)
    assert_close(got, kl(q, p)[mask.bool()].mean(), 1e-12)
    assert uf.categorical_kl(q, p, weights=torch.zeros_like(mask), normalize_weights=True) == 0


# ---- balanced_categorical_kl -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unimix", [0.0, 0.01])
@pytest.mark.parametrize("mode", ["sum", "per_variable"])
def test_gradients_are_those_of_the_side_that_is_trained(mode: str, unimix: float, device: torch.device) -> None:
    """By the derivative of the KL in the prior alone, and in the posterior alone."""
    q, p = pair(4, 3, 5, 6, device=device)
    nats = 4.5 if mode == "sum" else 1.0
    got = uf.balanced_categorical_kl(q, p, free_nats=nats, free_nats_mode=mode, unimix=unimix)
    assert_same_bits(got.dynamics, got.representation)
    sites = kl(q, p, unimix=unimix)
    rows = sites.clamp(min=nats).sum(-1) if mode == "per_variable" else sites.sum(-1).clamp(min=nats)
    assert 0 < int((sites if mode == "per_variable" else sites.sum(-1)).lt(nats).sum()) < sites.numel()
    by_q, by_p = torch.autograd.grad(rows.mean(), (q, p))
    assert_close(got.dynamics, rows.mean(), 1e-12)
    assert_close(got.loss, 1.1 * rows.mean(), 1e-12)
    for output, factors in zip(got, ((0.1, 1.0), (0.0, 1.0), (1.0, 0.0)), strict=True):
        found = torch.autograd.grad(output, (q, p), retain_graph=True, allow_unused=True)
        for g, factor, expected in zip(found, factors, (by_q, by_p), strict=True):
            assert (g is None) == (factor == 0)
            if g is not None:
                assert (expected != 0).any()
                assert_close(g, factor * expected, 1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_stopped_sides_get_none(native: bool, create_graph: bool, monkeypatch: Any, device: torch.device) -> None:
    """Not zeros, which an optimiser with momentum or weight decay would act on."""
    if not native:
        monkeypatch.setattr(OPS["balanced_categorical_kl"], "native", None)
    for output, trained in (("dynamics", 1), ("representation", 0)):
        tensors = pair(2, 3, 4, device=device)
        getattr(uf.balanced_categorical_kl(*tensors, free_nats=0.0), output).backward(create_graph=create_graph)
        assert tensors[1 - trained].grad is None
        assert tensors[trained].grad is not None and (tensors[trained].grad != 0).any()
        for x in tensors:
            x.grad = None
    tensors = pair(2, 3, 4, device=device)
    uf.balanced_categorical_kl(*tensors).loss.backward()
    assert all(x.grad is not None for x in tensors)
    posterior, prior = pair(2, 3, 4, device=device)
    uf.balanced_categorical_kl(posterior.detach(), prior).loss.backward()
    assert prior.grad is not None


@pytest.mark.skipif(not any(NATIVE.values()), reason="there is no op of its own for backward")
def test_only_what_is_needed_is_computed(device: torch.device) -> None:
    tensors = pair(2, 3, 4, device=device)
    with recorded_ops() as calls:
        uf.balanced_categorical_kl(*tensors).dynamics.backward()
    name, overload, args = calls[-1]
    assert name == "balanced_categorical_kl_backward"
    with torch.no_grad():
        assert [g.numel() for g in overload(*args)] == [0, 24]


def test_free_nats_cost_nothing_below(device: torch.device) -> None:
    q = leaf(torch.randn(4, 5, 6, device=device))
    p = leaf(q.detach() + 1e-3)
    for mode, expected in (("sum", 1.0), ("per_variable", 5.0)):
        got = uf.balanced_categorical_kl(q, p, free_nats_mode=mode)
        assert got.dynamics == expected
        for g in torch.autograd.grad(got.loss, (q, p)):
            assert (g == 0).all()


def test_dreamer_as_written_out(device: torch.device) -> None:
    """[B, T, 32, 32], fp32: value and both gradients to fp32's rounding of the float64 formula."""
    tensors = pair(4, 8, 32, 32, device=device, dtype=torch.float32)
    got = uf.balanced_categorical_kl(*tensors, unimix=0.01)
    wide = [leaf(x.double()) for x in tensors]
    expected = dreamer(*wide, unimix=0.01)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-6)
    grads = zip(torch.autograd.grad(got.loss, tensors), torch.autograd.grad(expected[0], wide), strict=True)
    for a, b in grads:
        assert_close(a, b, 1e-5)


def test_discrete_world_model_with_a_mixed_batch_of_nothing(device: torch.device) -> None:
    got = uf.balanced_categorical_kl(*pair(0, 3, 4, device=device))
    assert all(x.isnan() for x in got)


# ---- categorical_log_prob --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW_PRECISION], ids=str)
def test_cross_entropy(dtype: torch.dtype, device: torch.device) -> None:
    """Classes second, as F.cross_entropy takes images."""
    logits = torch.randn(2, 7, 4, 5, dtype=torch.float64, device=device).to(dtype).requires_grad_()
    x = torch.randint(0, 7, (2, 4, 5), device=device)
    got = uf.categorical_log_prob(logits, x, class_dim=1, event_ndims=2)
    wide = leaf(logits.double())
    expected = -F.cross_entropy(wide, x, reduction="none").sum((1, 2))
    relative = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close(got, expected, relative)
    (g,), (e,) = torch.autograd.grad(got.sum(), logits), torch.autograd.grad(expected.sum(), wide)
    assert_close(g, e, torch.finfo(dtype).eps if dtype in LOW_PRECISION else 10 * relative)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_integers_of_any_dtype(dtype: torch.dtype, device: torch.device) -> None:
    logits, x = torch.randn(6, 4, device=device), torch.tensor([0, 3, 1, 2, 3, 0], device=device)
    assert_same_bits(uf.categorical_log_prob(logits, x.to(dtype)), uf.categorical_log_prob(logits, x))


def test_sure_of_its_class(device: torch.device) -> None:
    """log p = -1e-9 in fp32, and a gradient of 1e-9: 1 - p would be 0."""
    logits = torch.tensor([[20.7, 0.0], [0.0, 20.7]], device=device, requires_grad=True)
    got = uf.categorical_log_prob(logits, torch.tensor([0, 1], device=device))
    exact = math.log1p(math.exp(-float(logits[0, 0].detach())))
    if NATIVE["cpu"] or NATIVE["cuda"] or NATIVE["triton"]:
        assert_close(got, torch.full((2,), -exact), 1e-6)
        (g,) = torch.autograd.grad(got.sum(), logits)
        assert_close(g.diagonal(), torch.full((2,), -math.expm1(-exact)), 1e-6)


def test_classes_that_do_not_exist(device: torch.device) -> None:
    """NaN in their row alone: an error would need the host to wait. No memory beside the logits is read."""
    logits = torch.randn(40, 3, 5, device=device, requires_grad=True)
    x = torch.randint(0, 5, (40, 3), device=device)
    clean = uf.categorical_log_prob(logits, x, event_ndims=1)
    for wrong in (-1, 5, 2**40, -(2**62)):
        bad = x.clone()
        bad[7, 1] = wrong
        got = uf.categorical_log_prob(logits, bad, event_ndims=1)
        assert got.isnan().nonzero().tolist() == [[7]]
        assert_same_values(got[8:], clean[8:].detach())
        (g,) = torch.autograd.grad(got.sum(), logits)
        assert g[7, 1].isnan().all() and g[8:].isfinite().all() and g[7, 0].isfinite().all()


def test_data_for_several_samples(device: torch.device) -> None:
    """[B, D] data against [B, K, D, C] logits: neither is repeated."""
    logits = torch.randn(3, 4, 5, 6, dtype=torch.float64, device=device)
    x = torch.randint(0, 6, (3, 1, 5), device=device)
    got = uf.categorical_log_prob(logits, x, event_ndims=1)
    assert_close(got, Categorical(logits=logits).log_prob(x.expand(3, 4, 5)).sum(-1), 1e-13)
    more = uf.categorical_log_prob(logits[None, :, 0], torch.stack([x[:, 0]] * 2), event_ndims=1)
    assert more.shape == (2, 3)
    assert_close(more[1], got[:, 0], 1e-13)


# ---- the discretized logistic mixture --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_pixelcnn(channels: int, device: torch.device) -> None:
    params = torch.randn(2, 3, 4, 10 * (10 if channels == 3 else 3), dtype=torch.float64, device=device)
    params, x = leaf(params), torch.randint(0, 256, (2, 3, 4, channels), device=device) / 127.5 - 1
    x[0, 0, 0], x[1, 2, 3] = -1, 1
    x = leaf(x.double())
    got, expected = uf.discretized_logistic_mixture_log_prob(params, x), pixelcnn(params, x, 3)
    assert_close(got, expected, 1e-12)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (params, x)), torch.autograd.grad(expected.sum(), (params, x)), strict=True
    ):
        assert (b != 0).any()
        assert_close(a, b, 1e-10)


@pytest.mark.parametrize("log_scale", [-9.0, -4.0, 0.0, 3.0])
def test_masses_of_all_values_add_up_to_one(log_scale: float, device: torch.device) -> None:
    """The bins of 256 grey values cover the line: no bin too wide, none missing at the edges."""
    x = (torch.arange(256, dtype=torch.float64, device=device) / 127.5 - 1).unsqueeze(-1)
    params = torch.tensor([0.3, -0.7, -0.2, 0.6, log_scale, log_scale + 0.5], dtype=torch.float64, device=device)
    mass = uf.discretized_logistic_mixture_log_prob(params.expand(256, 6), x, event_ndims=1).exp()
    assert_close(mass.sum(), torch.tensor(1.0), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_far_tails_are_exact(dtype: torch.dtype, device: torch.device) -> None:
    """A mass of e^-50 and less: a difference of two sigmoids of 1 is 0 in fp32, and its gradient NaN or none."""
    mpmath.mp.dps = 60
    x = torch.tensor([[-0.6], [0.6], [1.0], [-1.0], [0.2]], dtype=dtype, device=device)
    mean = torch.tensor([0.9, -0.9, -0.9, 0.9, 0.2], dtype=dtype, device=device)
    scales = torch.tensor([-3.5, -3.5, -3.0, -3.0, -6.5], dtype=dtype, device=device)
    params = torch.stack([torch.zeros_like(mean), mean, scales], -1).requires_grad_()
    got = uf.discretized_logistic_mixture_log_prob(params, x, event_ndims=1)
    (g,) = torch.autograd.grad(got.sum(), params)
    for i in range(5):
        v, m, s = (mpmath.mpf(float(t)) for t in (x[i, 0], mean[i], scales[i]))

        def log_mass(m: Any, s: Any, v: Any = v) -> Any:
            upper = 1 / (1 + mpmath.exp(-(v - m + mpmath.mpf(1) / 255) / mpmath.exp(s)))
            lower = 1 / (1 + mpmath.exp(-(v - m - mpmath.mpf(1) / 255) / mpmath.exp(s)))
            return mpmath.log(upper if v < -0.999 else 1 - lower if v > 0.999 else upper - lower)

        exact = [log_mass(m, s), mpmath.diff(log_mass, (m, s), (1, 0)), mpmath.diff(log_mass, (m, s), (0, 1))]
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        for a, e in zip((got[i], g[i, 1], g[i, 2]), exact, strict=True):
            assert abs(float(a.detach()) - float(e)) <= tolerance * max(abs(float(e)), 1)


def test_log_scales_are_clamped(device: torch.device) -> None:
    x = torch.zeros(1, 1, dtype=torch.float64, device=device)
    below, at = ([0.0, 0.001, s] for s in (-7.5, -7.0))
    params = torch.tensor([below, at], dtype=torch.float64, device=device, requires_grad=True)
    got = uf.discretized_logistic_mixture_log_prob(params, x.expand(2, 1), event_ndims=1)
    assert got[0] == got[1]
    (g,) = torch.autograd.grad(got.sum(), params)
    assert g[0, 2] == 0 and g[1, 2] != 0 and g[0, 1] == g[1, 1] != 0


@pytest.mark.parametrize("log_scale", [5.0, 20.0, 60.0])
def test_wide_scales(log_scale: float, device: torch.device) -> None:
    """A bin much narrower than the scale: log of its width over 4 s, in fp32 too."""
    params = torch.tensor([[0.0, 0.5, log_scale]], device=device, requires_grad=True)
    got = uf.discretized_logistic_mixture_log_prob(params, torch.zeros(1, 1, device=device), event_ndims=1)
    if log_scale > 10:
        assert_close(got, torch.tensor([math.log(2 / 255 / 4) - log_scale]), 1e-6)
    (g,) = torch.autograd.grad(got.sum(), params)
    assert g.isfinite().all()
    assert abs(float(g[0, 2]) + 1) < 1e-2


def test_a_site_that_no_component_explains(device: torch.device) -> None:
    """Components of log-mass -inf: an impossible site has -inf and no gradient, and the others are as without it."""
    params = torch.randn(2, 6, device=device)
    params[0, :2], params[0, 2:4] = torch.tensor([0.3, -1.0]), math.inf  # means
    params.requires_grad_()
    x = torch.zeros(2, 1, device=device)
    found = uf.discretized_logistic_mixture_log_prob(params, x, event_ndims=1)
    (gradient,) = torch.autograd.grad(found.sum(), params)
    assert found[0] == -math.inf and (gradient[0] == 0).all()
    alone = params.detach()[1:].requires_grad_()
    expected = uf.discretized_logistic_mixture_log_prob(alone, x[1:], event_ndims=1)
    assert_close(found[1:], expected, 1e-6)
    assert_close(gradient[1:], torch.autograd.grad(expected.sum(), alone)[0], 1e-6)


def test_means_depend_on_the_channels_before(device: torch.device) -> None:
    """Sampled means m_1 + c_0 x_0 and m_2 + c_1 x_0 + c_2 x_1, by NumPy, channel by channel."""
    rng = np.random.default_rng(0)
    params, x = rng.normal(size=10), np.array([0.4, -0.2, 0.6])
    c = np.tanh(params[[3, 6, 9]])
    means = [params[1], params[4] + c[0] * x[0], params[7] + c[1] * x[0] + c[2] * x[1]]
    total = 0.0
    for channel in range(3):
        scale = math.exp(max(params[2 + 3 * channel], -7))
        upper, lower = ((x[channel] - means[channel] + h) / scale for h in (1 / 255, -1 / 255))
        total += math.log(1 / (1 + math.exp(-upper)) - 1 / (1 + math.exp(-lower)))
    got = uf.discretized_logistic_mixture_log_prob(torch.tensor(params), torch.tensor(x), event_ndims=1)
    assert abs(float(got) - total) < 1e-10


# ---- errors ----------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4)
I = torch.zeros(2, 3, dtype=torch.int64)  # noqa: E741
ERRORS = [
    (lambda: uf.categorical_kl(X.long()), TypeError, "logits_q: expected a floating-point tensor, got torch.int64"),
    (lambda: uf.categorical_kl(X, X[0, 0, :3]), ValueError, r"logits_p: got shape \(3,\) .* and 4 classes"),
    (
        lambda: uf.categorical_kl(X, class_dim=3),
        ValueError,
        "class_dim: got 3, expected a dimension of a tensor of sha",
    ),
    (
        lambda: uf.categorical_kl(X, event_ndims=3),
        ValueError,
        "event_ndims: got 3, expected 0 to 2 for logits_q of sha",
    ),
    (lambda: uf.categorical_kl(X.sum()), ValueError, r"logits_q: got shape \(\), expected a dimension of classes"),
    (lambda: uf.categorical_kl(X, unimix=1.5), ValueError, "unimix: got 1.5, expected a share of probability, 0 to 1"),
    (lambda: uf.categorical_kl(X, unimix=-0.1), ValueError, "unimix: got -0.1, expected a number >= 0"),
    (lambda: uf.categorical_kl(X, reduction="avg"), ValueError, "reduction: got 'avg'"),
    (lambda: uf.categorical_kl(X, normalize_weights=True), ValueError, "normalize_weights: got True without weights"),
    (
        lambda: uf.categorical_kl(X, weights=X),
        ValueError,
        r"weights: got shape \(2, 3, 4\), expected that of the rows",
    ),
    (lambda: uf.balanced_categorical_kl(X, X, free_nats=-1.0), ValueError, "free_nats: got -1.0"),
    (lambda: uf.balanced_categorical_kl(X, X, free_nats_mode="row"), ValueError, "free_nats_mode: got 'row', expected"),
    (lambda: uf.balanced_categorical_kl(X, X, event_ndims=3), ValueError, "event_ndims: got 3, expected 0 to 2"),
    (lambda: uf.categorical_log_prob(X, X[..., 0]), TypeError, "x: expected integer classes, got torch.float32"),
    (lambda: uf.categorical_log_prob(X, I.bool()), TypeError, "x: expected integer classes, got torch.bool"),
    (lambda: uf.categorical_log_prob(X, I.T), ValueError, r"x: got shape \(3, 2\) beside logits \(2, 3, 4\) without"),
    (lambda: uf.categorical_log_prob(X, 1), TypeError, "x: expected a torch.Tensor, got int"),
    (
        lambda: uf.discretized_logistic_mixture_log_prob(X, X),
        ValueError,
        "expected 1 or 3 channels in the last dimensi",
    ),
    (
        lambda: uf.discretized_logistic_mixture_log_prob(X, X[..., :3]),
        ValueError,
        r"params: got shape \(2, 3, 4\), expected a multiple of 10",
    ),
    (
        lambda: uf.discretized_logistic_mixture_log_prob(X[..., :3], X[0, :, :1].expand(2, 2, 3, 1)[:, :, :2]),
        ValueError,
        r"params: got shape \(2, 3\) beside x \(2, 2, 2\)",
    ),
    (
        lambda: uf.discretized_logistic_mixture_log_prob(X[..., :3], X[..., :1], event_ndims=0),
        ValueError,
        "event_ndims: got 0, expected at least 1",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS, ids=[match[:40] for *_, match in ERRORS])
def test_errors(call: Any, error: type[Exception], match: str) -> None:
    assert_refused(call, error, match)
