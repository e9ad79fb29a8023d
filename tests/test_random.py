"""The noise: Philox4x32-10 and Box-Muller, the same for every dtype, layout and kernel."""

import math

import numpy as np
import pytest
import torch
from cases.base import noise, philox4x32
from helpers import LOW_PRECISION, OPS, assert_close, assert_same_bits, sliced, transposed
from torch import Tensor

import unigen_fast as uf
from unigen_fast.reference.random import philox

# Salmon et al. (2011), Random123's kat_vectors: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# (seed, offset), as signed 64-bit numbers: every half of both is seen to be used
STATES = [(0, 0), (1, 0), (0, 1), (-1, -1), (2**40 + 7, 2**33 + 5), (-(2**63), 2**63 - 1), (2**31, 2**31), (-2, 3)]


def standard(rng_state: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The op's own noise: mean 0, standard deviation 1."""
    zero, one = torch.zeros(shape, dtype=dtype, device=device), torch.ones(shape, dtype=dtype, device=device)
    return OPS["sample_gaussian"]((zero, one, rng_state), -1, 0, "std", -math.inf, math.inf)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    """The tests' own generator, against which everything else here is held."""
    assert philox4x32(np.array([counter]), key)[0].tolist() == list(expected)


@pytest.mark.parametrize("state", STATES, ids=str)
def test_words_of_the_reference(state: tuple[int, int]) -> None:
    seed, offset = (v % 2**64 for v in state)
    blocks = 70
    counter = np.array([(i, 0, offset % 2**32, offset >> 32) for i in range(blocks)])
    expected = philox4x32(counter, (seed % 2**32, seed >> 32))
    assert philox(torch.tensor(state), blocks).tolist() == expected.tolist()
    if state == (0, 0):
        assert philox(torch.tensor(state), 1)[0].tolist() == list(KNOWN[0][2])


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 127, 1000, 5000])
def test_normals_of_every_kernel(n: int, state: tuple[int, int], device: torch.device) -> None:
    """Of the kernels as of the reference, whatever the length: the last block is cut short."""
    rng_state = torch.tensor(state, device=device)
    expected = noise(rng_state, (3, n))
    assert_close(standard(rng_state, (3, n), torch.float64, device), expected.to(device), 1e-12)
    single = standard(rng_state, (3, n), torch.float32, device)
    assert ((single.cpu() - expected).abs() < 4e-6).all()


def test_drawn_again_in_backward(device: torch.device) -> None:
    """The gradient with respect to the standard deviation is the noise itself."""
    for n in (1, 5, 16, 33, 1000):
        for dtype in (torch.float64, torch.float32):
            m = torch.zeros(4, n, dtype=dtype, device=device)
            s = torch.ones(4, n, dtype=dtype, device=device, requires_grad=True)
            z = uf.sample_gaussian(m, s, spread="std")
            assert_same_bits(torch.autograd.grad(z.sum(), s)[0], z.detach())
            z, _ = uf.sample_gaussian_with_kl(m, s, spread="std", num_samples=3, sample_dim=1)
            assert_close(torch.autograd.grad(z.sum(), s)[0], z.detach().sum(1), 1e-6)


def test_moments_and_distribution(device: torch.device) -> None:
    """Mean, variance, skewness, kurtosis, and Kolmogorov-Smirnov's distance to the normal, of 2^18 numbers."""
    n = 2**18
    torch.manual_seed(11)
    z = uf.sample_gaussian(torch.zeros(n, device=device), torch.zeros(n, device=device)).double().cpu()
    # five standard errors: sqrt of 1/n, 2/n, 15/n and 96/n
    assert abs(z.mean()) < 5 * n**-0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    uniform = torch.special.ndtr(z.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((uniform - steps[:-1]).abs().max(), (uniform - steps[1:]).abs().max())
    assert distance < 1.95 * n**-0.5  # 0.1 % of true normals lie farther
    assert 4.2 < z.abs().max() <= math.sqrt(48 * math.log(2)) + 1e-5


def test_no_correlation_between_neighbours_or_calls(device: torch.device) -> None:
    n = 2**16
    zero = torch.zeros(n, device=device)
    a, b = (uf.sample_gaussian(zero, zero).double() for _ in range(2))
    for lag in (1, 2, 3, 4, 64):
        assert abs((a[lag:] * a[:-lag]).mean()) < 5 * n**-0.5
    assert abs((a * b).mean()) < 5 * n**-0.5
    assert a.unique().numel() > 0.99 * n


@pytest.mark.parametrize("shape", [(4, 5), (33, 17), (2, 3, 4, 5), (700,)], ids=str)
def test_same_noise_for_every_dtype_and_layout(shape: tuple[int, ...], device: torch.device) -> None:
    def draw(dtype: torch.dtype, layout=lambda x: x) -> Tensor:
        torch.manual_seed(21)
        m = layout(torch.zeros(shape)).to(dtype) if device.type != "cpu" else layout(torch.zeros(shape, dtype=dtype))
        return uf.sample_gaussian(m.to(device), torch.zeros_like(m).to(device))

    expected = draw(torch.float64)
    assert_close(draw(torch.float32), expected, 4e-6)
    for dtype in LOW_PRECISION:
        assert_close(draw(dtype), expected, torch.finfo(dtype).eps)
    for dtype in (torch.float64, torch.float32, *LOW_PRECISION):
        for layout in (sliced, transposed):
            assert_same_bits(draw(dtype, layout), draw(dtype))


def test_noise_depends_on_the_order_of_elements_alone(device: torch.device) -> None:
    """[4, 6] and [24] draw the same numbers; more samples begin with those of fewer."""

    def draw(shape: tuple[int, ...], **options: int) -> Tensor:
        torch.manual_seed(2)
        zero = torch.zeros(shape, dtype=torch.float64, device=device)
        return uf.sample_gaussian(zero, zero, **options)

    flat = draw((24,))
    assert_same_bits(draw((4, 6)).flatten(), flat)
    assert_same_bits(draw((6,), num_samples=4), flat.reshape(4, 6))
    assert_same_bits(draw((24,), num_samples=1)[0], flat)
    assert_same_bits(draw((4, 6), num_samples=1, sample_dim=1).squeeze(1), flat.reshape(4, 6))
    assert_same_bits(draw((4,), num_samples=6, sample_dim=1), flat.reshape(4, 6))
    assert_same_bits(draw((24,), num_samples=5)[:2], draw((24,), num_samples=2))


def test_manual_seed_governs(device: torch.device) -> None:
    zero = torch.zeros(50, device=device)
    torch.manual_seed(5)
    first, second = uf.sample_gaussian(zero, zero), uf.sample_gaussian(zero, zero)
    torch.manual_seed(5)
    again, _ = uf.sample_gaussian_with_kl(zero, zero)
    assert_same_bits(first, again)
    assert_same_bits(second, uf.sample_gaussian(zero, zero))
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(first, uf.sample_gaussian(zero, zero))


def test_generator(device: torch.device) -> None:
    """It alone governs, and moves on; the default generator is left where it was."""
    zero = torch.zeros(50, device=device)
    before = torch.get_rng_state()
    generator = torch.Generator(device).manual_seed(5)
    first, second = (uf.sample_gaussian(zero, zero, generator=generator) for _ in range(2))
    assert device.type != "cpu" or torch.equal(torch.get_rng_state(), before)
    generator.manual_seed(5)
    assert_same_bits(first, uf.sample_gaussian_with_kl(zero, zero, generator=generator)[0])
    assert_same_bits(second, uf.sample_gaussian(zero, zero, generator=generator))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert_same_bits(first, uf.sample_gaussian(zero, zero))


def test_state_of_the_generator_can_be_restored(device: torch.device) -> None:
    zero = torch.zeros(9, device=device)
    with torch.random.fork_rng():
        first = uf.sample_gaussian(zero, zero)
    assert_same_bits(first, uf.sample_gaussian(zero, zero))
