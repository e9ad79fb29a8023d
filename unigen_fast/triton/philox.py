"""The noise of `reference/random.py`, drawn in a kernel: element i takes word i % 4 of the Philox block i // 4."""

import triton
import triton.language as tl

from unigen_fast.triton._rows import _TAYLOR


@triton.jit
def words(block, rng_state):
    """The four words of int64 block numbers, under `rng_state`: a pointer to (seed, offset)."""
    seed = tl.load(rng_state)
    offset = tl.load(rng_state + 1)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, (offset & 0xFFFFFFFF).to(tl.uint32), (offset >> 32).to(tl.uint32))


@triton.jit
def _radius(word, DTYPE: tl.constexpr):
    uniform = ((word >> 8).to(tl.int32) + 1).to(DTYPE) * (2.0**-24)
    return tl.sqrt(-2 * tl.log(uniform))


@triton.jit
def _cos_sin(word, DTYPE: tl.constexpr):
    """Of 2 pi u. The nearest quarter turn is taken off exactly, in integers: at most pi / 4 is left for the series."""
    TERMS: tl.constexpr = 9 if DTYPE == tl.float64 else 5
    bits = (word >> 8).to(tl.int32)
    quarter = (bits + (1 << 21)) >> 22
    angle = (bits - (quarter << 22)).to(DTYPE) * (6.283185307179586 * 2.0**-24)
    square = -angle * angle
    cos = tl.full(angle.shape, _TAYLOR[2 * TERMS], DTYPE)
    sin = tl.full(angle.shape, 0.0, DTYPE)
    for n in tl.static_range(TERMS - 1, -1, -1):
        cos = cos * square + _TAYLOR[2 * n]
        sin = sin * square + _TAYLOR[2 * n + 1]
    sin *= angle
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    cos = tl.where(((quarter + 1) & 2) == 2, -cos, cos)
    sin = tl.where((quarter & 2) == 2, -sin, sin)
    return cos, sin


@triton.jit
def normal_at(index, rng_state, DTYPE: tl.constexpr):
    """The normals of int64 indices: a block for each of them."""
    w0, w1, w2, w3 = words(index >> 2, rng_state)
    second = (index & 2) == 2
    cos, sin = _cos_sin(tl.where(second, w3, w1), DTYPE)
    return _radius(tl.where(second, w2, w0), DTYPE) * tl.where((index & 1) == 1, sin, cos)


@triton.jit
def normal_of_blocks(block, rng_state, DTYPE: tl.constexpr):
    """The normals of whole blocks: [R, C] block numbers give [R, 4 C]."""
    w0, w1, w2, w3 = words(block, rng_state)
    near, far = _radius(w0, DTYPE), _radius(w2, DTYPE)
    cos0, sin0 = _cos_sin(w1, DTYPE)
    cos1, sin1 = _cos_sin(w3, DTYPE)
    pairs = tl.join(tl.join(near * cos0, far * cos1), tl.join(near * sin0, far * sin1))
    return pairs.reshape([block.shape[0], 4 * block.shape[1]])
