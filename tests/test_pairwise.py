"""Divergences over pairs: what is particular to them. Everything general is in test_fused.py."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import pairwise as oracle
from helpers import NATIVE, assert_close, assert_refused, assert_same_bits, cotangents_like, pull_back, upcast
from torch import Tensor

import unigen_fast as uf
from unigen_fast.reference import pairwise as reference

ESTIMATORS = ("mss", "mws", "mss_columns")


def posterior(rows: int, cols: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """z, mean and logvar as an encoder gives them: each z drawn from its own posterior."""
    generator = torch.Generator().manual_seed(seed)
    mean, logvar, noise = torch.randn(3, rows, cols, dtype=torch.float64, generator=generator)
    z = mean + (logvar / 2).exp() * noise
    return [x.to(dtype).requires_grad_() for x in (z, mean, logvar)]


def check_total_correlation(tensors: list[Tensor], size: int, estimator: str, relative: float, absolute: float) -> None:
    """All six rows, each with a random gradient, against the definition in float64."""
    got = uf.total_correlation(*tensors, dataset_size=size, estimator=estimator)
    wide = upcast(tensors)
    expected = oracle.total_correlation(*wide, size, estimator)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        assert_close(a, b, relative, absolute, what=name)
    cotangents = cotangents_like(got)
    gradients = pull_back(got, tensors, cotangents)
    expected_gradients = pull_back(expected, wide, [c.double() for c in cotangents if c is not None])
    for name, a, b in zip(("z", "mean", "logvar"), gradients, expected_gradients, strict=True):
        assert_close(a, b, 2 * relative, absolute, what=f"gradient of {name}")


# ---- total correlation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_the_definition(estimator: str) -> None:
    check_total_correlation(posterior(256, 10), 5000, estimator, 1e-10, 1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 257])
@pytest.mark.parametrize("cols", [1, 4])
def test_sizes_of_the_minibatch(rows: int, cols: int, estimator: str) -> None:
    """Around the blocks of rows, vectors and stretches of the kernels."""
    check_total_correlation(posterior(rows, cols), 70, estimator, 1e-10, 1e-11)
    check_total_correlation(posterior(rows, cols, torch.float32), 70, estimator, 1e-5, 3e-6)


@pytest.mark.parametrize("which", range(6))
def test_each_row_has_its_own_gradient(which: int) -> None:
    tensors = posterior(13, 3)
    wide = upcast(tensors)
    got = uf.total_correlation(*tensors, dataset_size=50)[which]
    expected = oracle.total_correlation(*wide, 50)[which]
    options = {"allow_unused": True, "materialize_grads": True}
    for a, b in zip(
        torch.autograd.grad(got.sum(), tensors, **options),
        torch.autograd.grad(expected.sum(), wide, **options),
        strict=True,
    ):
        assert_close(a, b, 1e-10, 1e-12)
        assert which == 5 or b.abs().max() > 1e-3  # the reference's gradient is there


def test_weights_of_every_row_sum_to_1() -> None:
    """rtqichen/beta-tcvae#1: column 0 filled in place of the diagonal, row B - 2 sums to 1.18 for B = 6, N = 100.

    Where all examples have one posterior, q(z) is that posterior.
    """
    z = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(6, 4)
    mean, logvar = torch.full_like(z, 0.3), torch.full_like(z, -0.4)
    found = uf.total_correlation(z, mean, logvar, dataset_size=100)
    assert_close(found.log_qz, found.log_qzx, 1e-13)
    assert_close(found.log_prod_qzi, found.log_qzx, 1e-13)
    most, diagonal, following = reference.pair_weights(6, 100, "mss")
    assert math.isclose(diagonal + following + 4 * most, 1)


def test_stratified_weight_of_each_pair() -> None:
    """Posteriors so far apart that one pair alone counts: the weight is that of (i, i), of (i, i + 1), or 1/M."""
    rows, size = 6, 100
    mean = 1000 * torch.arange(rows, dtype=torch.float64)[:, None].expand(rows, 2)
    logvar = torch.zeros_like(mean)
    density = -math.log(2 * math.pi)
    for step, weight in ((0, 1 / size), (1, (size - 5) / (size * 5)), (2, 1 / 5), (5, 1 / 5)):
        z = mean.roll(-step, 0)
        log_qz = uf.total_correlation(z, mean, logvar, dataset_size=size).log_qz
        assert_close(log_qz, torch.full_like(log_qz, density + math.log(weight)), 1e-12)


def test_weights_count_once_and_not_for_each_dimension() -> None:
    """YannDubs/disentangling-vae adds log W before the sum over the latent, D times over."""
    _, mean, logvar = posterior(5, 7)
    far = mean.detach() + 1000 * torch.arange(5, dtype=torch.float64)[:, None]
    found = uf.total_correlation(far, far, logvar.detach(), dataset_size=400)
    assert_close(found.mutual_information, torch.full((5,), math.log(400), dtype=torch.float64), 1e-10)
    assert_close(found.total_correlation, torch.full((5,), 6 * math.log(400), dtype=torch.float64), 1e-10)


def test_weighted_sampling_divides_by_batch_and_data_set() -> None:
    """YannDubs/disentangling-vae#60: log(B N) left out."""
    z = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
    zeros = torch.zeros_like(z)
    found = uf.total_correlation(z, zeros, zeros, dataset_size=300, estimator="mws")
    assert_close(found.log_qz, found.log_qzx - math.log(300), 1e-13)
    assert_close(found.log_prod_qzi, found.log_qzx - 3 * math.log(300), 1e-13)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_data_set_smaller_than_the_batch(size: int, estimator: str) -> None:
    """A negative weight would have no logarithm."""
    tensors = posterior(9, 3)
    small, least = (uf.total_correlation(*tensors, dataset_size=n, estimator=estimator) for n in (size, 9))
    for a, b in zip(small, least, strict=True):
        assert_same_bits(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_dimensions(estimator: str) -> None:
    tensors = [torch.empty(6, 0, requires_grad=True) for _ in range(3)]
    found = uf.total_correlation(*tensors, dataset_size=100, estimator=estimator)
    log_qz = oracle.weight_matrix(6, 100, estimator).sum(1).log().float()
    assert_close(found.log_qz, log_qz, 1e-6, 1e-6)
    assert_same_bits(found.log_prod_qzi, torch.zeros(6))
    assert all(g.shape == (6, 0) for g in torch.autograd.grad(sum(x.sum() for x in found), tensors))


def test_one_example() -> None:
    tensors = posterior(1, 4, torch.float32)
    found = uf.total_correlation(*tensors, dataset_size=10)
    assert found.mutual_information.item() == 0
    assert_close(found.total_correlation, torch.zeros(1), 0, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_nan_from_sharp_and_wide_posteriors(dtype: torch.dtype) -> None:
    """AntixK/PyTorch-VAE#16: NaN in log_q_z and log_prod_q_z."""
    torch.manual_seed(0)
    mean = 3 * torch.randn(40, 6)
    logvar = torch.linspace(-60, 20, 240)[torch.randperm(240)].reshape(40, 6)
    z = mean + (logvar / 2).exp() * torch.randn(40, 6)
    tensors = [x.to(dtype).requires_grad_() for x in (z, mean, logvar)]
    for estimator in ESTIMATORS:
        found = uf.total_correlation(*tensors, dataset_size=50000, estimator=estimator)
        assert all(x.isfinite().all() for x in found)
        wide = [x.detach().float().requires_grad_() for x in tensors]
        found = uf.total_correlation(*wide, dataset_size=50000, estimator=estimator)
        gradients = torch.autograd.grad(sum(x.mean() for x in found), wide)
        assert all(g.isfinite().all() for g in gradients)


def test_latents_far_from_every_posterior() -> None:
    """Densities that underflow by themselves; their logarithms do not."""
    z, mean, logvar = posterior(20, 3, torch.float32)
    away = (z.detach() + torch.linspace(-20, 20, 20)[:, None]).requires_grad_()
    narrow = (logvar.detach() / 4).requires_grad_()
    check_total_correlation([away, mean, narrow], 1000, "mss", 1e-5, 1e-5)
    far = (1000 * away.detach()).requires_grad_()
    check_total_correlation([far, mean, logvar], 1000, "mss", 1e-5, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("narrow", [-40.0, -45.0, -50.0, -55.0])
def test_latents_beyond_the_last_bit_of_a_joint_density(narrow: float, dtype: torch.dtype) -> None:
    """1e9 to 1e12 standard deviations away, where the joint densities' logarithms have last bits of 1e2 to 1e8."""
    z, mean, logvar = posterior(20, 3, dtype)
    tensors = [z, (mean.detach() - 9).requires_grad_(), (logvar.detach() / 4 + narrow).requires_grad_()]
    check_total_correlation(tensors, 1000, "mss", 1e-5, 1e-5)


def test_posteriors_of_certain_examples() -> None:
    """1e5 standard deviations away, and a deviation below fp32's range: no weight, and no NaN of 0 times infinity."""
    z, mean, _ = posterior(20, 3, torch.float32)
    narrow = torch.full_like(mean, -20.0).requires_grad_()
    check_total_correlation([z, (mean.detach() + 20).requires_grad_(), narrow], 1000, "mss", 1e-5, 1e-5)
    certain = torch.ones(2, 3)
    certain[0, 1] = -200
    lost = torch.ones(2, 3)
    lost[1, 1] = 200
    tensors = [x.requires_grad_() for x in (lost, torch.ones(2, 3), certain)]
    found = uf.total_correlation(*tensors, dataset_size=10)
    gradients = torch.autograd.grad((found.log_qz + found.log_prod_qzi).sum(), tensors)
    wide = upcast(tensors)
    expected = oracle.total_correlation(*wide, 10)
    for got, want in zip(gradients, torch.autograd.grad((expected[0] + expected[1]).sum(), wide), strict=True):
        assert_close(got, want, 1e-5)


def test_latents_without_any_density() -> None:
    z, mean, logvar = posterior(20, 3, torch.float32)
    lost = z.detach().clone()
    lost[4] = 1e30
    lost.requires_grad_()
    found = uf.total_correlation(lost, mean, logvar, dataset_size=1000)
    assert found.log_qz[4] == -math.inf and found.log_prod_qzi[4] == -math.inf
    others = torch.arange(20) != 4
    assert found.log_qz[others].isfinite().all()
    gradients = torch.autograd.grad((found.log_qz + found.log_prod_qzi)[others].sum(), [lost, mean, logvar])
    assert all(g.isfinite().all() for g in gradients)


def test_nan_stays_in_its_row() -> None:
    z, mean, logvar = (x.detach() for x in posterior(20, 3, torch.float32))
    z[7, 1] = math.nan
    for rows in uf.total_correlation(z, mean, logvar, dataset_size=1000):
        assert rows[7].isnan() and rows.isnan().sum() == 1


def test_long_latents_in_single_precision() -> None:
    """Sums over thousands of dimensions lie in the tens of thousands; their differences are small."""
    check_total_correlation(posterior(12, 5000, torch.float32), 1000, "mss", 1e-5, 1e-5)


@pytest.mark.skipif(not NATIVE["cpu"], reason="without kernels it is PyTorch that cuts the sums, by its thread count")
def test_same_bits_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    tensors = posterior(300, 20, torch.float32)
    x, y = tensors[0], tensors[1]
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = (*uf.total_correlation(*tensors, dataset_size=1000), uf.mmd(x, y))
            results.append([*found, *torch.autograd.grad(sum(v.sum() for v in found), tensors)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


MEMORY = """
import re, torch, unigen_fast as uf
from pathlib import Path

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def step(rows, cols):
    z, mean, logvar = (x.requires_grad_() for x in torch.randn(3, rows, cols))
    found = uf.total_correlation(z, mean, logvar, dataset_size=50000)
    (found.mutual_information + 6 * found.total_correlation + found.dimension_wise_kl).mean().backward()

step(256, 64)  # in several blocks, where there are blocks: what they need is loaded
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before = status("VmRSS")
step(ROWS, COLS)
print((status("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
def test_memory_is_not_of_pairs() -> None:
    """A `[B, B, D]` would be 2 GiB in the first case, 256 MiB in the second; a `[B, B]` of the first 64 MiB."""
    rows, cols, most = (4096, 32, 50) if NATIVE["cpu"] else (1024, 64, 128)
    code = MEMORY.replace("ROWS", str(rows)).replace("COLS", str(cols))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, and does not count
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    if "PermissionError" in run.stderr:
        pytest.skip("the high-water mark cannot be reset here")
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < most


def test_reference_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows, checkpointed where autograd records: value, gradient and second derivative."""

    def run(limit: int) -> list[Tensor]:
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", limit)
        tensors = posterior(11, 3)
        found = reference.total_correlation(*tensors, 40, "mss")[:6]
        discrepancy, made = reference.mmd(tensors[0], tensors[1], "imq", [0.5, 2.0], True, 3)
        of_both = torch.autograd.grad(discrepancy, tensors[:2], retain_graph=True)
        assert_close(made, torch.cat(of_both), 1e-12, 1e-15)
        firsts = torch.autograd.grad(sum(x.square().sum() for x in found) + discrepancy, tensors, create_graph=True)
        seconds = torch.autograd.grad(sum(g.square().sum() for g in firsts), tensors)
        return [*found, discrepancy, *firsts, *seconds]

    for a, b in zip(run(70), run(2**20), strict=True):
        assert_close(a, b, 1e-11, 1e-13)


def test_errors_of_total_correlation() -> None:
    z, mean, logvar = (x.detach() for x in posterior(4, 3))

    def call(z: Tensor = z, mean: Tensor = mean, logvar: Tensor = logvar, **options):
        return lambda: uf.total_correlation(z, mean, logvar, **{"dataset_size": 10, **options})

    assert_refused(
        call(estimator="MSS"), ValueError, "estimator: got 'MSS', expected one of 'mss', 'mws', 'mss_columns'"
    )
    assert_refused(call(dataset_size=0), ValueError, "dataset_size: got 0, expected an int >= 1")
    assert_refused(call(dataset_size=10.0), TypeError, "dataset_size: expected an int, got float")
    assert_refused(call(dataset_size=True), TypeError, "dataset_size: expected an int, got bool")
    assert_refused(call(z.long()), TypeError, "z: expected a floating-point tensor, got torch.int64")
    assert_refused(call(mean=mean[:3]), ValueError, r"mean: got shape \(3, 3\) beside z \(4, 3\), expected size 4")
    assert_refused(call(*(x[0] for x in (z, mean, logvar))), ValueError, r"got shape \(3,\), expected \[B, D\]")


# ---- maximum mean discrepancy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 8), (9, 17), (16, 15), (65, 33), (270, 40), (7, 1040)])
@pytest.mark.parametrize(("kernel", "unbiased"), [("imq", True), ("rbf", False)])
def test_numbers_of_points(n: int, m: int, kernel: str, unbiased: bool) -> None:
    torch.manual_seed(n)
    for dtype, relative in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        x, y = torch.randn(n, 3, dtype=dtype).requires_grad_(), (torch.randn(m, 3, dtype=dtype) + 1).requires_grad_()
        got = uf.mmd(x, y, kernel=kernel, unbiased=unbiased)
        wide = upcast([x, y])
        expected = oracle.mmd(*wide, kernel, oracle.SCALES, unbiased)
        assert_close(got, expected, relative, relative)
        for a, b in zip(torch.autograd.grad(got, [x, y]), torch.autograd.grad(expected, wide), strict=True):
            assert_close(a, b, relative)


def test_biased_discrepancy_of_a_set_and_itself_is_0() -> None:
    x = torch.randn(20, 3, dtype=torch.float64)
    assert abs(uf.mmd(x, x, unbiased=False).item()) < 1e-13


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_points_far_from_the_origin(kernel: str) -> None:
    """|a|² + |b|² - 2ab would lose all digits."""
    torch.manual_seed(0)
    x = torch.randint(-512, 512, (30, 4)) / 256 + 8192.0
    y = torch.randint(-512, 512, (20, 4)) / 256 + 8193.0
    tensors = [x.requires_grad_(), y.requires_grad_()]
    wide = upcast(tensors)
    got, expected = uf.mmd(*tensors, kernel=kernel), oracle.mmd(*wide, kernel, oracle.SCALES, True)
    assert_close(got, expected, 1e-5)
    for a, b in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(expected, wide), strict=True):
        assert_close(a, b, 1e-5)


def test_coinciding_points_have_a_gradient() -> None:
    """The square root of a distance of 0 would give NaN."""
    x = torch.ones(3, 2, requires_grad=True)
    y = torch.ones(4, 2)
    (gradient,) = torch.autograd.grad(uf.mmd(x, y), x)
    assert_same_bits(gradient, torch.zeros(3, 2))


def test_errors_of_mmd() -> None:
    x, y = torch.randn(3, 2), torch.randn(4, 2)
    assert_refused(lambda: uf.mmd(x, y, kernel="linear"), ValueError, "kernel: got 'linear'")
    assert_refused(lambda: uf.mmd(x, y, scales=()), ValueError, "scales: got 0 of them, expected 1 to 16")
    assert_refused(lambda: uf.mmd(x, y, scales=[1.0] * 17), ValueError, "scales: got 17 of them, expected 1 to 16")
    assert_refused(lambda: uf.mmd(x, y, scales=(0.0,)), ValueError, r"scales\[0\]: got 0.0, expected a number > 0")
    assert_refused(
        lambda: uf.mmd(x[0], y), ValueError, r"got shapes \(2,\) and \(4, 2\), expected \[N, D\] and \[M, D\]"
    )
    assert_refused(lambda: uf.mmd(x, y[:, :1]), ValueError, r"got shapes \(3, 2\) and \(4, 1\)")
    assert_refused(lambda: uf.mmd(x[:1], y), ValueError, "unbiased: got True with 1 points x and 4 points y")
    assert_refused(lambda: uf.mmd(x, y.int()), TypeError, "y: expected a floating-point tensor, got torch.int32")
    assert uf.mmd(x[:1], y, unbiased=False).isfinite()
